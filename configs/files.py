"""Writes files atomically: a reader sees the old content or all of the new, never a part.

This module is in configs, below every other package, because data, runtime, eval and launch all need it.
"""

import contextlib
import os
import uuid
from collections.abc import Iterator
from typing import IO

from etils import epath


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike) -> Iterator[IO[bytes]]:
  """Yields a binary file that becomes `path` when the block ends, and is removed if the block raises.

  Use it for content that doesn't fit in memory. `path` is local or in a bucket; its folder is created. The file has a
  unique temporary name in that folder until then, so that two writers can't disturb each other: the last one wins.
  A local file reaches the disk before it replaces the old one. A link at `path` is replaced, not followed.
  Only a killed process leaves the temporary file behind, under the name `.NAME.RANDOM.tmp`.
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
  finally:
    temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
  """Writes a whole file, text as UTF-8; see `atomic_writer`."""
  with atomic_writer(path) as file:
    file.write(content.encode() if isinstance(content, str) else content)
