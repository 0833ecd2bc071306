"""Flags that entry points share; importing this starts no JAX."""

import argparse


def add_run_flags(parser: argparse.ArgumentParser) -> None:
  """What a run takes: its workdir, how it goes on there, and what `job.job` takes."""
  parser.add_argument('--workdir', required=True, help='where checkpoints, logs and the resolved config go')
  parser.add_argument('--fallback', action='store_true',
                      help='if the newest checkpoint is damaged, move it aside and go on from the newest good one')
  parser.add_argument('--coordinator', default='', metavar='HOST:PORT | auto',
                      help='join several processes into one job; auto on TPU pods and Slurm')
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument('--process_id', type=int, default=0)
  parser.add_argument('--host_deadline_s', type=float, default=60.0,
                      help='a process that gives no sign of life for so long ends the others (default 60)')
