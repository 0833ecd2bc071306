"""Stops a command on request. A request is either SIGTERM (for example from a scheduler) or Ctrl-C.

A command of many steps saves before it ends:

    with StopSignal(jax.process_count()) as stop:
      for step in steps:
        work(step)
        if stop():
          save(step)
          print(f'asked to stop: step {step} is saved; the same command resumes from it')
          raise Stopped(stop.exit_status)

The first signal only makes `stop` return True. The exit status is 143 for SIGTERM and 130 for Ctrl-C, so that scripts
can see that the command didn't finish. A second Ctrl-C ends the process at once, whatever it is doing.

Every command runs in `interruptible`. Inside the block of a StopSignal, the StopSignal handles the signals. Outside
such a block, the first Ctrl-C raises KeyboardInterrupt, which ends the command with one line (configs/errors.py). The
results that the command has written by then are complete, because each is written atomically.

data, runtime and train need this module, so it is in configs, which every package may import.
"""

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from betarank.configs.errors import print_if_possible


class Stopped(SystemExit):
  """Raised to end the process after a request to stop. Everything is saved, so this isn't a failure."""


def leave(status: int) -> NoReturn:
  """Ends the process at once, after writing the buffered output.

  A normal exit of Python can crash, because it frees memory that an interrupted computation still uses.
  """
  try:
    sys.stdout.flush()
    sys.stderr.flush()
  finally:
    _exit(status)


def _exit(status: int) -> NoReturn:
  for stream in (1, 2):
    if os.isatty(stream):
      os.write(stream, b'\x1b[?25h')  # shows the cursor, which a progress bar hides
  os._exit(status)


@contextlib.contextmanager
def importing(text: str, console: Any = None) -> Iterator[None]:
  """Makes Ctrl-C end the process at once while the block imports modules, and shows `text` on a terminal.

  Ctrl-C prints the line 'stopped', and the exit status is 130. Use this context manager around slow imports, when there
  is nothing to save yet. During an import, a KeyboardInterrupt can crash the process. Enter the block in the main
  thread.

  Python's garbage collector doesn't run in the block, and later ignores the objects that the block created (gc.freeze),
  because imported modules are never freed. This saves a tenth of the import time, and about as much in each later
  collection.

  console: the rich.console.Console that shows the text. None means a console on standard output.
  """
  from betarank.configs.terminal import waiting

  def end(*_):
    print_if_possible('\nstopped')
    leave(128 + signal.SIGINT)

  handler = signal.signal(signal.SIGINT, end)
  gc.disable()
  try:
    with waiting(text, console):
      yield
  finally:
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGINT, handler)


class StopSignal:
  """A context manager that catches SIGTERM and Ctrl-C. It must be entered in the main thread.

  Call the object after each step. It returns True once the command must end. The attribute `exit_status` is the exit
  status for the process.
  """

  def __init__(self, processes: int = 1, before_exit: Callable[[], None] = lambda: None, *, unit: str = 'step'):
    """Creates the context manager. Until it is entered, the signals keep their usual effect.

    Args:
      processes: the number of processes of the job. All processes must call this object after the same steps. Once one
        process has received a signal, the calls return True in all processes at the same step. With several processes,
        jax.distributed must be initialized, and there must be only one such object.
      before_exit: called when a second Ctrl-C is about to end the process, for example to end child processes. It runs
        in another thread.
      unit: a word for the work that the command completes after a signal, such as 'step'. The first Ctrl-C prints it.
    """
    self._processes, self._before_exit, self._unit = processes, before_exit, unit
    self._calls = 0
    self._received: list[int] = []

  def __enter__(self):
    # In a job of several processes JAX has its own SIGTERM handler, which tells the other processes. It must stay.
    handled = (signal.SIGINT,) if self._processes > 1 else (signal.SIGINT, signal.SIGTERM)
    self._handlers = {number: signal.signal(number, lambda number, _: self._received.append(number))
                      for number in handled}
    self._listening = listening(self._interrupted)
    self._listening.__enter__()
    return self

  def __exit__(self, *_):
    self._listening.__exit__(None, None, None)
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def __call__(self) -> bool:
    """Returns True if the command must save and end now."""
    if self._processes == 1:
      return bool(self._received)
    from jax.experimental import multihost_utils
    self._calls += 1
    return multihost_utils.reached_preemption_sync_point(self._calls)

  def end_if_asked(self, kept: str) -> None:
    """Raises Stopped if the command was asked to stop. Call this in all processes, and only when everything is saved.

    kept: what was saved, for the line that process 0 prints.
    """
    if self():
      if self._processes == 1 or _is_first():
        print(f'asked to stop: {kept}', flush=True)
      raise Stopped(self.exit_status)

  @property
  def exit_status(self) -> int:
    """The exit status for the process: 130 if the first signal that it received was Ctrl-C, else 143."""
    return 128 + (self._received or [signal.SIGTERM])[0]

  def _interrupted(self, count: int) -> None:
    if count > 1:
      self._before_exit()
      _exit(128 + signal.SIGINT)
    print_if_possible(f'stopping after this {self._unit}; Ctrl-C again ends at once, without saving')
    if self._processes > 1:
      os.kill(os.getpid(), signal.SIGTERM)


