"""Tests that intervals have the stated coverage, that p-values agree with them, and that corrections equal textbook
examples.
"""

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks import intervals
from betarank.eval import statistics

DRAWS = {  # kind -> (per-problem scores of P problems, their true mean)
  'hard': (lambda rng, P: rng.binomial(128, rng.beta(0.3, 2, P)) / 128, 0.3 / 2.3),
  'middling': (lambda rng, P: rng.binomial(128, rng.beta(0.4, 0.4, P)) / 128, 0.5),
  'greedy': (lambda rng, P: (rng.random(P) < 0.4) * 1.0, 0.4),
}


def covered(draw, truth, trials, **settings):
  rng = np.random.default_rng(1)
  hits = []
  for _ in range(trials):
    found = statistics.bootstrap_interval(draw(rng), resamples=300, **settings)
    hits.append(found.low <= truth <= found.high)
  return np.mean(hits)


@pytest.mark.parametrize('kind', DRAWS)
@pytest.mark.parametrize('problems', [30, 60])
def test_the_interval_over_problems_covers_95_percent(kind, problems):
  draw, truth = DRAWS[kind]
  assert 0.925 <= covered(lambda rng: draw(rng, problems), truth, 600, bounds=(0, 1)) <= 0.98


@pytest.mark.parametrize('kind', ['beta(0.15, 1.5)', 'beta(0.3, 2)', 'beta(3, 0.5)'])
def test_ten_problems_with_skewed_scores_are_covered_and_missed_on_both_sides(kind):
  """Before the arcsine scale, only 88 % of the intervals contained the true value of beta(0.15, 1.5).

  Nearly all other intervals were below it.
  """
  covered, above, below, _ = intervals.coverage(intervals.KINDS[kind], problems=10, trials=500)
  assert covered >= 0.93 and above > 0 and below > 0 and max(above, below) < 0.05


@pytest.mark.parametrize('kind', ['85 % unsolved', '95 % unsolved', 'one sample, 10 %', 'pair: no change',
                                  'pair: a fifth less', 'pair: 50 more on a fifth'])
def test_ten_problems_are_covered_whatever_the_scores(kind):
  assert intervals.coverage(intervals.KINDS[kind], problems=10, trials=300)[0] >= 0.92


def test_no_limit_lies_beyond_clopper_and_pearsons_for_right_or_wrong_scores():
  for right in range(11):
    found = statistics.bootstrap_interval(np.array([1.0] * right + [0.0] * (10 - right)), bounds=(0, 1))
    exact = stats.binomtest(right, 10).proportion_ci()
    assert found.low >= exact.low - 0.01 and found.high <= exact.high + 0.01
    if right in (0, 10):
      assert (found.low, found.high) == pytest.approx((exact.low, exact.high))


def seeds_and_problems(rng, seeds, problems, seed_sd, problem_sd=0.3, rest_sd=0.1):
  return (rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, problem_sd, (1, problems))
          + rng.normal(0, rest_sd, (seeds, problems)))


@pytest.mark.parametrize(('seeds', 'seed_sd'), [(3, 0.1), (3, 0.3), (5, 0.1), (2, 0.2)])
def test_the_interval_over_seeds_and_problems_covers_at_least_95_percent(seeds, seed_sd):
  draw = lambda rng: seeds_and_problems(rng, seeds, 40, seed_sd)
  assert 0.93 <= covered(draw, 0.0, 600) <= 0.99  # a little more than nominal, by design
  # Problems alone miss what seeds add, which is why seeds are a level of their own.
  pooled = covered(lambda rng: draw(rng).mean(0), 0.0, 300)
  assert pooled < 0.93


def test_paired_differences_cover_and_are_narrower_than_unpaired():
  rng = np.random.default_rng(2)
  hits, narrower = [], []
  for _ in range(400):
    level_P = rng.beta(0.5, 1, 30)
    a, b = (np.clip(level_P + rng.normal(0, 0.05, 30), 0, 1) for _ in range(2))
    found = statistics.paired_difference(a, b, bounds=(-1, 1), resamples=300)
    alone = statistics.bootstrap_interval(a, bounds=(0, 1), resamples=300)
    hits.append(found.low <= 0 <= found.high)
    narrower.append(found.high - found.low < alone.high - alone.low)
  assert 0.925 <= np.mean(hits) <= 0.98
  assert np.mean(narrower) > 0.99


def test_p_value_and_interval_agree_and_p_is_nearly_uniform_without_an_effect():
  rng = np.random.default_rng(3)
  for _ in range(300):
    found = statistics.bootstrap_interval(seeds_and_problems(rng, 3, 25, 0.2) + rng.choice([0, 0.6]), resamples=300)
    assert found.excludes_zero == (found.p_value <= 0.05)
  p = np.array([statistics.bootstrap_interval(rng.normal(size=30), resamples=300).p_value for _ in range(800)])
  for alpha in (0.05, 0.2, 0.5):
    noise = 3 * math.sqrt(alpha * (1 - alpha) / 800)
    assert 0.85 * alpha - noise < np.mean(p <= alpha) < alpha + noise  # a little larger than uniform, by design


