"""betarank data COMMAND --config=FILE [--config.KEY=VALUE] [flags]

    tokenizer    train the tokenizer, and print how well it compresses text that it wasn't trained on
    prepare      tokenize all sources into config.data.dir, training the tokenizer first if needed; --part=3/8 prepares
                 only the third of eight parts, so that eight machines can share the work; --dry_run only prints the
                 hours, bytes and cost
    finish       combine the parts into one data set once all of them are complete
    verify       read all prepared data, and name the first damaged file
    show         print what training reads: counts, a packed row as text, the longest and shortest documents
"""

import itertools
import os
import re
import shlex
import time
from collections.abc import Sequence

from etils import epath
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from betarank.configs import load, settings
from betarank.configs.errors import ConfigError
from betarank.configs.parser import Parser, above_zero, install_hint
from betarank.configs.sections import section
from betarank.configs.stop import StopSignal
from betarank.configs.terminal import BAR, short, waiting
from betarank.data import estimate, prepare, prepared, show, tokenizer_training
from betarank.data.config import DataConfig, DataError
from betarank.data.packing import Packer
from betarank.data.worker import PIECE_BYTES

_COMMANDS = ('tokenizer', 'prepare', 'finish', 'verify', 'show')
_KEPT = 'what is prepared is kept, and the same command resumes'
_LINE_S = 10.0  # the shortest time between two lines of progress in a log file


def main(argv: Sequence[str]) -> None:
  parser = Parser('betarank data', __doc__)
  parser.add_argument('command', choices=_COMMANDS)
  parser.add_argument('--workers', type=above_zero(int), default=os.cpu_count(),
                      help='processes of prepare (default: all CPUs)')
  parser.add_argument('--part', default='1/1', metavar='I/N', help='prepare: part I, from 1, of N (default: all)')
  parser.add_argument('--dry_run', action='store_true', help='prepare: print what it will take on N machines (--part)')
  parser.add_argument('--mb_per_s', type=above_zero(float), default=0.0, metavar='MB',
                      help='--dry_run: MB of text per second of a process (default: as measured, docs/data.md)')
  parser.add_argument('--dollars_per_hour', type=above_zero(float), default=0.0, metavar='USD',
                      help='--dry_run: the price of a machine')
  parser.add_argument('--source', default='', help='show: one source (default: all)')
  parser.add_argument('--split', default='train', choices=prepared.SPLITS, help='show: of this split')
  parser.add_argument('--row', type=int, default=0, help='show: this row, counted over all epochs')
  config, args = load.from_command_line(
    parser, argv, settings={'model': {'vocab_size': settings.MODEL['vocab_size']}, 'data': settings.DATA_SECTION})
  if args.dry_run and args.command != 'prepare':
    parser.error('--dry_run is for prepare')
  part, parts = _part(args.part)
  data = section(DataConfig, config.get('data'), 'data')
  console = Console()
  if args.dry_run:
    estimate.show(data, parts, args.workers, args.mb_per_s or estimate.mb_per_s(data), args.dollars_per_hour, console)
    return
  if args.command in ('tokenizer', 'prepare'):
    _make_folder(data)
  if args.command == 'verify':
    for name in data.sources:
      print(f'{prepared.folder(data, name)}: {prepared.verify(data, name):,} documents, all as they were written')
  elif args.command == 'show':
    show.show(data, [args.source] if args.source else list(data.sources), args.split, args.row, config.get('seed', 0))
  elif args.command == 'finish':
    _summary(data, {name: prepare.finish(data, name) for name in data.sources}, console)
    _what_next(data, argv)
  elif args.command == 'tokenizer':
    if data.tokenizer:
      raise DataError(f'config.data.tokenizer names {data.tokenizer}; leave it empty to train one')
    _tokenizer(data, console)
    show.tokenizer(data)
  else:
    try:
      _prepare_all(data, args.workers, console, part, parts)
    except KeyboardInterrupt:
      raise KeyboardInterrupt(_KEPT) from None
    if parts == 1:
      _what_next(data, argv)


def _prepare_all(data: DataConfig, workers: int, console: Console, part: int, parts: int) -> None:
  if parts == 1:
    _tokenizer(data, console)
  with StopSignal(unit=f'piece of up to {PIECE_BYTES >> 20} MB') as stop:
    manifests = {name: _prepare(data, name, workers, console, part, parts, stop) for name in data.sources}
  if parts == 1:
    _summary(data, manifests, console)
    return
  print(f'part {part + 1} of {parts} is there; when all are, run: betarank data finish --config=...')


def _what_next(data: DataConfig, argv: Sequence[str]) -> None:
  """Prints where the prepared data is, and two commands to run next, with the --config flags of `argv`."""
  is_open = lambda word: word.startswith('--config') and '=' not in word  # the value is the next word
  config = [word for before, word in itertools.pairwise(['', *argv]) if word.startswith('--config') or is_open(before)]
  print(f'finished: {data.dir} is ready')
  print('try:      ' + shlex.join(['betarank', 'data', 'show', *config]))
  print('          ' + shlex.join(['betarank', 'train', *config, '--workdir=RUN']), flush=True)


