"""Computes the lines in the report's plots. A line is the mean of an arm (a pre-training objective) over seeds.

# S seeds  P problems  X points of a curve
"""

import dataclasses
import math
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np

from betarank.eval.report.agreement import alike, evaluated, of_steps
from betarank.eval.report.comparisons import aligned, estimate, pairs, sample_sets
from betarank.eval.report.runs import Curve, Run, Sweep, number, setting

BINS = 100  # a curve has at most so many points
BAND_RESAMPLES = 2000


@dataclasses.dataclass
class Series:
  """A line of a plot: the mean over seeds at each x, with lower and upper limits.

  The limits are the smallest and the largest value of all seeds, or NaN if there is only one seed. For Pass@k, they are
  the limits of the 95 % interval.
  """

  arm: str
  x_X: np.ndarray
  mean_X: np.ndarray
  low_X: np.ndarray
  high_X: np.ndarray
  seeds: int


def curve(sweep: Sweep, stage: str, name: str) -> tuple[list[Series], int]:
  """Returns (lines, size): the curve of the metric `name`, with one line per arm.

  Each point is a mean over seeds and over about `size` consecutive logged steps. The limits of a line are the range
  over seeds. Only runs of the same length are averaged, because the learning rate at a step depends on it. A
  metric of evaluations is drawn only of runs that were evaluated on the same tokens or problems as the first.
  """
  x_X, size = _points(sweep, stage, name)
  runs = [run for run in sweep.of(stage) if name in run.curves]
  if name.startswith('eval/'):
    runs = [run for run in runs if evaluated(run) == evaluated(runs[0])]
  binned = {arm: [_binned(run.curves[name], x_X) for run in _alike([run for run in runs if run.arm == arm], name)]
            for arm in sweep.arms}
  return [series for arm, rows in binned.items() if (series := _series(arm, x_X, rows))], size


def _alike(runs: Iterable[Run], name: str) -> list[Run]:
  """Returns those runs of an arm, at most one per seed, whose curves of the metric `name` may be averaged."""
  return list(alike([run for run in runs if name in run.curves])[0].values())


def difference(sweep: Sweep, stage: str, name: str) -> tuple[list[Series], int]:
  """Returns (lines, size) as `curve` does, but for the difference between each arm and its baseline.

  Runs are subtracted in pairs that have the same seed and agree in everything except the objective.
  """
  x_X, size = _points(sweep, stage, name)
  out = []
  for arm in sweep.arms:
    found = {a.seed: (a, b) for a, b in pairs(sweep, stage, arm)[0] if name in a.curves and name in b.curves}
    kept = {run.seed for run in _alike([a for a, _ in found.values()], name)}
    rows = [_binned(a.curves[name], x_X) - _binned(b.curves[name], x_X) for seed, (a, b) in found.items()
            if seed in kept]
    if series := _series(arm, x_X, rows):
      out.append(series)
  return out, size


def _points(sweep: Sweep, stage: str, name: str) -> tuple[np.ndarray, int]:
  """Returns (x [X], size): the x values of the points of a curve, and about how many steps each point averages.

  Point i averages the steps in (x[i-1], x[i]]. There are at most BINS points.
  """
  steps = [run.curves[name][0] for run in sweep.of(stage) if name in run.curves]
  x_X = np.unique(np.concatenate([*steps, []]))
  if len(x_X) <= BINS:
    return x_X, 1
  size = max(1, round(len(x_X) / BINS))
  return np.linspace(0, x_X[-1], BINS + 1)[1:], size


def _binned(curve: Curve, x_X: np.ndarray) -> np.ndarray:
  """Returns [X]: for each i, the mean of a curve's values at steps in (x[i-1], x[i]]; NaN if there are none."""
  steps, values = curve
  keep = np.isfinite(values)
  index = np.searchsorted(x_X, steps[keep], side='left')
  keep_index = index < len(x_X)
  count_X = np.bincount(index[keep_index], minlength=len(x_X))
  total_X = np.bincount(index[keep_index], weights=values[keep][keep_index], minlength=len(x_X))
  return np.divide(total_X, count_X, out=np.full(len(x_X), np.nan), where=count_X > 0)


def _series(arm: str, x_X: np.ndarray, rows: list[np.ndarray]) -> Series | None:
  """Returns the line of an arm; None if there are no values.

  rows: the values [X] of each seed, NaN where there is no value.
  """
  if not rows:
    return None
  y_SX = np.array(rows)
  there_X = ~np.isnan(y_SX).all(0)
  if not there_X.any():
    return None
  y_SX = y_SX[:, there_X]
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', RuntimeWarning)
    mean_X, low_X, high_X = np.nanmean(y_SX, 0), np.nanmin(y_SX, 0), np.nanmax(y_SX, 0)
  if len(y_SX) < 2:
    low_X = high_X = np.full_like(mean_X, np.nan)
  return Series(arm, x_X[there_X], mean_X, low_X, high_X, len(y_SX))


