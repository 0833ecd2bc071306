"""Defines the settings of an RL run as frozen dataclasses, one per section.

The sections `model`, `optimizer` and `checkpoint` are the same as in pre-training. configs/settings.py describes each
field of a section.
"""

import dataclasses
import math
import re

from ml_collections import ConfigDict

from betarank.configs.sections import section
from betarank.configs.settings import default
from betarank.model import MeshConfig, ModelConfig
from betarank.rl.advantages import AdvantageConfig
from betarank.rl.policy_losses import PolicyLossConfig
from betarank.rl.rewards import RewardRule
from betarank.runtime.checkpoint import CheckpointConfig
from betarank.tasks.code_jail import JailConfig
from betarank.tasks.task_set import TaskConfig
from betarank.tasks.verifiers import VerifierConfig
from betarank.train.config import at_least_one, check_profile, check_seed, check_warmup, first_and_last
from betarank.train.optimizer import OptimizerConfig

TRUNCATED_REWARD = ('zero', 'masked')
LONG_PROMPTS = ('refuse', 'skip')
ZERO_VARIANCE_GROUPS = ('auto', 'replace', 'keep')


@dataclasses.dataclass(frozen=True)
class RlConfig:
  """Section `rl`: the problems, how answers are sampled and judged, and how the policy is updated.

  configs/settings.py describes each field.
  """

  steps: int
  prompts_per_step: int
  group_size: int
  max_resampling_rounds: int
  extra_prompts: int
  max_prompt_tokens: int
  max_new_tokens: tuple[int, ...]
  phase_steps: tuple[int, ...]
  decode_batch_size: int
  cache_tokens: int
  decode_split: int
  truncated_reward: str
  overlong_buffer: int
  temperature: float
  long_prompts: str
  zero_variance_groups: str
  repeat_zero_variance: float
  minibatches: int
  microbatch_tokens: int
  eval_prompts: int
  eval_samples: int
  eval_tasks: dict[str, str]
  keep_best: str
  task: TaskConfig
  verifier: VerifierConfig
  code: JailConfig
  advantage: AdvantageConfig
  loss: PolicyLossConfig

  def __post_init__(self):
    at_least_one(self, 'steps', 'prompts_per_step', 'max_resampling_rounds', 'max_prompt_tokens', 'decode_batch_size',
                 'minibatches', 'eval_prompts', 'eval_samples')
    if self.extra_prompts < 0:
      raise ValueError(f'extra_prompts must be >= 0, got {self.extra_prompts}')
    if self.microbatch_tokens < 0:
      raise ValueError(f'microbatch_tokens must be >= 1, or 0 for the default, got {self.microbatch_tokens}')
    if self.cache_tokens < 0:
      raise ValueError(f'cache_tokens must be >= 1, or 0 for what all rows need, got {self.cache_tokens}')
    if self.decode_split < 0:
      raise ValueError(f'decode_split must be >= 1, or 0 for the default, got {self.decode_split}')
    if self.group_size < 2:
      raise ValueError(f'group_size must be >= 2 (an advantage compares a group), got {self.group_size}')
    if self.advantage.name == 'pass_at_k' and self.advantage.k > self.group_size:
      raise ValueError(f'advantage.k must be at most group_size = {self.group_size}, got {self.advantage.k}')
    if list(self.phase_steps) != sorted(set(self.phase_steps)) or min(self.phase_steps, default=1) < 1:
      raise ValueError(f'phase_steps must be >= 1 and rise, got {self.phase_steps}')
    if len(self.max_new_tokens) != len(self.phase_steps) + 1 or min(self.max_new_tokens) < 1:
      raise ValueError('max_new_tokens must have one length per phase, one more than phase_steps = '
                       f'{self.phase_steps}, got {self.max_new_tokens}')
    if self.prompts_per_step % self.minibatches:
      raise ValueError(f'minibatches must divide prompts_per_step = {self.prompts_per_step}, got {self.minibatches}')
    if self.loss.cov == 'kl_cov' and self.minibatches == 1:
      raise ValueError("minibatches must be > 1 with loss.cov = 'kl_cov', whose penalty is 0 in the first update after "
                       'sampling, got 1')
    if not 0 < self.temperature < math.inf:
      raise ValueError(f'temperature must be > 0 and finite, got {self.temperature}')
    if not 0 <= self.overlong_buffer <= min(self.max_new_tokens):
      raise ValueError(f'overlong_buffer must be from 0 to max_new_tokens = {min(self.max_new_tokens)}, got '
                       f'{self.overlong_buffer}')
    if self.long_prompts not in LONG_PROMPTS:
      raise ValueError(f'long_prompts must be one of {", ".join(LONG_PROMPTS)}, got {self.long_prompts!r}')
    for name in self.eval_tasks:
      if not re.fullmatch(r'[a-z]\w*', name) or name == 'held_out':
        raise ValueError('eval_tasks must have names of lower-case letters, digits and _, other than held_out, got '
                         f'{name!r}')
    sets = [*(['held_out'] if self.task.held_out_fraction else []), *self.eval_tasks]
    if self.keep_best and self.keep_best not in sets:
      raise ValueError('keep_best must be empty or an evaluation set of this run '
                       f'({", ".join(sets) or "there is none"}), got {self.keep_best!r}')
    if not 0.001 <= self.repeat_zero_variance <= 1:  # with less, a step might skip prompts almost forever
      raise ValueError(f'repeat_zero_variance must be from 0.001 to 1, got {self.repeat_zero_variance}')
    if self.repeat_zero_variance < 1 and self.task.uri.startswith('reasoning:'):
      raise ValueError('repeat_zero_variance must be 1 with generated problems, whose number is unlimited, got '
                       f'{self.repeat_zero_variance}')
    if self.zero_variance_groups not in ZERO_VARIANCE_GROUPS:
      raise ValueError(f'zero_variance_groups must be one of {", ".join(ZERO_VARIANCE_GROUPS)}, got '
                       f'{self.zero_variance_groups!r}')
    if self.truncated_reward not in TRUNCATED_REWARD:
      raise ValueError(
        f'truncated_reward must be one of {", ".join(TRUNCATED_REWARD)}, got {self.truncated_reward!r}')

  @property
  def keeps_zero_variance(self) -> bool:
    """True if zero-variance groups are kept for the update; False if groups of new prompts replace them."""
    if self.zero_variance_groups == 'auto':
      return self.advantage.name == 'w_reinforce'
    return self.zero_variance_groups == 'keep'

  def reward_rule(self, step: int) -> RewardRule:
    """Returns the reward rule of step number `step`, with the length limit of the step's phase.

    Phases are consecutive ranges of steps, each with its own limit on the length of answers.
    """
    return RewardRule(self.truncated_reward, self.max_new_tokens[self.phase(step)], self.overlong_buffer)

  def phase(self, step: int) -> int:
    """Returns the index, from 0, of the phase (see `reward_rule`) that contains `step`. Steps are counted from 1."""
    return sum(step > end for end in self.phase_steps)


