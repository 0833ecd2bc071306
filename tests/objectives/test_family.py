"""Tests that every objective equals its authors' formula, and that its limits are right.

Trained policies must reach the fixed points that theory predicts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from betarank.objectives import ObjectiveConfig, RewardShaping, shaped_linear_total, shaped_loss
from betarank.objectives.family import FAMILY

RNG = np.random.default_rng(0)
Z = jnp.asarray(RNG.normal(size=(30, 11)) * 3, jnp.float32)
X = jnp.asarray(RNG.integers(0, 11, 30))
LOG_P = jnp.take_along_axis(jax.nn.log_softmax(Z), X[:, None], 1)[:, 0]

# (parameter, the loss as its authors write it, differentiated by JAX); sg marks a weight without gradient.
sg = jax.lax.stop_gradient
AUTHORS = {
  'power': (0.5, lambda lp: -sg(jnp.exp(lp) ** (1 - (1 - jnp.exp(lp)) ** 0.5)) * lp),
  'product': (0.5, lambda lp: -sg((1 - jnp.exp(lp)) ** 0.5) * lp),
  'cross_entropy': (0.0, lambda lp: -lp),
  'focal': (2.0, lambda lp: -((1 - jnp.exp(lp)) ** 2) * lp),
  'dft': (0.0, lambda lp: -sg(jnp.exp(lp)) * lp),
  'likelihood_power': (0.7, lambda lp: (1 - jnp.exp(lp) ** 0.7) / 0.7),
  'coverage': (8.0, lambda lp: -jnp.log(-jnp.expm1(8 * jnp.log1p(-jnp.exp(lp))))),
}
LIMITS = {  # the parameter at which each equals cross-entropy
  'power': 0.0, 'product': 0.0, 'label_smoothing': 0.0, 'focal': 0.0, 'likelihood_power': 0.0,
  'coverage': 1.0,
}


def both(objective, z=Z, x=X):
  """Yields (losses, gradient) twice: of the reference, and of the chunked head."""
  def reference(z):
    loss = shaped_loss(z, x, objective)
    return loss.sum(), loss

  chunked = lambda z: shaped_linear_total(z, jnp.eye(z.shape[1]), x, objective, chunk_tokens=8)[:2]
  for f in (reference, chunked):
    (_, loss), grad = jax.jit(jax.value_and_grad(f, has_aux=True))(z)
    yield loss, grad


@pytest.mark.parametrize('name', AUTHORS)
def test_every_objective_is_as_its_authors_write_it(name):
  parameter, loss = AUTHORS[name]
  f = lambda z: loss(jnp.take_along_axis(jax.nn.log_softmax(z), X[:, None], 1)[:, 0])
  wanted, wanted_grad = jax.jit(lambda z: (f(z), jax.grad(lambda z: f(z).sum())(z)))(Z)
  for got_loss, got_grad in both(RewardShaping(parameter, top_k=11, form=name)):
    np.testing.assert_allclose(got_loss, wanted, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(got_grad, wanted_grad, rtol=2e-5, atol=2e-6)


def test_label_smoothing():
  f = lambda z: -(0.9 * jnp.eye(11)[X] + 0.1 / 11) * jax.nn.log_softmax(z)
  for got_loss, got_grad in both(RewardShaping(0.1, top_k=11, form='label_smoothing')):
    np.testing.assert_allclose(got_loss, f(Z).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(got_grad, jax.grad(lambda z: f(z).sum())(Z), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope='module')
def plain():
  return list(both(RewardShaping(top_k=11)))


@pytest.mark.parametrize('name', LIMITS)
def test_the_limit_is_cross_entropy(name, plain):
  for (got_loss, got_grad), (loss, grad) in zip(both(RewardShaping(LIMITS[name], top_k=11, form=name)), plain):
    np.testing.assert_allclose(got_loss, loss, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(got_grad, grad, rtol=1e-6, atol=1e-7)


def test_power_tends_to_dft():
  cost, weight = FAMILY['power'][0](jnp.linspace(-3, 3, 20), 300.0)
  dft_cost, dft_weight = FAMILY['dft'][0](jnp.linspace(-3, 3, 20))
  np.testing.assert_allclose(cost, dft_cost, atol=1e-5)
  np.testing.assert_allclose(weight, dft_weight, atol=1e-5)


@pytest.mark.parametrize('name', FAMILY)
def test_finite_at_any_margin(name):
  parameter = AUTHORS.get(name, (0.1,))[0]
  for value in FAMILY[name][0](jnp.array([-1e4, -200.0, -20, 0, 14.9, 15.1, 30, 90, 200, 1e4]), parameter):
    assert np.isfinite(value).all() and (np.asarray(value) >= 0).all()


def test_zero_is_cross_entropy_bit_for_bit():
  """beta = lambda = 0 gives the same bits as cross-entropy, with or without a top k.

  This holds both for constant values and for values that a schedule computes in the compiled program.
  """
  h, head = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((30, 8), (8, 500)))
  x = jnp.asarray(RNG.integers(0, 500, 30))

  @jax.jit
  def run(objective):
    f = lambda h, w: shaped_linear_total(h, w, x, objective, chunk_tokens=8)[:2]
    return jax.value_and_grad(f, (0, 1), has_aux=True)(h, head)

  plain = jax.tree.leaves(jax.jit(lambda: run.__wrapped__(RewardShaping(form='cross_entropy')))())
  scheduled = ObjectiveConfig(beta=-0.25, lambda_tail=-0.1, schedule='linear', schedule_end=9)
  static = ObjectiveConfig().at(5)
  assert jax.tree.leaves(static) == [0.0, 0.0, 0.0]
  static_run = jax.jit(lambda: run.__wrapped__(static))
  for got in (static_run(), run(RewardShaping()), run(scheduled.at(jnp.int32(0)))):
    for a, b in zip(jax.tree.leaves(got), plain):
      np.testing.assert_array_equal(a, b)


def test_zero_is_the_cross_entropy_of_optax():
  """Losses and gradients of logits differ from those of optax by at most 1e-6, relative to each entry.

  Gradients of weights differ by at most 1e-6 relative to their largest entry, because their entries are float32 sums
  whose terms cancel.
  """
  h, head = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((30, 8), (8, 500)))
  x = jnp.asarray(RNG.integers(0, 500, 30))
  optaxs = lambda h, w: optax.softmax_cross_entropy_with_integer_labels(h @ w, x)
  ours = lambda h, w: shaped_linear_total(h, w, x, RewardShaping(), chunk_tokens=8)[:2]
  (_, loss), grads = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(h, head)
  np.testing.assert_allclose(loss, optaxs(h, head), rtol=1e-6)
  for a, b in zip(grads, jax.jit(jax.grad(lambda *args: optaxs(*args).sum(), (0, 1)))(h, head)):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.abs(b).max()))
  eye = jnp.eye(500)
  grads = (jax.jit(jax.grad(lambda z, f=f: f(z).sum()))(h @ head)
           for f in (lambda z: ours(z, eye)[0], lambda z: optaxs(z, eye)))
  np.testing.assert_allclose(*grads, rtol=1e-6)


def train(shaping, q, steps):
  """Returns (the policy [V] that a tabular model learns from data q, the sum of its gradient's absolute values).

  The policy starts uniform. The expectation over the data is exact: every token is the target of one position, weighted
  by q, and all positions share one row of logits. A step follows the gradient divided by p, on a logarithmic scale.
  Near the optimum, this is the natural gradient of cross-entropy. One step can correct a probability that is a thousand
  times too small.
  """
  weights, targets, ones = jnp.asarray(q, jnp.float32), jnp.arange(len(q)), jnp.ones((len(q), 1))

  @jax.jit
  def step(z):
    total = lambda z: shaped_linear_total(ones, z[None], targets, shaping, weights=weights)[0]
    grad = jax.grad(total)(z)
    return z + jnp.log(jnp.maximum(1 - grad / jax.nn.softmax(z), 0.1)), jnp.abs(grad).sum()

  z = jnp.zeros(len(q))
  for _ in range(steps):
    z, residual = step(z)
  return np.asarray(jax.nn.softmax(z), np.float64), float(residual)


def zipf(vocab, exponent=1.8):
  q = np.arange(1, vocab + 1, dtype=np.float64) ** -exponent
  return q / q.sum()


entropy = lambda p: float(-np.sum(p * np.log(np.maximum(p, 1e-300))))


def solve_power(q, beta):
  """Returns the policy p that solves q w(p)/p = μ with Σ p = 1, in float64, by two nested bisections.

  Both halve their interval until it is smaller than what float64 resolves: 690 / 2**64 for log p, 4.8 / 2**56 for μ.
  """
  r = lambda p: p ** -((1 - p) ** beta)  # the reward of the ground truth, which decreases in p for small |β|

  def policy(mu):
    low, high = np.full_like(q, 1e-300), np.full_like(q, 1 - 1e-16)
    for _ in range(64):
      mid = np.sqrt(low * high)
      above = q * r(mid) > mu
      low, high = np.where(above, mid, low), np.where(above, high, mid)
    return np.sqrt(low * high)

  low, high = 0.2, 5.0
  for _ in range(56):
    mu = (low + high) / 2
    low, high = (mu, high) if policy(mu).sum() > 1 else (low, mu)
  return policy(mu)


@pytest.mark.parametrize('vocab,beta,of_data,wanted', [
  (2000, -0.25, 2.041, 1.949), (2000, 0.5, 2.041, 2.182),
  *(pytest.param(20_000, *rest, marks=pytest.mark.slow) for rest in [(-0.25, 2.060, 1.966), (0.5, 2.060, 2.203)])])
def test_training_reaches_the_fixed_point_of_beta(vocab, beta, of_data, wanted):
  """The policy π converges to the solution of q w(π)/π = μ. Its entropy must have the expected value, in nats."""
  q = zipf(vocab)
  assert entropy(q) == pytest.approx(of_data, abs=1e-3)
  p, residual = train(RewardShaping(beta), q, steps=7)
  assert residual < 1e-5
  assert entropy(p) == pytest.approx(wanted, abs=1e-3)
  solution = solve_power(q, beta)
  assert entropy(solution) == pytest.approx(wanted, abs=1e-3)
  assert np.abs(p - solution).sum() < 1e-4
  np.testing.assert_allclose(p, solution, rtol=5e-3)


@pytest.mark.parametrize('exponent,vocab', [(1.05, 600), (1.3, 600), (1.5, 2000)])
def test_training_reaches_the_fixed_point_of_the_tail_penalty(exponent, vocab):
  """The policy converges to π = q / (μ - λ(1-q)). With λ̂ = -0.1, the tail loses 7 to 9 % of its probability.

  If each q of the tail is small, the tail shrinks by 1 - 1/(μ + 0.1). For a small tail (μ = 1), this is |λ̂|/(1 + |λ̂|)
  = 9.1 %. For a tail with more than a quarter of q, it is less than 7 %. The tails in this test have 22, 10 and 6 % of
  q.
  """
  q, k = zipf(vocab, exponent), 100
  p, residual = train(RewardShaping(lambda_tail=-0.1, top_k=k), q, steps=8)
  assert residual < 1e-5
  assert 0.07 < 1 - p[k:].sum() / q[k:].sum() < 0.09
  lam = np.where(np.arange(vocab) < k, 0.0, -0.1)
  low, high = 0.5, 1.5
  for _ in range(80):
    mu = (low + high) / 2
    low, high = (mu, high) if (q / (mu - lam * (1 - q))).sum() > 1 else (low, mu)
  np.testing.assert_allclose(p, q / (mu - lam * (1 - q)), rtol=1e-4)
