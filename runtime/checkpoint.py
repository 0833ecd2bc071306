"""Saves and restores checkpoints with Orbax: atomically, in the background, and onto any mesh.

WORKDIR/checkpoints/STEP/ has three parts. `state` holds the parameters (with layers stacked), the optimizer state and
the step. `meta` is JSON: the data cursor, the resolved config, the parent checkpoint, the code version and the shape of
every array. manifest.json holds sizes and checksums of the files in `state` and `meta`. Before a restore, the files are
compared with it (runtime/integrity.py). `betarank checkpoint` (runtime/checkpoint_command.py) shows and verifies
checkpoints.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import re
import sys
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from betarank.configs import renamed
from betarank.configs.errors import UserError, print_if_possible, suggestion
from betarank.configs.files import read_json
from betarank.configs.load import from_dict
from betarank.configs.parser import install_hint
from betarank.runtime import integrity, multihost
from betarank.runtime.state import TrainState

COMMITTED = 'commit_success.txt'  # Orbax writes this file last; without it a checkpoint in a bucket is incomplete


class CheckpointError(UserError):
  """Raised if a checkpoint can't be written, found or restored. The message is one line that names the path."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Section `checkpoint`: how often a run saves, and which checkpoints it keeps.

  configs/settings.py describes each field.
  """

  every_steps: int
  keep: int
  keep_every_steps: int

  def __post_init__(self):
    for name in ('every_steps', 'keep'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be >= 1, got {getattr(self, name)}')
    if self.keep_every_steps < 0:
      raise ValueError(f'keep_every_steps must be >= 0, got {self.keep_every_steps}')


class _Manager(ocp.CheckpointManager):
  """Orbax's CheckpointManager, except that it leaves SIGTERM to StopSignal (configs/stop.py).

  In a job of several processes, all must stop at the same call of JAX's `reached_preemption_sync_point`. The caller
  numbers its calls. After SIGTERM, JAX chooses the number at which all stop, a little above the number of the latest
  call. Orbax and StopSignal number their calls differently. If the latest call were Orbax's, StopSignal might already
  have passed the chosen number, and the processes would never stop.
  """

  def reached_preemption(self, step: int) -> bool:
    return False


class Checkpoints:
  """The checkpoints of one workdir. Every process of a job must make the same calls."""

  def __init__(self, workdir: str | epath.Path, config: CheckpointConfig, fallback: bool = False):
    """Opens the folder of checkpoints, and creates it if needed.

    Args:
      workdir: the workdir of the run.
      config: which checkpoints to keep.
      fallback: if the newest checkpoint is damaged, moves it to WORKDIR/damaged and continues with the newest good
        checkpoint.

    Raises:
      CheckpointError: the newest checkpoint is damaged, and `fallback` is False or no older checkpoint is good.
    """
    _suppress_background_tracebacks()
    _need_no_access_to_buckets()
    _wait_by_a_steady_clock()
    self.path = epath.Path(workdir) / 'checkpoints'
    self._saving = 0
    self._kept = _Kept(config)
    _ensure_newest_is_valid(self.path, fallback)
    self._manager = _Manager(
      absolute(self.path),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._kept,
        cleanup_tmp_directories=True,  # unfinished saves of a killed run
        # If a folder can't be created in the background, other threads of Orbax wait 20 minutes for it.
        async_options=ocp.AsyncOptions(
          post_finalization_callback=self._write_manifest, create_directories_asynchronously=False),
      ),
      item_names=integrity.ITEMS,
    )

  @property
  def latest(self) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, state: TrainState, meta: dict[str, Any], step: int) -> None:
    """Starts to write a checkpoint in the background. Returns as soon as the caller may donate the state's buffers.

    When the new checkpoint is complete, old checkpoints are deleted as the config says, but not the one that `best`
    finds in the metadata.

    Args:
      state: the state to save.
      meta: the metadata to save. The step and the shapes are added here.
      step: the number of the step.

    Raises:
      CheckpointError: this write or an earlier write failed.
    """
    meta = {**meta, 'step': step, 'shapes': shapes_of(state)}
    self.wait()
    self._saving, self._kept.best = step, best(meta).get('step')
    self._guard(lambda: self._manager.save(
      step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)), force=True))

  def check(self) -> None:
    """Raises CheckpointError if a write in the background has failed. The check is cheap, so call it after every step.
    """
    self._guard(self._manager.check_for_errors)

  def wait(self) -> None:
    """Waits until all checkpoints are written. Raises CheckpointError if a write failed."""
    self._guard(self._manager.wait_until_finished)

  def close(self) -> None:
    """Waits until all checkpoints are written, and ends Orbax's threads. Raises CheckpointError if a write failed."""
    self._guard(self._manager.close)

  @property
  def in_flight(self) -> int | None:
    """The step whose checkpoint is being written, or None."""
    return self._saving if self._manager.is_saving_in_progress() else None

  def describe(self) -> str:
    """Returns a phrase that names the last good checkpoint, for the error message of a run that fails."""
    last = self._last_good()
    text = f'the last good checkpoint is {last}' if last else 'no checkpoint yet'
    return text if self.in_flight is None else f'{text}, and that of step {self.in_flight} is being written'

  def restore(self, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Returns (state, metadata) of the newest checkpoint. The arrays of the state get the shardings of `target`.

    After that, deletes the old checkpoints that aren't kept: a killed process may have left them, perhaps in part, and
    the config may now keep fewer.

    Raises:
      CheckpointError: the checkpoint can't be read, its shapes or dtypes differ from those of `target`, or an old one
        can't be deleted.
    """
    state, meta = _restore(self.path / str(self.latest), target)  # its files were checked by `__init__`
    self._kept.best = best(meta).get('step')
    for step in self._kept.superseded(sorted(self._manager.all_steps())):
      self._guard(lambda step=step: self._manager.delete(step), 'an old checkpoint could not be deleted from')
    return state, meta

  def _write_manifest(self) -> None:
    """Writes the manifest of the checkpoint that is being saved.

    Orbax calls this in the writing thread of process 0, after writing all files of the checkpoint and before committing
    them.
    """
    final = self.path / str(self._saving)
    integrity.write(absolute(final if final.exists() else final.parent / f'{final.name}.orbax-checkpoint-tmp'))

  def _guard(self, write: Callable[[], object], failed: str = 'a checkpoint could not be written to') -> None:
    """Calls `write`. Converts an error of Orbax or tensorstore, for example because a disk is full, to CheckpointError.

    If the loss of another process may have caused the error, it is raised unchanged.
    """
    try:
      write()
    except (OSError, ValueError, RuntimeError) as error:
      if _is_peer_failure(error):
        raise
      reason = _reason(error)[-160:]  # the message of the operating system or the store is at the end
      last = self._last_good()
      raise CheckpointError(f'{failed} {self.path} ({reason}); '
                            + (f'the last good one is {last}' if last else 'there is no earlier one')) from error

  def _last_good(self) -> str:
    """Returns the path of the newest complete checkpoint, for an error message; '' if there is none.

    If the folder can't be listed, for example because the store that refused a write also refuses to list, returns a
    text that says so.
    """
    try:
      found = [step for step in steps(self.path) if step != self.in_flight]
    except OSError:
      return f'the newest in {self.path}, which can\'t be listed now'
    return str(self.path / str(found[-1])) if found else ''


class _Kept:
  """Tells Orbax which checkpoints to keep.

  These are the newest `keep` checkpoints, those whose step is a multiple of `keep_every_steps` (none if it is 0), and
  the one whose step is the attribute `best`.
  """

  def __init__(self, config: CheckpointConfig):
    self._config, self.best = config, None

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """Returns, for each of the checkpoints (oldest first), whether to keep it. Orbax calls this."""
    superseded = self.superseded([found.step for found in checkpoints])
    return [found.step not in superseded for found in checkpoints]

  def superseded(self, found: Sequence[int]) -> list[int]:
    """Returns those of the steps (in ascending order) whose checkpoints aren't kept."""
    every = self._config.keep_every_steps
    return [step for step in found[:-self._config.keep] if step != self.best and not (every and step % every == 0)]


def _suppress_background_tracebacks() -> None:
  """Hides the tracebacks that threads of Orbax and TensorStore print when a write fails. The methods `check` and `wait`
  raise the error anyway.
  """
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(_has_no_traceback)
  if getattr(sys.unraisablehook, 'func', None) is not _print_unless_late:
    sys.unraisablehook = functools.partial(_print_unless_late, sys.unraisablehook)


def _has_no_traceback(record: logging.LogRecord) -> bool:
  return not record.exc_info


def _print_unless_late(then: Callable[[Any], None], error: Any) -> None:
  """Passes an exception that Python can't raise in any caller on to the hook `then`, unless it comes from a late write.

  After the first write that fails, Orbax closes its event loop. A write that ends later raises an error when it reports
  to this loop.
  """
  if not (error.exc_type is RuntimeError and str(error.exc_value) == 'Event loop is closed'):
    then(error)


def _need_no_access_to_buckets() -> None:
  """Lets Orbax delete checkpoints without permission to read the bucket's metadata.

  Before it deletes, Orbax reads whether the bucket has a hierarchical namespace. A role that covers only objects, such
  as roles/storage.objectAdmin, doesn't permit this. In that case, the bucket is assumed to have no hierarchical
  namespace. If it has one, empty folders remain.
  """
  with contextlib.suppress(ImportError, AttributeError):  # a later version of Orbax may not ask
    from orbax.checkpoint._src.path import gcs_utils

    ask = gcs_utils.is_hierarchical_namespace_enabled
    if not isinstance(ask, functools.partial):
      gcs_utils.is_hierarchical_namespace_enabled = functools.partial(_no_if_refused, ask)


def _wait_by_a_steady_clock() -> None:
  """Makes Orbax use time.monotonic() to measure how long it waits for a save. The wall clock, its default, may jump."""
  with contextlib.suppress(ImportError, AttributeError):  # a later version of Orbax may have other modules
    from orbax.checkpoint._src.futures import future, signaling_client

    for module in (future, signaling_client):
      module.time = types.SimpleNamespace(**{**vars(time), 'time': time.monotonic})


def _no_if_refused(ask: Callable[[Any], bool], path: Any) -> bool:
  try:
    return ask(path)
  except Exception:  # of google.cloud and google.auth, which may not be installed
    return False


def absolute(path: epath.Path) -> epath.Path:
  """Returns the path as an absolute path. A path in a bucket is returned unchanged, because epath's resolve() would
  damage it.
  """
  return path if '://' in str(path) else epath.Path(path).resolve()


def shapes_of(tree: Any) -> dict[str, list]:
  """Returns {path: [shape, dtype]} of every array, for example {'params.layers.norm_D': [[4, 256], 'float32'], ...}."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='.'): [list(leaf.shape), str(leaf.dtype)]
          for path, leaf in leaves}


def steps(folder: epath.Path) -> list[int]:
  """Returns the steps of the complete checkpoints in a folder, in ascending order."""
  if not folder.exists():
    return []
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and _is_committed(path))


def _is_committed(path: epath.Path) -> bool:
  """Returns True if Orbax has completed the checkpoint at `path`. On a disk, only a complete one has this name."""
  return '://' not in str(path) or (path / COMMITTED).exists()


def find(path: str) -> epath.Path:
  """Returns the path of the checkpoint at `path`, or of the newest checkpoint if `path` is a workdir.

  Raises:
    CheckpointError: there is no checkpoint at `path`, or it is incomplete.
  """
  root = epath.Path(path)
  try:
    return _find(root)
  except ImportError as error:
    raise CheckpointError(f'{path}: {error} ({install_hint(path)})') from None


def _find(root: epath.Path) -> epath.Path:
  if (root / integrity.NAME).exists():  # written after all other files, which `check` compares with it
    return root
  if all((root / item).exists() for item in integrity.ITEMS):
    if _is_committed(root):
      return root
    raise CheckpointError(f'{root}: incomplete, because its save was interrupted (neither {integrity.NAME} nor '
                          f'{COMMITTED} is there)')
  folder = root / 'checkpoints' if (root / 'checkpoints').exists() else root
  if not (found := steps(folder)):
    beside = root.parent.iterdir() if root.parent.exists() else []
    siblings = [str(p) for p in beside if p.name == 'checkpoints' or (p / 'checkpoints').is_dir()]
    missing = 'no checkpoint there' if root.exists() else 'no such folder'
    raise CheckpointError(f'{root}: {missing}{suggestion(str(root), siblings)}')
  return folder / str(found[-1])


def check(path: epath.Path) -> None:
  """Raises CheckpointError if a file of the checkpoint at `path` is damaged.

  The message names the file, and the newest good checkpoint that is older. Every process of a job must call this
  function; each process checks a part of the files.
  """
  if problem := _damage(path):
    good = _newest_good_before(path)
    raise CheckpointError(f'{path}/{problem}; ' + (f'{good} is good' if good else 'no earlier checkpoint is good'))


def _ensure_newest_is_valid(folder: epath.Path, fallback: bool) -> None:
  """Raises CheckpointError if the newest checkpoint in `folder` is damaged. Does nothing if there is no checkpoint.

  fallback: if the newest checkpoint is damaged and an older one is good, moves all checkpoints after the good one to
    WORKDIR/damaged instead of raising an error.
  """
  found = steps(folder)
  if not found or not (problem := _damage(newest := folder / str(found[-1]))):
    return
  good = _newest_good_before(newest)
  if good is None:
    raise CheckpointError(f'{newest}/{problem}; no earlier checkpoint is good, choose another workdir')
  if not fallback:
    raise CheckpointError(f'{newest}/{problem}; {good} is good, and --fallback resumes from it')
  aside = folder.parent / 'damaged'
  if multihost.index_and_count()[0] == 0:
    aside.mkdir(exist_ok=True)
    for step in found[found.index(int(good.name)) + 1:]:
      _move(folder / str(step), aside / str(step))
    print_if_possible(f'{newest}/{problem}; moved to {aside}, resuming from {good}')
  multihost.first_message('')  # the other processes wait here until the checkpoints are moved


def _move(checkpoint: epath.Path, to: epath.Path) -> None:
  """Moves a checkpoint to the path `to`, which is deleted if it exists."""
  to.rmtree(missing_ok=True)
  if '://' not in str(to):
    checkpoint.rename(to)
    return
  import fsspec

  # In a bucket, the files are moved one after another. Without the first of them, the checkpoint counts as incomplete.
  (checkpoint / COMMITTED).unlink()
  files, source = fsspec.core.url_to_fs(str(checkpoint))
  for path in files.find(source):
    files.mv(path, f'{to}{path.removeprefix(source)}')


def _newest_good_before(path: epath.Path) -> epath.Path | None:
  """Returns the newest good checkpoint in the same folder that is older than `path`, or None."""
  older = [step for step in steps(path.parent) if path.name.isdigit() and step < int(path.name)]
  return next((p for step in reversed(older) if not _damage(p := path.parent / str(step))), None)


def _damage(path: epath.Path) -> str:
  """Returns the first damage to the checkpoint at `path`, as 'FILE: PROBLEM', or '' if there is none.

  All processes must call this function. It returns the same result in all of them.
  """
  return multihost.first_message(integrity.damage(absolute(path), share=multihost.index_and_count()))


def _is_peer_failure(error: Exception) -> bool:
  """Returns True if the loss of another process may have caused this error.

  Returns False if storage has caused it, and always in a job of one process. The watchdog reports a lost process, so
  the caller doesn't report an error that it may have caused as one of storage.
  """
  return (multihost.index_and_count()[1] > 1 and not getattr(error, 'errno', None)
          and 'os_error_code' not in str(error) and 'http_response_code' not in str(error))


def _reason(error: Exception) -> str:
  """Returns the first line of an error's message, without the spec and the HTTP response that tensorstore appends."""
  text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
  return re.sub(r" \[(http_response_body|tensorstore_spec)='(\\.|[^'\\])*'\]", '', text)


def read_meta(path: epath.Path) -> dict[str, Any]:
  """Returns the metadata of a checkpoint. Reads no arrays and doesn't initialize JAX's backend."""
  try:
    if problem := integrity.damage(absolute(path), item='meta'):
      raise ValueError(problem)
    meta = read_json(path / 'meta' / 'metadata')  # as Orbax's JsonCheckpointHandler writes it
    if type(meta['step']) is not int or not all(map(_is_shape, meta['shapes'].values())):
      raise ValueError('its step or a shape is not valid')
    meta['config'] = renamed.update(meta['config'])  # an earlier version may have written it
    from_dict(meta['config'])
    return meta
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise CheckpointError(f'{path}: meta is missing or damaged ({_reason(error)[:200]})') from error


def _is_shape(entry: Any) -> bool:
  """Returns True if `entry` is [shape, dtype], as in the dictionary that `shapes_of` returns.

  Raises:
    ValueError, TypeError: `entry` doesn't have two parts, or NumPy doesn't know the dtype.
  """
  shape, dtype = entry
  return (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape) and math.prod(shape) < 2**63
          and bool(re.fullmatch(r'[a-z]\w*', dtype)) and np.dtype(dtype).itemsize > 0)


