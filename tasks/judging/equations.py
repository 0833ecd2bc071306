"""Reads equations that name a value, such as `x = 3`, and returns the name and the value.

A reading is an answer after parsing (readings.py).
"""

import dataclasses
from collections.abc import Sequence

from betarank.tasks.judging import expressions, notation, values
from betarank.tasks.judging.expressions import Node
from betarank.tasks.judging.names import Name, name_of
from betarank.tasks.judging.readings import Many, Reading, Relation, Value

_EQUALS = {'=', r'\approx'}


@dataclasses.dataclass(frozen=True)
class Claim:
  r"""The name and the values in a chain of equations. For example, x = 1/3 \approx 0.333 has the name x and two values.

  name: the name, or None if no side of the chain is a name.
  values: the exact value and, if the chain has one, its first approximation.
  """

  name: Name | None
  values: tuple[Reading, ...]


def claim(reading: Reading) -> Claim | None:
  r"""Returns the name and the values in an equation or a chain of equations.

  Examples are `x = 3`, `3 = x`, `x = 1 + 2 = 3`, `1/3 \approx 0.333` and `x \in \{1, 2\}`. Returns None for other
  readings (parsed answers), and for chains whose values differ, such as `x = 8 = 7`. Only the first of several
  approximations is a value of the claim, because each of them would be one more guess.
  """
  if not isinstance(reading, Relation) or None in reading.sides:
    return None
  sides, operators = list(reading.sides), list(reading.operators)
  name = name_of(sides[0])
  if operators == [r'\in'] and isinstance(sides[1], Many):
    return Claim(name, (sides[1],)) if name else None
  if not set(operators) <= _EQUALS:
    return None
  if len(sides) == 2 and isinstance(sides[0], Many) and isinstance(sides[1], Many) and sides[0].kind == 'pair':
    return Claim(Name(''.join(sides[0].tokens)), (sides[1],))  # (x, y) = (1, 2)
  if name is None and len(sides) == 2 and (name := name_of(sides[1])):
    return Claim(name, (sides[0],))
  if name is not None:
    sides, operators = sides[1:], operators[1:]
  found = [sides[0]]
  for operator, side in zip(operators, sides[1:]):
    if not _agrees(found[0], side, rounded=operator == r'\approx'):
      return None
    if operator == r'\approx' and len(found) == 1:
      found.append(side)
  return Claim(name, tuple(found))


def _agrees(value: Reading, side: Reading, rounded: bool) -> bool:
  """Returns whether two sides of a chain of equations have the same value, in the same unit if both have a unit.

  rounded: whether `side` may also be `value` rounded to as many digits as `side` has.
  """
  if not isinstance(value, Value) or not isinstance(side, Value):
    return False
  nodes = value.node, side.node
  if None in nodes or (value.unit and side.unit and value.unit[:2] != side.unit[:2]):
    return False
  if values.equal(*nodes) or values.near(*nodes):
    return True
  return rounded and values.rounds(*nodes)


def names(many: Many) -> list[Name] | None:
  """Returns the names in a list of equations such as x = 1, y = 2; None if an item doesn't name a value."""
  found = [claim(item) for item in many.items]
  return None if any(c is None or c.name is None for c in found) else [c.name for c in found]


def point(many: Many) -> Sequence[Reading] | None:
  """Returns the values of a list such as x = 1, y = 2, in alphabetical order of the names.

  Returns None if the items aren't such equations.
  """
  found = notation.as_point(many)
  return found.items if found is not many else None


def without_name(item: Reading) -> Reading:
  """Returns the value in an equation such as x = 1, here 1. If `item` isn't such an equation, returns `item` itself."""
  found = claim(item)
  return found.values[0] if found and found.name else item


def renamed(reading: Reading, name: str, new: str) -> Reading:
  """Returns an expression with the variable `name` renamed to `new`.

  If the reading (a parsed answer) isn't an expression, returns it unchanged.
  """
  if not isinstance(reading, Value) or reading.node is None:
    return reading
  return dataclasses.replace(reading, node=expressions.rename(reading.node, name, new), tokens=())


def difference(relation: Relation) -> Node | None:
  """Returns the left side of an equation or inequality minus its right side.

  Returns None if there are more than two sides, or if a side has a unit or isn't an expression.
  """
  sides = [side.node if isinstance(side, Value) and side.unit is None else None for side in relation.sides]
  return None if None in sides or len(sides) != 2 else Node('add', (sides[0], Node('neg', (sides[1],))))
