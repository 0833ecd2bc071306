"""betarank rl --config=configs/rl_smoke.py --workdir=DIR --config.train.init_from=PRETRAINED [--config.KEY=VALUE ...]

Started again with the same workdir, a run goes on where it stands.
"""

import argparse
from collections.abc import Sequence

from betarank.configs import load
from betarank.runtime.flags import add_run_flags


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(prog='betarank rl', description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  add_run_flags(parser)
  config, args = load.from_command_line(parser, argv)

  from betarank.rl import loop  # after the config is known to be good: this is where JAX starts
  from betarank.runtime import job

  with job.job(args, config):
    loop.train(config, args.workdir, args.fallback)
