"""Compares expressions by their values. Rational numbers are compared exactly, other values to many digits.

Two expressions with variables are equal if they agree at several points, which depend only on the variables' names.
This decides identities without rewriting expressions: (x+1)^2 = x^2+2x+1, sinh(at)/a = (e^{at} - e^{-at})/(2a). A
decimal counts as an exact number, except in `near` and `rounds`, which allow for rounding. mpmath is imported when it
is first needed, which happens only in workers.
"""

import functools
import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction

from betarank.tasks.judging.expressions import Node, precision, symbols, walk

_DIGITS, _MORE_DIGITS = 50, 100
_POINTS = 3
_MAX_BITS = 2**18  # the largest size of an exact number
_MAX_EXPONENT = 10**6
_MAX_FACTORIAL = 3000  # larger factorials are computed approximately
_INTEGER_LETTERS = set('nmkpqjlNMK')
# Functions with several cases: near 0 they can equal a simpler one.
_PIECEWISE = {'abs', 'floor', 'ceil', 'max', 'min'}
_GROWING = {'exp', 'factorial', 'binomial', 'sinh', 'cosh'}
# From so many digits on, a decimal in the gold stands for all numbers that round to it, and one in the answer for all
# numbers that it is close to.
GOLD_DIGITS, ANSWER_DIGITS = 4, 6
_CLOSE, _EQUAL = Fraction(1, 10**6), Fraction(1, 10**12)


class TooHard(Exception):
  """Raised if a value can't be computed, because it is too large or isn't defined."""


def exact(node: Node) -> Fraction | None:
  """Returns the exact value of an expression that is built from rational numbers by exact operations.

  These operations are arithmetic, integer powers, roots (up to the sixth) that are rational, and functions such as
  floor or gcd. Returns None for other expressions, for a division by zero, and if the value is too large.
  """
  op, args = node.op, node.args
  if op == 'number':
    return args[0]
  if op in ('symbol', 'constant', 'degree'):
    return None
  values = [exact(arg) if isinstance(arg, Node) else arg for arg in args]
  if None in values:
    return None
  if op == 'add':
    return _bounded(sum(values))
  if op == 'mul':
    return functools.reduce(lambda a, b: None if a is None else _bounded(a * b), values)
  if op == 'neg':
    return -values[0]
  if op == 'div':
    return _bounded(values[0] / values[1]) if values[1] else None
  if op == 'pow':
    return _exact_power(*values)
  if op == 'root':
    return _exact_root(*values)
  return _exact_call(*values)


def _bounded(value: Fraction) -> Fraction | None:
  return value if max(value.numerator.bit_length(), value.denominator.bit_length()) <= _MAX_BITS else None


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
  if exponent.denominator != 1 or (not base and exponent <= 0):
    return None
  size = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent)
  return base ** int(exponent) if size <= _MAX_BITS else None


def _exact_root(value: Fraction, degree: Fraction) -> Fraction | None:
  if degree not in (2, 3, 4, 5, 6) or (value < 0 and not degree % 2):
    return None
  parts = [_integer_root(part, int(degree)) for part in (abs(value.numerator), value.denominator)]
  return None if None in parts else Fraction(*parts) * (-1 if value < 0 else 1)


