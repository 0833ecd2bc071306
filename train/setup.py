"""Sets up a run: mesh, tokenizer, state and log. Pre-training, RL, evaluation and the planner all use these functions.

A run begins from the newest checkpoint in its workdir. If the workdir has no checkpoint, the run begins from the
checkpoint that the setting `train.init_from` names. If this setting is empty, the run begins from random weights, which
the seed determines.
"""

import contextlib
import importlib.util
import json
import os
import re
import shlex
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
from betarank.configs.errors import ConfigError, print_if_possible
from betarank.configs.load import to_json
from betarank.configs.stop import Stopped, StopSignal
from betarank.configs.terminal import duration, waiting
from betarank.runtime import checkpoint, workdir
from betarank.runtime.metrics import Log
from betarank.runtime.program_cache import keep_programs
from betarank.runtime.state import TrainState, abstract_state, create_state, shard_bytes

INHERITED = ('data', 'objective')  # sections of a config that the checkpoints of child runs keep
BATCH_AXES = ('data', 'fsdp', 'expert')  # mesh axes that split rows
_BEFORE_AMPERE = r'[1-7]\.'  # compute capabilities of GPUs without bfloat16
SAVE_DEADLINE_S = 1800  # how long a failed run waits for a save in progress; that of a large model takes minutes


def make_mesh(
  mesh: model.MeshConfig, c: model.ModelConfig, rows: Mapping[str, tuple[int, int]], devices: Any = None
) -> Mesh:
  """Returns the mesh of a run. With `devices` None, also turns on the cache of compiled programs.

  Args:
    mesh: the sizes of the mesh's axes.
    c: the model, whose arrays must be divisible by the mesh.
    rows: {config key: (rows, microbatches)}, for every batch whose rows are split over the mesh.
    devices: the devices to use, as in jax.make_mesh. None means all devices.

  Raises:
    ConfigError: the devices can't form this mesh, the mesh doesn't divide the model or the rows, the model's attention
      runs only on a GPU, or the GPU is older than Ampere. The message names the config key.
  """
  device = (jax.devices() if devices is None else devices)[0]
  on = device.platform
  if devices is None:
    keep_programs()
  capability = getattr(device, 'compute_capability', '')  # such as '9.0'; only devices of GPUs have it
  if re.match(_BEFORE_AMPERE, capability):
    raise ConfigError(f'{device.device_kind}: the kernels need an NVIDIA GPU of compute capability 8.0 (Ampere) or '
                      f'later, got {capability}')
  if c.attention in model.GPU_ONLY_ATTENTION and on != 'gpu':
    raise ConfigError(f'config.model.attention={c.attention} runs only on a GPU, and this is a {on.upper()}; '
                      'auto chooses what suits it')
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
  """Returns the metadata of the checkpoint that a run in the workdir `root` begins from; {} if it begins from random
  weights.

  If the metadata of the run's newest checkpoint is damaged, returns that of an earlier one. `open_checkpoints` or the
  restore then refuses the newest checkpoint, or `open_checkpoints` moves it aside.

  Raises:
    CheckpointError: there is no checkpoint at `init_from`, or the metadata of no checkpoint can be read.
  """
  problem = None
  for step in reversed(checkpoint.steps(root / 'checkpoints')):
    try:
      return checkpoint.read_meta(root / 'checkpoints' / str(step))
    except checkpoint.CheckpointError as error:
      if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
        raise  # the disk or the store failed, which says nothing about the checkpoint
      problem = problem or error
  if problem:
    raise problem
  return checkpoint.read_meta(checkpoint.find(init_from)) if init_from else {}


