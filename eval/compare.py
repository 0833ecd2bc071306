"""Compares runs from what they logged: betarank compare WORKDIR WORKDIR ... [--plot=FILE.png|FILE.svg]

Prints a table: the last validation of pre-training runs, or the start and the end of RL runs. With --plot, draws the
curves. Runs are named by the settings in which they differ. The command only reads files and needs no accelerator.
"""

import dataclasses
import io
import math
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from betarank.configs.errors import ConfigError
from betarank.configs.files import write_atomically
from betarank.configs.load import flatten, read
from betarank.configs.parser import Parser, place
from betarank.eval.columns import Columns
from betarank.eval.report.figures import STYLE, colour, dash, dodge
from betarank.eval.report.runs import Curve, number
from betarank.runtime.metrics import lines_of

KINDS = {'train/pass_rate': 'RL', 'train/ce_nats': 'pre-training'}  # a metric -> the kind of run that logs it
VALIDATION = {'ce_nats': ('CE (nats)', '.4f'), 'bits_per_byte': ('bits/byte', '.4f'),
              'entropy_nats': ('entropy (nats)', '.4f'), 'tail_mass': ('tail mass', '.5f'),
              'rank1_accuracy': ('rank-1', '.4f')}
DYNAMICS = {'pass_rate': ('reward', '.3f'), 'entropy_nats': ('entropy (nats)', '.3f'),
            'length_tokens': ('length', '.1f'), 'truncated_share': ('truncated', '.1%')}
SHOWN = {*KINDS, *(f'train/{name}' for name in DYNAMICS), 'time/tokens_per_s'}  # metrics of training that are used
FIRST_AND_LAST = 10  # the figures at the start and the end of an RL run are means over so many steps
WIDTH = 80  # the width of the table in columns, if there is no terminal
LABEL = 22  # if a name is longer, the table has numbers, and a legend explains them
FORMATS = ('png', 'svg')
LEGEND, LEGEND_KEY = 115, 10  # characters in a line of the legend; the room that a line's sample takes, in characters


@dataclasses.dataclass(frozen=True)
class Run:
  """The settings of a run, and the metrics that it logged.

  Attributes:
    path: the workdir of the run.
    kind: 'RL' or 'pre-training'.
    config: the settings of the run, {dotted key: value}.
    curves: {metric: (steps [X], values [X])}, from the run's metrics.jsonl.
  """

  path: str
  kind: str
  config: Mapping[str, Any]
  curves: Mapping[str, Curve]

  def curve(self, key: str) -> Curve:
    """Returns (steps [X], values [X]) of the metric `key`, without the steps at which the value isn't finite."""
    steps, values = self.curves.get(key, (np.array([], np.int64), np.array([])))
    there = np.isfinite(values)
    return steps[there], values[there]

  @property
  def last_step(self) -> int:
    """The last step of training that was logged."""
    return int(self.curves[next(key for key, kind in KINDS.items() if kind == self.kind)][0][-1])


def read_run(path: str) -> Run:
  """Returns the run in the workdir `path`.

  Raises:
    ConfigError: there is no run in the workdir, or the run hasn't finished a step.
  """
  root = epath.Path(path)
  if not (root / 'config.json').exists():
    raise ConfigError(f'{path}: no run there (no config.json)')
  columns = Columns()
  for line in lines_of(root / 'metrics.jsonl'):
    for name, value in line.items() if 0 <= line['step'] < 2**53 else ():
      if name in SHOWN or name.startswith('eval/'):
        columns.add(line['step'], name, number(value))
  curves = columns.curves()
  kind = next((kind for key, kind in KINDS.items() if key in curves), '')
  if not kind:
    raise ConfigError(f'{path}: no {" or ".join(KINDS)} in its metrics.jsonl; this run has not finished a step yet')
  return Run(path, kind, flatten(read(str(root / 'config.json'))), curves)


def read_runs(paths: Sequence[str]) -> list[Run]:
  """Returns the runs in several workdirs. Raises ConfigError if RL runs and pre-training runs are mixed."""
  runs = [read_run(path) for path in paths]
  other = next((run for run in runs if run.kind != runs[0].kind), None)
  if other:
    raise ConfigError(f'{other.path}: a run of {other.kind}, and {runs[0].path} is one of {runs[0].kind}; compare runs '
                      'of one kind')
  return runs


