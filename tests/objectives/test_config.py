"""Tests the config section `objective`: its schedules over optimizer steps, and its errors."""

import math

import jax
import jax.numpy as jnp
import pytest

from betarank.objectives import ObjectiveConfig, RewardShaping


def test_schedules_change_the_numbers_at_their_steps():
  c = ObjectiveConfig(beta=-0.25, lambda_tail=-0.1, schedule='linear', schedule_start=10, schedule_end=20)
  at = jax.jit(c.at)
  assert [float(at(s).beta) for s in (0, 10, 15, 20, 99)] == [0.0, 0.0, -0.125, -0.25, -0.25]
  assert float(at(15).lambda_tail) == pytest.approx(-0.05)
  c = ObjectiveConfig(beta=0.5, beta_from=-0.25, schedule='step', schedule_start=10)
  assert [float(c.at(s).beta) for s in (0, 9, 10, 11)] == [-0.25, -0.25, 0.5, 0.5]
  assert c.at(jnp.int32(3)).lambda_tail == 0.0 and not isinstance(c.at(jnp.int32(3)).lambda_tail, jax.Array)
  traces = []
  run = jax.jit(lambda step: (traces.append(1), c.at(step).beta)[1])
  for s in range(12):
    run(jnp.int32(s))
  assert len(traces) == 1  # the step is traced, so it isn't compiled again


@pytest.mark.parametrize('kwargs,message', [
  ({'beta': -2.0}, 'beta must be >= -1, got -2.0'),
  ({'beta': math.nan}, 'beta must be finite, got nan'),
  ({'beta': '0'}, "beta must be a number, got '0'"),
  ({'lambda_head': math.inf}, 'lambda_head must be finite, got inf'),
  ({'lambda_tail': math.nan}, 'lambda_tail must be finite, got nan'),
  ({'top_k': 0}, 'top_k must be an integer >= 1, got 0'),
  ({'top_k': 1.5}, 'top_k must be an integer >= 1, got 1.5'),
  ({'form': 'sum'}, "form must be one of"),
  ({'z_loss': math.nan}, 'z_loss must be finite, got nan'),
  ({'z_loss': -1.0}, 'z_loss must be >= 0, got -1.0'),
  ({'form': 'coverage'}, 'beta must be >= 1, got 0.0'),
  ({'form': 'label_smoothing', 'beta': 1.5}, 'beta must be <= 1 for label_smoothing, got 1.5'),
])
def test_values_out_of_range_are_refused_by_name(kwargs, message):
  for make in (RewardShaping, ObjectiveConfig):
    with pytest.raises(ValueError) as error:
      make(**kwargs)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize('kwargs,message', [
  ({'schedule': 'cosine'}, "schedule must be one of constant, linear, step, got 'cosine'"),
  ({'schedule': 'linear', 'schedule_start': 5, 'schedule_end': 5},
   'schedule_end must be > schedule_start = 5, got 5'),
  ({'schedule': 'step', 'beta_from': -3.0}, 'beta_from must be >= -1, got -3.0'),
  ({'schedule': 'step', 'lambda_tail_from': math.inf}, 'lambda_tail_from must be finite, got inf'),
])
def test_schedules_that_do_not_fit_are_refused_by_name(kwargs, message):
  with pytest.raises(ValueError) as error:
    ObjectiveConfig(**kwargs)
  assert str(error.value) == message
