"""Runs `betarank ARGS` with a fault: python -m tests.faults.child ARGS

The environment variable FAULT describes the fault as JSON:

    {"at": "betarank.rl.loop:graded_groups", "call": 3, "do": "kill", "after_s": 0.02}
        SIGKILL 0.02 s after the third call begins, or at the end of the call if that comes first
    {"at": "betarank.data.prepared:Documents.request", "call": 9, "do": "hang", "stall_s": 5}
        the ninth call never returns, and the watchdog allows 5 s without a step
    {"jumps": [[2.5, -3600]]}
        after 2.5 s, the wall clock is an hour slow; more jumps may follow
"""

import functools
import importlib
import json
import os
import runpy
import signal
import threading
import time


def disturb(at, call, do, after_s=0.0, stall_s=None):
  """Changes the function `at` so that its call number `call`, from 1, kills the process or never returns."""
  module, _, path = at.partition(':')
  owner = importlib.import_module(module)
  *parents, name = path.split('.')
  for parent in parents:
    owner = getattr(owner, parent)
  function, calls = getattr(owner, name), 0
  kill = lambda: os.kill(os.getpid(), signal.SIGKILL)

  @functools.wraps(function)
  def wrapped(*args, **kwargs):
    nonlocal calls
    calls += 1
    if calls != call:
      return function(*args, **kwargs)
    if do == 'hang':
      threading.Event().wait()
    timer = threading.Timer(after_s, kill)
    timer.daemon = True
    timer.start()
    try:
      return function(*args, **kwargs)
    finally:
      kill()

  setattr(owner, name, wrapped)
  if stall_s:
    importlib.import_module('betarank.runtime.watchdog').STALL_S = stall_s


def jump(jumps):
  """Shifts time.time and time.time_ns. jumps: [(seconds after the start, shift from then on in seconds), ...]."""
  start, real, real_ns = time.monotonic(), time.time, time.time_ns
  off = lambda: next((by for at, by in reversed(jumps) if time.monotonic() - start >= at), 0)
  time.time = lambda: real() + off()
  time.time_ns = lambda: real_ns() + int(off() * 1e9)


def main():
  fault = json.loads(os.environ['FAULT'])
  if 'jumps' in fault:
    jump(fault['jumps'])
  else:
    disturb(**fault)
  runpy.run_module('betarank', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main()
