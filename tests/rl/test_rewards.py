"""Tests the rules of RL: the effect of an answer's length, which groups are used for learning, and the warnings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from betarank.configs import load
from betarank.configs.errors import ConfigError
from betarank.rl import policy_losses as pl
from betarank.rl.config import rl_run
from betarank.rl.loop import check_held_out
from betarank.rl.rewards import RewardRule, rewards, vary
from betarank.rl.warnings import needed, warnings
from betarank.runtime.metrics import JsonLines, lines_of
from betarank.tasks.verifiers import Verdict
from betarank.train import setup
from betarank.train.sampler import Sample

RIGHT, WRONG, UNDECIDED = Verdict.RIGHT, Verdict.WRONG, Verdict.UNDECIDED


def sample(tokens, finish='eos'):
  return Sample(0, 0, np.zeros(tokens, np.int32), np.zeros(tokens, np.float32), finish)


def test_the_soft_penalty_falls_linearly_over_the_buffer():
  """DAPO's equation 13: the penalty is 0 up to the buffer, and -1 at the length limit."""
  rule = RewardRule('zero', longest=100, overlong_buffer=20)
  assert [rule.penalty(n) for n in (1, 80, 85, 90, 100)] == [0, 0, -0.25, -0.5, -1]
  assert RewardRule('zero', 100).penalty(100) == 0


def test_rewards_are_scores_less_what_the_length_costs():
  rule = RewardRule('masked', longest=10, overlong_buffer=4)
  samples = [sample(2), sample(8), sample(10, 'length'), sample(10, 'length'), sample(3)]
  values, valid = rewards(rule, [1, 0, 0, 1, float('nan')], [RIGHT, WRONG, WRONG, RIGHT, UNDECIDED], samples)
  assert values == [1, -0.5, 0, 0, 0] and valid == [True, True, False, True, False]


def test_a_cut_off_answer_that_is_not_right_gets_at_most_0():
  scores, verdicts, samples = [0.75, -2.0, 1.5], [WRONG, WRONG, RIGHT], [sample(10, 'length')] * 3
  assert rewards(RewardRule('zero', 10), scores, verdicts, samples) == ([0, -2, 1.5], [True] * 3)
  assert rewards(RewardRule('masked', 10), scores, verdicts, samples) == ([0, 0, 1.5], [False, False, True])
  assert not vary(RewardRule('zero', 10), [0.75, 0], [WRONG, WRONG], [samples[0], sample(3)])
  penalized, _ = rewards(RewardRule('zero', 10, overlong_buffer=4), scores, verdicts, samples)
  assert penalized == [-1, -3, 0.5]


def test_the_length_limit_of_the_rewards_is_that_of_the_phase():
  rl = rl_run(load.load('tests/tiny_rl.py:init_from=x', {'rl.max_new_tokens': '[4, 28]', 'rl.phase_steps': '[2]'})).rl
  assert [rl.reward_rule(step).longest for step in (1, 2, 3)] == [4, 4, 28]


def test_a_group_that_is_right_throughout_does_not_vary_by_its_lengths():
  rule = RewardRule('zero', longest=10, overlong_buffer=4)
  assert not vary(rule, [1, 1], [RIGHT, RIGHT], [sample(2), sample(9)])
  assert vary(rule, [1, 0], [RIGHT, WRONG], [sample(2), sample(2)])
  assert not vary(rule, [1, float('nan')], [RIGHT, UNDECIDED], [sample(2), sample(2)])


@pytest.mark.parametrize('advantage, keeps', [('grpo', False), ('w_reinforce', True)])
def test_w_reinforce_keeps_groups_that_agree_unless_told_otherwise(advantage, keeps):
  """The advantages of w_reinforce don't compare samples of a group. It is meant to learn from groups of only wrong
  samples too.
  """
  run = lambda **changes: rl_run(load.load('tests/tiny_rl.py:init_from=x', {'rl.advantage.name': advantage, **changes}))
  assert run().rl.keeps_zero_variance is keeps
  assert run(**{'rl.zero_variance_groups': 'keep'}).rl.keeps_zero_variance
  assert not run(**{'rl.zero_variance_groups': 'replace'}).rl.keeps_zero_variance


