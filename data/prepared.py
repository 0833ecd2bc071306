"""Prepared data on disk: a TFDS data set of token ids in ArrayRecord shards, its manifest, its reader.

    DIR/NAME/1.0.0/NAME-SPLIT.array_record-00000-of-00005   a record is a document: BOS, tokens, EOS
                   lengths-SPLIT.npy                 tokens of each document, so that packing needs no scan
                   manifest.json                     settings, counts, hashes, fingerprint of all; written last
                   dataset_info.json, features.json  TFDS's own

Sizes and the lengths are checked at every start, a record by ArrayRecord's own checksum whenever it is read, and all
of them by `betarank data verify`. `tfds.data_source(NAME, split=SPLIT, data_dir=DIR)` reads it as {'tokens': [N]}.
From a bucket, every machine that trains copies the split to its disk once.
"""

import bisect
import concurrent.futures
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import resource
import tempfile
import threading
import tokenize
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from betarank.data import tokenizer
from betarank.data.config import DataConfig, DataError

VERSION = '1.0.0'  # of the layout; TFDS wants it in the path
SPLITS = ('train', 'validation')
_VERIFIED_AT_ONCE = 1024  # records in memory
_COMMAND = 'betarank data prepare --config=...'


def folder(config: DataConfig, name: str) -> epath.Path:
  return epath.Path(config.dir) / name / VERSION


def shard_name(name: str, split: str, shard: int, count: int) -> str:
  return f'{name}-{split}.array_record-{shard:05d}-of-{count:05d}'


def token_dtype(vocab_size: int) -> np.dtype:
  return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')


@functools.lru_cache(maxsize=65_536)
def _header(size: int) -> bytes:
  """What precedes `size` bytes of tokens in a tf.train.Example {'tokens': bytes}; no proto library needed."""
  def varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
      out.append(n & 127 | 128)
      n >>= 7
    return bytes([*out, n])

  header, length = b'', size
  # From the inside out: bytes, BytesList, Feature with its key, map entry, Features.
  for prefix in (b'\x0a', b'\x0a', b'\x0a\x06tokens\x12', b'\x0a', b'\x0a'):
    header = prefix + varint(length) + header
    length = size + len(header)
  return header


def to_record(tokens: np.ndarray) -> bytes:
  raw = tokens.tobytes()
  return _header(len(raw)) + raw


def settings(config: DataConfig, name: str, tokenizer_sha256: str) -> dict[str, Any]:
  """What decides the prepared tokens; other settings may change without preparing again."""
  source = config.sources[name]
  wanted = {'uri': source.uri, 'max_documents': source.max_documents, 'document_bytes': config.document_bytes,
            'validation_fraction': config.validation_fraction, 'vocab_size': config.vocab_size,
            'tokenizer_sha256': tokenizer_sha256}
  if source.uri.partition(':')[0] == 'reasoning':  # others have no questions
    wanted['held_out_fraction'] = config.held_out_fraction
  return wanted


def check_settings(where: epath.Path, prepared: dict[str, Any], wanted: dict[str, Any]) -> None:
  """Raises DataError naming the settings that differ."""
  differ = [f'{key} is {prepared.get(key)!r} there and {wanted[key]!r} now' for key in wanted
            if prepared.get(key) != wanted[key]]
  if differ:
    raise DataError(f'{where}: prepared with other settings: {"; ".join(differ)}. Restore them, choose '
                    f'another data.dir, or delete the folder and run {_COMMAND}')


def tokenizer_sha256(config: DataConfig) -> str:
  return tokenizer.sha256_of(config.tokenizer_path)


def read_manifest(where: epath.Path) -> dict[str, Any] | None:
  """The manifest in folder `where`, or None if the data isn't prepared (or not to its end)."""
  try:
    manifest = json.loads((where / 'manifest.json').read_text())
    _check_manifest(manifest)
    return manifest
  except FileNotFoundError:
    return None
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    raise DataError(f'{where}/manifest.json: not a manifest of prepared data ({str(error)[:200]}); delete {where} and '
                    f'run {_COMMAND}') from None


