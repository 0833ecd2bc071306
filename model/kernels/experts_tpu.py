"""A Pallas kernel for experts on a TPU: all three matrix products of a tile of rows in one kernel.

All rows of a tile belong to one expert, so nothing is masked. The hidden values never leave the chip's vector memory
(VMEM). While an expert's tiles are processed, its weights stay in VMEM. The backward kernel computes gate and up again,
and keeps the float32 sums of the expert's weight gradients in VMEM. It rounds and writes the sums after the expert's
last tile. On a chip with two cores, each core takes half of the used tiles, which are the tiles that hold data.

# C tiles  R rows of a tile  D width  F hidden width  e experts of a device  H cores
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from betarank.model.kernels.arithmetic import dot
from betarank.model.sharding import cores, platform

VMEM_BYTES = 48 * 2**20  # v5e and v6e have 128 MiB, v5p has 64 MiB; the compiler's default limit is 16 MiB


def fits(width: int, hidden: int) -> bool:
  """Returns True if the kernel's data for experts of this width D and hidden width F fits into VMEM.

  The kernel needs two bfloat16 blocks of each weight and of each gradient, and a float32 sum of each gradient.
  """
  return 3 * width * (-(-hidden // 128) * 128) * (2 * 2 + 2 * 2 + 4) <= VMEM_BYTES * 3 // 4


@jax.custom_vjp
def experts(x_CRD, weight_CR, expert_C, used, gate_eDF, up_eDF, down_eFD) -> jax.Array:
  """Returns weight · down(silu(gate(x)) · up(x)), [C, R, D], where gate, up and down are the weights of each tile's
  expert.

  x_CRD: the inputs, in C tiles of R rows.
  weight_CR: float32, the factor of each row.
  expert_C: int32, the expert number of each tile, in ascending order.
  used: int32 scalar. Only the first `used` tiles of the output are defined.
  """
  weights = gate_eDF, up_eDF, down_eFD
  tile, column, of_expert = _blocks(x_CRD, weights)
  return _call(_forward, expert_C, used, [tile, column, *of_expert], [tile], [x_CRD], x_CRD, weight_CR[..., None],
               *weights)[0]


def _forward(expert_C, work, x_ref, weight_ref, gate_ref, up_ref, down_ref, out_ref):
  @pl.when(_works(work))
  def _():
    gate_RF, up_RF = dot(x_ref[0], gate_ref[0]), dot(x_ref[0], up_ref[0])
    hidden_RF = gate_RF * jax.nn.sigmoid(gate_RF) * up_RF * weight_ref[0]
    out_ref[0] = dot(hidden_RF.astype(x_ref.dtype), down_ref[0]).astype(out_ref.dtype)


def _backward(expert_C, work, x_ref, weight_ref, dout_ref, gate_ref, up_ref, down_ref, dx_ref, dweight_ref, *grads):
  grads, sums = grads[:3], grads[3:]
  step, last = pl.program_id(1), pl.num_programs(1) - 1
  expert = lambda step: expert_C[_tile(pl.program_id(0), step, expert_C, work)]

  @pl.when((step == 0) | (expert(step) != expert(jnp.maximum(step - 1, 0))))
  def _():
    for ref in sums:
      ref[...] = jnp.zeros_like(ref)

  @pl.when(_works(work))
  def _():
    x_RD, dout_RD, weight_R1 = x_ref[0], dout_ref[0], weight_ref[0]
    gate_RF, up_RF = dot(x_RD, gate_ref[0]), dot(x_RD, up_ref[0])
    sigmoid_RF = jax.nn.sigmoid(gate_RF)
    silu_RF = gate_RF * sigmoid_RF
    dhidden_RF = dot(dout_RD, down_ref[0], (1, 1))
    dweight_ref[0] = jnp.sum(dhidden_RF * silu_RF * up_RF, 1, keepdims=True)
    dhidden_RF *= weight_R1
    low = lambda x: x.astype(x_RD.dtype)
    dgate_RF = low(dhidden_RF * up_RF * (sigmoid_RF + silu_RF * (1 - sigmoid_RF)))
    dup_RF, hidden_RF = low(dhidden_RF * silu_RF), low(silu_RF * up_RF * weight_R1)
    dx_ref[0] = low(dot(dgate_RF, gate_ref[0], (1, 1)) + dot(dup_RF, up_ref[0], (1, 1)))
    for ref, a, b in zip(sums, (x_RD, x_RD, hidden_RF), (dgate_RF, dup_RF, dout_RD), strict=True):
      ref[...] += dot(a, b, (0, 0))

  @pl.when((step == last) | (expert(step) != expert(step + 1)))
  def _():
    for ref, total in zip(grads, sums, strict=True):
      ref[0] = total[...].astype(ref.dtype)


def _grid(tiles: int) -> tuple[int, int]:
  """Returns the kernel's grid: (number of cores, largest number of tiles per core).

  tiles: the number of tiles of the kernel's arrays.
  """
  ways = min(cores(), tiles)
  return ways, -(-tiles // ways)


def _tiles_per_core(tiles: int, used):
  """Returns the number of tiles that each core processes. The last core may have fewer.

  tiles: the number of tiles of the kernel's arrays.
  used: the number of these tiles that are processed.
  """
  return jnp.maximum(-(-used // _grid(tiles)[0]), 1)


def _tile(core, step, expert_C, work):
  """Returns the index of the tile that a core processes in a grid step.

  After as many steps as there are tiles per core, the index stays the same.

  core, step: the position in the grid.
  expert_C: the expert number of each tile. Only the length of this array is used.
  work: (number of used tiles, tiles per core).
  """
  return jnp.minimum(core * work[1] + jnp.minimum(step, work[1] - 1), expert_C.shape[0] - 1)


def _works(work):
  """Returns True if this core has a used tile to process in the current grid step.

  work: (number of used tiles, tiles per core), as for `_tile`.
  """
  core, step = pl.program_id(0), pl.program_id(1)
  return (step < work[1]) & (core * work[1] + step < work[0])


def _blocks(x_CRD, weights):
  """Returns (BlockSpec of x, BlockSpec of the rows' factors [C, R, 1], list of the weights' BlockSpecs).

  In each grid step, the kernel gets a tile of x, the factors of the tile's rows, and the weights of the tile's expert.

  weights: arrays whose first dimension is the expert.
  """
  by_tile = lambda width: pl.BlockSpec((1, x_CRD.shape[1], width), lambda *at: (_tile(*at), 0, 0))
  of_expert = [pl.BlockSpec((1, *w.shape[1:]), lambda *at: (at[2][_tile(*at)], 0, 0)) for w in weights]
  return by_tile(x_CRD.shape[2]), by_tile(1), of_expert


def _call(body, expert_C, used, ins, outs, shapes, *args, scratch=()):
  return pl.pallas_call(
    body,
    out_shape=[jax.ShapeDtypeStruct(s.shape, s.dtype) for s in shapes],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2, grid=_grid(len(expert_C)), in_specs=ins, out_specs=outs,
      scratch_shapes=scratch),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=VMEM_BYTES),
    interpret=platform() != 'tpu',
  )(expert_C, jnp.stack([used, _tiles_per_core(len(expert_C), used)]), *args)


def _experts_backward(saved, dout_CRD):
  x_CRD, weight_CR, expert_C, used, *weights = saved
  tile, column, of_expert = _blocks(x_CRD, weights)
  ways, count = _grid(len(expert_C))[0], len(weights[0])
  # Both cores may have tiles of the same expert, where the first core's tiles end. So core h writes the sum of expert e
  # at e + h, and the two don't overwrite each other.
  placed = [pl.BlockSpec((1, *w.shape[1:]), lambda *at: (at[2][_tile(*at)] + at[0], 0, 0)) for w in weights]
  shape = jax.ShapeDtypeStruct
  dx_CRD, dweight_CR1, *grads = _call(
    _backward, expert_C, used, [tile, column, tile, *of_expert], [tile, column, *placed],
    [x_CRD, shape((*weight_CR.shape, 1), jnp.float32),
     *(shape((count + ways - 1, *w.shape[1:]), w.dtype) for w in weights)],
    x_CRD, weight_CR[..., None], dout_CRD, *weights, scratch=[pltpu.VMEM(w.shape[1:], jnp.float32) for w in weights])
  core_C = jnp.arange(len(expert_C)) // _tiles_per_core(len(expert_C), used)
  met_He = [jnp.any((expert_C[None] == jnp.arange(count)[:, None]) & (core_C == h)[None], 1) for h in range(ways)]
  total = lambda grad: sum(jnp.where(met_e[:, None, None], grad[h : h + count], 0) for h, met_e in enumerate(met_He))
  return dx_CRD, dweight_CR1[..., 0], None, None, *map(total, grads)


experts.defvjp(lambda *args: (experts(*args), args), _experts_backward)
