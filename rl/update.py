"""Builds one policy-gradient update: a pure, jitted function from a state and rollouts to a new state.

# B rows  T tokens  L layers  k experts per token
"""

import functools

import jax
import jax.numpy as jnp
import optax

from betarank.model import ModelConfig
from betarank.model.sharding import constrain
from betarank.rl.policy_losses import PolicyLossConfig, add, aggregate, clip_cov_tokens, kl_cov_tokens, policy_loss
from betarank.runtime.state import TrainState, compiler_options, donated
from betarank.train import score


@functools.partial(jax.jit, static_argnums=0)
def cov_tokens(loss: PolicyLossConfig, key: jax.Array, old_logp_BT, advantages_B, completion_BT) -> jax.Array:
  """Returns bool [B, T]: the tokens that `loss.cov` selects.

  key: a random key, which only 'clip_cov' uses.
  """
  if loss.cov == 'kl_cov':
    return kl_cov_tokens(old_logp_BT, advantages_B[:, None], completion_BT, share=loss.cov_share)
  noise_BT = jax.random.uniform(key, completion_BT.shape)
  return clip_cov_tokens(old_logp_BT, advantages_B[:, None], completion_BT, noise_BT, share=loss.cov_share)


def make_update(
  c: ModelConfig, loss: PolicyLossConfig, tx: optax.GradientTransformation, microbatches: int, temperature: float = 1.0
):
  """Returns the jitted update of one minibatch.

      update(state, batch, completion_BT, sampler_logp_BT, advantages_B, old_logp_BT=None, ref_logp_BT=None,
             cov_tokens_BT=None, choices_BTLk=None) -> (state, sums, entropy_BT)

  completion_BT is bool, True for the tokens that count in the loss. sums are the input of `policy_losses.means`.
  entropy_BT is in nats, and replicated on all devices.

  The last four arguments may be None:
    old_logp_BT: the log-probabilities before the first update on these samples. None for an on-policy update, whose
      ratio is 1.
    ref_logp_BT: the log-probabilities of the KL reference. Required if loss.kl_weight > 0.
    cov_tokens_BT: the result of `cov_tokens`. Required if loss.cov is set.
    choices_BTLk: the experts that the sampler used for each token. None for a dense model.

  temperature: the sampler's temperature. The policy's log-probabilities are computed at the same temperature.

  The loss is a sum over the minibatch that is divided once, so the number of microbatches doesn't change the result.
  The update doesn't change router biases.
  """

  def update(state: TrainState, batch, completion_BT, sampler_logp_BT, advantages_B, old_logp_BT=None, ref_logp_BT=None,
             cov_tokens_BT=None, choices_BTLk=None):
    count = jnp.maximum(aggregate(jnp.zeros_like(sampler_logp_BT), completion_BT, loss.aggregation,
                                  constant=max(loss.constant, 1))[1], 1)

    def part(params, piece):
      batch, completion_BT, sampler_logp_BT, advantages_B, old_logp_BT, ref_logp_BT, cov_tokens_BT, choices_BTLk = piece
      logp_BT, entropy_BT = score.log_probabilities(c, params, batch, choices_BTLk, temperature)
      old_logp_BT = jax.lax.stop_gradient(logp_BT) if old_logp_BT is None else old_logp_BT
      total, _, sums = policy_loss(
        loss, logp_BT, old_logp_BT, advantages_B[:, None], completion_BT, sampler_logp_BT=sampler_logp_BT,
        ref_logp_BT=ref_logp_BT, cov_tokens_BT=cov_tokens_BT)
      sums['loss'] = jax.lax.stop_gradient(total) / count
      sums['entropy'] = jnp.sum(entropy_BT, where=completion_BT)
      return total / count, (sums, entropy_BT)

    grad = jax.grad(part, has_aux=True)
    pieces = (batch, completion_BT, sampler_logp_BT, advantages_B, old_logp_BT, ref_logp_BT, cov_tokens_BT,
              choices_BTLk)
    if microbatches == 1:
      grads, (sums, entropy_BT) = grad(state.params, pieces)
    else:
      # Row i is in microbatch i % microbatches, as in train/step.py.
      split = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), pieces)
      first = jax.tree.map(lambda x: x[0], split)
      zero_grads, (zero_sums, _) = jax.tree.map(jnp.zeros_like, jax.eval_shape(grad, state.params, first))

      def accumulate(carry, piece):
        grads, (sums, entropy_BT) = grad(state.params, piece)
        return (jax.tree.map(jnp.add, carry[0], grads), add(carry[1], sums)), entropy_BT

      (grads, sums), entropy = jax.lax.scan(accumulate, (zero_grads, zero_sums), split)
      entropy_BT = entropy.swapaxes(0, 1).reshape(completion_BT.shape)

    with jax.named_scope('optimizer'):
      updates, opt_state = tx.update(grads, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
      sums['grad_norm'] = optax.tree.norm(grads)
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), sums, constrain(entropy_BT, None, None)

  return jax.jit(update, donate_argnums=donated(), compiler_options=compiler_options())
