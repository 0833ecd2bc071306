"""Tests sweeps: errors that are found before anything starts, and real sweeps that are killed, with their launcher, and
started again.
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import rich.console
from etils import epath
from ml_collections import ConfigDict

from betarank.configs.errors import ConfigError
from betarank.launch import engine, on_tpu
from betarank.launch import sweep as sweep_module
from betarank.launch.points import Point, check_workdirs, expand, local_files
from betarank.launch.sweep import Sweep
from betarank.runtime import checkpoint, workdir
from tests import runs
from tests.runs import BETARANK, assert_no_secret, betarank, environment

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = 'tests/tiny_sweep.py'


def write(tmp_path, body):
  path = tmp_path / 'sweep.py'
  path.write_text('from tests.tiny_sweep import get_config as base\n\n\ndef get_config(arg=None):\n'
                  f'  return base(f"dir=/d,{{arg or str()}}")\n\n\ndef sweep(add):\n{body}')
  return str(path)


def test_points_are_named_chained_and_resolved(tmp_path):
  points = {p.name: p for p in expand(f'{CONFIG}:dir=/d,arms=2,seeds=2,probes=true', 'root')}
  assert list(points)[:4] == ['data/d', 'arm0,seed0/train', 'arm0,seed0/rl', 'arm0,seed0/probe'] and len(points) == 13
  rl = points['arm1,seed1/rl']
  assert rl.after == 'arm1,seed1/train' and rl.config.train.init_from == 'root/arm1,seed1/train'
  assert rl.config.seed == 1 and rl.steps == 2 and points['arm1,seed1/train'].config.objective.beta == -0.1
  assert rl.arguments == ('rl', f'--config={CONFIG}:dir=/d,arms=2,seeds=2,probes=true,stage=rl',
                          '--workdir=root/arm1,seed1/rl', '--config.seed=1',
                          '--config.train.init_from=root/arm1,seed1/train')
  assert points['arm1,seed1/probe'].arguments == ('eval', 'probe', '--checkpoint=root/arm1,seed1/rl',
                                                  '--config.eval.probe.rows=8')
  assert points['arm0,seed1/train'].needs == ('data/d',)


def test_the_paper_s_mid_training_waits_for_its_own_data_and_that_for_the_tokenizer():
  points = {p.name: p for p in expand('configs/paper/dense_4b.py', 'root')}
  assert len(points) == 2 + 5 * 3
  assert points['data/runs-data-paper-midtrain'].needs == ('data/runs-data-paper-pretrain',)
  middle = points['seed=0,beta=-0.25/midtrain']
  assert middle.needs == ('seed=0,beta=-0.25/pretrain', 'data/runs-data-paper-midtrain')


def test_only_keeps_what_its_points_need():
  names = [p.name for p in expand(f'{CONFIG}:dir=/d,arms=2,seeds=2', 'root', ['arm1,*/rl'])]
  assert names == ['data/d', 'arm1,seed0/train', 'arm1,seed0/rl', 'arm1,seed1/train', 'arm1,seed1/rl']
  with pytest.raises(ConfigError, match='--only=arm7: no such point'):
    expand(f'{CONFIG}:dir=/d', 'root', ['arm7'])


@pytest.mark.parametrize(
  'body, message',
  [
    ('  pass\n', 'its sweep(add) names no point'),
    ('  add()\n  add()\n', 'sweep point run/train: is named twice'),
    ('  add(seed=1)\n  add("seed=1")\n', 'sweep point seed=1/train: is named twice'),
    ('  add(**{"optimizer.lrr": 1})\n', 'sweep point lrr=1/train: config.optimizer.lrr: no such key; did you mean'),
    ('  add(**{"optimizer.lr": "x"})\n', 'sweep point lr=x/train: config.optimizer.lr: expected a number'),
    ('  add(**{"objective.beta": -3.0})\n', 'sweep point beta=-3.0/train: config.objective.beta must be >= -1'),
    ('  add(stage="pretrain")\n', "sweep: stage must be one of train, rl, probe, sample, got 'pretrain'"),
    ('  add(after="nobody/train")\n', "sweep point nobody/train: after='nobody/train' is not an earlier point"),
    ('  add("../x")\n', 'sweep point ../x/train: a name can have'),
    ('  add(arg="stag=rl")\n', "sweep point run/train,stag=rl: config argument 'stag'"),
    ('  add(stage="rl", arg="stage=rl", after=add(), **{"rl.group_size": 1})\n',
     'sweep point run/rl: config.rl.group_size must be >= 2'),
    ('  add(stage="probe")\n', 'sweep point run/probe: stage probe evaluates a point'),
    ('  add(stage="sample", after=add())\n', 'sweep point run/sample: benchmark= belongs to stage sample'),
    ('  add(stage="probe", after=add(), **{"eval.probe.row": 8})\n',
     'sweep point run/probe: config.eval.probe.row: no such key'),
  ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(tmp_path, body, message):
  with pytest.raises(ConfigError) as error:
    expand(write(tmp_path, body), str(tmp_path / 'root'))
  assert message in str(error.value)
  assert not (tmp_path / 'root').exists()


def test_a_run_that_took_its_model_from_another_run_can_be_launched_again(tmp_path):
  """The config in its workdir has the model of the run before, which is not that of its config file."""
  points = expand(write(tmp_path, '  add("mid", after=add(**{"model.d_model": 64}))\n'), str(tmp_path / 'root'))
  first, child = (point for point in points if point.stage == 'train')

  def started(point, **changes):
    config = point.config.copy_and_resolve_references()
    with config.unlocked():
      config.update_from_flattened_dict(changes)
    workdir.write_config(epath.Path(point.workdir), config)

  model = {'model.d_model': 64, 'model.vocab_size': 512, 'data.vocab_size': 512, 'model.moe.experts': 4}
  started(first)
  started(child, **model)
  check_workdirs(points)
  started(child, **model, **{'optimizer.lr': 0.5})
  with pytest.raises(ConfigError, match=r'mid/train: holds a run with config\.optimizer\.lr = 0\.5, now 0\.01'):
    check_workdirs(points)
  started(child, **model)
  started(first, **{'model.layers': 7})
  with pytest.raises(ConfigError, match=r'holds a run with config\.model\.layers = 7, now 1'):
    check_workdirs(points)


def test_on_tpu_a_dry_run_prints_points_chips_hours_cost_and_commands():
  settings = {name: value for name, value in environment().items() if not name.startswith('TPU_')}
  done = subprocess.run(
    [*BETARANK, 'sweep', '--config=configs/paper/dense_4b.py', '--on=tpu', '--dry_run'],
    env={**settings, 'TPU_TYPE': 'v5litepod-256', 'TPU_DOLLARS_PER_HOUR': '100', 'TPU_NAME': 'pod', 'COLUMNS': '200'},
    text=True, capture_output=True)
  assert done.returncode == 0, done.stderr
  [row] = [line.split() for line in done.stdout.splitlines() if line.split()[:1] == ['seed=0,beta=-0.25/pretrain']
           and 'after' not in line]
  # 6 FLOPs a parameter and token and causal attention, of 256 chips of 197 TFLOP/s at the MFU of the plans
  flops = 6 * 4.02e9 + 6 * 36 * 4096 * 32 * 128
  slow, fast = (flops * 500e9 / (256 * 197e12 * mfu) / 3600 for mfu in on_tpu.PLANNED_MFU['v5e', False])
  assert row[1:3] == ['500G', '256'] and row[4] == 'to'
  assert [float(row[3]), float(row[5])] == pytest.approx([fast, slow], rel=0.02)
  dollars = [float(word.strip('$').replace(',', '')) for word in (row[9], row[11])]
  assert dollars == pytest.approx([100 * fast, 100 * slow], rel=0.02)
  [rl] = [line.split() for line in done.stdout.splitlines() if line.split()[:1] == ['seed=0,beta=-0.25/rl']
          and 'after' not in line]
  # 2048 samples a step with answers of 8192 tokens for 700 steps and of 16,384 for 300, and prompts of 1024; the
  # chips draw 290,000 (175,000) tokens a second
  drawn = 2048 * (700 * 8192 + 300 * 16384)
  flops = (6 * 4.02e9 + 6 * 36 * 17408 * 32 * 128) * (drawn + 2048 * 1000 * 1024)
  slow, fast = ((flops / (256 * 197e12 * mfu) + drawn / rate) / 3600
                for mfu, rate in zip(on_tpu.PLANNED_RL_MFU['v5e', False][0], (175_000, 290_000)))
  assert [float(rl[2]), float(rl[4])] == pytest.approx([fast, slow], rel=0.02) and rl[1] == '256'
  assert 'hours of preparing data are printed by its command with --dry_run' in done.stdout
  assert done.stdout.count('tpu.sh --yes babysit train') == 10 and done.stdout.count('babysit rl') == 5
  assert '--workdir=gs://BUCKET/dense_4b/seed=0,beta=-0.25/midtrain' in done.stdout
  assert 'to be fixed before a launch: jsonl:corpus/math/*.jsonl is on this machine' in done.stdout  # RL's questions


def test_on_tpu_data_goes_to_the_bucket():
  """A slice can read neither prepared data nor tokenizers on this machine's disk."""
  points = {p.name: p for p in expand('configs/paper/dense_4b.py', 'gs://b/4b')}
  folder = 'gs://b/4b/runs/data/paper'
  tokenizer = f'{folder}/pretrain/tokenizer.model'
  assert points['data/runs-data-paper-midtrain'].workdir == f'{folder}/midtrain'
  point = points['seed=0,beta=-0.25/midtrain']
  assert (point.config.data.dir, point.config.data.tokenizer) == (f'{folder}/midtrain', tokenizer)
  assert f'--config.data.dir={folder}/midtrain' in point.arguments
  assert f'--config.data.tokenizer={tokenizer}' in point.arguments
  assert points['seed=0,beta=-0.25/rl'].config.data.tokenizer == ''  # that of the checkpoint it starts from
  assert all('=runs/' not in argument for point in points.values() for argument in point.arguments)


