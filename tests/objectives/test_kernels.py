"""Tests that the kernels equal their XLA equivalents, in interpret mode on a CPU, and that each platform uses its own
kernels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from betarank.objectives import Layout, RewardShaping, collectives, head_math, shaped_linear_total
from betarank.objectives.kernels import row_sums_triton, top_k_tpu, top_k_triton
from betarank.objectives.top_k import find_head

ROWS = 20  # a block of 16 rows and a partial one


@pytest.fixture(
  scope='module',
  params=[(top_k_tpu, 1100, 5), (top_k_tpu, 26_000, 130), (top_k_triton, 4096, 100), (top_k_triton, 26_000, 130)],
  ids=lambda p: f'{p[0].__name__.split(".")[-1]}-{p[1]}-{p[2]}')
def pair(request):
  """Returns (V, k, the kernel, its XLA equivalent).

  Some V aren't multiples of the kernel's block, so the last block is incomplete.
  """
  kernel, vocab, k = request.param
  assert kernel.fits(vocab, k)
  by_kernel = jax.jit(functools.partial(kernel.find_head, k=k, interpret=True))
  return vocab, k, by_kernel, jax.jit(functools.partial(find_head, None, k=k))


def check(pair, z, rank=None):
  """Asserts that the kernel and its XLA equivalent find the top k, and the same sum.

  rank: the rank of the targets in their rows; None for random targets.
  """
  vocab, k, *functions = pair
  rng = np.random.default_rng(1)
  z = np.asarray(z, np.float32)
  x = rng.integers(0, vocab, ROWS) if rank is None else np.argsort(-z, 1, kind='stable')[:, rank]
  target = np.take_along_axis(z, x[:, None], 1)[:, 0]
  arguments = [jnp.asarray(a) for a in (z, x.astype(np.int32), target, z.max(1))]
  results = [[np.asarray(a) for a in f(*arguments)] for f in functions]
  wanted = np.zeros(z.shape, bool)
  np.put_along_axis(wanted, np.argsort(-z, 1, kind='stable')[:, :k], True, 1)
  ids = np.arange(vocab)
  for value, last_id, _ in results:
    in_top = (z > value[:, None]) | ((z == value[:, None]) & (ids <= last_id[:, None]))
    np.testing.assert_array_equal(in_top, wanted)
  np.testing.assert_array_equal(results[0][0], results[1][0])
  exact = np.exp(z.astype(np.float64) - z.max(1, keepdims=True))
  exact = np.sum(exact, 1, where=wanted & (ids != x[:, None]))
  for _, _, head_sum in results:
    np.testing.assert_allclose(head_sum, exact, rtol=1e-6 * (1 + np.abs(z[np.isfinite(z)]).max()), atol=1e-37)


def test_random_logits(pair):
  vocab, k, *_ = pair
  z = np.random.default_rng(0).normal(size=(ROWS, vocab)) * 3
  for rank in (None, 0, k - 1, k):
    check(pair, z, rank)
  check(pair, -np.abs(z) * 1e30)


def test_more_of_the_top_k_in_a_group_than_the_sweep_keeps(pair):
  """The logits are sorted, or all large logits are in one lane of 128."""
  z = np.random.default_rng(0).normal(size=(ROWS, pair[0]))
  check(pair, np.sort(z, 1))
  z[:, 7 : 7 + 128 * 8 : 128] += 100
  check(pair, z, rank=3)


def test_ties(pair):
  """There are ties at the k-th largest logit and above it, rows of equal logits, signed zeros, and masks of -inf and of
  -1e30.
  """
  vocab, k, *_ = pair
  rng = np.random.default_rng(0)
  few = rng.integers(0, 9, (ROWS, vocab)).astype(np.float32)
  for rank in (None, 0, k - 1, k):
    check(pair, few, rank)
  check(pair, np.zeros((ROWS, vocab)))
  check(pair, np.where(rng.integers(0, 2, few.shape), 0.0, -0.0))
  check(pair, np.where(np.arange(vocab) < 3, few, -1e30))
  check(pair, np.where(np.arange(vocab) < 3, few, -np.inf))


def test_the_search_ends_on_rows_that_are_not_needed_and_on_nan(pair):
  """A negative id marks a row that isn't needed. Even if this row is NaN, the other rows must be right."""
  vocab, k, by_kernel, _ = pair
  z = np.random.default_rng(0).normal(size=(ROWS, vocab)).astype(np.float32)
  zero = jnp.zeros(ROWS)
  for hostile in (0.0, np.nan):
    z[3] = hostile
    ids = jnp.asarray(np.where(np.arange(ROWS) == 3, -1, 0), jnp.int32)
    value, _, head_sum = by_kernel(jnp.asarray(z), ids, jnp.asarray(z[:, 0]), jnp.asarray(z.max(1)))
    others = np.arange(ROWS) != 3
    np.testing.assert_array_equal(np.asarray(value)[others], -np.sort(-z, 1)[others, k - 1])
    assert np.isnan(hostile) or np.isfinite(head_sum).all()
  by_kernel(jnp.asarray(np.full((ROWS, vocab), np.nan, np.float32)), ids, zero, zero)[0].block_until_ready()


