"""Finds the two most probable tokens at each position, one chunk of tokens at a time.

# C tokens of a chunk  D width  V vocabulary (of this device)
"""

import math

import jax
import jax.numpy as jnp

from betarank.objectives import collectives
from betarank.objectives.head_math import linear_logits
from betarank.objectives.top_k import top_k

CHUNK_TOKENS = 256  # the logits of so many tokens exist at a time: 155 MB with a vocabulary of 151,936


@jax.named_scope('head')
def leading_two(
  hidden: jax.Array, head: jax.Array, layout: collectives.Layout | None = None
) -> tuple[jax.Array, jax.Array]:
  """Returns (log p1, log p1 - log p2) at each position, float32 nats.

  p1 is the largest probability, and p2 the second largest.

  Args:
    hidden: [..., D].
    head: [D, V].
    layout: how both arrays are sharded over the current mesh; None means all on one device.
  """

  def local(hidden, head):
    head_DV = collectives.gather_head(layout, head.astype(hidden.dtype))
    tokens = math.prod(hidden.shape[:-1])
    size = min(CHUNK_TOKENS, tokens)
    hidden_ND = jnp.pad(hidden.reshape(tokens, -1), ((0, -tokens % size), (0, 0)))

    def one(hidden_CD):
      z_CV = linear_logits(hidden_CD, head_DV)
      two_C2, _ = jax.lax.top_k(collectives.concatenate_over_vocab(layout, top_k(z_CV, 2)[0]), 2)
      mass_C = collectives.sum_over_vocab(layout, jnp.exp(z_CV - two_C2[:, :1]).sum(-1))
      return -jnp.log(mass_C), two_C2[:, 0] - two_C2[:, 1]

    parts = jax.lax.map(one, hidden_ND.reshape(-1, size, hidden.shape[-1]))
    return tuple(x.reshape(-1)[:tokens].reshape(hidden.shape[:-1]) for x in parts)

  return collectives.on_mesh(layout, local, ('hidden', 'head'), ('tokens', 'tokens'))(hidden, head)
