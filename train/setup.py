"""The start of every run, written once: pre-training, RL, evaluation and the planner all begin with these functions.

A run begins, in this order, from: the newest checkpoint in its workdir; else `train.init_from`; else fresh weights from
the seed.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from betarank import data, model
from betarank.configs.errors import ConfigError
from betarank.configs.load import to_json
from betarank.runtime import checkpoint, workdir
from betarank.runtime.metrics import Log
from betarank.runtime.state import TrainState, abstract_state, create_state
from betarank.runtime.stop import Stopped, StopSignal

BATCH_AXES = ('data', 'fsdp', 'expert')  # mesh axes that split rows
SAVE_DEADLINE_S = 1800  # for a save in flight when a run fails; one of a large model takes minutes


def make_mesh(
  mesh: model.MeshConfig, c: model.ModelConfig, rows: Mapping[str, tuple[int, int]], devices: Any = None
) -> Mesh:
  """Returns the mesh of a run over `devices` (default: all there are).

  Args:
    mesh: sizes of its axes.
    c: the model, whose arrays the mesh must divide.
    rows: {config key: (rows, microbatches)} of everything that the mesh splits by rows.
    devices: as jax.make_mesh takes them.

  Raises ConfigError, naming config.train.mesh or the key, for a mesh that the devices can't form, or that doesn't
  divide the model or the rows.
  """
  try:
    made = model.make_mesh(mesh, devices)
    _, shapes, axes = model.abstract(c)
    model.check_divides(shapes, axes, made.shape)
  except ValueError as error:
    raise ConfigError(f'config.train.mesh: {error}') from None
  for key, (count, microbatches) in rows.items():
    check_rows(key, count, made.shape, microbatches)
  return made


def parent_meta(root: epath.Path, init_from: str) -> dict[str, Any]:
  """Returns the meta of the checkpoint that a run in the workdir `root` begins with; {} for random weights.

  Raises CheckpointError if `init_from` holds no checkpoint.
  """
  if found := checkpoint.steps(root / 'checkpoints'):
    return checkpoint.read_meta(root / 'checkpoints' / str(found[-1]))
  return checkpoint.read_meta(checkpoint.find(init_from)) if init_from else {}


@contextlib.contextmanager
def open_checkpoints(
  root: epath.Path, config: checkpoint.CheckpointConfig, fallback: bool
) -> Iterator[checkpoint.Checkpoints]:
  """Opens the checkpoints of a workdir; whatever ends the block, a save in flight is finished first.

  After an error it has SAVE_DEADLINE_S to do so. Raises CheckpointError as Checkpoints does.
  """
  checkpoints, failed = checkpoint.Checkpoints(root, config, fallback), True
  try:
    yield checkpoints
    failed = False
  finally:
    if failed:
      closing = threading.Thread(target=_close, args=(checkpoints,), daemon=True)
      closing.start()
      closing.join(SAVE_DEADLINE_S)
      if closing.is_alive():
        print(f'a save in flight did not finish within {SAVE_DEADLINE_S} s', file=sys.stderr)
  checkpoints.close()


def _close(checkpoints: checkpoint.Checkpoints) -> None:
  try:
    checkpoints.close()
  except checkpoint.CheckpointError as error:  # the run's own error is the one to show
    print(error, file=sys.stderr)


def check_rows(key: str, rows: int, mesh_shape: Mapping[str, int], microbatches: int = 1) -> None:
  """Raises ConfigError, naming config.`key`, if a microbatch of `rows` can't be split over the mesh."""
  sizes = {axis: mesh_shape[axis] for axis in BATCH_AXES}
  if microbatches > 1:
    sizes['microbatches'] = microbatches
  ways = 1
  for size in sizes.values():
    ways *= size
  if rows % ways:
    raise ConfigError(f'config.{key} must be a multiple of {" x ".join(sizes)} = '
                      f'{" x ".join(map(str, sizes.values()))}, got {rows}')


