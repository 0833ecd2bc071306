"""Reads sources of documents. A source is named by a URI, and is divided into units that can be read in any order.

    reasoning[:TASK?OPTION=VALUE+TASK] generated problems with worked solutions (data/reasoning.py), without end
    text:FILES                         plain UTF-8; each file is one stream, cut into documents at line ends
    jsonl:FILES[#FIELD]                each line is an object; FIELD holds the text (default 'text')
    csv:FILES[#COLUMN]                 files with a header line; .tsv files are separated by tabs
    parquet:FILES[#COLUMN]             COLUMN holds the text
    arrayrecord:FILES                  each record is a UTF-8 document
    tfds:NAME[/CONFIG][:SPLIT][#FIELD] a TFDS data set on this machine, or its folder; SPLIT is 'train' by default

FILES is a path, a glob that may contain `**`, or a folder. It may be local, gs://, s3://, hf:// or anything else that
fsspec reads (data/files.py). Text, JSON Lines and CSV may be compressed with gzip, bz2, zstd or xz, which is recognized
by the content. FIELD names a field of each record: one that holds text or the messages of a chat, OUTER.INNER for a
field inside another field, or PROMPT+ANSWER for instruction data (data/fields.py). All errors are DataErrors that name
the file and the place in it.
"""

import concurrent.futures
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from betarank.data import fields, files, formats, reasoning, record_formats
from betarank.data.config import DataConfig, DataError, SourceConfig
from betarank.data.fields import Dialogue
from betarank.data.formats import Segment
from betarank.data.storage import is_remote

UNIT_BYTES = 16 * 2**20  # the approximate smallest size of a unit
MOST_UNITS = 8192  # enough to share a large source between many machines; a unit of 2 TB has 250 MB
_PROBLEM_BYTES = 4096.0  # the assumed size of a generated problem
_PLACES, _PLACE_BYTES = 1024, 2**16  # a sample is read at no more than 1024 places, at least 64 KiB at each
_PLACES_AT_ONCE = 16  # remote files are sampled at so many places at the same time

Unit = tuple[Segment, ...]
Document = str | Dialogue


@dataclasses.dataclass(frozen=True)
class _Reasoning:
  rest: str
  max_documents: int
  held_out_fraction: float

  @functools.cached_property
  def kinds(self) -> tuple[reasoning.Kind, ...]:
    return reasoning.parse(self.rest)

  def segments(self) -> list[Segment]:
    self.kinds  # noqa: B018 (raises an error if the URI can't be used)
    return [Segment('', 0, self.max_documents, item_bytes=_PROBLEM_BYTES)]

  def read(self, segment: Segment) -> Iterator[str]:
    for i in range(segment.start, segment.stop):
      problem = reasoning.problem(self.kinds, i)
      if not reasoning.held_out(problem.question, self.held_out_fraction):
        yield problem.document


def split_uri(uri: str) -> tuple[str, str, str]:
  """Returns (kind, path, field) of a source's URI. If the URI names no field, the field is 'text'."""
  kind, _, rest = uri.partition(':')
  path, _, field = rest.partition('#')
  return kind, path, field or 'text'


def masked(source: SourceConfig) -> bool:
  """Returns True if only parts of the source's documents count in the loss."""
  return fields.masked(split_uri(source.uri)[2], source.template)


class BadRows:
  """Counts the rows that were skipped because they can't be used. Raises DataError if there are more than `limit`.

  Attributes:
    count: the number of bad rows so far.
    last: the error message of the last bad row.
  """

  def __init__(self, limit: int):
    self.limit, self.count, self.last = limit, 0, ''

  def __call__(self, error: DataError) -> None:
    self.add(1, str(error))

  def add(self, count: int, last: str) -> None:
    """Adds `count` skipped rows. Raises DataError if there are now more than the limit.

    last: the error message of the last of these rows.
    """
    self.count, self.last = self.count + count, last or self.last
    if self.count > self.limit:
      raise DataError(f'{self.last}; or skip such rows: max_bad_rows=N of the source' if not self.limit else
                      f'{self.count} bad rows, more than max_bad_rows={self.limit}; the last: {self.last}')


