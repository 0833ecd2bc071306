"""Judges the paper's claims (arXiv 2512.22955) on a sweep that has the paper's objectives.

Each claim is judged by a few tests, which were fixed before the study's runs (docs/study.md). A test measures an
effect, such as a difference between two arms, with a 95 % interval over seeds and, for samples, problems. A rule turns
the effect into a verdict:

- 'yes' or 'no': the effect is or isn't as the claim says.
- SMALL: the effect is smaller than what is worth finding.
- CANT_TELL: the data don't decide.

A claim holds if all its tests say 'yes'. It fails if any test says 'no', or if all say SMALL. The p-values of a claim's
tests are corrected for multiple testing (Holm).

# S seeds  A arms
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
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
ORDERS = 10_000  # the largest number of orders of the arms in a permutation test

# (effect, p-value after Holm's correction) -> verdict. The p-value and the limits are NaN if all seeds have the same
# effect; a rule that needs them then says CANT_TELL.
Judge = Callable[[Estimate, float], str]


@dataclasses.dataclass
class Test:
  """One test of a claim.

  Attributes:
    what: a description of what is compared.
    unit: the unit in which the effect is shown, such as '%', 'points' or 'nats'.
    factor: the factor that converts the effect to this unit.
    effect: the effect with its interval; None if there are no runs to compare.
    noise: the noise of the effect; None if there are fewer than two seeds, or if all have the same effect.
    judge: the rule that turns the effect into a verdict.
    p_holm: the p-value after Holm's correction; NaN if there are fewer than two seeds, or if all have the same effect,
      other than zero.
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
    """The verdict of the rule; CANT_TELL if there is only one seed; '' if there are no runs to compare."""
    if self.effect is None:
      return ''
    return self.judge(self.effect, self.p_holm) if self.effect.seeds > 1 else CANT_TELL

  def smallest_detectable(self, seeds: int = PLANNED_SEEDS) -> float:
    """Returns the smallest effect that an experiment with `seeds` seeds would detect with a probability of about 80 %;
    NaN if unknown.

    Holm's correction, which requires larger effects, isn't taken into account.
    """
    return self.noise.smallest_detectable(seeds) if self.noise else math.nan


