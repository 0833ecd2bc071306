"""The tiny run's config."""

import pytest

from betarank.configs import load


@pytest.fixture
def tiny(data_dir):
  """tiny(**overrides by dotted key) -> config."""
  return lambda overrides=None: load.load(f'tests/tiny.py:dir={data_dir}', overrides or {})
