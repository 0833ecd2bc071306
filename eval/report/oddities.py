"""Finds signs of trouble in the log of an RL run: no reward signal, only truncated samples, no progress, entropy
collapse.
"""

import math
from collections.abc import Mapping

import numpy as np

from betarank.eval.report.runs import Curve

IN_A_ROW = 10  # so many steps in a row without signal, or with everything truncated, are reported
ALL = 0.995  # a share from here on counts as all
FEW_STEPS = 20  # shorter runs aren't checked for progress and collapse
EDGE_SHARE = 0.1  # the first and the last tenth of the steps are the start and the end of a run
COLLAPSED = 0.2  # the entropy has collapsed if it is below this share of that at the start


def of_rl(curves: Mapping[str, Curve]) -> list[str]:
  """Returns one line of text for each sign of trouble in an RL run.

  curves: {metric: (steps, values)} of the run.
  """
  found = []
  for name, is_odd, what in (
      ('groups_learned_from', lambda groups: groups == 0, 'no reward signal: no group to learn from'),
      ('truncated_share', lambda share: share >= ALL, 'every sample is truncated')):
    steps, values = _finite(curves, name)
    if (longest := _longest_stretch(is_odd(values))) and longest[1] >= IN_A_ROW:
      first, count = longest
      found.append(f'{what} at {count} steps in a row (step {steps[first]} to {steps[first + count - 1]})')
  steps, reward = _finite(curves, 'pass_rate')
  if len(reward) >= FEW_STEPS:
    start, end = _edges(reward)
    noise = 2 * math.hypot(*(part.std(ddof=1) / math.sqrt(len(part)) for part in (start, end)))
    if abs(end.mean() - start.mean()) <= noise:
      found.append(f'the reward does not move: pass rate {start.mean():.3f} in the first tenth of the steps, '
                   f'{end.mean():.3f} in the last (noise of the steps ± {noise:.3f})')
  steps, entropy = _finite(curves, 'entropy_nats')
  if len(entropy) >= FEW_STEPS:
    start, end = _edges(entropy)
    if end.mean() < COLLAPSED * start.mean():
      found.append(f'the entropy collapses: {start.mean():.3g} nats in the first tenth of the steps, {end.mean():.3g} '
                   'in the last')
  return found


def _finite(curves: Mapping[str, Curve], name: str) -> Curve:
  steps, values = curves.get(f'train/{name}', (np.array([], int), np.array([])))
  return steps[np.isfinite(values)], values[np.isfinite(values)]


def _edges(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  size = max(2, round(EDGE_SHARE * len(values)))
  return values[:size], values[-size:]


def _longest_stretch(there: np.ndarray) -> tuple[int, int] | None:
  """Returns (start, length) of the longest sequence of True values in a bool array; None if there is no True."""
  edges = np.flatnonzero(np.diff(np.concatenate([[False], there, [False]]).astype(int)))
  if not len(edges):
    return None
  lengths = edges[1::2] - edges[::2]
  longest = int(np.argmax(lengths))
  return int(edges[2 * longest]), int(lengths[longest])
