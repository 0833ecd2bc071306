"""Tests the verdicts on the paper's claims, on made-up figures with known effects: how often they are right, and wrong.

# S seeds  A arms  P problems
"""

import dataclasses

import numpy as np
import pytest

from betarank.configs import common
from betarank.eval.report import arms, claims, comparisons
from betarank.eval.report.comparisons import Comparison
from betarank.eval.report.runs import PLAIN, Run, Sweep
from betarank.eval.statistics import Noise, bootstrap_interval, noise, over_seeds
from tests.eval import sweep

SEEDS = 8


def shares(verdicts):
  return {name: verdicts.count(name) / len(verdicts) for name in set(verdicts)}


def simulated(judge, mean, sd, times=1000, seeds=SEEDS):
  """Returns {verdict: share} of a test whose effect has this mean, and this standard deviation between seeds."""
  rng, out = np.random.default_rng(0), []
  for _ in range(times):
    effect = over_seeds(rng.normal(mean, sd, seeds))
    out.append(judge(effect, effect.p_value))
  return shares(out)


def test_a_direction_is_found_as_often_as_promised_and_rarely_without_an_effect():
  detectable = Noise(seed=1.0).smallest_detectable(SEEDS)
  found = simulated(claims.above(), detectable, 1.0)
  assert found['yes'] == pytest.approx(0.8, abs=0.08) and found.get('no', 0) == 0
  nothing = simulated(claims.above(), 0.0, 1.0)
  assert nothing['yes'] < 0.04 and nothing["can't tell"] > 0.9
  assert simulated(claims.below, detectable, 1.0)['no'] == pytest.approx(found['yes'], abs=0.01)
  too_small = simulated(claims.above(worth=0.01), 0.0, 0.002)
  assert too_small['small'] > 0.9 and too_small['yes'] < 0.04
  assert simulated(claims.above(worth=0.01), 0.01, 0.002).get('small', 0) < 0.04


def test_equal_is_said_of_what_is_equal_and_rarely_of_what_lies_at_the_limit():
  assert simulated(claims.equal, 0.0, 0.002)['yes'] > 0.9
  assert simulated(claims.equal, claims.EQUAL, 0.002).get('yes', 0) < 0.04
  assert simulated(claims.equal, 0.0, 0.02)["can't tell"] > 0.9
  assert simulated(claims.equal, 0.02, 0.002)['no'] > 0.9


def test_the_tail_s_range_is_met_missed_or_not_tested():
  assert simulated(claims.in_tail_range, -0.08, 0.01)['yes'] > 0.9
  assert simulated(claims.in_tail_range, -0.02, 0.01)['no'] > 0.9
  assert simulated(claims.in_tail_range, -0.08, 0.10)["can't tell"] > 0.9


def test_noise_is_taken_apart_and_says_what_would_be_detected():
  rng, seeds, problems, true = np.random.default_rng(1), 400, 200, Noise(0.02, 0.1, 0.2, 200)
  draw = lambda seeds: (rng.normal(0, true.seed, (seeds, 1)) + rng.normal(0, true.problem, (1, problems))
                        + rng.normal(0, true.rest, (seeds, problems)))
  found = noise(draw(seeds))
  assert (found.seed, found.problem, found.rest) == pytest.approx((0.02, 0.1, 0.2), rel=0.15)
  effect = true.smallest_detectable(SEEDS)
  p_values = [bootstrap_interval(effect + draw(SEEDS), resamples=400).p_value for _ in range(100)]
  assert 0.65 < np.mean(np.array(p_values) <= 0.05) < 0.97
  assert noise(np.ones((1, 5))) is None and noise(np.full((3, 2), np.nan)) is None
  assert noise(np.array([[1.0], [3.0]])) == Noise(np.sqrt(2))


def scores(stage, metric, values_SA, subject='main'):
  names = [f'arm{i}' for i in range(values_SA.shape[1])]
  of = lambda values_S: dict(enumerate(values_S.tolist()))
  return [Comparison(stage, subject, metric, name, names[0], None, by_seed=of(values_SA[:, i]),
                     differences=of(values_SA[:, i] - values_SA[:, 0]) if i else {})
          for i, name in enumerate(names)]


