"""Creates the points of a sweep from `sweep(add)` in a config file, and checks them before anything starts.

    def sweep(add):
      for beta in (0.0, -0.25):
        base = add(**{'objective.beta': beta})                            # betarank train
        rl = add(after=base, stage='rl', config='configs/rl_smoke.py')    # betarank rl, from base's weights
        add(after=rl, stage='sample', benchmark='reasoning:chain_sum', **{'eval.sample.problems': 50})

`add` returns the name of the point, which is also its folder in the sweep's root.
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
from betarank.configs.parser import not_for_runs
from betarank.configs.sections import section
from betarank.data import DataConfig, DataError
from betarank.eval.config import EvalConfig
from betarank.rl.config import rl_run
from betarank.runtime import checkpoint, workdir
from betarank.train.config import run_config

# -P prevents Python from importing modules of the current folder, which may contain anything.
BETARANK = (sys.executable, '-P', '-m', 'betarank')

STAGES = ('train', 'rl', 'probe', 'sample')  # what a point can run; points that prepare data are added automatically
TRAINS = ('train', 'rl')  # stages with their own workdir; they are finished if there is a checkpoint of the last step


@dataclasses.dataclass(frozen=True)
class Point:
  """One betarank command of a sweep.

  Attributes:
    name: ARM/STAGE, such as 'beta=-0.25/train'. If the point trains, its workdir is ROOT/NAME.
    stage: one of STAGES, or 'data' for a point that prepares data.
    after: the name of the point whose weights this point starts from or evaluates; '' for none.
    needs: the names of the points that must be finished first. They are `after` and the point that prepares the data.
    config: the resolved config.
    steps: the number of steps; 0 for a stage that doesn't count steps.
    workdir: the folder that the point writes to.
    arguments: the arguments with which `betarank` runs the point.
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
    """Returns the step of the point's newest complete checkpoint; 0 if there is none."""
    return max(checkpoint.steps(epath.Path(self.workdir) / 'checkpoints'), default=0)

  def finished(self) -> bool | None:
    """Returns whether the point's result exists and is complete.

    Returns None for an evaluation, because its result can't be checked.
    """
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
  """Returns the points that the config file at `spec` adds. Each point comes after the points that it needs.

  root: the folder of the sweep.
  only: shell patterns that select points by name. Points that a selected point needs are included too. Without
    patterns, all points are returned.

  Raises:
    ConfigError: a name occurs twice, a needed point doesn't exist, a config can't be run, or no run can be saved in the
      folder.
  """
  if problem := not_for_runs(root):
    raise ConfigError(f'--root: {problem}')
  module, arg = load.module(spec)
  if not hasattr(module, 'sweep'):
    raise ConfigError(f'--config={spec}: has no sweep(add)')
  points: dict[str, Point] = {}
  takes_argument = len(inspect.signature(module.sweep).parameters) > 1  # sweep(add, arg), like get_config(arg)
  module.sweep(_adder(spec, root, points), *([arg or None] if takes_argument else []))
  if not points:
    raise ConfigError(f'--config={spec}: its sweep(add) names no point')
  return _select(_with_data(list(points.values()), root), only)


def _adder(spec: str, root: str, points: dict[str, Point]) -> Callable[..., str]:
  def add(name: str = '', *, stage: str = 'train', config: str = '', arg: str = '', after: str = '',
          benchmark: str = '', **overrides: Any) -> str:
    """Adds a point and returns its full name.

    Args:
      name: the name of the arm, which is the first part of the full name. The default is the arm of `after` or, without
        `after`, a name made from the overrides.
      stage: train (pre-training and mid-training), rl, probe or sample. A point of stage probe or sample runs `betarank
        eval`.
      config: the config file to use instead of the sweep's own.
      arg: appended to the argument of the config file, such as 'stage=mid'.
      after: the full name of the point whose weights the new point starts from or evaluates.
      benchmark: the value of `betarank eval sample --benchmark`; only for stage sample.
      overrides: settings to change, by dotted key, such as **{'optimizer.lr': 1e-3}.
    """
    if stage not in STAGES:
      raise ConfigError(f'sweep: stage must be one of {", ".join(STAGES)}, got {stage!r}')
    arm = name or (after.rpartition('/')[0] if after else _describe(overrides) or 'run')
    part = stage if name and not arg.startswith('stage=') else _stage_name(stage, arg, benchmark)
    full = f'{arm}/{part}'
    where = f'sweep point {full}'
    if not re.fullmatch(r'[\w.=,+-]+(/[\w.=,+-]+)*', full) or '..' in full:
      raise ConfigError(f'{where}: a name can have letters, digits and . = , + - _, with / between folders')
    if full in points:
      raise ConfigError(f'{where}: is named twice; give one of them another name=')
    if after and (after not in points or points[after].stage not in TRAINS):
      trained = [p.name for p in points.values() if p.stage in TRAINS]
      raise ConfigError(f'{where}: after={after!r} is not an earlier point that trains{suggestion(after, trained)}')
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
  """Returns a text such as 'beta=-0.25,seed=1' for overrides such as {'objective.beta': -0.25, 'seed': 1}.

  A key is shortened to its last part, unless two keys have the same last part.
  """
  leaves = [key.rpartition('.')[2] for key in overrides]
  short = [leaf if leaves.count(leaf) == 1 else key for leaf, key in zip(leaves, overrides)]
  return ','.join(f'{key}={_plain(str(value))}' for key, value in zip(short, overrides.values()))


