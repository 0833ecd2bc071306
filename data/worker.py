"""Tokenizes one unit of a source, and writes it as shards; see data/prepare.py.

A unit is written in pieces of PIECE_BYTES of text. A piece consists of one shard for each split, and a marker. The
marker is a JSON file with counts and hashes, and is written last. Where a piece ends depends only on the input. A unit
that was interrupted therefore resumes after its last complete piece, and its files are the same as without the
interruption.
"""

import array
import collections
import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from betarank.configs.files import flush, write_atomically
from betarank.data import prepared, records, sources
from betarank.data.config import DataConfig, DataError
from betarank.data.fields import Dialogue
from betarank.data.storage import is_remote
from betarank.data.tokenizer import read_tokenizer

PIECE_BYTES = 128 * 2**20  # bytes of text. A restart loses at most one piece: one to three minutes of one core.
REPORT_BYTES = 2**20  # bytes of text between two reports of progress

Marker = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
  """The settings that are the same for all units of a source. Each worker process gets them once, when it starts.

  Attributes:
    name: the source.
    config: the settings of the data.
    folder: where shards, and the markers that describe them, are written.
    share: if True, the end of each text goes to the validation split, and the rest of it to training. Dialogues can't
      be divided, so a few whole dialogues go to validation. If False, every document goes to one split as a whole.
  """

  name: str
  config: DataConfig
  folder: str
  share: bool = False

  def marker(self, unit: int, piece: int) -> epath.Path:
    return epath.Path(self.folder) / f'unit-{unit:05d}-{piece:03d}.json'

  def stage(self, unit: int, piece: int, split: str) -> epath.Path:
    return epath.Path(self.folder) / f'{split}-{unit:05d}-{piece:03d}.array_record'


class Worker:
  """Tokenizes units. The source and the tokenizer are opened once, for all units that a process tokenizes."""

  def __init__(self, job: Job):
    self.job = job
    self.source = sources.open_source(job.config, job.name)
    self.tokenizer = read_tokenizer(job.config.tokenizer_path)
    self.form = records.Form(records.token_dtype(job.config.vocab_size), sources.masked(self.source.config))

  def run(self, index: int, unit: sources.Unit, limit: int, done: list[Marker] | None = None,
          report: Callable[[int], None] = lambda _: None) -> Iterator[Marker]:
    """Writes those pieces of a unit that don't exist yet. Yields the marker of each new piece, once it is written.

    A piece has up to about PIECE_BYTES of text. Its marker is the JSON file that describes it.

    Args:
      index: the number of the unit.
      unit: the segments of the unit.
      limit: the largest number of documents to write in this call; 0 means no limit.
      done: the markers of the unit's pieces that exist already.
      report: called with the number of bytes of text that were tokenized since the previous call.
    """
    done = done or []
    bad = sources.BadRows(self.source.config.max_bad_rows)
    documents = self.source.read(unit, bad)
    skipped = sum(marker['documents'] for marker in done)
    collections.deque(zip(range(skipped), documents), maxlen=0)
    bad.count = sum(marker['bad_rows'] for marker in done)  # bad rows in these pieces were counted before
    ended, written = False, 0
    while not ended:
      piece, before = _Piece(self, index, len(done)), bad.count
      while piece.text_bytes < PIECE_BYTES and not (limit and written == limit):
        document = next(documents, None)
        if document is None:
          ended = True
          break
        piece.add(document, report)
        written += 1
      ended = ended or bool(limit and written == limit)
      marker = piece.close(bad_rows=bad.count - before, last_bad=bad.last, last=ended)
      done = [*done, marker]
      yield marker


class _Piece:
  """Writes one piece of a unit: a shard for each split, and a marker, which is a JSON file with counts and hashes."""

  def __init__(self, worker: Worker, unit: int, piece: int):
    self._worker, self._at = worker, (unit, piece)
    self._shards = {split: ShardWriter(worker.job.stage(unit, piece, split), worker.form) for split in prepared.SPLITS}
    self._documents = self._unreported = self.text_bytes = 0

  def add(self, document: sources.Document, report: Callable[[int], None]) -> None:
    config = self._worker.job.config
    self._documents += 1
    # The split is chosen before cutting, so that all parts of a long document, and its duplicates, are in one split.
    for split, part in self._divide(document).items():
      for cut in sources.cut(part, config.longest_document):
        size = len(sources.text_of(cut).encode())
        self._shards[split].add(*_tokens(self._worker, cut), size)
        self.text_bytes, self._unreported = self.text_bytes + size, self._unreported + size
    if self._unreported >= REPORT_BYTES:
      report(self._unreported)
      self._unreported = 0

  def _divide(self, document: sources.Document) -> dict[str, sources.Document]:
    fraction = self._worker.job.config.validation_fraction
    if not self._worker.job.share:
      text = sources.text_of(document)
      digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
      return {'validation' if int.from_bytes(digest) < fraction * 2**64 else 'train': document}
    if isinstance(document, Dialogue):  # can't be divided, so one dialogue of every 1 / fraction goes to validation
      return {'validation' if (self._documents - 1) % max(2, round(1 / fraction)) == 0 else 'train': document}
    return _share(document, fraction)

  def close(self, **about: Any) -> Marker:
    unit, piece = self._at
    marker = {'unit': unit, 'piece': piece, 'documents': self._documents, **about,
              'splits': {split: shard.close() for split, shard in self._shards.items()}}
    write_atomically(self._worker.job.marker(unit, piece), json.dumps(marker).encode())
    return marker


