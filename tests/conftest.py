"""Eight CPU devices for every test, set before JAX is imported anywhere. TEST_ON=gpu leaves the devices as they are.

What takes long to compile is compiled once for all workers and for the processes that tests start: runs are killed,
started again and compared, each time with the same programs.
"""

import atexit
import os
import pathlib
import shutil
import tempfile

import pytest

if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:  # workers have it from the process that starts them
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='betarank-tests-')
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.5'
  atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)

# Commands that tests start read configs of tests/, which import from there.
os.environ['PYTHONPATH'] = os.pathsep.join(
  [str(pathlib.Path(__file__).resolve().parent.parent), *filter(None, [os.environ.get('PYTHONPATH')])])

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


@pytest.fixture
def bucket():
  """The path of an empty bucket, in memory."""
  from tests import buckets
  return buckets.new()
