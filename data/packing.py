"""Decides which parts of which documents make up a row, as a pure function of (seed, source, number of the row).

A document of n tokens has n-1 (input, target) pairs, and a row holds T pairs. The documents of an epoch, in a shuffled
order, form one sequence of pairs. The sequence is divided into windows of R * T pairs, which fill R rows. Within a
window, a document is placed whole if a row has room for it (best fit, longest first). The few documents that don't fit
into any row are cut to fill the remaining space. Every pair therefore occurs exactly once per epoch. All rows are full
except in the last window of the epoch, where fewer than T positions are empty. The number of rows is known before any
row is planned.

To find the documents of a window, the lengths of all documents before the window must be summed. This takes about 25 ns
per document, so it is fast at the beginning of an epoch.
"""

import bisect
import functools
import hashlib
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_WINDOW_PAIRS = 2**18  # with larger windows, fewer documents are cut, but the first row takes longer
_FEWEST_ROWS = 64
_CHUNK = 8192  # the position in the sequence of pairs is stored for every 8192nd document
_CHUNKS_AT_ONCE = 8  # so many chunks are summed at once: 64k documents fit into a processor's cache


def permute(index_N: np.ndarray, size: int, key: str) -> np.ndarray:
  """Shuffles range(size), and returns the new positions of the N indices `index_N`: int64 [N].

  The shuffle is a bijection that depends on `key`. It applies invertible arithmetic to numbers with as many bits as
  `size` has, and repeats the arithmetic until the result is below `size`. NumPy's shuffles would need an array of
  length `size`. This shuffle doesn't depend on the version of NumPy, so a run can be resumed with another version.
  """
  if size <= 1:
    return np.zeros(len(index_N), np.int64)
  bits = max(3, (size - 1).bit_length())
  # The low b bits of a sum or product depend only on those of its operands, so 32 bits are enough for most sets.
  dtype = np.uint32 if bits <= 32 else np.uint64
  digest = hashlib.shake_128(key.encode()).digest(8 * 12)
  keys = np.frombuffer(digest, '<u8') & np.uint64(2**bits - 1)
  add, multiply = keys[::2].astype(dtype), (keys[1::2] | np.uint64(1)).astype(dtype)
  mask, shift = dtype(2**bits - 1), dtype((bits + 1) // 2)

  def scramble(x):
    for a, m in zip(add, multiply):
      x += a
      x *= m
      x &= mask
      x ^= x >> shift
    return x

  x = scramble(np.asarray(index_N).astype(dtype))
  while (out := np.flatnonzero(x >= size)).size:
    x[out] = scramble(x[out])
  return x.astype(np.int64)


class Pieces(NamedTuple):
  """N pieces, for example those of a row, as arrays int64 [N]. A piece is a document or a part of it, counted in
  (input, target) pairs.
  """

  document: np.ndarray
  start: np.ndarray  # the index of the first pair in the document
  length: np.ndarray  # the number of pairs


class Packer:
  """Computes the rows of one split of one source. Thread-safe.

  Attributes:
    rows_per_epoch: the number of rows in an epoch.
    efficiency: the share of an epoch's positions that hold an (input, target) pair; the others are padding.
  """

  def __init__(self, lengths_N: np.ndarray, row_length: int, key: str, *, shuffle: bool = True):
    """Computes the number of rows of an epoch, without planning any row.

    Args:
      lengths_N: the number of tokens of each of the N documents, including BOS and EOS.
      row_length: T, the number of (input token, target token) pairs in a row.
      key: decides the order of the shuffle. In training, it consists of the seed and the source's name.
      shuffle: False keeps the documents in order.
    """
    self._lengths_N = np.asarray(lengths_N)  # there may be 10^9 documents, so no copy is made
    self._T, self._key, self._shuffle = row_length, key, shuffle
    self._R = max(_FEWEST_ROWS, _WINDOW_PAIRS // row_length)
    self._total = int(self._lengths_N.sum(dtype=np.int64)) - len(self._lengths_N)
    self.rows_per_epoch = -(-self._total // row_length)
    self.efficiency = self._total / (self.rows_per_epoch * row_length)
    self._lock = threading.Lock()  # makes sure that only one thread plans a window
    self._line = functools.lru_cache(maxsize=2)(lambda epoch: _Line(functools.partial(self._sums, epoch)))
    self._window = functools.lru_cache(maxsize=4)(self._window)

  def row(self, index: int) -> Pieces:
    """Returns the pieces of row number `index` >= 0. The row belongs to epoch index // rows_per_epoch."""
    epoch, row = divmod(index, self.rows_per_epoch)
    window, row = divmod(row, self._R)
    with self._lock:
      pieces, bounds = self._window(epoch, window)
    return Pieces(*(field[bounds[row]:bounds[row + 1]] for field in pieces))

  def cut_share(self, windows: int = 4) -> float:
    """Returns the share of documents that are split over rows, estimated from the beginning of the first epoch.

    windows: the number of windows to use. A window is a group of rows that are packed together.
    """
    windows = min(windows, -(-self.rows_per_epoch // self._R))
    pieces = [self._window(0, w)[0] for w in range(windows)]
    document = np.concatenate([p.document for p in pieces])
    length = np.concatenate([p.length for p in pieces])
    return len(np.unique(document[length < self._pairs(document)])) / len(np.unique(document))

  def _pairs(self, document_N: np.ndarray) -> np.ndarray:
    return self._lengths_N.take(document_N).astype(np.int64) - 1

  def _order(self, epoch: int, start: int, stop: int) -> np.ndarray:
    index = np.arange(start, min(stop, len(self._lengths_N)))
    return permute(index, len(self._lengths_N), f'{self._key}/{epoch}') if self._shuffle else index

  def _sums(self, epoch: int, chunk: int) -> np.ndarray:
    """Returns the number of pairs in each of _CHUNKS_AT_ONCE chunks, int64. The first one is chunk number `chunk`.

    A chunk is _CHUNK documents that are adjacent in the epoch's order. Near the end of the epoch there are fewer
    chunks.
    """
    pairs = self._pairs(self._order(epoch, chunk * _CHUNK, (chunk + _CHUNKS_AT_ONCE) * _CHUNK))
    return np.add.reduceat(pairs, np.arange(0, len(pairs), _CHUNK))

  def _slice(self, epoch: int, window: int) -> Pieces:
    """Returns the pieces of a window, in the epoch's order. They aren't placed in rows yet.

    An epoch's sequence of (input, target) pairs is divided into windows. A piece is a whole document, or the part of it
    in the window.
    """
    low = window * self._R * self._T
    high = min(low + self._R * self._T, self._total)
    starts = self._line(epoch).up_to(high)
    first_chunk = int(np.searchsorted(starts, low, 'right')) - 1
    last_chunk = int(np.searchsorted(starts, high, 'left'))
    document = self._order(epoch, first_chunk * _CHUNK, last_chunk * _CHUNK)
    ends = starts[first_chunk] + np.cumsum(self._pairs(document))
    inside = slice(np.searchsorted(ends, low, 'right'), np.searchsorted(ends, high, 'left') + 1)
    document, ends = document[inside], ends[inside]
    begins = ends - self._pairs(document)
    start = np.maximum(low - begins, 0)
    return Pieces(document, start, np.minimum(high, ends) - begins - start)

  def _window(self, epoch: int, window: int) -> tuple[Pieces, np.ndarray]:
    """Returns (the pieces of a window, sorted by row; bounds, int64 [number of rows + 1]).

    A window is a group of rows that are packed together. Its row r has pieces bounds[r] to bounds[r + 1] - 1.
    """
    pieces = _cut_to(self._slice(epoch, window), self._T)
    rows = -(-int(pieces.length.sum()) // self._T)
    row, pieces = _place(pieces, rows, self._T)
    # Best fit leaves rows in an order that depends on their content. A shuffle makes each batch a fair sample.
    row = permute(np.arange(rows), rows, f'{self._key}/{epoch}/{window}')[row]
    order = np.argsort(row, kind='stable')
    bounds = np.searchsorted(row[order], np.arange(rows + 1))
    return Pieces(*(field[order] for field in pieces)), bounds


class _Line:
  """Computes where documents begin in an epoch's sequence of (input, target) pairs, for every _CHUNKth document."""

  def __init__(self, sums: Callable[[int], np.ndarray]):
    self._sums, self._starts, self._known = sums, np.zeros(1024, np.int64), 0  # the first start is 0

  def up_to(self, position: int) -> np.ndarray:
    """Returns the positions where documents 0, _CHUNK, 2 * _CHUNK and so on begin, int64.

    Returns all positions that are known. If `position` is after the last one, first computes more of them.
    """
    while self._starts[self._known] < position:
      sums = self._sums(self._known)
      if self._known + len(sums) >= len(self._starts):
        self._starts = np.concatenate([self._starts, np.zeros_like(self._starts)])
      self._starts[self._known + 1:self._known + 1 + len(sums)] = self._starts[self._known] + np.cumsum(sums)
      self._known += len(sums)
    return self._starts[:self._known + 1]


def _cut_to(pieces: Pieces, row_length: int) -> Pieces:
  """Cuts each piece that is longer than a row into pieces of a row's length and a remainder. Returns all pieces."""
  count = -(-pieces.length // row_length)
  which = np.repeat(np.arange(len(count)), count)
  offset = (np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)) * row_length
  return Pieces(pieces.document[which], pieces.start[which] + offset,
                np.minimum(pieces.length[which] - offset, row_length))


def _place(pieces: Pieces, rows: int, row_length: int) -> tuple[np.ndarray, Pieces]:
  """Assigns a row to each piece. The longest piece comes first, and goes to the fullest row that has room for it.

  Pieces that fit into no row are cut to fill the rows with the most free space.

  The pieces must have at most rows * row_length pairs in all, and at most row_length pairs each.

  Returns (row of each piece, the pieces after cutting).
  """
  holes = [(row_length, row) for row in range(rows)]  # always sorted
  placed, unplaced = [], []  # (row, piece, offset in it, length)
  length = pieces.length.tolist()
  for piece in np.argsort(-pieces.length, kind='stable').tolist():
    at = bisect.bisect_left(holes, (length[piece], 0))
    if at == len(holes):
      unplaced.append(piece)
      continue
    hole, row = holes.pop(at)
    placed.append((row, piece, 0, length[piece]))
    if hole > length[piece]:
      bisect.insort(holes, (hole - length[piece], row))
  for piece in unplaced:
    offset = 0
    while offset < length[piece]:
      hole, row = holes.pop()
      size = min(hole, length[piece] - offset)
      placed.append((row, piece, offset, size))
      offset += size
      if hole > size:
        bisect.insort(holes, (hole - size, row))
  row, piece, offset, size = np.array(placed, np.int64).T
  return row, Pieces(pieces.document[piece], pieces.start[piece] + offset, size)
