"""What the blocks are made of, held to plain forms."""

import jax
import jax.numpy as jnp
import numpy as np

from model import layers


def test_the_sorted_lookup_has_the_plain_one_s_gradient():
  """One GPU adds up each token's rows in order; tokens that never occur, once and often."""
  rng = np.random.default_rng(0)
  tokens_BT = jnp.asarray(rng.zipf(1.3, (4, 64)) % 50, jnp.int32)
  table_VD, weight_BTD = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((50, 8), (4, 64, 8)))
  assert 0 < len(np.unique(tokens_BT)) < 50

  def run(lookup):
    total = lambda table_VD: jnp.sum(lookup(table_VD, tokens_BT, jnp.float32) * weight_BTD)
    return jax.value_and_grad(total)(table_VD)

  for got, want in zip(run(layers._lookup_sorted), run(layers.lookup), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
