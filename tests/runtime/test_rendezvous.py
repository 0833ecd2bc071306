"""Tests that processes with equal settings start together. Otherwise all end with one line that names the difference.
"""

import json
import os
import socket
import threading
import time

import pytest

from betarank.runtime.rendezvous import JobError, ProcessInfo, rendezvous
from tests.runs import free_port


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