def test_on_tpu_a_file_of_this_machine_is_refused(tmp_path, monkeypatch):
  with pytest.raises(ConfigError, match='config.data.tokenizer: /my/own.model is on this machine'):
    expand(write(tmp_path, '  add(**{"data.tokenizer": "/my/own.model"})\n'), 'gs://b/x')
  [problem] = local_files(expand('configs/paper/dense_4b.py', 'gs://b/4b'))
  assert problem.startswith('jsonl:corpus/math/*.jsonl is on this machine') and 'and 4 more' in problem
  for name in on_tpu.REQUIRED:
    monkeypatch.setenv(name, 'x')
  monkeypatch.delenv('TPU_MAX_HOURS', raising=False)
  monkeypatch.delenv('TPU_MAX_DOLLARS', raising=False)
  with pytest.raises(ConfigError, match='TPU_MAX_HOURS or TPU_MAX_DOLLARS'):
    on_tpu.command(dry_run=False)


def test_a_plan_compiles_a_program_once_for_all_points_that_run_it():
  points = [point for point in expand('configs/paper/dense_1b.py', 'root') if point.stage != 'data']
  kinds = [on_tpu.program_key(point) for point in points]
  assert len(points) == 5 and kinds[0] == kinds[1] == kinds[2] != kinds[3] == kinds[4]  # two need the top k


