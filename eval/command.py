"""betarank eval probe  --checkpoint=RUN [--all] [--config=FILE] [--config.eval.probe.KEY=VALUE ...]
betarank eval sample --checkpoint=RUN [--all] --benchmark=NAME[,NAME] [--config.eval.sample.KEY=VALUE ...]
betarank eval harness --checkpoint=RUN [--all] --tasks=NAME[,NAME] [--num_fewshot=N] [--limit=N] [--include_path=DIR]
betarank eval paper   --checkpoint=RUN [--all]      the paper's average over 19 benchmarks (eval/paper.py)

RUN is one checkpoint, or a workdir of `betarank train` or `betarank rl`, whose newest checkpoint is used. With --all,
all checkpoints of the run are evaluated. Results are written to the folder `eval` of the workdir. If a command is run
again, it skips evaluations that already have results.
"""

import argparse
import contextlib
from collections.abc import Sequence

from betarank.configs import load, settings
from betarank.configs.errors import UserError
from betarank.configs.parser import Parser, above_zero, place
from betarank.configs.stop import StopSignal, importing

# Flags that only some of the commands have, and what another command has instead.
_FLAGS = {'benchmark': ('sample',), 'tasks': ('harness',), 'num_fewshot': ('harness',), 'limit': ('harness', 'paper'),
          'include_path': ('harness', 'paper'), 'max_length': ('harness', 'paper')}
_INSTEAD = {('harness', 'benchmark'): '--tasks=NAME', ('sample', 'tasks'): '--benchmark=NAME',
            ('sample', 'num_fewshot'): '--config.eval.sample.shots=N', ('sample', 'limit'):
            '--config.eval.sample.problems=N', ('probe', 'limit'): '--config.eval.probe.rows=N'}
_KEPT = 'results so far are kept, and the same command does the rest'


def main(argv: Sequence[str]) -> None:
  parser = Parser('betarank eval', __doc__)
  parser.add_argument('command', choices=('probe', 'sample', 'harness', 'paper'), help='the kind of evaluation')
  parser.add_argument('--checkpoint', required=True, type=place, metavar='RUN',
                      help='a workdir or a checkpoint; local or gs://')
  parser.add_argument('--all', action='store_true', help='all checkpoints of the run')
  parser.add_argument('--benchmark', default='', metavar='NAME[,NAME]',
                      help='sample: names from eval/benchmarks.py, or URIs of tasks: reasoning:chain_sum?level=1')
  parser.add_argument('--tasks', default='', metavar='NAME[,NAME]', help='harness: tasks of lm-evaluation-harness')
  parser.add_argument('--num_fewshot', type=int, help="harness: examples before a question, if not the task's number")
  parser.add_argument('--limit', type=above_zero(int), help='harness, paper: questions of each task, the first ones')
  parser.add_argument('--include_path', type=place, help='harness, paper: a folder with tasks of your own')
  parser.add_argument('--max_length', type=above_zero(int),
                      help='harness, paper: tokens, if not what the model was trained on')
  parser.add_argument('--coordinator', default='', metavar='HOST:PORT | auto',
                      help='join several processes into one job; auto on TPU pods and Slurm')
  parser.add_argument('--processes', type=int, default=1, help='processes of the job (default 1; auto counts them)')
  parser.add_argument('--process_id', type=int, default=0, help='number of this process, from 0 (auto finds it)')
  subjects = []

  def configure(args, _):
    _check_flags(args)
    with importing('starting JAX'):
      from betarank.eval import config
      from betarank.runtime import job

    job.join(args.coordinator, args.processes, args.process_id)
    subjects.extend(config.find_checkpoints(args.checkpoint, args.all))
    return config.configure(subjects[-1], args.config)

  config, args = load.from_command_line(
    parser, argv, settings={'eval': settings.EVAL}, configure=configure, needs_config=False)

  with importing('starting JAX'):
    import jax

    from betarank.eval import config as eval_config
    from betarank.eval import generate, probe
    from betarank.runtime import multihost, workdir

  run = eval_config.eval_run(config, subjects[-1])
  with contextlib.ExitStack() as alone:
    refused = ''
    if jax.process_index() == 0:
      try:
        # `paper` writes the files of the other two.
        for written in ('harness', 'sample') if args.command == 'paper' else (args.command,):
          alone.enter_context(workdir.claim(subjects[-1].run / 'eval', '--checkpoint', f'.lock-{written}'))
      except UserError as error:
        refused = str(error)
    if refused := multihost.first_message(refused):  # otherwise, the others would wait for process 0
      raise UserError(refused)
    try:
      if args.command == 'probe':
        with StopSignal(jax.process_count(), unit='checkpoint') as stop:
          probe.probe(run, subjects, lambda: stop.end_if_asked(_KEPT))
      elif args.command == 'sample':
        with StopSignal(jax.process_count(), unit='problem') as stop:
          generate.sample(run, subjects, args.benchmark, lambda: stop.end_if_asked(_KEPT))
      else:  # lm-evaluation-harness has no place to stop at, so Ctrl-C ends it at once
        _harness(run, subjects, args)
    except KeyboardInterrupt:
      raise KeyboardInterrupt(_KEPT) from None


def _check_flags(args: argparse.Namespace) -> None:
  """Raises UserError if a flag was given that the command doesn't have."""
  for name, commands in _FLAGS.items():
    if args.command not in commands and getattr(args, name) not in ('', None):
      instead = _INSTEAD.get((args.command, name), '')
      raise UserError(f'betarank eval {args.command}: --{name} is a flag of betarank eval {" and ".join(commands)}'
                      + (f'; use {instead}' if instead else ''))


def _harness(run, subjects, args) -> None:
  try:
    from betarank.eval import lm_harness, paper
  except ImportError as error:
    raise UserError(f"betarank eval {args.command}: {error}; pip install -e '.[lm_eval]'") from None
  asked = dict(limit=args.limit, include_path=args.include_path or '', max_length=args.max_length or 0)
  if args.command == 'paper':
    paper.evaluate(run, subjects, **asked)
  else:
    lm_harness.harness(run, subjects, args.tasks, num_fewshot=args.num_fewshot, **asked)
