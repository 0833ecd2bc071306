"""The positive reward's beta on a grid, which the paper didn't do: it has -0.25, 0 and 0.5.

    betarank sweep --config=configs/sweeps/beta.py --root=runs/beta --parallel=2

Entropy isn't monotone in beta: towards large ones the loss turns into -p, whose optimum is the mode. Hence up to 1.
"""

from betarank.configs import sweeps

BETAS = (-0.5, -0.25, -0.1, 0.0, 0.25, 0.5, 1.0)


def get_config(arg=None):
  return sweeps.config(sweeps.parse(arg, seeds=1))


def sweep(add, arg):
  a = sweeps.parse(arg, seeds=1)
  for beta in BETAS:
    sweeps.chain(add, a, dict(beta=beta))
