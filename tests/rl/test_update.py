"""One RL update: on-policy it is exact, and neither parts, devices nor padding change it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from betarank import model
from betarank.data import Batch
from betarank.rl.policy_losses import PolicyLossConfig, means
from betarank.rl.rollout import Group, lengths, pack
from betarank.rl.update import cov_tokens, make_update, score_tokens
from betarank.runtime.state import create_state
from betarank.tasks.verifiers import Verdict
from betarank.train.optimizer import OptimizerConfig, make_optimizer
from betarank.train.sampler import Sample

C = model.ModelConfig(
  vocab_size=32, layers=2, d_model=32, d_ff=48, heads=4, kv_heads=2, head_dim=8, rope_base=1e4, norm_eps=1e-6,
  tied_embeddings=True, compute_dtype='float32', remat_policy='none', scan_layers=True)
TX = make_optimizer(OptimizerConfig(lr=1e-2, warmup_steps=0, decay_fraction=0.0, final_lr=0.0, b1=0.9, b2=0.95,
                                    eps=1e-8, weight_decay=0.0, clip_norm=1e9), 10, model.abstract(C)[2])
LOSS = PolicyLossConfig()
ROWS, LENGTH = 8, 12


def rollouts(seed=0):
  """(batch, completion_BT, sampler_logp_BT, advantages_B) with rows of unequal length."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 32, (ROWS, LENGTH + 1)).astype(np.int32)
  n = 6 + np.arange(ROWS) % 6
  segments = (np.arange(LENGTH) < n[:, None]).astype(np.int32)
  completion = (segments > 0) & (np.arange(LENGTH) >= 3)
  positions = np.arange(LENGTH, dtype=np.int32) * segments
  batch = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), positions, segments)
  logp = np.where(completion, rng.normal(-3, 0.1, completion.shape), 0).astype(np.float32)
  return batch, completion, logp, rng.normal(size=ROWS).astype(np.float32)


def run(data, *, microbatches=1, shape=(1, 1, 1, 1, 1), loss=LOSS, tx=TX, old_logp=None, ref_logp=None, cov=None):
  """(parameters' change, metrics, entropies) of one update on a mesh."""
  mesh = model.make_mesh(model.MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
  with jax.set_mesh(mesh):
    state = create_state(C, tx, mesh, seed=0)
    before = jax.device_get(state.params)
    batch, completion, logp, advantage = data
    rows = jax.NamedSharding(mesh, model.spec('batch', 'length'))
    placed = jax.device_put((batch, completion, logp), rows)
    advantage = jax.device_put(advantage, jax.NamedSharding(mesh, model.spec('batch')))
    state, sums, entropy = make_update(C, loss, tx, microbatches)(state, *placed, advantage, old_logp, ref_logp, cov)
    figures = {name: float(x) for name, x in means(loss, sums).items()}
    figures |= {'loss': float(sums['loss']), 'grad_norm': float(sums['grad_norm'])}
    return jax.tree.map(np.subtract, jax.device_get(state.params), before), figures, np.asarray(entropy)


@pytest.fixture(scope='module')
def whole():
  return run(rollouts())


def same(a, b, tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * (np.abs(y).max() + 1e-9)), a, b)


def test_on_policy_the_ratio_is_one_and_nothing_is_clipped(whole):
  _, figures, _ = whole
  assert figures['ratio_mean'] == 1 and figures['clip_fraction'] == 0
  assert figures['sampler_gap_mean'] > 0  # these rollouts are of another sampler, and that is seen


@pytest.mark.parametrize('options', [{'microbatches': 4}, {'shape': (2, 2, 1, 1, 2)}])
def test_parts_and_devices_change_nothing(whole, options):
  change, figures, entropy = run(rollouts(), **options)
  assert figures == pytest.approx(whole[1], rel=1e-4)
  same(entropy, whole[2], 1e-5)
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
  change, figures, _ = run((batch, completion, logp, np.zeros(ROWS, np.float32)))
  assert figures['grad_norm'] == 0
  assert all(not x.any() for x in jax.tree.leaves(change))


