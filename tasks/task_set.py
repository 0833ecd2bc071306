"""Provides the prompts of RL and evaluation with their references, as tasks that are numbered in a fixed order.

    reasoning:TASK?OPTION=VALUE+TASK   an unlimited number of generated problems, as in data/reasoning.py
    jsonl:GLOB                         files of problems with final answers, in one of the forms of records.py
    tfds:NAME[/CONFIG][:SPLIT]         the same fields in a TFDS data set
    code:GLOB                          programming problems in the form of HumanEval or MBPP (code_problems.py)

A hash of a question's text decides which split the question is in. A question that occurs in several streams or files
is therefore always in the same split. A record is left out and counted if it has no final answer, or if its reference
can't be read. If reading a reference takes too long, that is an error, so that time doesn't decide which problems there
are. All errors are DataErrors of one line. For a record, this line names the file and the record's line.
"""

import ast
import dataclasses
import functools
import hashlib
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from betarank.data import packing, reasoning
from betarank.data.config import DataError
from betarank.data.files import find
from betarank.data.reasoning import question_hash
from betarank.tasks import code_problems, records
from betarank.tasks.answers import ANSWER_FORMATS
from betarank.tasks.records import LeftOut, OddRecord, Task, read_jsonl
from betarank.tasks.verifiers import Verdict, Verifier, VerifierConfig

_READING_S = 20.0  # the CPU time for reading a reference
SPLITS = ('train', 'held_out', 'all')
_MISS_CHANCE = 1e-12  # the probability that a generated set finds no question of its split for an index
# A generated set tries at least so many candidates for an index. With the probability above, they suffice if all but
# 1.4 % of the questions are excluded.
_CANDIDATES = 2000
_MOST_REPEATED = 200  # after so many questions in a row that aren't new, a generator counts as having no others
_UNFIT = {'game_of_life_halting': 'its scorer calls any text right'}


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  r"""The source of a set of problems, and the form of prompts and answers.

  Attributes:
    uri: the source; see the docstring of this module.
    prompt: the template of a prompt. Only {question} is replaced; other braces in it are ordinary characters.
      Programming problems have their own prompts.
    answer_format: 'line' for 'Answer: X' on its own line, or 'boxed' for \boxed{X}.
    held_out_fraction: the share of questions that are in the split 'held_out' and never in 'train'. A hash of a
      question's text decides.
    reward: FILE.py:FUNCTION or MODULE:FUNCTION, a reward function of the user that replaces the comparison with the
      reference; '' for none. It is called with the keywords text, answer, reference and question; see docs/extend.md.
  """

  uri: str
  prompt: str = reasoning.PROMPT
  answer_format: str = 'line'
  held_out_fraction: float = 0.02
  reward: str = ''

  def __post_init__(self):
    if self.uri.partition(':')[0] not in ('reasoning', 'jsonl', 'tfds', 'code') or not self.uri.partition(':')[2]:
      raise ValueError(f'uri must be reasoning:TASK, jsonl:GLOB, tfds:NAME or code:GLOB, got {self.uri!r}')
    if self.prompt.count('{question}') != 1:
      raise ValueError(f'prompt must hold {{question}} once, got {self.prompt!r}')
    if self.prompt != self.prompt.rstrip(' '):  # tokenizers join a space to the word after it
      raise ValueError(f'prompt must not end in a space, got {self.prompt!r}')
    if self.answer_format not in ANSWER_FORMATS:
      raise ValueError(f'answer_format must be {" or ".join(ANSWER_FORMATS)}, got {self.answer_format!r}')
    if not 0 <= self.held_out_fraction <= 1:
      raise ValueError(f'held_out_fraction must be in [0, 1], got {self.held_out_fraction}')
    place, _, function = self.reward.rpartition(':')
    if self.reward and not (place and function.isidentifier()):
      raise ValueError(f'reward must be FILE.py:FUNCTION or MODULE:FUNCTION, got {self.reward!r}')
    if self.reward and self.uri.startswith('code:'):
      raise ValueError(f'reward must be empty for {self.uri}, because tests judge programs, got {self.reward!r}')

  @property
  def reward_file(self) -> str:
    """The path of the file with the reward function; '' if there is no such function, or if it is in a module."""
    place = self.reward.rpartition(':')[0]
    return place if place.endswith('.py') else ''


