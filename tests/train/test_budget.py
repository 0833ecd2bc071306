"""Tests the schedule of the learning rate, and how the token budget of a run may change."""

import pytest
from etils import epath

from betarank.configs import load
from betarank.configs.errors import ConfigError
from betarank.runtime import checkpoint
from betarank.train.config import run_config
from betarank.train.loop import check_budget
from betarank.train.optimizer import OptimizerConfig, decay_start, schedule


def optimizer(**changes):
  return OptimizerConfig(**{
    'lr': 1.0, 'warmup_steps': 0, 'decay_fraction': 0.0, 'final_lr': 0.1, 'b1': 0.9, 'b2': 0.95, 'eps': 1e-8,
    'weight_decay': 0.1, 'clip_norm': 1.0, **changes})


@pytest.mark.parametrize(
  'warmup, fraction, start', [(5, 1.0, 5), (30, 0.5, 30), (0, 1.0, 0), (5, 0.25, 30), (39, 1.0, 39)])
def test_the_decay_reaches_final_lr_after_any_warm_up(warmup, fraction, start):
  """The decay used to be cut off if it overlapped with the warm-up.

  With warmup_steps=5 and decay_fraction=1.0, for example, the last of 40 rates was 0.235 instead of about 0.1.
  """
  c = optimizer(warmup_steps=warmup, decay_fraction=fraction)
  rate = schedule(c, 40)
  assert decay_start(c, 40) == start
  assert float(rate(start)) == pytest.approx(1.0) and float(rate(40)) == pytest.approx(0.1)
  assert float(rate(39)) == pytest.approx(0.1 + 0.9 / (40 - start))


@pytest.mark.parametrize('shape, middle', [('linear', 0.55), ('cosine', 0.55), ('1-sqrt', 0.1 + 0.9 * (1 - 0.5**0.5))])
def test_every_shape_of_the_decay_falls_from_lr_to_final_lr(shape, middle):
  c = optimizer(warmup_steps=2, decay_fraction=0.5, decay_shape=shape)
  rate = [float(schedule(c, 40)(step)) for step in range(42)]
  assert rate[2:21] == [1.0] * 19 and rate[40] == rate[41] == pytest.approx(0.1)
  assert rate[20:41] == sorted(rate[20:41], reverse=True) and rate[30] == pytest.approx(middle)


def test_the_slope_of_each_shape_is_what_its_name_says():
  """Cosine is flat at both ends. 1-sqrt falls fastest at its beginning."""
  rate = {shape: schedule(optimizer(decay_fraction=1.0, decay_shape=shape), 100)
          for shape in ('linear', 'cosine', '1-sqrt')}
  assert rate['1-sqrt'](5) < rate['linear'](5) < rate['cosine'](5)
  assert rate['1-sqrt'](95) < rate['linear'](95) and rate['cosine'](95) < rate['linear'](95)


def test_without_a_decay_the_rate_stays():
  assert float(schedule(optimizer(warmup_steps=3), 40)(40)) == 1.0 and decay_start(optimizer(), 40) == 40


def folder(tmp_path, *steps):
  for step in steps:
    (tmp_path / 'checkpoints' / str(step)).mkdir(parents=True, exist_ok=True)
  return epath.Path(tmp_path)


def checked(root, tokens, before, **optimizer):
  """Checks a new token budget of a run that was started with the budget `before`.

  A step has 256 tokens, and the learning rate decays in the last quarter of the steps.
  """
  run = run_config(load.load('tests/tiny.py:dir=/d', {
    'train.tokens': str(tokens), 'optimizer.decay_fraction': '0.25',
    **{f'optimizer.{name}': value for name, value in optimizer.items()}}))
  newest = max(checkpoint.steps(root / 'checkpoints'), default=0)
  check_budget(run, root, {'step': newest, 'config': {'train': {'tokens': before}}})


def test_a_budget_may_grow_until_the_decay_begins(tmp_path):
  checked(folder(tmp_path, 4, 9), 20 * 256, before=12 * 256)
  checked(epath.Path(tmp_path / 'new'), 20 * 256, before=12 * 256)


def test_a_budget_that_would_raise_a_decayed_rate_again_is_refused(tmp_path):
  """The learning rate used to jump from 0.0011 to 0.01, without an error."""
  with pytest.raises(ConfigError, match='lowering its learning rate since step 9, .* no checkpoint from before'):
    checked(folder(tmp_path, 10, 12), 20 * 256, before=12 * 256)
  with pytest.raises(ConfigError, match='lowering its learning rate since step 9'):
    checked(folder(tmp_path, 10, 12), 20 * 256, before=12 * 256, decay_shape='cosine', name='muon')
  with pytest.raises(ConfigError, match='checkpoints/8 --config.train.init_what=all'):
    checked(folder(tmp_path, 8), 20 * 256, before=12 * 256)
  checked(epath.Path(tmp_path), 12 * 256, before=12 * 256)


def test_a_budget_below_the_step_reached_is_refused(tmp_path):
  with pytest.raises(ConfigError, match='1024 make 4 steps, but .* has reached step 12'):
    checked(folder(tmp_path, 12), 4 * 256, before=12 * 256)
