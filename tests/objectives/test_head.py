"""Tests that the chunked head equals the reference for any cotangents, masks and options. Also tests its errors and its
memory.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from betarank.objectives import (
  Layout,
  RewardShaping,
  linear_token_stats,
  shaped_linear_loss,
  shaped_linear_total,
  shaped_loss,
)

SHAPING = RewardShaping(beta=-0.25, lambda_head=0.1, lambda_tail=-0.1, top_k=5)
RNG = np.random.default_rng(0)
H = jnp.asarray(RNG.normal(size=(3, 7, 8)), jnp.float32)
HEAD = jnp.asarray(RNG.normal(size=(8, 40)), jnp.float32)
X = jnp.asarray(RNG.integers(0, 40, (3, 7)))


def total_of(h, w, x=X, shaping=SHAPING, **options):
  return shaped_linear_total(h, w, x, shaping, chunk_tokens=4, **options)[0]


def close(got, wanted, **tolerance):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
    np.testing.assert_allclose(a, b, **{'rtol': 1e-5, 'atol': 1e-5, **tolerance})


def test_any_function_of_the_losses_can_be_differentiated():
  f = lambda losses: jnp.sum(jnp.sin(losses) * jnp.arange(21.0).reshape(3, 7))
  got, wanted = (jax.jit(jax.grad(lambda h, w, losses=losses: f(losses(h, w)), (0, 1)))(H, HEAD) for losses in (
    lambda h, w: shaped_linear_loss(h, w, X, SHAPING, chunk_tokens=4)[0], lambda h, w: shaped_loss(h @ w, X, SHAPING)))
  close(got, wanted, atol=1e-4)


@pytest.mark.parametrize('chunk', [1, 4, 21, 100, None])
def test_chunk_size_changes_nothing(chunk):
  f = lambda h, w: shaped_linear_total(h, w, X, SHAPING, chunk_tokens=chunk)[0]
  wanted = jax.jit(jax.value_and_grad(lambda h, w: shaped_loss(h @ w, X, SHAPING).sum(), (0, 1)))(H, HEAD)
  close(jax.jit(jax.value_and_grad(f, (0, 1)))(H, HEAD), wanted)


def test_weights_scale_losses_and_zero_weights_hide_even_nan():
  weights = jnp.asarray(RNG.integers(0, 3, (3, 7)), jnp.float32) * 0.7
  live = weights > 0
  hostile_h = jnp.where(live[..., None], H, jnp.nan)
  hostile_x = jnp.where(live, X, -7)
  plain = lambda h, w: jnp.sum(weights * shaped_loss(h @ w, X, SHAPING))
  per_token = lambda h, w: shaped_linear_loss(h, w, hostile_x, SHAPING, weights=weights)[0].sum()
  wanted = jax.jit(jax.value_and_grad(plain, (0, 1)))(H, HEAD)
  close(jax.jit(jax.value_and_grad(per_token, (0, 1)))(hostile_h, HEAD), wanted)
  got = jax.jit(jax.value_and_grad(lambda h, w: total_of(h, w, hostile_x, weights=weights), (0, 1)))(hostile_h, HEAD)
  close(got, wanted)
  assert (np.asarray(got[1][0])[~np.asarray(live)] == 0).all()
  loss, stats = shaped_linear_loss(hostile_h, HEAD, hostile_x, SHAPING, weights=weights, stats='full')
  assert (np.asarray(loss)[~np.asarray(live)] == 0).all() and np.asarray(stats.target_valid).all()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stats))
  nothing = jax.jit(jax.value_and_grad(lambda h, w: total_of(h, w, weights=jnp.zeros((3, 7), bool)), (0, 1)))(H, HEAD)
  assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(nothing))


def test_soft_cap_z_loss_and_temperature():
  shaping, options = dataclasses.replace(SHAPING, z_loss=0.01), {'soft_cap': 3.0, 'temperature': 0.6}
  capped = lambda h, w: 3 * jnp.tanh(h @ w / 3) / 0.6

  def plain(h, w):
    z = capped(h, w)
    return jnp.sum(shaped_loss(z, X, SHAPING) + 0.01 * jax.nn.logsumexp(z, -1) ** 2)

  wanted = jax.jit(jax.value_and_grad(plain, (0, 1)))(H, HEAD)
  reference = lambda h, w: shaped_loss(capped(h, w), X, shaping).sum()
  close(jax.jit(jax.value_and_grad(reference, (0, 1)))(H, HEAD), wanted)
  total = lambda h, w: total_of(h, w, shaping=shaping, **options)
  close(jax.jit(jax.value_and_grad(total, (0, 1)))(H, HEAD), wanted)
  per_token = lambda h, w: shaped_linear_loss(h, w, X, shaping, chunk_tokens=4, **options)[0].sum()
  close(jax.jit(jax.value_and_grad(per_token, (0, 1)))(H, HEAD), wanted)


def test_compute_dtype():
  got = jax.grad(lambda w: total_of(H, w, compute_dtype=jnp.bfloat16))(HEAD)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, jax.grad(lambda w: total_of(H, w))(HEAD), rtol=0.1, atol=0.1)


def test_no_top_k_is_computed_unless_a_lambda_or_the_statistics_need_it():
  basic = lambda shaping, **o: shaped_linear_loss(H, HEAD, X, shaping, **o)[1]
  assert basic(RewardShaping(beta=0.5)).tail_mass is None
  assert basic(RewardShaping(beta=0.5, top_k=5), stats='full').tail_mass is not None
  assert basic(SHAPING).head_mass is not None
  hlo = lambda s: jax.jit(lambda h: shaped_linear_total(h, HEAD, X, s)[0]).lower(H).as_text()
  assert 'top_k' in hlo(SHAPING) and 'top_k' not in hlo(RewardShaping(beta=0.5))


def test_targets_outside_the_vocabulary_give_nan_and_no_gradient():
  x = X.at[0, 0].set(40).at[1, 1].set(-1)

  def f(h, head):
    total, *rest = shaped_linear_total(h, head, x, SHAPING)
    return total, rest

  (total, (loss, stats)), grads = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(H, HEAD)
  wrong = np.asarray(x != X)
  assert np.isnan(total)
  np.testing.assert_array_equal(np.isnan(loss), wrong)
  np.testing.assert_array_equal(stats.target_valid, ~wrong)
  assert all(np.isfinite(g).all() for g in grads) and (np.asarray(grads[0])[wrong] == 0).all()
  np.testing.assert_array_equal(np.isnan(shaped_loss(H @ HEAD, x, SHAPING)), wrong)


@pytest.mark.parametrize('arguments,message', [
  ({'head': HEAD[:5]}, 'head must be [D, V]'),
  ({'targets': X[:2]}, 'targets must have the shape of hidden'),
  ({'targets': X.astype(float)}, 'targets must be integer'),
  ({'weights': jnp.ones(3)}, 'weights must have the shape of targets'),
  ({'stats': 'all'}, "stats must be basic or full, got 'all'"),
  ({'temperature': 0.0}, 'temperature must be positive, got 0.0'),
  ({'soft_cap': -1.0}, 'soft_cap must be positive, got -1.0'),
  ({'chunk_tokens': 0}, 'chunk_tokens must be positive, got 0'),
  ({'layout': Layout(vocab='nowhere')}, "layout.vocab: the current mesh has no axis 'nowhere'"),
])
def test_arguments_that_do_not_fit_are_refused_by_name(arguments, message):
  arguments = {'hidden': H, 'head': HEAD, 'targets': X, 'shaping': SHAPING} | arguments
  with pytest.raises(ValueError) as error:
    jax.eval_shape(lambda: shaped_linear_loss(**arguments))
  assert str(error.value).startswith(message)


def test_a_head_larger_than_the_vocabulary_is_refused_where_it_is_used():
  """With k > V, every wrong token is in the head (the top k). lambda_tail would then have no effect, without an error.
  """
  message = re.escape('top_k must be <= the vocabulary size 40, got 41')
  shaping = RewardShaping(lambda_tail=-0.1, top_k=41)
  for function in (
    lambda: shaped_linear_loss(H, HEAD, X, shaping),
    lambda: shaped_linear_total(H, HEAD, X, RewardShaping(top_k=41), stats='full'),
    lambda: shaped_loss(H @ HEAD, X, shaping),
    lambda: linear_token_stats(H, HEAD, X, top_k=41),
  ):
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(function)
  jax.eval_shape(lambda: shaped_linear_loss(H, HEAD, X, RewardShaping(top_k=41)))  # k isn't used
  jax.eval_shape(lambda: shaped_linear_loss(H, HEAD, X, RewardShaping(lambda_tail=-0.1, top_k=40)))


@pytest.mark.parametrize('function', [
  lambda *a: shaped_linear_total(*a, SHAPING)[::2],
  lambda *a: (lambda loss, stats: (loss.sum(), stats))(*shaped_linear_loss(*a, SHAPING)),
], ids=['total', 'per token'])
def test_memory(function):
  """For 32,768 tokens and a vocabulary of 131,072, forward and backward take at most a tenth of the memory of all
  logits.

  The program is only compiled, not run.
  """
  tokens, vocab, width = 32_768, 131_072, 2048
  h, head = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((tokens, width), (width, vocab)))
  step = jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))
  compiled = step.lower(h, head, jax.ShapeDtypeStruct((tokens,), jnp.int32)).compile()
  share = compiled.memory_analysis().temp_size_in_bytes / (4 * tokens * vocab)
  assert share <= 0.10, share
