"""Sweep of the paper's five objectives (arXiv 2512.22955, section 4) through all stages of a model size.

    betarank sweep --config=configs/sweeps/paper.py --root=runs/paper --parallel=2

The paper ran one seed of each objective; seeds=N runs more.
"""

from betarank.configs import paper, sweeps


def get_config(arg=None):
  return sweeps.config(sweeps.parse(arg, seeds=1))


def sweep(add, arg):
  a = sweeps.parse(arg, seeds=1)
  for objective in paper.OBJECTIVES.values():
    sweeps.chain(add, a, objective or dict(beta=0.0))
