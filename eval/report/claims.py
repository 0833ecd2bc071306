"""Judges the paper's claims (arXiv 2512.22955) on a sweep that has the paper's objectives.

Each claim is judged by a few tests, which were fixed before the study's runs (docs/study.md). A test has an effect with
a 95 % interval over seeds and, for samples, problems. Its verdict is 'yes', 'no', SMALL or CANT_TELL. Holm's correction
covers the tests that decide a claim. The claim holds if all of them say yes. It fails if any says no, or if all say
SMALL.

# S seeds  A arms
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from betarank.eval.report.comparisons import ALPHA, EARLY, Comparison, benchmarks
from betarank.eval.report.runs import PLAIN, Sweep, setting
from betarank.eval.report.words import stages_around_rl
from betarank.eval.statistics import Estimate, Noise, holm, noise, over_seeds

LOW, HIGH, TAIL = 'β = -0.25', 'β = 0.5', 'λ̂ = -0.1'  # objectives, as arms.label names them
CANT_TELL, SMALL = "can't tell", 'small'  # SMALL: shown to be less than what is worth finding
EQUAL = 0.005  # cross-entropies that differ by less than this share are called equal
TAIL_RANGE = (-0.09, -0.07)  # what the reward's fixed point predicts for the tail's mass, as a share of it
TAIL_WIDTH = 0.03  # an interval of a larger half-width doesn't test TAIL_RANGE
WORTH = 0.01  # the smallest difference worth finding, as a share of right answers: 1 point
UNRELATED = 0.5  # a rank correlation below this, whatever its sign, predicts little
PLANNED_SEEDS = 10

Judge = Callable[[Estimate, float], str]  # (effect, p-value after Holm's correction) -> verdict


@dataclasses.dataclass
class Test:
  """One test of a claim.

  Attributes:
    what: what is compared, in words.
    unit: the unit of the effect: '%' for shares of the baseline's value, 'points' for shares of right answers, ...
    factor: the factor that converts the effect to this unit.
    effect: the effect with its interval; None if there are no runs to compare.
    noise: the noise of the effect; None if there are fewer than two seeds.
    judge: the rule that makes the verdict.
  """

  what: str
  unit: str
  factor: float
  effect: Estimate | None
  noise: Noise | None
  judge: Judge
  p_holm: float = math.nan

  @property
  def verdict(self) -> str:
    """The verdict; '' if nothing can be compared. A single seed can't tell."""
    if self.effect is None:
      return ''
    return self.judge(self.effect, self.p_holm) if self.effect.seeds > 1 else CANT_TELL

  def smallest_detectable(self, seeds: int = PLANNED_SEEDS) -> float:
    """Returns the effect that so many seeds would detect with 80 % power, before correction; NaN if unknown."""
    return self.noise.smallest_detectable(seeds) if self.noise else math.nan


@dataclasses.dataclass
class Claim:
  """A claim, the tests that decide about it, and further tests that are only shown.

  Holm's correction is applied to the tests that decide, and separately to those that are shown.
  """

  letter: str
  sentence: str
  tests: list[Test]
  shown: list[Test] = dataclasses.field(default_factory=list)

  def __post_init__(self):
    for family in (self.tests, self.shown):
      tests = [test for test in family if test.effect and test.effect.seeds > 1]
      for test, p in zip(tests, holm([test.effect.p_value for test in tests])):
        test.p_holm = float(p)

  @property
  def verdict(self) -> str:
    """'yes', 'no' or CANT_TELL; '' if a test has nothing to compare."""
    verdicts = {test.verdict for test in self.tests}
    if not verdicts or '' in verdicts:
      return ''
    return 'no' if 'no' in verdicts or verdicts == {SMALL} else 'yes' if verdicts == {'yes'} else CANT_TELL


# Rules


def above(worth: float = 0.0) -> Judge:
  """Returns the rule for "the effect is above zero".

  Yes or no, if the corrected p-value is at most ALPHA. Otherwise SMALL, if the interval lies below `worth`. This has no
  correction, because a claim fails only if all its effects are small, which makes a false no rarer.
  """
  def judge(effect: Estimate, p_holm: float) -> str:
    if p_holm <= ALPHA:
      return 'yes' if effect.mean > 0 else 'no'
    return SMALL if effect.high < worth else CANT_TELL

  return judge


def below(effect: Estimate, p_holm: float) -> str:
  """Judges "the effect is below zero", if the corrected p-value is at most ALPHA."""
  return CANT_TELL if p_holm > ALPHA else 'yes' if effect.mean < 0 else 'no'


