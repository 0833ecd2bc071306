"""Several processes as one job that starts together, or not at all, and ends together, with a reason.

Before JAX starts, process 0 calls the roll (train/rollcall.py): who doesn't come in time is named, and so is who comes
with other code, another config or other data, or dies before JAX is up. While the job runs, every process leaves a
sign of life in JAX's key-value store every few seconds. One that is silent for the deadline, or that has said why it
ends, ends the others with a line that names it: on a TPU they would wait in a collective for ever.

JAX has a heartbeat too, but ends a process by abort() with a stack of C++ frames. It is set to be later than ours,
and the one abort that can't be forestalled, when process 0 and with it JAX's coordination service is gone, is given
our line by a handler.
"""

import argparse
import contextlib
import ctypes
import errno
import faulthandler
import hashlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import IO, Any

import jax
from etils import epath
from ml_collections import ConfigDict

from betarank.configs.errors import UserError
from betarank.configs.load import flatten, to_json
from betarank.configs.sections import section
from betarank.data import DataConfig, prepared
from betarank.runtime import workdir
from betarank.runtime.rendezvous import LOST, HostError, Place, Vigil, rendezvous

ROLL_CALL_S = 300.0  # all processes have to come within this
HANG_S = 600.0  # without a step: every thread's stack goes to the process's log, and again after as long
STALL_S = 7200.0  # without a step, after the first one: the job ends
_BEAT = 'betarank/beat/'
_STATUS = re.compile(r'(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ')  # as XLA's errors begin

_watch: '_Watch | _Alone | None' = None


def locate(coordinator: str, processes: int, index: int) -> Place:
  """Reads the flags; 'auto' asks the environment: TPU VMs, GKE, Slurm, Open MPI. Raises HostError."""
  if coordinator == 'auto':
    from jax._src import clusters  # what jax.distributed.initialize() asks; it has no public name
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(ROLL_CALL_S))
    if None in found[:3]:
      raise HostError('--coordinator=auto: this is no TPU VM, Slurm or MPI job; give HOST:PORT, --processes and '
                      '--process_id')
    return Place(*found)
  if not coordinator:
    return Place('', 1, 0, None)
  if not coordinator.rpartition(':')[2].isdigit() or not 0 <= index < processes:
    raise HostError(f'--coordinator={coordinator} --processes={processes} --process_id={index}: needs HOST:PORT, and '
                    f'a process_id from 0 to {processes - 1}')
  return Place(coordinator, processes, index, None)


def initialize(place: Place, deadline_s: float) -> None:
  """Starts JAX's side of a job. Must come before anything else touches a device; CPU processes talk through gloo."""
  if place.processes == 1:
    return
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(
    place.coordinator, place.processes, place.index, place.local_devices, initialization_timeout=int(ROLL_CALL_S),
    heartbeat_timeout_seconds=int(max(100, 3 * deadline_s)), shutdown_timeout_seconds=int(max(60, deadline_s)))


@contextlib.contextmanager
def job(args: argparse.Namespace, config: ConfigDict) -> Iterator[None]:
  """Joins the job that the process flags name (train/flags.py), for as long as the block lasts.

  Process 0 claims args.workdir. An error in the block ends the other processes too, with its message. Raises UserError
  if the workdir is taken, HostError if a process is missing or has come with something else.
  """
  global _watch
  place = locate(args.coordinator, args.processes, args.process_id)
  root = epath.Path(args.workdir)
  with contextlib.ExitStack() as stack:
    refused = ''
    if place.index == 0:
      try:
        stack.enter_context(workdir.claim(root))
      except UserError as error:
        refused = str(error)
    if place.processes == 1:
      if refused:
        raise UserError(refused)
      _watch = stack.enter_context(_Alone())
      with _in_one_line(args.workdir):
        yield
      return
    names, lines = rendezvous(place, _facts(config, args.workdir), ROLL_CALL_S, refused)
    with Vigil(place, names, lines, args.host_deadline_s):
      initialize(place, args.host_deadline_s)
    _watch = _Watch(place, names, args.host_deadline_s, _open_log(root, place.index))
    try:
      with _in_one_line(args.workdir):
        yield
    except BaseException as error:
      _watch.failed(error)
      raise
    _watch.close()


