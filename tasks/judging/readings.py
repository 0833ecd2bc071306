"""Defines the kinds of answers: number, expression, interval, list, equation, words and so on. See notation.py."""

import dataclasses
import re

from betarank.tasks.judging import expressions, values
from betarank.tasks.judging.expressions import Node
from betarank.tasks.judging.latex import is_word, spelled
from betarank.tasks.judging.units import Unit

_SHOWN_BITS = 100  # a larger number isn't written out; Python refuses to, from 4300 digits
_GAP = re.compile(r'(?<![A-Za-z]) | (?![A-Za-z])')  # a space that doesn't separate two letters


@dataclasses.dataclass(frozen=True)
class Reading:
  """An answer after parsing. Each subclass is one kind of answer.

  tokens: the tokens of the answer (latex.py).
  """

  tokens: tuple[str, ...]

  kind = 'answer'

  @property
  def text(self) -> str:
    """The answer as LaTeX, with a space between two tokens."""
    return ' '.join(rf'\text{{{token[1:]}}}' if is_word(token) else token for token in self.tokens)

  @property
  def shown(self) -> str:
    """The answer as LaTeX for messages, without spaces that aren't needed."""
    return _GAP.sub('', self.text)

  @property
  def spelled(self) -> str:
    return spelled(list(self.tokens))

  def __str__(self) -> str:
    return f'{self.kind} {self.shown}'


@dataclasses.dataclass(frozen=True)
class Value(Reading):
  """An expression with its unit.

  node: the expression; None if only math-verify may be able to parse it.
  unit: the unit; None if there is none.
  """

  node: Node | None = None
  unit: Unit | None = None

  @property
  def kind(self) -> str:
    return 'expression' if self.node is None or expressions.symbols(self.node) else 'number'

  def __str__(self) -> str:
    exact = None if self.node is None else values.exact(self.node)
    long = exact is None or max(part.bit_length() for part in exact.as_integer_ratio()) > _SHOWN_BITS
    value = '' if long or str(exact) == self.shown else f' = {exact}'
    unit = f', unit {self.unit.name}' if self.unit else ''
    return f'{self.kind} {self.shown}{value}{unit}{"" if self.node else ", for math-verify"}'


@dataclasses.dataclass(frozen=True)
class Many(Reading):
  """Several answers.

  kind: 'list' (without brackets), 'set' (in braces), 'pair' (in parentheses: values in order, or an open interval),
    'or' (alternatives), or 'and' (conditions that hold together).
  """

  items: tuple[Reading, ...] = ()
  kind: str = 'list'

  def __str__(self) -> str:
    names = {'pair': 'values in order', 'or': 'alternatives', 'and': 'conditions'}
    name = names.get(self.kind, f'values, a {self.kind}')
    return f'{len(self.items)} {name}: {"; ".join(item.shown for item in self.items)}'


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
  r"""A chain of equations, inequalities or other relations, such as 1 < x \le 2.

  sides: the sides, such as 1, x and 2. The first side is None if nothing precedes the first operator, as in `> 7`.
  operators: the operators between neighbouring sides: =, <, >, \le, \ge, \ne, \in, \to and others.
  """

  sides: tuple[Reading, ...] = ()
  operators: tuple[str, ...] = ()

  @property
  def kind(self) -> str:
    return 'equation' if set(self.operators) == {'='} else 'relation'


@dataclasses.dataclass(frozen=True)
class Residue(Reading):
  r"""A value modulo a number, such as 1 mod 3.

  name: the variable that is congruent to the value, such as x in x \equiv 1 \pmod 3; '' if there is none.
  """

  value: Node | None = None
  modulus: Node | None = None
  name: str = ''

  kind = 'residue'


@dataclasses.dataclass(frozen=True)
class Family(Reading):
  r"""The values of an expression for all integer values of one of its variables, such as k\pi for every integer k."""

  node: Node | None = None
  variable: str = ''

  kind = 'family'


@dataclasses.dataclass(frozen=True)
class Digits(Reading):
  """A number that is written in a stated base, such as 1011_2."""

  digits: str = ''
  base: int = 10

  kind = 'numeral in a base'


@dataclasses.dataclass(frozen=True)
class Ratio(Reading):
  parts: tuple[Node, ...] = ()

  kind = 'ratio'


@dataclasses.dataclass(frozen=True)
class Clock(Reading):
  """A time of day with am or pm.

  minutes: the minutes since midnight.
  """

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