def start(root, *flags, arguments=''):
  return betarank('sweep', f'--config={CONFIG}:dir={root.parent}/data{arguments}', f'--root={root}', '--on=local',
                  *flags)


def finish(process, timeout=600):
  return runs.finish([process], timeout)[0]


def status(root):
  path = root / 'sweep.json'
  points = json.loads(path.read_text())['points'] if path.exists() else {}
  return {name: point['status'] for name, point in points.items()}


def wait_until(process, holds):
  for _ in range(6000):
    if holds():
      return
    assert process.poll() is None, process.communicate()
    time.sleep(0.05)
  raise AssertionError('it never came to that')


def alive(root):
  """Returns the ids of the processes that currently run points of the sweep at `root`."""
  pids = []
  for lock in (root / '.sweep').rglob('*.lock'):
    with workdir.lock_file(lock.with_suffix('.lock')) as held:
      if held is None:
        pids.append(int(workdir.holder(lock)))
  return pids


def check_whole(root, points):
  """Checks that all points are finished, and that every step of every run was done exactly once.

  points: the expected number of points.
  """
  states = status(root)
  assert len(states) == points and {s['state'] for s in states.values()} == {'finished'}, states
  record = json.loads((root / 'sweep.json').read_text())
  for name, point in record['points'].items():
    if point['stage'] in ('train', 'rl'):
      lines = [json.loads(line) for line in (root / name / 'metrics.jsonl').read_text().splitlines()]
      steps = collections.Counter(line['step'] for line in lines if 'time/step_s' in line)
      assert steps == dict.fromkeys(range(1, (6 if point['stage'] == 'train' else 2) + 1), 1), name
      assert json.loads((root / name / 'config.json').read_text()) == point['config']
      meta = checkpoint.read_meta(checkpoint.find(str(root / name)))
      if point['stage'] == 'rl':
        assert meta['parent'].startswith(str(root / point['after']))


def kill_in_the_middle(root, at, *flags, arguments=''):
  """Starts a sweep, and kills its launcher once the point `at` is running. Commands of points continue. Returns their
  process ids.
  """
  launcher = start(root, *flags, arguments=arguments)
  wait_until(launcher, lambda: status(root).get(at, {}).get('state') == 'running' and (root / at).exists())
  launcher.kill()
  launcher.communicate()
  return alive(root)


@pytest.mark.slow
def test_a_sweep_killed_launcher_and_all_finishes_every_point_once(tmp_path):
  """The sweep has two arms with pre-training and RL.

  The first time, only the launcher is killed. The second time, the running commands are killed too.
  """
  root = tmp_path / 'sweep'
  left = kill_in_the_middle(root, 'arm0,seed0/train')
  assert len(left) == 1
  second = start(root, '--parallel=2')
  wait_until(second, (root / 'arm1,seed0/train').exists)
  adopted = status(root)['arm0,seed0/train']
  assert adopted['starts'] == 1  # not started beside the one that was there
  second.kill()
  second.communicate()
  for pid in alive(root):
    os.kill(pid, signal.SIGKILL)
  code, out, err = finish(start(root, '--parallel=2'))
  assert code == 0 and out.endswith(f'5 finished, of 5\ntry: betarank report {root}\n'), out + err
  check_whole(root, 5)
  before = status(root)
  code, out, _ = finish(start(root))
  assert code == 0
  assert {n: s['starts'] for n, s in status(root).items()} == {n: s['starts'] for n, s in before.items()}
  assert_no_secret(root)  # sweep.json, the commands' logs, workdirs


@pytest.mark.slow
def test_five_arms_two_seeds_three_stages(tmp_path):
  root, arguments = tmp_path / 'sweep', ',arms=5,seeds=2,probes=true'
  for at in ('arm1,seed0/train', 'arm2,seed1/rl', 'arm4,seed0/train'):
    for pid in kill_in_the_middle(root, at, '--parallel=3', arguments=arguments)[::2]:  # every other one dies too
      os.kill(pid, signal.SIGKILL)
  code, out, err = finish(start(root, '--parallel=3', arguments=arguments), timeout=1800)
  assert code == 0 and '31 finished, of 31' in out, out + err
  check_whole(root, 31)
  assert len(list(root.glob('*/rl/eval/probe/*.json'))) == 10
  done = subprocess.run([*BETARANK, 'report', str(root)], env=environment(), text=True,
                        capture_output=True)
  assert done.returncode == 0 and (root / 'report' / 'report.html').exists(), done.stderr


