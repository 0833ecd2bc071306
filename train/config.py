"""Defines the settings of a pre-training run as frozen dataclasses, one per section. Each dataclass checks its own
values.
"""

import dataclasses
import re

from ml_collections import ConfigDict

from betarank.configs.sections import section
from betarank.configs.settings import default
from betarank.configs.steps import budget_steps
from betarank.data import DataConfig
from betarank.model import MeshConfig, ModelConfig
from betarank.objectives import ObjectiveConfig
from betarank.runtime.checkpoint import CheckpointConfig
from betarank.train.optimizer import OptimizerConfig

INIT_WHAT = ('weights', 'all')
SEEDS = 2**31
MOST_STEPS = 10**8  # the learning rates of all steps are computed at the start


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Section `train`: the token budget, the rows per batch, the mesh, and the checkpoint to start from.

  configs/settings.py describes each field.
  """

  tokens: int
  batch_size: int
  microbatches: int
  mesh: MeshConfig
  init_from: str
  init_what: str

  def __post_init__(self):
    at_least_one(self, 'tokens', 'batch_size', 'microbatches')
    if self.batch_size % self.microbatches:
      raise ValueError(f'microbatches must divide batch_size = {self.batch_size}, got {self.microbatches}')
    if self.init_what not in INIT_WHAT:
      raise ValueError(f'init_what must be one of {", ".join(INIT_WHAT)}, got {self.init_what!r}')


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """Section `log`: which logs are written, and how often. configs/settings.py describes each field."""

  every_steps: int
  eval_every_steps: int
  eval_batches: int
  samples: int
  sample_tokens: int
  tensorboard: bool
  head_tail_mass: bool
  profile_steps: str = default('log.profile_steps')
  wandb: str = default('log.wandb')

  def __post_init__(self):
    at_least_one(self, 'every_steps', 'eval_every_steps', 'eval_batches', 'sample_tokens')
    if self.samples < 0:
      raise ValueError(f'samples must be >= 0, got {self.samples}')
    first_and_last(self.profile_steps)


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """All settings of `betarank train`, except the workdir."""

  seed: int
  model: ModelConfig
  objective: ObjectiveConfig
  data: DataConfig
  train: TrainConfig
  optimizer: OptimizerConfig
  checkpoint: CheckpointConfig
  log: LogConfig

  def __post_init__(self):
    check_seed(self.seed)
    if self.model.vocab_size != self.data.vocab_size:
      raise ValueError(f'model.vocab_size must equal data.vocab_size = {self.data.vocab_size}, '
                       f'got {self.model.vocab_size}')
    if self.objective.top_k > self.model.vocab_size:
      raise ValueError(f'objective.top_k must be <= model.vocab_size = {self.model.vocab_size}, got '
                       f'{self.objective.top_k}')
    if self.tokens_per_step >= 2**31:
      raise ValueError(f'train.batch_size must make fewer than 2**31 tokens per step, with rows of '
                       f'{self.sequence_length:,} tokens, got {self.rows}')
    if self.steps > MOST_STEPS:
      raise ValueError(f'train.tokens must make at most {MOST_STEPS:,} steps of {self.tokens_per_step:,} tokens, got '
                       f'{self.train.tokens}')
    check_warmup(self.optimizer, self.steps, f'the steps that train.tokens = {self.train.tokens} make')
    check_profile(self.log.profile_steps, self.steps)

  @property
  def mesh(self) -> MeshConfig:
    return self.train.mesh

  @property
  def split_rows(self) -> dict[str, tuple[int, int]]:
    """The batches that are split over the mesh: {config key of the batch size: (rows, microbatches)}.

    The number of rows of each microbatch must be a multiple of the number of devices over which it is split.
    """
    return {'train.batch_size': (self.rows, self.microbatches)}

  @property
  def rows(self) -> int:
    """The number of rows per update, over all devices."""
    return self.train.batch_size

  @property
  def microbatches(self) -> int:
    """The number of microbatches into which the rows of one update are divided."""
    return self.train.microbatches

  @property
  def sequence_length(self) -> int:
    """The number of tokens per row of an update."""
    return self.data.sequence_length

  @property
  def updates(self) -> int:
    """The number of optimizer updates in the whole run. In pre-training, each step is one update."""
    return self.steps

  @property
  def tokens_per_step(self) -> int:
    return self.rows * self.sequence_length

  @property
  def steps(self) -> int:
    """The number of optimizer steps: the token budget divided by the tokens per step, rounded up."""
    return budget_steps(self.train.tokens, self.tokens_per_step)


def run_config(config: ConfigDict) -> RunConfig:
  """Checks the settings of a pre-training run, and returns them.

  Raises:
    ConfigError: a setting is missing, unknown or invalid. The message names its key.
  """
  return section(RunConfig, config)


# Checks that RL's sections use too. Each raises a ValueError whose message starts with the key.


def at_least_one(values, *names: str) -> None:
  for name in names:
    if getattr(values, name) < 1:
      raise ValueError(f'{name} must be >= 1, got {getattr(values, name)}')


def check_seed(seed: int) -> None:
  if not 0 <= seed < SEEDS:
    raise ValueError(f'seed must be from 0 to 2**31 - 1, got {seed}')


def check_warmup(optimizer: OptimizerConfig, steps: int, which: str) -> None:
  if optimizer.warmup_steps >= steps:
    raise ValueError(f'optimizer.warmup_steps must be < {steps}, {which}, got {optimizer.warmup_steps}')


def check_profile(profile_steps: str, steps: int) -> None:
  if (found := first_and_last(profile_steps)) and found[0] > steps:
    raise ValueError(f'log.profile_steps must begin at or before the last step, {steps}, got {profile_steps}')


def first_and_last(profile_steps: str) -> tuple[int, int] | None:
  """Returns (first, last), the steps to profile, from the setting `log.profile_steps`; None if the setting is empty.

  Raises:
    ValueError: the setting isn't of the form FIRST-LAST.
  """
  if not profile_steps:
    return None
  found = re.fullmatch(r'(\d+)-(\d+)', profile_steps)
  if not found or not 1 <= int(found[1]) <= int(found[2]):
    raise ValueError(f'profile_steps must be FIRST-LAST, as in 10-12, or empty, got {profile_steps!r}')
  return int(found[1]), int(found[2])
