"""Tests that a run that starts from a checkpoint has the checkpoint's model, and that other settings of the model are
errors.
"""

import pytest

from betarank.configs import common, load
from betarank.configs.errors import ConfigError
from betarank.train.inherit import inherit_model


@pytest.fixture
def trained():
  model = load.load('configs/smoke.py', {'model.layers': '3', 'model.remat_policy': 'full'}).model
  return {'config': {'model': model.to_dict()}}


def test_what_is_learned_is_taken_and_how_it_is_computed_is_not(trained):
  config = common.base()
  inherit_model(config, trained, {'optimizer.lr': '1', 'model.layers': '3'})
  width = trained['config']['model']['d_model']
  assert (config.model.layers, config.model.d_model, config.model.vocab_size) == (3, width, 1024)
  assert config.data.vocab_size == 1024 and config.model.remat_policy == 'none'


def test_a_config_without_a_model_gets_it_whole(trained):
  config = common.rl_base()
  inherit_model(config, trained, {})
  assert config.model.to_dict() == trained['config']['model']


@pytest.mark.parametrize('key, text', [('model.layers', '4'), ('model.rope_base', '5e5'), ('model.moe.experts', '8')])
def test_an_override_that_contradicts_is_refused(trained, key, text):
  with pytest.raises(ConfigError, match=rf'config\.{key} is .* in the checkpoint to start from'):
    inherit_model(common.base(), trained, {key: text})