def _stage_name(stage: str, arg: str, benchmark: str) -> str:
  """Returns the last part of a point's name, such as 'train', 'sample,gsm8k', or 'mid' if `arg` is 'stage=mid'."""
  if arg.startswith('stage='):
    return _plain(arg.removeprefix('stage='))
  return ','.join(filter(None, (stage, _plain(arg), _plain(benchmark))))


def _plain(text: str) -> str:
  """Returns `text` with '-' in place of characters that are unusual in file names."""
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
  """Returns overrides that replace local data folders with folders in the bucket, which slices can read.

  root: the folder of the sweep, in the bucket.
  parent: the point that this point starts from; None if there is none.

  Raises:
    ConfigError: the tokenizer is a file of this machine that no point of the sweep creates.
  """
  moved = {f'data.{key}': f'{root}/{value.lstrip("/")}' for key in ('dir', 'tokenizer')
           if (value := config.data.get(key)) and '://' not in value}
  trained = ''
  if parent and 'dir' in parent.config.data:
    trained = section(DataConfig, parent.config.data, 'data').tokenizer_path
  if moved.get('data.tokenizer', trained) != trained:  # it isn't a tokenizer that a point of the sweep trains
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
  """Returns new points that prepare the data of the given points, followed by the given points.

  Points that need the same prepared data share one new point. The points that prepare data run one after the other,
  because each uses all cores, and may need a tokenizer that an earlier one trains.
  """
  prepare: dict[str, Point] = {}
  done = []
  for point in points:
    if point.after and point.stage != 'train':  # RL reads only the tokenizer, which the point before it has prepared
      done.append(point)
      continue
    c = section(DataConfig, point.config.data, 'data')
    key = json.dumps([c.dir, c.tokenizer, c.vocab_size, c.validation_fraction, c.longest_document, c.held_out_fraction,
                      {name: [s.uri, s.max_documents] for name, s in c.sources.items()}], sort_keys=True)
    if key not in prepare:
      same_folder = sum(p.workdir == c.dir for p in prepare.values())
      folder = _plain(c.dir.removeprefix(f'{root}/')).strip('-.')
      name = f'data/{folder}' + (f'-{same_folder + 1}' if same_folder else '')
      before = list(prepare.values())[-1:]
      settings = ('--config=', '--config.data.', '--config.model.vocab_size=')
      arguments = ('data', 'prepare', *(a for a in point.arguments if a.startswith(settings)))
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
  """Raises ConfigError if a point's workdir has a run that can't be resumed with the point's config."""
  for point in points:
    if point.stage in TRAINS:
      inherits = bool(point.config.get('train', {}).get('init_from'))
      workdir.check_config(epath.Path(point.workdir), point.config, inherits=inherits)


def resolved(points: Iterable[Point]) -> dict[str, Any]:
  """Returns {name of a point: its resolved config as JSON values}."""
  return {point.name: json.loads(to_json(point.config)) for point in points}


def local_files(points: Sequence[Point]) -> list[str]:
  """Returns a message for each `jsonl:` URI on this machine that the points use in RL or as a benchmark.

  The message says that points on other machines can't read the files.
  """
  readers: dict[str, list[str]] = {}
  for point in points:
    uris = [point.config.rl.task.uri] if point.stage == 'rl' else [
      uri for argument in point.arguments if argument.startswith('--benchmark=')
      for uri in argument.partition('=')[2].split(',')]
    for uri in uris:
      if uri.startswith('jsonl:') and '://' not in uri:
        readers.setdefault(uri, []).append(point.name)
  return [f'{uri} is on this machine, where no other machine can read it; copy it to the bucket and name it there '
          f'({names[0]}{f" and {len(names) - 1} more" if len(names) > 1 else ""})' for uri, names in readers.items()]
