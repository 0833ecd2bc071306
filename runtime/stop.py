"""Stops a command on request, after it has saved: SIGTERM from a scheduler, or Ctrl-C.

    with StopSignal(jax.process_count()) as stop:
      for step in steps:
        work(step)
        if stop(step):
          save(step)
          print(f'asked to stop: step {step} is saved; the same command resumes from it')
          raise Stopped(stop.exit_status)

The first signal changes only what `stop` returns. The exit status, 143 for SIGTERM and 130 for Ctrl-C, tells scripts
that the command did not finish. A second Ctrl-C ends the process at once, whatever it is doing.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import NoReturn


class Stopped(SystemExit):
  """Ends the process after a stop on request. Everything is saved; this is no failure."""


def leave(status: int) -> NoReturn:
  """Ends the process at once, once its output is written. Python's own way out frees what a computation that was
  interrupted still uses, which can crash.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


class StopSignal:
  """A context that holds back SIGTERM and Ctrl-C, and an object to call after each step: True to save and end.

  Must be entered in the main thread. Attribute `exit_status`: the status to end with.
  """

  def __init__(self, processes: int = 1, before_exit: Callable[[], None] = lambda: None):
    """Creates the context; the signals act as before until it is entered.

    Args:
      processes: the number of processes of the job. All of them must call this object after the same steps, and for all
        of them it returns True at the same step, once any process has received a signal. Several processes need
        jax.distributed, which carries the request from that process to the rest.
      before_exit: called in another thread before a second Ctrl-C ends the process, to end child processes.
    """
    self._processes, self._before_exit = processes, before_exit
    self._received: list[int] = []

  def __enter__(self):
    # JAX has its own SIGTERM handler in a job of several processes. It must stay, to tell the others.
    handled = (signal.SIGINT,) if self._processes > 1 else (signal.SIGINT, signal.SIGTERM)
    self._handlers = {number: signal.signal(number, lambda number, _: self._received.append(number))
                      for number in handled}
    # Python runs those handlers in the main thread, between two lines of Python. A compilation or a collective can keep
    # it from there for minutes, so a thread listens too.
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
    """Returns True if the command has to save and end now."""
    if self._processes == 1:
      return bool(self._received)
    from jax.experimental import multihost_utils
    return multihost_utils.reached_preemption_sync_point(step)

  @property
  def exit_status(self) -> int:
    """130 if Ctrl-C was the first signal that this process received, else 143."""
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
