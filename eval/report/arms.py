"""A sweep: every run under a folder, with its parent, its stage, and the arm it belongs to.

An arm is a pre-training objective, by what differs from plain cross-entropy: 'CE', 'β = -0.25', 'λ̂ = -0.1'. Runs that
start from another run belong to the arm of the first one; a mid-training with another objective extends the name.
"""

import math
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from betarank.configs import common
from betarank.configs.load import flatten
from betarank.eval.report.runs import PLAIN, Run, Sweep, number, read_run
from betarank.runtime import checkpoint

# Folders of a run, or of a report, in which no other run is looked for.
NOT_RUNS = ('checkpoints', 'eval', 'tensorboard', 'report', 'figures', 'tables')
DEPTH = 6
SYMBOLS = {'beta': 'β', 'lambda_head': 'λ̃', 'lambda_tail': 'λ̂'}
# Settings that don't make another arm: where and how a run is carried out, and what is told of elsewhere.
NOT_AN_ARM = ('seed', 'objective', 'data.dir', 'data.tokenizer', 'train.init_from', 'train.init_what', 'train.mesh',
              'train.microbatches', 'train.tokens', 'checkpoint', 'log', 'eval', 'rl.decode_batch_size',
              'rl.microbatches',
              'rl.steps', 'rl.verifier', 'rl.eval_prompts', 'rl.eval_samples',
              'model.remat_policy', 'model.scan_layers',
              'model.attention', 'model.compute_dtype')


def read_sweep(root: str | epath.Path) -> Sweep:
  """Every run under `root`, named, staged, with parents linked."""
  sweep = Sweep(epath.Path(root))
  for path in _find_runs(sweep.root, DEPTH, set()):
    name = str(path.relative_to(sweep.root)) if path != sweep.root else path.name
    sweep.runs.append(read_run(path, name, sweep))
  _link(sweep)
  _note_gaps(sweep)
  return sweep


def _find_runs(folder: epath.Path, depth: int, seen: set[str]) -> Iterator[epath.Path]:
  """seen: folders that were looked into, as a link may lead back to one."""
  here = str(folder) if '://' in str(folder) else os.path.realpath(folder)  # epath's resolve() follows no links
  if here in seen:
    return
  seen.add(here)
  if (folder / 'config.json').exists() or (folder / 'metrics.jsonl').exists():
    yield folder
  if depth:
    try:
      inner = sorted(p for p in folder.iterdir() if p.name not in NOT_RUNS and not p.name.startswith('.'))
      folders = [p for p in inner if p.is_dir()]
    except OSError:
      return
    for path in folders:
      yield from _find_runs(path, depth - 1, seen)


def label(objective: Any) -> str:
  """'CE', 'β = -0.25', 'λ̂ = -0.1, k = 50': what differs from plain cross-entropy. '' for no objective at all."""
  if not isinstance(objective, dict) or not objective:
    return ''
  plain = common.base().objective.to_dict()
  parts = []
  for key, value in sorted(objective.items(), key=lambda item: (item[0] not in SYMBOLS, item[0])):
    if key == 'top_k' or value == plain.get(key):
      continue
    shown = f'{value:g}' if math.isfinite(number(value)) else str(value)
    parts.append(f'{SYMBOLS.get(key, key)} = {shown}')
  if any(objective.get(key) for key in ('lambda_head', 'lambda_tail')) and objective.get('top_k') != plain['top_k']:
    parts.append(f'k = {objective.get("top_k")}')
  return ', '.join(parts) or PLAIN


def _link(sweep: Sweep) -> None:
  """Parents, then stage and arm: an arm is the objective of the pre-training that a run descends from."""
  for run in sweep.runs:
    run.parent = _find_parent(run, sweep)
  for run in sweep.runs:
    chain, names = [run], {run.name}
    while (parent := chain[-1].parent) and parent.name not in names:
      chain.append(parent)
      names.add(parent.name)
    chain.reverse()
    first = chain[0]
    kinds = ['RL' if r.is_rl else 'pre-training' if r is first else 'mid-training' for r in chain]
    if first.parent_path and not first.parent:
      kinds = ['?', 'RL' if first.is_rl else 'further training', *kinds[1:]]
      sweep.note(run.name, f'its parent {first.parent_path} was not found, so its arm is unknown')
      run.stage, run.arm = ' → '.join(kinds), f'unknown ({first.parent_path})'
      continue
    run.stage = ' → '.join(kinds)
    labels = [label(r.config.get('objective')) for r in chain if not r.is_rl]
    if not labels or not labels[0]:
      if first.config:
        sweep.note(run.name, 'its config has no objective, so its arm is unknown')
      continue
    unique = [name for i, name in enumerate(labels) if i == 0 or name != labels[i - 1]]
    run.arm = ' → '.join(unique)
  _tell_apart(sweep)


