"""Reads prepared data: a TFDS data set of token ids in ArrayRecord shards, and its manifest.

    DIR/NAME/1.0.0/NAME-SPLIT.array_record-00000-of-00005   a record is a document (data/records.py)
                   lengths-SPLIT.npy                 the number of tokens of each document, for packing
                   manifest.json                     settings, counts, hashes, fingerprint of the content; written last
                   dataset_info.json, features.json  TFDS's own files
    DIR/NAME/ID/1.0.0/   the same for another corpus under this name (see `folder`)

Opening a split checks the sizes of all files, and the hash of the lengths. Reading a record checks its checksum.
`betarank data verify` checks all records. `tfds.data_source(NAME, split=SPLIT, data_dir=DIR)` reads each document of N
tokens as {'tokens': [N]}. Data in a bucket is read in place. If `data.cache_dir` is set, it is copied to a disk first.
"""

import concurrent.futures
import hashlib
import io
import itertools
import json
import os
import re
import tokenize
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from betarank.data import cache, records, storage, tokenizer
from betarank.data.config import DataConfig, DataError

VERSION = '1.0.0'  # the version of the layout; TFDS requires it in the path
SPLITS = ('train', 'validation')
_VERIFIED_AT_ONCE = 1024  # the number of records in memory during verification
_TRIES = 3  # a shard counts as damaged if a record can't be read after so many tries
_NPY_HEADER = 4096  # bytes; the header is smaller
_COMMAND = 'betarank data prepare --config=...'


def folder(config: DataConfig, name: str) -> epath.Path:
  """Returns the folder of a source's data: DIR/NAME/1.0.0, or DIR/NAME/ID/1.0.0 if another corpus is there already.

  A corpus is what a URI names, and ID is a hash of the URI. So two corpora that are prepared under the same name have
  separate folders.

  Raises:
    DataError: DIR/NAME/1.0.0 has a manifest that isn't valid.
  """
  uri, home = config.sources[name].uri, epath.Path(config.dir) / name
  first, own = home / VERSION, home / hashlib.blake2b(uri.encode(), digest_size=4).hexdigest() / VERSION
  there = _corpus(first)
  return first if there == uri or not (there or own.exists()) else own


def _corpus(where: epath.Path) -> str | None:
  """Returns the URI of the data that is prepared, or being prepared, in folder `where`; None if there is none."""
  if manifest := read_manifest(where):
    return manifest['settings'].get('uri')
  try:
    return json.loads((where / 'partial' / 'plan.json').read_text())['settings']['uri']
  except (FileNotFoundError, ValueError, LookupError, TypeError):  # no plan, or a damaged one
    return None


def shard_name(name: str, split: str, shard: int, count: int) -> str:
  return f'{name}-{split}.array_record-{shard:05d}-of-{count:05d}'


def settings(config: DataConfig, name: str, tokenizer_sha256: str) -> dict[str, Any]:
  """Returns those settings on which the prepared tokens depend, as the manifest records them, {name: value}.

  All other settings may change after the preparation.
  """
  source = config.sources[name]
  wanted = {'uri': source.uri, 'max_documents': source.max_documents, 'document_bytes': config.longest_document,
            'validation_fraction': config.validation_fraction, 'vocab_size': config.vocab_size,
            'tokenizer_sha256': tokenizer_sha256, 'template': source.template}
  if source.uri.partition(':')[0] == 'reasoning':  # other sources have no questions to hold out
    wanted['held_out_fraction'] = config.held_out_fraction
  return wanted


def check_settings(config: DataConfig, where: epath.Path, prepared: dict[str, Any], wanted: dict[str, Any]) -> None:
  """Raises DataError if the data in folder `where` was prepared with settings other than `wanted`.

  The message names the settings that differ. If the config names a tokenizer, vocab_size may differ as long as a token
  takes the same number of bytes: the tokens then depend only on that tokenizer. Otherwise, vocab_size is the size of
  the tokenizer that was trained for the data.
  """
  there = {'template': '', **prepared}  # older versions recorded only templates that weren't empty
  differ = [key for key in wanted if there.get(key) != wanted[key]]
  if config.tokenizer and 'vocab_size' in differ and _same_token_dtype(there.get('vocab_size'), config.vocab_size):
    differ.remove('vocab_size')
  if differ:
    changes = '; '.join(f'{key} is {there.get(key)!r} there and {wanted[key]!r} now' for key in differ)
    raise DataError(f'{where}: prepared with other settings: {changes}. Restore them, choose another data.dir, or '
                    f'delete the folder and run {_COMMAND}')


