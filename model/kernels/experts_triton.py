"""Triton kernels for experts on a GPU: tiles of rows times the weights of their experts.

All rows of a tile belong to one expert, so a program only looks up which expert's weights to use. Nothing is copied or
masked. The gradient of an expert's weights is a sum over the expert's tiles.

# C tiles  R rows of a tile  I input width  O output width  D width  F hidden width  e experts of a device
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from betarank.model.kernels.arithmetic import dot
from betarank.model.sharding import platform

MOST, DEPTH = 128, 64  # the largest block of the output (rows and columns), and of the contracted dimension


def fits(width: int, hidden: int) -> bool:
  """Returns True if the kernels support experts of this width D and hidden width F.

  Both must be divisible by 32, because the sides of a block are powers of two and at least 32.
  """
  return min(_block(width), _block(hidden)) >= 32


def experts(x_CRD, weight_CR, expert_C, used, gate_eDF, up_eDF, down_eFD) -> jax.Array:
  """Returns weight · down(silu(gate(x)) · up(x)), [C, R, D], where gate, up and down are the weights of each tile's
  expert.

  x_CRD: the inputs, in C tiles of R rows.
  weight_CR: float32, the factor of each row.
  expert_C: int32, the expert number of each tile, in ascending order.
  used: int32 scalar. Only the first `used` tiles of the output are defined.
  """
  both_CRF = checkpoint_name(product(x_CRD, jnp.concatenate([gate_eDF, up_eDF], 2), expert_C, used), 'mlp')
  gate_CRF, up_CRF = jnp.split(both_CRF.astype(jnp.float32), 2, axis=2)
  hidden_CRF = jax.nn.silu(gate_CRF) * up_CRF * weight_CR[..., None]
  return product(hidden_CRF.astype(x_CRD.dtype), down_eFD, expert_C, used)


@jax.custom_vjp
def product(x_CRI, w_eIO, expert_C, used) -> jax.Array:
  """Returns the matrix product of each tile and its expert's weights, [C, R, O].

  x_CRI: the inputs, in C tiles of R rows.
  expert_C: int32, the expert number of each tile, in ascending order.
  used: int32 scalar. Only the first `used` tiles of the output are defined.
  """
  return _matmul(x_CRI, w_eIO, expert_C, used, transposed=False)


def _matmul(x_CRI, w, expert_C, used, transposed: bool) -> jax.Array:
  """Returns what `product` returns. If `transposed` is True, w has the shape [e, O, I] instead of [e, I, O]."""
  tiles, rows, depth = x_CRI.shape
  width = w.shape[1 if transposed else 2]
  block_R, block_O, step = _block(rows), _block(width), _block(depth, DEPTH)

  def body(expert_ref, used_ref, x_ref, w_ref, out_ref):
    tile, column = pl.program_id(1), pl.program_id(0)

    @pl.when(tile < used_ref[0])
    def _():
      expert = expert_ref[tile]
      columns = pl.ds(column * block_O, block_O)

      def add(i, sum_RO):
        along = pl.ds(i * step, step)
        w = w_ref[expert, columns, along].T if transposed else w_ref[expert, along, columns]
        return sum_RO + dot(x_ref[:, along], w)

      out_ref[...] = lax.fori_loop(
        0, depth // step, add, jnp.zeros((block_R, block_O), jnp.float32)).astype(out_ref.dtype)

  return _call(
    body, warps=8 if depth >= 1024 else 4, grid=(width // block_O, tiles, rows // block_R),
    in_specs=[pl.BlockSpec(expert_C.shape, lambda o, c, r: (0,)), pl.BlockSpec((1,), lambda o, c, r: (0,)),
              pl.BlockSpec((None, block_R, depth), lambda o, c, r: (c, r, 0)),
              pl.BlockSpec(w.shape, lambda o, c, r: (0, 0, 0))],
    out_specs=pl.BlockSpec((None, block_R, block_O), lambda o, c, r: (c, r, o)),
    out_shape=jax.ShapeDtypeStruct((tiles, rows, width), x_CRI.dtype),
  )(expert_C, used[None], x_CRI, w)


def _gradient(x_CRI, dout_CRO, expert_C, used, like: jax.Array) -> jax.Array:
  """Returns the gradient of each expert's weights, [e, I, O], in the dtype of `like`.

  The gradient is a sum over the expert's tiles.
  """
  rows, (count, depth, width) = x_CRI.shape[1], like.shape
  block_I, block_O, step = _block(depth), _block(width), _block(rows, DEPTH)
  # An expert's tiles end where those of the next expert start.
  start_e = jnp.minimum(jnp.sum(expert_C[None] < jnp.arange(count + 1)[:, None], 1, dtype=jnp.int32), used)

  def body(start_ref, x_ref, dout_ref, out_ref):
    expert, ins, outs = (pl.program_id(axis) for axis in (2, 1, 0))
    ins, outs = pl.ds(ins * block_I, block_I), pl.ds(outs * block_O, block_O)

    def add(i, sum_IO):
      along = pl.ds(i * step, step)
      return sum_IO + dot(x_ref[along, ins].T, dout_ref[along, outs])

    steps = rows // step
    out_ref[...] = lax.fori_loop(
      start_ref[expert] * steps, start_ref[expert + 1] * steps, add, jnp.zeros((block_I, block_O), jnp.float32),
    ).astype(out_ref.dtype)

  flat = lambda x: x.reshape(-1, x.shape[-1])
  whole = lambda x: pl.BlockSpec(x.shape, lambda o, i, e: (0,) * x.ndim)
  x_PI, dout_PO = flat(x_CRI), flat(dout_CRO)
  return _call(
    body, warps=8, grid=(width // block_O, depth // block_I, count),
    in_specs=[whole(start_e), whole(x_PI), whole(dout_PO)],
    out_specs=pl.BlockSpec((None, block_I, block_O), lambda o, i, e: (e, i, o)),
    out_shape=jax.ShapeDtypeStruct(like.shape, like.dtype),
  )(start_e, x_PI, dout_PO)


def _backward(saved, dout_CRO):
  x_CRI, w_eIO, expert_C, used = saved
  return (_matmul(dout_CRO, w_eIO, expert_C, used, transposed=True),
          _gradient(x_CRI, dout_CRO, expert_C, used, w_eIO), None, None)


product.defvjp(lambda *args: (product(*args), args), _backward)


def _block(size: int, most: int = MOST) -> int:
  """Returns the largest power of two up to `most` that divides `size`."""
  return min(size & -size, most)


def _call(body, warps: int, **settings):
  compiler = plgpu.CompilerParams(num_warps=warps, num_stages=3)
  return pl.pallas_call(body, compiler_params=compiler, interpret=platform() != 'gpu', **settings)
