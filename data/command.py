"""betarank data tokenizer|prepare|verify --config=FILE [--config.KEY=VALUE] [--workers=N]"""

import argparse
import os
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from betarank.configs import load, settings
from betarank.configs.sections import section
from betarank.data import prepared
from betarank.data.config import DataConfig, DataError
from betarank.data.packing import Packer
from betarank.data.prepare import prepare_source, train_tokenizer


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(prog='betarank data', description=__doc__)
  parser.add_argument('command', choices=('tokenizer', 'prepare', 'verify'),
                      help='train the tokenizer; prepare all sources, training it first if needed; or read all that is '
                           'prepared, and say which file is damaged')
  parser.add_argument('--workers', type=int, default=os.cpu_count(), help='processes (default: all CPUs)')
  config, args = load.from_command_line(
    parser, argv, settings={'model': {'vocab_size': settings.MODEL['vocab_size']}, 'data': settings.DATA_SECTION})
  if args.workers < 1:
    parser.error('--workers must be 1 or more')
  data = section(DataConfig, config.get('data'), 'data')
  console = Console()
  if data.tokenizer and args.command == 'tokenizer':
    raise DataError(f'config.data.tokenizer names {data.tokenizer}; leave it empty to train one')
  if args.command == 'verify':
    for name in data.sources:
      print(f'{prepared.folder(data, name)}: {prepared.verify(data, name):,} documents, all as they were written')
    return
  trained = train_tokenizer(data)
  if trained or args.command == 'tokenizer':
    print(f'{data.tokenizer_path}: {data.vocab_size} tokens, {"trained" if trained else "was there already"}')
  if args.command == 'prepare':
    manifests = {name: _prepare(data, name, args.workers, console) for name in data.sources}
    _summary(data, manifests, console)


def _prepare(data: DataConfig, name: str, workers: int, console: Console) -> dict:
  if not console.is_terminal:
    return prepare_source(data, name, workers=workers, report=_Lines(name))
  columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
             TextColumn('{task.fields[counts]}'), TimeRemainingColumn())
  with Progress(*columns, console=console) as bar:
    task = bar.add_task(name, total=None, counts='')

    def report(done, units, documents, tokens):
      bar.update(task, completed=done, total=units, counts=f'{documents:,} documents, {tokens:,} tokens')

    return prepare_source(data, name, workers=workers, report=report)


class _Lines:
  """Progress for a log file: a line every ten seconds at most, and one at the end."""

  def __init__(self, name: str):
    self.name, self.shown = name, time.monotonic()

  def __call__(self, done: int, units: int, documents: int, tokens: int) -> None:
    now = time.monotonic()
    if done == units or now - self.shown > 10:
      self.shown = now
      print(f'{self.name}: part {done} of {units}, {documents:,} documents, {tokens:,} tokens', flush=True)


def _summary(data: DataConfig, manifests: dict[str, dict], console: Console) -> None:
  headings = ('source', 'split', 'documents', 'tokens', 'bytes', 'bytes/token', 'rows', 'filled')
  table = Table(*headings, box=None)
  for column in table.columns[2:]:
    column.justify = 'right'
  for name, manifest in manifests.items():
    for split, counts in manifest['splits'].items():
      packer = Packer(prepared.Documents(data, name, split).lengths, data.sequence_length, name)
      numbers = (counts['documents'], counts['tokens'], counts['bytes'])
      table.add_row(name, split, *map(_short, numbers), f'{counts["bytes"] / counts["tokens"]:.2f}',
                    _short(packer.rows_per_epoch), f'{packer.efficiency:.2%}')
  console.print(table)


def _short(number: int) -> str:
  power = min(max(0, len(str(number)) - 1) // 3, 4)
  return f'{number / 1000**power:.3g}{["", "k", "M", "G", "T"][power]}'
