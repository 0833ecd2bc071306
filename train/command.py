"""betarank train --config=configs/smoke.py:beta=-0.25 --workdir=DIR [--config.KEY=VALUE ...]

Started again with the same workdir, a run goes on where it stands.
"""

import argparse
from collections.abc import Sequence

from betarank.configs import load
from betarank.runtime.flags import add_run_flags


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(prog='betarank train', description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  add_run_flags(parser)
  config, args = load.from_command_line(parser, argv)

  from betarank.runtime import job
  from betarank.train import loop  # after the config is known to be good: this is where JAX starts

  with job.job(args, config):
    loop.train(config, args.workdir, args.fallback)
