"""The reward-shaped next-token loss, as plainly as it can be written (arXiv 2512.22955).

Predicting a token is read as an episode of one step: the policy is p = softmax(z), the action is the token.
Cross-entropy is the reward 1/p for the ground truth x and 0 for every other token. The paper changes both:

    reward of x          (1/p_x)^((1 - p_x)^β)                          (Eq 11; β = 0: cross-entropy)
    reward of a != x     λ̃ if a is among the k most probable, else λ̂    (Eq 12)

Summing p_a r_a ∇log p_a over the whole vocabulary (Eq 13, exactly, not by sampling) is the gradient of

    loss = - sg(w) log p_x - λ̃ Σ_{a in H} p_a - λ̂ Σ_{a in T} p_a        (nats)
    w    = p_x^(1 - (1 - p_x)^β)     form 'power', the paper's
    w    = (1 - p_x)^β               form 'product', a reading of Eq 11 that loses the nesting

with K the k most probable tokens, H = K without x (head), T = the rest without x (tail); w and K are held
fixed. `linear_head.py` computes the same without ever holding all logits.
"""
# V vocabulary  k size of the head
# Shapes "..." are the positions: any leading axes, the same for logits and targets.

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

FORMS = ('power', 'product')

# A margin this large leaves 1 - p below float32's resolution; the weight then goes by its limit form.
FAR_MARGIN = 20.0
# Stands for infinite log-odds, so that masked (-inf) logits give a huge loss and not NaN.
MAX_MARGIN = 1e30
# The product form for β < 0 grows without bound as p -> 1.
MAX_PRODUCT_WEIGHT = 30.0


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['beta', 'lambda_head', 'lambda_tail'],
  meta_fields=['top_k', 'form'],
)
@dataclasses.dataclass(frozen=True)
class RewardShaping:
  """The reward of each token. All zero is plain cross-entropy.

  A pytree whose leaves are beta, lambda_head and lambda_tail, so that a schedule can trace them; a traced
  value can't be checked, and its top-k can't be left out.

  Attributes:
    beta: β >= -1. Negative sharpens (precision), positive flattens (diversity). Below -1 the weight diverges.
    lambda_head: λ̃, reward of a wrong token among the k most probable.
    lambda_tail: λ̂, reward of every other wrong token.
    top_k: k >= 1, size of the head. Ties go to the lower token id, as in jax.lax.top_k.
    form: 'power' (the paper's exponent form) or 'product'.

  Raises:
    ValueError: a value outside its range; the message starts with the field's name.
  """

  beta: float | jax.Array = 0.0
  lambda_head: float | jax.Array = 0.0
  lambda_tail: float | jax.Array = 0.0
  top_k: int = 100
  form: str = 'power'

  smoothing: ClassVar[float] = 0.0  # see family.py

  def __post_init__(self):
    check_number('beta', self.beta, at_least=-1.0)
    check_number('lambda_head', self.lambda_head)
    check_number('lambda_tail', self.lambda_tail)
    check_top_k(self.top_k)
    if self.form not in FORMS:
      raise ValueError(f'form must be one of {", ".join(FORMS)}, got {self.form!r}')

  def positive(self, margin):
    """The ground truth's part: (cost, weight), see `shaped_loss`; margin = log p/(1-p), float32 [...]."""
    weight = (power_weight if self.form == 'power' else product_weight)(margin, self.beta)
    return weight * jax.nn.softplus(-margin), weight


def power_weight(margin, beta):
  """p^(1 - (1-p)^β) from the margin log p/(1-p); float32 [...], exact at both ends, 1 for β = 0.

  Written with p itself, 1 - p would round to zero from a margin of 17 on, and β < 0 would give inf or NaN.
  """
  near, far = jnp.minimum(margin, FAR_MARGIN), jnp.maximum(margin, FAR_MARGIN)
  log_p = -jax.nn.softplus(-near)
  log_1mp = -jax.nn.softplus(near)
  exponent_near = -log_p * jnp.expm1(beta * log_1mp)
  exponent_far = jnp.exp(-(1 + beta) * far) - jnp.exp(-far)  # log p = -exp(-margin) there
  return jnp.exp(jnp.where(margin < FAR_MARGIN, exponent_near, exponent_far))


def product_weight(margin, beta):
  """(1-p)^β from the margin log p/(1-p); float32 [...], capped at MAX_PRODUCT_WEIGHT."""
  log_weight = -beta * jax.nn.softplus(margin)
  return jnp.exp(jnp.minimum(log_weight, math.log(MAX_PRODUCT_WEIGHT)))