def _part(text: str) -> tuple[int, int]:
  match = re.fullmatch(r'(\d{1,6})/(\d{1,6})', text)
  if not match or not 1 <= int(match[1]) <= int(match[2]):
    raise ConfigError(f'--part={text}: expected I/N, part I of N parts, from 1/N to N/N')
  return int(match[1]) - 1, int(match[2])


def _make_folder(data: DataConfig) -> None:
  """Creates the folder of prepared data. This happens first, because the work that follows may take hours.

  Raises:
    DataError: the folder can't be created.
  """
  try:
    epath.Path(data.dir).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise DataError(f'config.data.dir: {data.dir} can\'t be created ({error.strerror or error})') from None
  except ImportError as error:
    raise DataError(f'config.data.dir: {data.dir}: {error} ({install_hint(data.dir)})') from None


def _tokenizer(data: DataConfig, console: Console) -> None:
  start = time.monotonic()
  if not data.tokenizer and not prepared.has_tokenizer(data):
    print(f'training a tokenizer of {data.vocab_size:,} tokens on up to '
          f'{tokenizer_training.sample_bytes(data) / 1e6:,.0f} MB of text', flush=True)
  with waiting('reading text and merging pairs', console):
    trained = tokenizer_training.train_tokenizer(data)
  if trained:
    print(f'{data.tokenizer_path}: {show.read(data).vocab_size:,} tokens, trained in {time.monotonic() - start:.0f} s')
  elif not data.tokenizer:
    print(f'{data.tokenizer_path}: {show.read(data).vocab_size:,} tokens, was there already')


def _prepare(data: DataConfig, name: str, workers: int, console: Console, part: int, parts: int,
             stop: StopSignal) -> dict | None:
  """Prepares a source, and shows the progress. Returns the source's manifest, or None if there are several parts.

  With several parts, `betarank data finish` writes the manifest later.

  workers, part, parts: as in `prepare.prepare_part`.
  stop: returns True once the user has asked the command to stop.
  """
  def run(report):
    if not prepare.prepare_part(data, name, part, parts, workers=workers, report=report, asked=stop):
      stop.end_if_asked(_KEPT)
    return prepare.finish(data, name) if parts == 1 else None

  if not console.is_terminal:
    return run(_Lines(name))
  columns = (TextColumn('{task.description}'), BarColumn(BAR), TaskProgressColumn(), TimeRemainingColumn(),
             TextColumn('{task.fields[counts]}'))
  with Progress(*columns, console=console) as bar:
    task = bar.add_task(name, total=None, counts='')
    start = time.monotonic()

    def report(progress: prepare.Progress) -> None:
      bar.update(task, completed=progress.done_bytes, total=progress.total_bytes, counts=_counts(progress, start))

    return run(report)


def _counts(progress: prepare.Progress, start: float) -> str:
  skipped = f', {progress.bad_rows:,} bad rows' if progress.bad_rows else ''
  return (f'{progress.documents:,} documents, {short(progress.tokens)} tokens{skipped}, '
          f'{progress.done_bytes / 1e6 / max(time.monotonic() - start, 1e-3):.1f} MB/s')


class _Lines:
  """Prints progress as lines for a log file: at most one line every ten seconds, and one at the end."""

  def __init__(self, name: str):
    self.name, self.start = name, time.monotonic()
    self.shown = self.start

  def __call__(self, progress: prepare.Progress) -> None:
    now = time.monotonic()
    if progress.units_done == progress.units or now - self.shown > _LINE_S:
      self.shown = now
      share = progress.done_bytes / max(progress.total_bytes, 1)
      print(f'{self.name}: {share:.0%} of about {short(int(progress.total_bytes))} bytes, unit {progress.units_done} '
            f'of {progress.units}, {_counts(progress, self.start)}', flush=True)


def _summary(data: DataConfig, manifests: dict[str, dict], console: Console) -> None:
  headings = ('source', 'split', 'documents', 'tokens', 'bytes', 'bytes/token', 'rows', 'filled')
  table = Table(*headings, box=None)
  for column in table.columns[2:]:
    column.justify = 'right'
  for name, manifest in manifests.items():
    for split, counts in manifest['splits'].items():
      packer = Packer(prepared.Documents(data, name, split).lengths, data.sequence_length, name)
      numbers = (counts['documents'], counts['tokens'], counts['bytes'])
      table.add_row(name, split, *map(short, numbers), f'{counts["bytes"] / counts["tokens"]:.2f}',
                    short(packer.rows_per_epoch), f'{packer.efficiency:.2%}')
  console.print(table)
  for name, manifest in manifests.items():
    about = manifest.get('input', {})
    if about.get('empty_files'):
      print(f'{name}: {about["empty_files"]} of {about["files"] + about["empty_files"]} files are empty, and skipped')
    if about.get('bad_rows'):
      print(f'{name}: {about["bad_rows"]:,} bad rows skipped')
    if prepared.folder(data, name).parent.name != name:
      print(f'{name}: is in {prepared.folder(data, name)}, because another corpus was prepared under this name before')
    if manifest.get('divided') == 'text':
      print(f'{name}: so few documents that the end of each one is the validation split')
