"""Made-up problems with worked solutions, from reasoning-gym's generators: endless, and by index.

Pre-training reads whole documents, RL gives the prompt and grades what follows it; both use this form:

    Question: State the final answer to the following arithmetic problem: 4 - 1 - 7 =
    Solution: 4 - 1 = 3
    3 - 7 = -4
    Answer: -4
"""

import dataclasses
import difflib
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from data.config import DataError

# Ends without a space: a tokenizer glues a space to the word after it, so a prompt must not end in one.
PROMPT = 'Question: {question}\nSolution:'
COMPLETION = ' {solution}\nAnswer: {answer}\n'
ANSWER_MARK = '\nAnswer: '

_BLOCK = 1024  # generators are of fixed size, and some precompute by it: an endless one is a chain of these


@dataclasses.dataclass(frozen=True)
class Problem:
  """A question with its answer; `entry` is the generator's own record, which its verifier wants back."""

  task: str
  question: str
  solution: str  # worked steps; empty for a task that we can't work
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
  a, b = (int(number) for number in entry['metadata']['expression'].split(' * '))
  total, lines = 0, []
  for place, digit in enumerate(reversed(str(b))):
    part = a * int(digit) * 10**place
    lines.append(f'{a} * {int(digit) * 10**place} = {part}')
    if place:
      lines.append(f'{total} + {part} = {total + part}')
    total += part
  return '\n'.join(lines)


def _given(entry: dict[str, Any]) -> str:
  lines = entry['metadata']['answer_cot'].strip().split('\n')
  return '\n'.join(line for line in lines if not line.startswith('####'))  # the answer has its own line


# Task -> the generator's options that make it fit for a small model, and how to work its problems.
_TASKS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], str]]] = {
  'chain_sum': ({'max_terms': 4, 'max_digits': 2}, _running_sum),
  'gcd': ({}, _euclid),
  'products': ({'max_digits': 3}, _long_multiplication),
  'gsm_symbolic': ({}, _given),
}
DEFAULT_TASKS = ('chain_sum', 'gcd', 'products', 'gsm_symbolic')


def check_tasks(tasks: Sequence[str]) -> None:
  """Raises DataError for a task that reasoning-gym doesn't have."""
  import reasoning_gym  # a second to import: only those who make problems pay

  known = sorted(reasoning_gym.factory.DATASETS)
  for task in tasks:
    if task not in known:
      near = difflib.get_close_matches(task, known, n=1)
      raise DataError(f'reasoning:{"+".join(tasks)}: reasoning-gym has no task {task!r}'
                      + (f'; did you mean {near[0]}?' if near else ''))


@functools.lru_cache(maxsize=32)
def _block(task: str, stream: str, number: int):
  import reasoning_gym

  # The generators seed item i with seed + i, so blocks need seeds far apart: a 48-bit hash.
  seed = int.from_bytes(hashlib.blake2b(f'{task}/{stream}/{number}'.encode(), digest_size=6).digest())
  return reasoning_gym.create_dataset(task, seed=seed, size=_BLOCK, **_TASKS.get(task, ({}, None))[0])


def problem(tasks: Sequence[str], index: int, stream: str = 'pretrain') -> Problem:
  """Problem `index` >= 0 of an endless sequence that goes round the tasks; a pure function of its arguments.

  Another `stream` is another sequence, such as RL's, that shares no random seed with this one. Short problems
  of small numbers can still coincide.
  """
  task = tasks[index % len(tasks)]
  block, item = divmod(index // len(tasks), _BLOCK)
  entry = _block(task, stream, block)[item]
  worked = _TASKS[task][1](entry) if task in _TASKS else ''
  return Problem(task, entry['question'].strip(), worked, str(entry['answer']), entry)
