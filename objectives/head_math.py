"""What is computed on one chunk's logits: sums, loss, statistics, and the gradient.

Whatever the objective, the loss's gradient with respect to the logits z of a token with target x is

    dloss/dz_j = target                     for j = x
                 head_rate e_j              for j among the top k, not x
                 tail_rate e_j              for all other j,             e_j = exp(z_j - max_i z_i)

(label smoothing adds a constant). So one pass over the chunk takes a few sums, `score` turns these into the
loss, the statistics and the Coefficients with work of O(tokens), and one more pass writes the gradient.

All sums run over the wrong tokens only. With the margin m = z_x - logsumexp_{j != x} z_j,
log p = -softplus(-m) and log(1-p) = -softplus(m) keep their digits however sure the model is.
"""
# C tokens of a chunk  D width  V vocabulary (of this device)  K top k

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from betarank.objectives import collectives as mesh
from betarank.objectives.kernels import row_sums_triton
from betarank.objectives.reward_shaping import finite_margin, is_zero
from betarank.objectives.top_k import find_head

MAX_ADDED = 2**24  # elements, 64 MiB


def pytree(cls):
  return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@pytree
class TokenStats:
  """What the model thought of each position; fields [...] without gradient.

  They describe the distribution the loss is computed on, after soft cap and temperature. Where the weight is
  zero all are 0, and target_valid is True.

  Attributes:
    target_logp: float32, log-probability of the target, nats.
    entropy: float32, of the whole distribution, exact, nats.
    target_rank: int32, number of tokens more probable than the target, ties to the lower id as in
      jax.lax.top_k; so the target is among the top k if target_rank < k.
    head_mass: float32, probability of the top k without the target; None if no top k was asked for.
    tail_mass: float32, probability of the tokens outside the top k, without the target, summed directly;
      None if no top k was asked for.
    target_valid: bool, False where the target isn't in the vocabulary.
  """

  target_logp: jax.Array
  entropy: jax.Array
  target_rank: jax.Array
  head_mass: jax.Array | None
  tail_mass: jax.Array | None
  target_valid: jax.Array


@pytree
class Coefficients:
  """All that a token's gradient needs beside its logits; fields float32 [...], int32 for last_id."""

  shift: jax.Array  # largest logit
  target: jax.Array
  tail_rate: jax.Array
  head_rate: jax.Array | None  # None: no top k, all wrong tokens go by tail_rate
  threshold: jax.Array | None  # the k-th largest logit
  last_id: jax.Array | None  # among logits equal to the threshold, ids up to this one are in the top k
  uniform: jax.Array | None  # added for every token; None: label smoothing is off

  def times(self, factor):
    """The coefficients of a loss multiplied by factor [...]."""
    scaled = {f: getattr(self, f) for f in ('target', 'tail_rate', 'head_rate', 'uniform')}
    return dataclasses.replace(self, **{f: v * factor for f, v in scaled.items() if v is not None})


@dataclasses.dataclass(frozen=True)
class Options:
  """What is known of a call before anything is traced; see `shaped_linear_loss`."""

  with_top_k: bool
  with_smoothing: bool
  vocab_size: int
  chunk_tokens: int | None
  soft_cap: float | None
  z_loss: float
  temperature: float
  compute_dtype: jnp.dtype
  layout: mesh.Layout | None


def product(options, subscripts, a, b):
  """A matrix product in the compute dtype with float32 accumulation; float32 means float32 on TPU too."""
  exact = options.compute_dtype == jnp.float32
  return jnp.einsum(
    subscripts, a.astype(options.compute_dtype), b.astype(options.compute_dtype),
    preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST if exact else None,
  )


def settled(array):
  """Keeps XLA's CPU backend from fusing this into a matrix product, many times slower; elsewhere nothing."""
  return lax.platform_dependent(array, cpu=lax.optimization_barrier, default=lambda a: a)


def logits(options, h_CD, head_DV):
  """float32 logits [C, V], capped and divided by the temperature."""
  z_CV = settled(product(options, 'CD,DV->CV', h_CD, head_DV))
  if options.soft_cap is not None:
    z_CV = options.soft_cap * jnp.tanh(z_CV / options.soft_cap)
  return z_CV if options.temperature == 1 else z_CV / options.temperature


