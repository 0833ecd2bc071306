"""Sweep of five seeds, for cross-entropy and the paper's two best objectives. It shows how much runs differ by chance.

    betarank sweep --config=configs/sweeps/seeds.py --root=runs/seeds --parallel=2

The paper ran one seed of each objective, and reports differences of 0.5 to 2 points.
"""

from betarank.configs import paper, sweeps


def get_config(arg=None):
  return sweeps.config(sweeps.parse(arg, seeds=5))


def sweep(add, arg):
  a = sweeps.parse(arg, seeds=5)
  for name in ('ce', 'beta_low', 'tail'):
    sweeps.chain(add, a, paper.OBJECTIVES[name] or dict(beta=0.0))
