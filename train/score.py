"""Where model and objective meet: a batch in, a loss and the token statistics out.

Pre-training, validation and whatever else asks how likely a text is go through here, so they can't disagree.

# B rows  T tokens  L layers  E experts
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from betarank import model
from betarank.data import Batch
from betarank.objectives import Layout, RewardShaping, TokenStats, shaped_linear_total

# How the head's arrays lie on the mesh, in the words of model/sharding.py's table.
LAYOUT = Layout(
  tokens=(model.RULES['batch'], model.RULES['length']), width=model.RULES['embed'], vocab=model.RULES['vocab'])


def score_routed(
  c: model.ModelConfig, params: Any, batch: Batch, shaping: RewardShaping, stats: str = 'full'
) -> tuple[jax.Array, jax.Array, TokenStats, model.Routing | None]:
  """(total, loss_BT, statistics [B, T], routing): the summed loss, which can be differentiated, and its parts, in nats.

  shaping: the objective, as ObjectiveConfig.at(step) gives it.
  stats: 'basic' leaves the top k out, and head and tail mass with it, where no lambda needs them.
  Padding (segment 0) counts for nothing, whatever stands there: its loss and statistics are 0. The total, not loss_BT,
  has the load-balance loss of a mixture of experts in it; a dense model has no routing.
  """
  hidden_BTD, _, routing = model.forward_routed(c, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
  total, loss_BT, token_stats = shaped_linear_total(
    hidden_BTD, model.head(c, params), batch.targets_BT, shaping, weights=batch.segments_BT > 0, stats=stats,
    layout=None if jax.sharding.get_abstract_mesh().empty else LAYOUT)
  if c.moe.balance_weight:
    total += c.moe.balance_weight * jnp.mean(routing.balance_L)
  return total, loss_BT, token_stats, routing


def score(
  c: model.ModelConfig, params: Any, batch: Batch, shaping: RewardShaping
) -> tuple[jax.Array, jax.Array, TokenStats]:
  """(total, loss_BT, statistics [B, T]) of `score_routed`."""
  return score_routed(c, params, batch, shaping)[:3]


def sums(
  batch: Batch, loss_BT: jax.Array, stats: TokenStats, bytes_per_token_V: jax.Array,
  routing: model.Routing | None = None,
) -> dict[str, jax.Array]:
  """What a batch adds up to; sums of several batches add, and `means` divides once, at the end.

  Counts of tokens and bytes are int32: float32 can't count past 16 million.
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


def means(s: dict[str, Any]) -> dict[str, float]:
  """Per token and per byte, from the sums: the names that logs and reports use.

  Of a mixture of experts also the load of the busiest expert over the mean one, in the layer where it is highest.
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
