"""Tests the configs of the paper's models: their sizes, the effect of each argument, and one step of a small version of
each model.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from betarank import model
from betarank.configs import errors, load, paper
from betarank.data import Batch
from betarank.rl.config import rl_run
from betarank.rl.packing import Microbatch
from betarank.rl.update import make_update
from betarank.runtime.state import create_state
from betarank.train.config import run_config
from betarank.train.optimizer import make_optimizer
from betarank.train.step import make_step

SIZES = {  # billions: all, and those a token meets besides the embedding (paper.md's reading of Table 1)
  'dense_1b': (1.048, 0.815), 'dense_4b': (4.022, 3.634), 'moe_5b_a0p3b': (4.80, 0.26), 'moe_10b_a0p5b': (9.53, 0.52),
  'moe_20b_a1b': (19.6, 0.95),
}
ALL_STAGES = ('dense_4b', 'moe_10b_a0p5b', 'moe_20b_a1b')


def config(name, arg='', **overrides):
  return load.load(f'configs/paper/{name}.py' + (f':{arg}' if arg else ''), overrides)


def shrunken(name, arg):
  """Returns a small version of a config, which takes seconds on a CPU.

  The model has 2 layers, a width of 32 and a vocabulary of 64 tokens; a batch has 2 rows of 16 tokens.
  """
  small = {'model.layers': '2', 'model.d_model': '32', 'model.d_ff': '48', 'model.heads': '4', 'model.kv_heads': '2',
           'model.head_dim': '8', 'model.vocab_size': '64', 'train.mesh.fsdp': '1', 'train.mesh.data': '1',
           'train.mesh.expert': '1', 'optimizer.warmup_steps': '0'}
  if name.startswith('moe'):
    small |= {'model.moe.experts': '8', 'model.moe.experts_per_token': '2', 'model.moe.expert_d_ff': '8'}
  if 'stage=rl' in arg:
    small |= {'rl.prompts_per_step': '1', 'rl.group_size': '2', 'rl.eval_prompts': '1'}
  else:
    small |= {'data.sequence_length': '16', 'train.microbatches': '1', 'train.batch_size': '2', 'objective.top_k': '4',
              'train.tokens': '3200'}
  return config(name, arg, **small)


def started(run, steps):
  mesh = model.make_mesh(run.train.mesh, jax.devices()[:1])
  tx = make_optimizer(run.optimizer, steps, model.abstract(run.model)[2])
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 16)), jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(16), (2, 16))
  return mesh, tx, create_state(run.model, tx, mesh, 0), Batch(tokens, tokens, positions, jnp.ones_like(tokens))


def moved(before, after):
  return any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params)))


@pytest.mark.parametrize('name', SIZES)
def test_sizes(name):
  run = run_config(config(name))
  total, active = model.parameter_counts(run.model), model.parameter_counts(run.model, active=True)
  assert sum(total.values()) / 1e9 == pytest.approx(SIZES[name][0], rel=2e-3)
  assert (sum(active.values()) - active['embedding']) / 1e9 == pytest.approx(SIZES[name][1], rel=6e-3)
  assert run.tokens_per_step == 2**24 and run.optimizer.warmup_steps == 2000 and run.optimizer.lr == 3e-4


@pytest.mark.parametrize('objective', paper.OBJECTIVES)
def test_the_argument_sets_stage_and_objective(objective):
  run = run_config(config('dense_4b', f'objective={objective}'))
  given = {key: getattr(run.objective, key) for key in ('beta', 'lambda_head', 'lambda_tail')}
  assert {key: value for key, value in given.items() if value} == paper.OBJECTIVES[objective]
  mid = run_config(config('dense_4b', f'objective={objective},stage=midtrain'))
  assert (mid.data.sequence_length, mid.model.rope_base, mid.steps) == (16_384, 1e6, 5961)
  assert (mid.optimizer.decay_fraction, mid.optimizer.final_lr, mid.tokens_per_step) == (1.0, 3e-5, 2**24)
  rl = rl_run(config('dense_4b', f'objective={objective},stage=rl'))
  assert (rl.rl.prompts_per_step, rl.rl.group_size, rl.optimizer.lr, rl.rl.phase_steps) == (128, 16, 1e-6, (700,))


@pytest.mark.parametrize('arg, message', [('stage=mid', 'stage=mid: must be one of pretrain, midtrain, rl'),
                                          ('objective=beta', 'objective=beta: must be one of ce, beta_low')])
def test_a_wrong_argument_is_named(arg, message):
  with pytest.raises(errors.ConfigError, match=message):
    config('dense_1b', arg)


@pytest.mark.parametrize('name, arg', [
  ('moe_5b_a0p3b', 'objective=tail'), pytest.param('dense_1b', 'objective=beta_low', marks=pytest.mark.slow),
  pytest.param('dense_4b', 'objective=head,stage=midtrain', marks=pytest.mark.slow),
  pytest.param('moe_10b_a0p5b', 'objective=beta_high', marks=pytest.mark.slow),
  pytest.param('moe_20b_a1b', 'stage=midtrain', marks=pytest.mark.slow)])
def test_one_shrunken_step(name, arg):
  run = run_config(shrunken(name, arg))
  mesh, tx, state, batch = started(run, run.steps)
  with jax.set_mesh(mesh):
    after, sums = make_step(run.model, run.objective, tx, np.ones(64, np.int32))(state, batch)
  assert np.isfinite(float(sums['loss'])) and float(sums['grad_norm']) > 0 and moved(state, after)


@pytest.mark.slow
@pytest.mark.parametrize('name', ALL_STAGES)
def test_one_shrunken_rl_update(name):
  run = rl_run(shrunken(name, 'stage=rl'))
  mesh, tx, state, batch = started(run, run.rl.steps)
  advantages = jnp.repeat(jnp.asarray([[1.0], [-1.0]]), 16, 1)
  with jax.set_mesh(mesh):
    after, _, norm = make_update(run.model, run.rl.loss, tx)(
      state, [Microbatch(batch, -jnp.ones((2, 16)), advantages, batch.tokens_BT)])
  assert float(norm) > 0 and moved(state, after)
