"""Triton kernels for RMSNorm together with what is next to it in a decoder: the addition to the residual stream before
it, or the rotation of queries and keys after it.

XLA reads the inputs several times: for the sum of squares and for the result, and backward for two sums and for the
gradient. These kernels read them once, and compute in float32. For the gradient of a scale, each program adds up its
own rows, and XLA adds up the programs' sums, so results are deterministic.

# D width  N heads  H half a head's width  ... leading dimensions, any number
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

ELEMENTS = 4096  # of a block in `add_norm`
ELEMENTS_BACK = 2048  # in the other kernels, which hold more blocks at a time
WARPS = 4
PROGRAMS = 1024  # at most, for a gradient


def fits(size: int, width: int) -> bool:
  """Returns whether the kernels support an array of `size` elements in rows of `width`."""
  return size < 2**31 and width % 32 == 0  # offsets are int32; no model has other widths


def add_norm(parts, scale_D, eps: float, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """Returns (s, s / rms(s) · scale), both [..., D] in the parts' dtype. s is the sum of the parts, in this dtype.

  Args:
    parts: one or two arrays [..., D]: the residual stream, and what is added to it.
    scale_D: float32.
    eps: what is added to the mean square.
    interpret: runs the kernel on any device, slowly.
  """
  x = parts[0]
  rows, width = _rows_and_width(x)

  def body(*refs):
    at, real = _block(pl.program_id(0), rows, width, ELEMENTS)
    s, scale = _read(refs[0], at, real), _row(refs[len(parts)], width)
    if len(parts) == 2:
      s = (s + _read(refs[1], at, real)).astype(x.dtype).astype(jnp.float32)
      _write(refs[-2], at, real, s)
    _write(refs[-1], at, real, s * _inverse_rms(width, eps, s) * scale)

  *s, normed = pl.pallas_call(
    body, grid=(pl.cdiv(rows, _rows(width, ELEMENTS)),), out_shape=[_flat(x)] * len(parts),
    compiler_params=_params(width), interpret=interpret, name='add_norm',
  )(*(part.reshape(-1) for part in parts), scale_D)
  return s[0].reshape(x.shape) if s else x, normed.reshape(x.shape)


def add_norm_gradient(s, scale_D, ds, dnormed, eps: float, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """Returns (the gradient of each part, [..., D] in its dtype; the gradient of the scale, [D] float32).

  Args:
    s: the first result of `add_norm`.
    ds, dnormed: the gradients of its two results.
  """
  rows, width = _rows_and_width(s)
  each = _rows(width, ELEMENTS_BACK)
  programs, steps = _split(pl.cdiv(rows, each))

  def body(s_ref, scale_ref, ds_ref, dnormed_ref, dx_ref, dscale_ref):
    first, scale = pl.program_id(0) * steps, _row(scale_ref, width)

    def step(i, dscale_D):
      at, real = _block(first + i, rows, width, ELEMENTS_BACK)
      s, dnormed = _read(s_ref, at, real), _read(dnormed_ref, at, real)
      inverse = _inverse_rms(width, eps, s)
      unit, dunit = s * inverse, dnormed * scale
      mean = jnp.sum(unit * dunit, 1, keepdims=True) / width
      _write(dx_ref, at, real, _read(ds_ref, at, real) + inverse * (dunit - unit * mean))
      return dscale_D + jnp.sum(dnormed * unit, 0)

    dscale_D = lax.fori_loop(0, steps, step, jnp.zeros(pl.next_power_of_2(width), jnp.float32))
    _write_row(dscale_ref, pl.program_id(0) * width, dscale_D, width)

  dx, dscale = pl.pallas_call(
    body, grid=(programs,), compiler_params=_params(width), interpret=interpret, name='add_norm_gradient',
    out_shape=[_flat(s), jax.ShapeDtypeStruct((programs * width,), jnp.float32)],
  )(s.reshape(-1), scale_D, ds.reshape(-1), dnormed.reshape(-1))
  return dx.reshape(s.shape), dscale.reshape(programs, width).sum(0)


def norm_rotate(x, sin, cos, scale_D, eps: float, interpret: bool = False) -> jax.Array:
  """Returns x / rms(x) · scale, rotated: [..., N, D] in x's dtype. Each head has its own rms.

  Args:
    x: [..., N, D], queries or keys.
    sin, cos: [..., H] float32, of the angles by which the pairs of dimensions i and H + i are rotated.
    scale_D: float32.
    eps, interpret: as in `add_norm`.
  """
  rows, width, heads = *_rows_and_width(x), x.shape[-2]
  half = width // 2

  def body(x_ref, sin_ref, cos_ref, scale_ref, out_ref):
    low, high, angle, real = _halves(pl.program_id(0), rows, heads, half)
    a, b = _read(x_ref, low, real), _read(x_ref, high, real)
    inverse = _inverse_rms(width, eps, a, b)
    rounded = lambda x: x.astype(x_ref.dtype).astype(jnp.float32)  # the plain version, used to decode, also rounds here
    a, b = rounded(a * inverse * _row(scale_ref, half)), rounded(b * inverse * _row(scale_ref, half, half))
    sin, cos = _read(sin_ref, angle, real), _read(cos_ref, angle, real)
    _write(out_ref, low, real, a * cos - b * sin)
    _write(out_ref, high, real, b * cos + a * sin)

  out = pl.pallas_call(
    body, grid=(pl.cdiv(rows, _rows(half, ELEMENTS_BACK)),), out_shape=_flat(x), compiler_params=_params(half),
    interpret=interpret, name='norm_rotate',
  )(x.reshape(-1), sin.reshape(-1), cos.reshape(-1), scale_D)
  return out.reshape(x.shape)


def norm_rotate_gradient(
  x, sin, cos, scale_D, dout, eps: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
  """Returns (the gradient of x, [..., N, D] in x's dtype; the gradient of the scale, [D] float32).

  Args:
    dout: the gradient of the result of `norm_rotate`. The other arguments are those of `norm_rotate`.
  """
  rows, width, heads = *_rows_and_width(x), x.shape[-2]
  half = width // 2
  programs, steps = _split(pl.cdiv(rows, _rows(half, ELEMENTS_BACK)))

  def body(x_ref, sin_ref, cos_ref, scale_ref, dout_ref, dx_ref, dscale_ref):
    first, low_scale, high_scale = pl.program_id(0) * steps, _row(scale_ref, half), _row(scale_ref, half, half)

    def step(i, dscales):
      low, high, angle, real = _halves(first + i, rows, heads, half)
      a, b = _read(x_ref, low, real), _read(x_ref, high, real)
      inverse = _inverse_rms(width, eps, a, b)
      a, b = a * inverse, b * inverse
      da, db = _read(dout_ref, low, real), _read(dout_ref, high, real)
      sin, cos = _read(sin_ref, angle, real), _read(cos_ref, angle, real)
      da, db = da * cos + db * sin, db * cos - da * sin  # rotated back
      dscales = dscales[0] + jnp.sum(da * a, 0), dscales[1] + jnp.sum(db * b, 0)
      da, db = da * low_scale, db * high_scale
      mean = (jnp.sum(da * a, 1, keepdims=True) + jnp.sum(db * b, 1, keepdims=True)) / width
      _write(dx_ref, low, real, inverse * (da - a * mean))
      _write(dx_ref, high, real, inverse * (db - b * mean))
      return dscales

    dscales = lax.fori_loop(0, steps, step, (jnp.zeros(pl.next_power_of_2(half), jnp.float32),) * 2)
    for start, dscale in zip((0, half), dscales):
      _write_row(dscale_ref, pl.program_id(0) * width + start, dscale, half)

  dx, dscale = pl.pallas_call(
    body, grid=(programs,), compiler_params=_params(half), interpret=interpret, name='norm_rotate_gradient',
    out_shape=[_flat(x), jax.ShapeDtypeStruct((programs * width,), jnp.float32)],
  )(x.reshape(-1), sin.reshape(-1), cos.reshape(-1), scale_D, dout.reshape(-1))
  return dx.reshape(x.shape), dscale.reshape(programs, width).sum(0)


def _rows_and_width(x) -> tuple[int, int]:
  return x.size // x.shape[-1], x.shape[-1]


def _flat(x) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((x.size,), x.dtype)


# Used inside the kernels. All arrays are one-dimensional there. Blocks are padded to powers of 2, as Triton requires.


def _rows(width: int, elements: int) -> int:
  """Returns the number of rows of a block, so that it has about so many elements."""
  return max(1, elements // pl.next_power_of_2(width))


def _split(blocks: int) -> tuple[int, int]:
  """Returns (number of programs, blocks of each), for a gradient."""
  steps = pl.cdiv(blocks, PROGRAMS)
  return pl.cdiv(blocks, steps), steps


def _params(width: int) -> plgpu.CompilerParams:
  return plgpu.CompilerParams(num_warps=WARPS if width <= 2048 else 2 * WARPS)


def _block(number, rows: int, width: int, elements: int) -> tuple[jax.Array, jax.Array]:
  """Returns (places of a block's elements, whether they exist), both of shape [rows of the block, columns]."""
  each = _rows(width, elements)
  row = (number * each + jnp.arange(each))[:, None]
  column = jnp.arange(pl.next_power_of_2(width))[None]
  return row * width + column, (row < rows) & (column < width)


def _halves(number, rows: int, heads: int, half: int):
  """Returns the places of a block's first halves, of its second halves and of their angles, and whether they exist."""
  each = _rows(half, ELEMENTS_BACK)
  row = (number * each + jnp.arange(each))[:, None]
  column = jnp.arange(pl.next_power_of_2(half))[None]
  low = row * (2 * half) + column
  return low, low + half, row // heads * half + column, (row < rows) & (column < half)


def _read(ref, at, real) -> jax.Array:
  return plgpu.load(ref.at[at], mask=real, other=0).astype(jnp.float32)


def _row(ref, width: int, start: int = 0) -> jax.Array:
  """Returns [1, columns], the `width` elements of a vector from `start`."""
  column = jnp.arange(pl.next_power_of_2(width))
  return plgpu.load(ref.at[start + column], mask=column < width, other=0)[None]


def _write(ref, at, real, x) -> None:
  plgpu.store(ref.at[at], x.astype(ref.dtype), mask=real)


def _write_row(ref, start, x, width: int) -> None:
  column = jnp.arange(len(x))
  plgpu.store(ref.at[start + column], x, mask=column < width)


def _inverse_rms(width: int, eps: float, *parts) -> jax.Array:
  """Returns 1 / rms of each row, [rows of the block, 1]. parts: blocks that together have all columns of the rows."""
  return lax.rsqrt(sum(jnp.sum(x * x, 1, keepdims=True) for x in parts) / width + eps)