def score(options, z_CV, x_C, weight_C, shaping):
  """loss, TokenStats and Coefficients of a chunk, from its logits, targets and weights."""
  add = functools.partial(mesh.sum_over_vocab, options.layout)
  id_V = _ids(options, z_CV)
  target_C, shift_C, sums = _row_sums(options, z_CV, x_C)
  if options.with_top_k:
    wanted_C = jnp.where(weight_C != 0, x_C, -1)
    threshold_C, last_id_C, head_sum_C = find_head(
      options.layout, z_CV, wanted_C, target_C, shift_C, shaping.top_k)
    e_CV = _wrong_exp(z_CV, shift_C, id_V == x_C[:, None])
    sums['tail'] = jnp.sum(e_CV, -1, where=~_in_head(z_CV, id_V, threshold_C, last_id_C))
  if options.with_smoothing:
    sums['logits'] = jnp.sum(z_CV - shift_C[:, None], -1)
  sums = dict(zip(sums, add(jnp.stack(list(sums.values())))))

  live_C = weight_C != 0
  valid_C = (x_C >= 0) & (x_C < options.vocab_size)
  target_C = jnp.where(valid_C, target_C, 0.0)  # not -inf, the margin below would be NaN

  wrong_C = jnp.maximum(sums['wrong'], jnp.finfo(jnp.float32).tiny)  # all underflow beyond a margin of 87
  log_wrong_C = jnp.log(wrong_C)
  margin_C = finite_margin(target_C - shift_C - log_wrong_C)
  nll_C = jax.nn.softplus(-margin_C)
  p_C, rest_C = jnp.exp(-nll_C), jnp.exp(-jax.nn.softplus(margin_C))  # rest = 1 - p
  unit_C = rest_C / wrong_C  # probability of a wrong token = unit * e
  wrong_entropy_C = log_wrong_C - sums['energy'] / wrong_C
  entropy_C = p_C * nll_C + rest_C * (jax.nn.softplus(margin_C) + wrong_entropy_C)

  loss_C, w_C = shaping.positive(margin_C)
  target, tail, head, uniform = -w_C * rest_C, w_C, w_C, None
  head_mass_C = tail_mass_C = None
  if options.with_top_k:
    head_mass_C, tail_mass_C = unit_C * head_sum_C, unit_C * sums['tail']
    reward_C = shaping.lambda_head * head_mass_C + shaping.lambda_tail * tail_mass_C
    loss_C -= reward_C
    target += p_C * reward_C
    # 1 - P_H is what lies elsewhere, summed instead of subtracted.
    head = w_C - shaping.lambda_head * (p_C + tail_mass_C) + shaping.lambda_tail * tail_mass_C
    tail = w_C + shaping.lambda_head * head_mass_C - shaping.lambda_tail * (p_C + head_mass_C)
  push_C = 0.0  # a multiple of every token's probability, the target's too
  if options.with_smoothing:
    log_sum_C = log_wrong_C + jax.nn.softplus(margin_C)  # logsumexp of all logits, less the shift
    loss_C += shaping.smoothing * (log_sum_C - sums['logits'] / options.vocab_size)
    push_C += shaping.smoothing
    uniform = jnp.full_like(p_C, 1.0) * -shaping.smoothing / options.vocab_size
  if not is_zero(options.z_loss):
    lse_C = shift_C + log_wrong_C + jax.nn.softplus(margin_C)
    loss_C += options.z_loss * lse_C**2
    push_C += 2 * options.z_loss * lse_C

  stats = TokenStats(-nll_C, entropy_C, sums['rank'].astype(jnp.int32), head_mass_C, tail_mass_C, valid_C)
  stats = jax.tree.map(lambda s: jnp.where(live_C & valid_C, s, 0), stats)
  stats = dataclasses.replace(stats, target_valid=valid_C | ~live_C)
  loss_C = jnp.where(live_C, weight_C * jnp.where(valid_C, loss_C, jnp.nan), 0.0)
  coefficients = Coefficients(
    shift=shift_C,
    target=target + p_C * push_C,
    tail_rate=unit_C * (tail + push_C),
    head_rate=unit_C * (head + push_C) if options.with_top_k else None,
    threshold=threshold_C if options.with_top_k else None,
    last_id=last_id_C if options.with_top_k else None,
    uniform=uniform,
  )
  return loss_C, stats, coefficients.times(jnp.where(live_C & valid_C, weight_C, 0.0))


def _row_sums(options, z_CV, x_C):
  """(target_C, shift_C, sums): the target's logit and the largest one of the whole vocabulary, and this device's part
  of the sums over the wrong tokens' e and e·log e, and of the target's rank."""
  forms = {'default': _sums_by_passes} | ({'cuda': _sums_in_one} if row_sums_triton.fits(z_CV.shape[1]) else {})
  forms = {platform: functools.partial(form, options) for platform, form in forms.items()}
  target_C, shift_C, *sums = lax.platform_dependent(z_CV, x_C, **forms)
  return target_C, shift_C, dict(zip(('wrong', 'energy', 'rank'), sums))


