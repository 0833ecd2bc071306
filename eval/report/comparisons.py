"""Compares arms (pre-training objectives) with their baselines, and computes an interval for each metric and
difference.

A metric has one value per run, or one value per run and problem. Runs are paired by seed. A difference is computed only
between runs that agree in everything except the objective (agreement.py). If two runs disagree in anything else, the
remark of the comparison says in what. A single seed doesn't show how much seeds differ. A difference from a single seed
may therefore have an interval over problems, but no verdict.

# S seeds  P problems
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from betarank.eval import paper
from betarank.eval.report.agreement import alike, disagreements, evaluated, of_steps
from betarank.eval.report.oddities import EDGE_SHARE
from betarank.eval.report.runs import SAME_SETTINGS, Run, SampleSet, Sweep, number
from betarank.eval.statistics import Estimate, Noise, bootstrap_interval, holm, noise, over_seeds, paired_difference

ALPHA = 0.05
CHANGE, EARLY = 'change', 'early change'  # subjects of comparisons of RL's change: to its end, to EARLY_SHARE of it
EARLY_SHARE = 0.25
BEFORE_RL = 'before RL'
SHARES = ('head_mass', 'tail_mass', 'ece', 'rank1_accuracy', 'pass_rate', 'truncated_share', 'score', *paper.BENCHMARKS,
          *paper.CATEGORIES, *paper.AVERAGES)
_REASONS = 3  # a remark names at most so many

ByProblem = Callable[[Mapping[str, np.ndarray]], np.ndarray]  # SampleSet.metrics -> [P]


@dataclasses.dataclass
class Comparison:
  """One metric of one arm (the runs with one objective), and its difference to the baseline arm.

  Attributes:
    stage: the stage of the runs, such as 'pre-training → RL'.
    subject: what the metric is measured on: a benchmark, a task, a data source, or a part of an RL run.
    metric: the name of the metric.
    arm, baseline: the names of the two arms.
    value: the mean of the metric over seeds and problems, with its interval; None if unknown. Seeds are averaged only
      if they were measured at the same step and in the same way, after training of the same length (agreement.alike).
    difference: the mean difference, arm minus baseline, on the same seeds and problems, with its interval; None if
      unknown.
    p_holm: the p-value of the difference after Holm's correction; NaN if there is no difference, or only one seed, or
      the same difference other than zero in all seeds.
    remark: why there is no difference, why it or the value is based on fewer seeds than there are, or that one
      seed, or several without spread, give no verdict; '' if there is nothing to remark.
    by_seed: {seed: mean of the metric over problems}, of the seeds in `value`.
    differences: {seed: mean difference over problems}.
    theirs: {seed: mean of the baseline's metric over problems}, of the seeds in `differences`.
    noise: the noise of the metric; None if it has fewer than two seeds, or no spread.
    difference_noise: the noise of the difference; None if it has fewer than two seeds, or no spread.
  """

  stage: str
  subject: str
  metric: str
  arm: str
  baseline: str
  value: Estimate | None
  difference: Estimate | None = None
  p_holm: float = math.nan
  remark: str = ''
  by_seed: dict[Any, float] = dataclasses.field(default_factory=dict)
  differences: dict[Any, float] = dataclasses.field(default_factory=dict)
  theirs: dict[Any, float] = dataclasses.field(default_factory=dict)
  noise: Noise | None = None
  difference_noise: Noise | None = None

  @property
  def verdict(self) -> str:
    """'beyond' if the difference is larger than noise (p_holm <= ALPHA), 'within' if it isn't; '' if there is no
    verdict.

    There is no verdict if `difference` is None, or if it comes from a single seed or has the same value other than zero
    in all seeds. `difference` is None if the arm is its own baseline, or if no runs could be compared.
    """
    if self.difference is None or math.isnan(self.p_holm):
      return ''
    return 'beyond' if self.p_holm <= ALPHA else 'within'


def correct(comparisons: Sequence[Comparison]) -> list[Comparison]:
  """Sets p_holm in all comparisons whose difference has several seeds. Returns all comparisons.

  Holm's correction is applied separately for each stage and metric, over all arms and subjects.
  """
  for family_of in {(c.stage, c.metric) for c in comparisons}:
    family = [c for c in comparisons if (c.stage, c.metric) == family_of and c.difference and c.difference.seeds > 1]
    for c, p in zip(family, holm([c.difference.p_value for c in family])):
      c.p_holm = float(p)
  return list(comparisons)


def pairs(sweep: Sweep, stage: str, arm: str) -> tuple[list[tuple[Run, Run]], list[str]]:
  """Returns (pairs of runs that can be compared, reasons why other pairs can't be compared).

  A pair consists of a run of the arm and a run of its baseline with the same seed, which agree in everything except the
  objective. If `arm` is itself the baseline, both lists are empty.
  """
  baseline = sweep.baselines[arm]
  if arm == baseline:
    return [], []
  mine, theirs = ({run.seed: run for run in reversed(sweep.of(stage, name))} for name in (arm, baseline))
  agreeing, reasons = [], []
  for seed in sorted(mine.keys() & theirs.keys(), key=str):
    found = disagreements(mine[seed], theirs[seed])
    reasons += found
    if not found:
      agreeing.append((mine[seed], theirs[seed]))
  if not mine.keys() & theirs.keys():
    reasons.append('no seed in common')
  return agreeing, list(dict.fromkeys(reasons))


def remark(left_out: Iterable[str], reasons: Iterable[str], baseline: str, difference: Estimate | None) -> str:
  """Returns the remark on a comparison; '' if there is nothing to remark.

  The remark says why the value leaves out some seeds, and why some pairs of runs weren't compared. If only one pair was
  compared, or if all pairs have the same difference, it adds that this gives no verdict.

  left_out: why the value leaves out seeds.
  reasons: why pairs weren't compared.
  baseline: the name of the baseline arm.
  difference: the mean difference over the pairs that were compared; None if there are none.
  """
  parts = [f'some seeds are not in the mean: {_first(left_out)}'] if left_out else []
  if reasons:
    parts.append(f'{"some seeds are not compared" if difference else f"not compared with {baseline}"}: '
                 f'{_first(reasons)}')
  if difference and difference.seeds == 1:
    parts.append('one seed: no verdict')
  elif difference and math.isnan(difference.p_value):
    parts.append('no spread between seeds: no verdict')
  return '; '.join(parts)


def _first(reasons: Iterable[str]) -> str:
  reasons = list(dict.fromkeys(reasons))
  return '; '.join(reasons[:_REASONS]) + ('; ...' if len(reasons) > _REASONS else '')


# Figures with one value per run


@dataclasses.dataclass(frozen=True)
class Measured:
  """The value of a metric for one run.

  Attributes:
    value: the value.
    step: the step at which the metric was measured.
    basis: what else the value depends on, such as the tokens and the settings of the evaluation. Two values may be
      compared only if they have the same basis.
  """

  value: float
  step: int
  basis: Any = None


Read = Callable[[Run, str], Measured | None]


def distributions(sweep: Sweep, metrics: Sequence[str]) -> list[Comparison]:
  """Compares arms by the metrics of the newest probe of each run. Returns one Comparison per stage, domain, metric and
  arm.

  A domain is a data source. If no run of a stage was probed, the metrics come from the last validation during training.
  """
  out = []
  for stage in sweep.stages:
    probed = {domain for run in sweep.of(stage) if run.probe() for domain in run.probe()[1]['domains']}
    validated = {name.split('/')[1] for run in sweep.of(stage) for name in run.curves
                 if name.startswith('eval/') and name.endswith('/ce_nats')}
    for domain in sorted(probed or validated):
      read = _probe_figure if probed else _validation_figure
      subject = domain if probed else f'{domain} (validation in training)'
      out += _by_seed(sweep, stage, subject, metrics, lambda run, metric, read=read, d=domain: read(run, d, metric))
  return correct(out)


def _probe_figure(run: Run, domain: str, metric: str) -> Measured | None:
  if not (found := run.probe()):
    return None
  step, probe = found
  return Measured(number(probe['domains'].get(domain, {}).get(metric)), step, probe.get('deciding'))


def _validation_figure(run: Run, domain: str, metric: str) -> Measured | None:
  steps, values = run.curves.get(f'eval/{domain}/{metric}', ((), ()))
  return Measured(float(values[-1]), int(steps[-1]), evaluated(run)) if len(values) else None


def dynamics(sweep: Sweep, metrics: Sequence[str]) -> list[Comparison]:
  """Compares arms by the metrics that were logged during RL. Returns one Comparison per stage, subject, metric and arm.

  The subject is one of these four:

  - 'start': the mean over the first tenth of the steps.
  - 'end': the mean over the last tenth of the steps.
  - CHANGE: 'end' minus 'start'.
  - EARLY: the mean over the steps between 15 % and 25 % of the run, minus 'start'.
  """
  out = []
  for stage in sweep.stages:
    if any(run.is_rl for run in sweep.of(stage)):
      for subject, part in (('start', 0), ('end', 1), (CHANGE, 2), (EARLY, 3)):
        out += _by_seed(sweep, stage, subject, metrics,
                        lambda run, metric, part=part: Measured(_edges(run, metric)[part], run.last_step))
  return correct(out)


def _edges(run: Run, metric: str) -> tuple[float, float, float, float]:
  """Returns the values of the four subjects of `dynamics` for a metric: (start, end, change, early change).

  All four are NaN if the metric wasn't logged.
  """
  _, values = run.curves.get(f'train/{metric}', ((), np.array([])))
  values = values[np.isfinite(values)]
  if not len(values):
    return (math.nan,) * 4
  size = max(1, round(EDGE_SHARE * len(values)))
  start, end = float(values[:size].mean()), float(values[-size:].mean())
  quarter = max(size, round(EARLY_SHARE * len(values)))
  return start, end, end - start, float(values[quarter - size:quarter].mean()) - start


def harness(sweep: Sweep) -> list[Comparison]:
  """Compares arms by their scores from lm-evaluation-harness. Returns one Comparison per stage, task and arm.

  A run's score on a task comes from the newest step that has one.
  """
  out = []
  for stage in sweep.stages:
    tasks = sorted({task for run in sweep.of(stage) for results in run.harness.values() for task in results})
    for task in tasks:
      out += _by_seed(sweep, stage, task, ('score',), lambda run, _, task=task: _harness_figure(run, task))
  return correct(out)


def _harness_figure(run: Run, task: str) -> Measured | None:
  step = max((step for step, results in run.harness.items() if task in results), default=None)
  if step is None:
    return None
  found = run.harness[step][task]
  return Measured(found['score'], step, (found['metric'], found['settings']))


def paper_averages(sweep: Sweep) -> list[Comparison]:
  """Compares arms by their scores on the paper's benchmarks. Returns one Comparison per stage, score and arm.

  The scores are those of the benchmarks, their means over each category of benchmarks, and the three averages of
  eval/paper.py.
  """
  members = {name: (name,) for name in paper.BENCHMARKS} | dict(paper.CATEGORIES)
  names = paper.CATEGORIES.keys()
  for average, of in (('knowledge', paper.KNOWLEDGE), ('reasoning', names - set(paper.KNOWLEDGE)), ('overall', names)):
    members[average] = tuple(name for category in sorted(of) for name in paper.CATEGORIES[category])

  def read(run: Run, metric: str) -> Measured | None:
    if (step := paper.newest_step(run)) is None:
      return None
    scores = paper.benchmark_scores(run, step)
    categories = paper.category_scores(scores)
    value = {**scores, **categories, **paper.paper_average(categories)}.get(metric, math.nan)
    return Measured(value, step, [paper.settings(run, step, name) for name in members[metric]])

  return correct([c for stage in sweep.stages for c in _by_seed(sweep, stage, 'benchmarks', list(members), read)])


def _by_seed(sweep: Sweep, stage: str, subject: str, metrics: Sequence[str], read: Read) -> list[Comparison]:
  """Compares arms by metrics that have one value per run. Returns one Comparison per metric and arm.

  read: a function that takes a run and a metric, and returns the value as Measured; None if the run has no value.
  """
  out = []
  for arm in sweep.arms:
    baseline = sweep.baselines[arm]
    agreeing, why_not = pairs(sweep, stage, arm)
    for metric in metrics:
      mine = {seed: found for seed, run in {run.seed: run for run in reversed(sweep.of(stage, arm))}.items()
              if (found := read(run, metric)) and math.isfinite(found.value)}
      differing = lambda run, other, mine=mine: _of_measuring(run, mine[run.seed], other, mine[other.seed])
      kept, left_out = alike([run for run in sweep.of(stage, arm) if run.seed in mine], differing)
      values = {seed: mine[seed].value for seed in kept}
      if not values:
        continue
      # A change can have either sign. Other figures can't be negative.
      bounds = (-math.inf, math.inf) if subject in (CHANGE, EARLY) else (0.0, 1.0 if metric in SHARES else math.inf)
      c = Comparison(stage, subject, metric, arm, baseline, over_seeds(list(values.values()), bounds=bounds),
                     by_seed=values, noise=noise(_column(values)))
      out.append(c)
      reasons, measured = list(why_not), {}
      for run, other in agreeing:
        a, b = mine.get(run.seed), read(other, metric)
        if not (a and b and math.isfinite(b.value)):
          continue
        found = _of_measuring(run, a, other, b)
        reasons += found
        if not found:
          measured[run.seed] = run, a.value, b.value
      kept, others = alike([run for run, *_ in measured.values()], differing)
      for seed, (_, a, b) in measured.items():
        if seed in kept:
          c.differences[seed], c.theirs[seed] = _difference(a, b), b
      if c.differences:
        c.difference = over_seeds(list(c.differences.values()))
        c.difference_noise = noise(_column(c.differences))
      c.remark = remark(left_out, [*reasons, *others], baseline, c.difference)
  return out


def _of_measuring(run: Run, mine: Measured, other: Run, theirs: Measured) -> list[str]:
  """Compares how a metric of two runs was measured. Returns [] if it was in the same way, else the reasons why the two
  values can't be compared.
  """
  return of_steps(run, mine.step, other, theirs.step) + (
    [] if mine.basis == theirs.basis else ['measured on other tokens or with other settings'])


def _column(by_seed: Mapping[Any, float]) -> np.ndarray:
  """Returns the values of a dict as an array [S, 1], one row per seed."""
  return np.array(list(by_seed.values()), np.float64)[:, None]


def _difference(a: float, b: float) -> float:
  """Returns a - b, or 0 if a and b differ only by rounding.

  Without this, a difference of 1e-17 in every seed would count as significant.
  """
  return 0.0 if math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-15) else a - b


# Samples


def sampled_benchmarks(sweep: Sweep, stage: str) -> list[str]:
  return sorted({name for run in sweep.of(stage) for name in run.samples})


def pass_k(sweep: Sweep) -> int:
  """Returns the k of Pass@k to report: the largest power of two that is at most half the number of samples per problem.

  k is at least 1. If the number of samples differs between files, the smallest one is used. Without any samples, k is
  64, as in the paper, which draws 128 samples.
  """
  sizes = [found.samples.score_PN.shape[1] for run in sweep.runs for there in run.samples.values()
           for found in there.values()]
  return 2 ** int(math.log2(max(min(sizes) // 2, 1))) if sizes else 64


def benchmark_metrics(k: int) -> dict[str, ByProblem]:
  """Returns {metric: function}, for the metrics that are computed from samples.

  Each function takes SampleSet.metrics, and returns the metric's value for each problem. Metrics about right answers
  come first.

  k: the k of Pass@k.
  """
  return {
    'avg_at_n': lambda m: m['avg_at_n'], 'cons_at_n': lambda m: m['cons_at_n'],
    f'pass_at_{k}': lambda m: m['pass_at_k'][:, k - 1], 'distinct_answers': lambda m: m['distinct_answers'],
    'answer_entropy_nats': lambda m: m['answer_entropy_nats'], 'length_tokens': lambda m: m['length_tokens'],
    'truncated_share': lambda m: m['truncated_share'],
  }


def is_share(metric: str) -> bool:
  return metric.startswith(('avg_at', 'cons_at', 'pass_at')) or metric.endswith('_share')


def benchmarks(sweep: Sweep, k: int) -> list[Comparison]:
  """Compares arms by the newest samples of each run. Returns one Comparison per stage, benchmark, metric and arm.

  k: the k of Pass@k.
  """
  out = []
  for stage in sweep.stages:
    for benchmark in sampled_benchmarks(sweep, stage):
      for arm in sweep.arms:
        mine, left_out = sample_sets(sweep.of(stage, arm), benchmark)
        agreeing, why_not = pairs(sweep, stage, arm)
        both = [(run, run.sampled(benchmark), other, other.sampled(benchmark)) for run, other in agreeing
                if run.sampled(benchmark) and other.sampled(benchmark)]
        reasons, usable = list(why_not), {}
        for run, (step, found), other, (other_step, theirs) in both:
          differing = of_steps(run, step, other, other_step) + _of_sampling(found, theirs)
          reasons += differing
          if not differing:
            usable[run.seed] = found, theirs
        kept, others = sample_sets([run for run, *_ in both if run.seed in usable], benchmark)
        usable = {seed: pair for seed, pair in usable.items() if seed in kept}
        for metric, read in benchmark_metrics(k).items() if mine else ():
          c = Comparison(stage, benchmark, metric, arm, sweep.baselines[arm], None)
          out.append(_compared(c, mine, usable, left_out, [*reasons, *others], read))
  return correct(out)


def gains(sweep: Sweep, k: int) -> list[Comparison]:
  """Compares samples after RL with samples before RL. Returns one Comparison per stage, benchmark, metric and arm.

  For each RL run, the newest samples are compared with the samples of the checkpoint from which the run started.

  k: the k of Pass@k.
  """
  out = []
  for stage in sweep.stages:
    for benchmark in sampled_benchmarks(sweep, stage):
      for arm in sweep.arms:
        runs = [run for run in sweep.of(stage, arm) if run.is_rl and run.parent and run.sampled(benchmark)
                and run.parent.sampled(benchmark, run.parent_step)]
        mine, left_out = sample_sets(runs, benchmark)
        before = {run.seed: run.parent.sampled(benchmark, run.parent_step)[1] for run in reversed(runs)}
        reasons = [reason for seed, after in mine.items() for reason in _of_sampling(after, before[seed])]
        usable = {seed: (after, before[seed]) for seed, after in mine.items() if not _of_sampling(after, before[seed])}
        for metric, read in benchmark_metrics(k).items() if mine else ():
          c = Comparison(stage, benchmark, metric, arm, BEFORE_RL, None)
          out.append(_compared(c, mine, usable, left_out, reasons, read))
  return correct(out)


def sample_sets(runs: Iterable[Run], benchmark: str) -> tuple[dict[Any, SampleSet], list[str]]:
  """Returns ({seed: samples}, reasons): the newest samples on a benchmark of those runs of an arm that may be averaged,
  and the reasons why those of other runs aren't among them (see agreement.alike).

  Runs without samples on the benchmark are left out.
  """
  def differing(run: Run, other: Run) -> list[str]:
    (step, found), (other_step, theirs) = run.sampled(benchmark), other.sampled(benchmark)
    return of_steps(run, step, other, other_step) + _of_sampling(found, theirs)

  kept, reasons = alike([run for run in runs if run.sampled(benchmark)], differing)
  return {seed: run.sampled(benchmark)[1] for seed, run in kept.items()}, reasons


def _of_sampling(found: SampleSet, other: SampleSet) -> list[str]:
  """Compares the settings of two sets of samples. Returns [] if they are equal, else a list with one reason.

  The reason says why the samples can't be compared: it names the settings that differ.
  """
  differing = [key for key in SAME_SETTINGS if found.settings.get(key) != other.settings.get(key)]
  return [f'sampled with other {", ".join(differing)}'] if differing else []


def _compared(
  c: Comparison, sets: Mapping[Any, SampleSet], usable: Mapping[Any, tuple[SampleSet, SampleSet]],
  left_out: list[str], reasons: list[str], read: ByProblem,
) -> Comparison:
  """Completes a comparison of samples. Sets all fields that are computed from the samples, except p_holm, and returns
  the comparison.

  Args:
    c: the comparison.
    sets: {seed: samples of the arm}, from which `value` is computed.
    usable: {seed: (samples of the arm, samples to compare with)}, from which `difference` is computed.
    left_out: why other samples of the arm aren't among `sets`.
    reasons: why other pairs of runs can't be compared.
    read: a function that takes SampleSet.metrics, and returns the metric's value for each problem.
  """
  bounds = (0.0, 1.0) if is_share(c.metric) else (0.0, math.inf)
  values_SP = aligned(sets.values(), read)[0]
  c.value, c.by_seed, c.noise = estimate(values_SP, bounds), _means(sets, values_SP), noise(values_SP)
  reasons = list(reasons)
  if usable:
    both_SP, problems = aligned([x for pair in usable.values() for x in pair], read)
    differences_SP = both_SP[0::2] - both_SP[1::2]
    c.differences, c.difference_noise = _means(usable, differences_SP), noise(differences_SP)
    there_P = ~np.isnan(differences_SP).any(0)
    c.theirs = _means(usable, both_SP[1::2, there_P])
    try:
      c.difference = paired_difference(both_SP[0::2], both_SP[1::2],
                                       bounds=(-1, 1) if bounds[1] == 1 else (-math.inf, math.inf))
    except ValueError as error:
      reasons.append('no problem in common' if not problems else str(error))
  c.remark = remark(left_out, reasons, c.baseline, c.difference)
  return c


def _means(seeds: Iterable[Any], values_SP: np.ndarray) -> dict[Any, float]:
  """Returns {seed: mean over problems}. Problems without a value in some seed are left out; {} if no problem remains.

  seeds: the seeds of the rows of `values_SP`.
  """
  x_SP = values_SP[:, ~np.isnan(values_SP).any(0)]
  return dict(zip(seeds, x_SP.mean(1).tolist())) if x_SP.size else {}


def aligned(sets: Iterable[SampleSet], read: ByProblem) -> tuple[np.ndarray, list[str]]:
  """Returns the values of a metric on the P questions that all S sets of samples have, and the names of the questions.

  The values are float64 [S, P].

  read: a function that takes SampleSet.metrics, and returns one value of the metric per question.
  """
  sets = list(sets)
  shared = set.intersection(*(set(found.samples.questions) for found in sets))
  problems = [name for name in sets[0].samples.questions if name in shared]
  rows = []
  for found in sets:
    index = {name: i for i, name in enumerate(found.samples.questions)}
    rows.append(read(found.metrics)[[index[name] for name in problems]])
  return np.array(rows, np.float64).reshape(len(sets), len(problems)), problems


def estimate(values_SP: np.ndarray, bounds: tuple[float, float], **settings) -> Estimate | None:
  """Returns the mean and its interval over problems and seeds; None if no problem has a value in all seeds.

  values_SP: one row per seed and one column per problem.
  bounds, settings: arguments of statistics.bootstrap_interval.
  """
  try:
    return bootstrap_interval(values_SP, bounds=bounds, **settings)
  except ValueError:
    return None
