"""Tokenises a source once, in parallel, into the shards that data/prepared.py describes.

The source's units (data/sources.py) are worked on apart from each other by worker processes. A finished unit
leaves its shards and a marker in `partial/`; a run that was killed starts again with the units that have none
and ends with the same files. Only the last step makes them data: it renames shards and writes the manifest.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from betarank.data import prepared, records, sources
from betarank.data.config import DataConfig, DataError
from betarank.data.tokenizer import TRAIN_BYTES, Tokenizer, read_tokenizer, train
from betarank.data.worker import Job, Worker, write_whole

Report = Callable[[int, int, int, int], None]  # units done, units, documents so far, tokens so far


def train_tokenizer(config: DataConfig) -> bool:
  """Trains the tokenizer into `config.dir` on all sources alike; returns False if there is one already.

  Raises DataError for a source that can't be read, or that holds too little text for config.vocab_size.
  """
  if config.tokenizer or epath.Path(config.tokenizer_path).exists():
    return False
  share = TRAIN_BYTES // len(config.sources)

  def documents():
    for name in config.sources:
      with _named(name):
        yield from sources.open_source(config, name).sample(share)

  train(documents(), config.vocab_size, config.tokenizer_path, max_bytes=2 * TRAIN_BYTES)
  return True


@contextlib.contextmanager
def _named(name: str):
  """Puts the source's name before the message of a DataError."""
  try:
    yield
  except DataError as error:
    raise DataError(f'source {name!r}: {error}') from None


def prepare_source(config: DataConfig, name: str, *, workers: int | None = None,
                   report: Report = lambda *_: None) -> dict[str, Any]:
  """Prepares source `name` and returns its manifest; does nothing if that was done with the same settings.

  Args:
    workers: processes, by default one a CPU; the result is the same for any number. 1: all in this process.
    report: called as units finish.

  Raises DataError for a source or tokenizer that can't be used, or data there that was made otherwise.
  """
  tokenizer = read_tokenizer(config.tokenizer_path, config.vocab_size)
  where = prepared.folder(config, name)
  wanted = prepared.settings(config, name, tokenizer.sha256)
  if manifest := prepared.read_manifest(where):
    prepared.check_settings(where, manifest['settings'], wanted)
    prepared.check_files(where, manifest)
    return manifest
  with _named(name):
    units = sources.open_source(config, name).units()
    plan = json.dumps([[dataclasses.astuple(segment) for segment in unit] for unit in units]).encode()
    _check_partial(where, {**wanted, 'input_files_sha256': hashlib.sha256(plan).hexdigest()})
    job = Job(name, config, str(where / 'partial'))
    markers = _work(job, units, config.sources[name].max_documents, workers or os.cpu_count() or 1, report)
    return _finish(config, name, where, wanted, tokenizer, markers)


def _check_partial(where: epath.Path, wanted: dict[str, Any]) -> None:
  path = where / 'partial' / 'settings.json'
  if path.exists():
    prepared.check_settings(where, json.loads(path.read_text()), wanted)
  else:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(wanted).encode())


_WORKER: Worker | None = None  # in a worker process: set once, as each unit would load the tokenizer again


def _start_worker(job: Job) -> None:
  global _WORKER
  parent = multiprocessing.parent_process()

  def follow():  # a worker whose parent was killed would wait for work for ever
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()
  _WORKER = Worker(job)


def _run_unit(index: int, unit: sources.Unit, limit: int) -> dict[str, Any]:
  return _WORKER.run(index, unit, limit)


def _work(job: Job, units: list[sources.Unit], max_documents: int, workers: int,
          report: Report) -> list[dict[str, Any]]:
  """The markers of the units that hold the first `max_documents` documents (0: all), in order."""
  done: dict[int, dict] = {}
  for index in range(len(units)):
    if job.marker(index).exists():
      done[index] = json.loads(job.marker(index).read_text())

  def enough() -> bool:
    count = 0  # units end in any order, but one only counts when all before it have ended
    for index in range(len(units)):
      if index not in done:
        return False
      count += done[index]['documents']
      if max_documents and count >= max_documents:
        return True
    return True

  def show():
    counts = [m['splits'][split] for m in done.values() for split in prepared.SPLITS]
    report(len(done), len(units), sum(c['documents'] for c in counts), sum(c['tokens'] for c in counts))

  show()
  todo = [index for index in range(len(units)) if index not in done]
  worker = None
  if min(workers, len(todo)) > 1:
    for index, marker in _in_parallel(job, units, todo, max_documents, min(workers, len(todo)), enough):
      done[index] = marker
      show()
  for index in range(len(units)):
    if enough():
      break
    if index not in done:
      worker = worker or Worker(job)
      done[index] = worker.run(index, units[index], max_documents)
      show()

  kept, room = [], max_documents or float('inf')
  for index in range(len(units)):
    if room <= 0:
      break
    if done[index]['documents'] > room:
      done[index] = (worker or Worker(job)).run(index, units[index], room)
    kept.append(done[index])
    room -= done[index]['documents']
  return kept


