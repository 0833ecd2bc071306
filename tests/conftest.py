"""Sets up all tests: eight CPU devices, a shared compilation cache, and the import path.

The settings are environment variables, which are set before JAX is imported, so that they also apply to the commands
that tests start. With TEST_ON=gpu, the devices aren't changed.
"""

import atexit
import ctypes
import gc
import os
import pathlib
import shutil
import sys
import tempfile

import pytest

from tests.xla_flags import QUICK

# Runs are killed, resumed and compared, each time with the same programs: these are compiled once for all workers and
# commands. Workers have the variables from the process that starts them.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='betarank-tests-')
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
  atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)

# An implicit broadcast such as [B] + [B, T] is an error: where B = T, it adds along the wrong axis without a word. This
# also holds in the commands that tests start.
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'

# Commands that tests start read configs of tests/, which import from there.
os.environ['PYTHONPATH'] = os.pathsep.join(
  [str(pathlib.Path(__file__).resolve().parent.parent), *filter(None, [os.environ.get('PYTHONPATH')])])

if os.environ.get('TEST_ON') != 'gpu':  # benchmarks/gpu.py: the numeric tests on a card
  os.environ['JAX_PLATFORMS'] = 'cpu'
  flags = ['--xla_force_host_platform_device_count=8']
  # With TEST_OPTIMIZED (`make test-all`), programs are compiled as users compile them, except in modules that use
  # `quick_commands`.
  if not os.environ.get('TEST_OPTIMIZED'):
    flags += QUICK
  os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *flags])


# Files that take minutes. pytest-xdist gives whole files to its workers; if one of these came last, it would run alone.
LONGEST = ('test_faults.py', 'test_processes.py', 'test_determinism.py', 'test_gcloud.py')


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope='module', autouse=True)
def release_programs():
  """Frees the compiled programs of a module at its end. A worker would need 4 GB if it kept those of all modules."""
  yield
  if jax := sys.modules.get('jax'):
    jax.clear_caches()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # gives the freed memory back to the system


@pytest.fixture(scope='module')
def quick_commands():
  """Lets commands compile quickly, also in `make test-all`.

  It is for modules that start the same run again and again to see what processes do, not what they compute.
  """
  from tests import runs  # brings JAX
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(runs, 'XLA_FLAGS', QUICK)
    yield


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
  """Returns the folder of prepared data for the tiny run. The data is prepared once per worker of pytest."""
  from tests.runs import prepare  # brings JAX
  path = tmp_path_factory.mktemp('data')
  prepare(f'tests/tiny.py:dir={path}')
  return path


@pytest.fixture
def bucket():
  """Returns the path of an empty bucket in memory."""
  from tests import buckets
  return buckets.new()
