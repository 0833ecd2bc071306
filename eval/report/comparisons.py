"""Arms against the baseline arm: curves with seed bands, and figures with paired differences and their noise.

# S seeds  P problems  X points of a curve
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from betarank.eval.report.runs import Run, SampleSet, Sweep, number, setting
from betarank.eval.statistics import Estimate, bootstrap_interval, holm, over_seeds, paired_difference

ALPHA = 0.05
BINS = 100  # points of a curve
BAND_RESAMPLES = 2000
EDGE_SHARE = 0.1  # of the steps of an RL run: its "start" and its "end"
CHANGE = 'change'
BEFORE = 'before RL'
SHARES = ('tail_mass', 'ece', 'rank1_accuracy', 'pass_rate', 'truncated_share')
# What samples must agree in to be compared.
SAME_SETTINGS = ('benchmark', 'data_sha256', 'temperature', 'top_p', 'top_k', 'max_new_tokens', 'n', 'shots',
                 'answer_format')


@dataclasses.dataclass
class Comparison:
  """One figure of one arm, and its difference to the baseline's on the same problems and seeds."""

  stage: str
  subject: str  # a benchmark, or a domain of the probe
  metric: str
  arm: str
  baseline: str
  value: Estimate | None
  difference: Estimate | None = None
  p_holm: float = math.nan
  remark: str = ''  # why there is no difference, or what is odd about it

  @property
  def verdict(self) -> str:
    """'beyond' noise after Holm's correction, 'within' it, or '' where that can't be told."""
    if self.difference is None or math.isnan(self.p_holm):
      return ''
    return 'beyond' if self.p_holm <= ALPHA else 'within'


def correct(comparisons: Sequence[Comparison]) -> list[Comparison]:
  """Holm's correction over all arms and subjects of each stage and metric."""
  for family_of in {(c.stage, c.metric) for c in comparisons}:
    family = [c for c in comparisons if (c.stage, c.metric) == family_of and c.difference is not None]
    for c, p in zip(family, holm([c.difference.p_value for c in family])):
      c.p_holm = float(p)
  return list(comparisons)


# Curves


@dataclasses.dataclass
class Series:
  """A line of a figure: mean over seeds at x, and what the band shows; low and high are NaN for one seed."""

  arm: str
  x_X: np.ndarray
  mean_X: np.ndarray
  low_X: np.ndarray
  high_X: np.ndarray
  seeds: int


def curve(sweep: Sweep, stage: str, name: str, *, minus: str | None = None) -> list[Series]:
  """The metric `name` by arm; with `minus`, each seed less the same seed of that arm.

  Of more than BINS steps, means over as many bins. The band is the range over seeds. Arms without the metric, or
  without a seed in common with `minus`, are left out.
  """
  steps = [run.curves[name][0] for run in sweep.of(stage) if name in run.curves]
  x_X = np.unique(np.concatenate([*steps, []]))
  if len(x_X) > BINS:
    x_X = np.linspace(0, x_X[-1], BINS + 1)[1:]
  binned = {arm: {run.seed: _binned(*run.curves[name], x_X) for run in reversed(sweep.of(stage, arm))
                  if name in run.curves} for arm in sweep.arms}
  out = []
  for arm, by_seed in binned.items():
    if minus is not None:
      by_seed = {seed: y_X - binned[minus][seed] for seed, y_X in by_seed.items() if seed in binned.get(minus, {})}
    if not by_seed or arm == minus:
      continue
    y_SX = np.array(list(by_seed.values()))
    there_X = ~np.isnan(y_SX).all(0)
    if not there_X.any():
      continue
    y_SX = y_SX[:, there_X]
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', RuntimeWarning)
      mean_X, low_X, high_X = np.nanmean(y_SX, 0), np.nanmin(y_SX, 0), np.nanmax(y_SX, 0)
    if len(y_SX) < 2:
      low_X = high_X = np.full_like(mean_X, np.nan)
    out.append(Series(arm, x_X[there_X], mean_X, low_X, high_X, len(y_SX)))
  return out


def _binned(steps: np.ndarray, values: np.ndarray, x_X: np.ndarray) -> np.ndarray:
  """[X]: the mean of the values at steps in (x[i-1], x[i]]; NaN where there is none."""
  keep = np.isfinite(values)
  index = np.searchsorted(x_X, steps[keep], side='left')
  count_X = np.bincount(index, minlength=len(x_X))
  total_X = np.bincount(index, weights=values[keep], minlength=len(x_X))
  return np.divide(total_X, count_X, out=np.full(len(x_X), np.nan), where=count_X > 0)


