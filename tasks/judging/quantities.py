r"""Separates the unit from a number: `5 \text{ cm}^2`, `\$3.50`, `62.5\%`, `90^\circ`."""

from collections.abc import Sequence

from betarank.tasks.judging import units
from betarank.tasks.judging.latex import is_word
from betarank.tasks.judging.units import Unit

_DEGREES = (['^', '{', r'\circ', '}'], ['^', r'\circ'], [r'\degree'], ['^', '{', r'\degree', '}'])
_IN_DEGREES = (*_DEGREES, ["'degrees"], ["'degree"])  # before the scale of a temperature
_SCALES = {'C': 'celsius', 'F': 'fahrenheit', 'celsius': 'celsius', 'fahrenheit': 'fahrenheit'}
_MONEY = {r'\dollar': "'dollar", r'\euro': "'euro", r'\pound': "'sterling"}
_OF_ANGLES = {r'\sin', r'\cos', r'\tan', r'\cot', r'\sec', r'\csc'}
_WITHIN_UNITS = {'^', '{', '}', '/', r'\cdot', '-', '(', ')', '.', r'\mu', r'\sec', r'\min', '1', '2', '3'}


def split_unit(tokens: list[str], bare: bool) -> tuple[list[str], Unit | None]:
  r"""Returns (the tokens of the number, its unit). If there is no unit, returns (all tokens, None).

  A unit is separated only if the remaining tokens can be a number.

  bare: whether single letters outside \text, as in `5m`, may be units too.
  """
  if not _MONEY.keys().isdisjoint(tokens):
    return _amount(tokens)
  if tokens[-1] == '%' and len(tokens) > 1:
    return tokens[:-1], units.PERCENT
  if _OF_ANGLES.isdisjoint(tokens):
    if number := _before(_DEGREES, tokens):
      return number, units.DEGREE
    number, scale = _before(_IN_DEGREES, tokens[:-1]), _scale(tokens[-1])
    if number and scale:
      return number, scale
  begin = len(tokens)
  while begin > 1 and (is_word(tokens[begin - 1]) or tokens[begin - 1] in _WITHIN_UNITS or (
      bare and tokens[begin - 1] in units.SINGLE_LETTERS)):
    begin -= 1
  for start in range(begin, len(tokens)):
    if is_word(tokens[start]) or tokens[start].isalpha() or tokens[start] in (r'\mu', r'\sec', r'\min'):
      unit = units.read(tokens[start:], bare)
      if unit is not None and _is_whole(tokens[:start]):
        return _before(_DEGREES, tokens[:start]) or tokens[:start], unit
  return tokens, None


def _amount(tokens: list[str]) -> tuple[list[str], Unit | None]:
  """Does what `split_unit` does for an amount of money, such as $5, -$5, 5$, $5 each, $15/hour or $5 dollars."""
  end = next((i for i, t in enumerate(tokens) if is_word(t)), len(tokens))
  end -= tokens[end - 1:end] == ['/']
  number, rest = tokens[:end], tokens[end:]
  signed = number[1:] if number[:1] == ['-'] else number
  symbol = next((t for t in (*signed[:1], *signed[-1:]) if t in _MONEY), None)
  if symbol is None or not _is_whole(number):
    return tokens, None
  money, noun = units.read([_MONEY[symbol]]), units.read(rest[:1])
  repeated = noun is not None and (noun[:2] == money[:2] or money.may_be(noun))
  unit = units.read([_MONEY[symbol], *rest[repeated:]])
  if unit is None:  # because of a word such as 'more'
    number = tokens
  return [t for t in number if t != symbol], unit


def _before(forms: Sequence[list[str]], tokens: list[str]) -> list[str]:
  """Returns the tokens before one of the forms of a degree sign at the end; [] if there is no such sign."""
  return next((tokens[:-len(form)] for form in forms if tokens[-len(form):] == form), [])


def _scale(token: str) -> Unit | None:
  """Returns the unit of a temperature that the word or letter after the degrees names; None if it names none."""
  name = token.lstrip("'")
  scale = _SCALES.get(name if len(name) == 1 else name.lower())
  return units.read([f"'{scale}"]) if scale else None


def _is_whole(tokens: list[str]) -> bool:
  """Returns whether all brackets in `tokens` are closed and the last token isn't an operator."""
  depth = 0
  for token in tokens:
    depth += (token in ('{', '(')) - (token in ('}', ')'))
    if depth < 0:
      return False
  return depth == 0 and tokens[-1] not in ('/', r'\cdot', '-', '+', '^', '_')
