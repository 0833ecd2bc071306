"""Scatter-add of rows on a TPU. XLA would add the rows one by one.

The rows are first gathered in the order of their destinations, and divided into tiles. The sums are divided into
blocks. A tile is added to a block by a matrix product with a matrix of zeros and ones. A tile whose rows belong to
several blocks is visited once per block. On a chip with two cores, each core takes half of the width.

# P rows  V visits of tiles  M rows of a tile  G sums  B blocks of sums  D width
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from betarank.model.sharding import cores, platform

TILE, BLOCK = 256, 128


def add(y_PD: jax.Array, to_P: jax.Array, sums: int) -> jax.Array:
  """Returns an array [sums, D]. Its row s is the sum of all rows y_PD[p] for which to_P[p] = s.

  Rows with to_P[p] >= sums are ignored, even if they hold NaN.
  """
  width, blocks, tiles = y_PD.shape[1], -(-sums // BLOCK), -(-len(to_P) // TILE)
  to_P, order_P = lax.sort_key_val(to_P, jnp.arange(len(to_P)), is_stable=False)
  pad = (0, tiles * TILE - len(to_P))
  to_P, order_P = jnp.pad(to_P, pad, constant_values=sums), jnp.pad(order_P, pad)
  # A row without a destination is replaced by one that has one, because 0 times its values may be NaN.
  order_P = jnp.where(to_P < sums, order_P, order_P[0])
  sorted_PD = y_PD.at[order_P].get(mode='clip')
  end_B = jnp.sum(to_P[None] < jnp.minimum(jnp.arange(1, blocks + 1) * BLOCK, sums)[:, None], 1, dtype=jnp.int32)
  start_B = jnp.pad(end_B[:-1], (1, 0))
  tile_B = start_B // TILE
  visits_B = jnp.maximum(-(-end_B // TILE) - tile_B, 1)  # a block without rows needs a visit that sets it to zero
  visits_end_B = jnp.cumsum(visits_B)
  visit_V = jnp.arange(tiles + blocks)
  block_V = jnp.minimum(jnp.sum(visit_V[:, None] >= visits_end_B[None], 1, dtype=jnp.int32), blocks - 1)
  tile_V = jnp.minimum(tile_B[block_V] + visit_V - (visits_end_B - visits_B)[block_V], tiles - 1)
  works_V = (visit_V < visits_end_B[-1]) & (end_B > start_B)[block_V]
  ways = cores() if width % (128 * cores()) == 0 else 1
  out_GD = pl.pallas_call(
    _add, name='sum_rows', out_shape=jax.ShapeDtypeStruct((blocks * BLOCK, width), y_PD.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3, grid=(ways, len(visit_V)),
      in_specs=[pl.BlockSpec((1, 1, TILE), lambda h, v, tile_V, *_: (tile_V[v], 0, 0)),
                pl.BlockSpec((TILE, width // ways), lambda h, v, tile_V, *_: (tile_V[v], h))],
      out_specs=pl.BlockSpec((BLOCK, width // ways), lambda h, v, tile_V, block_V, _: (block_V[v], h)),
      scratch_shapes=[pltpu.VMEM((BLOCK, width // ways), jnp.float32)]),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')),
    interpret=platform() != 'tpu',
  )(tile_V, block_V, works_V.astype(jnp.int32), to_P.reshape(tiles, 1, TILE), sorted_PD)
  return out_GD[:sums]


def _add(tile_V, block_V, works_V, to_ref, y_ref, out_ref, sum_ref):
  visit, last = pl.program_id(1), pl.num_programs(1) - 1
  block = block_V[visit]

  @pl.when((visit == 0) | (block != block_V[jnp.maximum(visit - 1, 0)]))
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(works_V[visit] > 0)
  def _():
    here_TM = to_ref[0] - block * BLOCK == lax.broadcasted_iota(jnp.int32, (BLOCK, TILE), 0)
    precision = lax.Precision.HIGHEST if y_ref.dtype == jnp.float32 else None
    sum_ref[...] += jnp.dot(here_TM.astype(y_ref.dtype), y_ref[...], precision=precision,
                            preferred_element_type=jnp.float32)

  @pl.when((visit == last) | (block != block_V[jnp.minimum(visit + 1, last)]))
  def _():
    out_ref[...] = sum_ref[...].astype(out_ref.dtype)
