"""Tests which answers are right or wrong, by a table of judged pairs of each kind. Also tests the parts of the judge.
"""

import csv
import pathlib
import time
from fractions import Fraction

import pytest

from betarank.configs.errors import run_main
from betarank.tasks import command
from betarank.tasks.judging import expressions, latex, notation, values
from betarank.tasks.judging.comparison import Verdict, judge
from betarank.tasks.judging.latex import Unreadable, Unsupported, tokenize
from betarank.tasks.judging.numerals import exact_number, is_numeral, plain
from betarank.tasks.task_set import Task
from betarank.tasks.verifiers import Verifier, VerifierConfig

PAIRS = pathlib.Path(__file__).with_name('pairs.tsv')
SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data' / 'judge' / 'pairs.tsv'


def table(path):
  with path.open(encoding='utf-8', newline='') as file:
    return list(csv.DictReader(file, delimiter='\t', quoting=csv.QUOTE_NONE))


@pytest.fixture(scope='module')
def verifier():
  with Verifier(VerifierConfig(workers=1, deadline_s=30.0)) as verifier:
    yield verifier


def judged(verifier, rows, answer_format):
  form = '\nAnswer: {}\n' if answer_format == 'line' else 'So it is \\boxed{{{}}}.'
  items = [(form.format(row['answer']), Task('', '', '', row['gold'], 'math', answer_format)) for row in rows]
  return verifier.grade(items)


@pytest.mark.parametrize('answer_format', ['line', 'boxed'])
def test_every_kind_of_pair(verifier, answer_format):
  rows = table(PAIRS)
  if answer_format == 'boxed':  # a box is balanced, and what is in it is one line of the file
    rows = [row for row in rows if row['kind'] != 'malformed']
  wrong = [(row['kind'], row['gold'], row['answer'], row['right'], grade.verdict.name, grade.rule)
           for row, grade in zip(rows, judged(verifier, rows, answer_format))
           if grade.verdict != int(row['right'])]
  assert not wrong


def test_the_table_covers_both_directions():
  kinds = {}
  for row in table(PAIRS):
    kinds.setdefault(row['kind'], set()).add(row['right'])
  assert len(table(PAIRS)) > 500 and len(kinds) > 20
  assert all(sides == {'0', '1'} for kind, sides in kinds.items() if kind != 'malformed')


@pytest.mark.skipif(not SHARED.exists(), reason='no ../shared/data')
def test_shared_pairs(verifier):
  import math_verify

  rows = table(SHARED)
  grades = judged(verifier, rows, 'boxed')
  false = {right: [row for row, grade in zip(rows, grades) if row['right'] == right and grade.verdict != int(right)]
           for right in '01'}
  assert len(rows) == 149 and len(false['0']) <= 3 and len(false['1']) <= 6, false
  for row in false['0'] + false['1']:
    alone = math_verify.verify(math_verify.parse(f'${row["gold"]}$'), math_verify.parse(f'\\boxed{{{row["answer"]}}}'))
    assert alone != (row['right'] == '1'), row


def test_a_verdict_says_why():
  right = judge('1,2', 'x = 2 or x = 1')
  assert (right.verdict, right.rule) == (Verdict.RIGHT, 'the same list, in any order')
  assert right.gold == '2 values, a list: 1; 2' and right.answer == '2 alternatives: x=2; x=1'
  wrong = judge('(1,234)', '1234')
  assert (wrong.verdict, wrong.rule) == (Verdict.WRONG, 'one is several values, the other is one')
  assert judge('7', r'\frac{7').rule == 'the answer cannot be read: } is missing'
  assert judge('10 \\text{ m}', '10 \\text{ s}').rule == 'different units: m and s'


@pytest.mark.parametrize('gold,why', [
  (r'\frac{1}{0}', 'it has no value'), (r'\frac{', '} is missing'), ('', 'there is nothing to read'),
  ('$t(0,4]$', 'an interval is no factor'), ('7 8', 'two numbers stand side by side'),
  ('f(x)=ax+b, where $b$ is an arbitrary constant', 'neither a name nor mathematics'),
  ('9^{9^{9^9}}', 'a power is out of bounds'),
])
def test_golds_that_cannot_be_read_decide_nothing(gold, why):
  for answer in (gold, '1', 'x'):
    found = judge(gold, answer)
    assert found.verdict == Verdict.UNDECIDED and why in found.rule and not found.gold_is_read


