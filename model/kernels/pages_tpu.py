"""A Pallas kernel that writes one token per row into pages of keys and values, and attends to them, on a TPU.

The kernel processes one row after the other, in blocks of a few pages: first the prompt's pages, then the row's own.
While it processes a block, it fetches the next block, which may belong to the next row. Only pages that hold tokens are
read. A row's new token is put into the block on the chip, and is then written to the row's last page.

# R rows  J pages of a row, the first I of them for its prompt  P pages  S tokens of a page  K key heads
# 2 the dimension of the keys and the values  G query heads per key head  N = K·G query heads  H head width
# C cores of a chip  B tokens of a block  W tokens that are copied to a page for each new token
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from betarank.model.kernels.arithmetic import dot
from betarank.model.sharding import cores, platform

UNSEEN = -1e30
BLOCK_BYTES = 2**19  # large enough for fetching at the memory's rate
SMEM_BYTES = 2**20  # the memory for scalars
VMEM_BYTES = 24 * 10**6  # of all rows' data; compiled for v5e (libtpu 0.0.52), 23.6 MB fit and 47 MB don't
WRITTEN = 16  # tokens that are written at once; one bfloat16 token isn't contiguous in memory


def fits(q_RNH, pages_P2KSH, table) -> bool:
  """Returns True if the kernel supports these pages and heads, and if the data of all rows fits on the chip.

  Only the shapes and the dtype of the arguments are used. They are those of `step`.
  """
  (rows, heads, width), (kv_heads, size), itemsize = q_RNH.shape, pages_P2KSH.shape[2:4], q_RNH.dtype.itemsize
  least = max(1, 4 // itemsize)  # queries of a key head in VMEM; fewer are padded
  scalars = 4 * rows * (pl.cdiv(table.pages_BJ.shape[1], 128) * 128 + 5)  # the table, and five numbers per row
  of_key_head = 2 * (max(heads // kv_heads, least) + least)  # queries and outputs, the new key and value
  vectors = rows * kv_heads * of_key_head * width * itemsize
  return size % WRITTEN == 0 and width % 128 == 0 and scalars <= SMEM_BYTES and vectors <= VMEM_BYTES


def step(pages_P2KSH, q_RNH, k_RKH, v_RKH, table, length_R, real_R, prompt_pages: int):
  """Writes the keys and values of one token per row into the pages, and computes this token's attention.

  The kernel writes the token itself, because XLA's scatter needs the pages in another layout, and would copy all pages
  for every token.

  Args:
    pages_P2KSH: keys and values, in the dtype of the queries. The returned pages use the same memory.
    q_RNH, k_RKH, v_RKH: the query, key and value of each row's token.
    table: a decode.Table. Its units aren't used.
    length_R: int32, the number of tokens in each row's own pages, before this token.
    real_R: bool, False for rows without a token, for which nothing is read or written.
    prompt_pages: I, the number of prompt pages in each row of the table.

  Returns:
    (out_RNH, pages_P2KSH). out_RNH is softmax(q·k/√H) v over the keys in the row's pages, computed in float32. In rows
    without a token it is 0.
  """
  (rows, heads, width), (_, _, kv_heads, size, _) = q_RNH.shape, pages_P2KSH.shape
  group, ways = heads // kv_heads, cores()
  at_once = max(1, BLOCK_BYTES // (2 * kv_heads * size * width * pages_P2KSH.dtype.itemsize))  # pages of a block
  at_once = min(at_once, max(prompt_pages, table.pages_BJ.shape[1] - prompt_pages))
  block_tokens = at_once * size
  blocks = lambda tokens_R: pl.cdiv(tokens_R, block_tokens).astype(jnp.int32)
  prompt_R = blocks(table.prefix_B)
  last_R = prompt_R + blocks(length_R + 1) - 1
  order_R = jnp.argsort(~real_R).astype(jnp.int32)  # rows with a token first
  live_1 = jnp.sum(real_R, dtype=jnp.int32)[None]

  def body(pages, live, order, prompt, last, prefix, length, q_ref, new_ref, pages_ref, out_ref, written_ref,
           block_ref, tile_ref, most_ref, sum_ref, total_ref, fetched, wrote):
    first, live = pl.program_id(0), live[0]
    out_ref[...], block_ref[...] = jnp.zeros_like(out_ref), jnp.zeros_like(block_ref)  # 0 times any number is 0

    def fetch(row, block, slot, act):
      """Calls act(copy) for each page of a row's block. `copy` is the asynchronous copy of the page to block_ref[slot].

      `act` starts the copy or waits for it. Returns the number of tokens in the block.
      """
      own = block >= prompt[row]
      column = (block - jnp.where(own, prompt[row], 0)) * at_once
      tokens = jnp.minimum(jnp.where(own, length[row] + 1, prefix[row]) - column * size, block_tokens)
      column += jnp.where(own, prompt_pages, 0)

      def page(i, _):
        act(pltpu.make_async_copy(pages_ref.at[pages[row, column + i]],
                                  block_ref.at[slot, :, :, pl.ds(pl.multiple_of(i * size, size), size)],
                                  fetched.at[slot]))
        return 0

      lax.fori_loop(0, pl.cdiv(tokens, size), page, 0)
      return tokens

    def write(row):
      """Returns the asynchronous copy of tile_ref to the row's page. One of the WRITTEN tokens in tile_ref is new."""
      page = pages[row, prompt_pages + length[row] // size]
      start = pl.multiple_of(length[row] % size // WRITTEN * WRITTEN, WRITTEN)
      return pltpu.make_async_copy(tile_ref, written_ref.at[page, :, :, pl.ds(start, WRITTEN)], wrote)

    @pl.when(first < live)
    def _():
      fetch(order[first], 0, 0, lambda copy: copy.start())

    def process(carry):
      i, block, slot = carry
      row = order[i]
      ends = block == last[row]
      next_i, next_block = jnp.where(ends, i + ways, i), jnp.where(ends, 0, block + 1)

      @pl.when(next_i < live)
      def _():
        fetch(order[jnp.minimum(next_i, rows - 1)], next_block, 1 - slot, lambda copy: copy.start())

      tokens = fetch(row, block, slot, lambda copy: copy.wait())

      @pl.when(block == 0)
      def _():
        most_ref[...] = jnp.full_like(most_ref, UNSEEN)
        sum_ref[...], total_ref[...] = jnp.zeros_like(sum_ref), jnp.zeros_like(total_ref)

      @pl.when(ends)
      def _():
        @pl.when(i > first)
        def _():
          write(row).wait()  # the row before; all have the same size

        start = pl.multiple_of((tokens - 1) // WRITTEN * WRITTEN, WRITTEN)
        tile = block_ref.at[slot, :, :, pl.ds(start, WRITTEN)]
        new_W1 = lax.broadcasted_iota(jnp.int32, (WRITTEN, 1), 0) == tokens - 1 - start
        for kv in range(2):
          for k in range(kv_heads):
            new_1H, old_WH = new_ref[row, kv, k].astype(jnp.float32), tile[kv, k].astype(jnp.float32)
            tile_ref[kv, k] = jnp.where(new_W1, new_1H, old_WH).astype(tile_ref.dtype)
        tile[...] = tile_ref[...]
        write(row).start()

      seen_1B = lax.broadcasted_iota(jnp.int32, (1, block_tokens), 1) < tokens
      for k in range(kv_heads):
        score_GB = dot(q_ref[row, k], block_ref[slot, 0, k], (1, 1)) * width**-0.5
        score_GB = jnp.where(seen_1B, score_GB, UNSEEN)
        most_G1 = most_ref[k]
        new_G1 = jnp.maximum(most_G1, score_GB.max(1, keepdims=True))
        weight_GB = jnp.where(seen_1B, jnp.exp(score_GB - new_G1), 0)
        fade_G1 = jnp.exp(most_G1 - new_G1)
        most_ref[k] = new_G1
        sum_ref[k] = sum_ref[k] * fade_G1 + weight_GB.sum(1, keepdims=True)
        total_ref[k] = total_ref[k] * fade_G1 + dot(weight_GB.astype(block_ref.dtype), block_ref[slot, 1, k])

      @pl.when(ends)
      def _():
        out_ref[0, row] = (total_ref[...] / sum_ref[...]).astype(out_ref.dtype)

      return next_i, next_block, 1 - slot

    lax.while_loop(lambda carry: carry[0] < live, process, (first, 0, 0))

    @pl.when(first < live)
    def _():
      write(0).wait()

  whole = lambda *shape: pl.BlockSpec(shape, lambda core, *_: (0,) * len(shape))
  in_hbm = pl.BlockSpec(memory_space=pl.ANY)
  scratch = lambda last: pltpu.VMEM((kv_heads, group, last), jnp.float32)
  scalars = table.pages_BJ, live_1, order_R, prompt_R, last_R, table.prefix_B, length_R
  out_CRKGH, pages_P2KSH = pl.pallas_call(
    body, name='attention_pages',
    out_shape=(jax.ShapeDtypeStruct((ways, rows, kv_heads, group, width), q_RNH.dtype),
               jax.ShapeDtypeStruct(pages_P2KSH.shape, pages_P2KSH.dtype)),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars), grid=(ways,),
      in_specs=[whole(rows, kv_heads, group, width), whole(rows, 2, kv_heads, 1, width), in_hbm],
      out_specs=(pl.BlockSpec((1, rows, kv_heads, group, width), lambda core, *_: (core, 0, 0, 0, 0)), in_hbm),
      scratch_shapes=[
        pltpu.VMEM((2, 2, kv_heads, block_tokens, width), pages_P2KSH.dtype),
        pltpu.VMEM((2, kv_heads, WRITTEN, width), pages_P2KSH.dtype),
        scratch(1), scratch(1), scratch(width), pltpu.SemaphoreType.DMA((2,)), pltpu.SemaphoreType.DMA]),
    input_output_aliases={len(scalars) + 2: 1},
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',), disable_bounds_checks=True),
    interpret=platform() != 'tpu',
  )(*scalars, q_RNH.reshape(rows, kv_heads, group, width), jnp.stack([k_RKH, v_RKH], 1)[:, :, :, None], pages_P2KSH)
  return out_CRKGH.sum(0, dtype=q_RNH.dtype).reshape(q_RNH.shape), pages_P2KSH  # a row is 0 but on its core
