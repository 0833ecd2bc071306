"""Several real processes as one job: what becomes of it when one is killed, stopped, missing, or has come with
something else; and that their number changes nothing in the data.
"""

import json
import os
import signal
import socket
import subprocess
import threading
import time

import pytest

from betarank.runtime import checkpoint, job
from betarank.runtime.rendezvous import LOST, HostError, Place, rendezvous
from tests import runs
from tests.runs import (
  BETARANK,
  assert_lost,
  assert_no_secret,
  environment,
  finish,
  finish_well,
  free_port,
  last_error,
  metrics,
  wait_for_step,
)

STEPS = 12


def start(data_dir, workdir, processes, *extra, **how):
  """The tiny run as so many processes."""
  return runs.start('train', f'tests/tiny.py:dir={data_dir}', workdir, processes, *extra, '--config.log.samples=0',
                    '--config.model.layers=1', **how)


def assert_close_run(a, b):
  """Other shapes add up in another order; the same documents give the same figures but for that."""
  for mine, theirs in zip(metrics(a), metrics(b), strict=True):
    assert mine == pytest.approx(theirs, rel=1e-4), (mine, theirs)


LONG = '--config.train.tokens=2000000'  # it is killed long before


@pytest.mark.slow
@pytest.mark.parametrize('processes, victim', [(2, 1), (2, 0), (4, 2), (4, 0)])
def test_a_killed_process_ends_the_others_who_name_it_and_a_restart_resumes(data_dir, tmp_path, processes, victim):
  """The restart has half as many processes: their number is no part of a run."""
  began = time.monotonic()
  running = start(data_dir, tmp_path, processes, devices=4 // processes)
  wait_for_step(tmp_path, 5, running)
  startup, began = time.monotonic() - began, time.monotonic()
  running[victim].kill()
  results = finish(running)
  took = time.monotonic() - began
  saved = checkpoint.find(str(tmp_path))
  if any(code == 0 for code, _, _ in results):
    pytest.skip('it was through before the signal came')
  assert_lost(results, victim, processes, tmp_path)
  assert_no_secret(tmp_path)
  # The deadline and the way out of it; and what a machine takes longer for that took so long to start.
  assert took < runs.deadline_s(processes) + 20 + startup
  finish_well(start(data_dir, tmp_path, processes // 2, devices=8 // processes))
  assert int(saved.name) >= 4 and checkpoint.read_meta(checkpoint.find(str(tmp_path)))['cursor']['step'] == STEPS
  if (processes, victim) == (2, 1):
    return  # the quick case; the others are also compared with a run that nothing disturbed
  reference = tmp_path / 'reference'
  finish_well(start(data_dir, reference, 1, devices=4))
  assert_close_run(tmp_path, reference)


@pytest.mark.slow
@pytest.mark.parametrize('processes', [2, 4])
def test_sigterm_to_one_saves_once_for_all_and_the_restart_is_bit_equal(data_dir, tmp_path, processes):
  undisturbed, disturbed = tmp_path / 'undisturbed', tmp_path / 'disturbed'
  finish_well(start(data_dir, undisturbed, processes))
  running = start(data_dir, disturbed, processes)
  wait_for_step(disturbed, 3, running)
  running[-1].terminate()
  results = finish_well(running)
  if 'asked to stop' in results[0][1]:  # otherwise it was done before the signal came
    saved = checkpoint.find(str(disturbed))
    assert f'step {saved.name} is saved' in results[0][1] and 3 <= int(saved.name) < STEPS
  finish_well(start(data_dir, disturbed, processes))
  runs.assert_same_run(disturbed, undisturbed, STEPS)
  alone = tmp_path / 'alone'
  finish_well(start(data_dir, alone, 1, devices=processes))
  assert_close_run(undisturbed, alone)


@pytest.mark.slow
def test_a_run_goes_on_with_more_processes_and_with_fewer(data_dir, tmp_path):
  """One process, two, one: asked to stop on the way, all read what one undisturbed process reads."""
  steps = f'--config.train.tokens={60 * 8 * 32}'
  for processes, at in ((1, 5), (2, 20)):
    running = start(data_dir, tmp_path, processes, steps, devices=2 // processes)
    wait_for_step(tmp_path, at, running)
    running[0].terminate()
    assert 'asked to stop' in finish_well(running)[0][1]
    assert at <= int(checkpoint.find(str(tmp_path)).name) < 60
  finish_well(start(data_dir, tmp_path, 1, steps, devices=2))
  reference = tmp_path / 'reference'
  finish_well(start(data_dir, reference, 1, steps, devices=2))
  assert_close_run(tmp_path, reference)
  read = [[(line['step'], line['train/tokens']) for line in metrics(run) if 'train/tokens' in line]
          for run in (tmp_path, reference)]
  assert read[0] == read[1] and len(read[0]) == 60


@pytest.mark.slow
def test_a_process_that_hangs_is_as_good_as_dead(data_dir, tmp_path):
  """Nothing closes its connections: only the missing signs of life tell. The stacks of who waits are in the log."""
  running = start(data_dir, tmp_path, 2, LONG)
  wait_for_step(tmp_path, 3, running)
  running[1].send_signal(signal.SIGSTOP)
  [(code, _, err)] = finish(running[:1])
  running[1].kill()
  running[1].communicate()
  assert code == LOST and 'process 1 of 2 (' in last_error(err) and 'no sign of life for 1' in last_error(err)
  log = (tmp_path / 'hosts' / '0.log').read_text()
  assert 'train/loop.py' in log and 'Thread 0x' in log


@pytest.mark.slow
def test_an_error_in_one_process_is_the_reason_in_all(data_dir, tmp_path):
  """A full disk, say, that only process 0 sees: here a folder it can't write to."""
  (tmp_path / 'metrics.jsonl').mkdir()
  results = finish(start(data_dir, tmp_path, 2, LONG))
  assert results[0][0] != 0 and results[1][0] == LOST
  assert 'process 0 of 2 (' in last_error(results[1][2]) and 'metrics.jsonl' in last_error(results[1][2])


NEVER_STARTS = """
import time
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
def test_who_dies_or_hangs_while_jax_starts_is_named(data_dir, tmp_path, processes, victim, how):
  """After the roll call, before JAX's own: the others are waiting in jax.distributed.initialize, for five minutes."""
  running = start(data_dir, tmp_path, processes, replaced={victim: ('-c', NEVER_STARTS)})
  assert running[victim].stdout.readline() == 'has come\n'
  began = time.monotonic()
  running[victim].send_signal(how)
  results = finish([p for i, p in enumerate(running) if i != victim])
  assert time.monotonic() - began < 60  # at once if it died, 15 s if it hangs; the rest is this machine's being busy
  running[victim].kill()
  running[victim].communicate()
  how_it_is_said = 'died while JAX started' if how == signal.SIGKILL else 'gave no sign of life for 15 s while JAX'
  for code, _, err in results:
    assert code == LOST and len(err.splitlines()) == 1, err
    assert f'process {victim} of {processes} (' in err and how_it_is_said in err


def test_processes_that_differ_are_refused_with_the_difference(data_dir, tmp_path):
  port = free_port()
  command = [*BETARANK, 'train', f'--config=tests/tiny.py:dir={data_dir}', f'--workdir={tmp_path}',
             f'--coordinator=127.0.0.1:{port}', '--processes=2']
  running = [subprocess.Popen([*command, f'--process_id={i}', f'--config.optimizer.lr={0.01 * (1 + i)}'],
                              env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
             for i in range(2)]
  for code, _, err in finish(running):
    assert code == 2 and len(err.splitlines()) == 1, err
    assert 'process 1 of 2 (' in err and 'has config.optimizer.lr = 0.02, process 0 of 2 (' in err
  assert not (tmp_path / 'checkpoints').exists()


def roll_call(facts, processes=None, deadline_s=20.0, indices=None, refused=''):
  """What each of several threads, as processes, gets from the roll call."""
  port, results = free_port(), {}
  indices = range(len(facts)) if indices is None else indices

  def attend(slot, index):
    try:
      place = Place(f'127.0.0.1:{port}', processes or len(facts), index, None)
      results[slot], _ = rendezvous(place, facts[slot], deadline_s, refused if index == 0 else '')
    except HostError as error:
      results[slot] = str(error)

  threads = [threading.Thread(target=attend, args=pair) for pair in enumerate(indices)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  return [results[i] for i in range(len(facts))]


def test_the_roll_call_lets_those_start_who_are_alike():
  names = roll_call([{'code': 'abc'}] * 4)
  assert all(name == names[0] for name in names) and names[0][3].startswith('process 3 of 4 (')


@pytest.mark.parametrize(
  'arguments, message',
  [
    (dict(facts=[{'code': 'abc'}, {'code': 'abc'}, {'code': 'abd'}]), "has code = 'abd', process 0 of 3"),
    (dict(facts=[{'data manifest of main': 'a'}, {}]), "has data manifest of main = None, process 0 of 2"),
    (dict(facts=[{}, {}], processes=4, deadline_s=2.0), 'process 2, 3 of 4 did not come; there are 0 on '),
    (dict(facts=[{}, {}, {}], processes=3, indices=[0, 1, 1]), 'have the same --process_id'),
    (dict(facts=[{}, {}], refused='--workdir=x: is taken'), '--workdir=x: is taken'),
  ],
)
def test_the_roll_call_names_who_does_not_fit(arguments, message):
  for result in roll_call(**arguments)[:2]:
    assert isinstance(result, str) and message in result, result


def test_the_roll_call_without_process_0_says_so():
  with pytest.raises(HostError, match='process 0 of 2 could not be reached at 127.0.0.1'):
    rendezvous(Place(f'127.0.0.1:{free_port()}', 2, 1, None), {}, 1.0)


def test_the_roll_call_is_not_disturbed_by_strangers():
  port, results = free_port(), []
  place = lambda i: Place(f'127.0.0.1:{port}', 2, i, None)
  first = threading.Thread(target=lambda: results.append(rendezvous(place(0), {}, 30.0)[0]))
  first.start()
  for text in (b'GET / HTTP/1.1\r\n\r\n', b'{}\n', b'[]\n'):
    for _ in range(100):
      try:
        with socket.create_connection(('127.0.0.1', port), timeout=5) as stranger:
          stranger.sendall(text)
        break
      except ConnectionRefusedError:
        time.sleep(0.05)
  results.append(rendezvous(place(1), {}, 30.0)[0])
  first.join(30)
  assert results[0] == results[1] and f'pid {os.getpid()}' in json.dumps(results)


class Store:
  """JAX's key-value store, as far as the watch uses it."""

  def __init__(self):
    self.values = {}

  def key_value_dir_get(self, prefix):
    return [(key, json.dumps(value)) for key, value in self.values.items() if key.startswith(prefix)]

  def leave(self, index, **state):
    self.values[f'{job._BEAT}{index}'] = {'beat': 1, 'step': 0, 'ended': '', **state}


@pytest.fixture
def watch(monkeypatch):
  """Process 1 of 3, whose time is what the test says and whose end is an exception."""
  clock = [1000.0]
  monkeypatch.setattr(job.time, 'monotonic', lambda: clock[0])
  monkeypatch.setattr(job.faulthandler, 'dump_traceback_later', lambda *_, **__: None)
  watch = object.__new__(job._Watch)
  watch._client, watch._place, watch._deadline_s = Store(), Place('host:1', 3, 1, None), 60.0
  watch._names = [f'process {i} of 3 (host-{i}, pid {i})' for i in range(3)]
  watch._state, watch._seen = {'beat': 0, 'step': 0, 'ended': ''}, {0: ({}, 1000.0), 2: ({}, 1000.0)}
  watch._moved, watch._log, watch.clock = 1000.0, None, clock

  def end(text, code, stacks=True):
    raise HostError(f'{code}: {text}')

  watch._end = end
  return watch


def test_the_watch_names_who_is_silent_and_from_which_step(watch):
  for now in range(1000, 1060, 2):  # process 0 lives, process 2 leaves one sign
    watch.clock[0] = float(now)
    watch._client.leave(0, beat=now)
    if now == 1004:
      watch._client.leave(2, step=17)
    watch._look()
  watch.clock[0] = 1066.0
  watch._client.leave(0, beat=1)
  with pytest.raises(HostError, match=r'^3: process 2 of 3 .* has given no sign of life for 62 s, since step 17'):
    watch._look()


def test_the_watch_passes_on_why_another_process_ended_and_lets_those_go_who_ended_well(watch):
  watch._client.leave(0, ended='well')
  watch._client.leave(2)
  watch._look()
  watch.clock[0] = 1059.0
  watch._client.leave(2, beat=2)
  watch._look()
  watch.clock[0] = 1100.0  # process 0 is silent, and may be
  watch._look()
  watch._client.leave(2, ended='the disk is full')
  with pytest.raises(HostError, match=r'^3: process 2 of 3 \(host-2, pid 2\) ended: the disk is full$'):
    watch._look()


def test_the_watch_ends_a_job_that_lives_and_gets_nowhere(watch):
  watch.note(5)
  for now in range(1000, 1000 + int(job.STALL_S) + 1, 50):
    watch.clock[0] = float(now)
    watch._client.leave(0, beat=now, step=5)
    watch._client.leave(2, beat=now, step=4)
    watch._look()
  watch.clock[0] += 50
  watch._client.leave(0, step=5)
  watch._client.leave(2, step=4)
  with pytest.raises(HostError, match=r'process 2 of 3 \(host-2, pid 2\) is furthest behind, at step 4, this one at 5'):
    watch._look()


@pytest.mark.parametrize('flags', [('nonsense', 2, 0), ('host:1234', 2, 2), ('host:1234', 2, -1)])
def test_flags_that_name_no_place_are_refused(flags):
  with pytest.raises(HostError, match='--coordinator='):
    job.locate(*flags)


def test_slurm_is_asked_by_auto(monkeypatch):
  for name, value in dict(SLURM_JOB_ID='7', SLURM_STEP_NODELIST='node[1-2]', SLURM_NTASKS='2', SLURM_PROCID='1',
                          SLURM_LOCALID='0', SLURM_STEP_NUM_NODES='2').items():
    monkeypatch.setenv(name, value)
  place = job.locate('auto', 1, 0)
  assert place.coordinator.startswith('node1:') and place[1:] == (2, 1, [0])
