"""Makes a model's parameters without a program to compile, for tests of everything but the initialization."""

import jax
import jax.numpy as jnp
import numpy as np

from betarank import model


def random(c, seed=0, scale=1.0):
  """Returns random float32 parameters of the model `c`, `scale` times about as large as those of model.init."""
  rng = np.random.default_rng(seed)
  _, shapes, axes = model.abstract(c)
  new = lambda shape, names: jnp.asarray(scale * (
    np.ones(shape.shape) if 'norm' in names else rng.normal(0, c.d_model**-0.5, shape.shape)), jnp.float32)
  return jax.tree.map(new, shapes, axes)
