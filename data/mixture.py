"""Assigns each training row to a source, in a fixed order. In any stretch of rows, the sources' shares are close to
their weights.
"""

from collections.abc import Mapping

import numpy as np

PERIOD = 2**16  # the order repeats after so many rows; weights are rounded to multiples of 1 / PERIOD


class Schedule:
  """The fixed order in which rows are taken from the sources. Any row is looked up in O(1).

  Rows are counted from 0 at the beginning of a run, and again if the run resumes with other source weights.
  """

  def __init__(self, weights: Mapping[str, float]):
    """Computes one period of the order, which is repeated.

    weights: the weight of each source, on any scale. At least one weight must be positive. The order of the dict
      doesn't matter.
    """
    self.names = sorted(name for name, weight in weights.items() if weight > 0)
    share = np.array([weights[name] for name in self.names], np.float64)
    exact = share / share.sum() * PERIOD
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    # Rows left over by rounding down go to the sources with the largest remainders. If sources were raised to 1 row,
    # those rows are taken from the largest source.
    counts[np.argsort(counts - exact, kind='stable')[:max(0, PERIOD - counts.sum())]] += 1
    counts[np.argmax(counts)] += PERIOD - counts.sum()
    # A source that gives c rows per period gives its k-th row near the middle of the k-th of c equal parts.
    source = np.repeat(np.arange(len(counts)), counts)
    draw = np.concatenate([np.arange(c) for c in counts])
    order = np.argsort((draw + 0.5) / counts[source], kind='stable')
    self._source, self._draw, self._counts = source[order], draw[order], counts

  def at(self, row: int) -> tuple[str, int]:
    """Returns (the source of row number `row`, the number of earlier rows that came from this source)."""
    period, place = divmod(row, PERIOD)
    source = self._source[place]
    return self.names[source], int(period * self._counts[source] + self._draw[place])

  def counts(self, rows: int) -> dict[str, int]:
    """Returns how many of the first `rows` rows come from each source."""
    periods, rest = divmod(rows, PERIOD)
    counts = periods * self._counts + np.bincount(self._source[:rest], minlength=len(self.names))
    return {name: int(count) for name, count in zip(self.names, counts)}
