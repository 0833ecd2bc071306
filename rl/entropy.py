"""Counts the entropies of tokens in a histogram, so that devices needn't exchange the entropies themselves.

# B rows  T tokens  N bins
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

BINS = 2**14  # of equal width, from 0 to log V; for V = 131,072 a bin has a width of 0.0007 nats


def histogram(entropy_BT: jax.Array, mask_BT: jax.Array, vocab: int) -> jax.Array:
  """Returns how many entropies fall into each bin, int32 [N]. The bins divide the range from 0 to log V equally.

  entropy_BT: the entropies, in nats.
  mask_BT: bool, True where an entropy is counted.
  vocab: V, the number of tokens in the vocabulary.
  """
  bin_BT = jnp.clip(entropy_BT / math.log(vocab) * BINS, 0, BINS - 1).astype(jnp.int32)
  count = lambda bin_T, mask_T: jnp.zeros(BINS, jnp.int32).at[bin_T].add(mask_T.astype(jnp.int32))
  return jax.vmap(count)(bin_BT, mask_BT).sum(0)  # first row by row, because rows are on different devices


def mean_of_highest(count_N: np.ndarray, share: float, vocab: int) -> float:
  """Returns the mean of the highest entropies, in nats. Each entropy counts as the middle of its bin.

  count_N: the result of `histogram`, with at least one token.
  share: the share of tokens over which the mean is taken. At least one token is taken.
  vocab: as in `histogram`.
  """
  from_top = np.cumsum(count_N[::-1], dtype=np.int64)
  tokens = max(1, round(share * int(from_top[-1])))
  taken_N = np.diff(np.minimum(from_top, tokens), prepend=0)[::-1]
  middle_N = (np.arange(len(count_N)) + 0.5) / len(count_N) * math.log(vocab)
  return float(taken_N @ middle_N / tokens)