def _in_parallel(job: Job, units, todo, limit: int, workers: int, enough) -> Iterator[tuple[int, dict]]:
  """Yields (index, marker) as units finish, until all have or `enough`."""
  spawn = multiprocessing.get_context('spawn')
  pool = concurrent.futures.ProcessPoolExecutor(workers, spawn, _start_worker, (job,))
  waiting, running = iter(todo), {}
  with pool:
    try:
      while True:
        while len(running) < workers + 2 and not enough() and (index := next(waiting, None)) is not None:
          running[pool.submit(_run_unit, index, units[index], limit)] = index
        if not running:
          return
        finished, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in finished:
          yield running.pop(future), future.result()
    except concurrent.futures.process.BrokenProcessPool:
      raise DataError('a worker process was killed, perhaps for lack of memory; run the command again to go '
                      'on from here (fewer --workers need less memory)') from None
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def _finish(config: DataConfig, name: str, where: epath.Path, wanted: dict[str, Any], tokenizer: Tokenizer,
            markers: list[dict]) -> dict[str, Any]:
  """Makes the finished units a data set: renames shards, writes lengths, TFDS's files and the manifest."""
  job = Job(name, config, str(where / 'partial'))
  splits, content = {}, hashlib.sha256()
  needed = ['train', 'validation'] if config.validation_fraction else ['train']
  for split in needed:
    if not any(m['splits'][split]['documents'] for m in markers):
      (where / 'partial').rmtree()
      count = sum(m['documents'] for m in markers)
      raise DataError(f'the {split} split is empty ({count} documents, data.validation_fraction='
                      f'{config.validation_fraction}); give more documents, change the fraction, or make '
                      'documents shorter with data.document_bytes')
  for split in needed:
    units = [m for m in markers if m['splits'][split]['documents']]
    shards, lengths = [], []
    for number, marker in enumerate(units):
      counts = marker['splits'][split]
      stage = job.stage(marker['index'], split)
      final = where / prepared.shard_name(name, split, number, len(units))
      if stage.exists():  # else an earlier run got this far
        stage.replace(final)
      elif not final.exists():
        raise DataError(f'{stage}: vanished; delete {where} and prepare again')
      with stage.with_suffix('.npy').open('rb') as file:
        lengths.append(np.load(file))
      shards.append({'file': final.name, 'size': counts['size'], 'documents': counts['documents'],
                     'sha256': counts['sha256']})
      content.update(f'{split} {counts["documents"]} {counts["sha256"]}\n'.encode())
    packed = io.BytesIO()
    np.save(packed, np.concatenate(lengths))
    write_whole(where / f'lengths-{split}.npy', packed.getvalue())
    totals = {key: sum(m['splits'][split][key] for m in units) for key in ('documents', 'tokens', 'bytes')}
    splits[split] = {**totals, 'lengths_size': len(packed.getvalue()),
                     'lengths_sha256': hashlib.sha256(packed.getvalue()).hexdigest(), 'shards': shards}
  _write_tfds(where, name, splits, config.vocab_size)
  manifest = {'format_version': prepared.VERSION, 'name': name, 'settings': wanted, 'splits': splits,
              'record': {'checksum': 'crc32', 'masked': False},
              'token_dtype': records.token_dtype(config.vocab_size).name, 'bos': tokenizer.bos, 'eos': tokenizer.eos,
              'fingerprint': content.hexdigest()}
  write_whole(where / 'manifest.json', (json.dumps(manifest, indent=2) + '\n').encode())
  (where / 'partial').rmtree()
  return manifest


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
