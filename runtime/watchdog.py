"""Watches a job while it runs, and ends it with a reason if a process dies, hangs or fails.

Each process of a job writes a heartbeat to JAX's key-value store every few seconds and reads those of the others. If
one sends none until the deadline, or publishes why it ends, the others end with a line that names it. On a TPU they
would otherwise wait in a collective forever. A job without a step for two hours ends too, even if it is one process.

JAX has heartbeats of its own, but ends a process by abort() with C++ stack frames. Its deadline is set later than ours.
One abort can't be avoided: when process 0 is gone, and JAX's coordination service with it. A handler then prints our
line.
"""

import contextlib
import ctypes
import dataclasses
import faulthandler
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO

from betarank.configs.errors import UserError
from betarank.runtime.rendezvous import EXIT_JOB_LOST, ProcessInfo
from betarank.runtime.stop import Stopped

HANG_S = 600.0  # without a step: the stacks of all threads go to the process's log, and again after as long
STALL_S = 7200.0  # without a step, after the first one: the job ends
FINISHED = 'finished'
_KEY = 'betarank/heartbeat/'
_XLA_STATUS = re.compile(r'(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ')


@dataclasses.dataclass(frozen=True)
class Heartbeat:
  """What a process publishes about itself."""

  count: int = 0
  step: int = 0
  ended: str = ''  # FINISHED, or the error that ended the process; '' while it runs


@dataclasses.dataclass(frozen=True)
class Process:
  """What is known of a process: its last heartbeat, and the time when that, or for this process its step, changed."""

  name: str
  heartbeat: Heartbeat
  changed_s: float  # time.monotonic()


def update(peers: Mapping[int, Process], heartbeats: Mapping[int, Heartbeat], now_s: float) -> dict[int, Process]:
  """Returns `peers` with the heartbeats that have changed; others, also those of this process, have no effect."""
  new = {i: beat for i, beat in heartbeats.items() if i in peers and beat != peers[i].heartbeat}
  return {i: dataclasses.replace(peer, heartbeat=new[i], changed_s=now_s) if i in new else peer
          for i, peer in peers.items()}


def verdict(now_s: float, own: Process, peers: Iterable[Process], deadline_s: float) -> str | None:
  """Returns why this process must end, or None if all is well.

  Args:
    now_s: the time, on the clock of `Process.changed_s`.
    own: this process; `changed_s` is when it reached its step.
    peers: the others; `changed_s` is when their last heartbeat came.
    deadline_s: the longest time without a heartbeat.
  """
  peers = list(peers)
  for peer in peers:
    ended, silent_s = peer.heartbeat.ended, now_s - peer.changed_s
    if ended and ended != FINISHED:
      return f'{peer.name} ended: {ended}'
    if not ended and silent_s > deadline_s:
      return (f'{peer.name} sent no heartbeat for {silent_s:.0f} s, since step {peer.heartbeat.step}; the same command '
              'resumes from the last checkpoint')
  still_s, step = now_s - own.changed_s, own.heartbeat.step
  if not step or still_s <= STALL_S:  # the first step compiles, which may take long
    return None
  if not peers:
    return (f'no step for {still_s:.0f} s, since step {step}; the stacks above show where it hangs, and the same '
            'command resumes from the last checkpoint')
  last = min(peers, key=lambda peer: peer.heartbeat.step)
  return (f'no step for {still_s:.0f} s; {last.name} is furthest behind, at step {last.heartbeat.step}, this one at '
          f'{step}')


def is_own_error(error: BaseException) -> bool:
  """Returns True for an error in this process's settings, False for one that a lost peer may have caused.

  A collective that fails because a peer is gone can raise a ValueError, as wrong settings do.
  """
  return isinstance(error, UserError | ValueError) and not _XLA_STATUS.match(str(error))


class Watchdog:
  """A context that ends a job of one process if it makes no step for STALL_S."""

  period_s = 1.0

  def __init__(self, name: str = 'this process'):
    self._own = Process(name, Heartbeat(), time.monotonic())
    self._closed = threading.Event()

  def __enter__(self):
    threading.Thread(target=self._watch, name='watchdog', daemon=True).start()
    return self

  def __exit__(self, *_):
    self._closed.set()

  def note_step(self, step: int) -> None:
    """Records that this process has reached a step."""
    self._own = Process(self._own.name, dataclasses.replace(self._own.heartbeat, step=step), time.monotonic())

  def _watch(self) -> None:
    while not self._closed.wait(self.period_s):
      if reason := self._check():
        self._end(reason, EXIT_JOB_LOST)

  def _check(self) -> str | None:
    return verdict(time.monotonic(), self._own, (), 0)

  def _end(self, reason: str, status: int) -> None:
    faulthandler.dump_traceback(file=sys.stderr)
    print(f'error: {reason}', file=sys.stderr, flush=True)
    os._exit(status)


