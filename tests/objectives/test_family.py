"""The relatives of the paper's objective, their limits, fixed points, schedules, and the config section."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from betarank.objectives import RewardShaping, shaped_linear_total, shaped_loss
from betarank.objectives.family import FAMILY, ObjectiveConfig, TokenObjective

RNG = np.random.default_rng(0)
Z = jnp.asarray(RNG.normal(size=(30, 11)) * 3, jnp.float32)
X = jnp.asarray(RNG.integers(0, 11, 30))
LOG_P = jnp.take_along_axis(jax.nn.log_softmax(Z), X[:, None], 1)[:, 0]

# Each as its authors write it, differentiated by JAX; sg marks a weight without gradient.
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
LIMITS = {  # knob at which each is cross-entropy
  'power': 0.0, 'product': 0.0, 'label_smoothing': 0.0, 'focal': 0.0, 'likelihood_power': 0.0,
  'coverage': 1.0,
}


def both(objective, z=Z, x=X):
  """(losses, gradient) by the reference and by the chunked head."""
  reference = jax.vjp(lambda z: shaped_loss(z, x, objective), z)
  yield reference[0], reference[1](jnp.ones(len(x)))[0]
  f = lambda z: shaped_linear_total(z, jnp.eye(z.shape[1]), x, objective, chunk_tokens=8)[:2]
  (_, loss), grad = jax.value_and_grad(f, has_aux=True)(z)
  yield loss, grad


@pytest.mark.parametrize('name', AUTHORS)
def test_as_its_authors_write_it(name):
  knob, loss = AUTHORS[name]
  f = lambda z: loss(jnp.take_along_axis(jax.nn.log_softmax(z), X[:, None], 1)[:, 0])
  for got_loss, got_grad in both(TokenObjective(name, knob)):
    np.testing.assert_allclose(got_loss, f(Z), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(got_grad, jax.grad(lambda z: f(z).sum())(Z), rtol=2e-5, atol=2e-6)


def test_label_smoothing():
  f = lambda z: -(0.9 * jnp.eye(11)[X] + 0.1 / 11) * jax.nn.log_softmax(z)
  for got_loss, got_grad in both(TokenObjective('label_smoothing', 0.1)):
    np.testing.assert_allclose(got_loss, f(Z).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(got_grad, jax.grad(lambda z: f(z).sum())(Z), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', LIMITS)
def test_limit_is_cross_entropy(name):
  plain = list(both(RewardShaping()))
  for (got_loss, got_grad), (loss, grad) in zip(both(TokenObjective(name, LIMITS[name])), plain):
    np.testing.assert_allclose(got_loss, loss, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(got_grad, grad, rtol=1e-6, atol=1e-7)


def test_power_tends_to_dft():
  cost, weight = FAMILY['power'][0](jnp.linspace(-3, 3, 20), 300.0)
  dft_cost, dft_weight = FAMILY['dft'][0](jnp.linspace(-3, 3, 20))
  np.testing.assert_allclose(cost, dft_cost, atol=1e-5)
  np.testing.assert_allclose(weight, dft_weight, atol=1e-5)


@pytest.mark.parametrize('name', FAMILY)
def test_finite_at_any_margin(name):
  knob = AUTHORS.get(name, (0.1,))[0]
  for value in FAMILY[name][0](jnp.array([-1e4, -200.0, -20, 0, 14.9, 15.1, 30, 90, 200, 1e4]), knob):
    assert np.isfinite(value).all() and (np.asarray(value) >= 0).all()


def test_zero_is_cross_entropy_bit_for_bit():
  """beta = lambda = 0, static or traced by a schedule, with top-k or without: cross-entropy's own bits."""
  h, head = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((30, 8), (8, 500)))
  x = jnp.asarray(RNG.integers(0, 500, 30))

  @jax.jit
  def run(objective):
    f = lambda h, w: shaped_linear_total(h, w, x, objective, chunk_tokens=8)[:2]
    return jax.value_and_grad(f, (0, 1), has_aux=True)(h, head)

  plain = jax.tree.leaves(jax.jit(lambda: run.__wrapped__(TokenObjective('cross_entropy')))())
  scheduled = ObjectiveConfig(beta=-0.25, lambda_tail=-0.1, schedule='linear', schedule_end=9)
  static = ObjectiveConfig().at(5)
  assert jax.tree.leaves(static) == [0.0, 0.0, 0.0]
  static_run = jax.jit(lambda: run.__wrapped__(static))
  for got in (static_run(), run(RewardShaping()), run(scheduled.at(jnp.int32(0)))):
    for a, b in zip(jax.tree.leaves(got), plain):
      np.testing.assert_array_equal(a, b)



def test_zero_is_the_cross_entropy_of_optax():
  """Within 1e-6: of each loss, of each entry of the logits' gradient, of the largest entry of a weight's.

  Entries of the latter are sums whose terms cancel, in float32 here and there.
  """
  h, head = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((30, 8), (8, 500)))
  x = jnp.asarray(RNG.integers(0, 500, 30))
  optaxs = lambda h, w: optax.softmax_cross_entropy_with_integer_labels(h @ w, x)
  ours = lambda h, w: shaped_linear_total(h, w, x, RewardShaping(), chunk_tokens=8)[:2]
  (_, loss), grads = jax.value_and_grad(ours, (0, 1), has_aux=True)(h, head)
  np.testing.assert_allclose(loss, optaxs(h, head), rtol=1e-6)
  for a, b in zip(grads, jax.grad(lambda *args: optaxs(*args).sum(), (0, 1))(h, head)):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.abs(b).max()))
  eye = jnp.eye(500)
  grads = (jax.grad(lambda z, f=f: f(z).sum())(h @ head) for f in (lambda z: ours(z, eye)[0], lambda z: optaxs(z, eye)))
  np.testing.assert_allclose(*grads, rtol=1e-6)


