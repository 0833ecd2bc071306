"""Judges the claims of docs/study.md from tables of seeds: python -m benchmarks.study_seeds docs/study_20m_seeds.csv

The tables are tables/seeds.csv of one or more reports, whose seeds are taken together. This is for parts of a study
whose runs are no longer in one place. They must have the same settings, and different seeds; with --pool, they may be
studies of different sizes. All intervals are Student's t over seeds. As the tables have no figures by problem, those of
(d) are for these problems only, and a little wider or narrower than those of `betarank report`, which separates the
noise of seeds and of problems (eval/statistics.py).

After the claims, the differences of every arm to plain cross-entropy are printed, before and after RL, in points and
without correction. --plot draws those of Avg@n.
"""

import argparse
import csv
import pathlib
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from betarank.eval.report import claims
from betarank.eval.report.claims import HIGH, LOW, TAIL
from betarank.eval.report.comparisons import Comparison
from betarank.eval.report.figures import Forest, ForestRow, draw_forest
from betarank.eval.report.runs import PLAIN
from betarank.eval.statistics import noise, over_seeds

ARMS = {PLAIN: 'beta=0.0', LOW: 'beta=-0.25', HIGH: 'beta=0.5', TAIL: 'lambda_tail=-0.1'}
TEXT = 'text'  # the data source of the study that is real text

# {(stage, subject, metric): {arm: {seed: (value, difference to plain cross-entropy)}}}. A difference is over the
# problems that both runs have, which a value need not be. Plain cross-entropy's own is 0.
Figures = dict[tuple[str, str, str], dict[str, dict[str, tuple[float, float]]]]


def read(paths: Iterable[str], pool: bool) -> Figures:
  """Returns the figures of all seeds in the files, but not how much each model changed by RL.

  pool: whether the same seed number in two files means two seeds.

  Raises:
    SystemExit: two files have figures of the same seed.
  """
  out: Figures = defaultdict(lambda: defaultdict(dict))
  for number, path in enumerate(paths):
    with open(path, newline='', encoding='utf-8') as file:
      for row in csv.DictReader(file):
        plain = row['arm'] == ARMS[PLAIN]
        if row['baseline'] != ARMS[PLAIN] or not (row['value'] and (plain or row['difference'])):
          continue  # a model's change by RL, or a run that isn't compared
        by_seed = out[row['stage'], row['subject'], row['metric']][row['arm']]
        seed = f'{number}/{row["seed"]}' if pool else row['seed']
        if seed in by_seed:
          raise SystemExit(f'error: {path}: seed {seed} of {row["arm"]} is there already; for another study use --pool')
        by_seed[seed] = float(row['value']), 0.0 if plain else float(row['difference'])
  return out


def compared(figures: Figures, baseline: str) -> list[Comparison]:
  """Returns the comparisons of all arms with `baseline`."""
  out = []
  for (stage, subject, metric), arms in figures.items():
    theirs = arms.get(baseline, {})
    for arm, mine in arms.items():
      by_seed = {seed: value for seed, (value, _) in mine.items()}
      c = Comparison(stage, subject, metric, arm, baseline, over_seeds(list(by_seed.values())), by_seed=by_seed)
      both = [seed for seed in mine if seed in theirs]
      if arm != baseline and both:
        c.differences = {seed: mine[seed][1] - theirs[seed][1] for seed in both}
        c.theirs = {seed: theirs[seed][0] for seed in both}
        values = list(c.differences.values())
        c.difference, c.difference_noise = over_seeds(values), noise(np.array(values)[:, None])
      out.append(c)
  return out


def judge(figures: Figures, k: int) -> list[claims.Claim]:
  """Returns the claims. `k` is the k of Pass@k."""
  first, before, after = _stages(figures)
  found = compared(figures, ARMS[PLAIN])
  return claims.judged(ARMS, (first, before, after), {stage: {TEXT} for stage in (first, before, after)}, found, found,
                       [c for c in found if c.subject.startswith('reasoning:')], compared(figures, ARMS[HIGH]), k)


def _stages(figures: Figures) -> tuple[str, str, str]:
  """Returns the names of the first stage, the last one before RL, and RL."""
  stages = sorted({stage for stage, _, _ in figures}, key=lambda stage: stage.count('→'))
  return stages[0], stages[-2], stages[-1]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('files', nargs='+', metavar='FILE.csv')
  parser.add_argument('--k', type=int, default=32, help='the k of Pass@k')
  parser.add_argument('--pool', action='store_true', help='the same number in two files means different seeds')
  parser.add_argument('--plot', type=pathlib.Path, metavar='FILE.png')
  args = parser.parse_args()
  for file in args.files:
    if not pathlib.Path(file).is_file():
      parser.error(f'no such file: {file}')
  figures = read(args.files, args.pool)
  print("| claim | verdict | test | effect | p, Holm | of the test | seeds | detectable with 8 |\n"
        '|---|---|---|---|---|---|---|---|')
  for claim in judge(figures, args.k):
    for test in (*claim.tests, *claim.shown):
      e, f = test.effect, test.factor
      print(f'| {claim.letter} | {claim.verdict} | {test.what} | {e.mean * f:+.4g} [{e.low * f:.4g}, {e.high * f:.4g}] '
            f'{test.unit} | {test.p_holm:.2g} | {test.verdict} | {e.seeds} | {test.smallest_detectable(8) * f:.3g} |')
  _, before, after = _stages(figures)
  print('\n| stage | metric | arm | value, or difference to plain cross-entropy | p |\n|---|---|---|---|---|')
  shown = {(c.metric, c.arm, c.stage): c.difference or c.value for c in compared(figures, ARMS[PLAIN])
           if c.stage in (before, after) and c.subject.startswith('reasoning:')}
  for (metric, arm, stage), e in shown.items():
    if metric in ('avg_at_n', 'cons_at_n', f'pass_at_{args.k}'):
      p = '' if arm == ARMS[PLAIN] else f'{e.p_value:.2g}'
      print(f'| {stage} | {metric} | {arm} | {e.mean * 100:+.2f} [{e.low * 100:.2f}, {e.high * 100:.2f}] | {p} |')
  if args.plot:
    arms = sorted({arm for _, arm, _ in shown}, key=lambda arm: (arm != ARMS[PLAIN], arm))
    rows = [ForestRow(arm, '', *(shown.get(('avg_at_n', arm, stage)) for stage in (before, after)))
            for arm in arms[1:]]
    forest = Forest('plot', 'avg_at_n', 'Avg@n', f'difference to {ARMS[PLAIN]} (points)', rows)
    draw_forest(forest, arms, lambda name, content: name.endswith('.png') and args.plot.write_bytes(content))


if __name__ == '__main__':
  main()
