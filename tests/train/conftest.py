"""Prepared data for the tiny run, made once a worker."""

import subprocess
import sys

import pytest

from configs import load


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp('data')
  done = subprocess.run([sys.executable, '-m', 'data', 'prepare', f'--config=tests/tiny.py:dir={path}'],
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return path


@pytest.fixture
def tiny(data_dir):
  """tiny(**overrides by dotted key) -> config."""
  return lambda overrides=None: load.load(f'tests/tiny.py:dir={data_dir}', overrides or {})
