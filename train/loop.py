"""Runs pre-training: sets up the run, restores its state, and repeats the update.

Step n is dispatched before the figures of step n-1 are read, so the device never waits while the host logs.
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
from betarank.configs.steps import planned_steps
from betarank.configs.stop import StopSignal
from betarank.data import prepared
from betarank.data.tokenizer import find as tokenizer_file
from betarank.objectives import ObjectiveConfig
from betarank.runtime import checkpoint, job, multihost, wandb_board, workdir
from betarank.runtime.metrics import Clock, Log, describe_evaluation, peak_flops
from betarank.runtime.profile import Profile
from betarank.runtime.state import TrainState
from betarank.train import score, setup
from betarank.train.config import RunConfig, first_and_last, run_config
from betarank.train.inherit import describe_rope
from betarank.train.optimizer import decay_start, make_optimizer, schedule
from betarank.train.sampler import Prompt, Sampler, SamplerConfig
from betarank.train.step import make_evaluate, make_step

PROMPT_TOKENS = 12  # a logged text continues so many tokens of a training row


class TrainingError(UserError):
  """Raised if training fails. The message is one line that names the step and, for a loss that isn't finite, the newest
  good checkpoint.
  """


def inputs(config: ConfigDict) -> dict[str, str]:
  """Returns {description: path} of the files whose content must be the same for all processes of a run."""
  c = run_config(config).data
  manifests = {f'data manifest of {name}': str(prepared.folder(c, name) / 'manifest.json') for name in c.sources}
  return {'tokenizer': str(tokenizer_file(c.tokenizer_path)), **manifests}


def train(config: ConfigDict, path: str, fallback: bool = False) -> dict[str, float]:
  """Trains a model in the workdir `path`. If the workdir has a checkpoint, resumes from the newest one.

  fallback: if the newest checkpoint is damaged, moves it aside and resumes from the newest good checkpoint.

  Returns the figures of the last step.

  Raises:
    ConfigError, DataError, CheckpointError: the settings, the data or a checkpoint can't be used.
    TrainingError: the loss or the gradient norm isn't finite, or a target isn't a token of the vocabulary.
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
  setup.check_length('data.sequence_length', run.sequence_length, run.model, mesh)

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
      'rope': describe_rope(run.model, parent),
      'objective': describe_objective(run.objective),
      'data': f'{", ".join(f"{name} ({source.uri})" for name, source in run.data.sources.items())} in {run.data.dir}',
      'mesh': setup.describe_mesh(mesh),
      'run': f'{setup.describe_length(beginning, run.steps, root)}, {run.tokens_per_step:,} tokens per step'})
    if start == run.steps:
      log.say('nothing to do; a larger config.train.tokens continues the run, another --workdir starts a new one')
    update = make_step(run.model, run.objective, tx, tokenizer.bytes_per_token_V, run.microbatches,
                       'full' if run.log.head_tail_mass else 'basic')
    evaluate = make_evaluate(run.model, run.objective, tokenizer.bytes_per_token_V)
    texts = Texts(run, tokenizer, mesh)
    recorder = Recorder(run, log, checkpoints)
    lineage = setup.lineage(config, beginning, tokenizer, run.data.tokenizer_path)
    profile = stack.enter_context(contextlib.closing(Profile(root, first_and_last(run.log.profile_steps))))

    setup.stopped_before(log, start, stop)
    for step in range(start + 1, run.steps + 1):
      with recorder.clock.waiting():
        batch = next(feed)
      with profile.at(step):
        placed = feed.to_devices(batch)
        with setup.no_implicit_transfers():
          state, sums = update(state, placed)
          recorder.dispatched(step, sums)
      checkpoints.check()
      job.note_step(step)
      due = setup.due(step, run.steps, stopping=stop(), eval_every=run.log.eval_every_steps,
                      save_every=run.checkpoint.every_steps)
      if due.save or due.evaluate:
        recorder.catch_up()  # fails if the loss isn't finite, so that such a state is never saved
        with recorder.clock.apart():
          if due.evaluate:  # before saving, so that a checkpoint exists only if all else of its step was written
            validate(run, feed, evaluate, state, step, log)
            texts.write(state.params, batch, step, log)
          if due.save:
            log.flush()
            checkpoints.save(state, {**lineage, 'cursor': feed.cursor}, step)
      if due.stop:
        setup.stopped(log, checkpoints, step, stop)
    checkpoints.wait()
    setup.finished(log, root, config, run.steps, beginning.parent, run.steps * run.tokens_per_step)
  return recorder.last


