"""Writes the sections of the report's page. A section is left out if the sweep has nothing to show in it."""

import datetime
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence

from etils import epath

from betarank.configs import common
from betarank.configs.errors import ConfigError
from betarank.configs.load import flatten
from betarank.configs.terminal import duration
from betarank.eval import paper
from betarank.eval.report import claims, comparisons, curves, figures, words
from betarank.eval.report.agreement import of_steps
from betarank.eval.report.comparisons import Comparison
from betarank.eval.report.figures import Forest, ForestRow, Panel
from betarank.eval.report.metrics import interval, metric, shown, shown_change, title
from betarank.eval.report.page import Html, details, html_section, join, page, table, tag, text
from betarank.eval.report.runs import Run, Sweep, setting
from betarank.runtime import workdir

CURVES = {'ce_nats': 'cross-entropy (nats)', 'entropy_nats': 'entropy (nats)', 'tail_mass': 'tail mass'}
RL_CURVES = {'pass_rate': 'reward: pass rate on training prompts', 'entropy_nats': 'entropy (nats)',
             'length_tokens': 'length (tokens)', 'truncated_share': 'truncated share',
             'zero_variance_groups': 'share of zero-variance groups'}
DISTRIBUTION = ('ce_nats', 'bits_per_byte', 'perplexity', 'entropy_nats', 'entropy_top20_nats', 'head_mass',
                'tail_mass', 'top_gap_nats', 'ece', 'rank1_accuracy')
DYNAMICS = ('pass_rate', 'entropy_nats', 'length_tokens', 'truncated_share')
SUBJECTS = 4  # at most so many domains and benchmarks are drawn; the tables have all
TEXT = 700  # the number of characters shown of a sample
UNKNOWN = 'not recorded'
HASH = 12  # the number of characters shown of a hash


