"""Compares RL updates of packed samples with updates that have one sample per row: the amount of padding, or the time.

    python -m benchmarks.packed_update [--samples=2048] [--longest=16384] [--prompt=1024] [--mean=4096]
    taskset -c 0 python -m benchmarks.packed_update --time [--repeats=3]

Without --time, the benchmark counts padding. The lengths of answers are log-normal with the mean --mean, cut at
--longest. The first line of the table is for one sample per row, where each row is as long as the longest sample may
be. The other lines are for packed samples. They differ in the number of devices over which rows are split.

--time times two updates of a small model (4 layers, width 256, vocabulary 8192, random weights) from the same 32
samples. All lengths are divided by 64. One update has one sample per row, in 8 microbatches. In the other update, the
samples are packed. The two updates alternate. They give the same gradient, and differ only in the amount of padding.
"""

import argparse
import time

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding

from benchmarks.train import MODELS
from betarank import model
from betarank.rl import packing
from betarank.rl.policy_losses import PolicyLossConfig
from betarank.rl.update import make_update
from betarank.runtime.state import create_state
from betarank.train.sampler import Sample

CONFIG, *_ = MODELS['small']
SIGMA = 0.7  # of the logarithm of the length
SCALE, SAMPLES, ROWS = 64, 32, 4  # of the timed update; ROWS of a microbatch of padded samples


def answer_lengths(samples: int, longest: int, mean: float) -> np.ndarray:
  """Returns log-normal lengths of answers, int [samples].

  Lengths above `longest` become `longest`. `mean` is the mean of the distribution before this.
  """
  drawn = np.random.default_rng(0).normal(np.log(mean) - SIGMA**2 / 2, SIGMA, samples)
  return np.exp(drawn).clip(1, longest).astype(int)


def show_padding(new: np.ndarray, prompt: int, longest: int) -> None:
  lengths, room = (prompt + new - 1).tolist(), prompt + longest
  print(f'{len(new)} samples, answers of {new.mean():.0f} tokens in the mean, prompts of {prompt}')
  print(f'{"rows are split over":>22}{"microbatches":>15}{"million positions":>20}{"padding":>10}')
  print(f'{"one sample per row":>22}{"":>15}{len(new) * room / 1e6:20.1f}{1 - sum(lengths) / len(new) / room:10.1%}')
  for ways in (1, 8, 32, 64, 128, 256):
    found = packing.arrange(lengths, packing.shapes(room, 0, ways))
    positions = sum(length * len(rows) for length, rows in found)
    print(f'{ways:14} devices{len(found):15}{positions / 1e6:20.1f}{1 - sum(lengths) / positions:10.1%}')


def show_times(new: np.ndarray, prompt: int, longest: int, repeats: int) -> None:
  rng = np.random.default_rng(1)
  draw = lambda n: rng.integers(4, CONFIG.vocab_size, n).astype(np.int32)
  sample = lambda i, n: Sample(0, i, draw(n), np.full(n, -9, np.float32), 'eos')
  answers = [packing.Answer(draw(prompt).tolist(), sample(i, n), rng.normal()) for i, n in enumerate(new)]
  room = prompt + longest
  mesh = model.make_mesh(model.MeshConfig(1, 1, 1, 1, 1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    tx, rows = optax.sgd(1e-3), NamedSharding(mesh, model.spec('batch', 'length'))
    state = create_state(CONFIG, tx, mesh, seed=0)
    update = make_update(CONFIG, PolicyLossConfig(), tx)
    ways = {'one sample per row': [(ROWS, room)], 'packed': packing.shapes(room, ROWS * room, 1)}
    parts = {'packed': packing.microbatches(answers, ways['packed'], rows)}
    parts['one sample per row'] = [
      part for i in range(0, len(answers), ROWS)
      for part in packing.microbatches(answers[i : i + ROWS], [(ROWS, room)], rows)]
    best = dict.fromkeys(ways, np.inf)
    for _ in range(repeats + 1):  # the first compiles
      for name in ways:
        start = time.perf_counter()
        jax.block_until_ready(update(state, parts[name])[1:])
        best[name] = min(best[name], time.perf_counter() - start)
  print(f'{"one update":22}{"microbatches":>15}{"positions":>12}{"seconds":>10}{"this / packed":>16}')
  for name, seconds in best.items():
    positions = sum(part.batch.tokens_BT.size for part in parts[name])
    print(f'{name:22}{len(parts[name]):15}{positions:12,}{seconds:10.2f}{seconds / best["packed"]:16.2f}')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--samples', type=int, default=2048)
  parser.add_argument('--longest', type=int, default=16_384)
  parser.add_argument('--prompt', type=int, default=1024)
  parser.add_argument('--mean', type=float, default=4096)
  parser.add_argument('--time', action='store_true')
  parser.add_argument('--repeats', type=int, default=3)
  args = parser.parse_args()
  if args.time:
    longest = args.longest // SCALE
    show_times(answer_lengths(SAMPLES, longest, args.mean / SCALE), args.prompt // SCALE, longest, args.repeats)
  else:
    show_padding(answer_lengths(args.samples, args.longest, args.mean), args.prompt, args.longest)


if __name__ == '__main__':
  main()