def _integer_root(value: int, degree: int) -> int | None:
  if value.bit_length() > 2000:
    return None
  low, high = 0, 1 << (value.bit_length() // degree + 1)
  while low < high:
    middle = (low + high) // 2
    low, high = (middle + 1, high) if middle ** degree < value else (low, middle)
  return low if low ** degree == value else None


def _exact_call(name: str, *values: Fraction) -> Fraction | None:
  whole = all(value.denominator == 1 for value in values)
  if name == 'abs':
    return abs(values[0])
  if name in ('floor', 'ceil'):
    return Fraction(getattr(math, name)(values[0]))
  if name in ('max', 'min'):
    return max(values) if name == 'max' else min(values)
  if name in ('gcd', 'lcm') and whole:
    return Fraction(getattr(math, name)(*(int(value) for value in values)))
  if name == 'factorial' and whole and 0 <= values[0] <= _MAX_FACTORIAL:
    return Fraction(math.factorial(int(values[0])))
  if name == 'binomial' and whole and 0 <= values[1] <= values[0] <= _MAX_FACTORIAL:
    return Fraction(math.comb(int(values[0]), int(values[1])))
  return None


def equal(a: Node, b: Node) -> bool:
  """Returns True if two expressions have the same value for all values of their variables.

  A logarithm without a base may be natural or decimal: the expressions are equal if either choice makes them equal.

  Raises:
    TooHard: a value can't be computed.
  """
  if a == b:
    return True
  exactly = exact(a), exact(b)
  if None not in exactly:
    return exactly[0] == exactly[1]
  logarithms = any(node.op == 'call' and node.args[0] == 'log' for side in (a, b) for node in walk(side))
  return any(_equal(a, b, base) for base in ((None, 10) if logarithms else (None,)))


def _equal(a: Node, b: Node, base: int | None) -> bool:
  names = sorted(symbols(a) | symbols(b))
  if all(_agree(a, b, point, base) for point in _points(names, a, b)):
    return True
  return bool(names) and _over_integers(a, b) and all(
    _agree(a, b, point, base) for point in _integer_points(names, a, b))


def _calls(names: set[str], *nodes: Node) -> bool:
  """Returns whether one of the expressions calls one of the functions."""
  return any(node.op == 'call' and node.args[0] in names for side in nodes for node in walk(side))


def _over_integers(a: Node, b: Node) -> bool:
  """Returns whether the variables of two expressions probably stand for integers.

  They do if all variables are letters that are usual for integers, such as n or k, and at least one expression has a
  floor, ceiling, factorial, binomial, sine, cosine, or a power of a negative number.
  """
  if not (symbols(a) | symbols(b)) <= _INTEGER_LETTERS:
    return False
  return _calls({'floor', 'ceil', 'factorial', 'binomial', 'cos', 'sin'}, a, b) or any(
    node.op == 'pow' and exact(node.args[0]) is not None and exact(node.args[0]) < 0
    for side in (a, b) for node in walk(side))


def _points(names: list[str], *nodes: Node, signs: bool = False) -> list[dict[str, Fraction]]:
  """Returns the points {variable: value} at which expressions are compared. If there are no variables, returns [{}].

  The values are between 0.6 and 2.6. If an expression has a piecewise function, there are also points with larger
  values: near 0, |x - 3| is the same as 3 - x, and floor(x/4) the same as 0.

  nodes: the expressions.
  signs: whether to add, for each point, a second point with all values negated. They are also added for an absolute
    value, a maximum or a minimum.
  """
  if not names:
    return [{}]
  place = lambda name, i: Fraction(zlib.crc32(f'{i}/{name}'.encode()) % 99_991 + 30_011, 50_021)
  points = [{name: place(name, i) for name in names} for i in range(_POINTS)]
  points += [{name: place(name, i) * scale for name in names} for i, scale in enumerate(_scales(nodes), _POINTS)]
  if signs or _calls({'abs', 'max', 'min'}, *nodes):
    points += [{name: -value for name, value in point.items()} for point in points]
  return points


def _integer_points(names: list[str], *nodes: Node) -> list[dict[str, Fraction]]:
  """Returns points as `_points` does, with integers from 2 to 12, or larger ones too."""
  values = list(itertools.islice(itertools.cycle((7, 4, 12, 5, 9, 2, 11, 6, 3, 8)), len(names) + 10))
  points = [{name: Fraction(values[i + shift]) for i, name in enumerate(names)} for shift in range(10)]
  return points + [{name: value * scale + i for name, value in points[i].items()}
                   for i, scale in enumerate(_scales(nodes))]


def _scales(nodes: Sequence[Node]) -> tuple[int, ...]:
  """Returns by how much larger the values at additional points are, one scale per point; () if no points are needed.

  They are needed for piecewise functions. They are small for powers and factorials, which would lose their last digits.
  """
  if not _calls(_PIECEWISE, *nodes):
    return ()
  powers = any(node.op == 'pow' and symbols(node.args[1]) and exact(node.args[0]) != -1
               for side in nodes for node in walk(side))
  return (2, 3) if powers or _calls(_GROWING, *nodes) else (8, 9, 64, 71, 512, 569)


def check(node: Node) -> None:
  """Raises TooHard if the expression has no value that can be computed."""
  if exact(node) is None:
    for point in _points(sorted(symbols(node))):
      with _mp().workdps(_DIGITS):
        _value(node, point, None)


def _agree(a: Node, b: Node, point: dict[str, Fraction], base: int | None) -> bool:
  """Returns whether two expressions have the same value at `point`, which is {variable: value}.

  The difference of their values is computed twice, with 50 and with 100 digits. The values count as the same if the
  result with 100 digits is almost zero, or far smaller than the result with 50 digits.

  base: the base of a logarithm that is written without one; None means e.
  """
  rough, fine = (_difference(a, b, point, base, digits) for digits in (_DIGITS, _MORE_DIGITS))
  if rough is None or fine is None:
    return rough == fine
  (difference, _), (finer, scale) = rough, fine
  return finer <= scale * _mp().mpf(10) ** -70 or (finer < difference * _mp().mpf(10) ** -30 and difference < 1)


def _difference(a: Node, b: Node, point, base, digits):
  """Returns (|a - b|, the larger of |a| and |b|) at `point`; None if both are the same infinity.

  base: the base of a logarithm that is written without one; None means e.
  digits: the number of decimal digits to compute with.
  """
  mp = _mp()
  with mp.workdps(digits):
    x, y = _value(a, point, base), _value(b, point, base)
    if mp.isinf(x) or mp.isinf(y):
      return None if x == y else (mp.mpf(1), mp.mpf(1))
    return abs(x - y), max(abs(x), abs(y))


@functools.cache
def _mp():
  import mpmath

  return mpmath.mp.clone()


def approximate(node: Node, base: int | None = None):
  """Returns the value of an expression as an mpmath number with 50 digits. The expression must have no variables.

  base: the base of a logarithm that is written without one; None means e.

  Raises:
    TooHard: the value can't be computed.
  """
  with _mp().workdps(_DIGITS):
    return _value(node, {}, base)


def _value(node: Node, point: dict[str, Fraction], base: int | None):
  mp = _mp()
  try:
    value = _evaluate(node, point, base)
  except (ZeroDivisionError, OverflowError, ValueError, TypeError, mp.NoConvergence) as error:
    raise TooHard(str(error)) from None
  if mp.isnan(value):
    raise TooHard('it has no value')
  return value


def _number(value: Fraction):
  return _mp().mpf(value.numerator) / value.denominator


def _evaluate(node: Node, point: dict[str, Fraction], base: int | None):
  mp = _mp()
  op, args = node.op, node.args
  if op == 'number':
    return _number(args[0])
  if op == 'symbol':
    if args[0] not in point:
      raise TooHard('it has variables')
    return _number(point[args[0]])
  if op == 'constant':
    return {'pi': +mp.pi, 'e': +mp.e, 'i': mp.mpc(0, 1), 'infty': mp.inf}[args[0]]
  values = [_evaluate(arg, point, base) if isinstance(arg, Node) else arg for arg in args]
  if op == 'add':
    return sum(values[1:], values[0])
  if op == 'mul':
    return math.prod(values[1:], start=values[0])
  if op == 'neg':
    return -values[0]
  if op == 'div':
    return values[0] / values[1]
  if op == 'degree':
    return values[0] * mp.pi / 180
  if op == 'pow':
    return _power(*values)
  if op == 'root':
    return _root(*values)
  return _call(base, *values)


def _power(base, exponent):
  mp = _mp()
  if (abs(exponent) > _MAX_EXPONENT and abs(base) not in (0, 1)) or abs(base) > mp.mpf(10) ** _MAX_EXPONENT:
    raise TooHard('a power is out of bounds')
  return mp.power(base, exponent)


def _root(value, degree):
  mp = _mp()
  if mp.im(value) == 0 and mp.re(value) < 0 and degree in (3, 5, 7, 9):
    return -mp.power(-value, 1 / degree)
  return _power(value, 1 / degree)


def _near_integer(rounding: Callable) -> Callable:
  """Returns a version of `rounding` (floor or ceiling) that allows for errors in the last digits.

  It first replaces a number that is within 1e-30 of an integer by this integer.
  """
  def rounded(x):
    nearest = _mp().nint(x)
    return nearest if abs(x - nearest) < _mp().mpf(10) ** -30 else rounding(x)
  return rounded


def _order(value):
  """Returns the key by which numbers are sorted. A root may be complex where a variable is negative."""
  return _mp().re(value), _mp().im(value)


def _call(base: int | None, name: str, *values):
  mp = _mp()
  if name == 'factorial' and abs(values[0]) > _MAX_EXPONENT:
    raise TooHard('a factorial is out of bounds')
  if name == 'exp':
    return _power(+mp.e, values[0])
  if name == 'log':
    return mp.log(values[0]) if base is None else mp.log(values[0], base)
  if name in ('gcd', 'lcm'):
    raise TooHard(f'{name} of what is no number')
  functions = {
    'ln': mp.log, 'log10': lambda x: mp.log(x, 10), 'logarithm': mp.log, 'abs': abs, 'binomial': mp.binomial,
    'factorial': mp.factorial, 'floor': _near_integer(mp.floor), 'ceil': _near_integer(mp.ceil),
    'max': lambda *x: max(x, key=_order), 'min': lambda *x: min(x, key=_order),
    'arcsin': mp.asin, 'arccos': mp.acos, 'arctan': mp.atan, 'arccot': mp.acot, 'arcsec': mp.asec, 'arccsc': mp.acsc,
    'arcsinh': mp.asinh, 'arccosh': mp.acosh, 'arctanh': mp.atanh,
  }
  return (functions.get(name) or getattr(mp, name))(*values)


def near(gold: Node, answer: Node) -> bool:
  """Returns whether two numbers are equal up to the precision of their decimals.

  A decimal gold (reference) with at least 4 significant digits accepts every number that rounds to it and is at least
  as precise: 0.6667 accepts 2/3, and 20.39 accepts 20.394.

  A decimal answer with at least 6 significant digits may differ from the gold by a small relative error. The error is
  1e-6 if the gold can't be written exactly as a decimal: 1/3 accepts 0.333333. Otherwise it is 1e-12, which allows for
  errors of floating point.
  """
  given, wanted = precision(answer), precision(gold)
  if symbols(gold) or symbols(answer) or (given is None and wanted is None):
    return False
  mp = _mp()
  with mp.workdps(_DIGITS):
    a, g = approximate(answer), approximate(gold)
    if mp.isinf(a) or mp.isinf(g) or not g:
      return False
    difference = abs(a - g)
    if gold.op in ('number', 'neg', 'mul', 'div') and wanted is not None and wanted >= GOLD_DIGITS and (
        given is None or given >= wanted):
      half = mp.mpf(10) ** (mp.floor(mp.log10(abs(g)) + mp.mpf(10) ** -30) - wanted + 1) / 2
      if difference <= half * (1 + mp.mpf(10) ** -20):
        return True
    if given is None or given < ANSWER_DIGITS:
      return False
    return difference <= abs(g) * _number(_EQUAL if _terminates(gold) else _CLOSE)


def rounds(value: Node, stated: Node) -> bool:
  """Returns whether `stated` is an integer or a decimal, and is `value` rounded to as many digits as `stated` has.

  A decimal of two or more digits may also be cut off: 0.66 for 2/3. An integer is rounded only to such a decimal, such
  as 1.2e3 for 1234. Otherwise it is exact: 8 isn't 7 rounded.
  """
  written, digits = exact(stated), precision(stated)
  if symbols(value) or not written:
    return False
  mp = _mp()
  with mp.workdps(_DIGITS):
    v, s = approximate(value), _number(written)
    if mp.isinf(v) or ((digits or 0) < 2 and abs(v - mp.nint(v)) < mp.mpf(10) ** -30):
      return False
    places = int(mp.floor(mp.log10(abs(s)) + mp.mpf(10) ** -30)) - digits + 1 if digits else 0
    unit = Fraction(10) ** places
    left = mp.re(v - s) * mp.sign(s) / _number(unit)  # what `stated` leaves out, in units of its last digit
    tiny = mp.mpf(10) ** -30
    if abs(mp.im(v)) > tiny:
      return False
    cut_off = (digits or 0) >= 2 and 0 <= left < 1 - tiny
    return (written / unit).denominator == 1 and (abs(left) <= mp.mpf(1) / 2 + tiny or cut_off)


def _terminates(node: Node) -> bool:
  """Returns True if the number can be written exactly in decimals."""
  value = exact(node)
  if value is None:
    return False
  rest = value.denominator
  for prime in (2, 5):
    while rest % prime == 0:
      rest //= prime
  return rest == 1


def factor(a: Node, b: Node):
  """Returns the constant c, not 0, such that a = c·b for all values of the variables; None if there is none.

  The constant is an mpmath number.

  Raises:
    TooHard: a value can't be computed.
  """
  mp = _mp()
  names = sorted(symbols(a) | symbols(b))
  ratios = []
  with mp.workdps(_DIGITS):
    for point in _points(names, a, b, signs=True):
      x, y = _value(a, point, None), _value(b, point, None)
      if not x or not y:
        return None
      ratios.append(x / y)
  first = ratios[0]
  return first if all(abs(ratio - first) <= abs(first) * mp.mpf(10) ** -35 for ratio in ratios) else None
