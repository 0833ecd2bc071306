"""Attention: rotary positions, and softmax over the keys that a query may see.

`attend` is the plain form: decoding, and the judge of the others. `rows_attention` picks a form for whole rows by the
backend: flash kernels, which never hold the scores, on TPU and GPU, a part of the scores at a time on CPU.

# B batch  T query length  S key length  K key heads  G query heads a key head  N = K·G  H head width
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import NamedSharding

from betarank.model.kernels import attention_triton
from betarank.model.sharding import device_kind, platform, shards, spec

KERNELS = ('auto', 'plain', 'blocks', 'splash', 'hopper', 'triton', 'cudnn')


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, base: float) -> jax.Array:
  """Rotary position embedding (arXiv 2104.09864), halves paired as in Qwen and Llama checkpoints.

  Angles are float32 whatever x is: bfloat16 can't tell position 1025 from 1026.
  """
  half = x_BTNH.shape[-1] // 2
  frequency_H = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_BT1H = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_H
  sin, cos = jnp.sin(angle_BT1H), jnp.cos(angle_BT1H)
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def visible(positions_BT, segments_BT, key_positions_BS, key_segments_BS) -> jax.Array:
  """[B, T, S] bool: a query sees the keys of its own segment up to its own position.

  Segment 0 is padding, also in a cache's empty slots; nothing but padding sees it.
  """
  same = segments_BT[:, :, None] == key_segments_BS[:, None, :]
  return same & (positions_BT[:, :, None] >= key_positions_BS[:, None, :])


def attend(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, visible_BTS: jax.Array) -> jax.Array:
  """Grouped-query attention, [B, T, N, H]; scores and softmax in float32.

  A query that sees nothing (padding in front of an empty cache) gets the mean of all values, not NaN.
  """
  batch, length, heads, width = q_BTNH.shape
  # Queries first, in the products' own order: as einsum would turn them, decoding on a CPU takes twice as long.
  q_BKGTH = (q_BTNH * width**-0.5).reshape(batch, length, k_BKSH.shape[1], -1, width).transpose(0, 2, 3, 1, 4)
  score_BKGTS = jnp.einsum('BKGTH,BKSH->BKGTS', q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
  score_BKGTS = jnp.where(visible_BTS[:, None, None], score_BKGTS, -1e30)
  weight_BKGTS = jax.nn.softmax(score_BKGTS, axis=-1).astype(v_BKSH.dtype)
  out_BKGTH = jnp.einsum('BKGTS,BKSH->BKGTH', weight_BKGTS, v_BKSH)
  return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def rows_attention(kernel: str, segments_BT: jax.Array, dtype, kv_heads: int, width: int) -> Callable[..., jax.Array]:
  """(q_BTNH, k_BTKH, v_BTKH) -> out_BTNH over whole rows, where a document's tokens stand in order.

  kernel: one of KERNELS; `auto` takes splash on TPU, on GPU the Hopper kernels, Triton or cuDNN, the first that can do
  this card, mesh, head width, length and type, blocks on a CPU where no mesh axis splits the length, and the plain form
  elsewhere. What depends on the segments alone is made here, once for all layers.
  """
  if kernel == 'auto':
    kernel = next(_able(segments_BT.shape[1], kv_heads, width, dtype))
  forms = {'plain': _plain, 'blocks': _blocks, 'splash': _splash, 'hopper': _hopper, 'triton': _triton, 'cudnn': _cudnn}
  return forms[kernel](segments_BT)


def _able(length: int, kv_heads: int, width: int, dtype) -> Iterator[str]:
  """Forms that can do this here, the fastest first."""
  whole, half = shards('length') == 1, dtype == jnp.bfloat16
  on = platform()
  if on == 'tpu' and width % 128 == 0 and length % (128 * shards('length')) == 0:
    yield 'splash'
  if on == 'cpu' and whole:
    yield 'blocks'
  if on == 'gpu' and half and kv_heads % shards('row_heads') == 0:
    from betarank.model.kernels import attention_hopper  # takes a second to import
    if attention_hopper.fits(length, width, device_kind()):
      yield 'hopper'
    if attention_triton.fits(length, width):
      yield 'triton'
  if on == 'gpu' and half and whole and width % 8 == 0 and width <= 256 and length % 2 == 0:
    yield 'cudnn'
  yield 'plain'


def _plain(segments_BT):
  index_1T = jnp.arange(segments_BT.shape[1])[None]
  visible_BTT = visible(index_1T, segments_BT, index_1T, segments_BT)

  def run(q_BTNH, k_BTKH, v_BTKH):
    out_BTNH = attend(q_BTNH, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), visible_BTT)
    return checkpoint_name(out_BTNH, 'attention')

  return run


def _blocks(segments_BT):
  """The plain form, an eighth of the queries (or 128) at a time, with the keys up to the last of them. Their scores
  aren't kept for the backward pass: a CPU computes them again in less time.
  """
  length = segments_BT.shape[1]
  size = max(128, -(-length // 8))
  index_1T = jnp.arange(length)[None]
  visible_BTT = visible(index_1T, segments_BT, index_1T, segments_BT)
  some = jax.checkpoint(attend)

  def run(q_BTNH, k_BTKH, v_BTKH):
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    parts = [slice(start, start + size) for start in range(0, length, size)]
    out_BTNH = jnp.concatenate([
      some(q_BTNH[:, part], k_BKTH[:, :, :part.stop], v_BKTH[:, :, :part.stop], visible_BTT[:, part, :part.stop])
      for part in parts], 1)
    return checkpoint_name(out_BTNH, 'attention')

  return run


def _cudnn(segments_BT):
  """cuDNN's flash attention. It has no segments, so a mask tells documents apart; the acausal half is skipped."""
  same_B1TT = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
  return lambda q_BTNH, k_BTKH, v_BTKH: jax.nn.dot_product_attention(
    q_BTNH, k_BTKH, v_BTKH, mask=same_B1TT, is_causal=True, implementation='cudnn')


