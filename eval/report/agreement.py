"""Finds out whether two runs can be compared, and lists the reasons if they can't.

A difference between two runs can be attributed to the objective only if the runs agree in everything except objective
and seed: the prepared data (by its hash), the tokenizer, every setting that affects what is learned, and the step,
which determines how many tokens were seen. If the two runs started from other runs, those parent runs must agree too.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

from betarank.configs import settings
from betarank.configs.load import flatten
from betarank.eval.report.runs import Run

# These settings of a source aren't compared, because its data is compared by hash.
_ORIGIN = ('uri', 'max_documents')
_EVALUATED = ('log.eval_batches', 'rl.eval_prompts')  # how much an evaluation during training is of
_SHOWN = 12  # the number of characters shown of a hash


def choices(run: Run) -> dict[str, Any]:
  """Returns {dotted key: value} of the settings that affect what is learned, except objective and seed."""
  return _with_roles(run, (settings.IDENTITY, settings.DATA))


def _with_roles(run: Run, roles: tuple[str, ...]) -> dict[str, Any]:
  return {key: value for key, value in flatten(run.config).items()
          if _role(key) in roles and key != 'seed' and not key.startswith('objective.')}


def _role(key: str) -> str:
  """Returns the role of a setting, which says what the setting affects (see configs/settings.py).

  A setting that this version of betarank doesn't know gets the role IDENTITY: it is assumed to affect what is learned.
  """
  try:
    return settings.role(key)
  except KeyError:
    return settings.IDENTITY


def evaluated(run: Run) -> dict[str, Any]:
  """Returns {dotted key: value} of the settings on which it depends which tokens or problems a run was evaluated on
  during training, besides those that determine its data. Figures from such evaluations are compared only if these are
  equal.
  """
  flat = flatten(run.config)
  return {key: flat.get(key, settings.when_missing(key)) for key in _EVALUATED}


def disagreements(run: Run, other: Run) -> list[str]:
  """Returns one phrase for each way in which the settings or the data of two runs of the same stage differ.

  Phrases about data come first. Differences in objective, seed and number of steps are ignored (for steps, see
  `of_steps`). If both runs started from a checkpoint of a parent run, the two parents are compared too, and so are
  the steps at which those checkpoints were saved.
  """
  found = _of_data(run, other) + _of_settings(run, other)
  if run.parent and other.parent:
    found += _of_start(run, other, disagreements)
  return list(dict.fromkeys(found))


def of_steps(run: Run, step: int, other: Run, other_step: int) -> list[str]:
  """Compares the steps of two runs. Returns [] if the steps are equal, else a list with one reason why they can't be
  compared.

  The reason names both steps and, except for RL, the number of tokens that each run has seen, if it is known.
  """
  if step == other_step:
    return []
  seen = [f' ({run.tokens_per_step * at:,.0f} tokens)' if not run.is_rl and math.isfinite(run.tokens_per_step) else ''
          for run, at in ((run, step), (other, other_step))]
  return [f'step {step:,}{seen[0]} against {other_step:,}{seen[1]}']


def of_length(run: Run, other: Run) -> list[str]:
  """Returns one phrase for each way in which the lengths of two runs differ, or of the runs that they started from.

  The length of a run is the number of steps that its config asks for, on which the learning rate depends. A length that
  isn't known doesn't differ from any other.
  """
  found = [f'a run of {run.steps:,.0f} steps against one of {other.steps:,.0f}'] if (
    math.isfinite(run.steps) and math.isfinite(other.steps) and run.steps != other.steps) else []
  if run.parent and other.parent:
    return found + _of_start(run, other, of_length)
  return found


def alike(
  runs: Iterable[Run], differing: Callable[[Run, Run], list[str]] = lambda run, other: []
) -> tuple[dict[Any, Run], list[str]]:
  """Returns ({seed: run}, reasons): runs of an arm that may be averaged, and the reasons why others aren't among them.

  The runs agree in their lengths and in whatever `differing` compares. Of all such groups, they are the one with most
  finished runs; among equals, with most runs; and then the one with the first seed. If several runs have the same seed,
  only the first of them counts.

  differing: a function that returns one phrase for each way in which two runs differ.
  """
  found = {run.seed: run for run in reversed(list(runs))}
  differs = lambda run, other: differing(run, other) or of_length(run, other)
  groups = [{seed: run for seed, run in found.items() if not differs(run, found[first])}
            for first in sorted(found, key=str)]
  finished = lambda runs: sum(run.last_step >= run.steps for run in runs.values())
  kept = max(groups, key=lambda runs: (finished(runs), len(runs)), default={})
  first = next(iter(kept.values()), None)
  return kept, [reason for seed, run in found.items() if seed not in kept for reason in differs(run, first)]


def _of_start(run: Run, other: Run, differing: Callable[[Run, Run], list[str]]) -> list[str]:
  """Compares the checkpoints that two runs started from: their steps, and their runs with the function `differing`."""
  found = [] if run.parent_step == other.parent_step else [
    f'started from step {run.parent_step} against {other.parent_step}']
  before = run.stage.rpartition('→')[2].strip()
  return found + [f'{reason} (before {before})' for reason in differing(run.parent, other.parent)]


def _of_data(run: Run, other: Run) -> list[str]:
  mine, theirs = run.identity, other.identity
  if mine.tokenizer and theirs.tokenizer and mine.tokenizer != theirs.tokenizer:
    return [f'another tokenizer ({mine.tokenizer[:_SHOWN]} against {theirs.tokenizer[:_SHOWN]})']
  if run.is_rl:  # its settings determine all but the content of files, and what its evaluations leave to training
    for name, a, b in (('other problems', mine.problems, theirs.problems),
                       ('other problems left to training by the evaluations', mine.kept, theirs.kept),
                       ('another reward function', mine.reward, theirs.reward)):
      if a and b and a != b:
        return [f'{name} ({a[:_SHOWN]} against {b[:_SHOWN]})']
    return []
  if not mine.sources or not theirs.sources:
    return ['data identity not recorded (no checkpoint)']
  if mine.sources.keys() != theirs.sources.keys():
    return [f'data sources {", ".join(sorted(mine.sources))} against {", ".join(sorted(theirs.sources))}']
  return [f'other data in source {name} ({mine.sources[name][:_SHOWN]} against {theirs.sources[name][:_SHOWN]})'
          for name in sorted(mine.sources) if mine.sources[name] != theirs.sources[name]]


def _of_settings(run: Run, other: Run) -> list[str]:
  mine, theirs = _compared(run), _compared(other)
  found = [f'{key} {_plain(mine[key])} against {_plain(theirs[key])}' for key in sorted(mine.keys() & theirs.keys())
           if mine[key] != theirs[key]]
  alone = sorted(key for key in mine.keys() ^ theirs.keys() if (mine | theirs)[key] != settings.when_missing(key))
  if alone:
    found.append(f'{len(alone)} settings that only one of them has, as {alone[0]} (other code)')
  return found


def _compared(run: Run) -> dict[str, Any]:
  """Returns the settings of a run that must be equal in any run that it is compared with, as {dotted key: value}.

  These are the settings that affect what is learned, and the length of training, on which the learning rate depends.
  The settings that say where data comes from are left out, because data is compared by hash.
  """
  found = _with_roles(run, (settings.IDENTITY, settings.DATA, settings.LENGTH))
  return {key: value for key, value in found.items()
          if not (key.startswith('data.sources.') and key.rpartition('.')[2] in _ORIGIN)}


def _plain(value: Any) -> str:
  return f'{value:,}' if type(value) is int else str(value)
