"""Triton kernels for causal attention within documents on a GPU. They skip blocks that no query sees.

A row holds one document after the other, so a query sees the keys from the start of its document to itself. Blocks of
keys before the document are never read. Only blocks at the edges of documents and on the diagonal are masked. Neither
the forward nor the backward pass holds all scores in memory.

# B batch  T tokens  K key heads  G query heads per key head  N = K·G query heads  H head width
# Q, S queries, keys of a block
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from betarank.model.kernels.arithmetic import dot, exp2_scale
from betarank.model.sharding import platform

UNSEEN = -1e30
# (queries, keys, warps, stages) of each kernel: the fastest of those tried on an H100 (benchmarks/attention.py).
FORWARD = 128, 64, 8, 3
DQ = 128, 64, 8, 3
DKV = 64, 128, 8, 2


def fits(length: int, width: int) -> bool:
  """Returns True if the kernels support rows of this length and heads of this width."""
  return length % 128 == 0 and width in (32, 64, 128)


def documents(segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (start_BT, end_BT), int32, for each token: the indices at which its document starts and ends.

  The end is the index after the document's last token.
  """
  length = segments_BT.shape[1]
  index_T = jnp.arange(length, dtype=jnp.int32)
  change_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
  first_BT = jnp.pad(change_BT, ((0, 0), (1, 0)), constant_values=True)
  last_BT = jnp.pad(change_BT, ((0, 0), (0, 1)), constant_values=True)
  start_BT = lax.cummax(jnp.where(first_BT, index_T, 0), axis=1)
  end_BT = lax.cummin(jnp.where(last_BT, index_T + 1, length), axis=1, reverse=True)
  return start_BT, end_BT


@jax.custom_vjp
def attention(q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT) -> jax.Array:
  """Returns softmax(q·k/√H) v over the keys from start_BT to the query itself: [B, T, N, H], computed in float32.

  start_BT and end_BT come from `documents`. Only the gradient uses end_BT.
  """
  return _forward(q_BTNH, k_BTKH, v_BTKH, start_BT)[0]


def _attention_fwd(q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT):
  out_BTNH, lse_BNT = (checkpoint_name(x, 'attention') for x in _forward(q_BTNH, k_BTKH, v_BTKH, start_BT))
  return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT, out_BTNH, lse_BNT)


