"""Is an answer right? One verifier for RL and evaluation alike: right, wrong, or undecided.

    with Verifier(VerifierConfig()) as verifier:
      verdicts = verifier.verify([(text, task), ...])

A final answer is cut out of the text and compared. What plain comparison settles (the same text, or numbers
compared exactly) is settled here; the rest goes to worker processes, which are killed at a deadline and then
replaced. Model text is parsed in workers only and evaluated nowhere, see `verifier_worker.py`.
"""

import collections
import contextlib
import dataclasses
import enum
import json
import math
import os
import pathlib
import re
import secrets
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

from betarank.configs.errors import UserError
from betarank.data.reasoning import ANSWER_MARK

_START_S = 120.0  # imports take one to three seconds; a machine under load or a network disk takes longer
_MOST_FAILED_STARTS = 3  # in a row
_WORKER = pathlib.Path(__file__).with_name('verifier_worker.py')


class Verdict(enum.IntEnum):
  """What a verifier says. Undecided is never counted as wrong: such samples are left out, and counted."""

  UNDECIDED = -1
  WRONG = 0
  RIGHT = 1


class VerifierError(UserError):
  """Worker processes can't be started: one line that says why."""


class Task(Protocol):
  """What a verifier needs to know of a task; rl/tasks.py has the whole of it."""

  reference: str
  verifier: str  # exact | math | reasoning_gym
  answer_format: str  # line | boxed
  answer_lines: int  # of an answer in 'line' format; 0: all there are
  entry: str  # reasoning_gym: (name, options, record) as a Python literal


# Where the final answer is


_BOX = re.compile(r'\\(?:boxed|framebox|fbox)\s*')
ANSWER_FORMATS = ('line', 'boxed')


def extract_answer(text: str, answer_format: str, lines: int = 1) -> str | None:
  r"""The final answer in `text`, stripped; None if there is none.

  line: the `lines` lines (0: all) after the first '\nAnswer: '. The first, because a model that doesn't stop
  goes on to answer questions of its own. boxed: the content of the last \boxed{...} with balanced braces, as
  the graders of MATH have it.
  """
  if answer_format == 'line':
    _, mark, rest = text.partition(ANSWER_MARK)
    answer = '\n'.join(rest.split('\n')[:lines or None]).strip()
    return answer if mark and answer else None
  for match in reversed(list(_BOX.finditer(text))[-8:]):
    if (answer := _balanced(text, match.end())) is not None:
      return answer.strip() or None
  return None


def _balanced(text: str, start: int) -> str | None:
  if text[start:start + 1] != '{':
    return text[start:start + 1] or None  # \boxed 5
  depth = 0
  for i in range(start, len(text)):
    if text[i] in '{}' and text[i - 1] != '\\':
      depth += 1 if text[i] == '{' else -1
      if not depth:
        return text[start + 1:i]
  return None


# What needs no parser


_WRAPPED = (
  ('$$', '$$'), ('$', '$'), (r'\(', r'\)'), (r'\[', r'\]'), ('**', '**'),
  *((rf'\{name}{{', '}') for name in ('boxed', 'text', 'textbf', 'mathrm', 'mathbf')),
)
_PLAIN_NUMBER = re.compile(r'([+-]?)(?:([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)?(\.[0-9]+)?|'
                           r'([0-9]+)/([0-9]+)|\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\})')
_MOST_DIGITS = 100
_MOST_PLAIN = 1000
_CLEARLY_APART = Fraction(1, 1000)


def plain(text: str) -> str:
  """`text` without what surrounds an answer: math delimiters, one closing full stop, runs of spaces."""
  text = ' '.join(text.split())
  while len(text) <= _MOST_PLAIN:
    inner = text.removesuffix('.').strip()
    for left, right in _WRAPPED:
      inside = inner[len(left):len(inner) - len(right)]
      if not (inside and inner.startswith(left) and inner.endswith(right)):
        continue
      if _balanced(inner, len(left) - 1) == inside if left[-1] == '{' else left not in inside:
        inner = inside.strip()
        break
    if inner == text:
      break
    text = inner
  return text


def number(text: str) -> Fraction | None:
  """The exact value of an integer, decimal or fraction in digits; None for all else, and for long ones."""
  text = text.replace(r'\!', '').replace('{,}', ',').removeprefix(r'\$').removeprefix('$').strip()
  if text.startswith('(') and text.endswith(')'):
    text = text[1:-1]
  match = _PLAIN_NUMBER.fullmatch(text) if 0 < len(text) <= _MOST_DIGITS else None
  if match is None or not any(match.groups()[1:]):
    return None
  sign, whole, decimals, *ratios = match.groups()
  top, bottom = next(((a, b) for a, b in zip(ratios[::2], ratios[1::2]) if a), (None, None))
  if bottom is not None and not int(bottom):
    return None
  decimal = (whole or '0').replace(',', '') + (decimals or '')
  value = Fraction(int(top), int(bottom)) if top else Fraction(decimal)
  return -value if sign == '-' else value


