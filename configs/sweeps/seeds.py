"""Sweep of five seeds of cross-entropy and of the paper's two best objectives: how much arms differ by chance.

    betarank sweep --config=configs/sweeps/seeds.py --root=runs/seeds --parallel=2

The paper has one seed each, and differences of 0.5 to 2 points.
"""

from betarank.configs import paper, sweeps


def get_config(arg=None):
  return sweeps.config(sweeps.parse(arg, seeds=5))


def sweep(add, arg):
  a = sweeps.parse(arg, seeds=5)
  for name in ('ce', 'beta_low', 'tail'):
    sweeps.chain(add, a, paper.OBJECTIVES[name] or dict(beta=0.0))