def _forward(q_BTNH, k_BTKH, v_BTKH, start_BT):
  """Returns (out_BTNH, lse_BNT). lse is float32, the base-2 logarithm of the sum of each query's exponentials."""
  (batch, length, heads, width), group = q_BTNH.shape, q_BTNH.shape[2] // k_BTKH.shape[2]
  queries, keys, warps, stages = FORWARD
  scale = exp2_scale(width)
  tiles = length // queries

  def body(q_ref, k_ref, v_ref, start_ref, out_ref, lse_ref):
    tile = tiles - 1 - pl.program_id(2)
    row_Q, start_Q = tile * queries + jnp.arange(queries), start_ref[...]
    q_QH = q_ref[...]

    def step(masked, j, carry):
      out_QH, most_Q, sum_Q = carry
      at = pl.ds(j * keys, keys)
      s_QS = dot(q_QH, k_ref[at, :].T)
      if masked:
        s_QS = jnp.where(_seen(j * keys + jnp.arange(keys), start_Q, row_Q), s_QS, UNSEEN)
      new_Q = jnp.maximum(most_Q, s_QS.max(1) * scale)
      p_QS, factor_Q = jnp.exp2(s_QS * scale - new_Q[:, None]), jnp.exp2(most_Q - new_Q)
      out_QH = out_QH * factor_Q[:, None] + dot(p_QS.astype(q_QH.dtype), v_ref[at, :])
      return out_QH, new_Q, sum_Q * factor_Q + p_QS.sum(1)

    carry = jnp.zeros((queries, width), jnp.float32), jnp.full(queries, -jnp.inf), jnp.zeros(queries)
    out_QH, most_Q, sum_Q = _over_keys(step, start_ref, tile, queries, keys, carry)
    out_ref[...] = (out_QH / sum_Q[:, None]).astype(out_ref.dtype)
    lse_ref[...] = most_Q + jnp.log2(sum_Q)

  reverse = lambda i: tiles - 1 - i  # the last grid index varies slowest, so the longest tiles start first
  rows = pl.BlockSpec((None, queries, None, width), lambda n, b, i: (b, reverse(i), n, 0))
  all_keys = pl.BlockSpec((None, length, None, width), lambda n, b, i: (b, 0, n // group, 0))
  return _call(
    body, 'attention', warps, stages, grid=(heads, batch, tiles),
    in_specs=[rows, all_keys, all_keys, pl.BlockSpec((None, queries), lambda n, b, i: (b, reverse(i)))],
    out_specs=[rows, pl.BlockSpec((None, None, queries), lambda n, b, i: (b, n, reverse(i)))],
    out_shape=[jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
               jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)],
  )(q_BTNH, k_BTKH, v_BTKH, start_BT)


def _attention_bwd(saved, dout_BTNH):
  q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT, out_BTNH, lse_BNT = saved
  delta_BNT = jnp.einsum('BTNH,BTNH->BNT', out_BTNH, dout_BTNH, preferred_element_type=jnp.float32)
  args = q_BTNH, k_BTKH, v_BTKH, dout_BTNH, lse_BNT, delta_BNT, start_BT
  return _dq(*args), *_dkv(*args, end_BT), None, None


attention.defvjp(_attention_fwd, _attention_bwd)


def _dq(q_BTNH, k_BTKH, v_BTKH, dout_BTNH, lse_BNT, delta_BNT, start_BT):
  (batch, length, heads, width), group = q_BTNH.shape, q_BTNH.shape[2] // k_BTKH.shape[2]
  queries, keys, warps, stages = DQ
  scale, tiles = exp2_scale(width), length // queries

  def body(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, start_ref, dq_ref):
    tile = tiles - 1 - pl.program_id(2)
    row_Q, start_Q = tile * queries + jnp.arange(queries), start_ref[...]
    q_QH, dout_QH, lse_Q, delta_Q = q_ref[...], dout_ref[...], lse_ref[...], delta_ref[...]

    def step(masked, j, dq_QH):
      at = pl.ds(j * keys, keys)
      k_SH = k_ref[at, :]
      p_QS = jnp.exp2(dot(q_QH, k_SH.T) * scale - lse_Q[:, None])
      if masked:
        p_QS = jnp.where(_seen(j * keys + jnp.arange(keys), start_Q, row_Q), p_QS, 0)
      ds_QS = p_QS * (dot(dout_QH, v_ref[at, :].T) - delta_Q[:, None])
      return dq_QH + dot(ds_QS.astype(k_SH.dtype), k_SH)

    dq_QH = _over_keys(step, start_ref, tile, queries, keys, jnp.zeros((queries, width), jnp.float32))
    dq_ref[...] = (dq_QH * width**-0.5).astype(dq_ref.dtype)

  reverse = lambda i: tiles - 1 - i
  rows = pl.BlockSpec((None, queries, None, width), lambda n, b, i: (b, reverse(i), n, 0))
  per_row = pl.BlockSpec((None, None, queries), lambda n, b, i: (b, n, reverse(i)))
  all_keys = pl.BlockSpec((None, length, None, width), lambda n, b, i: (b, 0, n // group, 0))
  return _call(
    body, 'attention_dq', warps, stages, grid=(heads, batch, tiles),
    in_specs=[rows, all_keys, all_keys, rows, per_row, per_row,
              pl.BlockSpec((None, queries), lambda n, b, i: (b, reverse(i)))],
    out_specs=rows, out_shape=jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
  )(q_BTNH, k_BTKH, v_BTKH, dout_BTNH, lse_BNT, delta_BNT, start_BT)


def _dkv(q_BTNH, k_BTKH, v_BTKH, dout_BTNH, lse_BNT, delta_BNT, start_BT, end_BT):
  (batch, length, heads, width), group = q_BTNH.shape, q_BTNH.shape[2] // k_BTKH.shape[2]
  queries, keys, warps, stages = DKV
  scale = exp2_scale(width)

  def body(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, start_ref, end_ref, dk_ref, dv_ref):
    tile = pl.program_id(2)
    key_S = tile * keys + jnp.arange(keys)
    k_SH, v_SH = k_ref[...], v_ref[...]

    def step(g, masked, i, carry):
      dk_SH, dv_SH = carry
      at = pl.ds(i * queries, queries)
      q_QH, dout_QH = q_ref[at, g], dout_ref[at, g]
      p_SQ = jnp.exp2(dot(k_SH, q_QH.T) * scale - lse_ref[g, at][None])
      if masked:
        row_Q = i * queries + jnp.arange(queries)
        p_SQ = jnp.where(_seen(key_S, start_ref[at], row_Q).T, p_SQ, 0)
      dv_SH += dot(p_SQ.astype(q_QH.dtype), dout_QH)
      ds_SQ = p_SQ * (dot(v_SH, dout_QH.T) - delta_ref[g, at][None])
      return dk_SH + dot(ds_SQ.astype(q_QH.dtype), q_QH), dv_SH

    # Three ranges of queries: those at the diagonal, which see some keys; those in the first key's document, which see
    # all keys; and the rest, which see some keys.
    below = pl.cdiv((tile + 1) * keys, queries)
    full = jnp.maximum(end_ref[tile * keys] // queries, below)
    last = jnp.maximum(pl.cdiv(end_ref[tile * keys + keys - 1], queries), below)
    carry = jnp.zeros((keys, width), jnp.float32), jnp.zeros((keys, width), jnp.float32)
    for g in range(group):
      carry = lax.fori_loop(tile * keys // queries, below, functools.partial(step, g, True), carry)
      carry = lax.fori_loop(below, full, functools.partial(step, g, False), carry)
      carry = lax.fori_loop(full, last, functools.partial(step, g, True), carry)
    dk_ref[...] = (carry[0] * width**-0.5).astype(dk_ref.dtype)
    dv_ref[...] = carry[1].astype(dv_ref.dtype)

  rows = pl.BlockSpec((None, keys, None, width), lambda n, b, i: (b, i, n, 0))
  all_queries = pl.BlockSpec((None, length, group, width), lambda n, b, i: (b, 0, n, 0))
  per_row = pl.BlockSpec((None, group, length), lambda n, b, i: (b, n, 0))
  per_token = pl.BlockSpec((None, length), lambda n, b, i: (b, 0))
  return _call(
    body, 'attention_dkv', warps, stages, grid=(heads // group, batch, length // keys),
    in_specs=[all_queries, rows, rows, all_queries, per_row, per_row, per_token, per_token],
    out_specs=[rows, rows],
    out_shape=[jax.ShapeDtypeStruct(k_BTKH.shape, k_BTKH.dtype), jax.ShapeDtypeStruct(v_BTKH.shape, v_BTKH.dtype)],
  )(q_BTNH, k_BTKH, v_BTKH, dout_BTNH, lse_BNT, delta_BNT, start_BT, end_BT)


def _over_keys(step, start_ref, tile, queries: int, keys: int, carry):
  """Computes carry = step(masked, j, carry) for each block j of keys that a block of queries sees. Returns the final
  carry.

  step: a function. `masked` is True if some query may not see all keys of block j.
  start_ref: the start of each query's document.
  tile: the number of the block of queries in its row.
  queries, keys: the sizes of a block of queries and of a block of keys.
  """
  last = pl.cdiv((tile + 1) * queries, keys)
  full = jnp.minimum(pl.cdiv(start_ref[queries - 1], keys), last)  # the first block in the documents of all queries
  diagonal = jnp.maximum(tile * queries // keys, full)
  carry = lax.fori_loop(start_ref[0] // keys, full, functools.partial(step, True), carry)
  carry = lax.fori_loop(full, diagonal, functools.partial(step, False), carry)
  return lax.fori_loop(diagonal, last, functools.partial(step, True), carry)


def _seen(key_S, start_Q, row_Q) -> jax.Array:
  """Returns a bool mask [Q, S], True where a query sees a key.

  key_S, row_Q: the indices of the keys and of the queries in their row.
  start_Q: the index at which each query's document starts.
  """
  return (key_S[None] >= start_Q[:, None]) & (key_S[None] <= row_Q[:, None])


def _call(body, name: str, warps: int, stages: int, **settings):
  compiler = plgpu.CompilerParams(num_warps=warps, num_stages=stages)
  return pl.pallas_call(body, compiler_params=compiler, interpret=platform() != 'gpu', name=name, **settings)