def _same_token_dtype(there: Any, now: int) -> bool:
  return type(there) is int and records.token_dtype(there) == records.token_dtype(now)


def check_input(where: epath.Path, manifest: dict[str, Any], listing: dict[str, Any]) -> None:
  """Raises DataError if the names or sizes of the source's files have changed since the preparation.

  manifest: the manifest of the prepared data. If it doesn't describe the files, nothing is checked.
  listing: `Source.listing`, which describes the present files. If it is empty, nothing is checked.
  """
  there = manifest.get('input', {})
  if listing and 'sha256' in there and there['sha256'] != listing['sha256']:
    size = lambda about: f'{about["files"]} files of {about["bytes"]:,} bytes'
    raise DataError(f'{where}: prepared from other files: {size(there)} then, {size(listing)} now. Choose another '
                    f'data.dir or another name for the source, or delete the folder and run {_COMMAND}')


def tokenizer_sha256(config: DataConfig) -> str:
  return tokenizer.sha256_of(config.tokenizer_path)


def read_manifest(where: epath.Path) -> dict[str, Any] | None:
  """Returns the manifest in folder `where`, or None if the preparation isn't finished.

  Raises:
    DataError: the manifest isn't valid.
  """
  try:
    manifest = json.loads((where / 'manifest.json').read_text())
    _check_manifest(manifest)
    return manifest
  except FileNotFoundError:
    return None
  except ImportError as error:
    raise DataError(f'{where}: {error} ({storage.install_hint(str(where))})') from None
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    raise DataError(f'{where}/manifest.json: not a manifest of prepared data ({str(error)[:200]}); delete {where} and '
                    f'run {_COMMAND}') from None


def _check_manifest(manifest: dict[str, Any]) -> None:
  """Raises ValueError, TypeError, KeyError or AttributeError if the manifest isn't valid.

  The file names in a manifest become paths. A name that leads to another folder is therefore not valid.
  """
  if not re.fullmatch('[0-9a-f]{64}', manifest['fingerprint']):
    raise ValueError('its fingerprint is no SHA-256')
  manifest['settings'].items()
  manifest.get('record', {}).items()
  for split, counts in manifest['splits'].items():
    if split not in SPLITS or type(counts['lengths_size']) is not int:
      raise ValueError(f'it has a split {split!r}, or no sizes')
    for shard in counts['shards']:
      if not re.fullmatch(r'\w[\w.-]*', shard['file']):
        raise ValueError(f'it names {shard["file"]!r}')
      if type(shard['size']) is not int or type(shard['documents']) is not int or shard['documents'] < 1:
        raise ValueError(f'{shard["file"]} has no size, or no documents')


def check_files(where: epath.Path, manifest: dict[str, Any]) -> None:
  """Raises DataError if a file is missing, or if its size differs from the size in the manifest."""
  there = storage.open_folder(where).sizes()
  for split in manifest['splits']:
    for name, size in _files(manifest, split).items():
      if name not in there:
        raise DataError(f'{where / name}: missing; copy it back, or delete {where} and run {_COMMAND}')
      if there[name] != size:
        raise DataError(f'{where / name}: {there[name]} bytes where the manifest says {size}; copy it again, or delete '
                        f'{where} and run {_COMMAND}')


def _files(manifest: dict[str, Any], split: str) -> dict[str, int]:
  """Returns {file: size in bytes} for the files of a split."""
  counts = manifest['splits'][split]
  shards = {shard['file']: shard['size'] for shard in counts['shards']}
  return {f'lengths-{split}.npy': counts['lengths_size'], **shards}


