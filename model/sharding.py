"""Maps the logical axis names of all arrays to mesh axes, in one table.

To change how arrays are sharded, edit RULES. Weights and activations have separate names, so they can be sharded
independently. The model's code contains only logical names, and no number of devices.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')  # outermost first; only data may span TPU slices

RULES: dict[str, str | tuple[str, ...] | None] = {
  # weights
  'layers': None,
  'vocab': 'tensor',
  'embed': 'fsdp',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'head_dim': None,
  'mlp': 'tensor',
  'experts': 'expert',
  'router': None,  # every device scores all experts
  'norm': None,
  'bias': None,
  # activations
  'batch': ('data', 'fsdp', 'expert'),
  'drawn': ('data', 'fsdp', 'expert', 'tensor'),  # the batch while tokens are drawn
  'lookup': ('data', 'expert'),  # the batch during the embedding lookup, where `embed` splits D
  'length': 'context',
  'act_embed': None,
  'act_heads': 'tensor',
  'row_heads': ('tensor', 'context'),  # the heads where a device needs all tokens of a row
  'act_mlp': 'tensor',
}


def spec(*axes: str | None) -> P:
  """Returns the PartitionSpec of an array whose dimensions have these logical names. The name None means not sharded.

  Raises:
    ValueError: two dimensions would be split by the same mesh axis.
    KeyError: a name isn't in RULES.
  """
  dims = [RULES[axis] if axis else None for axis in axes]
  used = [name for dim in dims if dim for name in ((dim,) if isinstance(dim, str) else dim)]
  if len(used) != len(set(used)):
    raise ValueError(f'{axes} put two dimensions on one mesh axis: {dims}')
  return P(*dims)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The number of devices along each mesh axis. One number may be -1, which means all remaining devices."""

  data: int
  fsdp: int
  expert: int
  context: int
  tensor: int

  def __post_init__(self):
    for axis in MESH_AXES:
      size = getattr(self, axis)
      if size < 1 and size != -1:
        raise ValueError(f'{axis} must be >= 1, or -1 for the rest of the devices, got {size}')
    if sum(getattr(self, axis) == -1 for axis in MESH_AXES) > 1:
      raise ValueError('data and all other axes: only one axis may be -1')

  def shape(self, devices: int) -> tuple[int, ...]:
    """Returns the size of each mesh axis, in the order of MESH_AXES. -1 is replaced by the number of devices left.

    devices: the number of all devices.

    Raises:
      ValueError: the product of the sizes isn't `devices`.
    """
    sizes = [getattr(self, axis) for axis in MESH_AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and devices % fixed == 0:
      sizes[sizes.index(-1)] = devices // fixed
    if math.prod(sizes) != devices:
      asked = ' x '.join(f'{axis}={getattr(self, axis)}' for axis in MESH_AXES)
      raise ValueError(f'mesh: {asked} does not make up the {devices} devices that are here')
    return tuple(sizes)


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """Returns the mesh over `devices`; None means all devices.

  If there are several TPU slices, the data axis spans them, so that only sums of gradients are sent between slices.

  Raises:
    ValueError: the product of the sizes isn't the number of devices, or data isn't a multiple of the number of slices.
  """
  devices = jax.devices() if devices is None else devices
  shape, types = config.shape(len(devices)), (AxisType.Auto,) * len(MESH_AXES)  # JAX's default type differs by version
  tpu = devices[0].platform == 'tpu'
  slices = len({getattr(device, 'slice_index', 0) for device in devices}) if tpu else 1
  # Splitting physical axes allows mesh axes such as 32 on a torus of 16 x 16.
  if slices == 1:
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  elif shape[0] % slices:
    raise ValueError(f'data must be a multiple of the {slices} slices, got {shape[0]}')
  else:
    inside, across = (shape[0] // slices, *shape[1:]), (slices, *[1] * (len(shape) - 1))
    placed = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
  return Mesh(placed, MESH_AXES, axis_types=types)


def platform() -> str:
  """Returns 'cpu', 'gpu' or 'tpu': the platform of the current mesh, which may be an abstract mesh.

  If there is no current mesh, returns the platform of JAX's default backend.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def device_kind() -> str:
  """Returns the kind of the devices of `platform()`, such as 'TPU v5 lite' or 'NVIDIA H100 80GB HBM3'."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.device_kind if device else jax.devices()[0].device_kind


def cores() -> int:
  """Returns the number of cores per chip that a kernel can use in parallel, on the current mesh: 2 on v5p, else 1."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return (device and device.num_cores) or 1


def shards(axis: str) -> int:
  """Returns the number of parts into which the current mesh splits a dimension with this logical name."""
  sizes, dim = dict(jax.sharding.get_abstract_mesh().shape), RULES[axis]
  return math.prod(sizes.get(name, 1) for name in ((dim,) if isinstance(dim, str) else dim or ()))


def part(shape: tuple[int, ...], names: tuple[str | None, ...]) -> tuple[int, ...] | None:
  """Returns the shape of a device's part of an array whose dimensions have these logical names. The name None means not
  sharded. Returns None if the current mesh can't split the array into equal parts.
  """
  ways = [shards(name) if name else 1 for name in names]
  if any(size % n for size, n in zip(shape, ways, strict=True)):
    return None
  return tuple(size // n for size, n in zip(shape, ways))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains the sharding of an activation to RULES. If there is no current mesh (`jax.set_mesh`), returns x
  unchanged.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(*axes))


def per_device(f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
  """Returns a function that runs `f` on each device of the current mesh, on the device's own part of each array.
  Kernels need this, because XLA can't partition them. If there is no current mesh, returns f.

  in_specs, out_specs: a PartitionSpec for each array, as `jax.shard_map` takes them.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return f
  return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def shardings(mesh: Mesh, axes: Any) -> Any:
  """Returns a tree of NamedShardings.

  axes: a tree whose leaves are tuples of logical names.
  """
  return jax.tree.map(lambda a: NamedSharding(mesh, spec(*a)), axes, is_leaf=lambda a: isinstance(a, tuple))


def check_divides(shapes: Any, axes: Any, mesh_shape: Mapping[str, int]) -> None:
  """Raises ValueError if the mesh can't split a parameter into equal parts. The message names the first such parameter.

  shapes, axes: trees from `transformer.abstract`.
  mesh_shape: the size of each mesh axis.
  """
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  names = jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple))
  for (path, leaf), logical in zip(leaves, names, strict=True):
    for size, dim, name in zip(leaf.shape, spec(*logical), logical, strict=True):
      ways = math.prod(mesh_shape[axis] for axis in ((dim,) if isinstance(dim, str) else dim or ()))
      if size % ways:
        where = jax.tree_util.keystr(path, simple=True, separator='.')
        raise ValueError(f'{dim}: {ways} devices do not divide {name} = {size} of {where}')
