"""betarank watch RUN_OR_FOLDER [...] [--once] [--every=SECONDS]

Shows a table of runs, and refreshes it until all of them have finished, or until Ctrl-C. The command only reads the
files of the workdirs, local or gs://, so it works on any machine that can read these files. A run in a bucket uploads
its metrics with every checkpoint. States that a sweep has recorded, such as waiting and failed, are shown too. For a
sweep in a bucket, they are known only on the machine that launched it, in the same working directory.
"""

import contextlib
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from betarank.configs.errors import UserError
from betarank.configs.files import read_json
from betarank.configs.parser import Parser, above_zero, place
from betarank.configs.steps import planned_steps
from betarank.configs.sweep_folder import sweep_folder
from betarank.configs.terminal import duration

DEPTH = 6  # levels of folders that are searched for runs
NOT_RUNS = ('checkpoints', 'eval', 'tensorboard', 'report', 'hosts', 'profile', 'data')
TAIL_BYTES = 64 * 1024  # how much of metrics.jsonl is read
AVERAGED = 10  # the number of logged steps over which figures are averaged
# A run that has logged nothing for this long, or for 5 times the time of a step if that is longer, isn't running.
QUIET_S = 60.0
TITLES = ('run', 'state', 'step', 'CE', 'entropy', 'pass', 'tokens/s', 'left')
_COLOURS = {'running': 'cyan', 'finished': 'green', 'stopped': 'yellow', 'failed': 'red', 'skipped': 'yellow'}


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of the table, which shows one run. An unknown value is NaN or None.

  Attributes:
    name: the run's workdir, relative to the folder that is watched.
    state: 'waiting', 'starting', 'running', 'stopped' or 'finished'; 'failed' or 'skipped' if a sweep has recorded
      that.
    step: the last step that was logged.
    steps: the number of steps that the run's config asks for.
    ce, entropy: the cross-entropy and the entropy in nats, each a mean over the last AVERAGED logged steps.
    pass_rate: the fraction of right answers, a mean over the same steps; NaN for pre-training.
    tokens_per_s: the median over the same steps. Pre-training counts the tokens trained on, RL the tokens drawn.
    left_s: the estimated remaining time in seconds: the remaining steps times the median time of a step. The time of
      evaluations isn't included.
  """

  name: str
  state: str
  step: int = 0
  steps: int | None = None
  ce: float = math.nan
  entropy: float = math.nan
  pass_rate: float = math.nan
  tokens_per_s: float = math.nan
  left_s: float = math.nan

  def cells(self) -> list[str]:
    """Returns the texts of the row's cells, in the order of TITLES."""
    number = lambda x, form: '' if math.isnan(x) else format(x, form)
    step = f'{self.step}/{self.steps}' if self.steps else str(self.step or '')
    return [self.name, self.state, step, number(self.ce, '.3f'), number(self.entropy, '.3f'),
            number(self.pass_rate, '.3f'), number(self.tokens_per_s, ',.0f'),
            '' if math.isnan(self.left_s) else duration(self.left_s)]


def find_runs(folder: epath.Path, depth: int = DEPTH) -> Iterator[epath.Path]:
  """Yields the workdirs in a folder and its subfolders, ordered by name. If the folder itself is a workdir, yields only
  the folder.

  depth: the number of levels of subfolders to search.
  """
  if (folder / 'config.json').exists():
    yield folder
    return
  if depth and folder.is_dir():
    for path in sorted(folder.iterdir()):
      if path.name not in NOT_RUNS and not path.name.startswith('.') and path.is_dir():
        yield from find_runs(path, depth - 1)


def read_folder(folder: epath.Path) -> list[Row]:
  """Returns one row for each run in a folder.

  If the folder is that of a sweep, runs that its sweep.json lists have a row even if they haven't started.
  """
  recorded = _object(sweep_folder(folder) / 'sweep.json').get('points') or {}
  points = {name: point for name, point in recorded.items()
            if isinstance(point, dict) and point.get('stage') in ('train', 'rl')}
  states = {name: (point.get('status') or {}).get('state', '') for name, point in points.items()}
  found = {}
  for path in find_runs(folder):
    name = str(path.relative_to(folder)) if path != folder else path.name
    found[name] = read_run(path, name, states.get(name, ''))
  waiting = {name: Row(name, state) for name, state in states.items() if name not in found}
  return [row for _, row in sorted((found | waiting).items())]


def read_run(path: epath.Path, name: str, launcher_s: str = '') -> Row:
  """Returns the row of the run in a workdir. If a file is missing or damaged, its values are unknown.

  Args:
    name: the name of the run in the table.
    launcher_s: the state that a sweep has recorded for this run; '' if there is none.

  Raises:
    OSError: a file exists but can't be read.
  """
  config, file = _object(path / 'config.json'), path / 'metrics.jsonl'
  lines = [line for line in _tail(file) if 'time/step_s' in line][-AVERAGED:]
  last = _steps(config)
  if not lines:
    return Row(name, launcher_s or 'starting', steps=last)
  step = lines[-1]['step']
  figures = {key: [float(line[key]) for line in lines if isinstance(line.get(key), int | float)] for key in (
    'train/ce_nats', 'train/entropy_nats', 'train/pass_rate', 'time/tokens_per_s', 'time/step_s')}
  mean = lambda key: statistics.fmean(figures[key]) if figures[key] else math.nan
  median = lambda key: statistics.median(figures[key]) if figures[key] else math.nan
  step_s, every = median('time/step_s'), (config.get('checkpoint') or {}).get('every_steps', 1)
  quiet = max(QUIET_S, 5 * step_s, (3 * every * step_s if '://' in str(path) else 0))
  age = time.time() - file.stat().mtime
  finished = last is not None and step >= last
  state = 'finished' if finished else 'running' if age < quiet else 'stopped'
  if launcher_s in ('failed', 'skipped') and state == 'stopped':
    state = launcher_s
  left = (last - step) * step_s if state == 'running' and last else math.nan
  return Row(name, state, step, last, mean('train/ce_nats'), mean('train/entropy_nats'), mean('train/pass_rate'),
             median('time/tokens_per_s'), left)


