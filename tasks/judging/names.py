r"""Recognizes names on the left side of an equation: `x`, `x_1`, `f(x)`, `a_n`, `\angle ABC`, `Area`."""

import dataclasses
import re

from betarank.tasks.judging import expressions
from betarank.tasks.judging.readings import Reading, Words


@dataclasses.dataclass(frozen=True)
class Name:
  r"""The name on the left side of an equation.

  key: the text of the name. Equal names have the same key.
  kind: 'symbol' (x), 'function' (f(x), a_n), 'label' (\angle ABC, AB, P(A)) or 'words' (Area).
  variable: the variable of a function, such as x for f(x) or n for a_n. It has no meaning for other kinds.
  """

  key: str
  kind: str = 'symbol'
  variable: str = ''

  def may_be(self, other: 'Name') -> bool:
    """Returns whether an equation for this name and one for `other`, a different name, can mean the same.

    True for two functions, and for a function and y: f(x) = 2x means the same as g(x) = 2x and as y = 2x. True if one
    of the names is in words, such as Area. False otherwise: x = 2 doesn't mean the same as y = 2.
    """
    kinds = {self.kind, other.kind}
    return 'words' in kinds or kinds == {'function'} or ('function' in kinds and 'y' in (self.key, other.key))


_FUNCTION = re.compile(r"(\\?[A-Za-z]+)((?: _ (?:\{[^{}]*\}|\S+))?(?: ')*)(?: \( ([^()]*) \))?")


def name_of(side: Reading | None) -> Name | None:
  r"""Returns the name that one side of an equation consists of, such as x, x_1, f(x), a_n, \angle ABC, AB or Area.

  Returns None if the side is anything else.
  """
  if side is None:
    return None
  if isinstance(side, Words):
    return Name(side.spelled, 'words')
  tokens = [t for t in side.tokens if t not in (r'\overline', r'\bar', r'\vec', r'\hat')]
  marks = [t for t in tokens if t in (r'\angle', r'\triangle', '|', '[', r'\frac', '/', ':')]
  indexed = '_' in tokens
  letters = [t for t in tokens if t not in (*marks, '_', '{', '}', ']') and not (t.isdigit() and indexed)]
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
