"""Runs RL with verifiable rewards. A step calls four functions, in this order:

    sample_and_judge   draws groups of samples and judges them; replaces zero-variance groups by groups of new prompts
    minibatches        computes advantages, and packs the samples into rows of microbatches
    learn              updates the policy, once per minibatch
    describe_step      computes the figures to log

The default is the paper's recipe (arXiv 2512.22955, appendix B.1): on-policy GRPO, clip-higher, dynamic sampling, 16
samples per prompt at temperature 1, a constant learning rate, and no KL term.

The samples of a step depend only on the parameters, the seed, the step and the prompt numbers. The checkpoint holds the
number of prompts used so far, so a killed run resumes exactly.

# B rows  T tokens
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from betarank import data, model
from betarank.configs.errors import ConfigError, UserError
from betarank.configs.stop import StopSignal
from betarank.data.reasoning import question_hash
from betarank.rl import entropy, packing, policy_losses
from betarank.rl.config import RlConfig, RlRun, rl_run
from betarank.rl.packing import Answer, Microbatch
from betarank.rl.progress import Best, Progress
from betarank.rl.rollout import Group, check_prompts, graded_groups, prompt_tokens
from betarank.rl.update import Update, cov_tokens, make_update
from betarank.rl.warnings import needed, warnings
from betarank.runtime import checkpoint, job, wandb_board, workdir
from betarank.runtime.metrics import Log, lines_of
from betarank.runtime.profile import Profile
from betarank.runtime.state import TrainState, abstract_state
from betarank.tasks import task_set
from betarank.tasks.code_jail import Jail
from betarank.tasks.task_set import Task, TaskSet
from betarank.tasks.verifiers import Verdict, Verifier
from betarank.train import score, setup
from betarank.train.config import first_and_last
from betarank.train.optimizer import make_optimizer
from betarank.train.sampler import Sampler, SamplerConfig

HELD_OUT_STEP = 2**31  # added to the step number, so that evaluation and training use different random numbers
COV_STREAM = 3  # the random stream of cov_tokens: fold_in(seed, stream, step, update). The sampler uses stream 2.
HIGH_ENTROPY_SHARE = 0.2  # the share of tokens at which reasoning branches (arXiv 2506.01939)
# Model settings that array shapes don't show.
SAME_FUNCTION = ('heads', 'kv_heads', 'rope_base', 'rope_factor', 'norm_eps')


class RlError(UserError):
  """Raised if RL fails. The message is one line that names the step and the newest good checkpoint."""


@dataclasses.dataclass(frozen=True)
class Parts:
  """The objects that the functions of a step share. They don't change during a run.

  Attributes:
    evaluated: the problems to evaluate on, by name of their set.
    samplers: one sampler per phase.
    update: the result of `make_update`.
    log_probabilities: the jitted function `score.log_probabilities`.
    rows_by_token: the sharding of arrays [B, T].
    reference: the parameters of the KL reference, or None.
  """

  run: RlRun
  tokenizer: data.Tokenizer
  tasks: TaskSet
  evaluated: dict[str, list[Task]]
  verifier: Verifier
  samplers: list[Sampler]
  update: Update
  log_probabilities: Callable
  rows_by_token: NamedSharding
  reference: Any


def inputs(config: ConfigDict) -> dict[str, str]:
  """Returns {description: path} of the files whose content must be the same for all processes of a run."""
  rl = rl_run(config).rl
  problems = [path for uri in (rl.task.uri, *rl.eval_tasks.values()) for path in task_set.files(uri)]
  rewards = [rl.task.reward_file] if rl.task.reward_file else []
  return {f'problems {path}': path for path in problems} | {f'reward {path}': path for path in rewards}


def train(config: ConfigDict, path: str, fallback: bool = False) -> dict[str, float]:
  """Trains a model in the workdir `path`. If the workdir has a checkpoint, resumes from the newest one.

  fallback: whether to move the newest checkpoint aside if it is damaged, and to resume from the newest good checkpoint.

  Returns the figures of the last step.

  Raises:
    ConfigError, DataError, CheckpointError: the settings, the problems, the reward function or a checkpoint can't be
      used.
    JailError, VerifierError: programs can't be run safely, or the processes that grade answers can't be started.
    RlError: the loss or the gradient norm isn't finite.
  """
  run, root = rl_run(config), epath.Path(path)
  rl = run.rl
  workdir.check_config(root, config)
  wandb_board.check(run.log.wandb)
  parent = setup.parent_meta(root, run.train.init_from)
  check_steps(rl, root)
  setup.check_same_function(run.model, parent, SAME_FUNCTION)
  tokenizer_path = run.data.tokenizer or setup.trained_tokenizer(parent)
  tokenizer = setup.read_tokenizer(tokenizer_path, run.model, parent)
  check_held_out(rl, parent)
  evaluated = evaluation_sets(run)
  tasks = TaskSet(rl.task, seed=run.seed, verifier=rl.verifier, exclude=frozenset(
    question_hash(task.question) for asked in evaluated.values() for task in asked))
  checked = {'': tasks if tasks.size is not None else [], **evaluated}
  long = [check_prompts(tokenizer, some, rl.max_prompt_tokens, rl.long_prompts == 'skip', name)
          for name, some in checked.items()]
  mesh = setup.make_mesh(run.mesh, run.model, run.split_rows)
  for new in rl.max_new_tokens:
    for _, length in row_shapes(rl, new, mesh.shape):
      setup.check_length('rl.max_prompt_tokens + max_new_tokens', length, run.model, mesh)
  samplers = make_samplers(run, tokenizer, mesh)

  # Created before any device work, because it fails on systems that can't run programs safely.
  programs = any(uri.startswith('code:') for uri in (rl.task.uri, *rl.eval_tasks.values()))
  jail = Jail(rl.code, 'config.rl.code') if programs else None

  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    stop = stack.enter_context(StopSignal(jax.process_count()))
    verifier = stack.enter_context(Verifier(rl.verifier, jail))
    checkpoints = stack.enter_context(setup.open_checkpoints(root, run.checkpoint, fallback))
    tx = make_optimizer(run.optimizer, run.updates, model.abstract(run.model)[2])
    beginning = setup.begin(run.model, tx, mesh, checkpoints, seed=run.seed, init_from=run.train.init_from)
    state, start = beginning.state, beginning.step
    progress = Progress.read(beginning.cursor if start else {}, tasks, filtered=rl.repeat_zero_variance < 1)
    if progress.best and progress.best.step not in (0, *checkpoint.steps(checkpoints.path)):
      # Someone deleted the best checkpoint, or --fallback went back to a step before it.
      progress = dataclasses.replace(progress, best=None)
    log = stack.enter_context(contextlib.closing(setup.open_log(
      root, config, start=start, steps=run.steps, describe=functools.partial(
        describe_figures, score='reward' if rl.task.reward else 'pass'))))
    setup.log_header(log, {
      'model': setup.describe_model(run.model),
      'task': f'{rl.task.uri}; {rl.prompts_per_step} prompts x {rl.group_size} samples per step, '
              f'{rl.advantage.name} with {rl.loss.name}',
      'left out': '; '.join(filter(None, (tasks.describe_left_out(), *long))),
      'evaluated': '; '.join(
        f'{len(asked)} problems of {name}' + (', in which no others were found' if len(asked) < rl.eval_prompts else '')
        for name, asked in evaluated.items()),
      'mesh': setup.describe_mesh(mesh) + samplers[0].describe_split(),
      'run': setup.describe_length(beginning, run.steps, root)})
    if start == run.steps:
      log.say('nothing to do; a larger config.rl.steps continues the run, another --workdir starts a new one')
    parts = Parts(
      run, tokenizer, tasks, evaluated, verifier, samplers,
      make_update(run.model, rl.loss, tx, rl.temperature),
      jax.jit(functools.partial(score.log_probabilities, temperature=rl.temperature), static_argnums=0),
      NamedSharding(mesh, model.spec('batch', 'length')),
      _reference(run, tx, mesh, beginning.parent) if rl.loss.kl_weight else None)
    lineage = setup.lineage(config, beginning, tokenizer, tokenizer_path)
    profile = stack.enter_context(contextlib.closing(Profile(root, first_and_last(run.log.profile_steps))))
    last: dict[str, float] = {}
    history = needed(lines_of(root / 'metrics.jsonl'))  # of the steps up to `start`
    warned: set[str] = set()

    if not start:
      progress = evaluate(parts, state.params, progress, 0, log)
    setup.stopped_before(log, start, stop)
    for step in range(start + 1, run.steps + 1):
      with profile.at(step):
        began = time.perf_counter()
        before = progress.prompts
        kept, seen, progress = sample_and_judge(parts, state.params, progress, step)
        sampled = time.perf_counter()
        state, learned = learn(parts, state, minibatches(parts, kept, step), step)
        ended = time.perf_counter()
      if not all(math.isfinite(learned.get(name, 0.0)) for name in ('policy_loss', 'grad_norm')):
        raise RlError(f'step {step}: loss is {learned["policy_loss"]}, gradient norm {learned["grad_norm"]}; '
                      f'{checkpoints.describe()}')
      last = {**describe_step(learned, kept, seen, progress.prompts - before, rl, step),
              'time/step_s': ended - began, 'time/rollout_s': sampled - began, 'time/update_s': ended - sampled,
              'time/tokens_per_s': sum(len(s.tokens) for group in seen for s in group.samples) / (sampled - began)}
      log.train(step, last)
      history = needed([*history, last])
      for kind, text in warnings(history, verifier.why_undecided).items():
        if kind not in warned:
          log.say(f'warning: {text}')
          warned.add(kind)
      checkpoints.check()
      job.note_step(step)
      due = setup.due(step, run.steps, stopping=stop(), eval_every=run.log.eval_every_steps,
                      save_every=run.checkpoint.every_steps)
      if due.evaluate:  # before saving, so that a checkpoint exists only if everything else of its step was written
        progress = evaluate(parts, state.params, progress, step, log)
      if due.save or (progress.best and progress.best.step == step):
        log.flush()
        checkpoints.save(state, {**lineage, 'cursor': progress.cursor()}, step)
      if due.stop:
        setup.stopped(log, checkpoints, step, stop)
    checkpoints.wait()
    setup.finished(log, root, config, run.steps, beginning.parent)
  return last


def make_samplers(run: RlRun, tokenizer: data.Tokenizer, mesh: Mesh) -> list[Sampler]:
  """Returns one sampler per phase. The samplers differ only in the length limit of answers."""
  rl = run.rl
  settings = [SamplerConfig(rl.decode_batch_size, rl.max_prompt_tokens, new, rl.temperature, record_choices=True,
                            cache_tokens=rl.cache_tokens, decode_split=rl.decode_split)
              for new in rl.max_new_tokens]
  try:
    return [Sampler(run.model, s, tokenizer.eos, mesh) for s in settings]
  except ValueError as error:
    raise ConfigError(f'config.rl.{error}') from None


def row_shapes(rl: RlConfig, new: int, mesh_shape: Mapping[str, int]) -> list[tuple[int, int]]:
  """Returns the shapes of microbatches (see `packing.shapes`) in a phase with answers of up to `new` tokens."""
  ways = math.prod(mesh_shape[axis] for axis in model.RULES['batch'])
  return packing.shapes(rl.max_prompt_tokens + new, rl.microbatch_tokens, ways, mesh_shape['context'])


def sample_and_judge(
  parts: Parts, params: Any, progress: Progress, step: int
) -> tuple[list[Group], list[Group], Progress]:
  """Draws groups of samples for a step, and judges them.

  A zero-variance group (see `Group.has_reward_variance`) is replaced by the group of the next prompt (dynamic sampling:
  DAPO, arXiv 2503.14476 sec. 3.2), unless `rl.keeps_zero_variance` is True. The new prompt goes to the sampler as soon
  as the old group is judged, while other groups are still being drawn. `prompts_wanted` limits the number of prompts of
  the step.

  If `rl.extra_prompts` > 0, up to that many further prompts go to the sampler before it is known whether the step needs
  them. The step ends when all groups that it needs are judged, and drops the others, so this setting doesn't change the
  result (but for rounding, see `Sampler.__call__`).

  Returns (kept, seen, progress): the groups to learn from; these and the zero-variance groups that were replaced; and
  the Progress after the last of their prompts. Both lists are in the order of the prompts.
  """
  rl, rule = parts.run.rl, parts.run.rl.reward_rule(step)
  asked: dict[int, Task] = {}
  after = [progress]  # after 0, 1, ... of these prompts
  varies: dict[int, bool] = {}  # of the groups judged so far
  rounds = 1 if rl.keeps_zero_variance else rl.max_resampling_rounds

  def wanted(unknown_agree):
    agree = [not varies.get(number, not unknown_agree) for number in asked]
    agree += [unknown_agree] * (rounds * rl.prompts_per_step - len(agree))
    return prompts_wanted(agree, rl.prompts_per_step, rounds)

  def ask():
    new = {}
    for _ in range(min(wanted(False) + rl.extra_prompts, wanted(True)) - len(asked)):
      found, later = after[-1].next_prompts(
        parts.tasks, 1, rl.repeat_zero_variance, functools.partial(_is_asked, parts))
      after.append(later)
      asked.update(found)
      new |= found
    return new

  def note(judged):
    varies.update((group.cursor, group.has_reward_variance(rule, rl.advantage)) for group in judged)

  def more(judged):
    note(judged)
    count = wanted(False)
    return ask() if sum(number in varies for number in list(asked)[:count]) < count else None

  groups = graded_groups(
    parts.samplers[rl.phase(step)], params, parts.verifier, parts.tokenizer, ask(), samples=rl.group_size,
    seed=parts.run.seed, step=step, more=more)
  note([group for group in groups if group.cursor not in varies])
  seen = groups[: wanted(False)]
  compared = [group.cursor for group in seen if sum(group.rewards(rule)[1]) > 1]  # undecided answers show nothing
  progress = after[len(seen)].recorded(parts.tasks, [(number, varies[number]) for number in compared])
  return [group for group in seen if varies[group.cursor] or rl.keeps_zero_variance], seen, progress


def prompts_wanted(agree: Sequence[bool], first: int, rounds: int) -> int:
  """Returns how many prompts a step uses, including replacements for groups with zero variance.

  The first round has `first` prompts. Each further round has one new prompt for each zero-variance group of the round
  before. For example, if two of four groups in the first round have zero variance, and at most two rounds are allowed,
  the step uses six prompts.

  While groups are still being drawn, it isn't known which of them have zero variance. With False in `agree` for these
  groups, the result is the number of prompts that the step certainly uses, so they can all be drawn at once. With True
  instead, the result is the largest number that the step may use. Both results reach the same final number, in whatever
  order the groups are judged.

  Args:
    agree: for each prompt used so far, in order, whether its group has zero variance.
    first: the number of prompts of the first round.
    rounds: the largest number of rounds.
  """
  wanted = first
  for _ in range(rounds - 1):
    wanted = first + sum(agree[:wanted])
  return wanted


def _is_asked(parts: Parts, task: Task) -> bool:
  """Returns False if the task's prompt is too long and `rl.long_prompts` says to skip such prompts, else True."""
  rl = parts.run.rl
  return rl.long_prompts == 'refuse' or len(prompt_tokens(parts.tokenizer, task)) <= rl.max_prompt_tokens


