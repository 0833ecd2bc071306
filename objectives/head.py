"""Computes the shaped loss from hidden states and the head's weights, one chunk of tokens at a time.

All logits at once would take tokens x vocabulary floats, which is 80 GB for 131,072 tokens and Qwen's vocabulary. Here
the logits of only one chunk exist at a time, in the forward and in the backward pass. From the forward to the backward
pass, only a few numbers per token are kept.

This file has the public functions, the loop over chunks and the differentiation rules. `head_math.py` has the
arithmetic on one chunk, and `collectives.py` the communication between devices.

# N tokens of this device  C tokens of a chunk  D width  V vocabulary (of this device)
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from betarank.objectives import collectives, head_math
from betarank.objectives.reward_shaping import RewardShaping, check_shapes, is_zero

# The number of logits in a default chunk. In float32 it takes 8 MiB on a CPU, to fit its caches, and 512 MiB on an
# accelerator.
DEFAULT_CHUNK_LOGITS = {'cpu': 2**21, 'accelerator': 2**27}
# The smallest default chunk. With fewer tokens, adding a chunk's gradient to that of the head takes longer than
# computing it: on TPU v5e below 960 tokens. On H100, chunks of 192 take twice the time of chunks of 1024
# (benchmarks/objective.py).
LEAST_CHUNK_TOKENS = {'cpu': 192, 'accelerator': 1024}
# On an accelerator, a default chunk has at least 1/32 of all tokens. Its logits then take 1/32 of the memory of all
# logits, and there are at most 32 additions to the head's gradient.
LEAST_CHUNK_FRACTION = 32


def shaped_linear_loss(hidden, head, targets, shaping, **options):
  """Computes `shaped_loss(hidden @ head, targets, shaping)` at every position without ever holding all logits.

  The backward pass computes the logits of each chunk again. Any function of the losses can be differentiated. If only
  a weighted sum of the losses is needed, as in pre-training, use `shaped_linear_total`, which takes three matrix
  products instead of four.

  Args:
    hidden: [..., D] float, the inputs of the head.
    head: [D, V] float, the head's weights, such that the logits are `hidden @ head`.
    targets: [...] integer token ids in [0, V).
    shaping: a RewardShaping. No gradient flows into it.

  Optional keyword args:
    weights: [...] bool or float factors of the losses; default: ones. Where a weight is zero, the values of hidden and
      targets have no effect, even if they are NaN. No gradient flows into the weights.
    stats: 'full' always computes head_mass and tail_mass. 'basic' (default) computes them only if a lambda needs the
      top k.
    soft_cap: if given, logits become soft_cap * tanh(logits / soft_cap).
    temperature: divides the logits, after the cap; default 1.
    compute_dtype: the dtype of the inputs of matrix products, and of the head and its gradient when devices exchange
      them; default: the dtype of hidden. Products accumulate in float32, and all other values are float32.
    chunk_tokens: the number of tokens that a device processes at a time. By default, the chunk's float32 logits take 8
      MiB on a CPU, but a chunk has at least 192 tokens. On an accelerator they take 512 MiB, but a chunk has at least
      1024 tokens, and at least 1/32 of all tokens.
    layout: a Layout, which says how the arrays are sharded over the current mesh; default: all on one device.

  Returns:
    (loss, stats): [...] float32 weighted losses in nats, and TokenStats. A target outside the vocabulary has loss NaN
    and no gradient, and its stats.target_valid is False.

  Raises:
    ValueError: an argument has a wrong shape, type or value. The message begins with its name.
  """
  return _per_token(*_prepare(hidden, head, targets, shaping, **options))


def shaped_linear_total(hidden, head, targets, shaping, **options):
  """Computes the sum of `shaped_linear_loss` over all positions. The forward pass also computes the gradient.

  In a sum, all losses have the same cotangent, which is one number. The forward pass can therefore compute the gradient
  for a cotangent of 1 while a chunk's logits still exist, and the backward pass multiplies this gradient by the
  cotangent. This takes three matrix products instead of four. Don't rematerialize this function, because that would
  compute everything twice.

  Args: the same as for `shaped_linear_loss`.

  Returns:
    (total, loss, stats): total is the float32 sum of the weighted losses in nats over the global batch, and can be
    differentiated. loss has the [...] float32 losses, without gradient. stats are the TokenStats.

  Raises:
    ValueError: an argument has a wrong shape, type or value. The message begins with its name.
  """
  return _total(*_prepare(hidden, head, targets, shaping, **options))


def linear_token_stats(hidden, head, targets, *, top_k=100, **options):
  """Returns only the TokenStats, for evaluation and RL. This takes one matrix product, and has no gradient.

  Args:
    hidden, head, targets, options: as in `shaped_linear_loss`.
    top_k: the number of most probable tokens that head_mass covers. tail_mass covers all other tokens.
  """
  hidden, head = lax.stop_gradient((hidden, head))
  options = {'stats': 'full', **options}
  return shaped_linear_loss(hidden, head, targets, RewardShaping(top_k=top_k), **options)[1]


def _prepare(
  hidden, head, targets, shaping, *, weights=None, stats='basic', soft_cap=None, temperature=1.0, compute_dtype=None,
  chunk_tokens=None, layout=None,
):
  """Checks the arguments of `shaped_linear_loss`.

  Returns (options, hidden, head, targets, weights, shaping), the arguments of `_per_token` and `_total`.
  """
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
  if layout is not None:
    collectives.check_layout(layout, hidden, head)
  with_top_k = stats == 'full' or shaping.rewards_wrong_tokens
  if with_top_k:
    shaping.check_vocabulary(head.shape[1])
  elif layout is not None:  # not with a top k, because its kernels need all logits of a token on one device
    layout = collectives.with_vocab_groups(layout, targets.size, head.shape[1])
  options = head_math.Options(
    with_top_k=with_top_k,
    with_smoothing=not is_zero(shaping.smoothing),
    vocab_size=head.shape[1],
    chunk_tokens=chunk_tokens,
    soft_cap=soft_cap,
    temperature=temperature,
    compute_dtype=jnp.dtype(compute_dtype or hidden.dtype),
    layout=layout,
  )
  return options, hidden, head, targets, weights.astype(jnp.float32), lax.stop_gradient(shaping)


# The differentiation rules. Both passes are written out, so JAX never differentiates the loop or the collectives.


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


@jax.named_scope('head/gradient')
def _total_bwd(options, gradients, cotangents):
  dhidden, dhead = ((cotangents[0] * g).astype(g.dtype) for g in gradients)
  return dhidden, dhead, None, None, None


_total.defvjp(_total_fwd, _total_bwd)


@jax.named_scope('head')
def _forward(options, hidden, head, targets, weights, shaping, form_gradients=False):
  """Returns (losses, statistics, values for the backward pass).

  options: an Options. The next five arguments are those of `shaped_linear_loss`.
  form_gradients: whether the values for the backward pass are (dhidden, dhead). Otherwise they are the Coefficients,
    from which `_backward` computes dhidden and dhead.
  """

  def local(hidden, head, targets, weights, shaping):
    head_DV = _gather_head(options, head)

    def body(dhead, chunk):
      h_CD, x_C, weight_C = chunk
      h_CD = jnp.where(weight_C[:, None] != 0, h_CD, 0)  # padding may hold NaN
      z_CV = head_math.chunk_logits(options, h_CD, head_DV)
      loss_C, stats, coefficients = head_math.score(options, z_CV, x_C, weight_C, shaping)
      if not form_gradients:
        return dhead, (loss_C, stats, coefficients), None
      dh_CD, dhead = head_math.gradients(options, h_CD, head_DV, z_CV, x_C, coefficients, dhead)
      return dhead, (loss_C, stats, None), dh_CD.astype(hidden.dtype)

    dhead = jnp.zeros(head_DV.shape, jnp.float32) if form_gradients else None
    dhead, (loss, stats, saved), dhidden = _over_chunks(options, body, dhead, head_DV, (hidden, targets, weights))
    if form_gradients:
      saved = _reduce_gradients(options, dhidden, dhead, head)
    return loss, stats, saved

  kinds = ('hidden', 'head', 'tokens', 'tokens', None)
  kinds_out = ('tokens', 'tokens', ('hidden', 'head') if form_gradients else 'tokens')
  run = collectives.on_mesh(options.layout, local, kinds, kinds_out)
  return run(hidden, head, targets, weights, shaping)


@jax.named_scope('head')
def _backward(options, hidden, head, targets, weights, coefficients, cotangent):
  """Returns (dhidden, dhead), the gradients of hidden and head. The logits are computed again.

  coefficients: the Coefficients, from `_forward`.
  cotangent: [...] float32, the cotangent of each loss.
  """

  def local(hidden, head, targets, weights, coefficients, cotangent):
    head_DV = _gather_head(options, head)

    def body(dhead, chunk):
      h_CD, x_C, weight_C, coefficients, cotangent_C = chunk
      live_C = weight_C != 0
      h_CD = jnp.where(live_C[:, None], h_CD, 0)
      coefficients = coefficients.times(jnp.where(live_C, cotangent_C, 0))
      z_CV = head_math.chunk_logits(options, h_CD, head_DV)
      dh_CD, dhead = head_math.gradients(options, h_CD, head_DV, z_CV, x_C, coefficients, dhead)
      return dhead, None, dh_CD.astype(hidden.dtype)

    arrays = (hidden, targets, weights, coefficients, cotangent)
    dhead, _, dhidden = _over_chunks(options, body, jnp.zeros(head_DV.shape, jnp.float32), head_DV, arrays)
    return _reduce_gradients(options, dhidden, dhead, head)

  kinds = ('hidden', 'head', 'tokens', 'tokens', 'tokens', 'tokens')
  run = collectives.on_mesh(options.layout, local, kinds, ('hidden', 'head'))
  return run(hidden, head, targets, weights, coefficients, cotangent)


@jax.named_scope('head/weights')
def _gather_head(options, head):
  return collectives.gather_head(options.layout, head.astype(options.compute_dtype))


@jax.named_scope('head/weights')
def _reduce_gradients(options, dhidden, dhead, head):
  """Sums dhidden and dhead over the devices, once after the loop over chunks. Returns the sums (dhidden, dhead).

  Each device's dhead is a float32 sum over its own tokens, and is rounded to the compute dtype before it is sent. The
  gradients of the layers' weights are rounded in the same way, because they are matrix products in the compute dtype.
  """
  dhidden = collectives.sum_hidden(options.layout, dhidden)
  if options.layout is not None:
    dhead = collectives.reduce_head(options.layout, dhead.astype(options.compute_dtype))
  return dhidden, dhead.astype(head.dtype)


def _over_chunks(options, body, carry, head_DV, arrays):
  """Runs lax.scan of `body` over chunks of tokens.

  With vocabulary groups (see collectives.py), a chunk holds tokens of all devices of the group, and these devices work
  on it together. Otherwise each device is a group of its own.

  Args:
    options: the Options.
    body: a function (carry, chunk) -> (carry, common, partial). `common` must be equal on all devices of the group.
      `partial` is this device's term of a sum over the group.
    carry: the carry for the first chunk.
    head_DV: the head's weights. Only their shape is used, to choose the size of a chunk.
    arrays: (hidden, targets, ...). The leading dimensions of every array are the shape of the targets.

  Returns:
    (carry, common, total): the carry after the last chunk, the `common` of all chunks, and the sum of `partial` over
    the group. common and total are for this device's own tokens, with the leading dimensions of the targets.
  """
  shape = arrays[1].shape  # of the targets
  tokens = math.prod(shape)
  group = options.layout.vocab_group_size if options.layout else 1
  most = max(1, (options.chunk_tokens or default_chunk(tokens * group, head_DV.shape[1])) // group)
  chunks = max(1, -(-tokens // most))
  size = -(-tokens // chunks)  # equal chunks need little padding, which costs as much time as tokens
  size = min(size + -size % 64, most)

  def split(array):
    array = array.reshape(tokens, *array.shape[len(shape):])
    padding = [(0, chunks * size - tokens)] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, padding).reshape(chunks, size, *array.shape[1:])  # padding has weight 0, so no effect

  def join(array):
    return array.reshape(chunks * size, *array.shape[2:])[:tokens].reshape(*shape, *array.shape[2:])

  def step(carry, chunk):
    each = lambda function, tree: jax.tree.map(functools.partial(function, options.layout), tree)
    carry, common, partial = body(carry, each(collectives.gather_group, chunk))
    return carry, (each(collectives.own_tokens, common), each(collectives.reduce_scatter_group, partial))

  carry, outputs = lax.scan(step, carry, jax.tree.map(split, arrays))
  return carry, *jax.tree.map(join, outputs)


def default_chunk(tokens, vocab, kind=None):
  """Returns the default number of tokens per chunk, for a device with `tokens` tokens and `vocab` vocabulary entries.

  kind: 'cpu' or 'accelerator'. None means the kind of the current mesh's devices or, without a mesh, of JAX's default
    backend.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  kind = kind or ('cpu' if (device.platform if device else jax.default_backend()) == 'cpu' else 'accelerator')
  share = tokens // LEAST_CHUNK_FRACTION if kind == 'accelerator' else 0
  most = max(DEFAULT_CHUNK_LOGITS[kind] // vocab, share)
  return max(LEAST_CHUNK_TOKENS[kind], most - most % 64 if most > 64 else most)
