"""Which pieces of which documents make up row i, as a pure function of (seed, source, i).

A document of n tokens is n-1 (input, target) pairs; a row holds T of them. An epoch's documents, in a
shuffled order, form one line of pairs that is divided into windows of R rows, R * T pairs each. Within its
window a document is kept whole if it fits (best fit, longest first); the few that fit nowhere are cut up to
fill the holes. So every pair occurs exactly once an epoch, every row but the epoch's last is full, the number
of rows is known without planning any, and row i costs one window's planning however far away it is.
"""

import bisect
import functools
import hashlib
import threading
from typing import NamedTuple

import numpy as np

_WINDOW_PAIRS = 2**18  # more cuts fewer documents and takes longer to reach the first row
_FEWEST_ROWS = 64
_CHUNK = 8192  # documents between two remembered positions on the line of pairs


def permute(index_N: np.ndarray, size: int, key: str) -> np.ndarray:
  """Where a shuffle of range(size) puts `index_N` (int64): a bijection for each key, in O(1) memory.

  Rounds of invertible arithmetic on b-bit numbers, repeated while the result is not below `size`. Unlike
  NumPy's shuffles it needs no array of that size and is the same in all versions, as a resumed run needs it.
  """
  if size <= 1:
    return np.zeros_like(index_N)
  bits = max(3, (size - 1).bit_length())
  mask, shift = np.uint64(2**bits - 1), np.uint64((bits + 1) // 2)
  digest = hashlib.shake_128(key.encode()).digest(8 * 12)
  keys = np.frombuffer(digest, '<u8')

  def scramble(x):
    for add, multiply in zip(keys[::2], keys[1::2] | np.uint64(1)):
      x = ((x + add) * multiply) & mask
      x ^= x >> shift
    return x

  x = scramble(np.asarray(index_N).astype(np.uint64))
  while (out := x >= size).any():
    x[out] = scramble(x[out])
  return x.astype(np.int64)


class Pieces(NamedTuple):
  """Runs of pairs, one an entry: int64 [N] each."""

  document: np.ndarray
  start: np.ndarray  # first pair within the document
  length: np.ndarray  # pairs


class Packer:
  """Rows of one split of one source. Thread-safe.

  Attributes: rows_per_epoch, and efficiency: the share of an epoch's places that hold a pair.
  """

  def __init__(self, lengths_N: np.ndarray, row_length: int, key: str, *, shuffle: bool = True):
    """Args: lengths_N in tokens, BOS and EOS included; row_length T in pairs; key: seed and source."""
    self._pairs_N = np.asarray(lengths_N, np.int32) - 1  # there may be 10^9
    self._T, self._key, self._shuffle = row_length, key, shuffle
    self._R = max(_FEWEST_ROWS, _WINDOW_PAIRS // row_length)
    self._total = int(self._pairs_N.sum(dtype=np.int64))
    self.rows_per_epoch = -(-self._total // row_length)
    self.efficiency = self._total / (self.rows_per_epoch * row_length)
    self._lock = threading.Lock()  # so that threads that need one window don't all plan it
    self._chunk_starts = functools.lru_cache(maxsize=2)(self._chunk_starts)
    self._window = functools.lru_cache(maxsize=4)(self._window)

  def row(self, index: int) -> Pieces:
    """The pieces of row `index` >= 0; epoch = index // rows_per_epoch."""
    epoch, row = divmod(index, self.rows_per_epoch)
    window, row = divmod(row, self._R)
    with self._lock:
      pieces, bounds = self._window(epoch, window)
    return Pieces(*(field[bounds[row]:bounds[row + 1]] for field in pieces))

  def cut_share(self, windows: int = 4) -> float:
    """The share of documents that are not whole in one row, from the first epoch's first windows."""
    windows = min(windows, -(-self.rows_per_epoch // self._R))
    pieces = [self._window(0, w)[0] for w in range(windows)]
    document = np.concatenate([p.document for p in pieces])
    length = np.concatenate([p.length for p in pieces])
    return len(np.unique(document[length < self._pairs_N[document]])) / len(np.unique(document))

  def _order(self, epoch: int, start: int, stop: int) -> np.ndarray:
    index = np.arange(start, min(stop, len(self._pairs_N)))
    return permute(index, len(self._pairs_N), f'{self._key}/{epoch}') if self._shuffle else index

  def _chunk_starts(self, epoch: int) -> np.ndarray:
    """The position on the epoch's line of pairs of every _CHUNKth document."""
    sums = [self._pairs_N[self._order(epoch, start, start + _CHUNK)].sum(dtype=np.int64)
            for start in range(0, len(self._pairs_N), _CHUNK)]
    return np.concatenate([[0], np.cumsum(sums)])

  def _slice(self, epoch: int, window: int) -> Pieces:
    """What lies between the window's ends on the line of pairs."""
    low = window * self._R * self._T
    high = min(low + self._R * self._T, self._total)
    starts = self._chunk_starts(epoch)
    first_chunk = int(np.searchsorted(starts, low, 'right')) - 1
    last_chunk = int(np.searchsorted(starts, high, 'left'))
    document = self._order(epoch, first_chunk * _CHUNK, last_chunk * _CHUNK)
    ends = starts[first_chunk] + np.cumsum(self._pairs_N[document], dtype=np.int64)
    inside = slice(np.searchsorted(ends, low, 'right'), np.searchsorted(ends, high, 'left') + 1)
    document, ends = document[inside], ends[inside]
    begins = ends - self._pairs_N[document]
    start = np.maximum(low - begins, 0)
    return Pieces(document, start, np.minimum(high, ends) - begins - start)

  def _window(self, epoch: int, window: int) -> tuple[Pieces, np.ndarray]:
    """The window's pieces sorted by row, and where each row's begin."""
    pieces = _cut_to(self._slice(epoch, window), self._T)
    rows = -(-int(pieces.length.sum()) // self._T)
    row, pieces = _place(pieces, rows, self._T)
    # Best fit leaves rows ordered by what they hold, and a batch should be a fair sample.
    row = permute(np.arange(rows), rows, f'{self._key}/{epoch}/{window}')[row]
    order = np.argsort(row, kind='stable')
    bounds = np.searchsorted(row[order], np.arange(rows + 1))
    return Pieces(*(field[order] for field in pieces)), bounds


def _cut_to(pieces: Pieces, row_length: int) -> Pieces:
  """Cuts pieces longer than a row into rows and a rest."""
  count = -(-pieces.length // row_length)
  which = np.repeat(np.arange(len(count)), count)
  offset = (np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)) * row_length
  return Pieces(pieces.document[which], pieces.start[which] + offset,
                np.minimum(pieces.length[which] - offset, row_length))


def _place(pieces: Pieces, rows: int, row_length: int) -> tuple[np.ndarray, Pieces]:
  """A row for each piece: best fit, longest first; those that fit nowhere are cut into the largest holes.

  The pieces' pairs must be at most rows * row_length, and each at most row_length.
  """
  holes = [(row_length, row) for row in range(rows)]  # always sorted
  placed, homeless = [], []  # (row, piece, offset in it, length)
  length = pieces.length.tolist()
  for piece in np.argsort(-pieces.length, kind='stable').tolist():
    at = bisect.bisect_left(holes, (length[piece], 0))
    if at == len(holes):
      homeless.append(piece)
      continue
    hole, row = holes.pop(at)
    placed.append((row, piece, 0, length[piece]))
    if hole > length[piece]:
      bisect.insort(holes, (hole - length[piece], row))
  for piece in homeless:
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
