"""Reads programming problems: their prompts, and the code that tests an answer.

Files are jsonl or jsonl.gz, in two forms that are distinguished by their fields. HumanEval and HumanEval+ have
`prompt`, `test` and `entry_point`; the model continues the function that the prompt begins. MBPP has `text` or
`prompt`, `test_list`, `code`, and `test_setup_code` or `test_imports`; MBPP+ also has a whole script in `test`. The
prompt of MBPP and MBPP+ consists of the task and the tests, worded as in the paper (arXiv 2108.07732). The answer is a
program between [BEGIN] and [DONE].
"""

from collections.abc import Mapping
from typing import Any

from betarank.data.config import DataError
from betarank.tasks.answers import CODE_END
from betarank.tasks.records import Task, read_jsonl

_MBPP_ASKED = range(11, 511)  # the task_ids of the test split in a file with all of MBPP; 1 to 10 are for examples
_MBPP_SHOWN = (2, 3, 4)  # the examples in its paper
_MBPP_SIZE = 974
_PROMPT = ('You are an expert Python programmer, and here is your task: {} Your code should pass these tests:\n\n'
           '{}\n[BEGIN]\n')


def read(pattern: str, shots: int = 0, examples: str = '') -> list[Task]:
  """Returns the problems of the files, in order. Problems that are used as worked examples are left out.

  In each Task, `reference` holds the code that runs after the answer (the tests), and `entry` the code that runs before
  the answer (the beginning of the function in HumanEval, nothing in MBPP).

  Args:
    pattern: the path or glob of the files.
    shots: the number of worked examples before each problem.
    examples: the file that has the worked examples.

  Raises:
    DataError: there are no problems, too few examples, or a record can't be used. For a record, the message has the
      file and the line number.
  """
  records = list(read_jsonl(pattern))
  if len(records) == _MBPP_SIZE:
    records = [(r, where) for r, where in records if isinstance(r, Mapping) and r.get('task_id') in _MBPP_ASKED]
  shown, before = set(), ''
  if shots:
    found = {r.get('task_id'): (r, where) for r, where in read_jsonl(examples) if isinstance(r, Mapping)}
    order = [*(i for i in _MBPP_SHOWN if i in found), *(i for i in found if i not in _MBPP_SHOWN)][:shots]
    if len(order) < shots:
      raise DataError(f'{examples}: holds {len(order)} examples, {shots} are wanted')
    shown = {_number(i) for i in order}
    before = ''.join(_worked(*found[i]) for i in order)
  tasks = [_task(r, where, before) for r, where in records if _number(_field(r, 'task_id', where)) not in shown]
  if not tasks:
    raise DataError(f'{pattern}: no problems' + (f' but the {shots} worked examples' if records else ''))
  return tasks


def _number(task_id: Any) -> str:
  return str(task_id).rpartition('/')[2]


def _field(record: Any, name: str, where: str, *others: str) -> Any:
  if not isinstance(record, Mapping):
    raise DataError(f'{where}: expected an object, got {type(record).__name__}')
  for key in (name, *others):
    if key in record:
      return record[key]
  raise DataError(f"{where}: no '{name}', only {', '.join(sorted(record))}")


def _text(record: Any, name: str, where: str, *others: str) -> str:
  value = _field(record, name, where, *others)
  if not isinstance(value, str):
    raise DataError(f"{where}: '{name}' must be text, got {type(value).__name__}")
  return value.replace('\r\n', '\n')


def _is_mbpp(record: Any) -> bool:
  return isinstance(record, Mapping) and 'test_list' in record


def _task(record: Any, where: str, before: str) -> Task:
  key = str(_field(record, 'task_id', where))
  if _is_mbpp(record):
    question = _asked(record, where)
    return Task(key, question, before + question, _mbpp_tests(record, where), 'code', 'code')
  prompt, name = _text(record, 'prompt', where), _text(record, 'entry_point', where)
  tests = f'{_text(record, "test", where)}\n\ncheck({name})\n'
  return Task(key, prompt, before + prompt, tests, 'code', 'code', entry=prompt)


def _asked(record: Mapping, where: str) -> str:
  return _PROMPT.format(_text(record, 'text', where, 'prompt').strip(), '\n'.join(_tests(record, where)))


def _tests(record: Mapping, where: str) -> list[str]:
  tests = record['test_list']
  if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
    raise DataError(f"{where}: 'test_list' must be a list of statements, got {str(tests)[:80]}")
  return tests


def _mbpp_tests(record: Mapping, where: str) -> str:
  if 'test' in record:
    return _text(record, 'test', where)
  imports = record.get('test_imports') or []
  if not isinstance(imports, list) or not all(isinstance(line, str) for line in imports):
    raise DataError(f"{where}: 'test_imports' must be a list of statements, got {str(imports)[:80]}")
  before = record.get('test_setup_code') or '\n'.join(imports)
  return '\n'.join([str(before), *_tests(record, where)])


def _worked(record: Any, where: str) -> str:
  if not _is_mbpp(record):
    raise DataError(f"{where}: an example needs 'text', 'test_list' and 'code', as MBPP has them")
  return f'{_asked(record, where)}{_text(record, "code", where).strip()}{CODE_END}\n\n'
