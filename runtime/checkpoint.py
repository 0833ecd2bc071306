"""Checkpoints through Orbax: written in the background, whole or not at all, restorable on any mesh.

    betarank checkpoint inspect DIR     what a run's checkpoints, or one of them, hold
    betarank checkpoint verify DIR      reads every byte of them and says which file is damaged

WORKDIR/checkpoints/STEP/ holds `state` (parameters with layers stacked, optimizer, step), `meta` (JSON: data cursor,
resolved config, parent checkpoint, code version, shape of every array) and manifest.json (train/integrity.py), against
which every restore checks them first. The order in which a run looks for its start is in `train/loop.py`: this
workdir's newest checkpoint, then `train.init_from`, then the seed.
"""

import argparse
import dataclasses
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from betarank.configs import renamed
from betarank.configs.errors import UserError, suggestion
from betarank.configs.load import check_places, flatten
from betarank.runtime import integrity
from betarank.runtime.state import TrainState

COMMITTED = 'commit_success.txt'  # Orbax's last file: what tells a whole checkpoint in a bucket, which can't rename


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

  def __init__(self, workdir: str | epath.Path, config: CheckpointConfig, fallback: bool = False):
    """Raises CheckpointError if the newest one is damaged; with `fallback` the newest good one becomes the newest.

    Every process of a job must call.
    """
    _say_failures_once()
    self.path = epath.Path(workdir) / 'checkpoints'
    self._saving = 0
    _settle(self.path, fallback)
    self._manager = ocp.CheckpointManager(
      absolute(self.path),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=config.keep,
        keep_period=config.keep_every_steps or None,
        cleanup_tmp_directories=True,  # what a killed run left half-written
        # Folders made in the background fail there, and Orbax's other threads wait 20 minutes for them.
        async_options=ocp.AsyncOptions(post_finalization_callback=self._seal, create_directories_asynchronously=False),
      ),
      item_names=integrity.ITEMS,
    )

  @property
  def latest(self) -> int | None:
    """Step of the newest whole checkpoint."""
    return self._manager.latest_step()

  def save(self, state: TrainState, meta: dict[str, Any], step: int) -> None:
    """Starts writing and returns once the state may be donated. A failed earlier write raises here."""
    meta = {**meta, 'step': step, 'shapes': shapes_of(state)}
    self.wait()
    self._saving = step
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
    return _restore(self.path / str(self.latest), target)  # checked when this was made

  def _seal(self) -> None:
    """Called in process 0's writing thread once all files are there, before Orbax commits them under their name."""
    final = self.path / str(self._saving)
    integrity.write(absolute(final if final.exists() else final.parent / f'{final.name}.orbax-checkpoint-tmp'))

  def _guard(self, write) -> None:
    try:
      write()
    except (OSError, ValueError, RuntimeError) as error:  # what Orbax and tensorstore raise when a disk is full
      if _of_another_process(error):
        raise
      reason = str(error).strip().splitlines()[0][-160:]  # its end says what the system answered
      whole = steps(self.path)
      last = f'the last good one is {self.path / str(whole[-1])}' if whole else 'there is no earlier one'
      raise CheckpointError(f'a checkpoint could not be written to {self.path} ({reason}); {last}') from error


def _say_failures_once() -> None:
  """Drops the tracebacks that Orbax's threads log of a failed write; it is raised again by `check` or `wait`."""
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(lambda record: not record.exc_info)


def absolute(path: epath.Path) -> epath.Path:
  """`path` from the root; gs://... is that already, and epath's resolve() would make it /HERE/gs:/..."""
  return path if '://' in str(path) else epath.Path(path).resolve()


