"""A command asked to stop finishes its step and saves, and its exit status says so. A second Ctrl-C is final."""

import signal

import pytest

from betarank.runtime.stop import StopSignal
from tests.runs import finish, free_port, python

STEPS = '''
import sys, time
from betarank.runtime.stop import Stopped, StopSignal
with StopSignal() as stop:
  for step in range(1000):
    print('step', step, flush=True)
    time.sleep(0.05)
    if stop(step):
      print('saved', step)
      raise Stopped(stop.exit_status)
'''
# Nothing interrupts this hash: the main thread is in C code for years, as it is for minutes in a compilation.
BUSY = '''
import hashlib
from betarank.runtime.stop import StopSignal
with StopSignal(before_exit=lambda: print('children are ended', flush=True)):
  print('step 0', flush=True)
  hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)
'''
JOB = '''
import sys, time
import jax
from betarank.runtime import job
from betarank.runtime.stop import Stopped, StopSignal
job.initialize(job.locate(sys.argv[1], 2, int(sys.argv[2])), 60)
with StopSignal(jax.process_count()) as stop:
  for step in range(10_000):
    print('step', step, flush=True)
    time.sleep(0.05)
    if stop(step):
      print('saved', step, flush=True)
      raise Stopped(stop.exit_status)
'''


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_ends_after_the_step_and_the_save(number, status):
  process = python('-c', STEPS)
  first = process.stdout.readline()
  process.send_signal(number)
  [(code, out, err)] = finish([process], timeout=60)
  lines = [first.strip(), *out.splitlines()]
  assert code == status and lines[-1] == lines[-2].replace('step', 'saved') and 'Traceback' not in err
  assert ('Ctrl-C again ends at once' in err) == (number == signal.SIGINT)


def test_a_second_sigterm_changes_nothing():
  process = python('-c', STEPS)
  process.stdout.readline()
  for _ in range(3):
    process.terminate()
  [(code, out, _)] = finish([process], timeout=60)
  assert code == 143 and 'saved' in out


def test_the_second_ctrl_c_ends_at_once_even_in_c_code():
  process = python('-c', BUSY)
  process.stdout.readline()
  process.send_signal(signal.SIGINT)
  assert 'Ctrl-C again ends at once' in process.stderr.readline()
  process.send_signal(signal.SIGINT)
  [(code, out, _)] = finish([process], timeout=60)
  assert code == 130 and out == 'children are ended\n'


def test_signals_act_as_before_after_the_block():
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  with StopSignal() as stop:
    assert not stop(0)
    signal.raise_signal(signal.SIGTERM)
    assert stop(0) and stop(1) and stop.exit_status == 143
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
  assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize('number, statuses', [(signal.SIGTERM, [143, 143]), (signal.SIGINT, [143, 130])])
def test_a_signal_to_one_process_stops_all_at_the_same_step(number, statuses):
  address = f'127.0.0.1:{free_port()}'
  pair = [python('-c', JOB, address, i) for i in range(2)]
  for process in pair:
    assert process.stdout.readline() == 'step 0\n'
  pair[1].send_signal(number)
  results = finish(pair, timeout=120)
  assert [code for code, _, _ in results] == statuses, results
  saved = [out.splitlines()[-1] for _, out, _ in results]
  assert saved[0] == saved[1] and saved[0].startswith('saved ')
