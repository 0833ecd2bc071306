"""Manages the processes that grade answers. They are started when needed, limited in time and memory, and replaced if
they die.

A request and its reply are one JSON line each. verifier_worker.py is the code of such a process.
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from betarank.configs.errors import UserError

_START_S = 120.0  # imports take one to three seconds, and longer on a busy machine or a network disk
_MAX_FAILED_STARTS = 3  # after so many failed starts in a row, the pool gives up
_WALL_FACTOR = 6  # the wall time that an item may take, relative to the deadline, which is CPU time. Time in which the
# process could have run, but had no CPU, isn't counted.
_WORKER = pathlib.Path(__file__).with_name('verifier_worker.py')
REFUSED = 86  # exit status of a worker whose item touched the system


class VerifierError(UserError):
  """Raised if worker processes can't be started. The message is one line that says why."""


@dataclasses.dataclass(frozen=True)
class VerifierConfig:
  """The number of workers, and the limits on one item (one answer to grade).

  Attributes:
    workers: the number of processes of each kind (math, reasoning_gym, a reward function).
    deadline_s: the CPU seconds that one item may take. After that, the worker is killed and the verdict is undecided.
      CPU time is limited rather than wall time, so that a busy machine doesn't change verdicts. Wall time is limited to
      6 * deadline_s, not counting the time in which the worker waits for a CPU.
    memory_mb: the largest address space of a worker, in MB.
    answer_chars: the largest length of a final answer, in characters; a longer answer is wrong.
  """

  workers: int = 2
  deadline_s: float = 5.0
  memory_mb: int = 2048
  answer_chars: int = 10_000

  def __post_init__(self):
    if self.workers < 1:
      raise ValueError(f'workers must be positive, got {self.workers}')
    if not 0 < self.deadline_s < math.inf:
      raise ValueError(f'deadline_s must be positive, got {self.deadline_s}')
    if self.memory_mb < 512:
      raise ValueError(f'memory_mb must be 512 or more, got {self.memory_mb}')
    if self.answer_chars < 1:
      raise ValueError(f'answer_chars must be positive, got {self.answer_chars}')


class _Worker:
  """A process that reads requests and writes replies, one JSON line each.

  busy: the index of the request that the process works on, or None.
  first: the index of the request that this process must get before any other, or None.
  """

  def __init__(self, kind: str, c: VerifierConfig):
    keep = ('PATH', 'HOME', 'LANG', 'LD_LIBRARY_PATH', 'VIRTUAL_ENV')  # no others, which may be credentials
    environment = {key: os.environ[key] for key in keep if key in os.environ}
    self.process = subprocess.Popen(
      # -P: the folder of the script isn't on the path; -B: nothing is written
      [sys.executable, '-P', '-B', str(_WORKER), kind, str(c.memory_mb), str(math.ceil(2 * c.deadline_s))],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
      env={**environment, 'PYTHONPATH': _import_path(), 'OPENBLAS_NUM_THREADS': '1'})
    self.kind, self.busy, self.first, self.ready = kind, None, None, False
    self._token = ''
    self.deadline = time.monotonic() + _START_S
    self._buffer = b''

  def send(self, item: int, request: dict[str, Any], deadline_s: float) -> None:
    self.busy, self._token = item, secrets.token_hex(8)
    now = time.monotonic()
    self.deadline, self._last_moment = now + deadline_s, now + _WALL_FACTOR * deadline_s
    self._cpu_deadline_s = (_cpu_s(self.process.pid) or 0.0) + deadline_s
    self._waited_s = _waited_s(self.process.pid)
    with contextlib.suppress(BrokenPipeError):  # if the worker has died, `read` will notice
      self.process.stdin.write(json.dumps({**request, 'token': self._token}).encode() + b'\n')
      self.process.stdin.flush()

  def extend(self) -> bool:
    """Sets a later deadline if the worker has CPU time and wall time left. Returns whether a later deadline was set.

    Called when the worker's deadline has passed.
    """
    used = _cpu_s(self.process.pid)
    now = time.monotonic()
    last_moment = self._last_moment + _waited_s(self.process.pid) - self._waited_s
    if self.busy is None or used is None or used >= self._cpu_deadline_s or now >= last_moment:
      return False
    self.deadline = min(now + max(self._cpu_deadline_s - used, 0.05), last_moment)
    return True

  def read(self) -> dict[str, Any] | None:
    """Returns the worker's next message; {} if the message isn't complete yet.

    Returns None if the worker has ended, or if its message isn't a reply to the current request.
    """
    chunk = os.read(self.process.stdout.fileno(), 2**16)
    self._buffer += chunk
    if b'\n' not in self._buffer:
      return {} if chunk else None
    line, self._buffer = self._buffer.split(b'\n', 1)
    try:
      message = json.loads(line)
    except ValueError:
      return None
    # A reply must have the token of its request. So if an item leaves output behind, it can't decide the next item.
    expected = self._token if self.busy is not None else ''
    return message if isinstance(message, dict) and message.get('token', '') == expected else None

  def kill(self) -> int:
    """Ends the process, and returns its exit status."""
    self.process.kill()
    status = self.process.wait()
    self.process.stdout.close()
    with contextlib.suppress(BrokenPipeError):
      self.process.stdin.close()
    return status


def _import_path() -> str:
  """Returns the folders from which this package is imported, for a process that starts in another folder."""
  folders = [os.path.abspath(folder) for folder in sys.path if os.path.isdir(os.path.join(folder, 'betarank'))]
  return os.pathsep.join(dict.fromkeys([*folders, *filter(None, os.environ.get('PYTHONPATH', '').split(os.pathsep))]))


