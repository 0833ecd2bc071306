"""Defines what the sweeps share: the config of each model size, and the runs of an arm (one setting of the objective).

    betarank sweep --config=configs/sweeps/paper.py --root=runs/paper                        # smoke size
    betarank sweep --config=configs/sweeps/beta.py:size=dense_1b,seeds=3 --on=tpu --root=gs://BUCKET/beta
"""

from types import SimpleNamespace

from ml_collections import ConfigDict

from betarank.configs import common, load, rl_smoke, smoke
from betarank.configs.errors import ConfigError

SIZES = {  # size -> its stages; two of the paper's models were only pre-trained
  'smoke': ('pretrain', 'rl'),
  'dense_1b': ('pretrain',),
  'dense_4b': ('pretrain', 'midtrain', 'rl'),
  'moe_5b_a0p3b': ('pretrain',),
  'moe_10b_a0p5b': ('pretrain', 'midtrain', 'rl'),
  'moe_20b_a1b': ('pretrain', 'midtrain', 'rl'),
}


def parse(arg: str | None, seeds: int) -> SimpleNamespace:
  """Parses a config's argument, `size=smoke|dense_1b|...,stage=pretrain|midtrain|rl,seeds=N,tokens=N`.

  Without tokens=N, or with tokens=0, the token budget stays as it is in the config of this model size.

  seeds: the number of seeds if the argument has no seeds=N.
  """
  a = common.parse(arg, size='smoke', stage='pretrain', seeds=seeds, tokens=0)
  common.check_choice('size', a.size, SIZES)
  if a.stage not in SIZES[a.size]:
    raise ConfigError(f'config argument stage={a.stage}: {a.size} has {", ".join(SIZES[a.size])}')
  return a


def config(a: SimpleNamespace) -> ConfigDict:
  """Returns the config of the model size `a.size` and the stage `a.stage`, before the settings of an arm are applied.
  """
  if a.size != 'smoke':
    c = load.read(f'configs/paper/{a.size}.py:stage={a.stage}')
  elif a.stage == 'rl':
    c = rl_smoke.get_config()
  else:
    c = smoke.get_config()
  if a.tokens and a.stage != 'rl':
    c.train.tokens = a.tokens
  return c


def chain(add, a: SimpleNamespace, objective: dict[str, float]) -> None:
  """Adds one arm to the sweep: the runs with one setting of the objective.

  For each seed, the arm has one run for every stage of the model size `a.size`. Each run starts from the run of the
  stage before. After the last stage, a probe measures the last checkpoint.

  add: the function that adds a run to the sweep (launch/points.py).
  a: the parsed argument, from `parse`.
  objective: the settings of section `objective` that the arm changes. They apply to all stages except RL.
  """
  changed = {f'objective.{name}': value for name, value in objective.items()}
  for seed in range(a.seeds):
    point = ''
    for stage in SIZES[a.size]:
      if stage == 'rl':
        point = add(stage='rl', arg='stage=rl', after=point, seed=seed)
      else:
        point = add(arg=f'stage={stage}', after=point, seed=seed, **changed)
    add(stage='probe', after=point)
