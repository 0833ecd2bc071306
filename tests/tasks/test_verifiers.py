"""Tests the verifier's verdicts, and what a worker process can do to the run."""

import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from benchmarks import verifiers as bench
from betarank.tasks import verifiers, worker_pool
from betarank.tasks.code_jail import Outcome
from betarank.tasks.task_set import Task, TaskConfig, TaskSet
from betarank.tasks.verifiers import Verdict, Verifier, VerifierConfig, VerifierError

RIGHT, WRONG, UNDECIDED = Verdict.RIGHT, Verdict.WRONG, Verdict.UNDECIDED
ENDLESS = r'\sum_{i=1}^{10^{10}} \sin(i)'  # for math-verify


@pytest.fixture(scope='module')
def verifier():
  with Verifier(VerifierConfig(deadline_s=20.0)) as verifier:
    yield verifier


def task(reference, verifier='math', answer_format='line', **fields):
  return Task(id='', question='', prompt='', reference=reference, verifier=verifier, answer_format=answer_format,
              **fields)


def answers(*texts):
  return [f' some steps\nAnswer: {text}\n' for text in texts]


def workers(verifier):
  return [worker for kind in verifier._pool._workers.values() for worker in kind]


def test_math_verdicts(verifier):
  table = [
    ('42', '42', RIGHT), ('42.0', '42', RIGHT), ('43', '42', WRONG), ('1/2', '0.5', RIGHT), ('0.3333333', '1/3', RIGHT),
    (r'x^2+2x+1', '(x+1)^2', RIGHT), (r'x^2+2x-1', '(x+1)^2', WRONG), (r'\sqrt{117}', r'3\sqrt{13}', RIGHT),
    ('50%', '0.5', RIGHT), ('(1, 2)', '(1,2)', RIGHT), ('(2, 1)', '(1,2)', WRONG), (r'\text{Evelyn}', 'Evelyn', RIGHT),
    ('12 cm', r'12\text{ cm}', RIGHT), ('9**9', '9', WRONG), (r'\frac{', '1', WRONG), ('1', r'\frac{', UNDECIDED),
    ('1', '', UNDECIDED), ('a' * 10_001, 'a', WRONG),
  ]
  found = verifier.verify([(answers(given)[0], task(wanted)) for given, wanted, _ in table])
  assert [(row[:2], verdict) for row, verdict in zip(table, found)] == [(row[:2], row[2]) for row in table]


def test_exact_and_missing_answers(verifier):
  before = verifier.counts.copy()
  found = verifier.verify([
    (answers('abc')[0], task('abc', 'exact')), (answers('abc ')[0], task(' abc', 'exact')),
    (answers('Abc')[0], task('abc', 'exact')), ('no mark: abc', task('abc', 'exact')),
    (r'thus \boxed{4}', task('4', answer_format='boxed')), (r'thus \boxed{4}', task('4'))])
  assert found == [RIGHT, RIGHT, WRONG, WRONG, RIGHT, WRONG]
  assert verifier.counts - before == Counter(right=3, wrong=3, plain=6)


def test_reasoning_gym_verdicts(verifier):
  sums = TaskSet(TaskConfig('reasoning:chain_sum'))[0]
  game = TaskSet(TaskConfig('reasoning:countdown'))[0]
  turned = ' + '.join(reversed(game.reference.split(' + '))) if ' + ' in game.reference else f'({game.reference})'
  items = list(zip(answers(sums.reference, f'{sums.reference}.0', f'{sums.reference}1', 'x', turned, '1 + 1'),
                   [sums] * 4 + [game] * 2))
  assert verifier.verify(items) == [RIGHT, RIGHT, WRONG, WRONG, RIGHT, WRONG]


def test_equal_items_are_decided_once_and_order_is_kept(verifier):
  texts = answers(*(f'x+{i % 3}' for i in range(30)))
  assert verifier.verify([(text, task('1+x')) for text in texts]) == [RIGHT if i % 3 == 1 else WRONG for i in range(30)]
  assert verifier.verify([]) == []


def test_unknown_kinds_are_refused(verifier):
  for fields in ({'verifier': 'judge'}, {'answer_format': 'xml'}):
    with pytest.raises(ValueError, match='judge|xml'):
      verifier.verify([('\nAnswer: 1', task('1', **fields))])


