"""Writes one page on what the objective did to exploration, from the workdirs of a sweep.

    betarank report ROOT [--out=DIR]

Reads every run under ROOT (local or gs://), with any arms, seeds and stages, finished or not. Writes DIR/report.html
(one file that loads nothing else), DIR/figures/*.svg, *.png and *.csv, and DIR/tables/*.csv. By default DIR is
ROOT/report. It only reads what runs wrote, and needs no accelerator.
"""

import argparse
import os
from collections.abc import Sequence

import numpy as np
from etils import epath

from betarank.configs.errors import ConfigError, UserError
from betarank.configs.load import check_places
from betarank.eval.report.arms import read_sweep
from betarank.eval.report.sections import Report, write_over


def write_report(root: str, out: str = '') -> epath.Path:
  """Writes the report of all runs under `root`, and returns the path of the page.

  Raises:
    ConfigError: there is no folder `root`, or no run under it. Nothing is written then.
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
