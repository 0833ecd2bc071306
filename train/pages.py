"""Records, on the host, which rows and pages of the sampler's cache each sample uses.

The batch axes of the mesh divide the devices into parts. Each part has its own rows and pages, so a prompt is prefilled
in every part that draws samples of it. All decisions depend only on the prompts, the settings and the tokens drawn, so
they are the same on every host.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from betarank.model.decode import Table


@dataclasses.dataclass(eq=False)
class Prefix:
  """A prompt that is in the cache of one part of the mesh.

  Attributes:
    prompt: the number of the prompt.
    pages: the page numbers, within the part, of the pages that hold the prompt.
    samples: the number of running samples that use the prompt.
    routed: (choices, f), set by the sampler. choices are the experts chosen in a prefill of one or more prompts (None
      for a dense model), and f is the index of this prompt among them.
  """

  prompt: int
  pages: list[int]
  samples: int = 0
  routed: Any = None


@dataclasses.dataclass(eq=False)
class Running:
  """A sample that is being drawn.

  Attributes:
    prompt: the number of the sample's prompt.
    index: the index of the sample among the samples of the prompt.
    limit: the largest number of tokens to draw.
    row: the sample's row of the cache.
    prefix: the sample's prompt in the cache.
    pages: the page numbers of the pages for the sample's own tokens.
    count: the number of drawn tokens that the host has read.
    drawn: what the host has read: (tokens, log-probabilities, experts) for each dispatch.
  """

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
    self.growing: set[Running] = set()  # the running samples that may need more pages
    self.full = False


class Pages:
  """Assigns rows and pages to samples.

  Args:
    rows, pages: the numbers of rows and pages of the whole cache. Each part gets an equal share. A part must have
      enough pages for the longest prompt and the longest answer.
    parts: the number of parts into which the mesh divides rows and pages.
    size: the number of tokens per page.
    prompt_pages: the number of pages that the longest prompt needs.
    row_pages: the number of pages that the longest prompt and the longest answer need together.
    unit_rows: the largest number of rows of a unit (see decode.Table).
  """

  def __init__(
    self, *, rows: int, pages: int, parts: int, size: int, prompt_pages: int, row_pages: int, unit_rows: int):
    self._each, self._size, self._prompt_pages, self._unit_rows = rows // parts, size, prompt_pages, unit_rows
    self._parts = [_Part(range(n * self._each, (n + 1) * self._each), pages // parts) for n in range(parts)]
    self._table = Table(np.zeros((rows, row_pages), np.int32), np.zeros(rows, np.int32), None, None)
    self.running: dict[int, Running] = {}  # by row, in the order in which they started

  def unfinished(self, tokens: int) -> bool:
    """Returns True if some running sample may need more than `tokens` tokens beyond those that the host has read."""
    return any(sample.count + tokens < sample.limit for sample in self.running.values())

  def grow(self, tokens: int) -> list[Running]:
    """Gives running samples the pages for their next tokens, the oldest sample first. Returns the samples that it
    stopped.

    If a part of the mesh has too few free pages, the sample of this part that started last is stopped.

    tokens: the number of tokens that a sample needs room for, besides those that the host has already read.
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
    """Starts samples from the queue while there are free rows and pages.

    Each part of the mesh first starts samples whose prompts it already holds. After a sample has started, its part must
    still have one free page for every running sample that may need more pages. If the last call of `grow` stopped a
    sample of a part, no sample starts in this part.

    Args:
      queue: {number of a prompt: indices of its samples that haven't started}. Samples that start are removed from the
        queue.
      length: a function (number of a prompt) -> how many tokens of the prompt are in the cache once it is prefilled.
      limit: a function (number of a prompt) -> the largest number of tokens to draw for a sample of the prompt.
      tokens: the number of new tokens for which a sample gets pages at its start; `grow` gives it more later.

    Returns:
      (samples, prefixes). samples are the started samples. prefixes has one entry per part: the prompt that must be
      prefilled before the part's started samples run, or None. A call adds at most one prompt to a part, so call this
      function again until it starts no sample.
    """
    started, prefixes = [], [None] * len(self._parts)
    for n, part in enumerate(self._parts):
      p = None
      while queue and part.rows and not part.full:
        if p not in queue or p not in part.prefixes:
          p = min((p for p in part.prefixes if p in queue), default=None)
        new = p is None
        if new:
          p = min(queue)
          if prefixes[n]:
            break
        wanted = self._count(min(limit(p), tokens)) + (self._count(length(p)) if new else 0)
        if not self._room(part, wanted + len(part.growing), queue):
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
    """Frees the row and the pages of a sample. The prompt's pages are freed later, by `start` or `grow`."""
    part = self._part(sample)
    del self.running[sample.row]
    part.growing.discard(sample)
    part.rows.append(sample.row)
    part.pages += sample.pages[::-1]
    sample.prefix.samples -= 1

  def live_rows(self, sizes: Sequence[int]) -> np.ndarray | None:
    """Returns, for each part of the mesh, some of its rows, among them all rows that running samples use.

    sizes: in descending order, the numbers of rows to choose from, the first of them all rows of a part. The smallest
      one that is large enough for every part is taken.

    Returns int32 [parts, rows], in which a part's rows are numbered from 0, or None if all rows are needed.
    """
    used = max(self._each - len(part.rows) for part in self._parts)
    size = min(n for n in sizes if n >= used)
    if size == self._each:
      return None
    running_CE = np.zeros((len(self._parts), self._each), bool)
    running_CE.reshape(-1)[list(self.running)] = True
    return np.argsort(~running_CE, 1, kind='stable')[:, :size].astype(np.int32)

  def table(self, rows_CB: np.ndarray | None = None) -> Table:
    """Returns the table of the running samples, as a copy that later calls of other methods don't change.

    rows_CB: the rows that the table has, from `live_rows`. None means all rows.
    """
    row_B = self._numbers(rows_CB)
    size, members = len(row_B) // len(self._parts), self._unit_rows
    place = (self.columns(rows_CB) % size).tolist()
    rows_UM, count_U = np.zeros((len(row_B), members), np.int32), np.zeros(len(row_B), np.int32)
    together = collections.defaultdict(list)
    for sample in self.running.values():
      together[sample.row // self._each, sample.prompt].append(place[sample.row])
    used = [n * size for n in range(len(self._parts))]
    for (n, _), rows in together.items():
      for first in range(0, len(rows), members):
        unit = rows[first : first + members]
        rows_UM[used[n]] = unit + unit[:1] * (members - len(unit))
        count_U[used[n]] = len(unit)
        used[n] += 1
    return Table(self._table.pages_BJ[row_B], self._table.prefix_B[row_B], rows_UM, count_U)

  def columns(self, rows_CB: np.ndarray | None) -> np.ndarray:
    """Returns, for each row (numbered as in `Running.row`), its index among all rows of rows_CB. It is 0 for a row that
    isn't one of them.

    rows_CB: from `live_rows`.
    """
    row_B, column_R = self._numbers(rows_CB), np.zeros(len(self._parts) * self._each, int)
    column_R[row_B] = np.arange(len(row_B))
    return column_R

  def _numbers(self, rows_CB: np.ndarray | None) -> np.ndarray:
    if rows_CB is None:
      return np.arange(len(self._parts) * self._each)
    return (rows_CB + self._each * np.arange(len(self._parts))[:, None]).reshape(-1)

  def filled(self, prefixes: list[Prefix | None], out_of_range: int) -> np.ndarray:
    """Returns the pages into which prompts are to be written, int32 [parts, prompt_pages].

    Args:
      prefixes: for each part of the mesh, the Prefix of the prompt to write, or None.
      out_of_range: the number to use where there is no page to write.
    """
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
    (part.growing.add if len(sample.pages) < self._count(sample.limit) else part.growing.discard)(sample)
    return True

  def _room(self, part: _Part, pages: int, queue) -> bool:
    """Returns True if `part` has at least `pages` free pages, after freeing the pages of unused prompts.

    A prompt is unused if no running sample has it. If samples of an unused prompt are in the queue, its pages are freed
    only while there are fewer than `pages` free pages.

    queue: as in `start`.
    """
    for prefix in list(part.prefixes.values()):
      if not prefix.samples and (prefix.prompt not in queue or len(part.pages) < pages):
        part.pages += part.prefixes.pop(prefix.prompt).pages[::-1]
    return len(part.pages) >= pages