class Report:
  """A report: one HTML page, and files with its plots and tables."""

  def __init__(self, sweep: Sweep, out: epath.Path):
    """Computes all comparisons, and creates the folders `figures` and `tables` for the files.

    sweep: the runs.
    out: the folder of the report.

    Raises:
      ConfigError: one of the two folders is a symbolic link.
    """
    self.sweep, self.out, self.arms = sweep, out, sweep.arms
    self.k = comparisons.pass_k(sweep)
    self._stems: dict[str, int] = {}
    self.distributions = comparisons.distributions(sweep, DISTRIBUTION)
    self.dynamics = comparisons.dynamics(sweep, DYNAMICS)
    self.benchmarks = comparisons.benchmarks(sweep, self.k)
    self.gains = comparisons.gains(sweep, self.k)
    self.harness = comparisons.harness(sweep)
    self.paper = comparisons.paper_averages(sweep)
    self.claims = claims.claims(sweep, self.distributions, self.dynamics, self.benchmarks, self.k)
    for folder in ('figures', 'tables'):
      if os.path.islink(out / folder):  # it could lead to files that aren't part of a report
        raise ConfigError(f'{out / folder}: is a link, which a report would fill wherever it leads; remove it')
      (out / folder).mkdir(parents=True, exist_ok=True)

  def html(self) -> str:
    """Returns the page as HTML. Also writes the files of its plots and tables."""
    made = f'{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC'
    version = workdir.code_version()
    self.every_figure()
    parts = {
      'claims': ('The paper\'s claims', self.judged_claims()),
      'settings': ('Arms and settings', self.settings()),
      'training': ('Training', self.training()),
      'distributions': ('The token distribution', self.distribution()), 'rl': ('RL as it went', self.rl()),
      'samples': ('Samples on benchmarks', self.samples()), 'paper': ('Other benchmarks', self.other_benchmarks()),
      'texts': ('What the answers look like', self.texts()), 'notes': ('What is missing or odd', self.notes()),
      'runs': ('Runs, data and commands', self.runs()), 'how': ('How to read this', words.HOW_TO_READ),
    }
    parts = {key: part for key, part in parts.items() if part[1]}
    odd = len(self.sweep.notes)
    sentences = words.first_screen(self.sweep, self.distributions, self.benchmarks)
    return page(
      'What the objective did to exploration',
      tag('h1', 'What the objective did to exploration'),
      tag('p', f'{len(self.sweep.runs)} runs under ', tag('code', self.sweep.root), f', read {made}',
          f', code {version}' if version else '', class_='soft'),
      tag('div', *sentences, class_='answer'),
      self.forest(),
      tag('p', tag('a', f'{odd} thing{"s are" if odd > 1 else " is"} missing or odd', href='#notes')) if odd else '',
      tag('nav', tag('ul', *(tag('li', tag('a', name, href=f'#{key}')) for key, (name, _) in parts.items()))),
      *(html_section(name, inside, id_=key) for key, (name, inside) in parts.items()))

  # Sections

  def forest(self) -> Html:
    """Returns forest plots, one per metric, of the difference between each arm and its baseline before and after RL."""
    before, after = words.stages_around_rl(self.sweep)
    found = {(c.stage, c.subject, c.metric, c.arm): c for c in (*self.distributions, *self.benchmarks)}
    forests = []
    for name in ('entropy_nats', 'ce_nats', 'avg_at_n', f'pass_at_{self.k}'):
      subjects = list(dict.fromkeys(c.subject for c in found.values()
                                    if c.metric == name and c.stage in (before, after)))
      rows, names = [], words.short(subjects)
      for subject in subjects[:SUBJECTS]:
        for arm in (arm for arm in self.arms if arm != self.sweep.baselines[arm]):
          both = [found.get((stage, subject, name, arm)) for stage in (before, after)]
          estimates = [c.difference if c else None for c in both]
          remark = '' if any(estimates) else 'not compared'
          if any(both):
            rows.append(ForestRow(arm, names[subject] if len(subjects) > 1 else '', *estimates, remark))
      if any(row.before or row.after for row in rows):
        what = metric(name)
        on = f' on {names[subjects[0]]}' if len(subjects) == 1 else ''
        baselines = list(dict.fromkeys(self.sweep.baselines[row.arm] for row in rows))
        against = baselines[0] if len(baselines) == 1 else 'the baseline'
        forests.append(Forest(self._file_name(f'forest_{name}'), name, f'{what.title[:1].upper()}{what.title[1:]}{on}',
                              f'difference to {against} ({what.change_unit or what.unit})', rows))
    if not forests:
      return Html('')
    for forest in forests:
      figures.draw_forest(forest, self.arms, self._write_figure)
    one_seed = any(e and e.seeds == 1 for forest in forests for row in forest.rows for e in (row.before, row.after))
    caption = ('Difference of each arm to its baseline on the same seeds and problems, with its 95 % interval'
               + ('. Dotted: one seed, the noise of problems only' if one_seed else '') + '.')
    legend = tag('ul', tag('li', Html(figures.circle(False)), 'before RL'), tag('li', Html(figures.circle(True)),
                                                                               'after RL'), class_='legend')
    return tag('figure', tag('figcaption', caption), legend,
               tag('div', *(tag('div', Html(forest.svg)) for forest in forests), class_='panels forest'))

  def judged_claims(self) -> Html:
    """Returns a table of the paper's claims with their tests and verdicts; '' if there are no claims (see
    claims.claims).
    """
    rows, lines = [], []
    for claim in self.claims:
      rows.append((tag('strong', f'({claim.letter}) {claim.sentence}'), '', '', '', '',
                   tag('strong', claim.verdict or 'not measured')))
      for test in (*claim.tests, *claim.shown):
        e, of = test.effect, lambda x, test=test: '–' if math.isnan(x) else f'{test.factor * x:.3g}'
        if e is None:
          rows.append((test.what, '–', '', '', '', ''))
          continue
        decides = test in claim.tests
        detectable = test.smallest_detectable()
        limits = f'[{of(e.low)}, {of(e.high)}]' if math.isfinite(e.low) else '–'
        rows.append((test.what, f'{of(e.mean)} {test.unit}', limits,
                     '–' if math.isnan(test.p_holm) else f'{test.p_holm:.2g}', of(detectable),
                     test.verdict if decides else ''))
        lines.append((claim.letter, claim.sentence, claim.verdict, test.what, test.unit, decides,
                      *(test.factor * x for x in (e.mean, e.low, e.high)), e.p_value, test.p_holm, test.verdict,
                      e.seeds, e.problems, test.factor * detectable))
    self._csv('claims', ('claim', 'sentence', 'claim_verdict', 'test', 'unit', 'decides', 'effect', 'low', 'high', 'p',
                         'p_holm', 'verdict', 'seeds', 'problems', f'detectable_with_{claims.PLANNED_SEEDS}_seeds'),
              lines)
    titles = ('Claim or test', 'Effect', '95 % interval', 'p, Holm', f'Detectable with {claims.PLANNED_SEEDS} seeds',
              'Verdict')
    return table(titles, rows, words.CLAIMS_NOTE, class_='words claims') if rows else Html('')

  def every_figure(self) -> None:
    """Writes two CSV files on all metrics of all arms.

    seeds.csv has the value of each seed and its difference to the baseline. noise.csv has the parts of the noise of
    values and differences (see statistics.Noise).
    """
    found = [*self.distributions, *self.dynamics, *self.benchmarks, *self.gains, *self.harness, *self.paper]
    key = lambda c: (c.stage, c.subject, c.metric, c.arm, c.baseline)
    titles = ('stage', 'subject', 'metric', 'arm', 'baseline')
    self._csv('seeds', (*titles, 'seed', 'value', 'difference'), [
      (*key(c), seed, c.by_seed.get(seed, ''), c.differences.get(seed, '')) for c in found
      for seed in sorted(c.by_seed.keys() | c.differences.keys(), key=str)])
    rows = []
    for c in found:
      for what, noise, seeds in (('value', c.noise, len(c.by_seed)), ('difference', c.difference_noise,
                                                                      len(c.differences))):
        if noise:
          rows.append((*key(c), what, seeds, noise.problems, noise.seed, noise.problem, noise.rest,
                       *(noise.smallest_detectable(n) for n in (seeds, claims.PLANNED_SEEDS))))
    self._csv('noise', (*titles, 'of', 'seeds', 'problems', 'seed_sd', 'problem_sd', 'rest_sd', 'detectable',
                        f'detectable_with_{claims.PLANNED_SEEDS}_seeds'), rows)

  def settings(self) -> Html:
    rows, shown = [], []
    for stage in self.sweep.stages:
      for arm in self.arms:
        runs = self.sweep.of(stage, arm)
        if runs:
          seeds = ', '.join('?' if run.seed is None else str(run.seed) for run in runs)
          agrees, said = self._agreement(stage, arm)
          row = (arm, stage, seeds, _several(runs, lambda run: run.last_step), _several(runs, lambda run: run.tokens),
                 _several(runs, lambda run: run.flops))
          rows.append((*row, said))
          shown.append((*row, said if agrees else tag('span', said, class_='beyond why')))
    self._csv('settings', ('arm', 'stage', 'seeds', 'steps', 'tokens', 'flops', 'compared with the baseline'), rows)
    return join([
      table(('Arm', 'Stage', 'Seed numbers', 'Steps', 'Tokens', 'FLOPs',
             'Agrees with the baseline in all but the objective?'),
            shown, 'An arm is a pre-training objective; RL runs belong to the arm of the run they started from. FLOPs '
            'are those of training, forward and backward; those of RL are mostly sampling and not counted.',
            class_='words'),
      *(details(f'All settings of the first arm, {stage}', tag('pre', _settings_text(runs[0])))
        for stage in self.sweep.stages if (runs := self.sweep.of(stage, self.arms[0]) or self.sweep.of(stage)))])

  def training(self) -> Html:
    groups = []
    for stage in self.sweep.stages:
      if any(run.is_rl for run in self.sweep.of(stage)):
        continue
      panels = []
      for change in (False, True):
        for name, what in CURVES.items():
          series, size = (curves.difference if change else curves.curve)(self.sweep, stage, f'train/{name}')
          panels.append(Panel(f'{stage}_{name}{"_difference" if change else ""}',
                              f'{what}: difference to the baseline' if change else what, _steps_label('step', size),
                              series, settle=True, zero=change))
      groups.append(self._figure(f'Curves of {stage}: the mean over seeds, and the range over seeds as a band. '
                                 'Differences are between runs of one seed that agree in all but the objective.',
                                 panels, self.sweep.of(stage)))
    return join(groups)

  def distribution(self) -> Html:
    parts = [self._tables('distribution', self.distributions, DISTRIBUTION, words.BY_SEED)]
    probed = [found[1] for run in self.sweep.runs if (found := run.probe())]
    domains = sorted({domain for probe in probed for domain in probe['domains']})
    if len(domains) > SUBJECTS:
      self.sweep.note('figures', f'{len(domains)} domains were probed; the first {SUBJECTS} are drawn')
    for domain in domains[:SUBJECTS]:
      panels = []
      for stage in self.sweep.stages:
        ranks = curves.histogram(self.sweep, stage, domain, 'rank_histogram', survival=True)
        for series in ranks:
          series.x_X = series.x_X + 1  # rank 0 is the most probable token; a logarithmic axis has no 0
        logarithmic = dict(x_scale='log', y_scale='log')
        panels += [
          Panel(f'{stage}_{domain}_rank', f'true token at rank r or below, {stage}', 'r (1: the most probable)', ranks,
                **logarithmic),
          Panel(f'{stage}_{domain}_entropy', f'share of tokens by entropy, {stage}', 'entropy (nats)',
                curves.histogram(self.sweep, stage, domain, 'entropy_histogram')),
          Panel(f'{stage}_{domain}_coverage', f'tokens given at most 1/N, {stage}', 'N',
                curves.coverage(self.sweep, stage, domain), **logarithmic)]
      parts.append(self._figure(f'Distributions on {domain}, from the newest probe of each run, stage by stage; the '
                                'bars and bands are the range over seeds.', panels, self.sweep.runs, probe=True))
    return join(parts)

  def rl(self) -> Html:
    parts = []
    for stage in self.sweep.stages:
      runs = [run for run in self.sweep.of(stage) if run.is_rl]
      if not runs:
        continue
      held_out = sorted({name for run in runs for name in run.curves if name.startswith('eval/held_out/avg_at_')})
      names = {f'train/{name}': what for name, what in RL_CURVES.items()}
      names |= {name: f'Avg@{name.rsplit("_", 1)[-1]} on held-out problems' for name in held_out[:1]}
      panels = []
      for name, what in names.items():
        series, size = curves.curve(self.sweep, stage, name)
        panels.append(Panel(f'{stage}_{name}', what, _steps_label('RL step', size), series))
      parts.append(self._figure(
        f'{stage}: the mean over seeds, and the range over seeds as bars or a band. The reward is that of the training '
        'prompts of a step; held-out problems are others, and the two can\'t be compared. Runs evaluated on another '
        'number of them than the first are not drawn there.', panels, runs))
    tables = self._tables('rl', self.dynamics, DYNAMICS, words.DYNAMICS_NOTE)
    return join([*parts, tables])

  def samples(self) -> Html:
    names = list(comparisons.benchmark_metrics(self.k))
    parts = [self._tables('benchmarks', self.benchmarks, names, words.BENCHMARK_NOTE),
             self._tables('gains', self.gains, names, words.GAIN_NOTE, name='What RL changed')]
    for benchmark in sorted({name for run in self.sweep.runs for name in run.samples}):
      panels = [Panel(f'{stage}_{benchmark}_pass_at_k', f'Pass@k, {stage}', 'k',
                      curves.pass_curve(self.sweep, stage, benchmark), x_scale='log', dodge=True)
                for stage in self.sweep.stages]
      parts.append(self._figure(
        f'Pass@k on {benchmark}, unbiased, all k from one set of samples. Bars are the 95 % interval over problems and '
        'seeds of each arm alone, wider than what a paired difference needs; arms are drawn next to each other.',
        panels, [run for run in self.sweep.runs if benchmark in run.samples], benchmark=benchmark))
    return join(parts)

  def other_benchmarks(self) -> Html:
    """Returns tables of the scores on the paper's 19 benchmarks, and of all scores from lm-evaluation-harness."""
    parts = []
    names = (*paper.AVERAGES, *paper.CATEGORIES, *paper.BENCHMARKS)
    if self.paper:
      there = {c.metric for c in self.paper}
      missing = [name for name in paper.BENCHMARKS if name not in there]
      note = ('The paper\'s average of base models: each category counts alike, so that overall = 0.4 knowledge + 0.6 '
              f'reasoning; mathematics and code by Pass@{paper.K} (betarank eval paper).'
              + (f' Not evaluated yet: {", ".join(missing)}.' if missing else ''))
      parts.append(self._tables('paper', self.paper, names, note, name='The paper\'s average'))
    if self.harness:
      by_task = [Comparison(c.stage, 'lm-evaluation-harness', c.subject, c.arm, c.baseline, c.value, c.difference,
                            c.p_holm, c.remark) for c in self.harness]
      tasks = list(dict.fromkeys(c.metric for c in by_task))
      parts.append(self._tables('harness', by_task, tasks, words.HARNESS_NOTE, name='lm-evaluation-harness',
                                shown_as='score'))
    return join(parts)

  def texts(self) -> Html:
    """Returns a few sampled answers of each arm, with their verdicts, from the newest stage in which the arm has
    samples.
    """
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
        join([tag('p', what, class_='soft'), tag('pre', _cut(str(sample)))]) for what, sample in found)))
    return join(shown_texts)

  def notes(self) -> Html:
    return tag('ul', *(tag('li', note) for note in self.sweep.notes), class_='notes') if self.sweep.notes else Html('')

  def runs(self) -> Html:
    """Returns two tables and a list of commands: where each run ran, what data it read, and the command that started
    it.
    """
    where = ('Run', 'Arm', 'Seed', 'Stage', 'State', 'Device', 'Wall time', 'In steps', 'Tokens/s', 'Started')
    rows = [(run.name, run.arm or 'unknown', '?' if run.seed is None else run.seed, run.stage or '?', run.state,
             _device(run), *(duration(s) if math.isfinite(s) else UNKNOWN for s in (run.wall_s, run.seconds)),
             f'{run.tokens_per_s:,.0f}' if math.isfinite(run.tokens_per_s) else UNKNOWN, _moment(run.start.started_s))
            for run in self.sweep.runs]
    what = ('Run', 'Tokenizer', 'Data', 'Tokens', 'Rows or prompts', 'Parent', 'Newest checkpoint', 'Code')
    data = [(run.name, run.identity.tokenizer[:HASH] or UNKNOWN, _data(run), _several([run], lambda run: run.tokens),
             _consumed(run), run.parent_path or 'none: random weights', run.checkpoint or 'none yet',
             run.code_version or UNKNOWN) for run in self.sweep.runs]
    commands = '\n\n'.join(f'# {_line(run.name)}\n{_line(run.start.command) or f"# {UNKNOWN}"}'
                           for run in self.sweep.runs)
    self._csv('runs', (*where, *what[1:], 'Command'),
              [(*a, *b[1:], run.start.command or UNKNOWN) for run, a, b in zip(self.sweep.runs, rows, data)])
    return join([
      table(where, rows, 'Wall time includes compilation, evaluation and saving; the time in steps doesn\'t. Tokens/s '
            'is the median over steps; for RL, of tokens drawn.', class_='words'),
      table(what, data, 'SHA-256 of the tokenizer, of each source\'s prepared tokens, and of RL\'s problems where they '
            f'come from files, as the newest checkpoint records them (first {HASH} characters). Tokens of RL are those '
            'drawn.', class_='words'),
      details('The command that started each run', tag('pre', commands))])

  # Parts of sections

  def _agreement(self, stage: str, arm: str) -> tuple[bool, str]:
    """Returns (agrees, text): whether the runs of an arm agree with those of its baseline, and a text that says so.

    The text begins with 'it is the baseline', 'yes' or 'no'. After 'no', it lists the first disagreements.
    """
    if arm == self.sweep.baselines[arm]:
      return True, 'it is the baseline'
    agreeing, reasons = comparisons.pairs(self.sweep, stage, arm)
    reasons = reasons + [reason for run, other in agreeing
                         for reason in of_steps(run, run.last_step, other, other.last_step)]
    shown_reasons = '; '.join(reasons[:4]) + (' ...' if len(reasons) > 4 else '')
    against = f'with {self.sweep.baselines[arm]}'
    return not reasons, f'no, {against}: {shown_reasons}' if reasons else f'yes, {against}'

  def _figure(self, caption: str, panels: Sequence[Panel], runs: Sequence[Run], *, probe: bool = False,
              benchmark: str = '') -> Html:
    """Draws panels, and returns them as one element with a legend, links to their files, and commands.

    The commands recreate the runs and evaluations that are shown. Panels without lines are left out.

    Args:
      runs: the runs whose commands are shown.
      probe: whether to show the commands that probed these runs.
      benchmark: the benchmark whose sampling commands are shown; '' for none.
    """
    panels = [panel for panel in panels if panel.series]
    if not panels:
      return Html('')
    for panel in panels:
      panel.name = self._file_name(panel.name)
      figures.draw(panel, self.arms, self._write_figure)
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
              tag('p', 'Files (also .svg and .csv, next to this page): ', files, class_='soft'),
              tag('pre', '\n'.join([f'# draw again\n{_line(again)}', *commands]))))

  def _tables(self, file: str, found: Sequence[Comparison], names: Sequence[str], note: str, name: str = '',
              shown_as: str = '') -> Html:
    """Returns one table for each stage and subject, with a row per metric and a column per arm.

    Also writes all comparisons to one CSV file.

    Args:
      file: the name of the CSV file, without suffix.
      found: the comparisons.
      names: the values of Comparison.metric to show, one row for each, in this order.
      note: the text at the end of each table's caption.
      name: a heading above the tables; '' for none.
      shown_as: the metric whose number format all rows use, needed if `names` are tasks; '' if each row uses the format
        of its own metric.
    """
    self._csv(file, ('stage', 'subject', 'metric', 'arm', 'baseline', 'value', 'low', 'high', 'difference',
                     'difference_low', 'difference_high', 'p', 'p_holm', 'verdict', 'smallest_detectable', 'problems',
                     'seeds', 'remark'), map(_csv_row, found))
    parts = [tag('h3', name)] if name and found else []
    for stage, subject in dict.fromkeys((c.stage, c.subject) for c in found):
      here = {(c.arm, c.metric): c for c in found if (c.stage, c.subject) == (stage, subject)}
      arms = [arm for arm in self.arms if any(a == arm for a, _ in here)]
      rows = [(title(row) if not shown_as else row, *(_cell(here.get((arm, row)), shown_as or row) for arm in arms))
              for row in names if any(m == row for _, m in here)]
      remarks = dict.fromkeys(f'{c.arm}: {c.remark}' for c in here.values() if c.remark)
      caption = [tag('strong', f'{stage}, {subject}'), f' ({_counted(here.values())}). ', note,
                 *(tag('span', f' {remark}.', class_='beyond') for remark in remarks)]
      parts.append(table(('Figure', *arms), rows, join(caption)))
    return join(parts)

  def _file_name(self, name: str) -> str:
    """Makes a file name without suffix from any text. Never returns the same name twice."""
    stem = re.sub(r'[^A-Za-z0-9.@=-]+', '_', name.replace('→', 'then')).strip('_.')[:100] or 'figure'
    self._stems[stem] = self._stems.get(stem, 0) + 1
    return stem if self._stems[stem] == 1 else f'{stem}-{self._stems[stem]}'

  def _write_figure(self, name: str, content: bytes) -> None:
    write_over(self.out / 'figures' / name, content)

  def _csv(self, name: str, titles: Sequence[str], rows: Iterable[Sequence]) -> None:
    write_over(self.out / 'tables' / f'{name}.csv', figures.table(titles, rows))