def train(shaping, q, steps):
  """Policy [V] that a tabular model learns from data q, starting uniform, and the gradient's absolute sum.

  The expectation over the data is exact: every target is a position, weighted by q; all share one row of logits.
  A step goes along the gradient divided by p (the natural gradient of cross-entropy, near the optimum), on a
  logarithmic scale, so that a token seen a thousand times too rarely is right after one.
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
  """The root of q w(p)/p = μ with Σ p = 1, in float64: two nested bisections."""
  r = lambda p: p ** -((1 - p) ** beta)  # the reward of the truth, falling in p for small |β|

  def policy(mu):
    low, high = np.full_like(q, 1e-300), np.full_like(q, 1 - 1e-16)
    for _ in range(200):
      mid = np.sqrt(low * high)
      above = q * r(mid) > mu
      low, high = np.where(above, mid, low), np.where(above, high, mid)
    return np.sqrt(low * high)

  low, high = 0.2, 5.0
  for _ in range(80):
    mu = (low + high) / 2
    low, high = (mu, high) if policy(mu).sum() > 1 else (low, mu)
  return policy(mu)


@pytest.mark.parametrize('beta,wanted', [(-0.25, 1.966), pytest.param(0.5, 2.203, marks=pytest.mark.slow)])
def test_training_reaches_the_fixed_point_of_beta(beta, wanted):
  """Entropies of paper.md §1.6 at 20,000 tokens, through the head's own gradient; the policy solves q w(π)/π = μ."""
  q = zipf(20_000)
  assert entropy(q) == pytest.approx(2.060, abs=1e-3)
  p, residual = train(RewardShaping(beta), q, steps=7)
  assert residual < 1e-5
  assert entropy(p) == pytest.approx(wanted, abs=1e-3)
  solution = solve_power(q, beta)
  assert entropy(solution) == pytest.approx(wanted, abs=1e-3)
  assert np.abs(p - solution).sum() < 1e-4
  np.testing.assert_allclose(p, solution, rtol=5e-3)


@pytest.mark.parametrize('exponent,vocab', [(1.05, 600), (1.3, 600), (1.5, 2000)])
def test_training_reaches_the_fixed_point_of_the_tail_penalty(exponent, vocab):
  """λ̂ = -0.1 takes 7 to 9 % off the tail; the policy is π = q / (μ - λ(1-q)).

  With small q the tail falls by 1 - 1/(μ + 0.1), so by 9.1 % = |λ̂|/(1 + |λ̂|) of a small tail (μ = 1), and by
  less than 7 % of one that holds more than a quarter of q. These hold 22, 10 and 6 %.
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


def test_schedules():
  c = ObjectiveConfig(beta=-0.25, lambda_tail=-0.1, schedule='linear', schedule_start=10, schedule_end=20)
  at = jax.jit(c.at)
  assert [float(at(s).beta) for s in (0, 10, 15, 20, 99)] == [0.0, 0.0, -0.125, -0.25, -0.25]
  assert float(at(15).lambda_tail) == pytest.approx(-0.05)
  c = ObjectiveConfig(beta=0.5, beta_from=-0.25, schedule='step', schedule_start=10)
  assert [float(c.at(s).beta) for s in (0, 9, 10, 11)] == [-0.25, -0.25, 0.5, 0.5]
  assert c.at(jnp.int32(3)).lambda_tail == 0.0 and not isinstance(c.at(jnp.int32(3)).lambda_tail, jax.Array)
  traces = []
  run = jax.jit(lambda step: (traces.append(1), c.at(step).beta)[1])
  for s in range(12):
    run(jnp.int32(s))
  assert len(traces) == 1  # traced, not compiled anew


@pytest.mark.parametrize('kwargs,message', [
  ({'beta': -2.0}, 'beta must be >= -1, got -2.0'),
  ({'beta': math.nan}, 'beta must be finite, got nan'),
  ({'beta': '0'}, "beta must be a number, got '0'"),
  ({'lambda_head': math.inf}, 'lambda_head must be finite, got inf'),
  ({'lambda_tail': math.nan}, 'lambda_tail must be finite, got nan'),
  ({'top_k': 0}, 'top_k must be an integer >= 1, got 0'),
  ({'top_k': 1.5}, 'top_k must be an integer >= 1, got 1.5'),
  ({'form': 'sum'}, "form must be one of"),
])
def test_bad_values(kwargs, message):
  for make in (RewardShaping, ObjectiveConfig):
    with pytest.raises(ValueError) as error:
      make(**kwargs)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize('kwargs,message', [
  ({'schedule': 'cosine'}, "schedule must be one of constant, linear, step, got 'cosine'"),
  ({'schedule': 'linear', 'schedule_start': 5, 'schedule_end': 5},
   'schedule_end must be > schedule_start = 5, got 5'),
  ({'schedule': 'step', 'beta_from': -3.0}, 'beta_from must be >= -1, got -3.0'),
  ({'form': 'coverage'}, 'beta must be >= 1, got 0.0'),
  ({'form': 'label_smoothing', 'beta': 1.5}, 'beta must be <= 1 for label_smoothing, got 1.5'),
  ({'z_loss': -1.0}, 'z_loss must be >= 0, got -1.0'),
])
def test_bad_config(kwargs, message):
  with pytest.raises(ValueError) as error:
    ObjectiveConfig(**kwargs)
  assert str(error.value) == message
