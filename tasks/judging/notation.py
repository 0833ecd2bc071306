r"""Recognizes what kind of answer a text is: a number with a unit, an interval, a list, an equation, words.

    read(r'(-\infty, 3]')        Interval(low=..., high=..., closed=(False, True))
    read('x = 1 or x = 2')       Many(kind='or', items=(Relation(...), Relation(...)))

Brackets decide first: `(1,234)` is a pair, never a number. `read` raises Unreadable for a text that isn't an answer of
a known kind. Nothing is evaluated.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from fractions import Fraction

from betarank.tasks.judging import expressions, values, wording
from betarank.tasks.judging.expressions import Node
from betarank.tasks.judging.latex import (
  Unreadable,
  Unsupported,
  at_top,
  is_number,
  is_word,
  match_of,
  spelled,
  split_at,
  tokenize,
)
from betarank.tasks.judging.names import name_of
from betarank.tasks.judging.quantities import split_unit
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
from betarank.tasks.judging.wording import trim

_OPERATORS = {
  '=', '<', '>', r'\le', r'\ge', r'\ne', r'\approx', r'\equiv', r'\in', r'\notin', r'\to', r'\Rightarrow',
  r'\Leftarrow', r'\Leftrightarrow', r'\sim', r'\cong', r'\subset', r'\subseteq', r'\supset', r'\perp', r'\parallel',
  r'\propto', r'\ni', r'\gg', r'\ll', r'\nmid', r'\leftarrow', r'\uparrow', r'\downarrow',
}
_BOUNDS = {'<', '>', r'\le', r'\ge', r'\ne'}
_SEPARATORS = ((("'or",), 'or'), (("'and", r'\&', '&'), 'and'), ((';',), 'list'), ((',',), 'list'))
_BASES = {'binary': 2, 'octal': 8, 'hexadecimal': 16, 'hex': 16, 'two': 2, 'three': 3, 'four': 4, 'five': 5, 'six': 6,
          'seven': 7, 'eight': 8, 'nine': 9, 'ten': 10, 'eleven': 11, 'twelve': 12, 'sixteen': 16}
_BEFORE_INTEGERS = {'where', 'for', 'with', 'any', 'all', 'some', 'every', 'integer', 'integers', 'and', 'is'}


@functools.lru_cache(maxsize=4096)
def read(text: str, bare_units: bool = False) -> Reading:
  """Parses an answer. The class of the result is the kind of the answer, and its fields are the parts of the answer.

  bare_units: whether a letter after a number is read as a unit, as in `5m`. If False, it is a variable.

  Raises:
    Unreadable: the text isn't an answer of a known kind. The message is a phrase that says why.
  """
  return _Reader(bare_units).read(tokenize(text))


class _Reader:
  """Reads an answer as the first kind that fits. Kinds that can contain others, such as lists and equations, are tried
  before kinds that can't, such as numbers.
  """

  def __init__(self, bare_units: bool):
    self._bare_units = bare_units

  def read(self, tokens: list[str]) -> Reading:
    tokens = trim(tokens)
    if not tokens:
      raise Unreadable('there is nothing to read')
    if _has_label(tokens) and len(tokens) > 3:
      return self._labelled(tokens)
    for form in (self._words, self._family, self._several, self._relation, self._union, self._bracketed, self._matrix,
                 self._residue, self._in_base, self._clock, self._ratio, self._plus_minus):
      reading = form(tokens)
      if reading is not None:
        return reading
    return self._value(tokens)

  def _labelled(self, tokens: list[str]) -> Reading:
    r"""Reads the answer after the letter of a choice, as in `\text{(C)} 7`. A second letter, as in C) D, is none."""
    rest = tokens[3:]
    try:
      found = None if _has_label(rest) or rest[0] in ("'or", "'and", ',', ';') else self.read(rest)
    except Unreadable:
      found = None
    if found is None or re.fullmatch("'?[A-Z]", ''.join(found.tokens).strip('{}()[].')):
      return Words(tuple(tokens))
    return dataclasses.replace(found, tokens=tuple(tokens))

  def _words(self, tokens: list[str]) -> Reading | None:
    if wording.names_empty_set(tokens):
      return Empty(tuple(tokens))
    if spelled(tokens) in wording.ALL_REALS:
      return _reals(tokens)
    if not wording.is_plain_words(tokens):
      return None
    value = wording.number_in_words([t[1:] for t in tokens if is_word(t)])
    return Words(tuple(tokens)) if value is None else Value(tuple(tokens), Node('number', (Fraction(value), None)))

  def _family(self, tokens: list[str]) -> Reading | None:
    r"""Reads a family of values, such as `k\pi, k \in \mathbb{Z}`.

    The condition may also be in words, as in 'k an integer', or in brackets, or follow a word such as 'where'.
    """
    at = _place_of_integer(tokens)
    if at is None:
      return None
    variable, head = tokens[at], tokens[:at]
    while head and (head[-1] in (',', '(', ';', ':', '|') or (
        is_word(head[-1]) and head[-1][1:].lower() in _BEFORE_INTEGERS)):
      head = head[:-1]
    if variable not in head:
      return None
    body = self.read(head)
    families = []
    for item in body.items if isinstance(body, Many) else (body,):
      if isinstance(item, Relation) and item.operators == ('=',) and name_of(item.sides[0]):
        item = item.sides[1]
      for part in item.items if isinstance(item, Many) else (item,):
        if not isinstance(part, Value) or part.node is None:
          return None
        families.append(Family(tuple(tokens), part.node, variable))
    return families[0] if len(families) == 1 else Many(tuple(tokens), tuple(families), 'list')

  def _several(self, tokens: list[str]) -> Reading | None:
    """Reads several answers that are separated by 'or', 'and', semicolons or commas.

    If a text has several kinds of separators, it is first split at the kind that is named first above. Each part is
    then read as an answer of its own, so it may be split at another kind of separator.
    """
    for separators, kind in _SEPARATORS:
      places = [i for i in at_top(tokens) if tokens[i] in separators]
      if not places:
        continue
      parts = [part for part in split_at(tokens, places) if trim(part) and part[1:] != [r'\in', r'\mathbb{R}']]
      if len(parts) < 2:
        return self.read(parts[0]) if parts else None
      items: list[Reading] = []
      for part in parts:
        item = self.read(part)
        item = as_point(item) if separators != (',',) else item
        items += item.items if isinstance(item, Many) and item.kind in ('list', 'or', 'and') else [item]
      if kind == 'and' and not all(isinstance(i, Relation) and i.operators[0] in _BOUNDS for i in items):
        kind = 'list'
      return Many(tuple(tokens), tuple(items), kind) if len(items) > 1 else items[0]
    return None

  def _relation(self, tokens: list[str]) -> Reading | None:
    places = [i for i in at_top(tokens) if tokens[i] in _OPERATORS]
    if not places:
      return None
    if any(tokens[i] == r'\equiv' for i in places) and (residue := self._residue(tokens)):
      return residue
    sides = split_at(tokens, places)
    if not all(sides[1:]):
      raise Unreadable(f'nothing follows {tokens[places[-1]]}')
    return Relation(tuple(tokens), tuple(self._side(side) if side else None for side in sides),
                    tuple(tokens[i] for i in places))

  def _side(self, tokens: list[str]) -> Reading:
    """Reads one side of an equation or inequality. Returns Words if the side isn't an answer of a known kind."""
    try:
      return self.read(tokens)
    except Unreadable:
      return Words(tuple(tokens))

  def _union(self, tokens: list[str]) -> Reading | None:
    places = [i for i in at_top(tokens) if tokens[i] in (r'\cup', r'\sqcup', r'\setminus')]
    if not places:
      return None
    parts = [self.read(part) for part in split_at(tokens, places)]
    if all(tokens[i] != r'\setminus' for i in places):
      return Union(tuple(tokens), tuple(parts))
    return _without_points(tokens, parts)

  # In brackets

  def _bracketed(self, tokens: list[str]) -> Reading | None:
    """Reads (1,2), [1,2], {1,2} and all other answers that are entirely inside one pair of brackets."""
    if tokens[0] not in ('(', '[', r'\{') or match_of(tokens, 0) != len(tokens) - 1:
      return None
    inside, pair = tokens[1:-1], tokens[0] + tokens[-1]
    if tokens[0] == r'\{':
      return self._set(tokens, inside)
    places = [i for i in at_top(inside) if inside[i] in (',', ';')]
    if not places and pair in ('()', '[]'):
      return self.read(inside)
    items = tuple(self.read(part) for part in split_at(inside, places))
    if pair != '()' and len(items) == 2:
      return Interval(tuple(tokens), *items, (pair[0] == '[', pair[1] == ']'))
    if pair not in ('()', '[]'):
      raise Unreadable('an interval needs two ends')
    return Many(tuple(tokens), items, 'pair')

  def _set(self, tokens: list[str], inside: list[str]) -> Reading:
    bars = [i for i in at_top(inside) if inside[i] in ('|', ':')]
    if bars:  # {x | x > 3}
      name, condition = inside[:bars[0]], self.read(inside[bars[0] + 1:])
      name = name[:name.index(r'\in')] if r'\in' in name else name
      if isinstance(condition, Relation | Many) and len(name) <= 2:
        return condition
    body = self.read(inside)
    items = body.items if isinstance(body, Many) and body.kind in ('list', 'or', 'and') else (body,)
    return Many(tuple(tokens), tuple(items), 'set')

  def _matrix(self, tokens: list[str]) -> Reading | None:
    name = re.fullmatch(r'\\begin\{(p|b|B|v|V|small)?matrix\}|\\begin\{array\}', tokens[0])
    if name is None or not tokens[-1].startswith(r'\end{') or any(t.startswith(r'\begin{') for t in tokens[1:]):
      return None
    if name[1] in ('v', 'V'):
      raise Unsupported('a determinant')
    inside = tokens[1:-1]
    if name[0].endswith('{array}') and inside[:1] == ['{']:
      inside = inside[match_of(inside, 0) + 1:]
    rows = [row for row in split_at(inside, [i for i in at_top(inside) if inside[i] == '\\\\']) if row]
    cells = [split_at(row, [i for i in at_top(row) if row[i] == '&']) for row in rows]
    if not cells or len({len(row) for row in cells}) > 1:
      raise Unreadable('the rows of the matrix differ in length')
    return Matrix(tuple(tokens), tuple(tuple(self.read(cell) for cell in row) for row in cells))

  # Numbers of a special form

  def _residue(self, tokens: list[str]) -> Reading | None:
    r"""Reads a residue, such as `x \equiv 1 \pmod 3`, `1 \bmod 3` or `1 (mod 3)`."""
    places = [i for i, t in enumerate(tokens) if t in (r'\pmod', r'\bmod', "'mod", "'modulo")]
    if not places:
      return None
    head, modulus = tokens[:places[-1]], tokens[places[-1] + 1:]
    if head[-1:] == ['('] and modulus[-1:] == [')']:
      head, modulus = head[:-1], modulus[:-1]
    head = head[:-1] if head[-1:] == [','] else head
    if not head or not modulus:
      raise Unreadable('a modulus without a number')
    congruent = [i for i in at_top(head) if head[i] in (r'\equiv', '=')]
    name = ''.join(head[:congruent[0]]) if congruent else ''
    body = self.read(head[congruent[-1] + 1:] if congruent else head)
    items = body.items if isinstance(body, Many) else (body,)
    of = expressions.parse(trim(modulus))
    if not all(isinstance(item, Value) and item.node is not None for item in items):
      raise Unreadable('a residue that is no number')
    found = [Residue(tuple(tokens), item.node, of, name) for item in items]
    return found[0] if len(found) == 1 else Many(tuple(tokens), tuple(found), 'list')

  def _in_base(self, tokens: list[str]) -> Reading | None:
    r"""Reads a number with its base, such as `1011_2`, `2516_{8}`, `1A_{16}` or `1011 \text{ base } 2`."""
    text = ' '.join(t for t in tokens if t not in ('{', '}', '(', ')'))
    # Exactly one space follows each token, so that there is only one way to match. Otherwise a long number would make
    # the matcher backtrack forever.
    found = re.fullmatch(r"((?:[0-9]+ |[A-F] )*)(?:'in )?(?:_|'base) (\d{1,2}|'\w+)", text)
    digits = found[1].replace(' ', '') if found else ''
    if not any(d.isdigit() for d in digits):
      return None
    base = int(found[2]) if found[2].isdigit() else _BASES.get(found[2][1:].lower(), 0)
    if not 2 <= base <= 36 or any(int(d, 36) >= base for d in digits):
      return None
    return Digits(tuple(tokens), digits.lstrip('0') or '0', base)

  def _clock(self, tokens: list[str]) -> Reading | None:
    letters = 1 if is_word(tokens[-1]) else 2  # 4:00 PM ends with two letters
    half = ''.join(tokens[-letters:]).lstrip("'").lower()
    found = re.fullmatch(r'(\d{1,2})(?::(\d{2}))?', ''.join(tokens[:-letters])) if half in ('am', 'pm') else None
    if found is None or not 1 <= int(found[1]) <= 12:
      return None
    return Clock(tuple(tokens), 60 * (int(found[1]) % 12 + 12 * (half == 'pm')) + int(found[2] or 0))

  def _ratio(self, tokens: list[str]) -> Reading | None:
    places = [i for i in at_top(tokens) if tokens[i] == ':']
    if not places:
      return None
    return Ratio(tuple(tokens), tuple(expressions.parse(part) for part in split_at(tokens, places)))

  def _plus_minus(self, tokens: list[str]) -> Reading | None:
    """Reads 2 ± 1 as the list of 2 + 1 and 2 - 1.

    With several ± signs, the list has all combinations of signs. If there is also a ∓ sign, the list has only two
    items: one with all upper signs, and one with all lower signs.
    """
    places = [i for i, t in enumerate(tokens) if t in (r'\pm', r'\mp')]
    if not places:
      return None
    if len(places) > 4:
      raise Unreadable('too many signs ±')
    tied = r'\mp' in tokens
    items = []
    for signs in itertools.product('+-', repeat=1 if tied else len(places)):
      chosen = list(tokens)
      for i, sign in zip(places, signs * len(places) if tied else signs):
        chosen[i] = sign if tokens[i] == r'\pm' else '-' if sign == '+' else '+'
      items.append(self.read(chosen))
    return Many(tuple(tokens), tuple(items), 'list')

  def _value(self, tokens: list[str]) -> Reading:
    scale = next((i for i, (last, t) in enumerate(itertools.pairwise(tokens), 1)
                  if t.lower() in wording.POWERS_OF_TEN and (is_number(last) or last in ('}', ')'))), None)
    if scale:  # 1.5 million, $2 million
      zeros = str(wording.POWERS_OF_TEN[tokens[scale].lower()])
      tokens = [*tokens[:scale], r'\cdot', '10', '^', zeros, *tokens[scale + 1:]]
    body, unit = split_unit(tokens, self._bare_units)
    try:
      return Value(tuple(tokens), expressions.parse(trim(body)), unit)
    except Unsupported:
      return Value(tuple(tokens), None, unit)
    except Unreadable:
      if any(is_word(t) for t in tokens):
        return Words(tuple(tokens))
      raise


