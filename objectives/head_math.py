"""Computes loss, statistics and gradient from one chunk's logits.

For every objective, the gradient of a token's loss with respect to its logits z has the form

    dloss/dz_j = uniform + target           if j = x, the id of the target
                 uniform + head_rate e_j    if j is among the top k, and not x
                 uniform + tail_rate e_j    for all other j

Here e_j = exp(z_j - max_i z_i). Each token has its own numbers `uniform`, `target`, `head_rate` and `tail_rate` (see
Coefficients). `uniform` is 0 unless labels are smoothed. A first pass over the chunk's logits computes a few sums per
token. `score` turns these sums into the loss, the statistics and the Coefficients. A second pass over the logits writes
the gradient.

Sums of exponentials run over the wrong tokens only. With the margin m = z_x - logsumexp_{j != x} z_j,
log p = -softplus(-m) and log(1-p) = -softplus(m) are accurate even if p is close to 0 or 1.

In all functions, options is an Options, h_CD are hidden states, head_DV are the head's weights, z_CV are logits, and
x_C are the ids of the targets.

# C tokens of a chunk  D width  V vocabulary (of this device)  K top k
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from betarank.objectives import collectives
from betarank.objectives.kernels import row_sums_triton
from betarank.objectives.reward_shaping import finite_margin
from betarank.objectives.top_k import find_head

MAX_ADDED = 2**24  # on a CPU, so many elements of the head's gradient are added to at once: 64 MiB


def pytree(cls):
  """Makes `cls` a frozen dataclass that is also a JAX pytree."""
  return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@pytree
class TokenStats:
  """The model's prediction at each position. Fields have the shape of the targets. No gradient flows through them.

  The fields describe the distribution that the loss uses, after soft cap and temperature. Where the weight is zero, all
  fields are 0 except target_valid, which is True.

  Attributes:
    target_logp: float32, the log-probability of the target, in nats.
    entropy: float32, the exact entropy of the whole distribution, in nats.
    target_rank: int32, the number of tokens ordered before the target: those that are more probable, or equally
      probable with a lower id, as in jax.lax.top_k. The target is among the top k if target_rank < k.
    head_mass: float32, the probability of the top k without the target; None if the top k wasn't computed.
    tail_mass: float32, the probability of all tokens outside the top k, without the target; None if the top k wasn't
      computed. It is computed as a sum over these tokens, which is more accurate than 1 minus the other probabilities.
    target_valid: bool, False where the weight is nonzero and the target is outside the vocabulary.
  """

  target_logp: jax.Array
  entropy: jax.Array
  target_rank: jax.Array
  head_mass: jax.Array | None
  tail_mass: jax.Array | None
  target_valid: jax.Array


@pytree
class Coefficients:
  """Numbers from which `logit_gradient` computes the gradient of each token's loss, given the logits.

  This module's docstring has the formula. Fields have the shape of the targets. They are float32 except last_id.

  Attributes:
    shift: the largest logit.
    target, tail_rate, head_rate: the numbers with these names in the formula. If head_rate is None, no top k is needed,
      and tail_rate applies to all wrong tokens.
    threshold: the k-th largest logit; None without a top k.
    last_id: int32. Logits equal to the threshold are in the top k if their id is at most last_id. None without a top k.
    uniform: the number with this name in the formula; None without label smoothing.
  """

  shift: jax.Array
  target: jax.Array
  tail_rate: jax.Array
  head_rate: jax.Array | None
  threshold: jax.Array | None
  last_id: jax.Array | None
  uniform: jax.Array | None

  def times(self, factor):
    """Returns the Coefficients of a loss that is `factor` [...] times this loss."""
    scaled = {f: getattr(self, f) for f in ('target', 'tail_rate', 'head_rate', 'uniform')}
    return dataclasses.replace(self, **{f: v * factor for f, v in scaled.items() if v is not None})


@dataclasses.dataclass(frozen=True)
class Options:
  """The arguments of `shaped_linear_loss` that are known before tracing, and values that follow from them."""

  with_top_k: bool
  with_smoothing: bool
  vocab_size: int
  chunk_tokens: int | None
  soft_cap: float | None
  temperature: float
  compute_dtype: jnp.dtype
  layout: collectives.Layout | None


def linear_logits(hidden_CD, head_DV, *, soft_cap=None, temperature=1.0, compute_dtype=None):
  """Returns float32 logits [C, V] of C tokens. The losses and statistics of this package use exactly these logits.

  Args:
    hidden_CD: float [C, D].
    head_DV: float [D, V].
    soft_cap: if given, logits become soft_cap * tanh(logits / soft_cap).
    temperature: divides the logits, after the cap.
    compute_dtype: the dtype of the matrix product's inputs; None means the dtype of hidden_CD. The product accumulates
      in float32.
  """
  with jax.named_scope('head/logits'):
    z_CV = isolate_on_cpu(matmul(compute_dtype or hidden_CD.dtype, 'CD,DV->CV', hidden_CD, head_DV))
    if soft_cap is not None:
      z_CV = soft_cap * jnp.tanh(z_CV / soft_cap)
    return z_CV if temperature == 1 else z_CV / temperature


def matmul(dtype, subscripts, a, b):
  """Returns jnp.einsum(subscripts, a, b) in float32. a and b are first cast to `dtype`. Sums are float32.

  If `dtype` is float32, the product is a true float32 product, even on a TPU.
  """
  return jnp.einsum(
    subscripts, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32,
    precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None)


def isolate_on_cpu(array):
  """Returns `array` unchanged. On a CPU, the result is behind an optimization barrier.

  Without the barrier, XLA's CPU backend fuses the computation of `array` into a matrix product that uses it, which
  makes the product many times slower.
  """
  return lax.platform_dependent(array, cpu=lax.optimization_barrier, default=lambda a: a)


def chunk_logits(options, h_CD, head_DV):
  """Returns the chunk's float32 logits [C, V]."""
  return linear_logits(h_CD, head_DV, soft_cap=options.soft_cap, temperature=options.temperature,
                       compute_dtype=options.compute_dtype)


