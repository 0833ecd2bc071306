"""Tests advantages against numbers computed by hand, their invariants and, if tunix is installed, tunix's functions."""

import itertools
import math

import numpy as np
import pytest

from betarank.rl import advantages as adv

ALL = np.ones((1, 4), bool)
ONE_OF_FOUR = np.array([[1, 0, 0, 0]], np.float32)


def test_grpo_by_hand():
  # mean 1/4; squares 9/16 + 3/16 = 3/4; std with ddof 1: 1/2, with ddof 0: sqrt(3)/4
  np.testing.assert_allclose(adv.grpo(ONE_OF_FOUR, ALL, eps=0), [[1.5, -0.5, -0.5, -0.5]], rtol=1e-6)
  np.testing.assert_allclose(
    adv.grpo(ONE_OF_FOUR, ALL, ddof=0, eps=0)[0], np.array([3, -1, -1, -1]) / math.sqrt(3), rtol=1e-6)


def test_dr_grpo_and_rloo_by_hand():
  np.testing.assert_allclose(adv.dr_grpo(ONE_OF_FOUR, ALL), [[0.75, -0.25, -0.25, -0.25]], rtol=1e-6)
  np.testing.assert_allclose(adv.rloo(ONE_OF_FOUR, ALL), [[1, -1 / 3, -1 / 3, -1 / 3]], rtol=1e-6)


def test_pass_at_k_by_hand():
  # n=4, W=3, k=2: C(3,2)/C(4,2) = 1/2, so R = s = 1/2; wrong: (1/2 - C(2,1)/C(3,1)) / (1/2) = -1/3
  np.testing.assert_allclose(adv.pass_at_k(ONE_OF_FOUR, ALL, k=2), [[1, -1 / 3, -1 / 3, -1 / 3]], rtol=1e-6)
  two = np.array([[1, 1, 0, 0]], np.float32)
  assert not np.any(adv.pass_at_k(two, ALL, k=3))  # three samples always hold a right one
  np.testing.assert_allclose(
    adv.pass_at_k(ONE_OF_FOUR, ALL, k=1), adv.grpo(ONE_OF_FOUR, ALL, ddof=0, eps=0), rtol=1e-6)


@pytest.mark.parametrize('n,right,k', [(8, 1, 4), (8, 3, 2), (6, 2, 3), (16, 5, 8)])
def test_pass_at_k_is_the_mean_over_all_subsets(n, right, k):
  """A sample's advantage is the mean of the normalized rewards of all subsets of k samples that contain the sample."""
  rewards = np.array([1.0] * right + [0.0] * (n - right), np.float32)
  subsets = [(s, max(rewards[list(s)])) for s in itertools.combinations(range(n), k)]
  values = np.array([r for _, r in subsets])
  expected = [np.mean([(r - values.mean()) / values.std() for s, r in subsets if i in s]) for i in range(n)]
  np.testing.assert_allclose(adv.pass_at_k(rewards[None], np.ones((1, n), bool), k=k)[0], expected, atol=1e-5)


def test_w_reinforce_by_hand():
  np.testing.assert_allclose(adv.w_reinforce(ONE_OF_FOUR, ALL), [[0.1, -1, -1, -1]], rtol=1e-6)
  np.testing.assert_allclose(adv.w_reinforce(np.zeros((1, 4), np.float32), ALL), [[-1] * 4])  # nothing compared


COMPARING = [name for name in adv.ADVANTAGES if name != 'w_reinforce']


@pytest.mark.parametrize('name', adv.ADVANTAGES)
def test_undecided_samples_change_nothing(name):
  rewards = np.array([[1, 0, 0, 1, 0, 0]], np.float32)
  c = adv.AdvantageConfig(name=name, k=2)
  expected = adv.advantages(c, rewards, np.ones_like(rewards, bool))
  for junk in (0.0, 1.0, np.nan, np.inf):
    padded, valid = np.insert(rewards, [1, 4, 6], junk, axis=1), np.insert(np.ones((1, 6), bool), [1, 4, 6], False)
    found = adv.advantages(c, padded, valid[None])[0]
    assert type(found) is np.ndarray  # with JAX, each step with another number of groups would compile
    np.testing.assert_array_equal(found[~valid], 0)
    np.testing.assert_allclose(found[valid], expected[0], rtol=1e-6)


@pytest.mark.parametrize('name', COMPARING)
@pytest.mark.parametrize('reward', [0.0, 1.0, 0.1, -3.7])
def test_a_group_that_agrees_gets_exactly_zero(name, reward):
  rewards = np.full((2, 7), reward, np.float32)  # 0.1: the float32 mean of seven isn't 0.1
  assert not np.any(adv.ADVANTAGES[name](rewards, np.ones_like(rewards, bool)))


@pytest.mark.parametrize('name', COMPARING)
def test_fewer_than_two_valid_samples_get_zero(name):
  rewards = np.array([[1, 0, 1, 0]] * 2, np.float32)
  valid = np.array([[True, False, False, False], [False] * 4])
  assert not np.any(adv.ADVANTAGES[name](rewards, valid))


@pytest.mark.parametrize('name', COMPARING)
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order(name):
  rng = np.random.default_rng(0)
  rewards = (rng.random((64, 8)) < 0.3).astype(np.float32)
  found = np.asarray(adv.ADVANTAGES[name](rewards, np.ones_like(rewards, bool)))
  np.testing.assert_allclose(found.sum(-1), 0, atol=1e-5)
  live = found.any(-1)
  assert live.any() and np.all(found[live][rewards[live] > 0] > 0) and np.all(found[live][rewards[live] == 0] < 0)
  order = rng.permutation(8)
  np.testing.assert_allclose(
    adv.ADVANTAGES[name](rewards[:, order], np.ones_like(rewards, bool)), found[:, order], atol=1e-6)


def test_has_signal():
  rewards = np.array([[1, 1, 0], [1, 1, 1], [1, 1, np.nan], [0, 1, 1], [1, 0, 0]], np.float32)
  valid = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 1, 1], [0, 0, 0]], bool)
  assert adv.has_reward_variance(rewards, valid).tolist() == [True, False, False, False, False]


@pytest.mark.parametrize('field,value', [('name', 'gae'), ('ddof', 2), ('k', 0), ('positive_weight', -1.0)])
def test_settings_are_checked(field, value):
  with pytest.raises(ValueError, match=f'^{field} '):
    adv.AdvantageConfig(**{field: value})


def test_shapes_are_checked():
  for shape in ((4,), (2, 1)):
    with pytest.raises(ValueError, match='^rewards'):
      adv.advantages(adv.AdvantageConfig(), np.ones(shape), np.ones(shape, bool))
  with pytest.raises(ValueError, match='^rewards'):
    adv.advantages(adv.AdvantageConfig(name='pass_at_k', k=8), np.ones((2, 4)), np.ones((2, 4), bool))


def test_parity_with_tunix():
  """The results are equal for groups whose rewards differ. For groups of equal rewards, tunix returns amplified
  rounding errors instead of 0.
  """
  core = pytest.importorskip('tunix.rl.algo_core')
  rng = np.random.default_rng(1)
  rewards, valid = rng.random((32, 8)).astype(np.float32), np.ones((32, 8), bool)
  for ours, theirs in (
    (adv.grpo, core.compute_advantages), (adv.rloo, core.compute_rloo_advantages),
    (adv.dr_grpo, core.compute_drgrpo_advantages),
  ):
    np.testing.assert_allclose(
      ours(rewards, valid), np.asarray(theirs(rewards.reshape(-1), 8)).reshape(32, 8), rtol=2e-5, atol=1e-6)