def check_budget(run: RunConfig, root: epath.Path, meta: dict[str, Any]) -> None:
  """Raises ConfigError if the run that this one continues can't continue with the token budget of this config.

  This run continues the run in the workdir `root`. If the workdir has no checkpoint, it continues the run of
  `train.init_from` if `train.init_what` is 'all', else none. It can't do so in three cases:

  - The run has already done more steps than the budget allows. In a new workdir, at least one step must be left,
    because otherwise nothing would be saved there.
  - The budget is larger than before, but the learning rate has already begun to decay. The larger budget would raise
    the learning rate again.
  - The run is one of `betarank rl`.

  meta: the metadata of the newest checkpoint of the continued run whose metadata isn't damaged.
  """
  if steps := checkpoint.steps(root / 'checkpoints'):
    what, folder, most, way = root, root / 'checkpoints', run.steps, 'choose another workdir, or at least'
  elif run.train.init_from and run.train.init_what == 'all':
    what = checkpoint.find(run.train.init_from)
    if 'rl' in meta['config']:
      raise ConfigError(f'config.train.init_what=all continues a run of betarank train, but {what} is of betarank rl; '
                        'choose config.train.init_what=weights')
    folder, most, way = what.parent, run.steps - 1, 'choose config.train.init_what=weights, or more than'
    steps = checkpoint.steps(folder) if what.name.isdigit() else []
  else:
    return
  reached, before = meta['step'], meta['config']['train']['tokens']
  if reached > most:
    raise ConfigError(f'config.train.tokens: {run.train.tokens} make {run.steps} steps, but {what} has reached step '
                      f'{reached}; {way} {reached * run.tokens_per_step} tokens')
  planned = planned_steps(meta['config'])
  schedule_before = {key: meta['config'].get('optimizer', {}).get(key, getattr(run.optimizer, key))
                     for key in ('warmup_steps', 'decay_fraction')}
  decays = decay_start(dataclasses.replace(run.optimizer, **schedule_before), planned)
  if run.steps > planned and reached > decays:
    kept = [step for step in steps if step <= decays]
    way = (f'start from the checkpoint before the decay in another workdir: --config.train.init_from='
           f'{folder}/{kept[-1]} --config.train.init_what=all' if kept else
           'no checkpoint from before the decay was kept (config.checkpoint.keep_every_steps keeps some for good)')
    raise ConfigError(f'config.train.tokens: {what} has been lowering its learning rate since step {decays}, by its '
                      f'budget of {before} tokens, and a larger budget would raise it again; {way}')


class Feed(Iterator[data.Batch]):
  """Iterates over the batches of a run, and moves them to the devices. Each process reads only its own rows."""

  def __init__(self, run: RunConfig, mesh: Mesh, cursor: dict[str, Any] | None):
    self._placement, self._rows = NamedSharding(mesh, model.spec('batch', 'length')), run.rows
    self.process, self.processes = multihost.row_share(self._placement, run.rows, run.sequence_length)
    self._batches = data.TrainBatches(run.data, batch_size=run.rows, seed=run.seed, process_index=self.process,
                                      process_count=self.processes, cursor=cursor)

  def __next__(self) -> data.Batch:
    return next(self._batches)

  def to_devices(self, batch: data.Batch) -> data.Batch:
    """Returns the global batch on the devices. Each process passes its own rows."""
    return multihost.local_to_global(batch, self._placement, self._rows)

  @property
  def cursor(self) -> dict[str, Any]:
    """The position in the data, as a JSON value. It determines the next batch."""
    return self._batches.cursor

  def close(self) -> None:
    self._batches.close()


