"""Tests policy losses against enumerations, REINFORCE and numbers computed by hand.

Also tests that masked entries and packing have no effect.
"""
# B rows  T tokens  V vocabulary  S sequences of the enumeration

import functools
import itertools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from betarank.rl import policy_losses as pl
from betarank.rl.policy_losses import PolicyLossConfig, policy_loss

EPS = {'clip_higher': (0.2, 0.28), 'cispo': (1.0, 4.0), 'gspo': (3e-4, 4e-4)}
CONFIGS = {
  name: PolicyLossConfig(name=name, eps_low=EPS[name][0], eps_high=EPS[name][1], aggregation=aggregation, constant=7,
                         kl_weight=0.1, cov=cov)
  for name, aggregation, cov in (
    ('clip_higher', 'token_mean', 'kl_cov'), ('cispo', 'constant', 'clip_cov'), ('gspo', 'sequence_mean', ''))
}


def batch(seed=0, B=6, T=9, gap=0.3):
  """Returns random off-policy arrays, {argument of policy_loss: array}. Rows have different lengths; the last row is
  empty.
  """
  rng = np.random.default_rng(seed)
  f = lambda scale: rng.normal(0, scale, (B, T)).astype(np.float32)
  logp = -np.abs(f(1))
  lengths = np.array([*rng.integers(1, T + 1, B - 1), 0])
  return {
    'logp_BT': logp, 'old_logp_BT': logp + f(gap), 'advantages_BT': np.repeat(f(1)[:, :1], T, 1),
    'mask_BT': np.arange(T) < lengths[:, None], 'sampler_logp_BT': logp + f(gap), 'ref_logp_BT': logp + f(gap),
    'cov_tokens_BT': rng.random((B, T)) < 0.3,
  }


@functools.cache
def graded(c):
  """Returns a compiled function (logp_BT, other arrays) -> ((total, (count, sums)), gradient of the total)."""
  def total(logp_BT, rest):
    total, count, sums = policy_loss(c, logp_BT, **rest)
    return total, (count, sums)
  return jax.jit(jax.value_and_grad(total, has_aux=True))


def run(c, arrays):
  rest = {name: jnp.asarray(array) for name, array in arrays.items() if name != 'logp_BT'}
  (total, (count, sums)), gradient = graded(c)(jnp.asarray(arrays['logp_BT']), rest)
  return float(total), int(count), jax.tree.map(np.asarray, sums), np.asarray(gradient)


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('junk', [np.nan, np.inf, -np.inf, 1e30, 0.5])
def test_masked_places_hold_anything(name, junk):
  clean, dirty = batch(), batch()
  for key, array in dirty.items():
    if array.dtype == np.float32:
      array[~dirty['mask_BT']] = junk
    elif key == 'cov_tokens_BT':
      array[~dirty['mask_BT']] = True
  expected, found = run(CONFIGS[name], clean), run(CONFIGS[name], dirty)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert not expected[3][~clean['mask_BT']].any() and np.isfinite(expected[3]).all()


@pytest.mark.parametrize('name', CONFIGS)
def test_order_of_rows_microbatches_and_padding_do_not_matter(name):
  c, arrays = CONFIGS[name], batch()
  total, count, sums, gradient = run(c, arrays)
  order = np.random.default_rng(1).permutation(6)
  shuffled = run(c, {key: array[order] for key, array in arrays.items()})
  parts = [run(c, {key: array[b:b + 1] for key, array in arrays.items()}) for b in range(6)]
  joined = (sum(p[0] for p in parts), sum(p[1] for p in parts), functools.reduce(pl.add, [p[2] for p in parts]),
            np.concatenate([p[3] for p in parts]))
  padded = run(c, {key: np.pad(array, ((0, 2), (0, 3))) for key, array in arrays.items()})
  for found, rows in ((shuffled, order), (joined, slice(None)), (padded, slice(None))):
    assert found[1] == count
    np.testing.assert_allclose(found[0], total, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[3][:6, :9], gradient[rows], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found[2], sums)


