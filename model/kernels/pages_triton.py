"""A Triton kernel for attention of one token per row over pages of keys and values, on a GPU.

A unit is a few rows that share a prompt. A program processes one key head of a unit. It reads the prompt's pages once
for all rows of the unit, and then each row's own pages, which no other row uses. It reads only pages that hold tokens.
If there are few units, several programs share the pages of a unit.

# R rows  U units of up to M rows  J pages of a row, the first I of them for its prompt  P pages  S tokens of a page
# 2 keys, values  K key heads  G query heads per key head  N = K·G query heads  H head width
# Q queries of a unit and key head  C parts, into which the pages are divided
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from betarank.model.kernels.arithmetic import dot, exp2_scale
from betarank.model.sharding import platform

UNSEEN = -1e30
WARPS, STAGES = 4, 2
PROGRAMS = 512  # that an H100 needs to read at its memory's rate


def fits(size: int, width: int) -> bool:
  """Returns True if the kernel supports pages of this size and heads of this width."""
  return all(n >= 16 and n & (n - 1) == 0 for n in (size, width))


def attention(q_RNH, pages_P2KSH, table, length_R, prompt_pages: int) -> jax.Array:
  """Returns softmax(q·k/√H) v over the keys in each row's pages: [R, N, H], computed in float32.

  Args:
    q_RNH: the queries of one token per row.
    pages_P2KSH: keys and values, in the dtype of the queries.
    table: a decode.Table. The output of a row that is in none of the table's units is arbitrary.
    length_R: int32, the number of tokens in each row's own pages. Tokens in the prompt's pages aren't counted.
    prompt_pages: I, the number of prompt pages in each row of the table.
  """
  (rows, heads, width), (kv_heads, size) = q_RNH.shape, pages_P2KSH.shape[2:4]
  (units, members), group = table.rows_UM.shape, heads // kv_heads
  queries = max(16, pl.next_power_of_2(members * group))
  scale = exp2_scale(width)
  parts = min(16, max(1, PROGRAMS // (kv_heads * pl.cdiv(rows, members))))

  def body(q_ref, pages_ref, rows_ref, count_ref, table_ref, prefix_ref, length_ref, out_ref, *lse_refs):
    head, unit, part = (pl.program_id(axis) for axis in range(3))
    count = count_ref[unit]

    @pl.when(count > 0)
    def _():
      # Queries beyond the unit's are copies of others, and write the same results to the same places.
      n_Q = jnp.arange(queries) % (members * group)
      row_Q, head_Q = rows_ref[unit, n_Q // group], head * group + n_Q % group
      q_QH = q_ref[row_Q, head_Q]

      def step(row, column, length, shared, j, carry):
        out_QH, most_Q, sum_Q = carry
        page = table_ref[row, column + j]
        s_QS = dot(q_QH, pages_ref[page, 0, head].T) * scale
        seen_QS = jnp.broadcast_to((j * size + jnp.arange(size) < length)[None], s_QS.shape)
        if not shared:
          seen_QS &= (row_Q == row)[:, None]
        s_QS = jnp.where(seen_QS, s_QS, UNSEEN)
        new_Q = jnp.maximum(most_Q, s_QS.max(1))
        p_QS, factor_Q = jnp.exp2(s_QS - new_Q[:, None]), jnp.exp2(most_Q - new_Q)
        if not shared:
          p_QS = jnp.where(seen_QS, p_QS, 0)
        out_QH = out_QH * factor_Q[:, None] + dot(p_QS.astype(q_QH.dtype), pages_ref[page, 1, head])
        return out_QH, new_Q, sum_Q * factor_Q + p_QS.sum(1)

      def over(row, column, length, shared, carry):
        each = pl.cdiv(pl.cdiv(length, size), parts)
        first, last = part * each, jnp.minimum((part + 1) * each, pl.cdiv(length, size))
        return lax.fori_loop(first, last, functools.partial(step, row, column, length, shared), carry)

      carry = jnp.zeros((queries, width), jnp.float32), jnp.full(queries, UNSEEN), jnp.zeros(queries)
      first = rows_ref[unit, 0]
      carry = over(first, 0, prefix_ref[first], True, carry)
      for m in range(members):
        row = rows_ref[unit, m]
        carry = over(row, prompt_pages, jnp.where(m < count, length_ref[row], 0), False, carry)
      out_QH, most_Q, sum_Q = carry
      total_Q = jnp.where(sum_Q > 0, sum_Q, 1.0)
      out_QH = (out_QH / total_Q[:, None]).astype(out_ref.dtype)
      if parts == 1:
        out_ref[row_Q, head_Q] = out_QH
      else:
        out_ref[part, row_Q, head_Q] = out_QH
        lse_refs[0][part, row_Q, head_Q] = jnp.where(sum_Q > 0, most_Q + jnp.log2(total_Q), UNSEEN)

  out_shape = [jax.ShapeDtypeStruct(q_RNH.shape, q_RNH.dtype)]
  if parts > 1:
    out_shape = [jax.ShapeDtypeStruct((parts, *q_RNH.shape), jnp.float32),
                 jax.ShapeDtypeStruct((parts, rows, heads), jnp.float32)]
  out = pl.pallas_call(
    body, grid=(kv_heads, units, parts), name='attention_pages', out_shape=out_shape,
    compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES), interpret=platform() != 'gpu',
  )(q_RNH, pages_P2KSH, table.rows_UM, table.count_U, table.pages_BJ, table.prefix_B, length_R)
  if parts == 1:
    return out[0]
  out_CRNH, lse_CRN = out
  weight_CRN = jnp.exp2(lse_CRN - lse_CRN.max(0, keepdims=True))
  return (jnp.sum(out_CRNH * weight_CRN[..., None], 0) / weight_CRN.sum(0)[..., None]).astype(q_RNH.dtype)
