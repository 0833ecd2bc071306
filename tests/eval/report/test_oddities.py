"""Tests that signs of trouble are found in the curves of an RL run, and not in healthy curves."""

import numpy as np
import pytest

from betarank.eval.report.oddities import of_rl

STEPS = np.arange(1, 61)
GOOD = {'pass_rate': np.linspace(0.2, 0.6, 60), 'entropy_nats': np.linspace(1.0, 0.4, 60),
        'groups_learned_from': np.full(60, 4.0), 'truncated_share': np.full(60, 0.1)}


def found(**changed):
  return of_rl({f'train/{name}': (STEPS, np.asarray(values, float)) for name, values in (GOOD | changed).items()})


def test_a_good_run_has_none():
  assert found() == []
  assert of_rl({}) == []


def where(first, last, inside, outside):
  return np.where((first <= STEPS) & (last >= STEPS), inside, outside)


@pytest.mark.parametrize(('name', 'values', 'said'), [
  ('groups_learned_from', where(20, 31, 0.0, 1.0),
   'no reward signal: no group to learn from at 12 steps in a row (step 20 to 31)'),
  ('truncated_share', np.ones(60), 'every sample is truncated at 60 steps in a row (step 1 to 60)'),
  ('pass_rate', 0.3 + 0.02 * np.sin(STEPS), 'the reward does not move: pass rate 0.30'),
  ('pass_rate', np.zeros(60), 'the reward does not move: pass rate 0.000'),
  ('entropy_nats', np.linspace(1.0, 0.01, 60), 'the entropy collapses: 0.9'),
])
def test_each_sign_is_named(name, values, said):
  line, = found(**{name: values})
  assert line.startswith(said)


def test_a_short_stretch_is_none_and_missing_values_are_left_out():
  assert found(groups_learned_from=where(20, 28, 0.0, 1.0)) == []
  assert found(entropy_nats=where(5, 50, np.nan, 0.5)) == []