def write_over(path: epath.Path, content: bytes) -> None:
  """Writes a file. If `path` is a symbolic link, replaces the link by the file, so that the target of the link isn't
  changed.
  """
  if os.path.islink(path):
    path.unlink()
  path.write_bytes(content)


# Cells


def _cell(c: Comparison | None, name: str) -> Html:
  """Returns the content of a table cell: the value with its interval and, below it, the difference to the baseline.

  c: the comparison; None for a cell with a dash.
  name: the metric that gives the number format.
  """
  if c is None or c.value is None:
    return Html('–')
  lines = [text(shown(name, c.value.mean))]
  if math.isfinite(c.value.low) and math.isfinite(c.value.high):
    lines.append(tag('span', f'[{shown(name, c.value.low)}, {shown(name, c.value.high)}]', class_='range'))
  if c.difference is not None:
    change, limits = shown_change(name, c.difference.mean), interval(name, c.difference)
    if c.verdict == 'beyond':
      mark = tag('span', f'{"▲" if c.difference.mean > 0 else "▼"} p {max(c.p_holm, 1e-4):.2g}', class_='beyond')
      lines.append(tag('span', 'Δ ', change, ' ', mark, class_='delta'))
    else:
      why = ' within noise' if c.verdict else ' (one seed)' if c.difference.seeds == 1 else ' (no spread between seeds)'
      lines.append(tag('span', 'Δ ', change, why, class_='delta within'))
    lines += [tag('span', limits, class_='range')] if limits else []
  return join(lines)


