"""A whole RL run as one frozen dataclass: the sections it shares with pre-training, and `rl`."""

import dataclasses

from ml_collections import ConfigDict

from betarank.configs.sections import section
from betarank.data import DataConfig
from betarank.model import ModelConfig
from betarank.rl.advantages import AdvantageConfig
from betarank.rl.policy_losses import PolicyLossConfig
from betarank.runtime.checkpoint import CheckpointConfig
from betarank.tasks.task_set import TaskConfig
from betarank.tasks.verifiers import VerifierConfig
from betarank.train.config import LogConfig, TrainConfig
from betarank.train.optimizer import OptimizerConfig

TRUNCATED = ('wrong', 'left_out')


@dataclasses.dataclass(frozen=True)
class RlConfig:
  """Section `rl`: what is asked, how answers are drawn and judged, and what is learned from them."""

  steps: int
  prompts: int
  samples: int
  rounds: int
  max_prompt_tokens: int
  max_new_tokens: tuple[int, ...]
  phase_steps: tuple[int, ...]
  rows: int
  truncated: str
  minibatches: int
  microbatches: int
  eval_prompts: int
  eval_samples: int
  task: TaskConfig
  verifier: VerifierConfig
  advantage: AdvantageConfig
  loss: PolicyLossConfig

  def __post_init__(self):
    for name in ('steps', 'prompts', 'rounds', 'max_prompt_tokens', 'rows', 'minibatches', 'microbatches',
                 'eval_prompts', 'eval_samples'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be >= 1, got {getattr(self, name)}')
    if self.samples < 2:
      raise ValueError(f'samples must be >= 2 (an advantage compares a group), got {self.samples}')
    if len(self.max_new_tokens) != len(self.phase_steps) + 1 or min(self.max_new_tokens) < 1:
      raise ValueError(f'max_new_tokens must have a length a phase, one more than phase_steps = {self.phase_steps}, '
                       f'got {self.max_new_tokens}')
    if list(self.phase_steps) != sorted(set(self.phase_steps)):
      raise ValueError(f'phase_steps must rise, got {self.phase_steps}')
    if self.prompts % self.minibatches:
      raise ValueError(f'minibatches must divide prompts = {self.prompts}, got {self.minibatches}')
    if (self.prompts // self.minibatches * self.samples) % self.microbatches:
      raise ValueError(f'microbatches must divide the {self.prompts // self.minibatches * self.samples} rows of a '
                       f'minibatch, got {self.microbatches}')
    if self.loss.cov == 'kl_cov' and self.minibatches == 1:
      raise ValueError("minibatches must be > 1 with loss.cov = 'kl_cov', whose penalty is 0 in the first update after "
                       'sampling, got 1')
    if self.truncated not in TRUNCATED:
      raise ValueError(f'truncated must be one of {", ".join(TRUNCATED)}, got {self.truncated!r}')

  def phase(self, step: int) -> int:
    """Which phase the update number `step` (from 1) belongs to."""
    return sum(step > end for end in self.phase_steps)


@dataclasses.dataclass(frozen=True)
class RlRun:
  """Everything `betarank rl` is told, apart from the workdir."""

  seed: int
  model: ModelConfig
  data: DataConfig
  train: TrainConfig
  optimizer: OptimizerConfig
  checkpoint: CheckpointConfig
  log: LogConfig
  rl: RlConfig

  def __post_init__(self):
    if not self.train.init_from:
      raise ValueError('train.init_from must name the pre-trained run or checkpoint to start from, got none')


def rl_run(config: ConfigDict) -> RlRun:
  """The checked run. Raises ConfigError, one line that names the key."""
  return section(RlRun, {key: value for key, value in config.items() if key != 'objective'})  # pre-training's
