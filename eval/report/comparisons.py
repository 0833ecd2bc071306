"""Compares arms with their baselines, and computes an interval for each metric and each difference.

A metric has one value per run, or one value per run and problem. Runs are paired by seed. A difference is computed only
between runs that agree in everything but the objective (agreement.py). If two runs disagree in anything else, the
remark of the comparison names it. A difference from a single seed may have an interval over problems, but it has no
verdict, because one seed doesn't show how much seeds differ.

# S seeds  P problems
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from betarank.eval import paper
from betarank.eval.report.agreement import disagreements, of_steps
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
  """One metric of one arm (the runs with one objective), and its difference to the baseline arm on the same seeds and
  problems.

  Attributes:
    subject: what the metric is measured on: a benchmark, a task, a domain of the probe, or a part of an RL run.
    value, difference: the metric's mean and the difference, with their intervals; None if unknown.
    p_holm: the p-value of the difference after Holm's correction; NaN if the difference comes from a single seed.
    remark: why there is no difference, or what limits it.
    by_seed, differences: {seed: the metric's mean in this seed's run} and {seed: difference}.
    noise, difference_noise: the noise of the metric and of the difference; None if they have fewer than two seeds.
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
  noise: Noise | None = None
  difference_noise: Noise | None = None

  @property
  def verdict(self) -> str:
    """'beyond' if the difference is larger than noise, after Holm's correction; 'within' if it isn't.

    '' if there is no verdict: `difference` is None (the arm is its own baseline, or no runs could be compared), or the
    difference comes from a single seed.
    """
    if self.difference is None or math.isnan(self.p_holm):
      return ''
    return 'beyond' if self.p_holm <= ALPHA else 'within'


def correct(comparisons: Sequence[Comparison]) -> list[Comparison]:
  """Sets p_holm of all comparisons that have several seeds. Returns all comparisons.

  Holm's correction is applied to each stage and metric separately, over all arms and subjects.
  """
  for family_of in {(c.stage, c.metric) for c in comparisons}:
    family = [c for c in comparisons if (c.stage, c.metric) == family_of and c.difference and c.difference.seeds > 1]
    for c, p in zip(family, holm([c.difference.p_value for c in family])):
      c.p_holm = float(p)
  return list(comparisons)


def pairs(sweep: Sweep, stage: str, arm: str) -> tuple[list[tuple[Run, Run]], list[str]]:
  """Returns (pairs of runs that can be compared, reasons why other pairs can't be compared).

  A pair is (run of the arm, run of its baseline). Both runs have the same seed and agree in everything but the
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


def remark(reasons: Iterable[str], baseline: str, compared: int) -> str:
  """Returns a remark on a comparison; '' if there is nothing to remark.

  The remark says why pairs weren't compared. If only one pair was compared, it says that one seed gives no verdict.

  reasons: why pairs weren't compared.
  baseline: the name of the baseline arm.
  compared: the number of pairs that were compared.
  """
  reasons = list(dict.fromkeys(reasons))
  shown = '; '.join(reasons[:_REASONS]) + ('; ...' if len(reasons) > _REASONS else '')
  if not compared:
    return f'not compared with {baseline}: {shown}' if reasons else ''
  parts = [f'some seeds are not compared: {shown}'] if reasons else []
  return '; '.join([*parts, *(['one seed: no verdict'] if compared == 1 else [])])


# Figures with one value per run


@dataclasses.dataclass(frozen=True)
class Measured:
  """A metric of a run at a step. Two values may be compared only if their `basis` is equal.

  basis: what the value depends on besides the run, such as the tokens and the settings of the evaluation.
  """

  value: float
  step: int
  basis: Any = None


Read = Callable[[Run, str], Measured | None]


def distributions(sweep: Sweep, metrics: Sequence[str]) -> list[Comparison]:
  """Compares arms by the metrics of their newest probes. Returns one Comparison per stage, domain, metric and arm.

  A domain is a source of the data. If a stage has no probes, the metrics are those of the last validation in training.
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
  return Measured(float(values[-1]), int(steps[-1])) if len(values) else None


def dynamics(sweep: Sweep, metrics: Sequence[str]) -> list[Comparison]:
  """Returns comparisons of the metrics that RL logged: the value at the start, the value at the end, the change, and
  the early change.

  Start and end are means over the first and the last tenth of the steps. The early change is the difference between the
  start and the mean over the tenth of the steps that ends after the first quarter.
  """
  out = []
  for stage in sweep.stages:
    if any(run.is_rl for run in sweep.of(stage)):
      for subject, part in (('start', 0), ('end', 1), (CHANGE, 2), (EARLY, 3)):
        out += _by_seed(sweep, stage, subject, metrics,
                        lambda run, metric, part=part: Measured(_edges(run, metric)[part], run.last_step))
  return correct(out)


