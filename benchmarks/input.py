"""How fast batches are made, beside the simplest ways to make them.

    python benchmarks/input.py [--sequence_length=256] [--batch_size=16] [--documents=20000] [--seconds=3]

Prepares reasoning documents in a temporary folder, then runs each way for some seconds on its own. Tokens are
real ones: padding doesn't count, neither as work done nor, later on the device, as work to do.
"""

import argparse
import itertools
import pathlib
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from data.batches import Batch, TrainBatches
from data.config import DataConfig, SourceConfig
from data.prepare import prepare_source, train_tokenizer
from data.prepared import Documents


def padded(config: DataConfig, batch_size: int):
  """The naive loader: a document a row, cut or padded to the row's length, read one by one."""
  documents, T = Documents(config, 'main', 'train'), config.sequence_length
  rng = np.random.default_rng(0)
  while True:
    batch = Batch(*(np.zeros((batch_size, T), np.int32) for _ in range(4)))
    for r, index in enumerate(rng.integers(len(documents), size=batch_size)):
      tokens = documents.read([index])[0][:T + 1]
      n = len(tokens) - 1
      batch.tokens_BT[r, :n], batch.targets_BT[r, :n] = tokens[:-1], tokens[1:]
      batch.positions_BT[r, :n], batch.segments_BT[r, :n] = np.arange(n), 1
    yield batch


def measure(batches, seconds: float) -> dict[str, float]:
  rows = tokens = places = 0
  list(itertools.islice(batches, 5))  # files are opened and the first rows planned
  start = time.perf_counter()
  while (elapsed := time.perf_counter() - start) < seconds:
    batch = next(batches)
    rows += len(batch.tokens_BT)
    tokens += int((batch.segments_BT > 0).sum())
    places += batch.segments_BT.size
  return {'rows_per_s': rows / elapsed, 'tokens_per_s': tokens / elapsed, 'filled': tokens / places}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--sequence_length', type=int, default=256)
  parser.add_argument('--batch_size', type=int, default=16)
  parser.add_argument('--documents', type=int, default=20_000)
  parser.add_argument('--seconds', type=float, default=3.0, help='for each way')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    config = DataConfig(dir=folder, tokenizer='', vocab_size=1024, validation_fraction=0.02,
                        sequence_length=args.sequence_length,
                        sources={'main': SourceConfig('reasoning', weight=1.0, max_documents=args.documents)})
    start = time.perf_counter()
    train_tokenizer(config)
    manifest = prepare_source(config, 'main')
    prepared_s = time.perf_counter() - start
    text_bytes = sum(counts['bytes'] for counts in manifest['splits'].values())
    print(f'prepare, tokenizer included: {prepared_s:.1f} s, {text_bytes / prepared_s / 1e6:.2f} MB/s')
    ahead = TrainBatches(config, batch_size=args.batch_size, seed=0)
    plain = TrainBatches(config, batch_size=args.batch_size, seed=0, prefetch=0)
    print(f'documents cut by packing: {ahead.stats["main"].cut_documents:.1%}')
    ways = {'packed, read ahead': ahead, 'packed, plain': plain,
            'padded, plain': padded(config, args.batch_size)}
    results = {name: measure(batches, args.seconds) for name, batches in ways.items()}
    ahead.close()
    plain.close()
  base = results['padded, plain']
  print(f'{"":20}{"rows/s":>10}{"tokens/s":>12}{"filled":>9}{"tokens/s, ratio":>17}{"filled, ratio":>15}')
  for name, result in results.items():
    print(f'{name:20}{result["rows_per_s"]:10,.0f}{result["tokens_per_s"]:12,.0f}{result["filled"]:9.1%}'
          f'{result["tokens_per_s"] / base["tokens_per_s"]:17.2f}{result["filled"] / base["filled"]:15.2f}')


if __name__ == '__main__':
  main()
