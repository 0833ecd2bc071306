"""Finds and opens the files of a source, on a disk or in any store that fsspec can read (gs://, s3://, hf://, ...).

A pattern is a path, a glob that may contain `**`, or a folder. A folder means all files below it with one of the
suffixes of the source's kind, such as .jsonl. If the paths of these files name splits, as in Hugging Face data sets
(data/train-00000-of-00004.parquet), only the files of the training split are used.
"""

import bz2
import concurrent.futures
import contextlib
import dataclasses
import glob
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, TypeVar

from betarank.configs.errors import one_line
from betarank.data.config import DataError
from betarank.data.storage import install_hint, is_remote

_OPENED_AT_ONCE = 32  # the number of remote files opened at the same time; opening one takes 20 to 200 ms
_BUFFER = 2**18
_SPLIT = re.compile(r'(?:^|/)(train|validation|valid|val|dev|test|eval)(?![a-z])', re.IGNORECASE)
# The first bytes of compressed files. Names aren't reliable: a .gz file may be uncompressed, another file compressed.
_PACKED = {b'\x1f\x8b': 'gzip', b'BZh': 'bz2', b'\x28\xb5\x2f\xfd': 'zstd', b'\xfd7zXZ\x00': 'xz'}
_PACKED_SUFFIXES = ('.gz', '.bz2', '.zst', '.zstd', '.xz')

T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class File:
  path: str
  size: int | None  # bytes; None if the file system doesn't say, as some web servers don't


@dataclasses.dataclass(frozen=True)
class Found:
  """The files that match a pattern, sorted by path. Empty files are left out; `empty` is their number."""

  files: tuple[File, ...]
  empty: int


def find(pattern: str) -> list[str]:
  """Returns the paths of all files that match `pattern`, sorted.

  Raises:
    DataError: no file matches, or `pattern` is a folder.
  """
  return [file.path for file in _all(pattern, ())]


def look(pattern: str, suffixes: tuple[str, ...]) -> Found:
  """Returns the files that match `pattern`, from a single listing of the folder or bucket.

  suffixes: if `pattern` is a folder, only its files with one of these suffixes are returned.

  Raises:
    DataError: no file matches, all files are empty, or the folder or bucket can't be read.
  """
  every = _all(pattern, suffixes)
  files = tuple(file for file in every if file.size != 0)
  if not files:
    which = 'the file is' if len(every) == 1 else f'all {len(every)} files are'
    raise DataError(f'{pattern}: {which} empty; fetch the text again')
  return Found(files, len(every) - len(files))


def _all(pattern: str, suffixes: tuple[str, ...]) -> list[File]:
  files, in_folder = _remote(pattern) if is_remote(pattern) else _local(pattern)
  if in_folder:
    there, files = files, [file for file in files if _suffix(file.path) in suffixes]
    files = _training_split(files, pattern)
    if there and not files:
      kinds = sorted({_suffix(file.path) for file in there})
      raise DataError(f'{pattern}: the folder has no file of {", ".join(suffixes)}, only of {", ".join(kinds)}; name '
                      f'the files: {pattern.rstrip("/")}/**/*')
  if not files:
    raise DataError(f'{pattern}: no file matches; check the path (quote wildcards from the shell)')
  return sorted(files, key=lambda file: file.path)


def _suffix(path: str) -> str:
  """Returns the suffix that tells the format of a file: '.jsonl' for x.jsonl, and also for x.jsonl.gz."""
  name, suffix = os.path.splitext(path.lower())
  return (os.path.splitext(name)[1] or suffix) if suffix in _PACKED_SUFFIXES else suffix


def _training_split(files: list[File], folder: str) -> list[File]:
  splits = {}
  for file in files:
    match = _SPLIT.search(file.path[len(folder):])
    splits.setdefault(match[1].lower() if match else '', []).append(file)
  return splits.get('train', files)


def _hidden(path: str) -> bool:
  return any(part.startswith(('.', '_')) for part in path.split('/'))


