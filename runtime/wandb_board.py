"""Sends the figures of a run to Weights & Biases, which needs `pip install 'betarank[wandb]'`.

WORKDIR/wandb.json holds the id of the run in Weights & Biases, so that a resumed run continues the same curves. wandb's
own environment variables (WANDB_MODE=offline, WANDB_API_KEY, ...) apply. Curves are drawn over `step`. If a run is
killed and resumed, the figures of a few steps are sent twice, with the same values. wandb writes its file every 15
seconds, so a process that ends by SIGKILL loses the figures since the last write. metrics.jsonl still has all figures.
"""

import importlib.util
import json
import tempfile
import uuid
from typing import Any

from etils import epath

from betarank.configs.errors import ConfigError
from betarank.configs.files import write_atomically

FILE = 'wandb.json'


def check(project: str) -> None:
  """Raises ConfigError if a project is given but wandb isn't installed."""
  if project and importlib.util.find_spec('wandb') is None:
    raise ConfigError(f"config.log.wandb={project}: wandb is not installed; pip install 'betarank[wandb]'")


class WandbBoard:
  """Sends the figures of a workdir's run to Weights & Biases."""

  def __init__(self, project: str, config: dict[str, Any], workdir: epath.Path):
    """Continues the run of Weights & Biases that WORKDIR/wandb.json names, if it belongs to `project`. Otherwise starts
    a new run.
    """
    import wandb

    path = workdir / FILE
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get('project') != project:
      known = {'project': project, 'id': uuid.uuid4().hex[:12]}
      write_atomically(path, json.dumps(known) + '\n')
    # wandb writes to a local folder; a workdir in a bucket isn't one.
    folder = tempfile.mkdtemp(prefix='betarank-wandb-') if '://' in str(workdir) else str(workdir)
    self._run = wandb.init(project=project, id=known['id'], resume='allow', name=workdir.name, config=config,
                           dir=folder, settings={'console': 'off', 'quiet': True})  # the terminal is the run's own
    self._run.define_metric('step')
    self._run.define_metric('*', step_metric='step')

  def add_scalars(self, step: int, values: dict[str, float]) -> None:
    """Sends the figures of a step."""
    self._run.log({'step': step, **values})

  def close(self) -> None:
    """Waits until all figures are sent, or written to disk in offline mode, and ends the run."""
    self._run.finish()
