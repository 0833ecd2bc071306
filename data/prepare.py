"""Tokenizes a source once, in parallel, into the shards that data/prepared.py reads.

The source is divided into numbered units (data/sources.py), which are independent, so that processes and machines can
share the work. Each unit is written to `partial/` in pieces. A piece consists of shards and a marker, which is written
last (data/worker.py). A run that was killed resumes after the last complete piece of each unit. The result is the same,
byte for byte, as if one process had prepared the source without interruption. The last step, `finish`, turns the shards
into a data set: it renames the shards, and writes the lengths and the manifest.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from betarank.configs.files import write_atomically
from betarank.data import prepared, records, sources, storage
from betarank.data.config import DataConfig, DataError
from betarank.data.tokenizer import Tokenizer, read_tokenizer, train
from betarank.data.worker import Job, Worker

_FEW_DOCUMENTS = 2000  # if there are no more documents than this, each is divided rather than leaving a split empty
_REQUESTS_AT_ONCE = 32  # the number of requests to a bucket at the same time
_REPORT_S = 1.0
_LEAST_SAMPLE = 16e6  # a tokenizer is trained on at least so many bytes of text
_SAMPLE_PER_TOKEN = 1024  # bytes of text for each token of the vocabulary

Marker = dict[str, Any]


class Progress(NamedTuple):
  """How far the preparation of a source has come."""

  units: int
  units_done: int
  total_bytes: float  # the approximate size of the input
  done_bytes: float
  documents: int  # those in complete pieces; the same for tokens and bad_rows
  tokens: int
  bad_rows: int


Report = Callable[[Progress], None]
Asked = Callable[[], bool]  # returns True once the work must stop


def sample_bytes(config: DataConfig) -> float:
  """Returns the size of the text that the tokenizer is trained on, in bytes."""
  if config.tokenizer_sample_mb:
    return config.tokenizer_sample_mb * 1e6
  return max(_LEAST_SAMPLE, _SAMPLE_PER_TOKEN * config.vocab_size)


def train_tokenizer(config: DataConfig) -> bool:
  """Trains the tokenizer in `config.dir`, on equal amounts of text from each source.

  If the sources have too little text for config.vocab_size tokens, the tokenizer gets as many tokens as the text
  allows.

  Returns:
    True if a tokenizer was trained; False if config.dir has one already, or if config.tokenizer names one.

  Raises:
    DataError: a source can't be read; or the sample is too small for config.vocab_size tokens, although the sources
      have more text.
  """
  path = config.tokenizer_path
  if config.tokenizer or epath.Path(path).exists():
    return False
  try:
    _train(config, config.vocab_size)
  except _TooLittleTextError as error:
    every = sum(_open(config, name).total_bytes for name in config.sources)
    if every > sample_bytes(config):
      raise DataError(f'{path}: {sample_bytes(config) / 1e6:.0f} MB of text yield {error.tokens} tokens at most, fewer '
                      f'than vocab_size={config.vocab_size}; raise config.data.tokenizer_sample_mb (there are about '
                      f'{every / 1e6:,.0f} MB), or lower config.model.vocab_size') from None
    _train(config, error.tokens)
  return True


class _TooLittleTextError(Exception):

  def __init__(self, tokens: int):
    super().__init__(tokens)
    self.tokens = tokens


def _train(config: DataConfig, vocab_size: int) -> None:
  share = sample_bytes(config) / len(config.sources)
  failed: list[BaseException] = []

  def texts() -> Iterator[str]:
    try:
      for name in config.sources:
        with _named(name):
          yield from sources.open_source(config, name).sample(share)
    except BaseException as error:  # kept here, because SentencePiece would replace it by an error of its own
      failed.append(error)
      raise

  try:
    train(texts(), vocab_size, config.tokenizer_path, max_bytes=2 * int(sample_bytes(config)))
  except DataError as error:
    if failed:
      raise failed[0] from None
    if limit := re.search(r'yield (\d+) tokens at most', str(error)):
      raise _TooLittleTextError(int(limit[1])) from None
    raise


def _open(config: DataConfig, name: str) -> sources.Source:
  with _named(name):
    return sources.open_source(config, name)


@contextlib.contextmanager
def _named(name: str):
  """Adds the source's name to the message of any DataError raised inside the block."""
  try:
    yield
  except DataError as error:
    raise DataError(f'source {name!r}: {error}') from None


