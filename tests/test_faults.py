"""Tests each class of faults at two points. `python -m tests.faults` tests many points."""

import jax
import pytest

from tests.faults.__main__ import run
from tests.faults.classes import CLASSES
from tests.xla_flags import xla_flags

pytestmark = pytest.mark.slow  # the undisturbed runs alone take half a minute


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """Returns the folder of all campaigns, which share their inputs, undisturbed runs and compiled programs.

  Commands compile quickly, also in `make test-all`: faults hit the same programs again and again.
  """
  jax.devices()  # this process reads its flags here, before they are changed for commands
  with pytest.MonkeyPatch.context() as patch:
    for flag in xla_flags(optimized=False):
      patch.setenv('XLA_FLAGS', flag, prepend=' ')
    yield tmp_path_factory.mktemp('faults')


@pytest.mark.parametrize('name', CLASSES)
def test_two_points_of_every_class(name, root):
  lines = []
  counts, notes = run(seed=1, points=2, only=[name], parallel=2, root=root, say=lines.append, processes=4)
  for counted, count in counts.items():
    whole = '\n'.join([counted, *map(str, notes[counted]), *lines])  # pytest shortens all but strings
    assert count['survived'] == count['tried'] > 0, whole