class Source:
  """The documents at `config.uri`, divided into units of work.

  The division into units depends only on the input, not on the number of workers.
  """

  def __init__(self, config: SourceConfig, document_bytes: int, held_out_fraction: float = 0.0):
    """Checks the URI, without looking at files.

    Args:
      config: the settings of the source.
      document_bytes: the largest size in bytes of the documents into which a source of the kind `text` is cut.
      held_out_fraction: the share of questions that a source of the kind `reasoning` leaves out.

    Raises:
      DataError: the URI or the template isn't valid.
    """
    self.config = config
    kind, path, field = split_uri(config.uri)
    try:
      fields.check_template(field, config.template)
    except ValueError as error:
      raise DataError(f'uri {config.uri!r}: its {error}') from None
    readers: dict[str, Callable[[], Any]] = {
      'reasoning': lambda: _Reasoning(config.uri.partition(':')[2], config.max_documents, held_out_fraction),
      'text': lambda: formats.Text(config.uri.partition(':')[2], document_bytes),
      'jsonl': lambda: formats.Jsonl(path, fields.Fields(field, config.template)),
      'csv': lambda: formats.Csv(path, fields.Fields(field, config.template)),
      'parquet': lambda: record_formats.Parquet(path, fields.Fields(field, config.template)),
      'arrayrecord': lambda: record_formats.ArrayRecord(path),
      'tfds': lambda: record_formats.Tfds(path, fields.Fields(field, config.template)),
    }
    if kind not in readers:
      near = difflib.get_close_matches(kind, readers, n=1)
      raise DataError(f'uri {config.uri!r}: no such kind of source {kind!r}; '
                      + (f'did you mean {near[0]}?' if near else f'there are {", ".join(readers)}'))
    if kind == 'reasoning' and not config.max_documents:
      raise DataError(f'uri {config.uri!r} has no end; set max_documents to the number of documents you want')
    if kind != 'reasoning' and not path:
      raise DataError(f'uri {config.uri!r}: nothing after the kind; write {kind}:PATH')
    self._reader = readers[kind]()

  @functools.cached_property
  def segments(self) -> list[Segment]:
    """All segments of the source, in order. The files are examined at the first use only."""
    return self._reader.segments()

  @property
  def listing(self) -> dict[str, Any]:
    """A description of the source's files; {} for a source without files.

    The keys are 'files' and 'empty_files' (the numbers of files with and without content), 'bytes' (the size of all
    files), 'unknown_sizes' (the number of files whose size isn't known, which 'bytes' leaves out) and 'sha256' (a hash
    of their names and sizes).
    """
    if not isinstance(self._reader, formats.FileReader):
      return {}
    found: files.Found = self._reader.found
    names = json.dumps([[file.path, file.size] for file in found.files]).encode()
    return {'files': len(found.files), 'empty_files': found.empty, 'bytes': sum(file.size or 0 for file in found.files),
            'unknown_sizes': sum(file.size is None for file in found.files),
            'sha256': hashlib.sha256(names).hexdigest()}

  def units(self) -> list[Unit]:
    """Divides the source into units of similar size, and returns them in order.

    There are at most about MOST_UNITS units.
    """
    size = max(UNIT_BYTES, self.total_bytes / MOST_UNITS)
    units, unit, room = [], [], size
    for segment in self.segments:
      start = segment.start
      while start < segment.stop:
        stop = segment.stop
        if segment.splittable:
          stop = min(stop, start + max(1, round(room / segment.item_bytes)))
        part = dataclasses.replace(segment, start=start, stop=stop)
        unit.append(part)
        room -= segment_bytes(part)
        start = stop
        if room < segment.item_bytes / 2:
          units.append(tuple(unit))
          unit, room = [], size
    return [*units, tuple(unit)] if unit else units

  def read(self, unit: Iterable[Segment], bad_rows: Callable[[DataError], None] | None = None) -> Iterator[Document]:
    """Yields the documents of a unit, except empty ones. Long documents are cut only if the kind of source is `text`.

    bad_rows: called with the error of each row that can't be used. None means that the first such error is raised.
    """
    bad_rows = bad_rows or BadRows(0)
    for segment in unit:
      for document in self._reader.read(segment):
        if isinstance(document, DataError):
          bad_rows(document)
        elif document:
          yield document

  @property
  def total_bytes(self) -> float:
    """The approximate size of the source in bytes."""
    return sum(segment_bytes(segment) for segment in self.segments)

  def sample(self, max_bytes: float, held_out: float = 0.0) -> Iterator[str]:
    """Yields texts of about `max_bytes` bytes in all, from places that are spread evenly over the source.

    held_out: 0 yields the sample. Otherwise, the method yields about this many bytes of other text instead: at each
      place, the texts that follow those of the sample.
    """
    bad_rows = BadRows(self.config.max_bad_rows)
    ranges = self._ranges(max_bytes)
    room, skipped = (held_out, max_bytes) if held_out else (max_bytes, 0.0)

    def read(part: list[Segment]) -> list[str]:
      texts = map(text_of, self.read(part, bad_rows))
      return list(_between(texts, skipped / len(ranges), room / len(ranges)))

    if self.segments and is_remote(self.segments[0].path):
      with concurrent.futures.ThreadPoolExecutor(_PLACES_AT_ONCE) as pool:
        for texts in pool.map(read, ranges):
          yield from texts
    else:
      for texts in map(read, ranges):
        yield from texts

  def _ranges(self, max_bytes: float) -> list[list[Segment]]:
    """Divides the source into parts of about equal size, and returns the segments of each part.

    A sample consists of the texts at the beginning of each part. Larger samples have more parts, up to _PLACES. If
    the sample is the whole source, there is one part.

    max_bytes: the size of the sample in bytes.
    """
    total = self.total_bytes
    count = 1 if max_bytes >= total else max(1, min(_PLACES, int(max_bytes / _PLACE_BYTES)))
    size, at = max(total, 1) / count, 0.0
    ranges: list[list[Segment]] = [[] for _ in range(count)]
    for segment in self.segments:
      begin, at = at, at + segment_bytes(segment)
      if not segment.splittable:
        ranges[min(count - 1, int(begin / size))].append(segment)
        continue
      start = segment.start
      for index in range(min(count - 1, int(begin / size)), count):
        stop = min(segment.stop, segment.start + round(((index + 1) * size - begin) / segment.item_bytes))
        stop = segment.stop if index == count - 1 else stop
        if stop > start:
          ranges[index].append(dataclasses.replace(segment, start=start, stop=stop))
          start = stop
        if start >= segment.stop:
          break
    return [part for part in ranges if part]


