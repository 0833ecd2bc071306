"""A report's figures: each a small panel, as SVG for the page, and as SVG, PNG and CSV files.

Arms differ in colour and in line style: Okabe and Ito's palette, told apart by colour-blind readers, and in grey print.
"""

import csv
import dataclasses
import html
import io
import re
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from betarank.eval.report.comparisons import Series

COLOURS = ('#000000', '#D55E00', '#0072B2', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
DASHES = ('solid', (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
SIZE = (4.6, 3.0)  # inches: text is readable where the page shows a panel 360 px wide
TITLE = 58  # characters that fit above a panel
WARM_UP = 0.08  # of a curve, that doesn't decide the axis: the first fall would flatten all that matters
STYLE = {
  'font.family': 'sans-serif', 'font.size': 9, 'axes.titlesize': 9.5, 'axes.titlelocation': 'left',
  'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True, 'grid.color': '#dddddd',
  'grid.linewidth': 0.6, 'axes.axisbelow': True, 'lines.linewidth': 1.6, 'legend.frameon': False,
  'svg.fonttype': 'none',  # text stays text: selectable, and small
  'text.parse_math': False,  # names come from files; a $ in one is no formula
}


@dataclasses.dataclass
class Panel:
  """One plot. `name` is the stem of its files."""

  name: str
  title: str
  x_label: str
  series: list[Series]
  y_label: str = ''
  x_scale: str = 'linear'
  y_scale: str = 'linear'
  zero: bool = False  # a line at zero: a difference
  settle: bool = False  # the axis is decided without the warm-up
  svg: str = ''


def colour(i: int) -> str:
  return COLOURS[i % len(COLOURS)]


def dash(i: int):
  """Changes with the colour, and differs where colours come round again."""
  return DASHES[(i + i // len(COLOURS)) % len(DASHES)]


def draw(panel: Panel, arms: Sequence[str], write: Callable[[str, bytes], None]) -> None:
  """Fills in panel.svg, and writes NAME.svg and NAME.png (with a legend) and NAME.csv through write(file, bytes)."""
  with matplotlib.rc_context({**STYLE, 'svg.hashsalt': panel.name}):
    figure = Figure(figsize=SIZE)
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    _place(figure, axis, 0)
    for series in panel.series:
      if panel.y_scale == 'log':  # nothing is not drawn, rather than at the bottom
        series = dataclasses.replace(series, **{
          name: np.where(getattr(series, name) > 0, getattr(series, name), np.nan)
          for name in ('mean_X', 'low_X', 'high_X')})
      i = arms.index(series.arm)
      points = dict(marker='o', markersize=3) if len(series.x_X) <= 12 else {}
      if np.isfinite(series.low_X).any():
        axis.fill_between(series.x_X, series.low_X, series.high_X, color=colour(i), alpha=0.16, linewidth=0)
      axis.plot(series.x_X, series.mean_X, color=colour(i), linestyle=dash(i), label=series.arm, **points)
    if panel.zero:
      axis.axhline(0, color='#555555', linewidth=0.8, zorder=1)
    axis.set_title(panel.title if len(panel.title) <= TITLE else panel.title[: TITLE - 3] + '...')
    axis.set_xlabel(panel.x_label)
    axis.set_ylabel(panel.y_label)
    _scale(axis, panel)
    panel.svg = _inline(_save(figure, 'svg').decode(), panel.title)
    figure.legend(loc='lower center', ncols=2, fontsize=8)
    _place(figure, axis, -(-len(panel.series) // 2))
    write(f'{panel.name}.svg', _save(figure, 'svg'))
    write(f'{panel.name}.png', _save(figure, 'png'))
    write(f'{panel.name}.csv', table(('arm', 'x', 'mean', 'low', 'high', 'seeds'), (
      (s.arm, *row, s.seeds) for s in panel.series for row in zip(s.x_X, s.mean_X, s.low_X, s.high_X))))


def _place(figure: Figure, axis, legend_lines: int) -> None:
  """Fixed margins, in inches: panels line up on the page, and a layout engine takes longer than all the drawing."""
  below = 0.5 + 0.2 * legend_lines + 0.06 * (legend_lines > 0)
  height = SIZE[1] + below - 0.5
  figure.set_size_inches(SIZE[0], height)
  axis.set_position((0.7 / SIZE[0], below / height, (SIZE[0] - 0.8) / SIZE[0], (height - below - 0.3) / height))


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
  """1.5M, 20k, 300."""
  for size, letter in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if abs(x) >= size:
      return f'{x / size:g}{letter}'
  return f'{x:g}'


def _save(figure: Figure, kind: str) -> bytes:
  out = io.BytesIO()
  figure.savefig(out, format=kind, dpi=160, metadata={'Date': None} if kind == 'svg' else None)
  return out.getvalue()


def _inline(svg: str, title: str) -> str:
  """The <svg> element alone, sized by the page; ids are this panel's own (svg.hashsalt)."""
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg[svg.index('<svg'):], flags=re.DOTALL)
  opening = re.search(r'viewBox="[^"]*"', svg)[0]
  return (f'<svg {opening} role="img" aria-label="{html.escape(title)}" xmlns="http://www.w3.org/2000/svg" '
          f'xmlns:xlink="http://www.w3.org/1999/xlink">{svg[svg.index(">") + 1:]}')


def swatch(i: int) -> str:
  """A bit of an arm's line, for the page's legends."""
  pattern = dash(i)
  array = '' if pattern == 'solid' else f' stroke-dasharray="{" ".join(f"{2 * x:g}" for x in pattern[1])}"'
  return (f'<svg class="swatch" viewBox="0 0 36 8" aria-hidden="true"><line x1="0" y1="4" x2="36" y2="4" '
          f'stroke="{colour(i)}" stroke-width="3"{array}/></svg>')


def table(titles: Sequence[str], rows) -> bytes:
  """A CSV file. A text that a spreadsheet would take for a formula gets a ' in front."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow(titles)
  formula = lambda cell: isinstance(cell, str) and cell[:1] in ('=', '+', '-', '@')
  for row in rows:
    writer.writerow([f"'{cell}" if formula(cell) else cell for cell in row])
  return out.getvalue().encode()