def minibatches(parts: Parts, groups: list[Group], step: int) -> list[list[Microbatch]]:
  """Computes the advantages of a step's groups and packs the samples into rows.

  Returns the microbatches of each update. Each update learns from rl.prompts_per_step / rl.minibatches groups, in the
  order of their prompts. If the step has too few groups, the last updates have fewer groups. Invalid samples (see
  `rewards` in rl/rewards.py) are left out.

  An update is left out if it has no samples or, without a KL term, if all its advantages are 0. It would learn nothing,
  but the optimizer would move the weights by momentum and weight decay. The result is [] if no update is left.
  """
  rl, rule = parts.run.rl, parts.run.rl.reward_rule(step)
  of = row_shapes(rl, rl.max_new_tokens[rl.phase(step)], parts.rows_by_token.mesh.shape)
  each = rl.prompts_per_step // rl.minibatches
  answers = [
    [Answer(group.prompt, sample, float(advantage))
     for group in groups[at : at + each]
     for sample, advantage, valid in zip(
       group.samples, group.advantages(rule, rl.advantage), group.rewards(rule)[1]) if valid]
    for at in range(0, len(groups), each)]
  return [packing.microbatches(part, of, parts.rows_by_token) for part in answers
          if part and (rl.loss.kl_weight or any(answer.advantage for answer in part))]


