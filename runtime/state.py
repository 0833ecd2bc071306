"""What training changes: step, parameters, optimizer state. Born sharded."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from betarank import model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """One pytree; a step maps it and a batch to the next one."""

  step: jax.Array  # int32 []: updates done
  params: Any  # float32, as model.init makes them
  opt_state: Any


def abstract_state(c: model.ModelConfig, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Shapes, types and shardings of a state on `mesh`, with nothing allocated.

  Raises ValueError if a mesh axis doesn't divide a dimension it shards.
  """
  _, shapes, axes = model.abstract(c)
  model.check_divides(shapes, axes, mesh.shape)
  place = lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
  everywhere = NamedSharding(mesh, P())
  param_shardings = model.shardings(mesh, axes)
  opt_state = optax.tree.map_params(
    tx, place, jax.eval_shape(tx.init, shapes), param_shardings,
    transform_non_params=lambda leaf: place(leaf, everywhere))
  return TrainState(
    step=jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
    params=jax.tree.map(place, shapes, param_shardings),
    opt_state=opt_state,
  )


def create_state(
  c: model.ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, seed: int, params: Any = None
) -> TrainState:
  """Step 0 with fresh parameters from `seed`, the same on any mesh, or with `params`."""
  def create(params):
    if params is None:
      params = model.init(c, jax.random.key(seed))
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))

  out = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(c, tx, mesh))
  return jax.jit(create, out_shardings=out)(params)


def donated() -> tuple[int, ...]:
  """Arguments an update may overwrite: the state, except on a CPU.

  There a checkpoint being written reads the state's own memory (elsewhere it is copied to the host first), and an
  update that wants to overwrite it would have to wait for the disk.
  """
  return () if model.platform() == 'cpu' else (0,)


def compiler_options() -> dict[str, bool] | None:
  """What XLA should do otherwise in an update.

  On a GPU it would fuse a kernel (attention, a matrix product) with the copy of its output to where a scanned layer
  saves it, and run the kernel a second time for its other use.
  """
  return {'xla_gpu_enable_dynamic_slice_fusion': False} if model.platform() == 'gpu' else None