@jax.named_scope('head/loss')
def score(options, z_CV, x_C, weight_C, shaping):
  """Computes loss, statistics and gradient coefficients from a chunk's logits: (loss_C, TokenStats, Coefficients).

  z_CV: float32 logits.
  x_C: int32 targets.
  weight_C: float32, the factors of the losses.
  """
  id_1V = _ids(options, z_CV)
  target_C, shift_C, sums = _row_sums(options, z_CV, x_C)
  if options.with_top_k:
    wanted_C = jnp.where(weight_C != 0, x_C, -1)
    threshold_C, last_id_C, head_sum_C = find_head(
      options.layout, z_CV, wanted_C, target_C, shift_C, shaping.top_k)
    e_CV = _wrong_exp(z_CV, shift_C, id_1V == x_C[:, None])
    sums['tail'] = jnp.sum(e_CV, -1, where=~_in_head(z_CV, id_1V, threshold_C, last_id_C))
  if options.with_smoothing:
    sums['logits'] = jnp.sum(z_CV - shift_C[:, None], -1)
  sums = dict(zip(sums, collectives.sum_over_vocab(options.layout, jnp.stack(list(sums.values())))))

  live_C = weight_C != 0
  valid_C = (x_C >= 0) & (x_C < options.vocab_size)
  target_C = jnp.where(valid_C, target_C, 0.0)  # -inf would make the margin below NaN

  wrong_C = jnp.maximum(sums['wrong'], jnp.finfo(jnp.float32).tiny)  # for margins above 87 all terms underflow
  log_wrong_C = jnp.log(wrong_C)
  margin_C = finite_margin(target_C - shift_C - log_wrong_C)
  nll_C = jax.nn.softplus(-margin_C)
  p_C, miss_C = jnp.exp(-nll_C), jnp.exp(-jax.nn.softplus(margin_C))  # p and 1 - p of the target
  prob_C = miss_C / wrong_C  # the probability of a wrong token j is prob · e_j
  wrong_entropy_C = log_wrong_C - sums['energy'] / wrong_C
  entropy_C = p_C * nll_C + miss_C * (jax.nn.softplus(margin_C) + wrong_entropy_C)

  loss_C, w_C = shaping.positive(margin_C)
  target, tail, head, uniform = -w_C * miss_C, w_C, w_C, None
  head_mass_C = tail_mass_C = None
  if options.with_top_k:
    head_mass_C, tail_mass_C = prob_C * head_sum_C, prob_C * sums['tail']
    reward_C = shaping.lambda_head * head_mass_C + shaping.lambda_tail * tail_mass_C
    loss_C -= reward_C
    target += p_C * reward_C
    # 1 - P_H is computed as the sum of all other probabilities, which is more accurate; likewise 1 - P_T.
    head = w_C - shaping.lambda_head * (p_C + tail_mass_C) + shaping.lambda_tail * tail_mass_C
    tail = w_C + shaping.lambda_head * head_mass_C - shaping.lambda_tail * (p_C + head_mass_C)
  every_C = 0.0  # every_C p_j is added to the gradient of every logit j, including the target's
  if options.with_smoothing:
    log_sum_C = log_wrong_C + jax.nn.softplus(margin_C)  # logsumexp of all logits, minus the shift
    loss_C += shaping.smoothing * (log_sum_C - sums['logits'] / options.vocab_size)
    every_C += shaping.smoothing
    uniform = jnp.full_like(p_C, 1.0) * -shaping.smoothing / options.vocab_size
  if shaping.z_loss:
    lse_C = shift_C + log_wrong_C + jax.nn.softplus(margin_C)
    loss_C += shaping.z_loss * lse_C**2
    every_C += 2 * shaping.z_loss * lse_C

  stats = TokenStats(-nll_C, entropy_C, sums['rank'].astype(jnp.int32), head_mass_C, tail_mass_C, valid_C)
  stats = jax.tree.map(lambda s: jnp.where(live_C & valid_C, s, 0), stats)
  stats = dataclasses.replace(stats, target_valid=valid_C | ~live_C)
  loss_C = jnp.where(live_C, weight_C * jnp.where(valid_C, loss_C, jnp.nan), 0.0)
  coefficients = Coefficients(
    shift=shift_C,
    target=target + p_C * every_C,
    tail_rate=prob_C * (tail + every_C),
    head_rate=prob_C * (head + every_C) if options.with_top_k else None,
    threshold=threshold_C if options.with_top_k else None,
    last_id=last_id_C if options.with_top_k else None,
    uniform=uniform,
  )
  return loss_C, stats, coefficients.times(jnp.where(live_C & valid_C, weight_C, 0.0))