def _has_label(tokens: list[str]) -> bool:
  r"""Returns True if the tokens begin with the letter of a choice, as in `\text{(C)} 7`."""
  return re.fullmatch(r"\( '[A-Z] \)", ' '.join(tokens[:3])) is not None


def as_point(reading: Reading) -> Reading:
  """Returns the pair (1, 2) for a list such as `x = 1, y = 2`. The values are in alphabetical order of the names.

  If the reading (a parsed answer) isn't such a list, returns it unchanged.
  """
  if not isinstance(reading, Many) or reading.kind != 'list':
    return reading
  named = {}
  for item in reading.items:
    name = name_of(item.sides[0]) if isinstance(item, Relation) and item.operators == ('=',) else None
    if name is None or name.key in named:
      return reading
    named[name.key] = item.sides[1]
  return Many(reading.tokens, tuple(named[key] for key in sorted(named)), 'pair')


def _place_of_integer(tokens: list[str]) -> int | None:
  r"""Returns the index of the variable that the text declares to be an integer; None if there is none.

  The variable is the letter before `\in \mathbb{Z}`, or the last letter if the text ends with 'integer'.
  """
  for i, token in enumerate(tokens[:-1]):
    if token == r'\in' and tokens[i + 1] in (r'\mathbb{Z}', r'\mathbb{N}', 'Z') and i > 1 and len(tokens[i - 1]) == 1:
      return i - 1
  if is_word(tokens[-1]) and tokens[-1][1:].lower() in ('integer', 'integers'):
    letters = [i for i, t in enumerate(tokens) if len(t) == 1 and t.isalpha()]
    return letters[-1] if letters and letters[-1] else None
  return None


