"""What a report is made from: runs, as they stand, and a list of what is missing or odd.

Nothing here raises for what a file holds. A run may be unfinished, its log cut short, its config unreadable: what can
be read is used, and the rest becomes a line in `Sweep.notes`.
"""

import dataclasses
import json
import math
import os
from typing import Any

import numpy as np
from etils import epath

from betarank.configs.errors import ConfigError
from betarank.configs.sections import section
from betarank.eval import sampling_metrics
from betarank.model import ModelConfig, flops_per_token
from betarank.runtime import checkpoint

PLAIN = 'CE'  # the arm of plain cross-entropy
EXAMPLES = 6  # sample texts kept of each file
MOST_BYTES = 2**30  # of a file, which is read as a whole


@dataclasses.dataclass
class SampleSet:
  """One file of samples: its settings, the counted samples, and a few texts."""

  settings: dict[str, Any]
  samples: sampling_metrics.Samples
  examples: list[dict[str, Any]]

  def __post_init__(self):
    self.metrics = self.samples.metrics()


@dataclasses.dataclass
class Run:
  """A workdir, as far as it can be read."""

  path: epath.Path
  name: str  # relative to the sweep's root
  config: dict[str, Any]
  arm: str = ''
  stage: str = ''
  parent: 'Run | None' = None
  parent_path: str = ''
  code_version: str = ''
  checkpoint: str = ''
  curves: dict[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)  # name -> steps, values
  probes: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
  samples: dict[str, dict[int, SampleSet]] = dataclasses.field(default_factory=dict)  # benchmark -> step -> samples
  texts: list[dict[str, Any]] = dataclasses.field(default_factory=list)

  @property
  def is_rl(self) -> bool:
    return isinstance(self.config.get('rl'), dict)

  @property
  def seed(self) -> int | None:
    seed = self.config.get('seed')
    return seed if isinstance(seed, int) else None

  @property
  def last_step(self) -> int:
    return max((int(steps[-1]) for name, (steps, _) in self.curves.items() if name.startswith('train/')), default=0)

  @property
  def tokens_per_step(self) -> float:
    return number(setting(self.config, 'train.batch_size')) * number(setting(self.config, 'data.sequence_length'))

  @property
  def steps(self) -> float:
    """How many there are to be; NaN if the config doesn't say."""
    if self.is_rl:
      return number(setting(self.config, 'rl.steps'))
    steps = number(setting(self.config, 'train.tokens')) / self.tokens_per_step if self.tokens_per_step else math.nan
    return float(math.ceil(steps)) if math.isfinite(steps) else math.nan

  @property
  def tokens(self) -> float:
    """Tokens learned from so far."""
    if not self.is_rl:
      return self.last_step * self.tokens_per_step
    return float(np.nansum(self.curves['train/tokens'][1])) if 'train/tokens' in self.curves else math.nan

  @property
  def flops(self) -> float:
    """Of training so far, by the same count as a run's MFU; NaN for RL, which mostly samples."""
    if self.is_rl:
      return math.nan
    try:
      length = setting(self.config, 'data.sequence_length')
      return flops_per_token(section(ModelConfig, self.config['model'], 'model'), length) * self.tokens
    except (ConfigError, KeyError, TypeError, ValueError, ZeroDivisionError):
      return math.nan

  @property
  def state(self) -> str:
    if not self.last_step:
      return 'no step yet'
    if math.isnan(self.steps):
      return f'step {self.last_step:,}'
    if self.last_step >= self.steps:
      return 'finished'
    return f'unfinished: step {self.last_step:,} of {self.steps:,.0f}'

  def probe(self, step: int | None = None) -> dict[str, Any] | None:
    """The probe of `step`, or the newest."""
    return self.probes.get(max(self.probes) if step is None else step) if self.probes else None

  def sampled(self, benchmark: str) -> tuple[int, SampleSet] | None:
    """(step, samples) of the newest step that has any."""
    there = self.samples.get(benchmark)
    return (max(there), there[max(there)]) if there else None