def test_a_deadline_costs_one_worker_and_no_other_verdict():
  with Verifier(VerifierConfig(deadline_s=1.5)) as verifier:
    verifier.verify([(text, task('x+1')) for text in answers('x+2', 'x+3')])
    assert len(workers(verifier)) == 2
    texts = answers('1+x', ENDLESS, *(f'x+{i}' for i in range(2, 12)), '1+x ')
    found = verifier.verify([(text, task('x+1')) for text in texts])
    assert found == [RIGHT, UNDECIDED, *[WRONG] * 10, RIGHT]
    assert verifier.counts['timeouts'] == verifier.counts['restarts'] == verifier.counts['undecided'] == 1


def test_a_crash_is_undecided_and_the_next_item_is_graded():
  with Verifier(VerifierConfig(workers=1, deadline_s=30.0)) as verifier:
    verifier.verify([(answers('x+2')[0], task('x+1'))])
    (worker,) = workers(verifier)
    threading.Timer(0.5, worker.process.send_signal, [signal.SIGSEGV]).start()  # while it works on ENDLESS
    assert verifier.verify([(text, task('x+1')) for text in answers(ENDLESS, '1+x')]) == [UNDECIDED, RIGHT]
    assert verifier.counts['crashes'] == verifier.counts['restarts'] == 1
    (worker,) = workers(verifier)
    worker.process.kill()  # between two calls: nobody's verdict
    worker.process.wait()
    assert verifier.verify([(answers('1 + x')[0], task('x+1'))]) == [RIGHT]


def test_an_item_whose_worker_is_killed_from_outside_is_asked_about_once_more():
  with Verifier(VerifierConfig(workers=1, deadline_s=2.0)) as verifier:
    verifier.verify([(answers('x+2')[0], task('x+1'))])
    (worker,) = workers(verifier)
    threading.Timer(0.5, worker.process.kill).start()
    assert verifier.verify([(text, task('x+1')) for text in answers(ENDLESS, '1+x')]) == [UNDECIDED, RIGHT]
    assert verifier.counts['crashes'] == 0 and verifier.counts['timeouts'] == 1  # the second time it had its time
    assert verifier.counts['restarts'] == 2


def test_a_new_worker_is_asked_if_all_are_killed_at_once(monkeypatch):
  """The idle ones too, and then the first new one, before it is asked."""
  with Verifier(VerifierConfig(workers=2, deadline_s=30.0)) as verifier:
    while len(workers(verifier)) < 2 or not all(worker.ready for worker in workers(verifier)):
      verifier.verify([(text, task('x+1')) for text in answers('x+2', 'x+3')])
    old, started, send, read = workers(verifier), [], worker_pool._Worker.send, worker_pool._Worker.read

    def sent_too_late(worker, *args):
      if worker in old:
        worker.process.kill()
      send(worker, *args)

    def killed_at_its_start(worker):
      message = read(worker)
      if message and 'ready' in message:
        started.append(worker)
        if len(started) == 1:
          worker.process.kill()
          worker.process.wait()
      return message

    monkeypatch.setattr(worker_pool._Worker, 'send', sent_too_late)
    monkeypatch.setattr(worker_pool._Worker, 'read', killed_at_its_start)
    assert verifier.verify([(answers('1+x')[0], task('x+1'))]) == [RIGHT]
    assert verifier.counts['crashes'] == 0 and len(started) == verifier.counts['restarts'] == 2


def test_an_idle_worker_that_dies_is_replaced(monkeypatch):
  """Otherwise its closed pipe would wake up this process again and again until the call ends."""
  with Verifier(VerifierConfig(workers=2, deadline_s=2.0)) as verifier:
    while len(workers(verifier)) < 2 or not all(worker.ready for worker in workers(verifier)):
      verifier.verify([(text, task('x+1')) for text in answers('x+2', 'x+3')])
    waits, wait = [], worker_pool.WorkerPool._wait

    def kill_the_idle_one(pool, *args):
      waits.append(pool)
      if idle := [worker for worker in old if worker.busy is None]:
        idle[0].process.kill()
      wait(pool, *args)

    old = workers(verifier)
    monkeypatch.setattr(worker_pool.WorkerPool, '_wait', kill_the_idle_one)
    assert verifier.verify([(answers(ENDLESS)[0], task('x+1'))]) == [UNDECIDED]
    assert len(waits) < 100 and verifier.counts['restarts'] == 2  # tens of thousands of times before


