"""Writes files atomically: a reader sees either the old content or the complete new content.

data, runtime, eval and launch all need this module, so it is in configs, which every package may import.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import pathlib
from typing import IO

from etils import epath


def write_atomically(path: str | os.PathLike, content: str | bytes | memoryview) -> None:
  """Writes `content` to the file `path`. If this fails, `path` stays as it was. Text is encoded as UTF-8.

  `path` is local or in a bucket; its folder is created if needed. In a bucket, readers see an object only when its
  upload is complete. A local file is first written to a temporary file in the same folder. It is flushed to the disk
  before it replaces the old file, and its folder afterwards. If `path` is a symbolic link, the link itself is replaced.

  Several processes may write the same local file at once. They can't mix their content: the later one replaces the file
  of the earlier one. A killed process leaves its temporary file, which is used when the same file is written again.
  """
  content = content.encode() if isinstance(content, str) else content
  if '://' in str(path):
    epath.Path(path).write_bytes(content)
    return
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with _temporary(path) as file:
    try:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
      os.replace(file.name, path)
    except BaseException:
      if _has_its_name(file):  # not if Ctrl-C arrives after the file was renamed; another writer may use the name then
        os.unlink(file.name)
      raise
  flush(path.parent)


def _temporary(path: pathlib.Path) -> IO[bytes]:
  """Opens the first of the files .NAME.0.tmp, .NAME.1.tmp, ... that no other writer has open. Locks and empties it.

  The lock ends when the file is closed, and when the process is killed.
  """
  for number in itertools.count():
    file = open(path.parent / f'.{path.name}.{number}.tmp', 'ab')  # noqa: SIM115 (closed by the caller)
    with contextlib.suppress(BlockingIOError):  # another writer has it
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if _has_its_name(file):  # else another writer has renamed or deleted it before it was locked here
        file.truncate(0)
        return file
    file.close()


def _has_its_name(file: IO[bytes]) -> bool:
  """Returns False if an open file has been renamed or deleted. Its name may belong to another file then."""
  try:
    return os.path.samestat(os.fstat(file.fileno()), os.lstat(file.name))
  except FileNotFoundError:
    return False


def flush(path: str | os.PathLike) -> None:
  """Flushes a local file or folder to the disk. Before, a power failure may lose a file's content or a folder's names.

  Raises OSError if the disk fails.
  """
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno != errno.EINVAL:  # this file system can't flush folders
      raise
  finally:
    os.close(descriptor)
