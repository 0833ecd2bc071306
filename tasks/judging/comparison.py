"""Decides whether an answer is right, by comparing it with the reference answer, which is called the gold.

    judge('1,2', 'x=2 or x=1')      Judgement(RIGHT, 'the same list, in any order', ...)

Each rule compares one kind of notation, such as intervals, lists or equations. If a rule can't decide, the verdict is
undecided. Expressions are compared by value (values.py). For notation that only math-verify can parse, `judge` calls
its argument `by_math_verify`. Only worker processes pass a function that calls math-verify. The default function leaves
such answers undecided.
"""

import dataclasses
import enum
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

from betarank.tasks.judging import equations, families, notation, regions, values, wording
from betarank.tasks.judging.equations import Claim
from betarank.tasks.judging.expressions import Node
from betarank.tasks.judging.latex import Unreadable
from betarank.tasks.judging.readings import (
  Clock,
  Digits,
  Empty,
  Family,
  Interval,
  Many,
  Matrix,
  Ratio,
  Reading,
  Relation,
  Residue,
  Union,
  Value,
  Words,
)
from betarank.tasks.judging.value_rules import ByMathVerify, ValueRules


class Verdict(enum.IntEnum):
  """The verdict on an answer. An undecided answer counts neither as right nor as wrong, in RL and in all metrics."""

  UNDECIDED = -1
  WRONG = 0
  RIGHT = 1


@dataclasses.dataclass(frozen=True)
class Judgement:
  """A verdict, the rule that decided, and how gold and answer were understood.

  rule: a phrase such as 'equal numbers, exactly'.
  gold, answer: descriptions such as 'number 1/2'.
  gold_is_read: False if the verdict is undecided because the gold can't be read.
  """

  verdict: Verdict
  rule: str
  gold: str = ''
  answer: str = ''
  gold_is_read: bool = True


def judge(gold: str, answer: str, by_math_verify: ByMathVerify = lambda gold, answer: None) -> Judgement:
  """Judges whether `answer` is right if `gold` is the reference. Returns the verdict with its reason.

  by_math_verify: a function (gold, answer) that returns whether math-verify considers them equal, or None if it can't
    decide. The default function always returns None.
  """
  if why := why_unreadable(gold, by_math_verify):
    return Judgement(Verdict.UNDECIDED, f'the gold cannot be read: {why}', gold_is_read=False)
  wanted = notation.read(gold)
  try:
    given = notation.read(answer)
  except Unreadable as error:
    return Judgement(Verdict.WRONG, f'the answer cannot be read: {error}', str(wanted), 'nothing')
  compare = _Comparison(by_math_verify)
  try:
    same = compare.same(wanted, given)
  except values.TooHard as error:  # the answer's value, because that of the gold was checked before
    return Judgement(Verdict.WRONG, f'the answer has no value: {error}', str(wanted), str(given))
  verdict = Verdict.UNDECIDED if same is None else Verdict.RIGHT if same else Verdict.WRONG
  return Judgement(verdict, compare.rule, str(wanted), str(given))


@functools.lru_cache(maxsize=1024)
def why_unreadable(gold: str, by_math_verify: ByMathVerify) -> str:
  """Returns the reason why this gold can't be read, so that no answer can be compared with it; '' if it can be read.

  by_math_verify: as for `judge`.
  """
  try:
    reading = notation.read(gold)
    for part in _parts(reading):
      if isinstance(part, Words) and not wording.is_name(part.tokens):
        return f'{part.spelled!r} is neither a name nor mathematics'
      if isinstance(part, Value):
        if part.node is not None:
          values.check(part.node)
        elif by_math_verify(part.text, part.text) is None:
          return 'math-verify cannot read it either'
  except Unreadable as error:
    return str(error)
  except values.TooHard as error:
    return f'it has no value: {error}'
  return ''