def _check_manifest(manifest: dict[str, Any]) -> None:
  """Raises an error of the types above. What it names becomes a path: it may name nothing but files beside it."""
  if not re.fullmatch('[0-9a-f]{64}', manifest['fingerprint']):
    raise ValueError('its fingerprint is no SHA-256')
  manifest['settings'].items()
  for split, counts in manifest['splits'].items():
    if split not in SPLITS or type(counts['lengths_size']) is not int:
      raise ValueError(f'it has a split {split!r}, or no sizes')
    for shard in counts['shards']:
      if not re.fullmatch(r'\w[\w.-]*', shard['file']):
        raise ValueError(f'it names {shard["file"]!r}')
      if type(shard['size']) is not int or type(shard['documents']) is not int or shard['documents'] < 1:
        raise ValueError(f'{shard["file"]} has no size, or no documents')


def check_files(where: epath.Path, manifest: dict[str, Any]) -> None:
  """Raises DataError if a shard or the lengths are missing or of another size than the manifest says."""
  for split, counts in manifest['splits'].items():
    for file in [*counts['shards'], {'file': f'lengths-{split}.npy', 'size': counts['lengths_size']}]:
      try:
        size = (where / file['file']).stat().length
      except FileNotFoundError:
        raise DataError(f'{where / file["file"]}: missing; copy it back, or delete {where} and run '
                        f'{_COMMAND}') from None
      if size != file['size']:
        raise DataError(f'{where / file["file"]}: {size} bytes where the manifest says {file["size"]}; copy '
                        f'it again, or delete {where} and run {_COMMAND}')


def verify(config: DataConfig, name: str) -> int:
  """Reads every record of source `name`, in parallel; returns how many there are.

  Raises DataError naming the first file whose content isn't what was written.
  """
  manifest = check_prepared(config, name)
  splits = {split: Documents(config, name, split) for split in manifest['splits']}
  shards = [(documents, i) for documents in splits.values() for i in range(documents.shards)]
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(lambda shard: shard[0].verify_shard(shard[1]), shards))
  return sum(len(documents) for documents in splits.values())


def check_prepared(config: DataConfig, name: str) -> dict[str, Any]:
  """The manifest of source `name`, having checked that it is whole and was made with these settings."""
  where = folder(config, name)
  manifest = read_manifest(where)
  if manifest is None:
    raise DataError(f'{where}: source {name!r} is not prepared; run: {_COMMAND}')
  check_settings(where, manifest['settings'], settings(config, name, tokenizer_sha256(config)))
  check_files(where, manifest)
  return manifest


