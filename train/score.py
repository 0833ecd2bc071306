"""Connects model and objective. All code that needs the probability of a text calls this module, so that pre-training,
validation, RL, the probe, the harness and the sampler can't disagree.

    total         the summed loss, for training
    token_stats   log-probability, entropy, rank and masses of each token, for RL and evaluation
    logits        of given hidden states, for the sampler

# B rows  T tokens  D width  V vocabulary  L layers  E experts  k experts per token
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from betarank import model, objectives
from betarank.data import Batch
from betarank.objectives import (
  Layout,
  RewardShaping,
  TokenStats,
  linear_logits,
  linear_token_stats,
  shaped_linear_loss,
  shaped_linear_total,
)


def layout() -> Layout | None:
  """Returns how the head's arrays lie on the current mesh, by the table in model/sharding.py; None without a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return None
  return Layout(
    tokens=(model.RULES['batch'], model.RULES['length']), width=model.RULES['embed'], vocab=model.RULES['vocab'])


def total(
  c: model.ModelConfig, params: Any, batch: Batch, shaping: RewardShaping, stats: str = 'full'
) -> tuple[jax.Array, jax.Array, TokenStats, model.Routing | None]:
  """Returns (total, loss_BT, statistics [B, T], routing): the summed loss, which can be differentiated, and its parts.

  Args:
    shaping: the objective, as ObjectiveConfig.at(step) gives it.
    stats: 'full', or 'basic' to skip the top k, and head and tail mass with it, where no lambda needs them.

  All in nats, float32. Padding (segment 0) counts for nothing, whatever its tokens are: its loss and statistics are 0.
  The load-balance loss of a mixture of experts is part of the total, not of loss_BT. A dense model has no routing.
  """
  hidden_BTD, _, routing = model.forward_routed(c, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
  summed, loss_BT, statistics = shaped_linear_total(
    hidden_BTD, model.head(c, params), batch.targets_BT, shaping, weights=batch.segments_BT > 0, stats=stats,
    layout=layout())
  if c.moe.balance_weight:
    summed += c.moe.balance_weight * jnp.mean(routing.balance_L)
  return summed, loss_BT, statistics, routing


def log_probabilities(
  c: model.ModelConfig, params: Any, batch: Batch, choices_BTLk: jax.Array | None = None, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
  """Returns (log-probability of each target, entropy), [B, T] float32 nats; 0 in padding.

  Gradients flow through the first.

  choices_BTLk: the experts that the sampler sent each token to. Without them, rounding can send a token elsewhere.
  temperature: of the distribution, as the sampler's.
  """
  choices_LBTk = None if choices_BTLk is None else jnp.moveaxis(choices_BTLk, 2, 0).astype(jnp.int32)
  hidden_BTD, _, _ = model.forward_routed(
    c, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT, None, choices_LBTk)
  loss_BT, statistics = shaped_linear_loss(
    hidden_BTD, model.head(c, params), batch.targets_BT, RewardShaping(), weights=batch.segments_BT > 0,
    temperature=temperature, layout=layout())
  return -loss_BT, statistics.entropy


def token_stats(c: model.ModelConfig, params: Any, batch: Batch, top_k: int) -> tuple[TokenStats, jax.Array]:
  """Returns (statistics [B, T], hidden_BTD); statistics are 0 in padding, and have no gradient.

  top_k: tokens that make up the head.
  """
  hidden_BTD = model.forward(c, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)[0]
  statistics = linear_token_stats(
    hidden_BTD, model.head(c, params), batch.targets_BT, top_k=top_k, weights=batch.segments_BT > 0, layout=layout())
  return statistics, hidden_BTD


def leading_two(c: model.ModelConfig, params: Any, hidden_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (log p1, log p1 - log p2) of the two most probable tokens, [B, T] float32 nats."""
  return objectives.leading_two(hidden_BTD, model.head(c, params), layout())


def logits(c: model.ModelConfig, hidden: jax.Array, head_DV: jax.Array, temperature: float = 1.0) -> jax.Array:
  """Returns float32 logits [..., V] of hidden states [..., D] over `temperature`, by the scorer's own product."""
  return linear_logits(hidden, head_DV, temperature=temperature, compute_dtype=c.dtype)


def sums(
  batch: Batch, loss_BT: jax.Array, stats: TokenStats, bytes_per_token_V: jax.Array,
  routing: model.Routing | None = None,
) -> dict[str, jax.Array]:
  """Returns the sums over a batch from which `means` computes figures. Add the sums of several batches with `add`.

  Counts of tokens and bytes are int32, as float32 can't count past 16 million.
  """
  of_experts = {} if routing is None else {
    'expert_load': routing.load_LE,
    'router_entropy': jnp.mean(routing.entropy_L),
    'balance_loss': jnp.mean(routing.balance_L),
  }
  mask_BT = batch.segments_BT > 0
  total = lambda x_BT: jnp.sum(x_BT, where=mask_BT)
  return {
    'loss': total(loss_BT),
    'ce': total(-stats.target_logp),
    'entropy': total(stats.entropy),
    'rank1': total((stats.target_rank == 0).astype(jnp.float32)),
    'tokens': jnp.sum(mask_BT, dtype=jnp.int32),
    'bytes': total(bytes_per_token_V[batch.targets_BT]),
    'invalid': jnp.sum(mask_BT & ~stats.target_valid, dtype=jnp.int32),
    **({} if stats.tail_mass is None else {'head_mass': total(stats.head_mass), 'tail_mass': total(stats.tail_mass)}),
    **of_experts,
  }


def add(total: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
  """Returns the sum of two batches' sums on the host, in Python integers and float64: int32 overflows after 29 batches
  of 16.8M tokens.

  total: {} for the first batch.
  """
  exact = lambda x: np.asarray(x, np.int64 if np.issubdtype(np.asarray(x).dtype, np.integer) else np.float64)
  return {name: total.get(name, 0) + exact(value) for name, value in part.items()}


def means(s: dict[str, Any]) -> dict[str, float]:
  """Returns figures per token and per byte from the sums, under the names that logs and reports use.

  A mixture of experts adds the load of the busiest expert over the mean load, in the layer where it is highest.
  """
  s = dict(s)
  load_LE = s.pop('expert_load', None)
  s = {name: float(value) for name, value in s.items()}
  tokens = max(s['tokens'], 1.0)
  of_experts = {} if load_LE is None else {
    'expert_load_max_over_mean': float((load_LE.max(-1) / np.maximum(load_LE.mean(-1), 1e-9)).max()),
    'router_entropy_nats': s['router_entropy'] / tokens,
    'balance_loss': s['balance_loss'] / tokens,
  }
  return {
    'loss_nats': s['loss'] / tokens,
    'ce_nats': s['ce'] / tokens,
    'bits_per_byte': s['ce'] / max(s['bytes'], 1.0) / math.log(2),
    'entropy_nats': s['entropy'] / tokens,
    'rank1_accuracy': s['rank1'] / tokens,
    **{name: s[name] / tokens for name in ('head_mass', 'tail_mass') if name in s},
    'tokens': s['tokens'],
    **of_experts,
  }