@contextlib.contextmanager
def open_checkpoints(
  root: epath.Path, config: checkpoint.CheckpointConfig, fallback: bool
) -> Iterator[checkpoint.Checkpoints]:
  """Opens the checkpoints of a workdir. When the block ends, waits for a save in progress and closes the checkpoints.

  If the block ends with an error, the wait is limited to SAVE_DEADLINE_S seconds, and the outcome of the save is
  printed. The arguments are those of `Checkpoints.__init__`.

  Raises:
    CheckpointError: the newest checkpoint is damaged (see `Checkpoints.__init__`), or the last save failed.
  """
  checkpoints, failed = checkpoint.Checkpoints(root, config, fallback), True
  try:
    yield checkpoints
    failed = False
  finally:
    if failed:
      _finish_save(checkpoints)
  checkpoints.close()


def _finish_save(checkpoints: checkpoint.Checkpoints) -> None:
  """Closes `checkpoints` after an error, within SAVE_DEADLINE_S seconds. Prints whether a save in progress was
  completed.

  Never raises an error, because the user must see the error that ended the run.
  """
  step = checkpoints.in_flight
  outcome = f'did not finish within {SAVE_DEADLINE_S} s'

  def close():
    nonlocal outcome
    try:
      checkpoints.close()
      outcome = 'is complete'
    except checkpoint.CheckpointError as error:
      outcome = f'failed: {error}'

  if step is not None:
    print_if_possible(f'waiting for the checkpoint of step {step}, at most {SAVE_DEADLINE_S} s')
  closing = threading.Thread(target=close, daemon=True)
  closing.start()
  closing.join(SAVE_DEADLINE_S)
  if step is not None or outcome != 'is complete':
    print_if_possible(f'the checkpoint{"" if step is None else f" of step {step}"} {outcome}')


def check_rows(key: str, rows: int, mesh_shape: Mapping[str, int], microbatches: int = 1) -> None:
  """Raises ConfigError if `rows` can't be divided equally over the microbatches and the mesh's batch axes.

  key: the config key of the number of rows, for the message.
  """
  sizes = {axis: mesh_shape[axis] for axis in BATCH_AXES}
  if microbatches > 1:
    sizes['microbatches'] = microbatches
  ways = 1
  for size in sizes.values():
    ways *= size
  if rows % ways:
    raise ConfigError(f'config.{key} must be a multiple of {" x ".join(sizes)} = '
                      f'{" x ".join(map(str, sizes.values()))}, got {rows}')


def check_length(key: str, length: int, c: model.ModelConfig, mesh: Mesh) -> None:
  """Raises ConfigError if the mesh can't split rows of `length` tokens, or the model's attention doesn't support them.

  key: the config key that sets the length, for the message.
  """
  if length % mesh.shape['context']:
    raise ConfigError(f'config.{key} must be a multiple of config.train.mesh.context = {mesh.shape["context"]}, got '
                      f'{length}')
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    try:
      model.check_kernel(c.attention, length, c.kv_heads, c.head_dim, c.dtype)
    except ValueError as error:
      raise ConfigError(f'config.model.{error}, for config.{key}; auto chooses what suits it') from None


def read_tokenizer(path: str, c: model.ModelConfig, trained: Mapping[str, Any] | None = None) -> data.Tokenizer:
  """Returns the tokenizer at `path`.

  Args:
    path: the tokenizer's file.
    c: the model; it must have at least as many tokens as the tokenizer.
    trained: the metadata of the checkpoint that the tokenizer will be used with, if there is one.

  Raises:
    DataError: the file isn't a tokenizer, or has more tokens than the model.
    ConfigError: the checkpoint was trained with another tokenizer.
  """
  tokenizer = data.read_tokenizer(path, c.vocab_size)
  before = (trained or {}).get('tokenizer_sha256')
  if before and before != tokenizer.sha256:
    raise ConfigError(f'config.data.tokenizer: {path} is not the tokenizer that the checkpoint was trained with '
                      f'(sha256 {tokenizer.sha256[:12]}, not {before[:12]})')
  return tokenizer