def _tell_apart(sweep: Sweep) -> None:
  """Runs of one stage and objective that differ in another setting are arms of their own, named by it too."""
  groups: dict[tuple[str, str], list[Run]] = {}
  for run in sweep.runs:
    if run.arm:
      groups.setdefault((run.stage, run.arm), []).append(run)
  for runs in groups.values():
    flat = [{key: value for key, value in flatten(run.config).items() if not _ignored(key)} for run in runs]
    # A setting that one of them lacks is one that its code didn't have yet, not a choice.
    shared = set.intersection(*map(set, flat))
    differing = sorted(key for key in shared if any(f[key] != flat[0][key] for f in flat))
    for run, values in zip(runs, flat) if differing else ():
      run.arm += ''.join(f', {key.rsplit(".", 1)[-1]} = {values.get(key)}' for key in differing[:3])


def _ignored(key: str) -> bool:
  return any(key == name or key.startswith(name + '.') for name in NOT_AN_ARM)


def _find_parent(run: Run, sweep: Sweep) -> Run | None:
  """The run that holds run.parent_path: by the whole path, in the sweep or beside it, or by how the path ends.

  The last is for sweeps that were moved: the run that agrees longest, unless that is `run` itself or there are two.
  """
  if not run.parent_path:
    return None
  path = epath.Path(run.parent_path)
  if path.name.isdigit():
    path = path.parent
  if path.name == 'checkpoints':
    path = path.parent
  path = checkpoint.absolute(path)
  whole = [other for other in sweep.runs if other is not run and checkpoint.absolute(other.path) == path]
  if whole:
    return whole[0]
  try:
    if (path / 'config.json').exists():  # beside the sweep: its objective names the arm
      return read_run(path, str(path), sweep)
  except OSError:
    pass

  def shared(other: Run) -> int:
    """How many names at the end of both paths agree."""
    pairs = zip(reversed(checkpoint.absolute(other.path).parts), reversed(path.parts))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(other.path.parts), len(path.parts)))

  best, *others = sorted(sweep.runs, key=shared, reverse=True)
  clear = shared(best) > (shared(others[0]) if others else 0)
  return best if clear and best is not run else None


def _note_gaps(sweep: Sweep) -> None:
  """What a full grid of arms and seeds would have, and runs that stand still or failed."""
  if not sweep.runs:
    sweep.note(sweep.root, 'no run found (a folder with config.json or metrics.jsonl)')
  for run in sweep.runs:
    if run.state != 'finished' and 'train/ce_nats' not in run.curves and run.last_step == 0:
      sweep.note(run.name, 'has not finished a step')
    elif run.state.startswith('unfinished'):
      sweep.note(run.name, f'{run.state} (running, stopped or failed)')
  for stage in sweep.stages:
    runs = sweep.of(stage)
    if any(run.probes for run in runs):
      for run in (run for run in runs if not run.probes):
        sweep.note(run.name, 'not probed yet, as others are (betarank eval probe)')
    for benchmark in sorted({name for run in runs for name in run.samples}):
      for run in (run for run in runs if benchmark not in run.samples):
        sweep.note(run.name, f'no samples on {benchmark} yet, as others have (betarank eval sample)')
    seeds = sorted({run.seed for run in sweep.of(stage)} - {None})
    for arm in sweep.arms:
      there = [run.seed for run in sweep.of(stage, arm)]
      if not there and not any(arm in other.arm or other.arm in arm for other in sweep.of(stage)):
        sweep.note(f'arm {arm}', f'no run in stage {stage}')
      for seed in seeds if there else ():
        if there.count(seed) == 0:
          sweep.note(f'arm {arm}', f'no run with seed {seed} in stage {stage}')
        elif there.count(seed) > 1:
          sweep.note(f'arm {arm}', f'{there.count(seed)} runs with seed {seed} in stage {stage}; the first is compared')
