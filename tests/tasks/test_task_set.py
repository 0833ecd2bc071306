"""Tests the prompts of a task set: their form, their order, and that held-out problems are never used for training."""

import ast
import dataclasses
import gzip
import hashlib
import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import verifiers as bench
from betarank.configs.errors import UserError
from betarank.data import reasoning, record_formats
from betarank.data.config import DataError
from betarank.tasks import worker_pool
from betarank.tasks.task_set import TaskConfig, TaskSet, question_hash
from betarank.tasks.verifiers import Verdict, Verifier, VerifierConfig


@pytest.fixture
def jsonl(tmp_path):
  def write(*records, name='tasks.jsonl'):
    content = '\n'.join(record if isinstance(record, str) else json.dumps(record) for record in records).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith('.gz') else content)
    return f'jsonl:{tmp_path / name}'
  return write


def hashes(tasks, count=None):
  return frozenset(question_hash(task.question) for task in itertools.islice(tasks, count))


def numbered(count):
  return [{'question': f'What is {i} + {i}?', 'answer': f'{i} + {i} = {2 * i}\n#### {2 * i:,}'} for i in range(count)]


@pytest.mark.parametrize('record,reference', [
  ({'question': 'q', 'answer': 'a <<1+1=2>>\n#### 1,234'}, '1234'),  # GSM8K
  ({'problem': 'q', 'solution': r'so $\boxed{2}$', 'answer': r'\frac12'}, r'\frac12'),  # MATH-500
  ({'problem': 'q', 'solution': r'so $\boxed{\frac{1}{2}}$', 'level': 'Level 5'}, r'\frac{1}{2}'),  # MATH
  ({'id': 60, 'problem': 'q', 'answer': '204', 'url': 'u'}, '204'),  # AIME
  ({'id': 0, 'problem': 'q', 'answer': 27.0, 'question': 'q'}, '27'),  # AMC
  ({'question': 'q', 'answer': 2.5}, '2.5'),
  ({'question': 'q', 'final_answer': ['$2n$'], 'solution': ['s']}, '$2n$'),  # OlympiadBench
  ({'question': 'q', 'final_answer': ['1', '2']}, '1, 2'),
])
@pytest.mark.parametrize('name', ['t.jsonl', 't.jsonl.gz'])
def test_forms_of_records(jsonl, record, reference, name):
  (task,) = TaskSet(TaskConfig(jsonl(record, name=name)), split='all')
  assert (task.question, task.reference, task.verifier) == ('q', reference, 'math')
  assert task.prompt == reasoning.PROMPT.format(question='q')


@pytest.mark.parametrize('record,why', [
  ({'text': 'q'}, "no text in 'problem' or 'question', only text"), ({'problem': 'q'}, 'no final answer'),
  ({'question': 'q', 'answer': 'two lines\nand no mark'}, 'no final answer'),
  ({'question': 'q', 'answer': ''}, 'no final answer'), ({'question': 'q', 'answer': True}, 'no final answer'),
  ({'question': 'q', 'answer': None, 'solution': 'no box'}, 'no final answer'),
  ('[1]', 'expected an object, got list'),
])
def test_odd_records_are_left_out_and_counted(jsonl, record, why):
  tasks = TaskSet(TaskConfig(jsonl({'question': 'fine', 'answer': '1'}, record)), split='all')
  assert [task.question for task in tasks] == ['fine'] and tasks.records == 2
  [left_out] = tasks.left_out
  assert left_out.where.endswith('tasks.jsonl:2') and left_out.why.startswith(why)
  assert tasks.describe_left_out().startswith('1 of 2 problems left out: ')
  with pytest.raises(DataError, match='tasks.jsonl:1: .*so it is with all 2 records'):
    TaskSet(TaskConfig(jsonl(record, record)), split='all')