def histogram(sweep: Sweep, stage: str, domain: str, name: str, *, survival: bool = False) -> list[Series]:
  """A histogram of the newest probes by arm, as shares of the tokens; with `survival`, the share at or above an edge.

  x is the middle of a bin, or with `survival` its lower edge. Probes with other edges than the first one's, or that
  have no such histogram, are left out.
  """
  out, first = [], None
  for arm in sweep.arms:
    shares: dict[Any, np.ndarray] = {}
    for run in reversed(sweep.of(stage, arm)):
      found = (run.probe() or {}).get('domains', {}).get(domain)
      edges_X, counts_X = (_numbers(setting(found, f'{name}.{part}')) for part in ('edges', 'counts'))
      if len(edges_X) != len(counts_X) + 1 or not np.isfinite(counts_X).all() or not counts_X.sum():
        continue
      first = edges_X if first is None else first
      if np.array_equal(edges_X, first):
        share_X = counts_X / counts_X.sum()
        shares[run.seed] = np.cumsum(share_X[::-1])[::-1] if survival else share_X
    if shares:
      y_SX = np.array(list(shares.values()))
      x_X = first[:-1] if survival else (first[:-1] + first[1:]) / 2
      band = (y_SX.min(0), y_SX.max(0)) if len(y_SX) > 1 else (np.full(len(x_X), np.nan),) * 2
      out.append(Series(arm, x_X, y_SX.mean(0), *band, len(y_SX)))
  return out


def coverage(sweep: Sweep, stage: str, domain: str) -> list[Series]:
  """The share of tokens to which the newest probe gives a probability of at most 1/N, over N, by arm."""
  out = []
  for arm in sweep.arms:
    found: dict[Any, dict[float, float]] = {}
    for run in reversed(sweep.of(stage, arm)):
      domains = (run.probe() or {}).get('domains', {})
      shares = domains.get(domain, {}).get('coverage')
      shares = shares if isinstance(shares, dict) else {}
      points = {float(n): number(share) for n, share in shares.items() if n.isdecimal() and number(share) > 0}
      if points:
        found[run.seed] = points
    if found:
      x_X = np.array(sorted(set.intersection(*map(set, found.values()))))
      y_SX = np.array([[points[x] for x in x_X] for points in found.values()])
      band = (y_SX.min(0), y_SX.max(0)) if len(y_SX) > 1 else (np.full(len(x_X), np.nan),) * 2
      out.append(Series(arm, x_X, y_SX.mean(0), *band, len(y_SX)))
  return out


def _numbers(values: Any) -> np.ndarray:
  return np.array([number(x) for x in values], np.float64) if isinstance(values, list) else np.array([])


def pass_curve(sweep: Sweep, stage: str, benchmark: str) -> list[Series]:
  """Pass@k over k = 1, 2, 4, ..., n by arm; the band is the 95 % interval over problems and seeds."""
  out = []
  for arm in sweep.arms:
    sets = _samples(sweep, stage, arm, benchmark)
    if not sets:
      continue
    most = min(found.samples.score_PN.shape[1] for found in sets.values())
    estimates = {}
    for k in [2**i for i in range(int(math.log2(most)) + 1)]:
      values_SP = _aligned(list(sets.values()), lambda m, k=k: m['pass_at_k'][:, k - 1])[0]
      if (found := _estimate(values_SP, (0.0, 1.0), resamples=BAND_RESAMPLES)) is not None:
        estimates[k] = found
    if estimates:
      rows = np.array([(k, e.mean, e.low, e.high) for k, e in estimates.items()]).T
      out.append(Series(arm, *rows, len(sets)))
  return out


# Figures a checkpoint has one of


def distributions(sweep: Sweep, metrics: Sequence[str]) -> list[Comparison]:
  """Figures of the newest probe, by stage, domain and arm; where a stage has no probe, of the last validation."""
  out = []
  for stage in sweep.stages:
    probed = {domain for run in sweep.of(stage) for domain in (run.probe() or {}).get('domains', {})}
    validated = {name.split('/')[1] for run in sweep.of(stage) for name in run.curves
                 if name.startswith('eval/') and name.endswith('/ce_nats')}
    for domain in sorted(probed or validated):
      read = _probe_figure if probed else _validation_figure
      subject = domain if probed else f'{domain} (validation in training)'
      out += _by_seed(sweep, stage, subject, metrics, lambda run, metric, read=read, d=domain: read(run, d, metric))
  return correct(out)


