"""A model to start RL from, for every test of whole runs."""

import pytest

from tests.runs import finish_well, prepare, start


@pytest.fixture(scope='session')
def config(tmp_path_factory):
  """The RL config on top of a model that has learned what an answer looks like, and little else."""
  folder = tmp_path_factory.mktemp('pretrained')
  source = '--config.data.sources.main.uri=reasoning:chain_sum'
  tiny = f'tests/tiny.py:dir={folder}/data,beta=0'
  prepare(tiny, source)
  finish_well(start('train', tiny, folder / 'run', 1, source, '--config.train.tokens=128000',
                    '--config.checkpoint.every_steps=500', '--config.log.eval_every_steps=1000'))
  return f'tests/tiny_rl.py:init_from={folder}/run'