def _local(pattern: str) -> tuple[list[File], bool]:
  """Returns (the matching files, whether `pattern` is a folder). Pipes and devices are ignored."""
  folder = os.path.isdir(pattern)
  paths = glob.iglob(os.path.join(glob.escape(pattern), '**/*'), recursive=True) if folder else glob.iglob(
    pattern, recursive=True)
  return [File(path, os.path.getsize(path)) for path in paths
          if os.path.isfile(path) and not (folder and _hidden(os.path.relpath(path, pattern)))], folder


def _remote(pattern: str) -> tuple[list[File], bool]:
  import fsspec

  if pattern.partition('://')[0] not in fsspec.available_protocols():
    raise DataError(f'{pattern}: {install_hint(pattern)}; there are gs://, s3://, hf://, https:// and others of fsspec')
  with _errors(pattern):
    store, path = fsspec.core.url_to_fs(pattern)
    folder = False
    try:
      if any(character in pattern for character in '*?['):
        found = store.glob(path, detail=True)
      else:
        about = store.info(path)
        folder = about['type'] == 'directory'
        found = store.find(path, detail=True) if folder else {path: about}
    except FileNotFoundError:
      return [], False
    return [File(store.unstrip_protocol(name), about.get('size')) for name, about in found.items()
            if about['type'] == 'file' and not (folder and _hidden(name[len(path):]))], folder


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
  """Converts any exception inside the block to a DataError with one line that names `path`."""
  try:
    yield
  except DataError:
    raise
  except ImportError as error:
    raise DataError(f'{path}: {one_line(error)} ({install_hint(path)})') from None
  except Exception as error:  # gcsfs, botocore, aiohttp and huggingface_hub have no common error type
    raise DataError(f'{path}: can\'t be read ({type(error).__name__}: {one_line(error)[:300]}); check the path, the '
                    'network and your access to it') from None


def in_parallel(function: Callable[[File], T], files: Iterable[File]) -> list[T]:
  """Returns [function(file) for file in files]. If the files are remote, several are processed at the same time."""
  files = list(files)
  if not files or not is_remote(files[0].path):
    return [function(file) for file in files]
  with concurrent.futures.ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
    return list(pool.map(function, files))


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
  """Opens a file for reading and seeking, without decompressing it.

  Raises:
    DataError: the file can't be opened. If reading fails later, OSError is raised.
  """
  with contextlib.ExitStack() as stack:
    with _errors(path):
      if is_remote(path):
        import fsspec

        store, name = fsspec.core.url_to_fs(path)
        # Wrapped, because the readline of fsspec has no limit.
        file = stack.enter_context(io.BufferedReader(store.open(name, 'rb'), _BUFFER))
      else:
        file = stack.enter_context(open(path, 'rb', buffering=_BUFFER))
    yield file


def packing(path: str) -> str:
  """Returns the kind of compression of a file: 'gzip', 'bz2', 'zstd', 'xz', or '' for none. The first bytes decide."""
  with opened(path) as file, _errors(path):
    start = file.read(6)
  return next((kind for magic, kind in _PACKED.items() if start.startswith(magic)), '')


UNPACKING_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


@contextlib.contextmanager
def unpacked(path: str) -> Iterator[BinaryIO]:
  """Opens a file for reading, and decompresses it if necessary.

  Reading raises one of UNPACKING_ERRORS if the file is damaged.
  """
  kind = packing(path)
  with opened(path) as file, contextlib.ExitStack() as stack:
    yield stack.enter_context(_unpack(kind, file)) if kind else file


def _unpack(kind: str, file: BinaryIO) -> Any:
  if kind == 'zstd':  # pyarrow is a dependency anyway; Python supports zstd only from 3.14 on
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file), 'zstd'), _BUFFER)
  return {'gzip': gzip.open, 'bz2': bz2.open, 'xz': lzma.open}[kind](file)
