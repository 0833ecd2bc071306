"""Tests that loss, gradient and statistics equal those of the float64 oracle, for random and adversarial logits.

The chunked head gets the logits as hidden states, and the identity matrix as its weights, so its logits are the same.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from betarank.objectives import (
  RewardShaping,
  linear_token_stats,
  shaped_linear_loss,
  shaped_linear_total,
  shaped_loss,
)
from betarank.objectives.family import power_weight
from betarank.objectives.top_k import top_k
from tests.objectives import objective_oracle as oracle

VOCAB = 12
SHAPINGS = [
  RewardShaping(top_k=VOCAB),
  RewardShaping(beta=-0.25, top_k=VOCAB),
  RewardShaping(beta=0.5, lambda_head=0.1, lambda_tail=-0.1, top_k=4),
  RewardShaping(beta=-1.0, lambda_tail=-0.5, top_k=1),
  RewardShaping(beta=2.0, lambda_head=1.0, top_k=VOCAB),
  RewardShaping(beta=-0.5, lambda_head=-0.3, lambda_tail=0.2, top_k=3, form='product'),
]
IDS = [f'{s.form} {s.beta} {s.lambda_head} {s.lambda_tail} {s.top_k}' for s in SHAPINGS]


def as_oracle(s):
  return {
    'beta': s.beta, 'lambda_head': s.lambda_head, 'lambda_tail': s.lambda_tail,
    'top_k_size': s.top_k, 'form': s.form}


@pytest.fixture(scope='module', params=range(len(SHAPINGS)), ids=IDS)
def functions(request):
  """Returns a shaping and its three implementations, compiled once: functions (z [4, V], x [4]) -> (losses, gradient,
  ...).
  """
  s, eye = SHAPINGS[request.param], jnp.eye(VOCAB)

  @jax.jit
  def reference(z, x):
    loss, pull = jax.vjp(lambda z: shaped_loss(z, x, s), z)
    return loss, pull(jnp.ones_like(loss))[0]

  @jax.jit
  def per_token(z, x):
    loss, pull, stats = jax.vjp(lambda z: shaped_linear_loss(z, eye, x, s, chunk_tokens=2), z, has_aux=True)
    return loss, pull(jnp.ones_like(loss))[0], stats

  @jax.jit
  def total(z, x):
    def f(z):
      total, loss, stats = shaped_linear_total(z, eye, x, s, chunk_tokens=3, stats='full')
      return total, (loss, stats)
    (_, (loss, stats)), grad = jax.value_and_grad(f, has_aux=True)(z)
    return loss, grad, stats

  return s, reference, per_token, total


def within(got, wanted, size, name=''):
  """Asserts that the error is at most 1e-5 of `size`, plus 1e-35 for exponentials that underflow in float32.

  got, wanted: the values to compare.
  name: named in the message.
  """
  excess = np.abs(np.asarray(got, np.float64) - wanted) - 1e-5 * size - 1e-35
  assert (excess <= 0).all(), (name, got, wanted, excess.max())


def check(functions, z, x):
  s, *implementations = functions
  loss, grad, stats = oracle.many(z, x, **as_oracle(s))
  loss_size, grad_size, _ = oracle.many(z, x, **as_oracle(s), sizes=True)
  for run in implementations:
    got_loss, got_grad, *got_stats = run(jnp.asarray(z), jnp.asarray(x))
    assert np.isfinite(got_loss).all() and np.isfinite(got_grad).all()
    within(got_loss, loss, loss_size)
    within(got_grad, grad, grad_size)
    for found in got_stats:
      for name, wanted in stats.items():
        if getattr(found, name) is not None:
          # If one wrong token is nearly certain, the entropy loses digits in sums near 1: up to 2e-7 nats.
          size = abs(wanted) + (0.02 if name == 'entropy' else 0)
          within(getattr(found, name), wanted, size, name)
      assert np.asarray(found.target_valid).all()


@pytest.mark.parametrize('scale', [0.1, 1, 10, 100, 1e4])
def test_random(functions, scale):
  rng = np.random.default_rng(int(scale * 10))
  check(functions, (rng.normal(size=(4, VOCAB)) * scale).astype(np.float32), rng.integers(0, VOCAB, 4))


ADVERSARIAL = {
  'all equal': np.zeros(VOCAB),
  'target certain': np.r_[1e4, np.zeros(VOCAB - 1)],
  'target impossible': np.r_[-1e4, np.zeros(VOCAB - 1)],
  'margin 17': np.r_[17.0, np.full(VOCAB - 1, -2.4)],
  'margin 90': np.r_[90.0, np.zeros(VOCAB - 1)],
  'ties at the threshold': np.r_[1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, np.zeros(VOCAB - 7)],
  'target tied at the threshold': np.r_[0.5, 2, 2, 0.5, 0.5, 0.5, np.zeros(VOCAB - 6)],
  'masked with -1e30': np.r_[0.3, 1.0, np.full(VOCAB - 2, -1e30)],
  'only the target is unmasked': np.r_[0.3, np.full(VOCAB - 1, -1e30)],
  'far from zero': np.r_[1e4, 1e4 - 1, 1e4 - 2, np.full(VOCAB - 3, 1e4 - 3)],
}


@pytest.mark.parametrize('name', ADVERSARIAL)
def test_adversarial(functions, name):
  z = np.tile(ADVERSARIAL[name].astype(np.float32), (4, 1))
  check(functions, z, np.array([0, 1, 5, VOCAB - 1]))


finite = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
few = st.sampled_from([0.0, -0.0, 1.0, 1.5, 20.0, -20.0, 88.0, -103.0, 1e4, -1e4])


@settings(max_examples=40, deadline=None)
@given(
  z=st.lists(st.one_of(finite, few), min_size=4 * VOCAB, max_size=4 * VOCAB),
  x=st.lists(st.integers(0, VOCAB - 1), min_size=4, max_size=4),
)
def test_properties(functions, z, x):
  check(functions, np.array(z, np.float32).reshape(4, VOCAB), np.array(x))


@settings(max_examples=60, deadline=None)
@given(beta=st.floats(-1, 2, width=32), margin=st.floats(-1e4, 1e4, width=32))
def test_weight_is_finite_and_bounded(beta, margin):
  """The weight of the power form is in (0, e] for every margin, and every β in [-1, 2]."""
  weight = float(power_weight(jnp.float32(margin), jnp.float32(beta)))
  assert 0 < weight <= np.e * (1 + 1e-6)


@pytest.mark.parametrize('beta,extreme,at', [(-0.25, 1.141, 0.556), (0.5, 0.813, 0.421), (-0.5, 1.347, None),
                                             (1.0, 0.692, None)])
def test_weight_extremes(beta, extreme, at):
  """Checks the largest weight over all p (for β < 0) or the smallest (for β > 0), and the p at which it occurs."""
  p = np.linspace(0.001, 0.999, 999)
  w = np.asarray(power_weight(jnp.log(p) - jnp.log1p(-p), beta))
  best = w.argmax() if beta < 0 else w.argmin()
  assert w[best] == pytest.approx(extreme, abs=6e-4)
  assert at is None or p[best] == pytest.approx(at, abs=2e-3)


def test_the_reference_accepts_logits_masked_with_minus_infinity():
  z = jnp.array([[0.3, -jnp.inf, 1.0, -jnp.inf]])
  s = RewardShaping(beta=-0.5, lambda_tail=-0.1, top_k=2)
  loss, grad = jax.jit(jax.value_and_grad(lambda z: shaped_loss(z, jnp.array([0]), s).sum()))(z)
  wanted, wanted_grad, _ = oracle.one([0.3, -1e30, 1.0, -1e30], 0, **as_oracle(s))
  np.testing.assert_allclose(loss, wanted, rtol=1e-5)
  np.testing.assert_allclose(grad[0], wanted_grad, rtol=1e-5, atol=1e-7)


def test_the_reference_needs_no_top_k_under_jit_either():
  z, s = jnp.zeros((1, 11)), RewardShaping(beta=-0.25)
  loss = lambda z: shaped_loss(z, jnp.array([0]), s)
  assert s.top_k > 11 and 'top_k' not in str(jax.make_jaxpr(loss)(z))
  np.testing.assert_array_equal(jax.jit(loss)(z), loss(z))


def test_bfloat16():
  """With bfloat16 inputs, logits are exact except for float32 accumulation, and gradients are rounded to 8 bits."""
  rng = np.random.default_rng(0)
  h = jnp.asarray(rng.normal(size=(20, 16)), jnp.bfloat16)
  head = jnp.asarray(rng.normal(size=(16, 50)), jnp.bfloat16)
  x = jnp.asarray(rng.integers(0, 50, 20))
  s = RewardShaping(beta=-0.25, lambda_head=0.1, lambda_tail=-0.1, top_k=7)
  z = np.asarray(h, np.float64) @ np.asarray(head, np.float64)
  loss, dz, stats = oracle.many(z, x, **as_oracle(s))

  def f(h, head):
    total, *rest = shaped_linear_total(h, head, x, s)
    return total, rest

  (_, (got, found)), grads = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(h, head)
  np.testing.assert_allclose(got, loss, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(found.entropy, stats['entropy'], rtol=1e-4, atol=1e-5)
  for grad, wanted in zip(grads, (dz @ np.asarray(head, np.float64).T, np.asarray(h, np.float64).T @ dz)):
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(grad, np.float64), wanted, rtol=2e-2, atol=2e-2)


def test_the_gradient_is_the_policy_gradient_summed_over_all_actions():
  """-dloss/dz = Σ_a π(a) r(a) ∇log π(a) (equation 13 of the paper), with the rewards r of equations 11 and 12."""
  rng = np.random.default_rng(3)
  z, x = rng.normal(size=9) * 2, 4
  beta, head, tail, k = -0.25, 0.1, -0.2, 3
  p = np.exp(z) / np.exp(z).sum()
  top = set(np.argsort(-z)[:k])
  reward = [(1 / p[a]) ** ((1 - p[a]) ** beta) if a == x else head if a in top else tail for a in range(9)]
  policy_gradient = sum(p[a] * reward[a] * (np.eye(9)[a] - p) for a in range(9))
  shaping = RewardShaping(beta, head, tail, top_k=k)
  grad = jax.jit(jax.grad(lambda z: shaped_linear_total(z[None], jnp.eye(9), jnp.array([x]), shaping)[0]))
  np.testing.assert_allclose(-grad(jnp.asarray(z, jnp.float32)), policy_gradient, rtol=1e-5, atol=1e-7)


def test_top_k_equals_that_of_jax():
  """The top k, which is found in two rounds, has the values and ids of jax.lax.top_k, also with many ties."""
  rng = np.random.default_rng(0)
  for levels in (3, 40, 10**6):
    z = jnp.asarray(rng.integers(0, levels, (16, 3000)), jnp.float32)
    for got, wanted in zip(top_k(z, 5), jax.lax.top_k(z, 5)):
      np.testing.assert_array_equal(got, wanted)


def test_token_stats_alone_equal_the_oracle_with_temperature_and_soft_cap():
  rng = np.random.default_rng(1)
  h, head = rng.normal(size=(2, 7, 8)).astype(np.float32), rng.normal(size=(8, 300)).astype(np.float32)
  x = rng.integers(0, 300, (2, 7))
  z = 5 * np.tanh(h.astype(np.float64) @ head / 5) / 0.7
  _, _, wanted = oracle.many(z.reshape(14, 300), x.reshape(14), top_k_size=10)
  stats = linear_token_stats(
    jnp.asarray(h), jnp.asarray(head), jnp.asarray(x), top_k=10,
    temperature=0.7, soft_cap=5.0, chunk_tokens=4)
  for name, value in wanted.items():
    np.testing.assert_allclose(getattr(stats, name).reshape(14), value, rtol=2e-5, atol=1e-6, err_msg=name)
