"""Collects the figures of a metrics file by name. Runs may have a million steps, so a figure takes 16 bytes."""

from array import array

import numpy as np

from betarank.eval.report.runs import Curve


class Columns:
  """Figures by name and step, in the order in which they are added."""

  def __init__(self):
    self._columns: dict[str, tuple[array, array]] = {}

  def add(self, step: int, name: str, value: float) -> None:
    """Adds a figure. The step must be less than 2**63."""
    if (column := self._columns.get(name)) is None:
      column = self._columns[name] = array('q'), array('d')
    column[0].append(step)
    column[1].append(value)

  def curves(self) -> dict[str, Curve]:
    """Returns {name: (steps int64 [X], values float64 [X])}, in ascending order of steps.

    If a step has several figures of one name, the last one counts.
    """
    return {name: _sorted(np.frombuffer(steps, np.int64), np.frombuffer(values, np.float64))
            for name, (steps, values) in self._columns.items()}


def _sorted(steps: np.ndarray, values: np.ndarray) -> Curve:
  if (np.diff(steps) > 0).all():
    return steps, values
  order = np.argsort(steps, kind='stable')
  last = np.append(np.diff(steps[order]) > 0, True)
  return steps[order][last], values[order][last]
