"""betarank rl --from=RUN --task=URI [--workdir=DIR] [--config=FILE.py[:ARG]] [--config.KEY=VALUE ...]

Continues a pre-trained model with reinforcement learning on verifiable rewards. Run the same command again to resume.
RUN is a workdir or a checkpoint, from which the model's settings and its tokenizer are taken. URI names the problems,
for example reasoning:chain_sum or jsonl:FILE (docs/rl.md). Without --config, the settings are those of configs/rl.py.
"""

import argparse
from collections.abc import Sequence

from etils import epath
from ml_collections import ConfigDict

from betarank.configs import load, settings
from betarank.configs.errors import ConfigError
from betarank.configs.parser import Parser, not_for_runs, place
from betarank.configs.stop import importing
from betarank.runtime.flags import add_run_flags


def main(argv: Sequence[str]) -> None:
  parser = Parser('betarank rl', __doc__)
  add_run_flags(parser, workdir_needed=False)
  parser.add_argument('--from', type=place, dest='source', metavar='RUN',
                      help='the model to start from, a workdir or a checkpoint; the same as --config.train.init_from')
  parser.add_argument('--task', metavar='URI', help='the problems; the same as --config.rl.task.uri')
  config, args = load.from_command_line(
    parser, argv, settings=settings.RL, configure=_configure, needs_config=False)
  if not args.workdir:
    raise ConfigError('betarank rl: missing --workdir')

  with importing('starting JAX'):
    from betarank.rl import loop  # imported after the config was checked, because this takes seconds
    from betarank.runtime import job

  with job.job(args, config, loop.inputs(config)):
    loop.train(config, args.workdir, args.fallback)


def _configure(args: argparse.Namespace, overrides: dict[str, str]) -> ConfigDict:
  """Returns the config of --config, changed by --from and --task, with the model's settings taken from the checkpoint.

  The checkpoint is the one that the run starts from. If --workdir isn't given, args.workdir is set to RUN-rl, where RUN
  is the workdir of this checkpoint.
  """
  for flag, key in (('source', 'train.init_from'), ('task', 'rl.task.uri')):
    if getattr(args, flag):
      overrides.setdefault(key, getattr(args, flag))
  if not args.config and 'train.init_from' not in overrides:
    raise ConfigError('betarank rl: missing --from=RUN, the model to start from, or --config')
  config = load.read_stage(args.config or 'configs/rl.py', 'rl')
  if not args.config:
    del config.model  # that of the checkpoint is added below
  load.apply_paths(config, overrides, ['train.init_from'])
  source = config.get('train', {}).get('init_from')
  if not source:
    return config
  with importing('starting JAX'):
    from betarank.runtime import checkpoint
    from betarank.train import setup
    from betarank.train.inherit import inherit_model

  if not args.workdir:
    run = checkpoint.find(source)
    run = run.parent.parent if run.parent.name == 'checkpoints' else run
    args.workdir = f'{str(run).rstrip("/")}-rl'
    if problem := not_for_runs(args.workdir):
      raise ConfigError(f'betarank rl: --workdir: {problem}')
  trained = setup.parent_meta(epath.Path(args.workdir), source)
  inherit_model(config, trained, overrides)
  if not args.config and overrides.get('rl.task.uri', config.rl.task.uri).startswith('reasoning'):
    # The default is to hold problems out, as far as the documents of all stages before left them out.
    config.rl.task.held_out_fraction = min(config.rl.task.held_out_fraction, setup.left_out(trained))
  return config