def learn(
  parts: Parts, state: TrainState, batches: list[list[Microbatch]], step: int
) -> tuple[TrainState, dict[str, float]]:
  """Updates the policy once per minibatch. Returns (new state, figures to log).

  If there are no minibatches, returns the state unchanged, and no figures.
  """
  run, rl = parts.run, parts.run.rl
  if not batches:
    return state, {}
  score_with = lambda params, batch, replay: [
    parts.log_probabilities(run.model, params, part.batch, part.choices_BTLk if replay else None)[0] for part in batch]
  off_policy = rl.minibatches > 1
  # Computed before the first update, with the policy that drew the samples. All updates of this step use these.
  old = [score_with(state.params, batch, True) if off_policy or rl.loss.cov else None for batch in batches]
  found, losses, norms = [], [], []
  for m, (batch, old_logps) in enumerate(zip(batches, old)):
    ref_logps = score_with(parts.reference, batch, False) if rl.loss.kl_weight else None
    chosen = None
    if rl.loss.cov:
      key = functools.reduce(jax.random.fold_in, (COV_STREAM, step, m), jax.random.key(run.seed))
      chosen = cov_tokens(rl.loss, key, batch, old_logps)
    with setup.no_implicit_transfers():
      state, sums, norm = parts.update(state, batch, old_logps if off_policy else None, ref_logps, chosen)
    found.append(functools.reduce(policy_losses.add, jax.device_get(sums)))
    losses.append(found[-1]['loss'] / max(found[-1]['count'], 1))
    norms.append(jax.device_get(norm))
  total = functools.reduce(policy_losses.add, found)
  figures = {name: float(value) for name, value in policy_losses.means(rl.loss, total).items()}
  figures |= {'policy_loss': float(np.mean(losses)), 'grad_norm': float(np.mean(norms)),
              'entropy_nats': float(total['entropy']) / max(int(total['tokens']), 1),
              'padded_share': 1 - int(total['filled']) / sum(
                part.batch.tokens_BT.size for batch in batches for part in batch)}
  if total['tokens']:
    figures['entropy_top20_nats'] = entropy.mean_of_highest(
      total['entropy_histogram'], HIGH_ENTROPY_SHARE, run.model.vocab_size)
  return state, figures


