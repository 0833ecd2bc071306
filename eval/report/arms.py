"""Finds all runs under a folder, links each run to its parent, and names the stage and the arm of each run.

An arm is a pre-training objective. Its name comes from sweep.json if there is one. Otherwise, the arm of plain
cross-entropy is named 'CE', and the name of any other arm says how its objective differs from plain cross-entropy:
'β = -0.25' or 'λ̂ = -0.1'.

The parent of a run is the run whose checkpoint it started from. Without a sweep.json, the objectives of pre-training
and mid-training decide the arm, so an RL run belongs to the same arm as its parent. If mid-training had another
objective than pre-training, the arm's name has both: 'CE → β = -0.25'. Runs with the same objectives that differ in
another setting are different arms, and so are the runs that started from them.
"""

import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from betarank.configs import common
from betarank.configs.sweep_folder import sweep_folder
from betarank.eval.report.agreement import choices, disagreements
from betarank.eval.report.oddities import of_rl
from betarank.eval.report.reading import read_object, read_run
from betarank.eval.report.runs import PLAIN, Run, Sweep, number
from betarank.runtime import checkpoint

# Folders of a run or a report. No runs are searched for in them.
NOT_RUNS = ('checkpoints', 'eval', 'tensorboard', 'report', 'figures', 'tables')
DEPTH = 6  # folders are searched to this depth below the root
SYMBOLS = {'beta': 'β', 'lambda_head': 'λ̃', 'lambda_tail': 'λ̂'}


def read_sweep(root: str | epath.Path) -> Sweep:
  """Returns all runs under `root`, each with its name, stage, arm and parent. `Sweep.notes` lists what is missing or
  odd.
  """
  sweep = Sweep(epath.Path(root))
  named: dict[int, str] = {}  # id of a run -> arm as its sweep names it
  for path, arm in _find_runs(sweep.root, DEPTH, set(), {}, sweep):
    name = str(path.relative_to(sweep.root)) if path != sweep.root else path.name
    run = read_run(path, name, sweep)
    sweep.runs.append(run)
    named[id(run)] = _without_seed(arm, run.seed)
  _link(sweep, named)
  sweep.baselines = {arm: _baseline(sweep, arm) for arm in sweep.arms}
  _note_gaps(sweep)
  return sweep


# Finding


def _find_runs(
  folder: epath.Path, depth: int, seen: set[str], points: dict[str, str], sweep: Sweep
) -> Iterator[tuple[epath.Path, str]]:
  """Yields (workdir, arm) for each run in a folder. The arm's name comes from a sweep.json; it is '' if no sweep.json
  lists the run.

  depth: the number of levels below `folder` to search.
  seen: the folders that have been searched so far. They aren't searched again, because symbolic links may form a
    circle.
  points: {workdir: arm}, from the sweep.json files of the folders above.
  """
  here = str(folder) if '://' in str(folder) else os.path.realpath(folder)  # epath's resolve() follows no links
  if here in seen:
    return
  seen.add(here)
  if (sweep_folder(folder) / 'sweep.json').exists():
    points = points | _points(folder, sweep)
  if (folder / 'config.json').exists() or (folder / 'metrics.jsonl').exists():
    yield folder, points.get(str(folder), '')
  if depth:
    try:
      inner = sorted(p for p in folder.iterdir() if p.name not in NOT_RUNS and not p.name.startswith('.'))
      folders = [p for p in inner if p.is_dir()]
    except OSError as error:
      sweep.note(folder, f'could not be read ({error.strerror or error}); its runs are left out')
      return
    for path in folders:
      yield from _find_runs(path, depth - 1, seen, points, sweep)


def _points(folder: epath.Path, sweep: Sweep) -> dict[str, str]:
  """Returns {workdir: arm} for the runs that the sweep.json of the sweep in `folder` lists.

  A sweep.json lists points, each of which is one command of a sweep. The name of a point is ARM/STAGE, which is also
  its workdir relative to `folder`.
  """
  points = (read_object(sweep_folder(folder) / 'sweep.json', sweep) or {}).get('points')
  names = [name for name in points if '/' in name] if isinstance(points, dict) else []
  return {str(folder / name): name.rpartition('/')[0] for name in names}


