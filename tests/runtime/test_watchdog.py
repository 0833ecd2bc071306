"""Tests that a process that dies, hangs or fails ends its whole job, with a reason. A healthy job continues."""

import dataclasses
import signal

import pytest

from betarank.runtime.rendezvous import EXIT_JOB_LOST
from betarank.runtime.watchdog import FINISHED, STALL_S, Heartbeat, Process, is_own_error, update, verdict
from tests.runs import finish, free_port, last_error, python

NAMES = [f'process {i} of 3 (host-{i}, pid {i})' for i in range(3)]
DEADLINE_S = 60.0


def process(index, changed_s, **heartbeat):
  return Process(NAMES[index], Heartbeat(**heartbeat), changed_s)


def judge(now_s, own, *peers):
  return verdict(now_s, own, peers, DEADLINE_S)


def test_a_silent_process_is_named_with_its_last_step():
  own, alive = process(1, 0.0), process(0, 60.0)
  assert judge(60.0, own, alive, process(2, 0.0, step=17)) is None  # the deadline itself is in time
  assert judge(62.0, own, alive, process(2, 0.0, step=17)) == (
    f'{NAMES[2]} sent no heartbeat for 62 s (--host_deadline_s=60), since step 17; the same command resumes from the '
    'last checkpoint')


def test_a_process_that_never_sent_a_heartbeat_is_named_too():
  peers = {2: process(2, 0.0)}
  assert NAMES[2] in judge(61.0, process(1, 0.0), *update(peers, {}, 61.0).values())


def test_only_a_changed_heartbeat_is_a_sign_that_a_process_runs():
  peers = {0: process(0, 0.0), 2: process(2, 0.0)}
  beat = Heartbeat(count=1, step=4)
  first = update(peers, {0: beat, 1: beat, 2: beat}, 10.0)  # 1 is this process
  assert first == {0: Process(NAMES[0], beat, 10.0), 2: Process(NAMES[2], beat, 10.0)}
  second = update(first, {0: beat, 2: dataclasses.replace(beat, count=2)}, 50.0)
  assert [second[i].changed_s for i in (0, 2)] == [10.0, 50.0]


def test_the_reason_of_a_failed_process_is_passed_on():
  failed = process(2, 10.0, ended='the disk is full')
  assert judge(10.0, process(1, 0.0), process(0, 10.0), failed) == f'{NAMES[2]} ended: the disk is full'


def test_a_reason_that_names_a_process_is_passed_on_as_it_is():
  lost = f'{NAMES[0]} sent no heartbeat for 61 s'
  for own in (1, 0):  # also by the process that it names, if that one runs again
    assert judge(10.0, process(own, 0.0), process(1 - own, 10.0), process(2, 10.0, ended=lost)) == lost


def test_a_finished_process_may_be_silent():
  assert judge(1000.0, process(1, 999.0, step=12), process(0, 0.0, ended=FINISHED), process(2, 999.0)) is None


def test_a_job_without_a_step_names_the_process_that_is_furthest_behind():
  own, now = process(1, 0.0, step=5), STALL_S + 1
  ahead, behind = process(0, now, step=5), process(2, now, step=4)
  assert judge(STALL_S, own, ahead, behind) is None
  assert judge(now, own, ahead, behind) == (
    f'no step for {now:.0f} s (at most 7200); {NAMES[2]} is furthest behind, at step 4, this one at 5')


def test_the_first_step_may_take_any_time():
  assert judge(10 * STALL_S, process(1, 0.0, step=0), process(0, 10 * STALL_S)) is None


def test_a_single_process_ends_if_it_makes_no_step():
  assert judge(STALL_S, process(0, 0.0, step=7)) is None
  assert judge(STALL_S + 1, process(0, 0.0, step=7)).startswith('no step for 7201 s (at most 7200), since step 7; the ')


