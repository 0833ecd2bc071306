"""Grades answers as right, wrong or undecided, for RL and for evaluation.

    with Verifier(VerifierConfig()) as verifier:
      verdicts = verifier.verify([(text, task), ...])

The final answer is extracted from the text (answers.py), and compared with the reference by rules (comparison.py).
Plain numbers are compared in this process. All other answers go to worker processes, which are killed at a deadline and
replaced. Text written by a model is parsed only in workers, and never evaluated. Programs run in a jail (code_jail.py).
"""

import collections
import dataclasses
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from betarank.tasks.answers import ANSWER_FORMATS, Question, final_answer
from betarank.tasks.code_jail import Jail, JailError
from betarank.tasks.judging import numerals
from betarank.tasks.judging.comparison import Verdict, judge, why_unreadable
from betarank.tasks.worker_pool import VerifierConfig, VerifierError, WorkerPool

__all__ = ['Grade', 'Task', 'Verdict', 'Verifier', 'VerifierConfig', 'VerifierError']

VERIFIERS = ('exact', 'math', 'reasoning_gym', 'code', 'reward')


class Task(Question, Protocol):
  """The fields of a task that the verifier uses. Task in tasks/records.py has these and others."""

  reference: str
  verifier: str  # one of VERIFIERS
  # `entry` depends on the verifier. reasoning_gym: (name, options, record) as a Python literal. code: the code that
  # runs before the answer. reward: FILE.py:FUNCTION or MODULE:FUNCTION.


@dataclasses.dataclass(frozen=True)
class Grade:
  """A verdict, and how it was reached.

  Attributes:
    verdict: right, wrong or undecided.
    reward: 1.0 if right, 0.0 if wrong, NaN if undecided. With a user's reward function, it is the function's result.
    answer: the final answer that was extracted from the text; None if there is none.
    rule: a phrase that names the rule that decided, such as 'equal numbers, exactly'.
    gold_reading, answer_reading: how the reference and the answer were understood, for mathematical answers, such as
      'number 1/2'; '' for others.
  """

  verdict: Verdict
  reward: float
  answer: str | None = None
  rule: str = ''
  gold_reading: str = ''
  answer_reading: str = ''


_LOST = {
  'timeouts': 'no verdict before the deadline', 'crashes': 'the process that judged it ended',
  'refused': 'the process that judged it touched the system',
}


