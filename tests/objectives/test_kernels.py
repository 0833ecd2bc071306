"""The TPU kernel beside XLA's operations, on a CPU in interpret mode, and what is lowered where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import RewardShaping, shaped_linear_total
from objectives.kernels import find_head as kernel
from objectives.top_k import find_head

ROWS = 20  # a block of 16 and a part of one


@pytest.fixture(scope='module', params=[(1100, 5), (26_000, 130)], ids=str)
def pair(request):
  """(V, k, the kernel, the same by XLA); both widths end within a column of 128."""
  vocab, k = request.param
  assert kernel.fits(vocab, k)
  by_kernel = jax.jit(functools.partial(kernel.find_head, k=k, interpret=True))
  return vocab, k, by_kernel, jax.jit(functools.partial(find_head, None, k=k))


def check(pair, z, rank=None):
  """Both give the same top k and head; the target is the one of this rank, or any."""
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


def test_any_logits(pair):
  vocab, k, *_ = pair
  z = np.random.default_rng(0).normal(size=(ROWS, vocab)) * 3
  for rank in (None, 0, k - 1, k):
    check(pair, z, rank)
  check(pair, -np.abs(z) * 1e30)


def test_top_k_in_one_place(pair):
  """More of the top k in a group than the sweep keeps: sorted logits, and all the large ones in a lane."""
  z = np.random.default_rng(0).normal(size=(ROWS, pair[0]))
  check(pair, np.sort(z, 1))
  z[:, 7 : 7 + 128 * 8 : 128] += 100
  check(pair, z, rank=3)


def test_ties(pair):
  """Ties within and across the boundary, everything equal, signed zeros, masks of -inf and of -1e30."""
  vocab, k, *_ = pair
  rng = np.random.default_rng(0)
  few = rng.integers(0, 9, (ROWS, vocab)).astype(np.float32)
  for rank in (None, 0, k - 1, k):
    check(pair, few, rank)
  check(pair, np.zeros((ROWS, vocab)))
  check(pair, np.where(rng.integers(0, 2, few.shape), 0.0, -0.0))
  check(pair, np.where(np.arange(vocab) < 3, few, -1e30))
  check(pair, np.where(np.arange(vocab) < 3, few, -np.inf))


def test_rows_not_wanted_and_nan_end(pair):
  """A negative id asks for nothing, and NaN, which has no order, doesn't keep the search going."""
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


def test_one_switch():
  """Lowered for a TPU, a vocabulary that the kernel takes goes by it; elsewhere, or if small, by lax.top_k."""
  shaping = RewardShaping(lambda_tail=-0.1, top_k=9)

  def text(vocab, platform, shaping=shaping):
    step = jax.jit(jax.grad(lambda h, w, x: shaped_linear_total(h, w, x, shaping)[0], (0, 1)))
    shapes = (32, 8), (8, vocab)
    arguments = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes] + [jax.ShapeDtypeStruct((32,), jnp.int32)]
    return step.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()

  assert kernel.fits(20_000, 9) and not kernel.fits(1000, 9)
  kernels = lambda *a: 'tpu_custom_call' in text(*a)
  assert kernels(20_000, 'tpu') and 'chlo.top_k' not in text(20_000, 'tpu')
  assert not kernels(20_000, 'cpu') and not kernels(1000, 'tpu') and not kernels(20_000, 'tpu', RewardShaping())