@pytest.mark.slow
def test_a_point_that_fails_takes_only_its_own_chain_and_ctrl_c_saves(tmp_path):
  root = tmp_path / 'sweep'
  launcher = start(root, arguments=',bad=true')
  wait_until(launcher, lambda: status(root).get('arm1,seed0/train', {}).get('state') == 'running'
             and (root / 'arm1,seed0/train/metrics.jsonl').exists())
  launcher.send_signal(signal.SIGSTOP)  # so that it can't be done before the second one looks
  code, _, err = finish(start(root, arguments=',bad=true'))
  assert code == 2 and f'another launch is running there, process {launcher.pid}' in err
  launcher.send_signal(signal.SIGINT)
  launcher.send_signal(signal.SIGCONT)
  code, out, err = finish(launcher)
  assert code == 130 and 'asked to stop; the same command resumes the sweep' in err and not alive(root)
  code, out, err = finish(start(root, arguments=',bad=true'))
  assert code == 1, err
  assert 'failed arm0,seed0/train: step 2: loss is' in out and 'skipped arm0,seed0/rl: needs arm0,seed0/train' in out
  states = {name: s['state'] for name, s in status(root).items()}
  assert states['arm1,seed0/rl'] == 'finished' and states['arm0,seed0/train'] == 'failed'
  assert states['arm0,seed0/rl'] == 'skipped'


def test_a_second_run_in_a_workdir_is_refused(tmp_path):
  with workdir.claim(tmp_path):
    done = subprocess.run(
      [*BETARANK, 'train', f'--config={CONFIG}:dir={tmp_path}', f'--workdir={tmp_path}'],
      env=environment(), text=True, capture_output=True)
  assert done.returncode == 2 and f'process {os.getpid()} on ' in done.stderr
  assert done.stderr.startswith(f'error: --workdir={tmp_path}: ') and len(done.stderr.splitlines()) == 1


def bare_sweep(tmp_path, codes):
  """Runs a sweep of two points, train and rl. Returns {stage: (state, note)}.

  codes: {stage: exit status}. The commands of the points only exit with this status.
  """
  points = expand(write(tmp_path, '  base = add()\n  add(stage="rl", arg="stage=rl", after=base)\n'),
                  str(tmp_path / 'root'))
  points = [dataclasses.replace(p, needs=(p.after,) if p.after else ()) for p in points if p.stage != 'data']
  (tmp_path / 'root').mkdir(exist_ok=True)
  made = Sweep(points, tmp_path / 'root', 1, lambda point, _: ['sh', '-c', f'exit {codes[point.stage]}'])
  made.run(lambda: None)
  return {name.rpartition('/')[2]: (status.state, status.note) for name, status in made.status.items()}


@pytest.mark.parametrize('code, state, note', [
  (143, 'stopped', 'at step 0 of 6'), (130, 'stopped', 'at step 0 of 6'), (1, 'failed', 'exit 1: '),
  (0, 'failed', 'ended at step 0 of 6 with exit 0')])
def test_a_command_that_was_asked_to_stop_has_not_failed(tmp_path, code, state, note):
  """The exit status decides. Points that need a stopped point wait for the next launch, which starts that point again.
  """
  states = bare_sweep(tmp_path, {'train': code, 'rl': 0})
  assert states['train'][0] == state and states['train'][1].startswith(note)
  assert states['rl'][0] == ('waiting' if state == 'stopped' else 'skipped')
  assert bare_sweep(tmp_path, {'train': 1, 'rl': 0})['train'][0] == 'failed'  # it was started again


@pytest.fixture
def package_without_git(tmp_path):
  """Returns (folder, environment) for commands that use a copy of the package, as a wheel installs it, without a git
  checkout.

  The folder has subfolders with the names of the package's parts, such as data, which must not be imported instead.
  """
  site, here = tmp_path / 'site', tmp_path / 'here'
  shutil.copytree(ROOT, site / 'betarank', ignore=shutil.ignore_patterns('.*', 'runs', 'tests', 'docs', 'corpus'))
  for name in ('data', 'model', 'configs', 'launch'):
    (here / name).mkdir(parents=True)
  return here, {**environment(), 'PYTHONPATH': str(site)}


def test_on_tpu_from_a_wheel(package_without_git):
  """A dry run works. A launch ends with one line before anything is created, because `push` needs a git checkout."""
  here, settings = package_without_git
  settings = {name: value for name, value in settings.items() if not name.startswith('TPU_')}
  command = [sys.executable, '-P', '-m', 'betarank', 'sweep', '--config=configs/smoke.py', '--on=tpu', '--root=gs://b/x']
  for flag in ('--dry_run', '--dry-run'):
    done = subprocess.run([*command, flag], cwd=here, env=settings, text=True, capture_output=True)
    assert done.returncode == 0 and 'tpu.sh --yes babysit train' in done.stdout, done.stderr
  settings |= {**dict.fromkeys(on_tpu.REQUIRED, 'x'), 'TPU_TYPE': 'v5litepod-8', 'TPU_MAX_HOURS': '1'}
  done = subprocess.run(command, cwd=here, env=settings, text=True, capture_output=True)
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
  assert done.stderr.startswith('error: --on=tpu: push sends a git commit, and ') and 'clone betarank' in done.stderr