class Verifier:
  """Grades answers. It can be called from several threads, but processes one call at a time.

  Attributes:
    counts: a Counter of what happened since the verifier was created. If several equal items of one call fail, they
      count as one failure. The keys are:
        right, wrong, undecided: answers with this verdict.
        plain, worker, jail: answers that were graded in this process, in a worker, in a jail.
        restarts: workers that were restarted.
        timeouts: items that took too long.
        crashes: items during which the worker died.
        refused: items that tried to touch the system.
        unread: items that are undecided because their reference can't be read.
        errors: items for which a library or a reward function failed.
    why_undecided: the reason of the first undecided verdict, one line; '' if there was none.
  """

  def __init__(self, config: VerifierConfig, jail: Jail | None = None):
    """Creates the verifier. Workers are started when they are first needed.

    jail: runs answers that are programs. If it is None, `grade` raises ValueError for tasks with such answers.
    """
    self._c, self._lock = config, threading.Lock()
    self._pool = WorkerPool(config)
    self._jail = jail
    self._threads = ThreadPoolExecutor(jail.workers) if jail else None
    self.counts: collections.Counter[str] = collections.Counter()
    self.why_undecided = ''

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self) -> None:
    """Ends the workers. If `verify` or `grade` is called later, new workers are started."""
    with self._lock:
      self._pool.close()

  def verify(self, items: Sequence[tuple[str, Task]]) -> list[Verdict]:
    """Returns the verdict on each (sampled text, task), in order. The rules are those of `grade`."""
    return [grade.verdict for grade in self.grade(items)]

  def grade(self, items: Sequence[tuple[str, Task]]) -> list[Grade]:
    """Returns the grade of each (sampled text, task), in order.

    The verdict is wrong if the text has no answer in the task's format, if the answer is too long, or if it isn't equal
    to the reference. For a program, only the tests decide. With a user's reward function, only that function decides.

    The verdict is undecided if the reference can't be read, or if the worker reached the deadline or died, or if a
    program reached the deadline of its jail. If a worker was killed from outside, another worker grades the answer once
    more. A grade doesn't depend on the other items. Equal items are graded once.

    Raises:
      VerifierError: workers can't be started.
      ValueError: a task's verifier or answer_format is unknown, or its answers are programs and there is no jail.
    """
    grades: list[Grade | None] = []
    requests: dict[tuple[str, ...], list[int]] = {}
    programs: dict[str, list[int]] = {}
    for i, (text, task) in enumerate(items):
      self._check(task)
      answer = final_answer(text, task)
      grade = self._grade_here(answer, task)
      grades.append(grade)
      if grade is not None:
        self.counts['plain'] += 1
      elif task.verifier == 'code':
        programs.setdefault(f'{task.entry}{answer}\n{task.reference}', []).append(i)
      else:
        rest = (text, task.question) if task.verifier == 'reward' else ('', '')
        requests.setdefault((task.verifier, answer or '', task.reference, task.entry, *rest), []).append(i)
    answers = {places[0]: final_answer(*items[places[0]]) for places in [*requests.values(), *programs.values()]}
    for places, grade in [*zip(requests.values(), self._by_workers(list(requests))),
                          *zip(programs.values(), self._in_jail(list(programs)))]:
      for i in places:
        grades[i] = dataclasses.replace(grade, answer=answers[places[0]])
    self.counts['worker'] += sum(map(len, requests.values()))
    self.counts['jail'] += sum(map(len, programs.values()))
    self.counts.update(grade.verdict.name.lower() for grade in grades)
    undecided = (grade.rule for grade in grades if grade.verdict == Verdict.UNDECIDED)
    self.why_undecided = self.why_undecided or next(undecided, '')
    return grades

  def unreadable(self, references: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Finds the mathematical references that can't be read, and so can't be compared.

    Returns (unreadable, unknown), two dictionaries {reference: reason}. It is unknown whether a reference can be read
    if the worker that read it reached the deadline or died. The next time, it may be read.

    Most references are read in this process, which is safe because no model has written them. If only math-verify may
    be able to read a reference, a worker reads it.
    """
    found, unknown = {text: _why_unreadable(text) for text in dict.fromkeys(references)}, {}
    asked = [text for text, why in found.items() if why is None]
    if asked:
      with self._lock:
        replies = self._pool.ask(['math'] * len(asked), [{'reference': text, 'answer': None} for text in asked])
      unknown = {text: _LOST[reply] for text, reply in zip(asked, replies) if isinstance(reply, str)}
      found |= {text: reply['rule'] for text, reply in zip(asked, replies) if text not in unknown}
    return {text: why for text, why in found.items() if why}, unknown

  def _check(self, task: Task) -> None:
    if task.verifier not in VERIFIERS or task.answer_format not in (*ANSWER_FORMATS, 'code'):
      raise ValueError(f'verifier or answer_format unknown: {task.verifier!r}, {task.answer_format!r}')
    if task.verifier == 'code' and self._jail is None:
      raise ValueError('answers that are programs need a jail')

  def _grade_here(self, answer: str | None, task: Task) -> Grade | None:
    """Returns the grade if this process can decide, else None.

    This process can decide if there is no answer, if the answer is too long, or if comparing texts or plain numbers is
    enough. It never decides for answers that are programs, or if the user has a reward function.
    """
    if task.verifier in ('code', 'reward'):
      return None
    if answer is None:
      return _graded(Verdict.WRONG, answer, 'there is no final answer in the format that was asked for')
    if len(answer) > max(self._c.answer_chars, len(task.reference)):
      return _graded(Verdict.WRONG, answer[:self._c.answer_chars], 'the final answer is too long')
    if task.verifier == 'exact' or (task.verifier == 'reasoning_gym' and answer == task.reference.strip()):
      same = answer == task.reference.strip()
      return _graded(Verdict.RIGHT if same else Verdict.WRONG, answer, 'the same text' if same else 'another text')
    if task.verifier == 'math' and numerals.plain(answer) == numerals.plain(task.reference) and (
        _why_unreadable(task.reference) == ''):
      return _graded(Verdict.RIGHT, answer, 'the same text')
    if task.verifier == 'math' and numerals.is_numeral(answer) and numerals.is_numeral(task.reference):
      judged = judge(task.reference, answer)
      if judged.verdict != Verdict.UNDECIDED:
        return _graded(judged.verdict, answer, judged.rule, judged.gold, judged.answer)
    return None

  def _by_workers(self, requests: list[tuple[str, ...]]) -> list[Grade]:
    if not requests:
      return []
    kinds = [f'reward {entry}' if kind == 'reward' else kind for kind, _, _, entry, *_ in requests]
    names = ('verifier', 'answer', 'reference', 'entry', 'text', 'question')
    with self._lock:
      before = self._pool.counts.copy()
      replies = self._pool.ask(kinds, [dict(zip(names, request)) for request in requests])
      self.counts.update(self._pool.counts - before)
    return [self._grade_of(reply) for reply in replies]

  def _grade_of(self, reply: dict | str) -> Grade:
    if isinstance(reply, str):
      return _graded(Verdict.UNDECIDED, None, _LOST[reply])
    if 'why' in reply:
      self.counts[reply['why']] += 1
    verdict = Verdict(reply['verdict'])
    grade = _graded(verdict, None, reply.get('rule', ''), reply.get('gold', ''), reply.get('given', ''))
    return dataclasses.replace(grade, reward=reply['reward']) if 'reward' in reply else grade

  def _in_jail(self, programs: list[str]) -> list[Grade]:
    grades = list(self._threads.map(self._run, programs)) if programs else []
    self.counts['timeouts'] += sum(grade.rule == _LOST['timeouts'] for grade in grades)
    return grades

  def _run(self, program: str) -> Grade:
    try:
      outcome = self._jail.run(program)
    except JailError as error:  # the jail has worked before, so the machine is too busy or short of a resource
      return _graded(Verdict.UNDECIDED, None, str(error))
    if outcome.passed is None:
      return _graded(Verdict.UNDECIDED, None, _LOST['timeouts'])
    verdict = Verdict.RIGHT if outcome.passed else Verdict.WRONG
    return _graded(verdict, None, 'the tests pass' if outcome.passed else f'a test fails: {outcome.why}')


def _needs_math_verify(gold: str, answer: str) -> bool | None:
  raise LookupError('only a worker has math-verify')


def _why_unreadable(reference: str) -> str | None:
  """Returns the reason why no answer can be compared with a reference; '' if the reference can be read.

  Returns None if only math-verify can tell.
  """
  try:
    return why_unreadable(reference, _needs_math_verify)
  except LookupError:
    return None


def _graded(verdict: Verdict, answer: str | None, rule: str, gold: str = '', given: str = '') -> Grade:
  reward = math.nan if verdict == Verdict.UNDECIDED else float(verdict == Verdict.RIGHT)
  return Grade(verdict, reward, answer, rule, gold, given)