def names(runs: Sequence[Run]) -> list[str]:
  """Returns a name for each run, which lists the settings that differ between the runs, such as 'beta=-0.25, seed=1'.

  If no setting differs, or if there is only one run, a run's name is its path.
  """
  keys = sorted({key for run in runs for key in run.config if key != 'data.dir'
                 and any(run.config.get(key) != other.config.get(key) for other in runs)})
  starts = [str(run.config.get('train.init_from')).strip('/').split('/') for run in runs]
  while len({start[-1] for start in starts}) == 1 and min(map(len, starts)) > 1:
    starts = [start[:-1] for start in starts]  # runs/beta=0/pretrain and runs/beta=1/pretrain
  leaves = [key.rsplit('.', 1)[-1] for key in keys]
  short = [leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(keys, leaves)]
  labels = [', '.join(f'from {start[-1]}' if key == 'train.init_from' else f'{name}={run.config.get(key)}'
                      for key, name in zip(keys, short)) for run, start in zip(runs, starts)]
  return [label or run.path for label, run in zip(labels, runs)]


# Tables


def report(runs: Sequence[Run], width: int) -> str:
  """Returns the table of the runs as text, fitted to `width` characters as in `blocks`.

  If a name is longer than LABEL, all runs are numbered in the table, and a legend above it gives the names.
  """
  labels, legend = names(runs), []
  if max(map(len, labels)) > LABEL:
    for number, label in enumerate(labels, 1):
      legend += textwrap.wrap(f'{number}  {label}', width, subsequent_indent='   ')
    labels = [str(number) for number in range(1, len(runs) + 1)]
  make = _of_rl if runs[0].kind == 'RL' else _of_pretraining
  title, columns, rows, notes = make(runs, labels)
  body = blocks(columns, rows, width)
  notes = [line for note in notes for line in textwrap.wrap(note, width)]
  return '\n'.join([*legend, *([''] if legend else []), *textwrap.wrap(title, width), *body, *notes])


def _of_pretraining(runs: Sequence[Run], labels: Sequence[str]):
  """Returns (title, column titles, rows, notes) of the table of pre-training runs.

  The table has one row for each run and each source of its validation data. A row has the metrics of the run's last
  validation on this source. The table is meant to show whether runs have equal cross-entropy but different entropy.

  labels: the names of the runs in the table.
  """
  rows, notes, steps = [], [], {}
  for label, run in zip(labels, runs):
    found = {source: last_validation(run, source) for source in _sources(run)} or {'': {}}
    last = run.last_step
    speed = _median(run.curve('time/tokens_per_s'))
    for source, figures in found.items():
      step = figures.get('step')
      steps.setdefault(source, set()).add(step)
      rows.append([f'{label} {source}' if len(found) > 1 else label, '-' if step is None else str(step),
                   *(f'{figures[name]:{form}}' if name in figures else '-' for name, (_, form) in VALIDATION.items()),
                   speed])
    behind = {figures.get('step') for figures in found.values()} - {last}
    if behind:
      when = ', '.join('none yet' if step is None else f'step {step}' for step in behind)
      notes.append(f'{label}: at step {last}; last validation: {when}')
  if any(len(found) > 1 for found in steps.values()):
    notes.append('The validations are of different steps: their figures can\'t be compared.')
  columns = ['run', 'step', *(title for title, _ in VALIDATION.values()), 'tokens/s']
  return 'Last validation of each run, and its step', columns, rows, notes


def last_validation(run: Run, source: str) -> dict[str, float]:
  """Returns {'step': step, metric: value, ...} of the newest validation on the data `source`; {} if there is none.

  Metrics that weren't logged at this step are left out.
  """
  start = f'eval/{source}/'
  if f'{start}ce_nats' not in run.curves:
    return {}
  step = run.curves[f'{start}ce_nats'][0][-1]
  return {'step': int(step), **{key.removeprefix(start): float(values[-1]) for key, (steps, values)
                                in run.curves.items() if key.startswith(start) and steps[-1] == step}}


def _sources(run: Run) -> list[str]:
  return sorted({key.split('/')[1] for key in run.curves if key.startswith('eval/') and key.endswith('/ce_nats')})


def _of_rl(runs: Sequence[Run], labels: Sequence[str]):
  """Returns (title, column titles, rows, notes) of the table of RL runs.

  Most cells show a metric at the start and at the end of a run, as 'start -> end'.

  labels: the names of the runs in the table.
  """
  held_out = sorted({key for run in runs for key in evaluations(run)})
  rows, notes = [], []
  for label, run in zip(labels, runs):
    found = evaluations(run)
    ends = [_arrow(*(_with_error(*list(found[key].values())[at]) for at in (0, -1))) if key in found else '-'
            for key in held_out]
    figures = [_ends(run.curve(f'train/{name}'), form) for name, (_, form) in DYNAMICS.items()]
    rows.append([label, str(run.last_step), *ends, *figures,
                 _median(run.curve('time/tokens_per_s'))])
  if len({row[1] for row in rows}) > 1:
    notes.append('The runs are at different steps: their ends can\'t be compared.')
  columns = ['run', 'steps', *held_out, *(title for title, _ in DYNAMICS.values()), 'tokens/s drawn']
  return (f'RL, start -> end: held-out problems ± standard error over problems; all else, reward included, means of '
          f'{FIRST_AND_LAST} training steps'), columns, rows, notes