@dataclasses.dataclass(frozen=True)
class Flaky(Point):
  """A point whose result can't be read at first. Each exception in `errors` is raised once."""

  errors: list = dataclasses.field(default_factory=list)

  def finished(self):
    if self.errors:
      raise self.errors.pop()
    return True


def flaky(tmp_path, errors, command):
  """Returns (a sweep of one point that trains, the Status of this point). The point is Flaky, with `errors`."""
  [point] = [p for p in expand(write(tmp_path, '  add()\n'), str(tmp_path / 'root')) if p.stage == 'train']
  fields = {field.name: getattr(point, field.name) for field in dataclasses.fields(Point)} | {'needs': ()}
  (tmp_path / 'root').mkdir()
  made = Sweep([Flaky(**fields)], tmp_path / 'root', 1, lambda point, _: command, on_tpu.slice_of,
               on_tpu.start_delete)
  made.status[point.name].state = 'waiting'  # finished() has just said that it is
  made.points[0].errors.extend(errors)
  return made, made.status[point.name]


def test_an_incomplete_last_checkpoint_in_a_bucket_does_not_finish_a_point(bucket):
  """The points after it would start from the checkpoint before."""
  point = Point('a/train', 'train', '', (), {}, 12, str(bucket / 'a/train'), ())
  for step in (8, 12):
    (bucket / f'a/train/checkpoints/{step}').mkdir(parents=True)
  (bucket / 'a/train/checkpoints/8' / checkpoint.COMMITTED).touch()
  assert point.step() == 8 and not point.finished()
  (bucket / 'a/train/checkpoints/12' / checkpoint.COMMITTED).touch()
  assert point.step() == 12 and point.finished()


def test_a_bucket_that_fails_for_a_while_is_read_again(tmp_path, monkeypatch):
  monkeypatch.setattr(sweep_module, 'READ_AGAIN_S', 0.0)
  made, status = flaky(tmp_path, [OSError('HTTP 503')] * 3, ['true'])
  made.run(lambda: None)
  assert status.state == 'finished' and not made.points[0].errors


def test_a_bucket_that_goes_on_failing_fails_the_point_only(tmp_path, monkeypatch):
  monkeypatch.setattr(sweep_module, 'READ_AGAIN_S', 0.0)
  monkeypatch.setattr(sweep_module, 'GIVE_UP_S', 0.0)
  made, status = flaky(tmp_path, [OSError('HTTP 503')] * 3, ['true'])
  made.run(lambda: None)
  assert (status.state, status.note) == ('failed', 'its result could not be read (HTTP 503)')


@pytest.fixture
def stub(tmp_path, monkeypatch):
  """Returns the folder of a stub of gcloud, which launch/tpu.sh calls until the test ends."""
  stub = tmp_path / 'stub'
  (stub / 'bin').mkdir(parents=True)
  (stub / 'bin' / 'gcloud').write_text(
    f'#!/bin/sh\nexec {sys.executable} {pathlib.Path(__file__).with_name("stub_gcloud.py")} "$@"\n')
  (stub / 'bin' / 'gcloud').chmod(0o755)
  settings = dict(STUB=str(stub), PATH=f'{stub / "bin"}:{os.environ["PATH"]}', TPU_NAME='pod', TPU_PROJECT='p',
                  TPU_ZONE='z', TPU_TYPE='v5litepod-8', TPU_RUNTIME='v')
  for name, value in settings.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(on_tpu, 'DELETE_WAIT_S', 0.0)
  return stub


def create(slot):
  assert on_tpu._tpu_sh(on_tpu.slice_of(slot), '--yes', 'create').returncode == 0


def calls(stub):
  return [json.loads(line) for line in (stub / 'calls.jsonl').read_text().splitlines()]


def slices(stub):
  """Returns the names of the slices that exist."""
  return {path.name for path in (stub / 'nodes').glob('*')}


class Scripted(Point):
  """A point that is finished once its command has written the file `done` in its workdir."""

  def step(self):
    return 0

  def finished(self):
    return pathlib.Path(self.workdir, 'done').exists()


def scripted(tmp_path, scripts, parallel=1, only=''):
  """Returns a sweep on slices. The command of each point is a line of bash, run in the point's workdir.

  scripts: {name: line}. A point ARM/STAGE needs the point before it, if that is of the same arm.
  only: names of the points to select, separated by blanks; '' for all.
  """
  points, before = [], ''
  for name, line in scripts.items():
    folder = tmp_path / 'root' / name
    folder.mkdir(parents=True, exist_ok=True)
    needs = (before,) if before.split('/')[0] == name.split('/')[0] else ()
    if not only or name in only.split():
      points.append(Scripted(name, 'train', '', needs, ConfigDict(), 1, str(folder), (f'cd {folder}; {line}',)))
    before = name
  return Sweep(points, tmp_path / 'root', parallel, lambda point, slot: ['bash', '-c', *point.arguments],
               on_tpu.slice_of, on_tpu.start_delete)


FINISH, WAIT = 'touch done', "trap 'kill $!; exit 143' TERM; sleep 60 & touch started; wait"
CONSOLE = rich.console.Console(width=240)


