"""Defines the data that a report is made from.

A Run has everything that could be read in one workdir. A Sweep has all runs, and notes on what is missing or odd.
"""

import dataclasses
import math
import re
from typing import Any

import numpy as np
from etils import epath

from betarank.configs.errors import ConfigError
from betarank.configs.sections import section
from betarank.eval import sampling_metrics
from betarank.model import ModelConfig, flops_per_token

PLAIN = 'CE'  # the name of plain cross-entropy
NUMBER = re.compile(r'((?:(?<!\w)-)?\d+(?:\.\d+)?(?:e[-+]?\d+)?)')  # in the name of an arm; 'run-2' has no minus sign
# Two sets of samples can only be compared if they agree in these settings.
SAME_SETTINGS = ('benchmark', 'data_sha256', 'temperature', 'top_p', 'top_k', 'max_new_tokens', 'n', 'shots',
                 'answer_format', 'answer_chars')

Curve = tuple[np.ndarray, np.ndarray]  # steps, values


@dataclasses.dataclass
class SampleSet:
  """The samples of one checkpoint on one benchmark.

  Attributes:
    settings: the settings with which the samples were drawn.
    samples: the samples, as arrays.
    examples: a few stored lines with the texts of samples.
    metrics: the result of samples.metrics(), {metric: values per question}.
  """

  settings: dict[str, Any]
  samples: sampling_metrics.Samples
  examples: list[dict[str, Any]]

  def __post_init__(self):
    self.metrics = self.samples.metrics()


@dataclasses.dataclass(frozen=True)
class DataIdentity:
  """The data that a run has read so far, as recorded in its newest checkpoint.

  Attributes:
    tokenizer: SHA-256 of the tokenizer; '' if not recorded.
    sources: {source: SHA-256 of its prepared tokens}; empty for RL, or if not recorded.
    rows: the number of rows of data.sequence_length tokens read so far; NaN if not recorded.
    prompts: the number of prompts that RL has used or skipped; NaN for pre-training.
    problems: SHA-256 of RL's problems; '' if their number is unlimited, or if not recorded.
    kept: SHA-256 that says which problems evaluations leave to RL; '' if not recorded.
    reward: SHA-256 of the file of RL's reward function; '' if there is none, or if not recorded.
  """

  tokenizer: str = ''
  sources: dict[str, str] = dataclasses.field(default_factory=dict)
  rows: float = math.nan
  prompts: float = math.nan
  problems: str = ''
  kept: str = ''
  reward: str = ''


@dataclasses.dataclass(frozen=True)
class Start:
  """Describes how a run was started: the command, the devices and the time, as run.json has them.

  A text that run.json lacks is '', and a number that it lacks is NaN.
  """

  command: str = ''
  device_kind: str = ''
  devices: float = math.nan
  started_s: float = math.nan  # seconds since 1970