def shaped_loss(logits, targets, shaping):
  """The loss at every position; the readable reference, which needs all logits in memory.

  Args:
    logits: [..., V] any float type; computed on in float32.
    targets: [...] integer token ids in [0, V). One outside gives NaN, since it can't be refused here.
    shaping: a RewardShaping, or any objective of `family.py`.

  Returns:
    [...] float32, nats. Its gradient with respect to the logits is

      dloss/dz_j = w (p_j - 1[j=x]) - λ̃ p_j (1[j in H] - P_H) - λ̂ p_j (1[j in T] - P_T)

    No gradient flows through w, through the choice of K, or into the shaping's own numbers.

  Raises:
    ValueError: shapes or types that don't fit.
  """
  check_shapes(logits.shape[:-1], 'logits', targets)
  vocab = logits.shape[-1]
  shaping = jax.lax.stop_gradient(shaping)

  logits = jnp.maximum(logits.astype(jnp.float32), jnp.finfo(jnp.float32).min)  # -inf masks become finite
  in_top_k = top_k_mask(logits, shaping.top_k)  # before the next line, which can make neighbours equal
  # Relative to the largest, so that large logits don't lose the digits the loss is made of.
  logits = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
  is_target = targets[..., None] == jnp.arange(vocab)

  target_logit = jnp.sum(logits, -1, where=is_target)
  margin = target_logit - jax.nn.logsumexp(jnp.where(is_target, -jnp.inf, logits), -1)
  margin = finite_margin(margin)
  nll = jax.nn.softplus(-margin)  # -log p of the target
  cost, weight = jax.lax.stop_gradient(shaping.positive(margin))
  loss = cost + weight * (nll - jax.lax.stop_gradient(nll))  # worth `cost`, with the gradient of -sg(w) log p

  if not (is_zero(shaping.lambda_head) and is_zero(shaping.lambda_tail)):
    probs = jax.nn.softmax(logits, -1)
    head_mass = jnp.sum(probs, -1, where=in_top_k & ~is_target)
    tail_mass = jnp.sum(probs, -1, where=~in_top_k & ~is_target)
    loss -= shaping.lambda_head * head_mass + shaping.lambda_tail * tail_mass

  if not is_zero(shaping.smoothing):
    loss += shaping.smoothing * (jax.nn.logsumexp(logits, -1) - logits.mean(-1))
  return jnp.where((targets >= 0) & (targets < vocab), loss, jnp.nan)


def top_k_mask(logits, k):
  """[..., V] bool: the k most probable tokens, ties to the lower id as in jax.lax.top_k; all if k >= V."""
  logits = jnp.where(logits == 0, 0, logits)  # -0.0 ties with 0.0
  _, index = jax.lax.top_k(logits, min(k, logits.shape[-1]))
  return jnp.put_along_axis(jnp.zeros(logits.shape, bool), index, True, axis=-1, inplace=False)


def finite_margin(margin):
  return jnp.where(jnp.isinf(margin), jnp.sign(margin) * MAX_MARGIN, margin)


def is_zero(value):
  """Whether a number is known to be zero before anything is traced, so that its work can be left out."""
  return not isinstance(value, jax.Array) and value == 0


def check_number(name, value, *, at_least=-math.inf):
  """Refuses a Python number that isn't finite or is too small; traced values and arrays pass."""
  if isinstance(value, bool | str) or value is None:
    raise ValueError(f'{name} must be a number, got {value!r}')
  if isinstance(value, int | float) and not (math.isfinite(value) and value >= at_least):
    wanted = 'finite' if at_least == -math.inf or not math.isfinite(value) else f'>= {at_least:g}'
    raise ValueError(f'{name} must be {wanted}, got {value}')


def check_top_k(top_k):
  if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
    raise ValueError(f'top_k must be an integer >= 1, got {top_k!r}')


def check_shapes(leading, name, targets):
  """Refuses targets that aren't integers, or not of the shape `leading` that the argument `name` leaves."""
  if not jnp.issubdtype(targets.dtype, jnp.integer):
    raise ValueError(f'targets must be integer token ids, got {targets.dtype}')
  if targets.shape != leading:
    raise ValueError(
      f'targets must have the shape of {name} without its last axis, {leading}, got {targets.shape}')
