"""RMSNorm, alone or combined with the operation before or after it in a decoder: the addition to the residual stream,
or the rotation of queries and keys. On a GPU, each combination is one kernel (model/kernels/norm_triton.py).

# B batch  T tokens  D width  N heads  H head width (angles: half of it)
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from betarank.model.attention import angles, rotate
from betarank.model.kernels import norm_triton
from betarank.model.sharding import part, per_device, platform, shards, spec

STREAM = 'batch', 'length', 'act_embed'
HEADS = 'batch', 'length', 'act_heads', None
ANGLES = 'batch', 'length', None


def rms_norm(x: jax.Array, scale: nnx.Param, eps: float) -> jax.Array:
  """Returns x / rms(x) · scale in x's dtype, where rms is taken over the last axis. The computation is in float32."""
  x32 = x.astype(jnp.float32)
  x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  return (x32 * jnp.broadcast_to(scale[...], x.shape)).astype(x.dtype)


def add_norm(
  x_BTD: jax.Array, out_BTD: jax.Array | None, scale_D: nnx.Param, eps: float
) -> tuple[jax.Array, jax.Array]:
  """Adds a layer's output to the residual stream, and normalizes the sum.

  Args:
    x_BTD: the residual stream.
    out_BTD: what is added to it, in the same dtype; None adds nothing.
    scale_D: float32.
    eps: what RMSNorm adds to the mean square.

  Returns:
    (the sum, the normalized sum), both [B, T, D] in x's dtype.
  """
  if _has_kernel(x_BTD, STREAM) and shards('act_embed') == 1:
    return _add_norm(eps, (x_BTD,) if out_BTD is None else (x_BTD, out_BTD), scale_D[...])
  x_BTD = x_BTD if out_BTD is None else x_BTD + out_BTD
  return x_BTD, rms_norm(x_BTD, scale_D, eps)


def norm_rotate(
  x_BTNH: jax.Array, scale_H: nnx.Param, eps: float, positions_BT: jax.Array, base: float, factor: float = 1.0,
) -> jax.Array:
  """Returns queries or keys, each head normalized and then rotated by its position: [B, T, N, H] in x's dtype.

  scale_H: float32. eps: as in `add_norm`. positions_BT, base, factor: as in `attention.rotate`.
  """
  if _has_kernel(x_BTNH, HEADS):
    return _norm_rotate(eps, x_BTNH, *angles(positions_BT, x_BTNH.shape[-1], base, factor), scale_H[...])
  return rotate(rms_norm(x_BTNH, scale_H, eps), positions_BT, base, factor)


def _has_kernel(x: jax.Array, names: tuple[str | None, ...]) -> bool:
  """Returns whether a kernel is used for an array with these logical names on the current mesh.

  It isn't used for decoding (T = 1), where it is 1 to 2 % slower than XLA's fusions.
  """
  shape = part(x.shape, names)
  return (platform() == 'gpu' and x.shape[1] > 1 and shape is not None
          and norm_triton.fits(math.prod(shape), x.shape[-1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_norm(eps, parts_BTD, scale_D):
  """Returns what `add_norm` returns. parts_BTD: (x_BTD,) or (x_BTD, out_BTD)."""
  run, stream = functools.partial(norm_triton.add_norm, eps=eps), spec(*STREAM)
  return per_device(run, (stream, spec(None)), (stream, stream))(parts_BTD, scale_D)


def _add_norm_gradient(eps, saved, gradients):
  def run(*arrays):
    dx_BTD, dscale_D = norm_triton.add_norm_gradient(*arrays, eps)
    return dx_BTD, dscale_D[None, None]

  x_BTD, scale_D, parts = saved
  stream = spec(*STREAM)
  dx_BTD, dscale_11D = per_device(run, (stream, spec(None), stream, stream), (stream, stream))(
    x_BTD, scale_D, *gradients)
  return (dx_BTD,) * len(parts), dscale_11D.sum((0, 1))


def _add_norm_saving(eps, parts_BTD, scale_D):
  out = _add_norm(eps, parts_BTD, scale_D)
  return out, (out[0], scale_D, (None,) * len(parts_BTD))


_add_norm.defvjp(_add_norm_saving, _add_norm_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_rotate(eps, x_BTNH, sin_BTH, cos_BTH, scale_H):
  run = functools.partial(norm_triton.norm_rotate, eps=eps)
  angle = spec(*ANGLES)
  return per_device(run, (spec(*HEADS), angle, angle, spec(None)), spec(*HEADS))(x_BTNH, sin_BTH, cos_BTH, scale_H)


def _norm_rotate_gradient(eps, saved, dout_BTNH):
  def run(*arrays):
    dx_BTNH, dscale_H = norm_triton.norm_rotate_gradient(*arrays, eps=eps)
    return dx_BTNH, dscale_H[None, None, None]

  heads, angle = spec(*HEADS), spec(*ANGLES)
  dx_BTNH, dscale_111H = per_device(run, (heads, angle, angle, spec(None), heads), (heads, heads))(*saved, dout_BTNH)
  return dx_BTNH, None, None, dscale_111H.sum((0, 1, 2))


_norm_rotate.defvjp(lambda eps, *arrays: (_norm_rotate(eps, *arrays), arrays), _norm_rotate_gradient)
