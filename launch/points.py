"""The points of a sweep: what `sweep(add)` at the end of a config file names, checked before anything starts.

    def sweep(add):
      for beta in (0.0, -0.25):
        base = add(**{'objective.beta': beta})                            # betarank train
        rl = add(after=base, stage='rl', config='configs/rl_smoke.py')    # betarank rl, from base's weights
        add(after=rl, stage='sample', benchmark='reasoning:chain_sum', **{'eval.sample.problems': 50})

`add` returns the point's name, which is also its folder under the sweep's root.
"""

import dataclasses
import fnmatch
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from betarank import data
from betarank.configs import common, load
from betarank.configs.errors import ConfigError, suggestion
from betarank.configs.load import to_json
from betarank.configs.sections import section
from betarank.data import DataConfig, DataError
from betarank.eval.config import EvalConfig
from betarank.rl.config import rl_run
from betarank.runtime import workdir
from betarank.train.config import run_config

# -P: the folder that one is in, which may hold anything, isn't searched for modules.
BETARANK = (sys.executable, '-P', '-m', 'betarank')

STAGES = ('train', 'rl', 'probe', 'sample')  # what a point can run; preparing data is added by itself
TRAINS = ('train', 'rl')  # stages with a workdir of their own, whose last checkpoint says that they are finished


@dataclasses.dataclass(frozen=True)
class Point:
  """One command of the project, started once.

  Attributes:
    name: ARM/STAGE; the workdir of a stage that trains is ROOT/NAME.
    after: the point whose weights are where this one begins, or, for an evaluation, what is evaluated; '' for none.
    needs: the points that have to be finished first: `after`, and the one that prepares the data.
    config: the resolved config.
    steps: the step at which it is finished; 0 for a stage that doesn't count steps.
    arguments: of `betarank`, to run it.
  """

  name: str
  stage: str
  after: str
  needs: tuple[str, ...]
  config: ConfigDict
  steps: int
  workdir: str
  arguments: tuple[str, ...]

  def step(self) -> int:
    """Of the newest checkpoint; 0 if there is none."""
    folder = epath.Path(self.workdir) / 'checkpoints'
    return max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0) if folder.exists() else 0

  def finished(self) -> bool | None:
    """Whether what it makes is there, whole; None where that can't be seen (evaluations)."""
    if self.stage in TRAINS:
      return self.step() >= self.steps
    if self.stage != 'data':
      return None
    try:
      c = section(DataConfig, self.config.data, 'data')
      return epath.Path(c.tokenizer_path).exists() and all(data.check_prepared(c, name) for name in c.sources)
    except DataError:
      return False


def expand(spec: str, root: str, only: Sequence[str] = ()) -> list[Point]:
  """The points that the config file at `spec` names, each after the one it needs, with data to prepare first.

  only: shell patterns of names; what those points need is kept too. Raises ConfigError, one line, for a point that
  is named twice, follows one that isn't there, or whose config can't be run.
  """
  module, arg = load.module(spec)
  if not hasattr(module, 'sweep'):
    raise ConfigError(f'--config={spec}: has no sweep(add)')
  points: dict[str, Point] = {}
  takes_argument = len(inspect.signature(module.sweep).parameters) > 1  # sweep(add, arg), as get_config(arg)
  module.sweep(_adder(spec, root, points), *([arg or None] if takes_argument else []))
  if not points:
    raise ConfigError(f'--config={spec}: its sweep(add) names no point')
  return _select(_with_data(list(points.values()), root), only)