def _without_seed(arm: str, seed: int | None) -> str:
  """Returns an arm's name without the seed, because runs with different seeds belong to the same arm.

  For example, 'beta=-0.25,seed=1' becomes 'beta=-0.25'.
  """
  return ','.join(part for part in arm.split(',') if not re.fullmatch(rf's(eed)?[=_-]?{seed}', part))


# Linking and naming


def label(objective: Any) -> str:
  """Returns a short name for an objective, such as 'CE' (plain cross-entropy), 'β = -0.25' or 'λ̂ = -0.1, k = 50'.

  The name lists the settings that differ from plain cross-entropy. It is '' if `objective` is missing or empty.

  objective: the section `objective` of a config.
  """
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


def _link(sweep: Sweep, named: dict[int, str]) -> None:
  """Sets the parent of each run, and then the stage, the objective and the arm of each run.

  named: {id(run): the name of the run's arm in a sweep.json}. The name is '' if no sweep.json lists the run.
  """
  outside = []  # ancestors that aren't in the sweep
  for run in sweep.runs:
    run.parent = _find_parent(run, sweep)
    ancestor, seen = run.parent, {run.name}
    while ancestor and all(ancestor is not other for other in sweep.runs) and ancestor.name not in seen:
      seen.add(ancestor.name)
      outside.append(ancestor)
      ancestor.parent = _find_parent(ancestor, sweep)
      ancestor = ancestor.parent
  for run in (*sweep.runs, *outside):
    chain, seen = [run], {run.name}
    while (parent := chain[-1].parent) and parent.name not in seen:
      chain.append(parent)
      seen.add(parent.name)
    chain.reverse()
    first = chain[0]
    kinds = ['RL' if r.is_rl else 'pre-training' if r is first else 'mid-training' for r in chain]
    if first.parent_path and not first.parent:
      kinds = ['?', 'RL' if first.is_rl else 'further training', *kinds[1:]]
      if id(run) in named:
        sweep.note(run.name, f'its parent {first.parent_path} was not found, so its arm is unknown')
      run.stage, run.arm = ' → '.join(kinds), f'unknown ({first.parent_path})'
      continue
    run.stage = ' → '.join(kinds)
    labels = [label(r.config.get('objective')) for r in chain if not r.is_rl]
    if not labels or not labels[0]:
      if first.config and id(run) in named:
        sweep.note(run.name, 'its config has no objective, so its arm is unknown')
      continue
    run.objective = ' → '.join(name for i, name in enumerate(labels) if i == 0 or name != labels[i - 1])
    run.arm = named.get(id(run)) or run.objective
  _tell_apart([*sweep.runs, *outside])


def _tell_apart(runs: Sequence[Run]) -> None:
  """Divides each arm whose runs of the same stage differ in settings that affect what is learned, and then the arms of
  the runs that started from them.

  The objective and the seed don't count, nor do settings that some of these runs lack.

  Up to three of the differing settings, with their values in a run, are added to the arm's name of the run and of all
  runs that started from it.
  """
  added: dict[int, str] = {}  # id of a run -> what is added to the name of its arm
  depth = lambda run: run.stage.count('→')
  for _, level in itertools.groupby(sorted((run for run in runs if run.arm), key=depth), key=depth):
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in level:
      groups.setdefault((run.stage, run.arm, added.get(id(run.parent), '')), []).append(run)
    for (stage, _, inherited), group in groups.items():
      flat = [choices(run) for run in group]
      # If a run lacks a setting, its code didn't have the setting yet. So this isn't a difference.
      shared = set.intersection(*map(set, flat))
      differing = sorted(key for key in shared if any(f[key] != flat[0][key] for f in flat))[:3]
      names = {key: key.rpartition('.')[2] for key in differing}
      for key, name in names.items():
        if f', {name} = ' in inherited:  # RL's lr, next to that of pre-training
          names[key] = f'{stage.rpartition("→")[2].strip()} {name}'
      for run, values in zip(group, flat):
        added[id(run)] = inherited + ''.join(f', {name} = {values.get(key)}' for key, name in names.items())
  for run in runs:
    run.arm += added.get(id(run), '')


