"""Sweep of beta over seven values; the paper has three of them: -0.25, 0 and 0.5.

    betarank sweep --config=configs/sweeps/beta.py --root=runs/beta --parallel=2

The grid ends at 1, because entropy doesn't keep rising with beta. For large beta, the gradient of the loss approaches
the gradient of -p, where p is the probability of the target. Minimizing -p puts all probability on the most likely
token, so entropy falls.
"""

from betarank.configs import sweeps

BETAS = (-0.5, -0.25, -0.1, 0.0, 0.25, 0.5, 1.0)


def get_config(arg=None):
  return sweeps.config(sweeps.parse(arg, seeds=1))


def sweep(add, arg):
  a = sweeps.parse(arg, seeds=1)
  for beta in BETAS:
    sweeps.chain(add, a, dict(beta=beta))
