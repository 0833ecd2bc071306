"""Builds one policy-gradient update, which computes a new state from a state and microbatches of samples.

# B rows  T tokens
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from betarank import model
from betarank.model import ModelConfig
from betarank.model.sharding import constrain
from betarank.rl import entropy
from betarank.rl.packing import Microbatch
from betarank.rl.policy_losses import PolicyLossConfig, clip_cov_tokens, kl_cov_tokens, policy_loss
from betarank.runtime.state import TrainState, compiler_options, donated
from betarank.train import score


@functools.partial(jax.jit, static_argnums=0)
def cov_tokens(
  loss: PolicyLossConfig, key: jax.Array, microbatches: Sequence[Microbatch], old_logps: Sequence[jax.Array]
) -> list[jax.Array]:
  """Returns the tokens that the method `loss.cov` selects, as one bool array [B, T] per microbatch.

  The method selects once per update, among the tokens of all its microbatches.

  key: the random key of the update for 'clip_cov'. Each token gets a key of its own, made from this key and the token's
    number (Microbatch.numbers_BT). 'kl_cov' uses no random numbers.
  old_logps: for each microbatch, the log-probabilities before the update.
  """
  join = lambda arrays: jnp.concatenate([x.reshape(1, -1) for x in arrays], 1)
  known = (join(old_logps), join(m.advantages_BT for m in microbatches), join(m.batch.counted_BT for m in microbatches))
  if loss.cov == 'kl_cov':
    chosen = kl_cov_tokens(*known, share=loss.cov_share)
  else:
    uniform = lambda number: jax.random.uniform(jax.random.fold_in(key, number))
    noise = jax.vmap(uniform)(join(m.numbers_BT for m in microbatches)[0])[None]
    chosen = clip_cov_tokens(*known, noise, share=loss.cov_share)
  found, first = [], 0
  for logp_BT in old_logps:
    these = chosen[0, first : first + logp_BT.size].reshape(logp_BT.shape)
    found.append(constrain(these, 'batch', 'length'))
    first += logp_BT.size
  return found


class Update(NamedTuple):
  """The three jitted programs of an update. Calling an Update runs them on all microbatches of an update.

      zeros(params) -> gradients
      gradient(params, gradients, microbatch, old_logp_BT, ref_logp_BT, cov_tokens_BT) -> (gradients, sums)
      apply(state, gradients) -> (state, the gradient's norm)

  gradients: a pair (sum, count) over all microbatches so far. The sum of their gradients is a pytree like params. The
    count is that of `policy_losses.policy_loss`. `apply` divides the sum by the count.
  sums: {name: sum over the microbatch, or maximum if the name ends in _max}. `policy_losses.add` combines the sums of
    two microbatches. From the total, `policy_losses.means` and rl/loop.py compute the figures to log.
  """

  zeros: Callable
  gradient: Callable
  apply: Callable

  def __call__(
    self, state: TrainState, microbatches: Sequence[Microbatch], old_logps: Sequence[Any] | None = None,
    ref_logps: Sequence[Any] | None = None, chosen: Sequence[Any] | None = None,
  ) -> tuple[TrainState, list[dict[str, jax.Array]], jax.Array]:
    """Computes one update. Returns (the new state, the sums of each microbatch, the norm of the gradient).

    Args:
      state: the training state before the update.
      microbatches: the samples.
      old_logps: for each microbatch, the log-probabilities before the first update on these samples. None for an
        on-policy update, whose ratio is 1.
      ref_logps: for each microbatch, the log-probabilities of the KL reference. Required if the loss that was passed to
        `make_update` has a KL term.
      chosen: the result of `cov_tokens`. Required if this loss has `cov` set.
    """
    none = [None] * len(microbatches)
    gradients, sums = self.zeros(state.params), []
    for arrays in zip(microbatches, old_logps or none, ref_logps or none, chosen or none, strict=True):
      gradients, of_part = self.gradient(state.params, gradients, *arrays)
      sums.append(of_part)
    state, norm = self.apply(state, gradients)
    return state, sums, norm


def make_update(
  c: ModelConfig, loss: PolicyLossConfig, tx: optax.GradientTransformation, temperature: float = 1.0
) -> Update:
  """Returns the update of one minibatch.

  The loss is a sum over the minibatch, divided once at the end (see `policy_losses.aggregate`). Therefore neither the
  number of microbatches nor the packing of samples changes the result. The update doesn't change router biases.

  temperature: the sampler's temperature. The policy's log-probabilities are computed at the same temperature.
  """
  axes = model.abstract(c)[2]

  def pinned(gradients):  # sharded like the parameters, in all programs
    of_params = jax.tree.map(lambda names, x: constrain(x, *names), axes, gradients[0],
                             is_leaf=lambda names: isinstance(names, tuple))
    return of_params, constrain(gradients[1])

  def zeros(params):
    return pinned((jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32)))

  def part(params, microbatch: Microbatch, old_logp_BT, ref_logp_BT, cov_tokens_BT):
    batch = microbatch.batch
    logp_BT, entropy_BT = score.log_probabilities(c, params, batch, microbatch.choices_BTLk, temperature)
    old_logp_BT = jax.lax.stop_gradient(logp_BT) if old_logp_BT is None else old_logp_BT
    mask_BT = batch.counted_BT
    total, count, sums = policy_loss(
      loss, logp_BT, old_logp_BT, microbatch.advantages_BT, mask_BT, segments_BT=batch.segments_BT,
      sampler_logp_BT=microbatch.sampler_logp_BT, ref_logp_BT=ref_logp_BT, cov_tokens_BT=cov_tokens_BT)
    sums |= {
      'loss': jax.lax.stop_gradient(total),
      'count': count,
      'entropy': jnp.sum(entropy_BT, where=mask_BT),
      # In full on every host, as the other sums.
      'entropy_histogram': constrain(entropy.histogram(entropy_BT, mask_BT, c.vocab_size), None),
      'filled': jnp.sum(batch.segments_BT > 0, dtype=jnp.int32),
    }
    return total, (count, sums)

  def gradient(params, gradients, *arrays):
    found, (count, sums) = jax.grad(part, has_aux=True)(params, *arrays)
    return pinned((jax.tree.map(jnp.add, gradients[0], found), gradients[1] + count)), sums

  def apply(state: TrainState, gradients):
    with jax.named_scope('optimizer'):
      grads = jax.tree.map(lambda x: x / jnp.maximum(gradients[1], 1), gradients[0])
      updates, opt_state = tx.update(grads, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
      norm = optax.tree.norm(grads)
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), norm

  options = compiler_options()
  return Update(
    jax.jit(zeros), jax.jit(gradient, donate_argnums=1, compiler_options=options),
    jax.jit(apply, donate_argnums=donated(), compiler_options=options))
