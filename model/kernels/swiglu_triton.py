"""A Triton kernel for the gradient of SwiGLU: silu(gate) · up.

XLA computes the two gradients in two passes, and both read gate and the incoming gradient. The kernel computes both in
one pass, in float32, and rounds once.

# N elements
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

BLOCK = 2048
WARPS = 8


def fits(size: int) -> bool:
  """Returns whether the kernel supports arrays of `size` elements."""
  return size < 2**31  # offsets are int32


def gradient(gate: jax.Array, up: jax.Array, dout: jax.Array, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """Returns (dgate, dup), the gradients of silu(gate) · up, in gate's dtype.

  Args:
    gate, up: the inputs, of any shape.
    dout: the gradient of the output, of the same shape.
    interpret: runs the kernel on any device, slowly.
  """
  size = gate.size
  block = min(BLOCK, 1 << (size - 1).bit_length())

  def body(gate_ref, up_ref, dout_ref, dgate_ref, dup_ref):
    start = pl.program_id(0) * block
    inside = start + jnp.arange(block) < size
    read = lambda ref: plgpu.load(ref.at[pl.ds(start, block)], mask=inside, other=0).astype(jnp.float32)
    write = lambda ref, x: plgpu.store(ref.at[pl.ds(start, block)], x.astype(ref.dtype), mask=inside)
    gate, up, dout = read(gate_ref), read(up_ref), read(dout_ref)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    write(dgate_ref, dout * up * (sigmoid + silu * (1 - sigmoid)))
    write(dup_ref, dout * silu)

  flat = jax.ShapeDtypeStruct((size,), gate.dtype)
  dgate, dup = pl.pallas_call(
    body, grid=(pl.cdiv(size, block),), out_shape=[flat, flat],
    compiler_params=plgpu.CompilerParams(num_warps=WARPS), interpret=interpret, name='swiglu_gradient',
  )(gate.reshape(size), up.reshape(size), dout.reshape(size))
  return dgate.reshape(gate.shape), dup.reshape(gate.shape)
