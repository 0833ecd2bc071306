"""Tests training as a job of several processes: what happens if one is killed, stopped, missing, or has other settings.

The number of processes doesn't change what a run reads.
"""

import json
import signal
import time

import pytest

from betarank.runtime import checkpoint
from betarank.runtime.rendezvous import EXIT_JOB_LOST
from tests import runs
from tests.runs import (
  assert_lost,
  assert_no_secret,
  assert_stopped,
  finish,
  finish_well,
  free_port,
  last_error,
  metrics,
  wait_for_checkpoint,
  wait_for_step,
)

STEPS = 12

pytestmark = pytest.mark.usefixtures('quick_commands')


def start(data_dir, workdir, processes, *extra, **how):
  """Starts the tiny run as a job of `processes` processes, and returns them."""
  return runs.start('train', f'tests/tiny.py:dir={data_dir}', workdir, processes, '--config.log.samples=0',
                    '--config.model.layers=1', *extra, **how)


def tokens(steps):
  """Returns the flag with which a run has `steps` steps."""
  return f'--config.train.tokens={steps * 8 * 32}'


LONG = tokens(8000)  # ended long before


def assert_close_run(a, b):
  """Checks that the metrics of two runs are equal, except for the order of sums, which depends on the number of
  devices.
  """
  for mine, theirs in zip(metrics(a), metrics(b), strict=True):
    assert mine == pytest.approx(theirs, rel=1e-4), (mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize('processes, victim', [(2, 1), (2, 0), (4, 2), (4, 0)])
def test_a_killed_process_ends_the_others_which_name_it_and_a_restart_resumes(data_dir, tmp_path, processes, victim):
  """The restarted job has half as many processes, because a run doesn't depend on their number."""
  running = start(data_dir, tmp_path, processes, LONG, devices=4 // processes)
  wait_for_step(tmp_path, 5, running)
  wait_for_checkpoint(tmp_path, 4, running)
  running[victim].kill()
  assert_lost(finish(running), victim, processes, tmp_path)
  assert_no_secret(tmp_path)
  saved = int(checkpoint.find(str(tmp_path)).name)
  assert saved >= 4
  end = tokens(saved + 4)
  finish_well(start(data_dir, tmp_path, processes // 2, end, devices=8 // processes))
  assert checkpoint.read_meta(checkpoint.find(str(tmp_path)))['cursor']['step'] == saved + 4
  finish_well(start(data_dir, tmp_path / 'reference', 1, end, devices=4))
  assert_close_run(tmp_path, tmp_path / 'reference')


@pytest.mark.slow
@pytest.mark.parametrize('processes, number, statuses', [
  (2, signal.SIGTERM, [143, 143]), (2, signal.SIGINT, [143, 130]), (4, signal.SIGTERM, [143] * 4)])
def test_a_signal_to_one_process_saves_once_for_all_and_the_restart_is_bit_equal(
    data_dir, tmp_path, processes, number, statuses):
  running = start(data_dir, tmp_path, processes, LONG)
  wait_for_step(tmp_path, 3, running)
  running[-1].send_signal(number)
  results = finish(running)
  saved = assert_stopped(results, tmp_path, statuses)
  assert saved >= 3
  end = tokens(saved + 4)
  finish_well(start(data_dir, tmp_path, processes, end))
  undisturbed = tmp_path / 'undisturbed'
  finish_well(start(data_dir, undisturbed, processes, end))
  runs.assert_same_run(tmp_path, undisturbed, saved + 4)


@pytest.mark.slow
def test_a_run_resumes_with_more_processes_and_with_fewer(data_dir, tmp_path):
  """A run has one process, then two, then one. It must read the same as an undisturbed run of one process."""
  saved = 0
  for processes in (1, 2):
    running = start(data_dir, tmp_path, processes, LONG, devices=2 // processes)
    wait_for_step(tmp_path, saved + 3, running)
    running[0].terminate()
    saved = assert_stopped(finish(running), tmp_path)
  end = tokens(saved + 4)
  finish_well(start(data_dir, tmp_path, 1, end, devices=2))
  reference = tmp_path / 'reference'
  finish_well(start(data_dir, reference, 1, end, devices=2))
  assert_close_run(tmp_path, reference)
  read = [[(line['step'], line['train/tokens']) for line in metrics(run) if 'train/tokens' in line]
          for run in (tmp_path, reference)]
  assert read[0] == read[1] and len(read[0]) == saved + 4


ASKED = """
from tests import tiny

def get_config(arg=None):
  c = tiny.get_config('dir={folder}/data')
  c.data.sources.asked = dict(uri='jsonl:{folder}/asked.jsonl#question+answer', weight=1.0, max_documents=0)
  return c
"""


@pytest.mark.slow
def test_answers_count_in_two_processes_as_in_one(tmp_path):
  """The data mixes instructions with plain text. All losses, and the number of tokens that count, must be equal."""
  rows = [{'question': f'what is {i}?', 'answer': 'just ' * (1 + i % 9) + str(i)} for i in range(300)]
  (tmp_path / 'asked.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  config = tmp_path / 'asked.py'
  config.write_text(ASKED.format(folder=tmp_path))
  runs.prepare(config)
  flags = ['--config.log.samples=0', '--config.model.layers=1']
  for processes in (1, 2):
    finish_well(runs.start('train', config, tmp_path / str(processes), processes, *flags, devices=2 // processes))
  assert_close_run(tmp_path / '2', tmp_path / '1')
  one, two = ([line['train/tokens'] for line in metrics(tmp_path / name) if 'train/tokens' in line] for name in '12')
  assert one == two and len(one) == STEPS and max(one) < 8 * 32
  assert any('asked' in key for line in metrics(tmp_path / '2') for key in line)


@pytest.mark.slow
def test_a_process_that_hangs_is_treated_as_dead(data_dir, tmp_path):
  """Its connections stay open, so only missing heartbeats show that it hangs. The other process writes its own stacks
  to its log.
  """
  running = start(data_dir, tmp_path, 2, LONG)
  wait_for_step(tmp_path, 3, running)
  running[1].send_signal(signal.SIGSTOP)
  [(code, _, err)] = finish(running[:1])
  running[1].kill()
  running[1].communicate()
  assert code == EXIT_JOB_LOST and 'process 1 of 2 (' in last_error(err) and 'no heartbeat for 1' in last_error(err)
  log = (tmp_path / 'hosts' / '0.log').read_text()
  assert 'train/loop.py' in log and 'Thread 0x' in log


@pytest.mark.slow
def test_an_error_in_one_process_is_the_reason_in_all(data_dir, tmp_path):
  """Only process 0 writes metrics.jsonl, so only this process fails, as with a full disk. A folder with that name
  causes the error.
  """
  (tmp_path / 'metrics.jsonl').mkdir()
  results = finish(start(data_dir, tmp_path, 2, LONG))
  assert results[0][0] != 0 and results[1][0] == EXIT_JOB_LOST
  assert 'process 0 of 2 (' in last_error(results[1][2]) and 'metrics.jsonl' in last_error(results[1][2])


NEVER_STARTS = """
import sys, time
from betarank.runtime import job
from betarank.train.command import main
job.initialize = lambda *_: (print('has come', flush=True), time.sleep(1000))
main(sys.argv[1:])
"""


@pytest.mark.parametrize('processes, victim, how', [
  (2, 1, signal.SIGKILL),
  pytest.param(3, 0, signal.SIGKILL, marks=pytest.mark.slow),
  pytest.param(3, 2, signal.SIGSTOP, marks=pytest.mark.slow),
])
def test_a_process_that_dies_or_hangs_while_jax_starts_is_named(data_dir, tmp_path, processes, victim, how):
  """This happens after the rendezvous, when the other processes are in jax.distributed.initialize.

  Without the startup watchdog, they would wait there for five minutes.
  """
  running = start(data_dir, tmp_path, processes, replaced={victim: ('-c', NEVER_STARTS)})
  assert running[victim].stdout.readline() == 'has come\n', running[victim].stderr.read()
  began = time.monotonic()
  running[victim].send_signal(how)
  results = finish([p for i, p in enumerate(running) if i != victim])
  assert time.monotonic() - began < 120  # at once if it died, 15 s if it hangs; the rest is for a busy machine
  running[victim].kill()
  running[victim].communicate()
  message = 'died while JAX started' if how == signal.SIGKILL else 'no heartbeat for 15 s (--host_deadline_s) while'
  for code, _, err in results:
    assert code == EXIT_JOB_LOST and len(err.splitlines()) == 1, err
    assert f'process {victim} of {processes} (' in err and message in err


def test_processes_that_differ_are_refused_with_the_difference(data_dir, tmp_path):
  job = [f'--config=tests/tiny.py:dir={data_dir}', f'--workdir={tmp_path}',
         f'--coordinator=127.0.0.1:{free_port()}', '--processes=2']
  running = [runs.betarank('train', *job, f'--process_id={i}', f'--config.optimizer.lr={0.01 * (1 + i)}')
             for i in range(2)]
  for process in running:
    err = runs.refused(process)
    assert 'process 1 of 2 (' in err and 'has config.optimizer.lr = 0.02, process 0 of 2 (' in err
  assert not (tmp_path / 'checkpoints').exists()
