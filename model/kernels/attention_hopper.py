"""Pallas Mosaic GPU kernels for causal attention within documents on Hopper GPUs (H100, H200). They need jax >= 0.11.2.

A row holds one document after the other, so a query sees the keys from the start of its document to itself. Blocks of
keys before the document are never read. Only blocks at the edges of documents and on the diagonal are masked. Neither
the forward nor the backward pass holds all scores in memory. Two of a program's three warpgroups compute, each on 64
rows of every block (the size of a wgmma instruction). The third warpgroup keeps the copy engine (TMA) busy.

# B batch  T tokens  K key heads  G query heads per key head  N = K·G query heads  H head width
# Q, S queries, keys of a block  R blocks of a row  P = B·R blocks of all rows, in the order they are processed
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from betarank.model.kernels.arithmetic import exp2_scale

UNSEEN = -1e30
HALF = 64  # rows of one warpgroup
TILE = 2 * HALF  # queries or keys that a program owns at a time
STAGES = 2  # the number of blocks in shared memory: one in use, one being loaded
PROCESSORS = 132  # streaming multiprocessors of an H100
CARDS = 'H100', 'H200', 'GH200'
WGMMA, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def fits(length: int, width: int, device_kind: str) -> bool:
  """Returns True if the kernels support this row length and head width on this card with the installed JAX."""
  new = jax.__version_info__ >= (0, 11, 2)  # the first version that can store to an accumulator
  return new and length % TILE == 0 and width in (64, 128) and any(card in device_kind for card in CARDS)


@jax.custom_vjp
def attention(q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT) -> jax.Array:
  """Returns softmax(q·k/√H) v over the keys from start_BT to the query itself: [B, T, N, H], computed in float32.

  q, k and v are bfloat16 or float16, H is 64 or 128, and T is a multiple of 128. start_BT and end_BT come from
  `attention_triton.documents`. Only the gradient uses end_BT. The gradient of q is summed by atomic additions in no
  fixed order, so its last bits differ from run to run.
  """
  return _forward(q_BTNH, k_BTKH, v_BTKH, start_BT)[0]


def _attention_fwd(q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT):
  out_BTNH, lse_BNT = (checkpoint_name(x, 'attention') for x in _forward(q_BTNH, k_BTKH, v_BTKH, start_BT))
  return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, end_BT, out_BTNH, lse_BNT)


def _attention_bwd(saved, dout_BTNH):
  q_BTNH, k_BTKH, v_BTKH, end_BT, out_BTNH, lse_BNT = saved
  delta_BNT = jnp.einsum('BTNH,BTNH->BNT', out_BTNH, dout_BTNH, preferred_element_type=jnp.float32)
  dq_BTNH, dk_BTKH, dv_BTKH = _backward(q_BTNH, k_BTKH, v_BTKH, dout_BTNH, lse_BNT, delta_BNT, end_BT)
  return (dq_BTNH * q_BTNH.shape[-1]**-0.5).astype(q_BTNH.dtype), dk_BTKH, dv_BTKH, None, None


attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(q_BTNH, k_BTKH, v_BTKH, start_BT):
  """Returns (out_BTNH, lse_BNT). lse is float32, the base-2 logarithm of the sum of each query's exponentials.

  A program processes several blocks of queries, one after the other.
  """
  (batch, length, heads, width), group = q_BTNH.shape, q_BTNH.shape[2] // k_BTKH.shape[2]
  dtype, tiles, scale = q_BTNH.dtype, length // TILE, exp2_scale(width)
  if length % TILE or width not in (64, 128) or dtype.itemsize != 2:
    raise ValueError(f'The Hopper kernel takes 16-bit heads of 64 or 128 and multiples of 128 tokens: {q_BTNH}')
  items, programs = batch * tiles * heads, min(PROCESSORS, batch * tiles * heads)
  # steps: the number of blocks of keys from the diagonal back to the start of the first query's document. full: the
  # number of these blocks, counted from the diagonal, that lie within the last query's document. Since they lie between
  # its start and the diagonal, they lie within the documents of all queries.
  diagonal_1R = jnp.arange(tiles, dtype=jnp.int32)[None]
  steps_BR = diagonal_1R + 1 - start_BT[:, ::TILE] // TILE
  full_BR = jnp.maximum(diagonal_1R + 1 - pl.cdiv(start_BT[:, TILE - 1::TILE], TILE), 1)

  def body(q_ref, k_ref, v_ref, start_ref, place_ref, steps_ref, full_ref, out_ref, lse_ref,
           q_smem, k_smem, v_smem, out_smem, lse_smem, q_full, k_full, v_full, q_free, k_free, v_free, turn):
    wg, program = lax.axis_index('wg'), lax.axis_index('program')

    def each_item(run):
      """Calls run(r, t, b, tile, n, steps, full) for each item of this program. An item is a block of queries of one
      head.

      r: the number of the item in this program, from 0.
      t: the number of blocks of keys that this program has processed in earlier items.
      b, tile, n: the row, the number of the block of queries in the row, and the query head.
      steps: the number of blocks of keys to process, from the diagonal (block 0) back to the start of the first query's
        document.
      full: blocks 1 to full - 1 need no mask, because they lie within the documents of all queries; full is at least 1.
      """
      def one(r, t):
        # Every other round runs in reverse order, so that no program gets the longest item of every round.
        item = r * programs + jnp.where(r % 2 == 0, program, programs - 1 - program)
        at = item // heads
        place, steps, full = place_ref[at], steps_ref[at], full_ref[at]
        run(r, t, place // tiles, place % tiles, item % heads, steps, full)
        return t + steps

      rounds, rest = divmod(items, programs)
      position = program if rounds % 2 == 0 else programs - 1 - program
      lax.fori_loop(0, rounds + (position < rest).astype(jnp.int32), one, jnp.int32(0))

    @pl.when(wg < 2)
    def compute():
      plgpu.set_max_registers(240, action='increase')
      pl.when(wg == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))

      @each_item
      def _(r, t0, b, tile, n, steps, full):
        row = tile * TILE + wg * HALF
        at = pl.ds(row, HALF)
        start_Q = plgpu.load(start_ref.at[b, at], layout=ROW, optimized=False)

        def softmax(t, masked, s_QS, most_Q, sum_Q):
          """Adds a block of keys to the running softmax. Returns (p_QS, new maximum, new sum, factor).

          p_QS is 2^(scaled score - new maximum). The output of earlier blocks must be multiplied by factor, 2^(old
          maximum - new maximum).

          t: the number of the block of keys, counted from the diagonal.
          masked: whether the block may have keys that some query doesn't see.
          s_QS: the scores of the block.
          most_Q, sum_Q: the maximum of the scaled scores of earlier blocks, and the sum of their exponentials.
          """
          if masked:
            key_QS = plgpu.broadcasted_iota(jnp.int32, s_QS.shape, 1, layout=WGMMA) + (tile - t) * TILE
            row_QS = plgpu.broadcasted_iota(jnp.int32, s_QS.shape, 0, layout=WGMMA) + row
            seen_QS = (key_QS <= row_QS) & (key_QS >= lax.broadcast_in_dim(start_Q, s_QS.shape, [0]))
            s_QS = jnp.where(seen_QS, s_QS, UNSEEN)
          new_Q = jnp.maximum(most_Q, s_QS.max(1) * scale)
          p_QS = jnp.exp2(s_QS * scale - lax.broadcast_in_dim(new_Q, s_QS.shape, [0]))
          factor_Q = jnp.exp2(most_Q - new_Q)
          return p_QS, new_Q, sum_Q * factor_Q + p_QS.sum(1), factor_Q

        def first_scores(s_ref):
          slot = lax.rem(t0, STAGES)
          plgpu.barrier_wait(q_full.at[wg])
          plgpu.barrier_wait(k_full.at[slot])
          plgpu.barrier_wait(turn.at[wg])
          plgpu.wgmma(s_ref, q_smem.at[wg], k_smem.at[slot].T)
          plgpu.barrier_arrive(turn.at[1 - wg])
          s_QS = s_ref[...]
          plgpu.barrier_arrive(k_free.at[slot])
          return s_QS

        def step(masked, t, carry):
          """Computes the scores of block t and adds the weighted values of block t-1 to the output.

          This order lets one warpgroup use the tensor cores while the other computes exponentials.

          masked, t: as in `softmax`.
          """
          out_QH, most_Q, sum_Q, p_QS = carry
          slot, before = lax.rem(t0 + t, STAGES), lax.rem(t0 + t - 1, STAGES)

          def products(refs):
            out_ref, s_ref, p_ref, most_ref, sum_ref, factor_ref = refs
            plgpu.barrier_wait(k_full.at[slot])
            plgpu.barrier_wait(v_full.at[before])
            plgpu.barrier_wait(turn.at[wg])
            plgpu.wgmma(s_ref, q_smem.at[wg], k_smem.at[slot].T)
            plgpu.wgmma(out_ref, p_QS, v_smem.at[before])
            plgpu.barrier_arrive(turn.at[1 - wg])
            s_QS = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
            plgpu.barrier_arrive(k_free.at[slot])
            p_ref[...], most_ref[...], sum_ref[...], factor_ref[...] = softmax(t, masked, s_QS, most_Q, sum_Q)

          zero_QS = plgpu.layout_cast(jnp.zeros((HALF, TILE), jnp.float32), WGMMA)
          out_QH, _, p_QS, most_Q, sum_Q, factor_Q = pl.run_state(products)(
            (plgpu.ACC.init(out_QH), plgpu.ACC.init(zero_QS), zero_QS, most_Q, sum_Q, sum_Q))
          plgpu.barrier_arrive(v_free.at[before])
          # Cast here, not in softmax. There, the product with the previous p still reads the registers that this p
          # would get, and ptxas would then run the two products one after the other (its note C7513).
          p_QS = p_QS.astype(dtype)
          return out_QH * lax.broadcast_in_dim(factor_Q, out_QH.shape, [0]), most_Q, sum_Q, p_QS

        s_QS = pl.run_scoped(first_scores, plgpu.ACC((HALF, TILE), jnp.float32))
        none_Q = plgpu.layout_cast(jnp.full(HALF, UNSEEN, jnp.float32), ROW)
        zero_Q = plgpu.layout_cast(jnp.zeros(HALF, jnp.float32), ROW)
        zero_QH = plgpu.layout_cast(jnp.zeros((HALF, width), jnp.float32), WGMMA)
        p_QS, most_Q, sum_Q, _ = softmax(0, True, s_QS, none_Q, zero_Q)  # here each query sees at least itself
        carry = zero_QH, most_Q, sum_Q, p_QS.astype(dtype)
        carry = lax.fori_loop(1, full, functools.partial(step, False), carry)
        out_QH, most_Q, sum_Q, p_QS = lax.fori_loop(full, steps, functools.partial(step, True), carry)
        plgpu.barrier_arrive(q_free.at[wg])
        slot = lax.rem(t0 + steps - 1, STAGES)

        def last_values(out_ref):
          plgpu.barrier_wait(v_full.at[slot])
          plgpu.wgmma(out_ref, p_QS, v_smem.at[slot])

        out_QH = pl.run_state(last_values)(plgpu.ACC.init(out_QH))
        plgpu.barrier_arrive(v_free.at[slot])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_smem.at[wg][...] = (out_QH * lax.broadcast_in_dim(1 / sum_Q, out_QH.shape, [0])).astype(dtype)
        lse_smem.at[wg][...] = most_Q + jnp.log(sum_Q) * math.log2(math.e)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[b, at, n])
        plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[b, n, at])

      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 2)
    def load():
      plgpu.set_max_registers(24, action='decrease')

      @each_item
      def _(r, t0, b, tile, n, steps, full):
        for half in range(2):
          pl.when(r > 0)(functools.partial(plgpu.barrier_wait, q_free.at[half]))
          at = pl.ds(tile * TILE + half * HALF, HALF)
          plgpu.copy_gmem_to_smem(q_ref.at[b, at, n], q_smem.at[half], q_full.at[half])

        @pl.loop(0, steps)
        def _(i):
          t, at = t0 + i, (b, pl.ds((tile - i) * TILE, TILE), n // group)
          slot = lax.rem(t, STAGES)
          pl.when(t >= STAGES)(lambda: plgpu.barrier_wait(k_free.at[slot]))
          plgpu.copy_gmem_to_smem(k_ref.at[at], k_smem.at[slot], k_full.at[slot])
          pl.when(t >= STAGES)(lambda: plgpu.barrier_wait(v_free.at[slot]))
          plgpu.copy_gmem_to_smem(v_ref.at[at], v_smem.at[slot], v_full.at[slot])

  pair, free = plgpu.Barrier(num_barriers=2), plgpu.Barrier(num_arrivals=2, num_barriers=STAGES)
  # Blocks are sorted by length, so that each_item distributes them evenly.
  return _kernel(
    body, 'attention', grid=dict(program=programs),
    out=[jax.ShapeDtypeStruct(q_BTNH.shape, dtype), jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)],
    scratch=[_smem(2, HALF, width, dtype=dtype), *[_smem(STAGES, TILE, width, dtype=dtype)] * 2,
             _smem(2, HALF, width, dtype=dtype), plgpu.SMEM((2, HALF), jnp.float32),
             pair, *[plgpu.Barrier(num_barriers=STAGES)] * 2, pair, free, free, pair],
  )(q_BTNH, k_BTKH, v_BTKH, start_BT, *_in_order(-steps_BR, steps_BR, jnp.minimum(full_BR, steps_BR)))


def _backward(q_BTNH, k_BTKH, v_BTKH, dout_BTNH, lse_BNT, delta_BNT, end_BT):
  """Returns (dq·√H in float32, dk, dv), where dq, dk and dv are the gradients of q, k and v.

  Each program computes dk and dv of one block of keys, and adds its part of dq to a sum over programs. The two
  computing warpgroups each hold dk and dv of 64 keys in registers, which leaves no registers for dq. Therefore they
  write ds, the gradient of the scores, to shared memory. The third warpgroup computes dq from ds, and the copy engine
  adds dq to the sum in the L2 cache.

  dout_BTNH: the gradient of the output.
  lse_BNT: from `_forward`.
  delta_BNT: float32, the sum of output times dout over H.
  end_BT: for each token, the index after the end of its document.
  """
  (batch, length, heads, width), group = q_BTNH.shape, q_BTNH.shape[2] // k_BTKH.shape[2]
  dtype, tiles, scale, parts = q_BTNH.dtype, length // TILE, exp2_scale(width), width // HALF
  # steps: the number of blocks of 64 queries from the diagonal to the end of the last key's document. full: the index
  # of the block in which the first key's document ends.
  start_1R = jnp.arange(tiles, dtype=jnp.int32)[None] * (TILE // HALF)
  steps_BR = pl.cdiv(end_BT[:, TILE - 1::TILE], HALF) - start_1R
  full_BR = end_BT[:, ::TILE] // HALF
  # Rows are processed one after the other, so that the data that programs share is in the L2 cache. The longest block
  # of a row comes first. The short blocks of all rows come last, so that processors finish at about the same time.
  short_BR = 2 * steps_BR < steps_BR.mean()
  order_BR = jnp.where(short_BR, batch, jnp.arange(batch)[:, None]) * length - steps_BR

  def body(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, end_ref, place_ref, steps_ref, full_ref, dq_ref,
           dk_ref, dv_ref, k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem, ds_smem, dq_smem,
           kv_full, full, free, ds_full, ds_free):
    block, head, wg = (lax.axis_index(x) for x in ('block', 'head', 'wg'))
    place, steps = place_ref[block], steps_ref[block]
    b, tile = place // tiles, place % tiles
    start = tile * (TILE // HALF)

    @pl.when(wg < 2)
    def compute():
      plgpu.set_max_registers(216, action='increase')
      below, whole = start + TILE // HALF, full_ref[block]  # between these, all queries see all keys
      at = pl.ds(tile * TILE + wg * HALF, HALF)
      end_S = plgpu.load(end_ref.at[b, at], layout=ROW, optimized=False)
      plgpu.barrier_wait(kv_full)

      def step(g, i, dk_ref, dv_ref):
        t = g * steps + i - start
        slot = lax.rem(t, STAGES)
        # This equals wg, but the compiler can't know it. Otherwise it would compute all addresses in advance, and run
        # out of registers.
        w = wg + (i >> 20)

        def column(x_ref):
          return lax.broadcast_in_dim(plgpu.load(x_ref.at[slot], layout=COLUMN), (HALF, HALF), [1])

        def seen(p_SQ):
          key_SQ = plgpu.broadcasted_iota(jnp.int32, p_SQ.shape, 0, layout=WGMMA) + (tile * TILE + w * HALF)
          row_SQ = plgpu.broadcasted_iota(jnp.int32, p_SQ.shape, 1, layout=WGMMA) + i * HALF
          return jnp.where((key_SQ <= row_SQ) & (row_SQ < lax.broadcast_in_dim(end_S, p_SQ.shape, [0])), p_SQ, 0.)

        def products(s_ref, dp_ref):
          plgpu.barrier_wait(full.at[slot])
          s_ref[...] = column(lse_smem)  # -lse / scale, to which the product is added
          for h in range(parts):
            plgpu.wgmma(s_ref, k_smem.at[h, w], q_smem.at[slot, :, h * HALF:(h + 1) * HALF].T)
          p_SQ = jnp.exp2(s_ref[...] * scale)
          pl.when(t > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(t + 1, STAGES)]))  # dk of step t-1 is done too
          p_SQ = lax.cond((i < below) | (i >= whole), seen, lambda p_SQ: p_SQ, p_SQ).astype(dtype)
          dp_ref[...] = column(delta_smem)
          plgpu.wgmma(dp_ref, v_smem.at[w], dout_smem.at[slot].T)
          plgpu.wgmma(dv_ref, p_SQ, dout_smem.at[slot])
          return (p_SQ.astype(jnp.float32) * plgpu.wgmma_accumulator_load(dp_ref, wait_n=1)).astype(dtype)

        ds_SQ = pl.run_scoped(products, *[plgpu.ACC((HALF, HALF), jnp.float32)] * 2)
        pl.when(t >= STAGES)(lambda: plgpu.barrier_wait(ds_free.at[slot]))
        ds_smem.at[slot, w][...] = ds_SQ
        plgpu.commit_smem()
        plgpu.barrier_arrive(ds_full.at[slot])
        plgpu.wgmma(dk_ref, ds_SQ, q_smem.at[slot])

      def all_steps(dk_ref, dv_ref):
        @pl.loop(0, group)
        def _(g):
          pl.loop(start, start + steps)(lambda i: step(g, i, dk_ref, dv_ref))
        return dk_ref[...], dv_ref[...]

      dk_SH, dv_SH = pl.run_scoped(all_steps, *[plgpu.ACC((HALF, width), jnp.float32)] * 2)
      for out_ref, value_SH in ((dv_ref, dv_SH), (dk_ref, dk_SH * width**-0.5)):  # reuses the memory of v
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        v_smem.at[wg][...] = value_SH.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(v_smem.at[wg], out_ref.at[b, at, head])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 2)
    def load_and_add_dq():
      plgpu.set_max_registers(72, action='decrease')
      for half in range(2):
        at = b, pl.ds(tile * TILE + half * HALF, HALF), head
        for h in range(parts):
          plgpu.copy_gmem_to_smem(k_ref.at[*at, h * HALF:(h + 1) * HALF], k_smem.at[h, half], kv_full)
        plgpu.copy_gmem_to_smem(v_ref.at[at], v_smem.at[half], kv_full)

      def where(t):
        return lax.rem(t, STAGES), head * group + t // steps, pl.ds((start + lax.rem(t, steps)) * HALF, HALF)

      def load(t):
        slot, n, at = where(t)
        pl.when(t >= STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
        plgpu.copy_gmem_to_smem(q_ref.at[b, at, n], q_smem.at[slot], full.at[slot])
        plgpu.copy_gmem_to_smem(lse_ref.at[b, n, at], lse_smem.at[slot], full.at[slot])
        plgpu.copy_gmem_to_smem(dout_ref.at[b, at, n], dout_smem.at[slot], full.at[slot])
        plgpu.copy_gmem_to_smem(delta_ref.at[b, n, at], delta_smem.at[slot], full.at[slot])

      load(jnp.int32(0))

      @pl.loop(0, group * steps)
      def _(t):
        pl.when(t + 1 < group * steps)(lambda: load(t + 1))
        slot, n, at = where(t)
        plgpu.barrier_wait(ds_full.at[slot])
        for h in range(parts):
          def product(product_ref, h=h):
            for half in range(2):
              plgpu.wgmma(product_ref, ds_smem.at[slot, half].T, k_smem.at[h, half])
            return product_ref[...]

          dq_QH = pl.run_scoped(product, plgpu.ACC((HALF, HALF), jnp.float32))
          if h == parts - 1:
            plgpu.barrier_arrive(ds_free.at[slot])
          plgpu.wait_smem_to_gmem(parts - 1, wait_read_only=True)
          dq_smem.at[h][...] = dq_QH
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(dq_smem.at[h], dq_ref.at[b, at, n, h * HALF:(h + 1) * HALF], reduction_op='add')

      plgpu.wait_smem_to_gmem(0)

  barrier = lambda arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=STAGES)
  # This zero depends on delta. Otherwise XLA would make one array of zeros early, and copy it for each layer.
  zero, delta_BNT = lax.optimization_barrier((jnp.float32(0), delta_BNT))
  dq = jax.new_ref(jnp.full(q_BTNH.shape, zero))
  dk_BTKH, dv_BTKH = _kernel(
    body, 'attention_backward', grid=dict(block=batch * tiles, head=heads // group),
    out=[jax.ShapeDtypeStruct(k_BTKH.shape, dtype)] * 2,
    scratch=[_smem(parts, 2, HALF, HALF, dtype=dtype), _smem(2, HALF, width, dtype=dtype),
             *[_smem(STAGES, HALF, width, dtype=dtype)] * 2, *[plgpu.SMEM((STAGES, HALF), jnp.float32)] * 2,
             _smem(STAGES, 2, HALF, HALF, dtype=dtype), _smem(parts, HALF, HALF, dtype=jnp.float32),
             plgpu.Barrier(num_arrivals=2 * (parts + 1)), barrier(4), barrier(2), barrier(2), barrier(1)],
  )(q_BTNH, k_BTKH, v_BTKH, dout_BTNH, lse_BNT * (-1 / scale), -delta_BNT, end_BT,
    *_in_order(order_BR, steps_BR, full_BR), dq)
  return jax.freeze(dq), dk_BTKH, dv_BTKH


def _in_order(key_BR, *values_BR) -> list[jax.Array]:
  """Sorts the P = B·R blocks of all rows by `key_BR`, the smallest key first. Returns a list of arrays [P].

  The first array is int32: the index b·R + r of each block in sorted order. Each further array has the entries of one
  of `values_BR`, in the same order.
  """
  place_P = jnp.argsort(key_BR.ravel()).astype(jnp.int32)
  return [place_P, *(x.ravel()[place_P] for x in values_BR)]


def _smem(*shape, dtype):
  """Returns the type of a shared-memory array in the layout that wgmma and the copy engine use: swizzled tiles of 8
  rows of 128 bytes.
  """
  columns = 128 // jnp.dtype(dtype).itemsize
  return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))


def _kernel(body, name: str, grid: dict[str, int], out, scratch):
  body.__name__ = name
  return plgpu.kernel(
    body, out_type=out, scratch_types=scratch, grid=tuple(grid.values()), grid_names=tuple(grid), num_threads=3,
    thread_name='wg', compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True))
