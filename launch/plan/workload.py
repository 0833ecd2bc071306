"""Gives the planner the same view of pre-training and RL runs: rows, microbatches, length and steps."""

import dataclasses
import math
from collections.abc import Mapping

from ml_collections import ConfigDict

from betarank.model import RULES
from betarank.rl import packing
from betarank.rl.config import RlConfig, RlRun, rl_run
from betarank.train.config import RunConfig, run_config


@dataclasses.dataclass(frozen=True)
class Workload:
  """A run whose config has been checked. `rl` is the section `rl` of its config, or None for pre-training."""

  run: RunConfig | RlRun
  rl: RlConfig | None

  @property
  def rows(self) -> int:
    """The number of sequences in one update: rows of the batch in pre-training, samples in RL.

    In RL, several samples may be packed into one row.
    """
    rl = self.rl
    return rl.prompts_per_step // rl.minibatches * rl.group_size if rl else self.run.rows

  @property
  def keeps_reference(self) -> bool:
    """True if RL has a KL term. Its reference is a second copy of the parameters, which stays in memory."""
    return bool(self.rl and self.rl.loss.kl_weight)

  def microbatch(self, mesh_shape: Mapping[str, int]) -> tuple[int, int]:
    """Returns the shape (rows, tokens per row) of a microbatch; in RL, the shape of the largest microbatch."""
    if not self.rl:
      return self.rows // self.run.microbatches, self.length
    ways = math.prod(mesh_shape[axis] for axis in RULES['batch'])
    return packing.shapes(self.length, self.rl.microbatch_tokens, ways, mesh_shape['context'])[0]

  def microbatch_override(self, rows_per_chip: int, chips: int) -> dict[str, str]:
    """Returns {config key: value}, an override of the size of a microbatch.

    With it, a microbatch has room for `rows_per_chip` sequences of the greatest length on each chip.

    chips: the number of chips among which the rows are divided.
    """
    if self.rl:
      return {'rl.microbatch_tokens': str(rows_per_chip * self.length)}
    return {'train.microbatches': str(self.rows // (chips * rows_per_chip))}

  @property
  def length(self) -> int:
    """The greatest length of a sequence in tokens. In RL, a sequence is a prompt with its answer."""
    return self.run.sequence_length

  @property
  def steps(self) -> int:
    return self.run.steps

  def rl_tokens(self, mean_answer: int = 0) -> tuple[int, int]:
    """Returns (tokens that a run of RL draws, tokens that its updates process). The latter include the prompts.

    It is assumed that prompts have their greatest length, and that no group of samples is replaced by another one.

    mean_answer: the mean length of answers in tokens. With 0, all answers are assumed to have the maximum length.
    """
    rl, before, drawn, updated = self.rl, 0, 0, 0
    for end, new in zip((*rl.phase_steps, rl.steps), rl.max_new_tokens):
      answer = min(mean_answer or new, new)
      samples = max(rl.prompts_per_step * rl.group_size, rl.decode_batch_size)  # rows without a sample take time too
      drawn += (end - before) * samples * answer
      updated += (end - before) * rl.minibatches * self.rows * (rl.max_prompt_tokens + answer)
      before = end
    return drawn, updated


def workload(config: ConfigDict) -> Workload:
  """Returns the Workload of `config`: an RL run if the config has a section `rl`, otherwise a pre-training run.

  Raises:
    ConfigError: a setting is invalid. The message names its key.
  """
  if 'rl' in config:
    run = rl_run(config)
    return Workload(run, run.rl)
  return Workload(run_config(config), None)
