"""The paper's objective among its relatives, in one frame, and as a config section with schedules.

A relative is one function of the target's margin m = log p/(1-p), float32 [...]. It returns (cost, weight):
the loss in nats, and -dcost/dlog p, what cross-entropy's gradient is multiplied by; neither has a gradient of
its own. Rewards of wrong tokens (lambda_head, lambda_tail) combine with every one. A new objective is such a
function and a line in FAMILY; the chunked head and the reference then know it.

In this module `knob` stands for the one number each has: β, γ, α, N or ε.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from betarank.objectives.reward_shaping import RewardShaping, check_number, check_top_k, power_weight, product_weight

softplus = jax.nn.softplus  # -log p = softplus(-m), -log(1-p) = softplus(m)


def cross_entropy(margin, _=None):
  """-log p."""
  return softplus(-margin), jnp.ones_like(margin)


def power(margin, beta):
  """-sg(w) log p, w = p^(1-(1-p)^β): arXiv 2512.22955, Eq 11. Cross-entropy at β = 0."""
  weight = power_weight(margin, beta)
  return weight * softplus(-margin), weight


def product(margin, beta):
  """-sg((1-p)^β) log p, focal loss with a fixed weight. Cross-entropy at β = 0."""
  weight = product_weight(margin, beta)
  return weight * softplus(-margin), weight


def label_smoothing(margin, epsilon):
  """-(1-ε) log p - ε/V Σ_a log p_a (Szegedy et al., arXiv 1512.00567). Cross-entropy at ε = 0.

  The first term only; the second is the smoothing that TokenObjective asks of the head.
  """
  return (1 - epsilon) * softplus(-margin), (1 - epsilon) * jnp.ones_like(margin)


def focal(margin, gamma):
  """-(1-p)^γ log p, differentiated through the weight (arXiv 1708.02002). Cross-entropy at γ = 0."""
  nll, scale = softplus(-margin), jnp.exp(-gamma * softplus(margin))
  near = jnp.minimum(margin, 15.0)  # beyond, -log p / (1-p) is 1 to the last digit and both underflow
  ratio = jnp.where(margin < 15, softplus(-margin) * jnp.exp(softplus(near)), 1.0)
  return scale * nll, scale * (1 + gamma * jnp.exp(-nll) * ratio)


def dft(margin, _=None):
  """-sg(p) log p, i.e. reward 1 (Dynamic Fine-Tuning, arXiv 2508.05629). The power form as β -> ∞."""
  p = jnp.exp(-softplus(-margin))
  return p * softplus(-margin), p


def likelihood_power(margin, alpha):
  """(1 - p^α)/α (Beyond Log Likelihood, arXiv 2510.00526). Cross-entropy at α = 0, -p at α = 1."""
  nll = softplus(-margin)
  return nll * _mean_decay(alpha * nll), jnp.exp(-alpha * nll)


def coverage(margin, n):
  """-log(1 - (1-p)^N), that one of N samples is right (arXiv 2502.07154). Cross-entropy at N = 1.

  Direct Coverage Optimization; weight = N (1-p)^(N-1) p / (1 - (1-p)^N).
  """
  far = margin < -15  # log(1-p) = -p = -exp(m) to the last digit, and would underflow
  miss = softplus(margin)  # -log(1-p)
  log_miss = jnp.where(far, margin, jnp.log(softplus(jnp.maximum(margin, -15.0))))
  p_over_miss = jnp.where(far, 1.0, jnp.exp(-softplus(-margin) - log_miss))
  y = n * miss
  decay = _mean_decay(y)
  many = -jnp.log1p(-jnp.exp(-jnp.maximum(y, 1.0)))
  few = -jnp.log(decay) - jnp.log(jnp.float32(n)) - log_miss
  return jnp.where(y > 1, many, few), p_over_miss * jnp.exp((1 - n) * miss) / decay


def _mean_decay(y):
  """(1 - exp(-y)) / y for y >= 0, 1 at 0."""
  return jnp.where(y > 0, -jnp.expm1(-y) / jnp.where(y > 0, y, 1.0), 1.0)


# name -> (function, smallest knob, largest knob)
FAMILY = {
  'power': (power, -1.0, math.inf),
  'product': (product, -1.0, math.inf),
  'cross_entropy': (cross_entropy, 0.0, 0.0),
  'label_smoothing': (label_smoothing, 0.0, 1.0),
  'focal': (focal, 0.0, math.inf),
  'dft': (dft, 0.0, 0.0),
  'likelihood_power': (likelihood_power, 0.0, math.inf),
  'coverage': (coverage, 1.0, math.inf),
}


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['knob', 'lambda_head', 'lambda_tail'],
  meta_fields=['name', 'top_k'],
)
@dataclasses.dataclass(frozen=True)
class TokenObjective:
  """Any member of FAMILY with any rewards for wrong tokens; goes wherever a RewardShaping goes."""

  name: str
  knob: float | jax.Array = 0.0
  lambda_head: float | jax.Array = 0.0
  lambda_tail: float | jax.Array = 0.0
  top_k: int = 100

  def __post_init__(self):
    if self.name not in FAMILY:
      raise ValueError(f'name must be one of {", ".join(FAMILY)}, got {self.name!r}')
    _, low, high = FAMILY[self.name]
    check_number('knob', self.knob, at_least=low)
    if isinstance(self.knob, int | float) and self.knob > high:
      raise ValueError(f'knob must be <= {high:g} for {self.name}, got {self.knob}')
    check_number('lambda_head', self.lambda_head)
    check_number('lambda_tail', self.lambda_tail)
    check_top_k(self.top_k)

  def positive(self, margin):
    return FAMILY[self.name][0](margin, self.knob)

  @property
  def smoothing(self):
    """ε of the term ε/V Σ_a -log p_a."""
    return self.knob if self.name == 'label_smoothing' else 0.0


SCHEDULES = ('constant', 'linear', 'step')


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """The config section `objective`; `at(step)` is what the loss functions take.

  Attributes:
    form: a name of FAMILY. 'power' is the paper's; all zero with it is plain cross-entropy, bit for bit.
    beta: the form's number: β of power and product, γ of focal, ε of label_smoothing, α of likelihood_power,
      N of coverage; cross_entropy and dft have none (0).
    lambda_head: λ̃, reward of wrong tokens among the top k.
    lambda_tail: λ̂, reward of all other wrong tokens.
    top_k: size of the head.
    schedule: constant; linear: from the three values `*_from` at step schedule_start to the above at
      schedule_end; step: `*_from` before schedule_start, the above from it on.
    beta_from, lambda_head_from, lambda_tail_from: what a schedule starts with.
    schedule_start, schedule_end: optimizer steps.
    z_loss: factor of logsumexp(logits)^2, to be passed to the head.

  Raises:
    ValueError: a value outside its range; the message starts with the field's name.
  """

  form: str = 'power'
  beta: float = 0.0
  lambda_head: float = 0.0
  lambda_tail: float = 0.0
  top_k: int = 100
  schedule: str = 'constant'
  beta_from: float = 0.0
  lambda_head_from: float = 0.0
  lambda_tail_from: float = 0.0
  schedule_start: int = 0
  schedule_end: int = 0
  z_loss: float = 0.0

  def __post_init__(self):
    if self.schedule not in SCHEDULES:
      raise ValueError(f'schedule must be one of {", ".join(SCHEDULES)}, got {self.schedule!r}')
    if self.schedule == 'linear' and self.schedule_end <= self.schedule_start:
      raise ValueError(
        f'schedule_end must be > schedule_start = {self.schedule_start}, got {self.schedule_end}')
    check_number('z_loss', self.z_loss, at_least=0.0)
    self._objective(self.beta, self.lambda_head, self.lambda_tail)
    if self.schedule != 'constant':
      try:
        self._objective(self.beta_from, self.lambda_head_from, self.lambda_tail_from)
      except ValueError as error:
        name, rest = str(error).split(' ', 1)
        raise ValueError(f'{name}_from {rest}') from None

  def at(self, step):
    """The objective at an optimizer step, int or traced int32 scalar.

    Only numbers that a schedule changes are traced, so that what stays zero still costs nothing.
    """
    return self._objective(*(
      self._value(step, getattr(self, f'{name}_from'), getattr(self, name))
      for name in ('beta', 'lambda_head', 'lambda_tail')
    ))

  def _value(self, step, start, end):
    if self.schedule == 'constant' or start == end:
      return end
    if self.schedule == 'step':
      return jnp.where(step >= self.schedule_start, end, start).astype(jnp.float32)
    done = (step - self.schedule_start) / (self.schedule_end - self.schedule_start)
    done = jnp.clip(jnp.asarray(done, jnp.float32), 0, 1)
    return (1 - done) * start + done * end  # exact at both ends

  def _objective(self, beta, lambda_head, lambda_tail):
    if self.form in ('power', 'product'):
      return RewardShaping(beta, lambda_head, lambda_tail, self.top_k, self.form)
    if self.form not in FAMILY:
      raise ValueError(f'form must be one of {", ".join(FAMILY)}, got {self.form!r}')
    try:
      return TokenObjective(self.form, beta, lambda_head, lambda_tail, self.top_k)
    except ValueError as error:
      raise ValueError(str(error).replace('knob', 'beta', 1)) from None
