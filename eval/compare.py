"""Runs side by side, from what they wrote: betarank compare WORKDIR WORKDIR ... [--plot=FILE.png]

Prints a table of the last validation figures and draws the curves. Only reads; needs no device.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath
from rich.console import Console
from rich.table import Table

from betarank.configs.errors import ConfigError
from betarank.configs.load import check_places, flatten, read
from betarank.runtime.metrics import read_lines

KEYS = {'train/ce_nats': 'cross-entropy (nats)', 'train/entropy_nats': 'entropy (nats)'}
COLUMNS = {'ce_nats': '.4f', 'bits_per_byte': '.4f', 'entropy_nats': '.4f', 'tail_mass': '.5f', 'rank1_accuracy': '.4f'}
# Okabe and Ito's colours: told apart by colour-blind readers too.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')


def read_run(path: str, key: str = 'train/ce_nats') -> dict[str, Any]:
  """{'config': flat config, 'lines': metrics}. Raises ConfigError if `path` is no workdir of a run that wrote `key`."""
  check_places({'WORKDIR': path}, '')
  root = epath.Path(path)
  if not (root / 'config.json').exists():
    raise ConfigError(f'{path}: no run there (no config.json)')
  run = {'path': path, 'config': flatten(read(str(root / 'config.json'))), 'lines': read_lines(root / 'metrics.jsonl')}
  if not any(key in line for line in run['lines']):
    raise ConfigError(f'{path}: no {key} in its metrics.jsonl; this run has not finished a step yet, or is of another '
                      'kind')
  return run


def names(runs: list[dict[str, Any]]) -> list[str]:
  """What tells the runs apart: the settings in which their configs differ."""
  keys = sorted({k for run in runs for k in run['config'] if k != 'data.dir'
                 and any(run['config'].get(k) != other['config'].get(k) for other in runs)})
  starts = [str(run['config'].get('train.init_from')).strip('/').split('/') for run in runs]
  while len({start[-1] for start in starts}) == 1 and min(map(len, starts)) > 1:
    starts = [start[:-1] for start in starts]  # runs/beta=0/pretrain and runs/beta=1/pretrain
  labels = [', '.join(f'{k.rsplit(".", 1)[-1]}={start[-1] if k == "train.init_from" else run["config"].get(k)}'
                      for k in keys) for run, start in zip(runs, starts)]
  return [label or run['path'] for label, run in zip(labels, runs)]


def last_evaluation(run: dict[str, Any]) -> dict[str, float]:
  """{'SOURCE/ce_nats': ...} of the newest validation of each source."""
  figures = {}
  for line in run['lines']:
    figures |= {k.removeprefix('eval/'): v for k, v in line.items() if k.startswith('eval/')}
  return figures


def table(runs: list[dict[str, Any]]) -> Table:
  """The figures that decide: is cross-entropy equal, is entropy not."""
  out = Table(title='validation, after the last step', title_justify='left', box=None, pad_edge=False)
  out.add_column('run', no_wrap=True)
  for column in ('step', 'CE (nats)', 'bits/byte', 'entropy (nats)', 'tail mass', 'rank-1', 'tokens/s'):
    out.add_column(column, justify='right', no_wrap=True)
  for label, run in zip(names(runs), runs):
    figures = last_evaluation(run)
    steps = [line for line in run['lines'] if 'train/ce_nats' in line]
    # The median step: compiling and a busy machine make outliers.
    speed = statistics.median(line['time/tokens_per_s'] for line in steps)
    sources = sorted({name.split('/')[0] for name in figures}) or ['']
    for source in sources:
      shown = [f'{figures[f"{source}/{name}"]:{form}}' if f'{source}/{name}' in figures else '-'
               for name, form in COLUMNS.items()]
      name = f'{label} on {source}' if len(sources) > 1 else label
      out.add_row(name, str(steps[-1]['step']), *shown, f'{speed:,.0f}')
  return out


def plot(runs: list[dict[str, Any]], path: str) -> None:
  """Cross-entropy and entropy over steps, and how far each run is from the first, as one picture."""
  labels = names(runs)
  curves = [{key: curve(run, key) for key in KEYS} for run in runs]
  figure, axes = canvas(3)
  for axis, (key, title) in zip(axes, KEYS.items()):
    draw(axis, title, labels, [c[key] for c in curves], lambda steps: max(20, steps // 25))
  for c, colour in list(zip(curves, COLOURS * len(runs)))[1:]:
    for style, key in zip(('--', '-'), KEYS):
      shared = [step for step in c[key] if step in curves[0][key]]
      values = smooth([c[key][step] - curves[0][key][step] for step in shared], max(50, len(shared) // 12))
      axes[2].plot(shared, values, style, color=colour, linewidth=1.5)
  axes[2].axhline(0, color='black', linewidth=0.8)
  axes[2].set(title=f'difference from {labels[0]}', ylabel='entropy; dashed: cross-entropy (nats)')
  save(figure, axes, path)


def curve(run: dict[str, Any], key: str) -> dict[int, float]:
  """{step: value} of one figure."""
  return {line['step']: line[key] for line in run['lines'] if key in line}


def canvas(panels: int):
  """A matplotlib figure and its `panels` axes, side by side."""
  import matplotlib
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  return plt.subplots(1, panels, figsize=(13, 3.8), constrained_layout=True)


def draw(axis, title: str, labels: list[str], curves: list[dict[int, float]], window: Callable[[int], int]) -> None:
  """A smoothed line for each run; window(steps) is how many steps a point is the mean of."""
  settled = []
  for label, values, colour in zip(labels, curves, COLOURS * len(curves)):
    smoothed = smooth(list(values.values()), window(len(values)))
    settled += smoothed[len(smoothed) // 10:]  # the first steps would flatten all that matters
    axis.plot(list(values), smoothed, color=colour, label=label, linewidth=1.5)
  low, high = min(settled), max(settled)
  axis.set(title=title, ylim=(low - 0.05 * (high - low), high + 0.05 * (high - low)) if high > low else None)


def save(figure, axes, path: str) -> None:
  import matplotlib.pyplot as plt

  for axis in axes:
    axis.set_xlabel('step')
    axis.spines[['top', 'right']].set_visible(False)
    axis.grid(alpha=0.25)
  figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4, frameon=False)
  figure.savefig(path, dpi=130)
  plt.close(figure)


def smooth(values: list[float], window: int) -> list[float]:
  """Mean of the last `window` values at each point."""
  return [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def show(
  argv: Sequence[str], prog: str, doc: str, key: str, table: Callable[..., Table], plot: Callable[..., None]
) -> None:
  """The command line of a comparison of runs that have written `key`."""
  parser = argparse.ArgumentParser(prog=prog, description=doc, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('workdirs', nargs='+')
  parser.add_argument('--plot', default='', metavar='FILE.png')
  args = parser.parse_args(argv)
  runs = [read_run(path, key) for path in args.workdirs]
  Console(width=None if sys.stdout.isatty() else 240).print(table(runs))
  if args.plot:
    plot(runs, args.plot)
    print(f'curves: {args.plot}')


def main(argv: Sequence[str]) -> None:
  show(argv, 'betarank compare', __doc__, 'train/ce_nats', table, plot)
