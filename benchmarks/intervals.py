"""Simulates how often the 95 % intervals of eval/statistics.py contain the true mean: python -m benchmarks.intervals

For sets of 10, 30 and 100 problems, the benchmark prints how often the interval contains the true mean, how often the
whole interval is above or below the true mean, and how wide the interval is. The value of a problem is the share of its
16 samples that are right. In rows named `pair`, the value is the difference between two arms on the same problem. In
rows named `one sample`, the value is 0 or 1. The benchmark takes about 10 minutes on one core, or 2 minutes with
--trials=300.
"""

import argparse
import dataclasses
from collections.abc import Callable

import numpy as np

from betarank.eval.statistics import bootstrap_interval

SAMPLES = 16  # per problem
RESAMPLES = 400  # the report uses 10,000, which makes the limits less noisy


@dataclasses.dataclass(frozen=True)
class Kind:
  """A population of problems.

  Attributes:
    draw: a function (rng, number of problems P) -> the values of P problems drawn at random, float [P].
    truth: the mean over the population.
    bounds: the smallest and the largest possible value.
  """

  draw: Callable[[np.random.Generator, int], np.ndarray]
  truth: float
  bounds: tuple[float, float] = (0.0, 1.0)


def _solved(level_P: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  return rng.binomial(SAMPLES, level_P) / SAMPLES


def _beta(a: float, b: float) -> Kind:
  """Returns a population whose problems are solved with probabilities that have the distribution beta(a, b)."""
  return Kind(lambda rng, P: _solved(rng.beta(a, b, P), rng), a / (a + b))


def _mostly_unsolved(share: float) -> Kind:
  """Returns a population with two kinds of problems: those that are never solved, and others.

  The others are solved with a probability that differs between problems and is one half on average.

  share: the share of problems that are never solved.
  """
  return Kind(lambda rng, P: _solved((rng.random(P) >= share) * rng.beta(2, 2, P), rng), 0.5 * (1 - share))


def _pair(change: Callable[[np.random.Generator, np.ndarray], np.ndarray], a: float = 0.5, b: float = 1.0) -> Kind:
  """Returns a population in which the value of a problem is its score after a change minus its score before the change.

  change: a function (rng, p [problems]) -> p after the change [problems], where p is the probability that a problem is
    solved.
  a, b: before the change, p has the distribution beta(a, b).
  """
  def draw(rng, P):
    before_P = rng.beta(a, b, P)
    return _solved(change(rng, before_P), rng) - _solved(before_P, rng)

  rng = np.random.default_rng(0)
  before = rng.beta(a, b, 2_000_000)
  return Kind(draw, float((change(rng, before) - before).mean()), (-1.0, 1.0))


def _some_improve(rng: np.random.Generator, p_P: np.ndarray) -> np.ndarray:
  return np.minimum(p_P + 0.5 * (rng.random(p_P.shape) < 0.2), 1)


KINDS = {
  'beta(0.15, 1.5)': _beta(0.15, 1.5),
  'beta(0.3, 2)': _beta(0.3, 2),
  '85 % unsolved': _mostly_unsolved(0.85),
  '95 % unsolved': _mostly_unsolved(0.95),
  'beta(3, 0.5)': _beta(3, 0.5),
  'beta(0.4, 0.4)': _beta(0.4, 0.4),
  'one sample, 10 %': Kind(lambda rng, P: (rng.random(P) < 0.1) * 1.0, 0.1),
  'one sample, 40 %': Kind(lambda rng, P: (rng.random(P) < 0.4) * 1.0, 0.4),
  'pair: no change': _pair(lambda rng, p_P: p_P),
  'pair: a fifth less': _pair(lambda rng, p_P: 0.8 * p_P),
  'pair: 20 points more': _pair(lambda rng, p_P: np.minimum(p_P + 0.2, 1)),
  'pair: 50 more on a fifth': _pair(_some_improve),
  'hard pair: the same': _pair(_some_improve, 0.15, 1.5),
}


def coverage(kind: Kind, problems: int, trials: int, seed: int = 1) -> tuple[float, float, float, float]:
  """Draws sets of problems, and computes the 95 % interval of each set.

  Returns (share of intervals that contain the true mean, share above it, share below it, mean width).

  kind: the population from which problems are drawn.
  problems: the number of problems of a set.
  trials: the number of sets.
  """
  rng = np.random.default_rng(seed)
  found = [bootstrap_interval(kind.draw(rng, problems), bounds=kind.bounds, resamples=RESAMPLES) for _ in range(trials)]
  above = float(np.mean([e.low > kind.truth for e in found]))
  below = float(np.mean([e.high < kind.truth for e in found]))
  return 1 - above - below, above, below, float(np.mean([e.high - e.low for e in found]))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--trials', type=int, default=2000)
  args = parser.parse_args()
  print(f'{"scores":26}{"problems":>8}{"covered %":>11}{"above %":>9}{"below %":>9}{"width":>8}')
  for problems in (10, 30, 100):
    for name, kind in KINDS.items():
      covered, above, below, width = coverage(kind, problems, args.trials)
      print(f'{name:26}{problems:8}{100 * covered:11.1f}{100 * above:9.1f}{100 * below:9.1f}{width:8.3f}', flush=True)


if __name__ == '__main__':
  main()
