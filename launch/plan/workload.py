"""Gives the planner one view of pre-training and RL runs: rows, microbatches, length and steps."""

import dataclasses

from ml_collections import ConfigDict

from betarank.rl.config import RlConfig, RlRun, rl_run
from betarank.train.config import RunConfig, run_config


@dataclasses.dataclass(frozen=True)
class Workload:
  """A run whose config has been checked. `rl` is the section `rl` of its config, or None for pre-training."""

  run: RunConfig | RlRun
  rl: RlConfig | None

  @property
  def section(self) -> str:
    """The name of the config section that has the setting `microbatches`: 'train' or 'rl'."""
    return 'rl' if self.rl else 'train'

  @property
  def rows(self) -> int:
    """The number of sequences in one update."""
    return self.run.rows

  @property
  def microbatches(self) -> int:
    return self.run.microbatches

  @property
  def length(self) -> int:
    """The number of tokens per row. In RL, a row has room for a prompt and an answer of the largest length."""
    return self.run.sequence_length

  @property
  def steps(self) -> int:
    return self.run.steps


def workload(config: ConfigDict) -> Workload:
  """Returns the Workload of `config`, which is an RL run if the config has a section `rl`, else a pre-training run.

  Raises:
    ConfigError: a setting is invalid. The message names its key.
  """
  if 'rl' in config:
    run = rl_run(config)
    return Workload(run, run.rl)
  return Workload(run_config(config), None)
