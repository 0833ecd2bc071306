"""Stops a command on request, after it has saved. A request is SIGTERM, from a scheduler, or Ctrl-C.

    with StopSignal(jax.process_count()) as stop:
      for step in steps:
        work(step)
        if stop(step):
          save(step)
          print(f'asked to stop: step {step} is saved; the same command resumes from it')
          raise Stopped(stop.exit_status)

The first signal only makes `stop` return True. The exit status is 143 for SIGTERM and 130 for Ctrl-C, so that scripts
can see that the command didn't finish. A second Ctrl-C ends the process at once, whatever it is doing.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import NoReturn


class Stopped(SystemExit):
  """Raised to end the process after a stop on request. Everything is saved, so this isn't a failure."""


def leave(status: int) -> NoReturn:
  """Ends the process at once, once its output is written. Python's own way out frees what a computation that was
  interrupted still uses, which can crash.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


class StopSignal:
  """A context manager that catches SIGTERM and Ctrl-C. Call it after each step: it returns True once the command must
  end.

  It must be entered in the main thread. The attribute `exit_status` is the status to end with.
  """

  def __init__(self, processes: int = 1, before_exit: Callable[[], None] = lambda: None):
    """Creates the context manager. The signals keep their usual effect until it is entered.

    Args:
      processes: the number of processes of the job. All of them must call this object after the same steps. Once any of
        them has received a signal, it returns True in all of them at the same step. With several processes,
        jax.distributed must be initialized.
      before_exit: called before a second Ctrl-C ends the process, in order to end child processes. It runs in another
        thread.
    """
    self._processes, self._before_exit = processes, before_exit
    self._received: list[int] = []

  def __enter__(self):
    # In a job of several processes JAX has its own SIGTERM handler, which tells the other processes. It must stay.
    handled = (signal.SIGINT,) if self._processes > 1 else (signal.SIGINT, signal.SIGTERM)
    self._handlers = {number: signal.signal(number, lambda number, _: self._received.append(number))
                      for number in handled}
    # Python runs signal handlers in the main thread, between two bytecode instructions. A compilation or a collective
    # can delay them for minutes, so another thread listens too.
    listener, self._writer = socket.socketpair()
    self._writer.setblocking(False)
    self._wakeup_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=self._listen, args=(listener,), name='stop signal', daemon=True).start()
    return self

  def __exit__(self, *_):
    signal.set_wakeup_fd(self._wakeup_fd)
    self._writer.close()  # ends the thread
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def __call__(self, step: int = 0) -> bool:
    """Returns True if the command must save and end now."""
    if self._processes == 1:
      return bool(self._received)
    from jax.experimental import multihost_utils
    return multihost_utils.reached_preemption_sync_point(step)

  @property
  def exit_status(self) -> int:
    """130 if the first signal that this process received was Ctrl-C, else 143."""
    return 128 + (self._received or [signal.SIGTERM])[0]

  def _listen(self, listener: socket.socket) -> None:
    with listener:
      interrupts = 0
      while received := listener.recv(1):
        if received[0] != signal.SIGINT:
          continue
        interrupts += 1
        if interrupts > 1:
          self._before_exit()
          os._exit(128 + signal.SIGINT)
        print('stopping after this step; Ctrl-C again ends at once, without saving', file=sys.stderr, flush=True)
        if self._processes > 1:
          os.kill(os.getpid(), signal.SIGTERM)