def _edges(run: Run, metric: str) -> tuple[float, float, float, float]:
  """Returns (start, end, end - start, early - start) of a metric.

  start, end and early are means over a tenth of the steps at which the metric was logged: the first, the last, and the
  one that ends at EARLY_SHARE of the steps.
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
  """Returns comparisons of the scores from lm-evaluation-harness, by stage and task.

  The score of a run comes from its newest step that has a score for the task.
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
  """Returns comparisons of the score on each of the paper's benchmarks, and of the averages of these scores.

  As in the paper, there is an average for each category of benchmarks, and three averages over categories (see
  eval/paper.py).
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
  """Returns comparisons of metrics that have one value per run. Runs are paired by seed.

  read: a function that takes a run and a metric, and returns a Measured, or None if the run lacks the metric.
  """
  out = []
  for arm in sweep.arms:
    baseline = sweep.baselines[arm]
    agreeing, why_not = pairs(sweep, stage, arm)
    for metric in metrics:
      values = {seed: found.value for seed, run in {run.seed: run for run in reversed(sweep.of(stage, arm))}.items()
                if (found := read(run, metric)) and math.isfinite(found.value)}
      if not values:
        continue
      # A change can have either sign. Other figures can't be negative.
      bounds = (-math.inf, math.inf) if subject in (CHANGE, EARLY) else (0.0, 1.0 if metric in SHARES else math.inf)
      c = Comparison(stage, subject, metric, arm, baseline, over_seeds(list(values.values()), bounds=bounds),
                     by_seed=values, noise=noise(_column(values)))
      out.append(c)
      if arm == baseline:
        continue
      reasons = list(why_not)
      for run, other in agreeing:
        a, b = read(run, metric), read(other, metric)
        if not (a and b and math.isfinite(a.value) and math.isfinite(b.value)):
          continue
        differing = of_steps(run, a.step, other, b.step) + (
          [] if a.basis == b.basis else ['measured on other tokens or with other settings'])
        reasons += differing
        if not differing:
          c.differences[run.seed] = _difference(a.value, b.value)
      if c.differences:
        c.difference = over_seeds(list(c.differences.values()))
        c.difference_noise = noise(_column(c.differences))
      c.remark = remark(reasons, baseline, len(c.differences))
  return out


def _column(by_seed: Mapping[Any, float]) -> np.ndarray:
  """Returns the values of a dict as an array [S, 1]."""
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
  """Returns the k of Pass@k to report: the largest power of two that is at most half the samples per problem, but at
  least 1.

  If sets of samples differ in size, the smallest set decides. If there are no samples, k is 64, as in the paper, which
  draws 128 samples.
  """
  sizes = [found.samples.score_PN.shape[1] for run in sweep.runs for there in run.samples.values()
           for found in there.values()]
  return 2 ** int(math.log2(max(min(sizes) // 2, 1))) if sizes else 64


def benchmark_metrics(k: int) -> dict[str, ByProblem]:
  """Returns {metric: function}. A function takes the attribute `metrics` of a SampleSet, and returns the values [P].

  There is one value for each of the P problems. Metrics that are shares of right answers come first.

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
  """Returns a comparison for each stage, benchmark, arm and metric, from the newest samples of each run.

  The difference is between an arm and its baseline. It is computed from pairs of runs with the same seed.

  k: the k of Pass@k.
  """
  out = []
  for stage in sweep.stages:
    for benchmark in sampled_benchmarks(sweep, stage):
      for arm in sweep.arms:
        mine = sample_sets(sweep, stage, arm, benchmark)
        agreeing, why_not = pairs(sweep, stage, arm)
        both = [(run, run.sampled(benchmark), other, other.sampled(benchmark)) for run, other in agreeing
                if run.sampled(benchmark) and other.sampled(benchmark)]
        reasons, usable = list(why_not), {}
        for run, (step, found), other, (other_step, theirs) in both:
          differing = of_steps(run, step, other, other_step) + _of_sampling(found, theirs)
          reasons += differing
          if not differing:
            usable[run.seed] = found, theirs
        for metric, read in benchmark_metrics(k).items() if mine else ():
          c = Comparison(stage, benchmark, metric, arm, sweep.baselines[arm], None)
          out.append(_compared(c, {seed: found for seed, (_, found) in mine.items()}, usable, reasons, read))
  return correct(out)