class TaskSet:
  """The tasks of one split of a source. `tasks[i]` and `tasks.at(cursor)` are pure functions.

  Attributes:
    size: the number of tasks; None if the source is unlimited.
    left_out: the records that can't be used. Some aren't problems, for example because they have no final answer; these
      are in the list of every split. The others are problems of this split whose reference can't be read.
    records: size plus the number of records in left_out; 0 if the source is unlimited.
    sha256: SHA-256 of all questions and references, in the order of the source; '' if the source is unlimited.
    kept_sha256: SHA-256 of the questions and references of this set's own tasks, in order. If the source is unlimited,
      it is that of the hashes in `exclude` that would be in this split. With the config and the seed, they decide which
      tasks there are.
    reward_sha256: SHA-256 of the file with the user's reward function; '' if there is no such file.
  """

  def __init__(
    self, config: TaskConfig, *, seed: int = 0, split: str = 'train', exclude: frozenset[int] = frozenset(),
    verifier: VerifierConfig | None = None,
  ):
    """Reads the files or the data set, and keeps the tasks of one split.

    Args:
      config: the source and the formats.
      seed: decides the order in which `at` returns tasks. If problems are generated, it also decides which ones are in
        split 'train'. The other splits, which are for evaluation, have the same problems for every seed.
      split: 'train', 'held_out', or 'all' for a benchmark that is used for evaluation only.
      exclude: hashes (`question_hash` in data/reasoning.py) of questions to leave out, for example those of evaluation.
      verifier: the limits of the reward function, which is called once; None for the defaults.

    Raises:
      DataError: the source can't be read, the split is empty, the reward function fails or reaches a limit, or it can't
        be found out whether a reference can be read.
      VerifierError: the processes that read references, or that call the reward function, can't be started.
    """
    if split not in SPLITS:
      raise ValueError(f'split must be one of {", ".join(SPLITS)}, got {split!r}')
    self.config, self.seed, self.split, self._exclude = config, seed, split, exclude
    self.left_out: list[LeftOut] = []
    self.records, self.sha256 = 0, ''
    # Only questions that would be in this split count: evaluating on more held-out problems changes nothing here.
    self.kept_sha256 = _sha256(sorted(number for number in exclude if self._in_split(number)))
    kind, _, rest = config.uri.partition(':')
    if kind == 'reasoning':
      self._open_generator(rest)
    else:
      self._read(kind, rest)
    self.reward_sha256 = ''
    if config.reward:
      self._try_reward(verifier or VerifierConfig())
    if config.reward_file:
      self.reward_sha256 = hashlib.sha256(pathlib.Path(config.reward_file).read_bytes()).hexdigest()

  def __len__(self) -> int:
    if self.size is None:
      raise TypeError(f'{self.config.uri} has no end')
    return self.size

  def __getitem__(self, index: int) -> Task:
    """Returns task number `index` >= 0, in the order of the source. Raises IndexError after the last task."""
    if index < 0 or (self.size is not None and index >= self.size):
      raise IndexError(f'{self.config.uri}: no task {index}, there are {self.size}')
    return self._kept[index] if self.size is not None else self._generate(index)

  def describe_left_out(self, shown: int = 5) -> str:
    """Returns one line that says how many problems are left out, and lists the first `shown` of them.

    Returns '' if no problem is left out.
    """
    return records.describe(self.left_out, self.records, shown)

  def at(self, cursor: int) -> Task:
    """Returns the task for prompt number `cursor` of a run. In each epoch, every task occurs once, in a new order.

    To resume, a run needs only the number of prompts that it has used so far.
    """
    return self[self.index(cursor)]

  def distinct(self, count: int) -> list[Task]:
    """Returns the first `count` tasks with different questions, or as many as there are.

    Of equal questions, the first task is returned. Generated problems repeat, so a generator of few problems may have
    fewer than `count`. The search ends after 200 repeated questions in a row, and may miss rare questions.
    """
    found: dict[int, Task] = {}
    repeated = 0
    for task in self:
      is_new = found.setdefault(question_hash(task.question), task) is task
      repeated = 0 if is_new else repeated + 1
      if len(found) == count or (self.size is None and repeated == _MOST_REPEATED):
        break
    return list(found.values())

  def index(self, cursor: int) -> int:
    """Returns the index of the task for prompt number `cursor` of a run."""
    if self.size is None:
      return cursor
    epoch, place = divmod(cursor, self.size)
    return int(packing.permute(np.array([place]), self.size, f'tasks/{self.seed}/{epoch}')[0])

  def _belongs(self, question: str) -> bool:
    number = question_hash(question)
    return number not in self._exclude and self._in_split(number)

  def _in_split(self, number: int) -> bool:
    held_out = reasoning.hash_held_out(number, self.config.held_out_fraction)
    return self.split == 'all' or held_out == (self.split == 'held_out')

  def _open_generator(self, rest: str) -> None:
    """Prepares to generate tasks, and generates one of each kind as a test.

    rest: the part of the URI after 'reasoning:'.
    """
    fraction = self.config.held_out_fraction
    share = {'train': 1 - fraction, 'held_out': fraction, 'all': 1.0}[self.split]
    if share < 1e-3:
      raise DataError(f'{self.config.uri}: held_out_fraction={fraction} leaves too little to {self.split!r}')
    share = min(share, 0.98 if self._exclude else 1)  # several candidates, because some may be excluded
    self._tries = 1 if share == 1 else math.ceil(math.log(_MISS_CHANCE) / math.log(1 - share))
    # Problems of evaluation must not be the first ones of training, because training leaves them out.
    stream = {'held_out': 'rl/held_out', 'all': 'rl/all'}.get(self.split, f'rl/{self.seed}')
    self.size, self._source = None, _Generated(rest, stream)
    for index in range(self._source.kinds):
      self[index]

  def _generate(self, index: int) -> Task:
    count = max(self._tries, _CANDIDATES)
    for attempt in range(count):  # each index has its own candidates, so it doesn't depend on other indices
      problem = self._source.problem(index, attempt, self._tries)
      if self._belongs(problem.question):
        return self._task(**self._source.fields(index, problem))
    left_out = f', or are among the {len(self._exclude)} to leave out because they are evaluated on'
    raise DataError(f'{self.config.uri}: {count} problems of {problem.task} in a row are not in the {self.split!r} '
                    f'split (held_out_fraction={self.config.held_out_fraction}){left_out if self._exclude else ""}; '
                    'it has too few different ones')

  def _task(self, question: str, **fields: Any) -> Task:
    if self.config.reward:
      fields |= {'verifier': 'reward', 'entry': self.config.reward}
    prompt = self.config.prompt.replace('{question}', question)
    return Task(question=question, prompt=prompt, answer_format=self.config.answer_format, **fields)

  def _read(self, kind: str, rest: str) -> None:
    """Reads the tasks of this split.

    kind, rest: the parts of the URI before and after the first colon.
    """
    found = self._from_code(rest) if kind == 'code' else self._from_records(kind, rest)
    self.sha256 = digest([task for task, _ in found])
    kept = [(task, where) for task, where in found if self._belongs(task.question)]
    self.records = len(kept) + len(self.left_out)
    self._kept = self._readable(kept)
    self.size = len(self._kept)
    self.kept_sha256 = digest(self._kept)
    if not self._kept:
      raise DataError(f'{self.config.uri}: none of its {len(found)} questions is in the {self.split!r} split '
                      f'(held_out_fraction={self.config.held_out_fraction}, {len(self._exclude)} excluded, '
                      f'{len(self.left_out)} left out)')

  def _from_records(self, kind: str, rest: str) -> list[tuple[Task, str]]:
    """Returns (task, place) for each record that is a problem. Adds the other records to left_out.

    The place of a record is a text for messages, such as 'FILE:LINE'.

    kind, rest: the parts of the URI before and after the first colon.

    Raises:
      DataError: none of the records is a problem.
    """
    found = []
    for record, where in records.read_tfds(rest) if kind == 'tfds' else read_jsonl(rest):
      try:
        problem = records.problem(record, where, needs_answer=not self.config.reward)
      except OddRecord as error:
        self.left_out.append(LeftOut(where, str(error).removeprefix(f'{where}: ')))
        continue
      found.append((self._task(problem.question, id=problem.id, reference=problem.reference, verifier='math'), where))
    if not found and self.left_out:
      raise DataError(f'{self.left_out[0]}; so it is with all {len(self.left_out)} records of {self.config.uri}')
    return found

  def _from_code(self, rest: str) -> list[tuple[Task, str]]:
    return [(task, f'{rest}, task {task.id}') for task in code_problems.read(rest)]

  def _readable(self, kept: list[tuple[Task, str]]) -> list[Task]:
    """Returns the tasks whose reference can be read, and adds the other tasks to left_out.

    kept: (task, place of its record, such as 'FILE:LINE') for each task of this split.

    Raises:
      DataError: the worker that read a reference reached the deadline or died.
    """
    references = [task.reference for task, _ in kept if task.verifier == 'math']
    with Verifier(VerifierConfig(deadline_s=_READING_S)) as verifier:
      whys, unknown = verifier.unreadable(references)
    if unknown:
      reference, why = next(iter(unknown.items()))
      first, *others = [where for task, where in kept if task.verifier == 'math' and task.reference in unknown]
      raise DataError(f"{first}: can't find out whether its answer {reference!r} can be read ({why})" + (
        f', nor that of {", ".join(others[:5])}' if others else '') + (
          '; try again, or remove the record (a run that has begun with it then needs another workdir)'))
    readable = []
    for task, where in kept:
      if task.verifier == 'math' and task.reference in whys:
        self.left_out.append(LeftOut(where, f"its answer {task.reference!r} can't be read ({whys[task.reference]})"))
      else:
        readable.append(task)
    return readable

  def _try_reward(self, limits: VerifierConfig) -> None:
    """Calls the user's reward function once, with the first task. The answer is the task's reference, or 'x' if it has
    none.

    Raises:
      DataError: the reward function fails, reaches a limit, or does what worker processes may not do.
    """
    task = self[0]
    form = '\\boxed{{{}}}' if self.config.answer_format == 'boxed' else f'{reasoning.ANSWER_MARK}{{}}'
    with Verifier(limits) as verifier:
      [grade] = verifier.grade([(form.format(task.reference or 'x'), task)])
    if grade.verdict == Verdict.UNDECIDED:
      raise DataError(f'reward {self.config.reward}: {grade.rule}, when called with the first reference')


