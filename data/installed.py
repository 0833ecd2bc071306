"""Collects the text that is installed on this machine, source code and manuals, into one JSON Lines file.

    python -m betarank.data.installed --out=runs/study/corpus.jsonl [--most_mb=N] [FOLDER ...]

Without FOLDER, the folders are Python's standard library and the packages installed with it. A document is a whole
file: UTF-8 text of 200 bytes to 200 KB, after decompression if the file is gzipped. If several files are equal, one is
taken. Documents are sorted by the hash of their content, so that the first N MB, which --most_mb=N takes, are a fair
sample. The source `jsonl:FILE` reads the result. FILE.sha256 lists the hash and the path of each file that was taken.
If FILE ends in .xz, it is compressed.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import lzma
import os
import pathlib
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence

SUFFIXES = ('.py', '.pyi', '.md', '.rst', '.txt', *(f'.{section}' for section in range(1, 9)))  # .1 to .8: man pages
LEAST_BYTES, MOST_BYTES = 200, 200_000  # larger files are mostly tables of numbers


def documents(folders: Iterable[str]) -> list[tuple[str, str, str]]:
  """Returns (SHA-256 of the content, path, text) of each file that becomes a document, sorted by hash.

  folders: absolute or relative paths. Of several equal files, the one with the first path is taken.
  """
  found: dict[str, tuple[str, str]] = {}
  for path in sorted({path for folder in folders for path in _files(folder)}):
    if (content := _content(path)) and LEAST_BYTES <= len(content) <= MOST_BYTES:
      with contextlib.suppress(UnicodeDecodeError):
        found.setdefault(hashlib.sha256(content).hexdigest(), (path, content.decode()))
  return [(sha256, *found[sha256]) for sha256 in sorted(found)]


def _files(folder: str) -> Iterator[str]:
  for parent, _, names in os.walk(folder):
    for name in names:
      if os.path.splitext(name.removesuffix('.gz'))[1] in SUFFIXES:
        yield os.path.join(parent, name)


def _content(path: str) -> bytes:
  """Returns the decompressed content of a file, or b'' if it can't be read. At most MOST_BYTES + 1 bytes are read."""
  opened = gzip.open if path.endswith('.gz') else open
  with contextlib.suppress(OSError, EOFError, zlib.error), opened(path, 'rb') as file:
    return file.read(MOST_BYTES + 1)
  return b''


def write(out: pathlib.Path, found: Sequence[tuple[str, str, str]], most_bytes: float) -> tuple[int, int]:
  """Writes the documents to `out`, and their hashes to `out`.sha256. Returns (documents, bytes of text) written.

  found: the result of `documents`.
  most_bytes: the largest size of all texts together, in bytes. Writing stops before the first document
    that would exceed it.
  """
  out.parent.mkdir(parents=True, exist_ok=True)
  count = size = 0
  opened = lzma.open if out.suffix == '.xz' else open
  with opened(out, 'wt', encoding='ascii') as file, open(f'{out}.sha256', 'w', encoding='utf-8') as listing:
    for sha256, path, text in found:
      if size + len(text.encode()) > most_bytes:
        break
      count, size = count + 1, size + len(text.encode())
      file.write(json.dumps({'text': text}) + '\n')
      listing.write(f'{sha256}  {path}\n')
  return count, size


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('folders', nargs='*', metavar='FOLDER')
  parser.add_argument('--out', type=pathlib.Path, required=True, metavar='FILE.jsonl')
  parser.add_argument('--most_mb', type=float, default=float('inf'), help='MB of text to take; by default, all')
  args = parser.parse_args()
  paths = sysconfig.get_paths()
  count, size = write(args.out, documents(args.folders or [paths['stdlib'], paths['purelib']]), 1e6 * args.most_mb)
  sha256 = hashlib.sha256(args.out.read_bytes()).hexdigest()
  print(f'{args.out}: {count:,} documents, {size:,} bytes of text in {args.out.stat().st_size:,}, SHA-256 {sha256}')


if __name__ == '__main__':
  main()
