"""Measures how accurate, how fast and how safe grading is, compared with math-verify alone.

    python -m benchmarks.verifiers [pairs] [golds] [speed] [hostile] [--data=../shared/data] [--workers=2]

A reference is the right answer of a problem, as the problem set gives it.

pairs: grades pairs of a reference and an answer. For each pair, the right verdict is known. The pairs are in
tests/tasks/pairs.tsv and, if this file exists, in DATA/judge/pairs.tsv. Prints how many wrong verdicts betarank gives,
and how many math-verify alone gives.
golds: compares every reference of Minerva, OlympiadBench and MATH-500 with itself in other notations
(benchmarks/notations.py), and with the other references that look most similar.
speed: grades the worked solutions of GSM8K, MATH-500, AIME 2024 and AMC 2023, whose final answers are the references.
hostile: grades 200 answers that try to reach files and variables.
Without a name, all four parts run. golds and speed need the problem sets in DATA/reasoning.
"""

import argparse
import collections
import contextlib
import csv
import dataclasses
import difflib
import json
import os
import pathlib
import re
import tempfile
import time
from unittest import mock

from benchmarks.notations import notations
from betarank.data.reasoning import ANSWER_MARK
from betarank.tasks.task_set import Task, TaskConfig, TaskSet
from betarank.tasks.verifiers import Verdict, Verifier, VerifierConfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared' / 'data'
DATA = SHARED / 'reasoning'
PARTS = ('pairs', 'golds', 'speed', 'hostile')
SETS = ('gsm8k_train', 'gsm8k_test', 'math500', 'aime24', 'amc23')


def gold(data: pathlib.Path, name: str) -> list[tuple[str, Task]]:
  """Returns (worked solution, task) for every problem of the set DATA/`name`.jsonl.

  The final answer in the solution is written as the task's answer_format demands.
  """
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
  """Returns `count` pairs (text, task). The texts are answers that try to run code, or to take forever.

  Some of the tasks are math problems. The others come from reasoning-gym, where some scorers evaluate the answer as
  an expression.

  canary: the path of a file that the answers try to create.
  """
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


def alone(gold: str, answer: str) -> bool:
  """Returns whether math-verify judges the answer right, without betarank's rules and time limits."""
  import math_verify

  return math_verify.verify(math_verify.parse(f'${gold}$'), math_verify.parse(answer))


def plainly(items: list[tuple[str, Task]]) -> dict[str, float]:
  start = time.perf_counter()
  right = sum(alone(task.reference, text) for text, task in items)
  return {'right': right / len(items), 'seconds': time.perf_counter() - start}


def boxed(answer: str, gold: str) -> tuple[str, Task]:
  return f'\\boxed{{{answer}}}', Task('', '', '', gold, 'math', 'boxed')


def pairs(data: pathlib.Path, verifier: Verifier) -> None:
  """Prints how many pairs (reference, answer) get a wrong verdict from betarank, and how many from math-verify.

  The pairs and their right verdicts are in tests/tasks/pairs.tsv and, if it exists, DATA/judge/pairs.tsv.
  """
  print(f'{"pairs":28}{"":14}{"right":>8}{"wrong":>8}{"false right":>14}{"false wrong":>14}{"undecided":>12}')
  for path in (ROOT / 'tests' / 'tasks' / 'pairs.tsv', data / 'judge' / 'pairs.tsv'):
    if not path.is_file():
      continue
    with path.open(encoding='utf-8', newline='') as file:
      rows = [row for row in csv.DictReader(file, delimiter='\t', quoting=csv.QUOTE_NONE) if row['answer']]
    truth = [int(row['right']) for row in rows]
    task = lambda row: Task('', '', '', row['gold'], 'math', 'line')
    ours = verifier.verify([(f"{ANSWER_MARK}{row['answer']}", task(row)) for row in rows])
    theirs = [int(alone(row['gold'], f'\\boxed{{{row["answer"]}}}')) for row in rows]
    for name, verdicts in (('betarank', ours), ('math-verify', theirs)):
      counts = collections.Counter(zip(truth, map(int, verdicts)))
      print(f'{path.parent.name + "/" + path.name:28}{name:14}{sum(truth):8d}{len(truth) - sum(truth):8d}'
            f'{counts[0, 1]:14d}{counts[1, 0]:14d}{counts[0, -1] + counts[1, -1]:12d}')
    lost = [row for row, right, a, b in zip(rows, truth, ours, theirs) if a != right == b]
    for row in lost:
      print(f'  only math-verify is right: gold {row["gold"]!r}, answer {row["answer"]!r}')