# Generated problems


class _Generated:
  """Generates the problems of reasoning-gym.

  Each problem is a pure function of the stream, the task's index and the number of the attempt (see `problem`). The
  stream is a name; problems of different streams have different random seeds.
  """

  def __init__(self, rest: str, stream: str):
    self._kinds, self._stream = reasoning.parse(rest), stream
    for kind in self._kinds:
      if kind.task in _UNFIT:
        raise DataError(f'reasoning:{rest}: task {kind.task!r} is not for RL: {_UNFIT[kind.task]}')

  @property
  def kinds(self) -> int:
    """The number of kinds of problems, which take turns."""
    return len(self._kinds)

  def problem(self, index: int, attempt: int, attempts: int) -> reasoning.Problem:
    """Returns candidate number `attempt` for task number `index`.

    The kind of problem (the reasoning-gym task) depends only on the index. There are several candidates, because the
    first ones may belong to another split. The caller takes the first candidate that is in its own split.

    attempts: the number of candidates for each task in the stream. Further candidates come from further streams.
    """
    kind, turn = self._kinds[index % len(self._kinds)], index // len(self._kinds)
    further, attempt = divmod(attempt, attempts)
    stream = f'{self._stream}/{further}' if further else self._stream
    return reasoning.problem((kind,), turn * attempts + attempt, stream=stream)

  def fields(self, index: int, problem: reasoning.Problem) -> dict[str, Any]:
    """Returns the fields of Task number `index` that don't come from the config, as {name: value}.

    problem: the candidate that was taken for this task.
    """
    kind, entry = self._kinds[index % len(self._kinds)], problem.entry
    reference = '' if entry['answer'] is None else str(entry['answer']).strip()
    scored = not _is_exact(kind.task) or not reference
    return {
      'id': f'{kind.task}/{question_hash(problem.question):016x}', 'question': problem.question,
      'reference': reference, 'verifier': 'reasoning_gym' if scored else 'exact',
      'entry': _literal((kind.task, kind.options, entry), f'reasoning:{kind.task}') if scored else '',
      'answer_lines': reference.count('\n') + 1 if reference else 0,
    }