@pytest.mark.parametrize('error, own', [
  (ValueError('config.x must be 1'), True),
  (ValueError('UNKNOWN: Gloo AllGather failed: Connection reset'), False),
  (RuntimeError('DEADLINE_EXCEEDED: Barrier timed out'), False),
  (OSError('no'), False),
])
def test_a_collective_that_fails_is_not_taken_for_a_wrong_setting(error, own):
  assert is_own_error(error) == own


HANGS = '''
import threading
from betarank.runtime import watchdog
watchdog.STALL_S = 0.5
with watchdog.Watchdog() as dog:
  dog.note_step(7)
  threading.Event().wait()
'''


def test_a_process_that_hangs_ends_with_its_stacks_and_one_line():
  [(code, _, err)] = finish([python('-c', HANGS)], timeout=120)
  assert code == EXIT_JOB_LOST and err.splitlines()[-1].startswith('error: no step for ')
  assert 'since step 7' in err and 'line 7 in <module>' in err


def test_a_process_that_hangs_ends_though_standard_error_is_full():
  with open('/dev/full', 'w') as full:
    [(code, _, _)] = finish([python('-c', HANGS, stderr=full)], timeout=120)
  assert code == EXIT_JOB_LOST


ENDS = '''
import json, sys, threading, time
from jax._src import distributed
from betarank.runtime.rendezvous import ProcessInfo
from betarank.runtime.watchdog import JobWatchdog

class Store:
  def key_value_set(self, key, value, allow_overwrite):
    if threading.current_thread().name == 'watchdog':
      sending.set()
      time.sleep(1)  # a slow network
    sent.append(json.loads(value))

  def key_value_dir_get(self, key):
    return []

sending, sent = threading.Event(), []
distributed.global_state.client = Store()
with JobWatchdog(ProcessInfo('host:1', 1, 0, None), ['process 0 of 1 (here)'], 0.5, sys.stderr):
  sending.wait()
assert 'watchdog' not in [thread.name for thread in threading.enumerate()]
assert [beat['ended'] for beat in sent] == ['', 'finished'], sent
'''


def test_at_the_end_the_last_heartbeat_is_waited_for():
  """Python's end would end a thread in JAX's code with a crash. An earlier heartbeat must not overwrite the last."""
  [(code, _, err)] = finish([python('-c', ENDS)], timeout=120)
  assert code == 0, err


FULL = '''
import json, sys, time
from jax._src import distributed
from betarank.runtime.rendezvous import ProcessInfo
from betarank.runtime.watchdog import JobWatchdog

class Store:
  def key_value_set(self, key, value, allow_overwrite):
    print(json.loads(value)['ended'], flush=True)

  def key_value_dir_get(self, key):
    if not asked:
      asked.append(key)
      raise RuntimeError()  # which is logged
    return [('x/1', json.dumps({'count': time.monotonic_ns(), 'ended': 'a reason' if sys.argv[1] == 'wait' else ''}))]

asked = []
distributed.global_state.client = Store()
names = [f'process {i} of 2 (here)' for i in range(2)]
with JobWatchdog(ProcessInfo('host:1', 2, 0, None), names, 0.5, open('/dev/full', 'w', buffering=1)):
  if sys.argv[1] == 'wait':
    time.sleep(60)
  if sys.argv[1] != 'end':
    raise {'value': ValueError, 'file': FileNotFoundError}[sys.argv[1]]('why')
'''


@pytest.mark.parametrize('what, status, published', [
  ('end', 0, FINISHED), ('value', 2, 'why'), ('file', 1, 'why'),
  ('wait', EXIT_JOB_LOST, 'process 1 of 2 (here) ended: a reason')])
def test_the_reason_is_published_though_neither_the_log_nor_standard_error_can_be_written(what, status, published):
  with open('/dev/full', 'w') as full:
    [(code, out, _)] = finish([python('-c', FULL, what, stderr=full)], timeout=120)
  assert (code, out.splitlines()[-1]) == (status, published)


