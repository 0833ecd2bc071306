"""Defines the loss of the ground-truth token, for the paper's objective and for related ones.

Each objective is a function of the target's margin m = log(p/(1-p)), float32 [...], and of at most one parameter. Here
p is the target's probability. The function returns two float32 arrays [...]:

    cost      the loss in nats
    weight    -dcost/dlog p, the factor by which the gradient of cross-entropy is multiplied

The loss functions treat cost and weight as constants, and compute the gradient from the weight. JAX therefore never
differentiates the functions below. In their formulas, sg stops the gradient. Rewards for wrong tokens (lambda_head,
lambda_tail) can be added to every objective.

To add an objective, write such a function and add it to FAMILY. The reference loss and the chunked head then support
it.
"""

import math

import jax
import jax.numpy as jnp

softplus = jax.nn.softplus  # log p = -softplus(-m), log(1-p) = -softplus(m)

# For larger margins 1 - p is too small for float32, so the weight of 'power' is computed from its limit.
FAR_MARGIN = 20.0
# If β < 0, the weight of 'product' goes to infinity as p -> 1, so it is capped.
MAX_PRODUCT_WEIGHT = 30.0


def cross_entropy(margin, _=None):
  """Computes plain cross-entropy, -log p."""
  return softplus(-margin), jnp.ones_like(margin)


def power(margin, beta):
  """Computes the paper's objective: -sg(w) log p, with w = p^(1-(1-p)^β).

  Equals cross-entropy at β = 0. Source: arXiv 2512.22955, Eq 11.
  """
  weight = power_weight(margin, beta)
  return weight * softplus(-margin), weight


def product(margin, beta):
  """Computes -sg((1-p)^β) log p, which is focal loss without the gradient through its weight.

  Equals cross-entropy at β = 0.
  """
  weight = product_weight(margin, beta)
  return weight * softplus(-margin), weight


def label_smoothing(margin, epsilon):
  """Computes the first of the two terms of cross-entropy with label smoothing.

      loss = -(1-ε) log p - ε/V Σ_a log p_a

  V is the vocabulary size, and the sum runs over the vocabulary. The loss functions add the second term, with ε from
  `RewardShaping.smoothing`. Equals cross-entropy at ε = 0. Source: Szegedy et al., arXiv 1512.00567.
  """
  return (1 - epsilon) * softplus(-margin), (1 - epsilon) * jnp.ones_like(margin)


def focal(margin, gamma):
  """Computes focal loss, -(1-p)^γ log p, with a gradient through the weight.

  Equals cross-entropy at γ = 0. Source: arXiv 1708.02002.
  """
  nll, scale = softplus(-margin), jnp.exp(-gamma * softplus(margin))
  near = jnp.minimum(margin, 15.0)  # above 15, -log p / (1-p) rounds to 1, and both of its terms would underflow
  ratio = jnp.where(margin < 15, softplus(-margin) * jnp.exp(softplus(near)), 1.0)
  return scale * nll, scale * (1 + gamma * jnp.exp(-nll) * ratio)


def dft(margin, _=None):
  """Computes -sg(p) log p, the loss of Dynamic Fine-Tuning.

  This loss gives the target the reward 1, while cross-entropy gives the reward 1/p (see reward_shaping.py). It is the
  limit of `power` for β -> ∞. Source: arXiv 2508.05629.
  """
  p = jnp.exp(-softplus(-margin))
  return p * softplus(-margin), p


def likelihood_power(margin, alpha):
  """Computes (1 - p^α)/α. This is cross-entropy at α = 0, and 1 - p at α = 1.

  Source: Beyond Log Likelihood, arXiv 2510.00526.
  """
  nll = softplus(-margin)
  return nll * _mean_decay(alpha * nll), jnp.exp(-alpha * nll)


def coverage(margin, n):
  """Computes -log(1 - (1-p)^N): minus the log-probability that at least one of N = n samples is right.

  Returns (cost, weight) with weight = N (1-p)^(N-1) p / (1 - (1-p)^N). Here p is the target's probability, which the
  margin log(p/(1-p)) determines. Equals cross-entropy at N = 1. Source: Direct Coverage Optimization, arXiv 2502.07154.
  """
  far = margin < -15  # here log(1-p) rounds to -p = -exp(m), and its computation would underflow
  miss = softplus(margin)  # -log(1-p)
  log_miss = jnp.where(far, margin, jnp.log(softplus(jnp.maximum(margin, -15.0))))
  p_over_miss = jnp.where(far, 1.0, jnp.exp(-softplus(-margin) - log_miss))
  y = n * miss
  decay = _mean_decay(y)
  many = -jnp.log1p(-jnp.exp(-jnp.maximum(y, 1.0)))
  few = -jnp.log(decay) - jnp.log(jnp.float32(n)) - log_miss
  return jnp.where(y > 1, many, few), p_over_miss * jnp.exp((1 - n) * miss) / decay


def power_weight(margin, beta):
  """Returns p^(1 - (1-p)^β), computed from the margin log(p/(1-p)): float32 [...].

  The result is accurate for p near 0 and near 1, and exactly 1 for β = 0. A computation from p would fail, because 1 -
  p rounds to zero for margins above 17, which gives inf or NaN for β < 0.
  """
  near, far = jnp.minimum(margin, FAR_MARGIN), jnp.maximum(margin, FAR_MARGIN)
  log_p = -softplus(-near)
  log_1mp = -softplus(near)
  exponent_near = -log_p * jnp.expm1(beta * log_1mp)
  exponent_far = jnp.exp(-(1 + beta) * far) - jnp.exp(-far)  # for large margins, log p = -exp(-margin)
  return jnp.exp(jnp.where(margin < FAR_MARGIN, exponent_near, exponent_far))


def product_weight(margin, beta):
  """Returns (1-p)^β, computed from the margin log(p/(1-p)): float32 [...].

  For β < 0 this goes to infinity as p approaches 1, so it is capped at MAX_PRODUCT_WEIGHT.
  """
  log_weight = -beta * softplus(margin)
  return jnp.exp(jnp.minimum(log_weight, math.log(MAX_PRODUCT_WEIGHT)))


def _mean_decay(y):
  """Returns (1 - exp(-y)) / y for y >= 0, the mean of exp(-t) for t from 0 to y. At y = 0 it returns the limit, 1."""
  return jnp.where(y > 0, -jnp.expm1(-y) / jnp.where(y > 0, y, 1.0), 1.0)


# name -> (function, smallest parameter, largest parameter). Objectives without a parameter take 0.
FAMILY = {
  'power': (power, -1.0, math.inf),
  'product': (product, -1.0, math.inf),
  'cross_entropy': (cross_entropy, 0.0, 0.0),
  'label_smoothing': (label_smoothing, 0.0, 1.0),
  'focal': (focal, 0.0, math.inf),
  'dft': (dft, 0.0, 0.0),
  'likelihood_power': (likelihood_power, 0.0, math.inf),
  'coverage': (coverage, 1.0, math.inf),
}