@functools.cache
def _is_exact(task: str) -> bool:
  """Returns True if the scorer of this reasoning-gym task gives the score 1 only to the reference itself.

  Answers to such a task are then compared as texts, without a worker process.
  """
  from reasoning_gym.dataset import ProceduralDataset
  from reasoning_gym.factory import DATASETS

  return DATASETS[task][0].score_answer is ProceduralDataset.score_answer


def files(uri: str) -> list[str]:
  """Returns the paths of the files that `uri` names, in order; [] for generated problems and TFDS sets."""
  kind, _, pattern = uri.partition(':')
  return find(pattern) if kind in ('jsonl', 'code') else []


def digest(tasks: Iterable[Task]) -> str:
  """Returns SHA-256 of the questions and references of `tasks`, in order."""
  return _sha256([(task.question, task.reference) for task in tasks])


def _sha256(values: list[Any]) -> str:
  return hashlib.sha256(repr(values).encode(errors='backslashreplace')).hexdigest()


def _literal(value: Any, uri: str) -> str:
  """Returns `value` as the text of a Python literal.

  uri: the source, for the error message.

  Raises:
    DataError: `value` can't be written as a literal.
  """
  text = repr(value)
  try:
    if ast.literal_eval(text) == value:
      return text
  except (ValueError, SyntaxError):
    pass
  raise DataError(f'{uri}: its records hold objects that can\'t be handed to a verifier; choose another task')
