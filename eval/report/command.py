"""What did the objective do to exploration? One page from the workdirs of a sweep, as they stand.

    betarank report ROOT [--out=DIR]

Reads every run under ROOT (local or gs://), whatever arms, seeds and stages there are, finished or not, and writes
DIR/report.html (one file, asks for nothing from outside), DIR/figures/*.svg, *.png and *.csv, and DIR/tables/*.csv.
DIR is ROOT/report unless given. Only reads what runs wrote; needs no device.
"""

import argparse
import datetime
import math
import os
import re
import shlex
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from betarank.configs import common
from betarank.configs.errors import ConfigError, UserError
from betarank.configs.load import check_places, flatten
from betarank.eval.report import comparisons as compare
from betarank.eval.report import figures, words
from betarank.eval.report.arms import NOT_AN_ARM, read_sweep
from betarank.eval.report.comparisons import Comparison
from betarank.eval.report.figures import Panel
from betarank.eval.report.page import Html, details, html_section, join, page, table, tag, text
from betarank.eval.report.runs import Run, Sweep, setting
from betarank.eval.report.words import shown, shown_change
from betarank.runtime import workdir

CURVES = {'ce_nats': 'cross-entropy (nats)', 'entropy_nats': 'entropy (nats)', 'tail_mass': 'tail mass'}
RL_CURVES = {'pass_rate': 'pass rate (reward)', 'entropy_nats': 'entropy (nats)', 'length_tokens': 'length (tokens)',
             'truncated_share': 'truncated share', 'zero_variance_groups': 'share of groups without signal'}
DISTRIBUTION = ('ce_nats', 'bits_per_byte', 'perplexity', 'entropy_nats', 'entropy_top20_nats', 'tail_mass',
                'top_gap_nats', 'ece', 'rank1_accuracy')
DYNAMICS = ('pass_rate', 'entropy_nats', 'length_tokens', 'truncated_share')
DOMAINS = 4  # drawn; the table has all
TEXT = 700  # characters of a sample that are shown