def test_half_of_a_surrogate_pair_is_replaced(jsonl):
  (task,) = TaskSet(TaskConfig(jsonl({'question': 'q \ud800', 'answer': '1'})), split='all')
  assert task.question == 'q \ufffd'


def test_a_line_that_is_not_json_is_an_error(jsonl):
  with pytest.raises(DataError, match='tasks.jsonl:2: not JSON'):
    TaskSet(TaskConfig(jsonl({'question': 'fine', 'answer': '1'}, '{"question": ')), split='all')


def test_a_gold_that_cannot_be_read_leaves_its_problem_out_for_every_answer(jsonl):
  """If such a problem were undecided only for wrong answers, the remaining right answers would make the score too high.
  """
  golds = ['4.5e33', r'\frac{', '$t(0,4]$', 'E_{1},E_{2}', r'\int_0^1 x dx', r'\undefinedcommand']
  uri = jsonl(*({'question': f'q{i}', 'answer': gold} for i, gold in enumerate(golds)))
  tasks = TaskSet(TaskConfig(uri), split='all')
  assert [task.reference for task in tasks] == ['4.5e33', 'E_{1},E_{2}', r'\int_0^1 x dx']
  assert [left_out.where.rpartition(':')[2] for left_out in tasks.left_out] == ['2', '3', '6']
  assert r"its answer '$t(0,4]$' can't be read (an interval is no factor)" in tasks.describe_left_out()
  text = '\nAnswer: $t(0,4]$'
  with Verifier(VerifierConfig(workers=1)) as verifier:  # and by itself such a problem is undecided, also for its text
    task = dataclasses.replace(tasks[0], reference='$t(0,4]$')
    assert verifier.verify([(text, task), ('\nAnswer: 4', task)]) == [Verdict.UNDECIDED] * 2
    assert verifier.counts['unread'] == 2


@pytest.mark.parametrize('why', ['timeouts', 'crashes', 'refused'])
def test_no_deadline_and_no_lost_worker_decides_which_problems_there_are(jsonl, monkeypatch, why):
  """Such problems were left out, so a slow start or host had other problems than the rest of the run."""
  monkeypatch.setattr(worker_pool.WorkerPool, 'ask', lambda self, kinds, requests: [
    why if r'\int' in request['reference'] else {'rule': ''} for request in requests])
  integral = r'\int_0^1 x^2 \sin(x) dx'
  uri = jsonl(*({'question': f'q {answer}', 'answer': answer} for answer in ('1', integral, r'\sum_{i} i', integral)))
  with pytest.raises(DataError, match=r"tasks\.jsonl:2: can't find out whether its answer .* can be read \(.*\), nor "
                                      r'that of .*tasks\.jsonl:4; try again, or remove the record .*another workdir'):
    TaskSet(TaskConfig(uri), split='all')


@pytest.mark.parametrize('uri,message', [
  ('jsonl:/nowhere/*.jsonl', 'no file matches'), ('reasoning:chain_sums', r'did you mean chain_sum\?'),
  ('reasoning:codeio', 'it runs stored programs'), ('reasoning:knights_knaves', "can't be handed to a verifier"),
  ('reasoning:chain_sum?max_term=3', r"no option 'max_term'; did you mean max_terms\?"),
  ('reasoning:chain_sum?max_terms=1', 'max_terms must be >= min_terms'),
  ('reasoning:gsm_symbolic?level=1', 'level must be a whole number >= 0, of a task with a curriculum'),
  ('reasoning:game_of_life_halting', 'not for RL'), ('tfds:no_such_set', 'TFDS has no set of this name'),
])
def test_sources_that_cannot_be_used(uri, message):
  with pytest.raises(DataError, match=message):
    TaskSet(TaskConfig(uri))