def token_loss(logp, old, advantage, **options):
  array = lambda x: jnp.full((1, 1), x, jnp.float32)
  mask = jnp.ones((1, 1), bool)
  loss = lambda logp: pl.clip_higher(logp, array(old), array(advantage), mask, **options).loss_BT.sum()
  return [float(x.sum()) for x in jax.value_and_grad(loss)(array(logp))]


def test_dual_clip_bounds_what_one_token_can_cost():
  """In a wrong sample, a token whose probability has grown by e^5 would have a gradient of 148 without dual_clip."""
  assert token_loss(5.0, 0.0, -1.0)[1] == pytest.approx(np.exp(5), rel=1e-5)
  assert token_loss(5.0, 0.0, -1.0, dual_clip=3.0) == [3.0, 0.0]
  for logp, advantage in ((0.5, -1.0), (-1.0, -1.0), (5.0, 1.0), (0.1, 1.0)):
    assert token_loss(logp, 0.0, advantage, dual_clip=3.0) == token_loss(logp, 0.0, advantage)


def test_the_kl_term_off_policy_has_the_gradient_of_the_expectation_under_the_policy():
  """Samples are drawn from the old policy, and weighted by the ratio of both policies.

  The mean gradient of k2 over them must equal the gradient of the expectation under the new policy.
  """
  rng = np.random.default_rng(0)
  old, new, ref = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=5), jnp.float32)) for _ in range(3))
  config = pl.PolicyLossConfig(kl='k2', kl_weight=1.0, importance_cap=0.0)
  mask = jnp.ones((1, 1), bool)

  def mean_loss(logits):
    logp = jax.nn.log_softmax(logits)
    terms = [pl.policy_loss(config, logp[a].reshape(1, 1), old[a].reshape(1, 1), jnp.zeros((1, 1)), mask,
                            ref_logp_BT=ref[a].reshape(1, 1))[0] for a in range(5)]
    return sum(jnp.exp(old[a]) * terms[a] for a in range(5))

  want = jax.grad(lambda logits: jnp.sum(jnp.exp(jax.nn.log_softmax(logits)) * (jax.nn.log_softmax(logits) - ref)))(new)
  np.testing.assert_allclose(jax.grad(mean_loss)(new), want, atol=1e-5)


def test_problems_that_the_documents_may_hold_are_not_held_out():
  rl = rl_run(load.load('tests/tiny_rl.py:init_from=x')).rl
  parent = lambda fraction, uri: {'config': {'data': {
    'dir': 'd', 'sources': {'main': {'uri': uri}}, 'held_out_fraction': fraction}}, 'tokenizer': 't'}
  check_held_out(rl, parent(0.2, 'reasoning'))
  check_held_out(rl, parent(0.0, 'text:/any'))
  with pytest.raises(ConfigError, match='config.rl.task.held_out_fraction must be at most 0.1, what the documents'):
    check_held_out(rl, parent(0.1, 'reasoning:chain_sum'))
  with pytest.raises(ConfigError, match='config.rl.task.held_out_fraction must be at most 0.1'):  # two stages before
    check_held_out(rl, {**parent(0.0, 'text:/any'), 'inherited': setup._inherited(parent(0.1, 'reasoning'))})


def step(**changes):
  return {f'train/{name}': value for name, value in {
    'groups_learned_from': 4.0, 'truncated_share': 0.1, 'pass_rate': 0.3, 'entropy_drawn_nats': 0.5, 'undecided': 0.0,
    'tokens': 100.0, 'length_tokens': 10.0, **changes}.items()}  # ten answers


