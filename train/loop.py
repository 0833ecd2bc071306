"""Runs pre-training from top to bottom: build, restore, loop, close.

Step n is dispatched before the figures of step n-1 are read, so the device never waits for the log.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from betarank import data, model
from betarank.configs.errors import ConfigError, UserError
from betarank.objectives import ObjectiveConfig
from betarank.runtime import checkpoint, job, multihost, wandb_board, workdir
from betarank.runtime.metrics import Clock, Log, describe_evaluation, peak_flops
from betarank.runtime.profile import Profile
from betarank.runtime.state import TrainState
from betarank.runtime.stop import StopSignal
from betarank.train import score, setup
from betarank.train.config import RunConfig, first_and_last, run_config
from betarank.train.optimizer import decay_start, make_optimizer, schedule
from betarank.train.sampler import Prompt, Sampler, SamplerConfig
from betarank.train.step import make_evaluate, make_step

PROMPT_TOKENS = 12  # of a training row, which a logged text continues


class TrainingError(UserError):
  """The error for failed training. Its message is one line that names the step and the newest good checkpoint."""


def train(config: ConfigDict, path: str, fallback: bool = False) -> dict[str, float]:
  """Runs `config` in the workdir `path` to its last step, resuming from the workdir's newest checkpoint if it has one.

  fallback: moves a damaged newest checkpoint aside, and resumes from the newest good one.

  Returns the figures of the last step. Raises ConfigError, data.DataError or CheckpointError before any device work if
  something doesn't fit, TrainingError if training itself fails.
  """
  run, root = run_config(config), epath.Path(path)
  workdir.check_config(root, config)
  wandb_board.check(run.log.wandb)
  parent = setup.parent_meta(root, run.train.init_from)
  check_budget(run, root, parent)
  tokenizer = setup.read_tokenizer(run.data.tokenizer_path, run.model, parent)
  for source in run.data.sources:
    data.check_prepared(run.data, source)
  mesh = setup.make_mesh(run.mesh, run.model, run.split_rows)

  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    stop = stack.enter_context(StopSignal(jax.process_count()))
    checkpoints = stack.enter_context(setup.open_checkpoints(root, run.checkpoint, fallback))
    tx = make_optimizer(run.optimizer, run.steps, model.abstract(run.model)[2])
    beginning = setup.begin(run.model, tx, mesh, checkpoints, seed=run.seed, init_from=run.train.init_from,
                            everything=run.train.init_what == 'all')
    state, start = beginning.state, beginning.step
    feed = stack.enter_context(contextlib.closing(Feed(run, mesh, beginning.cursor)))
    log = stack.enter_context(contextlib.closing(setup.open_log(root, config, start=start, steps=run.steps)))
    setup.log_header(log, {
      'model': setup.describe_model(run.model),
      'objective': describe_objective(run.objective),
      'data': f'{", ".join(f"{name} ({source.uri})" for name, source in run.data.sources.items())} in {run.data.dir}',
      'mesh': setup.describe_mesh(mesh),
      'run': f'{setup.describe_length(beginning, run.steps, root)}, {run.tokens_per_step:,} tokens per step'})
    if start == run.steps:
      log.say('finished already: this was the last step; a larger config.train.tokens continues the run')
    update = make_step(run.model, run.objective, tx, tokenizer.bytes_per_token_V, run.microbatches,
                       'full' if run.log.head_tail_mass else 'basic')
    evaluate = make_evaluate(run.model, run.objective, tokenizer.bytes_per_token_V)
    texts = Texts(run, tokenizer, mesh)
    recorder = Recorder(run, log, checkpoints)
    lineage = setup.lineage(config, beginning, tokenizer, run.data.tokenizer_path)
    profile = Profile(root, first_and_last(run.log.profile_steps))

    for step in range(start + 1, run.steps + 1):
      with recorder.clock.waiting():
        batch = next(feed)
      with profile.at(step):
        placed = feed.to_devices(batch)
        with jax.transfer_guard('disallow'):  # forbids implicit transfers to or from the host
          state, sums = update(state, placed)
      recorder.dispatched(step, sums)
      checkpoints.check()
      job.note_step(step)
      due = setup.due(step, run.steps, stopping=stop(step), eval_every=run.log.eval_every_steps,
                      save_every=run.checkpoint.every_steps)
      if due.save or due.evaluate:
        recorder.catch_up()  # nothing that isn't a number gets into a checkpoint
        with recorder.clock.apart():
          if due.evaluate:  # before saving: all that belongs to a step is written before its checkpoint is
            validate(run, feed, evaluate, state, step, log)
            texts.write(state.params, batch, step, log)
          if due.save:
            log.flush()
            checkpoints.save(state, {**lineage, 'cursor': feed.cursor}, step)
      if due.stop:
        setup.stopped(log, checkpoints, step, stop)
    checkpoints.wait()
    setup.finished(log, root, config, run.steps)
  return recorder.last


def check_budget(run: RunConfig, root: epath.Path, meta: dict[str, Any]) -> None:
  """Raises ConfigError if the run in the workdir `root` has gone too far for the token budget of this config: it has
  passed the budget's end, or its learning rate already decays under a smaller budget, which a larger budget would undo.

  meta: the meta of the newest checkpoint.
  """
  steps = checkpoint.steps(root / 'checkpoints')
  if not steps:
    return
  reached, before = steps[-1], meta['config']['train']['tokens']
  if reached > run.steps:
    raise ConfigError(f'config.train.tokens: {run.train.tokens} make {run.steps} steps, but {root} has reached step '
                      f'{reached}; choose another workdir, or at least {reached * run.tokens_per_step} tokens')
  decays = decay_start(run.optimizer, math.ceil(before / run.tokens_per_step))
  if run.train.tokens > before and reached > decays:
    kept = [step for step in steps if step <= decays]
    way = (f'start from the checkpoint before the decay in another workdir: --config.train.init_from='
           f'{root}/checkpoints/{kept[-1]} --config.train.init_what=all' if kept else
           'no checkpoint from before the decay was kept (config.checkpoint.keep_every_steps keeps some for good)')
    raise ConfigError(f'config.train.tokens: {root} has been lowering its learning rate since step {decays}, by its '
                      f'budget of {before} tokens, and a larger budget would raise it again; {way}')


class Feed(Iterator[data.Batch]):
  """The batches of a run, as this process's rows of each batch, and their transfer to the devices."""

  def __init__(self, run: RunConfig, mesh: Mesh, cursor: dict[str, Any] | None):
    self._placement, self._rows = NamedSharding(mesh, model.spec('batch', 'length')), run.rows
    self.process, self.processes = multihost.row_share(self._placement, run.rows, run.sequence_length)
    self._batches = data.TrainBatches(run.data, batch_size=run.rows, seed=run.seed, process_index=self.process,
                                      process_count=self.processes, cursor=cursor)

  def __next__(self) -> data.Batch:
    return next(self._batches)

  def to_devices(self, batch: data.Batch) -> data.Batch:
    """Returns this process's rows as arrays of the whole batch, split over the mesh."""
    return multihost.local_to_global(batch, self._placement, self._rows)

  @property
  def cursor(self) -> dict[str, Any]:
    """The JSON-serializable position that determines the next batch."""
    return self._batches.cursor

  def close(self) -> None:
    self._batches.close()