def stop_once(made, holds):
  """Runs a sweep, and asks it to stop once holds() is true."""
  run = made.run

  def show():
    if holds() and not made.stopping:
      made.stop(hard=False)

  made.run = lambda _: run(show)
  sweep_module.run(made, CONSOLE, [signal.SIGINT], on_tpu.clean_up)


@pytest.mark.parametrize('parallel, only, zone', [(2, '', 'z'), (1, '', 'z'), (1, 'b/train', 'z'), (2, '', 'other')])
def test_slices_of_all_launches_are_deleted(tmp_path, monkeypatch, stub, capsys, parallel, only, zone):
  """The first launch is asked to stop, and keeps two slices. The second launch deletes both, although it uses one slice
  at most, and even in another zone.
  """
  create(0), create(1)
  made = scripted(tmp_path, {'a/train': WAIT, 'b/train': WAIT}, 2)
  stop_once(made, lambda: all((tmp_path / 'root' / name / 'started').exists() for name in made.status))
  assert slices(stub) == {'pod-0', 'pod-1'}
  assert 'STILL BILLED until deleted: pod-0, pod-1. To delete: ' in capsys.readouterr().out
  monkeypatch.setenv('TPU_ZONE', zone)
  made = scripted(tmp_path, {'a/train': FINISH, 'b/train': FINISH}, parallel, only)
  sweep_module.run(made, CONSOLE, [], on_tpu.clean_up)
  assert made.status['b/train'].state == 'finished' and not slices(stub)
  assert capsys.readouterr().out.splitlines()[-1] == 'no slice of this sweep is left: nothing is billed'
  deleted = [call for call in calls(stub) if 'delete' in call]
  assert {(call[4], call[6]) for call in deleted} >= {('pod-0', '--zone=z'), ('pod-1', '--zone=z')}
  assert json.loads((tmp_path / 'root' / 'sweep.json').read_text())['slices'] == []


def test_settings_that_mean_the_same_name_the_same_slice(monkeypatch):
  for name in ('TPU_SLICES', 'TPU_QUEUED'):
    monkeypatch.delenv(name, raising=False)
  plain = on_tpu.slice_of(0)
  monkeypatch.setenv('TPU_SLICES', '1')
  assert on_tpu.slice_of(0) == plain
  monkeypatch.setenv('TPU_SLICES', '2')
  several = on_tpu.slice_of(0)
  monkeypatch.setenv('TPU_QUEUED', 'yes')
  assert on_tpu.slice_of(0) == several != plain


def test_the_slices_of_a_record_from_before_slices_were_recorded_are_deleted(tmp_path, stub):
  create(0), create(1)
  made = scripted(tmp_path, {'a/train': WAIT, 'b/train': WAIT}, 2)
  stop_once(made, lambda: all((tmp_path / 'root' / name / 'started').exists() for name in made.status))
  path = tmp_path / 'root' / 'sweep.json'
  record = json.loads(path.read_text())
  del record['slices']
  for point in record['points'].values():
    del point['status']['slice']
  path.write_text(json.dumps(record))
  sweep_module.run(scripted(tmp_path, {'b/train': FINISH}), CONSOLE, [], on_tpu.clean_up)
  assert not slices(stub)


def test_the_slice_of_a_point_that_still_runs_and_is_not_selected_is_kept(tmp_path, stub, capsys):
  """An earlier launcher was killed, so its command continues on the first slice."""
  create(0), create(1)
  killed = scripted(tmp_path, {'a/train': WAIT, 'b/train': FINISH}, 2)
  killed._begin(killed.points[0])
  try:
    made = scripted(tmp_path, {'a/train': WAIT, 'b/train': FINISH}, 2, 'b/train')
    sweep_module.run(made, CONSOLE, [], on_tpu.clean_up)
    assert made.status['b/train'].slice == on_tpu.slice_of(1) and slices(stub) == {'pod-0'}
    assert 'still billed: pod-0' in capsys.readouterr().out and made.slices == [on_tpu.slice_of(0)]
  finally:
    killed.stop(hard=True)
    killed._wait()
  sweep_module.run(scripted(tmp_path, {'b/train': FINISH}), CONSOLE, [], on_tpu.clean_up)
  assert not slices(stub)


def test_a_slice_that_could_not_be_deleted_is_deleted_after_the_next_launch(tmp_path, stub, capsys):
  create(0)
  (stub / 'fail.json').write_text(json.dumps([{'match': 'tpu-vm delete', 'stderr': 'ERROR: UNAVAILABLE', 'times': 4}]))
  for left in ({'pod-0'}, set()):
    sweep_module.run(scripted(tmp_path, {'a/train': FINISH}), CONSOLE, [], on_tpu.clean_up)
    assert slices(stub) == left and ('STILL BILLED' in capsys.readouterr().out) == bool(left)


def test_a_slice_that_runs_another_command_is_not_deleted(tmp_path, stub, capsys):
  """An earlier point has used the slice. Then another sweep starts a command there, so babysit ends with status 7."""
  create(0), create(1)
  made = scripted(tmp_path, {'a/train': FINISH, 'b/train': 'exit 7', 'c/train': 'sleep 1; touch done'}, 2)
  sweep_module.run(made, CONSOLE, [], on_tpu.clean_up)
  other, = slices(stub)
  assert other == f'pod-{made.status["b/train"].slot}'
  assert capsys.readouterr().out.splitlines()[-2:] == [
    f'not deleted, because another command runs there, and still billed: {other}',
    'no other slice of this sweep is left: nothing else is billed']
  assert json.loads((tmp_path / 'root' / 'sweep.json').read_text())['slices'] == []