@pytest.mark.parametrize('name', CONFIGS)
def test_samples_in_one_row_are_as_samples_in_rows(name):
  """Three samples are packed into a row, in another order than before, and padding follows them."""
  c, arrays = CONFIGS[name], batch()
  total, count, sums, gradient = run(c, arrays)
  rows = [[4, 0, 5], [2, 3, 1]]
  joined = {key: np.stack([np.concatenate([*array[row], np.zeros(4, array.dtype)]) for row in rows])
            for key, array in arrays.items()}
  joined['segments_BT'] = np.repeat([[1] * 9 + [2] * 9 + [3] * 9 + [0] * 4], 2, 0)
  found = run(c, joined)
  assert found[1] == count
  np.testing.assert_allclose(found[0], total, rtol=1e-5)
  np.testing.assert_allclose(found[3][:, :27].reshape(6, 9), gradient[np.concatenate(rows)], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found[2], sums)


def test_eight_devices_are_as_one():
  mesh = jax.make_mesh((8,), ('data',))
  rows = jax.NamedSharding(mesh, jax.P('data'))
  for c in CONFIGS.values():
    arrays = batch(B=16)
    expected = run(c, arrays)
    found = run(c, {key: jax.device_put(array, rows) for key, array in arrays.items()})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize('name', CONFIGS)
def test_no_tokens_give_zero(name):
  arrays = batch()
  arrays['mask_BT'][:] = False
  total, count, sums, gradient = run(CONFIGS[name], arrays)
  assert total == 0 and count == 0 and not gradient.any()
  assert all(np.all(value == 0) for value in pl.means(CONFIGS[name], sums).values())


@pytest.mark.parametrize('name', EPS)
def test_on_policy_is_reinforce(name):
  c = PolicyLossConfig(name=name, eps_low=EPS[name][0], eps_high=EPS[name][1])
  arrays = batch()
  mask, advantages = arrays['mask_BT'], arrays['advantages_BT']
  arrays['old_logp_BT'] = arrays['sampler_logp_BT'] = arrays['logp_BT']
  _, count, sums, gradient = run(c, arrays)
  means = pl.means(c, sums)
  assert means['ratio_mean'] == 1 and means['clip_fraction'] == 0
  assert means['sampler_gap_mean'] == 0 and means['sampler_gap_max'] == 0
  assert means['importance_weight_mean'] == 1 and means['effective_sample_share'] == 1
  np.testing.assert_array_equal(gradient, np.where(mask, -advantages, 0))
  assert count == mask.sum()


def test_clip_higher_by_hand():
  ratio = np.array([[0.5, 0.9, 1.2, 1.5]], np.float32)
  ones, mask = np.ones((1, 4), np.float32), np.ones((1, 4), bool)
  up = pl.clip_higher(np.log(ratio), 0 * ones, ones, mask)
  np.testing.assert_allclose(up.loss_BT, [[-0.5, -0.9, -1.2, -1.28]], rtol=1e-6)
  down = pl.clip_higher(np.log(ratio), 0 * ones, -ones, mask)
  np.testing.assert_allclose(down.loss_BT, [[0.8, 0.9, 1.2, 1.5]], rtol=1e-6)
  assert up.clipped_BT.tolist() == [[False] * 3 + [True]] and down.clipped_BT.tolist() == [[True] + [False] * 3]
  slope = jax.grad(lambda x: pl.clip_higher(x, 0 * ones, ones, mask).loss_BT.sum())(jnp.log(ratio))
  np.testing.assert_allclose(slope, [[-0.5, -0.9, -1.2, 0]], rtol=1e-6)


def test_cispo_by_hand():
  ratio = np.array([[0.5, 1.0, 6.0]], np.float32)
  ones, mask = np.ones((1, 3), np.float32), np.ones((1, 3), bool)
  logp = jnp.asarray(np.log(ratio) - 1)
  token = pl.cispo(logp, -ones, 2 * ones, mask)
  np.testing.assert_allclose(token.loss_BT, -np.array([[0.5, 1, 5]]) * 2 * logp, rtol=1e-6)
  slope = jax.grad(lambda x: pl.cispo(x, -ones, 2 * ones, mask).loss_BT.sum())(logp)
  np.testing.assert_allclose(slope, [[-1, -2, -10]], rtol=1e-6)  # the clipped token has its gradient
  assert token.clipped_BT.tolist() == [[False, False, True]]


