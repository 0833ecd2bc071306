r"""Judges answers by the rules of RL and evaluation. Prints each verdict and the rule that decided it.

    betarank judge --gold='1,2' --answer='x = 2 or x = 1'
    betarank judge --gold='3/4' --format=boxed --answer='So it is \boxed{0.75}.'
    betarank judge pairs.tsv

The first line of a file names its columns: `gold` (the reference), `answer` and, if the right verdicts are known,
`right` (1 or 0). With the column `right`, only the pairs whose verdict differs from it are shown. Without it, every
pair is shown. The last lines count the verdicts.
"""

import csv
import io
import pathlib
import textwrap
from collections import Counter
from collections.abc import Sequence

from betarank.configs.errors import UserError, one_line
from betarank.configs.parser import Parser, place
from betarank.data.reasoning import ANSWER_MARK
from betarank.tasks.answers import ANSWER_FORMATS
from betarank.tasks.records import Task
from betarank.tasks.verifiers import Grade, Verifier, VerifierConfig

_WIDTH = 80
_KNOWN = {'1': 'right', '0': 'wrong', 'right': 'right', 'wrong': 'wrong', 'true': 'right', 'false': 'wrong'}


def main(argv: Sequence[str]) -> None:
  """Prints the verdict on one pair, or on the pairs of a file. Raises UserError if the arguments or the file can't be
  used.
  """
  parser = Parser('betarank judge', __doc__)
  parser.add_argument('file', nargs='?', type=place, help='tab-separated pairs, with a header')
  parser.add_argument('--gold', help='the reference')
  parser.add_argument('--answer', help='the final answer; with --format, a text that holds one')
  parser.add_argument('--format', default='', choices=('', *ANSWER_FORMATS), help='how the answer is cut out of a text')
  parser.add_argument('--deadline_s', type=float, default=20.0, help='CPU time for one pair (default 20)')
  args = parser.parse_args(argv)
  if bool(args.file) == (args.gold is not None and args.answer is not None):
    raise UserError('betarank judge: give either --gold and --answer, or a file of pairs')
  pairs = _read(args.file) if args.file else [(args.gold, args.answer, '')]
  try:
    config = VerifierConfig(deadline_s=args.deadline_s)
  except ValueError as error:
    raise UserError(f'--{error}') from None
  with Verifier(config) as verifier:
    grades = verifier.grade([_item(gold, answer, args.format) for gold, answer, _ in pairs])
  shown = [(pair, grade) for pair, grade in zip(pairs, grades) if grade.verdict.name.lower() != pair[2]]
  print('\n\n'.join(_describe(gold, answer, right, grade) for (gold, answer, right), grade in shown))
  if args.file:
    print(('\n' if shown else '') + _summary([right for _, _, right in pairs], grades))


def _item(gold: str, answer: str, answer_format: str) -> tuple[str, Task]:
  """Returns one pair as (text, task), the form that `Verifier.grade` takes.

  answer_format: where the final answer is in `answer`: 'line' or 'boxed'. '' means that `answer` is the final answer.
  """
  text = answer if answer_format else f'{ANSWER_MARK}{answer}'
  lines = 1 if answer_format else 0
  return text, Task('', '', '', gold, 'math', answer_format or 'line', answer_lines=lines)


def _read(path: str) -> list[tuple[str, str, str]]:
  """Returns (gold, answer, known verdict or '') for each line of a file.

  Raises:
    UserError: the file can't be read, or a line is bad. The message names the file and the line.
  """
  try:
    text = pathlib.Path(path).read_text(encoding='utf-8')
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror})') from None
  except UnicodeDecodeError as error:
    raise UserError(f'{path}: cannot be read ({error})') from None
  rows = csv.DictReader(io.StringIO(text), delimiter='\t', quoting=csv.QUOTE_NONE)
  if missing := {'gold', 'answer'} - set(rows.fieldnames or ()):
    raise UserError(f'{path}:1: no column {" and ".join(sorted(missing))}; the first line must name gold and answer, '
                    'separated by a tab')
  pairs = []
  for row in rows:
    if row['answer'] is None or None in row:
      raise UserError(f'{path}:{rows.line_num}: expected {len(rows.fieldnames)} columns')
    known = (row.get('right') or '').strip().lower()
    if known and known not in _KNOWN:
      raise UserError(f"{path}:{rows.line_num}: column 'right' must be 1 or 0, got {known!r}")
    pairs.append((row['gold'], row['answer'], _KNOWN.get(known, '')))
  if not pairs:
    raise UserError(f'{path}: no pairs')
  return pairs


def _describe(gold: str, answer: str, right: str, grade: Grade) -> str:
  verdict = grade.verdict.name.lower()
  lines = [
    ('gold', gold), ('answer', answer),
    ('extracted', '' if grade.answer in (None, answer) else grade.answer),
    ('gold is', grade.gold_reading), ('answer is', grade.answer_reading),
    ('verdict', verdict + (f', expected {right}' if right and right != verdict else '')), ('because', grade.rule)]
  return '\n'.join(textwrap.fill(one_line(text), _WIDTH, initial_indent=f'{name:11}', subsequent_indent=' ' * 11)
                   for name, text in lines if text)


def _summary(expected: list[str], grades: list[Grade]) -> str:
  """Returns a table of how many pairs (gold, answer) were judged right, wrong or undecided.

  The table has up to three rows: for pairs that should be judged right, for pairs that should be judged wrong, and for
  pairs whose correct verdict isn't known.

  expected: the correct verdict of each pair, 'right' or 'wrong'; '' if it isn't known.
  """
  counts = Counter((right, grade.verdict.name.lower()) for right, grade in zip(expected, grades))
  names = ('right', 'wrong', 'undecided')
  lines = [f'{"":16}' + ''.join(f'{"judged " + name:>18}' for name in names)]
  for right in dict.fromkeys(expected):
    label = f'{right} in truth' if right else 'pairs'
    lines.append(f'{label:16}' + ''.join(f'{counts[right, name]:18d}' for name in names))
  return '\n'.join(lines)