@pytest.mark.parametrize('keep', [False, True])
def test_without_gcloud_a_slice_does_not_count_as_deleted(monkeypatch, stub, capsys, keep):
  (stub / 'bin' / 'gcloud').unlink()
  for tool in ('bash', 'timeout', 'dirname', 'grep', 'cut', 'xargs'):
    (stub / 'bin' / tool).symlink_to(shutil.which(tool))
  monkeypatch.setenv('PATH', str(stub / 'bin'))
  assert on_tpu.clean_up(CONSOLE, [on_tpu.slice_of(0)], [], keep) == [on_tpu.slice_of(0)]
  assert 'STILL BILLED until deleted: pod-0' in capsys.readouterr().out


@pytest.mark.parametrize('second, third, left', [
  ('exit 2', FINISH, {'pod-0'}),  # refused, so the next point is skipped
  ('exit 143', FINISH, {'pod-0'}),  # stopped; the next point can't start in this launch
  (FINISH, FINISH, {'pod-0'}),
  (FINISH, 'until [ -f stop ]; do sleep 0.1; done; touch done', {'pod-0', 'pod-1'})])
def test_a_slice_is_deleted_once_no_point_can_use_it(tmp_path, stub, second, third, left):
  """Three slices are left of an earlier launch, of which two are used. The first point still runs."""
  create(0), create(1), create(2)
  scripts = {'a/train': 'until [ -f stop ]; do sleep 0.1; done; touch done', 'a/rl': FINISH, 'b/train': second,
             'b/rl': third}
  made = scripted(tmp_path, scripts, 2)
  made.slices.extend(on_tpu.slice_of(slot) for slot in range(3))
  run, until = made.run, time.monotonic() + 300

  def show():
    assert time.monotonic() < until, slices(stub)
    if slices(stub) == left and made.status['b/train'].state != 'running':
      for arm in 'a/train', 'b/rl':
        (tmp_path / 'root' / arm / 'stop').touch()

  made.run = lambda _: run(show)
  sweep_module.run(made, CONSOLE, [], on_tpu.clean_up)
  assert made.status['a/rl'].state == 'finished' and not slices(stub) and made.slices == []
  assert made.status['a/rl'].slice == on_tpu.slice_of(0)


@pytest.mark.parametrize('signum, code, left', [
  (signal.SIGHUP, 129, set()), (signal.SIGTERM, 143, {'pod-0'}), (signal.SIGINT, 130, {'pod-0'})])
def test_a_signal_stops_runs_and_only_a_closed_terminal_deletes_slices(tmp_path, stub, monkeypatch, signum, code, left):
  create(0)
  made = scripted(tmp_path, {'a/train': WAIT})
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sweep_module, 'expand', lambda *_: made.points)
  monkeypatch.setattr(sweep_module, 'local_files', lambda _: [])
  monkeypatch.setattr(on_tpu, 'command', lambda _: lambda point, _: ['bash', '-c', *point.arguments])
  before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)}
  signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup

  def send():
    while not (tmp_path / 'root' / 'a' / 'train' / 'started').exists():
      time.sleep(0.05)
    os.kill(os.getpid(), signum)
    if signum == signal.SIGHUP:  # a shell passes it on, and the kernel sends it again when the shell ends
      time.sleep(0.05)
      os.kill(os.getpid(), signum)

  sender = threading.Thread(target=send, daemon=True)
  sender.start()
  try:
    with pytest.raises(SystemExit) as ended:
      sweep_module.main(['--config=x.py', '--on=tpu', '--root=gs://b/x'])
    sender.join()
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  assert ended.value.code == code and slices(stub) == left
  record = json.loads((tmp_path / 'runs' / 'sweeps' / 'b' / 'x' / 'sweep.json').read_text())
  assert record['points']['a/train']['status']['state'] == 'stopped' and len(record['slices']) == len(left)


@pytest.mark.parametrize('fails_to_delete', [0, 2, 3])
def test_an_error_of_the_launcher_leaves_no_run_and_no_slice(tmp_path, stub, monkeypatch, capsys, fails_to_delete):
  """The command is asked to stop. Then its slice is deleted, with three tries, on a stub of gcloud.

  The last line says what still costs money.
  """
  create(0)
  (stub / 'fail.json').write_text(json.dumps(
    [{'match': 'tpu-vm delete', 'stderr': 'ERROR: UNAVAILABLE', 'times': fails_to_delete}] * bool(fails_to_delete)))
  stopped = tmp_path / 'stopped'
  made, _ = flaky(tmp_path, [], ['bash', '-c', f'trap "touch {stopped}; exit 143" TERM; sleep 60 & wait'])
  shown = []

  def show():
    shown.append(1)
    if len(shown) > 3:
      raise ZeroDivisionError

  made_run = made.run
  monkeypatch.setattr(made, 'run', lambda _: made_run(show))
  with pytest.raises(ZeroDivisionError):
    sweep_module.run(made, CONSOLE, [], on_tpu.clean_up)
  assert stopped.exists()
  last = capsys.readouterr().out.splitlines()[-1]
  if fails_to_delete < 3:
    assert not (stub / 'nodes' / 'pod-0').exists() and last.startswith('no slice of this sweep is left')
  else:
    assert last.startswith(
      'STILL BILLED until deleted: pod-0. To delete: TPU_NAME=pod-0 TPU_PROJECT=p TPU_ZONE=z TPU_SLICES=1 bash ')
  assert sum('delete' in call for call in calls(stub)) == 1 + min(fails_to_delete, 2)