class _Preparation:
  """A source that is being prepared: its settings, its units of work, and the folder of its shards and of the markers
  that say which shards are complete."""

  def __init__(self, config: DataConfig, name: str):
    self.config, self.name = config, name
    self.tokenizer = read_tokenizer(config.tokenizer_path, config.vocab_size)
    self.where = prepared.folder(config, name)
    self.wanted = prepared.settings(config, name, self.tokenizer.sha256)
    self.job = Job(name, config, str(self.where / 'partial'))

  def finished(self) -> dict[str, Any] | None:
    """Returns the manifest if the source is prepared, else None.

    Raises:
      DataError: the source was prepared with other settings or from other files, or the prepared data is damaged.
    """
    manifest = prepared.read_manifest(self.where)
    if manifest:
      prepared.check_settings(self.where, manifest['settings'], self.wanted)
      prepared.check_input(self.where, manifest, self._listing_now())
      prepared.check_files(self.where, manifest)
    return manifest

  def _listing_now(self) -> dict[str, Any]:
    sources.open_source.cache_clear()
    try:
      return sources.open_source(self.config, self.name).listing
    except DataError:  # the files may have been removed since
      return {}

  def open(self) -> None:
    """Examines the source's files. Divides the source into units, or reads the units that an earlier run has planned.
    """
    source = sources.open_source(self.config, self.name)
    self.listing = source.listing
    partial = self.where / 'partial'
    partial.mkdir(parents=True, exist_ok=True)
    now = {**self.wanted, 'input_files_sha256': self.listing.get('sha256', '')}
    if (partial / 'plan.json').exists():  # saves minutes, which examining each file of a large source would take
      plan = json.loads((partial / 'plan.json').read_text())
      prepared.check_settings(self.where, plan['settings'], now)
      self.units = [tuple(sources.Segment(*segment) for segment in unit) for unit in plan['units']]
      return
    self.units = source.units()
    units = [[dataclasses.astuple(segment) for segment in unit] for unit in self.units]
    write_atomically(partial / 'plan.json', json.dumps({'settings': now, 'units': units}).encode())

  def markers(self, job: Job) -> dict[int, list[Marker]]:
    """Returns {number of a unit: the markers of the unit's complete pieces, in order}.

    A unit is a numbered part of the source, and is written in pieces. A marker is the JSON file that completes a piece.
    """
    names = sorted(name for name in storage.open_folder(job.folder).sizes()
                   if name.startswith('unit-') and name.endswith('.json'))
    read = lambda name: json.loads((epath.Path(job.folder) / name).read_text())
    found: dict[int, list[Marker]] = {}
    for marker in _several(read, names, job.folder):
      pieces = found.setdefault(marker['unit'], [])
      if marker['piece'] == len(pieces):
        pieces.append(marker)
    return found


def _several(function: Callable, items: list, place: Any) -> Iterator:
  """Yields function(item) for each item, in order.

  If `place` is in a bucket, where each call takes long, several calls run at the same time.
  """
  if not storage.is_remote(place):
    yield from map(function, items)
    return
  with concurrent.futures.ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
    for start in range(0, len(items), 4 * _REQUESTS_AT_ONCE):
      yield from pool.map(function, items[start:start + 4 * _REQUESTS_AT_ONCE])


def prepare_source(config: DataConfig, name: str, *, workers: int | None = None,
                   report: Report = lambda _: None) -> dict[str, Any]:
  """Prepares source `name`, and returns its manifest. If the source is already prepared, only returns the manifest.

  Args:
    config: the settings of the data.
    name: the source.
    workers: the number of processes; None means one per CPU. With 1, this process does the work. The result doesn't
      depend on the number of processes.
    report: called with the Progress from time to time.

  Raises:
    DataError: the source or the tokenizer can't be used, or the source was prepared with other settings.
  """
  prepare_part(config, name, workers=workers, report=report)
  return finish(config, name, workers=workers)


