"""Collects the values of a metrics file by metric name.

A run may have a million steps, so values are kept in compact arrays: 16 bytes for each pair of a step and a value.
"""

from array import array

import numpy as np

from betarank.eval.report.runs import Curve


class Columns:
  """Collects (step, value) pairs for each metric."""

  def __init__(self):
    self._columns: dict[str, tuple[array, array]] = {}

  def add(self, step: int, name: str, value: float) -> None:
    """Adds the value of metric `name` at a step. The step must be less than 2**63."""
    if (column := self._columns.get(name)) is None:
      column = self._columns[name] = array('q'), array('d')
    column[0].append(step)
    column[1].append(value)

  def curves(self) -> dict[str, Curve]:
    """Returns {metric: (steps int64 [X], values float64 [X])}, in ascending order of steps.

    If a metric has several values at the same step, only the value that was added last is returned.
    """
    return {name: _sorted(np.frombuffer(steps, np.int64), np.frombuffer(values, np.float64))
            for name, (steps, values) in self._columns.items()}


def _sorted(steps: np.ndarray, values: np.ndarray) -> Curve:
  if (np.diff(steps) > 0).all():
    return steps, values
  order = np.argsort(steps, kind='stable')
  last = np.append(np.diff(steps[order]) > 0, True)
  return steps[order][last], values[order][last]
