"""Pre-trains the model from which RL starts in the tests of whole runs."""

import pytest

from tests.runs import finish_well, prepare, start


@pytest.fixture(scope='session')
def config(tmp_path_factory):
  """Returns the RL config, as FILE:ARG. RL starts from a model that has learned little more than the format of an
  answer.
  """
  folder = tmp_path_factory.mktemp('pretrained')
  source = '--config.data.sources.main.uri=reasoning:chain_sum'
  tiny = f'tests/tiny.py:dir={folder}/data,beta=0'
  prepare(tiny, source)
  finish_well(start('train', tiny, folder / 'run', 1, source, '--config.train.tokens=128000',
                    '--config.train.batch_size=32', '--config.checkpoint.every_steps=500',
                    '--config.log.eval_every_steps=1000', '--config.log.samples=0'))
  return f'tests/tiny_rl.py:init_from={folder}/run'
