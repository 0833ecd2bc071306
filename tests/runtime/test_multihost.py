"""Tests which rows each process reads, for every way in which a mesh can be spread over processes."""

import jax
import pytest
from jax.sharding import NamedSharding

from betarank import model
from betarank.runtime import multihost


@pytest.mark.parametrize('shape', [(8, 1, 1, 1, 1), (1, 8, 1, 1, 1), (2, 2, 1, 1, 2), (1, 1, 1, 1, 8), (2, 1, 1, 2, 2)])
def test_one_process_reads_all_rows(shape):
  mesh = model.make_mesh(model.MeshConfig(*shape))
  assert multihost.row_share(NamedSharding(mesh, model.spec('batch', 'length')), 16, 4) == (0, 1)


@pytest.mark.parametrize(
  'shape, mine, share',
  [
    ((8, 1, 1, 1, 1), (4, 5, 6, 7), (1, 2)),  # data over two processes of four devices: the second half
    ((8, 1, 1, 1, 1), (6, 7), (3, 4)),
    ((2, 1, 1, 1, 4), (0, 1, 2, 3), (0, 2)),
    ((1, 1, 1, 1, 8), (4, 5, 6, 7), (0, 1)),  # tensor over processes: all read the same rows
    ((2, 1, 1, 1, 4), (2, 3), (0, 2)),
  ],
)
def test_a_process_reads_what_its_devices_hold(monkeypatch, shape, mine, share):
  mesh = model.make_mesh(model.MeshConfig(*shape))
  sharding = NamedSharding(mesh, model.spec('batch', 'length'))
  everyone = sharding.devices_indices_map((16, 4))
  ours = {d: everyone[d] for d in mesh.devices.reshape(-1)[list(mine)]}
  monkeypatch.setattr(NamedSharding, 'addressable_devices_indices_map', lambda self, shape: ours)
  assert multihost.row_share(sharding, 16, 4) == share


def test_rows_that_are_no_even_part_are_refused(monkeypatch):
  mesh = model.make_mesh(model.MeshConfig(8, 1, 1, 1, 1))
  sharding = NamedSharding(mesh, model.spec('batch', 'length'))
  everyone = sharding.devices_indices_map((16, 4))
  ours = {d: everyone[d] for d in mesh.devices.reshape(-1)[[0, 3]]}
  monkeypatch.setattr(NamedSharding, 'addressable_devices_indices_map', lambda self, shape: ours)
  with pytest.raises(ValueError, match='not one even part'):
    multihost.row_share(sharding, 16, 4)


def test_a_local_batch_becomes_the_global_one():
  import numpy as np
  mesh = model.make_mesh(model.MeshConfig(2, 2, 1, 1, 2))
  sharding = NamedSharding(mesh, model.spec('batch', 'length'))
  rows = np.arange(48).reshape(8, 6)
  out = multihost.local_to_global({'x': rows}, sharding, 8)['x']
  assert isinstance(out, jax.Array) and out.sharding == sharding
  np.testing.assert_array_equal(out, rows)
