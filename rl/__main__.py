"""python -m rl --config=configs/rl_smoke.py --workdir=DIR --config.train.init_from=PRETRAINED [--config.KEY=VALUE ...]

Started again with the same workdir, a run goes on where it stands.
"""

import argparse

from configs import load
from data import DataError
from rl.verifiers import VerifierError
from train.flags import add_run_flags


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m rl', description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  add_run_flags(parser)
  config, args = load.from_command_line(parser)

  from rl import loop  # after the config is known to be good: this is where JAX starts
  from train import job

  with job.job(args, config):
    loop.train(config, args.workdir, args.fallback)


if __name__ == '__main__':
  load.run_main(main, DataError, VerifierError)
