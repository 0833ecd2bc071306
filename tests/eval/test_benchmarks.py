"""Tests that benchmarks have the right prompts, worked examples and references, and that errors are one line."""

import dataclasses
import gzip
import hashlib
import json
import re

import pytest

from betarank.configs import common
from betarank.configs.errors import UserError
from betarank.configs.sections import section
from betarank.data import DataError
from betarank.eval import benchmarks
from betarank.eval.benchmarks import TABLE, open_benchmark
from betarank.eval.config import SampleConfig

GSM = [{'question': f'What is {i} plus {i}?', 'answer': f'Add: {i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}'}
       for i in range(6)]
MATH = [{'problem': f'Find ${i}^2$.', 'solution': rf'It is $\boxed{{{i * i}}}$.', 'answer': str(i * i)}
        for i in range(1, 6)]
OLYMPIAD = [{'question': 'Which $n$?', 'solution': ['Try 2.'], 'final_answer': ['$2n-2$'], 'error': None}]


def write(path, records):
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def settings(tmp_path):
  """Returns a function (**overrides) -> SampleConfig: the default settings, whose data_dir has the test's own files."""
  base = section(SampleConfig, common.evaluation().sample)
  return lambda **overrides: dataclasses.replace(base, data_dir=str(tmp_path), **overrides)


@pytest.fixture
def known(monkeypatch, tmp_path):
  """Returns a function (name, records) that replaces a benchmark's file and its hash in TABLE by the test's own."""
  def put(name, records):
    sha256 = write(tmp_path / TABLE[name].file, records)
    monkeypatch.setitem(TABLE, name, dataclasses.replace(TABLE[name], sha256=sha256))
    return sha256
  return put


def test_gsm8k_is_asked_with_the_papers_worked_examples(known, settings, tmp_path):
  sha256 = known('gsm8k', GSM)
  worked = [{'question': f'Q{i}', 'answer': f'Work <<1=1>>{i}\n#### {i}'} for i in range(9)]
  write(tmp_path / 'gsm8k_train.jsonl', worked)
  b = open_benchmark('gsm8k', settings())
  assert (b.shots, b.answer_format, b.file_sha256, len(b.tasks)) == (4, 'line', sha256, 6)
  assert b.tasks[3].reference == '6'
  examples = ''.join(f'Question: Q{i}\nSolution: Work {i}\nAnswer: {i}\n\n' for i in range(4))
  assert b.tasks[3].prompt == examples + 'Question: What is 3 plus 3?\nSolution:'
  fewer = open_benchmark('gsm8k', settings(shots=0, problems=2))
  assert [task.prompt for task in fewer.tasks] == [f'Question: What is {i} plus {i}?\nSolution:' for i in range(2)]
  assert len({b.data_sha256, fewer.data_sha256, open_benchmark('gsm8k', settings(shots=0)).data_sha256}) == 3


def test_boxed_examples_end_in_one_box(known, settings, tmp_path):
  known('math500', MATH)
  write(tmp_path / 'math_train.jsonl', [{'problem': 'P', 'solution': 'It is $1$.', 'answer': '1'}, *MATH[1:]])
  b = open_benchmark('math500', settings(shots=2))
  assert b.tasks[0].prompt == (
    'Question: P\nSolution: It is $1$. The answer is \\boxed{1}.\n\n'
    'Question: Find $2^2$.\nSolution: It is $\\boxed{4}$.\n\nQuestion: Find $1^2$.\nSolution:')
  line = open_benchmark('math500', settings(shots=1, answer_format='line'))
  assert line.answer_format == 'line'
  assert line.tasks[0].prompt.startswith('Question: P\nSolution: It is $1$.\nAnswer: 1\n\nQuestion: ')


