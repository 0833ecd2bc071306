"""Tests that programming problems are read, asked and judged in the way that their sources describe."""

import dataclasses
import gzip
import json
import os

import numpy as np
import pytest

from betarank.configs import common
from betarank.configs.errors import UserError
from betarank.configs.sections import section
from betarank.data import DataError, read_tokenizer
from betarank.eval import generate
from betarank.eval.benchmarks import open_benchmark
from betarank.eval.config import SampleConfig
from betarank.tasks import code_problems
from betarank.tasks.answers import final_answer
from betarank.tasks.code_jail import Jail, JailConfig, JailError
from betarank.tasks.verifiers import Verdict, Verifier, VerifierConfig
from betarank.train.sampler import Sample
from tests import tokenizer_files

PROMPT = 'def add(a, b):\n    """Adds.\n    >>> add(1, 2)\n    3\n    """\n'
HUMAN = [{'task_id': f'HumanEval/{i}', 'prompt': PROMPT, 'entry_point': 'add',
          'canonical_solution': '    return a + b\n',
          'test': '\ndef check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n'}
         for i in range(2)]
MBPP = [{'task_id': i, 'text': f'Write a function to add {i}.', 'code': f'def add(x):\r\n  return x + {i}',
         'test_setup_code': 'start = 1', 'test_list': [f'assert add(start) == {i + 1}', f'assert add(0) == {i}'],
         'challenge_test_list': []} for i in range(1, 6)]
RIGHT, WRONG = Verdict.RIGHT, Verdict.WRONG


def write(path, records):
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return str(path)


@pytest.fixture(scope='module')
def verifier():
  try:
    made = Verifier(VerifierConfig(), Jail(JailConfig(deadline_s=30)))
  except JailError as error:  # test_code_jail.py asks why
    pytest.skip(str(error))
  with made:
    yield made


def test_humaneval_goes_on_with_a_function(tmp_path, verifier):
  task, _ = code_problems.read(write(tmp_path / 'h.jsonl', HUMAN))
  assert task.prompt == PROMPT and task.id == 'HumanEval/0'
  cut = {
    '    return a + b\n': '    return a + b\n',
    '    return (\n  a + b\n)\n\n\ndef other():\n  exit()': '    return (\n  a + b\n)\n\n\n',
    '    return a - b\n# no\n': '    return a - b\n',
  }
  for text, want in cut.items():
    assert final_answer(text, task) == want
  assert verifier.verify([(text, task) for text in cut] * 2) == [RIGHT, RIGHT, WRONG] * 2
  no = ['', '    import os; os._exit(0)\n', '    return a + b\0\n', '    return a +\n']
  assert verifier.verify([(text, task) for text in no]) == [WRONG] * 4


def test_mbpp_is_asked_with_its_tests_and_examples(tmp_path, verifier):
  path = write(tmp_path / 'm.jsonl', MBPP)
  tasks = code_problems.read(path, 3, path)
  assert [task.id for task in tasks] == ['1', '5']  # the examples are 2, 3 and 4, as in its paper
  assert tasks[0].prompt.count('[BEGIN]\n') == 4 and tasks[0].prompt.endswith(
    'and here is your task: Write a function to add 1. Your code should pass these tests:\n\n'
    'assert add(start) == 2\nassert add(0) == 1\n[BEGIN]\n')
  assert 'def add(x):\n  return x + 2\n[DONE]\n\nYou are an expert' in tasks[0].prompt
  good = 'def add(x):\n  return x + 1'
  assert verifier.verify([(good, tasks[0]), (f'{good}\n[DONE]\nnonsense', tasks[0]), (good, tasks[1])]) == [
    RIGHT, RIGHT, WRONG]
  plus = [{'task_id': 9, 'prompt': 'Write.', 'code': good, 'test_imports': [], 'test_list': ['assert add(1) == 2'],
           'test': 'import numpy as np\nassert np.allclose(add(np.ones(2)), 2)'}]
  [task] = code_problems.read(write(tmp_path / 'p.jsonl', plus))
  assert verifier.verify([(good, task), ('add = 3', task)]) == [RIGHT, WRONG]