def prepare_part(config: DataConfig, name: str, part: int = 0, parts: int = 1, *, workers: int | None = None,
                 report: Report = lambda _: None, asked: Asked = lambda: False) -> bool:
  """Tokenizes part number `part` (0 to parts - 1) of source `name`. Does nothing if the source is finished.

  The part consists of the units of work with the numbers part, part + parts, part + 2 * parts and so on.
  Processes on other machines may work on other parts at the same time. For the other arguments and the errors, see
  `prepare_source`.

  asked: once it returns True, the work stops after the pieces in progress.

  Returns False if the work stopped before all units were done.
  """
  preparation = _Preparation(config, name)
  if preparation.finished():
    return True
  with _named(name):
    preparation.open()
    mine = range(part, len(preparation.units), parts)
    return _work(preparation, preparation.job, mine, workers or os.cpu_count() or 1, report, stop_early=parts == 1,
                 asked=asked)


def finish(config: DataConfig, name: str, *, workers: int | None = None) -> dict[str, Any]:
  """Turns the tokenized shards of source `name` into a data set, and returns the set's manifest.

  Raises:
    DataError: not everything is tokenized, a split is empty, or there are too many bad rows.
  """
  preparation = _Preparation(config, name)
  if manifest := preparation.finished():
    return manifest
  with _named(name):
    if not (preparation.where / 'partial' / 'plan.json').exists():
      raise DataError(f'{preparation.where}: nothing is prepared yet; run: betarank data prepare --config=...')
    preparation.open()
    markers = _kept(preparation, preparation.job)
    job = preparation.job
    if config.validation_fraction and _empty_split(markers) and _documents(markers) <= _FEW_DOCUMENTS:
      job = dataclasses.replace(job, folder=f'{job.folder}/share', share=True)
      epath.Path(job.folder).mkdir(parents=True, exist_ok=True)
      _work(preparation, job, range(len(preparation.units)), workers or 1, lambda _: None, stop_early=True)
      markers = _kept(preparation, job)
    manifest = publish(job, preparation.tokenizer, markers, preparation.listing)
  sources.open_source.cache_clear()
  return manifest


# Units


_WORKER: Worker | None = None  # in a worker process; created once, so that the tokenizer is loaded only once
_DONE_BYTES: Any = None  # in a worker process; the bytes read by unfinished units, which the parent displays
_ASKED: Any = None  # in a worker process; an event that the parent sets, after which no piece may begin


def _start_worker(job: Job, done_bytes, asked) -> None:
  global _WORKER, _DONE_BYTES, _ASKED
  parent = multiprocessing.parent_process()

  def follow():  # otherwise a worker whose parent was killed would wait for work forever
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()
  _WORKER, _DONE_BYTES, _ASKED = Worker(job), done_bytes, asked


def _run_unit(index: int, unit: sources.Unit, limit: int, done: list[Marker]) -> list[Marker]:
  def report(text_bytes: int) -> None:
    with _DONE_BYTES.get_lock():
      _DONE_BYTES.value += text_bytes

  pieces, new = list(done), _WORKER.run(index, unit, limit, done, report)
  while not _ASKED.is_set() and (marker := next(new, None)):
    pieces.append(marker)
  return pieces


class _State:
  """Records which units of work are done, and reports the progress."""

  def __init__(self, preparation: _Preparation, job: Job, mine: range, report: Report):
    self.units, self.mine, self._report = preparation.units, mine, report
    self.limit = preparation.config.sources[preparation.name].max_documents
    self.found = preparation.markers(job)
    self._sizes = {index: sum(sources.segment_bytes(segment) for segment in self.units[index]) for index in mine}
    self._bad = sources.BadRows(preparation.config.sources[preparation.name].max_bad_rows)

  def done(self, index: int) -> bool:
    return bool(self.found.get(index)) and self.found[index][-1]['last']

  def enough(self) -> bool:
    """Returns True if all units are done, or if the units before the first unfinished unit have max_documents
    documents.

    No further unit is needed then.
    """
    count = 0
    for index in range(len(self.units)):
      if not self.done(index):
        return False
      count += sum(marker['documents'] for marker in self.found[index])
      if self.limit and count >= self.limit:
        return True
    return True

  def show(self, in_work: float = 0.0) -> None:
    pieces = [marker for index in self.mine for marker in self.found.get(index, ())]
    splits = [counts for marker in pieces for counts in marker['splits'].values()]
    total, done = sum(self._sizes.values()), [index for index in self.mine if self.done(index)]
    bad_rows = sum(marker['bad_rows'] for marker in pieces)
    if bad_rows > self._bad.limit:
      self._bad.add(bad_rows, next(marker['last_bad'] for marker in reversed(pieces) if marker['last_bad']))
    self._report(Progress(
      len(self.mine), len(done), total, min(total, sum(self._sizes[index] for index in done) + in_work),
      sum(counts['documents'] for counts in splits), sum(counts['tokens'] for counts in splits), bad_rows))


