"""python -m train --config=configs/smoke.py:beta=-0.25 --workdir=DIR [--config.KEY=VALUE ...]

Started again with the same workdir, a run goes on where it stands.
"""

import argparse

from configs import load
from data import DataError
from train.flags import add_run_flags


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m train', description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  add_run_flags(parser)
  config, args = load.from_command_line(parser)

  from train import job, loop  # after the config is known to be good: this is where JAX starts

  with job.job(args, config):
    loop.train(config, args.workdir, args.fallback)


if __name__ == '__main__':
  load.run_main(main, DataError)
