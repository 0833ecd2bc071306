"""betarank rl --config=configs/rl_smoke.py --workdir=DIR --config.train.init_from=PRETRAINED [--config.KEY=VALUE ...]

Continues a pre-trained model with reinforcement learning on verifiable rewards. Run the same command again to resume.
"""

import argparse
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from betarank.configs import load, settings
from betarank.configs.parser import Parser
from betarank.runtime.flags import add_run_flags


def main(argv: Sequence[str]) -> None:
  parser = Parser('betarank rl', __doc__)
  add_run_flags(parser)
  config, args = load.from_command_line(parser, argv, settings=settings.RL, configure=_with_model)

  from betarank.rl import loop  # imported after the config was checked, because this starts JAX
  from betarank.runtime import job

  with job.job(args, config, loop.inputs(config)):
    loop.train(config, args.workdir, args.fallback)


def _with_model(args: argparse.Namespace, overrides: Mapping[str, str]) -> ConfigDict:
  """Reads the config file of --config. If it has no section `model`, adds that of the checkpoint that the run starts
  from.
  """
  config = load.read_stage(args.config, 'rl')
  if 'model' not in config and 'train' in config:
    from betarank.runtime import checkpoint
    source = overrides.get('train.init_from') or config.train.get('init_from')
    if source:
      config.model = ConfigDict(checkpoint.read_meta(checkpoint.find(source))['config']['model'])
  return config
