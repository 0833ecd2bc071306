"""The key-value cache that makes the one forward function decode token by token.

# L layers  B batch  T new tokens  S slots  K key heads  H head width
"""

import dataclasses

import jax
import jax.numpy as jnp

from model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of the tokens seen so far. Rows fill independently: row b holds length_B[b] tokens."""

  k_LBSKH: jax.Array
  v_LBSKH: jax.Array
  positions_BS: jax.Array  # int32
  segments_BS: jax.Array  # int32; 0: empty slot
  length_B: jax.Array  # int32


def empty_cache(c: ModelConfig, batch: int, slots: int) -> Cache:
  """Room for `slots` tokens in each of `batch` rows, in the compute type."""
  shape = (c.layers, batch, slots, c.kv_heads, c.head_dim)
  zeros_BS = jnp.zeros((batch, slots), jnp.int32)
  return Cache(jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype), zeros_BS, zeros_BS, jnp.zeros(batch, jnp.int32))


def slots_for(cache: Cache, segments_BT: jax.Array) -> jax.Array:
  """[B, T] slot each new token goes to. Padding (segment 0) gets a slot out of range, which a write drops."""
  real_BT = segments_BT > 0
  slot_BT = cache.length_B[:, None] + jnp.cumsum(real_BT, axis=1) - 1
  return jnp.where(real_BT, slot_BT, cache.segments_BS.shape[1])


def write(buffer_BS: jax.Array, new_BT: jax.Array, slot_BT: jax.Array) -> jax.Array:
  """Puts row b's new entries (any trailing dimensions) into its slots."""
  row_B1 = jnp.arange(buffer_BS.shape[0])[:, None]
  return buffer_BS.at[row_B1, slot_BT].set(new_BT.astype(buffer_BS.dtype), mode='drop')