def test_an_order_predicts_another_if_it_is_the_same_in_most_seeds():
  rng = np.random.default_rng(2)
  true_A = np.arange(5.0)
  order = lambda sd: claims._order('x', scores('before', 'x', true_A + rng.normal(0, 0.1, (SEEDS, 5))),
                                   scores('after', 'y', true_A + rng.normal(0, sd, (SEEDS, 5))))
  same = order(0.1)
  assert same.effect.mean > 0.9 and same.effect.p_value == pytest.approx(2 / 120)
  p_values = []
  for _ in range(40):
    test = claims._order('x', scores('before', 'x', rng.normal(size=(SEEDS, 5))),
                         scores('after', 'y', rng.normal(size=(SEEDS, 5))))
    p_values.append(test.effect.p_value)
  assert np.mean(np.array(p_values) <= 0.05) <= 0.15
  assert claims._order('x', [], []).effect is None
  before, after = (scores(stage, 'x', np.tile(true_A, (SEEDS, 1))) for stage in ('before', 'after'))
  after[4].by_seed = dict.fromkeys(range(SEEDS), -9.0)  # of harder problems only, as in a piece that was cut off
  assert claims._order('x', before, after).effect.mean == 1.0
  del after[4]
  other = scores('after', 'x', np.tile(-true_A, (SEEDS, 1)), subject='another benchmark')
  assert claims._order('x', before, [*after, *other]).effect.mean == 1.0  # of four arms, on one benchmark


def test_an_order_of_many_arms_is_tested_by_random_orders():
  """All orders of twelve arms would take hours."""
  values = np.arange(12.0)[None]
  assert claims._order('x', scores('before', 'x', values), scores('after', 'y', values)).effect.p_value == 1e-4
  orders = np.array(claims._orders(8))  # 40,320 are possible
  assert len(orders) == claims.ORDERS and (np.sort(orders) == np.arange(8)).all() and (orders[0] == np.arange(8)).all()


def test_effects_without_spread_between_seeds_decide_nothing():
  """Equal effects in two seeds used to have p = 0, and an interval without width."""
  judges = claims.above(), claims.above(worth=1.0), claims.below, claims.equal, claims.in_tail_range, claims.related
  for effect in (-0.08, 0.0, 0.002, 0.3):
    for judge in judges:
      (test,) = claims.Claim('x', '', [claims._test('x', '', 1.0, {0: effect, 1: effect}, judge)]).tests
      assert test.verdict == claims.CANT_TELL and np.isnan(test.smallest_detectable())
  unrelated = claims._order('x', scores('before', 'x', np.tile([0.0, 1, 2], (2, 1))),
                            scores('after', 'y', np.tile([0.0, 2, 1], (2, 1))))
  assert unrelated.effect.mean == pytest.approx(1 / 3)
  assert claims.Claim('x', '', [unrelated]).verdict == claims.CANT_TELL
  order = scores('before', 'x', np.tile(np.arange(5.0), (2, 1)))  # its p-value is over orders of arms, not over seeds
  assert claims.Claim('x', '', [claims._order('x', order, order)]).verdict == 'yes'


def test_a_claim_holds_if_all_its_tests_say_yes_after_correction():
  def tests(*means, sd=0.1):
    rng = np.random.default_rng(3)
    return [claims._test('x', '', 1.0, dict(enumerate(mean + sd * rng.normal(size=SEEDS))), claims.above())
            for mean in means]

  assert claims.Claim('x', '', tests(1, 1)).verdict == 'yes'
  assert claims.Claim('x', '', tests(1, -1)).verdict == 'no'
  assert claims.Claim('x', '', tests(1, 0)).verdict == claims.CANT_TELL
  small = [dataclasses.replace(test, judge=claims.above(worth=1.0)) for test in tests(0, 0)]
  assert claims.Claim('x', '', small).verdict == 'no'
  assert claims.Claim('x', '', [*small, *tests(1)]).verdict == claims.CANT_TELL
  assert claims.Claim('x', '', [*tests(1), claims._test('y', '', 1.0, {}, claims.above())]).verdict == ''
  assert claims.Claim('x', '', [claims._test('y', '', 1.0, {0: 5.0}, claims.above())]).verdict == claims.CANT_TELL
  corrected = claims.Claim('x', '', tests(0.1, 0.1), tests(0.1))
  surest = min(corrected.tests, key=lambda test: test.effect.p_value)
  assert surest.p_holm == pytest.approx(2 * surest.effect.p_value)
  assert corrected.shown[0].p_holm == corrected.shown[0].effect.p_value