def test_the_gradient_is_reinforce():
  """Loss and gradient norm against -mean A logp, differentiated plainly, with all logits."""
  batch, completion, _, advantage = rollouts()
  params = model.init(C, jax.random.key(0))
  own = np.asarray(score_tokens(C, params, batch)[0])

  def plain(params):
    hidden, _ = model.forward(C, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    logp = jax.nn.log_softmax(hidden @ model.head(C, params))
    logp = jnp.take_along_axis(logp, batch.targets_BT[..., None], -1)[..., 0]
    return -jnp.sum(advantage[:, None] * logp, where=completion) / completion.sum()

  grads = jax.grad(plain)(params)
  norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
  _, figures, _ = run((batch, completion, own, advantage))
  assert figures['grad_norm'] == pytest.approx(norm, rel=1e-4)
  assert figures['sampler_gap_max'] < 1e-5  # the sampler here is the trainer


def test_without_a_weight_the_reference_changes_nothing(whole):
  change, figures, _ = run(rollouts(), ref_logp=np.full((ROWS, LENGTH), -1, np.float32))
  assert figures == whole[1] and 'kl_k2_nats' not in figures
  jax.tree.map(np.testing.assert_array_equal, change, whole[0])


@pytest.mark.parametrize('microbatches', [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_kl_gradient_by_finite_differences(microbatches):
  """Gradient descent of rate 1 moves by minus the gradient of weight · mean (logp - ref)²/2, which along three
  directions is the difference quotient of that mean, computed with all logits."""
  batch, completion, logp, _ = rollouts()
  ref = np.random.default_rng(1).normal(-3, 0.5, logp.shape).astype(np.float32)
  loss = PolicyLossConfig(kl_weight=0.5, importance_cap=0)
  change, figures, _ = run((batch, completion, logp, np.zeros(ROWS, np.float32)), microbatches=microbatches, loss=loss,
                           tx=optax.sgd(1.0), ref_logp=ref)

  def kl(params):
    hidden, _ = model.forward(C, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    own = jax.nn.log_softmax(hidden @ model.head(C, params))
    own = jnp.take_along_axis(own, batch.targets_BT[..., None], -1)[..., 0]
    return jnp.mean((own - ref) ** 2 / 2, where=completion)

  params, h = model.init(C, jax.random.key(0)), 1e-2
  assert figures['kl_k2_nats'] == pytest.approx(float(kl(params)), rel=1e-5)
  for seed in range(3):
    rng = np.random.default_rng(seed)
    along = jax.tree.map(lambda x: (rng.normal(size=x.shape) / np.sqrt(x.size)).astype(np.float32), params)  # noqa: B023
    at = lambda step: float(kl(jax.tree.map(lambda x, d: x + step * d, params, along)))  # noqa: B023
    slope = (at(-2 * h) - 8 * at(-h) + 8 * at(h) - at(2 * h)) / (12 * h)
    moved = sum(float(np.sum(c * d)) for c, d in zip(jax.tree.leaves(change), jax.tree.leaves(along)))
    assert moved == pytest.approx(-0.5 * slope, rel=2e-3, abs=1e-5)


def test_clip_cov_takes_its_tokens_out_of_the_gradient():
  """As if their advantage were 0, while they still count in the mean."""
  batch, completion, logp, advantage = rollouts()
  loss = PolicyLossConfig(cov='clip_cov', cov_share=0.1, importance_cap=0)
  old = score_tokens(C, model.init(C, jax.random.key(0)), batch)[0]
  choose = lambda seed: np.asarray(cov_tokens(loss, jax.random.key(seed), 30 * old, advantage, completion))
  chosen = choose(0)
  assert 1 <= chosen.sum() <= 0.1 * completion.sum() and not (chosen & ~completion).any()
  assert (choose(0) == chosen).all() and any((choose(seed) != chosen).any() for seed in range(1, 9))
  change, figures, _ = run((batch, completion, logp, advantage), loss=loss, tx=optax.sgd(1.0), cov=chosen)
  assert figures['cov_token_share'] == pytest.approx(chosen.sum() / completion.sum())

  def plain(params):
    hidden, _ = model.forward(C, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    own = jax.nn.log_softmax(hidden @ model.head(C, params))
    own = jnp.take_along_axis(own, batch.targets_BT[..., None], -1)[..., 0]
    return jnp.sum(advantage[:, None] * own, where=completion & ~chosen) / completion.sum()

  same(change, jax.device_get(jax.grad(plain)(model.init(C, jax.random.key(0)))), 1e-4)


def group(cursor, prompt, answers, verdicts, finishes):
  samples = [Sample(cursor, i, np.array(tokens, np.int32), np.full(len(tokens), -0.5 - i, np.float32), finish)
             for i, (tokens, finish) in enumerate(zip(answers, finishes))]
  scores = [float(verdict) if verdict != Verdict.UNDECIDED else float('nan') for verdict in verdicts]
  return Group(cursor, None, prompt, samples, [''] * len(samples), verdicts, scores)


def test_rollouts_are_laid_out_as_they_were_drawn():
  groups = [group(0, [2, 5, 6], [[7, 3], [8, 9, 3]], [Verdict.RIGHT, Verdict.UNDECIDED], ['eos', 'eos'])]
  out = pack(groups, prompts=2, samples=2, length=6, truncated_reward='zero')
  np.testing.assert_array_equal(out.batch.tokens_BT[1], [2, 5, 6, 8, 9, 0])
  np.testing.assert_array_equal(out.batch.targets_BT[1], [5, 6, 8, 9, 3, 0])
  np.testing.assert_array_equal(out.completion_BT[1], [0, 0, 1, 1, 1, 0])
  np.testing.assert_allclose(out.sampler_logp_BT[1], [0, 0, -1.5, -1.5, -1.5, 0])
  np.testing.assert_array_equal(out.valid_PG, [[True, False], [False, False]])
  assert not out.batch.segments_BT[2:].any()
  assert list(lengths(groups)) == [4, 5]


@pytest.mark.parametrize(
  'truncated, valid, signal', [('zero', [True, True], True), ('masked', [True, False], False)])
def test_truncated_answers_follow_the_stated_rule(truncated, valid, signal):
  g = group(0, [2], [[7, 3], [8, 9]], [Verdict.RIGHT, Verdict.WRONG], ['eos', 'length'])
  assert g.rewards(truncated) == ([1.0, 0.0], valid)
  assert g.has_reward_variance(truncated) is signal