@contextlib.contextmanager
def _in_one_line(path: str) -> Iterator[None]:
  """What a disk refuses in the block, as a UserError; of the checkpoints train/checkpoint.py says it itself."""
  try:
    yield
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
      raise
    raise UserError(f'--workdir={path}: {error.strerror} ({error.filename or "while a log was written"}); the same '
                    'command goes on from the last checkpoint') from error


def note_step(step: int) -> None:
  """Says that this process has got to a step."""
  if _watch:
    _watch.note(step)


def _facts(config: ConfigDict, path: str) -> dict[str, Any]:
  """What has to be the same in all processes, by the name that a person would give it."""
  c = section(DataConfig, config.data, 'data')
  digest = lambda file: hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.exists() else 'missing'
  return {
    'code': workdir.code_version(), 'jax': jax.__version__, '--workdir': path,
    **{f'config.{key}': value for key, value in flatten(json.loads(to_json(config))).items()},
    'tokenizer': digest(epath.Path(c.tokenizer_path)),
    **{f'data manifest of {name}': digest(prepared.folder(c, name) / 'manifest.json') for name in c.sources},
  }


def _open_log(root: epath.Path, index: int) -> IO[str]:
  """The process's own log, DIR/hosts/INDEX.log; what is printed where the workdir is a bucket."""
  if '://' in str(root):
    return sys.stderr
  (root / 'hosts').mkdir(parents=True, exist_ok=True)
  return open(root / 'hosts' / f'{index}.log', 'a', buffering=1, encoding='utf-8')  # open as long as the process


class _Alone:
  """Watches over a job of one process: one that hangs, on a disk or a data source, isn't to hang for ever."""

  def __init__(self):
    self._step, self._moved, self._closed = 0, time.monotonic(), threading.Event()

  def __enter__(self):
    threading.Thread(target=self._run, name='watch', daemon=True).start()
    return self

  def __exit__(self, *_):
    self._closed.set()

  def note(self, step: int) -> None:
    self._step, self._moved = step, time.monotonic()

  def _run(self) -> None:
    while not self._closed.wait(1.0):
      if self._step and (still := time.monotonic() - self._moved) > STALL_S:
        faulthandler.dump_traceback(file=sys.stderr)
        print(f'error: no step for {still:.0f} s, since step {self._step}; where it hangs is above, and the same '
              'command goes on from the last checkpoint', file=sys.stderr, flush=True)
        os._exit(LOST)