@dataclasses.dataclass
class Sweep:
  """All runs under a folder. `notes` says what is missing or odd, a line each."""

  root: epath.Path
  runs: list[Run] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)

  def note(self, where: Any, what: str) -> None:
    self.notes.append(f'{where}: {what}')

  @property
  def arms(self) -> list[str]:
    """Plain cross-entropy first: the others are compared with the first."""
    return sorted({run.arm for run in self.runs if run.arm}, key=lambda arm: (arm != PLAIN, not _is_plain(arm), arm))

  @property
  def stages(self) -> list[str]:
    return sorted({run.stage for run in self.runs if run.arm}, key=lambda stage: (stage.count('→'), stage))

  def of(self, stage: str, arm: str | None = None) -> list[Run]:
    """The runs of a stage with a known arm, in order of their seeds."""
    found = [run for run in self.runs if run.stage == stage and run.arm and arm in (None, run.arm)]
    return sorted(found, key=lambda run: (run.seed is None, run.seed or 0, run.name))


def _is_plain(arm: str) -> bool:
  return arm == PLAIN or arm.startswith(f'{PLAIN},')


def number(value: Any) -> float:
  """`value` as a float; NaN for what is none."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return math.nan
  try:
    return float(value)
  except OverflowError:
    return math.nan


def setting(config: Any, key: str) -> Any:
  """The value at a dotted key, None where there is none."""
  for part in key.split('.'):
    config = config.get(part) if isinstance(config, dict) else None
  return config


def read_run(path: epath.Path, name: str, sweep: Sweep) -> Run:
  """All that can be read of the workdir `path`; the rest is noted in `sweep`."""
  config = _read_object(path / 'config.json', sweep)
  run = Run(path, name, config or {})
  if config is None and not (path / 'config.json').exists():
    sweep.note(name, 'no config.json; its figures can\'t be given to an arm')
  _read_metrics(run, sweep)
  _read_lineage(run, sweep)
  _read_probes(run, sweep)
  _read_samples(run, sweep)
  return run


def _text(path: epath.Path, sweep: Sweep) -> str | None:
  try:
    if not path.exists():
      return None
    if '://' not in str(path) and not os.path.isfile(path):  # a pipe or a device, which is_file() takes, has no end
      raise OSError('it is no file')
    if path.stat().length > MOST_BYTES:
      raise OSError(f'it is larger than {MOST_BYTES} bytes')
    return path.read_bytes().decode('utf-8', errors='replace')
  except OSError as error:
    sweep.note(_short(path, sweep), f'could not be read ({error.strerror or error})')
    return None


def _short(path: epath.Path, sweep: Sweep) -> str:
  try:
    return str(path.relative_to(sweep.root))
  except ValueError:
    return str(path)


def _json(text: str) -> Any:
  """Parsed, or ValueError: also for what is nested too deep to be anything of ours."""
  try:
    return json.loads(text)
  except RecursionError:
    raise ValueError('nested too deep') from None


def _read_object(path: epath.Path, sweep: Sweep) -> dict[str, Any] | None:
  text = _text(path, sweep)
  if text is None:
    return None
  try:
    value = _json(text)
  except ValueError as error:
    sweep.note(_short(path, sweep), f'not JSON ({error})')
    return None
  if not isinstance(value, dict):
    sweep.note(_short(path, sweep), 'no JSON object')
    return None
  return value


def _read_lines(path: epath.Path, sweep: Sweep) -> list[dict[str, Any]]:
  """The objects of a file, one a line. What isn't one is counted in a note."""
  text = _text(path, sweep)
  lines, bad = [], []
  texts = (text or '').split('\n')
  for i, line in enumerate(texts):
    if not line.strip():
      continue
    try:
      value = _json(line)
      if not isinstance(value, dict):
        raise ValueError
      lines.append(value)
    except ValueError:
      bad.append(i + 1)
  if bad == [len(texts)]:
    sweep.note(_short(path, sweep), 'the last line is half written (the run was ended, or is writing it now); left out')
  elif bad:
    shown = ', '.join(map(str, bad[:5])) + (', ...' if len(bad) > 5 else '')
    sweep.note(_short(path, sweep), f'{len(bad)} malformed lines left out (line {shown})')
  return lines