def check_steps(rl: RlConfig, root: epath.Path) -> None:
  """Raises ConfigError if the run in the workdir `root` has already passed the last step of this config."""
  reached = max(checkpoint.steps(root / 'checkpoints'), default=0)
  if reached > rl.steps:
    raise ConfigError(f'config.rl.steps must be at least {reached}, the step that {root} has reached, or choose '
                      f'another workdir; got {rl.steps}')


def check_held_out(rl: RlConfig, parent: dict[str, Any]) -> None:
  """Raises ConfigError if held-out problems of this run may be in documents that the parent was trained on, in any
  stage.

  parent: the metadata of the checkpoint that the run starts from.
  """
  left_out = setup.left_out(parent)
  if rl.task.uri.startswith('reasoning') and rl.task.held_out_fraction > left_out:
    raise ConfigError(f'config.rl.task.held_out_fraction must be at most {left_out}, what the documents of the '
                      f'pre-training left out (data.held_out_fraction), got {rl.task.held_out_fraction}')


def evaluation_sets(run: RlRun) -> dict[str, list[Task]]:
  """Returns the problems to evaluate on, by name of their set.

  They are the first `rl.eval_prompts` with different questions of the task's held-out problems, and of each set of
  `rl.eval_tasks`.

  Raises:
    ConfigError: the URI of a set is invalid.
    DataError: a set, or the reward function, can't be used.
  """
  rl, found = run.rl, {}
  if rl.task.held_out_fraction:
    found['held_out'] = TaskSet(rl.task, split='held_out', verifier=rl.verifier)
  for name, uri in rl.eval_tasks.items():
    try:
      task = dataclasses.replace(rl.task, uri=uri)
    except ValueError as error:
      raise ConfigError(f'config.rl.eval_tasks.{name}: {error}') from None
    found[name] = TaskSet(task, split='all', verifier=rl.verifier)
  return {name: tasks.distinct(rl.eval_prompts) for name, tasks in found.items()}