class Report:
  """The parts of one page; every part can be empty."""

  def __init__(self, sweep: Sweep, out: epath.Path):
    self.sweep, self.out, self.arms = sweep, out, sweep.arms
    self.k = compare.pass_k(sweep)
    self._stems: dict[str, int] = {}
    self.distributions = compare.distributions(sweep, DISTRIBUTION)
    self.dynamics = compare.dynamics(sweep, DYNAMICS)
    self.benchmarks = compare.benchmarks(sweep, self.k)
    self.gains = compare.gains(sweep, self.k)
    for folder in ('figures', 'tables'):
      if os.path.islink(out / folder):  # what lies there may come from somebody else
        raise ConfigError(f'{out / folder}: is a link, which a report would fill wherever it leads; remove it')
      (out / folder).mkdir(parents=True, exist_ok=True)

  def html(self) -> str:
    made = f'{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC'
    version = workdir.code_version()
    parts = {
      'settings': ('Arms and settings', self.settings()), 'training': ('Training', self.training()),
      'distributions': ('The token distribution', self.distribution()), 'rl': ('RL as it went', self.rl()),
      'samples': ('Samples on benchmarks', self.samples()), 'texts': ('What the answers look like', self.texts()),
      'notes': ('What is missing or odd', self.notes()), 'runs': ('Runs and lineage', self.runs()),
      'how': ('How to read this', words.HOW_TO_READ),
    }
    parts = {key: part for key, part in parts.items() if part[1]}
    odd = len(self.sweep.notes)
    answer = words.answer(self.sweep, self.distributions, self.dynamics, self.benchmarks, self.k)
    return page(
      'What the objective did to exploration',
      tag('h1', 'What the objective did to exploration'),
      tag('p', f'{len(self.sweep.runs)} runs under ', tag('code', self.sweep.root), f', read {made}',
          f', code {version}' if version else '', class_='soft'),
      tag('div', *answer, class_='answer'),
      tag('p', tag('a', f'{odd} thing{"s are" if odd > 1 else " is"} missing or odd', href='#notes')) if odd else '',
      tag('nav', tag('ul', *(tag('li', tag('a', title, href=f'#{key}')) for key, (title, _) in parts.items()))),
      *(html_section(title, inside, id_=key) for key, (title, inside) in parts.items()))

  # Sections

  def settings(self) -> Html:
    rows = []
    for stage in self.sweep.stages:
      reference = next(iter(self.sweep.of(stage, self.arms[0]) or self.sweep.of(stage)))
      for arm in self.arms:
        runs = self.sweep.of(stage, arm)
        if runs:
          seeds = ', '.join('?' if run.seed is None else str(run.seed) for run in runs)
          rows.append((arm, stage, seeds, _several(runs, lambda run: run.last_step),
                       _several(runs, lambda run: run.tokens), _several(runs, lambda run: run.flops),
                       _matched(runs, reference)))
    self._csv('settings', ('arm', 'stage', 'seeds', 'steps', 'tokens', 'flops', 'compared with the first arm'), rows)
    return join([
      table(('Arm', 'Stage', 'Seeds', 'Steps', 'Tokens', 'FLOPs', 'Matched with the first?'), rows,
            'An arm is the pre-training objective; RL runs belong to the arm of the run they started from. FLOPs of '
            'training, forward and backward; those of RL are mostly sampling and not counted.'),
      *(details(f'All settings of the first arm, {stage}', tag('pre', _settings_text(runs[0])))
        for stage in self.sweep.stages if (runs := self.sweep.of(stage, self.arms[0]) or self.sweep.of(stage)))])

  def training(self) -> Html:
    groups = []
    for stage in self.sweep.stages:
      if any(run.is_rl for run in self.sweep.of(stage)):
        continue
      panels = []
      for minus in (None, self.arms[0]):
        for metric, title in CURVES.items():
          series = compare.curve(self.sweep, stage, f'train/{metric}', minus=minus)
          panels.append(Panel(f'{stage}_{metric}{"_difference" if minus else ""}',
                              f'{title}: difference to {minus}' if minus else title, 'step', series,
                              settle=True, zero=minus is not None))
      groups.append(self._figure(f'Curves of {stage}: mean over seeds, averaged in at most {compare.BINS} bins; the '
                                 'band is the range over seeds. Below, each seed less the same seed of the first arm.',
                                 panels, self.sweep.of(stage)))
    return join(groups)

  def distribution(self) -> Html:
    parts = [self._tables('distribution', self.distributions, DISTRIBUTION, words.BY_SEED)]
    domains = sorted({domain for run in self.sweep.runs for domain in (run.probe() or {}).get('domains', {})})
    if len(domains) > DOMAINS:
      self.sweep.note('figures', f'{len(domains)} domains were probed; the first {DOMAINS} are drawn')
    for domain in domains[:DOMAINS]:
      panels = []
      for stage in self.sweep.stages:
        ranks = compare.histogram(self.sweep, stage, domain, 'rank_histogram', survival=True)
        for series in ranks:
          series.x_X = series.x_X + 1  # rank 0 is the most probable token; a logarithmic axis has no 0
        logarithmic = dict(x_scale='log', y_scale='log')
        panels += [
          Panel(f'{stage}_{domain}_rank', f'true token at rank r or below, {stage}', 'r (1: the most probable)', ranks,
                **logarithmic),
          Panel(f'{stage}_{domain}_entropy', f'share of tokens by entropy, {stage}', 'entropy (nats)',
                compare.histogram(self.sweep, stage, domain, 'entropy_histogram')),
          Panel(f'{stage}_{domain}_coverage', f'tokens given at most 1/N, {stage}', 'N',
                compare.coverage(self.sweep, stage, domain), **logarithmic)]
      parts.append(self._figure(f'Distributions on {domain}, from the newest probe of each run, stage by stage; the '
                                'band is the range over seeds.', panels, self.sweep.runs, probe=True))
    return join(parts)

  def rl(self) -> Html:
    parts = []
    for stage in self.sweep.stages:
      runs = [run for run in self.sweep.of(stage) if run.is_rl]
      if not runs:
        continue
      held_out = sorted({name for run in runs for name in run.curves if name.startswith('eval/held_out/avg_at_')})
      curves = {f'train/{name}': title for name, title in RL_CURVES.items()}
      curves |= {name: f'held out, Avg@{name.rsplit("_", 1)[-1]}' for name in held_out[:1]}
      panels = [Panel(f'{stage}_{name}', title, 'RL step', compare.curve(self.sweep, stage, name))
                for name, title in curves.items()]
      parts.append(self._figure(f'{stage}: mean over seeds; the band is the range over seeds.', panels, runs))
    tables = self._tables('rl', self.dynamics, DYNAMICS, words.DYNAMICS_NOTE)
    return join([*parts, tables])

  def samples(self) -> Html:
    metrics = list(compare.benchmark_metrics(self.k))
    parts = [self._tables('benchmarks', self.benchmarks, metrics, words.BENCHMARK_NOTE),
             self._tables('gains', self.gains, metrics, words.GAIN_NOTE, title='What RL changed')]
    for benchmark in sorted({name for run in self.sweep.runs for name in run.samples}):
      panels = [Panel(f'{stage}_{benchmark}_pass_at_k', f'Pass@k, {stage}', 'k',
                      compare.pass_curve(self.sweep, stage, benchmark), x_scale='log')
                for stage in self.sweep.stages]
      parts.append(self._figure(
        f'Pass@k on {benchmark}, unbiased, all k from one set of samples; the band is the 95 % interval over problems '
        'and seeds of each arm alone, wider than what a paired difference needs.', panels,
        [run for run in self.sweep.runs if benchmark in run.samples], benchmark=benchmark))
    return join(parts)

  def texts(self) -> Html:
    """A few answers of each arm's newest stage, right and wrong ones, as they were sampled."""
    shown_texts = []
    for arm in self.arms:
      run = next((run for stage in reversed(self.sweep.stages) for run in self.sweep.of(stage, arm)
                  if run.samples or run.texts), None)
      if run is None:
        continue
      found = [(f'{benchmark}, problem {line["problem"]}, {line["verdict"]}', line.get('text', ''))
               for benchmark in sorted(run.samples)[:1] for line in run.sampled(benchmark)[1].examples]
      found = found or [(f'step {line.get("step")}', f'{line.get("prompt", "")}{line.get("text", "")}')
                        for line in run.texts[-2:]]
      shown_texts.append(details(f'{arm} ({run.name})', *(
        join([tag('p', title, class_='soft'), tag('pre', _cut(str(sample)), class_='wrap')])
        for title, sample in found)))
    return join(shown_texts)

  def notes(self) -> Html:
    return tag('ul', *(tag('li', note) for note in self.sweep.notes), class_='notes') if self.sweep.notes else Html('')

  def runs(self) -> Html:
    rows = [(run.name, run.arm or 'unknown', '?' if run.seed is None else run.seed, run.stage or '?', run.state,
             run.parent_path or 'none: random weights', run.checkpoint or 'none yet', run.code_version or '?')
            for run in self.sweep.runs]
    titles = ('Run', 'Arm', 'Seed', 'Stage', 'State', 'Parent', 'Newest checkpoint', 'Code')
    self._csv('runs', titles, rows)
    return table(titles, rows, class_='words')

  # Parts of sections

  def _figure(self, caption: str, panels: Sequence[Panel], runs: Sequence[Run], *, probe: bool = False,
              benchmark: str = '') -> Html:
    """Panels with their legend, the command that draws them, and what they were made from; empty ones left out."""
    panels = [panel for panel in panels if panel.series]
    if not panels:
      return Html('')
    for panel in panels:
      panel.name = self._file_name(panel.name)
      figures.draw(panel, self.arms, lambda name, content: _write(self.out / 'figures' / name, content))
    there = {series.arm for panel in panels for series in panel.series}
    legend = tag('ul', *(tag('li', Html(figures.swatch(i)), arm) for i, arm in enumerate(self.arms) if arm in there),
                 class_='legend')
    commands = [line for run in runs for line in _commands(run, probe, benchmark)]
    again = f'betarank report {shlex.quote(str(self.sweep.root))} --out={shlex.quote(str(self.out))}'
    files = join((tag('a', panel.name, href=f'figures/{panel.name}.png') for panel in panels), ', ')
    return tag(
      'figure', tag('figcaption', caption), legend,
      tag('div', *(tag('div', Html(panel.svg)) for panel in panels), class_='panels'),
      details('Where this comes from',
              tag('p', 'Files (also .svg and .csv, when the report\'s folder is at hand): ', files, class_='soft'),
              tag('pre', '\n'.join([f'# draw again\n{again}', *commands]))))

  def _tables(self, name: str, found: Sequence[Comparison], metrics: Sequence[str], note: str, title: str = '') -> Html:
    """A table a stage and subject: arms down, metrics across; a CSV of all of them."""
    self._csv(name, ('stage', 'subject', 'metric', 'arm', 'baseline', 'value', 'low', 'high', 'difference',
                     'difference_low', 'difference_high', 'p', 'p_holm', 'verdict', 'smallest_detectable', 'problems',
                     'seeds', 'remark'), map(_csv_row, found))
    parts = [tag('h3', title)] if title and found else []
    for stage, subject in dict.fromkeys((c.stage, c.subject) for c in found):
      here = {(c.arm, c.metric): c for c in found if (c.stage, c.subject) == (stage, subject)}
      columns = [metric for metric in metrics if any(m == metric for _, m in here)]
      rows = []
      for arm in (arm for arm in self.arms if any(a == arm for a, _ in here)):
        cells = [here.get((arm, metric)) for metric in columns]
        size = next(c.value for c in cells if c is not None and c.value) if any(c and c.value for c in cells) else None
        counted = [] if size is None else [f'{size.seeds} seed{"s" * (size.seeds != 1)}']
        counted += [f'{size.problems} problems'] if size and size.problems else []
        remarks = list(dict.fromkeys(c.remark for c in cells if c and c.remark))
        rows.append((join([arm, tag('span', ', '.join(counted), class_='range'),
                           *(tag('span', remark, class_='range') for remark in remarks)]),
                     *(_cell(c) for c in cells)))
      titles = ('Arm', *(words.title(metric, self.k) for metric in columns))
      parts.append(table(titles, rows, join([tag('strong', f'{stage}, {subject}. '), note])))
    return join(parts)

  def _file_name(self, name: str) -> str:
    """A file's stem made of a name from anywhere; never the same one twice."""
    stem = re.sub(r'[^A-Za-z0-9.@=-]+', '_', name.replace('→', 'then')).strip('_.')[:100] or 'figure'
    self._stems[stem] = self._stems.get(stem, 0) + 1
    return stem if self._stems[stem] == 1 else f'{stem}-{self._stems[stem]}'

  def _csv(self, name: str, titles: Sequence[str], rows) -> None:
    _write(self.out / 'tables' / f'{name}.csv', figures.table(titles, rows))


