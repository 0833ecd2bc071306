"""Provides the config of the tiny run."""

import pytest

from betarank.configs import load


@pytest.fixture
def tiny(data_dir):
  """Returns a function (overrides by dotted key) -> config of the tiny run."""
  return lambda overrides=None: load.load(f'tests/tiny.py:dir={data_dir}', overrides or {})
