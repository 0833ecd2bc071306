"""python -m train --config=configs/smoke.py:beta=-0.25 --workdir=DIR [--config.KEY=VALUE ...]

Started again with the same workdir, a run goes on where it stands.
"""

import argparse

from configs import load
from data import DataError


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m train', description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', required=True, help='where checkpoints, logs and the resolved config go')
  parser.add_argument('--coordinator', default='', metavar='HOST:PORT | auto',
                      help='join several processes into one job; auto on TPU pods and Slurm')
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument('--process_id', type=int, default=0)
  config, args = load.from_command_line(parser)

  from train import hosts, loop  # after the config is known to be good: this is where JAX starts

  hosts.join(args.coordinator, args.processes, args.process_id)
  loop.train(config, args.workdir)


if __name__ == '__main__':
  load.run_main(main, DataError)
