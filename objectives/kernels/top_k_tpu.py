"""A TPU kernel that finds the k-th largest logit of rows held in VMEM, reading each logit from HBM only once.

The logits of a row are laid out as columns of LANES consecutive logits, and are divided into about 24·k groups. A group
holds the logits of one lane in several neighbouring columns. One pass over the row keeps the DEPTH largest logits of
each group as candidates. Bisection over float32 bit patterns finds the k-th largest candidate. In most rows, this is
also the k-th largest logit of the row. It may not be if all candidates of some group are at or above it, because that
group may have further large logits. This happens to about one row in 3000 of independent logits at k = 100. For such
rows, bisection then runs over the whole row.

If several logits equal the k-th largest, and only some of them belong to the top k, bisection also finds the last id of
the top k. The result is therefore always exact, and only the time depends on the logits. The XLA operations for a top k
(objectives/top_k.py) move the logits several times on a TPU, and sort.

# R rows of a block  L lanes  V vocabulary  k size of the top k
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
DEPTH = 4
GROUPS_PER_K = 24
MAX_SPAN, MIN_SPAN = 64, 8  # limits of the number of logits per group
ROWS = 16  # a column takes two registers; with 8 rows and one register, more cycles would be spent waiting for results
UNROLL = 16  # columns per loop iteration
MAX_BLOCK = 20 * 2**20  # bytes of a block of rows; VMEM holds two blocks at once


def fits(vocab, k):
  """Returns True if the kernel supports rows of `vocab` logits and a top k of this size.

  Each group must have at least MIN_SPAN logits, and two blocks of rows must fit into VMEM.
  """
  return _span(vocab, k) >= MIN_SPAN and 4 * ROWS * _columns(vocab) * LANES <= MAX_BLOCK


def find_head(z_CV, x_C, target_C, shift_C, *, k, interpret=False):
  """Returns the same as `find_head` of objectives/top_k.py, on one device. Requires `fits(V, k)`.

  Subnormal logits count as zero.

  interpret: runs the kernel on any device, slowly.
  """
  tokens, vocab = z_CV.shape
  block = 4 * ROWS * _columns(vocab) * LANES
  groups = pl.cdiv(_columns(vocab), _span(vocab, k))
  per_row = pl.BlockSpec((ROWS, 1), lambda i: (i, 0))
  return tuple(a[:, 0] for a in pl.pallas_call(
    functools.partial(_kernel, k=k, vocab=vocab, span=_span(vocab, k)),
    grid=(pl.cdiv(tokens, ROWS),),
    in_specs=[pl.BlockSpec((ROWS, _columns(vocab) * LANES), lambda i: (i, 0)), per_row, per_row, per_row],
    out_specs=[per_row, per_row, per_row],
    out_shape=[jax.ShapeDtypeStruct((tokens, 1), dtype) for dtype in (jnp.float32, jnp.int32, jnp.float32)],
    scratch_shapes=[pltpu.VMEM((ROWS, DEPTH * groups * LANES), jnp.float32)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',), vmem_limit_bytes=2 * block + 8 * 2**20),
    cost_estimate=pl.CostEstimate(flops=10 * tokens * vocab, bytes_accessed=4 * tokens * vocab, transcendentals=0),
    interpret=interpret,
    name='find_head',
  )(z_CV, x_C[:, None], target_C[:, None], shift_C[:, None]))


def _columns(vocab):
  """Returns the number of columns into which a row of logits is divided. A column has LANES consecutive logits."""
  return pl.cdiv(vocab, LANES)


def _span(vocab, k):
  """Returns the number of columns of a group, which is also its number of logits, one from each column."""
  return min(MAX_SPAN, _columns(vocab) // pl.cdiv(GROUPS_PER_K * k, LANES))


def _kernel(z_ref, x_ref, target_ref, shift_ref, value_ref, last_id_ref, head_sum_ref, kept_ref, *, k, vocab, span):
  x_R1, target_R1, shift_R1 = x_ref[...], target_ref[...], shift_ref[...]
  kept_width = kept_ref.shape[1]
  _keep_largest(z_ref, kept_ref, vocab, span)
  largest_R1, low_R1 = _bracket([_column(kept_ref, c) for c in range(kept_width // DEPTH // LANES)], k)
  least_R1 = functools.reduce(jnp.maximum, [
    _column(kept_ref, c) for c in range((DEPTH - 1) * kept_width // DEPTH // LANES, kept_width // LANES)
  ]).max(-1, keepdims=True)

  wanted_R1 = x_R1 >= 0  # masked rows have equal logits, which would start the slow searches for nothing
  search = functools.partial(_search, k=k, high=to_key(largest_R1) + 1, target_R1=target_R1, shift_R1=shift_R1)
  found = search(kept_ref, kept_width, low=to_key(low_R1))
  missed = _any(wanted_R1 & (least_R1 >= found[0]))
  found = lax.cond(missed, lambda: search(z_ref, vocab, low=to_key(found[0])), lambda: found)
  value_R1, above_R1, reach_R1, sum_R1, targets_R1 = found

  def last_of_ties():
    """Returns the last token of the top k among those tied at the k-th largest logit, int32 [R, 1].

    Several tokens may have the k-th largest logit. If n tokens have a larger one, the k - n tied tokens with the lowest
    ids are in the top k. The largest of these k - n ids is returned.
    """
    lane_RL = lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    tied_before = lambda key: _count(z_ref, vocab, lambda z, first: (z == value_R1) & (first + lane_RL < -key))
    all_, none = (jnp.full((ROWS, 1), i, jnp.int32) for i in (-vocab, 0))
    return -_bisect(tied_before, k - above_R1, all_, none) - 1

  no_cut = lambda: jnp.full((ROWS, 1), vocab - 1, jnp.int32)
  last_id_R1 = lax.cond(_any(wanted_R1 & (reach_R1 > k)), last_of_ties, no_cut)

  # The sum leaves out all logits that equal the target's. Here those other than the target are added again. This is
  # more accurate than subtracting the target's exponential from a sum.
  equal_R1 = targets_R1 - jnp.where(target_R1 > value_R1, 1.0, 0.0)
  tied_R1 = k - above_R1 - jnp.where((target_R1 == value_R1) & (x_R1 <= last_id_R1), 1.0, 0.0)
  sum_R1 += equal_R1 * jnp.exp(target_R1 - shift_R1) + tied_R1 * jnp.exp(value_R1 - shift_R1)
  value_ref[...], last_id_ref[...], head_sum_ref[...] = value_R1, last_id_R1, sum_R1


def _bracket(columns, k):
  """Returns (the largest entry, a lower bound for the k-th largest entry) of each of R rows, [R, 1].

  To get the bound, the entries are divided into k or more disjoint sets. The bound is the smallest of the sets' maxima.

  columns: a list of arrays [R, LANES], which together hold the entries of the rows.
  """
  sets = columns[:pl.cdiv(k, LANES)]
  for c in range(len(sets), len(columns)):
    sets[c % len(sets)] = jnp.maximum(sets[c % len(sets)], columns[c])
  return (functools.reduce(jnp.maximum, sets).max(-1, keepdims=True),
          functools.reduce(jnp.minimum, sets).min(-1, keepdims=True))


def _keep_largest(z_ref, kept_ref, vocab, span):
  """Writes the DEPTH largest logits of each group to kept_ref.

  Group (g, l) holds the logits with ids c * LANES + l for the columns c from g * span to (g + 1) * span - 1. Its
  (d+1)-th largest logit is written to kept_ref[:, d * width + g * LANES + l], where width is kept_ref.shape[1] / DEPTH.
  The last column's logits with ids >= vocab are padding, and are left out.
  """
  width = kept_ref.shape[1] // DEPTH

  def insert(kept, z):
    new = []
    for largest in kept:
      new.append(jnp.maximum(largest, z))
      z = jnp.minimum(largest, z)
    return new

  def keep(g, columns):
    kept = [jnp.full((ROWS, LANES), -jnp.inf)] * DEPTH
    for z_RL in columns:
      kept = insert(kept, z_RL)
    for d, largest in enumerate(kept):
      kept_ref[:, pl.ds(pl.multiple_of(d * width + g * LANES, LANES), LANES)] = largest

  full = vocab // (span * LANES)
  pl.loop(0, full)(lambda g: keep(g, (_column(z_ref, g * span + c) for c in range(span))))
  if full * span * LANES < vocab:
    keep(full, (_column(z_ref, c, vocab) for c in range(full * span, _columns(vocab))))


def _search(ref, width, *, k, low, high, target_R1, shift_R1):
  """Finds the k-th largest logit in each of the R rows of ref[:, :width]. Its key (`to_key`) must be in [low, high).

  Returns:
    (kth_largest, above, reach, sum, targets), all float32 [R, 1].
    above: the number of logits above the k-th largest.
    reach: the number of logits at or above the k-th largest.
    sum: the sum of exp(z - shift) over the logits above the k-th largest that differ from the target's logit.
    targets: the number of logits above the k-th largest that equal the target's logit.
  """

  def at_least(key):
    least_R1 = to_float(key)
    return _count(ref, width, lambda z, _: z >= least_R1)

  low_R1 = to_float(_bisect(at_least, jnp.float32(k), low, high))
  least = lambda value, z, _: jnp.minimum(value, jnp.where(z >= low_R1, z, jnp.inf))
  value_R1 = _fold(ref, width, least, jnp.full((ROWS, LANES), jnp.inf)).min(-1, keepdims=True)

  def add(sums, z, _):
    above, reach, sum_, targets = sums
    is_above, is_target = z > value_R1, z == target_R1
    return (
      above + jnp.where(is_above, 1.0, 0.0),
      reach + jnp.where(z >= value_R1, 1.0, 0.0),
      sum_ + jnp.where(is_above & ~is_target, jnp.exp(z - shift_R1), 0.0),
      targets + jnp.where(is_above & is_target, 1.0, 0.0),
    )

  sums = _fold(ref, width, add, (jnp.zeros((ROWS, LANES)),) * 4)
  return value_R1, *(s.sum(-1, keepdims=True) for s in sums)


def _bisect(count, k, low, high):
  """Returns a key, int32 [R, 1], with count(key) = k. If there is none, returns the largest key with count(key) > k.

  count: a function of keys [R, 1] that returns the same number or a smaller one for a larger key.
  low, high: keys [R, 1] with count(low) >= k and count(high) < k.
  """
  middle = lambda low, high: (low >> 1) + (high >> 1) + (low & high & 1)

  def unfinished(state):
    step, low, high, count_low = state
    return (step < 32) & _any((count_low != k) & (middle(low, high) != low))  # 32 ends the search if logits are NaN

  def halve(state):
    step, low, high, count_low = state
    key = middle(low, high)
    n = count(key)
    up = (n >= k) & (count_low != k)
    return step + 1, jnp.where(up, key, low), jnp.where(n < k, key, high), jnp.where(up, n, count_low)

  return lax.while_loop(unfinished, halve, (0, low, high, jnp.full(low.shape, jnp.inf)))[1]


def _count(ref, width, test):
  """Returns how many of the logits ref[:, :width] in each row pass a test, float32 [R, 1].

  test: a function (logits [R, LANES], first_id) -> bool [R, LANES], see `_fold`.
  """
  add = lambda n, z, first: n + jnp.where(test(z, first), 1.0, 0.0)
  return _fold(ref, width, add, jnp.zeros((ROWS, LANES))).sum(-1, keepdims=True)


def _fold(ref, width, step, state):
  """Computes state = step(state, logits, first_id) for each part of ref[:, :width]. Returns the last state.

  A part is LANES consecutive logits of each of the R rows: `logits` is [R, LANES], and its ids begin at first_id.
  """
  full = width // LANES // UNROLL

  def some(i, state):
    for c in range(UNROLL):
      state = step(state, _column(ref, i * UNROLL + c), (i * UNROLL + c) * LANES)
    return state

  state = lax.fori_loop(0, full, some, state)
  for c in range(full * UNROLL, _columns(width)):
    state = step(state, _column(ref, c, width), c * LANES)
  return state


def _column(ref, c, width=None):
  """Returns column c of all rows of ref, [R, LANES]. The first logit in each row has the id c * LANES.

  If `width` is given, logits whose index in the row is `width` or more are replaced by -inf.
  """
  column_RL = ref[:, pl.ds(pl.multiple_of(c * LANES, LANES), LANES)]
  if width is None or (c + 1) * LANES <= width:
    return column_RL
  return jnp.where(lax.broadcasted_iota(jnp.int32, column_RL.shape, 1) < width - c * LANES, column_RL, -jnp.inf)


def _any(condition):
  return jnp.max(jnp.where(condition, 1, 0)) > 0


def to_key(value):
  """Maps float32 numbers to int32 keys that have the same order."""
  bits = lax.bitcast_convert_type(value, jnp.int32)
  return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def to_float(key):
  """Returns the float32 number that belongs to a key. The inverse of `to_key`."""
  return lax.bitcast_convert_type(jnp.where(key < 0, key ^ 0x7FFFFFFF, key), jnp.float32)