def _counted(found: Iterable[Comparison]) -> str:
  """Returns how many seeds and problems the values of some comparisons are based on: '3 seeds, 30 problems'."""
  values = [c.value for c in found if c.value]
  parts = []
  for count, what in (({e.seeds for e in values}, 'seed'), ({e.problems for e in values} - {0}, 'problem')):
    if count:
      shown_count = ' to '.join(str(x) for x in dict.fromkeys((min(count), max(count))))
      parts.append(f'{shown_count} {what}{"s" * (max(count) > 1)}')
  return ', '.join(parts)


def _csv_row(c: Comparison) -> tuple:
  value, difference = c.value, c.difference
  of = lambda e, *names: [getattr(e, name) if e else '' for name in names]
  return (c.stage, c.subject, c.metric, c.arm, c.baseline, *of(value, 'mean', 'low', 'high'),
          *of(difference, 'mean', 'low', 'high', 'p_value'), '' if math.isnan(c.p_holm) else c.p_holm, c.verdict,
          *of(difference, 'smallest_detectable'), *of(value, 'problems', 'seeds'), c.remark)


def _several(runs: Sequence[Run], read: Callable[[Run], float]) -> str:
  """Returns read(run) as text for several runs: one number if it is the same for all, otherwise the range ('8 to 10').

  read: a function that takes a run and returns a number.
  """
  values = sorted({read(run) for run in runs if math.isfinite(read(run))})
  form = lambda x: f'{x:,.0f}' if x < 1e5 else f'{x / 1e6:,.4g}M' if x < 1e11 else f'{x:.3g}'.replace('e+', 'e')
  return ' to '.join(form(x) for x in dict.fromkeys((values[0], values[-1]))) if values else '–'


