"""Tests that processes with equal settings start together. Otherwise all end with one line that names the difference.
"""

import json
import os
import signal
import socket
import subprocess
import threading
import time

import pytest

from betarank.runtime.rendezvous import EXIT_JOB_LOST, JobError, ProcessInfo, rendezvous
from tests.runs import finish, free_port, python


def meet(fingerprints, processes=None, deadline_s=20.0, indices=None, refused=''):
  """Returns what the rendezvous returns to each of several threads, which act as processes."""
  port, results = free_port(), {}
  indices = range(len(fingerprints)) if indices is None else indices

  def attend(slot, index):
    try:
      info = ProcessInfo(f'127.0.0.1:{port}', processes or len(fingerprints), index, None)
      results[slot], _ = rendezvous(info, fingerprints[slot], deadline_s, refused if index == 0 else '')
    except JobError as error:
      results[slot] = str(error)

  threads = [threading.Thread(target=attend, args=pair) for pair in enumerate(indices)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  return [results[i] for i in range(len(fingerprints))]


def test_processes_that_are_alike_learn_each_others_names():
  names = meet([{'code': 'abc'}] * 4)
  assert all(name == names[0] for name in names) and names[0][3].startswith('process 3 of 4 (')


@pytest.mark.parametrize(
  'arguments, message',
  [
    (dict(fingerprints=[{'code': 'abc'}, {'code': 'abc'}, {'code': 'abd'}]), "has code = 'abd', process 0 of 3"),
    (dict(fingerprints=[{'data manifest of main': 'a'}, {}]), "has data manifest of main = None, process 0 of 2"),
    (dict(fingerprints=[{}, {}], processes=4, deadline_s=2.0), 'process 2, 3 of 4 did not come within 2 s; there '),
    (dict(fingerprints=[{}, {}, {}], processes=3, indices=[0, 1, 1]), 'have the same --process_id'),
    (dict(fingerprints=[{}, {}], refused='--workdir=x: is taken'), '--workdir=x: is taken'),
  ],
)
def test_all_get_the_same_error_which_names_the_process(arguments, message):
  for result in meet(**arguments):
    assert isinstance(result, str) and message in result, result


def test_without_process_0_the_others_say_so():
  with pytest.raises(JobError, match=r'process 0 of 2 could not be reached at 127\.0\.0\.1:\d+ within 1 s'):
    rendezvous(ProcessInfo(f'127.0.0.1:{free_port()}', 2, 1, None), {}, 1.0)


def test_a_process_that_died_and_was_started_again_takes_its_place():
  port, results = free_port(), []
  info = lambda i: ProcessInfo(f'127.0.0.1:{port}', 3, i, None)
  attend = lambda i: results.append(rendezvous(info(i), {}, 30.0)[0])
  threads = [threading.Thread(target=attend, args=[i]) for i in range(3)]
  threads[0].start()
  dies = '''
import os, sys, threading, time
from betarank.runtime import rendezvous
threading.Timer(1.0, os._exit, [0]).start()
rendezvous.rendezvous(rendezvous.ProcessInfo(sys.argv[1], 3, 1, None), {}, 30.0)
'''
  finish([python('-c', dies, f'127.0.0.1:{port}')], timeout=60)
  for thread in threads[1:]:
    thread.start()
  for thread in threads:
    thread.join(60)
  assert len(results) == 3 and f'process 1 of 3 ({socket.gethostname()}, pid {os.getpid()})' in results[0]


STARTS = '''
import sys, time
from betarank.runtime.rendezvous import ProcessInfo, StartupWatchdog, rendezvous
address, index, what = sys.argv[1:]
info = ProcessInfo(address, 3, int(index), None)
names, connections = rendezvous(info, {}, 30.0)
with StartupWatchdog(info, names, connections, 3.0):
  print('starts', flush=True)
  if what == 'fail':
    sys.stdin.readline()
    raise ValueError('no device')
  time.sleep(60 if what == 'wait' else 0)
'''


def start_three(*whats, **popen):
  """Starts three processes, which act as the arguments say while JAX would start. Returns them once they have met."""
  address = f'127.0.0.1:{free_port()}'
  found = [python('-c', STARTS, address, i, what, **popen) for i, what in enumerate(whats)]
  for process in found:
    assert process.stdout.readline() == 'starts\n'
  return found


@pytest.mark.parametrize('number, message', [
  (signal.SIGKILL, ') died while JAX started; start all again'),
  (signal.SIGSTOP, ') sent no heartbeat for 3 s (--host_deadline_s) while JAX started; start all again')])
def test_if_a_process_dies_or_hangs_while_jax_starts_all_end_with_a_line_that_names_it(number, message):
  processes = start_three('wait', 'wait', 'wait')
  processes[2].send_signal(number)
  results = finish(processes[:2], timeout=60)
  processes[2].kill()
  processes[2].communicate()
  for code, _, err in results:
    assert code == EXIT_JOB_LOST and err.startswith('error: process 2 of 3 (') and err.endswith(f'{message}\n'), err


def test_an_error_while_jax_starts_is_the_reason_in_the_others():
  processes = start_three('wait', 'wait', 'fail', stdin=subprocess.PIPE)
  results = finish(processes[::-1], timeout=60)  # it fails once standard input is closed
  assert [code for code, _, _ in results] == [1, EXIT_JOB_LOST, EXIT_JOB_LOST]
  for _, _, err in results[1:]:
    assert err.startswith('error: process 2 of 3 (') and 'ended while JAX started: no device; start all again' in err


def test_once_jax_has_started_no_process_waits_for_the_others():
  assert [code for code, _, _ in finish(start_three('', '', ''), timeout=60)] == 3 * [0]


def test_a_process_ends_while_jax_starts_though_standard_error_is_full():
  with open('/dev/full', 'w') as full:
    processes = start_three('wait', 'wait', 'wait', stderr=full)
  processes[2].kill()
  assert [code for code, _, _ in finish(processes, timeout=60)] == [EXIT_JOB_LOST, EXIT_JOB_LOST, -signal.SIGKILL]


def test_other_programs_that_connect_have_no_effect():
  port, results = free_port(), []
  info = lambda i: ProcessInfo(f'127.0.0.1:{port}', 2, i, None)
  first = threading.Thread(target=lambda: results.append(rendezvous(info(0), {}, 30.0)[0]))
  first.start()
  for text in (b'GET / HTTP/1.1\r\n\r\n', b'{}\n', b'[]\n'):
    for _ in range(100):
      try:
        with socket.create_connection(('127.0.0.1', port), timeout=5) as stranger:
          stranger.sendall(text)
        break
      except ConnectionRefusedError:
        time.sleep(0.05)
  results.append(rendezvous(info(1), {}, 30.0)[0])
  first.join(30)
  assert results[0] == results[1] and f'pid {os.getpid()}' in json.dumps(results)