def test_tfds(tmp_path):
  import tensorflow_datasets as tfds
  from array_record.python import array_record_module

  features = tfds.features.FeaturesDict({'problem': tfds.features.Text(), 'answer': np.int64})
  folder = tmp_path / 'tiny' / '1.0.0'
  folder.mkdir(parents=True)
  writer = array_record_module.ArrayRecordWriter(str(folder / 'tiny-train.array_record-00000-of-00001'), 'group_size:1')
  for i in range(20):
    writer.write(features.serialize_example(features.encode_example({'problem': f'Give {i}.', 'answer': i})))
  writer.close()
  file = tfds.core.ShardedFileTemplate(folder, dataset_name='tiny', split='train', filetype_suffix='array_record')
  split = tfds.core.SplitInfo(name='train', shard_lengths=[20], num_bytes=1, filename_template=file)
  tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=[split], check_data=False)
  tasks = TaskSet(TaskConfig(f'tfds:{folder}'), split='all')
  assert [(t.question, t.reference) for t in tasks] == [(f'Give {i}.', str(i)) for i in range(20)]


def test_of_tfds_only_the_fields_of_a_problem_are_read(monkeypatch):
  """Other fields may hold anything. Text that isn't UTF-8 is no question and no answer."""
  sums = [{'question': b'2+3?', 'answer': b'5', 'choices': np.array([b'4', b'5'], object), 'image': b'\xff\xd8'},
          {'question': b'2+4?', 'answer': np.float64(6)},
          {'question': b'Which?', 'final_answer': np.array([b'1', b'2'], object)},
          {'question': b'\xff', 'answer': b'5'}, {'question': b'2+5?', 'answer': b'\xff'},
          {'question': b'2+6?', 'answer': np.array([b'8'], object)}]
  monkeypatch.setattr(record_formats, '_tfds', lambda spec: sums)
  tasks = TaskSet(TaskConfig('tfds:sums'), split='all')
  assert [(t.question, t.reference) for t in tasks] == [('2+3?', '5'), ('2+4?', '6'), ('Which?', '1, 2')]
  assert [str(left_out).partition(';')[0] for left_out in tasks.left_out] == [
    "tfds:sums, record 3: no text in 'problem' or 'question', only answer, question",
    'tfds:sums, record 4: no final answer', 'tfds:sums, record 5: no final answer']


def test_each_epoch_has_every_task_once_in_its_own_order(jsonl):
  uri = jsonl(*numbered(50))
  tasks = TaskSet(TaskConfig(uri, held_out_fraction=0.1), seed=1)
  n = tasks.size
  epochs = [[tasks.at(e * n + i).id for i in range(n)] for e in range(3)]
  assert n < 50 and len(set(epochs[0])) == n and sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0] != [task.id for task in tasks]
  other = TaskSet(TaskConfig(uri, held_out_fraction=0.1), seed=2)
  assert [other.at(i).id for i in range(n)] != epochs[0]
  again = TaskSet(TaskConfig(uri, held_out_fraction=0.1), seed=1)
  assert again.at(2 * n + 7).id == epochs[2][7]  # from the cursor alone


def test_splits_are_disjoint_and_complete(jsonl):
  c = TaskConfig(jsonl(*numbered(400)), held_out_fraction=0.2)
  parts = {split: [task.id for task in TaskSet(c, split=split)] for split in ('train', 'held_out', 'all')}
  assert not set(parts['train']) & set(parts['held_out'])
  assert sorted(parts['train'] + parts['held_out']) == sorted(parts['all']) and len(parts['all']) == 400
  assert 50 < len(parts['held_out']) < 110
  exclude = hashes(TaskSet(c, split='held_out')) | {question_hash('what is  3 + 3?')}
  rest = TaskSet(TaskConfig(c.uri, held_out_fraction=0.0), exclude=exclude)  # another file's evaluation set
  assert {task.id for task in rest} == set(parts['train']) - {f'{question_hash("What is 3 + 3?"):016x}'}