@pytest.mark.parametrize('shift,advantage', [(1e-4, 1.0), (1e-3, 1.0), (-1e-3, 1.0), (1e-3, -1.0), (-1e-3, -1.0)])
def test_gspo_is_the_sequence_surrogate(shift, advantage):
  """The mean over the tokens of a row has the value and gradient of -min(s A, clip(s) A), with s = exp(mean of logp -
  old).
  """
  rng = np.random.default_rng(0)
  old = -10 * rng.random((1, 5)).astype(np.float32)
  logp = jnp.asarray(old + rng.normal(0, 1e-4, (1, 5)).astype(np.float32) + np.float32(shift))
  mask = np.array([[True] * 4 + [False]])

  def sequence(x):
    s = jnp.exp(jnp.mean(jnp.where(mask, x - old, 0)) * 5 / 4)
    return -jnp.minimum(s * advantage, jnp.clip(s, 1 - 3e-4, 1 + 4e-4) * advantage)

  def tokens(x):
    total, count = pl.aggregate(pl.gspo(x, old, np.full((1, 1), advantage), mask).loss_BT, mask, 'sequence_mean')
    return total / count

  for got, want in zip(*(jax.jit(jax.value_and_grad(f))(logp) for f in (tokens, sequence))):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_aggregations_by_hand():
  loss = np.array([[1, 2, 3], [4, np.nan, np.nan], [np.nan] * 3], np.float32)
  mask = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
  for name, expected in (('token_mean', (10, 4)), ('sequence_mean', (6, 2)), ('constant', (2.5, 2))):
    assert tuple(map(float, pl.aggregate(loss, mask, name, constant=4))) == expected


def test_importance_weight_is_capped_detached_and_zero_on_padding():
  old = jnp.log(jnp.array([[0.5, 0.5, 0.5]]))
  sampler = jnp.log(jnp.array([[0.1, 0.8, jnp.nan]]))
  mask = np.array([[True, True, False]])
  np.testing.assert_allclose(pl.truncated_importance_weight(old, sampler, mask), [[2, 0.625, 0]], rtol=1e-6)
  assert not jax.grad(lambda x: pl.truncated_importance_weight(x, sampler, mask).sum())(old).any()
  c = PolicyLossConfig(importance_cap=2.0)
  total, _, sums = policy_loss(c, old, old, np.ones((1, 1)), mask, sampler_logp_BT=sampler)
  np.testing.assert_allclose(total, -2.625, rtol=1e-6)
  means = pl.means(c, sums)
  np.testing.assert_allclose(means['effective_sample_share'], 2.625**2 / (2**2 + 0.625**2) / 2, rtol=1e-6)
  np.testing.assert_allclose([means['sampler_gap_mean'], means['sampler_gap_max']], [(4 + 0.375) / 2, 4], rtol=1e-6)


def test_the_importance_weight_does_not_multiply_the_kl_term():
  arrays = batch()
  logp, mask = arrays['logp_BT'], arrays['mask_BT']
  arrays['old_logp_BT'] = logp
  weight = np.minimum(np.exp(logp - arrays['sampler_logp_BT']), 1.2)
  apart = logp - arrays['ref_logp_BT']
  total, *_, gradient = run(PolicyLossConfig(importance_cap=1.2, kl='k2', kl_weight=0.5), arrays)
  weighted = -arrays['advantages_BT'] * weight
  np.testing.assert_allclose(total, (weighted + 0.5 * apart**2 / 2).sum(where=mask), rtol=1e-5)
  np.testing.assert_allclose(gradient, np.where(mask, weighted + 0.5 * apart, 0), rtol=1e-5)


