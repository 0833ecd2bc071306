"""Copies prepared data sets from a bucket to a local folder of limited size, if `data.cache_dir` is set.

    CACHE_DIR/FINGERPRINT/FILE     a complete file; it is called FILE.partial while it is copied
                          used     locked while a process reads the set; its mtime is when a process last opened the set
              copying              locked while a process checks or copies a set; other processes wait for it

The operating system releases the locks when a process ends. To make room, sets that no process uses are deleted.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping

from betarank.configs.files import flush
from betarank.data import storage
from betarank.data.config import DataError

_IN_USE: dict[pathlib.Path, object] = {}  # a set that this process uses -> the open file that holds its lock


def local_copy(source: storage.Folder, files: Mapping[str, int], place: str, key: str, limit: int) -> storage.Folder:
  """Copies files from `source` to the folder PLACE/KEY, unless they are there already. Returns PLACE/KEY.

  Args:
    source: the folder to copy from.
    files: the files to copy, {name: size in bytes}.
    place: the folder of all copies.
    key: the name of this copy's folder in `place`.
    limit: the largest allowed size of all copies together, in bytes.

  Raises:
    DataError: the files don't fit within `limit`, or the disk is full.
  """
  here = pathlib.Path(place) / key
  try:
    here.parent.mkdir(parents=True, exist_ok=True)
    with _locked(here.parent / 'copying'):
      here.mkdir(exist_ok=True)
      if here not in _IN_USE:
        _IN_USE[here] = used = open(here / 'used', 'ab')  # noqa: SIM115 (open until the process ends)
        fcntl.flock(used, fcntl.LOCK_SH)
        os.utime(here / 'used')
      missing = _missing(here, files)
      if missing:
        _make_room(here, sum(missing.values()), limit)
      for name, size in missing.items():
        _copy(source, name, size, here)
  except OSError as error:
    reason = 'no space left' if error.errno == errno.ENOSPC else error.strerror or str(error)
    raise DataError(f'{here}: {reason}; free some, choose another data.cache_dir, or leave it empty to read the data '
                    'where they are') from None
  return storage.open_folder(here)


def _missing(here: pathlib.Path, files: Mapping[str, int]) -> dict[str, int]:
  there = storage.open_folder(here).sizes()
  return {name: size for name, size in files.items() if there.get(name) != size}


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
  with open(path, 'ab') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _copy(source: storage.Folder, name: str, size: int, here: pathlib.Path) -> None:
  partial = here / f'{name}.partial'
  try:
    with open(partial, 'wb') as file:
      for piece in storage.read_pieces(source, name, size):
        file.write(piece)
    flush(partial)  # before it gets its name, because from then on only its size is checked
    partial.replace(here / name)
    flush(here)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


def _size(folder: pathlib.Path) -> int:
  return sum(storage.open_folder(folder).sizes().values())


def _make_room(here: pathlib.Path, more: int, limit: int) -> None:
  """Makes room in the cache. Deletes incomplete copies, and then, if needed, data sets that no process uses.

  The least recently used data sets are deleted first.

  here: the folder of the data set that needs room. It isn't deleted.
  more: the number of bytes that will be copied to `here`.
  limit: the largest size of all data sets together, in bytes.

  Raises:
    DataError: the data set doesn't fit, even after deleting all others that aren't in use.
  """
  for partial in here.parent.glob('*/*.partial'):
    partial.unlink()
  others = sorted((set_ for set_ in here.parent.iterdir() if set_ != here and (set_ / 'used').exists()),
                  key=lambda set_: (set_ / 'used').stat().st_mtime)
  total = _size(here) + more + sum(map(_size, others))
  for other in others:
    if total <= limit:
      return
    with open(other / 'used', 'ab') as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        continue
      total -= _size(other)
      shutil.rmtree(other)
  if total > limit:
    raise DataError(f'{here.parent}: the set takes {total / 1e9:.2f} GB with those in use, more than data.cache_gb='
                    f'{limit / 1e9:g}; raise it, or leave data.cache_dir empty to read the data where they are')