class _Watch:
  """Signs of life: this process's, and what becomes of the others'."""

  def __init__(self, place: Place, names: list[str], deadline_s: float, log: IO[str]):
    from jax._src import distributed  # the key-value store of the job; it has no public name
    self._client = distributed.global_state.client
    self._place, self._names, self._deadline_s, self._log = place, names, deadline_s, log
    self._every_s = min(2.0, deadline_s / 5)
    self._state = {'beat': 0, 'step': 0, 'ended': ''}
    self._seen = {i: ({}, time.monotonic()) for i in range(place.processes) if i != place.index}  # i: (last, when)
    self._moved = time.monotonic()  # when this process got to its step
    self._ending = threading.Lock()
    self._closed = threading.Event()
    self._say(f'{names[place.index]} starts; coordinator {place.coordinator}')
    faulthandler.register(signal.SIGUSR1, file=log)  # kill -USR1 PID shows where a process is
    faulthandler.dump_traceback_later(HANG_S, repeat=True, file=log)
    self._abort = _on_abort(self._aborted)
    threading.Thread(target=self._run, name='watch', daemon=True).start()

  def _say(self, text: str) -> None:
    print(time.strftime('%Y-%m-%d %H:%M:%S'), text, file=self._log, flush=True)

  def note(self, step: int) -> None:
    self._state['step'], self._moved = step, time.monotonic()
    faulthandler.dump_traceback_later(HANG_S, repeat=True, file=self._log)

  def close(self) -> None:
    """At the end of the block: nobody has to wait for this process any more."""
    self._state['ended'] = 'well'
    with contextlib.suppress(Exception):
      self._beat()
    self._closed.set()
    faulthandler.cancel_dump_traceback_later()
    self._say('ends')

  def failed(self, error: BaseException) -> None:
    """Tells the others why this process ends, and ends it; names the process that is to blame, if it is another one."""
    # A collective fails where another process is gone, and may raise a ValueError, as those of settings are.
    of_a_device = bool(_STATUS.match(str(error)))
    mine = isinstance(error, UserError | ValueError) and not of_a_device
    if not mine and not isinstance(error, SystemExit | KeyboardInterrupt):
      time.sleep(self._deadline_s + 3 * self._every_s)  # the watch will know which, by the deadline
    if not mine:
      traceback.print_exception(error)
    self._end(f'{error}' if str(error) else type(error).__name__, 2 if mine else 1, stacks=False)

  def _run(self) -> None:
    while not self._closed.wait(self._every_s):
      try:
        self._beat()
        self._look()
      except Exception as error:  # the store can't be reached: JAX's client notices too, and aborts
        self._say(f'key-value store: {str(error).splitlines()[0]}')

  def _beat(self) -> None:
    self._state['beat'] += 1
    self._client.key_value_set(f'{_BEAT}{self._place.index}', json.dumps(self._state), allow_overwrite=True)

  def _look(self) -> None:
    now = time.monotonic()
    for key, value in self._client.key_value_dir_get(_BEAT):
      index, state = int(key.rpartition('/')[2]), json.loads(value)
      if index in self._seen and state != self._seen[index][0]:
        self._seen[index] = state, now
    for index, (state, when) in self._seen.items():
      ended = state.get('ended', '')
      if ended and ended != 'well':
        self._end(f'{self._names[index]} ended: {ended}', LOST)
      if not ended and now - when > self._deadline_s:
        self._end(f'{self._names[index]} has given no sign of life for {now - when:.0f} s, since step '
                  f'{state.get("step", 0)}; the same command goes on from the last checkpoint', LOST)
    if self._state['step'] and now - self._moved > STALL_S:
      last = min(self._seen, key=lambda i: self._seen[i][0].get('step', 0))
      self._end(f'no step for {now - self._moved:.0f} s; {self._names[last]} is furthest behind, at step '
                f'{self._seen[last][0].get("step", 0)}, this one at {self._state["step"]}', LOST)

  def _end(self, text: str, code: int, stacks: bool = True) -> None:
    """The line, for the person and the log, and the end of this process; of process 0 last, it holds the store."""
    if not self._ending.acquire(blocking=False):
      time.sleep(3600)  # another thread is at it
    line = f'error: {text}'
    print(line, file=sys.stderr, flush=True)
    self._say(line)
    if stacks:
      faulthandler.dump_traceback(file=self._log)
    self._state['ended'] = text
    with contextlib.suppress(Exception):
      self._beat()
    if self._place.index == 0:
      time.sleep(3 * self._every_s)
    os._exit(code)

  def _aborted(self) -> None:
    host, _, port = self._place.coordinator.rpartition(':')
    try:
      socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
      line = 'error: JAX ended this process; its reason is above'
    except OSError:
      line = (f'error: {self._names[0]}, which holds the job together, is gone, this process was at step '
              f'{self._state["step"]}; the same command goes on from the last checkpoint')
    print(line, file=sys.stderr, flush=True)
    self._say(line)
    faulthandler.dump_traceback(file=self._log)
    os._exit(LOST)


def _on_abort(act):
  """Calls `act` when this process calls abort(), which no handler of Python's own sees: JAX aborts from C++ threads."""
  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: act())
  libc = ctypes.CDLL(None)
  libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, type(handler)], ctypes.c_void_p
  libc.signal(signal.SIGABRT, handler)
  return handler  # to be kept: the process calls it
