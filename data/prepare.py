"""Tokenizes a source once, in parallel, into the shards that data/prepared.py reads.

The source is divided into numbered units (data/sources.py), which are independent, so that processes and machines can
share the work. Each unit is written to `partial/` in pieces. A piece consists of shards and a marker, which is written
last (data/worker.py). A run that was killed resumes after the last complete piece of each unit. The result is the same,
byte for byte, as if one process had prepared the source without interruption. The last step, `finish`, turns the shards
into a data set: it renames the shards, and writes the documents' lengths and the manifest.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from etils import epath

from betarank.configs import buckets
from betarank.configs.files import write_atomically
from betarank.data import prepared, sources, storage
from betarank.data.config import DataConfig, DataError
from betarank.data.publish import delete_pieces, empty_split, number_of_documents, publish
from betarank.data.tokenizer import read_tokenizer
from betarank.data.worker import Job, Marker, Worker

_FEW_DOCUMENTS = 2000  # if there are no more documents than this, each is divided rather than leaving a split empty
_REPORT_S = 1.0


class Progress(NamedTuple):
  """The progress of preparing a source."""

  units: int
  units_done: int
  total_bytes: float  # the approximate size of the input
  done_bytes: float
  documents: int  # those in complete pieces; the same for tokens and bad_rows
  tokens: int
  bad_rows: int


Report = Callable[[Progress], None]
Asked = Callable[[], bool]  # returns True once the work must stop


class _Preparation:
  """A source that is being prepared: its settings, its units of work, and the folder where its shards are written."""

  def __init__(self, config: DataConfig, name: str):
    self.config, self.name = config, name
    self.tokenizer = read_tokenizer(config.tokenizer_path, config.vocab_size)
    self.where = prepared.folder(config, name)
    self.wanted = prepared.settings(config, name, self.tokenizer.sha256)
    self.job = Job(name, config, str(self.where / 'partial'))

  def finished(self) -> dict[str, Any] | None:
    """Returns the manifest if the source is prepared, else None. Deletes pieces that a killed run has left behind.

    Raises:
      DataError: the source was prepared with other settings or from other files, or the prepared data is damaged.
    """
    manifest = prepared.read_manifest(self.where)
    if manifest:
      prepared.check_settings(self.config, self.where, manifest['settings'], self.wanted)
      prepared.check_input(self.where, manifest, self._listing_now())
      prepared.check_files(self.where, manifest)
      delete_pieces(self.where)  # there are some if a run was killed after it had written the manifest
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
      prepared.check_settings(self.config, self.where, plan['settings'], now)
      self.units = [tuple(sources.Segment(*segment) for segment in unit) for unit in plan['units']]
      return
    self.units = source.units()
    units = [[dataclasses.astuple(segment) for segment in unit] for unit in self.units]
    write_atomically(partial / 'plan.json', json.dumps({'settings': now, 'units': units}).encode())

  def markers(self, job: Job) -> dict[int, list[Marker]]:
    """Returns {number of a unit: the markers of the unit's complete pieces, in order}.

    A unit is a numbered part of the source, and is written in pieces. A marker is the JSON file that completes a piece.
    """
    names = [name for name in storage.open_folder(job.folder).sizes()
             if name.startswith('unit-') and name.endswith('.json')]
    read = lambda name: json.loads((epath.Path(job.folder) / name).read_text())
    found: dict[int, list[Marker]] = {}
    # Sorted by number: as text, the name of piece 1000 comes before that of piece 101.
    for marker in sorted(storage.several(read, names, job.folder), key=lambda m: (m['unit'], m['piece'])):
      pieces = found.setdefault(marker['unit'], [])
      if marker['piece'] == len(pieces):
        pieces.append(marker)
    return found


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
  """Tokenizes part number `part` (0 to parts - 1) of source `name`. Does nothing if the source is already prepared.

  The part consists of the units of work with the numbers part, part + parts, part + 2 * parts and so on.
  Processes on other machines may work on other parts at the same time. For the other arguments and the errors, see
  `prepare_source`.

  asked: a function that returns True once the work should stop. Each process first completes the piece that it writes.

  Returns False if the work stopped because `asked` returned True.
  """
  preparation = _Preparation(config, name)
  if preparation.finished():
    return True
  with sources.named(name):
    preparation.open()
    mine = range(part, len(preparation.units), parts)
    return _work(preparation, preparation.job, mine, workers or os.cpu_count() or 1, report, stop_early=parts == 1,
                 asked=asked)


def finish(config: DataConfig, name: str, *, workers: int | None = None) -> dict[str, Any]:
  """Turns the tokenized shards of source `name` into a data set, and returns the set's manifest.

  If there are so few documents that a split would be empty, each document is divided between the splits, and all are
  tokenized again.

  workers: the number of processes for tokenizing again; None means one.

  Raises:
    DataError: not everything is tokenized, a split is empty, or there are too many bad rows.
  """
  preparation = _Preparation(config, name)
  if manifest := preparation.finished():
    return manifest
  with sources.named(name):
    if not (preparation.where / 'partial' / 'plan.json').exists():
      raise DataError(f'{preparation.where}: nothing is prepared yet; run: betarank data prepare --config=...')
    preparation.open()
    markers = _kept(preparation, preparation.job)
    job = preparation.job
    if config.validation_fraction and empty_split(markers) and number_of_documents(markers) <= _FEW_DOCUMENTS:
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
  buckets.register()
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
    """Returns True if no further unit needs to be tokenized.

    This is so if all units are done, or if the units before the first unfinished unit have at least max_documents
    documents.
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
    job: the settings that each worker process gets.
    workers, report: as in `prepare_source`.
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


def _kept(preparation: _Preparation, job: Job) -> list[Marker]:
  """Returns the markers of the pieces that the data set will consist of, in order. Each marker describes a piece.

  These pieces contain the first max_documents documents of the source, or all documents if max_documents is 0. If the
  last of these pieces has too many documents, it is written again with fewer.

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
