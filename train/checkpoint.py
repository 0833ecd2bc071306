"""Checkpoints through Orbax: written in the background, whole or not at all, restorable on any mesh.

WORKDIR/checkpoints/STEP/ holds `state` (parameters with layers stacked, optimizer, step) and `meta` (JSON: data
cursor, resolved config, parent checkpoint, code version, shape of every array). The order in which a run looks
for its start is in `train/loop.py`: this workdir's newest checkpoint, then `train.init_from`, then the seed.
"""

import dataclasses
import logging
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from configs.load import UserError, suggestion
from train.state import TrainState


class CheckpointError(UserError):
  """A checkpoint that can't be written, or can't be what it is asked to be. One line, naming the path."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Section `checkpoint`."""

  every_steps: int
  keep: int
  keep_every_steps: int

  def __post_init__(self):
    for name in ('every_steps', 'keep'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be >= 1, got {getattr(self, name)}')
    if self.keep_every_steps < 0:
      raise ValueError(f'keep_every_steps must be >= 0, got {self.keep_every_steps}')


class Checkpoints:
  """The checkpoints of one workdir."""

  def __init__(self, workdir: str | epath.Path, config: CheckpointConfig):
    _say_failures_once()
    self.path = epath.Path(workdir) / 'checkpoints'
    self._manager = ocp.CheckpointManager(
      absolute(self.path),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=config.keep,
        keep_period=config.keep_every_steps or None,
        cleanup_tmp_directories=True,  # what a killed run left half-written
      ),
      item_names=('state', 'meta'),
    )

  @property
  def latest(self) -> int | None:
    """Step of the newest whole checkpoint."""
    return self._manager.latest_step()

  def save(self, state: TrainState, meta: dict[str, Any], step: int) -> None:
    """Starts writing and returns once the state may be donated. A failed earlier write raises here."""
    meta = {**meta, 'step': step, 'shapes': shapes_of(state)}
    self._guard(lambda: self._manager.save(
      step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)), force=True))

  def check(self) -> None:
    """Raises CheckpointError if a write in the background has failed; cheap, called every step."""
    self._guard(self._manager.check_for_errors)

  def wait(self) -> None:
    """Returns when all is written. Raises CheckpointError if it couldn't be."""
    self._guard(self._manager.wait_until_finished)

  def close(self) -> None:
    self._guard(self._manager.close)

  def restore(self, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The newest checkpoint, laid out as `target` (shapes, types, shardings) says, and its meta."""
    return restore(self.path / str(self.latest), target)

  def _guard(self, write) -> None:
    try:
      write()
    except (OSError, ValueError, RuntimeError) as error:  # what Orbax and tensorstore raise when a disk is full
      reason = str(error).strip().splitlines()[0][-160:]  # its end says what the system answered
      whole = sorted(int(p.name) for p in self.path.iterdir() if p.name.isdigit()) if self.path.exists() else []
      last = f'the last good one is {self.path / str(whole[-1])}' if whole else 'there is no earlier one'
      raise CheckpointError(f'a checkpoint could not be written to {self.path} ({reason}); {last}') from error


def _say_failures_once() -> None:
  """Drops the tracebacks that Orbax's threads log of a failed write; it is raised again by `check` or `wait`."""
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(lambda record: not record.exc_info)


def absolute(path: epath.Path) -> epath.Path:
  """`path` from the root; gs://... is that already, and epath's resolve() would make it /HERE/gs:/..."""
  return path if '://' in str(path) else path.resolve()


def shapes_of(tree: Any) -> dict[str, list]:
  """{'params.layers.norm_D': [[4, 256], 'float32'], ...}: what a checkpoint holds, readable without devices."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='.'): [list(leaf.shape), str(leaf.dtype)]
          for path, leaf in leaves}


def find(path: str) -> epath.Path:
  """The checkpoint at `path`: itself one, or a workdir, whose newest is taken. Raises CheckpointError."""
  root = epath.Path(path)
  if (root / 'meta').exists() and (root / 'state').exists():
    return root
  folder = root / 'checkpoints' if (root / 'checkpoints').exists() else root
  steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []
  if not steps:
    siblings = [str(p) for p in root.parent.iterdir() if p.is_dir()] if root.parent.exists() else []
    raise CheckpointError(f'{path}: no checkpoint there{suggestion(str(root), siblings)}')
  return folder / str(max(steps))


def read_meta(path: epath.Path) -> dict[str, Any]:
  """A checkpoint's meta, without its arrays. Raises CheckpointError if it isn't there or isn't one."""
  try:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
      meta = reader.restore(absolute(path) / 'meta')
    meta['shapes'], meta['config']
    return meta
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise CheckpointError(f'{path}: meta is missing or damaged ({str(error).splitlines()[0][:200]})') from error


def restore(path: epath.Path, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
  """The state at `path` laid out as `target`, and its meta. Raises CheckpointError if shapes differ."""
  meta = read_meta(path)
  _check_shapes(path, meta['shapes'], shapes_of(target))
  return _read(path, target), meta


def restore_weights(path: epath.Path, params: Any) -> tuple[Any, dict[str, Any]]:
  """Only the parameters at `path`, laid out as `params`, and the checkpoint's meta."""
  meta = read_meta(path)
  saved = {k: v for k, v in meta['shapes'].items() if k.startswith('params.')}
  _check_shapes(path, saved, shapes_of({'params': params}))
  return _read(path, {'params': params})['params'], meta


def _read(path: epath.Path, target: Any) -> Any:
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      return reader.restore(absolute(path) / 'state', ocp.args.PyTreeRestore(
        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True))
  except (OSError, ValueError, RuntimeError) as error:
    raise CheckpointError(f'{path}: could not be read ({str(error).strip().splitlines()[0][:300]})') from error


def _check_shapes(path: epath.Path, saved: dict[str, list], wanted: dict[str, list]) -> None:
  for name in sorted(saved.keys() | wanted.keys(), key=lambda name: (not name.startswith('params'), name)):
    if saved.get(name) != wanted.get(name):
      show = lambda entry: f'{entry[1]}{entry[0]}' if entry else 'nothing'
      raise CheckpointError(f'{path}: holds {show(saved.get(name))} for {name}, '
                            f'but this config makes it {show(wanted.get(name))}')
