"""RL runs side by side, from what they wrote: betarank compare WORKDIR WORKDIR ... [--plot=FILE.png]

Prints a table of how each began and ended and draws the curves. Only reads; needs no device.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from betarank.eval.compare import COLOURS, canvas, curve, draw, names, save, show

KEYS = {'train/pass_rate': 'reward: share of right answers (dots: held out)',
        'train/entropy_nats': 'entropy (nats a token)', 'train/length_tokens': 'length (tokens)'}
FIRST_AND_LAST = 10  # steps that a figure of the beginning or the end is the mean of


def held_out(run: dict[str, Any]) -> dict[int, tuple[float, float]]:
  """{step: (Avg@n, standard error over problems)} of the evaluations."""
  key = f'eval/held_out/avg_at_{run["config"]["rl.eval_samples"]}'
  errors = curve(run, 'eval/held_out/standard_error')
  return {step: (value, errors[step]) for step, value in curve(run, key).items()}


def table(runs: list[dict[str, Any]]) -> Table:
  """Start -> end of each figure: on held-out questions ± one standard error, else the mean of ten steps."""
  out = Table(title=f'RL: start -> end (held out: ± standard error; else means of {FIRST_AND_LAST} steps)',
              title_justify='left', box=None, pad_edge=False)
  out.add_column('run', no_wrap=True)
  n = runs[0]['config']['rl.eval_samples']
  for column in ('steps', f'held out Avg@{n}', 'reward', 'entropy (nats)', 'length', 'truncated', 'tokens/s drawn'):
    out.add_column(column, justify='right', no_wrap=True)
  for label, run in zip(names(runs), runs):
    evaluations = [f'{mean:.3f} ± {error:.3f}' for mean, error in held_out(run).values()]
    ends = lambda key, form, run=run: ' -> '.join(
      f'{statistics.fmean(part):{form}}' for values in [list(curve(run, key).values())]
      for part in (values[:FIRST_AND_LAST], values[-FIRST_AND_LAST:]))
    out.add_row(
      label, str(max(curve(run, 'train/pass_rate'))),
      f'{evaluations[0]} -> {evaluations[-1]}' if evaluations else '-',
      ends('train/pass_rate', '.3f'), ends('train/entropy_nats', '.3f'), ends('train/length_tokens', '.1f'),
      ends('train/truncated_share', '.1%'), f'{statistics.median(curve(run, "time/tokens_per_s").values()):,.0f}')
  return out


def plot(runs: list[dict[str, Any]], path: str) -> None:
  """Reward (and, as dots, that on held-out questions), entropy and length over steps, as one picture."""
  labels = names(runs)
  figure, axes = canvas(len(KEYS))
  for axis, (key, title) in zip(axes, KEYS.items()):
    draw(axis, title, labels, [curve(run, key) for run in runs], lambda steps: max(FIRST_AND_LAST, steps // 12))
  for run, colour in zip(runs, COLOURS * len(runs)):
    if evaluations := held_out(run):
      means, errors = zip(*evaluations.values())
      axes[0].errorbar(list(evaluations), means, errors, fmt='o', color=colour, capsize=3)
  axes[0].autoscale(axis='y')
  save(figure, axes, path)


def main(argv: Sequence[str]) -> None:
  show(argv, 'betarank compare', __doc__, 'train/pass_rate', table, plot)
