"""Simulates how often a study with few seeds says yes, no or can't tell to claim (d): python -m benchmarks.claims

The claim (docs/study.md) is that two arms answer better than two others, in four comparisons of Avg@64. Here both arms
gain the same number of points. Seeds and problems have normal noise, as the flags say.

# S seeds  P problems
"""

import argparse

import numpy as np

from betarank.eval.report.claims import WORTH, Claim, Test, above
from betarank.eval.statistics import noise, paired_difference

RESAMPLES = 400


def verdict(rng: np.random.Generator, seeds: int, problems: int, gain: float, seed_sd: float, problem_sd: float) -> str:
  """Returns the verdict on the claim in one simulated study: 'yes', 'no' or "can't tell".

  gain: the share of right answers of the first two arms, minus that of the last two arms.
  seed_sd: the standard deviation, over seeds, of the difference between two arms.
  problem_sd: the standard deviation, over the problems of one seed, of the difference between two arms.
  """
  scores = [(gain if arm < 2 else 0.0) + rng.normal(0, seed_sd / 2**0.5, (seeds, 1))
            + rng.normal(0, problem_sd / 2**0.5, (seeds, problems)) for arm in range(4)]
  tests = []
  for better in scores[:2]:
    for other in scores[2:]:
      effect = paired_difference(better, other, resamples=RESAMPLES, seed=int(rng.integers(2**31)))
      tests.append(Test('', 'points', 100.0, effect, noise(better - other), above(WORTH)))
  return Claim('d', '', tests).verdict


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--seeds', default='3,8,10', help='numbers of seeds')
  parser.add_argument('--gains', default='0,1,2,3', help='gains, in points')
  parser.add_argument('--problems', type=int, default=576)
  parser.add_argument('--seed_sd', type=float, default=1.0, help='of a difference between seeds, in points')
  parser.add_argument('--problem_sd', type=float, default=25.0, help='of a problem\'s difference, in points')
  parser.add_argument('--times', type=int, default=100)
  args = parser.parse_args()
  print("| seeds | gain, points | yes | can't tell | no |\n|---|---|---|---|---|")
  for seeds in map(int, args.seeds.split(',')):
    for gain in map(float, args.gains.split(',')):
      rng = np.random.default_rng(0)
      found = [verdict(rng, seeds, args.problems, gain / 100, args.seed_sd / 100, args.problem_sd / 100)
               for _ in range(args.times)]
      shares = (f'{found.count(name) / args.times:.2f}' for name in ('yes', "can't tell", 'no'))
      print(f'| {seeds} | {gain:g} | {" | ".join(shares)} |', flush=True)


if __name__ == '__main__':
  main()