def _share(text: str, fraction: float) -> dict[str, str]:
  """Splits a text in two: {'train': its beginning, 'validation': its last `fraction`}. Splits after a line or a word if
  possible.
  """
  tail = max(1, round(fraction * len(text)))
  cut = max(1, len(text) - tail)
  near = text[max(0, cut - tail):cut]
  cut -= len(near) - 1 - max(near.rfind('\n'), near.rfind(' ')) if any(c in near for c in '\n ') else 0
  return {split: part for split, part in (('train', text[:cut]), ('validation', text[cut:])) if part}


def _tokens(worker: Worker, document: sources.Document) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns (token ids, mask) of a document, with BOS and EOS.

  The mask is bool, True for the tokens that count as targets. It is None if the source isn't masked.
  """
  tokenizer = worker.tokenizer
  parts = document.parts if isinstance(document, Dialogue) else ((document, True),)
  ids = [tokenizer.encode(text) for text, _ in parts]
  tokens = np.concatenate([[tokenizer.bos], *ids, [tokenizer.eos]], dtype=worker.form.dtype, casting='unsafe')
  if not worker.form.masked:
    return tokens, None
  counts = [trained for _, trained in parts]
  return tokens, np.repeat([False, *counts, counts[-1]], [1, *map(len, ids), 1])


class ShardWriter:
  """Writes the documents of one split (train or validation) of a piece to the shard `path`.

  If the split has no documents, no file is written. ArrayRecord can write only to local files. A shard for a bucket is
  therefore first written to a file in memory, and uploaded when it is complete. It has at most about PIECE_BYTES of
  text. So no disk is needed, and a killed process leaves no incomplete shard in the bucket.
  """

  def __init__(self, path: epath.Path, form: records.Form):
    self.path, self.form, self.writer = path, form, None
    self.lengths, self.tokens, self.bytes, self.hash = array.array('I'), 0, 0, hashlib.sha256()

  def add(self, tokens: np.ndarray, mask: np.ndarray | None, text_bytes: int) -> None:
    if self.writer is None:
      from array_record.python import array_record_module

      if is_remote(self.path):
        self.file = open(os.memfd_create(self.path.name), 'rb')  # noqa: SIM115 (closed by `close`)
        self.temporary = f'/proc/self/fd/{self.file.fileno()}'
      else:
        self.temporary = f'{self.path}.{os.getpid()}'
      # A group can only be read as a whole, but training reads single documents, so a group has one document.
      self.writer = array_record_module.ArrayRecordWriter(self.temporary, 'group_size:1,uncompressed')
    record = records.to_record(tokens, mask)
    self.writer.write(record)
    self.hash.update(records.without_checksum(record))
    self.lengths.append(len(tokens))
    self.tokens, self.bytes = self.tokens + len(tokens), self.bytes + text_bytes

  def close(self) -> dict[str, Any]:
    size = 0
    if self.writer is not None:
      self.writer.close()
      lengths_N = np.frombuffer(self.lengths, np.uint32)
      with open(self.temporary, 'rb') as file:
        self._check_layout(file, lengths_N)
        size = os.fstat(file.fileno()).st_size
        if is_remote(self.path):
          file.seek(0)
          with self.path.open('wb') as out:
            shutil.copyfileobj(file, out, 2**23)
          self.file.close()
        else:
          flush(self.temporary)  # the marker says that the shard is complete, also after a power failure
          os.replace(self.temporary, self.path)
      lengths = io.BytesIO()
      np.save(lengths, lengths_N)
      write_atomically(self.path.with_suffix('.npy'), lengths.getvalue())
    return {'documents': len(self.lengths), 'tokens': self.tokens, 'bytes': self.bytes, 'size': size,
            'longest': max(self.lengths, default=0), 'sha256': self.hash.hexdigest()}

  def _check_layout(self, file, lengths_N: np.ndarray) -> None:
    """Raises DataError if ArrayRecord didn't write the last record where data/records.py will look for it."""
    last = len(lengths_N) - 1
    _, [begin], [end] = records.Places(lengths_N, [0, len(lengths_N)], self.form).of(np.array([last]))
    raw = os.pread(file.fileno(), int(end - begin), int(begin))
    try:
      records.from_record(records.record_in(raw, int(begin)), int(lengths_N[last]), self.form)
    except ValueError as error:
      raise DataError(f'{self.path}: this version of array_record writes another layout than expected ({error}); '
                      'install array-record==0.8.6') from None
