"""Connects the model with the objective. All code that needs probabilities of text gets them here.

Pre-training, validation, RL, the probe, the harness and the sampler all call this module, so their probabilities are
always computed in the same way.

    total               the summed loss, for training
    log_probabilities   log-probability and entropy of each token, for RL
    token_stats         log-probability, entropy, rank, head mass and tail mass of each token, for evaluation
    logits              the logits of given hidden states, for the sampler

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
  """Returns the Layout of the head's arrays on the current mesh (see model/sharding.py), or None if there is no mesh.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return None
  return Layout(
    tokens=(model.RULES['batch'], model.RULES['length']), width=model.RULES['embed'], vocab=model.RULES['vocab'])


def total(
  c: model.ModelConfig, params: Any, batch: Batch, shaping: RewardShaping, stats: str = 'full'
) -> tuple[jax.Array, jax.Array, TokenStats, model.Routing | None]:
  """Computes the summed loss of a batch, which can be differentiated, and the statistics of its tokens.

  Args:
    c, params: the model and its parameters.
    batch: the tokens. Where batch.counted_BT is False, as in padding, the loss and the statistics are 0.
    shaping: the objective, from ObjectiveConfig.at(step).
    stats: 'full' computes all statistics. 'basic' leaves out the top-k search, so head_mass and tail_mass are None. If
      a lambda of the objective may be nonzero, the loss needs the search, and these two fields are computed anyway.

  Returns (total, loss_BT, statistics [B, T], routing). Losses are float32, in nats. The total includes the load-balance
  loss of a mixture of experts, and loss_BT doesn't. routing is None for a dense model.
  """
  hidden_BTD, _, routing = model.forward_routed(c, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
  summed, loss_BT, statistics = shaped_linear_total(
    hidden_BTD, model.head(c, params), batch.targets_BT, shaping, weights=batch.counted_BT, stats=stats,
    layout=layout())
  if c.moe.balance_weight:
    balance = jnp.mean(routing.balance_L)
    if batch.counts_BT is not None:  # it is a sum over all tokens, but will be divided by the targets that count
      balance *= jnp.sum(batch.counted_BT) / jnp.maximum(jnp.sum(batch.segments_BT > 0), 1)
    summed += c.moe.balance_weight * balance
  return summed, loss_BT, statistics, routing


def log_probabilities(
  c: model.ModelConfig, params: Any, batch: Batch, choices_BTLk: jax.Array | None = None, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
  """Returns (log-probability of each target, entropy at each position), [B, T] float32 nats, 0 in padding.

  Gradients flow through the log-probabilities.

  choices_BTLk: the experts that the sampler used for each token. None means that the router chooses the experts again;
    because of rounding, it may choose other experts than in the sampler.
  temperature: the logits are divided by this number, as in the sampler.
  """
  choices_LBTk = None if choices_BTLk is None else jnp.moveaxis(choices_BTLk, 2, 0).astype(jnp.int32)
  hidden_BTD, _, _ = model.forward_routed(
    c, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT, None, choices_LBTk)
  loss_BT, statistics = shaped_linear_loss(
    hidden_BTD, model.head(c, params), batch.targets_BT, RewardShaping(), weights=batch.segments_BT > 0,
    temperature=temperature, layout=layout())
  return -loss_BT, statistics.entropy


def token_stats(c: model.ModelConfig, params: Any, batch: Batch, top_k: int) -> tuple[TokenStats, jax.Array]:
  """Returns (statistics [B, T], hidden_BTD).

  The statistics have no gradient. They are 0 where batch.counted_BT is False.

  top_k: the number of most probable tokens that form the head, for head mass and tail mass.
  """
  hidden_BTD = model.forward(c, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)[0]
  statistics = linear_token_stats(
    hidden_BTD, model.head(c, params), batch.targets_BT, top_k=top_k, weights=batch.counted_BT, layout=layout())
  return statistics, hidden_BTD


def leading_two(c: model.ModelConfig, params: Any, hidden_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (log p1, log p1 - log p2), [B, T] float32 nats.

  At each position, p1 is the largest probability of a token, and p2 the second largest.
  """
  return objectives.leading_two(hidden_BTD, model.head(c, params), layout())


def logits(c: model.ModelConfig, hidden: jax.Array, head_DV: jax.Array, temperature: float = 1.0) -> jax.Array:
  """Returns the float32 logits [..., V] of hidden states [..., D], divided by `temperature`.

  The loss computes its logits with the same matrix product.
  """
  return linear_logits(hidden, head_DV, temperature=temperature, compute_dtype=c.dtype)


def sums(
  batch: Batch, loss_BT: jax.Array, stats: TokenStats, bytes_per_token_V: np.ndarray,
  routing: model.Routing | None = None,
) -> dict[str, jax.Array]:
  """Returns sums over the targets of a batch, from which `means` computes the figures to log.

  Targets for which batch.counted_BT is False are left out. `add` adds the sums of several batches. Counts of tokens and
  bytes are int32, because float32 can't count past 16 million.
  """
  of_experts = {} if routing is None else {
    'expert_load': routing.load_LE,
    'routed_tokens': jnp.sum(batch.segments_BT > 0, dtype=jnp.int32),
    'router_entropy': jnp.mean(routing.entropy_L),
    'balance_loss': jnp.mean(routing.balance_L),
  }
  mask_BT = batch.counted_BT
  total = lambda x_BT: jnp.sum(x_BT, where=mask_BT)
  return {
    'loss': total(loss_BT),
    'ce': total(-stats.target_logp),
    'entropy': total(stats.entropy),
    'rank1': total((stats.target_rank == 0).astype(jnp.float32)),
    'tokens': jnp.sum(mask_BT, dtype=jnp.int32),
    'bytes': total(jnp.asarray(bytes_per_token_V)[batch.targets_BT]),
    'invalid': jnp.sum(mask_BT & ~stats.target_valid, dtype=jnp.int32),
    **({} if stats.tail_mass is None else {'head_mass': total(stats.head_mass), 'tail_mass': total(stats.tail_mass)}),
    **of_experts,
  }


def add(total: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
  """Adds the sums of one batch to a running total, on the host.

  Integers are added as int64 and floats as float64. In int32, the count of bytes would overflow after 29 batches of
  16.8M tokens.

  total: the running total; {} for the first batch.
  """
  exact = lambda x: np.asarray(x, np.int64 if np.issubdtype(np.asarray(x).dtype, np.integer) else np.float64)
  return {name: total.get(name, 0) + exact(value) for name, value in part.items()}


def means(s: dict[str, Any]) -> dict[str, float]:
  """Computes figures per token and per byte from the result of `sums`. They have the names that logs and reports use.

  For a mixture of experts, the figures include `expert_load_max_over_mean`: the load of the busiest expert divided by
  the mean load, in the layer where this ratio is largest.

  s: the result of `sums` for one batch, or of `add` for several.
  """
  s = dict(s)
  load_LE = s.pop('expert_load', None)
  s = {name: float(value) for name, value in s.items()}
  tokens = max(s['tokens'], 1.0)
  of_experts = {} if load_LE is None else {
    'expert_load_max_over_mean': float((load_LE.max(-1) / np.maximum(load_LE.mean(-1), 1e-9)).max()),
    'router_entropy_nats': s['router_entropy'] / max(s['routed_tokens'], 1.0),
    'balance_loss': s['balance_loss'] / max(s['routed_tokens'], 1.0),
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