def _work(preparation: _Preparation, job: Job, mine: range, workers: int, report: Report, stop_early: bool,
          asked: Asked = lambda: False) -> bool:
  """Tokenizes the units of work whose numbers are in `mine`, except those that are done already.

  Args:
    stop_early: whether to stop once max_documents documents are tokenized. It must be False if other machines also work
      on the source.
    asked: as in `prepare_part`.

  Returns False if the work stopped because `asked` returned True.
  """
  state = _State(preparation, job, mine, report)
  state.show()
  enough = lambda: stop_early and state.enough()
  todo = [index for index in mine if not state.done(index)]
  workers = min(workers, len(todo))
  if workers > 1:
    return _in_parallel(job, state, todo, workers, enough, asked)
  worker = None
  for index in todo:
    if enough():
      break
    worker = worker or Worker(job)
    in_work = 0

    def show(text_bytes: int) -> None:
      nonlocal in_work
      in_work += text_bytes
      state.show(in_work)

    pieces = state.found.setdefault(index, [])
    new = worker.run(index, state.units[index], state.limit, list(pieces), show)
    while not asked() and (marker := next(new, None)):
      pieces.append(marker)
      state.show(in_work)
    if not state.done(index):
      return False
  return True


def _in_parallel(job: Job, state: _State, todo: list[int], workers: int, enough: Callable[[], bool],
                 asked: Asked) -> bool:
  spawn = multiprocessing.get_context('spawn')
  done_bytes, asked_workers = spawn.Value('q', 0), spawn.Event()
  pool = concurrent.futures.ProcessPoolExecutor(workers, spawn, _start_worker, (job, done_bytes, asked_workers))
  waiting, running, finished_bytes = iter(todo), {}, 0
  with pool:
    try:
      while True:
        if asked():
          asked_workers.set()
        while (len(running) < workers + 2 and not asked_workers.is_set() and not enough()
               and (index := next(waiting, None)) is not None):
          done = state.found.get(index, [])
          with _without_interrupts():
            future = pool.submit(_run_unit, index, state.units[index], state.limit, done)
          running[future] = index
        if not running:
          return enough() or all(state.done(index) for index in todo)
        finished, _ = concurrent.futures.wait(running, _REPORT_S, concurrent.futures.FIRST_COMPLETED)
        for future in finished:
          pieces = future.result()
          state.found[running.pop(future)] = pieces
          finished_bytes += sum(counts['bytes'] for marker in pieces for counts in marker['splits'].values())
        state.show(max(0, done_bytes.value - finished_bytes))
    except concurrent.futures.process.BrokenProcessPool:
      raise DataError('a worker process was killed, perhaps for lack of memory; run the command again to resume '
                      '(fewer --workers need less memory)') from None
    except BaseException as error:
      workers_alive = list((pool._processes or {}).values())
      pool.shutdown(wait=False, cancel_futures=True)
      if isinstance(error, KeyboardInterrupt):  # what they have written is complete
        for process in workers_alive:
          process.kill()
      raise


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
  """Makes processes that start inside the block ignore Ctrl-C.

  A terminal sends Ctrl-C to all processes, but only this process should handle it.
  """
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


# The last step


def _documents(markers: list[Marker]) -> int:
  return sum(marker['documents'] for marker in markers)


def _empty_split(markers: list[Marker]) -> str:
  """Returns the name of the first split that has no documents, or '' if every split has some."""
  return next((split for split in prepared.SPLITS
               if not any(marker['splits'][split]['documents'] for marker in markers)), '')


