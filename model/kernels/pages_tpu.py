"""A Pallas kernel for attention of one token per row over pages of keys and values, on a TPU.

A step of the grid processes a few pages of a row. Meanwhile, the pages of the next step are fetched. Every row gets as
many steps as the row with the most pages needs, but no pages are fetched beyond a row's last page.

# R rows  J pages of a row, the first I of them for its prompt  P pages  S tokens of a page  K key heads
# 2 keys, values  G query heads per key head  N = K·G query heads  H head width
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from betarank.model.sharding import platform

UNSEEN = -1e30
AT_ONCE = 4  # pages of a step


def fits(size: int, width: int) -> bool:
  """Returns True if the kernel supports pages of this size and heads of this width."""
  return size % 16 == 0 and width % 128 == 0


def attention(q_RNH, pages_P2KSH, table, length_R, prompt_pages: int) -> jax.Array:
  """Returns softmax(q·k/√H) v over the keys in each row's pages: [R, N, H], computed in float32.

  The arguments are the same as for pages_triton.attention. The table's units aren't used.
  """
  (rows, heads, width), (_, _, kv_heads, size, _) = q_RNH.shape, pages_P2KSH.shape
  prefix_R = table.prefix_B
  # A step has AT_ONCE columns of the prompt's pages or of the row's own. prompt_R and own_R: the steps of each.
  steps = lambda tokens_R: pl.cdiv(tokens_R, size * AT_ONCE).astype(jnp.int32)
  prompt_R, all_R = steps(prefix_R), steps(prefix_R) + steps(length_R)

  def column(i, row, step, prompt_R, prefix_R, length_R):
    """Returns (column, tokens) of the i-th page of a grid step: its column in table.pages_BJ, and its number of tokens.

    The last step of a row's prompt pages, or of its own pages, may have room for more pages than are left. For the room
    without a page, returns the column of the last page, which isn't fetched again, and 0 tokens.

    row, step: the position in the grid.
    prompt_R: the number of steps for each row's prompt pages. The steps for the row's own pages follow.
    prefix_R, length_R: the numbers of tokens in each row's prompt pages, and in its own pages.
    """
    own = step >= prompt_R[row]
    at = (step - jnp.where(own, prompt_R[row], 0)) * AT_ONCE + i
    tokens = jnp.where(own, length_R[row], prefix_R[row])
    # Beyond the last page: the last page again, which isn't fetched twice.
    last = jnp.maximum(pl.cdiv(tokens, size) - 1, 0)
    return jnp.where(own, prompt_pages, 0) + jnp.minimum(at, last), jnp.clip(tokens - at * size, 0, size)

  def page(i, row, step, pages, prompt_R, all_R, prefix_R, length_R):
    step = jnp.minimum(step, jnp.maximum(all_R[row] - 1, 0))
    return pages[row, column(i, row, step, prompt_R, prefix_R, length_R)[0]], 0, 0, 0, 0

  def body(pages, prompt_R, all_R, prefix_R, length_R, q_ref, *refs):
    page_refs, (out_ref, most_ref, sum_ref, total_ref) = refs[:AT_ONCE], refs[AT_ONCE:]
    row, step = pl.program_id(0), pl.program_id(1)

    @pl.when(step == 0)
    def _():
      most_ref[...] = jnp.full_like(most_ref, UNSEEN)
      sum_ref[...], total_ref[...] = jnp.zeros_like(sum_ref), jnp.zeros_like(total_ref)

    @pl.when(step < all_R[row])
    def _():
      for i, page_ref in enumerate(page_refs):
        filled = column(i, row, step, prompt_R, prefix_R, length_R)[1]
        seen_1S = lax.broadcasted_iota(jnp.int32, (1, size), 1) < filled
        for k in range(kv_heads):
          score_GS = _dot(q_ref[0, k], page_ref[0, 0, k], 1) * width**-0.5
          score_GS = jnp.where(seen_1S, score_GS, UNSEEN)
          most_G1 = most_ref[k]
          new_G1 = jnp.maximum(most_G1, score_GS.max(1, keepdims=True))
          weight_GS = jnp.where(seen_1S, jnp.exp(score_GS - new_G1), 0)
          fade_G1 = jnp.exp(most_G1 - new_G1)
          most_ref[k] = new_G1
          sum_ref[k] = sum_ref[k] * fade_G1 + weight_GS.sum(1, keepdims=True)
          total_ref[k] = total_ref[k] * fade_G1 + _dot(weight_GS.astype(page_ref.dtype), page_ref[0, 1, k], 0)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
      out_ref[0] = (total_ref[...] / jnp.maximum(sum_ref[...], 1e-30)).astype(out_ref.dtype)

  group = heads // kv_heads
  by_row = pl.BlockSpec((1, kv_heads, group, width), lambda row, step, *_: (row, 0, 0, 0))
  blocks = [pl.BlockSpec((1, 2, kv_heads, size, width), functools.partial(page, i)) for i in range(AT_ONCE)]
  scratch = lambda last: pltpu.VMEM((kv_heads, group, last), jnp.float32)
  out_RKGH = pl.pallas_call(
    body, name='attention_pages', out_shape=jax.ShapeDtypeStruct((rows, kv_heads, group, width), q_RNH.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5, grid=(rows, jnp.maximum(jnp.max(all_R), 1)), in_specs=[by_row, *blocks], out_specs=by_row,
      scratch_shapes=[scratch(1), scratch(1), scratch(width)]),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')),
    interpret=platform() != 'tpu',
  )(table.pages_BJ, prompt_R, all_R, prefix_R, length_R, q_RNH.reshape(rows, kv_heads, group, width),
    *[pages_P2KSH] * AT_ONCE)
  return out_RKGH.reshape(q_RNH.shape)


def _dot(a, b, contract: int):
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(a, b, (((1,), (contract,)), ((), ())), precision=precision,
                         preferred_element_type=jnp.float32)
