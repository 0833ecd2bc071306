"""Generates problems with worked solutions, using reasoning-gym. Their number is unlimited, and each problem has an
index.

Pre-training reads whole documents. RL gives the model the prompt and grades what the model writes after it.
Pre-training and RL use the same form of a problem, for example:

    Question: State the final answer to the following arithmetic problem: 4 - 1 - 7 =
    Solution: 4 - 1 = 3
    3 - 7 = -4
    Answer: -4

A URI selects the problems, for pre-training and for RL. It names one or more tasks, and the difficulty of each.
Several tasks take turns.

    reasoning:TASK[?OPTION=VALUE&...][+TASK...]        reasoning:chain_sum?max_terms=2&max_digits=1+gcd

An OPTION is an option of the task's generator, or level=N, a level of reasoning-gym's curriculum. If a level is given,
the curriculum sets the options that aren't in the URI. If no level is given, they have the values in TASKS below or,
where TASKS has none, the generator's defaults.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import signal
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from betarank.configs import light_imports
from betarank.data.config import DataError

# A prompt must not end in a space, because a tokenizer joins a space to the word after it.
PROMPT = 'Question: {question}\nSolution:'
COMPLETION = ' {solution}\nAnswer: {answer}\n'
ANSWER_MARK = '\nAnswer: '


@dataclasses.dataclass(frozen=True)
class Problem:
  """A problem and its answer. `entry` is the generator's own record of the problem, which reasoning-gym's scorer needs.
  """

  task: str
  question: str
  solution: str  # the worked steps; empty for a task that isn't in TASKS
  answer: str
  entry: dict[str, Any]

  @property
  def prompt(self) -> str:
    return PROMPT.format(question=self.question)

  @property
  def document(self) -> str:
    text = COMPLETION.format(solution=self.solution, answer=self.answer)
    return self.prompt + (text if self.solution else text[1:])


def _running_sum(entry: dict[str, Any]) -> str:
  first, *rest = entry['metadata']['expression'].split()
  total, lines = int(first), []
  for sign, number in zip(rest[::2], rest[1::2]):
    new = total + int(number) if sign == '+' else total - int(number)
    lines.append(f'{total} {sign} {number} = {new}')
    total = new
  return '\n'.join(lines)


def _euclid(entry: dict[str, Any]) -> str:
  (a, *rest), lines = entry['metadata']['numbers'], []
  for b in rest:
    while b:
      lines.append(f'{a} mod {b} = {a % b}')
      a, b = b, a % b
  return '\n'.join(lines)


def _long_multiplication(entry: dict[str, Any]) -> str:
  (a, *rest), lines = (int(number) for number in entry['metadata']['expression'].split(' * ')), []
  for b in rest:
    total = 0
    for place, digit in enumerate(reversed(str(b))):
      part = a * int(digit) * 10**place
      lines.append(f'{a} * {int(digit) * 10**place} = {part}')
      if place:
        lines.append(f'{total} + {part} = {total + part}')
      total += part
    a = total
  return '\n'.join(lines)


def _given(entry: dict[str, Any]) -> str:
  lines = entry['metadata']['answer_cot'].strip().split('\n')
  return '\n'.join(line for line in lines if not line.startswith('####'))  # the answer has its own line


# Task -> (options of the generator that suit a small model, the function that writes the worked solution).
TASKS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], str]]] = {
  'chain_sum': ({'max_terms': 4, 'max_digits': 2}, _running_sum),
  'gcd': ({}, _euclid),
  'products': ({'max_digits': 3}, _long_multiplication),
  'gsm_symbolic': ({}, _given),
}
_TRIAL_S = 10.0  # a problem takes milliseconds, but an option could ask for a billion terms
_UNFIT = {'codeio': 'it runs stored programs to make its problems', 'composite': 'name its tasks instead'}


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
  """A task of reasoning-gym, with the options of its generator. The options decide how hard the problems are."""

  task: str
  options: dict[str, Any]  # options of the generator that differ from its defaults


def parse(rest: str) -> tuple[Kind, ...]:
  """Returns a Kind for each task that a URI names, in order. Generates one problem of each task as a test.

  rest: the part of the URI after `reasoning:`; '' means all of TASKS.

  Raises:
    DataError: reasoning-gym doesn't have the task or the option, or doesn't accept the option's value.
  """
  return tuple(_kind(*part.partition('?')[::2]) for part in (rest or '+'.join(TASKS)).split('+'))


def _kind(task: str, query: str) -> Kind:
  light_imports.reasoning_gym()
  from reasoning_gym.factory import CURRICULA, DATASETS

  uri = f'reasoning:{task}?{query}' if query else f'reasoning:{task}'
  if task not in DATASETS:
    raise DataError(f'{uri}: reasoning-gym has no task {task!r}{_instead(task, DATASETS)}')
  if task in _UNFIT:
    raise DataError(f'{uri}: task {task!r} can\'t be used: {_UNFIT[task]}')
  config = DATASETS[task][1]()
  defaults = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
              if field.name not in ('seed', 'size')}
  given = {}
  for name, text in urllib.parse.parse_qsl(query, keep_blank_values=True):
    if name != 'level' and name not in defaults:
      raise DataError(f'{uri}: {task} has no option {name!r}{_instead(name, ("level", *defaults))}')
    try:  # words are text; numbers, true/false and lists are parsed as such
      given[name] = json.loads(text)
    except (ValueError, RecursionError):
      given[name] = text
  level = given.pop('level', None)
  try:
    if level is None:
      base = TASKS[task][0] if task in TASKS else {}
    elif task in CURRICULA and isinstance(level, int) and level >= 0:
      curriculum = CURRICULA[task]()
      curriculum.set_global_level(level)
      at_level = curriculum.generate_configuration()
      base = {name: getattr(at_level, name) for name in defaults}
    else:
      raise ValueError('level must be a whole number >= 0, of a task with a curriculum')
    kind = Kind(task, {name: value for name, value in (base | given).items() if value != defaults[name]})
    with _deadline():
      problem((kind,), 0, stream='tried')
  except _TooLongError:
    raise DataError(f'{uri}: no problem within {_TRIAL_S:.0f} seconds; give smaller numbers') from None
  except Exception as error:  # the errors of the generators have no common type
    raise DataError(f'{uri}: {str(error) or "refused by the generator"}') from None
  return kind


class _TooLongError(BaseException):  # not an Exception, because a generator might catch that and retry
  pass


@contextlib.contextmanager
def _deadline():
  """Ends the block with _TooLongError if it takes longer than _TRIAL_S seconds.

  Only the main thread receives signals, so there is no time limit in other threads.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def end(*_):
    raise _TooLongError

  before = signal.signal(signal.SIGALRM, end)
  signal.setitimer(signal.ITIMER_REAL, _TRIAL_S)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def _instead(name: str, known: Sequence[str]) -> str:
  near = difflib.get_close_matches(name, known, n=1)
  return (f'; did you mean {near[0]}?' if near else ';') + f' There are {", ".join(sorted(known))}'


