"""Writes files atomically: a reader sees either the old content or the complete new content.

Also reads JSON that may be damaged or hostile, and opens for writing what can't be written atomically.

data, runtime, eval and launch all need this module, so it is in configs, which every package may import.
"""

import errno
import json
import os
import pathlib
import uuid
from typing import IO, Any

from etils import epath

from betarank.configs.errors import UserError


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


def from_json(text: str | bytes) -> Any:
  """Returns the value of a JSON text. Raises ValueError if the text isn't JSON, or is nested too deeply."""
  try:
    return json.loads(text)
  except RecursionError:
    raise ValueError('nested too deeply') from None


def is_regular(path: str | os.PathLike) -> bool:
  """Returns True if `path` is a regular file, or any path in a bucket. Reading a pipe or a device might never end.

  Path.is_file() of etils is True for pipes and devices too.
  """
  return '://' in str(path) or os.path.isfile(path)


def read_json(path: epath.Path) -> Any:
  """Returns the value in a JSON file, which may be damaged or hostile.

  Raises:
    ValueError: the file isn't JSON, is nested too deeply, or isn't a regular file.
    OSError: the file can't be read.
  """
  if path.exists() and not is_regular(path):
    raise ValueError('not a regular file')
  return from_json(path.read_text())


def open_no_follow(path: str | os.PathLike, mode: str, **options: Any) -> IO:
  """Opens a local file for writing as `open` does, but refuses a symbolic link, whose target must not be changed.

  Raises:
    UserError: `path` is a symbolic link.
  """
  try:
    return open(path, mode, opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o666), **options)
  except OSError as error:
    if error.errno != errno.ELOOP:
      raise
    raise UserError(f'{path}: is a symbolic link, through which nothing is written; remove it') from None


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
