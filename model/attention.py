"""Attention: rotary positions, and softmax over the keys that a query may see.

# B batch  T query length  S key length  K key heads  G query heads a key head  N = K·G  H head width
"""

import jax
import jax.numpy as jnp


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, base: float) -> jax.Array:
  """Rotary position embedding (arXiv 2104.09864), halves paired as in Qwen and Llama checkpoints.

  Angles are float32 whatever x is: bfloat16 can't tell position 1025 from 1026.
  """
  half = x_BTNH.shape[-1] // 2
  frequency_H = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_BT1H = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_H
  sin, cos = jnp.sin(angle_BT1H), jnp.cos(angle_BT1H)
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def visible(positions_BT, segments_BT, key_positions_BS, key_segments_BS) -> jax.Array:
  """[B, T, S] bool: a query sees the keys of its own segment up to its own position.

  Segment 0 is padding, also in a cache's empty slots; nothing but padding sees it.
  """
  same = segments_BT[:, :, None] == key_segments_BS[:, None, :]
  return same & (positions_BT[:, :, None] >= key_positions_BS[:, None, :])


def attend(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, visible_BTS: jax.Array) -> jax.Array:
  """Grouped-query attention, [B, T, N, H]; scores and softmax in float32.

  A query that sees nothing (padding in front of an empty cache) gets the mean of all values, not NaN.
  """
  batch, length, heads, width = q_BTNH.shape
  # Queries first, in the products' own order: as einsum would turn them, decoding on a CPU takes twice as long.
  q_BKGTH = (q_BTNH * width**-0.5).reshape(batch, length, k_BKSH.shape[1], -1, width).transpose(0, 2, 3, 1, 4)
  score_BKGTS = jnp.einsum('BKGTH,BKSH->BKGTS', q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
  score_BKGTS = jnp.where(visible_BTS[:, None, None], score_BKGTS, -1e30)
  weight_BKGTS = jax.nn.softmax(score_BKGTS, axis=-1).astype(v_BKSH.dtype)
  out_BKGTH = jnp.einsum('BKGTS,BKSH->BKGTH', weight_BKGTS, v_BKSH)
  return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)
