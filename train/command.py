"""betarank train --config=configs/smoke.py:beta=-0.25 --workdir=DIR [--config.KEY=VALUE ...]

Pre-trains a model. Run the same command again to resume.
"""

import argparse
from collections.abc import Mapping, Sequence

from etils import epath
from ml_collections import ConfigDict

from betarank.configs import load, settings
from betarank.configs.parser import Parser
from betarank.configs.stop import importing
from betarank.runtime.flags import add_run_flags

_DECIDE = ('train.init_from', 'data.dir', 'data.tokenizer')  # the settings that decide what is taken from a checkpoint


def main(argv: Sequence[str]) -> None:
  parser = Parser('betarank train', __doc__)
  add_run_flags(parser)
  config, args = load.from_command_line(parser, argv, settings=settings.PRETRAIN, configure=_configure)

  with importing('starting JAX'):
    from betarank.runtime import job  # imported after the config was checked, because this takes seconds
    from betarank.train import loop

  with job.job(args, config, loop.inputs(config)):
    loop.train(config, args.workdir, args.fallback)


def _configure(args: argparse.Namespace, overrides: Mapping[str, str]) -> ConfigDict:
  """Returns the config that --config and the overrides give.

  If the run starts from a checkpoint, the model's settings are taken from the checkpoint, except for those of the
  rotary embedding that the config or an override changes. The tokenizer is also taken from the checkpoint, unless the
  config names a tokenizer or the data folder has one.
  """
  config = load.read_stage(args.config, 'train')
  load.apply_paths(config, overrides, _DECIDE)
  source = config.get('train', {}).get('init_from')
  if source:
    with importing('starting JAX'):
      from betarank.train import setup
      from betarank.train.inherit import ROPE, inherit_model

    trained = setup.parent_meta(epath.Path(args.workdir), source)
    inherit_model(config, trained, overrides, may_change=ROPE)
    own = config.get('data', {})
    if 'dir' in own and not own.get('tokenizer') and not (epath.Path(own.dir) / 'tokenizer.model').exists():
      own.tokenizer = setup.trained_tokenizer(trained)
  return config
