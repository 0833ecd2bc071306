"""Finds damaged files in a checkpoint, by comparing them with the sizes and checksums in manifest.json.

    {"version": 1, "block_bytes": 67108864,
     "files": {"state/manifest.ocdbt": {"size": 115, "sha256": "7c1f...", "crc32": ["1c291ca3"]}, ...}}

The manifest is written before the checkpoint is committed, so every complete checkpoint has one. Only checkpoints of an
old version of this code have no manifest. They are accepted without a check.

Before a checkpoint on a disk is restored, the sizes of all files and the crc32 of each block of 64 MiB are checked. The
crc32 finds every single wrong byte, and misses larger damage with a probability of 2^-32. In a bucket, the sizes of all
files are checked too, but the crc32 is checked only for files of up to 1 MiB. The object store itself checks the
content of files, and reading all files twice would double the time of a start.

`betarank checkpoint verify` checks the sha256 of each file, which is the checksum that the program sha256sum prints.
"""

import concurrent.futures
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from betarank.configs.files import flush, is_regular, read_json

NAME = 'manifest.json'
ITEMS = ('state', 'meta')  # the folders of a checkpoint that are checked; its other files are Orbax's own
BLOCK_BYTES = 2**26  # the part of a file that one thread checks
_PIECE_BYTES = 2**20  # the part of a block that is in memory at a time
_SMALL_BYTES = 2**20  # in a bucket, only the content of files up to this size is checked
_Check = Callable[[], str]


def write(folder: epath.Path) -> None:
  """Writes manifest.json of a checkpoint: the sizes and checksums of all files in its folders `state` and `meta`.

  On a disk, all files and folders of the checkpoint are then flushed.

  folder: the folder of the checkpoint.
  """
  names = sorted(name for item in ITEMS for name in _files(folder, item))
  with _threads() as pool:
    entries = list(pool.map(lambda name: _describe(folder / name), names))
  manifest = {'version': 1, 'block_bytes': BLOCK_BYTES, 'files': dict(zip(names, entries))}
  (folder / NAME).write_text(json.dumps(manifest, indent=1) + '\n')
  if '://' not in str(folder):
    for place, _, names in os.walk(folder, topdown=False):  # TensorStore has flushed the arrays, Orbax nothing else
      for name in names:
        flush(os.path.join(place, name))
      flush(place)


def read(folder: epath.Path) -> dict[str, dict[str, Any]] | None:
  """Returns the manifest as {file: {'size': bytes, 'sha256': hex, 'crc32': [hex of each block]}}.

  Returns None if there is no manifest.

  Raises:
    ValueError: this version of the code can't read the manifest.
  """
  try:
    manifest = read_json(folder / NAME)
    if not (manifest['version'] == 1 and manifest['block_bytes'] == BLOCK_BYTES and all(
      name.partition('/')[0] in ITEMS and '..' not in name.split('/') and isinstance(f['size'], int)
      and isinstance(f['sha256'], str) and len(f['crc32']) == -(-f['size'] // BLOCK_BYTES)
      for name, f in manifest['files'].items())):
      raise ValueError
    return manifest['files']
  except FileNotFoundError:
    return None
  except (ValueError, KeyError, TypeError, AttributeError):
    raise ValueError('not a manifest that this version reads') from None


def damage(folder: epath.Path, *, item: str = '', full: bool = False, share: tuple[int, int] = (0, 1)) -> str:
  """Returns the first difference between the files in `folder` and its manifest, as 'FILE: PROBLEM'.

  Returns '' if there is no difference, or no manifest.

  Args:
    folder: the folder of the checkpoint.
    item: the part of the checkpoint to check, 'state' or 'meta'; '' for both.
    full: if True, checks the sha256 of every file. If False, checks the crc32 of every block, but in a bucket only for
      files of up to 1 MiB.
    share: (i, n), to divide the work among n processes. The blocks of all files are numbered in one sequence, and
      process i checks the blocks i, i + n, i + 2n and so on. With full=True, files are numbered instead of blocks.
      Every process checks the sizes of all files.

  Raises:
    OSError: a file in a bucket can't be read now.
  """
  remote = '://' in str(folder)
  try:
    files = read(folder)
  except (ValueError, OSError) as error:
    if remote and isinstance(error, OSError):
      raise
    return f'{NAME}: {_reason(error)}'
  files = {name: f for name, f in sorted((files or {}).items()) if name.startswith(item and f'{item}/')}
  content: list[tuple[str, _Check]] = []
  for name, f in files.items():
    if full:
      content.append((name, lambda name=name, f=f: _check_file(folder / name, f)))
    elif not remote or f['size'] <= _SMALL_BYTES:
      content += [(name, lambda name=name, block=block, crc=crc: _check_block(folder / name, block, crc))
                  for block, crc in enumerate(f['crc32'])]
  sizes = [(name, lambda name=name, f=f: _check_size(folder / name, f)) for name, f in files.items()]
  with _threads() as pool:
    for checks in (sizes, content[share[0]::share[1]]):  # sizes first, so that a truncated file is reported as such
      for (name, _), problem in zip(checks, pool.map(lambda check: _guarded(check[1], remote), checks)):
        if problem:
          return f'{name}: {problem}'
  return ''


def _guarded(check: _Check, remote: bool) -> str:
  try:
    return check()
  except (FileNotFoundError, NotADirectoryError):
    return 'missing'
  except OSError as error:
    if remote:  # the store failed, which says nothing about the file
      raise
    return _reason(error)


def _reason(error: Exception) -> str:
  return getattr(error, 'strerror', None) or str(error) or type(error).__name__


def _check_size(path: epath.Path, f: dict[str, Any]) -> str:
  size = path.stat().length
  if not is_regular(path):
    return 'not a regular file'
  return f'{size:,} bytes, {f["size"]:,} were written' if size != f['size'] else ''


def _check_block(path: epath.Path, block: int, crc: str) -> str:
  found = 0
  for piece in _pieces(path, block * BLOCK_BYTES, BLOCK_BYTES):
    found = zlib.crc32(piece, found)
  return '' if f'{found:08x}' == crc else f'not what was written (crc32 of 64 MiB block {block} differs)'


def _check_file(path: epath.Path, f: dict[str, Any]) -> str:
  return '' if _describe(path)['sha256'] == f['sha256'] else 'not what was written (sha256 differs)'


def _describe(path: epath.Path) -> dict[str, Any]:
  size, sha256, crc32 = 0, hashlib.sha256(), []
  for piece in _pieces(path):
    if size % BLOCK_BYTES == 0:
      crc32.append(0)
    crc32[-1] = zlib.crc32(piece, crc32[-1])
    sha256.update(piece)
    size += len(piece)
  return {'size': size, 'sha256': sha256.hexdigest(), 'crc32': [f'{crc:08x}' for crc in crc32]}


def _pieces(path: epath.Path, start: int = 0, length: float = float('inf')) -> Iterator[bytes]:
  with path.open('rb') as file:
    file.seek(start)
    while length > 0 and (piece := file.read(_PIECE_BYTES)):
      yield piece
      length -= len(piece)


def _files(folder: epath.Path, item: str) -> Iterator[str]:
  for path in (folder / item).iterdir():
    if path.is_dir():
      yield from _files(folder, f'{item}/{path.name}')
    else:
      yield f'{item}/{path.name}'


def _threads() -> concurrent.futures.ThreadPoolExecutor:
  # More threads than CPUs, because threads also wait for the disk.
  return concurrent.futures.ThreadPoolExecutor(min(32, 4 + (os.cpu_count() or 1)))