def test_kl_estimators_value_and_gradient_by_enumeration():
  rng = np.random.default_rng(0)
  z, ref = jnp.asarray(rng.normal(size=5), jnp.float32), jax.nn.log_softmax(jnp.asarray(rng.normal(size=5)))
  p, mask = jax.nn.softmax(z), jnp.ones((1, 5), bool)
  reverse = lambda z: jnp.sum(jax.nn.softmax(z) * (jax.nn.log_softmax(z) - ref))
  forward = lambda z: jnp.sum(jnp.exp(ref) * (ref - jax.nn.log_softmax(z)))
  mean = lambda f, z: jnp.sum(p * f(jax.nn.log_softmax(z)[None], ref[None], mask)[0])  # over samples of p, fixed
  slope = lambda f: jax.jit(jax.grad(lambda z: mean(f, z)))(z)
  np.testing.assert_allclose(mean(pl.kl_k1, z), reverse(z), rtol=1e-5)
  np.testing.assert_allclose(mean(pl.kl_k3, z), reverse(z), rtol=1e-5)
  np.testing.assert_allclose(slope(pl.kl_k1), np.zeros(5), atol=1e-6)
  np.testing.assert_allclose(slope(pl.kl_k2), jax.jit(jax.grad(reverse))(z), atol=1e-6)
  np.testing.assert_allclose(slope(pl.kl_k3), jax.jit(jax.grad(forward))(z), atol=1e-6)


def test_covariance_tokens():
  logp = np.array([[-1, -2, -3, -4], [-1, -6, np.nan, np.nan]], np.float32)
  advantages = np.array([[1, 1, 1, 1], [-2, -2, np.nan, np.nan]], np.float32)
  mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
  a, x = advantages[mask], logp[mask]
  expected = (x - x.mean()) * (a - a.mean())
  covariance = np.asarray(pl.token_covariance(logp, advantages, mask))
  np.testing.assert_allclose(covariance[mask], expected, rtol=1e-5)
  assert not covariance[~mask].any()
  np.testing.assert_array_equal(  # one of six at least, then a third
    np.asarray(pl.kl_cov_tokens(logp, advantages, mask))[mask], expected == expected.max())
  assert np.asarray(pl.kl_cov_tokens(logp, advantages, mask, share=0.34))[mask].sum() == 2
  noise = np.random.default_rng(0).random((2, 4))
  candidates = (expected > 0) & (expected < 5)
  chosen = np.asarray(pl.clip_cov_tokens(logp, advantages, mask, noise, share=0.34, low=0, high=5))
  assert chosen[mask].sum() == min(2, candidates.sum()) and not (chosen[mask] & ~candidates).any()
  assert not np.asarray(pl.clip_cov_tokens(logp, advantages, mask, noise, low=90, high=91)).any()


def test_covariance_terms_act_on_their_tokens_only():
  arrays = batch()
  tokens = arrays['cov_tokens_BT'] & arrays['mask_BT']
  plain = run(PolicyLossConfig(importance_cap=0), arrays)[3]
  clip = run(PolicyLossConfig(importance_cap=0, cov='clip_cov'), arrays)[3]
  np.testing.assert_array_equal(clip, np.where(tokens, 0, plain))


def test_kl_cov_penalizes_its_tokens_and_clips_none():
  """Compares with the formula of the source: -r A, plus the weighted |logp - old_logp| at the selected tokens."""
  arrays = batch(gap=1.0)
  mask, advantages, apart = arrays['mask_BT'], arrays['advantages_BT'], arrays['logp_BT'] - arrays['old_logp_BT']
  tokens, ratio = arrays['cov_tokens_BT'] & mask, np.exp(apart)
  assert run(PolicyLossConfig(importance_cap=0), arrays)[2]['clipped'] > 5, 'there is nothing to clip'
  c = PolicyLossConfig(importance_cap=0, cov='kl_cov', kl_cov_weight=0.5)
  total, _, sums, gradient = run(c, arrays)
  want = -advantages * ratio + np.where(tokens, 0.5 * np.abs(apart), 0)
  np.testing.assert_allclose(total, want.sum(where=mask), rtol=1e-5)
  np.testing.assert_allclose(
    gradient, np.where(mask, -advantages * ratio, 0) + np.where(tokens, 0.5 * np.sign(apart), 0), rtol=1e-5)
  assert sums['clipped'] == 0


SEQUENCES_ST = np.array(list(itertools.product(range(3), repeat=3)))


