"""Experts on a TPU: a tile of rows through all three products of its expert in one Pallas kernel.

A tile's rows are all one expert's, so nothing is masked, and the hidden values never leave the chip's vector memory.
An expert's weights stay there from one of its tiles to the next, and so do the float32 sums of their gradient, which
leave rounded, after its last tile. The backward kernel computes gate and up again. On a chip of two cores each takes
half of the tiles that are used.

# C tiles  R rows  D width  F hidden  e experts  H cores
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from betarank.model.sharding import cores, platform

VMEM_BYTES = 48 * 2**20  # of 128 MiB on v5e and v6e, 64 on v5p; the default is 16


def fits(width: int, hidden: int) -> bool:
  """Whether the kernels' blocks fit: two of each weight and each gradient in bfloat16, and a float32 sum of each."""
  return 3 * width * (-(-hidden // 128) * 128) * (2 * 2 + 2 * 2 + 4) <= VMEM_BYTES * 3 // 4


@jax.custom_vjp
def experts(x_CRD, weight_CR, expert_C, used, gate_eDF, up_eDF, down_eFD) -> jax.Array:
  """weight · down(silu(gate(x)) · up(x)), [C, R, D]; expert_C never falls. Tiles from `used` on come out undefined."""
  weights = gate_eDF, up_eDF, down_eFD
  tile, column, of_expert = _blocks(x_CRD, weights)
  return _call(_forward, expert_C, used, [tile, column, *of_expert], [tile], [x_CRD], x_CRD, weight_CR[..., None],
               *weights)[0]


def _forward(expert_C, work, x_ref, weight_ref, gate_ref, up_ref, down_ref, out_ref):
  @pl.when(_works(work))
  def _():
    gate_RF, up_RF = _dot(x_ref[0], gate_ref[0]), _dot(x_ref[0], up_ref[0])
    hidden_RF = gate_RF * jax.nn.sigmoid(gate_RF) * up_RF * weight_ref[0]
    out_ref[0] = _dot(hidden_RF.astype(x_ref.dtype), down_ref[0]).astype(out_ref.dtype)


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
    gate_RF, up_RF = _dot(x_RD, gate_ref[0]), _dot(x_RD, up_ref[0])
    sigmoid_RF = jax.nn.sigmoid(gate_RF)
    silu_RF = gate_RF * sigmoid_RF
    dhidden_RF = _dot(dout_RD, down_ref[0], (1, 1))
    dweight_ref[0] = jnp.sum(dhidden_RF * silu_RF * up_RF, 1, keepdims=True)
    dhidden_RF *= weight_R1
    low = lambda x: x.astype(x_RD.dtype)
    dgate_RF = low(dhidden_RF * up_RF * (sigmoid_RF + silu_RF * (1 - sigmoid_RF)))
    dup_RF, hidden_RF = low(dhidden_RF * silu_RF), low(silu_RF * up_RF * weight_R1)
    dx_ref[0] = low(_dot(dgate_RF, gate_ref[0], (1, 1)) + _dot(dup_RF, up_ref[0], (1, 1)))
    for ref, a, b in zip(sums, (x_RD, x_RD, hidden_RF), (dgate_RF, dup_RF, dout_RD), strict=True):
      ref[...] += _dot(a, b, (0, 0))

  @pl.when((step == last) | (expert(step) != expert(step + 1)))
  def _():
    for ref, total in zip(grads, sums, strict=True):
      ref[0] = total[...].astype(ref.dtype)


def _dot(a, b, contract=(1, 0)) -> jax.Array:
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), precision=precision,
                         preferred_element_type=jnp.float32)


def _grid(tiles: int) -> tuple[int, int]:
  """(cores, most steps of one)."""
  ways = min(cores(), tiles)
  return ways, -(-tiles // ways)


def _share(tiles: int, used):
  """Tiles of a core: its part of those that are used."""
  return jnp.maximum(-(-used // _grid(tiles)[0]), 1)


def _tile(core, step, expert_C, work):
  """The tile of a core's step; after its share it stays at the last. work: (tiles used, share)."""
  return jnp.minimum(core * work[1] + jnp.minimum(step, work[1] - 1), expert_C.shape[0] - 1)


def _works(work):
  core, step = pl.program_id(0), pl.program_id(1)
  return (step < work[1]) & (core * work[1] + step < work[0])


def _blocks(x_CRD, weights):
  """How a grid step sees x, an array with one number a row, and each weight: its tile, or its tile's expert."""
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
  )(expert_C, jnp.stack([used, _share(len(expert_C), used)]), *args)


def _experts_backward(saved, dout_CRD):
  x_CRD, weight_CR, expert_C, used, *weights = saved
  tile, column, of_expert = _blocks(x_CRD, weights)
  ways, count = _grid(len(expert_C))[0], len(weights[0])
  # Two cores may meet the same expert, where the one's tiles end and the other's start: core h has a place of its own
  # for its sum by writing expert e's at e + h.
  placed = [pl.BlockSpec((1, *w.shape[1:]), lambda *at: (at[2][_tile(*at)] + at[0], 0, 0)) for w in weights]
  shape = jax.ShapeDtypeStruct
  dx_CRD, dweight_CR1, *grads = _call(
    _backward, expert_C, used, [tile, column, tile, *of_expert], [tile, column, *placed],
    [x_CRD, shape((*weight_CR.shape, 1), jnp.float32),
     *(shape((count + ways - 1, *w.shape[1:]), w.dtype) for w in weights)],
    x_CRD, weight_CR[..., None], dout_CRD, *weights, scratch=[pltpu.VMEM(w.shape[1:], jnp.float32) for w in weights])
  core_C = jnp.arange(len(expert_C)) // _share(len(expert_C), used)
  met_He = [jnp.any((expert_C == jnp.arange(count)[:, None]) & (core_C == h), 1) for h in range(ways)]
  total = lambda grad: sum(jnp.where(met_e[:, None, None], grad[h : h + count], 0) for h, met_e in enumerate(met_He))
  return dx_CRD, dweight_CR1[..., 0], None, None, *map(total, grads)


experts.defvjp(lambda *args: (experts(*args), args), _experts_backward)
