"""Tests that the programs that the planner compiles are exactly those that runs execute."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from betarank import data, model
from betarank.configs import load
from betarank.data import Batch
from betarank.launch.plan import programs
from betarank.launch.plan.workload import workload
from betarank.rl import loop as rl_loop
from betarank.rl import packing
from betarank.rl.update import make_update
from betarank.runtime import multihost
from betarank.runtime.state import abstract_state
from betarank.train import loop as pretraining_loop
from betarank.train import sampler
from betarank.train.optimizer import make_optimizer
from betarank.train.step import make_step
from tests.runs import prepare as prepare_data

DENSE = {'model.layers': '1', 'model.d_model': '32', 'model.d_ff': '64', 'model.heads': '2', 'model.kv_heads': '1',
         'model.head_dim': '8', 'model.vocab_size': '64', 'train.mesh.fsdp': '2', 'train.mesh.data': '2'}
MIXTURE = DENSE | {'model.moe.experts': '4', 'model.moe.experts_per_token': '2', 'model.moe.expert_d_ff': '16'}
PRETRAINING = {'train.microbatches': '2', 'train.batch_size': '16',
               'data.sequence_length': '64'}
RL = {'rl.prompts_per_step': '4', 'rl.group_size': '2', 'rl.decode_batch_size': '8', 'rl.max_prompt_tokens': '8',
      'rl.max_new_tokens': '[16]'}  # two dispatches
OFF_POLICY = {'rl.minibatches': '2', 'rl.loss.kl_weight': '0.1', 'rl.loss.cov': 'kl_cov'}


def planned(work, mesh):
  """Returns {program: the text of the program that the planner compiles}."""
  return {name: lower().as_text() for name, (_, lower) in programs.lowerings(work, mesh)[1].items()}


def prepare(config, overrides):
  """Returns (workload, its mesh on four devices, optimizer, a train state of zeros)."""
  work = workload(load.load(config, overrides))
  mesh = programs.make_mesh(work, jax.devices()[:4])
  tx = make_optimizer(work.run.optimizer, work.steps, model.abstract(work.run.model)[2])
  zeros = lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
  return work, mesh, tx, jax.tree.map(zeros, abstract_state(work.run.model, tx, mesh))


def test_the_train_step_is_the_one_that_pre_training_runs():
  work, mesh, tx, state = prepare('configs/smoke.py', MIXTURE | PRETRAINING)
  rows = np.ones((work.rows, work.length), np.int32)
  with jax.set_mesh(mesh):
    placement = NamedSharding(mesh, model.spec('batch', 'length'))
    batch = multihost.local_to_global(Batch(rows, rows, rows, rows), placement, work.rows)
    step = make_step(work.run.model, work.run.objective, tx, np.ones(work.run.model.vocab_size, np.int32), 2)
    assert planned(work, mesh)['train'] == step.lower(state, batch).as_text()


def without_axes_of_one(text):
  """Removes the mesh axes that have one device here from the shardings in a program's text.

  The compiler leaves these axes out of a program's results.
  """
  return re.sub(r'(, )?"(expert|context|tensor)"(?!=)', '', text)


@pytest.mark.parametrize('settings', [DENSE, MIXTURE | OFF_POLICY])
def test_rl_s_programs_are_the_ones_that_its_sampler_and_update_run(settings, monkeypatch):
  work, mesh, tx, state = prepare('configs/rl_smoke.py', RL | settings)
  c, rl, want = work.run.model, work.rl, planned(work, mesh)
  decode, dispatched = sampler._decode, []
  monkeypatch.setattr(
    sampler, '_decode', lambda *args: dispatched.append(decode.lower(*args).as_text()) or decode(*args))
  draw = sampler.Sampler(c, programs.sampler_config(work), programs.EOS, mesh)
  prompts = [sampler.Prompt(i, [1] * rl.max_prompt_tokens) for i in range(rl.prompts_per_step)]
  answers = list(draw(state.params, prompts, samples=rl.group_size, seed=0, step=0))
  assert len(dispatched) > 1 and set(dispatched) == {want['decode']}

  all_of = [packing.Answer(list(prompts[sample.prompt_id].tokens), sample, 0.0)
            for samples in answers for sample in samples]
  with jax.set_mesh(mesh):
    rows = NamedSharding(mesh, model.spec('batch', 'length'))
    shape = work.microbatch(mesh.shape)
    [microbatch] = packing.microbatches(all_of, [shape], rows)
    assert microbatch.batch.tokens_BT.shape == shape and (microbatch.choices_BTLk is not None) == bool(c.moe.experts)
    logp, mask = microbatch.sampler_logp_BT, microbatch.batch.counts_BT
    update = make_update(c, rl.loss, tx, rl.temperature)
    gradients = update.zeros(state.params)
    arrays = (microbatch, logp if rl.minibatches > 1 else None, logp if rl.loss.kl_weight else None,
              mask if rl.loss.cov else None)
    given = {'gradient': update.gradient.lower(state.params, gradients, *arrays),
             'optimizer': update.apply.lower(state, gradients)}
  for name, lowered in given.items():
    assert without_axes_of_one(lowered.as_text()) == without_axes_of_one(want[name])


@pytest.mark.slow
def test_the_rl_loop_runs_the_planned_programs(tmp_path, monkeypatch):
  """Runs the loops themselves: one step of pre-training of a mixture of experts, then one step of RL."""
  prepare_data(f'tests/tiny.py:dir={tmp_path}/data', '--config.data.sources.main.uri=reasoning:chain_sum')
  small = {key: value for key, value in MIXTURE.items() if key != 'model.vocab_size'} | {'log.samples': '0'}
  pretraining = load.load(f'tests/tiny.py:dir={tmp_path}/data', small | {
    'train.tokens': '256', 'optimizer.warmup_steps': '0', 'data.sources.main.uri': 'reasoning:chain_sum',
    'train.mesh.data': '4'})
  pretraining_loop.train(pretraining, str(tmp_path / 'parent'))
  config = load.load(f'tests/tiny_rl.py:init_from={tmp_path}/parent', small | OFF_POLICY | {
    'train.mesh.data': '4', 'rl.steps': '1', 'rl.max_prompt_tokens': '24', 'rl.max_new_tokens': '[40]',
    'rl.eval_prompts': '1', 'rl.advantage.name': 'w_reinforce',  # an untrained model is always wrong
    'rl.microbatch_tokens': '64'})  # so few that all microbatches have the first shape
  ran = {}
  decode, jit = sampler._decode, jax.jit

  def recording(name, function):
    def call(*args):
      ran.setdefault(name, set()).add(without_axes_of_one(function.lower(*args).as_text()))
      return function(*args)
    return call

  def recording_jit(function, **options):
    jitted = jit(function, **options)
    programs = {'make_update.<locals>.gradient': 'gradient', 'make_update.<locals>.apply': 'optimizer',
                'decode_params': 'weights'}
    name = programs.get(getattr(getattr(function, 'func', function), '__qualname__', ''))  # func: of a partial
    return recording(name, jitted) if name else jitted

  monkeypatch.setattr(sampler, '_decode', recording('decode', decode))
  monkeypatch.setattr(jax, 'jit', recording_jit)
  rl_loop.train(config, str(tmp_path / 'rl'))
  monkeypatch.undo()
  work = workload(config)
  mesh = programs.make_mesh(work, jax.devices())
  monkeypatch.setattr(programs, 'EOS', data.read_tokenizer(f'{tmp_path}/data/tokenizer.model').eos)
  assert {name: {without_axes_of_one(text)} for name, text in planned(work, mesh).items()} == ran
