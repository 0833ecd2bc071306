"""The sums over a row of logits that a loss and its statistics need, in one pass over it: a Triton kernel for GPUs.

XLA takes four passes there, one for the largest logit and one for each sum; at Qwen's vocabulary that is a quarter of
what the head's products take. Each lane keeps a running maximum of its own, so that lanes meet only at a row's end.
"""
# C rows  V vocabulary  B a block of it

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

BLOCK = 1024
WARPS = 8


def fits(vocab):
  """Whether the kernel takes rows [V]."""
  return vocab >= BLOCK


def row_sums(z_CV, x_C, target_C, interpret=False):
  """(shift_C, wrong_C, energy_C, rank_C), float32, of logits z_CV, target ids x_C and their logits; needs `fits(V)`.

  shift: the largest z; wrong: sum of exp(z - shift) over all tokens but x; energy: the same sum of
  exp(z - shift) (z - shift); rank: how many tokens come before x, ties by id. z may be a part of the vocabulary: an x
  that isn't in [0, V) stands before or after it.

  interpret: run on any device, slowly.
  """
  rows, vocab = z_CV.shape
  per_row = pl.BlockSpec((None,), lambda i: (i,))

  def body(z_ref, x_ref, target_ref, *out_refs):
    x, target = x_ref[...], target_ref[...]

    def add(start, unread, carry):
      most_B, wrong_B, energy_B, rank_B = carry
      at_B = start + jnp.arange(BLOCK)
      z_B = z_ref[pl.ds(start, BLOCK)]
      before_B = (z_B > target) | ((z_B == target) & (at_B < x))
      if unread:
        z_B, before_B = jnp.where(at_B >= unread, z_B, -jnp.inf), before_B & (at_B >= unread)
      new_B = jnp.maximum(most_B, z_B)
      factor_B, e_B = jnp.exp(most_B - new_B), jnp.where(at_B == x, 0.0, jnp.exp(z_B - new_B))
      energy_B = factor_B * (energy_B + wrong_B * (most_B - new_B)) + jnp.where(e_B > 0, e_B * (z_B - new_B), 0.0)
      return new_B, wrong_B * factor_B + e_B, energy_B, rank_B + jnp.where(before_B, 1.0, 0.0)

    nothing = jnp.full(BLOCK, jnp.finfo(jnp.float32).min), *[jnp.zeros(BLOCK)] * 3
    carry = lax.fori_loop(0, vocab // BLOCK, lambda i, carry: add(i * BLOCK, 0, carry), nothing)
    if vocab % BLOCK:  # the last block, less what was read of it
      carry = add(vocab - BLOCK, vocab - vocab % BLOCK, carry)
    most_B, wrong_B, energy_B, rank_B = carry
    shift = most_B.max()
    factor_B = jnp.exp(most_B - shift)
    sums = wrong_B * factor_B, factor_B * (energy_B + wrong_B * (most_B - shift)), rank_B
    for ref, value in zip(out_refs, (shift, *(jnp.sum(sum_B) for sum_B in sums)), strict=True):
      ref[...] = value

  return pl.pallas_call(
    body, grid=(rows,),
    in_specs=[pl.BlockSpec((None, vocab), lambda i: (i, 0)), per_row, per_row], out_specs=[per_row] * 4,
    out_shape=[jax.ShapeDtypeStruct((rows,), jnp.float32)] * 4, compiler_params=plgpu.CompilerParams(num_warps=WARPS),
    interpret=interpret, name='row_sums',
  )(z_CV, x_C, target_C)
