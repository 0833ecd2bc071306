"""Attention: rotary positions, and softmax over the keys that a query may see.

`attend` is the plain implementation, and the reference for all faster implementations. `rows_attention` chooses an
implementation for whole rows. On TPU and GPU it chooses a flash kernel, which never holds all scores in memory. On CPU
it chooses plain attention, computed one block of queries at a time. Decoding has its own implementation
(model/decode.py).

# B batch  T query length  S key length  K key heads  G query heads per key head  N = K·G query heads  H head width
"""

import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from betarank.model.kernels import attention_triton
from betarank.model.sharding import device_kind, per_device, platform, shards, spec

KERNELS = ('auto', 'plain', 'blocks', 'splash', 'hopper', 'triton', 'cudnn')
# Llama 3.1's rope scaling: the length of the texts in pre-training, in tokens, and how often a pair of dimensions turns
# in this length if its frequency is kept (at least 4 times) or divided (at most once). All published models have these.
ROPE_CONTEXT, ROPE_TURNS = 8192, (4.0, 1.0)
GPU_ONLY_ATTENTION = ('hopper', 'cudnn')  # the others run on every platform; see `check_kernel` for the rows


def angles(positions_BT: jax.Array, width: int, base: float, factor: float = 1.0) -> tuple[jax.Array, jax.Array]:
  """Returns (sin, cos) of the angles of rotary positions, each [B, T, H/2] float32.

  Angles are always float32, because bfloat16 would round positions 1025 and 1026 to the same number.

  Args:
    positions_BT: int32.
    width: H.
    base, factor: as in `rotate`.
  """
  half = width // 2
  frequency_H = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if factor != 1:
    most, least = ROPE_TURNS
    kept_H = jnp.clip((frequency_H * (ROPE_CONTEXT / (2 * math.pi)) - least) / (most - least), 0, 1)
    frequency_H *= kept_H + (1 - kept_H) / factor
  angle_BTH = positions_BT[:, :, None].astype(jnp.float32) * frequency_H[None, None]
  return jnp.sin(angle_BTH), jnp.cos(angle_BTH)


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, base: float, factor: float = 1.0) -> jax.Array:
  """Applies rotary position embedding (arXiv 2104.09864). Dimension i is paired with H/2 + i, as in Qwen and Llama.

  Returns the rotated array, [B, T, N, H] in x's dtype.

  base: at position t, dimension pair i is rotated by t · base^(-2i/H) radians.
  factor: the factor of Llama 3.1's rope scaling (`llama3` in transformers), which lets the model read longer texts; 1
    for no scaling. Pairs that turn at most once in 8192 tokens turn `factor` times more slowly. Pairs that turn at
    least 4 times keep their frequency. Between these limits, the change is gradual.
  """
  sin, cos = (x_BTH[:, :, None] for x_BTH in angles(positions_BT, x_BTNH.shape[-1], base, factor))
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def visible(positions_BT, segments_BT, key_positions_BS, key_segments_BS) -> jax.Array:
  """Returns a bool mask [B, T, S], True where a query may see a key.

  A query sees a key if both are in the same segment and the key's position isn't after the query's position. Segment 0
  is padding, so only padding queries see padding keys. All arguments are int32.
  """
  same = segments_BT[:, :, None] == key_segments_BS[:, None, :]
  return same & (positions_BT[:, :, None] >= key_positions_BS[:, None, :])