def _compare_plainly(answer: str, task: Task) -> Verdict | None:
  """A verdict where text or exact numbers settle it; None where the worker has to be asked."""
  if task.verifier == 'exact':
    return Verdict.RIGHT if answer == task.reference.strip() else Verdict.WRONG
  if task.reference and answer == task.reference.strip():
    return Verdict.RIGHT
  if task.verifier != 'math':
    return None
  given, wanted = plain(answer), plain(task.reference)
  if given and given == wanted:
    return Verdict.RIGHT
  a, b = number(given), number(wanted)
  if a is None or b is None:
    return None
  if a == b:
    return Verdict.RIGHT
  # Between the two lies rounding, 0.333 for 1/3, which is the library's to judge.
  return Verdict.WRONG if abs(a - b) > _CLEARLY_APART * max(1, abs(b)) else None


# Worker processes


@dataclasses.dataclass(frozen=True)
class VerifierConfig:
  """How many workers there are, and what one item may cost them."""

  workers: int = 2  # processes of a kind (math, reasoning_gym); started when first needed
  deadline_s: float = 5.0  # wall time of one item; then its worker is killed and the verdict is undecided
  memory_mb: int = 2048  # address space of a worker
  answer_chars: int = 10_000  # a longer final answer is wrong

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
  """A process that answers one JSON line with another; `busy` is what it is at work on, if anything."""

  def __init__(self, kind: str, c: VerifierConfig):
    keep = ('PATH', 'HOME', 'LANG', 'LD_LIBRARY_PATH', 'PYTHONPATH', 'VIRTUAL_ENV')  # and no credentials
    self.process = subprocess.Popen(
      # -P: the folder of the script isn't on the path; -B: nothing is written
      [sys.executable, '-P', '-B', str(_WORKER), kind, str(c.memory_mb), str(math.ceil(2 * c.deadline_s))],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
      env={**{key: os.environ[key] for key in keep if key in os.environ}, 'OPENBLAS_NUM_THREADS': '1'})
    self.kind, self.busy, self.ready = kind, None, False
    self._token = ''
    self.deadline = time.monotonic() + _START_S
    self._buffer = b''

  def send(self, item: int, request: dict[str, str], deadline_s: float) -> None:
    self.busy, self.deadline, self._token = item, time.monotonic() + deadline_s, secrets.token_hex(8)
    with contextlib.suppress(BrokenPipeError):  # it has died: reading will say so
      self.process.stdin.write(json.dumps({**request, 'token': self._token}).encode() + b'\n')
      self.process.stdin.flush()

  def read(self) -> dict[str, str] | None:
    """A message, {} while it is incomplete, None if the worker has ended or this is no answer of its own."""
    chunk = os.read(self.process.stdout.fileno(), 2**16)
    self._buffer += chunk
    if b'\n' not in self._buffer:
      return {} if chunk else None
    line, self._buffer = self._buffer.split(b'\n', 1)
    try:
      message = json.loads(line)
    except ValueError:
      return None
    # A verdict carries the token of its own request, so that what one item may have left here decides no other.
    expected = self._token if self.busy is not None else ''
    return message if isinstance(message, dict) and message.get('token', '') == expected else None

  def kill(self) -> int:
    """Ends the process; returns its exit status."""
    self.process.kill()
    status = self.process.wait()
    self.process.stdout.close()
    with contextlib.suppress(BrokenPipeError):
      self.process.stdin.close()
    return status