def _row_sums(options, z_CV, x_C):
  """Returns (target_C, shift_C, sums) for each token.

  target_C is the target's logit, and shift_C the largest logit of the whole vocabulary. sums is a dictionary with this
  device's part of three sums over the wrong tokens j, where e_j = exp(z_j - shift):

    wrong   Σ e_j
    energy  Σ e_j log e_j
    rank    the number of tokens that are ordered before the target
  """
  forms = {'default': _row_sums_xla} | ({'cuda': _row_sums_triton} if row_sums_triton.fits(z_CV.shape[1]) else {})
  forms = {platform: functools.partial(form, options) for platform, form in forms.items()}
  target_C, shift_C, *sums = lax.platform_dependent(z_CV, x_C, **forms)
  return target_C, shift_C, dict(zip(('wrong', 'energy', 'rank'), sums))


def _row_sums_xla(options, z_CV, x_C):
  id_1V = _ids(options, z_CV)
  is_target = id_1V == x_C[:, None]
  target_C, shift_C = collectives.max_over_vocab(
    options.layout, jnp.stack([jnp.max(z_CV, -1, where=is_target, initial=-jnp.inf), z_CV.max(-1)]))
  e_CV = _wrong_exp(z_CV, shift_C, is_target)
  before = (z_CV > target_C[:, None]) | ((z_CV == target_C[:, None]) & (id_1V < x_C[:, None]))
  energy_C = jnp.vecdot(e_CV, z_CV - shift_C[:, None], precision=lax.Precision.HIGHEST)
  return target_C, shift_C, e_CV.sum(-1), energy_C, before.sum(-1, dtype=jnp.float32)


