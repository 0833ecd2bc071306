r"""Reads units of measurement, which follow a number (units of money may also precede it), and converts between them.

A unit is a product of powers of base units times an exact factor, so `36 \text{ km/h}` equals `10 \text{ m/s}`. A noun
that isn't in the table, as in `7 \text{ apples}`, is a unit that doesn't convert to any other.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from betarank.tasks.judging.latex import is_word
from betarank.tasks.judging.wording import number_in_words

_BASE = {
  'metre': ('length', 1, 'm meter metre'), 'inch': ('length', Fraction('0.0254'), 'in inch'),
  'foot': ('length', Fraction('0.3048'), 'ft foot feet'), 'yard': ('length', Fraction('0.9144'), 'yd yds yard'),
  'mile': ('length', Fraction('1609.344'), 'mi mile'), 'angstrom': ('length', Fraction(1, 10**10), 'angstrom'),
  'light year': ('length', Fraction(9460730472580800), 'lightyear ly'), 'parsec': ('parsecs', 1, 'pc parsec'),
  'second': ('time', 1, 's sec second'), 'minute': ('time', 60, 'min minute'), 'hour': ('time', 3600, 'h hr hrs hour'),
  'day': ('time', 86400, 'd day'), 'week': ('time', 604800, 'week'), 'month': ('months', 1, 'month'),
  'year': ('months', 12, 'yr yrs year'),
  'gram': ('mass', Fraction(1, 1000), 'g gram gramme'), 'pound': ('mass', Fraction('0.45359237'), 'lb lbs pound'),
  'ounce': ('mass', Fraction('0.028349523125'), 'oz ounce'), 'tonne': ('mass', 1000, 'tonne'),
  'ton': ('tons', 1, 'ton'), 'litre': ('length3', Fraction(1, 1000), 'l L liter litre'),
  'gallon': ('gallons', 1, 'gal gallon'), 'hectare': ('length2', 10000, 'ha hectare'), 'acre': ('acres', 1, 'acre'),
  'dollar': ('dollars', 1, 'dollar usd'), 'cent': ('dollars', Fraction(1, 100), 'cent penny pennie'),
  'euro': ('euros', 1, 'euro eur'), 'sterling': ('sterling', 1, 'sterling'),
  'degree': ('degrees', 1, 'degree deg'), 'radian': ('radians', 1, 'rad radian'),
  'kelvin': ('kelvins', 1, 'K kelvin'), 'celsius': ('celsius', 1, 'celsius'),
  'fahrenheit': ('fahrenheit', 1, 'fahrenheit'), 'newton': ('force', 1, 'N newton'), 'joule': ('energy', 1, 'J joule'),
  'electronvolt': ('electronvolts', 1, 'eV electronvolt'), 'watt': ('power', 1, 'W watt'),
  'pascal': ('pressure', 1, 'Pa pascal'), 'volt': ('voltage', 1, 'V volt'), 'ampere': ('current', 1, 'A amp ampere'),
  'ohm': ('resistance', 1, 'ohm'), 'hertz': ('frequency', 1, 'Hz hertz'), 'mole': ('moles', 1, 'mol mole'),
  'erg': ('energy', Fraction(1, 10**7), 'erg'), 'dyne': ('force', Fraction(1, 10**5), 'dyne dyn'),
  'percent': ('percent', 1, 'percent percentage pct'), 'bit': ('bits', 1, 'bit'), 'byte': ('bits', 8, 'byte'),
  'dozen': ('count', 12, 'dozen'), 'half': ('count', Fraction(1, 2), 'half halve'),
  **{name: ('count', Fraction(1, i), name) for i, name in enumerate((
    'third', 'fourth', 'fifth', 'sixth', 'seventh', 'eighth', 'ninth', 'tenth'), 3)},
}
_PREFIXES = {'k': 3, 'M': 6, 'G': 9, 'c': -2, 'm': -3, 'd': -1, 'n': -9, 'p': -12, 'mu': -6, 'u': -6}
_LONG_PREFIXES = {'kilo': 3, 'mega': 6, 'giga': 9, 'centi': -2, 'milli': -3, 'deci': -1, 'nano': -9, 'micro': -6}
_PREFIXED = ('m', 's', 'g', 'l', 'L', 'J', 'N', 'W', 'Pa', 'V', 'A', 'eV', 'Hz', 'K', 'mol')
_LONG_PREFIXED = ('meter', 'metre', 'gram', 'gramme', 'liter', 'litre', 'second', 'joule', 'watt', 'newton', 'volt',
                  'hertz', 'pascal', 'byte', 'bit', 'ohm')
_COMBINED = {'mph': 'mile / hour', 'kph': 'km / hour', 'kmh': 'km / hour', 'cc': 'cm ^ 3', 'ml': 'mL', 'sqft': 'ft ^ 2'}
# _EMPTY are words in a unit that have no meaning. A text with a word of _REFUSED isn't a unit.
_EMPTY = {'unit', 'units', 'of', 'the', 'a', 'an', 'in', 'exactly', 'each', 'total', 'altogether', 'long', 'away'}
_REFUSED = {
  'is', 'not', 'are', 'or', 'and', 'no', 'more', 'less', 'than', 'greater', 'fewer', 'least', 'most', 'wrong', 'if',
  'when', 'but', 'except', 'where', 'for', 'with', 'about', 'approximately', 'then', 'incorrect', 'plus', 'minus',
  'times', 'from', 'to', 'between', 'mod', 'base', 'squared', 'i', 'we', 'it', 'they', 'cannot', 'never', 'maybe',
  'otherwise', 'over', 'under', 'up', 'down', 'answer', 'both', 'either', 'neither', 'nor', 'because', 'since', 'so',
  'thus', 'factorial', 'divided', 'halved', 'doubled', 'tripled',
}
_OWED = {'loss', 'losses', 'debt', 'debts', 'deficit', 'deficits'}  # words that change the sign of an amount of money
_OF_UNITS = {'per', 'square', 'sq', 'cubic', 'cu', 'squared', 'cubed'}
# Letters that may be units even without \text.
SINGLE_LETTERS = {'m', 's', 'g', 'h', 'l', 'L', 'J', 'N', 'W', 'V', 'A', 'K', 'd'}
MAX_WORDS = 3


class Unit(NamedTuple):
  """A unit of measurement.

  dimensions: sorted pairs (dimension, power), for example (('length', 1), ('time', -1)) for km/h; () if the text
    doesn't say which unit, as in 'square units'.
  factor: the size of the unit in base units.
  name: the unit as it was written.
  """

  dimensions: tuple[tuple[str, int], ...]
  factor: Fraction
  name: str

  @property
  def is_percent(self) -> bool:
    return self.dimensions == (('percent', 1),)

  @property
  def is_degree(self) -> bool:
    return self.dimensions == (('degrees', 1),)

  @property
  def is_count(self) -> bool:
    """True for words such as dozen or thirds, which say how large a number is."""
    return self.dimensions == (('count', 1),)

  @property
  def is_money(self) -> bool:
    return self.dimensions in ((('dollars', 1),), (('euros', 1),), (('sterling', 1),))

  def may_be(self, other: 'Unit') -> bool:
    """Returns True if this is the sign £ and the other unit is the word pound, which is money or a weight.

    Both may have the same units after it, as in '£5 per week'.
    """
    differ = set(self.dimensions) - set(other.dimensions), set(other.dimensions) - set(self.dimensions)
    return differ == ({('sterling', 1)}, {('mass', 1)}) and self.factor * _TABLE['pound'][2] == other.factor and (
      other.name.lower().startswith('pound'))

  @property
  def is_generic(self) -> bool:
    """True if the text mentions a unit without its name, as in 'square units'."""
    return not self.dimensions


def _table() -> dict[str, tuple[str, int, Fraction]]:
  """Returns {name of a unit: (dimension, power of the dimension, size in base units)} for all known units."""
  found = {}
  for dimension, factor, names in _BASE.values():
    power = 1
    if re.fullmatch(r'length\d', dimension):
      dimension, power = 'length', int(dimension[-1])
    for name in names.split():
      found[name] = (dimension, power, Fraction(factor))
      if len(name) > 2:
        found[name + 's'] = found[name + 'es'] = found[name]
  for prefixes, names in ((_PREFIXES, _PREFIXED), (_LONG_PREFIXES, _LONG_PREFIXED)):
    for name in names:
      for prefix, ten in prefixes.items():
        dimension, power, factor = found[name]
        entry = (dimension, power, factor * Fraction(10) ** ten)
        found.setdefault(prefix + name, entry)
        found.setdefault(prefix + name + 's', entry)
  return found


_TABLE = _table()


def read(tokens: list[str], bare: bool = False) -> Unit | None:
  r"""Returns the unit that the tokens form together; None if they don't form a unit.

  The tokens may be a product, quotient or power of units, such as km/h. 'square' and 'cubic' precede the
  unit, 'squared' and 'cubed' follow it.

  bare: whether single letters outside \text may be units too.
  """
  words: list[str] = []
  for before, token in zip(['', *tokens], tokens):
    if token == r'\mu':
      continue
    word = token[1:] if is_word(token) else token
    if token in (r'\sec', r'\min'):
      word = token[1:]
    elif not is_word(token) and (token.isalpha() and not (bare and token in SINGLE_LETTERS)):
      return None
    word = 'mu' + word if before == r'\mu' else word
    words += _COMBINED.get(word.lower(), word).split()
  dimensions: dict[str, int] = {}
  factor, sign, power, nouns = Fraction(1), 1, 1, 0
  i, unknown, last, where = 0, [], None, False
  while i < len(words):
    word = words[i]
    if word in ('{', '}', '(', ')', r'\cdot', '.'):
      i += 1
      continue
    if word == 'in' and _is_preposition(words, i):
      where = True
    elif word in ('/', 'per'):
      sign = -1
    elif word.lower() in ('square', 'sq', 'cubic', 'cu'):
      power = 2 if word.lower().startswith('sq') else 3
    elif word == '^' or word.lower() in ('squared', 'cubed'):
      if last is None:
        return None
      exponent, i = _exponent(words, i)
      if exponent is None:
        return None
      name, change, entry_power, entry_factor = last
      dimensions[name] += change * (exponent - 1) * entry_power
      factor *= entry_factor ** (change * (exponent - 1))
    elif entry := _TABLE.get(word) or (len(word) > 2 and _TABLE.get(word.lower())):
      name, entry_power, entry_factor = entry
      dimensions[name] = dimensions.get(name, 0) + sign * power * entry_power
      factor *= entry_factor ** (sign * power)
      last, power = (name, sign, entry_power, entry_factor), 1
    elif re.fullmatch("[A-Za-z'-]+", word) and word.lower() not in _REFUSED and number_in_words([word]) in (None, 1):
      nouns += 1
      if word.lower() not in _EMPTY and not where:
        unknown.append(_singular(word.lower()))
    else:
      return None
    i += 1
  if nouns > MAX_WORDS:
    return None
  if unknown and not dimensions:
    dimensions[unknown[-1]] = 1
  if not words:
    return None
  name = ' '.join(token.lstrip("'") for token in tokens)
  unit = Unit(tuple(sorted((n, p) for n, p in dimensions.items() if p)), factor, name)
  return None if unit.is_money and any(word.lower() in _OWED for word in words) else unit


def _is_preposition(words: list[str], i: int) -> bool:
  """Returns True if `words[i]` is 'in' between two words, as in 'apples in total'. Elsewhere it is a unit of length."""
  before, after = words[i - 1] if i else '', words[i + 1] if i + 1 < len(words) else ''
  return all(word.replace('-', '').isalpha() and word.lower() not in _OF_UNITS for word in (before, after))


def _exponent(words: list[str], i: int) -> tuple[int | None, int]:
  """Reads the power that begins at `words[i]` with '^', 'squared' or 'cubed'. Returns (power, index of its last word).

  The power is None if '^' isn't followed by an integer of one digit.
  """
  if words[i] != '^':
    return (2 if words[i].lower() == 'squared' else 3), i
  sign, j = 1, i + 1
  while j < len(words) and words[j] in ('{', '-'):
    sign = -sign if words[j] == '-' else sign
    j += 1
  if j == len(words) or not words[j].isdigit() or len(words[j]) > 1:
    return None, i
  return sign * int(words[j]), j


def _singular(word: str) -> str:
  return word[:-1] if word.endswith('s') and len(word) > 3 else word


DEGREE = Unit((('degrees', 1),), Fraction(1), 'degrees')
PERCENT = Unit((('percent', 1),), Fraction(1), '%')