def golds(data: pathlib.Path, verifier: Verifier) -> None:
  """Runs two tests on each set of problems, and prints the verdicts that are wrong.

  In the first test, the answers to a problem are its own reference in other notations. All of them should be judged
  right. In the second test, the answers are references of other problems, namely those that look most like its own
  reference (see `_nearest`). All of them should be judged wrong.
  """
  for name in ('minerva_math', 'olympiadbench', 'math500'):
    path = data / 'reasoning' / f'{name}.jsonl'
    if not path.is_file():
      print(f'{name}: left out, because there is no {path}')
      continue
    tasks = TaskSet(TaskConfig(f'jsonl:{path}'), split='all')
    references = list(dict.fromkeys(task.reference for task in tasks))
    items = [(other, gold) for gold in references for other in notations(gold)]
    verdicts = verifier.verify([boxed(other, gold) for other, gold in items])
    accepted = collections.Counter(gold for (_, gold), verdict in zip(items, verdicts) if verdict == Verdict.RIGHT)
    few = [gold for gold in references if accepted[gold] < 2]
    print(f'{name}: {len(tasks)} of {tasks.records} problems, {len(references)} different golds; '
          f'{accepted.total()} of {len(items)} other notations accepted; golds with fewer than two: {few or "none"}')
    for left_out in tasks.left_out:
      print(f'  left out: {left_out}')
    for (other, gold), verdict in zip(items, verdicts):
      if verdict != Verdict.RIGHT:
        print(f'  not accepted ({verdict.name.lower()}): gold {gold!r}, answer {other!r}')
    near = [(other, gold) for gold in references for other in _nearest(gold, references)]
    for (other, gold), verdict in zip(near, verifier.verify([boxed(other, gold) for other, gold in near])):
      if verdict != Verdict.WRONG:
        print(f'  another gold {verdict.name.lower()}: gold {gold!r}, answer {other!r}')


def _nearest(gold: str, references: list[str], count: int = 3) -> list[str]:
  """Returns the `count` other references whose texts are most similar to `gold`.

  References that differ from `gold` only in layout, such as spaces and delimiters, are left out.
  """
  bare = lambda text: re.sub(r'[\s${}]|\\left|\\right|\\!', '', text).lstrip('+')
  others = [other for other in references if bare(other) != bare(gold)]
  return difflib.get_close_matches(gold, others, count, cutoff=0.0)


def speed(data: pathlib.Path, config: VerifierConfig) -> None:
  """Prints verdicts and seconds of up to three runs on each set of problems.

  The first run grades the worked solutions as in RL. The second run grades the references themselves, in worker
  processes: it skips the quick comparison that RL tries first. The third run grades the solutions with math-verify
  alone. For gsm8k_train, there is only the first run.
  """
  for name in SETS:
    items = gold(data / 'reasoning', name)
    with Verifier(config) as verifier:
      _show(f'{name} ({len(items)})', grade(verifier, items))
    if name != 'gsm8k_train':
      references = [(f'\nAnswer: {task.reference}', dataclasses.replace(task, answer_format='line'))
                    for _, task in items]
      with Verifier(config) as verifier, mock.patch.object(Verifier, '_grade_here', lambda *_: None):
        _show('  references by workers, with start', grade(verifier, references))
      _show('  math-verify in this process', plainly(items))


def attacks(config: VerifierConfig) -> None:
  """Prints the verdicts on hostile answers, and the files that the answers have created."""
  with tempfile.TemporaryDirectory() as folder, Verifier(config) as verifier:
    canary = os.path.join(folder, 'canary')
    with mock.patch.dict(os.environ, BETARANK_CANARY='secret'), contextlib.suppress(KeyboardInterrupt):
      items = hostile(canary)
      _show(f'hostile ({len(items)})', grade(verifier, items))
    print(f'hostile: files made: {os.listdir(folder)}; {dict(verifier.counts)}')


def _show(name: str, result: dict[str, float]) -> None:
  columns = ('right', 'wrong', 'undecided', 'timeouts', 'crashes', 'plain', 'seconds')
  if not _show.headed:
    print(f'{"":36}' + ''.join(f'{column:>11}' for column in columns))
    _show.headed = True
  cells = (f'{result[c]:11.2%}' if c == 'right' else f'{result[c]:11.2f}' if c == 'seconds' else f'{result[c]:11d}'
           if c in result else f'{"-":>11}' for c in columns)
  print(f'{name:36}' + ''.join(cells), flush=True)


_show.headed = False


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('parts', nargs='*', choices=(*PARTS, []), metavar='PART', help=', '.join(PARTS))
  parser.add_argument('--data', type=pathlib.Path, default=SHARED)
  parser.add_argument('--workers', type=int, default=2)
  args = parser.parse_args()
  parts = args.parts or PARTS
  if not (args.data / 'reasoning').is_dir() and {'golds', 'speed'} & {*parts}:
    if args.parts:
      parser.error(f'golds and speed need the problem sets, and there is no folder {args.data / "reasoning"}')
    print(f'golds and speed are left out, because there is no folder {args.data / "reasoning"}')
    parts = ('pairs', 'hostile')
  config = VerifierConfig(workers=args.workers)
  for part in parts:
    if part == 'speed':
      speed(args.data, config)
    elif part == 'hostile':
      attacks(config)
    else:
      with Verifier(config) as verifier:
        {'pairs': pairs, 'golds': golds}[part](args.data, verifier)


if __name__ == '__main__':
  main()