def test_the_planner_compiles_with_the_flags_that_the_workers_have(monkeypatch):
  monkeypatch.setenv('TPU_ENV', 'A=1 LIBTPU_INIT_ARGS="--xla_a=1 --xla_b"')
  assert on_tpu.worker_flags() == {'LIBTPU_INIT_ARGS': '--xla_a=1 --xla_b'}


@pytest.mark.parametrize('name, value, message', [
  *(('TPU_DOLLARS_PER_HOUR', value, ': expected a number above 0') for value in ('$307', '-5', 'nan', 'inf', '0')),
  *(('TPU_SLICES', value, ': expected a whole number above 0') for value in ('abc', '1.5', '0', '1e3')),
  ('TPU_ENV', 'A="b', ' has a quote without an end: A="b')])
def test_on_tpu_a_number_in_the_environment_that_is_none_is_named(monkeypatch, name, value, message):
  monkeypatch.setenv(name, value)
  with pytest.raises(ConfigError, match=re.escape(f'{name}{message}')):
    on_tpu.worker_flags()
    on_tpu.print_estimate(rich.console.Console(), [], 1, False)


def engine_commands(tmp_path, template, *chips):
  points = expand(f'{CONFIG}:dir=/d,arms=1,seeds=1,probes=true', str(tmp_path / 'root'))
  run = engine.command(template, chips)
  return {point.name: run(point, 0) for point in points}


def test_a_point_is_handed_to_an_engine_by_a_template(tmp_path):
  made = engine_commands(tmp_path, "submit --n={chips} '--job={name} x' {command}", '8', 'rl=16')
  assert made['data/d'][:1] == [sys.executable]  # data is prepared here
  train, rl, probe = (made[f'arm0,seed0/{stage}'] for stage in ('train', 'rl', 'probe'))
  assert [words[:2] for words in (train, rl, probe)] == [['submit', f'--n={n}'] for n in (8, 16, 8)]
  assert len(train) == 4 and shlex.split(train[3])[:2] == ['betarank', 'train']
  point = expand(f'{CONFIG}:dir=/d,arms=1,seeds=1,probes=true', str(tmp_path / 'root'))[1]
  assert shlex.split(train[3])[1:] == list(point.arguments)
  names = [re.fullmatch(r'--job=([a-z][a-z0-9-]{0,49}) x', words[2])[1] for words in (train, rl, probe)]
  assert len(set(names)) == 3 and names[0].startswith('arm0-seed0-train-')
  other = engine_commands(tmp_path / 'other', "'--job={name} x' {command}")['arm0,seed0/train'][0]
  assert other != f'--job={names[0]} x'  # another root, another job
  run = engine.command("cards '--card={slot}' {command}", [])
  assert [run(point, slot)[1] for slot in (0, 3)] == ['--card=0', '--card=3']


@pytest.mark.parametrize('template, chips, message', [
  ('slurm', [], 'must be local, tpu, or a command with {command} in it'),
  ('sbatch {comand}', [], '{comand} is not one of {command}, {name}, {chips}, {slot}; did you mean {command}?'),
  ("sbatch '{command}", [], 'no closing quotation'),
  ('x {chips} {command}', ['rl=4'], '{chips} needs --chips=N or --chips=train=N'),
  ('x {command}', ['many'], '--chips=many: must be a number'),
  ('x {command}', ['rll=4'], '--chips=rll=4: must be a number, or STAGE=NUMBER')])
def test_a_template_that_can_not_be_used_is_refused(tmp_path, template, chips, message):
  with pytest.raises(ConfigError) as error:
    engine_commands(tmp_path, template, *chips)
  assert message in str(error.value)


@pytest.mark.parametrize('template, message', [
  ('true {chips} {command}', '{chips} needs --chips=N or --chips=rl=N'),
  ('no-such-program {command}', 'no-such-program is not installed on this machine')])
def test_a_command_of_a_later_stage_is_refused_before_anything_starts(tmp_path, template, message):
  with pytest.raises(ConfigError) as error:
    sweep_module.main([f'--config={CONFIG}:dir={tmp_path}/d,arms=1,seeds=1', f'--root={tmp_path}/root',
                       f'--on={template}', '--chips=train=4'])
  assert str(error.value) == f'--on={template}: {message}'
  assert not (tmp_path / 'root').exists()


def test_a_finished_point_needs_no_command(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(Point, 'finished', lambda self: True)
  sweep_module.main([f'--config={CONFIG}:dir={tmp_path}/d,arms=1,seeds=1', f'--root={tmp_path}/root',
                     '--on=true {chips} {command}', '--chips=rl=4'])
  assert capsys.readouterr().out.endswith(f'try: betarank report {tmp_path}/root\n')
