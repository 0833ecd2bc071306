"""A whole run as one frozen dataclass: every section of a config, checked."""

import dataclasses
import math

from ml_collections import ConfigDict

from betarank.configs.sections import section
from betarank.data import DataConfig
from betarank.model import MeshConfig, ModelConfig
from betarank.objectives import ObjectiveConfig
from betarank.runtime.checkpoint import CheckpointConfig
from betarank.train.optimizer import OptimizerConfig

INIT_WHAT = ('weights', 'all')


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Section `train`: how much, how many at once, on which mesh, from where."""

  tokens: int
  batch_size: int
  microbatches: int
  mesh: MeshConfig
  init_from: str
  init_what: str

  def __post_init__(self):
    for name in ('tokens', 'batch_size', 'microbatches'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be >= 1, got {getattr(self, name)}')
    if self.batch_size % self.microbatches:
      raise ValueError(f'microbatches must divide batch_size = {self.batch_size}, got {self.microbatches}')
    if self.init_what not in INIT_WHAT:
      raise ValueError(f'init_what must be one of {", ".join(INIT_WHAT)}, got {self.init_what!r}')


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """Section `log`: what is written, and how often."""

  every_steps: int
  eval_every_steps: int
  eval_batches: int
  samples: int
  sample_tokens: int
  tensorboard: bool
  head_tail_mass: bool = True

  def __post_init__(self):
    for name in ('every_steps', 'eval_every_steps', 'eval_batches', 'sample_tokens'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be >= 1, got {getattr(self, name)}')
    if self.samples < 0:
      raise ValueError(f'samples must be >= 0, got {self.samples}')


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Everything `betarank train` is told, apart from the workdir."""

  seed: int
  model: ModelConfig
  objective: ObjectiveConfig
  data: DataConfig
  train: TrainConfig
  optimizer: OptimizerConfig
  checkpoint: CheckpointConfig
  log: LogConfig

  def __post_init__(self):
    if not 0 <= self.seed < 2**31:
      raise ValueError(f'seed must be from 0 to 2**31 - 1, got {self.seed}')
    if self.model.vocab_size != self.data.vocab_size:
      raise ValueError(f'model.vocab_size must equal data.vocab_size = {self.data.vocab_size}, '
                       f'got {self.model.vocab_size}')
    if self.objective.top_k > self.model.vocab_size:
      raise ValueError(f'objective.top_k must be <= model.vocab_size = {self.model.vocab_size}, '
                       f'got {self.objective.top_k}')
    if self.optimizer.warmup_steps >= self.steps:
      raise ValueError(f'optimizer.warmup_steps must be < {self.steps}, the steps that train.tokens = '
                       f'{self.train.tokens} make, got {self.optimizer.warmup_steps}')

  @property
  def tokens_per_step(self) -> int:
    return self.train.batch_size * self.data.sequence_length

  @property
  def steps(self) -> int:
    """Optimizer steps that spend the token budget."""
    return math.ceil(self.train.tokens / self.tokens_per_step)


def run_config(config: ConfigDict) -> RunConfig:
  """The checked run. Raises ConfigError, one line that names the key."""
  return section(RunConfig, config)
