"""Runs light processes in the place of a job's hosts. If one of them fails, the others are killed, and the error names
it and the last line of its standard error.
"""

import contextlib
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import IO, Any

from betarank.runtime.rendezvous import EXIT_JOB_LOST

EXITS = 0, EXIT_JOB_LOST  # of a command that ends as it should


class HostFailed(SystemExit):
  """A process failed. If nothing catches the error, this program ends with status 1 and the error's line."""


def run(commands: dict[int, Sequence[object]], timeout_s: float = 600.0, **popen) -> dict[int, str]:
  """Runs commands, and returns what each of them printed, by index.

  Each must print a line when it is ready, and then wait for a line. When all are ready, all get this line. The first
  line isn't returned.

  Raises:
    HostFailed: a command ended with a status that isn't in EXITS, or before it was ready, or not within timeout_s.
  """
  with contextlib.ExitStack() as stack:
    errors = {i: stack.enter_context(tempfile.TemporaryFile()) for i in commands}
    processes = {}
    for i, command in commands.items():  # without buffers, so that nothing is left to write to a process that has ended
      processes[i] = stack.enter_context(subprocess.Popen(
        list(map(str, command)), bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors[i], **popen))
      stack.callback(processes[i].kill)  # nothing happens if it has ended
    for i, process in processes.items():
      if not process.stdout.readline():
        raise _failed(i, process.wait(), errors[i])
    for process in processes.values():
      with contextlib.suppress(BrokenPipeError):  # it has failed, which is seen below
        process.stdin.write(b'\n')
    until = time.monotonic() + timeout_s
    while None in (status := {i: process.poll() for i, process in processes.items()}).values():
      _check(status, errors, EXITS)
      if time.monotonic() > until:
        raise HostFailed(f'after {timeout_s:.0f} s, {sum(s is None for s in status.values())} processes still run')
      time.sleep(0.05)
    _check(status, errors, EXITS)
    return {i: process.stdout.read().decode() for i, process in processes.items()}


class Forks:
  """Forks of this process, for a `with` statement. At its end they are killed if they still run."""

  def __init__(self, count: int, body: Callable[[int, connection.Connection], None]):
    """Starts the forks. Each calls body(index, pipe). The other end of the pipe is that of `tell` and `hear`."""
    fork = multiprocessing.get_context('fork')
    with contextlib.ExitStack() as stack:
      self._errors = {i: stack.enter_context(tempfile.TemporaryFile()) for i in range(count)}
      self._files = stack.pop_all()
    self._pipes, theirs = zip(*(fork.Pipe() for _ in range(count)))
    self._processes = [fork.Process(target=_call, args=(body, i, theirs[i], self._errors[i])) for i in range(count)]
    for process in self._processes:
      process.start()

  def tell(self, value: object = None) -> None:
    """Sends a value to every fork."""
    for pipe in self._pipes:
      pipe.send(value)

  def hear(self) -> list[Any]:
    """Waits for a value from every fork, and returns them by index. Raises HostFailed if a fork ends without it."""
    heard: dict[int, Any] = {}
    while True:
      status = self._status()  # before the pipes are read, so that what a fork sent last counts
      heard |= {i: pipe.recv() for i, pipe in enumerate(self._pipes) if i not in heard and pipe.poll()}
      _check({i: s for i, s in status.items() if i not in heard}, self._errors, exits=())
      _check(status, self._errors, exits=(0,))
      if len(heard) == len(self._pipes):
        return [heard[i] for i in status]
      connection.wait([*(pipe for i, pipe in enumerate(self._pipes) if i not in heard), *self._running(status)])

  def join(self) -> None:
    """Waits until all forks have ended. Raises HostFailed if one of them fails."""
    while running := self._running(status := self._status()):
      _check(status, self._errors, exits=(0,))
      connection.wait(running)
    _check(status, self._errors, exits=(0,))

  def _status(self) -> dict[int, int | None]:
    return {i: process.exitcode for i, process in enumerate(self._processes)}

  def _running(self, status: dict[int, int | None]) -> list[int]:
    return [process.sentinel for i, process in enumerate(self._processes) if status[i] is None]

  def __enter__(self) -> 'Forks':
    return self

  def __exit__(self, *_) -> None:
    for process in self._processes:
      process.kill()
    for process in self._processes:
      process.join()
    self._files.close()


def _call(body, index: int, pipe: connection.Connection, errors: IO[bytes]) -> None:
  """Calls `body` with standard error in a file, which also has what C++ code writes."""
  os.dup2(errors.fileno(), 2)
  body(index, pipe)


def _check(status: dict[int, int | None], errors: dict[int, IO[bytes]], exits: Sequence[int]) -> None:
  """Raises HostFailed if a process has ended with a status that isn't in `exits`. None is a process that runs."""
  for i, code in status.items():
    if code is not None and code not in exits:
      raise _failed(i, code, errors[i])


def _failed(index: int, code: int, errors: IO[bytes]) -> HostFailed:
  errors.seek(0)
  lines = [line for line in errors.read().decode(errors='replace').splitlines() if line.strip()]
  return HostFailed(f'process {index} ended with status {code}: {lines[-1] if lines else "it wrote no error"}')