def _find_parent(run: Run, sweep: Sweep) -> Run | None:
  """Returns the run that wrote the checkpoint run.parent_path; None if it can't be found.

  The path of the checkpoint contains the workdir of the parent. If there is no run in this workdir, the sweep may have
  been moved. The parent is then the run in the sweep whose workdir shares the most trailing folders with the missing
  workdir, as a/b/c and x/b/c share two. If several runs share equally many, but at least two, it is the one of these
  that shares the most leading folders with `run`: two pieces of a sweep may have runs of the same name. If that doesn't
  decide, or if `run` itself is the best, the parent is unknown.
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
    if (path / 'config.json').exists():  # outside the sweep: its objective names the arm
      return read_run(path, str(path), sweep)
  except OSError:
    pass

  def shared(a: epath.Path, b: epath.Path, step: int = 1) -> int:
    """Returns the number of leading folders that two paths have in common, or of trailing folders if `step` is -1."""
    pairs = zip(a.parts[::step], b.parts[::step])
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

  places = [(other, checkpoint.absolute(other.path)) for other in sweep.runs]
  most = max(shared(place, path, -1) for _, place in places)
  alike = [(other, place) for other, place in places if shared(place, path, -1) == most]
  if most > 1 and len(alike) > 1:  # the same arm and stage, as in two pieces of a sweep
    near = [shared(place, checkpoint.absolute(run.path)) for _, place in alike]
    alike = [found for found, folders in zip(alike, near) if folders == max(near)]
  best = alike[0][0]
  return best if most and len(alike) == 1 and best is not run else None


def _baseline(sweep: Sweep, arm: str) -> str:
  """Returns the name of the arm with which `arm` is compared.

  The baseline is the first arm of plain cross-entropy that agrees with `arm` in everything except the objective. If
  there is no such arm, or if `arm` itself has plain cross-entropy, the baseline is the first of all arms. This arm may
  differ from `arm` in more than the objective; comparisons then list the other differences.
  """
  first, *others = sweep.arms
  plain = [first, *(other for other in others if any(r.objective == PLAIN for r in sweep.runs if r.arm == other))]
  for candidate in () if arm in plain else plain:
    pairs = [(sweep.of(stage, arm), sweep.of(stage, candidate)) for stage in sweep.stages]
    pairs = [(mine[0], theirs[0]) for mine, theirs in pairs if mine and theirs]
    if pairs and not any(disagreements(*pair) for pair in pairs):
      return candidate
  return first


# What is missing or odd


def _note_gaps(sweep: Sweep) -> None:
  for run in sweep.runs:
    if run.state != 'finished' and 'train/ce_nats' not in run.curves and run.last_step == 0:
      sweep.note(run.name, 'has not finished a step')
    elif run.state.startswith('unfinished'):
      sweep.note(run.name, f'{run.state} (running, stopped or failed)')
    if run.is_rl:
      for line in of_rl(run.curves):
        sweep.note(run.name, line)
  for stage in sweep.stages:
    runs = sweep.of(stage)
    if any(run.probes for run in runs):
      for run in (run for run in runs if not run.probes):
        sweep.note(run.name, 'not probed yet, as others are (betarank eval probe)')
    for benchmark in sorted({name for run in runs for name in run.samples}):
      for run in (run for run in runs if benchmark not in run.samples):
        sweep.note(run.name, f'no samples on {benchmark} yet, as others have (betarank eval sample)')
    code = {arm: sorted({run.code_version for run in sweep.of(stage, arm)} - {''}) for arm in sweep.arms}
    if len({version for versions in code.values() for version in versions}) > 1:
      sweep.note(stage, 'runs of different versions of the code: ' + '; '.join(
        f'{arm} {", ".join(versions)}' for arm, versions in code.items() if versions))
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