def evaluations(run: Run) -> dict[str, dict[int, tuple[float, float]]]:
  """Returns the results of the evaluations during RL: {'held_out Avg@16': {step: (mean, standard error)}}.

  The standard error is NaN if it wasn't logged.
  """
  found = {}
  for key in sorted(key for key in run.curves if key.startswith('eval/') and '/avg_at_' in key):
    _, subject, name = key.split('/', 2)
    errors = dict(zip(*run.curve(f'eval/{subject}/standard_error')))
    found[f'{subject} {name.replace("avg_at_", "Avg@")}'] = {
      int(step): (float(value), float(errors.get(step, math.nan))) for step, value in zip(*run.curve(key))}
  return {key: values for key, values in found.items() if values}


def _with_error(value: float, error: float) -> str:
  return f'{value:.3f} ± {error:.3f}' if math.isfinite(error) else f'{value:.3f}'


def _ends(curve: Curve, form: str) -> str:
  _, values = curve
  parts = values[:FIRST_AND_LAST], values[-FIRST_AND_LAST:]
  return _arrow(*(f'{part.mean():{form}}' for part in parts)) if len(values) else '-'


def _arrow(start: str, end: str) -> str:
  return f'{start} -> {end}'


def _median(curve: Curve) -> str:
  """Returns the median of a curve's values as text; '-' if there are no values.

  The median is used because compilation and a busy machine make some steps much slower than the others.
  """
  _, values = curve
  return f'{np.median(values):,.0f}' if len(values) else '-'


