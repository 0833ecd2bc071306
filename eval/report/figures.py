"""Draws the report's plots: small panels, as SVG in the page, and as SVG, PNG and CSV files.

Arms differ in colour and in line style. The colours are Okabe and Ito's palette, which colour-blind readers can
distinguish. The line styles distinguish arms in black-and-white print.
"""

import csv
import dataclasses
import html
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from betarank.eval.report.curves import Series
from betarank.eval.report.metrics import metric
from betarank.eval.statistics import Estimate

COLOURS = ('#000000', '#D55E00', '#0072B2', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
DASHES = ('solid', (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
SIZE = (4.2, 2.9)  # inches; text is then readable in a panel 340 px wide
TITLE = 52  # so many characters fit above a panel
NAME, LONG_NAME = 20, 48  # so many characters of an arm's name fit into a legend of two columns, and of one
FEW_POINTS = 12  # a line with no more points has markers, and bars instead of a band
WARM_UP = 0.08  # the axis ignores this share of a curve, because its first fall would make the rest flat
STYLE = {
  'font.family': 'sans-serif', 'font.size': 10, 'axes.titlesize': 10.5, 'axes.titlelocation': 'left',
  'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True, 'grid.color': '#dddddd',
  'grid.linewidth': 0.6, 'axes.axisbelow': True, 'lines.linewidth': 1.6, 'legend.frameon': False,
  'svg.fonttype': 'none',  # text stays text, which can be selected and is small
  'text.parse_math': False,  # names come from files, and a $ in a name doesn't begin a formula
}

Write = Callable[[str, bytes], None]  # (file name, content)


@dataclasses.dataclass
class Panel:
  """A plot with one line per arm.

  Attributes:
    name: the name of the panel's files, without suffix.
    title, x_label, y_label: the texts on the plot.
    series: the lines.
    x_scale, y_scale: 'linear' or 'log'.
    zero: whether to draw a horizontal line at zero, as is useful for differences.
    dodge: whether to shift the arms a little along a logarithmic x axis, so that their error bars don't overlap. Lines
      with more than FEW_POINTS points aren't shifted.
    settle: whether to ignore the first steps when the limits of the y axis are chosen.
    svg: the drawn panel, set by `draw`.
  """

  name: str
  title: str
  x_label: str
  series: list[Series]
  y_label: str = ''
  x_scale: str = 'linear'
  y_scale: str = 'linear'
  zero: bool = False
  dodge: bool = False
  settle: bool = False
  svg: str = ''


@dataclasses.dataclass(frozen=True)
class ForestRow:
  """A row of a forest plot: the difference between an arm and its baseline in one metric, before and after RL.

  Attributes:
    arm: the name of the arm.
    subject: what the metric is measured on, such as a benchmark.
    before, after: the difference before RL, and after RL; None if unknown.
    remark: a text to show after the name, such as why both differences are unknown.
  """

  arm: str
  subject: str
  before: Estimate | None
  after: Estimate | None
  remark: str = ''  # why there is none


@dataclasses.dataclass
class Forest:
  """A forest plot of one metric.

  Each row shows how much an arm differs from its baseline, once before RL and once after RL, with intervals.
  """

  name: str
  metric: str
  title: str
  x_label: str
  rows: list[ForestRow]
  svg: str = ''


def colour(i: int) -> str:
  return COLOURS[i % len(COLOURS)]


def dash(i: int):
  """Returns the line style of arm number `i`, for matplotlib. Arms that have the same colour have different line
  styles.
  """
  return DASHES[(i + i // len(COLOURS)) % len(DASHES)]


def dodge(count: int, i: int, width: float) -> float:
  """Returns how far to shift mark number `i` of `count` marks at the same x, so that their error bars don't overlap.

  width: the distance between the first and the last mark after the shift.
  """
  return width * (i - (count - 1) / 2) / max(count - 1, 1)


# Lines


def draw(panel: Panel, arms: Sequence[str], write: Write) -> None:
  """Draws a panel, and sets panel.svg. Writes NAME.svg and NAME.png, which have a legend, and NAME.csv with the values.

  arms: all arms of the report. The index of an arm in this list selects its colour and line style.
  write: a function that takes a file name and the content, and writes the file.
  """
  with matplotlib.rc_context({**STYLE, 'svg.hashsalt': panel.name}):
    figure = Figure(figsize=SIZE)
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    _place(figure, axis, SIZE[1], 0)
    for place, series in enumerate(panel.series):
      _draw_line(axis, panel, series, arms.index(series.arm), place)
    if panel.zero:
      axis.axhline(0, color='#555555', linewidth=0.8, zorder=1)
    axis.set_title(_fit(panel.title, TITLE))
    axis.set_xlabel(panel.x_label)
    axis.set_ylabel(panel.y_label)
    _scale(axis, panel)
    panel.svg = _inline(_save(figure, 'svg').decode(), panel.title)
    columns = 2 if all(len(series.arm) <= NAME for series in panel.series) else 1
    figure.legend(loc='lower center', ncols=columns, fontsize=9)
    _place(figure, axis, SIZE[1], -(-len(panel.series) // columns))
    _write_both(figure, panel.name, write)
    write(f'{panel.name}.csv', table(('arm', 'x', 'mean', 'low', 'high', 'seeds'), (
      (s.arm, *row, s.seeds) for s in panel.series for row in zip(s.x_X, s.mean_X, s.low_X, s.high_X))))


def _draw_line(axis, panel: Panel, series: Series, i: int, place: int) -> None:
  if panel.y_scale == 'log':  # zeros aren't drawn
    series = dataclasses.replace(series, **{
      name: np.where(getattr(series, name) > 0, getattr(series, name), np.nan)
      for name in ('mean_X', 'low_X', 'high_X')})
  style = dict(color=colour(i), linestyle=dash(i), label=_fit(series.arm, LONG_NAME))
  x_X, banded = series.x_X, np.isfinite(series.low_X).any()
  if len(x_X) > FEW_POINTS:
    if banded:
      axis.fill_between(x_X, series.low_X, series.high_X, color=colour(i), alpha=0.16, linewidth=0)
    axis.plot(x_X, series.mean_X, **style)
    return
  if panel.dodge:
    x_X = x_X * 2 ** dodge(len(panel.series), place, 0.3)
  axis.plot(x_X, series.mean_X, marker='o', markersize=3, **style)
  if banded:
    axis.vlines(x_X, series.low_X, series.high_X, color=colour(i), linewidth=1)


def _scale(axis, panel: Panel) -> None:
  if panel.x_scale == 'log':
    axis.set_xscale('log', base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f'{x:,.0f}' if x >= 1 else f'{x:g}')
  else:
    axis.xaxis.set_major_formatter(_compact)
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
  if panel.y_scale == 'log':
    axis.set_yscale('log')
    axis.yaxis.set_major_formatter(lambda y, _: f'{y:g}')
    axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
  if panel.settle:
    drawn = [np.concatenate([s.mean_X[len(s.x_X) * WARM_UP <= np.arange(len(s.x_X))] for s in panel.series])]
    drawn += [x for s in panel.series for x in (s.low_X[len(s.x_X) // 4:], s.high_X[len(s.x_X) // 4:])]
    values = np.concatenate(drawn)
    values = values[np.isfinite(values)]
    if len(values) and np.ptp(values) > 0:
      margin = 0.06 * np.ptp(values)
      axis.set_ylim(values.min() - margin, values.max() + margin)


def _compact(x: float, _) -> str:
  """Returns a number in a short form, such as '1.5M', '20k' or '300'."""
  for size, letter in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if abs(x) >= size:
      return f'{x / size:g}{letter}'
  return f'{x:g}'


# Forest plots


def draw_forest(forest: Forest, arms: Sequence[str], write: Write) -> None:
  """Draws a forest plot, and sets forest.svg. Writes NAME.svg, NAME.png and NAME.csv.

  An open circle shows the difference between an arm and its baseline before RL, and a filled circle the difference
  after RL. The name of the arm is above the two circles.

  arms, write: as in `draw`.
  """
  factor = metric(forest.metric).factor
  with matplotlib.rc_context({**STYLE, **_LARGE, 'svg.hashsalt': forest.name}):
    figure = Figure()
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    title = textwrap.wrap(forest.title, _TITLE_COLUMNS)
    _place(figure, axis, 0.9 + 0.66 * len(forest.rows), 0, left=0.32, right=0.32, title_lines=len(title))
    for y, row in enumerate(forest.rows):
      i = arms.index(row.arm)
      name = ' · '.join(filter(None, (row.arm, row.subject, row.remark)))
      axis.text(0, y - 0.26, _fit(name, TITLE), transform=axis.get_yaxis_transform(), va='center', fontsize=11,
                bbox=dict(facecolor='white', edgecolor='none', pad=1))
      for e, lift, face in ((row.before, 0.02, 'white'), (row.after, 0.26, colour(i))):
        if e is None:
          continue
        if math.isfinite(e.low) and math.isfinite(e.high):
          axis.plot([factor * e.low, factor * e.high], [y + lift] * 2, color=colour(i), linewidth=1.6,
                    solid_capstyle='butt', linestyle='solid' if e.seeds > 1 else (0, (1.5, 1)))
        axis.plot(factor * e.mean, y + lift, marker='o', markersize=5.5, color=colour(i), markerfacecolor=face)
    axis.axvline(0, color='#555555', linewidth=0.9, zorder=1)
    axis.set_ylim(len(forest.rows) - 0.5, -0.5)
    axis.set_yticks([])
    axis.spines['left'].set_visible(False)
    axis.set_title('\n'.join(title), fontsize=10 if len(forest.title) > _LARGE_TITLE else None)
    axis.set_xlabel(forest.x_label)
    shown = [factor * x for row in forest.rows for e in (row.before, row.after) if e is not None
             for x in (e.low, e.mean, e.high)]
    _set_range(axis, shown, least=10 * 10.0 ** -int(metric(forest.metric).form.strip('.f')))
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    forest.svg = _inline(_save(figure, 'svg').decode(), forest.title)
    _write_both(figure, forest.name, write)
    write(f'{forest.name}.csv', table(('arm', 'subject', 'when', 'difference', 'low', 'high', 'seeds'), (
      (row.arm, row.subject, when, e.mean, e.low, e.high, e.seeds) for row in forest.rows
      for when, e in (('before RL', row.before), ('after RL', row.after)) if e is not None)))


_LARGE = {'font.size': 12, 'axes.titlesize': 12.5}  # larger, because up to four forest plots are side by side
# Letters that fit in a line of a forest plot's title, in its small font and in its large one.
_TITLE_COLUMNS, _LARGE_TITLE = 44, 34


def _set_range(axis, values: Sequence[float], least: float) -> None:
  """Sets the limits of the x axis, so that it shows zero and all finite values.

  least: the smallest distance between the limits. Without it, differences that are only due to rounding would fill the
    axis.
  """
  finite = [0.0, *(x for x in values if math.isfinite(x))]
  low, high = min(finite), max(finite)
  margin = max(0.08 * (high - low), (least - (high - low)) / 2)
  axis.set_xlim(low - margin, high + margin)


# Parts


def _place(figure: Figure, axis, height: float, legend_lines: int, left: float = 0.75, right: float = 0.12,
           title_lines: int = 1) -> None:
  """Sets the size of a figure, and fixed margins in inches, so that panels line up on the page.

  Matplotlib's layout engines aren't used, because they take longer than the drawing itself.

  height: the height of the figure without its legend, in inches.
  legend_lines, title_lines: the number of lines of the legend and of the title.
  left, right: the left and the right margin in inches.
  """
  above = 0.3 + 0.18 * (title_lines - 1)
  below = 0.52 + 0.2 * legend_lines + 0.06 * (legend_lines > 0)
  total = height + below - 0.52 + above - 0.3
  figure.set_size_inches(SIZE[0], total)
  axis.set_position((left / SIZE[0], below / total, (SIZE[0] - left - right) / SIZE[0],
                     (total - below - above) / total))


def _fit(title: str, size: int) -> str:
  return title if len(title) <= size else title[: size - 3] + '...'


def _write_both(figure: Figure, name: str, write: Write) -> None:
  write(f'{name}.svg', _save(figure, 'svg'))
  write(f'{name}.png', _save(figure, 'png'))


def _save(figure: Figure, kind: str) -> bytes:
  out = io.BytesIO()
  figure.savefig(out, format=kind, dpi=160, metadata={'Date': None} if kind == 'svg' else None)
  return out.getvalue()


def _inline(svg: str, title: str) -> str:
  """Returns the <svg> element of an SVG file, without a fixed size and with `title` as its label, to be put into an
  HTML page.

  The ids in the element are unique on the page, because each plot is drawn with a different svg.hashsalt.
  """
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg[svg.index('<svg'):], flags=re.DOTALL)
  opening = re.search(r'viewBox="[^"]*"', svg)[0]
  return (f'<svg {opening} role="img" aria-label="{html.escape(title)}" xmlns="http://www.w3.org/2000/svg" '
          f'xmlns:xlink="http://www.w3.org/1999/xlink">{svg[svg.index(">") + 1:]}')


def swatch(i: int) -> str:
  """Returns a short sample of an arm's line as an <svg> element, for legends.

  i: the index of the arm.
  """
  pattern = dash(i)
  array = '' if pattern == 'solid' else f' stroke-dasharray="{" ".join(f"{2 * x:g}" for x in pattern[1])}"'
  return (f'<svg class="swatch" viewBox="0 0 36 8" aria-hidden="true"><line x1="0" y1="4" x2="36" y2="4" '
          f'stroke="{colour(i)}" stroke-width="3"{array}/></svg>')


def circle(filled: bool) -> str:
  """Returns a circle as an <svg> element, for the legend of forest plots: filled for after RL, open for before RL."""
  return (f'<svg class="mark" viewBox="0 0 12 12" aria-hidden="true"><circle cx="6" cy="6" r="4.5" stroke="#1a1a1a" '
          f'stroke-width="1.8" fill="{"#1a1a1a" if filled else "#fff"}"/></svg>')


def table(titles: Sequence[str], rows: Iterable[Sequence]) -> bytes:
  """Returns the content of a CSV file. A text that a spreadsheet would read as a formula gets a leading apostrophe."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow(titles)
  formula = lambda cell: isinstance(cell, str) and cell[:1] in ('=', '+', '-', '@')
  for row in rows:
    writer.writerow([f"'{cell}" if formula(cell) else cell for cell in row])
  return out.getvalue().encode()