class Recorder:
  """Reads the figures of an update while the next one runs, and logs them."""

  def __init__(self, run: RunConfig, log: Log, checkpoints: checkpoint.Checkpoints):
    self._log, self._checkpoints = log, checkpoints
    self._rate = schedule(run.optimizer, run.steps)
    self._flops_per_step = model.flops_per_token(run.model, run.sequence_length) * run.tokens_per_step
    self._pending: tuple[int, dict[str, jax.Array]] | None = None
    self.clock = Clock()
    self.last: dict[str, float] = {}  # figures of the newest step that was read

  def dispatched(self, step: int, sums: dict[str, jax.Array]) -> None:
    """Stores the figures of the update that was just dispatched, and logs the figures of the update before it."""
    self.catch_up()
    self._pending = (step, sums)

  def catch_up(self) -> None:
    """Waits for the last dispatched update and logs its figures.

    Raises TrainingError if the loss or the gradient norm isn't finite, or if a target isn't a token of the vocabulary.
    """
    if self._pending is None:
      return
    (step, sums), self._pending = self._pending, None
    sums = jax.device_get(sums)
    step_s, wait = self.clock.lap()
    figures = score.means(sums)
    self._check(step, sums, figures)
    self.last = {
      **{f'train/{name}': value for name, value in figures.items()},
      **{f'train/{name}': float(sums[name]) for name in ('grad_norm', 'router_bias_min', 'router_bias_max')
         if name in sums},
      'train/lr': float(self._rate(step - 1)),
      'time/step_s': step_s,
      'time/tokens_per_s': figures['tokens'] / step_s,
      'time/input_wait_share': wait,
      **device_figures(self._flops_per_step / step_s),
    }
    self._log.train(step, self.last)

  def _check(self, step: int, sums: dict[str, Any], figures: dict[str, float]) -> None:
    if sums['invalid']:
      raise TrainingError(f'step {step}: {int(sums["invalid"])} targets are no tokens of the vocabulary')
    if not math.isfinite(figures['loss_nats']) or not math.isfinite(sums['grad_norm']):
      good = self._checkpoints.latest
      good = f'the last good checkpoint is {self._checkpoints.path / str(good)}' if good else 'no checkpoint yet'
      raise TrainingError(f'step {step}: loss is {figures["loss_nats"]}, gradient norm {float(sums["grad_norm"])}; '
                          f'{good}')