def _write(path: epath.Path, content: bytes) -> None:
  """A link of that name is replaced, not followed."""
  if os.path.islink(path):
    path.unlink()
  path.write_bytes(content)


def _cell(c: Comparison | None) -> Html:
  """value [interval], and beneath it the difference to the baseline with its verdict."""
  if c is None or c.value is None:
    return Html('–')
  lines = [text(shown(c.metric, c.value.mean))]
  if math.isfinite(c.value.low) and math.isfinite(c.value.high):
    interval = f'[{shown(c.metric, c.value.low, unit=False)}, {shown(c.metric, c.value.high, unit=False)}]'
    lines.append(tag('span', interval, class_='range'))
  if c.difference is not None:
    change, interval = shown_change(c.metric, c.difference.mean), words.interval(c.metric, c.difference)
    if c.verdict == 'beyond':
      mark = tag('span', f'{"▲" if c.difference.mean > 0 else "▼"} p {max(c.p_holm, 1e-4):.2g}', class_='beyond')
      lines.append(tag('span', 'Δ ', change, ' ', mark, class_='delta'))
    else:
      lines.append(tag('span', 'Δ ', change, ' within noise' if c.verdict else ' noise unknown', class_='delta within'))
    lines += [tag('span', interval, class_='range')] if interval else []
  return join(lines)