def _row_sums_triton(options, z_CV, x_C, interpret=False):
  """Computes the same as `_row_sums_xla`, in one pass over the logits.

  The kernel's sums are relative to the largest logit of this device. They are rescaled when the largest logit of all
  devices is known.

  interpret: runs the kernel on any device, slowly.
  """
  local_C = x_C - collectives.vocab_offset(options.layout, z_CV.shape[1])
  target_C = jnp.take_along_axis(z_CV, local_C[:, None], 1, mode='clip')[:, 0]
  target_C = jnp.where((local_C >= 0) & (local_C < z_CV.shape[1]), target_C, -jnp.inf)
  target_C = collectives.max_over_vocab(options.layout, target_C)
  local_shift_C, wrong_C, energy_C, rank_C = row_sums_triton.row_sums(z_CV, local_C, target_C, interpret)
  shift_C = collectives.max_over_vocab(options.layout, local_shift_C)
  below_C = local_shift_C - shift_C
  factor_C = jnp.exp(below_C)
  return target_C, shift_C, factor_C * wrong_C, factor_C * (energy_C + below_C * wrong_C), rank_C


def logit_gradient(options, z_CV, x_C, coefficients):
  """Returns the gradient of the loss with respect to the product hidden @ head, float32 [C, V].

  The gradient includes the derivatives of the soft cap and of the division by the temperature.
  """
  id_1V = _ids(options, z_CV)
  is_target = id_1V == x_C[:, None]
  c = coefficients
  rate = c.tail_rate[:, None]
  if options.with_top_k:
    rate = jnp.where(_in_head(z_CV, id_1V, c.threshold, c.last_id), c.head_rate[:, None], rate)
  dz_CV = jnp.where(is_target, c.target[:, None], rate * _wrong_exp(z_CV, c.shift, is_target))
  if options.with_smoothing:
    dz_CV += c.uniform[:, None]
  if options.soft_cap is not None:
    dz_CV *= 1 - (z_CV * (options.temperature / options.soft_cap)) ** 2
  return isolate_on_cpu(dz_CV if options.temperature == 1 else dz_CV / options.temperature)


@jax.named_scope('head/gradient')
def gradients(options, h_CD, head_DV, z_CV, x_C, coefficients, dhead_DV):
  """Returns (dhidden_CD, dhead_DV), the gradients of the hidden states and of the head's weights, both float32.

  dhidden_CD is summed over this device's part of the vocabulary only. The returned dhead_DV is the argument dhead_DV
  plus this chunk's gradient.
  """
  dtype = options.compute_dtype
  dz_CV = logit_gradient(options, z_CV, x_C, coefficients)
  dh_CD = matmul(dtype, 'CV,DV->CD', dz_CV, head_DV)

  def add(h_DC, dz_CV, dhead_DV):
    return dhead_DV + matmul(dtype, 'DC,CV->DV', h_DC, dz_CV)

  def add_by_rows(h_DC, dz_CV, dhead_DV):
    # XLA's CPU backend can't add a matrix product in place, so it would hold a large dhead twice.
    width, vocab = dhead_DV.shape
    rows = max(r for r in range(1, width + 1) if width % r == 0 and (r == 1 or r * vocab <= MAX_ADDED))
    part = lambda array, i: lax.dynamic_slice_in_dim(array, i * rows, rows)
    body = lambda i, dhead: lax.dynamic_update_slice_in_dim(
      dhead, add(part(h_DC, i), dz_CV, part(dhead, i)), i * rows, 0)
    return lax.fori_loop(0, width // rows, body, dhead_DV)

  dhead_DV = lax.platform_dependent(isolate_on_cpu(h_CD.T), dz_CV, dhead_DV, cpu=add_by_rows, default=add)
  return dh_CD, dhead_DV


def _ids(options, z_CV):
  """Returns the token ids [1, V] of this device's part of the vocabulary."""
  return collectives.vocab_offset(options.layout, z_CV.shape[1]) + jnp.arange(z_CV.shape[1])[None]


def _wrong_exp(z_CV, shift_C, is_target):
  """Returns exp(z - shift), [C, V], with 0 at the target."""
  return jnp.where(is_target, 0, jnp.exp(z_CV - shift_C[:, None]))


def _in_head(z_CV, id_1V, threshold_C, last_id_C):
  """Returns a bool mask [C, V] that is True for the top k.

  threshold_C: the k-th largest logit.
  last_id_C: the largest id of the tokens in the top k whose logit equals the threshold.
  """
  return (z_CV > threshold_C[:, None]) | ((z_CV == threshold_C[:, None]) & (id_1V <= last_id_C[:, None]))
