"""Computes the reward-shaped next-token loss in its most readable form (arXiv 2512.22955).

The paper treats the prediction of a token as an episode of one step. The policy is p = softmax(z), and the action is
the token. Cross-entropy then gives reward 1/p to the ground truth x, and 0 to every other token. The paper changes both
rewards:

    reward of x          (1/p_x)^((1 - p_x)^β)                          (Eq 11; β = 0: cross-entropy)
    reward of a != x     λ̃ if a is among the k most probable, else λ̂    (Eq 12)

The policy gradient is the sum of p_a r_a ∇log p_a over the whole vocabulary (Eq 13), where r_a is the reward of token
a. It is computed exactly, not from samples. It is minus the gradient of

    loss = - sg(w) log p_x - λ̃ Σ_{a in H} p_a - λ̂ Σ_{a in T} p_a        (nats)
    w    = p_x^(1 - (1 - p_x)^β)     form 'power', the paper's
    w    = (1 - p_x)^β               form 'product', which reads (1 - p_x)^β in Eq 11 as a factor, not an exponent

K is the set of the k most probable tokens. H (the head) is K without x. T (the tail) is all tokens outside K, without
x. sg stops the gradient, so no gradient flows through w. No gradient flows through the choice of K either. `head.py`
computes the same loss without ever holding all logits.

# V vocabulary  k size of K
"""
# Shapes "..." are the positions: any leading axes, the same for logits and targets.

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from betarank.objectives.family import FAMILY

# Replaces infinite log-odds, so that masked (-inf) logits give a huge loss instead of NaN.
MAX_MARGIN = 1e30


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['beta', 'lambda_head', 'lambda_tail'],
  meta_fields=['top_k', 'form', 'z_loss'],
)
@dataclasses.dataclass(frozen=True)
class RewardShaping:
  """The objective, as rewards of tokens. The default is plain cross-entropy.

  A RewardShaping is a pytree whose leaves are beta, lambda_head and lambda_tail. These three can therefore be traced
  values, which change on a schedule without a new compilation. Traced values aren't checked. A traced lambda always
  costs a top-k search, even while it is zero.

  Attributes:
    beta: β >= -1. Negative values sharpen the distribution (precision), positive values flatten it (diversity). Below
      -1 the weight diverges. In forms other than 'power' and 'product', beta is the form's own parameter; see
      `ObjectiveConfig.beta`.
    lambda_head: λ̃, the reward of a wrong token among the k most probable.
    lambda_tail: λ̂, the reward of every other wrong token.
    top_k: k, from 1 to the vocabulary size. Of equal logits, those with lower token ids come first, as in
      jax.lax.top_k.
    form: a name of `family.FAMILY`; 'power' is the paper's form.
    z_loss: z_loss · logsumexp(logits)^2 is added to the loss of every token.

  Raises:
    ValueError: a value is out of range. The message begins with the field's name.
  """

  beta: float | jax.Array = 0.0
  lambda_head: float | jax.Array = 0.0
  lambda_tail: float | jax.Array = 0.0
  top_k: int = 100
  form: str = 'power'
  z_loss: float = 0.0

  def __post_init__(self):
    check_parameters(self.form, self.beta, self.lambda_head, self.lambda_tail)
    if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 1:
      raise ValueError(f'top_k must be an integer >= 1, got {self.top_k!r}')
    check_number('z_loss', self.z_loss, at_least=0.0)

  @property
  def rewards_wrong_tokens(self):
    """True if the loss may need a top k. It doesn't if both lambdas are zero and known before tracing."""
    return not (is_zero(self.lambda_head) and is_zero(self.lambda_tail))

  @property
  def smoothing(self):
    """The factor ε of the label-smoothing term ε/V Σ_a -log p_a; 0 unless the form is 'label_smoothing'."""
    return self.beta if self.form == 'label_smoothing' else 0.0

  def positive(self, margin):
    """Returns (cost, weight) of the ground truth, float32 [...]. family.py explains both.

    margin: log(p/(1-p)) of the ground truth, float32 [...].
    """
    return FAMILY[self.form][0](margin, self.beta)

  def check_vocabulary(self, vocab):
    """Raises ValueError if top_k is larger than the vocabulary."""
    if self.top_k > vocab:
      raise ValueError(f'top_k must be <= the vocabulary size {vocab}, got {self.top_k}')