def _steps_label(what: str, size: int) -> str:
  return what if size == 1 else f'{what} (each point: mean of {size} steps)'


def _device(run: Run) -> str:
  if not run.start.device_kind:
    return UNKNOWN
  return f'{run.start.devices:.0f} x {run.start.device_kind}' if run.start.devices > 1 else run.start.device_kind


def _moment(seconds: float) -> str:
  try:
    return f'{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M} UTC'
  except (ValueError, OverflowError, OSError):
    return UNKNOWN


def _data(run: Run) -> str:
  """Returns the names and hashes of a run's data sources, such as 'main 1a2b3c4d5e6f, sums 6f5e4d3c2b1a'.

  For RL, returns the URI of the task and the hash of its problems.
  """
  if run.is_rl:
    return f'{setting(run.config, "rl.task.uri") or UNKNOWN} {run.identity.problems[:HASH]}'.strip()
  return ', '.join(f'{name} {sha256[:HASH]}' for name, sha256 in sorted(run.identity.sources.items())) or UNKNOWN


def _consumed(run: Run) -> str:
  count = run.identity.prompts if run.is_rl else run.identity.rows
  return f'{count:,.0f}' if math.isfinite(count) else UNKNOWN


def _settings_text(run: Run) -> str:
  return '\n'.join(f'{key} = {value!r}' for key, value in flatten(run.config).items())