def device_figures(flops_per_s: float) -> dict[str, float]:
  """Returns MFU at this rate of model FLOPs over all devices, and the peak memory, where the device tells."""
  found, peak = {}, peak_flops(jax.devices()[0])
  if peak:
    found['time/mfu'] = flops_per_s / peak / jax.device_count()
  memory = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in memory:
    found['time/hbm_bytes'] = memory['peak_bytes_in_use']
  return found


def validate(run: RunConfig, feed: Feed, evaluate, state: TrainState, step: int, log: Log) -> None:
  """Logs the figures of each source's validation split, if there is one."""
  if not run.data.validation_fraction:
    return
  for source in run.data.sources:
    sums: dict[str, Any] = {}
    for batch in data.validation_batches(run.data, source, batch_size=run.rows, count=run.log.eval_batches,
                                         process_index=feed.process, process_count=feed.processes):
      sums = score.add(sums, jax.device_get(evaluate(state, feed.to_devices(batch))))
    figures = score.means(sums)
    log.evaluation(step, source, figures, describe_evaluation(source, figures))


class Texts:
  """A few texts by the model as it is, to look at while it trains: continuations of the beginnings of training rows."""

  def __init__(self, run: RunConfig, tokenizer: data.Tokenizer, mesh: Mesh):
    self._count, self._seed, self._tokenizer = run.log.samples, run.seed, tokenizer
    ways = math.prod(mesh.shape[axis] for axis in setup.BATCH_AXES)
    size = -(-max(self._count, 1) // ways) * ways
    self._sampler = Sampler(run.model, SamplerConfig(size, PROMPT_TOKENS, run.log.sample_tokens), tokenizer.eos, mesh)

  def write(self, params: Any, batch: data.Batch, step: int, log: Log) -> None:
    """Samples at temperature 1 and logs prompt and continuation. Every process must call."""
    if not self._count:
      return
    prompt_BP = np.asarray(batch.tokens_BT)[: self._count, :PROMPT_TOKENS]
    if jax.process_count() > 1:  # each has rows of its own
      prompt_BP = multihost_utils.broadcast_one_to_all(prompt_BP)
    prompts = [Prompt(i, prompt_P.tolist()) for i, prompt_P in enumerate(prompt_BP)]
    texts = {}
    for [sample] in self._sampler(params, prompts, samples=1, seed=self._seed, step=step):
      texts[sample.prompt_id] = self._tokenizer.decode(sample.tokens[:-1] if sample.finish == 'eos' else sample.tokens)
    for prompt in prompts:
      log.sample(step, self._tokenizer.decode(prompt.tokens), texts[prompt.id])


def describe_objective(objective: ObjectiveConfig) -> str:
  """Returns what differs from plain cross-entropy, for the log's header."""
  changed = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)
             if getattr(objective, field.name) != field.default}
  k = changed.pop('top_k', objective.top_k)
  shaping = ', '.join(f'{name} {value}' for name, value in changed.items()) or 'plain cross-entropy'
  return f'{shaping} (head and tail metrics use top-k = {k})'
