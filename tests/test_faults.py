"""Tests each class of faults at two points. `python -m tests.faults` tests many points."""

import pytest

from tests import runs
from tests.faults.__main__ import run
from tests.faults.classes import CLASSES
from tests.xla_flags import QUICK_AND_FAST

pytestmark = pytest.mark.slow  # the undisturbed runs alone take half a minute


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """Returns the folder of all campaigns, which share their inputs, undisturbed runs and compiled programs.

  Commands compile quickly, also in `make test-all`: what is tested is what processes do, not what they compute.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(runs, 'XLA_FLAGS', QUICK_AND_FAST)
    yield tmp_path_factory.mktemp('faults')


@pytest.mark.parametrize('name', CLASSES)
def test_two_points_of_every_class(name, root):
  lines = []
  counts, notes = run(seed=1, points=2, names=[name], parallel=2, root=root, say=lines.append, processes=4)
  for counted, count in counts.items():
    if notes[counted] and all(note.startswith('skipped: ') for note in notes[counted]):
      pytest.skip(f'{counted}: {next(iter(notes[counted]))}')  # this account may not do it
    whole = '\n'.join([counted, *map(str, notes[counted]), *lines])  # pytest shortens all but strings
    assert count['survived'] == count['tried'] > 0, whole