def _hopper(segments_BT):
  from betarank.model.kernels import attention_hopper
  return _by_documents(attention_hopper.attention, segments_BT)


def _triton(segments_BT):
  return _by_documents(attention_triton.attention, segments_BT)


def _by_documents(kernel, segments_BT):
  """A kernel that skips other documents. Each device has its own rows and heads; where devices split the length they
  trade tokens for heads and back (DeepSpeed-Ulysses, arXiv 2309.14509).
  """
  ends = attention_triton.documents(segments_BT)

  def run(q_BTNH, k_BTKH, v_BTKH):
    rows = kernel
    if not jax.sharding.get_abstract_mesh().empty:  # XLA can't split a kernel by itself
      heads, tokens = spec('batch', None, 'row_heads', None), spec('batch', None)
      rows = jax.shard_map(rows, in_specs=(heads, heads, heads, tokens, tokens), out_specs=heads, check_vma=False)
    return rows(q_BTNH, k_BTKH, v_BTKH, *ends)

  return run


def _splash(segments_BT):
  """Splash attention, a Pallas kernel for TPU (interpreted elsewhere): each device has its own rows, heads and queries,
  and all keys of them.
  """
  length = segments_BT.shape[1]

  def run(q_BTNH, k_BTKH, v_BTKH):
    heads, width = q_BTNH.shape[2:]
    kernel = _splash_kernel(heads, length)
    q_BNTH, k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (q_BTNH * width**-0.5, k_BTKH, v_BTKH))
    rows = lambda kernel, q, k, v, q_segments, kv_segments: jax.vmap(
      lambda *x: kernel(*x[:3], segment_ids=splash.SegmentIds(*x[3:])))(q, k, v, q_segments, kv_segments)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:  # XLA can't split a kernel by itself
      q, kv = spec('batch', 'act_heads', 'length', None), spec('batch', 'act_heads', None, None)
      parts = kernel.manual_sharding_spec(NamedSharding(mesh, spec('act_heads', 'length')))
      rows = jax.shard_map(rows, in_specs=(parts, q, kv, kv, spec('batch', 'length'), spec('batch', None)), out_specs=q,
                           check_vma=False)
    return rows(kernel, q_BNTH, k_BKTH, v_BKTH, segments_BT, segments_BT).swapaxes(1, 2)

  return run


def _splash_kernel(heads: int, length: int):
  """The kernel for the heads of one row. How its blocks (in tokens) were chosen: docs/plans.md."""
  queries = length // shards('length')
  fits = lambda *sizes: next(size for size in (*sizes, 128) if not queries % size)
  forward = fits(1024, 512, 256) if 'v6' in device_kind() else fits(512, 256)
  backward = fits(1024, 512, 256)
  sizes = splash.BlockSizes(
    block_q=forward, block_kv=forward, block_kv_compute=min(forward, 512), block_q_dkv=backward,
    block_kv_dkv=backward, block_kv_dkv_compute=min(backward, 512), use_fused_bwd_kernel=True)
  mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
  with jax.ensure_compile_time_eval():
    return splash.make_splash_mha(
      mask, block_sizes=sizes, head_shards=shards('act_heads'), q_seq_shards=shards('length'),
      interpret=platform() != 'tpu', residual_checkpoint_name='attention')