@dataclasses.dataclass
class Run:
  """A run, with everything that could be read in its workdir.

  Attributes:
    path: the workdir.
    name: the path of the workdir relative to the sweep's root.
    config: the settings of the run; empty if they couldn't be read.
    objective: the pre-training objective, such as 'β = -0.25'; for RL, the objective of the run it started from; '' if
      unknown.
    arm: the name of the arm that the run belongs to (see arms.py); '' if unknown.
    stage: 'pre-training', 'pre-training → RL', ...; '' if unknown.
    parent: the run that this run started from; None if there is none, or if it wasn't found.
    parent_path: the checkpoint that the run started from; '' for random weights.
    code_version: the version of betarank that wrote the newest checkpoint; '' if unknown.
    checkpoint: the path of the newest checkpoint; '' if there is none.
    identity: the tokenizer and the data of the run.
    start: the command that started the run, and its devices.
    curves: {metric: (steps [X], values [X])}, for metrics named train/..., eval/... and time/....
    probes: {step: result of `betarank eval probe`}.
    samples: {benchmark: {step: samples}}.
    harness: {step: {task: {'score', 'standard_error', 'metric', 'settings'}}}.
    texts: the last lines of samples.jsonl.
  """

  path: epath.Path
  name: str
  config: dict[str, Any]
  objective: str = ''
  arm: str = ''
  stage: str = ''
  parent: 'Run | None' = None
  parent_path: str = ''
  code_version: str = ''
  checkpoint: str = ''
  identity: DataIdentity = dataclasses.field(default_factory=DataIdentity)
  start: Start = dataclasses.field(default_factory=Start)
  curves: dict[str, Curve] = dataclasses.field(default_factory=dict)
  probes: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
  samples: dict[str, dict[int, SampleSet]] = dataclasses.field(default_factory=dict)
  harness: dict[int, dict[str, dict[str, Any]]] = dataclasses.field(default_factory=dict)
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
  def parent_step(self) -> int | None:
    """The step of the checkpoint that the run started from; None if parent_path doesn't end in a step."""
    name = self.parent_path.rstrip('/').rpartition('/')[2]
    return int(name) if name.isdecimal() else None

  @property
  def tokens_per_step(self) -> float:
    return number(setting(self.config, 'train.batch_size')) * number(setting(self.config, 'data.sequence_length'))

  @property
  def steps(self) -> float:
    """The number of steps that the config asks for; NaN if the config lacks the settings for it."""
    if self.is_rl:
      return number(setting(self.config, 'rl.steps'))
    steps = number(setting(self.config, 'train.tokens')) / self.tokens_per_step if self.tokens_per_step else math.nan
    return float(math.ceil(steps)) if math.isfinite(steps) else math.nan

  @property
  def tokens(self) -> float:
    """The number of tokens that the run has been trained on so far; for RL, the number of tokens drawn."""
    if not self.is_rl:
      return self.last_step * self.tokens_per_step
    return float(np.nansum(self.curves['train/tokens'][1])) if 'train/tokens' in self.curves else math.nan

  @property
  def flops(self) -> float:
    """The number of FLOPs of training so far: tokens times model.flops_per_token, the same count that the MFU is based
    on.

    NaN for RL, because RL spends most of its FLOPs on sampling, and these aren't counted. Also NaN if the config lacks
    settings that the count needs.
    """
    if self.is_rl:
      return math.nan
    try:
      length = setting(self.config, 'data.sequence_length')
      return flops_per_token(section(ModelConfig, self.config['model'], 'model'), length) * self.tokens
    except (ConfigError, KeyError, TypeError, ValueError, ZeroDivisionError):
      return math.nan

  @property
  def seconds(self) -> float:
    """The wall-clock time of all steps in seconds, without evaluation and saving; NaN if not recorded."""
    return float(np.nansum(self.curves['time/step_s'][1])) if 'time/step_s' in self.curves else math.nan

  @property
  def wall_s(self) -> float:
    """The wall-clock time of the run in seconds, with compilation, evaluation and saving; NaN if not recorded."""
    return float(self.curves['time/elapsed_s'][1][-1]) if 'time/elapsed_s' in self.curves else math.nan

  @property
  def tokens_per_s(self) -> float:
    """The median over steps of the tokens per second; NaN if not recorded.

    The median is used because compilation and a busy machine make some steps much slower than the others.
    """
    values = self.curves.get('time/tokens_per_s', ((), np.array([])))[1]
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan

  @property
  def state(self) -> str:
    if not self.last_step:
      return 'no step yet'
    if math.isnan(self.steps):
      return f'step {self.last_step:,}'
    if self.last_step >= self.steps:
      return 'finished'
    return f'unfinished: step {self.last_step:,} of {self.steps:,.0f}'

  def probe(self) -> tuple[int, dict[str, Any]] | None:
    """Returns (step, result) of the newest `betarank eval probe` of this run; None if there is none."""
    return (max(self.probes), self.probes[max(self.probes)]) if self.probes else None

  def sampled(self, benchmark: str, step: int | None = None) -> tuple[int, SampleSet] | None:
    """Returns (step, samples) on a benchmark; None if there are no such samples.

    step: the step of the checkpoint that was sampled; None means the newest one that has samples.
    """
    there = self.samples.get(benchmark, {})
    step = max(there, default=None) if step is None else step
    return (step, there[step]) if step in there else None


@dataclasses.dataclass
class Sweep:
  """All runs under a folder.

  Attributes:
    root: the folder.
    runs: the runs.
    baselines: {arm: the arm with which it is compared}.
    notes: lines about what is missing or odd.
  """

  root: epath.Path
  runs: list[Run] = dataclasses.field(default_factory=list)
  baselines: dict[str, str] = dataclasses.field(default_factory=dict)
  notes: list[str] = dataclasses.field(default_factory=list)

  def note(self, where: Any, what: str) -> None:
    self.notes.append(f'{where}: {what}')

  @property
  def arms(self) -> list[str]:
    """The names of all arms, sorted. Arms of plain cross-entropy come first, because they are the baselines.

    Numbers in the names are sorted by their value, so β = -0.5 comes before β = -0.25.
    """
    def by_value(arm: str) -> list[str | float]:
      return [float(part) if i % 2 else part for i, part in enumerate(re.split(NUMBER, arm))]

    found = {run.arm for run in self.runs if run.arm}
    return sorted(found, key=lambda arm: (not self._is_plain(arm), by_value(arm), arm))

  def _is_plain(self, arm: str) -> bool:
    return any(run.objective == PLAIN for run in self.runs if run.arm == arm)

  @property
  def stages(self) -> list[str]:
    return sorted({run.stage for run in self.runs if run.arm}, key=lambda stage: (stage.count('→'), stage))

  def of(self, stage: str, arm: str | None = None) -> list[Run]:
    """Returns the runs of a stage and an arm, sorted by seed. If `arm` is None, returns the runs of all arms in this
    stage.
    """
    found = [run for run in self.runs if run.stage == stage and run.arm and arm in (None, run.arm)]
    return sorted(found, key=lambda run: (run.seed is None, run.seed or 0, run.name))


def number(value: Any) -> float:
  """Returns `value` as a float, or NaN if it isn't a number."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return math.nan
  try:
    return float(value)
  except OverflowError:
    return math.nan


def setting(config: Any, key: str) -> Any:
  """Returns the value of the setting with the dotted key `key`, or None if there is no such setting."""
  for part in key.split('.'):
    config = config.get(part) if isinstance(config, dict) else None
  return config