GONE = '''
import os, sys, threading
from jax._src import distributed
from betarank.runtime import watchdog
from betarank.runtime.rendezvous import ProcessInfo
watchdog.WRITE_S = 1.0

class Store:  # of a process 0 that hangs
  def key_value_set(self, key, value, allow_overwrite):
    threading.Event().wait()

class JobWatchdog(watchdog.JobWatchdog):
  def _write_error(self, reason, stacks):
    super()._write_error(reason, stacks)
    lines.append(reason)
    if threading.current_thread().name == 'store watchdog':
      threading.Thread(target=os.abort).start()  # as JAX does if process 0 dies
    if len(lines) == 1:
      threading.Event().wait()  # the thread that writes is slow

lines = []
distributed.global_state.client = Store()
names = [f'process {i} of 2 (here)' for i in range(2)]
with JobWatchdog(ProcessInfo(sys.argv[1], 2, 1, None), names, 0.5, sys.stderr):
  if sys.argv[2:] == ['abort']:
    os.abort()
  threading.Event().wait()
'''


@pytest.mark.parametrize('first', ['hang', 'abort'])
def test_if_process_0_hangs_and_dies_at_once_there_is_one_line(first):
  """Two threads notice it. Whichever is first, the other one neither writes nor cuts off what the first one writes."""
  [(code, _, err)] = finish([python('-c', GONE, f'127.0.0.1:{free_port()}', first)], timeout=120)
  lines = [line for line in err.splitlines() if line.startswith('error: ')]
  assert code == EXIT_JOB_LOST and len(lines) == 1 and 'process 0 of 2 (here), which' in lines[0], err


JOB = '''
import sys, time
from betarank.runtime import job
from betarank.runtime.watchdog import JobWatchdog
info = job.locate(sys.argv[1], 2, int(sys.argv[2]))
job.initialize(info, 60)
names = [f'process {i} of 2 (here)' for i in range(2)]
with JobWatchdog(info, names, 8.0, open(sys.argv[3], 'w')) as dog:
  dog.note_step(3)
  print('step 3', flush=True)
  if sys.argv[4:] == ['fail']:
    raise ValueError('config.x must be 1')
  time.sleep(1000)
'''


def start_job(folder, last):
  """Starts two processes of a job, which report step 3 and then wait. Returns the processes.

  last: further arguments of process 1. With ['fail'], it raises an error after step 3.
  """
  address = f'127.0.0.1:{free_port()}'
  return [python('-c', JOB, address, i, folder / str(i), *(last if i else [])) for i in range(2)]


@pytest.mark.parametrize('victim, message', [
  pytest.param(1, 'error: process 1 of 2 (here) sent no heartbeat for ', marks=pytest.mark.slow),
  (0, 'error: process 0 of 2 (here), which coordinates the job, has not answered for ')])
def test_a_stopped_process_ends_the_other_one_which_names_it_and_the_deadline(tmp_path, victim, message):
  pair, other = start_job(tmp_path, []), 1 - victim
  for running in pair:
    assert running.stdout.readline() == 'step 3\n'
  pair[victim].send_signal(signal.SIGSTOP)
  [(code, _, err)] = finish([pair[other]], timeout=300)
  pair[victim].kill()
  pair[victim].communicate()
  assert code == EXIT_JOB_LOST and message in last_error(err) and '(--host_deadline_s=8)' in last_error(err), err
  log = (tmp_path / str(other)).read_text()
  assert last_error(err) in log and 'Thread 0x' in log


def test_an_error_in_one_process_is_the_reason_in_the_other(tmp_path):
  results = finish(start_job(tmp_path, ['fail']), timeout=120)
  assert [code for code, _, _ in results] == [EXIT_JOB_LOST, 2]
  assert last_error(results[0][2]) == 'error: process 1 of 2 (here) ended: config.x must be 1'
  assert last_error(results[1][2]) == 'error: config.x must be 1'
