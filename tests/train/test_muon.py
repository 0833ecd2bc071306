"""Tests Muon: each update equals that of optax, on any mesh and after resuming, and the planner knows its memory."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from betarank import model
from betarank.configs import load
from betarank.launch.plan import programs
from betarank.launch.plan.workload import workload
from betarank.runtime.checkpoint import CheckpointConfig, Checkpoints
from betarank.runtime.state import abstract_state, create_state, shard_bytes
from betarank.train import loop
from betarank.train.optimizer import MUON_RMS, make_optimizer
from tests import parameters
from tests.runs import assert_same_run
from tests.train.test_step import ADAMW, MOE, C, same

MUON = dataclasses.replace(ADAMW, name='muon', warmup_steps=0)


def test_an_update_is_that_of_optax_for_each_matrix_alone():
  """Heads and head_dim together form one side of a matrix. Each layer and each expert has its own matrices."""
  c = dataclasses.replace(MOE, moe=dataclasses.replace(MOE.moe, experts=2))
  axes, params = model.abstract(c)[2], parameters.random(c)
  rng = np.random.default_rng(0)
  rounds = [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 1e-3, jnp.float32), params) for _ in range(2)]
  names = jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple))

  def split(tree):
    """Returns ({name: matrix of two dimensions}, {name: parameter that Adam updates})."""
    matrices, rest = {}, {}
    for (path, x), logical in zip(jax.tree_util.tree_leaves_with_path(tree), names):
      name, batch = jax.tree_util.keystr(path), sum(name in ('layers', 'experts') for name in logical)
      if logical[-1] in ('norm', 'bias') or 'vocab' in logical:
        rest[name] = x
      else:
        sides = (x.shape[batch], -1) if logical[batch] == 'embed' else (-1, x.shape[-1])
        for i in np.ndindex(x.shape[:batch]):
          matrices[f'{name}{i}'] = x[i].reshape(sides)
    return matrices, rest

  def last_update(tx, params, rounds):
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for grads in rounds:
      updates, state = update(grads, state, params)
    return updates

  got = split(last_update(make_optimizer(MUON, 100, axes), params, rounds))
  wholes = list(zip(*map(split, (params, *rounds))))
  muon = optax.contrib.muon(1e-2, beta=0.9, weight_decay=0.1, consistent_rms=MUON_RMS)
  adam = optax.nadamw(1e-2, 0.9, 0.95, 1e-8, weight_decay=0.1, mask={name: 'VD' in name for name in wholes[1][0]})
  assert len(wholes[0][0]) == 2 * (4 + 1 + 2 * 3) and len(wholes[1][0]) > 3
  for found, tx, (start, *grads) in zip(got, (muon, adam), wholes):
    same(found, last_update(tx, start, grads), 1e-4)


def test_an_update_on_eight_devices_is_that_on_one():
  c = dataclasses.replace(C, layers=1)
  axes, params = model.abstract(c)[2], parameters.random(c)
  grads = parameters.random(c, seed=1)
  tx = make_optimizer(MUON, 100, axes)
  update = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])
  mesh = model.make_mesh(model.MeshConfig(2, 2, 1, 1, 2), jax.devices())
  same(update(*jax.device_put((grads, params), (model.shardings(mesh, axes),) * 2)), update(grads, params), 1e-4)


def test_its_momentum_is_sharded_as_the_parameters_and_the_planner_counts_it():
  """Muon keeps one moment of the layers' matrices, and two of all other parameters, in 4 bytes each."""
  mesh = model.make_mesh(model.MeshConfig(2, 2, 1, 1, 2), jax.devices())
  axes = model.abstract(C)[2]
  state = abstract_state(C, make_optimizer(MUON, 100, axes), mesh)
  momentum = state.opt_state[1].inner_states['muon'].inner_state[0].mu
  assert momentum['layers']['attention']['q_DNH'].sharding == state.params['layers']['attention']['q_DNH'].sharding
  bytes_of = {}
  for name in ('adamw', 'muon'):
    work = workload(load.load('configs/smoke.py', {'optimizer.name': name}))
    state, _ = programs.lowerings(work, programs.make_mesh(work, jax.devices()[:1]))
    bytes_of[name] = shard_bytes(state.opt_state)
  size = {True: 0, False: 0}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
    size['norm' in jax.tree_util.keystr(path) or 'embed' in jax.tree_util.keystr(path)] += 4 * leaf.size
  assert bytes_of == {'adamw': pytest.approx(2 * sum(size.values()), abs=100),
                      'muon': pytest.approx(size[False] + 2 * size[True], abs=100)}


def test_its_state_is_restored_to_the_bit(tmp_path):
  """Muon's state has no momentum for parameters that Adam updates, and Adam's state has none for the matrices."""
  c = dataclasses.replace(C, layers=1)
  mesh = model.make_mesh(model.MeshConfig(1, 2, 1, 1, 1), jax.devices()[:2])
  tx = make_optimizer(MUON, 100, model.abstract(c)[2])
  state = create_state(c, tx, mesh, seed=0, params=parameters.random(c))
  fill = lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)
  filled = jax.jit(lambda state: jax.tree.map(fill, state))(state)
  with contextlib.closing(Checkpoints(tmp_path, CheckpointConfig(every_steps=1, keep=1, keep_every_steps=0))) as kept:
    kept.save(filled, {'config': {}, 'cursor': {}, 'parent': ''}, 1)
    kept.wait()
    restored, _ = kept.restore(abstract_state(c, tx, mesh))
  jax.tree.map(np.testing.assert_array_equal, restored, filled)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(data_dir, tmp_path):
  def train(name, steps):
    loop.train(load.load(f'tests/tiny.py:dir={data_dir}', {
      'optimizer.name': 'muon', 'optimizer.warmup_steps': '1', 'train.tokens': str(256 * steps), 'model.layers': '1',
      'log.eval_every_steps': '2', 'checkpoint.every_steps': '2', 'log.samples': '0'}), str(tmp_path / name))

  train('whole', 4)
  train('resumed', 2)
  train('resumed', 4)
  assert_same_run(tmp_path / 'resumed', tmp_path / 'whole', 4)
