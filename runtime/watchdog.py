"""Watches a running job, and ends it with a clear reason if a process dies, hangs or fails.

Each process writes a heartbeat to JAX's key-value store every few seconds, and reads the heartbeats of the other
processes. A process that sends no heartbeat within the deadline counts as lost. A process that fails publishes its
error. In both cases, all other processes end with a message that names the process. Otherwise they would wait in a
collective forever, at least on a TPU. A job that makes no step for two hours ends too, even if it has only one process.
Only the first step has no time limit.

JAX has heartbeats of its own, but if a process is lost, JAX calls abort() and prints C++ stack frames. JAX's deadline
is longer than ours, so that our message comes first. If process 0 dies, the abort can't be avoided, because JAX's
coordination service runs in that process. In that case, a signal handler prints our message. If process 0 hangs, a
second thread notices that the service doesn't answer.
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

from betarank.configs.errors import UserError, one_line, print_if_possible
from betarank.configs.stop import Stopped
from betarank.runtime.rendezvous import EXIT_JOB_LOST, ProcessInfo

HANG_S = 600.0  # after each such time without a step, the stacks of all threads are written to the process's log
STALL_S = 7200.0  # after this time without a step, not counting the first step, the job ends
WRITE_S = 10.0  # the time that a thread which ends the process has to do so, before another thread ends it
FINISHED = 'finished'
_KEY = 'betarank/heartbeat/'
_XLA_STATUS = re.compile(r'(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ')


@dataclasses.dataclass(frozen=True)
class Heartbeat:
  """The state that a process publishes for the other processes of its job.

  Attributes:
    count: the number of heartbeats that the process has sent.
    step: the last step that the process has reached.
    ended: FINISHED, or the error that ended the process; '' while it runs.
  """

  count: int = 0
  step: int = 0
  ended: str = ''


@dataclasses.dataclass(frozen=True)
class Process:
  """The last heartbeat of a process, and when it changed.

  Attributes:
    name: the name of the process in messages.
    heartbeat: the last known heartbeat of the process.
    changed_s: the value of time.monotonic() when the heartbeat last changed. For the process that runs this code, it is
      the value when the process reached its most recent step.
  """

  name: str
  heartbeat: Heartbeat
  changed_s: float


def update(peers: Mapping[int, Process], heartbeats: Mapping[int, Heartbeat], now_s: float) -> dict[int, Process]:
  """Returns `peers` with their newest heartbeats. `changed_s` becomes `now_s` for a peer whose heartbeat has changed.

  Args:
    peers: the other processes, by process index.
    heartbeats: the newest heartbeats, by process index. Processes that aren't in `peers` are ignored.
    now_s: the present time, from time.monotonic().
  """
  new = {i: beat for i, beat in heartbeats.items() if i in peers and beat != peers[i].heartbeat}
  return {i: dataclasses.replace(peer, heartbeat=new[i], changed_s=now_s) if i in new else peer
          for i, peer in peers.items()}


def verdict(now_s: float, own: Process, peers: Iterable[Process], deadline_s: float) -> str | None:
  """Returns the reason why this process must end, or None if it may continue.

  This process must end if another process has failed or sends no heartbeats. It must also end if it has itself made no
  step for STALL_S seconds, except during the first step.

  Args:
    now_s: the present time, from time.monotonic().
    own: this process. Its `changed_s` is the time when it reached its last step.
    peers: the other processes. Their `changed_s` is the time when their last heartbeat arrived.
    deadline_s: the longest allowed time without a heartbeat, in seconds.
  """
  peers = list(peers)
  for peer in peers:
    ended, silent_s = peer.heartbeat.ended, now_s - peer.changed_s
    if ended and ended != FINISHED:
      if any(ended.startswith(each.name) for each in (own, *peers)):  # which already names the process that caused it
        return ended
      return f'{peer.name} ended: {ended}'
    if not ended and silent_s > deadline_s:
      return (f'{peer.name} sent no heartbeat for {silent_s:.0f} s (--host_deadline_s={deadline_s:g}), since step '
              f'{peer.heartbeat.step}; the same command resumes from the last checkpoint')
  still_s, step = now_s - own.changed_s, own.heartbeat.step
  if not step or still_s <= STALL_S:  # the first step has no limit, because compiling may take long
    return None
  if not peers:
    return (f'no step for {still_s:.0f} s (at most {STALL_S:.0f}), since step {step}; the stacks above show where it '
            'hangs, and the same command resumes from the last checkpoint')
  last = min(peers, key=lambda peer: peer.heartbeat.step)
  return (f'no step for {still_s:.0f} s (at most {STALL_S:.0f}); {last.name} is furthest behind, at step '
          f'{last.heartbeat.step}, this one at {step}')


def is_own_error(error: BaseException) -> bool:
  """Returns True if this process itself caused the error, and False if the loss of another process may have caused it.

  The type of the error isn't enough to decide this. A wrong setting raises a ValueError, but a collective that fails
  because another process is gone may raise a ValueError too.
  """
  return isinstance(error, UserError | ValueError) and not _XLA_STATUS.match(str(error))


class Watchdog:
  """A context manager that ends a job of one process if it makes no step for STALL_S seconds.

  Only the first step has no time limit.
  """

  period_s = 1.0

  def __init__(self, name: str = 'this process'):
    self._own = Process(name, Heartbeat(), time.monotonic())
    self._closed = threading.Event()

  def __enter__(self):
    self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._closed.set()
    self._thread.join()  # a thread that is in JAX's C++ code when Python ends would end the process with a signal

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
    _dump_stacks(sys.stderr)
    print_if_possible(f'error: {reason}')
    os._exit(status)


class JobWatchdog(Watchdog):
  """A context manager that ends this process if another process of its job dies, hangs or fails.

  If the block raises an error other than `Stopped`, this process has failed. The watchdog then publishes the error and
  ends this process. Every other process prints a message that names this process, and ends too.
  """

  def __init__(self, info: ProcessInfo, names: Sequence[str], deadline_s: float, log: IO[str]):
    """Creates the context manager. jax.distributed must be initialized.

    Args:
      info: the position of this process in its job.
      names: the names of all processes, for messages.
      deadline_s: the longest allowed time without a heartbeat, in seconds.
      log: the file for messages. If this process hangs, the stacks of all its threads are written there too.
    """
    from jax._src import distributed  # there is no public way to reach the job's key-value store
    super().__init__(names[info.index])
    self._store = distributed.global_state.client
    self._info, self._names, self._deadline_s, self._log = info, names, deadline_s, log
    self.period_s = min(2.0, deadline_s / 5)
    self._peers = {i: Process(name, Heartbeat(), time.monotonic()) for i, name in enumerate(names) if i != info.index}
    self._count, self._ended = 0, ''
    self._answers = 0  # the number of times that process 0, which holds the store, has answered
    self._ending, self._left = threading.Lock(), threading.Event()

  def __enter__(self):
    self._write_log(f'{self._own.name} starts; coordinator {self._info.coordinator}')
    faulthandler.register(signal.SIGUSR1, file=self._log)  # kill -USR1 PID writes the stacks of a process
    faulthandler.dump_traceback_later(HANG_S, repeat=True, file=self._log)
    self._abort_handler = _on_abort(self._aborted)
    if self._info.index:
      threading.Thread(target=self._watch_store, name='store watchdog', daemon=True).start()
    return super().__enter__()

  def __exit__(self, kind, error, trace):
    if error is not None and not isinstance(error, Stopped):
      self._fail(error)
    super().__exit__(kind, error, trace)  # before the last heartbeat, which must not be overwritten by an earlier one
    self._ended = FINISHED
    with contextlib.suppress(RuntimeError):  # fails if process 0 has already ended, because it holds the store
      self._publish()
    self._left.set()
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
    except RuntimeError as error:  # JAX can't reach the store either, and will abort this process
      self._write_log(f'key-value store: {one_line(error)}')
      return None
    self._answers += 1
    now_s = time.monotonic()
    self._peers = update(self._peers, heartbeats, now_s)
    return verdict(now_s, self._own, self._peers.values(), self._deadline_s)

  def _watch_store(self) -> None:
    """Ends this process if process 0 hangs.

    Process 0 holds the key-value store. If it hangs, the thread that reads heartbeats from the store waits forever, so
    another thread runs this method. Time in which this process is suspended isn't counted.
    """
    silent_s, answers = 0.0, 0
    while not self._left.wait(self.period_s):
      silent_s, answers = 0.0 if self._answers > answers else silent_s + self.period_s, self._answers
      if silent_s > self._deadline_s:
        self._end_without_store(f'{self._names[0]}, which coordinates the job, has not answered for {silent_s:.0f} s '
                                f'(--host_deadline_s={self._deadline_s:g}). This process was at step '
                                f'{self._own.heartbeat.step}; the same command resumes from the last checkpoint')

  def _publish(self) -> None:
    self._count += 1
    heartbeat = Heartbeat(self._count, self._own.heartbeat.step, self._ended)
    self._store.key_value_set(f'{_KEY}{self._info.index}', json.dumps(dataclasses.asdict(heartbeat)),
                              allow_overwrite=True)

  def _fail(self, error: BaseException) -> None:
    """Ends this process because the block of the `with` statement has raised `error`.

    If the loss of another process may have caused the error, first waits long enough for the watchdog to find the lost
    process and report it.
    """
    own = is_own_error(error)
    if not own and not isinstance(error, SystemExit | KeyboardInterrupt):
      time.sleep(self._deadline_s + 3 * self.period_s)  # the watchdog thread ends the process if it finds a lost peer
    interrupted = isinstance(error, KeyboardInterrupt)
    if not own and not interrupted:
      print_if_possible(''.join(traceback.format_exception(error)).rstrip())
    self._end('stopped by Ctrl-C' if interrupted else str(error) or type(error).__name__,
              130 if interrupted else 2 if own else 1, stacks=False)

  def _end(self, reason: str, status: int, stacks: bool = True) -> None:
    """Writes the reason to standard error and to the log, publishes it in the heartbeat, and ends this process.

    status: the exit status.
    stacks: whether the stacks of all threads are written to the log.
    """
    if not self._ending.acquire(blocking=False):
      time.sleep(3600)  # another thread is ending the process
    self._write_error(reason, stacks)
    self._ended = reason
    with contextlib.suppress(RuntimeError):  # the store may be gone
      self._publish()
    if self._info.index == 0:
      time.sleep(3 * self.period_s)  # process 0 holds the store, so it waits until the others have read the reason
    os._exit(status)

  def _aborted(self) -> None:
    host, _, port = self._info.coordinator.rpartition(':')
    try:
      socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
      reason = 'JAX ended this process; its reason is above'
    except OSError:
      reason = (f'{self._names[0]}, which coordinates the job, is gone, this process was at step '
                f'{self._own.heartbeat.step}; the same command resumes from the last checkpoint')
    self._end_without_store(reason)

  def _end_without_store(self, reason: str) -> None:
    """Ends this process. Writes the reason first, unless another thread is ending the process with its own reason.

    That thread has WRITE_S seconds to end the process. It may wait forever for the store of a process 0 that hangs.
    """
    if self._ending.acquire(timeout=WRITE_S):
      self._write_error(reason, stacks=True)
    os._exit(EXIT_JOB_LOST)

  def _write_error(self, reason: str, stacks: bool) -> None:
    print_if_possible(f'error: {reason}')
    self._write_log(f'error: {reason}')
    if stacks:
      _dump_stacks(self._log)

  def _write_log(self, text: str) -> None:
    print_if_possible(f'{time.strftime("%Y-%m-%d %H:%M:%S")} {text}', self._log)


def _dump_stacks(file: IO[str]) -> None:
  """Writes the stacks of all threads to a file, if it can be written."""
  with contextlib.suppress(OSError, ValueError, RuntimeError):  # RuntimeError: standard error is closed
    faulthandler.dump_traceback(file=file)


def _on_abort(act: Callable[[], None]):
  """Registers a function `act` that is called when this process calls abort(). Returns the handler.

  The caller must keep a reference to the handler for the life of the process. The handler is a C function, because JAX
  aborts from C++ threads, in which Python's signal handlers don't run.
  """
  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: act())
  libc = ctypes.CDLL(None)
  libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, type(handler)], ctypes.c_void_p
  libc.signal(signal.SIGABRT, handler)
  return handler
