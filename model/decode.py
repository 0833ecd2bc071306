"""The key-value cache that makes the one forward function decode token by token.

# L layers  B batch  T new tokens  S slots  K key heads  H head width
"""

import dataclasses

import jax
import jax.numpy as jnp

from betarank.model.config import ModelConfig
from betarank.model.sharding import constrain

CACHE_AXES = {1: ('batch',), 2: ('batch', None), 4: ('batch', 'act_heads', None, None)}  # by number of dimensions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of the tokens seen so far. Rows fill independently: row b holds length_B[b] tokens.

  An array a layer, so that a loop of steps writes each token in place; slots next to H, so that a query's dot
  products read memory in order (with K next to H, attention of one token takes six times as long on a CPU).
  """

  k_LBKSH: tuple[jax.Array, ...]
  v_LBKSH: tuple[jax.Array, ...]
  positions_BS: jax.Array  # int32
  segments_BS: jax.Array  # int32; 0: empty slot
  length_B: jax.Array  # int32


def empty_cache(c: ModelConfig, batch: int, slots: int) -> Cache:
  """Room for `slots` tokens in each of `batch` rows, in the compute type."""
  # Never one array in two places: a cache that is donated gives each buffer once.
  zeros = lambda *shape, dtype=jnp.int32: constrain(jnp.zeros(shape, dtype), *CACHE_AXES[len(shape)])
  layers = lambda: tuple(zeros(batch, c.kv_heads, slots, c.head_dim, dtype=c.dtype) for _ in range(c.layers))
  return Cache(layers(), layers(), zeros(batch, slots), zeros(batch, slots), zeros(batch))


def slots_for(cache: Cache, segments_BT: jax.Array) -> jax.Array:
  """[B, T] slot each new token goes to. Padding (segment 0) gets a slot out of range, which a write drops."""
  real_BT = segments_BT > 0
  slot_BT = cache.length_B[:, None] + jnp.cumsum(real_BT, axis=1) - 1
  return jnp.where(real_BT, slot_BT, cache.segments_BS.shape[1])


def write(buffer_BS: jax.Array, new_BT: jax.Array, slot_BT: jax.Array) -> jax.Array:
  """Puts row b's new entries into its slots."""
  row_B1 = jnp.arange(buffer_BS.shape[0])[:, None]
  return buffer_BS.at[row_B1, slot_BT].set(new_BT.astype(buffer_BS.dtype), mode='drop')


def write_heads(buffer_BKSH: jax.Array, new_BTKH: jax.Array, slot_BT: jax.Array) -> jax.Array:
  """`write` for a layer's keys or values."""
  row_B1 = jnp.arange(buffer_BKSH.shape[0])[:, None]
  return buffer_BKSH.at[row_B1, :, slot_BT].set(new_BTKH.astype(buffer_BKSH.dtype), mode='drop')