def test_the_smallest_detectable_difference_is_detected_four_times_in_five():
  rng = np.random.default_rng(4)
  settings = dict(resamples=400)
  typical = np.mean([statistics.bootstrap_interval(rng.normal(size=40), **settings).smallest_detectable
                     for _ in range(100)])
  seen = [statistics.bootstrap_interval(rng.normal(typical, 1, 40), **settings).excludes_zero for _ in range(600)]
  assert 0.74 <= np.mean(seen) <= 0.88


@pytest.mark.parametrize('seeds, power', [(2, 0.71), (3, 0.74), (4, 0.76), (5, 0.77), (8, 0.79), (10, 0.79)])
def test_with_few_seeds_it_is_detected_as_often_as_the_docstring_says(seeds, power):
  x = np.random.default_rng(0).normal(statistics.Noise(1.0).smallest_detectable(seeds), 1.0, (200_000, seeds))
  t = x.mean(1) / (x.std(1, ddof=1) / math.sqrt(seeds))
  assert np.mean(np.abs(t) > statistics._t_quantile(seeds, 0.975)) == pytest.approx(power, abs=0.006)


def test_the_same_seed_repeats_and_missing_problems_are_counted():
  values = np.array([0.1, 0.4, np.nan, 0.9, 0.2])
  found = statistics.bootstrap_interval(values, seed=7)
  assert found == statistics.bootstrap_interval(values, seed=7)
  assert found.problems == 4 and found.left_out == 1 and found.mean == pytest.approx(0.4)
  with pytest.raises(ValueError, match='no problem has a value'):
    statistics.bootstrap_interval(np.array([np.nan, np.nan]))
  with pytest.raises(ValueError, match='same problems'):
    statistics.paired_difference(np.zeros(3), np.zeros(4))


def test_problems_that_are_all_alike_are_not_certainty():
  """If none of 30 problems is solved, the upper limit is 1 - 0.025^(1/30).

  If this share of all problems could be solved, a set of 30 problems would still have none of them 1 time in 40.
  """
  found = statistics.bootstrap_interval(np.zeros(30), bounds=(0, 1))
  assert found.low == 0 and found.high == pytest.approx(1 - 0.025 ** (1 / 30)) and found.p_value == 1
  assert statistics.paired_difference(np.ones(2), np.zeros(2), bounds=(-1, 1)).p_value == pytest.approx(0.5)
  assert statistics.paired_difference(np.ones(20), np.zeros(20), bounds=(-1, 1)).p_value < 1e-5
  one = statistics.bootstrap_interval(np.array([0.3]), bounds=(0, 1))
  assert one.low < 0.02 and one.high > 0.95
  assert statistics.paired_difference(np.array([0.3]), np.array([0.0]), bounds=(-1, 1)).p_value == 1


def test_a_difference_on_one_problem_alone_is_never_a_finding():
  values = np.zeros(30)
  values[4] = 1.0
  found = statistics.paired_difference(values, np.zeros(30), bounds=(-1, 1))
  assert not found.excludes_zero and found.p_value > 0.3
  assert found.high < 0.5  # and yet all but one of the problems say that it is small


def test_figures_without_problems_get_students_t_over_seeds():
  found = statistics.over_seeds(np.array([1.0, 2.0, 3.0, math.nan]))
  want = stats.ttest_1samp([1.0, 2.0, 3.0], 0)
  assert (found.low, found.high) == pytest.approx(tuple(want.confidence_interval()))
  assert found.p_value == pytest.approx(want.pvalue) and found.seeds == 3 and found.left_out == 1
  one = statistics.over_seeds(np.array([2.0]))
  assert one.mean == 2 and math.isnan(one.low) and math.isnan(one.p_value) and not one.excludes_zero
  assert statistics.over_seeds(np.zeros(3)).p_value == 1
  for same in ([0.02, 0.02], [0.3 - 0.2, 0.7 - 0.6], [0.9804 - 0.9803, 0.5003 - 0.5002]):  # equal up to rounding
    found = statistics.over_seeds(same)
    assert found.mean == pytest.approx(same[0]) and statistics.noise(np.array(same)[:, None]) is None
    assert np.isnan([found.low, found.high, found.p_value, found.smallest_detectable]).all()
  with pytest.raises(ValueError, match='no seed'):
    statistics.over_seeds(np.array([math.nan]))


def test_holm():
  np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
  np.testing.assert_allclose(statistics.holm([0.5, math.nan, 0.01]), [0.5, math.nan, 0.02])
  np.testing.assert_allclose(statistics.holm([0.9, 0.8]), [1, 1])
  assert statistics.holm([]).shape == (0,)