# Distributions of the newest probes


def histogram(sweep: Sweep, stage: str, domain: str, name: str, *, survival: bool = False) -> list[Series]:
  """Returns a histogram from the newest probe (`betarank eval probe`) of each run, as one line per arm.

  x is the middle of a bin, and y is the fraction of tokens in the bin. Probes without this histogram, and probes whose
  bins differ from those of the first probe, are left out.

  name: the name of the histogram in the results of a probe, such as 'rank_histogram'.
  survival: if True, x is the lower edge of a bin, and y is the fraction of tokens whose value is at least x.
  """
  out, first = [], None
  for arm in sweep.arms:
    shares: dict[Any, np.ndarray] = {}
    for run in _probed_alike(sweep, stage, arm):
      found = _domain(run, domain)
      edges_X, counts_X = (_numbers(setting(found, f'{name}.{part}')) for part in ('edges', 'counts'))
      if len(edges_X) != len(counts_X) + 1 or not np.isfinite(counts_X).all() or not counts_X.sum():
        continue
      first = edges_X if first is None else first
      if np.array_equal(edges_X, first):
        share_X = counts_X / counts_X.sum()
        shares[run.seed] = np.cumsum(share_X[::-1])[::-1] if survival else share_X
    if shares:
      x_X = first[:-1] if survival else (first[:-1] + first[1:]) / 2
      out.append(_series(arm, x_X, list(shares.values())))
  return out


def coverage(sweep: Sweep, stage: str, domain: str) -> list[Series]:
  """Returns the coverage (see probe.figures) from the newest probe of each run, as one line per arm.

  x is n, and y is the fraction of tokens to which the model gives a probability of at most 1/n.
  """
  out = []
  for arm in sweep.arms:
    found: dict[Any, dict[float, float]] = {}
    for run in _probed_alike(sweep, stage, arm):
      shares = _domain(run, domain).get('coverage')
      shares = shares if isinstance(shares, dict) else {}
      points = {float(n): number(share) for n, share in shares.items() if n.isdecimal() and number(share) > 0}
      if points:
        found[run.seed] = points
    if found and (x_X := np.array(sorted(set.intersection(*map(set, found.values()))))).size:
      out.append(_series(arm, x_X, [np.array([points[x] for x in x_X]) for points in found.values()]))
  return out


def _probed_alike(sweep: Sweep, stage: str, arm: str) -> list[Run]:
  """Returns the runs of an arm, at most one per seed, whose newest probes may be averaged: of the same step, tokens and
  settings, after training of the same length.
  """
  def differing(run: Run, other: Run) -> list[str]:
    (step, probe), (other_step, other_probe) = run.probe(), other.probe()
    return of_steps(run, step, other, other_step) + (
      [] if probe.get('deciding') == other_probe.get('deciding') else ['other tokens'])

  return list(alike([run for run in sweep.of(stage, arm) if run.probe()], differing)[0].values())


def _domain(run: Run, domain: str) -> dict[str, Any]:
  found = run.probe()
  return found[1].get('domains', {}).get(domain, {}) if found else {}


def _numbers(values: Any) -> np.ndarray:
  return np.array([number(x) for x in values], np.float64) if isinstance(values, list) else np.array([])


# Samples


def pass_curve(sweep: Sweep, stage: str, benchmark: str) -> list[Series]:
  """Returns Pass@k on a benchmark as a function of k, as one line per arm, with 95 % intervals over problems and seeds.

  k is 1, 2, 4, ..., up to the number of samples per problem. If this number differs between seeds, the smallest one is
  used.
  """
  out = []
  for arm in sweep.arms:
    sets = list(sample_sets(sweep.of(stage, arm), benchmark)[0].values())
    if not sets:
      continue
    most = min(found.samples.score_PN.shape[1] for found in sets)
    estimates = {}
    for k in [2**i for i in range(int(math.log2(most)) + 1)]:
      values_SP = aligned(sets, lambda m, k=k: m['pass_at_k'][:, k - 1])[0]
      if (found := estimate(values_SP, (0.0, 1.0), resamples=BAND_RESAMPLES)) is not None:
        estimates[k] = found
    if estimates:
      rows = np.array([(k, e.mean, e.low, e.high) for k, e in estimates.items()]).T
      out.append(Series(arm, *rows, len(sets)))
  return out
