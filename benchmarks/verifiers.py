"""Measures how right, fast and safe grading is, compared with plain calls of math-verify.

    python -m benchmarks.verifiers [--data=../shared/data/reasoning] [--workers=2]

Gold answers: the reference of every problem of GSM8K, MATH-500, AIME 2024 and AMC 2023, graded against the
final answer of its own worked solution (AMC has none: against its answer). Three ways: as RL does it; with every
item sent to a worker; and math-verify's parse and verify in this process, one after another, under its alarm
signal. Then 200 hostile answers, with files and variables that they try to reach.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import time
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from betarank.tasks import verifiers
from betarank.tasks.task_set import Task, TaskConfig, TaskSet
from betarank.tasks.verifiers import Verdict, Verifier, VerifierConfig

DATA = pathlib.Path(__file__).resolve().parent.parent.parent / 'shared' / 'data' / 'reasoning'
SETS = ('gsm8k_train', 'gsm8k_test', 'math500', 'aime24', 'amc23')


def gold(data: pathlib.Path, name: str) -> list[tuple[str, Task]]:
  """(worked solution with its final answer in the task's format, task) for every problem of a set."""
  path = data / f'{name}.jsonl'
  tasks = TaskSet(TaskConfig(f'jsonl:{path}', answer_format='line' if 'gsm8k' in name else 'boxed'), split='all')
  items = []
  for task, line in zip(tasks, path.read_text().splitlines()):
    record = json.loads(line)
    if 'gsm8k' in name:
      text = record['answer'].replace('#### ', 'Answer: ') + '\n'
    else:
      text = record.get('solution') or f'So it is $\\boxed{{{record["answer"]}}}$.'
    items.append((text, task))
  return items


CODE = (
  "__import__('os').system('touch {canary}')", "open('{canary}', 'w').write('x')",
  "exec('import os; os.mkdir(\"{canary}\")')",
  "eval(\"open('{canary}','w')\")", "__import__('subprocess').run(['touch', '{canary}'])",
  "[c for c in ().__class__.__base__.__subclasses__() if 'Popen' in str(c)][0](['touch', '{canary}'])",
  "__import__('pathlib').Path('{canary}').touch()", "__import__('os').environ['BETARANK_CANARY']",
  "(lambda: __import__('shutil').copy('/etc/hostname', '{canary}'))()",
  "globals()['__builtins__']['open']('{canary}','w')",
  "sympy.sympify(\"open('{canary}','w')\")", "__import__('os').kill(__import__('os').getppid(), 9)",
  "__import__('os').write(4, b'{{\"verdict\": 1}}')", "print('{{\"verdict\": 1}}')",
  "''.join([str(open('{canary}','w'))])",
  "\\input{{|touch {canary}}}", "\\write18{{touch {canary}}}", "$(touch {canary})",
  "`touch {canary}`", "; touch {canary} #",
)
BOMBS = (
  '9**9**9**9', '9^{9^{9^9}}', '2^{2^{2^{2^{2^2}}}}', '10^{10^{10}}', '99999!!!!', '\\sum_{i=1}^{10^{12}} \\sin(i)',
  '\\int_0^1 e^{x^{x^x}} dx', '\\prod_{k=1}^{10000000} (k+x)', '(x+y+z+w+1)^{5000}', '\\frac{' * 2000, '(' * 5000,
  '{' * 5000 + '}' * 5000, '1+' * 4000 + '1', '7' * 9000, '\\sqrt{' * 500 + '2' + '}' * 500, '1e999999999', '0/0',
  '\\frac{1}{0}', '\x00', '\ud800', '\\boxed{' * 1000, 'a' * 9999, ',' * 9000, '$' * 9001, '{"verdict": 1}',
  '\\lim_{x\\to 0} \\frac{\\sin(x^{100})}{x^{100}}', '\\begin{pmatrix}' + '1&' * 900 + '1\\end{pmatrix}',
  '1<' * 400 + '1',
  '\\{' + ','.join(map(str, range(1500))) + '\\}', '\N{ARABIC-INDIC DIGIT FOUR}\N{FULLWIDTH DIGIT TWO}',
)
SCORED = ('string_insertion', 'spiral_matrix', 'binary_matrix', 'n_queens', 'number_sorting', 'countdown', 'puzzle24',
          'simple_integration', 'polynomial_multiplication', 'bitwise_arithmetic')


def hostile(canary: str, count: int = 200) -> list[tuple[str, Task]]:
  """(text, task) of `count` answers that try to run code, or to take for ever, under both kinds of worker."""
  math_task = Task(id='', question='', prompt='', reference='x^2+3', verifier='math', answer_format='line')
  code = [text.format(canary=canary) for text in CODE]
  items = [(text, math_task) for text in BOMBS]
  items += [(form.format(text), math_task) for text in code for form in ('{}', '${}$', '\\text{{{}}}')]
  for name in SCORED:
    # reasoning-gym's own generators and scorers, several of which evaluate answers
    task = TaskSet(TaskConfig(f'reasoning:{name}'), split='all')[0]
    items += [(text, task) for text in (*code[:9], *BOMBS[:2])]
  assert len(items) >= count, len(items)
  return [(f'\nAnswer: {text}\n', task) for text, task in items[:count]]


def grade(verifier: Verifier, items: list[tuple[str, Task]]) -> dict[str, float]:
  before, start = verifier.counts.copy(), time.perf_counter()
  verdicts = verifier.verify(items)
  seconds = time.perf_counter() - start
  counts = verifier.counts - before
  return {
    'right': verdicts.count(Verdict.RIGHT) / len(items), 'wrong': counts['wrong'], 'undecided': counts['undecided'],
    'timeouts': counts['timeouts'], 'crashes': counts['crashes'] + counts['refused'], 'plain': counts['plain'],
    'seconds': seconds,
  }


def plainly(items: list[tuple[str, Task]]) -> dict[str, float]:
  import math_verify

  start, right = time.perf_counter(), 0
  for text, task in items:
    right += math_verify.verify(math_verify.parse(f'${task.reference}$'), math_verify.parse(text))
  return {'right': right / len(items), 'seconds': time.perf_counter() - start}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--data', type=pathlib.Path, default=DATA)
  parser.add_argument('--workers', type=int, default=2)
  args = parser.parse_args()
  columns = ('right', 'wrong', 'undecided', 'timeouts', 'crashes', 'plain', 'seconds')
  print(f'{"":36}' + ''.join(f'{name:>11}' for name in columns))

  def show(name, result):
    cells = (f'{result[c]:11.2%}' if c == 'right' else f'{result[c]:11.2f}' if c == 'seconds' else f'{result[c]:11d}'
             if c in result else f'{"-":>11}' for c in columns)
    print(f'{name:36}' + ''.join(cells), flush=True)

  config = VerifierConfig(workers=args.workers)
  for name in SETS if args.data.is_dir() else ():
    items = gold(args.data, name)
    with Verifier(config) as verifier:
      show(f'{name} ({len(items)})', grade(verifier, items))
    if name != 'gsm8k_train':
      references = [(f'\nAnswer: {task.reference}', dataclasses.replace(task, answer_format='line'))
                    for _, task in items]
      with Verifier(config) as verifier, mock.patch.object(verifiers, '_compare_plainly', lambda *_: None):
        show('  references by workers, with start', grade(verifier, references))
      show('  math-verify in this process', plainly(items))
  with tempfile.TemporaryDirectory() as folder, Verifier(config) as verifier:
    canary = os.path.join(folder, 'canary')
    with mock.patch.dict(os.environ, BETARANK_CANARY='secret'), contextlib.suppress(KeyboardInterrupt):
      items = hostile(canary)
      show(f'hostile ({len(items)})', grade(verifier, items))
    print(f'hostile: files made: {os.listdir(folder)}; {dict(verifier.counts)}')


if __name__ == '__main__':
  main()