def shapes_of(tree: Any) -> dict[str, list]:
  """{'params.layers.norm_D': [[4, 256], 'float32'], ...}: what a checkpoint holds, readable without devices."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='.'): [list(leaf.shape), str(leaf.dtype)]
          for path, leaf in leaves}


def steps(folder: epath.Path) -> list[int]:
  """The whole checkpoints in a folder, by step, oldest first."""
  whole = lambda path: path.name.isdigit() and ('://' not in str(path) or (path / COMMITTED).exists())
  return sorted(int(p.name) for p in folder.iterdir() if whole(p)) if folder.exists() else []


def find(path: str) -> epath.Path:
  """The checkpoint at `path`: itself one, or a workdir, whose newest is taken. Raises CheckpointError."""
  root = epath.Path(path)
  if ((root / 'meta').exists() and (root / 'state').exists()) or (root / integrity.NAME).exists():
    return root
  folder = root / 'checkpoints' if (root / 'checkpoints').exists() else root
  if not (found := steps(folder)):
    siblings = [str(p) for p in root.parent.iterdir() if p.is_dir()] if root.parent.exists() else []
    raise CheckpointError(f'{path}: no checkpoint there{suggestion(str(root), siblings)}')
  return folder / str(found[-1])


def check(path: epath.Path) -> None:
  """Raises CheckpointError if a file at `path` isn't what was written: which one, and which checkpoint is good.

  Every process of a job must call; each looks at its part.
  """
  if problem := _problem(path):
    good = _good_before(path)
    raise CheckpointError(f'{path}/{problem}; ' + (f'{good} is good' if good else 'no earlier checkpoint is good'))


def _settle(folder: epath.Path, fallback: bool) -> None:
  """Makes sure that the newest checkpoint in `folder`, if there is one, is good; see Checkpoints."""
  found = steps(folder)
  if not found or not (problem := _problem(newest := folder / str(found[-1]))):
    return
  good = _good_before(newest)
  if good is None:
    raise CheckpointError(f'{newest}/{problem}; no earlier checkpoint is good, choose another workdir')
  if not fallback:
    raise CheckpointError(f'{newest}/{problem}; {good} is good, and --fallback goes on from it')
  aside = folder.parent / 'damaged'
  if _place()[0] == 0:
    aside.mkdir(exist_ok=True)
    for step in found[found.index(int(good.name)) + 1:]:
      (aside / str(step)).rmtree(missing_ok=True)
      (folder / str(step)).rename(aside / str(step))
    print(f'{newest}/{problem}; moved to {aside}, going on from {good}', file=sys.stderr)
  _agree('')  # nobody looks before they are moved


def _good_before(path: epath.Path) -> epath.Path | None:
  """The newest good checkpoint beside `path` that is older."""
  older = [step for step in steps(path.parent) if path.name.isdigit() and step < int(path.name)]
  return next((p for step in reversed(older) if not _problem(p := path.parent / str(step))), None)


def _problem(path: epath.Path) -> str:
  """'' or what is damaged at `path`, the same in all processes, which must all call."""
  return _agree(integrity.damage(absolute(path), share=_place()))


def _place() -> tuple[int, int]:
  """(index, number) of processes; asks no device where there is one."""
  return (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)


def _of_another_process(error: Exception) -> bool:
  """Whether it needn't be a disk's error: another process that is gone is one here too, and train/job.py names it."""
  return _place()[1] > 1 and not getattr(error, 'errno', None) and 'os_error_code' not in str(error)


def _agree(text: str) -> str:
  """The first text of a process that isn't ''; every process must call, and gets it."""
  if _place()[1] == 1:
    return text
  said_PC = multihost_utils.process_allgather(np.frombuffer(text.encode()[:500].ljust(500), np.uint8))
  return next((line for said_C in said_PC if (line := said_C.tobytes().decode(errors='replace').strip())), '')


def read_meta(path: epath.Path) -> dict[str, Any]:
  """A checkpoint's meta, without its arrays; needs no device. Raises CheckpointError if it's missing or damaged."""
  try:
    if problem := integrity.damage(absolute(path), item='meta'):
      raise ValueError(problem)
    meta = json.loads((path / 'meta' / 'metadata').read_text())  # as Orbax's JsonCheckpointHandler writes it
    meta['shapes']
    meta['config'] = renamed.update(meta['config'])  # it may be from an earlier version
    return meta
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise CheckpointError(f'{path}: meta is missing or damaged ({str(error).splitlines()[0][:200]})') from error


