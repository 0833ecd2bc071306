"""Tests an RL update: on-policy, it equals REINFORCE. Microbatches, devices, padding and packing don't change it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from betarank import model
from betarank.data import Batch
from betarank.rl.advantages import AdvantageConfig
from betarank.rl.packing import Answer, Microbatch, fill, microbatches
from betarank.rl.policy_losses import PolicyLossConfig, add, means
from betarank.rl.rewards import RewardRule
from betarank.rl.rollout import Group
from betarank.rl.update import cov_tokens, make_update
from betarank.runtime.state import create_state
from betarank.tasks.verifiers import Verdict
from betarank.train.optimizer import OptimizerConfig, make_optimizer
from betarank.train.sampler import Sample
from betarank.train.score import log_probabilities
from tests import parameters

C = model.ModelConfig(
  vocab_size=32, layers=2, d_model=32, d_ff=48, heads=4, kv_heads=2, head_dim=8, rope_base=1e4, norm_eps=1e-6,
  tied_embeddings=True, compute_dtype='float32', remat_policy='none', scan_layers=True)
TX = make_optimizer(OptimizerConfig(lr=1e-2, warmup_steps=0, decay_fraction=0.0, final_lr=0.0, b1=0.9, b2=0.95,
                                    eps=1e-8, weight_decay=0.0, clip_norm=1e9), 10, model.abstract(C)[2])
LOSS = PolicyLossConfig()
PARAMS = parameters.random(C)
ROWS, LENGTH = 8, 12


def rollouts(seed=0):
  """Returns (batch, completion_BT, sampler_logp_BT, advantages_BT). Rows have different lengths.

  completion_BT is True for the tokens of answers.
  """
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 32, (ROWS, LENGTH + 1)).astype(np.int32)
  n = 6 + np.arange(ROWS) % 6
  segments = (np.arange(LENGTH) < n[:, None]).astype(np.int32)
  completion = (segments > 0) & (np.arange(LENGTH) >= 3)
  positions = np.arange(LENGTH, dtype=np.int32) * segments
  batch = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), positions, segments)
  logp = np.where(completion, rng.normal(-3, 0.1, completion.shape), 0).astype(np.float32)
  return batch, completion, logp, np.repeat(rng.normal(size=(ROWS, 1)).astype(np.float32), LENGTH, 1)


def microbatch(data):
  batch, completion, logp, advantage = data
  return Microbatch(dataclasses.replace(batch, counts_BT=completion), logp, advantage, np.zeros_like(batch.tokens_BT))


scored = jax.jit(log_probabilities, static_argnums=0)
update_of = functools.cache(make_update)  # so that an update is compiled once


def run(data, *, parts=1, shape=(1, 1, 1, 1, 1), loss=LOSS, tx=TX, old_logp=None, ref_logp=None, cov=None):
  """Runs one update, and returns (change of the parameters, metrics, histogram of entropies).

  data: the result of `rollouts`, or a list of Microbatches. If it is a list, old_logp, ref_logp and cov are lists too.
  parts: the number of microbatches.
  shape: the shape of the mesh.
  """
  mesh = model.make_mesh(model.MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
  with jax.set_mesh(mesh):
    state = create_state(C, tx, mesh, seed=0, params=PARAMS)
    before = jax.device_get(state.params)
    if not isinstance(data, list):
      split = lambda x: None if x is None else [
        jax.tree.map(lambda x: x[i::parts], x) for i in range(parts)]  # noqa: B023
      data, old_logp, ref_logp, cov = map(split, (microbatch(data), old_logp, ref_logp, cov))
    data = jax.device_put(data, jax.NamedSharding(mesh, model.spec('batch', 'length')))
    state, sums, norm = update_of(C, loss, tx)(state, data, old_logp, ref_logp, cov)
    sums = functools.reduce(add, jax.device_get(sums))
    figures = {name: float(x) for name, x in means(loss, sums).items()}
    figures |= {'loss': float(sums['loss']) / max(sums['count'], 1), 'grad_norm': float(norm),
                'entropy': float(sums['entropy'])}
    return jax.tree.map(np.subtract, jax.device_get(state.params), before), figures, sums['entropy_histogram']


@pytest.fixture(scope='module')
def whole():
  return run(rollouts())


def same(a, b, tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * (np.abs(y).max() + 1e-9)), a, b)


def test_on_policy_the_ratio_is_one_and_nothing_is_clipped(whole):
  _, figures, _ = whole
  assert figures['ratio_mean'] == 1 and figures['clip_fraction'] == 0
  assert figures['sampler_gap_mean'] > 0  # these rollouts are of another sampler, and that is seen


@pytest.mark.parametrize('options', [{'parts': 4}, {'shape': (2, 2, 1, 1, 2)}])
def test_parts_and_devices_change_nothing(whole, options):
  change, figures, histogram = run(rollouts(), **options)
  assert figures == pytest.approx(whole[1], rel=1e-4)
  assert histogram.sum() == whole[2].sum() and np.abs(np.cumsum(histogram - whole[2])).max() <= 1
  same(change, whole[0], 5e-3)  # Adam's division makes rounding of near-zero gradients visible


def test_what_stands_outside_the_completions_changes_nothing(whole):
  batch, completion, logp, advantage = rollouts()
  padding = batch.segments_BT == 0
  batch.tokens_BT[padding], batch.targets_BT[padding] = 7, 10**6
  batch.targets_BT[~completion & ~padding] = 3  # the prompt's own targets
  change, figures, _ = run((batch, completion, np.where(completion, logp, np.nan).astype(np.float32), advantage))
  assert figures == whole[1]
  jax.tree.map(np.testing.assert_array_equal, change, whole[0])


def test_without_advantage_nothing_moves():
  batch, completion, logp, _ = rollouts()
  change, figures, _ = run((batch, completion, logp, np.zeros((ROWS, LENGTH), np.float32)))
  assert figures['grad_norm'] == 0
  assert all(not x.any() for x in jax.tree.leaves(change))


def test_the_gradient_is_reinforce():
  """Loss and gradient norm equal those of -mean(A logp), which is differentiated with all logits in memory."""
  batch, completion, _, advantage = rollouts()
  own = np.asarray(scored(C, PARAMS, batch)[0])

  def plain(params):
    hidden, _ = model.forward(C, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    logp = jax.nn.log_softmax(hidden @ model.head(C, params))
    logp = jnp.take_along_axis(logp, batch.targets_BT[..., None], -1)[..., 0]
    return -jnp.sum(advantage * logp, where=completion) / completion.sum()

  grads = jax.jit(jax.grad(plain))(PARAMS)
  norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
  _, figures, _ = run((batch, completion, own, advantage))
  assert figures['grad_norm'] == pytest.approx(norm, rel=1e-4)
  assert figures['sampler_gap_max'] < 1e-5  # the sampler here is the trainer


def test_without_a_weight_the_reference_changes_nothing(whole):
  change, figures, _ = run(rollouts(), ref_logp=np.full((ROWS, LENGTH), -1, np.float32))
  assert figures == whole[1] and 'kl_k2_nats' not in figures
  jax.tree.map(np.testing.assert_array_equal, change, whole[0])


@pytest.mark.parametrize('parts', [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_kl_gradient_by_finite_differences(parts):
  """A step of gradient descent with rate 1 changes the parameters by minus the gradient of weight · mean (logp -
  ref)²/2.

  Along three directions, this gradient must equal a difference quotient of the mean, computed with all logits in
  memory.
  """
  batch, completion, logp, _ = rollouts()
  ref = np.random.default_rng(1).normal(-3, 0.5, logp.shape).astype(np.float32)
  loss = PolicyLossConfig(kl_weight=0.5, importance_cap=0)
  change, figures, _ = run((batch, completion, logp, np.zeros((ROWS, LENGTH), np.float32)), parts=parts, loss=loss,
                           tx=optax.sgd(1.0), ref_logp=ref)

  @jax.jit
  def kl(params):
    hidden, _ = model.forward(C, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    own = jax.nn.log_softmax(hidden @ model.head(C, params))
    own = jnp.take_along_axis(own, batch.targets_BT[..., None], -1)[..., 0]
    return jnp.mean((own - ref) ** 2 / 2, where=completion)

  h = 1e-2
  assert figures['kl_k2_nats'] == pytest.approx(float(kl(PARAMS)), rel=1e-5)
  for seed in range(3):
    rng = np.random.default_rng(seed)
    along = jax.tree.map(lambda x: (rng.normal(size=x.shape) / np.sqrt(x.size)).astype(np.float32), PARAMS)  # noqa: B023
    at = lambda step: float(kl(jax.tree.map(lambda x, d: x + step * d, PARAMS, along)))  # noqa: B023
    slope = (at(-2 * h) - 8 * at(-h) + 8 * at(h) - at(2 * h)) / (12 * h)
    moved = sum(float(np.sum(c * d)) for c, d in zip(jax.tree.leaves(change), jax.tree.leaves(along)))
    assert moved == pytest.approx(-0.5 * slope, rel=2e-3, abs=1e-5)


def test_clip_cov_takes_its_tokens_out_of_the_gradient():
  """The chosen tokens have no gradient, as if their advantage were 0. They still count in the mean."""
  batch, completion, logp, advantage = rollouts()
  loss = PolicyLossConfig(cov='clip_cov', cov_share=0.1, importance_cap=0)
  old = scored(C, PARAMS, batch)[0]
  data = dataclasses.replace(
    microbatch((batch, completion, logp, advantage)), numbers_BT=np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH))
  choose = lambda seed: np.asarray(cov_tokens(loss, jax.random.key(seed), [data], [30 * old])[0])
  chosen = choose(0)
  assert 1 <= chosen.sum() <= 0.1 * completion.sum() and not (chosen & ~completion).any()
  assert (choose(0) == chosen).all() and any((choose(seed) != chosen).any() for seed in range(1, 9))
  change, figures, _ = run((batch, completion, logp, advantage), loss=loss, tx=optax.sgd(1.0), cov=chosen)
  assert figures['cov_token_share'] == pytest.approx(chosen.sum() / completion.sum())

  def plain(params):
    hidden, _ = model.forward(C, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    own = jax.nn.log_softmax(hidden @ model.head(C, params))
    own = jnp.take_along_axis(own, batch.targets_BT[..., None], -1)[..., 0]
    return jnp.sum(advantage * own, where=completion & ~chosen) / completion.sum()

  same(change, jax.device_get(jax.jit(jax.grad(plain))(PARAMS)), 1e-4)


def group(cursor, prompt, answers, verdicts, finishes):
  samples = [Sample(cursor, i, np.array(tokens, np.int32), np.full(len(tokens), -0.5 - i, np.float32), finish)
             for i, (tokens, finish) in enumerate(zip(answers, finishes))]
  return Group(cursor, None, prompt, samples, [''] * len(samples), verdicts,
               [float(v == Verdict.RIGHT) for v in verdicts])


def test_samples_are_laid_out_as_they_were_drawn():
  drawn = lambda i, tokens: Sample(0, i, np.array(tokens, np.int32), np.full(len(tokens), -0.5 - i), 'eos')
  one, other = (Answer([2, 5, 6], drawn(i, tokens), 1.0 + i) for i, tokens in enumerate([[7, 3], [8, 9, 3]]))
  out = fill([[(one, 0), (other, 2)], []], 11)
  np.testing.assert_array_equal(out.batch.tokens_BT, [[2, 5, 6, 7, 2, 5, 6, 8, 9, 0, 0], [0] * 11])
  np.testing.assert_array_equal(out.batch.targets_BT[0], [5, 6, 7, 3, 5, 6, 8, 9, 3, 0, 0])
  np.testing.assert_array_equal(out.batch.positions_BT[0], [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0])
  np.testing.assert_array_equal(out.batch.segments_BT[0], [1] * 4 + [2] * 5 + [0] * 2)
  np.testing.assert_array_equal(out.batch.counts_BT[0], [0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0])
  np.testing.assert_allclose(out.sampler_logp_BT[0], [0, 0, -0.5, -0.5, 0, 0, -1.5, -1.5, -1.5, 0, 0])
  np.testing.assert_allclose(out.advantages_BT[0], [0, 0, 1, 1, 0, 0, 2, 2, 2, 0, 0])
  np.testing.assert_array_equal(out.numbers_BT[0], [0, 0, 0, 1, 0, 0, 2, 3, 4, 0, 0])


MIXTURE = dataclasses.replace(C, moe=model.MoeConfig(experts=8, experts_per_token=2, expert_d_ff=16))
LOSSES = {
  'clip_higher': PolicyLossConfig(kl_weight=0.1, cov='clip_cov', cov_share=0.1),
  'gspo': PolicyLossConfig(name='gspo', eps_low=3e-4, eps_high=4e-4, aggregation='sequence_mean'),
}


@pytest.mark.parametrize('c, loss, change', [
  (C, 'clip_higher', 0.07), pytest.param(MIXTURE, 'gspo', 1e-3, marks=pytest.mark.slow)])
def test_packed_samples_give_the_update_of_one_sample_per_row(c, loss, change):
  """Compares losses, metrics and gradients, off-policy. Some losses sum over samples or select among all tokens."""
  rng, loss = np.random.default_rng(0), LOSSES[loss]
  answers = []
  for i in range(12):
    prompt, n = rng.integers(1, 32, rng.integers(2, 6)), rng.integers(1, 12)
    m = len(prompt) + n - 1
    choices = np.argsort(rng.random((m, c.layers, 8)))[..., :2].astype(np.int16) if c.moe.experts else None
    sample = Sample(0, i, rng.integers(0, 32, n).astype(np.int32), rng.normal(-3, 0.1, n), '', choices)
    answers.append(Answer(list(prompt), sample, rng.normal()))
  mesh = model.make_mesh(model.MeshConfig(1, 1, 1, 1, 1), jax.devices()[:1])
  [packed] = microbatches(answers, [(12, 32)], jax.NamedSharding(mesh, model.spec('batch', 'length')))
  first = np.cumsum([0, *(len(answer.sample.tokens) for answer in answers)])
  alone = fill([[place] for place in zip(answers, first)], 32, choices.shape[1:] if c.moe.experts else None)
  segments_BT = np.asarray(packed.batch.segments_BT)
  assert segments_BT.max() > 2 and segments_BT.any(1).sum() < 7, 'nothing is packed'

  params, other = (parameters.random(c, seed) for seed in (0, 1))
  near = lambda s: jax.tree.map(lambda a, b: a + s * b, params, other)  # the policy before it became `params`
  score = lambda params, part: scored(c, params, part.batch, part.choices_BTLk)[0]
  update, found = make_update(c, loss, TX), []
  for part in (alone, packed):
    old_logp_BT, ref_logp_BT = score(near(change), part), score(near(0.1), part) if loss.kl_weight else None
    [chosen_BT] = cov_tokens(loss, jax.random.key(0), [part], [20 * old_logp_BT]) if loss.cov else [None]
    (gradient, count), sums = update.gradient(params, update.zeros(params), part, old_logp_BT, ref_logp_BT, chosen_BT)
    found.append((gradient, int(count), jax.device_get(sums)))
  (want, want_count, want_sums), (got, count, sums) = found
  assert count == want_count and 0 < sums['clipped'] < sums['tokens'] and sums.get('cov_tokens') != 0
  same(got, want, 1e-4)
  histograms = [sums.pop('entropy_histogram') for sums in (sums, want_sums)]
  assert np.abs(np.cumsum(histograms[0] - histograms[1])).max() <= 1
  assert jax.tree.map(float, sums) == pytest.approx(jax.tree.map(float, want_sums), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
  'truncated, valid, signal', [('zero', [True, True], True), ('masked', [True, False], False)])
def test_truncated_answers_follow_the_stated_rule(truncated, valid, signal):
  g = group(0, [2], [[7, 3], [8, 9]], [Verdict.RIGHT, Verdict.WRONG], ['eos', 'length'])
  assert g.rewards(RewardRule(truncated, 6)) == ([1.0, 0.0], valid)
  assert g.has_reward_variance(RewardRule(truncated, 6), AdvantageConfig()) is signal