class Documents:
  """A split of a prepared source, by index.

  Attributes: manifest, fingerprint (of the content), lengths (int32 [N], tokens with BOS and EOS).
  """

  def __init__(self, config: DataConfig, name: str, split: str):
    """Raises DataError if the data is absent, damaged, made with other settings, or the split is empty."""
    self.manifest = check_prepared(config, name)
    self.fingerprint: str = self.manifest['fingerprint']
    counts = self.manifest['splits'].get(split)
    if counts is None:  # prepare writes no empty split; it was told to make none
      raise DataError(f'{folder(config, name)}: there is no {split} split; prepare again with another '
                      'data.validation_fraction')
    where = _local(folder(config, name), self.manifest, split)
    packed = (where / f'lengths-{split}.npy').read_bytes()
    if counts.get('lengths_sha256') not in (None, hashlib.sha256(packed).hexdigest()):  # None: by an older version
      raise DataError(f'{where}/lengths-{split}.npy: damaged (sha256 differs); copy it again, or delete the folder '
                      f'and run {_COMMAND}')
    try:
      self.lengths = _lengths(packed, sum(shard['documents'] for shard in counts['shards']))
    except (ValueError, SyntaxError, tokenize.TokenError) as error:  # what NumPy raises for a bad header
      raise DataError(f'{where}/lengths-{split}.npy: damaged ({str(error)[:200]}); copy it again, or delete the folder '
                      f'and run {_COMMAND}') from None
    self._dtype = token_dtype(self.manifest['settings']['vocab_size'])
    _allow_open_files(len(counts['shards']))
    self._paths = [str(where / shard['file']) for shard in counts['shards']]
    self._hashes = [shard.get('sha256') for shard in counts['shards']]  # None: prepared by an older version
    self._starts = [0, *itertools.accumulate(shard['documents'] for shard in counts['shards'])]
    self._readers: list[Any] = [None] * len(self._paths)
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self.lengths)

  def read(self, indices: Sequence[int]) -> list[np.ndarray]:
    """The tokens of documents `indices`: read-only arrays [length] of the stored type. Thread-safe."""
    wanted: dict[int, list[int]] = {}  # a call for each shard costs more than the records it reads
    for position, index in enumerate(indices):
      wanted.setdefault(bisect.bisect_right(self._starts, index) - 1, []).append(position)
    out: list[Any] = [None] * len(indices)
    for shard, positions in wanted.items():
      start = self._starts[shard]
      try:
        records = self._reader(shard).read([int(indices[p]) - start for p in positions])
      except RuntimeError as error:  # a checksum doesn't hold
        raise self._damaged(shard, str(error)) from None
      for position, record in zip(positions, records):
        size = int(self.lengths[indices[position]]) * self._dtype.itemsize
        header = _header(size)
        if len(record) != len(header) + size or not record.startswith(header):
          raise self._damaged(shard, 'a document is not as long as lengths-*.npy says')
        out[position] = np.frombuffer(record, self._dtype, offset=len(header))
    return out

  @property
  def shards(self) -> int:
    return len(self._paths)

  def verify_shard(self, shard: int) -> None:
    """Raises DataError if the records of a shard aren't what was written."""
    start, content = self._starts[shard], hashlib.sha256()
    for first in range(start, self._starts[shard + 1], _VERIFIED_AT_ONCE):
      for tokens in self.read(range(first, min(first + _VERIFIED_AT_ONCE, self._starts[shard + 1]))):
        content.update(to_record(tokens))
    if self._hashes[shard] not in (None, content.hexdigest()):
      raise self._damaged(shard, 'its records are not what was written')

  def _reader(self, shard: int):
    if self._readers[shard] is None:
      with self._lock:
        if self._readers[shard] is None:
          from array_record.python import array_record_module

          # Reads are scattered: reading ahead would fetch 16 MB for each document.
          reader = array_record_module.ArrayRecordReader(self._paths[shard], 'readahead_buffer_size:0')
          if not reader.ok():
            raise self._damaged(shard, 'not an ArrayRecord file')
          self._readers[shard] = reader
    return self._readers[shard]

  def _damaged(self, shard: int, reason: str) -> DataError:
    reason = ' '.join(reason.split())
    return DataError(f'{self._paths[shard]}: damaged ({reason}); copy it again, or delete the folder and run '
                     f'{_COMMAND}')


def _lengths(npy: bytes, documents: int) -> np.ndarray:
  """int32 [documents]: tokens of each. Reserves no memory for what the header claims."""
  file = io.BytesIO(npy)
  np.lib.format.read_magic(file)
  shape, _, dtype = np.lib.format.read_array_header_1_0(file)
  if shape != (documents,) or dtype != np.uint32 or len(npy) != file.tell() + 4 * documents:
    raise ValueError(f'not {documents} lengths')
  lengths_N = np.frombuffer(npy, np.uint32, offset=file.tell())
  if lengths_N.min() < 2 or lengths_N.max() >= 2**31:
    raise ValueError('a document has BOS and EOS at least')
  return lengths_N.astype(np.int32)


def _allow_open_files(more: int) -> None:
  """Every shard stays open, and the usual limit is 1024 files where much more is allowed."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft != resource.RLIM_INFINITY and soft < hard:
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft + more, hard), hard))


def _local(where: epath.Path, manifest: dict[str, Any], split: str) -> pathlib.Path:
  """`where` or, as ArrayRecord can't read a bucket, a copy of the split on this machine's disk."""
  if '://' not in str(where):
    return pathlib.Path(where)
  ours = pathlib.Path(tempfile.gettempdir()) / f'betarank-{os.getuid()}'
  ours.mkdir(mode=0o700, exist_ok=True)
  if ours.is_symlink() or ours.stat().st_uid != os.getuid():  # anybody may make folders there
    raise DataError(f'{ours}: belongs to somebody else; remove it, or set TMPDIR to a folder of your own')
  cache = ours / manifest['fingerprint']
  cache.mkdir(exist_ok=True)
  for file in [*manifest['splits'][split]['shards'], {'file': f'lengths-{split}.npy'}]:
    if not (cache / file['file']).exists():
      partial = cache / f'{file["file"]}.{os.getpid()}'
      (where / file['file']).copy(partial, overwrite=True)
      partial.replace(cache / file['file'])
  return cache