def test_workers_that_cannot_start_are_an_error(tmp_path, monkeypatch):
  script = tmp_path / 'worker.py'
  monkeypatch.setattr(worker_pool, '_WORKER', script)
  for code, message in (('import sys; sys.exit(3)', 'ended 3 times .*status 3'),
                        ('print(\'{"error": "no module named x"}\')', 'no module named x')):
    script.write_text(code)
    with Verifier(VerifierConfig()) as verifier, pytest.raises(VerifierError, match=message):
      verifier.verify([(answers('x+2')[0], task('x+1'))])
    assert not workers(verifier)


def test_a_forged_verdict_is_not_believed(tmp_path, monkeypatch):
  """The worker replies 'right' before it is asked. A malicious item could make a worker do this for the next item."""
  script = tmp_path / 'worker.py'
  script.write_text('import sys, time\nprint(\'{"ready": true}\', flush=True)\nsys.stdin.readline()\n'
                    'print(\'{"verdict": 1}\', flush=True); time.sleep(60)')
  monkeypatch.setattr(worker_pool, '_WORKER', script)
  with Verifier(VerifierConfig(workers=1)) as verifier:
    assert verifier.verify([(text, task('x+1')) for text in answers('x+2', 'x+3')]) == [UNDECIDED, UNDECIDED]
    assert verifier.counts['crashes'] == 2


SLEEPY = """import json, sys, time
print('{"ready": true}', flush=True)
for line in sys.stdin:
  request = json.loads(line)
  time.sleep(60 if 'forever' in request['answer'] else 1.5)
  print(json.dumps({'token': request['token'], 'verdict': 1}), flush=True)
"""


def test_the_deadline_is_of_cpu_time(tmp_path, monkeypatch):
  """Waiting on a busy machine doesn't count. A worker that waits forever is still ended."""
  script = tmp_path / 'worker.py'
  script.write_text(SLEEPY)
  monkeypatch.setattr(worker_pool, '_WORKER', script)
  with Verifier(VerifierConfig(workers=1, deadline_s=0.5)) as verifier:
    found = verifier.verify([(text, task('x+1')) for text in answers('1+x', 'for forever')])
    assert found == [RIGHT, UNDECIDED] and verifier.counts['timeouts'] == 1


def test_time_without_a_cpu_is_not_counted(tmp_path, monkeypatch):
  """On a machine so busy that a worker waits for a CPU longer than the limit on wall time, the verdict is the same."""
  script = tmp_path / 'worker.py'
  script.write_text(SLEEPY)
  monkeypatch.setattr(worker_pool, '_WORKER', script)
  monkeypatch.setattr(worker_pool, '_waited_s', lambda pid: time.monotonic())  # its sleep seems to be such time
  with Verifier(VerifierConfig(workers=1, deadline_s=0.1)) as verifier:
    assert verifier.verify([(answers('1+x')[0], task('x+1'))]) == [RIGHT]


def test_the_system_says_how_long_a_process_waited_for_a_cpu():
  pinned = 'import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nwhile True: pass'
  busy = [subprocess.Popen([sys.executable, '-c', pinned]) for _ in range(2)]
  try:
    until = time.monotonic() + 30
    while worker_pool._waited_s(busy[0].pid) < 0.1 and time.monotonic() < until:
      time.sleep(0.05)
    assert 0.1 <= worker_pool._waited_s(busy[0].pid) < 31
  finally:
    for process in busy:
      process.kill()
      process.wait()
  assert worker_pool._waited_s(2**22 + 1) == 0.0


