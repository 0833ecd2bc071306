"""RL as a job of two processes: what becomes of it when one is killed or asked to stop."""

import pytest

from betarank.runtime import checkpoint
from tests import runs
from tests.runs import assert_lost, assert_same_run, finish, finish_well, metrics, wait_for_step

STEPS = 10

pytestmark = pytest.mark.slow


def start(config, workdir):
  return runs.start('rl', config, workdir, 2, f'--config.rl.steps={STEPS}')


@pytest.fixture(scope='module')
def undisturbed(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('undisturbed')
  finish_well(start(config, workdir))
  assert any(line.get('train/grad_norm') for line in metrics(workdir)), 'a run without signal tests nothing'
  return workdir


@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_process_ends_the_other_which_names_it_and_a_restart_is_bit_equal(
    undisturbed, config, tmp_path, victim):
  running = start(config, tmp_path)
  wait_for_step(tmp_path, 3, running)
  running[victim].kill()
  results = finish(running)
  if any(code == 0 for code, _, _ in results):
    pytest.skip('it was through before the signal came')
  assert_lost(results, victim, 2, tmp_path)
  assert 2 <= int(checkpoint.find(str(tmp_path)).name) < STEPS
  finish_well(start(config, tmp_path))
  assert_same_run(tmp_path, undisturbed, STEPS)


def test_sigterm_to_one_saves_once_for_both_and_a_restart_is_bit_equal(undisturbed, config, tmp_path):
  running = start(config, tmp_path)
  wait_for_step(tmp_path, 3, running)
  running[1].terminate()
  results = finish_well(running)
  if 'asked to stop' not in results[0][1]:
    pytest.skip('it was through before the signal came')
  saved = int(checkpoint.find(str(tmp_path)).name)
  assert f'step {saved} is saved' in results[0][1] and 3 <= saved < STEPS
  finish_well(start(config, tmp_path))
  assert_same_run(tmp_path, undisturbed, STEPS)