def _adder(spec: str, root: str, points: dict[str, Point]) -> Callable[..., str]:
  def add(name: str = '', *, stage: str = 'train', config: str = '', arg: str = '', after: str = '',
          benchmark: str = '', **overrides: Any) -> str:
    """Names a point and returns its full name.

    name: of its arm; by default made of the overrides or, after another point, that point's.
    stage: train (pre-training and mid-training), rl, probe or sample (both of `betarank eval`).
    config: another config file than the sweep's own. arg: more of its argument, 'stage=mid'.
    after: the point whose weights it starts from, or which it evaluates.
    benchmark: of stage sample, as `betarank eval sample --benchmark` takes it.
    overrides: by dotted key, **{'optimizer.lr': 1e-3}.
    """
    if stage not in STAGES:
      raise ConfigError(f'sweep: stage must be one of {", ".join(STAGES)}, got {stage!r}')
    arm = name or (after.rpartition('/')[0] if after else _describe(overrides) or 'run')
    full = f'{arm}/{(name and stage) or _stage_name(stage, arg, benchmark)}'
    where = f'sweep point {full}'
    if not re.fullmatch(r'[\w.=,+-]+(/[\w.=,+-]+)*', full) or '..' in full:
      raise ConfigError(f'{where}: a name is made of letters, digits and . = , + - _, with / between folders')
    if full in points:
      raise ConfigError(f'{where}: is named twice; give one of them another name=')
    if after and (after not in points or points[after].stage not in TRAINS):
      trained = [p.name for p in points.values() if p.stage in TRAINS]
      raise ConfigError(f'{where}: after={after!r} is no earlier point that trains{suggestion(after, trained)}')
    if bool(benchmark) != (stage == 'sample'):
      raise ConfigError(f'{where}: benchmark= belongs to stage sample, which needs it')
    parent = points.get(after)
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in overrides.items()}
    try:
      make = _training if stage in TRAINS else _evaluation
      points[full] = make(full, stage, _extend(config or spec, arg) if config or arg or stage in TRAINS else '',
                          text, parent, f'{root}/{full}', benchmark)
    except ConfigError as error:
      raise ConfigError(f'{where}: {error}') from None
    return full

  return add


def _describe(overrides: dict[str, Any]) -> str:
  """'beta=-0.25,seed=1': the overrides by the last part of their keys, which is enough where it is unique."""
  leaves = [key.rpartition('.')[2] for key in overrides]
  short = [leaf if leaves.count(leaf) == 1 else key for leaf, key in zip(leaves, overrides)]
  return ','.join(f'{key}={_plain(str(value))}' for key, value in zip(short, overrides.values()))


def _stage_name(stage: str, arg: str, benchmark: str) -> str:
  """'train', or what tells it from another point of the arm: 'mid' of stage=mid, 'sample,gsm8k'."""
  if arg.startswith('stage='):
    return _plain(arg.removeprefix('stage='))
  return ','.join(filter(None, (stage, _plain(arg), _plain(benchmark))))


def _plain(text: str) -> str:
  """`text` with what doesn't belong into a file's name replaced."""
  return re.sub(r'[^\w.=,+-]+', '-', text)


def _extend(spec: str, arg: str) -> str:
  return spec + (',' if '.py:' in spec else ':') + arg if arg else spec


def _flags(overrides: dict[str, str]) -> tuple[str, ...]:
  return tuple(f'--config.{key}={value}' for key, value in overrides.items())


def _training(name: str, stage: str, spec: str, overrides: dict[str, str], parent: Point | None, path: str,
              _) -> Point:
  if parent:
    overrides = overrides | {'train.init_from': parent.workdir}
  config = load.load(spec, overrides)
  if '://' in path and (moved := _to_bucket(config, path.removesuffix(f'/{name}'), parent)):
    overrides = overrides | moved
    config = load.load(spec, overrides)
  steps = rl_run(config).rl.steps if stage == 'rl' else run_config(config).steps
  arguments = (stage, f'--config={spec}', f'--workdir={path}', *_flags(overrides))
  after = parent.name if parent else ''
  return Point(name, stage, after, (after,) if after else (), config, steps, path, arguments)


