"""The sampler's mesh, in which the devices of a small group share one copy of the weights.

A decoding step reads all weights, even for a few rows. If the sampler used training's mesh (axes `data`, `fsdp`), every
device would hold and read a whole copy. In a group, each device holds and reads only its part of the weights, and uses
it for the rows of the whole group. A dense model is split by heads and hidden units (mesh axis `tensor`), a mixture of
experts by experts (mesh axis `expert`).
"""

import math

from jax.sharding import AxisType, Mesh

from betarank import model
from betarank.model.sharding import MESH_AXES

PART = 2**29  # weights, 1 GiB in bfloat16. With smaller parts, a group's transfers would take longer than its reading.


def decode_mesh(c: model.ModelConfig, mesh: Mesh, split: int = 0) -> Mesh:
  """Returns the mesh for decoding, which has the devices of `mesh` in the same order.

  Consecutive devices form a group, which shares one copy of the weights.

  Args:
    c: the model.
    mesh: the mesh of the parameters.
    split: the number of devices of a group; 0 means `default_split`.

  Raises:
    ValueError: the number of devices isn't a multiple of `split`, or the model can't be split into this many parts.
  """
  split = split or default_split(c, mesh)
  if not _divides(c, mesh, split):
    what = f'its experts = {c.moe.experts}' if c.moe.experts else f'its kv_heads = {c.kv_heads}'
    raise ValueError(f'decode_split must divide the {mesh.size} devices and the model ({what}, and so on), got {split}')
  sizes = dict.fromkeys(MESH_AXES, 1) | {'data': -1} | _axes(c, mesh, split)
  return Mesh(mesh.devices.reshape([sizes[axis] for axis in MESH_AXES]), MESH_AXES,
              axis_types=(AxisType.Auto,) * len(MESH_AXES))


def default_split(c: model.ModelConfig, mesh: Mesh) -> int:
  """Returns the default number of devices that share one copy of the weights.

  This is the number of parts into which training's mesh splits the experts or, in a dense model, the heads. On a TPU,
  the number is doubled until each device holds at most PART weights. In a mixture of experts, only the experts' weights
  count. Doubling stops earlier if the next number wouldn't divide the number of devices, or a dimension of the model
  that is split.
  """
  split = mesh.shape['expert' if c.moe.experts else 'tensor']
  counts = model.parameter_counts(c)
  weights = counts['experts'] or sum(counts.values())
  while mesh.devices.flat[0].platform == 'tpu' and weights > split * PART and _divides(c, mesh, 2 * split):
    split *= 2
  return split


def _axes(c, mesh, split):
  return {'expert': split, 'tensor': mesh.shape['tensor']} if c.moe.experts else {'tensor': split}


def _divides(c, mesh, split) -> bool:
  axes = _axes(c, mesh, split)
  if mesh.size % math.prod(axes.values()):
    return False
  _, shapes, names = model.abstract(c)
  try:
    model.check_divides(shapes, names, dict.fromkeys(MESH_AXES, 1) | axes)
  except ValueError:
    return False
  return True