_BLOCK = 1024  # a generator has a fixed number of problems, so an unlimited sequence uses one generator per block


@functools.lru_cache(maxsize=32)
def _block(kind: Kind, stream: str, number: int):
  # A generator seeds item i with seed + i. So the seeds of blocks must be far apart, and are 48-bit hashes.
  seed = int.from_bytes(hashlib.blake2b(f'{kind.task}/{stream}/{number}'.encode(), digest_size=6).digest())
  return light_imports.reasoning_gym().create_dataset(kind.task, seed=seed, size=_BLOCK, **kind.options)


def problem(kinds: Sequence[Kind], index: int, stream: str = 'pretrain') -> Problem:
  """Returns problem number `index` >= 0 of an unlimited sequence in which the kinds take turns.

  The same arguments always give the same problem.

  stream: the name of the sequence. Sequences with different names, such as those of pre-training and RL, use different
    random seeds. A short problem with small numbers may still occur in two sequences. To separate questions strictly,
    use `held_out`.
  """
  kind = kinds[index % len(kinds)]
  block, item = divmod(index // len(kinds), _BLOCK)
  entry = _block(kind, stream, block)[item]
  worked = TASKS[kind.task][1](entry) if kind.task in TASKS else ''
  return Problem(kind.task, entry['question'].strip(), worked, str(entry['answer']), entry)


def question_hash(question: str) -> int:
  """Returns a 64-bit hash of a question. Questions that differ only in white space and case have the same hash."""
  return int.from_bytes(hashlib.blake2b(' '.join(question.lower().split()).encode(), digest_size=8).digest())


def held_out(question: str, fraction: float) -> bool:
  """Returns True if this question is held out. A hash of the question decides.

  fraction: the share of all questions that are held out. A larger fraction holds out the same questions and more.
  """
  return hash_held_out(question_hash(question), fraction)


def hash_held_out(number: int, fraction: float) -> bool:
  """Returns what `held_out` returns, for the question with this `question_hash`."""
  return number < fraction * 2**64