def _between(texts: Iterable[str], skipped: float, room: float) -> Iterator[str]:
  """Skips texts of about `skipped` bytes in all, then yields texts of about `room` bytes in all."""
  for text in texts:
    size = len(text.encode())
    if skipped > 0:
      skipped -= size
      continue
    yield text if size <= room else text[:max(1, int(room * len(text) / size))]
    room -= size
    if room <= 0:
      return


def segment_bytes(segment: Segment) -> float:
  """Returns the approximate size of a segment in bytes."""
  return (segment.stop - segment.start) * segment.item_bytes


@functools.lru_cache(maxsize=64)
def open_source(config: DataConfig, name: str) -> Source:
  """Returns source `name` of `config`. Repeated calls return the same object, so that files are examined only once."""
  return Source(config.sources[name], config.longest_document, config.held_out_fraction)


@contextlib.contextmanager
def named(name: str):
  """Adds the source's name to the message of any DataError raised inside the block."""
  try:
    yield
  except DataError as error:
    raise DataError(f'source {name!r}: {error}') from None


def text_of(document: Document) -> str:
  return document.text if isinstance(document, Dialogue) else document


def cut(document: Document, document_bytes: int) -> Iterator[Document]:
  """Yields a document in pieces of at most `document_bytes` bytes (UTF-8), cut at line ends if possible.

  A piece of a Dialogue is left out if no part of it counts in the loss.
  """
  if isinstance(document, str):
    yield from _cut_text(document, document_bytes)
    return
  piece: list[tuple[str, bool]] = []
  room = document_bytes
  for text, trained in document.parts:
    for part in _cut_text(text, document_bytes):
      size = len(part.encode())
      if size > room:
        if any(counts for _, counts in piece):
          yield Dialogue(tuple(piece))
        piece, room = [], document_bytes
      piece.append((part, trained))
      room -= size
  if any(counts for _, counts in piece):
    yield Dialogue(tuple(piece))


def _cut_text(text: str, document_bytes: int) -> Iterator[str]:
  if len(text) * 4 <= document_bytes or len(data := text.encode()) <= document_bytes:
    yield text
    return
  start = 0
  while len(data) - start > document_bytes:
    block = data[start:start + document_bytes]
    stop = start + formats.cut_point(block)
    yield data[start:stop].decode()
    start = stop
  yield data[start:].decode()