def _csv_row(c: Comparison) -> tuple:
  value, difference = c.value, c.difference
  of = lambda e, *names: [getattr(e, name) if e else '' for name in names]
  return (c.stage, c.subject, c.metric, c.arm, c.baseline, *of(value, 'mean', 'low', 'high'),
          *of(difference, 'mean', 'low', 'high', 'p_value'), '' if math.isnan(c.p_holm) else c.p_holm, c.verdict,
          *of(difference, 'smallest_detectable'), *of(value, 'problems', 'seeds'), c.remark)


def _several(runs: Sequence[Run], read: Callable[[Run], float]) -> str:
  """One figure for runs that agree, else the range."""
  values = sorted({read(run) for run in runs if math.isfinite(read(run))})
  form = lambda x: f'{x:,.0f}' if x < 1e5 else f'{x / 1e6:,.4g}M' if x < 1e11 else f'{x:.3g}'.replace('e+', 'e')
  return ' to '.join(form(x) for x in dict.fromkeys((values[0], values[-1]))) if values else '–'


def _matched(runs: Sequence[Run], reference: Run) -> Html:
  """'matched', or in what these runs differ from the reference beyond objective and seed."""
  ignored = tuple(key for key in NOT_AN_ARM if key not in ('train.tokens', 'rl.steps'))
  flat = lambda run: {key: value for key, value in flatten(run.config).items()
                      if not any(key == name or key.startswith(name + '.') for name in ignored)}
  before, odd = flat(reference), []
  for run in runs:
    now = flat(run)
    odd += [f'{key} {now.get(key)} against {before.get(key)}' for key in sorted(before.keys() | now.keys())
            if key in before and key in now and before[key] != now[key]]
    if other := sorted(before.keys() ^ now.keys()):
      odd.append(f'{len(other)} settings only one of them has, as {other[0]} (written by other code)')
    if run.last_step != reference.last_step:
      odd.append(f'step {run.last_step:,} against {reference.last_step:,}')
  odd = list(dict.fromkeys(odd))
  shown_odd = '; '.join(odd[:4]) + (' ...' if len(odd) > 4 else '')
  return tag('span', tag('span', f'differs: {shown_odd}', class_='beyond'), class_='wrap') if odd else text('matched')


