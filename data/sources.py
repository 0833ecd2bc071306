"""A source of documents, named by a URI, in units that can be read apart from each other and in any order.

    reasoning[:TASK?OPTION=VALUE+TASK] made-up problems with worked solutions (data/reasoning.py); endless
    text:GLOB                          plain UTF-8; a file is one stream, cut into documents at line ends
    jsonl:GLOB[#FIELD]                 .jsonl or .jsonl.gz; FIELD holds the text ('text' if not given)
    parquet:GLOB[#COLUMN]              COLUMN holds the text ('text' if not given)
    arrayrecord:GLOB                   a record is a UTF-8 document
    tfds:NAME[/CONFIG][:SPLIT][#FIELD] a TFDS data set on this machine, or the folder of one; 'train', 'text'

GLOB is local or gs:// (arrayrecord: local) and may hold `**`; files are taken in order of their names. All
errors are DataErrors that name the file and where in it.
"""

import dataclasses
import difflib
import functools
from collections.abc import Iterator

from betarank.data import formats, reasoning, record_formats
from betarank.data.config import DataConfig, DataError, SourceConfig
from betarank.data.formats import Segment

_MOST_UNITS = 256  # a unit becomes a file that the loader keeps open

Unit = tuple[Segment, ...]


@dataclasses.dataclass(frozen=True)
class _Reasoning:
  rest: str
  max_documents: int
  held_out_fraction: float
  smallest_unit = 4096

  @functools.cached_property
  def kinds(self) -> tuple[reasoning.Kind, ...]:
    return reasoning.parse(self.rest)

  def segments(self) -> list[Segment]:
    self.kinds  # noqa: B018 (a URI that can't be used is said here)
    return [Segment('', 0, self.max_documents)]

  def read(self, segment: Segment) -> Iterator[str]:
    for i in range(segment.start, segment.stop):
      problem = reasoning.problem(self.kinds, i)
      if not reasoning.held_out(problem.question, self.held_out_fraction):
        yield problem.document


_KINDS = {
  'reasoning': lambda rest, source, _, held_out: _Reasoning(rest, source.max_documents, held_out),
  'text': lambda rest, _, document_bytes, __: formats.Text(rest, document_bytes),
  'jsonl': lambda rest, *_: formats.Jsonl(*_field(rest)),
  'parquet': lambda rest, *_: record_formats.Parquet(*_field(rest)),
  'arrayrecord': lambda rest, *_: record_formats.ArrayRecord(rest),
  'tfds': lambda rest, *_: record_formats.Tfds(*_field(rest)),
}


def _field(rest: str) -> tuple[str, str]:
  path, _, field = rest.partition('#')
  return path, field or 'text'


class Source:
  """The documents at `config.uri`. The units, and what each holds, depend on the input alone."""

  def __init__(self, config: SourceConfig, document_bytes: int, held_out_fraction: float = 0.0):
    """
    Args:
      document_bytes: where `text` is cut.
      held_out_fraction: of all questions, what `reasoning` leaves out.

    Raises DataError for a URI that can't be understood; looks at no file yet.
    """
    kind, _, rest = config.uri.partition(':')
    if kind not in _KINDS:
      near = difflib.get_close_matches(kind, _KINDS, n=1)
      raise DataError(f'uri {config.uri!r}: no such kind of source {kind!r}; '
                      + (f'did you mean {near[0]}?' if near else f'there are {", ".join(_KINDS)}'))
    if kind == 'reasoning' and not config.max_documents:
      raise DataError(f'uri {config.uri!r} has no end; set max_documents to the number of documents you want')
    if kind != 'reasoning' and not rest:
      raise DataError(f'uri {config.uri!r}: nothing after the kind; write {kind}:PATH')
    self._reader = _KINDS[kind](rest, config, document_bytes, held_out_fraction)

  def units(self) -> list[Unit]:
    """The source cut into at most about 256 parts of similar size, in order."""
    segments = self._reader.segments()
    size = max(self._reader.smallest_unit, -(-sum(s.stop - s.start for s in segments) // _MOST_UNITS))
    units, unit, room = [], [], size
    for segment in segments:
      start = segment.start
      while start < segment.stop:
        stop = min(segment.stop, start + room) if segment.splittable else segment.stop
        unit.append(dataclasses.replace(segment, start=start, stop=stop))
        room -= stop - start
        start = stop
        if room <= 0:
          units.append(tuple(unit))
          unit, room = [], size
    return [*units, tuple(unit)] if unit else units

  def read(self, unit: Unit) -> Iterator[str]:
    """The unit's documents, whole (`text` alone cuts them as it reads) and without empty ones."""
    for segment in unit:
      for document in self._reader.read(segment):
        if document:
          yield document

  def sample(self, max_bytes: int) -> Iterator[str]:
    """Documents of about `max_bytes` in all, taken evenly from the beginnings of all units."""
    units = self.units()
    for unit in units:
      room = max_bytes / len(units)
      for document in self.read(unit):
        yield document
        room -= len(document)
        if room <= 0:
          break


def open_source(config: DataConfig, name: str) -> Source:
  """The source that `config` calls `name`."""
  return Source(config.sources[name], config.document_bytes, config.held_out_fraction)


def cut(text: str, document_bytes: int) -> Iterator[str]:
  """`text` in pieces of at most `document_bytes` (UTF-8), cut at line ends where there are any."""
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