def _line(name: str) -> str:
  """Returns `name` with its line breaks replaced by spaces.

  Names come from files. In a list of commands, text after a line break would look like another command.
  """
  return name.replace('\n', ' ').replace('\r', ' ')


def _commands(run: Run, probe: bool, benchmark: str) -> list[str]:
  """Returns lines for a shell: a comment on where a run comes from, and the commands that recreate the run and its
  evaluation.

  Args:
    probe: whether to include the command for the newest probe of the run.
    benchmark: the benchmark whose sampling command is included; '' for none.
  """
  quote = lambda path: shlex.quote(str(path))
  lines = [f'# {run.arm or "unknown arm"}, seed {run.seed}; config {run.name}/config.json; '
           f'parent {run.parent_path or "none"}; code {run.code_version or "?"}',
           f'betarank {"rl" if run.is_rl else "train"} --config={quote(run.path / "config.json")} '
           f'--workdir={quote(run.path)}']
  defaults = common.evaluation().to_dict()
  if probe and run.probes:
    step, result = run.probe()
    lines.append(f'betarank eval probe --checkpoint={quote(run.path / "checkpoints" / str(step))}'
                 + _overrides('probe', setting(result, 'config.probe') or {}, defaults['probe']))
  if benchmark and (found := run.sampled(benchmark)):
    step, samples = found
    options = {'n': 'samples', 'answer_chars': 'verifier.answer_chars'}
    set_to = {options.get(key, key): value for key, value in samples.settings.items()}
    lines.append(f'betarank eval sample --checkpoint={quote(run.path / "checkpoints" / str(step))} '
                 f'--benchmark={quote(samples.settings.get("benchmark", benchmark))}'
                 + _overrides('sample', set_to, flatten(defaults['sample'])))
  return [_line(line) for line in lines]


def _overrides(part: str, values: dict, defaults: dict) -> str:
  return ''.join(f' {shlex.quote(f"--config.eval.{part}.{key}={values[key]}")}' for key, default in defaults.items()
                 if key in values and values[key] != default and not isinstance(default, dict))


def _cut(sample: str) -> str:
  return sample if len(sample) <= TEXT else f'{sample[:TEXT]} ... ({len(sample):,} characters)'
