"""Tests that runs are found, linked to their parents and named, and that the names in a sweep.json are used."""

import json
import shutil

import pytest

from betarank.eval.report import arms
from betarank.eval.report.runs import Run, Sweep
from tests.eval import sweep


@pytest.mark.parametrize(('objective', 'name'), [
  ({}, 'CE'), ({'beta': -0.25}, 'β = -0.25'), ({'lambda_tail': -0.1}, 'λ̂ = -0.1'),
  ({'lambda_tail': -0.1, 'top_k': 50}, 'λ̂ = -0.1, k = 50'), ({'top_k': 50}, 'CE'),
  ({'beta': 1, 'form': 'product'}, 'β = 1, form = product'),
])
def test_arms_are_named_by_what_differs_from_cross_entropy(objective, name):
  assert arms.label(sweep.config(objective=objective, seed=0, steps=1)['objective']) == name


def test_arms_are_sorted_by_the_values_in_their_names_with_plain_cross_entropy_first():
  names = ('CE', 'β = -1', 'β = -0.5', 'β = -1e-05', 'β = -1e-05 → CE', 'β = 0.25', 'β = 10', 'run-1', 'run-2')
  found = Sweep(None, [Run(None, name, {}, objective=name, arm=name) for name in names[::-1]])
  assert found.arms == ['CE', 'run-1', 'run-2', *names[1:7]]


def test_a_moved_sweep_still_finds_its_parents(tmp_path):
  sweep.make(tmp_path / 'here', arms=sweep.ARMS[:2], seeds=1)
  shutil.move(tmp_path / 'here', tmp_path / 'there')
  found = arms.read_sweep(tmp_path / 'there')
  assert {run.name: run.parent.name for run in found.runs if run.is_rl} == {
    'rl/arm0-seed0': 'pre/arm0-seed0', 'rl/arm1-seed0': 'pre/arm1-seed0'}
  # The parents lie elsewhere; runs of the same name are not mistaken for them.
  (tmp_path / 'there' / 'rl' / 'again').mkdir()
  shutil.copytree(tmp_path / 'there' / 'rl' / 'arm0-seed0', tmp_path / 'there' / 'rl' / 'again' / 'arm0-seed0')
  alone = arms.read_sweep(tmp_path / 'there' / 'rl')
  assert all('unknown' in run.arm for run in alone.runs) and len(alone.notes) >= 3


def test_two_pieces_with_runs_of_the_same_name_find_their_own_parents(tmp_path):
  sweep.make(tmp_path / 'here', arms=sweep.ARMS[:2], seeds=1)
  for piece in ('1', '2'):
    shutil.copytree(tmp_path / 'here', tmp_path / 'pieces' / piece)
  shutil.rmtree(tmp_path / 'here')
  found = arms.read_sweep(tmp_path / 'pieces')
  assert {run.name: run.parent.name for run in found.runs if run.is_rl} == {
    f'{piece}/rl/arm{arm}-seed0': f'{piece}/pre/arm{arm}-seed0' for piece in '12' for arm in '01'}


def test_an_ancestor_outside_two_pieces_may_be_missing(tmp_path):
  sweep.make(tmp_path / 'gone', arms=sweep.ARMS[:2], seeds=1)
  for piece in ('1', '2'):
    shutil.copytree(tmp_path / 'gone', tmp_path / 'pieces' / piece)
  shutil.move(tmp_path / 'gone' / 'rl', tmp_path / 'outside')
  shutil.rmtree(tmp_path / 'gone')
  sweep.run(tmp_path / 'pieces' / 'last', objective={}, seed=0, steps=20, entropy=1.0,
            init_from=next((tmp_path / 'outside/arm0-seed0/checkpoints').iterdir()))
  found = {run.name: run for run in arms.read_sweep(tmp_path / 'pieces').runs}
  assert found['last'].parent.name.endswith('outside/arm0-seed0') and found['last'].parent.parent is None


def test_a_parent_outside_the_sweep_names_the_arm(tmp_path):
  sweep.make(tmp_path, arms=sweep.ARMS[1:2], seeds=1)
  found = arms.read_sweep(tmp_path / 'rl')
  assert [(run.arm, run.stage) for run in found.runs] == [('β = -0.25', 'pre-training → RL')] and not found.notes


def test_all_ancestors_outside_the_sweep_count(tmp_path):
  start = ''
  for name in ('pre', 'rl', 'last'):
    sweep.run(tmp_path / name, objective={'beta': -0.25} if not start else {}, seed=0, steps=20, entropy=1.0,
              init_from=start)
    start = tmp_path / name / 'checkpoints' / '20'
  found = arms.read_sweep(tmp_path / 'last')
  assert [(run.arm, run.stage) for run in found.runs] == [('β = -0.25', 'pre-training → RL → RL')] and not found.notes


def change(path, **settings):
  """Changes settings in a run's config.json. In a keyword, '__' stands for the dot of the key."""
  config = json.loads((path / 'config.json').read_text())
  for key, value in settings.items():
    section, name = key.split('__')
    config[section][name] = value
  (path / 'config.json').write_text(json.dumps(config))