def test_an_answer_without_a_value_is_wrong():
  for answer in (r'\frac{1}{0}', '9^{9^{9^9}}', r'\ln 0', '10^{10^{10}}'):
    assert judge('7', answer).verdict == Verdict.WRONG


@pytest.mark.parametrize('answer', [
  '3' * 100, '3' * 5000, '3 ' * 2000, '1A ' * 1000, '3,' * 2000, '1 000 ' * 500, '-' * 3000, '+1' * 2000, '(' * 5000,
  '3_' * 1000, '12:' * 1000, 'x = ' * 1000 + '3', 'and 3 ' * 800, '5 m ' * 1000, '{3}' * 1500, r'\frac{' * 500,
  '3' * 60 + ' base', '3 ' * 60 + '_'])
def test_no_answer_takes_long(answer):
  """Plain numbers are judged in the process of RL itself, without a deadline. Numbers of 40 digits used to take days.
  """
  for gold in ('7', '101_2', 'x=3'):
    began = time.process_time()
    judge(gold, answer)
    assert time.process_time() - began < 1


@pytest.mark.parametrize('text', [
  '10^9999', '-10^9999', '10^{-9999}', '1e9999', '3' * 5000, '3.' + '3' * 5000, f'0.\\overline{{{"3" * 5000}}}',
  f'3 {"3" * 5000}/2', f'{"3" * 5000}_8', f'\\sqrt[{"3" * 5000}]{{2}}', f'\\frac{{d^{"3" * 5000}y}}{{dx}}', '3000!',
  '2^{9999} \\text{ m}', '10^{9999}\\%', f'x^{"3" * 5000}'])
def test_a_number_too_long_to_be_written_is_judged(text):
  """Python can't convert integers of more than 4300 digits from or to text. Such an answer used to end a run of RL."""
  assert judge('7', text).verdict == Verdict.WRONG
  assert judge(text, '7').verdict in (Verdict.WRONG, Verdict.UNDECIDED)
  Verifier(VerifierConfig())._grade_here(text, Task('', '', '', '7', 'math', 'line'))  # in the trainer's own process


def test_math_verify_is_asked_about_what_only_it_may_know():
  asked = []

  def by_math_verify(gold, answer):
    asked.append((gold, answer))
    return True

  assert judge('2', r'\int_0^2 dx', by_math_verify).verdict == Verdict.RIGHT
  assert asked == [('2', r'\int _ 0 ^ 2 d x')]
  assert judge('2', r'\int_0^2 dx').verdict == Verdict.UNDECIDED  # without it
  assert judge(r'\int_0^2 dx', '2', lambda *_: None).verdict == Verdict.UNDECIDED  # or if it can't read the gold


@pytest.fixture
def judge_file(tmp_path, capsys):
  """Returns a function (lines, *flags) -> the output of `betarank judge` for a file of these lines."""
  path = tmp_path / 'pairs.tsv'

  def run(*lines):
    path.write_text(''.join('\t'.join(line.split()) + '\n' for line in lines))
    run_main(lambda: command.main([str(path)]))
    return capsys.readouterr().out

  return run


def test_the_command_shows_pairs_that_are_judged_otherwise_than_is_known(judge_file, capsys):
  out = judge_file('gold answer right', '3/4 0.75 1', '7 8 0', '5 6 1', '2 2.0 0')
  shown, table = out.rsplit('\n\n', 1)
  assert [[line[:11].strip(), line[11:]] for line in shown.splitlines() if line[:6] in ('gold  ', 'answer', 'verdic')
          and not line.startswith('answer is')] == [
    ['gold', '5'], ['answer', '6'], ['verdict', 'wrong, expected right'],
    ['gold', '2'], ['answer', '2.0'], ['verdict', 'right, expected wrong']]
  assert [' '.join(line.split()) for line in table.splitlines()] == [
    'judged right judged wrong judged undecided', 'right in truth 1 1 0', 'wrong in truth 1 1 0']
  with pytest.raises(SystemExit) as end:
    judge_file('gold answer right', '3/4 0.75 1', '7 8 perhaps')
  assert end.value.code == 2
  assert capsys.readouterr().err.endswith("pairs.tsv:3: column 'right' must be 1 or 0, got 'perhaps'\n")


