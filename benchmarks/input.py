"""Times how fast batches are made, compared with the simplest ways to make them.

    python -m benchmarks.input [--seconds=3] [--steps=100]

The benchmark prepares the smoke config's documents in a temporary folder. It then makes batches for some seconds in
each way, one way after the other. Last, it trains, and measures how long training waits for batches. Only real tokens
are counted, not padding.
"""

import argparse
import itertools
import statistics
import tempfile
import time

import numpy as np
from etils import epath

from betarank.configs import load
from betarank.data.batches import Batch, TrainBatches
from betarank.data.config import DataConfig
from betarank.data.prepare import prepare_source
from betarank.data.prepared import Documents
from betarank.data.tokenizer_training import train_tokenizer
from betarank.runtime.metrics import lines_of
from betarank.train import loop
from betarank.train.config import run_config


def padded(config: DataConfig, batch_size: int):
  """Yields the batches of a naive loader: each row has one document, cut or padded to the row's length, and documents
  are read one by one.
  """
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
  list(itertools.islice(batches, 5))  # opens the files and plans the first rows
  start = time.perf_counter()
  while (elapsed := time.perf_counter() - start) < seconds:
    batch = next(batches)
    rows += len(batch.tokens_BT)
    tokens += int((batch.segments_BT > 0).sum())
    places += batch.segments_BT.size
  return {'rows_per_s': rows / elapsed, 'tokens_per_s': tokens / elapsed, 'filled': tokens / places}


def training(config, workdir: str, steps: int) -> tuple[float, float]:
  """Trains for some steps. Returns (median tokens/s, share of the time spent waiting for input).

  The first steps aren't counted.
  """
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.train.tokens = steps * config.train.batch_size * config.data.sequence_length
    config.optimizer.warmup_steps = 1
    config.log.update(samples=0, tensorboard=False, every_steps=steps)
  loop.train(config, workdir)
  lines = [line for line in lines_of(epath.Path(workdir) / 'metrics.jsonl') if 'time/step_s' in line][steps // 4:]
  waited = sum(line['time/step_s'] * line['time/input_wait_share'] for line in lines)
  return (statistics.median(line['time/tokens_per_s'] for line in lines),
          waited / sum(line['time/step_s'] for line in lines))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--seconds', type=float, default=3.0, help='per way of making batches')
  parser.add_argument('--steps', type=int, default=100, help='training steps')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    whole = load.load('configs/smoke.py', {'data.dir': folder})
    config, batch_size = run_config(whole).data, whole.train.batch_size
    start = time.perf_counter()
    train_tokenizer(config)
    manifest = prepare_source(config, 'main')
    prepared_s = time.perf_counter() - start
    text_bytes = sum(counts['bytes'] for counts in manifest['splits'].values())
    print(f'prepare, tokenizer included: {prepared_s:.1f} s, {text_bytes / prepared_s / 1e6:.2f} MB/s')
    ahead = TrainBatches(config, batch_size=batch_size, seed=0)
    plain = TrainBatches(config, batch_size=batch_size, seed=0, prefetch=0)
    print(f'documents cut by packing: {ahead.stats["main"].cut_documents:.1%}')
    ways = {'packed, read ahead': ahead, 'packed, plain': plain, 'padded, plain': padded(config, batch_size)}
    results = {name: measure(batches, args.seconds) for name, batches in ways.items()}
    ahead.close()
    plain.close()
    consumed, wait = training(whole, f'{folder}/run', args.steps)
  base = results['padded, plain']
  print(f'{"":20}{"rows/s":>10}{"tokens/s":>12}{"filled":>9}{"tokens/s, ratio":>17}{"filled, ratio":>15}')
  for name, result in results.items():
    print(f'{name:20}{result["rows_per_s"]:10,.0f}{result["tokens_per_s"]:12,.0f}{result["filled"]:9.1%}'
          f'{result["tokens_per_s"] / base["tokens_per_s"]:17.2f}{result["filled"] / base["filled"]:15.2f}')
  print(f'training consumes {consumed:,.0f} tokens/s: the loader alone is '
        f'{results["packed, read ahead"]["tokens_per_s"] / consumed:.0f} times as fast; '
        f'training waits for input {wait:.2%} of its time')


if __name__ == '__main__':
  main()
