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


def checked(root, tokens, before, parent='', step=0, batch_size=8, config=None, **optimizer):
  """Checks a new token budget of a run that was started with the budget `before`.

  A step has 256 tokens, and the learning rate decays in the last quarter of the steps.

  Args:
    parent: the checkpoint that a run in an empty workdir takes everything from.
    step: the step of the parent; the newest in the workdir if it is 0.
    batch_size: the rows of each step of the new run, of 32 tokens each.
    config: more of the config in the metadata.
    optimizer: changed settings of the optimizer.
  """
  run = run_config(load.load('tests/tiny.py:dir=/d', {
    'train.tokens': str(tokens), 'train.batch_size': str(batch_size), 'train.init_from': str(parent),
    'train.init_what': 'all', 'optimizer.decay_fraction': '0.25',
    **{f'optimizer.{name}': value for name, value in optimizer.items()}}))
  newest = step or max(checkpoint.steps(root / 'checkpoints'), default=0)
  meta = {'train': {'tokens': before, 'batch_size': 8}, 'data': {'sequence_length': 32}, **(config or {})}
  check_budget(run, root, {'step': newest, 'config': meta})


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


@pytest.fixture
def parent(tmp_path):
  """Returns the newest checkpoint of a run with checkpoints of the steps 8 and 12."""
  for step in (8, 12):
    for item in ('state', 'meta'):
      (folder(tmp_path / 'parent', step) / 'checkpoints' / str(step) / item).mkdir()
  return epath.Path(tmp_path) / 'parent/checkpoints/12'


@pytest.mark.parametrize('steps', [4, 12])
def test_a_new_run_that_takes_all_of_a_checkpoint_needs_a_step_to_do(parent, tmp_path, steps):
  """Otherwise it would save nothing, and report success."""
  message = rf'{steps * 256} make {steps} steps, but .*/parent/checkpoints/12 has reached step 12; .* than 3072 tokens'
  for named in (parent, parent.parent.parent):
    with pytest.raises(ConfigError, match=message):
      checked(epath.Path(tmp_path / 'new'), steps * 256, before=12 * 256, parent=named, step=12)


def test_a_new_run_that_takes_all_of_a_checkpoint_does_not_raise_its_decayed_rate(parent, tmp_path):
  new = epath.Path(tmp_path / 'new')
  with pytest.raises(ConfigError, match='12 has been lowering its learning rate since step 9.*parent/checkpoints/8 --'):
    checked(new, 20 * 256, before=12 * 256, parent=parent, step=12)
  checked(new, 20 * 256, before=12 * 256, parent=parent.parent / '8', step=8)
  checked(new, 20 * 512, before=12 * 256, parent=parent.parent / '8', step=8, batch_size=16)


def test_the_decay_of_the_checkpoint_counts_and_not_that_of_the_new_run(parent, tmp_path):
  new, constant = epath.Path(tmp_path / 'new'), {'optimizer': {'warmup_steps': 2, 'decay_fraction': 0.0}}
  checked(new, 20 * 256, before=12 * 256, parent=parent, step=12, config=constant)
  with pytest.raises(ConfigError, match='has been lowering its learning rate since step 9'):
    checked(new, 20 * 256, before=12 * 256, parent=parent, step=12, decay_fraction='0.0', config={
      'optimizer': {'warmup_steps': 2, 'decay_fraction': 0.25}})


def test_what_rl_has_saved_is_not_continued_by_pre_training(parent, tmp_path):
  with pytest.raises(ConfigError, match='init_what=all continues a run of betarank train, but .*12 is of betarank rl'):
    checked(epath.Path(tmp_path / 'new'), 20 * 256, before=12 * 256, parent=parent, step=12, config={'rl': {}})