def verify(config: DataConfig, name: str) -> int:
  """Reads every record of source `name`, in parallel. Returns the number of records.

  Raises:
    DataError: the content of a file has changed since it was written. The message names the first such file.
  """
  manifest = check_prepared(config, name)
  splits = {split: Documents(config, name, split) for split in manifest['splits']}
  shards = [(documents, i) for documents in splits.values() for i in range(documents.shards)]
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(lambda shard: shard[0].verify_shard(shard[1]), shards))
  return sum(len(documents) for documents in splits.values())


def check_prepared(config: DataConfig, name: str) -> dict[str, Any]:
  """Returns the manifest of source `name`.

  Raises:
    DataError: the source isn't prepared, was prepared with settings other than those in `config`, or lacks a file.
  """
  where = folder(config, name)
  manifest = read_manifest(where)
  if manifest is None:
    raise DataError(f'{where}: source {name!r} is not prepared from {config.sources[name].uri}; run: {_COMMAND}')
  check_settings(config, where, manifest['settings'], settings(config, name, tokenizer_sha256(config)))
  check_files(where, manifest)
  return manifest


class Document(NamedTuple):
  """A prepared document."""

  tokens: np.ndarray  # [N], read-only, in the stored dtype: BOS, those of the text, EOS
  mask: np.ndarray | None  # bool [N]: True for tokens that count as targets; None: all count


class Documents:
  """Reads the documents of one split of a prepared source, by index. Thread-safe.

  Only the lengths of the documents are kept in memory, in 2 or 4 bytes per document.

  Attributes:
    manifest: the manifest of the source.
    fingerprint: a hash of the content of the source.
    lengths: uint16 or uint32 [N], the number of tokens of each document, with BOS and EOS.
    masked: whether each document has a mask of the tokens that count as targets.
  """

  def __init__(self, config: DataConfig, name: str, split: str):
    """Opens the split, and reads the lengths of its documents.

    Raises:
      DataError: the data is missing, damaged, or made with other settings, or there is no such split.
    """
    self.manifest = check_prepared(config, name)
    self.fingerprint: str = self.manifest['fingerprint']
    counts = self.manifest['splits'].get(split)
    where = folder(config, name)
    if counts is None:  # no split is ever empty, so the data was prepared without this one
      raise DataError(f'{where}: there is no {split} split; prepare again with another data.validation_fraction')
    self._folder = storage.open_folder(where)
    self._repair = f'copy it again, or delete the folder and run {_COMMAND}'
    if config.cache_dir and storage.is_remote(where):
      self._folder = cache.local_copy(self._folder, _files(self.manifest, split), config.cache_dir, self.fingerprint,
                                      int(config.cache_gb * 1e9))
      self._repair = f'delete {self._folder.path}, a copy of {where}, to have it copied again'
    self.lengths = _read_lengths(self._folder, split, counts, self._repair)
    about = self.manifest.get('record', {})
    self.masked: bool = bool(about.get('masked'))
    self._form = records.Form(records.token_dtype(self.manifest['settings']['vocab_size']), self.masked,
                              about.get('checksum') == 'crc32')
    self._names = [shard['file'] for shard in counts['shards']]
    self._hashes = [shard.get('sha256') for shard in counts['shards']]  # None: prepared by an older version
    self._starts = [0, *itertools.accumulate(shard['documents'] for shard in counts['shards'])]
    self._places = records.Places(self.lengths, self._starts, self._form)
    for shard, size in enumerate(self._places.sizes):
      if size > counts['shards'][shard]['size']:
        raise self._damaged(shard, 'too short for its documents')

  def __len__(self) -> int:
    return len(self.lengths)

  def read(self, indices: Sequence[int]) -> list[np.ndarray]:
    """Returns the tokens of the documents `indices`: read-only arrays [length] in the stored dtype."""
    return [document.tokens for document in self.request(indices)()]

  def request(self, indices: Sequence[int]) -> Callable[[], list[Document]]:
    """Requests the documents with these indices, without waiting for them.

    Returns a function that waits for the documents and returns them. The function raises DataError if they can't be
    read.
    """
    indices_N = np.asarray(indices, np.int64)
    places = list(zip(indices_N.tolist(), *(part.tolist() for part in self._places.of(indices_N))))
    waits = [self._folder.start(self._names[shard], begin, end) for _, shard, begin, end in places]
    return lambda: [self._document(wait(), *place) for wait, place in zip(waits, places)]

  def _document(self, raw: bytes, index: int, shard: int, begin: int, end: int) -> Document:
    for attempt in range(_TRIES):
      try:
        return Document(*records.from_record(records.record_in(raw, begin), int(self.lengths[index]), self._form))
      except ValueError as error:
        if attempt == _TRIES - 1:
          raise self._damaged(shard, str(error)) from None
      raw = self._folder.start(self._names[shard], begin, end)()  # it may have been damaged in transfer

  @property
  def shards(self) -> int:
    return len(self._names)

  def verify_shard(self, shard: int) -> None:
    """Raises DataError if a record of shard number `shard` has changed since it was written."""
    start, content = self._starts[shard], hashlib.sha256()
    for first in range(start, self._starts[shard + 1], _VERIFIED_AT_ONCE):
      for document in self.request(range(first, min(first + _VERIFIED_AT_ONCE, self._starts[shard + 1])))():
        content.update(records.without_checksum(records.to_record(*document)))
    if self._hashes[shard] not in (None, content.hexdigest()):
      raise self._damaged(shard, 'its records are not what was written')

  def _damaged(self, shard: int, reason: str) -> DataError:
    return DataError(f'{self._folder.path}/{self._names[shard]}: damaged ({reason}); {self._repair}')


