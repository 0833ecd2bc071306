"""Eight CPU devices for every test, set before JAX is imported anywhere. TEST_ON=gpu leaves the devices as they are."""

import os

import pytest

if os.environ.get('TEST_ON') != 'gpu':  # benchmarks/gpu.py: the numeric tests on a card
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
  """Prepared data for the tiny run, made once a worker."""
  from tests.runs import prepare  # brings JAX
  path = tmp_path_factory.mktemp('data')
  prepare(f'tests/tiny.py:dir={path}')
  return path
