"""Reads ranges of files, on a disk or in a bucket, without copying the files.

    folder = open_folder('gs://bucket/data/main/1.0.0')
    wait = folder.start('x', 4096, 8192)     # requested at once; many requests may run at the same time
    content = wait()

A bucket is read with TensorStore, which Orbax depends on. TensorStore's threads don't hold the GIL, and keep
connections open. Requests that are refused (429, 5xx), cut short or not answered are repeated, with growing pauses. A
request that still fails after about five minutes raises a DataError that names the file and the reason.
"""

import collections
import concurrent.futures
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from betarank.configs.errors import STORE_ERRORS, one_line
from betarank.configs.parser import install_hint
from betarank.data.config import DataError

REQUESTS_AT_ONCE = 64  # per process. A request takes 20 to 50 ms, so this allows more than 1000 per second.
RETRIES = {'max_retries': 16, 'initial_delay': '500ms', 'max_delay': '30s'}  # about five minutes in all
_SILENT_S = 30  # a request that receives no byte for so long is repeated
_CALLS_AT_ONCE = 32  # calls by `several` at the same time
_DEADLINE_S = 900.0  # the limit for one read with all its retries, which should never be reached
_OPEN_FILES = 256
_PIECE = 2**24  # large files are read in pieces of so many bytes
_PIECES_AT_ONCE = 8
_SCHEMES = ('gs', 's3')
_Wait = Callable[[], bytes]


class Folder(Protocol):
  """A folder whose files can be read by range.

  Attributes:
    path: the path of the folder.
  """

  path: Any

  def sizes(self) -> dict[str, int]:
    """Lists the folder, and returns {file: size in bytes}. Raises DataError if the folder can't be read."""

  def start(self, name: str, begin: int, end: int) -> _Wait:
    """Requests the bytes [begin, end) of a file, without waiting for them.

    Returns a function that waits for the bytes and returns them. The function returns fewer bytes if the file ends
    before `end`. It raises DataError if the bytes can't be read.
    """


def is_remote(path: Any) -> bool:
  return '://' in str(path)


def open_folder(path: Any) -> Folder:
  """Returns the Folder at `path`: local, gs:// or s3://. Raises DataError for any other kind of path."""
  return _BucketFolder(str(path)) if is_remote(path) else _LocalFolder(pathlib.Path(path))


def read_pieces(folder: Folder, name: str, size: int) -> Iterator[bytes]:
  """Yields the first `size` bytes of a file in consecutive pieces. Further pieces are requested before they are needed.
  """
  waiting: collections.deque[_Wait] = collections.deque()
  begins = iter(range(0, size, _PIECE))
  while True:
    for begin in itertools.islice(begins, _PIECES_AT_ONCE - len(waiting)):
      waiting.append(folder.start(name, begin, min(size, begin + _PIECE)))
    if not waiting:
      return
    yield waiting.popleft()()


def several(function: Callable, items: list, place: Any) -> Iterator:
  """Yields function(item) for each item, in order.

  place: the path that the calls access. If it is in a bucket, several calls run at the same time, because each takes
    long.
  """
  if not is_remote(place):
    yield from map(function, items)
    return
  with concurrent.futures.ThreadPoolExecutor(_CALLS_AT_ONCE) as pool:
    for start in range(0, len(items), 4 * _CALLS_AT_ONCE):
      yield from pool.map(function, items[start:start + 4 * _CALLS_AT_ONCE])


@functools.lru_cache(maxsize=_OPEN_FILES)
def _open_file(path: str):
  # A file that leaves the cache is closed when the last thread that reads from it is done.
  return open(path, 'rb', buffering=0)


class _LocalFolder:

  def __init__(self, path: pathlib.Path):
    self.path = path

  def sizes(self) -> dict[str, int]:
    try:
      with os.scandir(self.path) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    except FileNotFoundError:
      return {}

  def start(self, name: str, begin: int, end: int) -> _Wait:
    return lambda: self._read(name, begin, end)

  def _read(self, name: str, begin: int, end: int) -> bytes:
    path = str(self.path / name)
    try:
      file = _open_file(path)  # the local reference keeps it open while this thread reads
      content = os.pread(file.fileno(), end - begin, begin)
      while 0 < len(content) < end - begin:  # one read returns at most 2 GB
        more = os.pread(file.fileno(), end - begin - len(content), begin + len(content))
        if not more:
          break
        content += more
      return content
    except OSError as error:
      raise DataError(f'{path}: could not be read ({error.strerror or error})') from None


@functools.cache
def _context():
  """Returns the TensorStore context with the limits on requests and retries.

  All folders share it, so that the limit on simultaneous requests holds for the whole process.
  """
  import tensorstore

  os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS', str(_SILENT_S))
  os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES', '1')
  limits = {f'{scheme}_request_concurrency': {'limit': REQUESTS_AT_ONCE} for scheme in ('gcs', 's3')}
  retries = {f'{scheme}_request_retries': RETRIES for scheme in ('gcs', 's3')}
  return tensorstore.Context({**limits, **retries})


class _BucketFolder:

  def __init__(self, path: str):
    if path.partition('://')[0] not in _SCHEMES:
      raise DataError(f'{path}: prepared data is read from a disk, gs:// or s3://; copy it there')
    import tensorstore

    self.path = path.rstrip('/')
    try:
      self._store = tensorstore.KvStore.open(f'{self.path}/', context=_context()).result()
    except STORE_ERRORS as error:
      raise self._failed('', error) from None

  def sizes(self) -> dict[str, int]:
    import fsspec

    try:
      files, path = fsspec.core.url_to_fs(self.path)
      files.invalidate_cache()  # a cached listing wouldn't show files that were written since
      return {item['name'].rpartition('/')[2]: item['size'] for item in files.ls(path, detail=True)
              if item['type'] == 'file'}
    except FileNotFoundError:
      return {}
    except ImportError as error:
      raise DataError(f'{self.path}: {error} ({install_hint(self.path)})') from None
    except STORE_ERRORS as error:
      raise self._failed('', error) from None

  def start(self, name: str, begin: int, end: int) -> _Wait:
    future = self._store.read(name, byte_range=slice(begin, end))

    def wait() -> bytes:
      try:
        found = future.result(timeout=_DEADLINE_S)
      except TimeoutError:
        future.cancel()
        raise self._failed(name, f'no answer within {_DEADLINE_S:.0f} s') from None
      except STORE_ERRORS as error:
        if str(error).startswith('OUT_OF_RANGE'):  # the file ends before the range begins
          return b''
        raise self._failed(name, error) from None
      if found.state == 'missing':
        raise DataError(f'{self.path}/{name}: missing; copy it back, or prepare again')
      return found.value

    return wait

  def _failed(self, name: str, reason: object) -> DataError:
    return DataError(f'{self.path}/{name}: the store failed ({one_line(reason)[:300]}); check the network, the bucket '
                     'and your access to it, then run the same command again')