def _parts(reading: Reading) -> Iterator[Reading]:
  """Yields the reading (a parsed answer) and all readings inside it, such as the items of a list."""
  yield reading
  parts = [*getattr(reading, 'items', ()), *getattr(reading, 'sides', ()), getattr(reading, 'low', None),
           getattr(reading, 'high', None), *(getattr(reading, 'parts', ()) if isinstance(reading, Union) else ()),
           *(cell for row in getattr(reading, 'rows', ()) for cell in row)]
  for part in parts:
    if part is not None:
      yield from _parts(part)


# These match tokens with a space between two. A letter in \text is a word, so it begins with a quote.
_CHOICE = re.compile(r"\( '([A-Z]) \) (.+)|(?:\( )?'?([A-Z])(?: \))?")
# Another letter that may be a choice. A is also an article, I is also a Roman numeral, and 7 N is a force.
_LETTER = r"'?(?:(?!A '(?!is|or|and|was))[A-HJ-Z])(?= [])},;:/=|.]| '|$)"
_ANOTHER = re.compile('|'.join((
  rf"(?:^|(?:[\[(,;:/=|.]|\\to|\\Rightarrow|'\S+) ){_LETTER}",  # C) D, (C) not D
  rf"\d (?!'?[JKLNVW]\b){_LETTER}",  # (C) 7 B
  r"(?:^| )'?[A-Z] \.|\( '?[A-Z] \)",  # C. 7 D. 8
  r"'(?i:but|actually|wait|wrong|incorrect)\b",
  r"^'(?i:or|and|is)\b|^[,;/=] ",
)))


