"""Reads plain numbers in the process that runs RL or evaluation, so that most answers don't have to go to a worker
process.

Only short texts of digits, signs and powers of ten are accepted, so no function here can take long.
"""

import re
from fractions import Fraction

from betarank.tasks.judging import notation, values
from betarank.tasks.judging.latex import Unreadable
from betarank.tasks.judging.readings import Value

_MAX_CHARS = 100
_NUMERAL = re.compile(
  r'(?:[\d\s.,+/{}$()*-]|(?<=\d)[eE](?=[+-]?\d)|\\[dt]?frac|\\times|\\cdot|\\[,!$ ]|10\s*\^|\\boxed)*',
  re.ASCII)
_WRAPPED = (
  ('$$', '$$'), ('$', '$'), (r'\(', r'\)'), (r'\[', r'\]'), ('**', '**'),
  *((rf'\{name}{{', '}') for name in ('boxed', 'text', 'textbf', 'mathrm', 'mathbf')),
)


def is_numeral(text: str) -> bool:
  """Returns True if `text` is short and has only digits, signs, fractions, powers of ten and math delimiters."""
  return 0 < len(text) <= _MAX_CHARS and _NUMERAL.fullmatch(text) is not None and any(c.isdigit() for c in text)


def exact_number(text: str) -> Fraction | None:
  """Returns the exact value of an integer, decimal, fraction or power of ten that is written in digits.

  Returns None for other texts.
  """
  if not is_numeral(text):
    return None
  try:
    reading = notation.read(text)
  except Unreadable:
    return None
  if not isinstance(reading, Value) or (reading.unit and not reading.unit.is_money):
    return None
  return values.exact(reading.node)


def plain(text: str) -> str:
  """Returns `text` without math delimiters around it and without a full stop at its end.

  Each run of white space becomes one space.
  """
  text = ' '.join(text.split())
  while len(text) <= 10 * _MAX_CHARS:
    inner = text.removesuffix('.').strip()
    for left, right in _WRAPPED:
      inside = inner[len(left):len(inner) - len(right)]
      if inside and inner.startswith(left) and inner.endswith(right) and _is_one_group(inside, left):
        inner = inside.strip()
        break
    if inner == text:
      break
    text = inner
  return text


def _is_one_group(inside: str, left: str) -> bool:
  r"""Returns True if the first and the last delimiter of a text belong together, as in `$1$`, but not in `$1$ or $2$`.

  inside: the text between the first and the last delimiter.
  left: the first delimiter, such as $ or \boxed{.
  """
  if left[-1] != '{':
    return left not in inside
  depth = 0
  for before, char in zip('{' + inside, inside):
    if char in '{}' and before != '\\':
      depth += 1 if char == '{' else -1
      if depth < 0:
        return False
  return depth == 0