def equal(effect: Estimate, _) -> str:
  """Judges "the effect is nearer to zero than EQUAL".

  Yes, if the 95 % interval lies within these limits, which is stricter than two one-sided tests at 5 %. No, if it lies
  outside. There is no correction: the claim needs a yes for every arm, which makes a false yes rarer.
  """
  if effect.low > -EQUAL and effect.high < EQUAL:
    return 'yes'
  return 'no' if effect.low > EQUAL or effect.high < -EQUAL else CANT_TELL


def in_tail_range(effect: Estimate, p_holm: float) -> str:
  """Judges "the tail's mass changes by TAIL_RANGE".

  No, if the interval misses the range. Yes, if it meets the range, excludes zero and is narrow enough to say so.
  """
  if effect.low > TAIL_RANGE[1] or effect.high < TAIL_RANGE[0]:
    return 'no'
  narrow = (effect.high - effect.low) / 2 <= TAIL_WIDTH
  return 'yes' if p_holm <= ALPHA and narrow else CANT_TELL


def related(effect: Estimate, p_holm: float) -> str:
  """Judges "the orders are related". SMALL, if the interval holds only rank correlations below UNRELATED."""
  if p_holm <= ALPHA:
    return 'yes'
  return SMALL if effect.low > -UNRELATED and effect.high < UNRELATED else CANT_TELL


# Claims


def claims(
  sweep: Sweep, distributions: Sequence[Comparison], dynamics: Sequence[Comparison], sampled: Sequence[Comparison],
  k: int,
) -> list[Claim]:
  """Returns the paper's claims; [] if the sweep has no arm of plain cross-entropy, or none of LOW, HIGH and TAIL.

  Claims (a) and (b) are judged at the end of pre-training on the sources of real text, or on all if all are generated.

  distributions, dynamics, sampled: comparisons with plain cross-entropy, from comparisons.distributions, dynamics and
    benchmarks.
  k: the k of Pass@k.
  """
  arm = {name: _arm(sweep, name) for name in (PLAIN, LOW, HIGH, TAIL)}
  if not arm[PLAIN] or not any(arm[name] for name in (LOW, HIGH, TAIL)):
    return []
  first = sweep.stages[0]
  before, after = stages_around_rl(sweep)
  here = [c for c in distributions if c.stage == first and _domain(c) in _texts(sweep, first)]
  find = lambda found, name, metric: [c for c in found if c.arm == arm[name] and c.metric == metric]

  def ratio(name: str, metric: str, judge: Judge) -> list[Test]:
    tests = []
    for c in find(here, name, metric):
      plain = {seed: x for p in find(here, PLAIN, metric) if p.subject == c.subject for seed, x in p.by_seed.items()}
      shares = {seed: value / plain[seed] for seed, value in c.differences.items() if plain.get(seed)}
      tests.append(_test(f'{name} against CE, {metric}, {_domain(c)}', '%', 100.0, shares, judge))
    return tests

  def change(name: str, metric: str, found: Sequence[Comparison], judge: Judge, unit: str) -> list[Test]:
    return [_test(f'{name} against CE, {metric}, {_domain(c)}', unit, 1.0, c.differences, judge)
            for c in find(found, name, metric)]

  shown = lambda *_: ''
  scores = [c for c in sampled if (c.stage, c.metric) == (after, 'avg_at_n')]
  early = [c for c in dynamics if c.stage == after and c.subject == EARLY]
  return [
    Claim('a', 'Cross-entropy is equal within 0.5 %, and entropy falls from β = 0.5 to 0 to -0.25', [
      *ratio(LOW, 'ce_nats', equal), *ratio(HIGH, 'ce_nats', equal),
      *change(LOW, 'entropy_nats', here, below, 'nats'), *change(HIGH, 'entropy_nats', here, above(), 'nats')]),
    Claim('b', 'λ̂ = -0.1 takes 7 to 9 % of the tail\'s mass', ratio(TAIL, 'tail_mass', in_tail_range),
          [*change(TAIL, 'tail_mass', here, shown, ''), *change(TAIL, 'head_mass', here, shown, '')]),
    Claim('c', 'Early in RL, β = 0.5 loses entropy and length faster', [
      *change(HIGH, 'entropy_nats', early, below, 'nats'), *change(HIGH, 'length_tokens', early, below, 'tokens')]),
    _better_after_rl(sweep, arm, after, sampled, k),
    Claim('e', 'The order of the arms before RL predicts their order after it', [
      _order(f'Pass@{k} before RL', [c for c in sampled if (c.stage, c.metric) == (before, f'pass_at_{k}')], scores),
      _order('entropy before RL', [c for c in distributions if (c.stage, c.metric) == (before, 'entropy_nats')
                                   and _domain(c) in _texts(sweep, before)], scores)]),
  ]