def test_the_command_shows_every_pair_if_nothing_is_known(judge_file, capsys):
  shown, table = judge_file('gold answer', '3/4 0.75', '7 8').rsplit('\n\n', 1)
  assert [line.split()[1] for line in shown.splitlines() if line.startswith('verdict ')] == ['right', 'wrong']
  assert table.splitlines()[1].split() == ['pairs', '1', '1', '0']
  run_main(lambda: command.main(['--gold=7', '--answer=So it is \\boxed{7.0}.', '--format=boxed']))
  lines = capsys.readouterr().out.splitlines()
  assert 'extracted  7.0' in lines and 'verdict    right' in lines


# Tokens


@pytest.mark.parametrize('text,tokens', [
  ('1,234', ['1234']), ('(1,234)', ['(', '1', ',', '234', ')']), ('1, 234', ['1', ',', '234']),
  ('27,54,108', ['27', ',', '54', ',', '108']), ('1,234, 5,678', ['1234', ',', '5678']), ('10,00', ['10', ',', '00']),
  (r'10{,}000', ['10000']), (r'11,\! 111,\! 100', ['11111100']), ('1 000 000', ['1000000']), (r'3{,}14', ['3.14']),
  ('3.2e5', ['3.2e5']), ('2e^{3}', ['2', 'e', '^', '{', '3', '}']), ('x = 5', ['x', '=', '5']),
  (r'\text{ p.m.}', ["'pm"]), ('no solution', ["'no", "'solution"]), ('abc', ['a', 'b', 'c']),
  ('sin x', [r'\sin', 'x']),
  (r'\left(\dfrac12\right)', ['(', r'\frac', '12', ')']), ('5 m', ['5', "'m"]), ('5m', ['5', 'm']),
  ('$5$', ['5']), ('$5', [r'\dollar', '5']), ('x²', ['x', '^', '{', '2', '}']), ('x >= 5', ['x', r'\ge', '5']),
  (r'\\frac{1}{2}', [r'\frac', '{', '1', '}', '{', '2', '}']),
])
def test_tokens(text, tokens):
  assert tokenize(text) == tokens


@pytest.mark.parametrize('text', ['(', ')', '{', r'\{1,2', '(1,2}', '{' * 50 + '}' * 50, 'x' * 10_001, 'x ' * 4100])
def test_text_that_is_not_well_formed(text):
  with pytest.raises(Unreadable):
    tokenize(text)


def tree(text):
  return expressions.parse(tokenize(text))


@pytest.mark.parametrize('text,value', [
  ('1\\frac{1}{2}', '3/2'), ('137 \\frac12', '275/2'), ('1 1/2', '3/2'), ('-2^2', '-4'), ('2^{-1}', '1/2'), ('3!', '6'),
  ('2^10', '1024'), (r'\frac9{18}', '1/2'), (r'0.\overline{3}', '1/3'), ('0.1666...', '1/6'), (r'\binom{5}{2}', '10'),
  (r'\sqrt[3]{8}', '2'), (r'\lfloor 7/2 \rfloor', '3'), ('|-3|', '3'), ('-1./4', '-1/4'), ('4.5e3', '4500'),
  (r'4.5 \times 10^{-3}', '9/2000'), (r'\gcd(12, 18)', '6'), ('6/2(1+2)', '9'), ('5%', '1/20'),
  (r'{5 \choose 2}', '10'),
])
def test_exact_values(text, value):
  assert values.exact(tree(text)) == Fraction(value)


@pytest.mark.parametrize('text', ['7 8', '7 +', '* 7', '^2', 'x^^2', '()', r'\frac{1}', r'\sqrt', '|x', 'x_', "'"])
def test_expressions_that_are_not_well_formed(text):
  with pytest.raises(Unreadable):
    tree(text)