def _read_metrics(run: Run, sweep: Sweep) -> None:
  path = run.path / 'metrics.jsonl'
  if not path.exists():
    sweep.note(run.name, 'no metrics.jsonl yet')
    return
  columns: dict[str, dict[int, float]] = {}
  without_step, wrong, not_finite = 0, set(), {}
  for line in _read_lines(path, sweep):
    step = line.get('step')
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**53:
      without_step += 1
      continue
    for name, value in line.items():
      if not name.startswith(('train/', 'eval/')):
        continue
      x = value if type(value) is float else number(value)
      if not math.isfinite(x):
        if isinstance(value, float):
          not_finite.setdefault(name, []).append(step)
        else:
          wrong.add(name)
        x = math.nan
      columns.setdefault(name, {})[step] = x
  for name, column in columns.items():
    steps = sorted(column)
    run.curves[name] = np.array(steps), np.array([column[step] for step in steps])
  if without_step:
    sweep.note(run.name, f'{without_step} lines of metrics.jsonl have no step; left out')
  for name in sorted(wrong):
    sweep.note(run.name, f'metrics.jsonl has values of {name} that are no numbers; left out')
  for name, steps in sorted(not_finite.items()):
    if not name.endswith('standard_error'):  # of one problem: there is none
      sweep.note(run.name, f'{name} is NaN or infinite at {len(steps)} steps, first at step {min(steps)}; left out')
  run.texts = _read_lines(run.path / 'samples.jsonl', sweep)[-EXAMPLES:]


def _read_lineage(run: Run, sweep: Sweep) -> None:
  """Parent and code version, from the newest checkpoint; before there is one, from the config."""
  run.parent_path = setting(run.config, 'train.init_from') or ''
  if not isinstance(run.parent_path, str):
    run.parent_path = ''
  if not (run.path / 'checkpoints').exists():
    return
  try:
    found = checkpoint.find(str(run.path))
    meta = checkpoint.read_meta(found)
  except (checkpoint.CheckpointError, OSError) as error:
    sweep.note(run.name, str(error).replace(f'{run.path}/', ''))
    return
  run.checkpoint = _short(found, sweep)
  run.parent_path = str(meta.get('parent') or run.parent_path)
  run.code_version = str(meta.get('code_version') or '')


def _steps_in(folder: epath.Path, sweep: Sweep) -> list[int]:
  if not folder.exists():
    return []
  return sorted(int(p.stem) for p in folder.iterdir() if p.suffix == '.json' and p.stem.isdecimal())


def _read_probes(run: Run, sweep: Sweep) -> None:
  folder = run.path / 'eval' / 'probe'
  for step in _steps_in(folder, sweep):
    probe = _read_object(folder / f'{step}.json', sweep)
    if probe is None:
      continue
    domains = probe.get('domains')
    if not isinstance(domains, dict) or not all(isinstance(domain, dict) for domain in domains.values()) or not domains:
      sweep.note(_short(folder / f'{step}.json', sweep), 'a probe without domains; left out')
      continue
    run.probes[step] = probe


def _read_samples(run: Run, sweep: Sweep) -> None:
  folder = run.path / 'eval' / 'samples'
  for benchmark in sorted(p for p in folder.iterdir() if p.is_dir()) if folder.exists() else ():
    for step in _steps_in(benchmark, sweep):
      where = _short(benchmark / f'{step}.jsonl', sweep)
      settings = _read_object(benchmark / f'{step}.json', sweep) or {}
      good, wrong, examples, shown = [], [], [], set()
      for line in _read_lines(benchmark / f'{step}.jsonl', sweep):
        try:
          sampling_metrics.parse(line)
        except ValueError as error:
          wrong.append(str(error))
          continue
        if len(examples) < EXAMPLES and (kind := line['verdict']) not in shown:
          shown.add(kind)
          examples.append(line)
        good.append({name: line[name] for name in sampling_metrics.FIELDS})
      if wrong:
        sweep.note(where, f'{len(wrong)} samples left out: {wrong[0]}')
      if not good:
        sweep.note(where, 'no samples yet')
        continue
      found = SampleSet(settings, sampling_metrics.collect(good), examples)
      named = settings.get('benchmark')
      run.samples.setdefault(named if isinstance(named, str) else benchmark.name, {})[step] = found
      _note_samples(where, found, sweep)


def _note_samples(where: str, found: SampleSet, sweep: Sweep) -> None:
  there_P = (~np.isnan(found.samples.tokens_PN)).sum(1)
  problems, n = number(found.settings.get('problems')), number(found.settings.get('n'))
  if problems > len(there_P):
    sweep.note(where, f'{len(there_P)} of {problems:.0f} problems so far')
  if n > there_P.min():
    sweep.note(where, f'{int((there_P < n).sum())} problems have fewer than n = {n:.0f} samples so far')
  if found.samples.undecided:
    sweep.note(where, f'{found.samples.undecided} samples undecided by the verifier; counted neither right nor wrong')