class _Comparison(ValueRules):
  """Compares two readings (parsed answers, see readings.py) by the first rule that applies to them.

  A rule is a method (gold, answer). It returns True or False, None if it can't decide, or NotImplemented if it doesn't
  apply to such readings.
  """

  def same(self, gold: Reading, answer: Reading) -> bool | None:
    """Returns whether the answer means the same as the gold; None if this can't be decided."""
    if gold.tokens and gold.tokens == answer.tokens:
      return self.decide(True, 'the same notation')
    for rule in (self._choices, self._words, self._unparsed, self._empty, self._digits, self._residues, self._families,
                 self._clocks, self._regions, self._named, self._lists, self._relations, self._matrices, self._ratios,
                 self.quantities):
      decided = rule(gold, answer)
      if decided is not NotImplemented:
        return decided
    return self.decide(False, f'the gold is a {gold.kind}, the answer a {answer.kind}')

  # Words, nothing

  def _choices(self, gold: Reading, answer: Reading):
    """Compares the letters of multiple-choice answers, such as C, (C), or (C) 7.

    If the letters are the same, and neither gold nor answer is only a letter, other rules compare their values.
    """
    letter, other = _choice(gold), _choice(answer)
    if letter and other and letter != other:
      return self.decide(False, 'another choice')
    if letter and letter == other and any(letter == ''.join(side.tokens).strip("(').{}") for side in (gold, answer)):
      return self.decide(True, 'the same choice')
    return NotImplemented

  def _words(self, gold: Reading, answer: Reading):
    if not isinstance(gold, Words) and not isinstance(answer, Words):
      return NotImplemented
    wanted, given = (side.spelled.replace(' ', '').replace("'", '') for side in (gold, answer))
    given = given if len(given) == 1 else given.lower()  # variables differ in case, words don't
    if (wanted and wanted == given) or (_choice(gold) and _choice(gold) == _choice(answer)):
      return self.decide(True, 'the same words')
    if isinstance(gold, Words):
      return self.decide(False, 'other words')
    return self.decide(False, 'the answer is words, the gold is not')

  def _unparsed(self, gold: Reading, answer: Reading):
    if not any(isinstance(side, Value) and side.node is None and side.unit is None for side in (gold, answer)):
      return NotImplemented
    same = self.by_math_verify(gold.text, answer.text)
    return self.decide(same, 'compared by math-verify' if same is not None else 'math-verify cannot read it either')

  def _empty(self, gold: Reading, answer: Reading):
    if not isinstance(gold, Empty) and not isinstance(answer, Empty):
      return NotImplemented
    same = isinstance(gold, Empty) and isinstance(answer, Empty)
    return self.decide(same, 'both are the empty set' if same else 'one is the empty set, the other is not')

  # Numerals, residues, families

  def _digits(self, gold: Reading, answer: Reading):
    if not isinstance(gold, Digits) and not isinstance(answer, Digits):
      return NotImplemented
    if isinstance(gold, Digits) and isinstance(answer, Digits):
      same = (gold.digits, gold.base) == (answer.digits, answer.base)
      return self.decide(same, 'digits and base agree' if same else 'digits or bases differ')
    stated, other = (gold, answer) if isinstance(gold, Digits) else (answer, gold)
    if not isinstance(other, Value):
      return self.decide(False, 'one is a numeral in a base, the other is not')
    same = ''.join(other.tokens).lstrip('0') == stated.digits
    return self.decide(same, 'the same digits, the base left out' if same else 'other digits than those in the base')

  def _residues(self, gold: Reading, answer: Reading):
    if isinstance(gold, Family) and isinstance(answer, Residue):
      return self._families(gold, families.as_family(answer))
    if isinstance(gold, Residue):
      if isinstance(answer, Family):
        return self._families(families.as_family(gold), answer)
      if isinstance(answer, Residue):
        named = gold.name == answer.name or not gold.name or not answer.name
        same = named and self._families(families.as_family(gold), families.as_family(answer))
        return self.decide(same, 'the same residue' if same else 'another residue or modulus')
      return self.decide(False, 'the gold is a residue, the answer names no modulus')
    if isinstance(answer, Residue):
      if answer.name or not isinstance(gold, Value) or gold.node is None:
        return self.decide(False, 'the answer is a residue, the gold is not')
      return self.decide(values.equal(gold.node, answer.value), 'the number before the modulus')
    return NotImplemented

  def _families(self, gold: Reading, answer: Reading):
    if not isinstance(gold, Family) and not isinstance(answer, Family):
      return NotImplemented
    if not isinstance(gold, Family) or not isinstance(answer, Family):
      return self.decide(False, 'one is a family of values, the other is not')
    return self.decide(families.same_family(gold, answer), 'families of values, compared as sets')

  def _clocks(self, gold: Reading, answer: Reading):
    if not isinstance(gold, Clock) and not isinstance(answer, Clock):
      return NotImplemented
    times = [side.minutes if isinstance(side, Clock) else _minutes(side) for side in (gold, answer)]
    if None in times:
      return self.decide(False, 'one is a time of day, the other is not')
    half_open = not isinstance(gold, Clock) or not isinstance(answer, Clock)
    same = times[0] == times[1] or (half_open and min(times) < 720 and abs(times[0] - times[1]) == 720)
    return self.decide(same, 'the same time of day' if same else 'another time of day')

  # Intervals and inequalities

  def _regions(self, gold: Reading, answer: Reading):
    """Compares intervals, unions and inequalities of one variable. Gold and answer may use different notations."""
    if not (regions.is_region(gold) or regions.is_region(answer)):
      return NotImplemented
    wanted, given = regions.region(gold, open_pairs=True), regions.region(answer, open_pairs=True)
    if wanted is None or given is None:
      if isinstance(gold, Relation | Many) and isinstance(answer, Relation | Many):
        return NotImplemented  # they have several variables
      return self.decide(False, 'one is an interval or inequality, the other is not')
    if wanted[0] and given[0] and wanted[0] != given[0]:
      return self.decide(False, f'the inequalities are about {wanted[0]} and {given[0]}')
    if len(wanted[1]) != len(given[1]):
      return self.decide(False, 'other intervals')
    same = self._matched(wanted[1], given[1], self._same_interval)
    return self.decide(same, 'the same intervals' if same else 'other ends, or open where the gold is closed')

  def _same_interval(self, gold: Interval | Reading, answer: Interval | Reading) -> bool | None:
    if not isinstance(gold, Interval) or not isinstance(answer, Interval):
      return self.same(gold, answer) if not isinstance(gold, Interval) and not isinstance(answer, Interval) else False
    if [gold.closed[i] for i, end in enumerate((gold.low, gold.high)) if not regions.infinite(end)] != [
        answer.closed[i] for i, end in enumerate((answer.low, answer.high)) if not regions.infinite(end)]:
      return False
    return _all([self.same(gold.low, answer.low), self.same(gold.high, answer.high)])

  # Equations that give a name to something

  def _named(self, gold: Reading, answer: Reading):
    """Compares equations that name a value, as in x = 3 or f(x) = x^2. The name may be missing in gold or answer.

    The answer is right if its value equals the gold's value. If gold and answer both have a name, the names must agree
    too.
    """
    if isinstance(gold, Many) and isinstance(answer, Many):
      return self._named_lists(gold, answer)
    if not isinstance(gold, Relation) and not isinstance(answer, Relation):
      return NotImplemented
    wanted, given = equations.claim(gold), equations.claim(answer)
    if wanted and given and wanted.name and given.name:
      return self._both_named(gold, answer, wanted, given)
    if wanted and wanted.name and not isinstance(answer, Relation):
      return self.decide(self.same(wanted.values[0], answer), 'the name left out: ' + self.rule)
    if isinstance(answer, Relation) and not isinstance(gold, Relation):
      if given is None:
        return self.decide(False, 'an equation, inequality or arrow is not its right side')
      same = any(self.same(gold, value) for value in given.values)
      return self.decide(same, ('a name before it: ' if given.name else 'a chain of equal values: ') + self.rule)
    return NotImplemented

  def _both_named(self, gold: Relation, answer: Relation, wanted: Claim, given: Claim) -> bool | None:
    name, other, said = wanted.name, given.name, given.values[0]
    if name.key != other.key and not name.may_be(other):
      swapped = self._equations(gold, answer)
      return swapped if swapped else self.decide(False, f'{name.key} and {other.key} are different names')
    if name.variable and other.variable and name.variable != other.variable:
      said = equations.renamed(said, other.variable, name.variable)
    return self.decide(self.same(wanted.values[0], said), 'what the names stand for: ' + self.rule)

  def _named_lists(self, gold: Many, answer: Many):
    """Compares lists of named values, such as x = 1, y = 2, in any order. One of them may be a pair such as (1, 2)."""
    if 'pair' in (gold.kind, answer.kind):
      wanted, given = (side.items if side.kind == 'pair' else equations.point(side) for side in (gold, answer))
      return self._in_order(wanted, given) if wanted and given else NotImplemented
    wanted, given = equations.names(gold), equations.names(answer)
    if wanted is None or given is None or len(set(wanted)) == 1 or len(set(given)) == 1:
      return NotImplemented
    keys, said = [name.key for name in wanted], dict(zip((name.key for name in given), answer.items))
    if sorted(keys) != sorted(name.key for name in given):
      return NotImplemented if any(name.kind != 'symbol' for name in wanted) else self.decide(False, 'other names')
    every = _all([self.same(item, said[key]) for key, item in zip(keys, gold.items)])
    return self.decide(every, 'each name has the same value' if every else 'a name has another value')

  # Lists, sets, pairs

  def _lists(self, gold: Reading, answer: Reading):
    if not isinstance(gold, Many) and not isinstance(answer, Many):
      return NotImplemented
    gold, answer = (_single(side) for side in (gold, answer))
    if not isinstance(gold, Many) and not isinstance(answer, Many):
      return self.decide(self.same(gold, answer), 'a set of one: ' + self.rule)
    if isinstance(gold, Matrix) or isinstance(answer, Matrix):
      return self._vectors(gold, answer)
    if not isinstance(gold, Many) or not isinstance(answer, Many):
      return self.decide(False, 'one is several values, the other is one')
    wanted, given = [equations.without_name(i) for i in gold.items], [equations.without_name(i) for i in answer.items]
    if 'pair' in (gold.kind, answer.kind):
      if 'set' in (gold.kind, answer.kind):
        return self.decide(False, 'a point is not a set')
      return self._in_order(wanted, given)
    if _repeats(wanted):
      same = self._matched(wanted, given, self.same) if len(wanted) == len(given) else False
    else:
      same = self._matched(wanted, self._distinct(given), self.same)
    return self.decide(same, 'the same list, in any order' if same else 'other items in the list')

  def _in_order(self, gold: Sequence[Reading], answer: Sequence[Reading]) -> bool | None:
    if len(gold) != len(answer):
      return self.decide(False, f'{len(gold)} values in the gold, {len(answer)} in the answer')
    same = _all([self.same(g, a) for g, a in zip(gold, answer)])
    return self.decide(same, 'the same values in the same order' if same else 'other values, or another order')

  def _matched(self, gold: Sequence, answer: Sequence, same: Callable) -> bool | None:
    """Returns whether gold and answer have the same items, in any order.

    Returns None if this depends on items for which `same` returns None.

    same: a function (item of the gold, item of the answer) -> True, False, or None if it can't decide.
    """
    if len(gold) != len(answer):
      return False
    left, unsure = list(answer), False
    for item in gold:
      verdicts = []
      for other in left:
        verdicts.append(same(item, other))
        if verdicts[-1]:
          break
      if True in verdicts:
        del left[verdicts.index(True)]
      elif None in verdicts:
        unsure = True
      else:
        return False
    return None if unsure else True

  def _distinct(self, items: list[Reading]) -> list[Reading]:
    kept: list[Reading] = []
    for item in items:
      if not any(self.same(item, other) for other in kept):
        kept.append(item)
    return kept

  # Equations and other relations

  def _relations(self, gold: Reading, answer: Reading):
    if not isinstance(gold, Relation) and not isinstance(answer, Relation):
      return NotImplemented
    if not isinstance(gold, Relation) or not isinstance(answer, Relation):
      return self.decide(False, 'one is a relation, the other is not')
    if gold.operators == answer.operators == ('=',):
      return self._equations(gold, answer)
    if len(gold.operators) == len(answer.operators) == 1 and (
        {*gold.operators, *answer.operators} <= regions.DIRECTIONS.keys()):
      return self._inequalities(gold, answer)
    same = gold.operators == answer.operators and _all(
      [a is b or (a is not None and b is not None and self.same(a, b)) for a, b in zip(gold.sides, answer.sides)])
    return self.decide(same, 'the same relation of the same sides' if same else 'other relations')

  def _equations(self, gold: Relation, answer: Relation) -> bool | None:
    differences = [equations.difference(side) for side in (gold, answer)]
    if None not in differences and values.factor(*differences) is not None:
      return self.decide(True, 'the equations are multiples of each other')
    swapped = self._sides(gold.sides, answer.sides) or self._sides(gold.sides, answer.sides[::-1])
    if swapped:
      return self.decide(True, 'the same sides')
    decided = self.by_math_verify(gold.text, answer.text)
    return self.decide(decided, 'other equations' if decided is False else 'equations, by math-verify')

  def _sides(self, gold, answer) -> bool | None:
    return len(gold) == len(answer) and _all([g is not None and a is not None and self.same(g, a)
                                              for g, a in zip(gold, answer)])

  def _inequalities(self, gold: Relation, answer: Relation) -> bool | None:
    """Compares inequalities of several variables.

    Two inequalities are the same if multiplying one of them by a constant gives the other. A negative constant must
    reverse the direction.
    """
    differences = [equations.difference(side) for side in (gold, answer)]
    if None in differences:
      return self.decide(None if differences[0] is None else False, 'inequalities that cannot be compared')
    ratio = values.factor(*differences)
    wanted, given = (regions.DIRECTIONS[side.operators[0]] for side in (gold, answer))
    if ratio is None or abs(ratio.imag) > 0:
      return self.decide(False, 'other inequalities')
    same = wanted == (given if ratio.real > 0 else (-given[0], given[1]))
    return self.decide(same, 'the same inequality' if same else 'the other direction, or with equality')

  # Matrices, ratios

  def _matrices(self, gold: Reading, answer: Reading):
    if not isinstance(gold, Matrix) and not isinstance(answer, Matrix):
      return NotImplemented
    if not isinstance(gold, Matrix) or not isinstance(answer, Matrix):
      return self.decide(False, 'one is a matrix, the other is not')
    if [len(row) for row in gold.rows] != [len(row) for row in answer.rows]:
      return self.decide(False, 'matrices of different shapes')
    same = _all([self.same(g, a) for row, other in zip(gold.rows, answer.rows) for g, a in zip(row, other)])
    return self.decide(same, 'the same entries' if same else 'an entry differs')

  def _vectors(self, gold: Reading, answer: Reading):
    """Compares two vectors. Each may be written as a matrix of one row or column, or as a tuple such as (1, 2)."""
    sides = [side.items if isinstance(side, Many) and side.kind == 'pair' else _vector(side) for side in (gold, answer)]
    return self._in_order(*sides) if all(sides) else self.decide(False, 'one is a matrix, the other is not')

  def _ratios(self, gold: Reading, answer: Reading):
    if not isinstance(gold, Ratio) and not isinstance(answer, Ratio):
      return NotImplemented
    sides = [_ratio_parts(side) for side in (gold, answer)]
    if None in sides or len(sides[0]) != len(sides[1]):
      return self.decide(False, 'ratios of different length, or no ratio')
    if isinstance(gold, Ratio) and isinstance(answer, Ratio) and _is_time(gold) and _is_time(answer):
      return self.decide(_minutes(gold) == _minutes(answer), 'times of day')
    (first, *rest), (other, *others) = sides
    cross = [values.equal(Node('mul', (first, b)), Node('mul', (a, other))) for a, b in zip(rest, others)]
    return self.decide(all(cross), 'the same ratio' if all(cross) else 'another ratio')


