"""A whole RL run as one frozen dataclass: the sections it shares with pre-training, and `rl`."""

import dataclasses

from ml_collections import ConfigDict

from betarank.configs.sections import section
from betarank.data import DataConfig
from betarank.model import ModelConfig
from betarank.rl.advantages import AdvantageConfig
from betarank.rl.policy_losses import PolicyLossConfig
from betarank.runtime.checkpoint import CheckpointConfig
from betarank.tasks.code_jail import JailConfig
from betarank.tasks.task_set import TaskConfig
from betarank.tasks.verifiers import VerifierConfig
from betarank.train.config import LogConfig, TrainConfig
from betarank.train.optimizer import OptimizerConfig

TRUNCATED_REWARD = ('zero', 'masked')


@dataclasses.dataclass(frozen=True)
class RlConfig:
  """Section `rl`: what is asked, how answers are drawn and judged, and what is learned from them."""

  steps: int
  prompts_per_step: int
  group_size: int
  max_resampling_rounds: int
  max_prompt_tokens: int
  max_new_tokens: tuple[int, ...]
  phase_steps: tuple[int, ...]
  decode_batch_size: int
  truncated_reward: str
  minibatches: int
  microbatches: int
  eval_prompts: int
  eval_samples: int
  task: TaskConfig
  verifier: VerifierConfig
  code: JailConfig
  advantage: AdvantageConfig
  loss: PolicyLossConfig

  def __post_init__(self):
    for name in ('steps', 'prompts_per_step', 'max_resampling_rounds', 'max_prompt_tokens', 'decode_batch_size',
                 'minibatches', 'microbatches', 'eval_prompts', 'eval_samples'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be >= 1, got {getattr(self, name)}')
    if self.group_size < 2:
      raise ValueError(f'group_size must be >= 2 (an advantage compares a group), got {self.group_size}')
    if len(self.max_new_tokens) != len(self.phase_steps) + 1 or min(self.max_new_tokens) < 1:
      raise ValueError(f'max_new_tokens must have one length per phase, one more than phase_steps = '
                       f'{self.phase_steps}, got {self.max_new_tokens}')
    if list(self.phase_steps) != sorted(set(self.phase_steps)):
      raise ValueError(f'phase_steps must rise, got {self.phase_steps}')
    if self.prompts_per_step % self.minibatches:
      raise ValueError(f'minibatches must divide prompts_per_step = {self.prompts_per_step}, got {self.minibatches}')
    if (self.prompts_per_step // self.minibatches * self.group_size) % self.microbatches:
      rows = self.prompts_per_step // self.minibatches * self.group_size
      raise ValueError(f'microbatches must divide the {rows} rows of a '
                       f'minibatch, got {self.microbatches}')
    if self.loss.cov == 'kl_cov' and self.minibatches == 1:
      raise ValueError("minibatches must be > 1 with loss.cov = 'kl_cov', whose penalty is 0 in the first update after "
                       'sampling, got 1')
    if self.truncated_reward not in TRUNCATED_REWARD:
      raise ValueError(f'truncated_reward must be one of {", ".join(TRUNCATED_REWARD)}, got {self.truncated_reward!r}')

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
