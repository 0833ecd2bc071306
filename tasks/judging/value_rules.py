"""Compares numbers and expressions with their units. The units may be equal, convertible, or missing on one side.

The gold is the reference answer.
"""

import dataclasses
from collections.abc import Callable
from fractions import Fraction

from betarank.tasks.judging import expressions, notation, values
from betarank.tasks.judging.expressions import Node
from betarank.tasks.judging.readings import Reading, Value

# A function (gold, answer) -> whether math-verify considers them equal; None if it can't parse the gold.
ByMathVerify = Callable[[str, str], bool | None]
_PERCENT = Fraction(1, 100)


class ValueRules:
  """Compares values with their units.

  Attributes:
    rule: a phrase that names the rule that decided the last comparison.
  """

  def __init__(self, by_math_verify: ByMathVerify):
    self.by_math_verify = by_math_verify
    self.rule = ''

  def decide(self, same: bool | None, rule: str) -> bool | None:
    """Stores `rule`, the rule that decided, in self.rule. Returns `same`."""
    self.rule = rule
    return same

  def quantities(self, gold: Reading, answer: Reading) -> bool | None:
    """Returns whether two values with their units are the same; None if this can't be decided.

    Returns NotImplemented if gold or answer isn't a Value.
    """
    if not isinstance(gold, Value) or not isinstance(answer, Value):
      return NotImplemented
    if (gold.unit is None) != (answer.unit is None):
      gold, answer = _with_bare_unit(gold, answer)
    wanted, given = gold.unit, answer.unit
    if wanted is None and given is None:
      return self.values(gold, answer)
    if given is None:
      return self._unit_left_out(gold, answer)
    if wanted is None:
      return self._unit_added(gold, answer)
    if wanted.dimensions == given.dimensions:
      same = self.values(_scaled(gold, wanted.factor / given.factor), answer)
      return self.decide(same, f'{self.rule}, in the same unit' if wanted.factor == given.factor else
                          f'{self.rule}, converted from {given.name} to {wanted.name}')
    if wanted.may_be(given) or given.may_be(wanted):
      return self.decide(self.values(gold, answer), 'pounds of money')
    if {wanted.dimensions, given.dimensions} == {(('degrees', 1),), (('radians', 1),)}:
      sides = [_radians(side) if side.unit.is_degree else side for side in (gold, answer)]
      return self.decide(self.values(*sides), 'degrees and radians')
    if wanted.is_generic or given.is_generic:
      return self.decide(self.values(gold, answer), 'a unit without a name')
    return self.decide(False, f'different units: {wanted.name} and {given.name}')

  def _unit_left_out(self, gold: Value, answer: Value) -> bool | None:
    if self.values(gold, answer):
      return self.decide(True, 'the unit of the gold left out')
    if gold.unit.is_percent:
      return self.decide(self.values(_scaled(gold, _PERCENT), answer), 'a percentage as a number')
    if gold.unit.is_count:
      return self.decide(self.values(_scaled(gold, gold.unit.factor), answer), 'dozens or parts as a number')
    if gold.unit.is_degree:
      return self.decide(self.values(_radians(gold), answer), 'degrees as radians')
    return self.decide(False, 'another number')

  def _unit_added(self, gold: Value, answer: Value) -> bool | None:
    if answer.unit.is_percent:
      if self.values(gold, _scaled(answer, _PERCENT)):
        return self.decide(True, 'a percentage for the number')
      return self.decide(self.values(gold, answer), 'a percentage whose sign the gold leaves out')
    if answer.unit.is_count:
      return self.decide(self.values(gold, _scaled(answer, answer.unit.factor)), 'dozens or parts for the number')
    if answer.unit.is_degree and gold.node is not None and any(
        n == Node('constant', ('pi',)) for n in expressions.walk(gold.node)):
      return self.decide(self.values(gold, _radians(answer)), 'degrees for radians')
    same = self.values(gold, answer)
    return self.decide(same, 'a unit that the gold leaves out' if same else self.rule)

  def values(self, gold: Value, answer: Value) -> bool | None:
    """Returns whether two expressions have the same value. Units are ignored.

    Returns None if one of them has notation that only math-verify may be able to parse, and math-verify can't decide.
    """
    if gold.node is None or answer.node is None:
      same = self.by_math_verify(gold.text, answer.text)
      return self.decide(same, 'compared by math-verify' if same is not None else 'math-verify cannot read it either')
    if values.equal(gold.node, answer.node):
      exactly = not expressions.symbols(gold.node) and None not in (values.exact(gold.node), values.exact(answer.node))
      return self.decide(True, 'equal numbers, exactly' if exactly else 'equal values')
    if values.near(gold.node, answer.node):
      return self.decide(True, 'equal to as many digits as its decimals state')
    return self.decide(False, 'different values')


def _with_bare_unit(gold: Value, answer: Value) -> tuple[Value, Value]:
  """Returns (gold, answer), read again with letters as units instead of variables: `5 m` then means five metres.

  A value that has no variables, or already has a unit, stays as it is.
  """
  gold_again, answer_again = gold, answer
  if gold.unit is None and gold.node is not None and expressions.symbols(gold.node):
    gold_again = _read_again(gold)
  if answer.unit is None and answer.node is not None and expressions.symbols(answer.node):
    answer_again = _read_again(answer)
  return gold_again, answer_again


def _read_again(reading: Value) -> Value:
  again = notation.read(reading.text, True)
  return again if isinstance(again, Value) else reading


def _scaled(value: Value, factor) -> Value:
  if value.node is None or factor == 1:
    return value
  return dataclasses.replace(value, node=Node('mul', (Node('number', (factor, None)), value.node)), tokens=())


def _radians(value: Value) -> Value:
  return value if value.node is None else dataclasses.replace(value, node=Node('degree', (value.node,)), tokens=())
