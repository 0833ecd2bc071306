"""Tokenises one unit of a source into staged shards and a marker; see data/prepare.py."""

import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any

import numpy as np
from etils import epath

from betarank.data import prepared, records, sources
from betarank.data.config import DataConfig
from betarank.data.tokenizer import read_tokenizer


def write_whole(path: epath.Path, content: bytes) -> None:
  """Writes the file so that, whenever we are killed, it is whole or absent."""
  temporary = path.parent / f'{path.name}.{os.getpid()}'
  temporary.write_bytes(content)
  temporary.replace(path)


@dataclasses.dataclass(frozen=True)
class Job:
  """What every unit needs; a worker process gets it once."""

  name: str
  config: DataConfig
  folder: str

  def marker(self, index: int) -> epath.Path:
    return epath.Path(self.folder) / f'unit-{index:05d}.json'

  def stage(self, index: int, split: str) -> epath.Path:
    return epath.Path(self.folder) / f'{split}-{index:05d}.array_record'


class Worker:
  """The source and the tokenizer, opened once for all units that a process works on."""

  def __init__(self, job: Job):
    self.job = job
    self.source = sources.open_source(job.config, job.name)
    self.tokenizer = read_tokenizer(job.config.tokenizer_path)

  def run(self, index: int, unit: sources.Unit, limit: int) -> dict[str, Any]:
    """Writes the unit's first `limit` (0: all) documents, then its marker, which it returns."""
    splits = {split: _Shard(self.job.stage(index, split)) for split in prepared.SPLITS}
    count = 0
    for document in self.source.read(unit):
      if limit and count == limit:
        break
      count += 1
      # Before cutting, so that a long document's parts, and its duplicates, stay on one side.
      split = _split(document, self.job.config.validation_fraction)
      for piece in sources.cut(document, self.job.config.document_bytes):
        splits[split].add(self._tokens(piece), len(piece.encode()))
    marker = {'index': index, 'limit': limit, 'documents': count,
              'splits': {split: shard.close() for split, shard in splits.items()}}
    write_whole(self.job.marker(index), json.dumps(marker).encode())
    return marker

  def _tokens(self, text: str) -> np.ndarray:
    ids = np.concatenate([[self.tokenizer.bos], self.tokenizer.encode(text), [self.tokenizer.eos]])
    return ids.astype(records.token_dtype(self.job.config.vocab_size))


def _split(document: str, validation_fraction: float) -> str:
  digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
  return 'validation' if int.from_bytes(digest) < validation_fraction * 2**64 else 'train'


class _Shard:
  """One unit's part of one split, on its way to `path`; there is no file without documents."""

  def __init__(self, path: epath.Path):
    self.path, self.writer = path, None
    self.lengths, self.tokens, self.bytes, self.hash = [], 0, 0, hashlib.sha256()

  def add(self, tokens: np.ndarray, text_bytes: int) -> None:
    if self.writer is None:
      from array_record.python import array_record_module

      # ArrayRecord writes to disks only; a bucket gets the finished file.
      parent = tempfile.gettempdir() if '://' in str(self.path) else self.path.parent
      self.temporary = pathlib.Path(parent) / f'{self.path.name}.{os.getpid()}'
      # A group is read as a whole, and training reads single documents.
      self.writer = array_record_module.ArrayRecordWriter(str(self.temporary), 'group_size:1,uncompressed')
    record = records.to_record(tokens)
    self.writer.write(record)
    self.hash.update(records.without_checksum(record))
    self.lengths.append(len(tokens))
    self.tokens, self.bytes = self.tokens + len(tokens), self.bytes + text_bytes

  def close(self) -> dict[str, Any]:
    size = 0
    if self.writer is not None:
      self.writer.close()
      size = self.temporary.stat().st_size
      if '://' in str(self.path):
        epath.Path(self.temporary).copy(self.path, overwrite=True)
        self.temporary.unlink()
      else:
        self.temporary.replace(self.path)
      with self.path.with_suffix('.npy').open('wb') as file:
        np.save(file, np.array(self.lengths, np.uint32))
    return {'documents': len(self.lengths), 'tokens': self.tokens, 'bytes': self.bytes, 'size': size,
            'sha256': self.hash.hexdigest()}