def _probe_figure(run: Run, domain: str, metric: str) -> tuple[float, Any]:
  probe = run.probe() or {}
  domains = probe.get('domains', {})
  found = domains.get(domain) if isinstance(domains, dict) else None
  return number((found or {}).get(metric)), probe.get('deciding')


def _validation_figure(run: Run, domain: str, metric: str) -> tuple[float, Any]:
  _, values = run.curves.get(f'eval/{domain}/{metric}', ((), ()))
  return (float(values[-1]) if len(values) else math.nan), None


def dynamics(sweep: Sweep, metrics: Sequence[str]) -> list[Comparison]:
  """RL's logged figures at its start, at its end, and the change, each a mean over a tenth of the steps."""
  out = []
  for stage in sweep.stages:
    if any(run.is_rl for run in sweep.of(stage)):
      for subject, part in (('start', 0), ('end', 1), (CHANGE, 2)):
        read = lambda run, metric, part=part: (_edges(run, metric)[part], None)
        out += _by_seed(sweep, stage, subject, metrics, read)
  return correct(out)


def _edges(run: Run, metric: str) -> tuple[float, float, float]:
  _, values = run.curves.get(f'train/{metric}', ((), np.array([])))
  values = values[np.isfinite(values)]
  size = max(1, round(EDGE_SHARE * len(values)))
  if not len(values):
    return (math.nan,) * 3
  start, end = float(values[:size].mean()), float(values[-size:].mean())
  return start, end, end - start


def _by_seed(
  sweep: Sweep, stage: str, subject: str, metrics: Sequence[str],
  read: Callable[[Run, str], tuple[float, Any]],
) -> list[Comparison]:
  """Comparisons of one figure a run, paired by seed. read(run, metric) -> (figure, what it must agree in)."""
  baseline, out = sweep.arms[0], []
  for metric in metrics:
    found = {arm: {run.seed: read(run, metric) for run in reversed(sweep.of(stage, arm))} for arm in sweep.arms}
    found = {arm: {seed: pair for seed, pair in by_seed.items() if math.isfinite(pair[0])}
             for arm, by_seed in found.items()}
    for arm, by_seed in found.items():
      if not by_seed:
        continue
      # A change has either sign; all else that is measured here can't be negative.
      bounds = (-math.inf, math.inf) if subject == CHANGE else (0.0, 1.0 if metric in SHARES else math.inf)
      c = Comparison(stage, subject, metric, arm, baseline, over_seeds([x for x, _ in by_seed.values()], bounds=bounds))
      out.append(c)
      if arm == baseline:
        continue
      common = [seed for seed in by_seed if seed in found[baseline]]
      if not common:
        c.remark = f'no seed in common with {baseline}'
      elif any(by_seed[seed][1] != found[baseline][seed][1] for seed in common):
        c.remark = f'not comparable: measured on other tokens than {baseline}'
      else:
        c.difference = over_seeds([_difference(by_seed[seed][0], found[baseline][seed][0]) for seed in common])
        c.remark = 'one seed: its noise is unknown' if len(common) == 1 else ''
  return out


def _difference(a: float, b: float) -> float:
  """a - b, where rounding alone is no difference: arms that agree must not differ by 1e-17 with certainty."""
  return 0.0 if math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-15) else a - b


# Samples


def sampled_benchmarks(sweep: Sweep, stage: str) -> list[str]:
  return sorted({name for run in sweep.of(stage) for name in run.samples})