def entropies(share):
  return [step(entropy_drawn_nats=0.8)] * 10 + [step(entropy_drawn_nats=share * 0.8)] * 10


@pytest.mark.parametrize('kind, odd, well', [
  ('no signal', [step(groups_learned_from=0.0)] * 10, [step()] + [step(groups_learned_from=0.0)] * 9),
  ('undecided', [step(undecided=6.0)] * 5 + [step(undecided=5.0)] * 5, [step(undecided=5.0)] * 10),
  ('truncated', [step(truncated_share=0.96)] * 10, [step(truncated_share=0.95)] + [step(truncated_share=1.0)] * 9),
  ('flat', [step()] * 50 + [step(pass_rate=0.304)] * 50, [step()] * 50 + [step(pass_rate=0.306)] * 50),
  ('collapse', entropies(0.09), entropies(0.11))])
def test_warnings_come_at_their_thresholds(kind, odd, well):
  assert kind in warnings(odd)
  assert kind not in warnings(odd[:-1]) and kind not in warnings(well)
  assert not warnings([step(pass_rate=0.3 + i / 200) for i in range(100)])


def test_a_verifier_that_decides_nothing_is_not_blamed_on_the_problems():
  found = warnings([step(groups_learned_from=0.0, undecided=10.0)] * 10, 'ValueError: no idea')
  assert found == {'undecided': '100 % of the answers of 10 steps are undecided, and nothing is learned from them; the '
                                'first reason was: ValueError: no idea'}


def test_a_resumed_run_gives_the_warnings_of_an_uninterrupted_one(tmp_path):
  path = epath.Path(tmp_path / 'metrics.jsonl')
  lines = [step(entropy_drawn_nats=0.8, pass_rate=i / 100) for i in range(15)] + [step(entropy_drawn_nats=0.04)] * 150
  file = JsonLines(path, -1)
  for i, line in enumerate(lines, 1):
    file.write(i, {'eval/held_out/avg_at_4': 0.5})
    file.write(i, line)
  assert not needed([{'step': 1, 'train/groups_learned_from': 1.0}])  # a run from before the other figures were logged
  for start in (120, 15):
    JsonLines(path, start)  # which removes the lines of later steps
    history, whole = needed(lines_of(path)), lines[:start]
    for line in lines[start:]:
      history, whole = needed([*history, line]), [*whole, line]
      assert warnings(history) == warnings(whole) and len(history) <= 105
    assert warnings(history).keys() == {'collapse', 'flat'}


@pytest.mark.parametrize('name, shape', [
  ('advantages_BT', (4,)), ('advantages_BT', (4, 2)), ('old_logp_BT', (4,)), ('sampler_logp_BT', (4, 1)),
  ('mask_BT', (4,))])
def test_an_array_that_would_broadcast_is_named(name, shape):
  """With 4 rows of 4 tokens, an array [4] would be broadcast over rows, and the loss would look plausible."""
  arrays = {key: jnp.zeros((4, 4)) for key in ('logp_BT', 'old_logp_BT', 'advantages_BT', 'sampler_logp_BT')}
  arrays |= {'mask_BT': jnp.ones((4, 4), bool)} | {name: jnp.zeros(shape)}
  with pytest.raises(ValueError, match=name):
    pl.policy_loss(pl.PolicyLossConfig(), **arrays)


def test_a_group_must_have_k_samples_for_pass_at_k():
  run = lambda **settings: rl_run(load.load('tests/tiny_rl.py:init_from=x', {
    'rl.group_size': '8', **{f'rl.advantage.{key}': value for key, value in settings.items()}}))
  run(name='pass_at_k', k='8')
  run(name='grpo', k='9')  # which doesn't use it
  with pytest.raises(ConfigError, match=r'^config\.rl\.advantage\.k must be at most group_size = 8, got 9$'):
    run(name='pass_at_k', k='9')
