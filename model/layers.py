"""Building blocks of the decoder: weights, embedding lookup, matrix products, dense feed-forward network.

# B batch  T tokens  N = B·T  D width  E experts  V vocabulary  F hidden width  X, Y any number of dimensions
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from betarank.model.config import ModelConfig
from betarank.model.kernels import swiglu_triton
from betarank.model.sharding import constrain, part, per_device, platform, shards, spec


def weight(key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...], *, std: float) -> nnx.Param:
  """Declares a float32 weight.

  Args:
    key: the random key for the initial values.
    shape: the shape of the weight.
    axes: the logical names of the dimensions (model/sharding.py).
    std: the standard deviation of the normal distribution of initial values, which is truncated at 3 std.
  """
  value = std * jax.random.truncated_normal(key, -3, 3, shape, jnp.float32)
  return nnx.Param(value, axes=axes, eager_sharding=False)


def ones(size: int, axis: str) -> nnx.Param:
  """Declares a float32 vector of ones, such as the scale of a norm."""
  return nnx.Param(jnp.ones(size, jnp.float32), axes=(axis,), eager_sharding=False)


def zeros(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
  """Declares a float32 array of zeros, such as a bias. The arguments are those of `weight`."""
  return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes, eager_sharding=False)


def lookup(table_VD: jax.Array, tokens_BT: jax.Array, dtype) -> jax.Array:
  """Returns the table's rows for these tokens, [B, T, D] in `dtype`. Each device looks up its own part of D.

  table_VD: float32. tokens_BT: int32 token ids.
  """
  rows, length = tokens_BT.shape
  if platform() != 'gpu' or shards('vocab') > 1 or rows % shards('lookup') or length % shards('length'):
    return table_VD.astype(dtype)[tokens_BT]
  find = per_device(functools.partial(_lookup_sorted, dtype), (spec('vocab', 'embed'), spec('lookup', 'length')),
                    spec('lookup', 'length', 'embed'))
  return find(table_VD, tokens_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup_sorted(dtype, table_VD, tokens_BT):
  """Returns the table's rows for these tokens. The backward pass adds gradients in a fixed order, in float32.

  XLA's own gradient on a GPU adds the gradients of all positions at once, with atomic operations in `dtype`. This is
  slow for a token with many positions, because all additions to the same row of the table wait for each other.
  """
  return table_VD.astype(dtype)[tokens_BT]


def _lookup_gradient(dtype, saved, dx_BTD):
  tokens_BT, shape = saved
  order_N = jnp.argsort(tokens_BT.reshape(-1))
  rows_ND = dx_BTD.reshape(-1, shape[1])[order_N].astype(jnp.float32)
  return jnp.zeros(shape).at[tokens_BT.reshape(-1)[order_N]].add(rows_ND, indices_are_sorted=True), None


_lookup_sorted.defvjp(
  lambda dtype, table_VD, tokens_BT: (_lookup_sorted(dtype, table_VD, tokens_BT), (tokens_BT, table_VD.shape)),
  _lookup_gradient)


def matmul_bf16x3(x_BTD: jax.Array, w_DE: jax.Array) -> jax.Array:
  """Returns x·w, [B, T, E] float32, as accurate as a float32 matrix product.

  w must be float32. If x is bfloat16, w is split into three bfloat16 terms (bf16x3), and one matrix product multiplies
  x by all three terms. On an accelerator this takes half as long as a float32 product. The gradient of w is equally
  accurate; the gradient of x is bfloat16.
  """
  if x_BTD.dtype == jnp.bfloat16:
    return _matmul_split(x_BTD, w_DE)
  return jnp.einsum('BTD,DE->BTE', x_BTD, w_DE, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def _matmul_split(x_BTD, w_DE):
  return _sum_terms(_dot('BTD,DE->BTE', x_BTD, _concat(_bf16_terms(w_DE, 3))))


def _matmul_split_gradient(saved, dout_BTE):
  x_BTD, w_DE = saved
  w1_DE, w2_DE = _bf16_terms(w_DE, 2)
  d1_BTE, d2_BTE, _ = d = _bf16_terms(dout_BTE, 3)
  dx_BTD = _dot('BTE,DE->BTD', _concat([d1_BTE, d2_BTE, d1_BTE]), _concat([w1_DE, w1_DE, w2_DE]))
  dw_DE = _sum_terms(_dot('BTD,BTE->DE', x_BTD, _concat(d)))
  return dx_BTD.astype(x_BTD.dtype), dw_DE


_matmul_split.defvjp(lambda x_BTD, w_DE: (_matmul_split(x_BTD, w_DE), (x_BTD, w_DE)), _matmul_split_gradient)


def _bf16_terms(x: jax.Array, count: int) -> list[jax.Array]:
  """Splits float32 x into `count` bfloat16 terms, whose sum is nearly x.

  With 1, 2 or 3 terms, the relative error of the sum is at most 2^-9, 2^-18 or 2^-27.
  """
  terms = []
  for _ in range(count):
    # XLA may remove a cast and its inverse, but not reduce_precision.
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    terms.append(high.astype(jnp.bfloat16))
    x = x - high
  return terms


def _concat(terms: list[jax.Array]) -> jax.Array:
  return jnp.concatenate(terms, -1)


def _sum_terms(x: jax.Array) -> jax.Array:
  """Splits x's last axis into three equal parts, and returns their sum."""
  return sum(jnp.split(x, 3, -1))