def test_another_setting_makes_another_arm_with_a_baseline_of_its_own(tmp_path):
  for name, beta, lr in (('a', 0.0, 3e-4), ('b', 0.0, 1e-3), ('c', -0.25, 3e-4), ('d', -0.25, 1e-3)):
    sweep.run(tmp_path / name, objective={'beta': beta}, seed=0, steps=20, entropy=1.0)
    change(tmp_path / name, optimizer__lr=lr)
  found = arms.read_sweep(tmp_path)
  assert found.arms == ['CE, lr = 0.0003', 'CE, lr = 0.001', 'β = -0.25, lr = 0.0003', 'β = -0.25, lr = 0.001']
  assert found.baselines == {
    'CE, lr = 0.0003': 'CE, lr = 0.0003', 'CE, lr = 0.001': 'CE, lr = 0.0003',
    'β = -0.25, lr = 0.0003': 'CE, lr = 0.0003', 'β = -0.25, lr = 0.001': 'CE, lr = 0.001'}


def test_runs_that_started_from_different_arms_are_different_arms(tmp_path):
  """RL runs from pre-trainings with other learning rates used to form one arm, and half of them weren't compared."""
  places = {'inside': tmp_path / 'sweep' / 'pre', 'outside': tmp_path / 'elsewhere'}
  for where, pre in places.items():
    for lr in (3e-4, 1e-3):
      for beta in (0.0, -0.25):
        for rl_lr in (1e-5, 1e-6):
          name = f'{lr},{beta},{rl_lr}'
          sweep.run(pre / name, objective={'beta': beta}, seed=0, steps=4, entropy=1.0, changes={'optimizer.lr': lr})
          sweep.run(tmp_path / 'sweep' / f'rl-{where}' / name, objective={}, seed=0, steps=2, entropy=1.0,
                    init_from=pre / name / 'checkpoints' / '4', changes={'optimizer.lr': rl_lr})
  before = [f'{objective}, lr = {lr}' for objective in ('CE', 'β = -0.25') for lr in (0.0003, 0.001)]
  after = [f'{arm}, RL lr = {lr}' for arm in before for lr in (1e-6, 1e-5)]
  assert {run.arm for run in arms.read_sweep(tmp_path / 'sweep' / 'pre').runs} == set(before)
  assert {run.arm for run in arms.read_sweep(tmp_path / 'sweep' / 'rl-outside').runs} == set(after)
  found = arms.read_sweep(tmp_path / 'sweep')
  assert {run.arm for run in found.runs if run.is_rl} == set(after)
  assert found.baselines['β = -0.25, lr = 0.001, RL lr = 1e-06'] == 'CE, lr = 0.001, RL lr = 1e-06'


def test_how_a_run_is_executed_makes_no_arm(tmp_path):
  for name, policy, offload in (('a', 'none', False), ('b', 'full', True)):
    sweep.run(tmp_path / name, objective={}, seed=int(name == 'b'), steps=20, entropy=1.0)
    change(tmp_path / name, model__remat_policy=policy, model__offload_activations=offload)
  assert arms.read_sweep(tmp_path).arms == ['CE']


def test_arms_have_the_names_that_sweep_json_gives_them(tmp_path):
  folder, points = tmp_path / 'sweeps' / 'one', {}
  for beta in (0.0, -0.25):
    for seed in (0, 1):
      name = f'beta={beta},seed={seed}'
      train, rl = folder / name / 'train', folder / name / 'rl'
      sweep.run(train, objective={'beta': beta}, seed=seed, steps=4, entropy=1.0)
      sweep.run(rl, objective={}, seed=seed, steps=2, entropy=1.0, init_from=train / 'checkpoints' / '4')
      points |= {f'{name}/train': {'stage': 'train'}, f'{name}/rl': {'stage': 'rl'}}
  sweep.write(folder / 'sweep.json', json.dumps({'points': points}))
  found = arms.read_sweep(folder)
  assert found.arms == ['beta=0.0', 'beta=-0.25']  # plain cross-entropy first, by its config and not by its name
  assert {(run.arm, run.stage) for run in found.runs} == {
    (arm, stage) for arm in found.arms for stage in ('pre-training', 'pre-training → RL')}
  assert set(found.baselines.values()) == {'beta=0.0'} and not found.notes
  sweep.make(folder.parent / 'another', arms=sweep.ARMS[:2], seeds=1)
  above = arms.read_sweep(folder.parent)  # a folder with several sweeps
  assert {'beta=0.0', 'beta=-0.25'} < set(above.arms)


def test_arms_in_a_bucket_have_the_names_that_this_machine_recorded(bucket, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  sweep.run(bucket / 'one' / 'plain' / 'train', objective={}, seed=0, steps=2, entropy=1.0)
  sweep.write(tmp_path / 'runs' / 'sweeps' / bucket.name / 'one' / 'sweep.json',
              json.dumps({'points': {'plain/train': {'stage': 'train'}}}))
  assert arms.read_sweep(bucket / 'one').arms == ['plain']
