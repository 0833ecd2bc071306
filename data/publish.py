"""Turns the shards of a prepared source into a data set: the last step of data/prepare.py."""

import contextlib
import hashlib
import io
import json
from typing import Any

import numpy as np
from etils import epath

from betarank.configs.files import write_atomically
from betarank.data import prepared, records, sources, storage
from betarank.data.config import DataError
from betarank.data.tokenizer import Tokenizer
from betarank.data.worker import Job, Marker


def number_of_documents(markers: list[Marker]) -> int:
  return sum(marker['documents'] for marker in markers)


def empty_split(markers: list[Marker]) -> str:
  """Returns the name of the first split that has no documents, or '' if every split has some."""
  return next((split for split in prepared.SPLITS
               if not any(marker['splits'][split]['documents'] for marker in markers)), '')


def delete_pieces(where: epath.Path) -> None:
  """Deletes the pieces of which the data set in folder `where` was made. Another process may delete them too."""
  with contextlib.suppress(FileNotFoundError):
    (where / 'partial').rmtree()


def publish(job: Job, tokenizer: Tokenizer, markers: list[Marker], listing: dict[str, Any]) -> dict[str, Any]:
  """Turns the shards of a source into a data set, and returns the set's manifest.

  The function renames the shards, and writes the lengths, TFDS's files, and finally the manifest.

  markers: descriptions of the pieces that the set consists of. A piece has at most one shard for each split.
  listing: `Source.listing`, the description of the source's files, which becomes a part of the manifest.

  Raises:
    DataError: a split is empty.
  """
  config, name = job.config, job.name
  where = prepared.folder(config, name)
  needed = prepared.SPLITS if config.validation_fraction else ('train',)
  if (empty := empty_split(markers)) in needed:
    delete_pieces(where)
    raise DataError(f'the {empty} split is empty ({number_of_documents(markers)} documents, data.validation_fraction='
                    f'{config.validation_fraction}); give more text, or change the fraction')
  splits, content = {}, hashlib.sha256()
  for split in needed:
    pieces = [marker for marker in markers if marker['splits'][split]['documents']]
    stages = [job.stage(marker['unit'], marker['piece'], split) for marker in pieces]
    final = [where / prepared.shard_name(name, split, number, len(pieces)) for number in range(len(pieces))]
    counts = [marker['splits'][split] for marker in pieces]
    lengths = _write_lengths(where / f'lengths-{split}.npy', stages, counts)
    for _ in storage.several(lambda pair: _rename(*pair), list(zip(stages, final)), where):
      pass
    shards = [{'file': path.name, **{key: count[key] for key in ('size', 'documents', 'sha256')}}
              for path, count in zip(final, counts)]
    for count in counts:
      content.update(f'{split} {count["documents"]} {count["sha256"]}\n'.encode())
    totals = {key: sum(count[key] for count in counts) for key in ('documents', 'tokens', 'bytes')}
    splits[split] = {**totals, 'longest': max(count['longest'] for count in counts), **lengths, 'shards': shards}
  _write_tfds(where, name, splits, config.vocab_size)
  masked = sources.masked(config.sources[name])
  manifest = {'format_version': prepared.VERSION, 'name': name,
              'settings': prepared.settings(config, name, tokenizer.sha256),
              'input': {**listing, 'bad_rows': sum(marker['bad_rows'] for marker in markers)},
              'splits': splits, 'divided': 'text' if job.share else 'documents',
              'record': {'checksum': 'crc32', 'masked': masked},
              'token_dtype': records.token_dtype(config.vocab_size).name, 'bos': tokenizer.bos,
              'eos': tokenizer.eos, 'fingerprint': content.hexdigest()}
  write_atomically(where / 'manifest.json', (json.dumps(manifest, indent=2) + '\n').encode())
  delete_pieces(where)
  return manifest


def _rename(stage: epath.Path, final: epath.Path) -> None:
  try:
    if stage.exists():  # otherwise an earlier run has renamed it already
      stage.replace(final)
      return
  except FileNotFoundError:  # it has just been renamed, by another process or the last request of one that was killed
    pass
  if not final.exists():
    raise DataError(f'{stage}: vanished; delete {final.parent} and prepare again')


def _write_lengths(path: epath.Path, stages: list[epath.Path], counts: list[dict[str, Any]]) -> dict[str, Any]:
  """Writes one file, `path`, with the lengths of all documents of a split. Returns the file's size and hash.

  stages: the temporary path of each shard. A file with the same name and the suffix .npy has the lengths of the shard's
    documents.
  counts: for each shard, what its marker records, such as the number of documents and the longest length.
  """
  dtype = np.dtype('<u2' if max(count['longest'] for count in counts) < 2**16 else '<u4')
  file = io.BytesIO()  # the reader keeps all lengths in memory too
  about = {'descr': dtype.str, 'fortran_order': False, 'shape': (sum(count['documents'] for count in counts),)}
  np.lib.format.write_array_header_1_0(file, about)
  for lengths_N in storage.several(_read_lengths, stages, path):
    file.write(lengths_N.astype(dtype).tobytes())
  content = file.getbuffer()
  write_atomically(path, content)
  return {'lengths_size': len(content), 'lengths_sha256': hashlib.sha256(content).hexdigest()}


def _read_lengths(stage: epath.Path) -> np.ndarray:
  with stage.with_suffix('.npy').open('rb') as file:
    return np.load(file)


def _write_tfds(where: epath.Path, name: str, splits: dict[str, Any], vocab_size: int) -> None:
  import tensorflow_datasets as tfds

  tokens = tfds.features.Tensor(shape=(None,), dtype=records.token_dtype(vocab_size), encoding='bytes')
  file = tfds.core.ShardedFileTemplate(data_dir=where, dataset_name=name, filetype_suffix='array_record')
  infos = [
    tfds.core.SplitInfo(name=split, filename_template=file.replace(split=split),
                        shard_lengths=[shard['documents'] for shard in counts['shards']],
                        num_bytes=sum(shard['size'] for shard in counts['shards']))
    for split, counts in splits.items()]
  tfds.folder_dataset.write_metadata(
    data_dir=where, features=tfds.features.FeaturesDict({'tokens': tokens}), split_infos=infos,
    version=prepared.VERSION, check_data=False, description='Token ids with BOS and EOS; see manifest.json')