def test_what_is_kept_has_a_hash(jsonl):
  """A run must not resume with other problems, even if only the problems to leave out have changed."""
  for c in (TaskConfig(jsonl(*numbered(40)), held_out_fraction=0.2),
            TaskConfig('reasoning:chain_sum', held_out_fraction=0.0)):
    exclude = frozenset(map(question_hash, ('What is 3 + 3?', 'What is 4 + 4?')))
    same, fewer = TaskSet(c, exclude=exclude), TaskSet(c)
    assert same.kept_sha256 == TaskSet(c, exclude=exclude).kept_sha256 != fewer.kept_sha256
    assert same.sha256 == fewer.sha256
  c = TaskConfig('reasoning:chain_sum', held_out_fraction=0.1)
  some, more = (TaskSet(c, exclude=hashes(TaskSet(c, split='held_out'), n)) for n in (4, 64))
  assert some.kept_sha256 == more.kept_sha256 and [some[i] for i in range(64)] == [more[i] for i in range(64)]


@pytest.mark.parametrize('uri', [
  'reasoning:chain_sum+gcd', 'reasoning:chain_sum?max_terms=2&max_digits=1'])
def test_endless_training_never_meets_a_held_out_question(uri):
  """There are so few sums of two one-digit numbers that training asks each one many times."""
  c = TaskConfig(uri, held_out_fraction=0.1)
  held_out = hashes(TaskSet(c, split='held_out'), 64)
  train = [question_hash(TaskSet(c, seed=seed).at(i).question) for seed in (0, 1) for i in range(400)]
  assert len(held_out) > 5 and not held_out & set(train)
  without = TaskSet(c, exclude=frozenset(train[:100]))
  assert not hashes(without, 100) & set(train[:100])


@pytest.mark.parametrize('uri', ['reasoning:chain_sum?max_digits=6', 'reasoning:chain_sum?max_digits=6+gcd'])
def test_training_begins_with_other_problems_than_an_evaluation_on_the_same_task(uri):
  c = TaskConfig('reasoning:chain_sum?max_digits=6')
  asked = TaskSet(c, split='all').distinct(64)
  assert asked == TaskSet(c, seed=1, split='all').distinct(64)  # all seeds are evaluated on the same problems
  exclude = frozenset(question_hash(task.question) for task in asked)
  for left_out in (exclude, frozenset()):  # not only because they are left out
    assert not hashes(TaskSet(dataclasses.replace(c, uri=uri), exclude=left_out), 64) & exclude


def test_a_generator_with_few_problems_left_for_training_finds_them_or_says_so():
  """There are about two hundred sums of two numbers of one digit."""
  c = TaskConfig('reasoning:chain_sum?max_terms=2&max_digits=1', held_out_fraction=0.0)
  everything = [question_hash(task.question) for task in TaskSet(c, split='all').distinct(1000)]
  assert 150 < len(everything) < 250
  rest = set(everything[:6])
  assert hashes(TaskSet(c, exclude=frozenset(everything) - rest), 40) <= rest
  # The search for different problems may have missed a few, so all of them are made sure of by their numbers.
  every = frozenset(question_hash(f'State the final answer to the following arithmetic problem: {a} {sign} {b} =')
                    for a in range(10) for b in range(10) for sign in '+-')
  assert set(everything) <= every
  with pytest.raises(DataError, match=r"2000 problems of chain_sum in a row are not in the 'train' split "
                                      r'\(held_out_fraction=0.0\), or are among the 200 to leave out because'):
    TaskSet(c, exclude=every)


def test_different_questions(jsonl):
  c = TaskConfig('reasoning:chain_sum?max_terms=2&max_digits=1', held_out_fraction=0.2)
  tasks = TaskSet(c, split='held_out')
  some, more = tasks.distinct(16), tasks.distinct(256)
  assert len({question_hash(task.question) for task in more}) == len(more) and 16 < len(more) < 100
  assert more[:16] == some and some[0] == tasks[0]
  file = TaskSet(TaskConfig(jsonl(*({'question': f'Q{i // 300}', 'answer': f'{i}'} for i in range(601)))), split='all')
  assert [task.reference for task in file.distinct(5)] == ['0', '300', '600']