def attend(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, visible_BTS: jax.Array) -> jax.Array:
  """Returns grouped-query attention, [B, T, N, H] in v's dtype. Scores and softmax are float32.

  visible_BTS: bool, True where a query may see a key. A query that sees no key gets the mean of all values, not NaN.
  """
  batch, length, heads, width = q_BTNH.shape
  # The queries are transposed before the matrix products, which is faster on a CPU than what einsum chooses.
  q_BKGTH = (q_BTNH * width**-0.5).reshape(batch, length, k_BKSH.shape[1], -1, width).transpose(0, 2, 3, 1, 4)
  score_BKGTS = jnp.einsum('BKGTH,BKSH->BKGTS', q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
  score_BKGTS = jnp.where(visible_BTS[:, None, None], score_BKGTS, -1e30)
  weight_BKGTS = jax.nn.softmax(score_BKGTS, axis=-1).astype(v_BKSH.dtype)
  out_BKGTH = jnp.einsum('BKGTS,BKSH->BKGTH', weight_BKGTS, v_BKSH)
  return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def rows_attention(kernel: str, segments_BT: jax.Array, dtype, kv_heads: int, width: int) -> Callable[..., jax.Array]:
  """Returns a function (q_BTNH, k_BTKH, v_BTKH) -> out_BTNH that computes causal attention within documents.

  A row holds one document after the other, and a query sees only keys of its own document. Masks and document
  boundaries are computed in this call, once for all layers.

  Args:
    kernel: one of KERNELS. 'auto' takes the first of these that supports the device, mesh, head width, length and
      dtype: on TPU splash; on GPU hopper, triton, cudnn; on CPU blocks; on any device plain.
    segments_BT: int32, the number of each token's document; 0 is padding.
    dtype: the dtype of q, k and v.
    kv_heads, width: K and H, the number of key heads and their width.

  Raises:
    ValueError: `kernel` doesn't support such rows; see `check_kernel`.
  """
  if kernel == 'auto':
    kernel = next(_supported(segments_BT.shape[1], kv_heads, width, dtype))
  check_kernel(kernel, segments_BT.shape[1], kv_heads, width, dtype)
  makers = {
    'plain': _plain, 'blocks': _blocks, 'splash': _splash, 'hopper': _hopper, 'triton': _triton, 'cudnn': _cudnn}
  return makers[kernel](segments_BT)


def check_kernel(kernel: str, length: int, kv_heads: int, width: int, dtype) -> None:
  """Raises ValueError if a kernel doesn't support such rows on the current platform and mesh.

  The message begins with 'attention='. The arguments are those of `rows_attention` and `_supported`.
  """
  multiple = {'splash': 128 * shards('length'), 'triton': 128, 'hopper': 128, 'cudnn': 2}.get(kernel, 1)
  if length % multiple:
    raise ValueError(f'attention={kernel} needs rows of a multiple of {multiple} tokens, got {length}')
  if kernel in ('triton', 'hopper') and kv_heads % shards('row_heads'):
    raise ValueError(f'attention={kernel} needs kv_heads that {shards("row_heads")} devices (tensor x context) divide, '
                     f'got {kv_heads}')
  # On other platforms, splash and triton are interpreted, which works for heads of any width. 'auto' doesn't choose
  # triton for float32, which it supports.
  compiled = kernel in GPU_ONLY_ATTENTION or (kernel, platform()) in (('splash', 'tpu'), ('triton', 'gpu'))
  choice = _supported(length, kv_heads, width, jnp.bfloat16 if kernel == 'triton' else dtype)
  if compiled and kernel not in choice:
    raise ValueError(f'attention={kernel} does not support head_dim={width} and {jnp.dtype(dtype).name} on '
                     f'{device_kind()} with jax {jax.__version__}')


def _supported(length: int, kv_heads: int, width: int, dtype) -> Iterator[str]:
  """Yields the names of the implementations that work on the current platform and mesh, the fastest first.

  length: the number of tokens per row.
  kv_heads, width, dtype: the number of key heads, their width, and the dtype of q, k and v.
  """
  whole_rows, bfloat16 = shards('length') == 1, dtype == jnp.bfloat16
  on = platform()
  if on == 'tpu' and width % 128 == 0 and length % (128 * shards('length')) == 0:
    yield 'splash'
  if on == 'cpu' and whole_rows:
    yield 'blocks'
  if on == 'gpu' and bfloat16 and kv_heads % shards('row_heads') == 0:
    from betarank.model.kernels import attention_hopper  # takes a second to import
    if attention_hopper.fits(length, width, device_kind()):
      yield 'hopper'
    if attention_triton.fits(length, width):
      yield 'triton'
  if on == 'gpu' and bfloat16 and whole_rows and width % 8 == 0 and width <= _widest_for_cudnn() and length % 2 == 0:
    yield 'cudnn'
  yield 'plain'


def _widest_for_cudnn() -> int:
  """Returns the largest head width that cuDNN's attention supports on this GPU: 256 on Hopper and later, else 128."""
  capability = getattr(jax.devices()[0], 'compute_capability', '0.0')  # such as '9.0'; only devices of GPUs have it
  return 256 if int(capability.split('.')[0]) >= 9 else 128


def _plain(segments_BT):
  index_1T = jnp.arange(segments_BT.shape[1])[None]
  visible_BTT = visible(index_1T, segments_BT, index_1T, segments_BT)

  def run(q_BTNH, k_BTKH, v_BTKH):
    out_BTNH = attend(q_BTNH, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), visible_BTT)
    return checkpoint_name(out_BTNH, 'attention')

  return run


