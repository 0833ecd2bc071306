"""Tests that two devices give the results of one, with a model that is large enough for an accelerator's kernels.

On two GPUs (`python -m benchmarks.gpu --only=tests-two`), the test uses the kernels and collectives of training.
"""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from betarank import model
from betarank.data import Batch
from betarank.objectives import ObjectiveConfig
from betarank.runtime.state import create_state
from betarank.train.step import make_step

V, ROWS, LENGTH = 4224, 4, 256  # half a vocabulary still fits the kernels
ENDS = [256], [7, 130], [128], [200]  # of the documents in each row
DENSE = model.ModelConfig(
  vocab_size=V, layers=2, d_model=256, d_ff=384, heads=4, kv_heads=2, head_dim=64, rope_base=1e4, norm_eps=1e-6,
  tied_embeddings=True, compute_dtype='auto', remat_policy='attention', scan_layers=True)
MOE = dataclasses.replace(DENSE, moe=model.MoeConfig(experts=8, experts_per_token=2, expert_d_ff=64))
AXES = {axis: model.MeshConfig(*(2 if axis == name else 1 for name in model.sharding.MESH_AXES))
        for axis in model.sharding.MESH_AXES}


def gradients(c, objective, mesh_config, devices, params=None):
  """Returns (gradients, metrics, parameters before) of one step, which starts from `params`, or from random ones.

  The gradients are what one step of gradient descent with rate 1 subtracts.
  """
  rng = np.random.default_rng(0)
  tokens = rng.zipf(1.3, (ROWS, LENGTH + 1)).astype(np.int32) % V
  segments = np.stack([np.searchsorted(ends, np.arange(LENGTH), 'right') + 1 for ends in ENDS])
  positions = np.stack([np.concatenate([np.arange(n) for n in np.bincount(row)[1:]]) for row in segments])
  batch = Batch(tokens[:, :-1], tokens[:, 1:], positions.astype(np.int32), segments.astype(np.int32))
  mesh, tx = model.make_mesh(mesh_config, jax.devices()[:devices]), optax.sgd(1.0)
  with jax.set_mesh(mesh):
    state = create_state(c, tx, mesh, seed=0, params=params)
    before = jax.device_get(state.params)
    placed = jax.device_put(batch, jax.NamedSharding(mesh, model.spec('batch', 'length')))
    state, metrics = make_step(c, objective, tx, np.ones(V))(state, placed)
    after, metrics = jax.device_get((state.params, metrics))
    return jax.tree.map(np.subtract, before, after), metrics, before


@pytest.mark.slow
@pytest.mark.parametrize(
  'c, objective', [(DENSE, ObjectiveConfig(beta=-0.25)), (MOE, ObjectiveConfig(lambda_tail=-0.1))])
def test_two_devices_give_what_one_gives(c, objective):
  near = 1e-4 if jax.default_backend() == 'cpu' else 2e-2  # bfloat16, in other parts
  want, known, params = gradients(c, objective, model.MeshConfig(1, 1, 1, 1, 1), 1)
  norm = float(known['grad_norm'])
  for axis, mesh_config in AXES.items():
    if axis == 'expert' and c is DENSE:
      continue
    own = axis == 'fsdp'  # parameters are created there too; compiling that for each axis would take seconds
    got, metrics, _ = gradients(c, objective, mesh_config, 2, None if own else params)
    for name in ('loss', 'entropy', 'grad_norm'):
      np.testing.assert_allclose(metrics[name], known[name], rtol=near, err_msg=f'{axis}: {name}')
    apart = optax.tree.norm(jax.tree.map(np.subtract, got, want))
    assert apart < near * norm, f'{axis}: gradients are {apart / norm:.1e} apart'