def test_a_file_without_problems_to_ask_is_refused(tmp_path):
  path = write(tmp_path / 'm.jsonl', MBPP[1:4])
  assert len(code_problems.read(path)) == 3
  with pytest.raises(DataError, match='m.jsonl: no problems but the 3 worked examples$'):
    code_problems.read(path, 3, path)
  with pytest.raises(DataError, match='x.jsonl: no problems$'):
    code_problems.read(write(tmp_path / 'x.jsonl', []))


def test_all_of_mbpp_asks_its_test_split(tmp_path):
  everything = [{**MBPP[0], 'task_id': i} for i in range(1, 975)]
  tasks = code_problems.read(write(tmp_path / 'mbpp.jsonl', everything))
  assert [tasks[0].id, tasks[-1].id, len(tasks)] == ['11', '510', 500]


@pytest.mark.parametrize('record, message', [
  ([1], ':1: expected an object, got list'),
  ({'task_id': 1, 'prompt': 'x'}, ":1: no 'entry_point', only prompt, task_id"),
  ({'task_id': 1, 'prompt': 3, 'entry_point': 'f', 'test': ''}, ":1: 'prompt' must be text, got int"),
  ({'task_id': 1, 'text': 'x', 'test_list': []}, ":1: 'test_list' must be a list of statements"),
])
def test_other_records_are_refused(tmp_path, record, message):
  with pytest.raises(DataError, match=message):
    code_problems.read(write(tmp_path / 'x.jsonl', [record]))


def test_as_benchmarks(tmp_path):
  c = dataclasses.replace(section(SampleConfig, common.evaluation().sample), data_dir=str(tmp_path))
  b = open_benchmark(f'code:{write(tmp_path / "mine.jsonl", HUMAN)}', c)
  assert (b.shots, b.answer_format, len(b.tasks)) == (0, 'code', 2) and len(b.file_sha256) == 64
  with pytest.raises(UserError, match='shots must be 0'):
    open_benchmark(f'code:{tmp_path}/mine.jsonl', dataclasses.replace(c, shots=1))
  with pytest.raises(UserError, match='HumanEval.jsonl.gz: no such file for humaneval; it is in the package'):
    open_benchmark('humaneval', c)
  (tmp_path / 'HumanEval.jsonl.gz').write_bytes(gzip.compress(b'{}'))
  with pytest.raises(UserError, match='is not that of humaneval, .* as code:'):
    open_benchmark('humaneval', c)
  write(tmp_path / 'mbpp.jsonl', MBPP)
  b = open_benchmark('mbpp', dataclasses.replace(c, problems=1))
  assert b.shots == 3 and len(b.tasks) == 1 and b.tasks[0].prompt.count('[DONE]') == 3
  (tmp_path / 'mbpp.jsonl').unlink()
  write(tmp_path / 'mbpp_plus.jsonl', MBPP)
  with pytest.raises(UserError, match='mbpp.jsonl: no such file; the 3 examples'):
    open_benchmark('mbpp_plus', c)


def test_samples_are_judged_in_the_jail(tmp_path, verifier):
  tokenizer = read_tokenizer(tokenizer_files.byte_level(tmp_path / 'tokenizer', 'qwen'))
  task = code_problems.read(write(tmp_path / 'h.jsonl', HUMAN))[0]
  texts = ['    return a + b\n\ndef more():\n', '    return a', '    return a + b\n']
  group = [Sample(0, i, np.array([*tokenizer.encode(text), tokenizer.eos]), np.zeros(1, np.float32), 'eos')
           for i, text in enumerate(texts)]
  lines = generate.judged(group, task, tokenizer, verifier)
  assert [line['verdict'] for line in lines] == ['right', 'wrong', 'right']
  assert [line['text'] for line in lines] == texts and lines[0]['answer'].strip() == 'return a + b'


@pytest.mark.slow
@pytest.mark.skipif('HUMANEVAL' not in os.environ, reason='HUMANEVAL names no HumanEval.jsonl.gz')
def test_humanevals_own_solutions_pass(verifier):
  path = os.environ['HUMANEVAL']
  tasks = code_problems.read(path)
  with gzip.open(path, 'rt') as file:
    solutions = [json.loads(line)['canonical_solution'] for line in file]
  assert len(tasks) == len(solutions) == 164
  assert verifier.verify([(s + '\nraise SystemExit\n', task) for s, task in zip(solutions, tasks)]) == [RIGHT] * 164
  assert verifier.verify([('    pass\n', task) for task in tasks]) == [WRONG] * 164
