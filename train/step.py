"""One update: (state, batch) -> (state, metrics), a pure function, jitted."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from betarank.data import Batch
from betarank.model import ModelConfig, update_router_bias
from betarank.objectives import ObjectiveConfig
from betarank.runtime.state import TrainState, compiler_options, donated
from betarank.train.score import score_routed, sums


def make_step(
  c: ModelConfig,
  objective: ObjectiveConfig,
  tx: optax.GradientTransformation,
  bytes_per_token_V: np.ndarray,
  microbatches: int = 1,
  stats: str = 'full',
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """Returns the jitted update; its metrics are sums (train/score.py), the norm of the whole gradient, and where a
  router's bias evens out the load of experts, that bias's range.

  stats: 'basic' spares the top k where no lambda needs it (train/score.py).
  The loss is the sum over the batch's targets, divided once by their number; microbatches add up exact parts of
  it, so neither they nor packing nor the mesh change what is learned.
  """
  bytes_V = jnp.asarray(bytes_per_token_V, jnp.int32)

  def part(params, batch: Batch, targets, shaping):
    total, loss_BT, token_stats, routing = score_routed(c, params, batch, shaping, stats)
    return total / targets, sums(batch, loss_BT, token_stats, bytes_V, routing)

  def step(state: TrainState, batch: Batch):
    targets = jnp.maximum(jnp.sum(batch.segments_BT > 0), 1)
    shaping = objective.at(state.step)
    grad = jax.grad(part, has_aux=True)

    if microbatches == 1:
      grads, metrics = grad(state.params, batch, targets, shaping)
    else:
      # Row i goes to part i % microbatches, so that each part has rows of every device and none move.
      parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
      add = lambda total, one: (jax.tree.map(jnp.add, total, grad(state.params, one, targets, shaping)), None)
      first = jax.tree.map(lambda x: x[0], parts)
      # Closed over, as in the loop: a lambda of 0 that is traced is no 0, and asks for other statistics.
      shapes = jax.eval_shape(lambda params, one: grad(params, one, targets, shaping), state.params, first)
      zeros = jax.tree.map(jnp.zeros_like, shapes)
      (grads, metrics), _ = jax.lax.scan(add, zeros, parts)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics['grad_norm'] = optax.tree.norm(grads)
    if c.moe.experts and c.moe.router == 'sigmoid':
      params, bias_LE = update_router_bias(c, params, metrics['expert_load'])
      metrics |= {'router_bias_min': bias_LE.min(), 'router_bias_max': bias_LE.max()}
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

  return jax.jit(step, donate_argnums=donated(), compiler_options=compiler_options())


def make_evaluate(c: ModelConfig, objective: ObjectiveConfig, bytes_per_token_V: np.ndarray) -> Callable:
  """Returns the jitted (state, batch) -> sums: the same figures as in training, without an update."""
  bytes_V = jnp.asarray(bytes_per_token_V, jnp.int32)

  def evaluate(state: TrainState, batch: Batch):
    _, loss_BT, stats, routing = score_routed(c, state.params, batch, objective.at(state.step))
    return sums(batch, loss_BT, stats, bytes_V, routing)

  return jax.jit(evaluate)
