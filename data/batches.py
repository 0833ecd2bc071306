"""Makes packed batches for training and validation.

    batches = TrainBatches(config, batch_size=64, seed=0, process_index=p, process_count=P)
    batch = next(batches)          # this process's rows of the global batch
    save(batches.cursor)           # TrainBatches(..., cursor=cursor) continues with the next batch

The global batch of a step depends only on the config, the batch size and the seed, not on the number of processes. The
batch of any step can be computed without computing the batches before it.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from betarank.data.config import DataConfig, DataError
from betarank.data.mixture import Schedule
from betarank.data.packing import Packer, Pieces
from betarank.data.prepared import Documents

_ENDLESS = 2**62
_CURSOR_VERSION = 1  # increase it if packing or mixing changes, because old cursors would then select other rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """B rows of T tokens each. A row consists of pieces: documents, or parts of documents."""

  tokens_BT: Any  # int32 [B, T]: inputs
  targets_BT: Any  # int32 [B, T]: the token after each input
  positions_BT: Any  # int32 [B, T]: start at 0 in each piece
  segments_BT: Any  # int32 [B, T]: number of the piece in its row, from 1; 0 is padding. Attention stays in a piece.
  counts_BT: Any = None  # bool [B, T]: whether the loss counts the target, as in an answer; None: it counts all

  @property
  def counted_BT(self) -> Any:
    """bool [B, T]: True for the targets that count in the loss and in all metrics. Padding never counts."""
    real_BT = self.segments_BT > 0
    return real_BT if self.counts_BT is None else real_BT & self.counts_BT


@dataclasses.dataclass(frozen=True)
class PackingStats:
  """Statistics of how the training split of a source is packed into rows."""

  documents: int
  rows_per_epoch: int
  efficiency: float  # the share of an epoch's positions that hold a token
  cut_documents: float  # the share of documents that are split over rows, estimated from the first rows


def _fill(rows: Sequence[tuple[Documents, Pieces] | None], row_length: int, masked: bool) -> Batch:
  """Reads the pieces of each row from prepared data, and returns the rows as a batch.

  rows: for each row, (the documents of its source, its pieces). None stands for a row of padding.
  row_length: the number of tokens in a row.
  masked: whether the batch gets the array counts_BT. The value must be the same for all batches of a run, in all
    processes, because it decides which program is compiled.
  """
  shape = (len(rows), row_length)
  tokens, targets, positions, segments = (np.zeros(shape, np.int32) for _ in range(4))
  counts = np.zeros(shape, bool) if masked else None
  mine: dict[int, tuple[Documents, list[tuple[int, Pieces]]]] = {}
  for r, row in enumerate(rows):
    if row:
      mine.setdefault(id(row[0]), (row[0], []))[1].append((r, row[1]))
  # Requests are sent to all sources before waiting for the first reply.
  waits = [documents.request(np.concatenate([pieces.document for _, pieces in places]))
           for documents, places in mine.values()]
  for wait, (_, places) in zip(waits, mine.values()):
    read = iter(wait())
    for r, pieces in places:
      at = 0
      for number, (start, length) in enumerate(zip(pieces.start.tolist(), pieces.length.tolist()), 1):
        document, place, next_ones = next(read), slice(at, at + length), slice(start + 1, start + length + 1)
        tokens[r, place] = document.tokens[start:start + length]
        targets[r, place] = document.tokens[next_ones]
        if masked:
          counts[r, place] = True if document.mask is None else document.mask[next_ones]
        positions[r, place] = np.arange(length)
        segments[r, place] = number
        at += length
  return Batch(tokens, targets, positions, segments, counts)


def _check_split(batch_size: int, process_index: int, process_count: int) -> int:
  if batch_size < 1 or batch_size % process_count:
    raise DataError('batch_size must be a positive multiple of the number of processes, '
                    f'got {batch_size} rows for {process_count}')
  if not 0 <= process_index < process_count:
    raise DataError(f'process_index must be in [0, {process_count}), got {process_index}')
  return batch_size // process_count


class _Steps:
  """An endless sequence of the batches of one process. Grain reads its items ahead, in threads.

  Item k is this process's part of global batch k. Batches are counted from 0, which is the first batch of the run or,
  if the run resumes, the first batch after the cursor.
  """

  def __init__(self, documents, packers, schedule: Schedule, origin: Mapping[str, int], first_row: int,
               batch_size: int, local: slice, row_length: int):
    self._documents, self._packers, self._schedule, self._origin = documents, packers, schedule, origin
    self._first_row, self._batch_size, self._local, self._T = first_row, batch_size, local, row_length
    self._masked = any(one.masked for one in documents.values())

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, k: int) -> Batch:
    rows = []
    start = self._first_row + k * self._batch_size
    for row in range(start + self._local.start, start + self._local.stop):
      name, draw = self._schedule.at(row)
      rows.append((self._documents[name], self._packers[name].row(self._origin[name] + draw)))
    return _fill(rows, self._T, self._masked)


class TrainBatches(Iterator[Batch]):
  """Yields training batches without end. Rows come from the sources' training splits, mixed by weight.

  When all rows of a source were used, its next epoch begins, with its documents in another order.

  Attributes:
    stats: packing statistics of each source, {source: PackingStats}.
    cursor: the position to resume from.
  """

  def __init__(self, config: DataConfig, *, batch_size: int, seed: int, process_index: int = 0,
               process_count: int = 1, cursor: Mapping[str, Any] | None = None, prefetch: int = 4):
    """Checks the config and the data, then starts to read ahead.

    Args:
      config: the settings of the data.
      batch_size: the number of rows of the global batch.
      seed: decides the order of the documents.
      process_index: the number of this process, from 0.
      process_count: the number of processes. Each process gets an equal part of the rows of every batch.
      cursor: the position to resume from; None starts at the first batch. The seed, sequence_length and the prepared
        data must be those with which the cursor was saved. The weights, the batch size and the set of sources may
        differ; each source then continues at its own position.
      prefetch: the number of batches that threads prepare ahead; 0 for none.

    Raises:
      DataError: data isn't prepared, is damaged or was prepared with other settings; the cursor doesn't fit the seed,
        sequence_length or data; or the batch can't be divided among the processes. For a damaged record, `next` raises
        the error, because records are checked when they are read.
    """
    local = _check_split(batch_size, process_index, process_count)
    weights = {name: source.weight for name, source in config.sources.items()}
    schedule = Schedule(weights)
    documents = {name: Documents(config, name, 'train') for name in schedule.names}
    packers = {name: Packer(documents[name].lengths, config.sequence_length, f'{seed}/{name}')
               for name in schedule.names}
    start = {'version': _CURSOR_VERSION, 'step': 0, 'row': 0, 'seed': seed,
             'sequence_length': config.sequence_length, 'weights': {}, 'sources': {}}
    if cursor is not None:
      _check_cursor(cursor, start, documents)
      start = {**cursor}
    consumed = {name: source['rows'] for name, source in start['sources'].items()}
    if start['weights'] != weights:
      start |= {'row': 0, 'weights': weights}
    given = schedule.counts(start['row'])
    self._start, self._schedule, self._batch_size, self._returned = start, schedule, batch_size, 0
    self._origin = {name: consumed.get(name, 0) - given[name] for name in schedule.names}
    self._fingerprints = {name: documents[name].fingerprint for name in schedule.names}
    self.stats = {
      name: PackingStats(len(documents[name]), packer.rows_per_epoch, packer.efficiency, packer.cut_share())
      for name, packer in packers.items()}
    steps = _Steps(documents, packers, schedule, self._origin, start['row'], batch_size,
                   slice(process_index * local, (process_index + 1) * local), config.sequence_length)
    import grain  # takes 0.2 s, and RL and evaluation don't need it

    # With two threads, one can wait for a disk while the other computes. More would only compete for the interpreter.
    options = grain.ReadOptions(num_threads=min(prefetch, 2), prefetch_buffer_size=prefetch)
    self._iterator = iter(grain.MapDataset.source(steps).to_iter_dataset(options))

  def __next__(self) -> Batch:
    batch = next(self._iterator)
    self._returned += 1
    return batch

  @property
  def cursor(self) -> dict[str, Any]:
    """The position of the next batch, as a JSON value. Its entry `step` is the number of batches since the start of
    training.
    """
    row = self._start['row'] + self._returned * self._batch_size
    sources = {name: {'rows': self._origin[name] + count, 'fingerprint': self._fingerprints[name]}
               for name, count in self._schedule.counts(row).items()}
    return {**self._start, 'step': self._start['step'] + self._returned, 'row': row,
            'sources': {**self._start['sources'], **sources}}

  def close(self) -> None:
    """Stops reading ahead."""
    self._iterator.close()


def _check_cursor(cursor: Mapping[str, Any], expected: Mapping[str, Any],
                  documents: Mapping[str, Documents]) -> None:
  if missing := sorted(set(expected) - set(cursor)):
    raise DataError(f'cursor: has no {", ".join(missing)}; it is not one of TrainBatches, start without it')
  for key in ('version', 'seed', 'sequence_length'):
    if cursor[key] != expected[key]:
      raise DataError(f'cursor: made with {key} {cursor[key]}, now it is {expected[key]}, so it points at '
                      f'other rows; set {key} back or start the data from the beginning')
  for name, source in cursor['sources'].items():
    if name in documents and source['fingerprint'] != documents[name].fingerprint:
      raise DataError(f'cursor: source {name!r} was prepared again with other content since; restore the '
                      'former data, give the new data another name, or start the data from the beginning')


@functools.lru_cache(maxsize=32)
def _open_validation(config: DataConfig, name: str) -> tuple[Documents, Packer]:
  # Opened once per process: a run evaluates every few hundred steps, and opening a data set checks all of its files.
  documents = Documents(config, name, 'validation')
  return documents, Packer(documents.lengths, config.sequence_length, 'validation', shuffle=False)


def validation_batches(config: DataConfig, name: str, *, batch_size: int, count: int, process_index: int = 0,
                       process_count: int = 1) -> Iterator[Batch]:
  """Yields the first `count` batches of source `name`'s validation split, or all batches if there are fewer.

  The batches are the same at each call. If the split ends within a batch, the batch is filled with rows of padding.

  Raises:
    DataError: there is no such source; its data isn't prepared, is damaged or was prepared with other settings; or the
      batch can't be divided among the processes. The call itself raises the error, before the first batch is read.
      Only a damaged record is found later, when its batch is read.
  """
  local = _check_split(batch_size, process_index, process_count)
  if name not in config.sources:
    raise DataError(f'no source {name!r}; there are {", ".join(config.sources)}')
  documents, packer = _open_validation(config, name)

  def batches():
    for k in range(min(count, -(-packer.rows_per_epoch // batch_size))):
      start = k * batch_size + process_index * local
      yield _fill([(documents, packer.row(row)) if row < packer.rows_per_epoch else None
                   for row in range(start, start + local)], config.sequence_length, documents.masked)

  return batches()
