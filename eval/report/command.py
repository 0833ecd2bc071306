"""Writes one page on what the objective changed in the models and in RL, from the workdirs of a sweep.

    betarank report ROOT [--out=DIR] [--watch]

Reads every run under ROOT (local or gs://), with any arms, seeds and stages, finished or not. Writes DIR/report.html
(one file that loads nothing else), DIR/figures/*.svg, *.png and *.csv, and DIR/tables/*.csv. By default DIR is
ROOT/report. The command only reads what runs wrote, and needs no accelerator. --watch writes the report again every
minute, until Ctrl-C.
"""

import os
import sys
import time
from collections.abc import Sequence

import numpy as np
from etils import epath

from betarank.configs.errors import ConfigError, UserError, one_line
from betarank.configs.parser import Parser, place
from betarank.configs.terminal import waiting
from betarank.eval.report.arms import read_sweep
from betarank.eval.report.sections import Report, write_over

EVERY_S = 60.0  # between two reports with --watch


def write_report(root: str, out: str | None = None) -> epath.Path:
  """Writes the report of all runs under `root`, and returns the path of the page.

  out: the folder for the report; None means the folder `report` in `root`.

  Raises:
    ConfigError: `root` doesn't exist or has no runs, or a folder of the report is a symbolic link. No file is written
      then.
  """
  folder = epath.Path(root)
  if not folder.is_dir():
    raise ConfigError(f'{root}: no such folder')
  target = epath.Path(out) if out else folder / 'report'
  if not out and os.path.islink(target):
    raise ConfigError(f'{target}: is a link, which a report would fill wherever it leads; give --out=DIR')
  sweep = read_sweep(folder)
  if not sweep.runs:
    raise ConfigError(f'{root}: no run under it (a folder with config.json or metrics.jsonl)')
  np.seterr(invalid='ignore')
  path = target / 'report.html'
  content = Report(sweep, target).html()
  write_over(path, content.encode())
  return path


def main(argv: Sequence[str]) -> None:
  import jax

  jax.config.update('jax_platforms', 'cpu')  # a training run on this machine may hold the accelerator
  parser = Parser('betarank report', __doc__)
  parser.add_argument('root', type=place, metavar='ROOT', help='a folder with runs; local or gs://')
  parser.add_argument('--out', type=place, metavar='DIR', help='where the report is written; default: ROOT/report')
  parser.add_argument('--watch', action='store_true', help='write the report again every minute, until Ctrl-C')
  args = parser.parse_args(argv)
  out = args.out or ''
  with waiting('reading the runs, and drawing'):
    path = _write(args.root, out)
  print(f'report: {path}' + (f', written again every {EVERY_S:.0f} s until Ctrl-C' if args.watch else ''), flush=True)
  while args.watch:
    time.sleep(EVERY_S)
    try:
      _write(args.root, out)
    except UserError as error:  # a run may take weeks, in which a bucket fails and tokens expire
      print(f'{one_line(error)}; tried again in {EVERY_S:.0f} s', file=sys.stderr, flush=True)


def _write(root: str, out: str) -> epath.Path:
  """Calls `write_report`. Raises UserError if a folder can't be read or written."""
  try:
    return write_report(root, out)
  except OSError as error:
    raise UserError(f'{error.filename or root}: {error.strerror or error}') from None
