r"""Compares families of values as sets. A family has the values a + b·k for every integer k, such as \pi/2 + \pi k.

A residue is compared as a family: 1 mod 3 is 1 + 3·k.
"""

import itertools
from fractions import Fraction

from betarank.tasks.judging import expressions, values
from betarank.tasks.judging.expressions import Node
from betarank.tasks.judging.readings import Family, Residue


def as_family(residue: Residue) -> Family:
  node = Node('add', (residue.value, Node('mul', (residue.modulus, Node('symbol', ('k',))))))
  return Family(residue.tokens, node, 'k')


def same_family(gold: Family, answer: Family) -> bool | None:
  lines = [_line(family) for family in (gold, answer)]
  if None in lines:
    renamed = expressions.rename(answer.node, answer.variable, gold.variable)
    return values.equal(gold.node, renamed) or None
  (start, step), (other, stride) = lines
  if not (values.equal(step, stride) or values.equal(step, Node('neg', (stride,)))):
    return False
  shift = Node('div', (Node('add', (start, Node('neg', (other,)))), step))
  try:
    size = values.approximate(shift)
  except values.TooHard:
    return values.equal(start, other)
  nearest = Node('number', (Fraction(round(float(size.real))), None))
  return values.equal(shift, nearest)


def _line(family: Family) -> tuple[Node, Node] | None:
  """Returns the expressions (a, b) of a family a + b·k; None if the family isn't linear in k."""
  at = [expressions.substitute(family.node, family.variable, Node('number', (Fraction(i), None))) for i in range(4)]
  step, second, third = (Node('add', (b, Node('neg', (a,)))) for a, b in itertools.pairwise(at))
  return (at[0], step) if values.equal(step, second) and values.equal(step, third) else None
