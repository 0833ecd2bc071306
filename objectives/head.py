"""The shaped loss straight from hidden states and the head's matrix, a chunk of tokens at a time.

All logits would take tokens x vocabulary floats (80 GB at 131,072 tokens and Qwen's vocabulary). Here one
chunk's exist at a time, forward and backward, and what is kept between the two is a few numbers a token.
The arithmetic on a chunk is in `chunk.py`, the collectives are in `layout.py`; this file holds the loops and
the differentiation rules.
"""
# N tokens of this device  C tokens of a chunk  D width  V vocabulary (of this device)

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from betarank.objectives import collectives as mesh
from betarank.objectives import head_math as tile
from betarank.objectives.reward_shaping import RewardShaping, check_number, check_shapes, is_zero

# Logits of a default chunk: 8 MiB in float32 on a CPU, which its caches hold; 512 MiB on an accelerator. But 192 or
# 1024 tokens at least: with fewer, adding to the head's gradient in memory takes longer than the product that is added
# (TPU v5e: below 960; H100, benchmarks/objective.py: 192 take twice the time of 1024). On an accelerator a 32nd of all
# tokens if that is more: a chunk then takes a 32nd of all logits' memory, and the fewer there are the fewer additions.
DEFAULT_CHUNK_LOGITS = {'cpu': 2**21, 'accelerator': 2**27}
LEAST_CHUNK_TOKENS = {'cpu': 192, 'accelerator': 1024}


def shaped_linear_loss(
  hidden, head, targets, shaping, *, weights=None, stats='basic', soft_cap=None, z_loss=0.0, temperature=1.0,
  compute_dtype=None, chunk_tokens=None, layout=None,
):
  """`shaped_loss(hidden @ head, targets, shaping)` at every position without ever holding all logits.

  The backward pass computes each chunk's logits again, so any function of the losses can be differentiated.
  For a weighted sum, as in pre-training, `shaped_linear_total` is a matrix product cheaper.

  Args:
    hidden: [..., D] float, what the head is applied to.
    head: [D, V] float, in the orientation of `hidden @ head`.
    targets: [...] integer token ids in [0, V).
    shaping: a RewardShaping, or any objective of `family.py`. No gradient flows into it.
    weights: [...] bool or float factors of the losses; None is all ones. Where zero, nothing that stands in
      hidden or targets (NaN included) has any effect. No gradient flows into them.
    stats: 'full' to have head and tail mass in any case, 'basic' only if a lambda needs the top k.
    soft_cap: logits become soft_cap * tanh(logits / soft_cap), if given.
    z_loss: adds z_loss * logsumexp(logits)^2 to every loss.
    temperature: logits are divided by it, after the cap.
    compute_dtype: of the matrix products, which accumulate in float32, and of what devices send each other of the head
      and its gradient; None: hidden's. All else is float32.
    chunk_tokens: tokens a device works on at a time; None: so that their float32 logits take 8 MiB on a CPU, or
      what 192 tokens take if that is more; elsewhere 512 MiB, 1024 tokens or a 32nd of all.
    layout: a Layout, how the arrays lie on the mesh in force; None: on one device.

  Returns:
    (loss, stats): [...] float32 weighted losses, nats, and TokenStats. A target outside the vocabulary makes
    its loss NaN, gives no gradient, and clears its stats.target_valid.

  Raises:
    ValueError: an argument of wrong shape, type or value; the message starts with its name.
  """
  return _per_token(*_prepare(
    hidden, head, targets, shaping, weights, stats, soft_cap, z_loss, temperature, compute_dtype,
    chunk_tokens, layout,
  ))


def shaped_linear_total(hidden, head, targets, shaping, **options):
  """Sum over all positions of `shaped_linear_loss`, with its gradients formed in the forward pass.

  A sum has one cotangent, so the gradients are known up to that factor while a chunk's logits are still at
  hand: three matrix products instead of four. Don't rematerialize it.

  Args: as `shaped_linear_loss`.

  Returns:
    (total, loss, stats): float32 sum of the weighted losses in nats over all positions of the global batch,
    the part that can be differentiated; [...] float32 losses without gradient; TokenStats.

  Raises:
    ValueError: as `shaped_linear_loss`.
  """
  return _total(*_prepare(hidden, head, targets, shaping, **options))


def linear_token_stats(hidden, head, targets, *, top_k=100, **options):
  """TokenStats alone, for evaluation and RL: no gradient, one matrix product.

  Args: as `shaped_linear_loss`; top_k is the head that head_mass and tail_mass speak of.
  """
  hidden, head = lax.stop_gradient((hidden, head))
  options = {'stats': 'full', **options}
  return shaped_linear_loss(hidden, head, targets, RewardShaping(top_k=top_k), **options)[1]


