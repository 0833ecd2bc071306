"""Policy gradient on verifiable rewards, top to bottom. A step is four functions, in this order:

    sample_and_judge   draws groups of samples and their verdicts; zero-variance groups are replaced by new prompts
    minibatches        lays the samples into rows, with their advantages
    learn              updates the policy, once per minibatch
    describe_step      computes the figures that are logged

The paper's recipe by default (arXiv 2512.22955, appendix B.1): on-policy GRPO, clip-higher, dynamic sampling, 16
samples per prompt at temperature 1, constant learning rate, no KL term. What a step draws depends on (parameters, seed,
step, prompt numbers) alone, and the checkpoint holds the number of prompts consumed, so a killed run resumes exactly.

# P prompts  G samples per prompt  B = P·G rows  T tokens
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from betarank import data, model
from betarank.configs.errors import ConfigError, UserError
from betarank.rl import policy_losses
from betarank.rl.advantages import advantages
from betarank.rl.config import RlConfig, RlRun, rl_run
from betarank.rl.rollout import Group, check_prompts, graded_groups, lengths, pack
from betarank.rl.update import cov_tokens, make_update
from betarank.rl.warnings import warnings
from betarank.runtime import checkpoint, job, multihost, workdir
from betarank.runtime.metrics import Log, duration
from betarank.runtime.profile import Profile
from betarank.runtime.state import TrainState, abstract_state
from betarank.runtime.stop import StopSignal
from betarank.tasks.code_jail import Jail
from betarank.tasks.task_set import TaskSet
from betarank.tasks.verifiers import Verdict, Verifier
from betarank.train import score, setup
from betarank.train.config import first_and_last
from betarank.train.optimizer import make_optimizer
from betarank.train.sampler import Sampler, SamplerConfig

HELD_OUT_STEP = 2**31  # added to the step number, so that evaluation draws other samples than training
COV_STREAM = 3  # fold_in(seed, stream, step, update); the sampler has 2
HIGH_ENTROPY_SHARE = 0.2  # of tokens: where reasoning forks (arXiv 2506.01939)
SAME_FUNCTION = ('heads', 'kv_heads', 'rope_base', 'norm_eps')  # model settings that no array's shape shows


class RlError(UserError):
  """The error for failed RL. Its message is one line that names the step and the newest good checkpoint."""


@dataclasses.dataclass(frozen=True)
class Parts:
  """The objects that the functions of a step share. None of them changes during a run.

  Attributes:
    samplers: one per phase.
    update: see `make_update`.
    log_probabilities: jitted `score.log_probabilities`.
    rows_by_token, rows: shardings of [B, T] and of [B] arrays.
    reference: parameters that the KL term refers to, or None.
  """

  run: RlRun
  tokenizer: data.Tokenizer
  tasks: TaskSet
  evaluated: dict[str, TaskSet]
  verifier: Verifier
  samplers: list[Sampler]
  update: Callable
  log_probabilities: Callable
  rows_by_token: NamedSharding
  rows: NamedSharding
  reference: Any


def train(config: ConfigDict, path: str, fallback: bool = False) -> dict[str, float]:
  """Runs `config` in the workdir `path` to its last step, resuming from the workdir's newest checkpoint if it has one.

  fallback: moves a damaged newest checkpoint aside, and resumes from the newest good one.

  Returns the figures of the last step. Raises ConfigError, data.DataError or CheckpointError before any device work if
  something doesn't fit, RlError if the run itself fails.
  """
  run, root = rl_run(config), epath.Path(path)
  rl = run.rl
  workdir.check_config(root, config)
  parent = setup.parent_meta(root, run.train.init_from)
  setup.check_same_function(run.model, parent, SAME_FUNCTION)
  tokenizer_path = run.data.tokenizer or setup.trained_tokenizer(parent)
  tokenizer = setup.read_tokenizer(tokenizer_path, run.model, parent)
  check_held_out(rl, parent)
  evaluated = evaluation_sets(run)
  tasks = TaskSet(rl.task, seed=run.seed, exclude=frozenset().union(*(
    found.hashes(min(rl.eval_prompts, found.size or rl.eval_prompts)) for found in evaluated.values())))
  long = check_prompts(tokenizer, tasks, rl.max_prompt_tokens)
  if long and rl.long_prompts == 'refuse':
    raise ConfigError(f'config.rl.max_prompt_tokens: {long}; raise it, or leave them out with '
                      '--config.rl.long_prompts=skip')
  mesh = setup.make_mesh(run.mesh, run.model, run.split_rows)

  # Before any device work: not every system can run programs safely.
  jail = Jail(rl.code, 'config.rl.code') if rl.task.uri.startswith('code:') else None

  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    stop = stack.enter_context(StopSignal(jax.process_count()))
    verifier = stack.enter_context(Verifier(rl.verifier, jail))
    checkpoints = stack.enter_context(setup.open_checkpoints(root, run.checkpoint, fallback))
    tx = make_optimizer(run.optimizer, run.updates, model.abstract(run.model)[2])
    beginning = setup.begin(run.model, tx, mesh, checkpoints, seed=run.seed, init_from=run.train.init_from)
    state, start = beginning.state, beginning.step
    cursor = beginning.cursor['prompts'] if beginning.cursor and start else 0
    log = stack.enter_context(contextlib.closing(setup.open_log(
      root, config, start=start, steps=run.steps, every=run.log.every_steps, tensorboard=run.log.tensorboard,
      describe=describe_line)))
    setup.log_header(log, {
      'model': setup.describe_model(run.model),
      'task': f'{rl.task.uri}; {rl.prompts_per_step} prompts x {rl.group_size} samples per step, '
              f'{rl.advantage.name} with {rl.loss.name}',
      'left out': '; '.join(filter(None, (tasks.describe_left_out(), long))) or 'no problem',
      'mesh': setup.describe_mesh(mesh),
      'run': setup.describe_length(beginning, run.steps, root)})
    parts = Parts(
      run, tokenizer, tasks, evaluated, verifier, make_samplers(run, tokenizer, mesh),
      make_update(run.model, rl.loss, tx, run.microbatches, rl.temperature),
      jax.jit(functools.partial(score.log_probabilities, temperature=rl.temperature), static_argnums=0),
      NamedSharding(mesh, model.spec('batch', 'length')), NamedSharding(mesh, model.spec('batch')),
      _reference(run, tx, mesh, beginning.parent) if rl.loss.kl_weight else None)
    lineage = setup.lineage(config, beginning, tokenizer, tokenizer_path)
    profile = Profile(root, first_and_last(run.log.profile_steps))
    last: dict[str, float] = {}
    history: list[dict[str, float]] = []
    warned: set[str] = set()

    if not start:
      evaluate(parts, state.params, 0, log)
    for step in range(start + 1, run.steps + 1):
      with profile.at(step):
        began = time.perf_counter()
        kept, seen, cursor = sample_and_judge(parts, state.params, cursor, step)
        sampled = time.perf_counter()
        state, learned = learn(parts, state, minibatches(parts, kept, step), step)
        ended = time.perf_counter()
      if not all(math.isfinite(learned.get(name, 0.0)) for name in ('policy_loss', 'grad_norm')):
        raise RlError(f'step {step}: loss is {learned["policy_loss"]}, gradient norm {learned["grad_norm"]}; '
                      f'the last good checkpoint is {checkpoints.path / str(checkpoints.latest)}')
      last = {**describe_step(learned, kept, seen), 'time/step_s': ended - began, 'time/rollout_s': sampled - began,
              'time/update_s': ended - sampled,
              'time/tokens_per_s': sum(len(s.tokens) for group in seen for s in group.samples) / (sampled - began)}
      log.train(step, last)
      history.append(last)
      for kind, text in warnings(history).items():
        if kind not in warned:
          log.say(f'warning: {text}')
          warned.add(kind)
      checkpoints.check()
      job.note_step(step)
      due = setup.due(step, run.steps, stopping=stop(step), eval_every=run.log.eval_every_steps,
                      save_every=run.checkpoint.every_steps)
      if due.evaluate:  # before saving: all that belongs to a step is written before its checkpoint is
        evaluate(parts, state.params, step, log)
      if due.save:
        log.flush()
        checkpoints.save(state, {**lineage, 'cursor': {'prompts': cursor}}, step)
      if due.stop:
        setup.stopped(log, checkpoints, step, stop)
    checkpoints.wait()
  return last


def make_samplers(run: RlRun, tokenizer: data.Tokenizer, mesh: Mesh) -> list[Sampler]:
  """Returns the sampler of each phase; they differ in the longest answer."""
  rl = run.rl
  settings = [SamplerConfig(rl.decode_batch_size, rl.max_prompt_tokens, new, rl.temperature, record_choices=True,
                            cache_tokens=rl.cache_tokens)
              for new in rl.max_new_tokens]
  try:
    return [Sampler(run.model, s, tokenizer.eos, mesh) for s in settings]
  except ValueError as error:
    raise ConfigError(f'config.rl.{error}') from None


def sample_and_judge(parts: Parts, params: Any, cursor: int, step: int) -> tuple[list[Group], list[Group], int]:
  """Returns (groups to learn from, all groups drawn, number of prompts consumed so far).

  Groups whose rewards don't vary are replaced by the next prompts, in `rl.max_resampling_rounds` draws, the first
  included (dynamic sampling: DAPO, arXiv 2503.14476 section 3.2). Groups are judged while the device draws on.
  """
  rl, kept, seen = parts.run.rl, [], []
  rule = rl.reward_rule(step)
  for _ in range(rl.max_resampling_rounds):
    wanted = rl.prompts_per_step - len(kept)
    if not wanted:
      break
    groups = graded_groups(
      parts.samplers[rl.phase(step)], params, parts.verifier, parts.tokenizer, parts.tasks,
      range(cursor, cursor + wanted), samples=rl.group_size, seed=parts.run.seed, step=step,
      long_prompts=rl.long_prompts)
    cursor += wanted
    seen += groups
    kept += [group for group in groups if rl.keeps_zero_variance or group.has_reward_variance(rule)]
  return kept, seen, cursor


@dataclasses.dataclass(frozen=True)
class Minibatch:
  """The rows of one update, on the devices, and which tokens count.

  Attributes: as `make_update` names them; counts_BT is also there on the host.
  """

  batch: data.Batch
  counts_BT: jax.Array
  sampler_logp_BT: jax.Array
  advantages_B: jax.Array
  choices_BTLk: jax.Array | None
  counted_BT: np.ndarray


def minibatches(parts: Parts, groups: list[Group], step: int) -> list[Minibatch]:
  """Returns the rows of each update of a step, with advantages; [] if there is no group to learn from."""
  if not groups:
    return []
  rl = parts.run.rl
  rows = rl.prompts_per_step * rl.group_size
  longest = rl.max_prompt_tokens + rl.max_new_tokens[rl.phase(step)]
  needed = max(lengths(groups))
  length = next(n for n in (-(-longest // 4), -(-longest // 2), longest) if n >= needed)  # three shapes at most
  out = pack(groups, prompts=rl.prompts_per_step, samples=rl.group_size, length=length,
             rule=rl.reward_rule(step))
  advantage_B = np.asarray(advantages(rl.advantage, out.rewards_PG, out.valid_PG)).reshape(rows)
  # The tokens of a sample that doesn't count are not in the mean either.
  counts_BT = out.completion_BT & out.valid_PG.reshape(rows, 1)
  found = []
  for at in range(0, rows, rl.rows):
    these = slice(at, at + rl.rows)
    put = lambda x, these=these: multihost.replicated_to_global(
      x[these], parts.rows_by_token if x.ndim == 2 else parts.rows)
    on_devices = jax.tree.map(put, (out.batch, counts_BT, out.sampler_logp_BT, advantage_B, out.choices_BTLk))
    found.append(Minibatch(*on_devices, counts_BT[these]))
  return found


def learn(
  parts: Parts, state: TrainState, batches: list[Minibatch], step: int
) -> tuple[TrainState, dict[str, float]]:
  """Returns (new state, figures), after one update per minibatch. Without a minibatch the state stays as it is, the
  optimizer's moments included, and there are no figures.
  """
  run, rl = parts.run, parts.run.rl
  if not batches:
    return state, {}
  off_policy = rl.minibatches > 1
  # Before the first update, by the policy that drew the samples: all updates of this step refer to it.
  old = [parts.log_probabilities(run.model, state.params, b.batch, b.choices_BTLk)[0]
         if off_policy or rl.loss.cov else None for b in batches]
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(run.seed), COV_STREAM), step)
  total, entropies = {}, []
  for m, (b, old_logp_BT) in enumerate(zip(batches, old)):
    ref_logp_BT = parts.log_probabilities(run.model, parts.reference, b.batch)[0] if rl.loss.kl_weight else None
    chosen_BT = None
    if rl.loss.cov:
      chosen_BT = cov_tokens(rl.loss, jax.random.fold_in(key, m), old_logp_BT, b.advantages_B, b.counts_BT)
    with jax.transfer_guard('disallow'):  # forbids implicit transfers to or from the host
      state, sums, entropy_BT = parts.update(
        state, b.batch, b.counts_BT, b.sampler_logp_BT, b.advantages_B, old_logp_BT if off_policy else None,
        ref_logp_BT, chosen_BT, b.choices_BTLk)
    sums = jax.device_get(sums)
    total = policy_losses.add(total, sums) if total else sums
    entropies.append(np.asarray(entropy_BT)[b.counted_BT])
  figures = {name: float(value) for name, value in policy_losses.means(rl.loss, total).items()}
  figures |= {name: float(total[key]) / rl.minibatches
              for name, key in (('policy_loss', 'loss'), ('grad_norm', 'grad_norm'))}
  figures['entropy_nats'] = float(total['entropy']) / max(int(total['tokens']), 1)
  entropy_N = np.sort(np.concatenate(entropies))
  if entropy_N.size:
    figures['entropy_top20_nats'] = float(entropy_N[-max(1, round(HIGH_ENTROPY_SHARE * entropy_N.size)):].mean())
  return state, figures


def check_held_out(rl: RlConfig, parent: dict[str, Any]) -> None:
  """Raises ConfigError if held-out problems of this run can be in the documents that its parent was trained on."""
  documents = setup.whole_config(parent).get('data', {})
  made = any(source['uri'].startswith('reasoning') for source in documents.get('sources', {}).values())
  left_out = documents.get('held_out_fraction', 0.0)
  if made and rl.task.uri.startswith('reasoning') and rl.task.held_out_fraction > left_out:
    raise ConfigError(f'config.rl.task.held_out_fraction must be at most {left_out}, what the documents of the '
                      f'pre-training left out (data.held_out_fraction), got {rl.task.held_out_fraction}')


def evaluation_sets(run: RlRun) -> dict[str, TaskSet]:
  """Returns the problems that the policy is evaluated on, by name: those held out of the task, and `rl.eval_tasks`."""
  rl, found = run.rl, {}
  if rl.task.held_out_fraction:
    found['held_out'] = TaskSet(rl.task, seed=run.seed, split='held_out')
  for name, uri in rl.eval_tasks.items():
    found[name] = TaskSet(dataclasses.replace(rl.task, uri=uri), seed=run.seed, split='all')
  return found


def evaluate(parts: Parts, params: Any, step: int, log: Log) -> None:
  """Samples the problems of each evaluation set; logs the share of right answers, its standard error, and some texts.
  """
  for name, tasks in parts.evaluated.items():
    _evaluate(parts, params, name, tasks, step, log)


def _evaluate(parts: Parts, params: Any, name: str, tasks: TaskSet, step: int, log: Log) -> None:
  run, rl = parts.run, parts.run.rl
  groups = graded_groups(
    parts.samplers[rl.phase(max(step, 1))], params, parts.verifier, parts.tokenizer, tasks,
    range(min(rl.eval_prompts, tasks.size or rl.eval_prompts)), samples=rl.eval_samples, seed=run.seed,
    step=HELD_OUT_STEP + step, long_prompts=rl.long_prompts)
  rates = [np.mean([v == Verdict.RIGHT for v in group.verdicts if v != Verdict.UNDECIDED] or [0]) for group in groups]
  error = float(np.std(rates, ddof=1) / math.sqrt(len(rates))) if len(rates) > 1 else float('nan')
  log.evaluation(
    step, name, {f'avg_at_{rl.eval_samples}': float(np.mean(rates)), 'standard_error': error},
    f'  eval {name}: Avg@{rl.eval_samples} {np.mean(rates):.3f} ± {error:.3f} over {len(groups)} problems')
  for group in groups[: run.log.samples]:
    log.sample(step, group.task.prompt, group.texts[0])


def describe_step(learned: dict[str, float], kept: list[Group], seen: list[Group]) -> dict[str, float]:
  """Returns a step's figures under the names of the log: those of the update, if there was one, and those of all
  samples that were drawn, before zero-variance groups were dropped.
  """
  verdicts = [verdict for group in seen for verdict in group.verdicts]
  samples = [sample for group in seen for sample in group.samples]
  tokens = sum(len(sample.tokens) for sample in samples)
  decided = max(sum(v != Verdict.UNDECIDED for v in verdicts), 1)
  found = {
    **learned,
    # -log p of a token, by the distribution it was drawn from, is an unbiased estimate of that distribution's entropy.
    'entropy_drawn_nats': -sum(float(sample.logp.sum(dtype=np.float64)) for sample in samples) / tokens,
    'pass_rate': sum(v == Verdict.RIGHT for v in verdicts) / decided,
    'undecided': float(sum(v == Verdict.UNDECIDED for v in verdicts)),
    'zero_variance_groups': 1 - len(kept) / len(seen),
    'groups_learned_from': float(len(kept)),
    'length_tokens': float(np.mean([len(sample.tokens) for sample in samples])),
    'truncated_share': float(np.mean([sample.finish == 'length' for sample in samples])),
  }
  return {f'train/{name}': value for name, value in found.items()}


def describe_line(step: int, steps: int, values: dict[str, float], eta_s: float) -> str:
  """Returns the line of a step for a person."""
  v = {name.split('/', 1)[1]: value for name, value in values.items()}
  learned = (f'entropy {v["entropy_nats"]:.3f}  |g| {v["grad_norm"]:.2f}  gap {v["sampler_gap_mean"]:.1e}'
             if 'grad_norm' in v else 'no update: all groups have zero variance')
  return (f'step {step:>{len(str(steps))}}/{steps}  pass {v["pass_rate"]:.3f}  zero-variance groups '
          f'{100 * v["zero_variance_groups"]:.0f}%  {learned}  length {v["length_tokens"]:.1f}  truncated '
          f'{100 * v["truncated_share"]:.0f}%  {v["tokens_per_s"]:,.0f} tok/s drawn  eta {duration(eta_s)}')


def _reference(run: RlRun, tx, mesh: Mesh, parent: str) -> Any:
  """Returns the weights that the run started from, for the KL term; from disk, as the state moves away from them."""
  return checkpoint.restore_weights(epath.Path(parent), abstract_state(run.model, tx, mesh).params)[0]
