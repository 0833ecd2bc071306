"""Assigns each training row to a source: a fixed interleaving whose counts stay close to the weights everywhere."""

from collections.abc import Mapping

import numpy as np

PERIOD = 2**16  # rows after which the interleaving repeats: weights are rounded to multiples of 1 / PERIOD


class Schedule:
  """The source of each row and its number within that source, in O(1). Rows count from when the weights were set."""

  def __init__(self, weights: Mapping[str, float]):
    """Args: weights of any scale, at least one of them positive. Their order doesn't matter."""
    self.names = sorted(name for name, weight in weights.items() if weight > 0)
    share = np.array([weights[name] for name in self.names], np.float64)
    exact = share / share.sum() * PERIOD
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    # The largest remainders get the rows that rounding down left; the largest source pays for those raised to 1.
    counts[np.argsort(counts - exact, kind='stable')[:max(0, PERIOD - counts.sum())]] += 1
    counts[np.argmax(counts)] += PERIOD - counts.sum()
    # Draw k of a source's c draws belongs in the middle of the k-th of c equal parts of the period.
    source = np.repeat(np.arange(len(counts)), counts)
    draw = np.concatenate([np.arange(c) for c in counts])
    order = np.argsort((draw + 0.5) / counts[source], kind='stable')
    self._source, self._draw, self._counts = source[order], draw[order], counts

  def at(self, row: int) -> tuple[str, int]:
    """Returns the source of `row`, and how many earlier rows that source gave."""
    period, place = divmod(row, PERIOD)
    source = self._source[place]
    return self.names[source], int(period * self._counts[source] + self._draw[place])

  def counts(self, rows: int) -> dict[str, int]:
    """Returns how many of the first `rows` rows each source gives."""
    periods, rest = divmod(rows, PERIOD)
    counts = periods * self._counts + np.bincount(self._source[:rest], minlength=len(self.names))
    return {name: int(count) for name, count in zip(self.names, counts)}