def _prepare(
  hidden, head, targets, shaping, weights=None, stats='basic', soft_cap=None, z_loss=0.0, temperature=1.0,
  compute_dtype=None, chunk_tokens=None, layout=None,
):
  """Refuses what doesn't fit, by name; returns the arguments of `_per_token` and `_total`."""
  if head.ndim != 2 or hidden.shape[-1:] != head.shape[:1]:
    raise ValueError(f'head must be [D, V] with D the width of hidden {hidden.shape}, got {head.shape}')
  check_shapes(hidden.shape[:-1], 'hidden', targets)
  weights = jnp.ones(targets.shape) if weights is None else lax.stop_gradient(jnp.asarray(weights))
  if weights.shape != targets.shape:
    raise ValueError(f'weights must have the shape of targets, {targets.shape}, got {weights.shape}')
  if stats not in ('basic', 'full'):
    raise ValueError(f'stats must be basic or full, got {stats!r}')
  for name, value in (('soft_cap', soft_cap), ('temperature', temperature), ('chunk_tokens', chunk_tokens)):
    if value is not None and not 0 < value < math.inf:
      raise ValueError(f'{name} must be positive, got {value!r}')
  check_number('z_loss', z_loss)
  if layout is not None:
    mesh.check(layout, hidden, head)
  with_top_k = stats == 'full' or not (is_zero(shaping.lambda_head) and is_zero(shaping.lambda_tail))
  if layout is not None and not with_top_k:  # the kernel that finds a top k needs all of a token's logits
    layout = mesh.share(layout, targets.size, head.shape[1])
  options = tile.Options(
    with_top_k=with_top_k,
    with_smoothing=not is_zero(shaping.smoothing),
    vocab_size=head.shape[1],
    chunk_tokens=chunk_tokens,
    soft_cap=soft_cap,
    z_loss=z_loss,
    temperature=temperature,
    compute_dtype=jnp.dtype(compute_dtype or hidden.dtype),
    layout=layout,
  )
  return options, hidden, head, targets, weights.astype(jnp.float32), lax.stop_gradient(shaping)


# The differentiation rules. Nothing differentiates through the loop or the mesh; both ways are spelt out.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _per_token(options, hidden, head, targets, weights, shaping):
  loss, stats, _ = _forward(options, hidden, head, targets, weights, shaping)
  return loss, stats


def _per_token_fwd(options, hidden, head, targets, weights, shaping):
  loss, stats, coefficients = _forward(options, hidden, head, targets, weights, shaping)
  return (loss, stats), (hidden, head, targets, weights, coefficients)


def _per_token_bwd(options, saved, cotangents):
  dhidden, dhead = _backward(options, *saved, cotangents[0])
  return dhidden, dhead, None, None, None


