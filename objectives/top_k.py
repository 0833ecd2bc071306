"""An exact top-k along a vocabulary, several times faster than sorting it all."""

import jax.numpy as jnp
from jax import lax

GROUP = 128  # a TPU's lanes; neighbours of which only the largest is looked at first


def top_k(z_CV, k):
  """`jax.lax.top_k(z_CV, k)`: values and int32 ids [C, min(k, V)], largest first, ties to the lower id.

  The top k lie in the k groups of neighbours with the largest maxima: those k maxima come before anything in
  another group. Groups hold consecutive ids and are kept in order, so ties break by id in both rounds.
  """
  tokens, vocab = z_CV.shape
  groups = -(-vocab // GROUP)
  if k >= vocab or k * GROUP >= vocab // 2:
    return _settled_top_k(z_CV, min(k, vocab))
  z_CV = jnp.pad(z_CV, ((0, 0), (0, groups * GROUP - vocab)), constant_values=-jnp.inf)
  z_CGN = z_CV.reshape(tokens, groups, GROUP)
  _, group_CK = _settled_top_k(z_CGN.max(-1), k)
  group_CK = jnp.sort(group_CK, -1)
  candidates = jnp.take_along_axis(z_CGN, group_CK[:, :, None], 1).reshape(tokens, k * GROUP)
  value_CK, position_CK = _settled_top_k(candidates, k)
  return value_CK, jnp.take_along_axis(group_CK, position_CK // GROUP, 1) * GROUP + position_CK % GROUP


def _settled_top_k(array, k):
  # Without a barrier a later slice of the result makes XLA's CPU backend sort the whole row (jax 0.10).
  # One each: a barrier over the pair aborts its compiler when partitioning.
  value, position = lax.top_k(array, k)
  return lax.optimization_barrier(value), lax.optimization_barrier(position)
