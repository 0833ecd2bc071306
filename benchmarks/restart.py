"""Measures how much work `betarank data prepare` loses if it is killed (SIGKILL), and checks the result.

    python -m benchmarks.restart [--megabytes=16] [--piece_megabytes=2] [--kills=5]

The benchmark tokenizes made-up text in one process, kills the process at random times and restarts it. The result must
be the same as without kills. A restart continues after the last complete piece, so only the text of the unfinished
piece is lost. `betarank data prepare` has pieces of 128 MiB. Smaller pieces are used here, so that a run takes a
minute. The benchmark prints how much text a kill loses (as a fraction of a piece), the rate at which this core
tokenizes, and the most CPU seconds that a kill would lose with pieces of 128 MiB.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

from benchmarks import made_up_set
from betarank.data import prepare, prepared, worker
from betarank.data.config import DataConfig, SourceConfig
from betarank.data.tokenizer_training import train

PIECE_BYTES = worker.PIECE_BYTES


def settings(folder: pathlib.Path, name: str) -> DataConfig:
  source = SourceConfig(f'jsonl:{folder}/x.jsonl', 1.0, 0)
  return DataConfig(str(folder / name), f'{folder}/tokenizer.model', 4096, {'main': source}, 0.01, 1024)


def child(config: DataConfig, piece_bytes: float) -> None:
  """Prepares the source in pieces of `piece_bytes` bytes of text.

  Prints the number of bytes tokenized so far, again and again. At the end, prints the CPU seconds of the whole work.
  """
  worker.PIECE_BYTES = piece_bytes
  worker.REPORT_BYTES = 2**16
  start = time.process_time()
  prepare.prepare_source(config, 'main', workers=1, report=lambda progress: print(int(progress.done_bytes), flush=True))
  print(json.dumps({'cpu_s': time.process_time() - start}), flush=True)


def start(folder: pathlib.Path, name: str, piece_megabytes: float) -> subprocess.Popen:
  command = [sys.executable, '-m', 'benchmarks.restart', f'--folder={folder}', f'--name={name}',
             f'--piece_megabytes={piece_megabytes}']
  return subprocess.Popen(command, text=True, stdout=subprocess.PIPE)


def kept_bytes(config: DataConfig) -> int:
  """Returns the bytes of text in complete pieces, which a restart doesn't tokenize again."""
  markers = (prepared.folder(config, 'main') / 'partial').glob('unit-*.json')
  found = (json.loads(marker.read_text())['splits'] for marker in markers)
  return sum(counts['bytes'] for splits in found for counts in splits.values())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--megabytes', type=float, default=16.0)
  parser.add_argument('--piece_megabytes', type=float, default=2.0)
  parser.add_argument('--kills', type=int, default=5)
  for name in ('folder', 'name'):
    parser.add_argument(f'--{name}', default='', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.folder:
    child(settings(pathlib.Path(args.folder), args.name), args.piece_megabytes * 1e6)
    return
  with tempfile.TemporaryDirectory() as temporary:
    measure(pathlib.Path(temporary), args)


def measure(folder: pathlib.Path, args: argparse.Namespace) -> None:
  made_up_set.write_text(folder / 'x.jsonl', args.megabytes * 1e6)
  train(iter(made_up_set.texts(1000)), 4096, str(folder / 'tokenizer.model'))
  began = time.perf_counter()
  [*_, line] = start(folder, 'undisturbed', args.piece_megabytes).communicate()[0].splitlines()
  wall_s, cpu_s = time.perf_counter() - began, json.loads(line)['cpu_s']
  config, rng, lost = settings(folder, 'killed'), random.Random(0), []
  for _ in range(args.kills):
    process = start(folder, 'killed', args.piece_megabytes)
    process.stdout.readline()  # it is at work
    time.sleep(rng.uniform(0, wall_s / args.kills / 2))
    process.kill()
    lines = process.communicate()[0].splitlines()
    done = max([int(line) for line in lines if line.isdigit()], default=0)
    lost.append(max(0, done - kept_bytes(config)))
  start(folder, 'killed', args.piece_megabytes).communicate()
  same = [json.loads((prepared.folder(settings(folder, name), 'main') / 'manifest.json').read_text())['fingerprint']
          for name in ('undisturbed', 'killed')]
  assert same[0] == same[1], 'the result of the killed preparation is another'
  rate, piece = args.megabytes * 1e6 / cpu_s, args.piece_megabytes * 1e6
  print(f'{args.kills} kills lost {sum(lost) / len(lost) / piece:.2f} of a piece on average, {max(lost) / piece:.2f} '
        'at most; the result is the same, byte for byte')
  print(f'this core tokenizes {rate / 1e6:.2f} MB per CPU second (SentencePiece), so with pieces of {PIECE_BYTES:,} '
        f'bytes at most {PIECE_BYTES / rate:.0f} s of a core are lost per process that is killed')


if __name__ == '__main__':
  main()