def _reals(tokens: Sequence[str]) -> Interval:
  ends = (Value(('-', r'\infty'), Node('neg', (Node('constant', ('infty',)),))),
          Value((r'\infty',), Node('constant', ('infty',))))
  return Interval(tuple(tokens), *ends)


def _without_points(tokens: list[str], parts: list[Reading]) -> Union:
  r"""Returns a set from which points are removed, such as `\mathbb{R} \setminus \{0, 1\}`, as a union of intervals.

  The intervals end at the points: (-\infty, 0), (0, 1) and (1, \infty) in this example.

  tokens: all tokens of the expression, including `\setminus`.
  parts: [the set, the points to remove].

  Raises:
    Unsupported: the set isn't an interval, or the points aren't a set of rational numbers.
  """
  whole, *rest = parts
  if not isinstance(whole, Interval) or len(rest) != 1 or not isinstance(rest[0], Many) or rest[0].kind != 'set':
    raise Unsupported('a difference of sets')
  points = [(values.exact(item.node), item) for item in rest[0].items if isinstance(item, Value) and item.node]
  if len(points) < len(rest[0].items) or any(value is None for value, _ in points):
    raise Unsupported('a difference of sets')
  ends = [whole.low, *(item for _, item in sorted(points, key=lambda point: point[0])), whole.high]
  return Union(tuple(tokens), tuple(Interval(tuple(tokens), low, high) for low, high in itertools.pairwise(ends)))
