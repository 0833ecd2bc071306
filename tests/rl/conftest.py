"""What RL's tests share: no silent broadcast in losses, and a model to start whole runs from."""

import jax
import pytest

from tests.runs import finish_well, prepare, start


@pytest.fixture(autouse=True)
def no_rank_promotion(request):
  """[B] + [B, T] is an error in the tests of losses and advantages: it broadcasts over the wrong axis where B = T."""
  losses = request.module.__name__.rpartition('.')[2] in ('test_policy_losses', 'test_advantages')
  with jax.numpy_rank_promotion('raise' if losses else 'allow'):
    yield


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
