"""Defines the flags that `betarank train` and `betarank rl` share. Importing this module doesn't import JAX."""

import argparse

from betarank.configs.parser import above_zero, run_place


def add_run_flags(parser: argparse.ArgumentParser, workdir_needed: bool = True) -> None:
  """Adds the flags for the workdir, for resuming, and for jobs of several processes (runtime/job.py).

  workdir_needed: whether --workdir must be given.
  """
  parser.add_argument('--workdir', required=workdir_needed, type=run_place,
                      help='where checkpoints, logs and the resolved config go; local or gs://'
                      + ('' if workdir_needed else '; default: the workdir of RUN with -rl at its end'))
  parser.add_argument('--fallback', action='store_true',
                      help='if the newest checkpoint is damaged, move it aside and resume from the newest good one')
  parser.add_argument('--coordinator', default='', metavar='HOST:PORT | auto',
                      help='join several processes into one job; auto on TPU pods and Slurm')
  parser.add_argument('--processes', type=int, default=1, help='processes of the job (default 1; auto counts them)')
  parser.add_argument('--process_id', type=int, default=0, help='number of this process, from 0 (auto finds it)')
  parser.add_argument('--host_deadline_s', type=above_zero(float), default=60.0,
                      help='seconds without a heartbeat after which a process counts as lost, and the others end '
                           '(default 60)')