def _settings_text(run: Run) -> str:
  return '\n'.join(f'{key} = {value!r}' for key, value in flatten(run.config).items())


def _commands(run: Run, probe: bool, benchmark: str) -> list[str]:
  """A comment on the run's origin, and the commands that make again what a figure shows of it."""
  quote = lambda path: shlex.quote(str(path))
  lines = [f'# {run.arm or "unknown arm"}, seed {run.seed}; config {run.name}/config.json; '
           f'parent {run.parent_path or "none"}; code {run.code_version or "?"}',
           f'python -m {"rl" if run.is_rl else "train"} --config={quote(run.path / "config.json")} '
           f'--workdir={quote(run.path)}']
  defaults = common.evaluation().to_dict()
  if probe and run.probes:
    step = max(run.probes)
    set_to = setting(run.probes[step], 'config.probe') or {}
    lines.append(f'betarank eval probe --checkpoint={quote(run.path / "checkpoints" / str(step))}'
                 + _overrides('probe', set_to, defaults['probe']))
  if benchmark and (found := run.sampled(benchmark)):
    step, samples = found
    set_to = {'samples' if key == 'n' else key: value for key, value in samples.settings.items()}
    lines.append(f'betarank eval sample --checkpoint={quote(run.path / "checkpoints" / str(step))} '
                 f'--benchmark={quote(samples.settings.get("benchmark", benchmark))}'
                 + _overrides('sample', set_to, defaults['sample']))
  # A line break in a name must not begin a command of its own.
  return [line.replace('\n', ' ').replace('\r', ' ') for line in lines]


def _overrides(part: str, values: dict, defaults: dict) -> str:
  return ''.join(f' {shlex.quote(f"--config.eval.{part}.{key}={values[key]}")}' for key, default in defaults.items()
                 if key in values and values[key] != default and not isinstance(default, dict))


def _cut(sample: str) -> str:
  return sample if len(sample) <= TEXT else f'{sample[:TEXT]} ... ({len(sample):,} characters)'


def write_report(root: str, out: str = '') -> epath.Path:
  """Writes the report of all runs under `root`; returns the page's path. Raises ConfigError if there is no `root`."""
  folder = epath.Path(root)
  if not folder.is_dir():
    raise ConfigError(f'{root}: no such folder')
  target = epath.Path(out) if out else folder / 'report'
  if not out and os.path.islink(target):
    raise ConfigError(f'{target}: is a link, which a report would fill wherever it leads; give --out=DIR')
  np.seterr(invalid='ignore')
  path = target / 'report.html'
  content = Report(read_sweep(folder), target).html()
  _write(path, content.encode())
  return path


def main(argv: Sequence[str]) -> None:
  import jax

  jax.config.update('jax_platforms', 'cpu')  # a training run beside this may hold the accelerator
  parser = argparse.ArgumentParser(prog='betarank report', description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('root', metavar='ROOT')
  parser.add_argument('--out', default='', metavar='DIR')
  args = parser.parse_args(argv)
  check_places(vars(args))
  try:
    print(f'report: {write_report(args.root, args.out)}')
  except OSError as error:
    raise UserError(str(error)) from None