def trained_tokenizer(meta: Mapping[str, Any]) -> str:
  """Returns the path of the tokenizer that a checkpoint was trained with. `meta` is the checkpoint's metadata."""
  if 'tokenizer' in meta:
    return meta['tokenizer']
  own = meta['config']['data']
  return own.get('tokenizer') or f'{own["dir"].rstrip("/")}/tokenizer.model'


def whole_config(meta: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config of a checkpoint, together with the sections that the checkpoint inherited.

  A checkpoint of an RL run inherits the sections on data and objective from the pre-training that the RL run started
  from.

  meta: the metadata of the checkpoint.
  """
  config, inherited = dict(meta['config']), meta.get('inherited', {})
  if 'sources' not in config['data'] and 'data' in inherited:
    sections = {name: inherited[name] for name in INHERITED if name in inherited}
    config = {**sections, **config, 'data': {**inherited['data'], 'tokenizer': trained_tokenizer(meta)}}
  return config


def trained_length(meta: Mapping[str, Any]) -> int:
  """Returns the longest sequence length that a checkpoint was trained with, in tokens.

  This is data.sequence_length of the pre-training or, after RL, the maximum length of a prompt with its answer if that
  is longer.

  meta: the metadata of the checkpoint.
  """
  config = whole_config(meta)
  longest = config['data'].get('sequence_length', 0)
  if rl := config.get('rl'):
    longest = max(longest, rl['max_prompt_tokens'] + max(rl['max_new_tokens']))
  return longest


def longest_text(meta: Mapping[str, Any]) -> int:
  """Returns the length in tokens of the longest text that a checkpoint was trained on in any of its stages, or that it
  was imported with.

  meta: the metadata of the checkpoint.
  """
  return max(trained_length(meta), meta.get('positions', 0), meta.get('inherited', {}).get('positions', 0))


def left_out(meta: Mapping[str, Any]) -> float:
  """Returns the smallest data.held_out_fraction of all stages that trained on `reasoning` documents; 1 if none did.

  The config of an imported model doesn't count, because its sources are only defaults.

  meta: the metadata of the checkpoint.
  """
  before = meta.get('inherited', {})
  stages = [] if 'positions' in meta else [meta['config'].get('data', {})]
  if 'held_out_fraction' not in before:  # an earlier version of the code wrote only the section of the last stage
    stages.append(before.get('data', {}))
  return min([before.get('held_out_fraction', 1.0), *(
    stage.get('held_out_fraction', 0.0) for stage in stages
    if any(source['uri'].startswith('reasoning') for source in stage.get('sources', {}).values()))])


class Beginning(NamedTuple):
  """The state that a run begins with, and its origin.

  Attributes:
    state: the training state, on the devices.
    step: the number of steps done; 0 for a new run.
    cursor: the position in the data or the prompts, from the checkpoint; None for a new run.
    parent: the checkpoint that the run started from when it was new; '' for random weights.
    inherited: what the run's checkpoints keep of the parent's metadata (see `_inherited`).
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
  """Returns the state that a run begins with, and its origin. This module's docstring says which checkpoint is used.

  Args:
    c, tx, mesh: the model, optimizer and mesh of the state.
    checkpoints: the checkpoints of the run's workdir.
    seed: the seed of the random weights.
    init_from: a workdir or a checkpoint to start a new run from; '' for random weights.
    everything: whether a new run also takes the optimizer state, the step and the data cursor from `init_from`. If
      False, it takes only the weights.

  Raises:
    CheckpointError: the checkpoint is missing or damaged, or the shapes of its arrays differ from the model's.
    ConfigError: the state is larger than the memory.
  """
  target = abstract_state(c, tx, mesh)
  _check_memory(target, mesh)
  if checkpoints.latest is not None:
    with waiting(f'restoring step {checkpoints.latest}'):
      state, meta = checkpoints.restore(target)
    return Beginning(state, meta['step'], meta['cursor'], meta['parent'], meta.get('inherited', {}))
  if not init_from:
    return Beginning(create_state(c, tx, mesh, seed), 0, None, '', {})
  source = checkpoint.find(init_from)
  if everything:
    with waiting(f'restoring {source}'):
      state, meta = checkpoint.restore(source, target)
    return Beginning(state, meta['step'], meta['cursor'], str(source), _inherited(meta))
  with waiting(f'restoring the weights of {source}'):
    params, meta = checkpoint.restore_weights(source, target.params)
  return Beginning(create_state(c, tx, mesh, seed, params), 0, None, str(source), _inherited(meta))


def _check_memory(state: TrainState, mesh: Mesh) -> None:
  """Raises ConfigError if the state alone is larger than the memory, in which a run on a CPU would hang or be killed.

  state: a state of abstract arrays with shardings on `mesh`.
  """
  device, needed = mesh.local_devices[0], shard_bytes(state)
  if device.platform == 'cpu':
    needed *= len(mesh.local_devices)
    room, where = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'), 'this machine has {:,.1f} GB'
  else:
    room = (device.memory_stats() or {}).get('bytes_limit', needed)  # less than the device has
    where = f'JAX may use {{:,.1f}} GB of each {device.device_kind}'
  if needed > room:
    raise ConfigError(f'config.model: parameters and optimizer state take {needed / 1e9:,.1f} GB, and '
                      + where.format(room / 1e9))


def check_same_function(c: model.ModelConfig, trained: Mapping[str, Any], fields: tuple[str, ...]) -> None:
  """Raises ConfigError if a model setting in `fields` has another value in the checkpoint than in `c`.

  The settings don't affect the shapes of arrays, so restoring the checkpoint would raise no error.

  trained: the metadata of the checkpoint.
  fields: names of settings in section `model`.
  """
  before = trained['config']['model']
  for name in fields:
    if name in before and before[name] != getattr(c, name):
      raise ConfigError(f'config.model.{name} must be {before[name]}, as the checkpoint to start from was trained, got '
                        f'{getattr(c, name)}')


def _inherited(meta: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what the checkpoints of a run keep of its parent's metadata.

  This is the sections INHERITED of its config, which the config of the child run may lack, although code that reads the
  child's checkpoints needs them, and what is known of all earlier stages: `positions` (see `longest_text`) and
  `held_out_fraction` (see `left_out`).
  """
  config = whole_config(meta)
  return {**{name: config[name] for name in INHERITED if name in config},
          'positions': longest_text(meta), 'held_out_fraction': left_out(meta)}


def lineage(config: ConfigDict, beginning: Beginning, tokenizer: data.Tokenizer, tokenizer_path: str) -> dict[str, Any]:
  """Returns the origin of a run: its config, parent, tokenizer and code version.

  Every checkpoint of the run stores this dictionary, together with the step and the cursor.
  """
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
  describe: Callable[[dict[str, float]], list[str]] | None = None,
) -> Log:
  """Writes config.json and run.json to the workdir, and returns the log of the run.

  Args:
    root: the workdir.
    config: the resolved config.
    start: the step that the run resumes after; 0 for a new run.
    steps: the last step.
    describe: a function that turns the figures of a step into the texts to print. None means `metrics.describe`, which
      is for pre-training.
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
  """Prints the log header of a run: its model, data, mesh and so on, one line per entry of `lines` that has a text."""
  for name, text in lines.items():
    if text:
      log.say(f'{name:9} {text}', indent=10)


def describe_model(c: model.ModelConfig) -> str:
  """Returns the number of parameters, total and by part, for `log_header`."""
  counts = model.parameter_counts(c)
  parts = ', '.join(f'{name} {short(n)}' for name, n in counts.items() if n)
  return f'{short(sum(counts.values()))} parameters ({parts}), {c.dtype} compute'


def describe_mesh(mesh: Mesh) -> str:
  """Returns the axes of the mesh and the devices, for `log_header`."""
  axes = ' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items() if size > 1) or 'one device'
  processes = f'{jax.process_count()} process{"es" if jax.process_count() > 1 else ""}'
  return f'{axes} of {jax.device_count()} {jax.devices()[0].device_kind}, {processes}'


def describe_length(beginning: Beginning, steps: int, root: Any) -> str:
  """Returns the first and last step of a run and what the run starts from, as a text for `log_header`.

  If the run has no steps left, the text says that it is finished.
  """
  start = beginning.step
  if start >= steps:
    return f'finished already: step {start} of {steps} is in {root}'
  if start:
    origin = f'resumed after step {start}'
  else:
    origin = f'from {beginning.parent}' if beginning.parent else 'from random weights'
  version = workdir.code_version()
  return f'steps {start + 1} to {steps} in {root}, {origin}' + (f', code {version}' if version else '')


def short(n: float) -> str:
  """Returns a number with three digits and a unit, for example 1.05B, 64.3M or 12.3k."""
  for size, unit in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if n >= size:
      return f'{n / size:.3g}{unit}'
  return f'{n:.3g}'


def finished(log: Log, root: epath.Path, config: ConfigDict, step: int, parent: str, tokens: int = 0) -> None:
  """Logs how long a finished run took, where it is saved, and commands to run next.

  If the run wrote TensorBoard events, one command shows its curves. Another command shows the predictions of the run
  next to those of its parent.

  parent: the checkpoint that the run started from; '' for random weights.
  tokens: the tokens that the run has trained on; 0 if they aren't counted.
  """
  counts = f'{step:,} steps' + (f', {short(tokens)} tokens' if tokens else '')
  log.say(f'finished: {counts}, {duration(log.elapsed_s)} in all')
  log.say(f'saved:    {root / "checkpoints" / str(step)}')
  if config.log.tensorboard:
    install = '' if importlib.util.find_spec('tensorboard') else 'pip install tensorboard; '
    log.say(f'curves:   {install}tensorboard --logdir={root}')
  log.say('try:      ' + shlex.join(['betarank', 'explore', *filter(None, [parent]), str(root)]))


def no_implicit_transfers() -> contextlib.AbstractContextManager[None]:
  """Forbids implicit transfers between host and devices in a `with` block. A transfer would make an update wait.

  If JAX_DISABLE_JIT is set, transfers are allowed, because each operation then transfers its constants.
  """
  return contextlib.nullcontext() if jax.config.jax_disable_jit else jax.transfer_guard('disallow')


class Due(NamedTuple):
  """The actions that are due after a step."""

  evaluate: bool
  save: bool
  stop: bool  # comes after saving


def due(step: int, steps: int, *, stopping: bool, eval_every: int, save_every: int) -> Due:
  """Returns the actions that are due after step number `step` of `steps`. The last step is always evaluated and saved.

  stopping: whether the run was asked to stop.
  eval_every, save_every: the numbers of steps between two evaluations, and between two saves.
  """
  final = step == steps
  return Due(final or step % eval_every == 0, final or stopping or step % save_every == 0, stopping and not final)


def stopped(log: Log, checkpoints: checkpoint.Checkpoints, step: int, stop: StopSignal) -> None:
  """Waits until the checkpoint of `step` is written, logs that the run was asked to stop, and raises Stopped."""
  checkpoints.wait()
  log.say(f'asked to stop: step {step} is saved; the same command resumes from it')
  raise Stopped(stop.exit_status)


def stopped_before(log: Log, start: int, stop: StopSignal) -> None:
  """Raises Stopped if a run was asked to stop before its first step. All processes must call this.

  start: the step that the run resumes after; 0 for a new run.
  """
  if stop():
    log.say('asked to stop before the next step; ' + (f'step {start} is saved' if start else 'nothing is lost')
            + ', and the same command ' + ('resumes from it' if start else 'starts again'))
    raise Stopped(stop.exit_status)
