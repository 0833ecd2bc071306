"""Tests the sampling metrics against enumerations of all subsets and of all ways to break ties."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from betarank.eval import sampling_metrics

NAN = math.nan


def line(problem, sample, verdict='right', group=0, tokens=5, finish='stop'):
  return dict(problem=problem, sample=sample, verdict=verdict, group=group, tokens=tokens, finish=finish)


@pytest.mark.parametrize('n', range(1, 9))
def test_pass_at_k_is_the_mean_over_all_subsets(n):
  for c in range(n + 1):
    score_N = np.array([1.0] * c + [0.0] * (n - c))
    pass_K = sampling_metrics.pass_at_k(score_N[None])[0]
    for k in range(1, n + 1):
      subsets = list(itertools.combinations(score_N, k))
      assert pass_K[k - 1] == pytest.approx(np.mean([max(s) for s in subsets]), abs=1e-15), (n, c, k)


def test_pass_at_k_stays_exact_at_many_samples():
  n = 20_000  # C(n, n/2) has 6000 digits
  for c in (1, 3, 1000):
    pass_K = sampling_metrics.pass_at_k(np.array([[1.0] * c + [0.0] * (n - c)]))[0]
    for k in (1, 64, 5000, n - c, n):
      exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
      assert pass_K[k - 1] == pytest.approx(float(exact), rel=1e-11), (c, k)


def test_pass_at_k_leaves_undecided_samples_out_and_ends_where_they_end():
  pass_PK = sampling_metrics.pass_at_k(np.array([[1, 0, NAN, 0], [NAN] * 4]))
  np.testing.assert_allclose(pass_PK[0], [1 / 3, 2 / 3, 1, NAN])
  assert np.isnan(pass_PK[1]).all()


samples = st.lists(st.tuples(st.sampled_from([0.0, 1.0, NAN]), st.integers(-1, 3)), min_size=1, max_size=7)


@settings(max_examples=200, deadline=None)
@given(samples)
def test_cons_at_n_is_the_mean_over_all_ways_of_breaking_ties(drawn):
  """The expected value is computed by hand: count the votes, and list the most frequent answers and their samples."""
  score_N, group_N = np.array([s for s, _ in drawn]), np.array([g for _, g in drawn])
  got = sampling_metrics.cons_at_n(score_N[None], group_N[None])[0]
  decided = [(s, g) for s, g in drawn if not math.isnan(s)]
  votes = {}
  for score, group in decided:
    if group >= 0:
      votes.setdefault(group, []).append(score)
  if not decided:
    assert math.isnan(got)
  elif not votes:
    assert got == 0
  else:
    most = max(map(len, votes.values()))
    outcomes = [score for scores in votes.values() if len(scores) == most for score in scores]
    assert got == pytest.approx(sum(outcomes) / len(outcomes))


def test_cons_at_n_by_example():
  cons = lambda score, group: sampling_metrics.cons_at_n(np.array([score]), np.array([group]))[0]
  assert cons([1.0, 1.0, 0.0], [0, 0, 1]) == 1
  assert cons([1.0, 0.0, 0.0], [0, 1, 1]) == 0  # right, but outvoted
  assert cons([1.0, 0.0], [0, 1]) == 0.5
  assert cons([1.0, 0.0, 0.0, 0.0], [0, -1, -1, -1]) == 1  # silence is no vote
  assert cons([NAN, NAN, 1.0], [1, 1, 0]) == 1  # nor is an answer that nobody judged


def test_avg_diversity_length_and_truncation():
  found = sampling_metrics.collect([
    line('2', 1, 'wrong', 1, 8, 'length'), line('2', 0, 'right', 0, 4), line('2', 2, 'undecided', -1, 6),
    line('10', 0, 'undecided', -1, 3), line('2', 2, 'right', 0, 99),  # a second line for a sample: not counted
  ])
  assert found.problems == ('2', '10') and found.undecided == 2
  got = found.metrics()
  np.testing.assert_allclose(got['avg_at_n'], [0.5, NAN])
  np.testing.assert_allclose(got['cons_at_n'], [0.5, NAN])
  np.testing.assert_allclose(got['distinct_answers'], [2, 0])
  np.testing.assert_allclose(got['answer_entropy_nats'], [math.log(2), 0])
  np.testing.assert_allclose(got['length_tokens'], [6, 3])
  np.testing.assert_allclose(got['truncated_share'], [1 / 3, 0])
  assert got['pass_at_k'].shape == (2, 3)


def test_problems_with_the_same_question_count_as_one():
  found = sampling_metrics.collect([
    line(problem, sample, verdict, group, tokens=problem) | ({'question': question} if question else {})
    for problem, question, verdicts in (
      (1, 'a', ('right', 'right')), (2, 'b', ('wrong', 'right')), (3, 'a', ('wrong', 'right')),
      (4, 'c', ('undecided', 'undecided')), (5, 'c', ('right', 'right')), (10, None, ('wrong', 'wrong')))
    for sample, (verdict, group) in enumerate(zip(verdicts, (0, 1)))][::-1])
  assert found.questions == ('1', '2', '4', '10') and len(found.problems) == 6
  got = found.metrics()
  np.testing.assert_allclose(got['avg_at_n'], [0.75, 0.5, 1, 0])
  np.testing.assert_allclose(got['pass_at_k'], [[0.75, 1], [0.5, 1], [1, 1], [0, 0]])
  np.testing.assert_allclose(got['length_tokens'], [2, 2, 4.5, 10])


def test_answer_entropy_is_that_of_the_empirical_distribution():
  group_N = np.array([0, 0, 0, 1, 2, -1])
  want = -sum(p * math.log(p) for p in (0.6, 0.2, 0.2))
  assert sampling_metrics.answer_entropy(group_N[None])[0] == pytest.approx(want)


@pytest.mark.parametrize(('change', 'said'), [
  ({'verdict': 'maybe'}, "verdict 'maybe'"), ({'verdict': ['right']}, 'verdict'), ({'group': None}, 'malformed'),
  ({'tokens': 'many'}, 'malformed'), ({'sample': math.inf}, 'malformed'),
])
def test_a_malformed_sample_is_named(change, said):
  with pytest.raises(ValueError, match=said):
    sampling_metrics.collect([line('1', 0) | change])
  with pytest.raises(ValueError, match="no 'verdict'"):
    sampling_metrics.collect([{k: v for k, v in line('1', 0).items() if k != 'verdict'}])


def test_no_samples_at_all():
  found = sampling_metrics.collect([])
  assert found.problems == found.questions == () and found.metrics()['avg_at_n'].shape == (0,)
