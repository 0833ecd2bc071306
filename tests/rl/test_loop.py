"""Whole RL runs as processes: a killed one goes on to the last bit, and what it writes is what happened."""

import json
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

from tests.runs import BETARANK, arrays, assert_no_secret, environment, metrics

STEPS = 6


def start(module, config, workdir, *extra, devices=1):
  return subprocess.Popen([*BETARANK, module, f'--config={config}', f'--workdir={workdir}', *extra],
                          env=environment(devices), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  return out


@pytest.fixture(scope='module')
def undisturbed(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('undisturbed')
  finish(start('rl', config, workdir))
  return workdir


def test_an_undisturbed_run_says_what_happened(undisturbed):
  lines = metrics(undisturbed)
  steps = [line for line in lines if 'train/pass_rate' in line]
  assert [line['step'] for line in steps] == list(range(1, STEPS + 1))
  assert [line['step'] for line in lines if 'eval/held_out/avg_at_4' in line] == [0, 3, 6]
  assert any(line['train/groups_learned_from'] for line in steps), 'a run without signal tests nothing'
  for line in steps:
    assert 0 <= line['train/truncated_share'] <= 1 and line['train/undecided'] == 0
    assert line['train/entropy_drawn_nats'] > 0
    if not line['train/groups_learned_from']:
      assert not line.keys() & {'train/grad_norm', 'train/entropy_nats', 'train/ratio_mean'}, 'nothing was measured'
      continue
    assert line['train/clip_fraction'] == 0  # on-policy: nothing to clip,
    assert line['train/ratio_mean'] == pytest.approx(1, abs=1e-6)
    assert line['train/sampler_gap_max'] < 1e-4  # and the sampler is the trainer
  sample = json.loads((undisturbed / 'samples.jsonl').read_text().splitlines()[0])
  assert sample['prompt'].startswith('Question: ')
  assert_no_secret(undisturbed)


def wait_for(workdir, step, process):
  """Returns once the run has written this step, or has ended."""
  path = workdir / 'metrics.jsonl'
  while process.poll() is None and not (path.exists() and f'"step": {step}, "train' in path.read_text()):
    time.sleep(0.02)


@pytest.mark.parametrize('kill_at', [pytest.param(1, marks=pytest.mark.slow), 4])
def test_killed_and_started_again_equals_uninterrupted(undisturbed, config, tmp_path, kill_at):
  process = start('rl', config, tmp_path)
  wait_for(tmp_path, kill_at, process)
  process.kill()
  process.communicate()
  assert process.returncode in (-signal.SIGKILL, 0)
  finish(start('rl', config, tmp_path))
  assert metrics(tmp_path) == metrics(undisturbed)
  want, got = arrays(undisturbed, STEPS), arrays(tmp_path, STEPS)
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


# A reference, covariance terms and two updates a step, on two devices; samples enough for some to be right each step.
EVERYTHING = ('--config.rl.steps=4', '--config.rl.loss.kl_weight=0.1', '--config.rl.loss.cov=kl_cov',
              '--config.rl.minibatches=2', '--config.rl.group_size=16')


@pytest.fixture(scope='module')
def two_devices(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('two_devices')
  finish(start('rl', config, workdir, *EVERYTHING, devices=2))
  return workdir


@pytest.mark.slow
def test_two_processes_equal_one_with_two_devices(two_devices, config, tmp_path):
  """They draw the same samples, judge half of them each, and learn the same."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  pair = [start('rl', config, tmp_path, *EVERYTHING, f'--coordinator=127.0.0.1:{port}', '--processes=2',
                f'--process_id={i}') for i in range(2)]
  for process in pair:
    finish(process)
  for mine, theirs in zip(metrics(tmp_path), metrics(two_devices), strict=True):
    assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_the_kl_is_to_the_start(two_devices):
  steps = [line for line in metrics(two_devices) if 'train/kl_k2_nats' in line]
  assert len(steps) == 4 and any(line['train/cov_token_share'] > 0 for line in steps)
  distances = [line['train/kl_k2_nats'] for line in steps]
  assert distances[0] < 1e-2 < max(distances[1:]) and min(distances) >= 0  # the reference stays where it was


@pytest.mark.slow
def test_a_reference_survives_a_kill(two_devices, config, tmp_path):
  process = start('rl', config, tmp_path, *EVERYTHING, devices=2)
  wait_for(tmp_path, 3, process)
  process.kill()
  process.communicate()
  finish(start('rl', config, tmp_path, *EVERYTHING, devices=2))
  assert metrics(tmp_path) == metrics(two_devices)
  want, got = arrays(two_devices, 4), arrays(tmp_path, 4)
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.mark.parametrize(
  'override, message',
  [
    ('--config.rl.group_size=1', 'config.rl.group_size must be >= 2'),
    ('--config.rl.task.uri=reasonin:x', 'config.rl.task.uri must be'),
    ('--config.rl.loss.eps_low=2', 'config.rl.loss.eps_low must be in [0, 1]'),
    ('--config.rl.minibatches=3', 'config.rl.minibatches must divide prompts_per_step = 4'),
    ('--config.rl.loss.cov=kl_cov', "config.rl.minibatches must be > 1 with loss.cov = 'kl_cov'"),
    ('--config.train.init_from=nowhere', 'nowhere: no checkpoint there'),
    ('--config.model.rope_base=1e6', 'config.model.rope_base must be 10000.0'),
    ('--config.rl.max_prompt_tokens=5', 'more than config.rl.max_prompt_tokens = 5'),
  ],
)
def test_what_cannot_be_ends_in_one_line(config, tmp_path, override, message):
  process = start('rl', config, tmp_path, override)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 2 and len(err.splitlines()) == 1, err
  assert message in err
