"""A job of one process: it hangs for ever on nothing, and what a disk refuses is one line."""

import subprocess
import sys

import pytest

from betarank.configs.errors import UserError
from betarank.runtime import job

HANGS = '''
import threading
from betarank.runtime import job
job.STALL_S = 0.5
with job._Alone() as watch:
  watch.note(7)
  threading.Event().wait()
'''


def test_one_that_gets_nowhere_ends_with_its_stacks_and_a_line():
  done = subprocess.run([sys.executable, '-c', HANGS], text=True, capture_output=True, timeout=120)
  assert done.returncode == 3 and done.stderr.splitlines()[-1].startswith('error: no step for ')
  assert 'since step 7' in done.stderr and 'line 7 in <module>' in done.stderr


def test_a_full_disk_is_one_line_that_names_the_workdir():
  message = r'--workdir=RUN: No space left on device \(while a log was written\); the same command goes on'
  with pytest.raises(UserError, match=message), job._in_one_line('RUN'), open('/dev/full', 'w') as file:
    file.write('x')


def test_errors_that_are_no_disk_s_stay_what_they_are():
  for error in (FileNotFoundError(2, 'no'), TimeoutError('late'), KeyError('x')):
    with pytest.raises(type(error)), job._in_one_line('RUN'):
      raise error


def test_a_collective_that_fails_is_not_taken_for_a_setting():
  """Whatever its class: the watch is given time to find out who is gone, and only then it is this process's own end."""
  watch, codes = object.__new__(job._Watch), []
  watch._deadline_s = watch._every_s = 0
  watch._end = lambda text, code, stacks: codes.append(code)
  for error in (ValueError('UNKNOWN: Gloo AllGather failed: Connection reset'), ValueError('config.x must be 1')):
    watch.failed(error)
  assert codes == [1, 2]