def evaluate(parts: Parts, params: Any, progress: Progress, step: int, log: Log) -> Progress:
  """Samples answers to each evaluation set. Logs the mean score, its standard error, and a few texts.

  The score of an answer is 1 if it is right and 0 if it is wrong, or the result of the user's reward function.
  Undecided answers have no score. A problem whose answers are all undecided has no weight in the mean; if all problems
  of a set are such, the mean is NaN, and this evaluation isn't the best one.

  Returns the progress, updated if this is the best evaluation so far on the set `rl.keep_best`.
  """
  for name, tasks in parts.evaluated.items():
    average = _evaluate(parts, params, name, tasks, step, log)
    if name == parts.run.rl.keep_best:
      progress = progress.evaluated(
        Best(f'eval/{name}/avg_at_{parts.run.rl.eval_samples}', step, average, task_set.digest(tasks)))
      if progress.best and progress.best.step == step:
        log.say(f'  best on {name} so far: ' + (f'step {step}, whose checkpoint is kept' if step else 'the start'))
  return progress


def _evaluate(parts: Parts, params: Any, name: str, tasks: list[Task], step: int, log: Log) -> float:
  run, rl = parts.run, parts.run.rl
  groups = graded_groups(
    parts.samplers[rl.phase(max(step, 1))], params, parts.verifier, parts.tokenizer,
    {i: task for i, task in enumerate(tasks) if _is_asked(parts, task)}, samples=rl.eval_samples, seed=run.seed,
    step=HELD_OUT_STEP + step)
  scores = [[score for score in group.scores if not math.isnan(score)] for group in groups]
  rates = [np.mean(decided) for decided in scores if decided]
  average = float(np.mean(rates)) if rates else float('nan')
  error = float(np.std(rates, ddof=1) / math.sqrt(len(rates))) if len(rates) > 1 else float('nan')
  log.evaluation(
    step, name, {f'avg_at_{rl.eval_samples}': average, 'standard_error': error},
    [f'  eval {name}: Avg@{rl.eval_samples} {average:.3f} ± {error:.3f} over {len(rates)} problems'
     + (f', {len(groups) - len(rates)} undecided' if len(rates) < len(groups) else '')])
  for group in groups[: run.log.samples]:
    log.sample(step, group.task.prompt, group.texts[0])
  return average