def _arm(sweep: Sweep, objective: str) -> str:
  """Returns the arm with most runs of a pre-training objective; '' if there is none."""
  arms = [run.arm for run in sweep.runs if run.arm and run.objective.partition(' → ')[0] == objective]
  return max(sorted(set(arms)), key=arms.count, default='')


def _domain(c: Comparison) -> str:
  """Returns the source of the data: a subject may have a remark in parentheses after it."""
  return c.subject.partition(' (')[0]


def _texts(sweep: Sweep, stage: str) -> set[str]:
  """Returns the names of the sources that aren't generated; of all sources, if all are generated."""
  sources = {name: str(source.get('uri')) for run in sweep.of(stage)
             for name, source in (setting(run.config, 'data.sources') or {}).items() if isinstance(source, dict)}
  return {name for name, uri in sources.items() if not uri.startswith('reasoning')} or set(sources)


def _test(what: str, unit: str, factor: float, by_seed: dict[Any, float], judge: Judge) -> Test:
  values = list(by_seed.values())
  effect = over_seeds(values) if values else None
  return Test(what, unit, factor, effect, noise(np.array(values)[:, None]) if values else None, judge)


def _better_after_rl(sweep: Sweep, arm: dict[str, str], stage: str, sampled: Sequence[Comparison], k: int) -> Claim:
  """Returns claim (d). LOW and TAIL are compared with plain cross-entropy and with HIGH, on the same problems.

  Only Avg@n decides; Cons@n and Pass@k are shown.
  """
  runs = [run for run in sweep.of(stage) if run.arm in (arm[LOW], arm[TAIL], arm[HIGH])] if arm[HIGH] else []
  against = dataclasses.replace(sweep, runs=runs, baselines=dict.fromkeys(arm.values(), arm[HIGH]))
  found = {(c.metric, c.arm, c.baseline): c for c in (*sampled, *benchmarks(against, k)) if c.stage == stage}
  tests: dict[bool, list[Test]] = {True: [], False: []}
  for metric, name, other in itertools.product(('avg_at_n', 'cons_at_n', f'pass_at_{k}'), (LOW, TAIL), (PLAIN, HIGH)):
    c = found.get((metric, arm[name], arm[other]))
    tests[metric == 'avg_at_n'].append(Test(
      f'{name} against {other}, {metric}', 'points', 100.0, c.difference if c else None,
      c.difference_noise if c else None, above(WORTH)))
  return Claim('d', 'After RL, β = -0.25 and λ̂ = -0.1 answer better than CE and than β = 0.5', tests[True],
               tests[False])


def _order(what: str, earlier: Sequence[Comparison], later: Sequence[Comparison]) -> Test:
  """Returns the test whether the arms' order in `earlier` predicts their order in `later`, by Kendall's tau.

  Arms are ordered by their differences to the baseline, which are measured on the same problems; its own is zero. The
  effect is the mean tau over seeds. The p-value is that of all permutations of the arms, because arms, not seeds,
  are what the order is about; five arms give at least 2/120.
  """
  a, b = ({c.arm: c.differences or dict.fromkeys(c.by_seed, 0.0) for c in found
           if c.subject == found[0].subject and (c.differences or c.arm == c.baseline)} for found in (earlier, later))
  arms = sorted(a.keys() & b.keys())
  seeds = sorted(set.intersection(*(set(found[arm]) for found in (a, b) for arm in arms)), key=str) if arms else []
  if len(arms) < 3 or not seeds:
    return Test(what, 'tau', 1.0, None, None, related)
  a_SA, b_SA = (np.array([[found[arm][seed] for arm in arms] for seed in seeds]) for found in (a, b))
  tau_S = _taus(a_SA, b_SA)
  effect = over_seeds(tau_S, bounds=(-1.0, 1.0))
  others = [abs(_taus(a_SA, b_SA[:, list(order)]).mean()) for order in itertools.permutations(range(len(arms)))]
  p_value = float(np.mean(np.array(others) >= abs(tau_S.mean()) - 1e-12))
  return Test(what, 'tau', 1.0, dataclasses.replace(effect, p_value=p_value), noise(tau_S[:, None]), related)


def _taus(a_SA: np.ndarray, b_SA: np.ndarray) -> np.ndarray:
  """Returns [S]: Kendall's tau-a of the arms' values in each seed."""
  sign = lambda x_SA: np.sign(x_SA[:, :, None] - x_SA[:, None, :])
  arms = a_SA.shape[1]
  return (sign(a_SA) * sign(b_SA)).sum((1, 2)) / (arms * (arms - 1))
