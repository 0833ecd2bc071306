"""Tests RL as a job of two processes: what happens if one of them is killed or asked to stop."""

import pytest

from betarank.runtime import checkpoint
from tests import runs
from tests.runs import (
  assert_lost,
  assert_same_run,
  assert_stopped,
  finish,
  finish_well,
  metrics,
  wait_for_checkpoint,
  wait_for_step,
)

LONG = 1000  # steps; ended long before

pytestmark = pytest.mark.slow


def start(config, workdir, steps):
  return runs.start('rl', config, workdir, 2, f'--config.rl.steps={steps}')


def finish_like_undisturbed(config, workdir, step):
  """Resumes the run until `step`, and checks that it equals an undisturbed run to the last bit."""
  finish_well(start(config, workdir, step))
  undisturbed = workdir / 'undisturbed'
  finish_well(start(config, undisturbed, step))
  assert any(line.get('train/grad_norm') for line in metrics(undisturbed)), 'a run without signal tests nothing'
  assert_same_run(workdir, undisturbed, step)


@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_process_ends_the_other_which_names_it_and_a_restart_is_bit_equal(config, tmp_path, victim):
  running = start(config, tmp_path, LONG)
  wait_for_step(tmp_path, 3, running)
  wait_for_checkpoint(tmp_path, 2, running)
  running[victim].kill()
  assert_lost(finish(running), victim, 2, tmp_path)
  saved = int(checkpoint.find(str(tmp_path)).name)
  assert saved >= 2
  finish_like_undisturbed(config, tmp_path, saved + 2)


def test_sigterm_to_one_saves_once_for_both_and_a_restart_is_bit_equal(config, tmp_path):
  running = start(config, tmp_path, LONG)
  wait_for_step(tmp_path, 3, running)
  running[1].terminate()
  saved = assert_stopped(finish(running), tmp_path)
  assert saved >= 3
  finish_like_undisturbed(config, tmp_path, saved + 2)
