"""Readers of text files: plain text, JSON Lines and CSV. Readers of record files are in data/record_formats.py.

A reader has two methods. `segments()` returns the segments that make up the source. `read(segment)` yields the
documents of a segment, or of a part of a segment. If a segment is divided into parts that don't overlap, the parts
together yield each document of the segment exactly once. In place of a line or record that can't be used, `read` yields
a DataError that names the file and the line.
"""

import csv
import dataclasses
import functools
import io
import json
import sys
from collections.abc import Callable, Iterator
from typing import BinaryIO

from betarank.data import files
from betarank.data.config import DataError
from betarank.data.fields import BadValue, Dialogue, Fields, missing_field
from betarank.data.files import find  # noqa: F401 (tasks and eval name their files by the same patterns)

_LINE_BYTES = 256 * 2**20  # the longest line of JSON or CSV, limited because a line must be in memory
EXPANSION = 4  # the assumed size of a compressed file's content, relative to the file
UNKNOWN_BYTES = 16 * 2**20  # the assumed size of a file whose size isn't known

Row = str | Dialogue | DataError


@dataclasses.dataclass(frozen=True)
class Segment:
  """A part of a file: the items from number `start` to number `stop` - 1.

  An item is a byte, a record or a row group, depending on the format.

  splittable: whether a part of the segment can be read without the rest.
  item_bytes: the approximate number of bytes of an item.
  """

  path: str
  start: int
  stop: int
  splittable: bool = True
  item_bytes: float = 1.0


def text_segments(found: files.Found, splittable: bool = True) -> list[Segment]:
  """Returns one segment for each file. The items of a segment are the bytes of the file.

  splittable: whether segments of uncompressed files can be split. Segments of compressed files, and of files whose size
    isn't known, never can.
  """
  kinds = files.in_parallel(lambda file: files.packing(file.path), found.files)
  return [Segment(file.path, 0, file.size or UNKNOWN_BYTES, splittable and not kind and file.size is not None,
                  EXPANSION if kind else 1.0) for file, kind in zip(found.files, kinds)]


def cut_point(block: bytes) -> int:
  """Returns the position at which to cut `block`: after its last line end.

  If there is no line end, this is the position before the last character, whose bytes may be incomplete.

  block: text in UTF-8, which may end within a character.
  """
  if (line_end := block.rfind(b'\n')) >= 0:
    return line_end + 1
  last = len(block) - 1
  while last > max(0, len(block) - 4) and block[last] & 0xC0 == 0x80:
    last -= 1
  return last or len(block)


def unpack_error(path: str, error: Exception) -> DataError:
  return DataError(f'{path}: can\'t be unpacked ({error}); fetch it again')


class FileReader:
  """The base class of all readers of files. The pattern is expanded at the first use, and the list of files is kept."""

  pattern: str
  suffixes: tuple[str, ...] = ()

  @functools.cached_property
  def found(self) -> files.Found:
    return files.look(self.pattern, self.suffixes)


@dataclasses.dataclass(frozen=True)
class Text(FileReader):
  """A reader of plain text. Each file is cut at line ends into documents of at most `document_bytes` bytes."""

  pattern: str
  document_bytes: int
  suffixes = ('.txt', '.text', '.md')

  def segments(self) -> list[Segment]:
    return text_segments(self.found)

  def read(self, segment: Segment) -> Iterator[Row]:
    path = segment.path
    with files.unpacked(path) as file:
      position, stop = 0, sys.maxsize
      try:
        if segment.splittable:
          position, stop = self._boundary(file, segment.start), self._boundary(file, segment.stop)
          file.seek(position)
        block, ended = b'', False
        while position < stop:
          wanted = min(self.document_bytes - len(block), stop - position - len(block))
          new = file.read(wanted)
          ended, block = len(new) < wanted, block + new
          if not block:
            return
          length = len(block) if ended or position + len(block) >= stop else cut_point(block)
          try:
            yield block[:length].decode()
          except UnicodeDecodeError as error:
            yield DataError(f'{path}: not UTF-8 at byte {position + error.start}; convert the file')
          position, block = position + length, block[length:]
      except files.UNPACKING_ERRORS as error:
        raise unpack_error(path, error) from None

  def _boundary(self, file: BinaryIO, offset: int) -> int:
    """Returns the start of the first line that begins at or after `offset`.

    If that line is more than `document_bytes` away, returns the start of the first character at or after `offset`.
    """
    if offset <= 0:
      return 0
    file.seek(offset - 1)
    block = file.read(self.document_bytes)
    if (line_end := block.find(b'\n')) >= 0:
      return offset + line_end
    skip = 1
    while skip < len(block) and skip < 4 and block[skip] & 0xC0 == 0x80:
      skip += 1
    return offset - 1 + min(skip, len(block))


