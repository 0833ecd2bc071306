"""Builds one update of pre-training: (state, batch) -> (state, metrics), a pure function, jitted."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from betarank.data import Batch
from betarank.model import ModelConfig, update_router_bias
from betarank.objectives import ObjectiveConfig
from betarank.runtime.state import TrainState, compiler_options, donated
from betarank.train import score


def make_step(
  c: ModelConfig,
  objective: ObjectiveConfig,
  tx: optax.GradientTransformation,
  bytes_per_token_V: np.ndarray,
  microbatches: int = 1,
  stats: str = 'full',
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """Returns the jitted update. Its metrics are sums (train/score.py), the norm of the whole gradient and, where a
  router's bias balances the load, the range of that bias.

  Args:
    c, objective, tx: model, objective and optimizer.
    bytes_per_token_V: UTF-8 bytes of each token.
    microbatches: parts in which a batch is computed. Row i is in part i % microbatches.
    stats: 'full', or 'basic' to skip the top k where no lambda needs it.

  The loss is the sum over the batch's targets, divided once by their number. Microbatches are exact parts of that sum,
  so neither they nor packing nor the mesh change what is learned. The exception is the load-balance loss of a softmax
  router, which is a mean over microbatches of each one's own balance.
  """
  bytes_V = jnp.asarray(bytes_per_token_V, jnp.int32)

  def part(params, batch: Batch, targets, shaping):
    total, loss_BT, token_stats, routing = score.total(c, params, batch, shaping, stats)
    return total / targets, score.sums(batch, loss_BT, token_stats, bytes_V, routing)

  def step(state: TrainState, batch: Batch):
    targets = jnp.maximum(jnp.sum(batch.segments_BT > 0), 1)
    shaping = objective.at(state.step)
    grad = jax.grad(part, has_aux=True)

    if microbatches == 1:
      grads, metrics = grad(state.params, batch, targets, shaping)
    else:
      # Each part has rows of every device, and none of them move.
      parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
      add = lambda total, one: (jax.tree.map(jnp.add, total, grad(state.params, one, targets, shaping)), None)
      first = jax.tree.map(lambda x: x[0], parts)
      # `shaping` is closed over here as in the loop: a traced lambda isn't known to be 0, and needs other statistics.
      shapes = jax.eval_shape(lambda params, one: grad(params, one, targets, shaping), state.params, first)
      zeros = jax.tree.map(jnp.zeros_like, shapes)
      (grads, metrics), _ = jax.lax.scan(add, zeros, parts)

    with jax.named_scope('optimizer'):
      updates, opt_state = tx.update(grads, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
      metrics['grad_norm'] = optax.tree.norm(grads)
    if c.moe.experts and c.moe.router == 'sigmoid':
      params, bias_LE = update_router_bias(c, params, metrics['expert_load'])
      metrics |= {'router_bias_min': bias_LE.min(), 'router_bias_max': bias_LE.max()}
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

  return jax.jit(step, donate_argnums=donated(), compiler_options=compiler_options())


def make_evaluate(c: ModelConfig, objective: ObjectiveConfig, bytes_per_token_V: np.ndarray) -> Callable:
  """Returns the jitted (state, batch) -> sums (train/score.py): the figures of training, without an update."""
  bytes_V = jnp.asarray(bytes_per_token_V, jnp.int32)

  def evaluate(state: TrainState, batch: Batch):
    _, loss_BT, stats, routing = score.total(c, state.params, batch, objective.at(state.step))
    return score.sums(batch, loss_BT, stats, bytes_V, routing)

  return jax.jit(evaluate)
