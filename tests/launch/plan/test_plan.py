"""Tests the planner: topologies, plans, search, and a real compilation for a TPU if libtpu is installed."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import types

import jax
import pytest

from betarank.configs import errors, load
from betarank.launch.plan import chips, command, plans, predict, programs, report, search
from betarank.launch.plan.chips import PlanError, Topology
from betarank.launch.plan.workload import workload
from betarank.runtime.state import shard_bytes
from tests.runs import BETARANK


@pytest.mark.parametrize('name, count, shape', [
  ('v5e-256', 256, '16x16'), ('v5p-128', 64, '4x4x4'), ('v6e-8', 8, '2x4'), ('v6e-1', 1, '1x1'),
  ('v5litepod-16', 16, '4x4'), ('v5p-384', 192, '4x4x12'), ('v5p-640', 320, '4x4x20'), ('v5p-3072', 1536, '8x12x16'),
  ('v5p-7808', 3904, '4x4x244'), ('v5p-12288', 6144, '16x16x24')])
def test_pods_by_their_usual_names(name, count, shape):
  assert (chips.topology(name).chips, chips.topology(name).shape) == (count, shape)
  assert chips.topology(name, slices=3).chips == 3 * count


@pytest.mark.parametrize('name, message', [
  ('v4-8', 'no such chip; there are v5e, v5p, v6e'), ('v5e-100', 'no such pod; v5e comes as v5e-1, v5e-4, v5e-8'),
  ('v5p-8576', 'v5p comes as v5p-8, .*v5p-2048, and more up to v5p-12288'), ('v5p-400', 'v5p-384')])
def test_a_pod_that_does_not_exist(name, message):
  with pytest.raises(PlanError, match=message):
    Topology(name)


def test_time_of_a_transfer():
  """A v5e chip has two links per axis, of 45 GB/s in each direction. A ring of 16 chips lies along one axis."""
  pod = Topology('v5e-256')
  assert predict.transfer_s('all-gather', 1.6e9, 16, pod) == pytest.approx(1.5e9 / 90e9)
  assert predict.transfer_s('all-reduce', 2.56e9, 256, pod) == pytest.approx(2 * 2.55e9 / 180e9)


@pytest.mark.parametrize('name, group, links', [
  ('v5e-256', 4, 1), ('v5e-256', 16, 2), ('v5e-256', 64, 3), ('v5p-128', 16, 4), ('v5p-128', 64, 6),
  ('v5e-16', 4, 1), ('v5e-16', 16, 2), ('v5e-64', 64, 2), ('v6e-128', 8, 1), ('v6e-128', 16, 2), ('v6e-128', 128, 3),
  ('v5p-8', 4, 2), ('v5p-32', 16, 3), ('v5p-64', 16, 2), ('v5e-1', 1, 0)])
def test_links_of_a_group(name, group, links):
  """A chip has two links along each ring that the group fills. Along any other axis it has one: a part of an axis is a
  line, and so is a whole axis of fewer than 16 chips on v5e and v6e, or of a slice of v5p smaller than a cube.
  """
  assert Topology(name).links(group) == links


def test_the_compiler_s_own_peak_counts_not_the_sum_of_all_temporary_arrays():
  sizes = dict(argument_size_in_bytes=3, output_size_in_bytes=3, alias_size_in_bytes=2, temp_size_in_bytes=20)
  assert predict.memory_bytes(types.SimpleNamespace(**sizes, total_allocation_bytes=14)) == (10, 14)
  assert predict.memory_bytes(types.SimpleNamespace(**sizes)) == (20, 24)


def test_search_proposes_only_what_divides():
  found = search.candidates(workload(load.load('configs/paper/moe_10b_a0p5b.py')), Topology('v5e-256'))
  assert found
  for candidate in found:
    mesh = dict(candidate.mesh)
    ways = mesh['data'] * mesh['fsdp'] * mesh['expert']
    assert ways == 256 and 4096 % (ways * candidate.microbatches) == 0 and 384 % mesh['expert'] == 0
  assert {dict(candidate.mesh)['expert'] for candidate in found} >= {1, 2, 4, 8}  # 4 is what the config has


def test_search_tries_the_sizes_of_the_config_s_own_mesh():
  own = {'train.mesh.expert': '6', 'train.mesh.fsdp': '12', 'train.batch_size': '768'}
  found = search.candidates(workload(load.load('configs/paper/moe_10b_a0p5b.py', own)), Topology('v5p-384'))
  assert any(dict(candidate.mesh)['expert'] == 6 for candidate in found)
  assert any(dict(candidate.mesh)['fsdp'] == 12 for candidate in found)


def test_the_bound_on_the_memory_counts_the_state_that_the_optimizer_has():
  """A chip of v5e-4 has 16.9 GB. With AdamW, 4.6 billion parameters, two moments and gradients take 18.5 GB of each of
  four chips. With Muon and moments in bfloat16 they take 12.
  """
  def found(changed):
    work = workload(load.load('configs/paper/dense_4b.py', {'model.layers': '42'} | changed))
    return search.candidates(work, Topology('v5e-4'))

  assert not found({})
  muon = found({'optimizer.name': 'muon', 'optimizer.moment_dtype': 'bfloat16'})
  assert muon and all(dict(candidate.mesh)['fsdp'] == 4 for candidate in muon)
  assert all(11.9e9 < candidate.least_bytes < 16.91e9 for candidate in muon)


def test_the_bound_on_the_memory_is_the_state_as_it_is_sharded():
  work = workload(load.load('configs/rl_smoke.py', SMALL | MIXTURE))
  mesh = programs.make_mesh(work, jax.devices()[:4])
  state, _ = programs.lowerings(work, mesh)
  least = lambda work: search._least_bytes(work.run.model, search._state_bytes(work), mesh.shape, 0, 'full')
  assert least(work) == shard_bytes(state.opt_state) + 2 * shard_bytes(state.params)
  reference = workload(load.load('configs/rl_smoke.py', SMALL | MIXTURE | {'rl.loss.kl_weight': '0.1'}))
  assert least(reference) - least(work) == shard_bytes(state.params)


@pytest.mark.parametrize('config, changed, message', [
  ('configs/base.py', {'train.batch_size': '100', 'train.microbatches': '1'},
   'the 100 rows of an update .train.batch_size. can\'t be divided evenly among 8 chips; 96 or 104 would do'),
  ('configs/rl_smoke.py', {'rl.prompts_per_step': '3', 'rl.group_size': '2'},
   'the 6 samples of an update .*; 8 would do')])
def test_search_says_that_the_rows_can_not_be_divided(tmp_path, config, changed, message):
  with pytest.raises(PlanError, match=message):
    search.search(load.load(config, changed), Topology('v5e-8'), [], tmp_path, 1, print)


def test_advice_when_it_does_not_fit():
  work = workload(load.load('configs/paper/dense_4b.py'))
  plan = plans.Plan('train', 'v5e-256', 256, {'fsdp': 256}, 4, 'qkv', False, 'needs 20G of 15.75G HBM', 16.9e9,
                    10**8, 10**8, 0, 0, 0.0, None, (0, 0), 2**24)
  advice = plans.suggest_fix(work, plan)
  assert 'train.microbatches=8' in advice and 'remat_policy=full' in advice
  assert 'fsdp larger' in plans.suggest_fix(work, dataclasses.replace(plan, params_bytes=10**10))


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='needs libtpu, which the extra `tpu` brings')
def test_the_command_compiles_for_a_pod_that_is_not_here():
  def compiled(*more):
    done = subprocess.run(
      [*BETARANK, 'plan', '--config=configs/smoke.py', '--topology=v5e-4', '--config.train.batch_size=4', '--json',
       *more],
      capture_output=True, text=True, env={**os.environ, 'XLA_FLAGS': ''})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)['plans'][0]

  made = compiled()
  assert made['fits'] and made['chips'] == 4 and made['mesh'] == {'fsdp': 4}
  low, high = made['prediction']['step_s']
  assert 0 < low <= high < 1
  quick = compiled('--no_bundles')  # the same program: its bundles are only not written
  assert quick['temp_bytes'] == made['temp_bytes'] and quick['peak_bytes'] == made['peak_bytes']
  assert quick['prediction']['collective_bytes'] == made['prediction']['collective_bytes']


def test_bfloat16_moments_take_a_quarter_off_the_optimizer():
  """Only the first moment becomes half as large.

  The second moment stays float32. It consists of squares, whose small changes would be lost in bfloat16.
  """
  sizes = {}
  for dtype in ('float32', 'bfloat16'):
    work = workload(load.load('configs/smoke.py', {'optimizer.moment_dtype': dtype}))
    state, _ = programs.lowerings(work, programs.make_mesh(work, jax.devices()[:1]))
    sizes[dtype] = shard_bytes(state.opt_state)
  assert sizes['bfloat16'] / sizes['float32'] == pytest.approx(0.75, abs=1e-4)
  with pytest.raises(errors.ConfigError, match='moment_dtype must be one of float32, bfloat16'):
    workload(load.load('configs/smoke.py', {'optimizer.moment_dtype': 'float16'}))


def test_a_mesh_that_does_not_divide_is_one_line_with_what_would():
  work = workload(load.load('configs/smoke.py', {'train.batch_size': '12'}))
  with pytest.raises(PlanError, match='got 12; 8 or 16 would do'):
    programs.make_mesh(work, jax.devices())


SMALL = {'model.layers': '1', 'model.d_model': '32', 'model.d_ff': '64', 'model.heads': '2', 'model.kv_heads': '1',
         'model.head_dim': '8', 'model.vocab_size': '64', 'train.mesh.fsdp': '2'}
MIXTURE = {'model.moe.experts': '4', 'model.moe.experts_per_token': '2', 'model.moe.expert_d_ff': '16',
           'train.mesh.expert': '2'}
PREDICTION = predict.Prediction((10.0, 12.5), (9.0, 11.5), 1.0, 2.0, {}, 0.0, (), (), {})


def test_the_kl_reference_is_part_of_the_memory_of_every_rl_program(tmp_path, monkeypatch):
  """Nothing is compiled."""
  lowerings = programs.lowerings
  compiled = types.SimpleNamespace(as_text=str, memory_analysis=lambda: types.SimpleNamespace(
    argument_size_in_bytes=3, output_size_in_bytes=3, alias_size_in_bytes=2, temp_size_in_bytes=20,
    total_allocation_bytes=14))
  compiled.compile = lambda: compiled

  def without_compiling(work, mesh):
    state, found = lowerings(work, mesh)
    return state, {name: (on, lambda: compiled) for name, (on, _) in found.items()}

  monkeypatch.setattr(programs, 'lowerings', without_compiling)
  monkeypatch.setattr(plans, 'predict', lambda *_: PREDICTION)
  monkeypatch.setattr(plans.hlo, 'read', lambda _: None)
  small = SMALL | {'rl.decode_batch_size': '4'}

  def made(changed):
    work = workload(load.load('configs/rl_smoke.py', small | changed))
    return list(plans.make_plans(work, Topology('v5e-4'), jax.devices()[:2], tmp_path))

  without, with_reference = made({}), made({'rl.loss.kl_weight': '0.1'})
  assert len(without) == 4 and not any(plan.reference_bytes for plan in without)
  for one, other in zip(without, with_reference, strict=True):
    assert other.peak_bytes - one.peak_bytes == other.reference_bytes == other.params_bytes > 0
  advice = plans.suggest_fix(workload(load.load('configs/rl_smoke.py', small)), dataclasses.replace(
    with_reference[0], hbm_bytes=2.5 * with_reference[0].params_bytes))
  assert 'Parameters, optimizer and KL reference alone take' in advice


@pytest.mark.parametrize('search_flag, fits, status', [
  ([], {'gradient': [True], 'decode': [True]}, 0), ([], {'gradient': [True], 'decode': [False]}, 1),
  ([], {'gradient': [False], 'decode': [True]}, 1), (['--search'], {'gradient': [True, False], 'decode': [True]}, 0),
  (['--search'], {'gradient': [True], 'decode': [False, False]}, 1), (['--search'], {}, 1)])
def test_the_exit_status_says_whether_all_programs_fit(search_flag, fits, status, monkeypatch):
  plan = plans.Plan('', 'v5e-4', 4, {}, 1, 'full', True, '', 16.9e9, 1, 1, 1, 1, 0.0, PREDICTION, (0.5, 0.6), 1)
  found = [dataclasses.replace(plan, program=program, fits=fit) for program, all_of in fits.items() for fit in all_of]
  monkeypatch.setattr(command, 'configure_libtpu', lambda *_: None)  # it changes the environment of this process
  monkeypatch.setattr(Topology, 'devices', lambda _: [])
  monkeypatch.setattr(plans, 'make_plans', lambda *_: iter(found))
  monkeypatch.setattr(search, 'search', lambda *_: found)
  monkeypatch.setattr(report, 'report', lambda *_: None)
  ended = contextlib.nullcontext() if status == 0 else pytest.raises(SystemExit, match='1')
  with ended:
    command.main(['--config=configs/rl_smoke.py', '--topology=v5e-4', *search_flag])


def test_plans_of_the_rl_stage(tmp_path):
  """The programs are compiled for two CPU devices. Checks every figure of the plans, and the time of the stage made
  from them.
  """
  work = workload(load.load('configs/rl_smoke.py', SMALL | {
    'rl.prompts_per_step': '4', 'rl.group_size': '2', 'rl.decode_batch_size': '4', 'rl.max_prompt_tokens': '8',
    'rl.max_new_tokens': '[8, 16]', 'rl.phase_steps': '[3]', 'rl.steps': '5'}))
  topology = Topology('v5e-4')
  found = list(plans.make_plans(work, topology, jax.devices()[:2], tmp_path))
  gradient, optimizer, weights, decode = found
  assert [plan.program for plan in found] == ['gradient', 'optimizer', 'weights', 'decode']
  assert all(plan.fits for plan in found)
  assert (gradient.tokens, decode.tokens) == (2 * 32 * 96, 4 * 8)  # 8 is the sampler's decode_steps
  assert gradient.mesh == {'fsdp': 2} and gradient.peak_bytes > 2 * gradient.params_bytes + gradient.optimizer_bytes
  # Two fills of the decode batch per step, of one dispatch each in the first phase and two in the second.
  low = 3 * 2 * 1 * decode.prediction.step_s[0] + 2 * 2 * 2 * decode.prediction.step_s[0]
  samples = 3 * 4 * 2 * (8 + 8) + 2 * 4 * 2 * (8 + 16)  # tokens
  low += samples / gradient.tokens * gradient.prediction.step_s[0] + 5 * optimizer.prediction.step_s[0]
  low += 5 * weights.prediction.step_s[0]
  assert plans.describe_stage(work, topology, found)['seconds'][0] == pytest.approx(low)
  low = 5 * (8 * 4 / decode.tokens * decode.prediction.step_s[0] + optimizer.prediction.step_s[0]
             + weights.prediction.step_s[0]
             + 8 * (8 + 4) / gradient.tokens * gradient.prediction.step_s[0])
  assert plans.describe_stage(work, topology, found, mean_answer=4)['seconds'][0] == pytest.approx(low)
  assert plans.describe_stage(work, topology)['seconds'] is None
  assert plans.describe_stage(work, topology)['usd'] is None
  stage = plans.describe_stage(work, topology, found, usd_per_chip_hour=1.5)
  assert stage['usd'] == pytest.approx([s / 3600 * 4 * 1.5 for s in stage['seconds']])


def test_search_tries_each_number_of_chips_that_can_share_the_sampler_s_weights(tmp_path):
  config = load.load('configs/rl_smoke.py', SMALL | {
    'model.kv_heads': '2', 'train.mesh.fsdp': '4', 'rl.decode_batch_size': '4',
    'rl.max_prompt_tokens': '8', 'rl.max_new_tokens': '[8]'})
  said = []
  found = search.search_decoding(config, Topology('v5e-4'), jax.devices()[:4], tmp_path, said.append)
  assert sorted(plan.mesh.get('tensor', 1) for plan in found) == [1, 2]  # 4 doesn't divide the key heads
  assert len(said) == 3 and all('tokens/s' in line for line in said[1:])


@pytest.mark.parametrize('config, rows, length, microbatch', [
  ('configs/smoke.py', 2, 256, (2, 256)), ('configs/paper/dense_4b.py:stage=rl', 2048, 17_408, (256, 17_408))])
def test_pre_training_and_rl_under_the_same_names(config, rows, length, microbatch):
  work = workload(load.load(config))
  assert (work.rows, work.length) == (rows, length)
  assert work.microbatch({'data': 8, 'fsdp': 32, 'expert': 1, 'context': 1}) == microbatch
  assert (work.rl is None) == (rows == 2)
