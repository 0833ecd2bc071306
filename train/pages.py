"""Which rows and pages of the sampler's cache belong to which sample: bookkeeping on the host.

Each part of the mesh's batch axes has its own rows and pages, so a prompt is prefilled in every part that draws samples
of it. Everything here is a function of the prompts, the settings and the tokens drawn, hence equal on every host.
"""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from betarank.model.decode import Table


@dataclasses.dataclass(eq=False)
class Prefix:
  """A prompt in the pages of one part of the mesh.

  Attributes:
    prompt: its number.
    pages: of that part.
    samples: how many running ones use it.
    routed: what the sampler keeps of its prefill.
  """

  prompt: int
  pages: list[int]
  samples: int = 0
  routed: Any = None


@dataclasses.dataclass(eq=False)
class Running:
  """A sample that is being drawn: its prompt's number, index, limit of tokens, row, and what there is of it."""

  prompt: int
  index: int
  limit: int
  row: int
  prefix: Prefix
  pages: list[int] = dataclasses.field(default_factory=list)
  count: int = 0
  drawn: list = dataclasses.field(default_factory=list)


class _Part:
  def __init__(self, rows: range, pages: int):
    self.rows, self.pages = list(rows)[::-1], list(range(pages))[::-1]  # the free ones
    self.prefixes: dict[int, Prefix] = {}
    self.full = False


class Pages:
  """Assigns rows and pages to samples.

  Args:
    rows, pages: of the whole cache, split over `parts`; a part's pages have room for a row at least.
    size: tokens of a page.
    prompt_pages, row_pages: pages of the longest prompt, and of the longest prompt and answer.
    unit_rows: rows of a unit (decode.Table).
  """

  def __init__(
    self, *, rows: int, pages: int, parts: int, size: int, prompt_pages: int, row_pages: int, unit_rows: int):
    self._each, self._size, self._prompt_pages, self._unit_rows = rows // parts, size, prompt_pages, unit_rows
    self._parts = [_Part(range(n * self._each, (n + 1) * self._each), pages // parts) for n in range(parts)]
    self._table = Table(np.zeros((rows, row_pages), np.int32), np.zeros(rows, np.int32), None, None)
    self.running: dict[int, Running] = {}  # by row, in the order in which they started

  def unfinished(self, tokens: int) -> bool:
    """Returns True if some running sample may need more than `tokens` other tokens."""
    return any(sample.count + tokens < sample.limit for sample in self.running.values())

  def grow(self, tokens: int) -> list[Running]:
    """Gives running samples the pages for `tokens` more tokens than they are known to have, the oldest first.

    If a part has no page left, its sample that started last is stopped. Returns the stopped samples.
    """
    stopped = []
    for part in self._parts:
      part.full = False
    for sample in list(self.running.values()):
      part = self._part(sample)
      while self.running.get(sample.row) is sample and not self._extend(part, sample, tokens):
        last = next(other for other in reversed(self.running.values()) if self._part(other) is part)
        self.stop(last)
        stopped.append(last)
        part.full = True
    return stopped

  def start(
    self, queue: dict[int, collections.deque[int]], length: Callable[[int], int], limit: Callable[[int], int],
    tokens: int,
  ) -> tuple[list[Running], list[Prefix | None]]:
    """Starts samples from the queue (prompt -> indices) while there are rows and pages.

    A sample starts only if each sample that already runs in its part, and may need more pages, can take one, and if
    none was just stopped there. Samples of prompts that are in the part come first.

    Args:
      length: tokens of a prompt in the cache.
      limit: of a prompt's samples.
      tokens: that a sample gets pages for.

    Returns:
      (samples, prefixes): the samples started, and for each part the prompt to prefill there before; at most one, so
      call this again until it starts none.
    """
    started, prefixes = [], [None] * len(self._parts)
    for n, part in enumerate(self._parts):
      while queue and part.rows and not part.full:
        p = min((p for p in part.prefixes if p in queue), default=None)
        new = p is None
        if new:
          p = min(queue)
          if prefixes[n]:
            break
        wanted = -(-min(limit(p), tokens) // self._size) + (self._count(length(p)) if new else 0)
        growing = sum(len(sample.pages) < self._count(sample.limit) for sample in self.running.values()
                      if self._part(sample) is part)
        if not self._room(part, wanted + growing, queue):
          break
        if not new and p not in part.prefixes:
          continue  # it made room for its own sample, and is prefilled again
        if new:
          prefixes[n] = part.prefixes[p] = Prefix(p, [part.pages.pop() for _ in range(self._count(length(p)))])
        prefix = part.prefixes[p]
        sample = Running(p, queue[p].popleft(), limit(p), part.rows.pop(), prefix)
        if not queue[p]:
          del queue[p]
        prefix.samples += 1
        self._table.pages_BJ[sample.row, : len(prefix.pages)] = prefix.pages
        self._table.prefix_B[sample.row] = length(p)
        self._extend(part, sample, tokens)
        self.running[sample.row] = sample
        started.append(sample)
    return started, prefixes

  def stop(self, sample: Running) -> None:
    """Takes the row and pages of a sample back. Its prompt stays until its pages are needed."""
    part = self._part(sample)
    del self.running[sample.row]
    part.rows.append(sample.row)
    part.pages += sample.pages[::-1]
    sample.prefix.samples -= 1

  def table(self) -> Table:
    """Returns the table of the running samples; a copy, because a dispatch may read it later."""
    members = self._unit_rows
    rows_UM, count_U = np.zeros((len(self._table.prefix_B), members), np.int32), np.zeros_like(self._table.prefix_B)
    together = collections.defaultdict(list)
    for sample in self.running.values():
      together[sample.row // self._each, sample.prompt].append(sample.row % self._each)
    used = [n * self._each for n in range(len(self._parts))]
    for (n, _), rows in together.items():
      for first in range(0, len(rows), members):
        unit = rows[first : first + members]
        rows_UM[used[n]] = unit + unit[:1] * (members - len(unit))
        count_U[used[n]] = len(unit)
        used[n] += 1
    return Table(self._table.pages_BJ.copy(), self._table.prefix_B.copy(), rows_UM, count_U)

  def filled(self, prefixes: list[Prefix | None], out_of_range: int) -> np.ndarray:
    """Returns int32 [parts, prompt_pages], the pages that prompts are written to; `out_of_range` elsewhere."""
    pages_FI = np.full((len(prefixes), self._prompt_pages), out_of_range, np.int32)
    for f, prefix in enumerate(prefixes):
      if prefix:
        pages_FI[f, : len(prefix.pages)] = prefix.pages
    return pages_FI

  def _part(self, sample: Running) -> _Part:
    return self._parts[sample.row // self._each]

  def _count(self, tokens: int) -> int:
    return -(-tokens // self._size)

  def _extend(self, part: _Part, sample: Running, tokens: int) -> bool:
    wanted = self._count(min(sample.count + tokens, sample.limit)) - len(sample.pages)
    if wanted <= 0:
      return True
    if not self._room(part, wanted, {}):
      return False
    pages = [part.pages.pop() for _ in range(wanted)]
    first = self._prompt_pages + len(sample.pages)
    self._table.pages_BJ[sample.row, first : first + wanted] = pages
    sample.pages += pages
    return True

  def _room(self, part: _Part, pages: int, queue) -> bool:
    """Returns True if a part has this many free pages, if need be after its unused prompts have left."""
    for prefix in list(part.prefixes.values()):
      if not prefix.samples and (prefix.prompt not in queue or len(part.pages) < pages):
        part.pages += part.prefixes.pop(prefix.prompt).pages[::-1]
    return len(part.pages) >= pages
