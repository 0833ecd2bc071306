import numpy as np
import pytest

from betarank.data.mixture import PERIOD, Schedule


@pytest.mark.parametrize('weights', [
  {'a': 1.0}, {'a': 3, 'b': 1}, {'x': 0.61, 'y': 0.3, 'z': 0.09, 'off': 0.0}, {'big': 1.0, 'tiny': 1e-9},
  {str(i): 1.0 for i in range(7)}])
def test_follows_the_weights_everywhere(weights):
  schedule = Schedule(weights)
  share = {name: weights[name] / sum(weights.values()) for name in schedule.names}
  assert sum(schedule.counts(PERIOD).values()) == PERIOD
  for rows in (1, 10, 1000, PERIOD, PERIOD + 17, 10 * PERIOD + 3):
    counts = schedule.counts(rows)
    assert sum(counts.values()) == rows
    for name in schedule.names:
      assert abs(counts[name] - share[name] * rows) <= len(weights) + 2 * rows / PERIOD


def test_draws_of_a_source_are_consecutive():
  schedule, drawn = Schedule({'a': 2, 'b': 1, 'c': 0.5}), {'a': 0, 'b': 0, 'c': 0}
  for row in [*range(300)]:
    name, draw = schedule.at(row)
    assert draw == drawn[name]
    drawn[name] += 1
    assert schedule.counts(row + 1) == drawn
  name, draw = schedule.at(5 * PERIOD + 300)
  assert draw == schedule.counts(5 * PERIOD + 300)[name]


def test_order_of_names_does_not_matter():
  one, other = Schedule({'a': 1, 'b': 2}), Schedule({'b': 2, 'a': 1})
  assert [one.at(r) for r in range(50)] == [other.at(r) for r in range(50)]
  np.testing.assert_array_equal(one.counts(99), other.counts(99))