def best(meta: dict[str, Any]) -> dict[str, Any]:
  """Returns the best evaluation of a run so far, as RL with `rl.keep_best` records it (rl/progress.py).

  The dictionary has at least the keys 'step', 'metric' and 'value'. It is {} if there is no such evaluation.
  """
  cursor = meta.get('cursor')
  found = cursor.get('best') if isinstance(cursor, dict) else None
  kinds = {'step': int, 'metric': str, 'value': float}
  valid = isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in kinds.items())
  return found if valid else {}


def restore(path: epath.Path, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
  """Returns (state, metadata) of the checkpoint at `path`. The arrays of the state get the shardings of `target`.

  Raises:
    CheckpointError: the checkpoint is damaged, or its shapes differ from those of `target`.
  """
  check(path)
  return _restore(path, target)


def _restore(path: epath.Path, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
  meta = read_meta(path)
  _check_shapes(path, meta['shapes'], shapes_of(target))
  return _read(path, target), meta


def restore_weights(path: epath.Path, params: Any) -> tuple[Any, dict[str, Any]]:
  """Returns (parameters, metadata) of the checkpoint at `path`. The parameters get the shardings of `params`.

  The optimizer's state isn't read.

  Raises:
    CheckpointError: the checkpoint is damaged, or the shapes of its parameters differ from those of `params`.
  """
  check(path)
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
    if _is_peer_failure(error):
      raise
    raise CheckpointError(f'{path}: could not be read ({_reason(error)[:300]})') from error


def _check_shapes(path: epath.Path, saved: dict[str, list], wanted: dict[str, list]) -> None:
  for name in sorted(saved.keys() | wanted.keys(), key=lambda name: (not name.startswith('params'), name)):
    if saved.get(name) != wanted.get(name):
      show = lambda entry: f'{entry[1]}{entry[0]}' if entry else 'nothing'
      raise CheckpointError(f'{path}: holds {show(saved.get(name))} for {name}, '
                            f'but this config makes it {show(wanted.get(name))}')