def _steps(config: dict[str, Any]) -> int | None:
  """Returns the number of steps that a config asks for, or None if the config lacks the settings for it."""
  try:
    return planned_steps(config)
  except (KeyError, TypeError, ValueError, ZeroDivisionError):
    return None


def _object(path: epath.Path) -> dict[str, Any]:
  """Returns the JSON object in a file; {} if the file doesn't exist or doesn't contain a JSON object."""
  try:
    value = read_json(path)
  except (FileNotFoundError, ValueError):
    return {}
  return value if isinstance(value, dict) else {}


def _tail(path: epath.Path) -> list[dict[str, Any]]:
  """Returns the parsed lines in the last TAIL_BYTES of a metrics file.

  The beginning isn't read, because the file can have hundreds of MB.
  """
  try:
    with path.open('rb') as file:
      size = file.seek(0, 2)
      file.seek(max(0, size - TAIL_BYTES))
      content = file.read()
  except FileNotFoundError:
    return []
  lines = []
  for text in content.split(b'\n'):
    with contextlib.suppress(ValueError, RecursionError):
      line = json.loads(text)
      if isinstance(line, dict) and isinstance(line.get('step'), int):
        lines.append(line)
  return lines


def table(rows: Sequence[Row], width: int) -> Table:
  """Returns the table, fitted to `width` characters by shortening long names.

  A name is cut at its beginning, which is usually the same for all runs.
  """
  cells = [row.cells() for row in rows]
  shown = [i for i in range(len(TITLES)) if i < 3 or any(row[i] for row in cells)]
  sizes = {i: max(len(TITLES[i]), *(len(row[i]) for row in cells)) for i in shown}
  room = max(8, width - sum(size + 2 for i, size in sizes.items() if i) - 1)
  drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
  for i in shown:
    drawn.add_column(TITLES[i], justify='left' if i < 2 else 'right', no_wrap=True)
  for row in cells:
    name = row[0] if len(row[0]) <= room else f'…{row[0][1 - room:]}'
    drawn.add_row(Text(name), Text(row[1], _COLOURS.get(row[1], '')), *(row[i] for i in shown[2:]))
  return drawn


def screen(rows: Sequence[Row], console: Console, problem: str = '') -> Group:
  """Returns the table with as many rows as fit on the terminal, and a line that says how many rows are missing.

  problem: a line to show below; '' for none.
  """
  notes = [Text(problem)] if problem else []
  room = max(1, console.height - 1 - sum(len(console.render_lines(note)) for note in notes))  # without the titles
  if len(rows) > room:
    rows, hidden = rows[:max(1, room - 1)], len(rows) - max(1, room - 1)
    notes.insert(0, Text(f'{hidden} more; with --once, all are shown'))
  return Group(table(rows, console.width), *notes)


def main(argv: Sequence[str]) -> None:
  """Runs the command.

  Raises:
    UserError: a folder has no runs or can't be read when the command starts. If a folder can't be read later, the
      command shows the problem and tries again.
  """
  parser = Parser('betarank watch', __doc__)
  parser.add_argument('folder', nargs='+', type=place, metavar='RUN_OR_FOLDER',
                      help='a workdir, or a folder with runs: a sweep')
  parser.add_argument('--once', action='store_true', help='print the table once')
  parser.add_argument('--every', type=above_zero(float), default=0.0, metavar='SECONDS', help='default: 2, or 30 for gs://')
  args = parser.parse_args(argv)
  every = args.every or (30.0 if any('://' in folder for folder in args.folder) else 2.0)
  console = Console(highlight=False)
  rows = _read(args.folder)
  if args.once or _done(rows):
    console.print(table(rows, console.width))
    return
  with Live(screen(rows, console), console=console, auto_refresh=False) as live:
    try:
      while not _done(rows):
        time.sleep(every)
        problem = ''
        try:
          rows = _read(args.folder)
        except UserError as error:  # a run may take weeks, in which a bucket fails and tokens expire
          problem = f'{error}; tried again in {every:.0f} s'
        live.update(screen(rows, console, problem), refresh=True)
    finally:
      live.update(table(rows, console.width))  # what remains on the terminal has all rows


def _read(folders: Sequence[str]) -> list[Row]:
  """Returns the rows of all folders.

  Raises:
    UserError: a folder has no runs or can't be read.
  """
  rows = []
  for folder in folders:
    try:
      found = read_folder(epath.Path(folder))
    except OSError as error:
      raise UserError(f'{folder}: could not be read ({error.strerror or error})') from None
    if not found:
      raise UserError(f'{folder}: no runs there (no config.json)')
    rows += found if len(folders) == 1 else [
      dataclasses.replace(row, name=f'{folder.rstrip("/")}/{row.name}' if row.name != epath.Path(folder).name
                          else folder) for row in found]
  return rows


def _done(rows: Sequence[Row]) -> bool:
  return all(row.state in ('finished', 'failed', 'skipped') for row in rows)
