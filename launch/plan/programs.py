"""The programs a config would run, lowered for devices that aren't here: nothing is allocated, no data is read."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from betarank import model
from betarank.data import Batch
from betarank.launch.plan.chips import PlanError
from betarank.rl.config import RlRun
from betarank.rl.update import make_update
from betarank.runtime.multihost import check_rows
from betarank.runtime.state import abstract_state
from betarank.train import sampler
from betarank.train.config import RunConfig
from betarank.train.optimizer import make_optimizer
from betarank.train.step import make_step

Lower = Callable[[], Any]


def make_mesh(run: RunConfig | RlRun, devices) -> Mesh:
  """The run's mesh over `devices`, checked as its start would. Raises PlanError with what would work."""
  count, (rows, parts) = len(devices), run_rows(run)
  try:
    hint = f'axes must make up the {count} chips of this topology, and one at -1 takes the rest'
    slices = len({getattr(device, 'slice_index', 0) for device in devices})
    if slices > 1:
      hint += f': --config.train.mesh.data={slices} --config.train.mesh.fsdp=-1'
    mesh = model.make_mesh(run.train.mesh, devices)
    _, shapes, axes = model.abstract(run.model)
    hint = f'fsdp={math.gcd(run.model.d_model, count)} with data=-1 divides the width of {run.model.d_model}'
    model.check_divides(shapes, axes, mesh.shape)
    step = parts * math.prod(mesh.shape[axis] for axis in model.RULES['batch'])
    near = sorted({max(step, rows // step * step), -(-rows // step) * step})
    hint = f'{" or ".join(map(str, near))} rows would do'
    check_rows(rows, mesh.shape, parts)
  except ValueError as error:
    raise PlanError(f'config.train.mesh: {error}; {hint}') from None
  return mesh


def run_rows(run: RunConfig | RlRun) -> tuple[int, int]:
  """(rows of an update, parts they are worked through in)."""
  if isinstance(run, RlRun):
    return run.rl.prompts_per_step // run.rl.minibatches * run.rl.group_size, run.rl.microbatches
  return run.train.batch_size, run.train.microbatches


def programs(run: RunConfig | RlRun, mesh: Mesh) -> tuple[Any, dict[str, Lower]]:
  """(abstract train state, name -> a function that lowers it): `train`, or RL's `update` and `decode`."""
  rl = run.rl if isinstance(run, RlRun) else None
  tx = make_optimizer(run.optimizer, rl.steps if rl else run.steps, model.abstract(run.model)[2])
  state = abstract_state(run.model, tx, mesh)
  array = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(
    shape, dtype, sharding=NamedSharding(mesh, model.spec(*axes)))
  rows = run_rows(run)[0]
  if rl is None:
    tokens = array((rows, run.data.sequence_length), jnp.int32, 'batch', 'length')
    stats, byte_counts = 'full' if run.log.head_tail_mass else 'basic', np.ones(run.model.vocab_size, np.int32)
    step = lambda: make_step(run.model, run.objective, tx, byte_counts, run.train.microbatches, stats).lower(
      state, Batch(tokens, tokens, tokens, tokens))
    return state, {'train': _on(mesh, step)}
  longest = rl.max_prompt_tokens + max(rl.max_new_tokens)
  of = lambda dtype: array((rows, longest), dtype, 'batch', 'length')
  update = lambda: make_update(run.model, rl.loss, tx, rl.microbatches).lower(
    state, Batch(*[of(jnp.int32)] * 4), of(jnp.bool_), of(jnp.float32), array((rows,), jnp.float32, 'batch'),
    None if rl.minibatches == 1 else of(jnp.float32))
  return state, {'update': _on(mesh, update), 'decode': _on(mesh, lambda: _lower_decode(run, mesh, state))}


def _lower_decode(run: RlRun, mesh: Mesh, state):
  """A dispatch of the sampler: decode_steps tokens for every row, at the longest phase's room."""
  c, rl = run.model, run.rl
  settings = sampler.SamplerConfig(rl.decode_batch_size, rl.max_prompt_tokens, max(rl.max_new_tokens))
  rows = jax.eval_shape(lambda: sampler._empty(c, settings))
  place = lambda x, *axes: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, model.spec(*axes)))
  rows = jax.tree.map(lambda x: place(x, *sampler.CACHE_AXES[x.ndim]), rows)
  weights = jax.eval_shape(lambda params: sampler.decode_params(c, params), state.params)
  weights = jax.tree.map(lambda names, x: place(x, *names), sampler.decode_param_axes(c), weights,
                         is_leaf=lambda names: isinstance(names, tuple))
  return sampler._decode.lower(c, settings, 0, weights, rows)


def _on(mesh: Mesh, lower: Lower) -> Lower:
  """`lower` with the mesh in force, abstractly: its devices can't hold the constants that tracing makes."""
  def run():
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return lower()
  return run


def shard_bytes(tree: Any) -> int:
  """Bytes on one device of abstract arrays with shardings."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