def _all(verdicts: Sequence[bool | None]) -> bool | None:
  """Returns True if all verdicts are True, False if any is False, None otherwise."""
  return False if any(v is not None and not v for v in verdicts) else None if None in verdicts else True


def _choice(reading: Reading) -> str:
  """Returns the letter of a multiple-choice answer such as C, (C), or (C) 5; '' if the answer isn't multiple choice.

  It isn't if it has another answer too, such as (C) or (D), or if the letter is a variable, as in (N)(N-1) or (C) < 5.
  """
  found = _CHOICE.fullmatch(' '.join(token for token in reading.tokens if token not in ('{', '}')))
  if found is None or (found[2] and _ANOTHER.search(re.sub(rf"'?\b{found[1]}(?= |$)", '', found[2]))):
    return ''
  return found[1] or found[3]


def _is_time(reading: Ratio) -> bool:
  """Returns True if the ratio is written like a time of day, such as 3:05."""
  return re.fullmatch(r'\d{1,2}:[0-5]\d', ''.join(reading.tokens)) is not None


def _minutes(reading: Reading) -> int | None:
  if not isinstance(reading, Ratio) or len(reading.parts) != 2:
    return None
  hours, minutes = (values.exact(part) for part in reading.parts)
  return int(60 * hours + minutes) if None not in (hours, minutes) and hours.denominator == 1 else None


def _single(reading: Reading) -> Reading:
  """Returns the value in a set that has only one value, such as {3}. Returns any other parsed answer as it is."""
  if isinstance(reading, Many) and reading.kind == 'set' and [type(item) for item in reading.items] == [Value]:
    return reading.items[0]
  return reading


def _repeats(items: list[Reading]) -> bool:
  texts = [item.tokens for item in items]
  return len(set(texts)) < len(texts)


def _vector(reading: Reading) -> Sequence[Reading] | None:
  if not isinstance(reading, Matrix):
    return None
  if len(reading.rows) == 1:
    return reading.rows[0]
  return [row[0] for row in reading.rows] if all(len(row) == 1 for row in reading.rows) else None


def _ratio_parts(reading: Reading) -> tuple[Node, ...] | None:
  if isinstance(reading, Ratio):
    return reading.parts
  if not isinstance(reading, Value) or reading.node is None or reading.unit is not None:
    return None
  return reading.node, Node('number', (Fraction(1), None))