class JobWatchdog(Watchdog):
  """A context that ends this process if another one of its job dies, hangs or fails, and tells them if it fails itself.

  An error that leaves the block ends this process, and by its heartbeat the others, with a line that names the process
  at fault.
  """

  def __init__(self, info: ProcessInfo, names: Sequence[str], deadline_s: float, log: IO[str]):
    """Creates the context. Needs jax.distributed; `log` gets the messages and, on a hang, the stacks of all threads."""
    from jax._src import distributed  # the job's key-value store has no public name
    super().__init__(names[info.index])
    self._store = distributed.global_state.client
    self._info, self._names, self._deadline_s, self._log = info, names, deadline_s, log
    self.period_s = min(2.0, deadline_s / 5)
    self._peers = {i: Process(name, Heartbeat(), time.monotonic()) for i, name in enumerate(names) if i != info.index}
    self._count, self._ended = 0, ''
    self._ending = threading.Lock()

  def __enter__(self):
    self._write_log(f'{self._own.name} starts; coordinator {self._info.coordinator}')
    faulthandler.register(signal.SIGUSR1, file=self._log)  # kill -USR1 PID writes the stacks of a process
    faulthandler.dump_traceback_later(HANG_S, repeat=True, file=self._log)
    self._abort_handler = _on_abort(self._aborted)
    return super().__enter__()

  def __exit__(self, kind, error, trace):
    if error is not None and not isinstance(error, Stopped):
      self._fail(error)
    self._ended = FINISHED
    with contextlib.suppress(RuntimeError):  # the others may have left, and the store with them
      self._publish()
    super().__exit__(kind, error, trace)
    faulthandler.cancel_dump_traceback_later()
    self._write_log('ends')

  def note_step(self, step: int) -> None:
    super().note_step(step)
    faulthandler.dump_traceback_later(HANG_S, repeat=True, file=self._log)

  def _check(self) -> str | None:
    try:
      self._publish()
      heartbeats = {int(key.rpartition('/')[2]): Heartbeat(**json.loads(value))
                    for key, value in self._store.key_value_dir_get(_KEY)}
    except RuntimeError as error:  # JAX can't reach the store either, and aborts the process
      self._write_log(f'key-value store: {str(error).splitlines()[0]}')
      return None
    now_s = time.monotonic()
    self._peers = update(self._peers, heartbeats, now_s)
    return verdict(now_s, self._own, self._peers.values(), self._deadline_s)

  def _publish(self) -> None:
    self._count += 1
    heartbeat = Heartbeat(self._count, self._own.heartbeat.step, self._ended)
    self._store.key_value_set(f'{_KEY}{self._info.index}', json.dumps(dataclasses.asdict(heartbeat)),
                              allow_overwrite=True)

  def _fail(self, error: BaseException) -> None:
    """Ends this process because of an error in it; if a peer may be the cause, after the time it takes to find out."""
    own = is_own_error(error)
    if not own and not isinstance(error, SystemExit | KeyboardInterrupt):
      time.sleep(self._deadline_s + 3 * self.period_s)  # the other thread ends the process if it finds a lost peer
    if not own:
      traceback.print_exception(error)
    self._end(str(error) or type(error).__name__, 2 if own else 1, stacks=False)

  def _end(self, reason: str, status: int, stacks: bool = True) -> None:
    """Writes the reason to standard error, the log and the heartbeat, and ends this process."""
    if not self._ending.acquire(blocking=False):
      time.sleep(3600)  # another thread is ending the process
    self._write_error(reason, stacks)
    self._ended = reason
    with contextlib.suppress(RuntimeError):  # the store may be gone
      self._publish()
    if self._info.index == 0:
      time.sleep(3 * self.period_s)  # it holds the store, in which the others must find the reason
    os._exit(status)

  def _aborted(self) -> None:
    host, _, port = self._info.coordinator.rpartition(':')
    try:
      socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
      reason = 'JAX ended this process; its reason is above'
    except OSError:
      reason = (f'{self._names[0]}, which coordinates the job, is gone, this process was at step '
                f'{self._own.heartbeat.step}; the same command resumes from the last checkpoint')
    self._write_error(reason, stacks=True)
    os._exit(EXIT_JOB_LOST)

  def _write_error(self, reason: str, stacks: bool) -> None:
    print(f'error: {reason}', file=sys.stderr, flush=True)
    self._write_log(f'error: {reason}')
    if stacks:
      faulthandler.dump_traceback(file=self._log)

  def _write_log(self, text: str) -> None:
    print(time.strftime('%Y-%m-%d %H:%M:%S'), text, file=self._log, flush=True)


def _on_abort(act: Callable[[], None]):
  """Calls `act` if this process calls abort(). JAX aborts from C++ threads, where no Python signal handler runs.

  Returns the C handler, which must be kept alive as long as the process.
  """
  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: act())
  libc = ctypes.CDLL(None)
  libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, type(handler)], ctypes.c_void_p
  libc.signal(signal.SIGABRT, handler)
  return handler
