"""Policy gradient on verifiable rewards, top to bottom. A step is: sample, judge, advantage, update.

The paper's recipe by default (arXiv 2512.22955, appendix B.1): on-policy GRPO, clip-higher, dynamic sampling, 16
samples a prompt at temperature 1, constant learning rate, no KL term. What a step draws depends on (parameters, seed,
step, prompt numbers) alone, and the checkpoint holds the number of prompts consumed, so a killed run goes on exactly.

# P prompts  G samples of each  B = P·G rows  T tokens
"""

import json
import math
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from betarank import data, model
from betarank.configs.errors import ConfigError, UserError
from betarank.configs.load import to_json
from betarank.rl import policy_losses
from betarank.rl.advantages import advantages
from betarank.rl.config import RlRun, rl_run
from betarank.rl.rollout import Group, graded_groups, lengths, pack
from betarank.rl.update import cov_tokens, make_update, score_tokens
from betarank.runtime import checkpoint, multihost, workdir
from betarank.runtime.metrics import Log, duration
from betarank.runtime.state import TrainState, abstract_state, create_state
from betarank.tasks.task_set import TaskSet
from betarank.tasks.verifiers import Verdict, Verifier
from betarank.train.optimizer import make_optimizer
from betarank.train.sampler import Sampler, SamplerConfig

HELD_OUT_STEP = 2**31  # added to the step number: evaluation draws other samples than training
COV_STREAM = 3  # fold_in(seed, stream, step, update); train/loop.py has 1, the sampler 2
HIGH_ENTROPY_SHARE = 0.2  # of tokens: where reasoning forks (arXiv 2506.01939)


class RlError(UserError):
  """RL can't go on. One line that says since which step."""