def describe_step(
  learned: dict[str, float], kept: list[Group], seen: list[Group], consumed: int, rl: RlConfig, step: int
) -> dict[str, float]:
  """Returns the figures of a step, under the names that are logged.

  Args:
    learned: the figures of the update; {} if there was no update.
    kept: the groups for the update. Those whose advantages are all 0 don't count as learned from.
    seen: all groups that the step needed, including zero-variance groups.
    consumed: the number of prompts that the step used or skipped (see `Progress.next_prompts`).
    rl: the settings.
    step: the number of the step.
  """
  rule = rl.reward_rule(step)
  used = sum(bool(group.advantages(rule, rl.advantage).any()) for group in kept)
  varied = sum(group.has_reward_variance(rule, rl.advantage) for group in seen)
  verdicts = [verdict for group in seen for verdict in group.verdicts]
  scores = [score for group in seen for score in group.scores]  # NaN where undecided
  samples = [sample for group in seen for sample in group.samples]
  tokens = sum(len(sample.tokens) for sample in samples)
  decided = sum(v != Verdict.UNDECIDED for v in verdicts)
  found = {
    **learned,
    # The mean of -log p over tokens drawn from a distribution is an unbiased estimate of its entropy.
    'entropy_drawn_nats': -sum(float(sample.logp.sum(dtype=np.float64)) for sample in samples) / tokens,
    **({'pass_rate': float(np.nansum(scores)) / decided} if decided else {}),
    'undecided': float(sum(v == Verdict.UNDECIDED for v in verdicts)),
    'zero_variance_groups': 1 - varied / len(seen),
    'groups_learned_from': float(used),
    'prompts_passed_over': float(consumed - len(seen)),
    'tokens': float(tokens),
    'length_tokens': float(np.mean([len(sample.tokens) for sample in samples])),
    'truncated_share': float(np.mean([sample.finish == 'length' for sample in samples])),
  }
  return {f'train/{name}': value for name, value in found.items()}


def describe_figures(values: dict[str, float], score: str = 'pass') -> list[str]:
  """Returns the figures to print for a step, the most important ones first.

  score: the name to print for the mean score of the answers.
  """
  v = {name.split('/', 1)[1]: value for name, value in values.items()}
  learned = ([f'entropy {v["entropy_nats"]:.3f}', f'|g| {v["grad_norm"]:.2f}',
              f'sampler gap {v["sampler_gap_mean"]:.0e}'] if 'grad_norm' in v else ['no update'])
  return [f'{score} {v["pass_rate"]:.3f}' if 'pass_rate' in v else 'undecided', *learned[:1],
          f'zero-variance groups {100 * v["zero_variance_groups"]:.0f}%', *learned[1:],
          f'length {v["length_tokens"]:.1f}', f'truncated {100 * v["truncated_share"]:.0f}%',
          f'{v["tokens_per_s"]:,.0f} tok/s drawn']


def _reference(run: RlRun, tx, mesh: Mesh, parent: str) -> Any:
  """Reads the weights of the KL reference, which are the weights that the run started from.

  They are read from disk, because training changes the weights in memory.

  parent: the checkpoint that the run started from.
  """
  return checkpoint.restore_weights(epath.Path(parent), abstract_state(run.model, tx, mesh).params)[0]
