"""Readers of text files: plain text and JSON Lines. data/record_formats.py has those of records.

A reader has `segments()`, all there is to read, and `read(segment)`, the documents of any part of one; parts
that cover a segment without overlap give each document once.
"""

import contextlib
import dataclasses
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from etils import epath

from betarank.data.config import DataError

_LINE_BYTES = 256 * 2**20  # the longest JSON line: it must be parsed in one piece


@dataclasses.dataclass(frozen=True)
class Segment:
  """A part of a file; what start and stop count (bytes, records, row groups) is the reader's own."""

  path: str
  start: int
  stop: int
  splittable: bool = True


def find(pattern: str) -> list[str]:
  """The files that match, by name. Raises DataError if there are none."""
  if '://' in pattern:
    fixed = re.split(r'[^/]*[*?\[]', pattern, maxsplit=1)[0]
    try:
      found = epath.Path(fixed).glob(pattern[len(fixed):]) if fixed != pattern else [epath.Path(pattern)]
      paths = [str(path) for path in found if path.exists()]
    except ImportError as error:
      raise DataError(f'{pattern}: {error} (pip install gcsfs for gs://)') from None
  else:
    paths = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]  # no pipes, no devices
  if not paths:
    raise DataError(f'{pattern}: no file matches; check the path (quote wildcards from the shell)')
  return sorted(paths)


def sized(pattern: str) -> list[tuple[str, int]]:
  files = [(path, epath.Path(path).stat().length) for path in find(pattern)]
  for path, size in files:
    if not size:
      raise DataError(f'{path}: the file is empty; remove it, or fetch it again')
  return files


def cut_point(block: bytes) -> int:
  """Where in `block` to end a piece: after the last line end or, without one, between two characters."""
  if (line_end := block.rfind(b'\n')) >= 0:
    return line_end + 1
  last = len(block) - 1
  while last > max(0, len(block) - 4) and block[last] & 0xC0 == 0x80:
    last -= 1
  return last or len(block)


def utf8(raw: bytes, path: str, where: str) -> str:
  try:
    return raw.decode()
  except UnicodeDecodeError as error:
    raise DataError(f'{path}: not UTF-8 at {where}byte {error.start}; convert the file') from None


def checked_text(text: object, where: Callable[[], str], field: str) -> str:
  if not isinstance(text, str):
    raise DataError(f'{where()}: field {field!r} must be text, got {type(text).__name__}')
  # JSON can spell half a surrogate pair, which no UTF-8 text can hold: it becomes U+FFFD.
  return text if text.isascii() else text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def missing_field(where: str, field: str, present: list[str], uri: str) -> DataError:
  names = ', '.join(sorted(present))
  return DataError(f'{where}: no field {field!r}, only {names}; name the right one: {uri}#FIELD')


@dataclasses.dataclass(frozen=True)
class Text:
  pattern: str
  document_bytes: int
  smallest_unit = 16 * 2**20

  def segments(self) -> list[Segment]:
    return [Segment(path, 0, size) for path, size in sized(self.pattern)]

  def read(self, segment: Segment) -> Iterator[str]:
    with epath.Path(segment.path).open('rb') as file:
      position, stop = self._boundary(file, segment.start), self._boundary(file, segment.stop)
      file.seek(position)
      block = b''
      while position < stop:
        block += file.read(min(self.document_bytes - len(block), stop - position - len(block)))
        length = len(block) if position + len(block) >= stop else cut_point(block)
        try:
          yield block[:length].decode()
        except UnicodeDecodeError as error:
          raise DataError(f'{segment.path}: not UTF-8 at byte {position + error.start}; convert the '
                          'file') from None
        position, block = position + length, block[length:]

  def _boundary(self, file: BinaryIO, offset: int) -> int:
    """The first line start from `offset` on; the first character's if that is further than a document."""
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
class Jsonl:
  pattern: str
  field: str
  smallest_unit = 16 * 2**20

  def segments(self) -> list[Segment]:
    return [Segment(path, 0, size, not path.endswith('.gz')) for path, size in sized(self.pattern)]

  def read(self, segment: Segment) -> Iterator[str]:
    """The documents of the lines that start in the segment."""
    path, position = segment.path, segment.start
    with contextlib.ExitStack() as stack:
      # fsspec's own readline takes no limit.
      file = stack.enter_context(io.BufferedReader(epath.Path(path).open('rb'), 2**20))
      if not segment.splittable:
        file = stack.enter_context(gzip.open(file))
      elif position:
        file.seek(position - 1)
        while (skipped := file.readline(2**20)) and not skipped.endswith(b'\n'):
          pass
        position = file.tell()
      number = None if segment.start else 1  # counting lines up to here is for errors only
      while position < segment.stop or not segment.splittable:
        try:
          line = file.readline(_LINE_BYTES)
        except (OSError, EOFError, zlib.error) as error:  # gzip: not a gzip file, cut short, bad checksum, garbage
          raise DataError(f'{path}: can\'t be unpacked ({error}); fetch it again') from None
        if not line:
          return
        if line.strip():
          yield self._document(line, path, lambda: number or _line_number(path, position))  # noqa: B023
        position += len(line)
        number = number and number + 1

  def _document(self, line: bytes, path: str, number: Callable[[], int]) -> str:
    if len(line) >= _LINE_BYTES and not line.endswith(b'\n'):
      raise DataError(f'{path}:{number()}: the line is longer than {_LINE_BYTES} bytes; is this JSON Lines?')
    try:
      record = json.loads(line)
    except UnicodeDecodeError as error:
      at = f'{path}:{number()}'
      raise DataError(f'{at}: not UTF-8 at byte {error.start} of the line; convert the file') from None
    except (ValueError, RecursionError) as error:  # ValueError: also for a number of thousands of digits
      raise DataError(f'{path}:{number()}: not JSON ({error}); mend or remove the line') from None
    if not isinstance(record, dict):
      raise DataError(f'{path}:{number()}: expected an object with field {self.field!r}, got '
                      f'{type(record).__name__}')
    if self.field not in record:
      raise missing_field(f'{path}:{number()}', self.field, list(record), f'jsonl:{self.pattern}')
    return checked_text(record[self.field], lambda: f'{path}:{number()}', self.field)


def _line_number(path: str, position: int) -> int:
  with epath.Path(path).open('rb') as file:
    count = 1
    while position > 0 and (block := file.read(min(position, 2**20))):
      count, position = count + block.count(b'\n'), position - len(block)
  return count
