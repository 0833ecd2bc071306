"""What RL and evaluation ask of the model: prompts with their references, by index, in a fixed order.

    reasoning:TASK?OPTION=VALUE+TASK   made-up problems, as in pre-training (data/reasoning.py); endless
    jsonl:GLOB                   GSM8K (question, answer ending in '#### N'), MATH (problem, solution, answer),
                                 AIME and AMC (problem, answer), OlympiadBench (question, final_answer of one
                                 entry): told apart by their fields; .gz too
    tfds:NAME[/CONFIG][:SPLIT]   the same fields in a TFDS data set

Questions are split by a hash of their text, so that one that comes up twice, in another stream or file, stays
on its side. Errors are DataErrors of one line, naming the file and the line in it.
"""

import ast
import dataclasses
import functools
import gzip
import io
import itertools
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from betarank.data import formats, packing, reasoning, record_formats
from betarank.data.config import DataError
from betarank.data.reasoning import question_hash
from betarank.tasks.verifiers import ANSWER_FORMATS, extract_answer

SPLITS = ('train', 'held_out', 'all')
_MOST_BYTES = 2**30  # of a packed file, unpacked: it is held in memory
_MISSED = 1e-12  # chance that an endless set finds no question of its split for an index
_UNFIT = {'game_of_life_halting': 'its scorer calls any text right'}


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """Where prompts come from and how they and their answers are written."""

  uri: str  # see above
  prompt: str = reasoning.PROMPT  # {question} is replaced; nothing else in it has a meaning
  answer_format: str = 'line'  # line: 'Answer: X' on a line of its own; boxed: \boxed{X}
  held_out_fraction: float = 0.02  # of the questions, by a hash of their text: never in 'train'

  def __post_init__(self):
    if self.uri.partition(':')[0] not in ('reasoning', 'jsonl', 'tfds') or not self.uri.partition(':')[2]:
      raise ValueError(f'uri must be reasoning:TASK, jsonl:GLOB or tfds:NAME, got {self.uri!r}')
    if self.prompt.count('{question}') != 1:
      raise ValueError(f'prompt must hold {{question}} once, got {self.prompt!r}')
    if self.prompt != self.prompt.rstrip(' '):  # tokenizers glue a space to the word after it
      raise ValueError(f'prompt must not end in a space, got {self.prompt!r}')
    if self.answer_format not in ANSWER_FORMATS:
      raise ValueError(f'answer_format must be {" or ".join(ANSWER_FORMATS)}, got {self.answer_format!r}')
    if not 0 <= self.held_out_fraction <= 1:
      raise ValueError(f'held_out_fraction must be in [0, 1], got {self.held_out_fraction}')


@dataclasses.dataclass(frozen=True)
class Task:
  """A prompt, and what its verifier needs."""

  id: str  # the same question of the same source has the same one in any split, order or run
  question: str
  prompt: str
  reference: str  # the right answer, or one of them; empty if there is only a scorer
  verifier: str  # exact | math | reasoning_gym
  answer_format: str
  answer_lines: int = 1  # how many lines an answer takes; 0: all that are left
  entry: str = ''  # reasoning_gym: (name, options, record) as a Python literal, which a worker reads safely


