"""Tests each class of faults at two points. `python -m tests.faults` tests many points."""

import pytest

from tests.faults.__main__ import run
from tests.faults.classes import CLASSES

pytestmark = pytest.mark.slow  # the undisturbed runs alone take half a minute


@pytest.mark.parametrize('name', CLASSES)
def test_two_points_of_every_class(name, tmp_path):
  lines = []
  counts, notes = run(seed=1, points=2, only=[name], parallel=2, root=tmp_path / 'faults', say=lines.append)
  for counted, count in counts.items():
    assert count['survived'] == count['tried'] > 0, (counted, notes[counted], lines)