def _blocks(segments_BT):
  """Returns a function (q, k, v) -> output that computes plain attention, one block of queries at a time.

  A block has an eighth of the queries, but at least 128. It uses only the keys up to its last query. Scores aren't
  saved for the backward pass, because computing them again is faster on a CPU.
  """
  length = segments_BT.shape[1]
  size = max(128, -(-length // 8))
  index_1T = jnp.arange(length)[None]
  visible_BTT = visible(index_1T, segments_BT, index_1T, segments_BT)
  attend_block = jax.checkpoint(attend)

  def run(q_BTNH, k_BTKH, v_BTKH):
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    blocks = [slice(start, start + size) for start in range(0, length, size)]
    out_BTNH = jnp.concatenate([
      attend_block(q_BTNH[:, b], k_BKTH[:, :, :b.stop], v_BKTH[:, :, :b.stop], visible_BTT[:, b, :b.stop])
      for b in blocks], 1)
    return checkpoint_name(out_BTNH, 'attention')

  return run


def _cudnn(segments_BT):
  """Returns a function (q, k, v) -> output that runs cuDNN's flash attention.

  cuDNN skips blocks above the diagonal. It doesn't support segments, so it gets a mask [B, 1, T, T] that is True within
  documents.
  """
  same_B1TT = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
  return lambda q_BTNH, k_BTKH, v_BTKH: jax.nn.dot_product_attention(
    q_BTNH, k_BTKH, v_BTKH, mask=same_B1TT, is_causal=True, implementation='cudnn')


def _hopper(segments_BT):
  from betarank.model.kernels import attention_hopper
  return _by_documents(attention_hopper.attention, segments_BT)


def _triton(segments_BT):
  return _by_documents(attention_triton.attention, segments_BT)


def _by_documents(kernel, segments_BT):
  """Returns a function (q, k, v) -> output that runs `kernel` on each device, for the device's own rows and heads.

  kernel: a function (q, k, v, start, end) -> output, where start and end come from `attention_triton.documents`.

  If the mesh splits the length of rows, an all-to-all before the kernel gives each device whole rows, but only a part
  of the heads. An all-to-all after the kernel reverses this (DeepSpeed-Ulysses, arXiv 2309.14509).
  """
  ends = attention_triton.documents(segments_BT)

  def run(q_BTNH, k_BTKH, v_BTKH):
    heads, tokens = spec('batch', None, 'row_heads', None), spec('batch', None)
    rows = per_device(kernel, (heads, heads, heads, tokens, tokens), heads)
    return rows(q_BTNH, k_BTKH, v_BTKH, *ends)

  return run


def _splash(segments_BT):
  """Returns a function (q, k, v) -> output that runs splash attention, a Pallas kernel for TPU (interpreted elsewhere).

  Each device processes its own rows, heads and queries, with all keys of its rows.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes 0.1 s to import

  length = segments_BT.shape[1]

  def run(q_BTNH, k_BTKH, v_BTKH):
    heads, width = q_BTNH.shape[2:]
    kernel = _splash_kernel(heads, length)
    q_BNTH, k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (q_BTNH * width**-0.5, k_BTKH, v_BTKH))
    rows = lambda kernel, q, k, v, q_segments, kv_segments: jax.vmap(
      lambda *x: kernel(*x[:3], segment_ids=splash.SegmentIds(*x[3:])))(q, k, v, q_segments, kv_segments)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:  # XLA can't partition a kernel
      q, kv = spec('batch', 'act_heads', 'length', None), spec('batch', 'act_heads', None, None)
      parts = kernel.manual_sharding_spec(NamedSharding(mesh, spec('act_heads', 'length')))
      rows = jax.shard_map(rows, in_specs=(parts, q, kv, kv, spec('batch', 'length'), spec('batch', None)), out_specs=q,
                           check_vma=False)
    return rows(kernel, q_BNTH, k_BKTH, v_BKTH, segments_BT, segments_BT).swapaxes(1, 2)

  return run


def _splash_kernel(heads: int, length: int):
  """Returns the splash kernel for all heads of one row. docs/plans.md explains the kernel's block sizes, which are in
  tokens.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  queries = length // shards('length')
  block = next(size for size in (1024, 512, 256, 128) if not queries % size)
  keys = min(block, 512)  # of one product
  sizes = splash.BlockSizes(
    block_q=block, block_kv=block, block_kv_compute=keys, block_q_dkv=block, block_kv_dkv=block,
    block_kv_dkv_compute=keys, use_fused_bwd_kernel=True)
  mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
  with jax.ensure_compile_time_eval():
    return splash.make_splash_mha(
      mask, block_sizes=sizes, head_shards=shards('act_heads'), q_seq_shards=shards('length'),
      interpret=platform() != 'tpu', residual_checkpoint_name='attention')