def test_an_example_never_has_the_solution_of_another_problem(known, settings, tmp_path):
  """A record without a final answer can't be an example. Without it, questions and solutions used to be shifted."""
  known('math500', MATH)
  proof = {'problem': 'Prove it.', 'solution': 'By Peano.', 'answer': ''}
  write(tmp_path / 'math_train.jsonl', [MATH[0], proof, *MATH[1:]])
  assert 'Find $1^2$.\nSolution: It is $\\boxed{1}$.' in open_benchmark('math500', settings(shots=1)).tasks[0].prompt
  with pytest.raises(DataError, match=r"math_train.jsonl:2: no final answer; 'answer' must hold it") as error:
    open_benchmark('math500', settings(shots=2))
  assert '\n' not in str(error.value)
  with pytest.raises(UserError, match='math_train.jsonl: holds 1 examples, 2 are wanted'):
    write(tmp_path / 'math_train.jsonl', MATH[:1])
    open_benchmark('math500', settings(shots=2))


def test_forms_of_the_other_benchmarks_are_read(known, settings, tmp_path):
  known('olympiadbench', OLYMPIAD)
  known('minerva', [{'problem': 'How wide?', 'solution': r'So \boxed{1.6} cm.', 'type': 't', 'idx': 0}])
  write(tmp_path / 'aime25.jsonl', [{'problem': 'How many?', 'answer': 70}])  # of unknown hash: taken as it is
  known('amc23', [{'id': 0, 'problem': 'How far?', 'answer': 27.0, 'url': ''}])
  references = {name: open_benchmark(name, settings(shots=0)).tasks[0].reference
                for name in ('olympiadbench', 'minerva', 'aime25', 'amc23')}
  assert references == {'olympiadbench': '$2n-2$', 'minerva': '1.6', 'aime25': '70', 'amc23': '27'}
  assert open_benchmark('aime25', settings()).file_sha256 == hashlib.sha256(
    (tmp_path / 'aime25.jsonl').read_bytes()).hexdigest()


def test_a_file_of_ones_own_and_made_up_problems(settings, tmp_path):
  path = tmp_path / 'mine.jsonl.gz'
  path.write_bytes(gzip.compress(json.dumps(MATH[0]).encode()))
  b = open_benchmark(f'jsonl:{path}', settings())
  assert b.tasks[0].prompt == 'Question: Find $1^2$.\nSolution:'
  assert re.fullmatch(r'jsonl_[\w.=+-]+_mine.jsonl.gz', b.folder)
  made = open_benchmark('reasoning:chain_sum?max_terms=2&max_digits=1', settings(problems=3))
  assert made.folder == 'reasoning_chain_sum_max_terms=2_max_digits=1' and len(made.tasks) == 3
  assert made.file_sha256 == '' and made.tasks[0].verifier == 'reasoning_gym'


@pytest.mark.parametrize(
  'name, overrides, message',
  [
    ('gsm8', {}, '--benchmark=gsm8: no such benchmark; did you mean gsm8k?'),
    ('amc23', {}, 'amc23.jsonl: no such file for amc23; it is github.com/'),
    ('math500', {}, 'sha256 .* is not that of math500, 35dc41080a3680'),
    ('gsm8k', {}, 'gsm8k_train.jsonl: no such file; the 4 examples'),
    ('reasoning:chain_sum', {}, 'config.eval.sample.problems must be a number'),
    ('reasoning:chain_su', dict(problems=1), 'did you mean chain_sum?'),
    ('reasoning:chain_sum', dict(problems=1, shots=2), 'config.eval.sample.shots must be 0'),
    ('jsonl:/nowhere/*.jsonl', {}, '/nowhere/*.jsonl: no file matches'),
    ('bbh:x', {}, '--benchmark=bbh:x: uri must be reasoning:TASK'),
  ],
)
def test_what_cannot_be_is_refused_in_one_line(known, settings, tmp_path, name, overrides, message):
  write(tmp_path / 'math500.jsonl', MATH)  # one that isn't the published file
  known('gsm8k', GSM)
  with pytest.raises((UserError, DataError)) as error:
    open_benchmark(name, settings(**overrides))
  assert re.search(message.replace('?', r'\?').replace('/*', r'/\*'), str(error.value)) and '\n' not in str(error.value)


def test_every_shot_has_a_file_to_come_from():
  for name, entry in benchmarks.TABLE.items():
    assert bool(entry.examples) == bool(entry.shots), name
    assert entry.answer_format in ('line', 'boxed', 'code') and re.fullmatch('|[0-9a-f]{64}', entry.sha256)