def _dot(dims: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(dims, a, b, preferred_element_type=jnp.float32)


def project(x_BTX: jax.Array, w_XY: nnx.Param, inner: int = 1) -> jax.Array:
  """Returns x·w, [B, T, Y] in x's dtype.

  The product sums over the last `inner` dimensions of x and the first `inner` dimensions of w, which the names write as
  X. For w_NHD, inner is 2.
  """
  w_XY = w_XY[...].astype(x_BTX.dtype)
  if platform() != 'cpu' or shards('length') > 1:
    return jnp.tensordot(x_BTX, w_XY, inner)
  # XLA's CPU backend would transpose and copy an operand that it contracts over two dimensions. A weight's gradient is
  # such a product, over B and T.
  rows = math.prod(w_XY.shape[:inner])
  out_NY = x_BTX.reshape(-1, rows) @ w_XY.reshape(rows, -1)
  return out_NY.reshape(*x_BTX.shape[:2], *w_XY.shape[inner:])


def swiglu(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
  """Returns silu(gate) · up, in their dtype."""
  names = 'batch', 'length', 'act_mlp'
  shape = part(gate_BTF.shape, names)
  if platform() != 'gpu' or shape is None or not swiglu_triton.fits(math.prod(shape)):
    return jax.nn.silu(gate_BTF) * up_BTF
  axes = spec(*names)
  return per_device(_swiglu, (axes, axes), axes)(gate_BTF, up_BTF)


@jax.custom_vjp
def _swiglu(gate_BTF, up_BTF):
  return jax.nn.silu(gate_BTF) * up_BTF


_swiglu.defvjp(
  lambda gate_BTF, up_BTF: (_swiglu(gate_BTF, up_BTF), (gate_BTF, up_BTF)),
  lambda saved, dout_BTF: swiglu_triton.gradient(*saved, dout_BTF))


class FeedForward(nnx.Module):
  """A dense SwiGLU network: down(silu(gate(x)) · up(x)) with hidden size d_ff."""

  def __init__(self, c: ModelConfig, d_ff: int, key: jax.Array):
    gate, up, down = jax.random.split(key, 3)
    std = c.d_model**-0.5
    self.gate_DF = weight(gate, (c.d_model, d_ff), ('embed', 'mlp'), std=std)
    self.up_DF = weight(up, (c.d_model, d_ff), ('embed', 'mlp'), std=std)
    self.down_FD = weight(down, (d_ff, c.d_model), ('mlp', 'embed'), std=(d_ff * 2 * c.layers) ** -0.5)

  def __call__(self, x_BTD: jax.Array, real_BT=None, choices_BTk=None) -> tuple[jax.Array, None]:
    """Returns (out_BTD, None).

    real_BT and choices_BTk aren't used. They exist so that `Block` can call this network and MixtureOfExperts
    (model/moe.py) with the same arguments.
    """
    with jax.named_scope('feed_forward/in'):
      gate_BTF = checkpoint_name(project(x_BTD, self.gate_DF), 'mlp')
      up_BTF = checkpoint_name(project(x_BTD, self.up_DF), 'mlp')
      hidden_BTF = constrain(swiglu(gate_BTF, up_BTF), 'batch', 'length', 'act_mlp')
    with jax.named_scope('feed_forward/out'):
      return project(hidden_BTF, self.down_FD), None
