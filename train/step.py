"""Builds one update of pre-training: a pure, jitted function (state, batch) -> (state, metrics)."""

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
  """Returns the jitted update of pre-training, a function (state, batch) -> (new state, metrics).

  The loss is a sum over the targets for which batch.counted_BT is True, divided once by the number of these targets.
  Microbatches, packing and mesh therefore don't change what is learned. The only exception is the load-balance loss of
  a softmax router, which is computed within each microbatch and then averaged over tokens.

  The metrics are the sums of train/score.py and the norm of the gradient before clipping. For a router with a
  load-balancing bias, they include the smallest and the largest bias.

  Args:
    c, objective, tx: the model, the objective and the optimizer.
    bytes_per_token_V: int [V], the number of UTF-8 bytes of each of the V tokens of the vocabulary.
    microbatches: the number of parts into which the rows of a batch are divided. Row i is in part i % microbatches.
    stats: 'full' computes all statistics. 'basic' leaves out head_mass and tail_mass, unless a lambda of the objective
      needs the top k anyway.
  """
  bytes_V = np.asarray(bytes_per_token_V, np.int32)  # on the host: a device array would be read back to compile

  def part(params, batch: Batch, targets, shaping):
    total, loss_BT, token_stats, routing = score.total(c, params, batch, shaping, stats)
    return total / targets, score.sums(batch, loss_BT, token_stats, bytes_V, routing)

  def step(state: TrainState, batch: Batch):
    targets = jnp.maximum(jnp.sum(batch.counted_BT), 1)
    shaping = objective.at(state.step)
    grad = jax.grad(part, has_aux=True)

    if microbatches == 1:
      grads, metrics = grad(state.params, batch, targets, shaping)
    else:
      # Each microbatch takes rows from every device, so no row moves between devices.
      parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
      add = lambda total, one: (jax.tree.map(jnp.add, total, grad(state.params, one, targets, shaping)), None)
      first = jax.tree.map(lambda x: x[0], parts)
      # `shaping` isn't an argument here: it would be traced, and a traced lambda isn't known to be 0, which changes the
      # metrics.
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
  """Returns a jitted function (state, batch) -> the result of `score.sums` for this batch.

  The loss uses the objective's parameters at step `state.step`. The arguments are those of `make_step`.
  """
  bytes_V = np.asarray(bytes_per_token_V, np.int32)

  def evaluate(state: TrainState, batch: Batch):
    _, loss_BT, stats, routing = score.total(c, state.params, batch, objective.at(state.step))
    return score.sums(batch, loss_BT, stats, bytes_V, routing)

  return jax.jit(evaluate)