def read_tokenizer(path: str, c: model.ModelConfig, trained: Mapping[str, Any] | None = None) -> data.Tokenizer:
  """Returns the tokenizer at `path`.

  Args:
    path: of the file.
    c: the model, whose vocabulary must be as large or larger.
    trained: meta of the checkpoint that it will be used with, if any.

  Raises DataError for a file that is no tokenizer or has more tokens than the model, ConfigError for another tokenizer
  than the checkpoint was trained with.
  """
  tokenizer = data.read_tokenizer(path, c.vocab_size)
  before = (trained or {}).get('tokenizer_sha256')
  if before and before != tokenizer.sha256:
    raise ConfigError(f'config.data.tokenizer: {path} is not the tokenizer that the checkpoint was trained with '
                      f'(sha256 {tokenizer.sha256[:12]}, not {before[:12]})')
  return tokenizer


def trained_tokenizer(meta: Mapping[str, Any]) -> str:
  """Returns the path of the tokenizer that the checkpoint with this meta was trained with."""
  if 'tokenizer' in meta:
    return meta['tokenizer']
  own = meta['config']['data']
  return own.get('tokenizer') or f'{own["dir"].rstrip("/")}/tokenizer.model'


def whole_config(meta: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a checkpoint's config with the sections it inherited: if it is from RL, those on data and objective."""
  config, inherited = dict(meta['config']), meta.get('inherited', {})
  if 'sources' not in config['data'] and 'data' in inherited:
    config = {**inherited, **config, 'data': {**inherited['data'], 'tokenizer': trained_tokenizer(meta)}}
  return config


class Beginning(NamedTuple):
  """Where a run begins, or resumes.

  Attributes:
    state: on the devices.
    step: steps done; 0 for a fresh run.
    cursor: of the data or the prompts, as the checkpoint has it; None for a fresh run.
    parent: the checkpoint that the run first started from; '' for random weights.
    inherited: what the run's checkpoints must keep of the pre-training they descend from (see `lineage`).
  """

  state: TrainState
  step: int
  cursor: Any
  parent: str
  inherited: dict[str, Any]


def begin(
  c: model.ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, checkpoints: checkpoint.Checkpoints, *,
  seed: int, init_from: str, everything: bool = False,
) -> Beginning:
  """Returns the state to begin with; see the module for the order in which it is looked for.

  Args:
    c, tx, mesh: model, optimizer and mesh of the state.
    checkpoints: those of the run's workdir.
    seed: of fresh weights.
    init_from: a workdir or checkpoint; '' for none.
    everything: takes optimizer state, step and data cursor from init_from too, not only the weights.

  Raises CheckpointError for a checkpoint that is damaged, or holds arrays of other shapes.
  """
  target = abstract_state(c, tx, mesh)
  if checkpoints.latest is not None:
    state, meta = checkpoints.restore(target)
    return Beginning(state, meta['step'], meta['cursor'], meta['parent'], meta.get('inherited', {}))
  if not init_from:
    return Beginning(create_state(c, tx, mesh, seed), 0, None, '', {})
  source = checkpoint.find(init_from)
  if everything:
    state, meta = checkpoint.restore(source, target)
    return Beginning(state, meta['step'], meta['cursor'], str(source), _inherited(meta))
  params, meta = checkpoint.restore_weights(source, target.params)
  return Beginning(create_state(c, tx, mesh, seed, params), 0, None, str(source), _inherited(meta))


def check_same_function(c: model.ModelConfig, trained: Mapping[str, Any], fields: tuple[str, ...]) -> None:
  """Raises ConfigError if the checkpoint with the meta `trained` differs in `fields` of the model, which the shapes of
  its arrays don't show.
  """
  before = trained['config']['model']
  for name in fields:
    if name in before and before[name] != getattr(c, name):
      raise ConfigError(f'config.model.{name} must be {before[name]}, as the checkpoint to start from was trained, got '
                        f'{getattr(c, name)}')


def _inherited(meta: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the sections of a parent's config that a child's config doesn't have but its readers need."""
  config = whole_config(meta)
  return {name: config[name] for name in ('data', 'objective') if name in config}


def lineage(config: ConfigDict, beginning: Beginning, tokenizer: data.Tokenizer, tokenizer_path: str) -> dict[str, Any]:
  """Returns the record of a run's origin that every checkpoint holds in addition to its step and cursor."""
  return {
    'config': json.loads(to_json(config)),
    'parent': beginning.parent,
    'inherited': beginning.inherited,
    'tokenizer': tokenizer_path,
    'tokenizer_sha256': tokenizer.sha256,
    'code_version': workdir.code_version(),
  }


def open_log(
  root: epath.Path, config: ConfigDict, *, start: int, steps: int,
  describe: Callable[[int, int, dict[str, float], float], str] | None = None,
) -> Log:
  """Writes the workdir's config.json and run.json, and returns the run's log.

  start, steps: the step that the run resumes after, and its last one.
  describe: the line of a step; default: that of pre-training.
  """
  first = jax.process_index() == 0
  if first:
    workdir.write_config(root, config)
    device = jax.devices()[0]
    workdir.write_json(root / 'run.json', {
      'command': sys.argv, 'started_s': time.time(), 'device_kind': device.device_kind, 'devices': jax.device_count(),
      'processes': jax.process_count(), 'code_version': workdir.code_version()})
  given = {} if describe is None else {'describe': describe}
  project = config.log.get('wandb', '')
  return Log(root, step=start, steps=steps, every=config.log.every_steps, tensorboard=config.log.tensorboard,
             wandb=(project, json.loads(to_json(config))) if project else None, active=first, **given)


def log_header(log: Log, lines: Mapping[str, str]) -> None:
  """Logs what a run is, a line per name: model, data, mesh and so on."""
  for name, text in lines.items():
    log.say(f'{name:9} {text}')


def describe_model(c: model.ModelConfig) -> str:
  """Returns the number of parameters, in all and by part, for `log_header`."""
  counts = model.parameter_counts(c)
  parts = ', '.join(f'{name} {short(n)}' for name, n in counts.items() if n)
  return f'{short(sum(counts.values()))} parameters ({parts}), {c.dtype} compute'


def describe_mesh(mesh: Mesh) -> str:
  """Returns axes and devices, for `log_header`."""
  axes = ' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items() if size > 1) or 'one device'
  return f'{axes} of {jax.device_count()} {jax.devices()[0].device_kind}, {jax.process_count()} process(es)'


def describe_length(beginning: Beginning, steps: int, root: Any) -> str:
  """Returns from which step to which a run goes and what it starts from, for `log_header`."""
  start = beginning.step
  if start:
    origin = f'resumed after step {start}'
  else:
    origin = f'from {beginning.parent}' if beginning.parent else 'from random weights'
  version = workdir.code_version()
  return f'steps {start + 1} to {steps} in {root}, {origin}' + (f', code {version}' if version else '')


def short(n: float) -> str:
  """Returns a count with its unit, in three digits: 1.05B, 64.3M, 12.3k."""
  for size, unit in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if n >= size:
      return f'{n / size:.3g}{unit}'
  return f'{n:.3g}'


def finished(log: Log, root: epath.Path, config: ConfigDict, step: int) -> None:
  """Logs where a run that has ended is saved, and how to look at it."""
  log.say(f'finished: step {step} is saved in {root / "checkpoints" / str(step)}')
  if config.log.tensorboard:
    log.say(f'curves:   tensorboard --logdir={root}')
  log.say(f'try:      betarank explore {root}')


class Due(NamedTuple):
  """The actions that must follow a step."""

  evaluate: bool
  save: bool
  stop: bool  # after saving


def due(step: int, steps: int, *, stopping: bool, eval_every: int, save_every: int) -> Due:
  """Returns the actions after step number `step` of `steps`. The last step is always evaluated and saved."""
  final = step == steps
  return Due(final or step % eval_every == 0, final or stopping or step % save_every == 0, stopping and not final)


def stopped(log: Log, checkpoints: checkpoint.Checkpoints, step: int, stop: StopSignal) -> None:
  """Ends a run that was asked to stop, once its checkpoint of `step` is written. Raises Stopped."""
  checkpoints.wait()
  log.say(f'asked to stop: step {step} is saved; the same command resumes from it')
  raise Stopped(stop.exit_status)