def gains(sweep: Sweep, k: int) -> list[Comparison]:
  """Returns comparisons that show what RL changed in each arm, by stage, benchmark and metric.

  The newest samples of each RL run are compared with the samples of the checkpoint that this run started from.

  k: the k of Pass@k.
  """
  out = []
  for stage in sweep.stages:
    for benchmark in sampled_benchmarks(sweep, stage):
      for arm in sweep.arms:
        runs = [run for run in reversed(sweep.of(stage, arm)) if run.is_rl and run.parent]
        both = {run.seed: (after[1], before[1]) for run in runs if (after := run.sampled(benchmark))
                and (before := run.parent.sampled(benchmark, run.parent_step))}
        reasons = [reason for pair in both.values() for reason in _of_sampling(*pair)]
        usable = {seed: pair for seed, pair in both.items() if not _of_sampling(*pair)}
        for metric, read in benchmark_metrics(k).items() if both else ():
          c = Comparison(stage, benchmark, metric, arm, BEFORE_RL, None)
          out.append(_compared(c, {seed: after for seed, (after, _) in both.items()}, usable, reasons, read))
  return correct(out)


def sample_sets(sweep: Sweep, stage: str, arm: str, benchmark: str) -> dict[Any, tuple[int, SampleSet]]:
  """Returns {seed: (step, newest samples)} of an arm's runs that have samples on a benchmark."""
  runs = reversed(sweep.of(stage, arm))
  return {run.seed: found for run in runs if (found := run.sampled(benchmark))}


def _of_sampling(found: SampleSet, other: SampleSet) -> list[str]:
  """Returns [] if two sets of samples have equal settings. Otherwise returns one reason why they can't be compared.

  The reason names the settings that differ.
  """
  differing = [key for key in SAME_SETTINGS if found.settings.get(key) != other.settings.get(key)]
  return [f'sampled with other {", ".join(differing)}'] if differing else []


def _compared(
  c: Comparison, sets: Mapping[Any, SampleSet], usable: Mapping[Any, tuple[SampleSet, SampleSet]], reasons: list[str],
  read: ByProblem,
) -> Comparison:
  """Sets all fields of a comparison that depend on samples, except p_holm, and returns the comparison.

  Args:
    sets: {seed: the arm's samples}, for the value.
    usable: {seed: (the arm's samples, the samples they are compared with)}, for the difference.
    reasons: why other pairs can't be compared.
    read: a function that returns the metric's values [P].
  """
  bounds = (0.0, 1.0) if is_share(c.metric) else (0.0, math.inf)
  values_SP = aligned(sets.values(), read)[0]
  c.value, c.by_seed, c.noise = estimate(values_SP, bounds), _means(sets, values_SP), noise(values_SP)
  if c.arm == c.baseline:
    return c
  reasons, compared = list(reasons), len(usable)
  if usable:
    both_SP, problems = aligned([x for pair in usable.values() for x in pair], read)
    differences_SP = both_SP[0::2] - both_SP[1::2]
    c.differences, c.difference_noise = _means(usable, differences_SP), noise(differences_SP)
    try:
      c.difference = paired_difference(both_SP[0::2], both_SP[1::2],
                                       bounds=(-1, 1) if bounds[1] == 1 else (-math.inf, math.inf))
    except ValueError as error:
      reasons.append('no problem in common' if not problems else str(error))
      compared = 0
  c.remark = remark(reasons, c.baseline, compared)
  return c


def _means(seeds: Iterable[Any], values_SP: np.ndarray) -> dict[Any, float]:
  """Returns {seed: mean over the problems that have a value in all seeds}; {} if there are none."""
  x_SP = values_SP[:, ~np.isnan(values_SP).any(0)]
  return dict(zip(seeds, x_SP.mean(1).tolist())) if x_SP.size else {}


def aligned(sets: Iterable[SampleSet], read: ByProblem) -> tuple[np.ndarray, list[str]]:
  """Returns (values [S, P] of a metric, the names of the P problems), for the problems that all S sets have.

  read: a function that takes SampleSet.metrics, and returns the metric's value per problem.
  """
  sets = list(sets)
  shared = set.intersection(*(set(found.samples.problems) for found in sets))
  problems = [name for name in sets[0].samples.problems if name in shared]
  rows = []
  for found in sets:
    index = {name: i for i, name in enumerate(found.samples.problems)}
    rows.append(read(found.metrics)[[index[name] for name in problems]])
  return np.array(rows, np.float64).reshape(len(sets), len(problems)), problems


def estimate(values_SP: np.ndarray, bounds: tuple[float, float], **settings) -> Estimate | None:
  """Returns the mean with its interval over problems and seeds; None if no problem has a value in all seeds.

  values_SP: [S, P], one row per seed and one column per problem.
  bounds, settings: the arguments of statistics.bootstrap_interval.
  """
  try:
    return bootstrap_interval(values_SP, bounds=bounds, **settings)
  except ValueError:
    return None
