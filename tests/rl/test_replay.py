"""Tests that the sampler's choices of experts are recorded and replayed in the trainer, so that both agree on every
token.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from betarank import model
from betarank.rl import loop
from betarank.rl.packing import Answer, microbatches
from betarank.rl.policy_losses import PolicyLossConfig
from betarank.rl.update import make_update
from betarank.runtime.state import create_state
from betarank.train.optimizer import OptimizerConfig, make_optimizer
from betarank.train.sampler import Prompt, Sample, Sampler, SamplerConfig
from betarank.train.score import log_probabilities
from tests import parameters

C = model.ModelConfig(
  vocab_size=32, layers=2, d_model=32, d_ff=48, heads=4, kv_heads=2, head_dim=8, rope_base=1e4, norm_eps=1e-6,
  tied_embeddings=True, compute_dtype='float32', remat_policy='none', scan_layers=True,
  moe=model.MoeConfig(experts=8, experts_per_token=2, expert_d_ff=16))
ADAMW = OptimizerConfig(lr=1e-3, warmup_steps=0, decay_fraction=0.0, final_lr=0.0, b1=0.9, b2=0.95, eps=1e-8,
                        weight_decay=0.1, clip_norm=1.0)
PROMPTS = [Prompt(0, [3, 1, 4, 1, 5]), Prompt(1, [9, 2])]


@pytest.mark.parametrize('shape', [(1, 1, 1, 1, 1), pytest.param((1, 2, 2, 1, 2), marks=pytest.mark.slow)])
def test_the_trainer_replays_what_the_sampler_chose(shape):
  mesh = model.make_mesh(model.MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
  with jax.set_mesh(mesh):
    tx = make_optimizer(ADAMW, 10, model.abstract(C)[2])
    state = create_state(C, tx, mesh, seed=0, params=parameters.random(C))
  sampler = Sampler(C, SamplerConfig(4, 8, 7, record_choices=True), eos=0, mesh=mesh)
  drawn = sorted(sampler(state.params, PROMPTS, samples=4, seed=1, step=0), key=lambda group: group[0].prompt_id)
  answers = [Answer(list(p.tokens), sample, advantage) for p, samples in zip(PROMPTS, drawn)
             for sample, advantage in zip(samples, [1.0, -1.0] * 2)]
  for answer in answers:
    assert answer.sample.choices.shape == (answer.length, C.layers, 2)

  with jax.set_mesh(mesh):
    rows = jax.NamedSharding(mesh, model.spec('batch', 'length'))
    [out] = microbatches(answers, [(8, 24)], rows)
    logp_BT = np.asarray(jax.jit(log_probabilities, static_argnums=0)(C, state.params, out.batch, out.choices_BTLk)[0])
    host, sampler_logp_BT, choices_BTLk = jax.device_get((out.batch, out.sampler_logp_BT, out.choices_BTLk))
    np.testing.assert_allclose(logp_BT[host.counts_BT], sampler_logp_BT[host.counts_BT], atol=2e-5)
    own = jax.jit(model.forward_routed, static_argnums=0)(
      C, state.params, out.batch.tokens_BT, out.batch.positions_BT, out.batch.segments_BT)[2]
    real_BT = host.segments_BT > 0
    assert host.segments_BT.max() > 1 and choices_BTLk.dtype == np.int16
    np.testing.assert_array_equal(np.moveaxis(np.asarray(own.choices_LBTk), 0, 2)[real_BT], choices_BTLk[real_BT])
    # Others than its own give other probabilities: it is the recorded ones that count.
    other = jax.jit(log_probabilities, static_argnums=0)(C, state.params, out.batch, (out.choices_BTLk + 1) % 8)[0]
    assert np.abs(np.asarray(other) - logp_BT)[host.counts_BT].max() > 1e-3

    after, [sums], _ = make_update(C, PolicyLossConfig(), tx)(state, [out])
  assert sums['gap_max'] < 1e-4
  bias = lambda state: np.asarray(state.params['layers']['feed_forward']['router_bias_E'])
  np.testing.assert_array_equal(bias(after), bias(state))


def test_a_step_of_two_updates_has_the_figures_of_its_samples():
  """The recorded experts aren't the router's own, so log-probabilities are right only if all functions replay them."""
  rng, temperature = np.random.default_rng(0), 0.7
  loss = PolicyLossConfig(aggregation='sequence_mean', importance_cap=0.0)
  answers = []
  for i in range(12):
    prompt, n = rng.integers(1, 32, rng.integers(2, 6)).tolist(), rng.integers(1, 12)
    experts = np.argsort(rng.random((len(prompt) + n - 1, C.layers, 8)))[..., :2].astype(np.int16)
    sample = Sample(0, i, rng.integers(0, 32, n).astype(np.int32), rng.normal(-3, 0.1, n), 'eos', experts)
    answers.append(Answer(prompt, sample, rng.normal()))
  mesh = model.make_mesh(model.MeshConfig(1, 1, 1, 1, 1), jax.devices()[:1])
  params, tx = parameters.random(C), optax.sgd(3.0)
  parts = types.SimpleNamespace(
    run=types.SimpleNamespace(rl=types.SimpleNamespace(minibatches=2, loss=loss), model=C, seed=0),
    update=make_update(C, loss, tx, temperature),
    log_probabilities=jax.jit(functools.partial(log_probabilities, temperature=temperature), static_argnums=0))
  with jax.set_mesh(mesh):
    rows = jax.NamedSharding(mesh, model.spec('batch', 'length'))
    batches = [microbatches(part, [(8, 24)], rows) for part in (answers[:6], answers[6:])]
    learn = lambda batches: loop.learn(parts, create_state(C, tx, mesh, seed=0, params=params), batches, 1)[1]
    first, both = learn(batches[:1]), learn(batches)
    [[part]] = batches[:1]
    hidden_BTD = model.forward_routed(
      C, params, part.batch.tokens_BT, part.batch.positions_BT, part.batch.segments_BT, None,
      jnp.moveaxis(part.choices_BTLk, 2, 0).astype(jnp.int32))[0]
    logp_BTV = jax.nn.log_softmax(hidden_BTD @ model.head(C, params) / temperature)
  entropies = np.sort(np.asarray(-jnp.sum(jnp.exp(logp_BTV) * logp_BTV, -1))[np.asarray(part.batch.counts_BT)])
  assert first['ratio_mean'] == pytest.approx(1, abs=1e-6) and first['clip_fraction'] == 0
  assert first['policy_loss'] == pytest.approx(-np.mean([answer.advantage for answer in answers[:6]]), rel=1e-5)
  assert first['entropy_nats'] == pytest.approx(entropies.mean(), rel=1e-5)
  assert first['entropy_top20_nats'] == pytest.approx(entropies[-round(len(entropies) / 5) :].mean(), abs=3e-4)
  assert first['padded_share'] == pytest.approx(1 - sum(answer.length for answer in answers[:6]) / (8 * 24))
  assert abs(both['ratio_mean'] - 1) > 1e-3  # in the second update, of the policy that the first one made


def test_a_dense_model_and_a_sampler_that_is_not_asked_record_nothing():
  sampler = Sampler(C, SamplerConfig(2, 8, 3), eos=0)
  assert next(sampler(parameters.random(C), PROMPTS[:1], samples=2, seed=1, step=0))[0].choices is None
