"""Pre-training, top to bottom: build, restore, loop, close.

The start of a run, in this order: the newest checkpoint in its workdir; else `train.init_from`, weights only or
all; else fresh weights from the seed. Step n is dispatched before the numbers of step n-1 are read, so the
device never waits for the log.
"""

import dataclasses
import json
import math
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from betarank import data, model
from betarank.configs.errors import ConfigError, UserError
from betarank.configs.load import to_json
from betarank.runtime import checkpoint, multihost, workdir
from betarank.runtime.metrics import Clock, Log, describe_evaluation, peak_flops
from betarank.runtime.state import TrainState, abstract_state, create_state
from betarank.train.config import RunConfig, run_config
from betarank.train.optimizer import make_optimizer, schedule
from betarank.train.samples import sample_texts
from betarank.train.score import means
from betarank.train.step import make_evaluate, make_step

SAMPLE_STREAM = 1  # fold_in(seed, stream, step): what is random here besides the first weights
PROMPT_TOKENS = 12


class TrainingError(UserError):
  """Training can't go on. One line that says since which step, and what is safe."""


def train(config: ConfigDict, path: str, fallback: bool = False) -> dict[str, float]:
  """Runs `config` in the workdir `path`, from wherever it stands there, to its last step.

  fallback: a damaged checkpoint is moved aside, and an earlier good one taken.

  Returns the last step's figures. Raises ConfigError, data.DataError or CheckpointError before any device work
  where something doesn't fit, TrainingError where training itself fails.
  """
  run = run_config(config)
  root = epath.Path(path)
  workdir.check_config(root, config)
  tokenizer = data.read_tokenizer(run.data.tokenizer_path, run.model.vocab_size)
  for source in run.data.sources:
    data.check_prepared(run.data, source)
  mesh = _make_mesh(run)

  with jax.set_mesh(mesh):
    tx = make_optimizer(run.optimizer, run.steps, model.abstract(run.model)[2])
    checkpoints = checkpoint.Checkpoints(root, run.checkpoint, fallback)
    state, cursor, parent = _start(run, tx, mesh, checkpoints)
    start = int(state.step)
    placement = NamedSharding(mesh, model.spec('batch', 'length'))
    process, processes = multihost.row_share(placement, run.train.batch_size, run.data.sequence_length)
    batches = data.TrainBatches(
      run.data, batch_size=run.train.batch_size, seed=run.seed, process_index=process, process_count=processes,
      cursor=cursor)
    if jax.process_index() == 0:
      workdir.write_config(root, config)
    log = Log(root, step=start, steps=run.steps, every=run.log.every_steps, tensorboard=run.log.tensorboard,
              active=jax.process_index() == 0)
    _introduce(log, run, mesh, root, start, batches)

    step_fn = make_step(run.model, run.objective, tx, tokenizer.bytes_per_token_V, run.train.microbatches,
                        'full' if run.log.head_tail_mass else 'basic')
    evaluate = make_evaluate(run.model, run.objective, tokenizer.bytes_per_token_V)
    rate, clock, stop = schedule(run.optimizer, run.steps), Clock(), multihost.StopSignal()
    lineage = {'config': json.loads(to_json(config)), 'parent': parent, 'code_version': workdir.code_version()}
    flops_per_step = model.flops_per_token(run.model, run.data.sequence_length) * run.tokens_per_step
    device_flops = peak_flops(jax.devices()[0])
    last: dict[str, float] = {}

    def record(step: int, sums: dict[str, jax.Array]) -> None:
      """Reads and writes the figures of an update; stops the run if they aren't numbers."""
      nonlocal last
      sums = jax.device_get(sums)
      step_s, wait = clock.lap()
      figures = means(sums)
      if sums['invalid']:
        raise TrainingError(f'step {step}: {int(sums["invalid"])} targets are no tokens of the vocabulary')
      if not math.isfinite(figures['loss_nats']) or not math.isfinite(sums['grad_norm']):
        good = checkpoints.latest
        good = 'no checkpoint yet' if good is None else f'the last good checkpoint is {checkpoints.path / str(good)}'
        norm = float(sums['grad_norm'])
        raise TrainingError(f'step {step}: loss is {figures["loss_nats"]}, gradient norm {norm}; {good}')
      last = {
        **{f'train/{name}': value for name, value in figures.items()},
        **{f'train/{name}': float(sums[name]) for name in ('grad_norm', 'router_bias_min', 'router_bias_max')
           if name in sums},
        'train/lr': float(rate(step - 1)),
        'time/step_s': step_s,
        'time/tokens_per_s': figures['tokens'] / step_s,
        'time/input_wait_share': wait,
      }
      if device_flops:
        last['time/mfu'] = flops_per_step / step_s / device_flops / jax.device_count()
      memory = jax.local_devices()[0].memory_stats() or {}
      if 'peak_bytes_in_use' in memory:
        last['time/hbm_bytes'] = memory['peak_bytes_in_use']
      log.train(step, last)

    def validate(step: int) -> None:
      if not run.data.validation_fraction:
        return
      for source in run.data.sources:
        total: dict[str, Any] = {}
        rows = run.train.batch_size
        for batch in data.validation_batches(run.data, source, batch_size=rows, count=run.log.eval_batches,
                                             process_index=process, process_count=processes):
          part = jax.device_get(evaluate(state, multihost.local_to_global(batch, placement, rows)))
          total = {name: total.get(name, 0) + value for name, value in part.items()}
        figures = means(total)
        log.evaluation(step, source, figures, describe_evaluation(source, figures))
      if run.log.samples and jax.process_count() == 1:  # several hosts would all have to draw them
        prompt = np.asarray(batch.tokens_BT)[: run.log.samples, :PROMPT_TOKENS]
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(run.seed), SAMPLE_STREAM), step)
        for text in sample_texts(run.model, state.params, tokenizer, prompt, new_tokens=run.log.sample_tokens, key=key):
          log.sample(step, *text)

    pending = None  # the update whose figures haven't been read yet
    try:
      for step in range(start + 1, run.steps + 1):
        with clock.waiting():
          batch = next(batches)
        state, sums = step_fn(state, multihost.local_to_global(batch, placement, run.train.batch_size))
        if pending:
          record(*pending)
        pending = (step, sums)
        checkpoints.check()

        stopping, final = stop(step), step == run.steps
        saving = final or stopping or step % run.checkpoint.every_steps == 0
        evaluating = final or step % run.log.eval_every_steps == 0
        if saving or evaluating:
          record(*pending)  # nothing that isn't a number gets into a checkpoint
          pending = None
          with clock.apart():
            if evaluating:  # before saving: all that belongs to a step is written before its checkpoint is
              validate(step)
            if saving:
              log.flush()
              checkpoints.save(state, {**lineage, 'cursor': batches.cursor}, step)
        if stopping and not final:
          checkpoints.wait()
          log.say(f'asked to stop: step {step} is saved; the same command goes on from there')
          break
      checkpoints.wait()
    finally:
      batches.close()
      log.close()
    checkpoints.close()
    return last