def _read_lengths(where: storage.Folder, split: str, counts: dict[str, Any], repair: str) -> np.ndarray:
  """Returns the number of tokens of each document of a split, uint16 or uint32.

  where: the folder to read from. It may be a local copy of the data.
  counts: the split's entry in the manifest.
  repair: what to do if the file is damaged, for the message.

  Raises:
    DataError: the file can't be read, or its content has changed since it was written.
  """
  name, documents = f'lengths-{split}.npy', sum(shard['documents'] for shard in counts['shards'])
  content = hashlib.sha256()
  try:
    pieces = storage.read_pieces(where, name, counts['lengths_size'])
    lengths_N = _parse_lengths(pieces, counts['lengths_size'], documents, content.update)
  except (ValueError, SyntaxError, tokenize.TokenError) as error:  # the last two: NumPy raises them for a bad header
    if isinstance(error, DataError):
      raise
    raise DataError(f'{where.path}/{name}: damaged ({str(error)[:200]}); {repair}') from None
  if counts.get('lengths_sha256') not in (None, content.hexdigest()):  # None: written by an older version
    raise DataError(f'{where.path}/{name}: damaged (sha256 differs); {repair}')
  return lengths_N


def _parse_lengths(pieces: Iterator[bytes], size: int, documents: int, update: Callable[[bytes], None]) -> np.ndarray:
  """Returns the lengths in an .npy file, uint16 or uint32 [documents].

  Only the memory for `documents` lengths is allocated, even if the file is damaged.

  pieces: the content of the file, in consecutive pieces.
  size: the size of the file in bytes.
  documents: the number of lengths that the file must have.
  update: called with each piece, for example to compute a hash.

  Raises:
    ValueError: the file isn't an array of `documents` lengths.
  """
  first = next(pieces, b'')
  file = io.BytesIO(first[:_NPY_HEADER])
  np.lib.format.read_magic(file)
  shape, _, dtype = np.lib.format.read_array_header_1_0(file)
  if shape != (documents,) or dtype not in (np.uint16, np.uint32) or size != file.tell() + dtype.itemsize * documents:
    raise ValueError(f'not {documents} lengths')
  lengths_N, at, rest, header = np.empty(documents, dtype), 0, b'', file.tell()
  for piece in itertools.chain([first], pieces):
    update(piece)
    piece, header = rest + piece[header:], 0
    whole = len(piece) // dtype.itemsize
    part, rest = np.frombuffer(piece, dtype, count=whole), piece[whole * dtype.itemsize:]
    if at + whole > documents or (whole and (part.min() < 2 or part.max() >= 2**31)):
      raise ValueError('a document has BOS and EOS at least')
    lengths_N[at:at + whole] = part
    at += whole
  if at != documents or rest:
    raise ValueError(f'not {documents} lengths')
  return lengths_N


def has_tokenizer(config: DataConfig) -> bool:
  return epath.Path(config.tokenizer_path).exists()