def _to_bucket(config: ConfigDict, root: str, parent: Point | None) -> dict[str, str]:
  """Overrides that place data in the sweep's bucket which the config has on this machine, whose disk no slice reads."""
  moved = {f'data.{key}': f'{root}/{value.lstrip("/")}' for key in ('dir', 'tokenizer')
           if (value := config.data[key]) and '://' not in value}
  made = section(DataConfig, parent.config.data, 'data').tokenizer_path if parent else ''
  if moved.get('data.tokenizer', made) != made:  # nothing in the sweep makes it
    raise ConfigError(f'config.data.tokenizer: {config.data.tokenizer} is on this machine, where no slice can read it; '
                      'copy it to the bucket')
  return moved


def _evaluation(name: str, stage: str, spec: str, overrides: dict[str, str], parent: Point | None, _path: str,
                benchmark: str) -> Point:
  if not parent:
    raise ConfigError(f'stage {stage} evaluates a point: name it with after=')
  config = parent.config.copy_and_resolve_references()
  with config.unlocked():
    given = load.read(spec) if spec else ConfigDict()
    config.eval = given.get('eval', config.get('eval', common.evaluation()))
    for key, value in overrides.items():
      load.override(config, key, value)
  section(EvalConfig, config.eval, 'eval')
  flags = [f'--checkpoint={parent.workdir}', *([f'--config={spec}'] if spec else []),
           *([f'--benchmark={benchmark}'] if benchmark else [])]
  return Point(name, stage, parent.name, (parent.name,), config, 0, parent.workdir,
               ('eval', stage, *flags, *_flags(overrides)))


def _with_data(points: list[Point], root: str) -> list[Point]:
  """Puts first what prepares the data that pre-training reads, a point a data section, each after the one before it:
  it uses all cores, and may need a tokenizer that the one before it trains.
  """
  prepare: dict[str, Point] = {}
  done = []
  for point in points:
    if point.after and point.stage != 'train':  # what RL reads, the tokenizer, was there for what comes before it
      done.append(point)
      continue
    c = section(DataConfig, point.config.data, 'data')
    key = json.dumps([c.dir, c.tokenizer, c.vocab_size, c.validation_fraction, c.document_bytes, c.held_out_fraction,
                      {name: [s.uri, s.max_documents] for name, s in c.sources.items()}], sort_keys=True)
    if key not in prepare:
      same_folder = sum(p.workdir == c.dir for p in prepare.values())
      folder = _plain(c.dir.removeprefix(f'{root}/')).strip('-.')
      name = f'data/{folder}' + (f'-{same_folder + 1}' if same_folder else '')
      before = list(prepare.values())[-1:]
      deciding = ('--config=', '--config.data.', '--config.model.vocab_size=')
      arguments = ('data', 'prepare', *(a for a in point.arguments if a.startswith(deciding)))
      prepare[key] = Point(name, 'data', '', tuple(p.name for p in before), point.config, 0, c.dir, arguments)
    done.append(dataclasses.replace(point, needs=(*point.needs, prepare[key].name)))
  return [*prepare.values(), *done]


def _select(points: list[Point], only: Sequence[str]) -> list[Point]:
  if not only:
    return points
  by_name = {point.name: point for point in points}
  keep: set[str] = set()
  for pattern in only:
    hits = [name for name in by_name if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f'{pattern}/*')]
    if not hits:
      raise ConfigError(f'--only={pattern}: no such point{suggestion(pattern, by_name)}')
    while hits:
      keep.add(name := hits.pop())
      hits += by_name[name].needs
  return [point for point in points if point.name in keep]


def check_workdirs(points: Iterable[Point]) -> None:
  """Raises ConfigError, one line, if a workdir holds a run that can't go on as its point's config says."""
  for point in points:
    if point.stage in TRAINS:
      workdir.check_config(epath.Path(point.workdir), point.config)


def resolved(points: Iterable[Point]) -> dict[str, Any]:
  """{name: config as JSON would hold it}."""
  return {point.name: json.loads(to_json(point.config)) for point in points}