@dataclasses.dataclass(frozen=True)
class Jsonl(FileReader):
  """A reader of JSON Lines, in which each line is an object."""

  pattern: str
  fields: Fields
  suffixes = ('.jsonl', '.json', '.ndjson')

  def segments(self) -> list[Segment]:
    return text_segments(self.found)

  def read(self, segment: Segment) -> Iterator[Row]:
    """Yields the documents of the lines that begin in the segment."""
    path, position = segment.path, segment.start
    with files.unpacked(path) as file:
      try:
        if segment.splittable and position:
          file.seek(position - 1)
          while (skipped := file.readline(2**20)) and not skipped.endswith(b'\n'):
            pass
          position = file.tell()
        number = None if segment.start else 1  # None: the lines before are counted only if an error needs the number
        while position < segment.stop or not segment.splittable:
          line = file.readline(_LINE_BYTES)
          if not line:
            return
          if line.strip():
            yield self._document(line, path, lambda: number or _line_number(path, position))  # noqa: B023
          position += len(line)
          number = number and number + 1
      except files.UNPACKING_ERRORS as error:
        raise unpack_error(path, error) from None

  def _document(self, line: bytes, path: str, number: Callable[[], int]) -> Row:
    if len(line) >= _LINE_BYTES and not line.endswith(b'\n'):
      raise DataError(f'{path}:{number()}: the line is longer than {_LINE_BYTES} bytes; is this JSON Lines?')
    try:
      record = json.loads(line)
      if not isinstance(record, dict):
        raise BadValue(f'expected an object with field {self.fields.names[0]!r}, got {type(record).__name__}')
      return self.fields.document(record)
    except UnicodeDecodeError as error:
      return DataError(f'{path}:{number()}: not UTF-8 at byte {error.start} of the line; convert the file')
    except (ValueError, RecursionError) as error:  # a number with thousands of digits raises ValueError too
      return DataError(f'{path}:{number()}: not JSON ({error}); fix or remove the line')
    except BadValue as error:
      return DataError(f'{path}:{number()}: {error}; name the right field: jsonl:{self.pattern}#FIELD'
                       if str(error).startswith('no field') else f'{path}:{number()}: {error}')


def _line_number(path: str, position: int) -> int:
  with files.opened(path) as file:
    count = 1
    while position > 0 and (block := file.read(min(position, 2**20))):
      count, position = count + block.count(b'\n'), position - len(block)
  return count


@dataclasses.dataclass(frozen=True)
class Csv(FileReader):
  """A reader of CSV files with a header line. In files with the suffix .tsv, tabs separate the fields.

  Quoted fields may contain line ends.
  """

  pattern: str
  fields: Fields
  suffixes = ('.csv', '.tsv')

  def segments(self) -> list[Segment]:
    return text_segments(self.found, splittable=False)

  def read(self, segment: Segment) -> Iterator[Row]:
    path = segment.path
    csv.field_size_limit(_LINE_BYTES)
    with files.unpacked(path) as file:
      # Bytes that aren't UTF-8 become surrogates, which never occur in valid text. So only rows with them are rejected.
      lines = io.TextIOWrapper(file, 'utf-8-sig', errors='surrogateescape', newline='')
      name = path.lower()
      size = 0  # of the current row

      def limited() -> Iterator[str]:
        nonlocal size
        while line := lines.readline(_LINE_BYTES):
          size += len(line)
          if size >= _LINE_BYTES:
            raise DataError(f'{path}:{rows.line_num + 1}: the row is longer than {_LINE_BYTES} bytes; is this CSV?')
          yield line

      rows = csv.DictReader(limited(), delimiter='\t' if '.tsv' in name.rpartition('/')[2] else ',', strict=True)
      try:
        present = rows.fieldnames or []
        for needed in self.fields.names:
          if needed not in present:
            raise missing_field(path, needed, present, f'csv:{self.pattern}')
        while True:
          size = 0
          try:
            yield self._document(next(rows), f'{path}:{rows.line_num}')
          except StopIteration:
            return
          except csv.Error as error:
            yield DataError(f'{path}:{rows.line_num + 1}: not CSV ({error}); fix or remove the line')
      except csv.Error as error:
        raise DataError(f'{path}: not CSV ({error})') from None
      except files.UNPACKING_ERRORS as error:
        raise unpack_error(path, error) from None
      finally:
        lines.detach()

  def _document(self, row: dict[str, str], where: str) -> Row:
    try:
      for name in self.fields.names:
        if row[name] and any('\udc80' <= character <= '\udcff' for character in row[name]):
          raise BadValue(f'field {name!r} is not UTF-8')
      return self.fields.document(row)
    except BadValue as error:
      return DataError(f'{where}: {error}')
