"""Writes files atomically: a reader sees either the old content or the complete new content.

data, runtime, eval and launch all need this module, so it is in configs, which every package may import.
"""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from typing import IO

from etils import epath


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike) -> Iterator[IO[bytes]]:
  """Yields a binary file that replaces `path` when the block ends. If the block raises, `path` stays as it was.

  Use this for content that doesn't fit in memory. `path` is local or in a bucket; its folder is created if needed.
  Until the block ends, the content is in the same folder under a unique temporary name, `.NAME.RANDOM.tmp`. Two writers
  therefore can't mix their content: the later one replaces the file of the earlier one. The temporary file remains only
  if the process is killed.

  A local file is flushed to the disk before it replaces the old file, and its folder afterwards. If `path` is a
  symbolic link, the link itself is replaced.
  """
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.parent / f'.{path.name}.{uuid.uuid4().hex[:12]}.tmp'
  try:
    with temporary.open('wb') as file:
      yield file
      if '://' not in str(path):
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    if '://' not in str(path):
      flush(path.parent)
  finally:
    temporary.unlink(missing_ok=True)


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


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
  """Writes a file atomically, as `atomic_writer` does. Text is encoded as UTF-8.

  In a bucket, no temporary file is needed, because readers see an object only when its upload is complete.
  """
  content = content.encode() if isinstance(content, str) else content
  if '://' in str(path):
    epath.Path(path).write_bytes(content)
    return
  with atomic_writer(path) as file:
    file.write(content)
