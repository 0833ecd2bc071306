"""Computations that several kernels share."""

import math

import jax
import jax.numpy as jnp
from jax import lax


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
  """Returns the float32 matrix product of a and b. A product of float32 matrices isn't rounded to a lower precision.

  contract: the dimensions of a and of b that are summed over.
  """
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), precision=precision,
                         preferred_element_type=jnp.float32)


def exp2_scale(width: int) -> float:
  """Returns log2(e)/√H for heads of this width H. With scores multiplied by it, softmax takes powers of 2 instead of e.
  """
  return width**-0.5 * math.log2(math.e)