def pass_k(sweep: Sweep) -> int:
  """The k to report: the largest power of two up to half the samples of a problem, as the paper's 64 of 128."""
  sizes = [found.samples.score_PN.shape[1] for run in sweep.runs for there in run.samples.values()
           for found in there.values()]
  return 2 ** int(math.log2(max(min(sizes) // 2, 1))) if sizes else 64


def benchmark_metrics(k: int) -> dict[str, Callable[[dict[str, np.ndarray]], np.ndarray]]:
  """Metric name -> its value a problem, from SampleSet.metrics. The shares come first."""
  return {
    'avg_at_n': lambda m: m['avg_at_n'], 'cons_at_n': lambda m: m['cons_at_n'],
    f'pass_at_{k}': lambda m: m['pass_at_k'][:, k - 1], 'distinct_answers': lambda m: m['distinct_answers'],
    'answer_entropy_nats': lambda m: m['answer_entropy_nats'], 'length_tokens': lambda m: m['length_tokens'],
    'truncated_share': lambda m: m['truncated_share'],
  }


def is_share(metric: str) -> bool:
  return metric.startswith(('avg_at', 'cons_at', 'pass_at')) or metric.endswith('_share')


def benchmarks(sweep: Sweep, k: int) -> list[Comparison]:
  """Every benchmark's figures by stage and arm, newest samples of each run, paired with the baseline's."""
  out = []
  for stage in sweep.stages:
    for benchmark in sampled_benchmarks(sweep, stage):
      sets = {arm: _samples(sweep, stage, arm, benchmark) for arm in sweep.arms}
      for metric, read in benchmark_metrics(k).items():
        out += [_compared(Comparison(stage, benchmark, metric, arm, sweep.arms[0], None), there,
                          sets[sweep.arms[0]] if arm != sweep.arms[0] else None, read)
                for arm, there in sets.items() if there]
  return correct(out)


def gains(sweep: Sweep, k: int) -> list[Comparison]:
  """What RL made of each arm: its samples against those of the checkpoint it started from, seed by seed."""
  out = []
  for stage in sweep.stages:
    for benchmark in sampled_benchmarks(sweep, stage):
      for arm in sweep.arms:
        runs = [run for run in sweep.of(stage, arm) if run.is_rl and run.parent]
        before = {run.seed: found[1] for run in runs if (found := run.parent.sampled(benchmark))}
        after = {run.seed: found[1] for run in runs if run.seed in before and (found := run.sampled(benchmark))}
        for metric, read in benchmark_metrics(k).items() if after else ():
          out.append(_compared(Comparison(stage, benchmark, metric, arm, BEFORE, None), after, before, read))
  return correct(out)


def _samples(sweep: Sweep, stage: str, arm: str, benchmark: str) -> dict[Any, SampleSet]:
  """seed -> newest samples."""
  runs = reversed(sweep.of(stage, arm))
  return {run.seed: found[1] for run in runs if (found := run.sampled(benchmark))}


def _compared(
  c: Comparison, sets: dict[Any, SampleSet], others: dict[Any, SampleSet] | None,
  read: Callable[[dict[str, np.ndarray]], np.ndarray],
) -> Comparison:
  """Fills in value and difference; others: the baseline's samples, None for the baseline itself."""
  bounds = (0.0, 1.0) if is_share(c.metric) else (0.0, math.inf)
  c.value = _estimate(_aligned(list(sets.values()), read)[0], bounds)
  if others is None:
    return c
  common = [seed for seed in sets if seed in others]
  pairs = [(sets[seed], others[seed]) for seed in common]
  differing = {key for a, b in pairs for key in SAME_SETTINGS if a.settings.get(key) != b.settings.get(key)}
  if not common:
    c.remark = f'no seed in common with {c.baseline}'
  elif differing:
    c.remark = f'not comparable with {c.baseline}: {", ".join(sorted(differing))} differ'
  else:
    both_SP, problems = _aligned([x for pair in pairs for x in pair], read)
    a_SP, b_SP = both_SP[0::2], both_SP[1::2]
    if problems:
      try:
        c.difference = paired_difference(a_SP, b_SP, bounds=(-1, 1) if bounds[1] == 1 else (-math.inf, math.inf))
      except ValueError as error:
        c.remark = str(error)
    else:
      c.remark = f'no problem in common with {c.baseline}'
    steps = {tuple(str(x.settings.get('step')) for x in pair) for pair in pairs}
    if c.baseline != BEFORE and any(a != b for a, b in steps):
      c.remark = c.remark or 'other steps: ' + ', '.join(f'{a} against {b}' for a, b in sorted(steps))
    if len(common) == 1:
      c.remark = c.remark or 'one seed: intervals are over problems only'
  return c


def _aligned(sets: Iterable[SampleSet], read: Callable) -> tuple[np.ndarray, list[str]]:
  """([S, P] values on the problems that all sets have, their names)."""
  sets = list(sets)
  shared = set.intersection(*(set(found.samples.problems) for found in sets))
  problems = [name for name in sets[0].samples.problems if name in shared]
  rows = []
  for found in sets:
    index = {name: i for i, name in enumerate(found.samples.problems)}
    rows.append(read(found.metrics)[[index[name] for name in problems]])
  return np.array(rows, np.float64).reshape(len(sets), len(problems)), problems


def _estimate(values_SP: np.ndarray, bounds: tuple[float, float], **settings) -> Estimate | None:
  try:
    return bootstrap_interval(values_SP, bounds=bounds, **settings)
  except ValueError:
    return None