_per_token.defvjp(_per_token_fwd, _per_token_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(options, hidden, head, targets, weights, shaping):
  loss, stats, _ = _forward(options, hidden, head, targets, weights, shaping)
  return loss.sum(), loss, stats


def _total_fwd(options, hidden, head, targets, weights, shaping):
  loss, stats, gradients = _forward(options, hidden, head, targets, weights, shaping, form_gradients=True)
  return (loss.sum(), loss, stats), gradients


def _total_bwd(options, gradients, cotangents):
  dhidden, dhead = ((cotangents[0] * g).astype(g.dtype) for g in gradients)
  return dhidden, dhead, None, None, None


_total.defvjp(_total_fwd, _total_bwd)


def _forward(options, hidden, head, targets, weights, shaping, form_gradients=False):
  """loss, stats, and (dhidden, dhead) if they are to be formed, else the Coefficients to form them from."""

  def local(hidden, head, targets, weights, shaping):
    head_DV = mesh.gather_head(options.layout, head.astype(options.compute_dtype))

    def body(dhead, chunk):
      h_CD, x_C, weight_C = chunk
      h_CD = jnp.where(weight_C[:, None] != 0, h_CD, 0)  # padding may hold NaN
      z_CV = tile.logits(options, h_CD, head_DV)
      loss_C, stats, coefficients = tile.score(options, z_CV, x_C, weight_C, shaping)
      if not form_gradients:
        return dhead, (loss_C, stats, coefficients), None
      dz_CV = tile.logit_gradient(options, z_CV, x_C, coefficients)
      dh_CD, dhead = tile.products(options, h_CD, head_DV, dz_CV, dhead)
      return dhead, (loss_C, stats, None), dh_CD.astype(hidden.dtype)

    dhead = jnp.zeros(head_DV.shape, jnp.float32) if form_gradients else None
    dhead, (loss, stats, saved), dhidden = _over_chunks(options, body, dhead, head_DV, (hidden, targets, weights))
    if form_gradients:
      saved = _gradients(options, dhidden, dhead, head)
    return loss, stats, saved

  kinds = ('hidden', 'head', 'tokens', 'tokens', None)
  kinds_out = ('tokens', 'tokens', ('hidden', 'head') if form_gradients else 'tokens')
  run = mesh.on_mesh(options.layout, local, kinds, kinds_out)
  return run(hidden, head, targets, weights, shaping)


def _backward(options, hidden, head, targets, weights, coefficients, cotangent):
  """(dhidden, dhead) given each loss's cotangent [...], from logits computed anew."""

  def local(hidden, head, targets, weights, coefficients, cotangent):
    head_DV = mesh.gather_head(options.layout, head.astype(options.compute_dtype))

    def body(dhead, chunk):
      h_CD, x_C, weight_C, coefficients, cotangent_C = chunk
      live_C = weight_C != 0
      h_CD = jnp.where(live_C[:, None], h_CD, 0)
      coefficients = coefficients.times(jnp.where(live_C, cotangent_C, 0))
      dz_CV = tile.logit_gradient(options, tile.logits(options, h_CD, head_DV), x_C, coefficients)
      dh_CD, dhead = tile.products(options, h_CD, head_DV, dz_CV, dhead)
      return dhead, None, dh_CD.astype(hidden.dtype)

    arrays = (hidden, targets, weights, coefficients, cotangent)
    dhead, _, dhidden = _over_chunks(options, body, jnp.zeros(head_DV.shape, jnp.float32), head_DV, arrays)
    return _gradients(options, dhidden, dhead, head)

  kinds = ('hidden', 'head', 'tokens', 'tokens', 'tokens', 'tokens')
  run = mesh.on_mesh(options.layout, local, kinds, ('hidden', 'head'))
  return run(hidden, head, targets, weights, coefficients, cotangent)


def _gradients(options, dhidden, dhead, head):
  """Adds up what the devices hold of the two gradients, once, after the loop.

  A device's own sum over its tokens is float32. It is rounded to the compute type before it is sent, as the layers'
  gradients are, which are products in that type.
  """
  dhidden = mesh.sum_hidden(options.layout, dhidden)
  if options.layout is not None:
    dhead = mesh.reduce_head(options.layout, dhead.astype(options.compute_dtype))
  return dhidden, dhead.astype(head.dtype)


def _over_chunks(options, body, carry, head_DV, arrays):
  """lax.scan of `body` over the chunks of arrays [..., *]; outputs come back in the arrays' shape.

  body(carry, chunk) -> (carry, what all who share a vocabulary know of the chunk's tokens, what is to be summed over
  them); a chunk has the tokens of all of them.
  """
  shape = arrays[1].shape  # of the targets
  tokens = math.prod(shape)
  sharing = options.layout.neighbours if options.layout else 1
  most = max(1, (options.chunk_tokens or default_chunk(tokens * sharing, head_DV.shape[1])) // sharing)
  chunks = max(1, -(-tokens // most))
  size = -(-tokens // chunks)  # even parts: what fills up the last one is computed too
  size = min(size + -size % 64, most)

  def split(array):
    array = array.reshape(tokens, *array.shape[len(shape):])
    padding = [(0, chunks * size - tokens)] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, padding).reshape(chunks, size, *array.shape[1:])  # zeros: weight 0, no effect

  def join(array):
    return array.reshape(chunks * size, *array.shape[2:])[:tokens].reshape(*shape, *array.shape[2:])

  def step(carry, chunk):
    each = lambda function, tree: jax.tree.map(functools.partial(function, options.layout), tree)
    carry, known, parts = body(carry, each(mesh.gather_tokens, chunk))
    return carry, (each(mesh.own_tokens, known), each(mesh.sum_own_tokens, parts))

  carry, outputs = lax.scan(step, carry, jax.tree.map(split, arrays))
  return carry, *jax.tree.map(join, outputs)


def default_chunk(tokens, vocab, kind=None):
  """Tokens of a chunk, of a device's tokens and for its part of the vocabulary; kind is cpu or accelerator, None: what
  runs here."""
  device = jax.sharding.get_abstract_mesh().abstract_device  # of the mesh in force, which may be of absent devices
  kind = kind or ('cpu' if (device.platform if device else jax.default_backend()) == 'cpu' else 'accelerator')
  most = max(DEFAULT_CHUNK_LOGITS[kind] // vocab, tokens // 32 if kind == 'accelerator' else 0)
  return max(LEAST_CHUNK_TOKENS[kind], most - most % 64 if most > 64 else most)