def tabular_logp(z, tokens_BT):
  """Returns the log-probability of each token given the tokens before it, [B, 3].

  z: logits [1 + 3 + 9, 3], one row for each prefix of up to two tokens.
  """
  state_BT = np.stack([0 * tokens_BT[:, 0], 1 + tokens_BT[:, 0], 4 + 3 * tokens_BT[:, 0] + tokens_BT[:, 1]], 1)
  return jnp.take_along_axis(jax.nn.log_softmax(z)[state_BT], jnp.asarray(tokens_BT)[..., None], -1)[..., 0]


@pytest.mark.parametrize('name', EPS)
def test_gradient_is_that_of_the_expected_reward_by_enumeration(name):
  """Every sequence of 3 tokens from a vocabulary of 3 is weighted by its probability, so there is no noise of sampling.
  """
  rng = np.random.default_rng(0)
  z = jnp.asarray(rng.normal(size=(13, 3)), jnp.float32)
  reward_S = jnp.asarray(rng.random(27), jnp.float32)
  chance = lambda z: jnp.exp(tabular_logp(z, SEQUENCES_ST).sum(-1))
  value, slope = jax.jit(jax.value_and_grad(lambda z: jnp.sum(chance(z) * reward_S)))(z)
  advantages = (jax.jit(chance)(z) * (reward_S - value))[:, None]
  c = PolicyLossConfig(name=name, eps_low=EPS[name][0], eps_high=EPS[name][1], aggregation='constant', constant=1)

  def surrogate(z):
    logp = tabular_logp(z, SEQUENCES_ST)
    return policy_loss(c, logp, jax.lax.stop_gradient(logp), advantages, np.ones((27, 3), bool))[0]

  np.testing.assert_allclose(jax.jit(jax.grad(surrogate))(z), -slope, atol=1e-6)


@pytest.mark.parametrize('name', EPS)
def test_bandit_converges_to_its_best_arm(name):
  """There are four arms, groups of 8 samples, and two updates on each group. The second update is off-policy."""
  from betarank.rl.advantages import grpo

  chance_of_reward = jnp.array([0.2, 0.3, 0.8, 0.5])
  c = PolicyLossConfig(name=name, eps_low=EPS[name][0], eps_high=EPS[name][1])

  def update(z, key):
    arm_key, reward_key = jax.random.split(key)
    arms_PG = jax.random.categorical(arm_key, z, shape=(8, 8))
    rewards_PG = (jax.random.uniform(reward_key, (8, 8)) < chance_of_reward[arms_PG]).astype(jnp.float32)
    of_numpy = lambda rewards_PG: grpo(np.asarray(rewards_PG), np.ones((8, 8), bool))
    advantages_B1 = jax.pure_callback(of_numpy, rewards_PG, rewards_PG).reshape(64, 1)
    logp = lambda z: jax.nn.log_softmax(z)[arms_PG.reshape(64, 1)]
    old = logp(z)
    for _ in range(2):
      gradient = jax.grad(lambda z: policy_loss(c, logp(z), old, advantages_B1, jnp.ones((64, 1), bool))[0] / 64)(z)
      z = z - 0.3 * gradient
    return z, None

  z, _ = jax.lax.scan(update, jnp.zeros(4), jax.random.split(jax.random.key(0), 300))
  assert jax.nn.softmax(z)[2] > 0.95


@pytest.mark.parametrize('field,settings', [
  ('name', {'name': 'ppo'}), ('eps_low', {'eps_low': 1.5}), ('eps_high', {'eps_high': -1.0}),
  ('eps_low', {'name': 'gspo'}), ('eps_low', {'name': 'cispo'}),
  ('aggregation', {'aggregation': 'mean'}), ('constant', {'aggregation': 'constant'}),
  ('dual_clip', {'dual_clip': 3.0, 'cov': 'kl_cov'}), ('importance_cap', {'importance_cap': 0.5}),
  ('kl', {'kl': 'k4'}), ('kl', {'kl': 'k1', 'kl_weight': 0.1}),
  ('kl_weight', {'kl_weight': math.inf}), ('cov', {'cov': 'cov'}), ('cov_share', {'cov_share': 0.0}),
])
def test_settings_are_checked(field, settings):
  with pytest.raises(ValueError, match=f'^{field} '):
    PolicyLossConfig(**settings)