@dataclasses.dataclass
class Claim:
  """A claim of the paper with its tests.

  Holm's correction is applied to the p-values of `tests`, and separately to those of `shown`.

  Attributes:
    letter: the letter of the claim in docs/study.md, such as 'a'.
    sentence: the claim in words.
    tests: the tests that decide whether the claim holds.
    shown: further tests, which the report shows but which don't decide.
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
    """'yes' if the claim holds, 'no' if it fails, CANT_TELL if its tests don't decide; '' if there are no tests, or if
    a test has no runs to compare.
    """
    verdicts = {test.verdict for test in self.tests}
    if not verdicts or '' in verdicts:
      return ''
    return 'no' if 'no' in verdicts or verdicts == {SMALL} else 'yes' if verdicts == {'yes'} else CANT_TELL


# Rules


def above(worth: float = 0.0) -> Judge:
  """Returns a rule that judges the claim "the effect is above zero".

  If the corrected p-value is at most ALPHA, the verdict is 'yes' for a positive effect and 'no' for a negative one.
  Otherwise it is SMALL if the whole interval is below `worth`, and CANT_TELL if it isn't. SMALL needs no correction for
  multiple testing. The reason is that small effects refute a claim only if all its tests say SMALL.

  worth: the smallest effect worth finding.
  """
  def judge(effect: Estimate, p_holm: float) -> str:
    if p_holm <= ALPHA:
      return 'yes' if effect.mean > 0 else 'no'
    return SMALL if effect.high < worth else CANT_TELL

  return judge


def below(effect: Estimate, p_holm: float) -> str:
  """Judges the claim "the effect is below zero".

  The verdict is 'yes' for a negative effect, and 'no' for a positive one, if the corrected p-value is at most ALPHA.
  Otherwise it is CANT_TELL.
  """
  if p_holm <= ALPHA:
    return 'yes' if effect.mean < 0 else 'no'
  return CANT_TELL


def equal(effect: Estimate, _) -> str:
  """Judges the claim "the effect lies between -EQUAL and EQUAL".

  The verdict is 'yes' if the whole 95 % interval lies in this range, which is stricter than two one-sided tests at 5 %.
  It is 'no' if the whole interval lies outside, otherwise CANT_TELL. 'yes' needs no correction for multiple testing,
  because the claim holds only if every test says 'yes'.
  """
  if effect.low > -EQUAL and effect.high < EQUAL:
    return 'yes'
  return 'no' if effect.low > EQUAL or effect.high < -EQUAL else CANT_TELL


def in_tail_range(effect: Estimate, p_holm: float) -> str:
  """Judges the claim "the relative change of the tail's probability lies in TAIL_RANGE".

  The verdict is 'no' if the interval doesn't overlap the range. It is 'yes' if the interval overlaps the range, the
  corrected p-value is at most ALPHA, and the half-width of the interval is at most TAIL_WIDTH. Otherwise it is
  CANT_TELL.
  """
  if effect.low > TAIL_RANGE[1] or effect.high < TAIL_RANGE[0]:
    return 'no'
  narrow = (effect.high - effect.low) / 2 <= TAIL_WIDTH
  return 'yes' if p_holm <= ALPHA and narrow else CANT_TELL


def related(effect: Estimate, p_holm: float) -> str:
  """Judges the claim "two orders of the arms are related". The effect is the rank correlation of the two orders.

  The verdict is 'yes' if the p-value is at most ALPHA. Otherwise it is SMALL if the whole interval lies between
  -UNRELATED and UNRELATED, and CANT_TELL if it doesn't.
  """
  if p_holm <= ALPHA:
    return 'yes'
  return SMALL if effect.low > -UNRELATED and effect.high < UNRELATED else CANT_TELL


# Claims


def claims(
  sweep: Sweep, distributions: Sequence[Comparison], dynamics: Sequence[Comparison], sampled: Sequence[Comparison],
  k: int,
) -> list[Claim]:
  """Returns the paper's claims with their tests.

  Returns [] if the sweep has no arm of plain cross-entropy, or no arm with any of the objectives LOW, HIGH and TAIL.

  Claims (a) and (b) are judged at the end of pre-training, on the data sources of real text. If all sources are
  generated, they are judged on all sources.

  distributions, dynamics, sampled: the results of comparisons.distributions, comparisons.dynamics and
    comparisons.benchmarks, in which the baseline is plain cross-entropy.
  k: the k of Pass@k.
  """
  arm = _arms(sweep)
  if not arm:
    return []
  before, after = stages_around_rl(sweep)
  stages = sweep.stages[0], before, after
  runs = [run for run in sweep.of(after) if run.arm in (arm[LOW], arm[TAIL], arm[HIGH])] if arm[HIGH] else []
  against = dataclasses.replace(sweep, runs=runs, baselines=dict.fromkeys(arm.values(), arm[HIGH]))
  return judged(arm, stages, {stage: _texts(sweep, stage) for stage in stages}, distributions, dynamics, sampled,
                benchmarks(against, k), k)


def judged(
  arm: dict[str, str], stages: tuple[str, str, str], texts: dict[str, set[str]], distributions: Sequence[Comparison],
  dynamics: Sequence[Comparison], sampled: Sequence[Comparison], against_high: Sequence[Comparison], k: int,
) -> list[Claim]:
  """Returns the paper's claims with their tests, from comparisons.

  arm: {objective: name of its arm}, for PLAIN, LOW, HIGH and TAIL; '' if there is none.
  stages: the first stage, the last one before RL, and RL.
  texts: {stage: the names of the data sources that claims about text are judged on}.
  distributions, dynamics, sampled: as for `claims`.
  against_high: comparisons of benchmarks after RL whose baseline is the arm of HIGH.
  k: the k of Pass@k.
  """
  first, before, after = stages
  here = [c for c in distributions if c.stage == first and _domain(c) in texts[first]]
  find = lambda found, name, metric: [c for c in found if c.arm == arm[name] and c.metric == metric]

  def ratio(name: str, metric: str, judge: Judge) -> list[Test]:
    tests = []
    for c in find(here, name, metric):
      shares = {seed: value / c.theirs[seed] for seed, value in c.differences.items() if c.theirs[seed]}
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
    _better_after_rl(arm, [c for c in (*sampled, *against_high) if c.stage == after], k),
    Claim('e', 'The order of the arms before RL predicts their order after it', [
      _order(f'Pass@{k} before RL', [c for c in sampled if (c.stage, c.metric) == (before, f'pass_at_{k}')], scores),
      _order('entropy before RL', [c for c in distributions if (c.stage, c.metric) == (before, 'entropy_nats')
                                   and _domain(c) in texts[before]], scores)]),
  ]


def _arms(sweep: Sweep) -> dict[str, str]:
  """Returns {objective: arm} for PLAIN, LOW, HIGH and TAIL, the objectives that runs were pre-trained with.

  The arm of PLAIN is the arm of plain cross-entropy with which most runs of the other three are compared, and each
  other arm is one that is compared with it, the one with most runs. So all differences are between these four arms. An
  objective without such an arm has the arm ''. Returns {} if nothing is compared with plain cross-entropy.
  """
  runs = {name: [run.arm for run in sweep.runs if run.arm and run.objective.partition(' → ')[0] == name]
          for name in (PLAIN, LOW, HIGH, TAIL)}
  most = lambda names: max(sorted(set(names)), key=names.count, default='')
  baselines = [sweep.baselines[arm] for name in (LOW, HIGH, TAIL) for arm in runs[name]]
  plain = most([name for name in baselines if name in runs[PLAIN]])
  if not plain:
    return {}
  return {PLAIN: plain} | {name: most([arm for arm in runs[name] if sweep.baselines[arm] == plain])
                           for name in (LOW, HIGH, TAIL)}


def _domain(c: Comparison) -> str:
  """Returns the data source of a comparison, which is its subject without a remark in parentheses at the end."""
  return c.subject.partition(' (')[0]


def _texts(sweep: Sweep, stage: str) -> set[str]:
  """Returns the names of the data sources that hold real text; the names of all sources if all are generated."""
  sources = {name: str(source.get('uri')) for run in sweep.of(stage)
             for name, source in (setting(run.config, 'data.sources') or {}).items() if isinstance(source, dict)}
  return {name for name, uri in sources.items() if not uri.startswith('reasoning')} or set(sources)


def _test(what: str, unit: str, factor: float, by_seed: dict[Any, float], judge: Judge) -> Test:
  values = list(by_seed.values())
  effect = over_seeds(values) if values else None
  return Test(what, unit, factor, effect, noise(np.array(values)[:, None]) if values else None, judge)


def _better_after_rl(arm: dict[str, str], after_rl: Sequence[Comparison], k: int) -> Claim:
  """Returns claim (d) of docs/study.md: after RL, the models with the objectives LOW and TAIL answer better than those
  with plain cross-entropy and those with HIGH.

  The claim is decided by the differences of Avg@n. The differences of Cons@n and Pass@k are only shown.

  arm: {objective: name of its arm}.
  after_rl: comparisons of benchmarks with plain cross-entropy and with HIGH.
  """
  found = {(c.metric, c.arm, c.baseline): c for c in after_rl}
  tests: dict[bool, list[Test]] = {True: [], False: []}
  for metric, name, other in itertools.product(('avg_at_n', 'cons_at_n', f'pass_at_{k}'), (LOW, TAIL), (PLAIN, HIGH)):
    c = found.get((metric, arm[name], arm[other]))
    tests[metric == 'avg_at_n'].append(Test(
      f'{name} against {other}, {metric}', 'points', 100.0, c.difference if c else None,
      c.difference_noise if c else None, above(WORTH)))
  return Claim('d', 'After RL, β = -0.25 and λ̂ = -0.1 answer better than CE and than β = 0.5', tests[True],
               tests[False])


def _order(what: str, earlier: Sequence[Comparison], later: Sequence[Comparison]) -> Test:
  """Returns a test of whether the arms' order in `earlier` predicts their order in `later`.

  Arms are ordered by their difference to the baseline, whose own difference is zero. The effect is Kendall's tau, a
  rank correlation in [-1, 1], as the mean over seeds. The p-value comes from a permutation test over the orders of the
  arms (`_orders`), because the test is about arms, not about seeds. With five arms, the p-value can't be less than
  2/120.
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
  others = [abs(_taus(a_SA, b_SA[:, list(order)]).mean()) for order in _orders(len(arms))]
  p_value = float(np.mean(np.array(others) >= abs(tau_S.mean()) - 1e-12))
  return Test(what, 'tau', 1.0, dataclasses.replace(effect, p_value=p_value), noise(tau_S[:, None]), related)


def _orders(arms: int) -> Iterable[Sequence[int]]:
  """Returns all orders of the arms; if they are more than ORDERS, the given order and random ones, ORDERS in all."""
  if math.factorial(arms) <= ORDERS:
    return itertools.permutations(range(arms))
  rng = np.random.default_rng(0)
  return [range(arms), *(rng.permutation(arms) for _ in range(ORDERS - 1))]


def _taus(a_SA: np.ndarray, b_SA: np.ndarray) -> np.ndarray:
  """Returns [S]: Kendall's tau-a between the arms' values in a_SA and in b_SA, for each seed."""
  sign = lambda x_SA: np.sign(x_SA[:, :, None] - x_SA[:, None, :])
  arms = a_SA.shape[1]
  return (sign(a_SA) * sign(b_SA)).sum((1, 2)) / (arms * (arms - 1))
