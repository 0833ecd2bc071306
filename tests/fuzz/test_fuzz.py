"""Runs a small part of the campaign (python -m tests.fuzz), and tests that the campaign counts every kind of failure.
"""

import pytest

from tests.fuzz import campaign
from tests.fuzz.__main__ import plan
from tests.fuzz.targets import TARGETS

COSTLY = ('report_page', 'verifier', 'report', 'reasoning_uri')


def test_hostile_input_is_read_or_refused():
  cases = plan(500, [name for name in TARGETS if TARGETS[name].weight and name not in COSTLY])
  for result in campaign.run(cases, seed=0, together=True):
    assert not result.bad, (result.name, dict(result.bad))
    assert result.cases == cases[result.name] and result.good + result.refused == result.cases
    assert result.peak_mb < 300


def test_all_cases_are_planned():
  whole = plan(100_000, [name for name in TARGETS if TARGETS[name].weight])
  assert sum(whole.values()) >= 100_000 and whole.keys() == TARGETS.keys() - {'broken'}


@pytest.mark.slow
def test_each_failure_is_counted():
  """The target `broken` fails in four ways: an exception, too much memory, a segmentation fault, and a hang."""
  [result] = campaign.run({'broken': 10}, seed=0)
  assert (result.cases, result.good, result.refused, result.crashes, result.hangs) == (10, 4, 2, 3, 1), result.bad
  assert {what for what, _ in result.bad} == {'ZeroDivisionError', 'MemoryError', 'deadline',
                                              'worker ended with status -11'}
