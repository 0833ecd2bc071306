r"""Reads sets of numbers in all notations: intervals, unions, inequalities of one variable, `x \in (1, 2)`."""

from betarank.tasks.judging import notation
from betarank.tasks.judging.names import name_of
from betarank.tasks.judging.readings import Interval, Many, Reading, Relation, Union, Value, Words

# Operator -> (the direction in which the variable is unbounded, whether the end point is included).
DIRECTIONS = {'<': (-1, False), '>': (1, False), r'\le': (-1, True), r'\ge': (1, True)}


def is_region(reading: Reading) -> bool:
  if isinstance(reading, Interval | Union):
    return True
  if isinstance(reading, Many):
    return reading.kind in ('or', 'and', 'list') and all(is_region(item) for item in reading.items)
  return isinstance(reading, Relation) and region(reading) is not None


def region(reading: Reading, open_pairs: bool = False) -> tuple[str, list[Reading]] | None:
  """Returns (variable, parts of the set) if the reading is a set of values of at most one variable, otherwise None.

  The variable is '' if the set is written without one. The parts are intervals and single values.

  open_pairs: whether a pair such as (1, 2) is read as an open interval.
  """
  if isinstance(reading, Interval):
    return '', [reading]
  if isinstance(reading, Many) and reading.kind == 'pair' and open_pairs and len(reading.items) == 2:
    return '', [Interval(reading.tokens, *reading.items)]
  if isinstance(reading, Many) and reading.kind == 'set':
    return '', list(reading.items)
  if isinstance(reading, Union):
    return _joined([region(part, True) for part in reading.parts])
  if isinstance(reading, Many) and reading.kind in ('or', 'list', 'and'):
    parts = [region(item, True) for item in reading.items]
    if reading.kind == 'and' and None not in parts and all(len(p[1]) == 1 for p in parts):
      return _intersection(parts)
    return _joined(parts)
  return _bounds(reading) if isinstance(reading, Relation) else None


def _joined(parts: list) -> tuple[str, list[Reading]] | None:
  if None in parts or len({name for name, _ in parts if name}) > 1:
    return None
  return next((name for name, _ in parts if name), ''), [piece for _, pieces in parts for piece in pieces]


def _intersection(parts) -> tuple[str, list[Reading]] | None:
  joined = _joined(parts)
  if joined is None or not all(isinstance(piece, Interval) for piece in joined[1]) or len(joined[1]) != 2:
    return joined
  first, second = joined[1]
  below, above = (first, second) if infinite(first.high) else (second, first)
  if not infinite(below.high) or not infinite(above.low):
    return joined
  return joined[0], [Interval(first.tokens, below.low, above.high, (below.closed[0], above.closed[1]))]


def infinite(reading: Reading | None) -> bool:
  return reading is None or [t for t in reading.tokens if t not in '+-{}'] == [r'\infty']


def _bounds(relation: Relation) -> tuple[str, list[Reading]] | None:
  r"""Returns (variable, intervals of its values) for a relation such as x > 3, -1 < x \le 2, x \ne 0 or x \in (1, 2).

  Returns None for other relations.
  """
  sides, operators = relation.sides, relation.operators
  low, high = notation.read(r'-\infty'), notation.read(r'\infty')
  if None in sides:
    return None
  names = [i for i, side in enumerate(sides) if _variable(side)]
  if len(names) != 1:
    return None
  at, name = names[0], _variable(sides[names[0]])
  others = [side for i, side in enumerate(sides) if i != at]
  if any(isinstance(side, Words) for side in others):
    return None
  if operators == (r'\in',) and at == 0:
    inner = region(sides[1], open_pairs=True)
    return (name, inner[1]) if inner else None
  if operators == (r'\ne',):
    return name, [Interval(relation.tokens, low, others[0]), Interval(relation.tokens, others[0], high)]
  if not set(operators) <= DIRECTIONS.keys() or len({DIRECTIONS[o][0] for o in operators}) > 1 or len(sides) > 3 or (
      len(sides) == 3 and at != 1):
    return None
  if len(sides) == 3:
    ends = [(sides[0], DIRECTIONS[operators[0]][1]), (sides[2], DIRECTIONS[operators[1]][1])]
    (low, a), (high, b) = ends if DIRECTIONS[operators[0]][0] < 0 else ends[::-1]
    return name, [Interval(relation.tokens, low, high, (a, b))]
  direction, closed = DIRECTIONS[operators[0]]
  if (direction > 0) == (at == 0):
    return name, [Interval(relation.tokens, others[0], high, (closed, False))]
  return name, [Interval(relation.tokens, low, others[0], (False, closed))]


def _variable(side: Reading | None) -> str:
  """Returns the variable that a side consists of; '' if the side isn't a single variable."""
  name = name_of(side) if isinstance(side, Value) and side.unit is None else None
  return name.key if name else ''