def test_each_platform_uses_its_kernel_where_the_vocabulary_fits():
  """Programs for TPUs and GPUs contain the kernel. On other platforms, and for small vocabularies, they contain
  lax.top_k.
  """
  shaping = RewardShaping(lambda_tail=-0.1, top_k=9)

  def text(vocab, platform, shaping=shaping):
    step = jax.jit(jax.grad(lambda h, w, x: shaped_linear_total(h, w, x, shaping)[0], (0, 1)))
    shapes = (32, 8), (8, vocab)
    arguments = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes] + [jax.ShapeDtypeStruct((32,), jnp.int32)]
    return step.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()

  assert top_k_tpu.fits(20_000, 9) and not top_k_tpu.fits(1000, 9)
  assert top_k_triton.fits(20_000, 9) and not top_k_triton.fits(1000, 9)
  kernels = lambda *a: 'tpu_custom_call' in text(*a)
  card = jax.sharding.AbstractDevice(device_kind='NVIDIA H100 80GB HBM3', num_cores=132, platform='gpu')
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ('data',), abstract_device=card)):
    on_card, small = text(20_000, 'cuda'), text(1000, 'cuda')
  assert 'find_head' in on_card and 'row_sums' in on_card and 'chlo.top_k' not in on_card
  assert 'find_head' not in small and 'row_sums' not in small
  assert kernels(20_000, 'tpu') and 'chlo.top_k' not in text(20_000, 'tpu')
  assert not kernels(20_000, 'cpu') and not kernels(1000, 'tpu') and not kernels(20_000, 'tpu', RewardShaping())


@pytest.mark.parametrize('tensor', [1, 2])
def test_a_vocabulary_axis_of_one_device_keeps_the_kernel(tensor):
  """The kernels need whole rows. The layout of training always names the axis that may split rows, even if it has one
  device.
  """
  shaping, layout = RewardShaping(lambda_tail=-0.1, top_k=9), Layout(tokens=('data',), vocab='tensor')
  step = jax.jit(jax.grad(lambda h, w, x: shaped_linear_total(h, w, x, shaping, layout=layout)[0], (0, 1)))
  mesh = jax.sharding.AbstractMesh((1, tensor), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  with jax.sharding.use_abstract_mesh(mesh):
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((32, 8), (8, 40_000))]
    text = step.trace(*shapes, jax.ShapeDtypeStruct((32,), jnp.int32)).lower(lowering_platforms=('tpu',)).as_text()
  assert ('tpu_custom_call' in text) == (tensor == 1)


@pytest.mark.parametrize('vocab', [1024, 1500, 5000])
def test_row_sums_kernel_equals_float64(vocab):
  """There are large logits, logits of -inf, ties with the target, and targets outside the vocabulary."""
  rng = np.random.default_rng(vocab)
  z = (rng.normal(size=(6, vocab)) * np.array([1, 10, 80, 1e-3, 1, 1])[:, None]).astype(np.float32)
  z[4, ::7] = z[4, 3]
  z[5, 5:] = -np.inf
  x = np.array([0, vocab - 1, vocab // 2, vocab, 3, 2])
  at_x = np.where(x < vocab, z[np.arange(6), np.minimum(x, vocab - 1)], -np.inf)
  shift, wrong, energy, rank = (np.asarray(a) for a in row_sums_triton.row_sums(
    jnp.asarray(z), jnp.asarray(x, jnp.int32), jnp.asarray(at_x), interpret=True))
  np.testing.assert_array_equal(shift, z.max(1))
  ids, apart = np.arange(vocab), z.astype(np.float64) - z.max(1, keepdims=True)
  e = np.where(ids == x[:, None], 0, np.exp(apart))
  np.testing.assert_allclose(wrong, e.sum(1), rtol=2e-6)
  np.testing.assert_allclose(energy, np.sum(e * np.where(e > 0, apart, 0), 1), rtol=2e-5)
  before = (z > at_x[:, None]) | ((z == at_x[:, None]) & (ids < x[:, None]))
  np.testing.assert_array_equal(rank, before.sum(1))


@pytest.mark.parametrize(
  'layout', [Layout(), Layout(vocab='tensor'), Layout(tokens=('data',), width='data', vocab_group_size=2)])
def test_row_sums_kernel_equals_xla_on_a_sharded_vocabulary(layout):
  """Each of two devices has half of the vocabulary. In one row, all probability is in one half."""
  vocab = 2100
  rng = np.random.default_rng(0)
  z = (9 * rng.normal(size=(8, vocab))).astype(np.float32)
  z[1, vocab // 2:] = -1e30
  z[2, ::5] = z[2, 5]
  x = jnp.asarray([3, 4, vocab - 5, vocab // 2, vocab // 2 - 1, vocab - 1, 0, vocab], jnp.int32)
  options = head_math.Options(False, False, vocab, None, None, 1.0, jnp.dtype(jnp.float32), layout)
  split = P(None, 'data' if layout.width else layout.vocab)

  def run(form, **how):
    def local(z, x):
      target, shift, *sums = form(options, z, x, **how)
      return target, shift, *(collectives.sum_over_vocab(layout, a) for a in sums)
    return jax.jit(jax.shard_map(local, in_specs=(split, P()), out_specs=P(), check_vma=False))(z, x)

  types = (jax.sharding.AxisType.Auto,) * 2
  with jax.set_mesh(jax.make_mesh((2, 2), ('data', 'tensor'), types, devices=jax.devices()[:4])):
    got, want = run(head_math._row_sums_triton, interpret=True), run(head_math._row_sums_xla)
  assert np.isneginf(want[0][-1]) and np.isfinite(want[0][:-1]).all()
  for a, b, rtol in zip(got, want, (0, 0, 3e-6, 3e-6, 0), strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol)
