"""Reads problems from files and TFDS data sets. Records that can't be used are left out and reported.

jsonl:GLOB reads .jsonl and .jsonl.gz files with the fields of one of these data sets:

    GSM8K            question, answer ending in '#### N'
    MATH             problem, solution, answer
    AIME, AMC        problem, answer
    OlympiadBench    question, final_answer
    Minerva          problem, solution

tfds:NAME reads a TFDS data set with the same fields.
"""

import contextlib
import dataclasses
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from betarank.data import formats, record_formats
from betarank.data.config import DataError
from betarank.data.fields import text_of
from betarank.data.reasoning import question_hash
from betarank.tasks.answers import last_boxed

_FIELDS = ('problem', 'question', 'answer', 'solution', 'final_answer')  # those that `problem` reads
_MAX_BYTES = 2**30  # the largest size of a compressed file's content, which is held in memory


class OddRecord(DataError):
  """Raised for a record that isn't a problem with a final answer. The message is one line that begins with the place of
  the record, such as 'FILE:LINE'.
  """


@dataclasses.dataclass(frozen=True)
class Task:
  """A prompt, and what a verifier needs to judge an answer to it."""

  id: str  # depends only on the question and its source, not on split, order or run
  question: str
  prompt: str
  reference: str  # the right answer, or one of several; empty if only a scorer can tell
  verifier: str  # exact | math | reasoning_gym | code | reward
  answer_format: str  # line | boxed | code
  answer_lines: int = 1  # the number of lines of an answer; 0: all remaining lines
  # What else the verifier needs. reasoning_gym: (name, options, record) as a Python literal, which a worker parses
  # safely. code: the code that runs before the answer. reward: FILE.py:FUNCTION or MODULE:FUNCTION.
  entry: str = ''


@dataclasses.dataclass(frozen=True)
class Problem:
  """The question of a record, and its answer.

  reference: the final answer; '' if the record has none.
  where: the place of the record, such as 'FILE:LINE'.
  """

  question: str
  reference: str
  where: str

  @property
  def id(self) -> str:
    return f'{question_hash(self.question):016x}'


@dataclasses.dataclass(frozen=True)
class LeftOut:
  """A record that isn't used.

  where: the place of the record, such as 'FILE:LINE'.
  why: the reason why it can't be used.
  """

  where: str
  why: str

  def __str__(self) -> str:
    return f'{self.where}: {self.why}'


def describe(left_out: list[LeftOut], total: int, shown: int = 5) -> str:
  """Returns one line that says how many of `total` problems are left out, and lists the first `shown` of them.

  Returns '' if no problem is left out.
  """
  if not left_out:
    return ''
  more = f'; and {len(left_out) - shown} more' if len(left_out) > shown else ''
  return f'{len(left_out)} of {total} problems left out: {"; ".join(map(str, left_out[:shown]))}{more}'


def read_jsonl(pattern: str) -> Iterator[tuple[Any, str]]:
  """Yields (record, 'FILE:LINE') for each line that isn't empty. Raises DataError if a line isn't JSON."""
  for path in formats.find(pattern):
    content = epath.Path(path).read_bytes()
    try:
      if path.endswith('.gz'):
        with gzip.open(io.BytesIO(content)) as file:
          content = file.read(_MAX_BYTES)
        if len(content) == _MAX_BYTES:
          raise OSError(f'it unpacks to {_MAX_BYTES} bytes or more')
      lines = content.decode().split('\n')
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
      raise DataError(f'{path}: can\'t be read ({error}); fetch it again') from None
    for number, line in enumerate(lines, 1):
      if line.strip():
        try:
          record = json.loads(line)
          if '\\ud' in line.lower():  # perhaps half of a surrogate pair, which becomes U+FFFD, as in documents
            record = json.loads(text_of(json.dumps(record, ensure_ascii=False), 'line'))
        except (ValueError, RecursionError) as error:  # a number with thousands of digits raises ValueError too
          raise DataError(f'{path}:{number}: not JSON ({error}); correct or remove the line') from None
        yield record, f'{path}:{number}'


def read_tfds(spec: str) -> Iterator[tuple[Any, str]]:
  """Yields (record, 'tfds:SPEC, record INDEX') for each record of a TFDS data set.

  The fields of a problem have the values that they would have in JSON. Other fields aren't converted.
  """
  records = record_formats._tfds(spec)
  for i in range(len(records)):
    record = {name: _plain(value) if name in _FIELDS else value for name, value in records[i].items()}
    yield record, f'tfds:{spec}, record {i}'


def _plain(value: Any) -> Any:
  """Returns a value of NumPy as Python's own, with bytes as text. Bytes that aren't UTF-8 stay bytes."""
  if hasattr(value, 'tolist'):
    value = value.tolist()
  if isinstance(value, list):
    return [_plain(part) for part in value]
  if isinstance(value, bytes):
    with contextlib.suppress(UnicodeDecodeError):
      return value.decode()
  return value


def problem(record: Any, where: str, needs_answer: bool = True) -> Problem:
  """Returns the problem of a record. The record must have one of the forms in this module's docstring.

  Raises:
    OddRecord: there is no question, or `needs_answer` is True and there is no final answer on one line.
  """
  if not isinstance(record, Mapping):
    raise OddRecord(f'{where}: expected an object, got {type(record).__name__}')
  question = record.get('problem', record.get('question'))
  if not isinstance(question, str) or not question.strip():
    raise OddRecord(f"{where}: no text in 'problem' or 'question', only {', '.join(sorted(record))}")
  reference = _reference(record)
  if needs_answer and (not reference or '\n' in reference):
    raise OddRecord(f"{where}: no final answer; 'answer' must hold it on one line, alone or after '####', or, if there "
                    "is no 'answer', 'solution' must box it")
  return Problem(question.strip(), reference, where)


def _reference(record: Mapping) -> str:
  answer, solution, final = record.get('answer'), record.get('solution'), record.get('final_answer')
  if answer is None and isinstance(final, list) and final and all(isinstance(part, str) for part in final):
    answer = ', '.join(final)  # OlympiadBench
  if isinstance(answer, float) and answer.is_integer():  # AMC: 27.0
    answer = int(answer)
  if isinstance(answer, str) and '####' in answer:  # GSM8K: worked steps, '####', the number
    return answer.rsplit('####', 1)[1].strip().replace(',', '')
  if answer is None and isinstance(solution, str):  # MATH as published
    return last_boxed(solution) or ''
  return str(answer).strip() if isinstance(answer, str | int | float) and not isinstance(answer, bool) else ''