def test_missing_arrays_are_named():
  arrays = batch()
  for field, settings in (('ref_logp_BT', {'kl_weight': 0.1}), ('cov_tokens_BT', {'cov': 'kl_cov'})):
    with pytest.raises(ValueError, match=f'^{field} '):
      policy_loss(PolicyLossConfig(**settings), *(arrays[key] for key in list(arrays)[:4]))


@pytest.mark.parametrize('name,algorithm,aggregation', [
  ('clip_higher', 'grpo', 'token-mean'), ('gspo', 'gspo-token', 'sequence-mean-token-mean')])
def test_parity_with_tunix_losses(name, algorithm, aggregation, monkeypatch):
  """Compares with tunix's GRPO loss on given log-probabilities and importance weights.

  The results are equal, except for rounding errors in tunix's gspo.
  """
  core = pytest.importorskip('tunix.rl.algo_core')
  gap = 2e-4 if name == 'gspo' else 0.3
  arrays = {key: jnp.asarray(array[:5]) for key, array in batch(gap=gap).items()}
  logp, old, mask = arrays['logp_BT'], arrays['old_logp_BT'], arrays['mask_BT']
  weights = pl.truncated_importance_weight(old, arrays['sampler_logp_BT'], mask)
  monkeypatch.setattr(core.nnx, 'split', lambda model: (None, None))
  example = SimpleNamespace(
    prompt_ids=None, completion_ids=None, completion_mask=mask.astype(jnp.float32), advantages=arrays['advantages_BT'],
    old_per_token_logps=old, ref_per_token_logps=None, sampler_is_weights=weights)
  config = SimpleNamespace(
    beta=None, epsilon=EPS[name][0], epsilon_high=EPS[name][1], loss_algo=algorithm, loss_agg_mode=aggregation,
    temperature=1.0)

  def theirs(logp):
    monkeypatch.setattr(core.common, 'compute_per_token_logps', lambda *_, **__: (logp, jnp.zeros((5, 9, 3))))
    loss, aux = core.grpo_loss_fn(None, example, config, 0, 1)
    return loss, aux['pg_clipfrac']

  c = PolicyLossConfig(name=name, eps_low=EPS[name][0], eps_high=EPS[name][1],
                       aggregation='sequence_mean' if name == 'gspo' else 'token_mean')
  (loss, clipped), slope = jax.value_and_grad(theirs, has_aux=True)(logp)
  total, count, sums, gradient = run(c, {key: np.asarray(array) for key, array in arrays.items()})
  np.testing.assert_allclose(total / count, loss, rtol=1e-5)
  np.testing.assert_allclose(gradient / count, slope, rtol=1e-4, atol=1e-7)
  if name != 'gspo':  # near the limits, its rounding decides otherwise
    np.testing.assert_allclose(pl.means(c, sums)['clip_fraction'], clipped, rtol=1e-6)


def test_parity_with_tunix():
  """Compares with tunix's KL estimators and aggregations. All entries are finite here, because tunix multiplies by
  masks.

  Its results would be NaN if a masked entry were NaN.
  """
  common = pytest.importorskip('tunix.rl.common')
  arrays = batch()
  logp, ref, mask = arrays['logp_BT'], arrays['ref_logp_BT'], np.ones((6, 9), bool)
  for ours, theirs in (('k1', 'kl'), ('k2', 'mse_kl'), ('k3', 'low_var_kl')):
    expected = common.compute_kl_divergence(jnp.asarray(logp), jnp.asarray(ref), theirs)
    np.testing.assert_allclose(pl.KL_ESTIMATORS[ours](logp, ref, mask), expected, atol=1e-6)
  for ours, theirs in (('token_mean', 'token-mean'), ('sequence_mean', 'sequence-mean-token-mean'),
                       ('constant', 'sequence-mean-token-scale')):
    total, count = pl.aggregate(logp, arrays['mask_BT'], ours, constant=9)
    expected = common.aggregate_loss(jnp.asarray(logp), jnp.asarray(arrays['mask_BT']), theirs)
    np.testing.assert_allclose(total / count, expected, rtol=1e-5)
