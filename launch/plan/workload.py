"""What a config runs, with one set of names for pre-training and RL."""

import dataclasses

from ml_collections import ConfigDict

from betarank.rl.config import RlConfig, RlRun, rl_run
from betarank.train.config import RunConfig, run_config


@dataclasses.dataclass(frozen=True)
class Workload:
  """A checked run. `rl` is None for pre-training; nothing else in the planner asks which of the two a run is."""

  run: RunConfig | RlRun
  rl: RlConfig | None

  @property
  def section(self) -> str:
    """The config section that holds `microbatches`."""
    return 'rl' if self.rl else 'train'

  @property
  def rows(self) -> int:
    """Sequences in one update."""
    return self.run.rows

  @property
  def microbatches(self) -> int:
    return self.run.microbatches

  @property
  def length(self) -> int:
    """Tokens per row; in RL, a prompt and an answer of the longest phase."""
    return self.run.sequence_length

  @property
  def steps(self) -> int:
    return self.run.steps


def workload(config: ConfigDict) -> Workload:
  """Returns what `config` runs: RL if it has a section `rl`, else pre-training. Raises ConfigError, naming the key."""
  if 'rl' in config:
    run = rl_run(config)
    return Workload(run, run.rl)
  return Workload(run_config(config), None)
