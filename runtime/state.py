"""Defines the training state (step, parameters, optimizer state), and creates it sharded over the mesh."""

import dataclasses
import math
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
  """The state of training. An update takes a state and a batch, and returns the next state."""

  step: jax.Array  # int32 []: the number of updates so far
  params: Any  # float32, with the structure of model.init
  opt_state: Any


def abstract_state(c: model.ModelConfig, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Returns a state of jax.ShapeDtypeStructs, which have shapes, dtypes and shardings on `mesh` but no memory.

  Raises:
    ValueError: a dimension isn't divisible by the size of the mesh axis that splits it.
  """
  _, shapes, axes = model.abstract(c)
  model.check_divides(shapes, axes, mesh.shape)
  place = lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
  everywhere = NamedSharding(mesh, P())
  param_shardings = model.shardings(mesh, axes)
  of_param = dict(jax.tree_util.tree_leaves_with_path(param_shardings))

  def place_moment(path, leaf):  # the path of a moment ends with that of its parameter; a count has no such path
    ends = (path[i:] for i in range(len(path)))
    return place(leaf, next((of_param[end] for end in ends if end in of_param), everywhere))

  return TrainState(
    step=jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
    params=jax.tree.map(place, shapes, param_shardings),
    opt_state=jax.tree_util.tree_map_with_path(place_moment, jax.eval_shape(tx.init, shapes)),
  )


def shard_bytes(tree: Any) -> int:
  """Returns the bytes that a tree of arrays takes on one device.

  tree: abstract arrays with shardings.
  """
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def create_state(
  c: model.ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, seed: int, params: Any = None
) -> TrainState:
  """Returns the state before the first update, sharded over `mesh`.

  params: the parameters. None means random parameters from `seed`, which are the same on every mesh.
  """
  def create(params):
    if params is None:
      params = model.init(c, jax.random.key(seed))
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))

  out = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(c, tx, mesh))
  return jax.jit(create, out_shardings=out)(params)


def donated() -> tuple[int, ...]:
  """Returns the positions of the arguments that an update donates: (0,), which is the state, or () on a CPU.

  On a CPU, a checkpoint is written directly from the state's memory. If the state were donated, the next update would
  have to wait for the disk. On other devices, the state is first copied to the host.
  """
  return () if model.platform() == 'cpu' else (0,)


def compiler_options() -> dict[str, bool | int] | None:
  """Returns the XLA options for compiling an update; None if the device isn't a GPU.

  xla_gpu_enable_dynamic_slice_fusion=False prevents XLA from running a kernel (attention or a matmul) twice. Scanned
  layers copy the kernel's output to an array of all layers. By default, XLA fuses the kernel with this copy. If the
  output has another use, XLA then runs the kernel again.

  xla_gpu_dot_merger_threshold_mb=0 prevents XLA from merging products with the same input, such as those of keys and
  values. The output of a merged product would be sliced, and each slice copied for the kernel that reads it.
  """
  options = {'xla_gpu_enable_dynamic_slice_fusion': False, 'xla_gpu_dot_merger_threshold_mb': 0}
  return options if model.platform() == 'gpu' else None