def test_a_grade_tells_how_it_came_about(verifier):
  right, wrong, missing, undecided = verifier.grade([
    (text, task(gold)) for text, gold in ((answers('x = 3')[0], '3'), (answers('8 = 7')[0], '7'), ('7', '7'),
                                          (answers('1')[0], r'\frac{'))])
  assert (right.verdict, right.reward, right.answer, right.rule) == (
    RIGHT, 1.0, 'x = 3', 'a name before it: the same notation')
  assert (right.gold_reading, right.answer_reading) == ('number 3', 'equation x=3')
  assert (wrong.verdict, wrong.reward) == (WRONG, 0.0) and 'not its right side' in wrong.rule
  assert (missing.verdict, missing.answer) == (WRONG, None) and 'no final answer' in missing.rule
  assert undecided.verdict == UNDECIDED and undecided.reward != undecided.reward and '} is missing' in undecided.rule


REWARDS = """calls = []
def reward(text, answer, reference, question):
  if answer == 'fail':
    raise RuntimeError('no idea')
  if answer == 'write':
    open('canary', 'w')
  calls.append(answer)
  return {'half': 0.5, 'nan': float('nan'), 'yes': True}.get(answer, -1)
"""


def test_a_reward_function_of_the_users_own(tmp_path, monkeypatch):
  """The function runs in a worker process, under the worker's limits.

  If it raises an exception, the sample is undecided. The reason of the first undecided sample is kept.
  """
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'mine.py').write_text(REWARDS)
  own = task('', 'reward', entry='mine.py:reward')
  with Verifier(VerifierConfig(workers=1)) as verifier:
    grades = verifier.grade([(text, own) for text in [*answers('half', 'yes', 'no', 'fail', 'nan', 'write'), 'none']])
    assert [grade.verdict for grade in grades] == [WRONG, RIGHT, WRONG, UNDECIDED, UNDECIDED, UNDECIDED, WRONG]
    assert [grade.reward for grade in grades[:3]] == [0.5, 1.0, -1.0] and grades[6].reward == -1.0
    assert verifier.counts['errors'] == 2 and verifier.counts['refused'] == 1
    assert verifier.why_undecided == 'RuntimeError: no idea' and not (tmp_path / 'canary').exists()
    with pytest.raises(VerifierError, match="verifier worker 'reward mine.py:absent': .*absent"):
      verifier.grade([(answers('x')[0], task('', 'reward', entry='mine.py:absent'))])


def test_programs_need_a_jail(verifier):
  with pytest.raises(ValueError, match='need a jail'):
    verifier.verify([('x = 1', task('assert x', 'code', 'code'))])


def test_a_program_that_reaches_its_deadline_is_undecided():
  """The time that a program takes depends on how busy the machine is."""
  late = SimpleNamespace(workers=1, run=lambda program: Outcome(None, 'deadline'))
  with Verifier(VerifierConfig(), late) as verifier:
    grade, = verifier.grade([('x = 1', task('assert x', 'code', 'code'))])
    assert grade.verdict == UNDECIDED and math.isnan(grade.reward) and verifier.counts['timeouts'] == 1


def test_threads_share_a_verifier(verifier):
  found = {}
  def use(i):
    found[i] = verifier.verify([(text, task(f'{i}+x')) for text in answers(f'x+{i}', f'x-{i}')])
  threads = [threading.Thread(target=use, args=[i]) for i in range(1, 5)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert all(found[i] == [RIGHT, WRONG] for i in range(1, 5))


def test_workers_end_with_us():
  """If the parent is killed, its workers end too, even a worker that is busy."""
  code = ('from betarank.tasks.verifiers import *; from betarank.tasks.task_set import Task\n'
          'task = Task("", "", "", "1+x", "math", "line"); v = Verifier(VerifierConfig(workers=1, deadline_s=1.0))\n'
          'v.verify([("\\nAnswer: x+2", task)]); print(v._pool._workers["math"][0].process.pid, flush=True)\n'
          f'v._pool._c = VerifierConfig(deadline_s=60.0); v.verify([("\\nAnswer: {ENDLESS}", task)])')
  root = pathlib.Path(verifiers.__file__).parent.parent
  with subprocess.Popen([sys.executable, '-c', code], cwd=root, stdout=subprocess.PIPE, text=True) as parent:
    pid = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.kill()
  deadline = time.monotonic() + 30
  while time.monotonic() < deadline and pathlib.Path(f'/proc/{pid}/stat').exists():
    if pathlib.Path(f'/proc/{pid}/stat').read_text().split()[2] == 'Z':
      break
    time.sleep(0.2)
  else:
    assert not pathlib.Path(f'/proc/{pid}').exists()


@pytest.mark.parametrize('act', [
  "__import__('os').system('touch canary')", "open('canary', 'w')", "__import__('os').mkdir('canary')",
  "__import__('subprocess').run(['touch', 'canary'])", "__import__('socket').socket()", "__import__('os').fork()",
  "__import__('ctypes').CDLL(None)", "__import__('os').kill(1, 0)", "__import__('os').putenv('A', 'b')",
])
def test_the_second_wall(act, tmp_path):
  """If text written by a model did get evaluated, the audit hook would end the worker, with exit status 86."""
  code = ('import sys, subprocess, socket, ctypes; from betarank.tasks import verifier_worker as w\n'
          f'w._limit(1024); sys.addaudithook(w._audit); {act}; print("still here")')
  done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
                        env={**os.environ, 'PYTHONPATH': worker_pool._import_path()})
  assert done.returncode == 86 and not done.stdout
  assert not list(tmp_path.iterdir())


