"""betarank train --config=configs/smoke.py:beta=-0.25 --workdir=DIR [--config.KEY=VALUE ...]

Pre-trains a model. Run the same command again to resume.
"""

from collections.abc import Sequence

from betarank.configs import load, settings
from betarank.configs.parser import Parser
from betarank.runtime.flags import add_run_flags


def main(argv: Sequence[str]) -> None:
  parser = Parser('betarank train', __doc__)
  add_run_flags(parser)
  config, args = load.from_command_line(parser, argv, settings=settings.PRETRAIN,
                                        configure=lambda args, _: load.read_stage(args.config, 'train'))

  from betarank.runtime import job  # imported after the config was checked, because this starts JAX
  from betarank.train import loop

  with job.job(args, config, loop.inputs(config)):
    loop.train(config, args.workdir, args.fallback)
