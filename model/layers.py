"""What the blocks are made of: how a weight is declared, lookup, an exact product, the norm, the dense feed-forward.

# B batch  T tokens  N = B·T  D width  E experts  V vocabulary  F hidden  L layers  X, Y any dimensions
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from betarank.model.config import ModelConfig
from betarank.model.sharding import constrain, platform, shards, spec


def weight(key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...], *, std: float) -> nnx.Param:
  """A weight in one line: shape, logical axes (model/sharding.py) and the width of its normal start."""
  value = std * jax.random.truncated_normal(key, -3, 3, shape, jnp.float32)
  return nnx.Param(value, axes=axes, eager_sharding=False)


def ones(size: int, axis: str) -> nnx.Param:
  return nnx.Param(jnp.ones(size, jnp.float32), axes=(axis,), eager_sharding=False)


def lookup(table_VD: jax.Array, tokens_BT: jax.Array, dtype) -> jax.Array:
  """[B, T, D] in `dtype`: the table's rows of these tokens, each device in the part of D that it has."""
  rows, length = tokens_BT.shape
  if platform() != 'gpu' or shards('vocab') > 1 or rows % shards('lookup') or length % shards('length'):
    return table_VD.astype(dtype)[tokens_BT]
  find = functools.partial(_lookup_sorted, dtype)
  if not jax.sharding.get_abstract_mesh().empty:
    find = jax.shard_map(find, in_specs=(spec('vocab', 'embed'), spec('lookup', 'length')),
                         out_specs=spec('lookup', 'length', 'embed'), check_vma=False)
  return find(table_VD, tokens_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup_sorted(dtype, table_VD, tokens_BT):
  """The lookup whose gradient adds up each token's rows in turn, in float32. As XLA would have it, a GPU adds all rows
  at once, atomically and in `dtype`, and waits wherever a frequent token's meet.
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


def product32(x_BTD: jax.Array, w_DE: jax.Array) -> jax.Array:
  """[B, T, E] float32, x·w as exact as a float32 product is.

  Where x is bfloat16, three such parts make up float32's w and one product multiplies x by all of them, half the work
  that an accelerator has with x in float32; backward it is as exact for w, and x gets its gradient in bfloat16.
  """
  if x_BTD.dtype == jnp.bfloat16:
    return _product_of_parts(x_BTD, w_DE)
  return jnp.einsum('BTD,DE->BTE', x_BTD, w_DE, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def _product_of_parts(x_BTD, w_DE):
  return _sum_parts(_dot('BTD,DE->BTE', x_BTD, _side_by_side(_parts(w_DE, 3))))


def _product_gradient(saved, dout_BTE):
  x_BTD, w_DE = saved
  w1_DE, w2_DE = _parts(w_DE, 2)
  d1_BTE, d2_BTE, _ = d = _parts(dout_BTE, 3)
  dx_BTD = _dot('BTE,DE->BTD', _side_by_side([d1_BTE, d2_BTE, d1_BTE]), _side_by_side([w1_DE, w1_DE, w2_DE]))
  dw_DE = _sum_parts(_dot('BTD,BTE->DE', x_BTD, _side_by_side(d)))
  return dx_BTD.astype(x_BTD.dtype), dw_DE


_product_of_parts.defvjp(lambda x_BTD, w_DE: (_product_of_parts(x_BTD, w_DE), (x_BTD, w_DE)), _product_gradient)


def _parts(x: jax.Array, count: int) -> list[jax.Array]:
  """Arrays in bfloat16 that make up x but for 2^-9 of it, 2^-18 or 2^-27. XLA may drop a cast and its inverse; it keeps
  reduce_precision.
  """
  parts = []
  for _ in range(count):
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    parts.append(high.astype(jnp.bfloat16))
    x = x - high
  return parts


def _side_by_side(parts: list[jax.Array]) -> jax.Array:
  return jnp.concatenate(parts, -1)


def _sum_parts(x: jax.Array) -> jax.Array:
  return sum(jnp.split(x, 3, -1))


def _dot(dims: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(dims, a, b, preferred_element_type=jnp.float32)


def rms_norm(x: jax.Array, scale: nnx.Param, eps: float) -> jax.Array:
  """x / rms(x) · scale over the last dimension, computed in float32."""
  x32 = x.astype(jnp.float32)
  x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  return (x32 * scale[...]).astype(x.dtype)


def project(x_BTX: jax.Array, w_XY: nnx.Param, inner: int = 1) -> jax.Array:
  """[B, T, Y]: x times w over the first `inner` dimensions of w, in the type of x."""
  w_XY = w_XY[...].astype(x_BTX.dtype)
  if platform() != 'cpu' or shards('length') > 1:
    return jnp.tensordot(x_BTX, w_XY, inner)
  # XLA's CPU backend copies what a product sums over two dimensions of, B and T in a weight's gradient, transposed.
  rows = math.prod(w_XY.shape[:inner])
  out_NY = x_BTX.reshape(-1, rows) @ w_XY.reshape(rows, -1)
  return out_NY.reshape(*x_BTX.shape[:2], *w_XY.shape[inner:])


class FeedForward(nnx.Module):
  """SwiGLU of width d_ff."""

  def __init__(self, c: ModelConfig, d_ff: int, key: jax.Array):
    gate, up, down = jax.random.split(key, 3)
    std = c.d_model**-0.5
    self.gate_DF = weight(gate, (c.d_model, d_ff), ('embed', 'mlp'), std=std)
    self.up_DF = weight(up, (c.d_model, d_ff), ('embed', 'mlp'), std=std)
    self.down_FD = weight(down, (d_ff, c.d_model), ('mlp', 'embed'), std=(d_ff * 2 * c.layers) ** -0.5)

  def __call__(self, x_BTD: jax.Array, real_BT=None, choices_BTk=None) -> tuple[jax.Array, None]:
    """(out_BTD, None): a mixture of experts (model/moe.py) takes and returns more."""
    gate_BTF = checkpoint_name(project(x_BTD, self.gate_DF), 'mlp')
    up_BTF = checkpoint_name(project(x_BTD, self.up_DF), 'mlp')
    hidden_BTF = constrain(jax.nn.silu(gate_BTF) * up_BTF, 'batch', 'length', 'act_mlp')
    return project(hidden_BTF, self.down_FD), None