def _kept(preparation: _Preparation, job: Job) -> list[Marker]:
  """Returns the markers (descriptions) of the pieces that contain the first max_documents documents (0: all documents),
  in order.

  If a piece has too many documents, it is written again with fewer.

  Raises:
    DataError: a unit isn't complete, or there are too many bad rows.
  """
  found, kept, worker = preparation.markers(job), [], None
  source = preparation.config.sources[preparation.name]
  room = source.max_documents or float('inf')
  missing = []
  for index, unit in enumerate(preparation.units):
    pieces = found.get(index, [])
    for i, marker in enumerate(pieces):
      if room <= 0:
        break
      if marker['documents'] > room:
        worker = worker or Worker(job)
        marker = next(worker.run(index, unit, int(room), pieces[:i]))
      kept.append(marker)
      room -= marker['documents']
    if room > 0 and not (pieces and pieces[-1]['last']):
      missing.append(index)
    if room <= 0:
      break
  if missing:
    raise DataError(f'{preparation.where}: {len(missing)} of {len(preparation.units)} units are not prepared yet, '
                    f'the first is unit {missing[0]}, which is in part {missing[0]} mod N + 1 of N; run '
                    'betarank data prepare --config=... with --part=I/N for the parts that are missing, or without it')
  bad = sources.BadRows(source.max_bad_rows)
  for marker in kept:
    bad.add(marker['bad_rows'], marker['last_bad'])
  return kept


def publish(job: Job, tokenizer: Tokenizer, markers: list[Marker], listing: dict[str, Any]) -> dict[str, Any]:
  """Turns the pieces that `markers` describe into a data set, and returns the set's manifest.

  The function renames the shards, and writes the lengths, TFDS's files, and finally the manifest.

  listing: `Source.listing`, the description of the source's files, which becomes a part of the manifest.

  Raises:
    DataError: a split is empty.
  """
  config, name = job.config, job.name
  where = prepared.folder(config, name)
  needed = prepared.SPLITS if config.validation_fraction else ('train',)
  if (empty := _empty_split(markers)) in needed:
    (where / 'partial').rmtree()
    raise DataError(f'the {empty} split is empty ({_documents(markers)} documents, data.validation_fraction='
                    f'{config.validation_fraction}); give more text, or change the fraction')
  splits, content = {}, hashlib.sha256()
  for split in needed:
    pieces = [marker for marker in markers if marker['splits'][split]['documents']]
    stages = [job.stage(marker['unit'], marker['piece'], split) for marker in pieces]
    final = [where / prepared.shard_name(name, split, number, len(pieces)) for number in range(len(pieces))]
    counts = [marker['splits'][split] for marker in pieces]
    lengths = _write_lengths(where / f'lengths-{split}.npy', stages, counts)
    for _ in _several(lambda pair: _rename(*pair), list(zip(stages, final)), where):
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
  (where / 'partial').rmtree()
  return manifest


def _rename(stage: epath.Path, final: epath.Path) -> None:
  if stage.exists():  # otherwise an earlier run has renamed it already
    stage.replace(final)
  elif not final.exists():
    raise DataError(f'{stage}: vanished; delete {final.parent} and prepare again')


def _write_lengths(path: epath.Path, stages: list[epath.Path], counts: list[dict[str, Any]]) -> dict[str, Any]:
  """Writes the lengths of all documents of a split to the file `path`. Returns the file's size and hash."""
  dtype = np.dtype('<u2' if max(count['longest'] for count in counts) < 2**16 else '<u4')
  content, size = hashlib.sha256(), 0
  temporary = path.parent / f'{path.name}.{os.getpid()}'

  def parts() -> Iterator[bytes]:
    header = _Buffer()
    about = {'descr': dtype.str, 'fortran_order': False, 'shape': (sum(count['documents'] for count in counts),)}
    np.lib.format.write_array_header_1_0(header, about)
    yield b''.join(header)
    for lengths_N in _several(_read_lengths, stages, path):
      yield lengths_N.astype(dtype).tobytes()

  with temporary.open('wb') as file:
    for part in parts():
      file.write(part)
      content.update(part)
      size += len(part)
  temporary.replace(path)
  return {'lengths_size': size, 'lengths_sha256': content.hexdigest()}


class _Buffer(list):
  write = list.append


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