class TaskSet:
  """The tasks of one split of a source. `tasks[i]` and `tasks.at(cursor)` are pure functions.

  Attributes:
    size: number of tasks; None if there is no end of them.
  """

  def __init__(
    self, config: TaskConfig, *, seed: int = 0, split: str = 'train', exclude: frozenset[int] = frozenset(),
  ):
    """
    Args:
      seed: of the order and, in an endless 'train' split, of the problems. Held-out tasks don't depend on it.
      split: 'train', 'held_out', or 'all' for a benchmark that is only evaluated on.
      exclude: hashes of questions to leave out, `hashes()` of the sets to be evaluated on.

    Raises:
      DataError: a source that can't be read, or whose split is empty.
    """
    if split not in SPLITS:
      raise ValueError(f'split must be one of {", ".join(SPLITS)}, got {split!r}')
    self.config, self.seed, self.split, self._exclude = config, seed, split, exclude
    kind, _, rest = config.uri.partition(':')
    if kind == 'reasoning':
      self.size, self._source = None, _Generated(rest, 'rl/held_out' if split == 'held_out' else f'rl/{seed}')
      share = {'train': 1 - config.held_out_fraction, 'held_out': config.held_out_fraction, 'all': 1.0}[split]
      if share < 1e-3:
        raise DataError(f'{config.uri}: held_out_fraction={config.held_out_fraction} leaves too little to {split!r}')
      share = min(share, 0.98 if exclude else 1)  # what else is left out is assumed to be rare
      self._tries = 1 if share == 1 else math.ceil(math.log(_MISSED) / math.log(1 - share))
      return
    found = list(_from_tfds(rest) if kind == 'tfds' else itertools.starmap(_fields, read_jsonl(rest)))
    self._kept = [fields for fields in found if self._belongs(fields['question'])]
    self.size = len(self._kept)
    if not self._kept:
      raise DataError(f'{config.uri}: none of its {len(found)} questions is in the {split!r} split '
                      f'(held_out_fraction={config.held_out_fraction}, {len(exclude)} excluded)')

  def __len__(self) -> int:
    if self.size is None:
      raise TypeError(f'{self.config.uri} has no end')
    return self.size

  def __getitem__(self, index: int) -> Task:
    """Task `index` >= 0 of the set, in the source's own order. Raises IndexError after the last."""
    if index < 0 or (self.size is not None and index >= self.size):
      raise IndexError(f'{self.config.uri}: no task {index}, there are {self.size}')
    fields = self._kept[index] if self.size is not None else self._generate(index)
    prompt = self.config.prompt.replace('{question}', fields['question'])
    return Task(prompt=prompt, answer_format=self.config.answer_format, **fields)

  def at(self, cursor: int) -> Task:
    """The task of prompt number `cursor` of a run: each epoch has every task once, in another order.

    A run's whole state is the number of prompts that it has consumed.
    """
    if self.size is None:
      return self[cursor]
    epoch, index = divmod(cursor, self.size)
    return self[int(packing.permute(np.array([index]), self.size, f'tasks/{self.seed}/{epoch}')[0])]

  def hashes(self, count: int = 0) -> frozenset[int]:
    """question_hash of the first `count` tasks (0: all, if they end), for another set's `exclude`."""
    return frozenset(question_hash(self[i].question) for i in range(count or len(self)))

  def _belongs(self, question: str) -> bool:
    held_out = reasoning.held_out(question, self.config.held_out_fraction)
    return question_hash(question) not in self._exclude and (
      self.split == 'all' or held_out == (self.split == 'held_out'))

  def _generate(self, index: int) -> dict[str, Any]:
    for attempt in range(self._tries):  # an index has its own candidates, so that no other need be looked at
      fields = self._source.fields(index, attempt, self._tries)
      if self._belongs(fields['question']):
        return fields
    raise DataError(f'{self.config.uri}: {self._tries} problems in a row are not in the {self.split!r} split; '
                    'the task has too few different ones for this held_out_fraction')


# Records of files


def read_jsonl(pattern: str) -> Iterator[tuple[Any, str]]:
  """(record, 'FILE:LINE') of each line that isn't empty. Raises DataError where one isn't JSON."""
  for path in formats.find(pattern):
    content = epath.Path(path).read_bytes()
    try:
      if path.endswith('.gz'):
        with gzip.open(io.BytesIO(content)) as file:
          content = file.read(_MOST_BYTES)
        if len(content) == _MOST_BYTES:
          raise OSError(f'it unpacks to {_MOST_BYTES} bytes or more')
      lines = content.decode().split('\n')
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
      raise DataError(f'{path}: can\'t be read ({error}); fetch it again') from None
    for number, line in enumerate(lines, 1):
      if line.strip():
        try:
          record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also for a number of thousands of digits
          raise DataError(f'{path}:{number}: not JSON ({error}); mend or remove the line') from None
        yield record, f'{path}:{number}'


