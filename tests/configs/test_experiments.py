"""Tests that every config that comes with betarank is complete and valid, and that its sweep names existing settings.
"""

import math

import jax
import pytest

from betarank import model
from betarank.configs import errors, load
from betarank.launch.points import expand
from betarank.rl.config import rl_run
from betarank.train.config import run_config

FILES = load.shipped()


def check(config):
  """Returns the run that a config describes. Raises ConfigError if the config is invalid."""
  return rl_run(config) if 'rl' in config else run_config(config)


@pytest.mark.parametrize('path', FILES)
def test_it_builds_and_its_sweep_can_be_run(path):
  check(load.load(path))
  if hasattr(load.module(path)[0], 'sweep'):
    assert expand(path, 'root')  # refuses points that are named twice or can't be run


def test_the_paper_s_recipe_is_the_default():
  """The expected values are those of arXiv 2512.22955, appendix B.1, as far as it states them."""
  config = load.load('configs/rl_smoke.py')
  from betarank.configs import common
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.rl = common.rl_base().rl
  rl = check(config).rl
  assert (rl.steps, rl.prompts_per_step, rl.group_size) == (1000, 128, 16)
  assert rl.max_new_tokens == (8192, 16_384) and rl.phase(700) == 0 and rl.phase(701) == 1
  assert rl.advantage.name == 'grpo' and rl.loss.name == 'clip_higher' and rl.loss.kl_weight == 0
  assert (rl.loss.eps_low, rl.loss.eps_high, rl.minibatches) == (0.2, 0.28, 1)


@pytest.mark.parametrize('size', ['10m', '20m', '64m'])
def test_the_study_has_its_budget_and_asks_what_no_document_holds(size):
  points = {point.name: point for point in expand(f'configs/study.py:size={size},seeds=1', 'root')}
  trained = [point.config for name, point in points.items() if name.startswith('seed=0,beta=0.5/') and point.steps]
  pretrain, midtrain, rl = trained
  assert len([point for point in points.values() if point.stage == 'rl']) == 5
  held_out = {pretrain.data.held_out_fraction, midtrain.data.held_out_fraction, rl.rl.task.held_out_fraction,
              *(p.config.eval.sample.held_out_fraction for p in points.values() if p.stage == 'sample')}
  assert held_out == {0.05}
  run = run_config(pretrain)
  parameters = sum(math.prod(shape.shape) for shape in jax.tree.leaves(model.abstract(run.model)[1]))
  assert 20 <= (pretrain.train.tokens + midtrain.train.tokens) / parameters < 21
  assert midtrain.train.init_from == 'root/seed=0,beta=0.5/pretrain' and midtrain.objective.beta == 0.5


def test_the_study_trains_once_what_two_of_its_arms_share():
  points = {point.name: point for point in expand('configs/study.py:arms=beta+family+change,seeds=1', 'root')}
  assert len([name for name in points if name.endswith('/pretrain')]) == 10  # 7 + 4 - 1 that is in both sets
  changed = points['seed=0,beta=0.5,then_beta=-0.25/midtrain']
  assert changed.after == 'seed=0,beta=0.5/pretrain' and changed.config.objective.beta == -0.25
  assert changed.config.data == points['seed=0,beta=0.5/midtrain'].config.data
  with pytest.raises(errors.ConfigError, match='arms=bet: must be .* change; did you mean beta'):
    expand('configs/study.py:arms=paper+bet', 'root')


@pytest.mark.parametrize('spec, message', [
  ('small.py:stage=zz', 'stage=zz: must be one of pretrain, rl'),
  ('small.py:objective=zz', 'objective=zz: must be one of ce, beta_low, beta_high, tail, head'),
  ('small.py:objective=tial', 'objective=tial: must be .*; did you mean tail'),
  ('small.py:stage=rl,objective=zz', 'objective=zz: must be one of ce'),
  ('base.py:objective=zz', 'objective=zz: must be one of ce'),
  ('study.py:level=7', 'level=7: must be one of 0, 1, 2, 3'),
  ('sweeps/beta.py:size=smok', 'size=smok: must be .*; did you mean smoke')])
def test_an_argument_that_is_none_of_the_choices_is_named(spec, message):
  with pytest.raises(errors.ConfigError, match=f'config argument {message}'):
    load.load(f'configs/{spec}')


@pytest.mark.parametrize(
  'override, message',
  [
    ({'train.batch_size': '0'}, 'config.train.batch_size must be >= 1'),
    ({'train.microbatches': '3'}, 'config.train.microbatches must divide batch_size = 2'),
    ({'train.init_what': 'some'}, 'config.train.init_what must be one of weights, all'),
    ({'train.mesh.data': '0'}, 'config.train.mesh.data must be >= 1, or -1'),
    ({'optimizer.lr': '-1'}, 'config.optimizer.lr must be > 0'),
    ({'optimizer.lr': '1e-5', 'optimizer.decay_fraction': '0.1', 'optimizer.final_lr': '3e-5'},
     'config.optimizer.final_lr must be <= lr = 1e-05 if decay_fraction is > 0, got 3e-05'),
    ({'log.profile_steps': '1000000-1000002'}, 'config.log.profile_steps must begin at or before the last step, '),
    ({'optimizer.warmup_steps': '100000'}, 'config.optimizer.warmup_steps must be <'),
    ({'objective.beta': '-2'}, 'config.objective.beta must be >= -1'),
    ({'objective.top_k': '5000'}, 'config.objective.top_k must be <= model.vocab_size = 1024, got 5000'),
    ({'objective.form': 'powr'}, 'config.objective.form must be one of'),
    ({'checkpoint.keep': '0'}, 'config.checkpoint.keep must be >= 1'),
    ({'log.eval_batches': '0'}, 'config.log.eval_batches must be >= 1'),
    ({'data.sources.main.weight': '-1'}, 'config.data.sources.main.weight must be'),
    ({'model.heads': '3', 'model.kv_heads': '2'}, 'config.model.kv_heads must divide heads = 3'),
    ({'seed': '-1'}, 'config.seed must be from 0'),
    ({'seed': '2147483648'}, 'config.seed: expected a whole number below 2**31'),
    ({'model.layers': '1e21'}, 'config.model.layers: expected a whole number below 2**31, got 1000000000000000000000'),
    ({'model.d_ff': '1e12'}, 'config.model.d_ff: expected a whole number below 2**31'),
    ({'checkpoint.keep': '-1e30'}, 'config.checkpoint.keep: expected a whole number below 2**31'),
    ({'train.batch_size': '1e8'}, 'config.train.batch_size must make fewer than 2**31 tokens per step'),
    ({'train.tokens': '1e13'}, 'config.train.tokens must make at most 100,000,000 steps of 512 tokens'),
    ({'train.tokens': '1e30'}, 'config.train.tokens: expected a whole number below 2**63'),
  ],
)
def test_values_out_of_range_are_named(override, message):
  with pytest.raises(errors.ConfigError) as error:
    check(load.load('configs/smoke.py', override))
  assert str(error.value).startswith(message)
