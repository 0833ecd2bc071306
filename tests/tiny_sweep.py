"""Config of a small sweep for tests: `betarank sweep --config=tests/tiny_sweep.py:dir=DATA,arms=2,seeds=1 ...`."""

from betarank.configs import common
from tests import tiny, tiny_rl


def arguments(arg):
  """Returns the arguments of this config. `bad` gives the first arm a learning rate with which it fails."""
  return common.parse(arg, dir='', stage='pretrain', arms=2, seeds=1, probes=False, bad=False)


def get_config(arg=None):
  a = arguments(arg)
  if a.stage == 'rl':
    c = tiny_rl.get_config('init_from=parent')
    c.model.layers = 1
    c.rl.update(steps=2, group_size=4, max_resampling_rounds=1, max_new_tokens=(16,), decode_batch_size=16,
                eval_prompts=2, eval_samples=2)
    return c
  c = tiny.get_config(f'dir={a.dir}')
  c.data.sources.main.uri = 'reasoning:chain_sum'
  c.model.layers = 1
  c.train.tokens //= 2  # 6 steps
  c.log.samples = 0
  return c


def sweep(add, arg):
  a = arguments(arg)
  for arm in range(a.arms):
    for seed in range(a.seeds):
      bad = {'optimizer.lr': 1e38, 'optimizer.weight_decay': 0} if a.bad and not arm else {}
      base = add(f'arm{arm},seed{seed}', seed=seed, **{'objective.beta': -0.1 * arm, **bad})
      rl = add(stage='rl', arg='stage=rl', after=base, seed=seed)
      if a.probes:
        add(stage='probe', after=rl, **{'eval.probe.rows': 8})