@pytest.mark.parametrize('text', [r'\int x dx', r'\sum_{i=1}^n i', r'\lim_{x \to 0} x', r'\foo'])
def test_expressions_for_math_verify(text):
  with pytest.raises(Unsupported):
    tree(text)


@pytest.mark.parametrize('a,b,same', [
  ('(x+1)^2', 'x^2+2x+1', True), (r'\sin 2x', r'2\sin x\cos x', True), ('2^{2020}', '2^{2020}-1', False),
  (r'\sin \pi', '0', True), ('10^{-80}', '10^{-81}', False), ('e^{-100}', 'e^{-101}', False), ('|x|', 'x', False),
  ('(-1)^n', r'\cos(n\pi)', True), (r'\ln 2', r'\log 2', True), (r'\log 100', '2', True), (r'\ln 100', '2', False),
  (r'\infty', r'-\infty', False), ('f(2)', '2f(2)', False), ('I(0)', '0', False), (r'\dot x', r'\frac{dx}{dt}', True),
])
def test_values(a, b, same):
  assert values.equal(tree(a), tree(b)) is same and values.equal(tree(b), tree(a)) is same


@pytest.mark.parametrize('gold,answer,same', [
  ('0.6667', '2/3', True), ('0.667', '2/3', False), ('1/3', '0.333333', True), ('1/3', '0.33333', False),
  ('7', '7.0000001', False), ('0.3', '0.30000000000000004', True), ('20.39', '20.394', True),
  ('20.39', '20.396', False),
  ('20.394', '20.39', False), (r'\pi', '3.14159265', True), (r'\pi', '355/113', False), ('4.5e33', '4.52e33', False),
])
def test_decimals_stand_for_what_they_round(gold, answer, same):
  assert values.near(tree(gold), tree(answer)) is same


# Plain numbers, which are judged in the trainer's own process


@pytest.mark.parametrize('text,expected', [
  ('12', 12), ('-0.50', Fraction(-1, 2)), ('1,234,567', 1234567), ('1,23', None), ('3/4', Fraction(3, 4)),
  (r'-\frac{3}{4}', Fraction(-3, 4)), (r'\dfrac{3}{4}', Fraction(3, 4)), ('.5', Fraction(1, 2)), ('1/0', None),
  ('', None), ('-', None), ('1e5', 100000), ('x', None), (r'\$18', 18), ('$18', 18), ('(073)', 73), ('(1,234)', None),
  ('٤', None), (r'10{,}000', 10000), ('9' * 100, int('9' * 100)), ('9' * 101, None), ('1_000', None), ('+3', 3),
  (r'3.2 \times 10^{5}', 320000), ('10^{-8}', Fraction(1, 10**8)), ('50%', None), ('7 8', None), ('1e999999999', None),
])
def test_exact_numbers(text, expected):
  assert exact_number(text) == expected


def test_only_plain_numbers_are_read_here():
  for text in ('x', '9^{9^9}', r'\sqrt{2}', 'sin 1', '9!', '(' * 101, r'\text{7}', '7 apples', '٤'):
    assert not is_numeral(text), text


@pytest.mark.parametrize('text,expected', [
  ('$5$.', '5'), (r'\boxed{x+1}', 'x+1'), (r'$\boxed{\text{no}}$', 'no'), ('$a$ and $b$', '$a$ and $b$'),
  ('**7**', '7'), (r'\boxed{1}+\boxed{2}', r'\boxed{1}+\boxed{2}'), ('', ''), ('$', '$'), (' a \n b ', 'a b'),
])
def test_plain_text(text, expected):
  assert plain(text) == expected


def test_reading_is_bounded():
  """The longest and deepest texts that are accepted are read, or raise Unreadable, without exhausting the stack."""
  for text in ('(' * latex.MAX_DEPTH + '1' + ')' * latex.MAX_DEPTH, '+'.join('x' for _ in range(1900)),
               ','.join('1' for _ in range(1900)), r'\pm ' * 20 + '1', '{' * 40 + 'x' + '}' * 40, '-' * 3000 + '1'):
    try:
      notation.read(text)
    except Unreadable:
      continue
  assert judge('1', '-' * 3000 + '1').verdict == Verdict.RIGHT  # 3000 signs are none