def test_endless_tasks_are_a_function_of_seed_and_index():
  c = TaskConfig('reasoning:chain_sum+gcd')
  one, again, other = TaskSet(c, seed=0), TaskSet(c, seed=0), TaskSet(c, seed=1)
  order = [7, 3, 2000, 3]
  assert [again[i] for i in order] == [one[i] for i in reversed(order)][::-1]
  assert [one[i].id for i in range(9)] != [other[i].id for i in range(9)]
  held = [TaskSet(c, seed=seed, split='held_out')[5] for seed in (0, 1)]
  assert held[0] == held[1]
  assert [one[i].id.split('/')[0] for i in range(4)] == ['chain_sum', 'gcd'] * 2
  assert one.size is None
  with pytest.raises(TypeError):
    len(one)
  code = 'from betarank.tasks.task_set import *; s = TaskSet(TaskConfig("reasoning:chain_sum+gcd")); print(s[2000])'
  root = pathlib.Path(bench.__file__).parent.parent
  out = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True)
  assert out.stdout.strip() == str(one[2000])  # another process, another hash seed


def test_an_empty_split_is_an_error(jsonl):
  for c, split in ((TaskConfig(jsonl(*numbered(3)), held_out_fraction=0.0), 'held_out'),
                   (TaskConfig('reasoning:gcd', held_out_fraction=0.0), 'held_out'),
                   (TaskConfig('reasoning:gcd', held_out_fraction=1.0), 'train')):
    with pytest.raises(DataError, match='held_out'):
      TaskSet(c, split=split)


def test_difficulty():
  plain = TaskSet(TaskConfig('reasoning:chain_sum'))
  hard = TaskSet(TaskConfig('reasoning:chain_sum?level=3&min_terms=5'))
  terms = lambda task: task.question.count(' + ') + task.question.count(' - ') + 1
  assert max(terms(plain[i]) for i in range(50)) <= 4 < min(terms(hard[i]) for i in range(50))
  name, options, record = ast.literal_eval(hard[0].entry)
  assert name == 'chain_sum' and options['min_terms'] == 5 and record['answer'] == hard[0].reference


def test_every_kind_of_answer_is_right_when_it_is_the_reference():
  """Kinds of answers: compared exactly, scored by the task's generator, of several lines, and without a reference.

  The scorer must get the options with which the task was generated.
  """
  with Verifier(VerifierConfig(workers=1, deadline_s=20.0)) as verifier:
    for uri, kind in (('reasoning:chain_sum', 'reasoning_gym'), ('reasoning:gcd', 'exact'),
                      ('reasoning:game_of_life', 'reasoning_gym'), ('reasoning:rotate_matrix', 'exact'),
                      ('reasoning:puzzle24?max_value=9', 'reasoning_gym'), ('reasoning:rush_hour', 'reasoning_gym')):
      task = TaskSet(TaskConfig(uri))[0]
      assert task.verifier == kind, (uri, task.verifier)
      expected = Verdict.RIGHT if task.reference else Verdict.WRONG
      assert verifier.verify([(f'\nAnswer: {task.reference or "x"}\n', task)]) == [expected], uri


def test_the_prompt_template():
  c = TaskConfig('reasoning:gcd', prompt='Solve, {and} box: {question}\nSo', answer_format='boxed')
  task = TaskSet(c)[0]
  assert task.prompt == f'Solve, {{and}} box: {task.question}\nSo' and task.answer_format == 'boxed'
  problem = reasoning.problem(reasoning.parse('gcd'), 0)
  assert problem.prompt == TaskConfig('reasoning:gcd').prompt.replace('{question}', problem.question)