def _from_tfds(spec: str) -> Iterator[dict[str, Any]]:
  records = record_formats._tfds(spec)
  for i in range(len(records)):
    values = {name: value.item() if hasattr(value, 'item') else value for name, value in records[i].items()}
    record = {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
    yield _fields(record, f'tfds:{spec}, record {i}')


def _fields(record: Any, where: str) -> dict[str, Any]:
  """The fields of a Task from a record of one of the known forms."""
  if not isinstance(record, Mapping):
    raise DataError(f'{where}: expected an object, got {type(record).__name__}')
  question = record.get('problem', record.get('question'))
  answer, solution = record.get('answer'), record.get('solution')
  if not isinstance(question, str) or not question.strip():
    raise DataError(f"{where}: no text in 'problem' or 'question', only {', '.join(sorted(record))}")
  final = record.get('final_answer')
  if answer is None and isinstance(final, list) and len(final) == 1:  # OlympiadBench
    answer = final[0]
  if isinstance(answer, float) and answer.is_integer():  # AMC: 27.0
    answer = int(answer)
  if isinstance(answer, str) and '####' in answer:  # GSM8K: worked steps, then the number
    reference = answer.rsplit('####', 1)[1].strip().replace(',', '')
  elif answer is None and isinstance(solution, str):  # MATH as published
    reference = extract_answer(solution, 'boxed') or ''
  else:
    reference = '' if answer is None or isinstance(answer, bool | list | dict) else str(answer).strip()
  if not reference or '\n' in reference:
    raise DataError(f"{where}: no final answer; 'answer' must hold it, alone or after '####', or, if there is "
                    "no 'answer', 'solution' must box it")
  question = question.strip()
  key = f'{question_hash(question):016x}'
  return {'id': key, 'question': question, 'reference': reference, 'verifier': 'math'}


# Generated problems


class _Generated:
  """reasoning-gym's problems, by index."""

  def __init__(self, rest: str, stream: str):
    self._kinds, self._stream = reasoning.parse(rest), stream
    for i, kind in enumerate(self._kinds):
      if kind.task in _UNFIT:
        raise DataError(f'reasoning:{rest}: task {kind.task!r} is not for RL: {_UNFIT[kind.task]}')
      self.fields(i, 0, 1)

  def fields(self, index: int, attempt: int, attempts: int) -> dict[str, Any]:
    """Candidate `attempt` of `attempts` for task `index`, which stays with its kind of task."""
    kind, turn = self._kinds[index % len(self._kinds)], index // len(self._kinds)
    entry = reasoning.problem((kind,), turn * attempts + attempt, stream=self._stream).entry
    reference = '' if entry['answer'] is None else str(entry['answer']).strip()
    question = entry['question'].strip()
    scored = not _is_exact(kind.task) or not reference
    return {
      'id': f'{kind.task}/{question_hash(question):016x}', 'question': question, 'reference': reference,
      'verifier': 'reasoning_gym' if scored else 'exact',
      'entry': _literal((kind.task, kind.options, entry), f'reasoning:{kind.task}') if scored else '',
      'answer_lines': reference.count('\n') + 1 if reference else 0,
    }


@functools.cache
def _is_exact(task: str) -> bool:
  """Whether the task's scorer gives 1 to nothing but the answer itself, so that no worker is needed."""
  from reasoning_gym.dataset import ProceduralDataset
  from reasoning_gym.factory import DATASETS

  return DATASETS[task][0].score_answer is ProceduralDataset.score_answer


def _literal(value: Any, uri: str) -> str:
  """`value` as a Python literal. Raises DataError if there is none that equals it."""
  text = repr(value)
  try:
    if ast.literal_eval(text) == value:
      return text
  except (ValueError, SyntaxError):
    pass
  raise DataError(f'{uri}: its records hold objects that can\'t be handed to a verifier; choose another task')
