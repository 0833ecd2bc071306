"""Whole runs, as separate processes: what a kill, a stop, a full disk or a wrong setting does to them.

Equality is to the last bit: metrics.jsonl without its `time/` entries, and every array of the last checkpoint.
"""

import json
import random
import resource
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

from betarank.runtime import checkpoint
from tests.runs import BETARANK, arrays, environment, metrics

STEPS = 12


def command(data_dir, workdir, *extra):
  return [*BETARANK, 'train', f'--config=tests/tiny.py:dir={data_dir}', f'--workdir={workdir}', *extra]


def start(*args, devices=1, **popen):
  return subprocess.Popen(command(*args), env=environment(devices), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, **popen)


def start_pair(data_dir, workdir):
  """The same run as two processes of one device each."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  return [start(data_dir, workdir, f'--coordinator=127.0.0.1:{port}', '--processes=2', f'--process_id={i}')
          for i in range(2)]


def finish(*processes):
  """Waits for all; returns (exit code, standard error) of the first."""
  outs = [p.communicate(timeout=240) for p in processes]
  return processes[0].returncode, outs[0][1]


def assert_same_run(a, b):
  assert metrics(a) == metrics(b)
  want, got = arrays(b, STEPS), arrays(a, STEPS)
  assert got.keys() == want.keys() and len(got) > 20
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def wait_for_step(workdir, step, processes):
  """Returns once the run has written this step, or is at its end."""
  for _ in range(2400):
    if any(p.poll() is not None for p in processes):
      return
    path = workdir / 'metrics.jsonl'
    if path.exists() and any(f'"step": {n},' in path.read_text() for n in range(step, STEPS + 1)):
      return
    time.sleep(0.05)
  raise AssertionError('the run wrote nothing')


@pytest.fixture(scope='module')
def undisturbed(data_dir, tmp_path_factory):
  """One run from start to end, in one process on one device."""
  workdir = tmp_path_factory.mktemp('undisturbed')
  code, err = finish(start(data_dir, workdir))
  assert code == 0, err
  return workdir


def test_an_undisturbed_run_leaves_what_it_should(undisturbed):
  lines = metrics(undisturbed)
  assert [line['step'] for line in lines if 'train/ce_nats' in line] == list(range(1, STEPS + 1))
  assert [line['step'] for line in lines if 'eval/main/ce_nats' in line] == [6, 12]
  assert lines[0]['train/loss_nats'] != lines[0]['train/ce_nats']  # shaped, and plain cross-entropy beside it
  meta = checkpoint.read_meta(undisturbed / 'checkpoints' / '12')
  assert meta['step'] == 12 and meta['cursor']['step'] == 12 and meta['parent'] == ''
  assert meta['config'] == json.loads((undisturbed / 'config.json').read_text())
  assert sorted(p.name for p in (undisturbed / 'checkpoints').iterdir()) == ['12', '8']  # keep = 2
  sample = json.loads((undisturbed / 'samples.jsonl').read_text().splitlines()[-1])
  assert sample.keys() == {'step', 'prompt', 'text'}


@pytest.mark.parametrize('kill_at', [pytest.param(2, marks=pytest.mark.slow), random.Random(7).randint(5, 11)])
def test_killed_and_started_again_equals_uninterrupted(undisturbed, data_dir, tmp_path, kill_at):
  process = start(data_dir, tmp_path)
  wait_for_step(tmp_path, kill_at, [process])
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  code, err = finish(start(data_dir, tmp_path))
  assert code == 0, err
  assert_same_run(tmp_path, undisturbed)


@pytest.fixture(scope='module')
def undisturbed_pair(data_dir, tmp_path_factory):
  """One run from start to end in two processes."""
  workdir = tmp_path_factory.mktemp('pair')
  code, err = finish(*start_pair(data_dir, workdir))
  assert code == 0, err
  return workdir


def test_two_processes_killed_and_started_again_equal_uninterrupted(undisturbed_pair, data_dir, tmp_path):
  pair = start_pair(data_dir, tmp_path)
  wait_for_step(tmp_path, 6, pair)
  for process in pair:
    process.kill()
  for process in pair:
    process.communicate()
  code, err = finish(*start_pair(data_dir, tmp_path))
  assert code == 0, err
  assert_same_run(tmp_path, undisturbed_pair)


def test_two_processes_equal_one_with_two_devices(undisturbed_pair, data_dir, tmp_path):
  code, err = finish(start(data_dir, tmp_path, devices=2))
  assert code == 0, err
  for mine, theirs in zip(metrics(undisturbed_pair), metrics(tmp_path), strict=True):
    assert mine == pytest.approx(theirs, rel=1e-4)


def test_sigterm_saves_and_the_next_start_goes_on(undisturbed, data_dir, tmp_path):
  process = start(data_dir, tmp_path)
  wait_for_step(tmp_path, 5, [process])
  process.terminate()
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  if 'asked to stop' in out:  # otherwise it was done before the signal came
    saved = checkpoint.find(str(tmp_path))
    assert int(saved.name) >= 5 and f'step {saved.name} is saved' in out
  code, err = finish(start(data_dir, tmp_path))
  assert code == 0, err
  assert_same_run(tmp_path, undisturbed)


def test_a_finished_run_started_again_changes_nothing(undisturbed, data_dir):
  before = metrics(undisturbed)
  code, err = finish(start(data_dir, undisturbed))
  assert code == 0, err
  assert metrics(undisturbed) == before


def refused(*args, **popen):
  code, err = finish(start(*args, **popen))
  assert code == 2, err
  [message] = [line for line in err.splitlines() if line.startswith('error: ')]
  # tensorstore's threads print their own when a write fails, before or after; nothing else may
  assert err == message + '\n' or 'preexec_fn' in popen, err
  return message


def test_a_workdir_of_another_config_is_refused(undisturbed, data_dir):
  message = refused(data_dir, undisturbed, '--config.optimizer.lr=0.5')
  assert f'--workdir={undisturbed}: holds a run with config.optimizer.lr = 0.01, now 0.5' in message
  assert metrics(undisturbed)[-1]['step'] == STEPS


def test_a_checkpoint_of_another_shape_is_refused(undisturbed, data_dir, tmp_path):
  message = refused(data_dir, tmp_path, f'--config.train.init_from={undisturbed}', '--config.model.d_ff=48')
  assert 'checkpoints/12: holds float32[2, 64, 32] for params.layers.feed_forward.down_FD' in message
  assert 'but this config makes it float32[2, 48, 32]' in message


def test_init_from_nowhere_is_refused(data_dir, tmp_path):
  assert 'nowhere: no checkpoint there' in refused(data_dir, tmp_path, '--config.train.init_from=nowhere')


def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(data_dir, tmp_path):
  message = refused(data_dir, tmp_path, '--config.model.vocab_size=512')
  assert 'vocab_size' in message and '384' in message and '512' in message


def test_figures_that_are_no_numbers_stop_the_run_before_anything_is_saved(data_dir, tmp_path):
  message = refused(data_dir, tmp_path / 'bad', '--config.optimizer.lr=1e38', '--config.optimizer.weight_decay=0')
  assert 'error: step 2: loss is' in message and 'nan' in message and 'no checkpoint yet' in message
  assert not list((tmp_path / 'bad' / 'checkpoints').iterdir())


def test_init_from_takes_weights_only_or_all(undisturbed, data_dir, tmp_path):
  weights, everything = tmp_path / 'weights', tmp_path / 'all'
  code, err = finish(start(data_dir, weights, f'--config.train.init_from={undisturbed}'))
  assert code == 0, err
  first = metrics(weights)[0]
  assert first['step'] == 1 and first['train/ce_nats'] < metrics(undisturbed)[0]['train/ce_nats']
  assert checkpoint.read_meta(weights / 'checkpoints' / '12')['parent'].endswith('checkpoints/12')
  # All of step 8, then on to 12: the same end as the run it came from.
  at_8 = undisturbed / 'checkpoints' / '8'
  code, err = finish(start(data_dir, everything, f'--config.train.init_from={at_8}', '--config.train.init_what=all'))
  assert code == 0, err
  want, got = arrays(undisturbed, STEPS), arrays(everything, STEPS)
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_a_full_disk_while_saving_leaves_the_old_checkpoint_good(data_dir, tmp_path):
  """A limit on file size makes every large write fail as a full disk does."""
  long = '--config.train.tokens=200000'
  process = start(data_dir, tmp_path, long)
  while not (tmp_path / 'checkpoints' / '4').exists():
    assert process.poll() is None
    time.sleep(0.02)
  process.kill()
  process.communicate()
  good = checkpoint.find(str(tmp_path))
  before = arrays(tmp_path, good.name)
  limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
  message = refused(data_dir, tmp_path, long, preexec_fn=limit)
  assert 'could not be written' in message and f'the last good one is {good}' in message
  after = arrays(tmp_path, checkpoint.find(str(tmp_path)).name)
  for name in before:
    np.testing.assert_array_equal(after[name], before[name])
  code, err = finish(start(data_dir, tmp_path, f'--config.train.tokens={(int(good.name) + 4) * 256}'))
  assert code == 0, err
  assert checkpoint.find(str(tmp_path)).name == str(int(good.name) + 4)