class Recorder:
  """Logs the figures of each update. The figures are read while the next update runs."""

  def __init__(self, run: RunConfig, log: Log, checkpoints: checkpoint.Checkpoints):
    self._log, self._checkpoints = log, checkpoints
    # All learning rates are computed here. To compute one later, the host would wait for the updates in between.
    self._rates = jax.device_get(jax.jit(jax.vmap(schedule(run.optimizer, run.steps)))(np.arange(run.steps)))
    self._flops_per_step = model.flops_per_token(run.model, run.sequence_length) * run.tokens_per_step
    self._pending: tuple[int, dict[str, jax.Array]] | None = None
    self.clock = Clock()
    self.last: dict[str, float] = {}  # the figures of the newest step that was logged

  def dispatched(self, step: int, sums: dict[str, jax.Array]) -> None:
    """Keeps the sums of the update that was just dispatched, and logs the figures of the update before it."""
    self.catch_up()
    self._pending = (step, sums)

  def catch_up(self) -> None:
    """Waits for the last dispatched update, and logs its figures.

    Raises:
      TrainingError: the loss or the gradient norm isn't finite, or a target isn't a token of the vocabulary.
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
      'train/lr': float(self._rates[step - 1]),
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
      raise TrainingError(f'step {step}: loss is {figures["loss_nats"]}, gradient norm {float(sums["grad_norm"])}; '
                          f'{self._checkpoints.describe()}')


def device_figures(flops_per_s: float) -> dict[str, float]:
  """Returns time/mfu (model FLOPs utilization) and time/hbm_bytes (peak memory).

  A figure that is unknown for this kind of device is left out.

  flops_per_s: model FLOPs per second, over all devices. The caller counts causal attention over whole rows. If rows
    hold several documents, kernels skip the attention between them, and time/mfu counts more FLOPs than are computed.
  """
  found, peak = {}, peak_flops(jax.devices()[0])
  if peak:
    found['time/mfu'] = flops_per_s / peak / jax.device_count()
  memory = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in memory:
    found['time/hbm_bytes'] = memory['peak_bytes_in_use']
  return found


def validate(run: RunConfig, feed: Feed, evaluate, state: TrainState, step: int, log: Log) -> None:
  """Logs the figures of the validation split of each source. Does nothing if data.validation_fraction is 0."""
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
  """Logs a few texts in which the current model continues the first tokens of training rows."""

  def __init__(self, run: RunConfig, tokenizer: data.Tokenizer, mesh: Mesh):
    self._count, self._seed, self._tokenizer = run.log.samples, run.seed, tokenizer
    size = -(-max(self._count, 1) // mesh.size) * mesh.size  # a multiple of the devices, whatever the sampler's mesh
    self._sampler = Sampler(run.model, SamplerConfig(size, PROMPT_TOKENS, run.log.sample_tokens), tokenizer.eos, mesh)

  def write(self, params: Any, batch: data.Batch, step: int, log: Log) -> None:
    """Samples continuations at temperature 1, and logs them together with their prompts. Every process must call this.
    """
    if not self._count:
      return
    prompt_BP = np.asarray(batch.tokens_BT)[: self._count, :PROMPT_TOKENS]
    if jax.process_count() > 1:  # each process has other rows
      prompt_BP = multihost_utils.broadcast_one_to_all(prompt_BP)
    prompts = [Prompt(i, prompt_P.tolist()) for i, prompt_P in enumerate(prompt_BP)]
    texts = {}
    for [sample] in self._sampler(params, prompts, samples=1, seed=self._seed, step=step):
      texts[sample.prompt_id] = self._tokenizer.decode(sample.text_tokens)
    for prompt in prompts:
      log.sample(step, self._tokenizer.decode(prompt.tokens), texts[prompt.id])


def describe_objective(objective: ObjectiveConfig) -> str:
  """Returns a line for the log header, which describes the objective.

  The line has the settings in which the objective differs from plain cross-entropy, and k, the size of the head.
  """
  changed = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)
             if getattr(objective, field.name) != field.default}
  k = changed.pop('top_k', objective.top_k)
  shaping = ', '.join(f'{name} {value}' for name, value in changed.items()) or 'plain cross-entropy'
  return f'{shaping} (head and tail metrics use top-k = {k})'
