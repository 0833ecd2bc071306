r"""Separates the unit from a number: `5 \text{ cm}^2`, `\$3.50`, `62.5\%`, `90^\circ`."""

from betarank.tasks.judging import units
from betarank.tasks.judging.latex import is_word
from betarank.tasks.judging.units import Unit

_DEGREES = (['^', '{', r'\circ', '}'], ['^', r'\circ'], [r'\degree'], ['^', '{', r'\degree', '}'])
_OF_ANGLES = {r'\sin', r'\cos', r'\tan', r'\cot', r'\sec', r'\csc'}
_WITHIN_UNITS = {'^', '{', '}', '/', r'\cdot', '-', '(', ')', '.', r'\mu', r'\sec', r'\min', '1', '2', '3'}


def split_unit(tokens: list[str], bare: bool) -> tuple[list[str], Unit | None]:
  r"""Returns (the tokens of the number, its unit). If there is no unit, returns (all tokens, None).

  A unit is separated only if the remaining tokens can be a number.

  bare: whether single letters outside \text, as in `5m`, may be units too.
  """
  if tokens[0] == r'\dollar' or tokens[:2] == ['-', r'\dollar']:
    return [t for t in tokens if t != r'\dollar'], units.DOLLAR
  if tokens[-1] in (r'\dollar', '%') and len(tokens) > 1:
    return tokens[:-1], units.DOLLAR if tokens[-1] == r'\dollar' else units.PERCENT
  without_sign = _without_degree_sign(tokens)
  if without_sign and not _OF_ANGLES & set(tokens):
    return without_sign, units.DEGREE
  begin = len(tokens)
  while begin > 1 and (is_word(tokens[begin - 1]) or tokens[begin - 1] in _WITHIN_UNITS or (
      bare and tokens[begin - 1] in units.SINGLE_LETTERS)):
    begin -= 1
  for start in range(begin, len(tokens)):
    if is_word(tokens[start]) or tokens[start].isalpha() or tokens[start] in (r'\mu', r'\sec', r'\min'):
      unit = units.read(tokens[start:], bare)
      if unit is not None and _is_whole(tokens[:start]):
        return _temperature(tokens[:start], unit)
  return tokens, None


def _without_degree_sign(tokens: list[str]) -> list[str]:
  """Returns the tokens before a degree sign at the end; [] if there is no such sign."""
  return next((tokens[:-len(form)] for form in _DEGREES if tokens[-len(form):] == form), [])


def _is_whole(tokens: list[str]) -> bool:
  """Returns whether all brackets in `tokens` are closed and the last token isn't an operator."""
  depth = 0
  for token in tokens:
    depth += (token in ('{', '(')) - (token in ('}', ')'))
    if depth < 0:
      return False
  return depth == 0 and tokens[-1] not in ('/', r'\cdot', '-', '+', '^', '_')


def _temperature(tokens: list[str], unit: Unit) -> tuple[list[str], Unit]:
  r"""Returns (the tokens of the number, the unit). In 25^\circ\text{C}, the degree sign becomes a part of the unit.

  tokens: the tokens before the unit, perhaps with a degree sign at the end.
  """
  number = _without_degree_sign(tokens)
  if not number:
    return tokens, unit
  scale = {'C': 'celsius', 'F': 'fahrenheit'}.get(unit.name, unit.name)
  return number, units.read([f"'{scale}"]) or unit