@dataclasses.dataclass(frozen=True)
class RlDataConfig:
  """Section `data`, in which RL needs only the tokenizer."""

  tokenizer: str


@dataclasses.dataclass(frozen=True)
class StartConfig:
  """Section `train`: the mesh, and the checkpoint that RL starts from."""

  mesh: MeshConfig
  init_from: str


@dataclasses.dataclass(frozen=True)
class RlLogConfig:
  """Section `log`: which logs are written, and how often. configs/settings.py describes each field."""

  every_steps: int
  eval_every_steps: int
  samples: int
  tensorboard: bool
  profile_steps: str = default('log.profile_steps')
  wandb: str = default('log.wandb')

  def __post_init__(self):
    at_least_one(self, 'every_steps', 'eval_every_steps')
    if self.samples < 0:
      raise ValueError(f'samples must be >= 0, got {self.samples}')
    first_and_last(self.profile_steps)


@dataclasses.dataclass(frozen=True)
class RlRun:
  """All settings of `betarank rl`, except the workdir."""

  seed: int
  model: ModelConfig
  data: RlDataConfig
  train: StartConfig
  optimizer: OptimizerConfig
  checkpoint: CheckpointConfig
  log: RlLogConfig
  rl: RlConfig

  def __post_init__(self):
    check_seed(self.seed)
    if not self.train.init_from:
      raise ValueError('train.init_from must name the pre-trained run or checkpoint to start from, got none')
    check_warmup(self.optimizer, self.updates, 'the updates of rl.steps')
    check_profile(self.log.profile_steps, self.steps)

  @property
  def mesh(self) -> MeshConfig:
    return self.train.mesh

  @property
  def split_rows(self) -> dict[str, tuple[int, int]]:
    """The batches that are split over the mesh: {config key of the batch size: (rows, microbatches)}.

    The number of rows of each microbatch must be a multiple of the number of devices over which it is split.
    """
    return {'rl.decode_batch_size': (self.rl.decode_batch_size, 1)}

  @property
  def sequence_length(self) -> int:
    """The largest number of tokens of a prompt and its answer together, in the phase with the longest answers."""
    return self.rl.max_prompt_tokens + max(self.rl.max_new_tokens)

  @property
  def steps(self) -> int:
    return self.rl.steps

  @property
  def updates(self) -> int:
    """The number of optimizer updates in the whole run, if none is left out."""
    return self.rl.steps * self.rl.minibatches


def rl_run(config: ConfigDict) -> RlRun:
  """Checks the settings of an RL run, and returns them.

  Raises:
    ConfigError: a setting is missing, unknown or invalid. The message names its key.
  """
  return section(RlRun, config)
