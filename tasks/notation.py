r"""Reads what kind of answer a text is: a number with its unit, an interval, a list, an equation, words.

    read(r'(-\infty, 3]')        Interval(low=..., high=..., closed=(False, True))
    read('x = 1 or x = 2')       Many(kind='or', items=(Relation(...), Relation(...)))

Brackets decide first: what `(1,234)` holds is a pair, never a number. `read` raises Unreadable for text that is none of
these. It runs nothing and imports nothing but the standard library.
"""

import dataclasses
import functools
import itertools
import re
from fractions import Fraction

from betarank.tasks import expressions, units, wording
from betarank.tasks.expressions import Node
from betarank.tasks.latex import (
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
from betarank.tasks.units import Unit
from betarank.tasks.wording import trim


@dataclasses.dataclass(frozen=True)
class Reading:
  """What was read. tokens: of the text that it was read from."""

  tokens: tuple[str, ...]

  kind = 'answer'

  @property
  def text(self) -> str:
    """The tokens as LaTeX."""
    return ' '.join(rf'\text{{{token[1:]}}}' if is_word(token) else token for token in self.tokens)

  @property
  def spelled(self) -> str:
    return spelled(list(self.tokens))

  def __str__(self) -> str:
    return f'{self.kind} {self.text}'


@dataclasses.dataclass(frozen=True)
class Value(Reading):
  """An expression, and the unit behind it. node is None where only math-verify may be able to read it."""

  node: Node | None = None
  unit: Unit | None = None

  @property
  def kind(self) -> str:
    return 'expression' if self.node is None or expressions.symbols(self.node) else 'number'

  def __str__(self) -> str:
    unit = f', unit {self.unit.name}' if self.unit else ''
    return f'{self.kind} {self.text}{unit}{"" if self.node else ", for math-verify"}'


@dataclasses.dataclass(frozen=True)
class Many(Reading):
  """Several answers. kind: list (bare), set, pair (in parentheses: ordered, or an open interval), or, and."""

  items: tuple[Reading, ...] = ()
  kind: str = 'list'

  def __str__(self) -> str:
    return f'{self.kind} of {len(self.items)}: {"; ".join(item.text for item in self.items)}'


@dataclasses.dataclass(frozen=True)
class Interval(Reading):
  low: Reading | None = None
  high: Reading | None = None
  closed: tuple[bool, bool] = (False, False)

  kind = 'interval'


@dataclasses.dataclass(frozen=True)
class Union(Reading):
  parts: tuple[Reading, ...] = ()

  kind = 'union'


@dataclasses.dataclass(frozen=True)
class Relation(Reading):
  """A chain: sides[0] operators[0] sides[1] ... Operators are =, <, >, \\le, \\ge, \\ne, \\in, \\to, \\Rightarrow, ..."""

  sides: tuple[Reading, ...] = ()
  operators: tuple[str, ...] = ()

  @property
  def kind(self) -> str:
    return 'equation' if set(self.operators) == {'='} else 'relation'


@dataclasses.dataclass(frozen=True)
class Residue(Reading):
  """value mod modulus; name: of the variable that is congruent to it, '' if there is none."""

  value: Node | None = None
  modulus: Node | None = None
  name: str = ''

  kind = 'residue'


@dataclasses.dataclass(frozen=True)
class Family(Reading):
  """An expression for every integer value of a variable in it."""

  node: Node | None = None
  variable: str = ''

  kind = 'family'


@dataclasses.dataclass(frozen=True)
class Digits(Reading):
  """A number written in a stated base."""

  digits: str = ''
  base: int = 10

  kind = 'numeral in a base'


@dataclasses.dataclass(frozen=True)
class Ratio(Reading):
  parts: tuple[Node, ...] = ()

  kind = 'ratio'


@dataclasses.dataclass(frozen=True)
class Clock(Reading):
  """A time of day with am or pm, in minutes since midnight."""

  minutes: int = 0

  kind = 'time of day'


@dataclasses.dataclass(frozen=True)
class Matrix(Reading):
  rows: tuple[tuple[Reading, ...], ...] = ()

  kind = 'matrix'


@dataclasses.dataclass(frozen=True)
class Words(Reading):
  kind = 'words'


@dataclasses.dataclass(frozen=True)
class Empty(Reading):
  kind = 'empty set'


@functools.lru_cache(maxsize=4096)
def read(text: str, bare_units: bool = False) -> Reading:
  """What `text` says. bare_units: the letter in `5 m` is a unit, not a variable.

  Raises Unreadable, with a phrase that says why.
  """
  return _read(tokenize(text), bare_units)


# The structure of an answer

_OPERATORS = {'=', '<', '>', r'\le', r'\ge', r'\ne', r'\approx', r'\equiv', r'\in', r'\to', r'\Rightarrow', r'\notin',
              r'\Leftrightarrow', r'\sim', r'\cong', r'\subset', r'\perp', r'\parallel', r'\propto', r'\subseteq', r'\ni',
              r'\supset', r'\gg', r'\ll', r'\nmid', r'\notin', r'\leftarrow', r'\Leftarrow', r'\uparrow', r'\downarrow'}
_INTEGER_SETS = {r'\mathbb{Z}', r'\mathbb{N}', r'\mathbb{Z}^+', 'integer', 'integers', 'any integer', 'an integer', 'natural number'}


def _words(tokens: list[str]) -> Reading | None:
  """A reading of tokens that are words alone; None if they aren't."""
  if wording.names_empty_set(tokens):
    return Empty(tuple(tokens))
  if spelled(tokens) in wording.ALL_REALS:
    return Interval(tuple(tokens), _read(['-', r'\infty']), _read([r'\infty']))
  if not wording.is_plain_words(tokens):
    return None
  value = wording.number_in_words([t[1:] for t in tokens if is_word(t)])
  return Words(tuple(tokens)) if value is None else Value(tuple(tokens), Node('number', (Fraction(value), None)))


def _read(tokens: list[str], bare: bool = False) -> Reading:
  tokens = trim(tokens)
  if not tokens:
    raise Unreadable('there is nothing to read')
  for reader in (_words, _family, _several, _relation, _union, _bracketed, _matrix, _residue, _in_base, _clock, _ratio,
                 _plus_minus):
    reading = reader(tokens) if reader in (_words, _family, _in_base, _clock) else reader(tokens, bare)
    if reading is not None:
      return reading
  return _value(tokens, bare)


def _several(tokens: list[str], bare: bool) -> Reading | None:
  """Answers joined by or, and, commas or semicolons."""
  for separators, kind in ((("'or",), 'or'), (("'and", r'\&', '&'), 'and'), ((';',), 'list'), ((',',), 'list')):
    places = [i for i in at_top(tokens) if tokens[i] in separators]
    if not places:
      continue
    parts = [part for part in split_at(tokens, places) if trim(part)]
    if len(parts) < 2:
      return _read(parts[0], bare) if parts else None
    if kind == 'list' and separators == (',',):
      parts = _without_condition(parts)
    items = []
    for part in parts:
      item = _read(part, bare)
      if isinstance(item, Many) and kind != 'list' or separators == (';',):
        item = as_point(item)
      items += item.items if isinstance(item, Many) and item.kind in ('list', 'or', 'and') else [item]
    kind = 'list' if kind == 'and' and not all(_bound(item) for item in items) else kind
    return Many(tuple(tokens), tuple(items), kind) if len(items) > 1 else items[0]
  return None


def as_point(reading: Reading) -> Reading:
  """`x = 1, y = 2` as the pair of its values in the order of the names; other readings as they are."""
  if not isinstance(reading, Many) or reading.kind != 'list':
    return reading
  named = {}
  for item in reading.items:
    name = name_of(item.sides[0]) if isinstance(item, Relation) and item.operators == ('=',) else None
    if name is None or name.key in named:
      return reading
    named[name.key] = item.sides[1]
  return Many(reading.tokens, tuple(named[key] for key in sorted(named)), 'pair')


def _bound(item: Reading) -> bool:
  return isinstance(item, Relation) and item.operators[0] in ('<', '>', r'\le', r'\ge', r'\ne')


def _without_condition(parts: list[list[str]]) -> list[list[str]]:
  r"""Drops `n \ge 1` of `2n+1, n \ge 1`? No: a condition may be the answer, so nothing is dropped but `x \in \mathbb{R}`."""
  kept = [part for part in parts if not (len(part) == 3 and part[1] == r'\in' and part[2] == r'\mathbb{R}')]
  return kept or parts


def _family(tokens: list[str]) -> Reading | None:
  r"""`k\pi, k \in \mathbb{Z}`, also with where, for, (in brackets), or `k` an integer in words."""
  found = next((i for i in range(len(tokens) - 1) if tokens[i] == r'\in' and _is_integers(tokens[i + 1:])), None)
  if found is None or found < 2:
    words = [i for i, t in enumerate(tokens) if is_word(t) and t[1:].lower() in ('integer', 'integers')]
    if not words or words[-1] < len(tokens) - 2:
      return None
    found = next((i for i in range(words[0], 0, -1) if len(tokens[i - 1]) == 1 and tokens[i - 1].isalpha()), None)
    if found is None:
      return None
  variable = tokens[found - 1]
  head = tokens[:found - 1]
  while head and (head[-1] in (',', '(', ';', ':', '|') or (is_word(head[-1]) and head[-1][1:].lower() in (
      'where', 'for', 'with', 'any', 'all', 'some', 'every', 'integer', 'integers', 'and', 'is'))):
    head = head[:-1]
  if not head or len(variable) != 1 or variable not in head:
    return None
  try:
    body = _read(head)
  except Unreadable:
    return None
  items = body.items if isinstance(body, Many) else (body,)
  families = []
  for item in items:
    if isinstance(item, Relation) and item.operators == ('=',) and name_of(item.sides[0]):
      item = item.sides[1]
    pieces = item.items if isinstance(item, Many) else (item,)
    if not all(isinstance(piece, Value) and piece.node is not None for piece in pieces):
      return None
    families += [Family(tuple(tokens), piece.node, variable) for piece in pieces]
  return families[0] if len(families) == 1 else Many(tuple(tokens), tuple(families), 'list')


def _is_integers(tokens: list[str]) -> bool:
  return bool(tokens) and (tokens[0] in (r'\mathbb{Z}', r'\mathbb{N}') or tokens[0] == 'Z')


def _relation(tokens: list[str], bare: bool) -> Reading | None:
  places = [i for i in at_top(tokens) if tokens[i] in _OPERATORS]
  if not places:
    return None
  operators = tuple(tokens[i] for i in places)
  if r'\equiv' in operators:
    residue = _residue(tokens, bare)
    if residue is not None:
      return residue
  sides = split_at(tokens, places)
  if not all(sides[1:]):
    raise Unreadable(f'nothing follows {operators[-1]}')
  read_sides = [_side(side) if side else None for side in sides]
  return Relation(tuple(tokens), tuple(read_sides), operators)


def _side(tokens: list[str]) -> Reading:
  """A side of a relation; one that isn't readable by itself, such as a name in words, is kept as it is."""
  try:
    return _read(tokens)
  except Unreadable:
    return Words(tuple(tokens))


def _union(tokens: list[str], bare: bool) -> Reading | None:
  places = [i for i in at_top(tokens) if tokens[i] in (r'\cup', r'\sqcup', r'\bigcup')]
  if not places:
    return None
  return Union(tuple(tokens), tuple(_read(part) for part in split_at(tokens, places)))


def _bracketed(tokens: list[str], bare: bool) -> Reading | None:
  """(1,2), [1,2], {1,2} and what else is wholly in one pair of brackets."""
  opening = tokens[0]
  if opening not in ('(', '[', r'\{') or match_of(tokens, 0) != len(tokens) - 1:
    return None
  closing, inside = tokens[-1], tokens[1:-1]
  if opening == r'\{':
    return _set(tokens, inside, bare)
  places = [i for i in at_top(inside) if inside[i] in (',', ';')]
  if not places:
    if opening + closing != '()':
      if opening + closing == '[]':
        return _read(inside, bare)
      raise Unreadable('an interval needs two ends')
    return _read(inside, bare)
  items = tuple(_read(part, bare) for part in split_at(inside, places))
  if opening + closing == '()':
    return Many(tuple(tokens), items, 'pair')
  if len(items) == 2:
    return Interval(tuple(tokens), *items, (opening == '[', closing == ']'))
  if opening + closing == '[]':
    return Many(tuple(tokens), items, 'pair')
  raise Unreadable('an interval needs two ends')


def _set(tokens: list[str], inside: list[str], bare: bool) -> Reading:
  if not inside or inside == [r'\emptyset']:
    return Empty(tuple(tokens)) if not inside else Many(tuple(tokens), (Empty((r'\emptyset',)),), 'set')
  bars = [i for i in at_top(inside) if inside[i] in ('|', ':')]
  if bars:  # {x | x > 3}
    name, condition = inside[:bars[0]], inside[bars[0] + 1:]
    if r'\in' in name:
      name = name[:name.index(r'\in')]
    reading = _read(condition)
    if isinstance(reading, Relation | Many) and len(name) <= 2:
      return reading
  body = _read(inside, bare)
  items = body.items if isinstance(body, Many) and body.kind in ('list', 'or', 'and') else (body,)
  return Many(tuple(tokens), tuple(items), 'set')


def _matrix(tokens: list[str], bare: bool) -> Reading | None:
  first, last = tokens[0], tokens[-1]
  name = re.fullmatch(r'\\begin\{(p|b|B|v|V|small)?matrix\}|\\begin\{array\}', first)
  if name is None or not last.startswith(r'\end{') or any(t.startswith(r'\begin{') for t in tokens[1:]):
    return None
  if name[1] in ('v', 'V'):
    raise Unsupported('a determinant')
  inside = tokens[1:-1]
  if first.endswith('array}') and inside[:1] == ['{']:
    inside = inside[match_of(inside, 0) + 1:]
  rows = [row for row in split_at(inside, [i for i in at_top(inside) if inside[i] == '\\\\']) if row]
  cells = [split_at(row, [i for i in at_top(row) if row[i] == '&']) for row in rows]
  if not cells or len({len(row) for row in cells}) > 1:
    raise Unreadable('the rows of the matrix differ in length')
  return Matrix(tuple(tokens), tuple(tuple(_read(cell) for cell in row) for row in cells))


def _residue(tokens: list[str], bare: bool) -> Reading | None:
  r"""`x \equiv 1 \pmod 3`, `1 \bmod 3`, `1 (mod 3)`."""
  places = [i for i, t in enumerate(tokens) if t in (r'\pmod', r'\bmod', "'mod", "'modulo")]
  if not places:
    return None
  i = places[-1]
  head, modulus = tokens[:i], tokens[i + 1:]
  if head and head[-1] == '(' and modulus and modulus[-1] == ')':
    head, modulus = head[:-1], modulus[:-1]
  head = head[:-1] if head and head[-1] == ',' else head
  if not head or not modulus:
    raise Unreadable('a modulus without a number')
  name = ''
  congruent = [j for j in at_top(head) if head[j] in (r'\equiv', '=')]
  if congruent:
    name, head = ''.join(head[:congruent[0]]), head[congruent[-1] + 1:]
  body = _read(head)
  items = body.items if isinstance(body, Many) else (body,)
  of = expressions.parse(trim(modulus))
  if not all(isinstance(item, Value) and item.node is not None for item in items):
    raise Unreadable('a residue that is no number')
  found = [Residue(tuple(tokens), item.node, of, name) for item in items]
  return found[0] if len(found) == 1 else Many(tuple(tokens), tuple(found), 'list')


_BASE_WORDS = {'two': 2, 'three': 3, 'four': 4, 'five': 5, 'six': 6, 'seven': 7, 'eight': 8, 'nine': 9, 'ten': 10, 'sixteen': 16,
               'twelve': 12, 'eleven': 11, 'binary': 2, 'octal': 8, 'hexadecimal': 16, 'hex': 16}


def _in_base(tokens: list[str]) -> Reading | None:
  r"""`1011_2`, `2516_{8}`, `1A_{16}`, `1011 \text{ base } 2`."""
  flat = [t for t in tokens if t not in ('{', '}', '(', ')')]
  for mark in ('_', "'base"):
    if flat.count(mark) != 1:
      continue
    i = flat.index(mark)
    digits, base = ''.join(flat[:i]), flat[i + 1:]
    if flat[i - 1:i] == ["'in"]:
      digits = ''.join(flat[:i - 1])
    if len(base) != 1 or not re.fullmatch('[0-9][0-9A-F]*|[A-F]+[0-9][0-9A-F]*', digits) or not digits:
      return None
    number = int(base[0]) if base[0].isdigit() and len(base[0]) < 3 else _BASE_WORDS.get(base[0].lstrip("'").lower(), 0)
    if not 2 <= number <= 36 or any(int(d, 36) >= number for d in digits):
      return None
    return Digits(tuple(tokens), digits.lstrip('0') or '0', number)
  return None


def _clock(tokens: list[str]) -> Reading | None:
  if not is_word(tokens[-1]) or tokens[-1][1:].lower() not in ('am', 'pm'):
    return None
  found = re.fullmatch(r'(\d{1,2})(?::(\d{2}))?', ''.join(tokens[:-1]))
  if found is None or not 1 <= int(found[1]) <= 12:
    return None
  hours = int(found[1]) % 12 + (12 if tokens[-1][1:].lower() == 'pm' else 0)
  return Clock(tuple(tokens), 60 * hours + int(found[2] or 0))


def _ratio(tokens: list[str], bare: bool) -> Reading | None:
  places = [i for i in at_top(tokens) if tokens[i] == ':']
  if not places:
    return None
  return Ratio(tuple(tokens), tuple(expressions.parse(part) for part in split_at(tokens, places)))


def _plus_minus(tokens: list[str], bare: bool) -> Reading | None:
  """2 ± 1 as the list of 2 + 1 and 2 - 1."""
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
    items.append(_read(chosen, bare))
  return Many(tuple(tokens), tuple(items), 'list')


# Numbers with units


def _value(tokens: list[str], bare: bool) -> Reading:
  scale = next((i for i, t in enumerate(tokens) if i and t.lower() in wording.POWERS_OF_TEN), None)
  if scale:  # 1.5 million, $2 million
    zeros = str(wording.POWERS_OF_TEN[tokens[scale].lower()])
    tokens = [*tokens[:scale], r'\cdot', '10', '^', zeros, *tokens[scale + 1:]]
  body, unit = _split_unit(tokens, bare)
  label = body[:1] == ['('] and len(body) > 3 and is_word(body[1]) and len(body[1]) == 2 and body[2] == ')'
  if label:  # \text{(C) } 7
    body = body[3:]
  try:
    return Value(tuple(tokens), expressions.parse(trim(body)), unit)
  except Unsupported:
    return Value(tuple(tokens), None, unit)
  except Unreadable:
    if any(is_word(t) for t in tokens):
      return Words(tuple(tokens))
    raise


def _split_unit(tokens: list[str], bare: bool) -> tuple[list[str], Unit | None]:
  """(the tokens of the number, its unit). Nothing is cut where no number is left."""
  if tokens[0] == r'\dollar' or tokens[:2] == ['-', r'\dollar']:
    return [t for t in tokens if t != r'\dollar'], units.DOLLAR
  if tokens[-1] == r'\dollar':
    return tokens[:-1], units.DOLLAR
  if tokens[-1] == '%' and len(tokens) > 1:
    return tokens[:-1], units.PERCENT
  for form in (['^', '{', r'\circ', '}'], ['^', r'\circ'], [r'\degree'], ['^', '{', r'\degree', '}']):
    if tokens[-len(form):] == form and len(tokens) > len(form) and not any(
        t in (r'\sin', r'\cos', r'\tan', r'\cot', r'\sec', r'\csc') for t in tokens):
      return tokens[:-len(form)], units.DEGREE
  begin = len(tokens)
  while begin > 1 and _may_be_unit(tokens, begin - 1, bare):
    begin -= 1
  for start in range(begin, len(tokens)):
    if start and tokens[start] not in ('^', '}', '/', r'\cdot', ')', '{', '-') and not tokens[start].isdigit():
      unit = units.read(tokens[start:], bare)
      if unit is not None and _is_whole(tokens[:start]):
        return _without_degree(tokens[:start], unit)
  return tokens, None


def _may_be_unit(tokens: list[str], i: int, bare: bool) -> bool:
  token = tokens[i]
  return is_word(token) or token in ('^', '{', '}', '/', r'\cdot', '-', '(', ')', '.', r'\mu', r'\sec', r'\min') or (
    token in ('1', '2', '3')) or (bare and token in units._SINGLE)


def _is_whole(tokens: list[str]) -> bool:
  depth = 0
  for token in tokens:
    depth += (token in ('{', '(')) - (token in ('}', ')'))
    if depth < 0:
      return False
  return depth == 0 and tokens[-1] not in ('/', r'\cdot', '-', '+', '^', '_')


def _without_degree(tokens: list[str], unit: Unit) -> tuple[list[str], Unit]:
  r"""25^\circ\text{C}: the degree sign belongs to the unit."""
  for form in (['^', '{', r'\circ', '}'], ['^', r'\circ'], [r'\degree']):
    if tokens[-len(form):] == form and len(tokens) > len(form):
      scale = {'C': 'celsius', 'F': 'fahrenheit'}.get(unit.name, unit.name)
      return tokens[:-len(form)], units.read([f"'{scale}"]) or unit
  return tokens, unit


# Names on the left of an equation


@dataclasses.dataclass(frozen=True)
class Name:
  r"""What a left side names. kind: symbol (x), function (f(x), a_n), label (\angle ABC, AB, P(A)), words (Area).

  variable: what a function is a function of.
  """

  key: str
  kind: str = 'symbol'
  variable: str = ''

  def may_be(self, other: 'Name') -> bool:
    """Whether the names may be exchanged: f(x) = 2x says what g(x) = 2x and y = 2x say, but x = 2 isn't y = 2."""
    kinds = {self.kind, other.kind}
    return 'words' in kinds or kinds == {'function'} or ('function' in kinds and 'y' in (self.key, other.key))


_FUNCTION = re.compile(r"(\\?[A-Za-z]+)((?: _ (?:\{[^{}]*\}|\S+))?(?: ')*)(?: \( ([^()]*) \))?")


def name_of(side: Reading | None) -> Name | None:
  r"""The name that a side of an equation is: x, x_1, f(x), a_n, \angle ABC, AB, Area; None if it is an expression."""
  if side is None:
    return None
  if isinstance(side, Words):
    return Name(side.spelled, 'words')
  tokens = [t for t in side.tokens if t not in (r'\overline', r'\bar', r'\vec', r'\hat')]
  marks = [t for t in tokens if t in (r'\angle', r'\triangle', '|', '[', r'\frac', '/', ':')]
  letters = [t for t in tokens if t not in marks and t not in ('_', '{', '}', ']') and not (t.isdigit() and '_' in tokens)]
  if letters and all(len(t) == 1 and t.isupper() for t in letters) and (marks or 2 <= len(letters) <= 4):
    return Name(''.join(tokens), 'label')
  found = _FUNCTION.fullmatch(' '.join(tokens))
  if found is None or found[1] in ('e', 'i') or not (len(found[1]) == 1 or found[1][1:] in expressions.GREEK):
    return None
  index, argument = found[2] or '', found[3]
  if argument is not None:
    variable = argument if len(argument) == 1 and argument.isalpha() and argument.islower() else ''
    return Name(found[1] + index, 'function' if variable else 'label', variable)
  indices = re.findall('[a-z]', index)
  return Name((found[1] + index).replace(' ', ''), 'function' if len(indices) == 1 else 'symbol', ''.join(indices)[:1])
