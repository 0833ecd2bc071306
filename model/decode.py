"""The key-value cache, with which the forward function decodes token by token.

# L layers  B batch  T new tokens  S slots  K key heads  H head width
"""

import dataclasses

import jax
import jax.numpy as jnp

from betarank.model.config import ModelConfig
from betarank.model.sharding import constrain

CACHE_AXES = {1: ('batch',), 2: ('batch', None), 4: ('batch', 'act_heads', None, None)}  # by the number of dimensions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of the tokens so far. Rows fill independently: row b holds length_B[b] tokens.

  Each layer has its own array, so that a loop over steps can write tokens in place. Slots are next to H, so that the
  dot products of a query read memory in order. With K next to H, attention of one token takes six times as long on a
  CPU.
  """

  k_LBKSH: tuple[jax.Array, ...]
  v_LBKSH: tuple[jax.Array, ...]
  positions_BS: jax.Array  # int32
  segments_BS: jax.Array  # int32; 0: empty slot
  length_B: jax.Array  # int32


def empty_cache(c: ModelConfig, batch: int, slots: int) -> Cache:
  """Returns an empty cache with `slots` slots in each of `batch` rows, in the compute dtype."""
  # No array is used in two places, because a buffer can be donated only once.
  zeros = lambda *shape, dtype=jnp.int32: constrain(jnp.zeros(shape, dtype), *CACHE_AXES[len(shape)])
  layers = lambda: tuple(zeros(batch, c.kv_heads, slots, c.head_dim, dtype=c.dtype) for _ in range(c.layers))
  return Cache(layers(), layers(), zeros(batch, slots), zeros(batch, slots), zeros(batch))


def slots_for(cache: Cache, segments_BT: jax.Array) -> jax.Array:
  """Returns the slot of each new token, [B, T]. Padding (segment 0) gets a slot out of range, so that writing it does
  nothing.
  """
  real_BT = segments_BT > 0
  slot_BT = cache.length_B[:, None] + jnp.cumsum(real_BT, axis=1) - 1
  return jnp.where(real_BT, slot_BT, cache.segments_BS.shape[1])


def write(buffer_BS: jax.Array, new_BT: jax.Array, slot_BT: jax.Array) -> jax.Array:
  """Writes the new entries of each row to their slots."""
  row_B1 = jnp.arange(buffer_BS.shape[0])[:, None]
  return buffer_BS.at[row_B1, slot_BT].set(new_BT.astype(buffer_BS.dtype), mode='drop')


def write_heads(buffer_BKSH: jax.Array, new_BTKH: jax.Array, slot_BT: jax.Array) -> jax.Array:
  """Writes new keys or values of a layer to their slots, as `write` does."""
  row_B1 = jnp.arange(buffer_BKSH.shape[0])[:, None]
  return buffer_BKSH.at[row_B1, :, slot_BT].set(new_BTKH.astype(buffer_BKSH.dtype), mode='drop')
