"""betarank plan --config=FILE[:ARG] --topology=v5e-256 [--search] [--json] [--config.KEY=VALUE ...]
betarank plan --table

Compiles the programs of a config for a TPU pod that this machine doesn't have. Prints whether they fit into memory, how
long a step takes, and what the whole stage (one run of pre-training, mid-training or RL) costs. Nothing is allocated,
and neither data nor a tokenizer is needed. A compile takes minutes. Pods have their usual names: v5e-256 and v6e-256
have 256 chips, v5p-128 has 64.

The exit status is 1 if a program doesn't fit; RL has several, and needs all of them. With --search, it is 1 if a
program fits with none of the settings that were tried.

--table makes the table of docs/plans.md, which has the models of configs/paper on three pods.

Memory is what the compiler assigned. Time is predicted from the compiled program, as an interval;
launch/plan/predict.py describes the method.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from betarank.configs import load, settings
from betarank.configs.errors import ConfigError
from betarank.configs.parser import Parser, above_zero
from betarank.configs.stop import importing


def main(argv: Sequence[str]) -> None:
  """Runs the command. Exits with status 1 if one of the programs has no plan that fits."""
  parser = Parser('betarank plan', __doc__)
  parser.add_argument('--topology', help='v5e-256, v5p-128, v6e-64, ...')
  parser.add_argument('--slices', type=above_zero(int), default=1,
                      help='pods joined by a network; the data axis spans them')
  parser.add_argument('--usd_per_chip_hour', type=above_zero(float), default=0.0,
                      help='the price, to print what the stage costs')
  parser.add_argument('--mean_answer', type=above_zero(int), default=0, metavar='TOKENS',
                      help="mean length of RL's answers, for the time of the stage; default: the greatest length")
  parser.add_argument('--json', action='store_true', help='print the plan as JSON, nothing else')
  parser.add_argument('--search', action='store_true', help='try meshes, microbatches and remat policies; rank them')
  parser.add_argument('--no_bundles', action='store_true', help='compile in a third of the time, as training does; '
                      "memory and collectives stay the same, but times are XLA's estimates, without kernels")
  parser.add_argument('--table', nargs='?', const='*', metavar='PATTERN',
                      help="make the table of docs/plans.md, or its rows that match, such as 'dense_*/v5e-256'")
  parser.add_argument('--tries', type=above_zero(int), default=12, help='how many settings --search compiles at most')
  config, args = load.from_command_line(
    parser, argv, settings=settings.STAGES, needs_config=False,
    configure=lambda args, overrides: _read_config(parser, args, overrides))
  if args.mean_answer and 'rl' not in config:
    raise ConfigError(f'--mean_answer={args.mean_answer}: is for a config of RL')
  folder = pathlib.Path(tempfile.mkdtemp(prefix='plan-'))
  configure_libtpu(folder, not args.no_bundles)

  with importing('starting JAX'):
    # After the environment was set, for JAX.
    from betarank.launch.plan import chips, plans, report, search, table, workload
  say = (lambda text: print(text, file=sys.stderr)) if args.json or args.table else print
  try:
    if args.table:
      for line in table.lines(table.choose(args.table), folder, say):
        print(line, flush=True)
      return
    work = workload.workload(config)
    if work.rl and args.mean_answer > max(work.rl.max_new_tokens):
      raise ConfigError(f'--mean_answer={args.mean_answer}: no answer is longer than '
                        f'config.rl.max_new_tokens = {max(work.rl.max_new_tokens)}')
    topology = chips.topology(args.topology, args.slices)
    devices = topology.devices()
    if args.search:
      found = search.search(config, topology, devices, folder, args.tries, say)
    else:
      found = list(plans.make_plans(work, topology, devices, folder, say))
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  if args.json:
    stage = plans.describe_stage(
      work, topology, () if args.search else found, args.mean_answer, args.usd_per_chip_hour)
    print(json.dumps({'stage': stage, 'plans': [dataclasses.asdict(plan) for plan in found]}, indent=2))
  elif not args.search:
    report.report(work, topology, found, args.usd_per_chip_hour, args.mean_answer)
  if not found or {plan.program for plan in found} - {plan.program for plan in found if plan.fits}:
    sys.exit(1)


def _read_config(parser: Parser, args: argparse.Namespace, overrides: Mapping[str, str]) -> ConfigDict:
  """Returns the config of --config, or an empty one for --table.

  Raises:
    ConfigError: a required flag is missing, or flags are given that can't be combined.
  """
  changed = lambda *names: [f'--{name}' for name in names if getattr(args, name) != parser.get_default(name)]
  if args.table:
    given = changed(
      'config', 'topology', 'slices', 'usd_per_chip_hour', 'mean_answer', 'json', 'search', 'tries')
    if given := given + [f'--config.{key}' for key in overrides]:
      raise ConfigError(f'{given[0]}: can\'t be combined with --table, which takes only a pattern and --no_bundles')
    return ConfigDict()
  for flag, example in (('config', 'configs/smoke.py'), ('topology', 'v5e-256')):
    if not getattr(args, flag):
      raise ConfigError(f'--{flag} is needed, as in --{flag}={example}')
  if args.search and (given := changed('usd_per_chip_hour', 'mean_answer')):
    raise ConfigError(f'{given[0]}: can\'t be combined with --search, which doesn\'t plan the whole stage')
  if not args.search and changed('tries'):
    raise ConfigError('--tries: is for --search')
  return load.read(args.config)


def configure_libtpu(folder: pathlib.Path, write_bundles: bool) -> None:
  """Sets the environment for compiling without a TPU. Call this before JAX is imported.

  write_bundles: whether libtpu writes its bundles (instruction words) to `folder`. If it does, libtpu also checks
    each bundle, which takes twice as long as the rest of a compile.
  """
  from betarank.launch.plan import bundles
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  # Without these, libtpu queries the machine, and prints warnings if it isn't a TPU VM.
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_STDERR_LOG_LEVEL', '3')
  os.environ.setdefault('TPU_MIN_LOG_LEVEL', '3')
  if write_bundles:
    flags = bundles.FLAGS.format(folder=folder)
    os.environ['LIBTPU_INIT_ARGS'] = f'{os.environ.get("LIBTPU_INIT_ARGS", "")} {flags}'.strip()
