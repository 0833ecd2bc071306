"""Measures how much time and memory it takes to open a large data set, and extrapolates to 500M documents.

    python -m benchmarks.opening [--millions=5,10,20]

The sets are made up, with shards of the right size but without content, because opening reads only the lengths of
documents. Each set is opened in a process of its own. The benchmark prints the CPU seconds of several parts of the work
and the bytes of memory, for each set. For each of these figures, it also prints the line `a + b * documents` that fits
the sets best (least squares), the line's largest error, and its value at 500M documents.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks import made_up_set
from betarank.data.config import DataConfig, SourceConfig
from betarank.data.packing import Packer
from betarank.data.prepared import Documents

ROW = 4096
AIM = 500e6


def resident() -> int:
  return int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * 4096


def opened(folder: pathlib.Path) -> None:
  """Opens the set in `folder`. Prints the CPU seconds of each part of the work and the bytes of memory, as JSON."""
  config = DataConfig(str(folder), '', made_up_set.VOCAB, {'main': SourceConfig(f'jsonl:{folder}/x.jsonl', 1.0, 0)},
                      0.0, ROW)
  figures, before, start = {}, resident(), time.process_time()

  def lap(name: str) -> None:
    nonlocal start
    figures[name], start = time.process_time() - start, time.process_time()

  documents = Documents(config, 'main', 'train')
  lap('open: lengths read and checked, s')
  packer = Packer(documents.lengths, ROW, '0/main')
  packer.row(0)
  lap('first row, s')
  packer.row(packer.rows_per_epoch)
  lap('first row of the next epoch, s')
  packer.row(2 * packer.rows_per_epoch - 1)
  lap('resume at the end of an epoch, s')
  print(json.dumps({**figures, 'memory, bytes': resident() - before}))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--millions', default='5,10,20', help='sizes of the sets, in millions of documents')
  parser.add_argument('--folder', default='', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.folder:
    opened(pathlib.Path(args.folder))
    return
  sizes = [round(float(text) * 1e6) for text in args.millions.split(',')]
  found: dict[str, list[float]] = {}
  for size in sizes:
    with tempfile.TemporaryDirectory() as temporary:
      folder = pathlib.Path(temporary) / 'data'
      made_up_set.write(folder, shards=max(1, size // 125_000), documents=size, row=ROW, contents=False)
      done = subprocess.run([sys.executable, '-m', 'benchmarks.opening', f'--folder={folder}'], check=True,
                            stdout=subprocess.PIPE, text=True)
    for name, value in json.loads(done.stdout).items():
      found.setdefault(name, []).append(value)
  print(f'{"documents":36}' + ''.join(f'{size / 1e6:9.1f} M' for size in sizes) + '   fit, at 500 M')
  for name, values in found.items():
    slope, offset = np.polyfit(sizes, values, 1)
    off = max(abs(offset + slope * size - value) for size, value in zip(sizes, values))
    if name.startswith('memory'):
      shown = ''.join(f'{value / 1e6:8.1f} MB' for value in values)
      fit = f'{offset / 1e6:.1f} MB + {slope:.2f} B (+- {off / 1e6:.1f} MB): {(offset + slope * AIM) / 1e9:.2f} GB'
    else:
      shown = ''.join(f'{value:9.2f} s' for value in values)
      fit = f'{offset:.2f} s + {1e9 * slope:.1f} ns (+- {off:.2f} s): {offset + slope * AIM:.1f} s'
    print(f'{name:36}{shown}   {fit}')


if __name__ == '__main__':
  main()