def test_workers_import_no_jax_and_see_no_secrets(verifier, monkeypatch):
  monkeypatch.setenv('BETARANK_SECRET', 'x')
  with Verifier(VerifierConfig(workers=1)) as verifier:
    verifier.verify([(answers('x+2')[0], task('x+1'))])
    (worker,) = workers(verifier)
    proc = pathlib.Path(f'/proc/{worker.process.pid}')
    assert b'BETARANK_SECRET' not in (proc / 'environ').read_bytes()
    assert 'jaxlib' not in (proc / 'maps').read_text()


@pytest.mark.parametrize('kind', ['code', pytest.param('all', marks=pytest.mark.slow)])
def test_hostile_answers(kind, tmp_path, monkeypatch):
  """The slow test judges all 200 hostile answers. Some of them take as long as the deadline allows."""
  monkeypatch.setenv('BETARANK_CANARY', 'secret')
  items = bench.hostile(str(tmp_path / 'canary'))
  assert len(items) == 200
  if kind == 'code':
    items = [(text, task) for text, task in items if 'canary' in text.lower()]
    assert len(items) > 80
  with Verifier(VerifierConfig(deadline_s=0.5)) as verifier:
    assert RIGHT not in verifier.verify(items)
    assert not list(tmp_path.iterdir())
    assert verifier.verify([(answers('1')[0], task('1'))]) == [RIGHT]


@pytest.mark.skipif(not bench.DATA.is_dir(), reason='no ../shared/data')
@pytest.mark.parametrize('name', ['gsm8k_test', 'math500', 'aime24', 'amc23'])
def test_gold_answers_are_right(name):
  items = bench.gold(bench.DATA, name)
  with Verifier(VerifierConfig()) as verifier:
    found = verifier.verify(items)
    assert found.count(RIGHT) >= 0.99 * len(found)
    assert not verifier.counts['crashes'] and not verifier.counts['timeouts']


@pytest.mark.skipif(not bench.DATA.is_dir(), reason='no ../shared/data')
def test_gold_answers_are_right_by_workers(monkeypatch):
  """The references of MATH-500 are used as answers. All are judged by workers, none in this process."""
  monkeypatch.setattr(verifiers.numerals, 'is_numeral', lambda _: False)
  monkeypatch.setattr(verifiers.numerals, 'plain', lambda _: object())  # equal texts aren't settled here either
  items = [(f'\\boxed{{{task.reference}}}', task) for _, task in bench.gold(bench.DATA, 'math500')]
  with Verifier(VerifierConfig()) as verifier:
    found = verifier.verify(items)
    assert found.count(RIGHT) == len(found) and verifier.counts['worker'] == 500
    assert not verifier.counts['crashes'] and not verifier.counts['timeouts']


@pytest.mark.parametrize('field,value', [
  ('workers', 0), ('deadline_s', 0.0), ('deadline_s', float('nan')), ('memory_mb', 10), ('answer_chars', 0)])
def test_settings_are_checked(field, value):
  with pytest.raises(ValueError, match=f'^{field} '):
    VerifierConfig(**{field: value})
