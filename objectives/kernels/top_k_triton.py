"""A Triton kernel that finds the k-th largest logit of a row, reading each logit once. XLA would sort the row.

Each of LANES lanes keeps the DEPTH largest logits that it reads. Bisection over float32 bit patterns finds the k-th
largest of the kept logits. In most rows, this is also the k-th largest logit of the row. It may not be if all logits
kept by some lane are at or above it, because that lane may have read further large logits. This happens to about one
row in 2000 of independent logits at k = 100. For such rows, bisection then runs over the whole row. The result is
therefore always exact.

# C rows  V vocabulary  L lanes  k size of the top k
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from betarank.objectives.kernels.top_k_tpu import to_float, to_key

LANES = 2048
DEPTH = 4
WARPS = 8
MOST_K = 256  # with a larger k, too many rows need bisection over the whole row


def fits(vocab, k):
  """Returns True if the kernel supports rows of `vocab` logits and a top k of this size."""
  return vocab >= 2 * LANES and k <= MOST_K


def find_head(z_CV, x_C, target_C, shift_C, *, k, interpret=False):
  """Returns the same as `find_head` of objectives/top_k.py, on one device. Requires `fits(V, k)`.

  interpret: runs the kernel on any device, slowly.
  """
  rows, vocab = z_CV.shape
  per_row = pl.BlockSpec((None,), lambda i: (i,))

  def body(z_ref, x_ref, shift_ref, value_ref, last_id_ref, sum_ref):
    def read(start, unread=0):
      """Returns (logits, ids) of L tokens, which begin at id `start`.

      Tokens with ids below `unread` were read before, so their logits are replaced by -inf, and their ids by vocab.
      """
      id_L = start + jnp.arange(LANES)
      z_L = z_ref[pl.ds(start, LANES)]
      z_L = jnp.where(z_L == 0, 0.0, z_L)  # -0.0 equals 0.0 but has another bit pattern
      return jnp.where(id_L >= unread, z_L, -jnp.inf), jnp.where(id_L >= unread, id_L, vocab)

    def over_row(add, start):
      out = lax.fori_loop(0, vocab // LANES, lambda i, carry: add(read(i * LANES), carry), start)
      return add(read(vocab - LANES, vocab - vocab % LANES), out) if vocab % LANES else out

    def keep(token, kept):
      kept, (z_L, id_L) = list(kept), token
      for d, (kept_z_L, kept_id_L) in enumerate(kept):
        larger_L = z_L > kept_z_L
        kept[d] = jnp.where(larger_L, z_L, kept_z_L), jnp.where(larger_L, id_L, kept_id_L)
        z_L, id_L = jnp.where(larger_L, kept_z_L, z_L), jnp.where(larger_L, kept_id_L, id_L)
      return tuple(kept)

    def write_results(total):
      """Writes the outputs of `find_head` for this row, and returns the k-th largest logit.

      total: a function that takes a function f, and returns the sum of f(logits, ids) over the tokens to search. These
        are all tokens of the row, or only the largest ones.
      """
      count = lambda condition: total(lambda z_L, id_L: jnp.where(condition(z_L, id_L), 1, 0))
      value = to_float(_bisect(lambda low: count(lambda z_L, _: to_key(z_L) >= low) >= k, -(2**31), 2**31 - 1))
      ties = k - count(lambda z_L, _: z_L > value)
      # The last id in the top k is the smallest one up to which `ties` logits equal the value.
      last_id = 1 + _bisect(lambda id: count(lambda z_L, id_L: (z_L == value) & (id_L <= id)) < ties, -1, vocab)
      in_head = lambda z_L, id_L: ((z_L > value) | ((z_L == value) & (id_L <= last_id))) & (id_L != x_ref[...])
      value_ref[...], last_id_ref[...] = value, last_id
      sum_ref[...] = total(lambda z_L, id_L: jnp.where(in_head(z_L, id_L), jnp.exp(z_L - shift_ref[...]), 0.0))
      return value

    empty = jnp.full(LANES, -jnp.inf), jnp.full(LANES, vocab, jnp.int32)
    kept = over_row(keep, (empty,) * DEPTH)
    value = write_results(lambda f: sum(jnp.sum(f(*token)) for token in kept))

    @pl.when(jnp.max(kept[-1][0]) >= value)
    def _():
      def total(f):
        zero = jnp.zeros(LANES, jax.eval_shape(f, *empty).dtype)
        return jnp.sum(over_row(lambda token, sum_L: sum_L + f(*token), zero))
      write_results(total)

  return tuple(pl.pallas_call(
    body, grid=(rows,), in_specs=[pl.BlockSpec((None, vocab), lambda i: (i, 0)), per_row, per_row],
    out_specs=[per_row] * 3,
    out_shape=[jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.float32, jnp.int32, jnp.float32)],
    compiler_params=plgpu.CompilerParams(num_warps=WARPS), interpret=interpret, name='find_head',
  )(z_CV, x_C, shift_C))


def _bisect(holds, low: int, high: int):
  """Returns the largest int32 in [low, high) for which `holds` is true.

  `holds` must be true at low. It must be true up to some number and false for all larger numbers.
  """
  def step(_, ends):
    low, high = ends
    middle = (low & high) + ((low ^ high) >> 1)  # the mean, rounded down, without overflow
    yes = holds(middle)
    return jnp.where(yes, middle, low), jnp.where(yes, high, middle)
  return lax.fori_loop(0, (high - low).bit_length(), step, (jnp.int32(low), jnp.int32(high)))[0]
