"""Tests the errors for sections of a pre-training config that don't fit together."""

import re

import pytest

from betarank.configs import load
from betarank.configs.errors import ConfigError
from betarank.train.config import run_config


def test_a_head_larger_than_the_vocabulary_is_refused_by_name():
  """Otherwise every wrong token would be in the head, and lambda_tail would have no effect, without an error."""
  message = re.escape('config.objective.top_k must be <= model.vocab_size = 1024, got 1025')
  for overrides in ({}, {'objective.lambda_tail': '-0.1'}):
    with pytest.raises(ConfigError, match=f'^{message}$'):
      run_config(load.load('configs/smoke.py', overrides | {'objective.top_k': '1025'}))
  assert run_config(load.load('configs/smoke.py', {'objective.top_k': '1024'})).objective.top_k == 1024