def test_a_sweep_with_the_paper_s_arms_gets_its_claims_judged(tmp_path):
  sweep.make(tmp_path, arms=sweep.ARMS[:4], seeds=3, problems=24, n=8, gain=0.5)
  found = arms.read_sweep(tmp_path)
  assert {claims.LOW, claims.HIGH, claims.TAIL, PLAIN} == set(found.arms)
  k = comparisons.pass_k(found)
  judged = claims.claims(found, comparisons.distributions(found, ('ce_nats', 'entropy_nats', 'tail_mass', 'head_mass')),
                         comparisons.dynamics(found, ('entropy_nats', 'length_tokens')),
                         comparisons.benchmarks(found, k), k)
  by_letter = {claim.letter: claim for claim in judged}
  assert list(by_letter) == list('abcde')
  tests = {test.what: test for test in by_letter['a'].tests}
  assert tests['β = -0.25 against CE, ce_nats, main'].verdict == 'yes'
  assert tests['β = -0.25 against CE, entropy_nats, main'].verdict == 'yes'
  assert tests['β = 0.5 against CE, entropy_nats, main'].verdict == 'no'  # made 0.2 nats less, for every arm in turn
  assert by_letter['a'].verdict == 'no' and by_letter['b'].verdict == 'no'
  after = {test.what: test for test in by_letter['d'].tests}
  assert len(after) == 4 and after['β = -0.25 against CE, avg_at_n'].verdict == 'yes'
  assert after['β = -0.25 against β = 0.5, avg_at_n'].verdict == 'yes'
  assert after['λ̂ = -0.1 against CE, avg_at_n'].verdict != 'yes'
  assert 0 < after['β = -0.25 against CE, avg_at_n'].smallest_detectable() < 0.4


def test_effects_are_shares_of_the_run_that_they_are_differences_to(tmp_path):
  """With another arm of cross-entropy that had more runs, -8 % was shown as -4 %: it was divided by that arm."""
  for name, objective, lr, seeds, tail in (('plain', {}, 1e-3, 3, 0.1), ('tail', {'lambda_tail': -0.1}, 1e-3, 3, 0.092),
                                           ('other', {}, 1e-2, 4, 0.2)):
    for seed in range(seeds):
      path = tmp_path / f'{name}{seed}'
      sweep.run(path, objective=objective, seed=seed, steps=4, entropy=1.0, changes={'optimizer.lr': lr})
      sweep.probe(path, 4, entropy=1.0, tail_mass=tail + 1e-4 * seed)
  found = arms.read_sweep(tmp_path)
  judged = claims.claims(found, comparisons.distributions(found, ('ce_nats', 'tail_mass')), [], [], 1)
  (test,) = next(claim for claim in judged if claim.letter == 'b').tests
  assert test.effect.mean == pytest.approx(-0.08, rel=0.02) and test.effect.seeds == 3
  assert claims._arms(found) == {PLAIN: 'CE, lr = 0.001', claims.LOW: '', claims.HIGH: '', claims.TAIL: claims.TAIL}


def test_other_sweeps_have_no_claims():
  assert claims.claims(Sweep(None), [], [], [], 1) == []
  run = Run(None, 'x', {}, objective=PLAIN, arm=PLAIN, stage='pre-training')
  other = dataclasses.replace(run, objective='β = 1', arm='β = 1')
  assert claims.claims(Sweep(None, [run, other]), [], [], [], 1) == []


def test_objectives_are_named_as_the_report_names_them():
  plain = common.base().objective.to_dict()
  changes = {}, dict(beta=-0.25), dict(beta=0.5), dict(lambda_tail=-0.1)
  assert [arms.label(plain | changed) for changed in changes] == [PLAIN, claims.LOW, claims.HIGH, claims.TAIL]