def _cpu_s(pid: int) -> float | None:
  """Returns the CPU seconds that a process has used; None if the system doesn't report them."""
  try:
    fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
  except OSError:
    return None
  return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def _waited_s(pid: int) -> float:
  """Returns the seconds that a process has waited for a CPU; 0 if the system doesn't report them."""
  try:
    return int(pathlib.Path(f'/proc/{pid}/schedstat').read_text().split()[1]) / 1e9
  except (OSError, IndexError, ValueError):
    return 0.0


class WorkerPool:
  """Worker processes of several kinds. Not thread-safe: a caller with several threads must hold a lock during each
  call.

  Attributes:
    counts: a Counter with the keys 'restarts' (workers that were replaced), and 'timeouts', 'crashes' and 'refused'
      (requests without a reply, because the worker took too long, died, or tried to touch the system).
  """

  def __init__(self, config: VerifierConfig):
    self._c = config
    self._workers: dict[str, list[_Worker]] = {}
    self._failed_starts = 0
    self._asked_again: set[int] = set()
    self.counts: collections.Counter[str] = collections.Counter()

  def close(self) -> None:
    """Ends all workers. If `ask` is called later, new workers are started."""
    for workers in self._workers.values():
      for worker in workers:
        worker.kill()
    self._workers.clear()

  def ask(self, kinds: Sequence[str], requests: Sequence[dict[str, Any]]) -> list[dict[str, Any] | str]:
    """Returns a worker's reply to each request, or the reason why there is none: 'timeouts', 'crashes' or 'refused'.

    The docstring of the class explains the reasons.

    kinds: the kind of worker for each request.

    Raises:
      VerifierError: workers can't be started.
    """
    replies: list[dict[str, Any] | str | None] = [None] * len(requests)
    pending: dict[str, collections.deque[int]] = {}
    self._asked_again = set()
    for i, kind in enumerate(kinds):
      pending.setdefault(kind, collections.deque()).append(i)
    try:
      with selectors.DefaultSelector() as selector:
        for kind, queue in pending.items():
          workers = self._workers.setdefault(kind, [])
          while len(workers) < min(self._c.workers, len(queue)):
            workers.append(_Worker(kind, self._c))
          for worker in workers:
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        while None in replies:
          for key in list(selector.get_map().values()):
            worker = key.data
            if worker.ready and worker.busy is None and (worker.first is not None or pending[worker.kind]):
              if worker.process.poll() is not None:  # it was killed from outside between two calls
                self._replace(selector, worker, replies, 'crashes')
                continue
              i = pending[worker.kind].popleft() if worker.first is None else worker.first
              worker.first = None
              worker.send(i, requests[i], self._c.deadline_s)
          self._wait(selector, replies)
    except BaseException:  # no worker may continue with an item of a call that has ended
      self.close()
      raise
    return replies

  def _wait(self, selector: selectors.BaseSelector, replies: list) -> None:
    """Waits for replies and receives them, at most until the first deadline of a worker.

    Replaces workers that have ended or have passed their deadline. An idle worker that has ended is replaced too:
    otherwise each call would return at once, because its closed pipe can always be read.

    selector: the selector of all workers of this call.
    replies: a list with the reply to each request, or None. New replies are stored in it.
    """
    workers = [key.data for key in selector.get_map().values()]
    working = [worker for worker in workers if worker.busy is not None or not worker.ready]
    patience = min(worker.deadline for worker in working) - time.monotonic()
    heard = {key.data for key, _ in selector.select(max(0.0, patience))}
    for worker in workers:
      if worker in heard:
        message = worker.read() if worker in working else None  # an idle worker has nothing to say
        if message is None:
          self._replace(selector, worker, replies, 'crashes')
        elif 'ready' in message:
          worker.ready, self._failed_starts = True, 0
        elif 'error' in message:
          raise VerifierError(f'verifier worker {worker.kind!r}: {message["error"]}')
        elif message:
          replies[worker.busy], worker.busy = message, None
      elif worker in working and time.monotonic() > worker.deadline and not worker.extend():
        self._replace(selector, worker, replies, 'timeouts')

  def _replace(self, selector, worker: _Worker, replies: list, why: str) -> None:
    selector.unregister(worker.process.stdout)
    killed, first = False, worker.first
    if why == 'crashes':
      with contextlib.suppress(subprocess.TimeoutExpired):
        killed = worker.process.wait(1.0) == -signal.SIGKILL  # its status before we kill it
    status = worker.kill()
    if worker.busy is not None and killed and worker.busy not in self._asked_again:
      # It was killed by the system, for lack of memory, or by a person. The item may not be the cause, so it is tried
      # once more. A new worker gets it, because the others may have been killed at the same time.
      self._asked_again.add(worker.busy)
      first = worker.busy
    elif worker.busy is not None:
      replies[worker.busy] = 'refused' if status == REFUSED else why
      self.counts[replies[worker.busy]] += 1
    elif not worker.ready:
      self._failed_starts += 1
      if self._failed_starts >= _MAX_FAILED_STARTS:
        raise VerifierError(f'verifier worker {worker.kind!r} ended {self._failed_starts} times at its start '
                            f'(status {status}); is memory_mb={self._c.memory_mb} too little?')
    self.counts['restarts'] += 1
    workers = self._workers[worker.kind]
    workers[workers.index(worker)] = new = _Worker(worker.kind, self._c)
    new.first = first
    selector.register(new.process.stdout, selectors.EVENT_READ, new)