def shaped_loss(logits, targets, shaping):
  """Computes the loss at every position. This is the readable reference, which needs all logits in memory.

  Args:
    logits: [..., V] of any float type. The computation is in float32.
    targets: [...] integer token ids in [0, V). Any other id gives the loss NaN, but no error, because ids aren't known
      while tracing.
    shaping: a RewardShaping.

  Returns:
    [...] float32, nats. Its gradient with respect to the logits is

      dloss/dz_j = w (p_j - 1[j=x]) - λ̃ p_j (1[j in H] - P_H) - λ̂ p_j (1[j in T] - P_T)

    plus the gradients of the label-smoothing and z-loss terms. p is the softmax, x the target, and w its weight (see
    the docstring of this module); λ̃ and λ̂ are shaping.lambda_head and lambda_tail. H (the head) is the top k without
    x, T (the tail) is all other tokens without x, and P_H and P_T are their probabilities. No gradient flows through w,
    through the choice of the top k, or into `shaping`.

  Raises:
    ValueError: a shape or type is wrong, or top_k exceeds V while a lambda needs the top k.
  """
  check_shapes(logits.shape[:-1], 'logits', targets)
  vocab = logits.shape[-1]
  # Before stop_gradient, which under jit turns all numbers into traced values.
  with_top_k, with_smoothing = shaping.rewards_wrong_tokens, not is_zero(shaping.smoothing)
  shaping = jax.lax.stop_gradient(shaping)

  logits = jnp.maximum(logits.astype(jnp.float32), jnp.finfo(jnp.float32).min)  # -inf masks become finite
  in_top_k = None
  if with_top_k:
    shaping.check_vocabulary(vocab)
    in_top_k = top_k_mask(logits, shaping.top_k)  # before the subtraction below, which can make two logits equal
  # Subtracting the largest logit preserves small differences between large logits.
  largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
  logits = logits - largest
  is_target = jax.nn.one_hot(targets, vocab, dtype=bool)

  target_logit = jnp.sum(logits, -1, where=is_target)
  margin = target_logit - jax.nn.logsumexp(jnp.where(is_target, -jnp.inf, logits), -1)
  margin = finite_margin(margin)
  nll = jax.nn.softplus(-margin)  # -log p of the target
  cost, weight = jax.lax.stop_gradient(shaping.positive(margin))
  loss = cost + weight * (nll - jax.lax.stop_gradient(nll))  # the value of `cost`, the gradient of -sg(w) log p

  if with_top_k:
    probs = jax.nn.softmax(logits, -1)
    head_mass = jnp.sum(probs, -1, where=in_top_k & ~is_target)
    tail_mass = jnp.sum(probs, -1, where=~in_top_k & ~is_target)
    loss -= shaping.lambda_head * head_mass + shaping.lambda_tail * tail_mass
  if with_smoothing:
    loss += shaping.smoothing * (jax.nn.logsumexp(logits, -1) - logits.mean(-1))
  if shaping.z_loss:
    loss += shaping.z_loss * (jax.nn.logsumexp(logits, -1) + largest[..., 0]) ** 2
  return jnp.where((targets >= 0) & (targets < vocab), loss, jnp.nan)


def top_k_mask(logits, k):
  """Returns a bool mask [..., V] of the k most probable tokens. Ties go to the lower id, as in jax.lax.top_k."""
  logits = jnp.where(logits == 0, 0, logits)  # makes -0.0 equal to 0.0
  _, index = jax.lax.top_k(logits, k)
  return jnp.put_along_axis(jnp.zeros(logits.shape, bool), index, True, axis=-1, inplace=False)


def finite_margin(margin):
  """Returns the margin with infinities replaced by MAX_MARGIN of the same sign."""
  return jnp.where(jnp.isinf(margin), jnp.sign(margin) * MAX_MARGIN, margin)


def is_zero(value):
  """Returns True if `value` is zero and known before tracing. The term that it multiplies can then be left out."""
  return not isinstance(value, jax.Array) and value == 0


def check_parameters(form, beta, lambda_head, lambda_tail, suffix=''):
  """Raises ValueError if a parameter of an objective is out of range.

  suffix: what the message appends to the field's name, such as '_from'.
  """
  if form not in FAMILY:
    raise ValueError(f'form must be one of {", ".join(FAMILY)}, got {form!r}')
  _, low, high = FAMILY[form]
  check_number(f'beta{suffix}', beta, at_least=low)
  if isinstance(beta, int | float) and beta > high:
    raise ValueError(f'beta{suffix} must be <= {high:g} for {form}, got {beta}')
  check_number(f'lambda_head{suffix}', lambda_head)
  check_number(f'lambda_tail{suffix}', lambda_tail)


def check_number(name, value, *, at_least=-math.inf):
  """Raises ValueError unless `value` is a finite number of at least `at_least`. None, bools and strings aren't numbers.

  Arrays and traced values aren't checked.
  """
  if isinstance(value, bool | str) or value is None:
    raise ValueError(f'{name} must be a number, got {value!r}')
  if isinstance(value, int | float) and not (math.isfinite(value) and value >= at_least):
    wanted = 'finite' if at_least == -math.inf or not math.isfinite(value) else f'>= {at_least:g}'
    raise ValueError(f'{name} must be {wanted}, got {value}')


def check_shapes(leading, name, targets):
  """Raises ValueError if targets aren't integers of the shape `leading`.

  leading: the shape of the hidden states or logits, without its last dimension.
  name: 'hidden' or 'logits', for the message.
  """
  if not jnp.issubdtype(targets.dtype, jnp.integer):
    raise ValueError(f'targets must be integer token ids, got {targets.dtype}')
  if targets.shape != leading:
    raise ValueError(
      f'targets must have the shape of {name} without its last axis, {leading}, got {targets.shape}')