class Verifier:
  """Verdicts on answers. Can be used from several threads; one call at a time does its work.

  Attributes:
    counts: Counter over the verifier's life: right, wrong, undecided; plain, worker (who decided); restarts
      of workers; and of distinct items: timeouts, crashes, refused (it touched the system), unparsed (a bad
      reference), stumbles (a library's error over an answer: wrong).
  """

  def __init__(self, config: VerifierConfig):
    self._c, self._lock = config, threading.Lock()
    self._workers: dict[str, list[_Worker]] = {}
    self._failed_starts = 0
    self._asked_again: set[int] = set()
    self.counts: collections.Counter[str] = collections.Counter()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def verify(self, items: Sequence[tuple[str, Task]]) -> list[Verdict]:
    """A verdict on each (sampled text, task), in order.

    Wrong: no final answer in the task's format, too long a one, or one that differs from the reference.
    Undecided: the worker ran past the deadline, or died (killed from outside: twice), or can't read the reference. A
    verdict doesn't depend on what else is in the list; equal items are decided once.

    Raises:
      VerifierError: workers don't start.
      ValueError: a task's verifier or answer_format is unknown.
    """
    verdicts: list[Verdict | None] = []
    requests: dict[tuple[str, ...], list[int]] = {}
    for i, (text, task) in enumerate(items):
      if task.verifier not in ('exact', 'math', 'reasoning_gym') or task.answer_format not in ANSWER_FORMATS:
        raise ValueError(f'verifier or answer_format unknown: {task.verifier!r}, {task.answer_format!r}')
      answer = extract_answer(text, task.answer_format, task.answer_lines)
      missing = answer is None or len(answer) > max(self._c.answer_chars, len(task.reference))
      verdicts.append(Verdict.WRONG if missing else _compare_plainly(answer, task))
      self.counts['plain' if verdicts[-1] is not None else 'worker'] += 1
      if verdicts[-1] is None:
        requests.setdefault((task.verifier, answer, task.reference, task.entry), []).append(i)
    if requests:
      with self._lock:
        decided = self._ask([dict(zip(('kind', 'answer', 'reference', 'entry'), key)) for key in requests])
      for places, verdict in zip(requests.values(), decided):
        for i in places:
          verdicts[i] = verdict
    self.counts.update(verdict.name.lower() for verdict in verdicts)
    return verdicts

  def close(self) -> None:
    """Ends the workers; a later `verify` starts new ones."""
    with self._lock:
      self._kill_all()

  def _kill_all(self) -> None:
    for workers in self._workers.values():
      for worker in workers:
        worker.kill()
    self._workers.clear()

  def _ask(self, requests: list[dict[str, str]]) -> list[Verdict]:
    verdicts: list[Verdict | None] = [None] * len(requests)
    pending = {kind: collections.deque() for kind in ('math', 'reasoning_gym')}
    self._asked_again = set()
    for i, request in enumerate(requests):
      pending[request['kind']].append(i)
    try:
      with selectors.DefaultSelector() as selector:
        for kind, queue in pending.items():
          workers = self._workers.setdefault(kind, [])
          while len(workers) < min(self._c.workers, len(queue)):
            workers.append(_Worker(kind, self._c))
          for worker in workers if queue else ():
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        while None in verdicts:
          for key in list(selector.get_map().values()):
            worker = key.data
            if worker.ready and worker.busy is None and pending[worker.kind]:
              if worker.process.poll() is not None:  # between calls, by another's hand
                self._replace(selector, worker, verdicts, 'crashes')
                continue
              i = pending[worker.kind].popleft()
              worker.send(i, requests[i], self._c.deadline_s)
          self._wait(selector, verdicts, pending)
    except BaseException:  # leave no worker at work on an item of a call that has ended
      self._kill_all()
      raise
    return verdicts

  def _wait(self, selector: selectors.BaseSelector, verdicts: list[Verdict | None],
            pending: dict[str, collections.deque]) -> None:
    """Takes in what workers say, until the first deadline at the latest, and replaces those that are lost."""
    workers = [key.data for key in selector.get_map().values()]
    working = [worker for worker in workers if worker.busy is not None or not worker.ready]
    patience = min(worker.deadline for worker in working) - time.monotonic()
    heard = {key.data for key, _ in selector.select(max(0.0, patience))}
    for worker in working:
      if worker in heard:
        message = worker.read()
        if message is None:
          self._replace(selector, worker, verdicts, 'crashes', pending)
        elif 'ready' in message:
          worker.ready, self._failed_starts = True, 0
        elif 'error' in message:
          raise VerifierError(f'verifier worker {worker.kind!r}: {message["error"]}')
        elif 'verdict' in message:
          verdicts[worker.busy], worker.busy = Verdict(message['verdict']), None
          if 'why' in message:
            self.counts[message['why']] += 1
      elif time.monotonic() > worker.deadline:
        self._replace(selector, worker, verdicts, 'timeouts')

  def _replace(self, selector, worker: _Worker, verdicts: list[Verdict | None], why: str,
               pending: dict[str, collections.deque] | None = None) -> None:
    selector.unregister(worker.process.stdout)
    killed = False
    if why == 'crashes':
      with contextlib.suppress(subprocess.TimeoutExpired):
        killed = worker.process.wait(1.0) == -signal.SIGKILL  # its own status, before ours
    status = worker.kill()
    if worker.busy is not None and killed and worker.busy not in self._asked_again:
      # By the system, short of memory, or by somebody: the item needn't be to blame, and is asked about once more.
      self._asked_again.add(worker.busy)
      pending[worker.kind].appendleft(worker.busy)
    elif worker.busy is not None:
      verdicts[worker.busy] = Verdict.UNDECIDED
      self.counts['refused' if status == 86 else why] += 1
    elif not worker.ready:
      self._failed_starts += 1
      if self._failed_starts >= _MOST_FAILED_STARTS:
        raise VerifierError(f'verifier worker {worker.kind!r} ended {self._failed_starts} times at its start '
                            f'(status {status}); is memory_mb={self._c.memory_mb} too little?')
    self.counts['restarts'] += 1
    workers = self._workers[worker.kind]
    workers[workers.index(worker)] = new = _Worker(worker.kind, self._c)
    selector.register(new.process.stdout, selectors.EVENT_READ, new)
