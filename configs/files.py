"""Writes files atomically: a reader sees either the old content or the complete new content.

data, runtime, eval and launch all need this module, so it is in configs, which every package may import.
"""

import errno
import os
import pathlib
import uuid

from etils import epath


def write_atomically(path: str | os.PathLike, content: str | bytes | memoryview) -> None:
  """Writes `content` to the file `path`. If this fails, `path` stays as it was. Text is encoded as UTF-8.

  `path` is local or in a bucket; its folder is created if needed. In a bucket, readers see an object only when its
  upload is complete. A local file is first written to a temporary file in the same folder, `.NAME.RANDOM.tmp`. It is
  flushed to the disk before it replaces the old file, and its folder afterwards. If `path` is a symbolic link, the link
  itself is replaced.

  Several processes may write the same file at once. They can't mix their content: the later one replaces the file of
  the earlier one. The temporary file remains only if the process is killed.
  """
  content = content.encode() if isinstance(content, str) else content
  if '://' in str(path):
    epath.Path(path).write_bytes(bytes(content))
    return
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.parent / f'.{path.name}.{uuid.uuid4().hex[:12]}.tmp'
  try:
    with temporary.open('wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
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