def _is_first() -> bool:
  import jax
  return jax.process_index() == 0


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
  """Ends the block with KeyboardInterrupt at the first Ctrl-C. A second Ctrl-C ends the process at once, with exit
  status 130.

  Must be entered in the main thread. Inside a nested block of a StopSignal, the StopSignal handles Ctrl-C. Inside a
  nested block of `listening`, a second Ctrl-C doesn't end the process.

  Python alone doesn't ensure that KeyboardInterrupt ends the block. C code may turn a KeyboardInterrupt into another
  error (an import does) or ignore it (a callback of the garbage collector does). In both cases this function raises
  KeyboardInterrupt again.
  """
  count, ignored, raised, ended = 0, False, False, False

  def raise_(signum: int, frame) -> None:
    nonlocal raised
    raised = True
    signal.default_int_handler(signum, frame)

  def interrupted(_: int) -> None:
    nonlocal count, ignored
    if ignored:  # this is the signal of `unraisable`, not another Ctrl-C
      ignored = False
      return
    count += 1
    if count > 1:
      _exit(128 + signal.SIGINT)

  def unraisable(error) -> None:
    nonlocal ignored
    if error.exc_type is KeyboardInterrupt and not ended:
      ignored = True
      # Later and from another thread, or it would be raised here, where it is ignored too.
      threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
      before(error)

  before, sys.unraisablehook = sys.unraisablehook, unraisable
  handler = signal.signal(signal.SIGINT, raise_)
  try:
    with listening(interrupted):
      yield
  except Exception:
    if raised:
      raise KeyboardInterrupt from None
    raise
  finally:
    ended = True
    signal.signal(signal.SIGINT, handler)
    if sys.unraisablehook is unraisable:  # otherwise a later hook passes errors on to it, and must stay
      sys.unraisablehook = before


@contextlib.contextmanager
def listening(interrupted: Callable[[int], None]) -> Iterator[None]:
  """Calls `interrupted` in another thread at each Ctrl-C, until the block ends. Signal handlers stay as they are.

  A signal handler in Python runs in the main thread, between two bytecode instructions, so a compilation or a
  collective can delay it for minutes. The call of `interrupted` isn't delayed.

  interrupted: called with the number of times that Ctrl-C was pressed so far, 1 for the first time.
  """
  listener, writer = socket.socketpair()
  writer.setblocking(False)

  def listen():
    count = 0
    with listener:
      while received := listener.recv(1):
        if received[0] == signal.SIGINT:
          count += 1
          interrupted(count)

  before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
  threading.Thread(target=listen, name='Ctrl-C', daemon=True).start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    writer.close()  # ends the thread