def test_programs_as_tasks(tmp_path):
  records = [{'task_id': i, 'text': f'Write add{i}.', 'code': '', 'test_list': [f'assert add{i}(1) == 2']}
             for i in range(20)]
  (tmp_path / 'mbpp.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
  config = TaskConfig(f'code:{tmp_path}/mbpp.jsonl', held_out_fraction=0.3)
  train, held_out = (TaskSet(config, split=split) for split in ('train', 'held_out'))
  assert train.size + held_out.size == 20 and train.size > 0 < held_out.size
  assert {task.id for task in train} & {task.id for task in held_out} == set()
  assert train[0].verifier == train[0].answer_format == 'code' and '[BEGIN]' in train[0].prompt


@pytest.fixture
def rewards(tmp_path):
  """Returns the path of a file with reward functions."""
  path = tmp_path / 'rewards.py'
  path.write_text('def brevity(answer, **_):\n  return 1 / len(answer)\n'
                  'def broken(answer, **_):\n  return answer.nothing\n'
                  'def starts(answer, **_):\n  import os\n  return os.system("true")\n'
                  'def endless(answer, **_):\n  while True:\n    pass\n')
  return path


def test_a_reward_of_ones_own(jsonl, rewards):
  uri = jsonl({'question': 'q', 'answer': 'any\ntext'}, {'question': 'r', 'answer': '2'})
  tasks = TaskSet(TaskConfig(uri, reward=f'{rewards}:brevity'), split='all')
  assert [task.reference for task in tasks] == ['any\ntext', '2'] and tasks[0].verifier == 'reward'
  assert tasks.reward_sha256 == hashlib.sha256(rewards.read_bytes()).hexdigest()
  assert TaskSet(TaskConfig(uri), split='all').reward_sha256 == ''
  for reward, message in ((f'{rewards}:absent', 'AttributeError: .*absent'), ('nowhere.py:f', 'nowhere.py'),
                          ('no_such_module:f', 'no_such_module')):
    with pytest.raises(UserError, match=message):
      TaskSet(TaskConfig(uri, reward=reward), split='all')


@pytest.mark.parametrize('source', ['reasoning:gcd', 'jsonl'])
@pytest.mark.parametrize('reward, message', [
  ('broken', "AttributeError: 'str' object has no attribute 'nothing'"),
  ('starts', 'the process .* touched the system'),
  ('endless', 'no verdict before the deadline')])
def test_a_reward_that_decides_nothing_is_refused(jsonl, rewards, source, reward, message):
  uri = source if source != 'jsonl' else jsonl({'question': 'r', 'answer': '2'})
  config = TaskConfig(uri, reward=f'{rewards}:{reward}')
  with pytest.raises(DataError, match=f'^reward {rewards}:{reward}: {message}, when called with the first reference$'):
    TaskSet(config, verifier=VerifierConfig(deadline_s=0.3))


@pytest.mark.parametrize('field,value', [
  ('uri', 'csv:x'), ('uri', 'jsonl:'), ('prompt', 'no place'), ('prompt', '{question} '), ('answer_format', 'xml'),
  ('held_out_fraction', 1.5), ('held_out_fraction', float('nan')), ('reward', 'no_colon'), ('reward', 'a.py:1x'),
])
def test_settings_are_checked(field, value):
  with pytest.raises(ValueError, match=f'^{field} '):
    TaskConfig(**{'uri': 'reasoning:gcd', field: value})


def test_programs_have_no_reward_function():
  with pytest.raises(ValueError, match=r"^reward must be empty for code:x, because tests judge programs, got 'a.py:f'"):
    TaskConfig('code:x', reward='a.py:f')


@pytest.mark.skipif(not bench.DATA.is_dir(), reason='no ../shared/data')
def test_shared_problem_sets():
  sizes = {name: TaskSet(TaskConfig(f'jsonl:{bench.DATA}/{name}.jsonl'), split='all').size for name in bench.SETS}
  assert sizes == {'gsm8k_train': 7473, 'gsm8k_test': 1319, 'math500': 500, 'aime24': 30, 'amc23': 40}