def restore(path: epath.Path, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
  """The state at `path` laid out as `target`, and its meta. Raises CheckpointError if it's damaged or shapes differ."""
  check(path)
  return _restore(path, target)


def _restore(path: epath.Path, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
  meta = read_meta(path)
  _check_shapes(path, meta['shapes'], shapes_of(target))
  return _read(path, target), meta


def restore_weights(path: epath.Path, params: Any) -> tuple[Any, dict[str, Any]]:
  """Only the parameters at `path`, laid out as `params`, and the checkpoint's meta. Raises as `restore` does."""
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
    if _of_another_process(error):
      raise
    raise CheckpointError(f'{path}: could not be read ({str(error).strip().splitlines()[0][:300]})') from error


def _check_shapes(path: epath.Path, saved: dict[str, list], wanted: dict[str, list]) -> None:
  for name in sorted(saved.keys() | wanted.keys(), key=lambda name: (not name.startswith('params'), name)):
    if saved.get(name) != wanted.get(name):
      show = lambda entry: f'{entry[1]}{entry[0]}' if entry else 'nothing'
      raise CheckpointError(f'{path}: holds {show(saved.get(name))} for {name}, '
                            f'but this config makes it {show(wanted.get(name))}')


# betarank checkpoint


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(prog='betarank checkpoint', description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('command', choices=('inspect', 'verify'))
  parser.add_argument('path', metavar='DIR', help='a workdir or one checkpoint; local or gs://')
  args = parser.parse_args(argv)
  check_places({'DIR': args.path}, '')
  found = find(args.path)
  one = str(found) == str(epath.Path(args.path)) or not found.name.isdigit()
  paths = [found] if one else [found.parent / str(step) for step in steps(found.parent)]
  if args.command == 'inspect':
    _inspect(paths)
  else:
    _verify(paths)


def _inspect(paths: list[epath.Path]) -> None:
  for path in paths:
    meta = read_meta(path)
    shapes = {name: (math.prod(shape), np.dtype(kind).itemsize if kind != 'bfloat16' else 2)
              for name, (shape, kind) in meta['shapes'].items()}
    parameters = sum(n for name, (n, _) in shapes.items() if name.startswith('params.'))
    written = (path / 'meta' / 'metadata').stat().mtime
    print(f'{path}: step {meta["step"]}, {parameters:,} parameters, {(time.time() - written) / 3600:.1f} h old')
    files = integrity.read(path)
    for item in integrity.ITEMS if files else ():
      sizes = [f['size'] for name, f in files.items() if name.startswith(f'{item}/')]
      print(f'  {item:6} {sum(sizes):,} bytes in {len(sizes)} files')
    if not files:
      print('  no manifest: what it holds can\'t be checked')
    print(f'  arrays {len(shapes)}, {sum(n * size for n, size in shapes.values()):,} bytes')
    print(f'  code {meta.get("code_version") or "unknown"}, parent {meta.get("parent") or "none"}')
  print(f'config of {paths[-1]}:')
  for key, value in flatten(meta['config']).items():
    print(f'  {key} = {json.dumps(value)}')


def _verify(paths: list[epath.Path]) -> None:
  """A line for each; exit status 1 if one is damaged or can't be checked."""
  bad = 0
  for path in paths:
    problem = integrity.damage(absolute(path), full=True)
    if not problem and not (path / integrity.NAME).exists():
      problem = f'{integrity.NAME}: missing, so what the checkpoint holds can\'t be checked'
    bad += bool(problem)
    print(f'{path}/{problem}' if problem else f'{path}: good')
  sys.exit(bad > 0)