def train(config: ConfigDict, path: str, fallback: bool = False) -> dict[str, float]:
  """Runs `config` in the workdir `path`, from wherever it stands there, to its last step; returns its last figures.

  fallback: a damaged checkpoint is moved aside, and an earlier good one taken.
  Raises ConfigError, data.DataError or CheckpointError before any device work where something doesn't fit, RlError
  where the run itself fails.
  """
  run = rl_run(config)
  c, rl = run.model, run.rl
  root = epath.Path(path)
  workdir.check_config(root, config)
  tokenizer = data.read_tokenizer(run.data.tokenizer_path, c.vocab_size)
  tasks = TaskSet(rl.task, seed=run.seed)
  held_out = TaskSet(rl.task, seed=run.seed, split='held_out')
  try:
    mesh = model.make_mesh(run.train.mesh)
    multihost.check_rows(rl.prompts_per_step // rl.minibatches * rl.group_size, mesh.shape, rl.microbatches)
  except ValueError as error:
    raise ConfigError(f'config.train.mesh: {error}') from None

  with jax.set_mesh(mesh), Verifier(rl.verifier) as verifier:
    tx = make_optimizer(run.optimizer, rl.steps, model.abstract(c)[2])
    checkpoints = checkpoint.Checkpoints(root, run.checkpoint, fallback)
    state, cursor, parent = _start(run, tx, mesh, checkpoints)
    start = int(state.step) // rl.minibatches
    reference = _reference(run, tx, mesh, parent) if rl.loss.kl_weight else None
    if jax.process_index() == 0:
      workdir.write_config(root, config)
    lineage = {'config': json.loads(to_json(config)), 'parent': parent, 'code_version': workdir.code_version()}
    log = Log(root, step=start, steps=rl.steps, every=run.log.every_steps, tensorboard=run.log.tensorboard,
              active=jax.process_index() == 0, describe=describe)
    log.say(f'policy    {sum(model.parameter_counts(c).values()) / 1e6:,.1f}M parameters from {parent}')
    log.say(f'task      {rl.task.uri}; {rl.prompts_per_step} prompts x {rl.group_size} samples a step, '
            f'{rl.advantage.name} with {rl.loss.name}')
    log.say(f'run       steps {start} to {rl.steps} in {root}')

    placement = NamedSharding(mesh, model.spec('batch', 'length'))
    by_row = NamedSharding(mesh, model.spec('batch'))
    update = make_update(c, rl.loss, tx, rl.microbatches)
    score = jax.jit(score_tokens, static_argnums=0)
    settings = [SamplerConfig(rl.decode_batch_size, rl.max_prompt_tokens, new, record_choices=True)
                for new in rl.max_new_tokens]
    samplers = [Sampler(c, s, tokenizer.eos, mesh) for s in settings]
    cov_key = jax.random.fold_in(jax.random.key(run.seed), COV_STREAM)
    stop = multihost.StopSignal()
    last: dict[str, float] = {}

    def collect(step: int) -> tuple[list[Group], list[Group], int]:
      """(groups to learn from, all groups, prompts consumed). Groups that agree are replaced, in `rounds` draws."""
      kept, seen, at = [], [], cursor
      for _ in range(rl.max_resampling_rounds):
        wanted = rl.prompts_per_step - len(kept)
        if not wanted:
          break
        groups = graded_groups(samplers[rl.phase(step)], state.params, verifier, tokenizer, tasks,
                               range(at, at + wanted), samples=rl.group_size, seed=run.seed, step=step)
        at += wanted
        seen += groups
        kept += [group for group in groups if group.has_reward_variance(rl.truncated_reward)]
      return kept, seen, at

    def learn(kept: list[Group], step: int) -> tuple[dict[str, float], np.ndarray]:
      """Updates the state; returns figures and the entropies of the drawn tokens."""
      nonlocal state
      rows = rl.prompts_per_step * rl.group_size
      longest = rl.max_prompt_tokens + rl.max_new_tokens[rl.phase(step)]
      needed = max(lengths(kept), default=1)
      length = next(n for n in (-(-longest // 4), -(-longest // 2), longest) if n >= needed)  # three shapes at most
      out = pack(kept, prompts=rl.prompts_per_step, samples=rl.group_size, length=length,
                 truncated_reward=rl.truncated_reward)
      advantage_B = np.asarray(advantages(rl.advantage, out.rewards_PG, out.valid_PG)).reshape(rows)
      # A sample that doesn't count isn't a token of the mean either.
      counts_BT = out.completion_BT & out.valid_PG.reshape(rows, 1)
      size, parts = rows // rl.minibatches, []
      pieces = [jax.tree.map(lambda x, at=at: multihost.replicated_to_global(
        x[at : at + size], placement if x.ndim == 2 else by_row),
                             (out.batch, counts_BT, out.sampler_logp_BT, advantage_B, out.choices_BTLk))
                for at in range(0, rows, size)]
      # Before the first update, as the policy that drew them: what all updates of this step are held against.
      old = [score(c, state.params, piece[0], piece[4])[0] if rl.minibatches > 1 or rl.loss.cov else None
             for piece in pieces]
      for m, (piece, old_logp_BT) in enumerate(zip(pieces, old)):
        ref_logp_BT = score(c, reference, piece[0])[0] if rl.loss.kl_weight else None
        key = jax.random.fold_in(jax.random.fold_in(cov_key, step), m)
        chosen_BT = cov_tokens(rl.loss, key, old_logp_BT, piece[3], piece[1]) if rl.loss.cov else None
        state, sums, entropy_BT = update(
          state, *piece[:4], old_logp_BT if rl.minibatches > 1 else None, ref_logp_BT, chosen_BT, piece[4])
        parts.append((jax.device_get(sums), np.asarray(entropy_BT)[counts_BT[m * size : (m + 1) * size]]))
      total = parts[0][0]
      for sums, _ in parts[1:]:
        total = policy_losses.add(total, sums)
      tokens = max(int(total['tokens']), 1)
      figures = {name: float(value) for name, value in policy_losses.means(rl.loss, total).items()}
      figures |= {name: float(total[key]) / rl.minibatches
                  for name, key in (('policy_loss', 'loss'), ('grad_norm', 'grad_norm'))}
      figures['entropy_nats'] = float(total['entropy']) / tokens
      return figures, np.concatenate([entropy for _, entropy in parts])

    def evaluate(step: int) -> None:
      groups = graded_groups(samplers[rl.phase(max(step, 1))], state.params, verifier, tokenizer, held_out,
                             range(rl.eval_prompts), samples=rl.eval_samples, seed=run.seed, step=HELD_OUT_STEP + step)
      rates = [np.mean([v == Verdict.RIGHT for v in group.verdicts if v != Verdict.UNDECIDED] or [0])
               for group in groups]
      error = float(np.std(rates, ddof=1) / math.sqrt(len(rates))) if len(rates) > 1 else float('nan')
      log.evaluation(
        step, 'held_out', {f'avg_at_{rl.eval_samples}': float(np.mean(rates)), 'standard_error': error},
        f'  eval held out: Avg@{rl.eval_samples} {np.mean(rates):.3f} ± {error:.3f} over {len(groups)} problems')
      for group in groups[: run.log.samples]:
        log.sample(step, group.task.prompt, group.texts[0])

    try:
      if not start:
        evaluate(0)
      for step in range(start + 1, rl.steps + 1):
        began = time.perf_counter()
        kept, seen, cursor = collect(step)
        sampled = time.perf_counter()
        figures, entropies = learn(kept, step)
        ended = time.perf_counter()
        if not all(math.isfinite(figures[name]) for name in ('policy_loss', 'grad_norm')):
          raise RlError(f'step {step}: loss is {figures["policy_loss"]}, gradient norm {figures["grad_norm"]}; '
                        f'the last good checkpoint is {checkpoints.path / str(checkpoints.latest)}')
        figures |= describe_groups(seen, len(kept))
        drawn = sum(len(sample.tokens) for group in seen for sample in group.samples)
        if entropies.size:
          top = np.sort(entropies)[-max(1, round(HIGH_ENTROPY_SHARE * entropies.size)):]
          figures['entropy_top20_nats'] = float(top.mean())
        last = {f'train/{name}': value for name, value in figures.items()}
        last |= {'time/step_s': ended - began, 'time/rollout_s': sampled - began, 'time/update_s': ended - sampled,
                 'time/tokens_per_s': drawn / (sampled - began)}
        log.train(step, last)
        checkpoints.check()

        stopping, final = stop(step), step == rl.steps
        if final or step % run.log.eval_every_steps == 0:  # before saving, as in train/loop.py
          evaluate(step)
        if final or stopping or step % run.checkpoint.every_steps == 0:
          log.flush()
          checkpoints.save(state, {**lineage, 'cursor': {'prompts': cursor}}, step)
        if stopping and not final:
          checkpoints.wait()
          log.say(f'asked to stop: step {step} is saved; the same command goes on from there')
          break
      checkpoints.wait()
    finally:
      log.close()
    checkpoints.close()
    return last


def describe_groups(groups: list[Group], kept: int) -> dict[str, float]:
  """What the samples of a step were like, before groups without signal were left out."""
  verdicts = [verdict for group in groups for verdict in group.verdicts]
  samples = [sample for group in groups for sample in group.samples]
  decided = max(sum(v != Verdict.UNDECIDED for v in verdicts), 1)
  return {
    'pass_rate': sum(v == Verdict.RIGHT for v in verdicts) / decided,
    'undecided': float(sum(v == Verdict.UNDECIDED for v in verdicts)),
    'zero_variance_groups': 1 - kept / len(groups),
    'groups_learned_from': float(kept),
    'length_tokens': float(np.mean([len(sample.tokens) for sample in samples])),
    'truncated_share': float(np.mean([sample.finish == 'length' for sample in samples])),
  }


def describe(step: int, steps: int, values: dict[str, float], eta_s: float) -> str:
  """The line a person watches."""
  v = {name.split('/', 1)[1]: value for name, value in values.items()}
  return (f'step {step:>{len(str(steps))}}/{steps}  pass {v["pass_rate"]:.3f}  no signal '
          f'{100 * v["zero_variance_groups"]:.0f}%  entropy {v["entropy_nats"]:.3f}  length {v["length_tokens"]:.1f}  '
          f'truncated {100 * v["truncated_share"]:.0f}%  |g| {v["grad_norm"]:.2f}  gap {v["sampler_gap_mean"]:.1e}  '
          f'{v["tokens_per_s"]:,.0f} tok/s drawn  eta {duration(eta_s)}')


def _start(run: RlRun, tx, mesh, checkpoints: checkpoint.Checkpoints) -> tuple[TrainState, int, str]:
  """(state, prompts consumed, parent): this workdir's newest checkpoint, else the pre-trained weights."""
  target = abstract_state(run.model, tx, mesh)
  if checkpoints.latest is not None:
    state, meta = checkpoints.restore(target)
    return state, meta['cursor']['prompts'], meta['parent']
  source = checkpoint.find(run.train.init_from)
  params, meta = checkpoint.restore_weights(source, target.params)
  _check_reads_alike(meta['config'], run)
  return create_state(run.model, tx, mesh, run.seed, params), 0, str(source)


def _reference(run: RlRun, tx, mesh, parent: str) -> Any:
  """The pre-trained weights, which the KL term holds the policy to; from disk, as the state moves on from them."""
  return checkpoint.restore_weights(epath.Path(parent), abstract_state(run.model, tx, mesh).params)[0]


def _check_reads_alike(pretrained: dict[str, Any], run: RlRun) -> None:
  """Shapes are checked by restoring; what they don't show is checked here. Raises ConfigError."""
  for name in ('heads', 'kv_heads', 'rope_base', 'norm_eps'):
    before, now = pretrained['model'].get(name), getattr(run.model, name)
    if before != now:
      raise ConfigError(f'config.model.{name} must be {before}, as {run.train.init_from} was trained, got {now}')