def blocks(titles: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
  """Returns the lines of a text table, fitted to `width` characters.

  If not all columns fit next to each other, the remaining columns follow below, after a copy of the first column. Long
  titles are wrapped between words. Cells are never cut, so a wide cell can make a line longer than `width`.
  """
  def size(column: int) -> int:
    return max(*(len(row[column]) for row in rows), *map(len, titles[column].split()))

  lines, left = [], list(range(1, len(titles)))
  while left:
    shown, used = [], size(0)
    while left and (not shown or used + 2 + size(left[0]) <= width):
      used += 2 + size(left[0])
      shown.append(left.pop(0))
    heads = {column: textwrap.wrap(titles[column], size(column)) for column in (0, *shown)}
    height = max(map(len, heads.values()))
    texts = [[([''] * (height - len(heads[column])) + heads[column])[line] for column in (0, *shown)]
             for line in range(height)]
    texts += [[row[column] for column in (0, *shown)] for row in rows]
    lines += ['  '.join(f'{cell:{"<" if column == 0 else ">"}{size(column)}}' for cell, column in
                        zip(text, (0, *shown))).rstrip() for text in texts]
    lines += [''] if left else []
  return lines


# Curves


def plot(runs: Sequence[Run], path: str) -> None:
  """Draws four panels, and saves them to `path`, local or in a bucket. Its folder is created if needed.

  For pre-training runs, two panels show cross-entropy and entropy, and two show the differences of both to the first
  run. For RL runs, the panels show reward, held-out problems, entropy and length. The legend names each run by the
  settings in which the runs differ.
  """
  import matplotlib

  drawn = io.BytesIO()
  with matplotlib.rc_context(STYLE):
    draw(runs).savefig(drawn, format=path.rpartition('.')[2], dpi=130)
  write_atomically(path, drawn.getvalue())


def draw(runs: Sequence[Run]) -> Any:
  """Returns the figure that `plot` saves, a matplotlib Figure."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  labels = [textwrap.fill(name, LEGEND - LEGEND_KEY) for name in names(runs)]
  longest = max(len(line) for label in labels for line in label.splitlines())
  columns = max(1, min(3, LEGEND // (longest + LEGEND_KEY)))
  lines = sum(label.count('\n') + 1 for label in labels) / columns
  figure = Figure(figsize=(10, 6.4 + 0.2 * lines), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots(2, 2).flat
  (_draw_rl if runs[0].kind == 'RL' else _draw_pretraining)(list(axes), runs, labels)
  figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=columns)
  return figure


def _draw_pretraining(axes, runs: Sequence[Run], labels: Sequence[str]) -> None:
  for column, (key, title) in enumerate((('train/ce_nats', 'cross-entropy (nats)'),
                                         ('train/entropy_nats', 'entropy (nats)'))):
    curves = [run.curve(key) for run in runs]
    _draw(axes[column], title, labels, curves, lambda steps: max(20, steps // 25))
    less = [_less(curve, curves[0]) for curve in curves]
    _draw(axes[2 + column], f'{title} less that of {_short(labels[0])}', labels, less,
          lambda steps: max(50, steps // 12))


def _less(curve: Curve, other: Curve) -> Curve:
  """Returns the curve `curve - other`, at the steps that both curves have."""
  steps, mine, theirs = np.intersect1d(curve[0], other[0], assume_unique=True, return_indices=True)
  return steps, curve[1][mine] - other[1][theirs]


def _draw_rl(axes, runs: Sequence[Run], labels: Sequence[str]) -> None:
  window = lambda steps: max(FIRST_AND_LAST, steps // 12)
  _draw(axes[0], 'reward on training prompts', labels, [run.curve('train/pass_rate') for run in runs], window, 0)
  _draw(axes[2], 'entropy (nats)', labels, [run.curve('train/entropy_nats') for run in runs], window, 0)
  _draw(axes[3], 'length (tokens)', labels, [run.curve('train/length_tokens') for run in runs], window, 0, 0.2)
  found = [evaluations(run) for run in runs]
  subject = next((key for some in found for key in some), '')
  axes[1].set(title=f'{subject}, ± standard error' if subject else 'nothing was evaluated', xlabel='step')
  longest = max(run.last_step for run in runs)
  for i, some in enumerate(found):
    if values := some.get(subject):
      means, errors = zip(*values.values())
      steps = [step + dodge(len(runs), i, 0.02 * longest) for step in values]
      bars = [0 if math.isnan(error) else error for error in errors]
      axes[1].errorbar(steps, means, bars, fmt='o', linestyle=dash(i), markersize=4, linewidth=1, color=colour(i),
                       capsize=3)


def _draw(axis, title: str, labels: Sequence[str], curves: Sequence[Curve], window: Callable[[int], int],
          first: float = 0.1, least: float = 0.0) -> None:
  """Draws a smoothed line for each run. The title of the x axis says how many steps are averaged.

  labels: the name of each run.
  curves: the (steps, values) of each run.
  window: a function that takes the number of points of the longest curve, and returns the number of points to average.
  first: the fraction of each curve, from its beginning, that is ignored when the range of the y axis is chosen. Without
    it, the steep fall of a loss in the first steps would make the rest of the curve look flat.
  least: the smallest range of the y axis, as a fraction of the value in the middle of the axis.
  """
  size, settled = window(max(len(steps) for steps, _ in curves)), []
  for i, (label, (steps, values)) in enumerate(zip(labels, curves)):
    smoothed = smooth(values, size)
    settled.append(smoothed[int(first * len(smoothed)):])
    axis.plot(steps, smoothed, color=colour(i), linestyle=dash(i), label=label, linewidth=1.5)
  axis.set(title=title, xlabel=f'step (each point: mean of the last {size} steps)')
  if len(settled := np.concatenate(settled)):
    low, high = settled.min(), settled.max()
    spare = max(0.05 * (high - low), (least * abs(high + low) / 2 - (high - low)) / 2)
    if spare > 0:
      axis.set_ylim(low - spare, high + spare)


def _short(label: str) -> str:
  return label if len(label) <= LABEL else 'the first run'


def smooth(values: np.ndarray, window: int) -> np.ndarray:
  """Returns the moving average of values [X]. Entry i is the mean of the last `window` values up to and including i."""
  total = np.concatenate([[0.0], np.cumsum(values)])
  last = np.arange(1, len(values) + 1)
  first = np.maximum(last - window, 0)
  return (total[last] - total[first]) / (last - first)


def main(argv: Sequence[str]) -> None:
  parser = Parser('betarank compare', __doc__)
  parser.add_argument('workdirs', nargs='+', type=place, metavar='WORKDIR', help='the workdirs of runs; local or gs://')
  parser.add_argument('--plot', type=place, metavar='FILE.png|FILE.svg',
                      help='also draw the curves, and save them to this file')
  args = parser.parse_args(argv)
  if args.plot and args.plot.rpartition('.')[2] not in FORMATS:
    raise ConfigError(f'--plot={args.plot}: must end in .{" or .".join(FORMATS)}')
  runs = read_runs(args.workdirs)
  print(report(runs, shutil.get_terminal_size((WIDTH, 24)).columns))
  if args.plot:
    plot(runs, args.plot)
    print(f'curves: {args.plot}')