def _make_mesh(run: RunConfig) -> Mesh:
  try:
    mesh = model.make_mesh(run.train.mesh)
    multihost.check_rows(run.train.batch_size, mesh.shape, run.train.microbatches)
    _, shapes, axes = model.abstract(run.model)
    model.check_divides(shapes, axes, mesh.shape)
    return mesh
  except ValueError as error:
    raise ConfigError(f'config.train.mesh: {error}') from None


def _start(
  run: RunConfig, tx, mesh: Mesh, checkpoints: checkpoint.Checkpoints
) -> tuple[TrainState, dict | None, str]:
  """(state, data cursor, parent checkpoint): where this run begins or goes on."""
  target = abstract_state(run.model, tx, mesh)
  if checkpoints.latest is not None:
    state, meta = checkpoints.restore(target)
    return state, meta['cursor'], meta['parent']
  if not run.train.init_from:
    return create_state(run.model, tx, mesh, run.seed), None, ''
  source = checkpoint.find(run.train.init_from)
  if run.train.init_what == 'all':
    state, meta = checkpoint.restore(source, target)
    return state, meta['cursor'], str(source)
  params, _ = checkpoint.restore_weights(source, target.params)
  return create_state(run.model, tx, mesh, run.seed, params), None, str(source)


def _introduce(log: Log, run: RunConfig, mesh: Mesh, root, start: int, batches) -> None:
  """What one wants to know once: what is trained, on what, for how long, from where."""
  counts = model.parameter_counts(run.model)
  axes = ' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items() if size > 1) or 'one device'
  log.say(f'model     {sum(counts.values()) / 1e6:,.1f}M parameters '
          f'({", ".join(f"{name} {n / 1e6:.1f}M" for name, n in counts.items() if n)}), {run.model.dtype} compute')
  objective = {field.name: getattr(run.objective, field.name) for field in dataclasses.fields(run.objective)
               if getattr(run.objective, field.name) != field.default}
  k = objective.pop('top_k', run.objective.top_k)
  shaping = ', '.join(f'{name} {value}' for name, value in objective.items()) or 'plain cross-entropy'
  log.say(f'objective {shaping}; head and tail are told apart at k = {k}')
  log.say(f'data      {", ".join(f"{name} ({s.uri})" for name, s in run.data.sources.items())} in {run.data.dir}')
  log.say(f'mesh      {axes} of {jax.device_count()} {jax.devices()[0].device_kind}, {jax.process_count()} process(es)')
  log.say(f'run       steps {start} to {run.steps}, {run.tokens_per_step:,} tokens each, in {root}'
          + (f', code {workdir.code_version()}' if workdir.code_version() else ''))