def _sums_by_passes(options, z_CV, x_C):
  id_V = _ids(options, z_CV)
  is_target = id_V == x_C[:, None]
  target_C, shift_C = mesh.max_over_vocab(
    options.layout, jnp.stack([jnp.max(z_CV, -1, where=is_target, initial=-jnp.inf), z_CV.max(-1)]))
  e_CV = _wrong_exp(z_CV, shift_C, is_target)
  before = (z_CV > target_C[:, None]) | ((z_CV == target_C[:, None]) & (id_V < x_C[:, None]))
  energy_C = jnp.vecdot(e_CV, z_CV - shift_C[:, None], precision=lax.Precision.HIGHEST)
  return target_C, shift_C, e_CV.sum(-1), energy_C, before.sum(-1, dtype=jnp.float32)


def _sums_in_one(options, z_CV, x_C, interpret=False):
  """The kernel knows this device's largest logit only, so the sums are scaled once the largest of all is known."""
  own_C = x_C - mesh.vocab_offset(options.layout, z_CV.shape[1])
  target_C = jnp.take_along_axis(z_CV, own_C[:, None], 1, mode='clip')[:, 0]
  target_C = jnp.where((own_C >= 0) & (own_C < z_CV.shape[1]), target_C, -jnp.inf)
  target_C = mesh.max_over_vocab(options.layout, target_C)
  own_shift_C, wrong_C, energy_C, rank_C = row_sums_triton.row_sums(z_CV, own_C, target_C, interpret)
  shift_C = mesh.max_over_vocab(options.layout, own_shift_C)
  apart_C = own_shift_C - shift_C
  factor_C = jnp.exp(apart_C)
  return target_C, shift_C, factor_C * wrong_C, factor_C * (energy_C + apart_C * wrong_C), rank_C


def logit_gradient(options, z_CV, x_C, coefficients):
  """dloss/d(hidden @ head), float32 [C, V]."""
  id_V = _ids(options, z_CV)
  is_target = id_V == x_C[:, None]
  c = coefficients
  rate = c.tail_rate[:, None]
  if options.with_top_k:
    rate = jnp.where(_in_head(z_CV, id_V, c.threshold, c.last_id), c.head_rate[:, None], rate)
  dz_CV = jnp.where(is_target, c.target[:, None], rate * _wrong_exp(z_CV, c.shift, is_target))
  if options.with_smoothing:
    dz_CV += c.uniform[:, None]
  if options.soft_cap is not None:
    dz_CV *= 1 - (z_CV * (options.temperature / options.soft_cap)) ** 2
  return settled(dz_CV if options.temperature == 1 else dz_CV / options.temperature)


def products(options, h_CD, head_DV, dz_CV, dhead_DV):
  """(dhidden [C, D] from this part of the vocabulary, dhead with this chunk added), both float32."""
  dh_CD = product(options, 'CV,DV->CD', dz_CV, head_DV)

  def add(h_DC, dz_CV, dhead_DV):
    return dhead_DV + product(options, 'DC,CV->DV', h_DC, dz_CV)

  def add_by_rows(h_DC, dz_CV, dhead_DV):
    # XLA's CPU backend can't add a product in place and would hold a large dhead twice.
    width, vocab = dhead_DV.shape
    rows = max(r for r in range(1, width + 1) if width % r == 0 and (r == 1 or r * vocab <= MAX_ADDED))
    part = lambda array, i: lax.dynamic_slice_in_dim(array, i * rows, rows)
    body = lambda i, dhead: lax.dynamic_update_slice_in_dim(
      dhead, add(part(h_DC, i), dz_CV, part(dhead, i)), i * rows, 0)
    return lax.fori_loop(0, width // rows, body, dhead_DV)

  dhead_DV = lax.platform_dependent(settled(h_CD.T), dz_CV, dhead_DV, cpu=add_by_rows, default=add)
  return dh_CD, dhead_DV


def _ids(options, z_CV):
  return mesh.vocab_offset(options.layout, z_CV.shape[1]) + jnp.arange(z_CV.shape[1])


def _wrong_exp(z_CV, shift_C, is_target):
  return jnp.where(is_target, 0, jnp.exp(z_CV - shift_C[:, None]))


def _in_head(z_CV, id_V, threshold_C, last_id_C):
  return (z_CV > threshold_C[:, None]) | ((z_CV == threshold_C[:, None]) & (id_V <= last_id_C[:, None]))
