"""Estimates the time of preparing sources and the size of the result, without preparing anything.

The estimates come from the sizes of the sources' files or, for sources without files, from a sample of documents.
"""

import dataclasses
import math
import time
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from betarank.configs.terminal import short
from betarank.data import formats, prepared, records, sources
from betarank.data.config import DataConfig, DataError
from betarank.data.tokenizer import find
from betarank.data.worker import PIECE_BYTES

# MB of text per second of one core that tokenizes; docs/data.md says how they were measured.
MB_PER_S = {'.json': 0.76, '.model': 2.4}
BYTES_PER_TOKEN = 4.0  # assumed for English text and a large vocabulary
# The documents that are sampled from a source without files: consecutive ones at several places, because generators of
# problems are slow to start.
_PLACES, _DOCUMENTS = 8, 32


class Estimate(NamedTuple):
  """The expected size of a source, and the time of preparing it."""

  files: int  # 0, and so is file_bytes, for a source without files
  file_bytes: int
  unknown_sizes: int  # the number of files whose size isn't known; file_bytes doesn't include them
  text_bytes: float
  pieces: int  # of each split
  machine_s: float  # seconds of the machine that takes longest


def mb_per_s(config: DataConfig) -> float:
  """Returns the rate at which one CPU core is assumed to tokenize, in MB of text per second.

  Raises:
    DataError: the tokenizer that the config names can't be read.
  """
  if config.tokenizer:
    prepared.tokenizer_sha256(config)
  return MB_PER_S['.json' if find(config.tokenizer_path).suffix == '.json' else '.model']


def estimate(config: DataConfig, name: str, machines: int, workers: int, rate: float) -> Estimate:
  """Returns the estimated size of source `name`, and the time that preparing it will take.

  Args:
    config: the settings of the data.
    name: the source.
    machines: the number of machines that share the source.
    workers: the number of processes on each machine.
    rate: MB of text per second of each process.

  Raises:
    DataError: the files of the source can't be read, or its data set isn't on this machine.
  """
  source = sources.open_source(config, name)
  units = [sum(map(sources.segment_bytes, unit)) for unit in source.units()]
  if not source.listing:
    text_bytes, seconds = _from_sample(source)
    units = [size * text_bytes / sum(units) for size in units]
    rate = 1 / (1 / rate + seconds / (text_bytes / 1e6))  # a process first makes or reads the text
  # A unit is the work of one process. So a large file that can't be divided may take longer than all others.
  slowest = max(max(sum(units[part::machines]) / workers, max(units[part::machines], default=0))
                for part in range(machines))
  pieces = sum(math.ceil(size / PIECE_BYTES) for size in units)
  about = source.listing or {'files': 0, 'bytes': 0, 'unknown_sizes': 0}
  return Estimate(about['files'], about['bytes'], about['unknown_sizes'], sum(units), pieces, slowest / rate / 1e6)


def _from_sample(source: sources.Source) -> tuple[float, float]:
  """Estimates the size of a source, and the time of reading it, by reading a sample of its documents.

  Returns (bytes of text in all documents, seconds that one core needs to generate or read all documents).
  """
  whole = sum(segment.stop - segment.start for segment in source.segments)
  parts = []
  for segment in source.segments:
    step = max(_DOCUMENTS, math.ceil((segment.stop - segment.start) / _PLACES))
    parts += [dataclasses.replace(segment, start=start, stop=min(start + _DOCUMENTS, segment.stop))
              for start in range(segment.start, segment.stop, step)]
  start = time.perf_counter()
  texts = [sources.text_of(document) for document in source.read(parts, lambda _: None)]
  seconds = time.perf_counter() - start
  scale = min(whole, source.config.max_documents or whole) / sum(part.stop - part.start for part in parts)
  return max(1, sum(len(text.encode()) for text in texts)) * scale, seconds * scale


def show(config: DataConfig, machines: int, workers: int, rate: float, dollars: float, console: Console) -> None:
  """Prints a table with the estimated size and time of preparing each source, and then the total time and cost.

  machines, workers, rate: as in `estimate`.
  dollars: the price of an hour of one machine; 0 if it isn't known.
  console: where the table is printed.
  """
  table = Table('source', 'files', 'bytes', 'text', 'tokens', 'output', 'pieces', 'hours', box=None)
  for column in table.columns[1:]:
    column.justify = 'right'
  seconds, notes = 0.0, []
  for name, source in config.sources.items():
    if prepared.read_manifest(prepared.folder(config, name)):
      table.add_row(name, *[''] * 6, 'prepared')
      continue
    try:
      found = estimate(config, name, machines, workers, rate)
    except DataError as error:
      if not source.uri.startswith('tfds:'):
        raise
      table.add_row(name, *[''] * 6, '?')  # it may be on the machines that will prepare it
      notes.append(f'{name}: not included: {error}')
      continue
    seconds += found.machine_s
    tokens = found.text_bytes / BYTES_PER_TOKEN
    sizes = found.text_bytes, tokens, tokens * records.token_dtype(config.vocab_size).itemsize
    files = (f'{found.files:,}', short(found.file_bytes)) if found.files else ('', '')
    table.add_row(name, *files, *map(short, sizes), f'{found.pieces:,}', _hours(found.machine_s))
    if found.unknown_sizes:
      notes.append(f'{name}: the server doesn\'t say the sizes of {found.unknown_sizes:,} files; '
                   f'each is assumed to have {short(formats.UNKNOWN_BYTES)} bytes')
    if not found.files:
      notes.append(f'{name}: from a sample of up to {_PLACES * _DOCUMENTS} documents, read on this machine')
    elif source.max_documents:
      notes.append(f'{name}: at most this, because max_documents={source.max_documents:,} may end it earlier')
  console.print(table)
  cost = f'${machines * seconds / 3600 * dollars:,.2f}' if dollars else 'cost unknown: give --dollars_per_hour'
  notes += [
    f'in all {_hours(seconds)} hours on {machines} machine{"s" * (machines > 1)} with {workers} processes each, '
    f'{_hours(seconds * machines * workers)} core hours, {cost}',
    f'assumed: {rate:.3g} MB/s per process (--mb_per_s), {BYTES_PER_TOKEN:g} bytes per token, compressed text is '
    f'{formats.EXPANSION} times its file; the tokenizer\'s training and finish are not included. Nothing was written.']
  for note in notes:
    print(note)


def _hours(seconds: float) -> str:
  return f'{seconds / 3600:,.3g}' if seconds < 3.6e6 else f'{seconds / 3600:,.0f}'
