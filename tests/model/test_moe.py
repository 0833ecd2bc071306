"""Tests the mixture of experts against a slow loop, and sharded models against a single device.

Replayed choices of experts give the same result, and no token is dropped.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from betarank import model
from betarank.model import moe
from betarank.model.kernels import experts_tpu, rows_tpu
from tests import parameters

MOE = model.MoeConfig(experts=8, experts_per_token=2, expert_d_ff=16)
CONFIG = model.ModelConfig(
  vocab_size=64, layers=2, d_model=32, d_ff=48, heads=4, kv_heads=2, head_dim=8, rope_base=1e4, norm_eps=1e-6,
  tied_embeddings=True, compute_dtype='float32', remat_policy='none', scan_layers=True, moe=MOE)
SOFTMAX = dataclasses.replace(MOE, router='softmax', balance_weight=0.01, shared_d_ff=24)


def with_moe(**changes):
  return dataclasses.replace(CONFIG, moe=dataclasses.replace(MOE, **changes))


def same(a, b, tolerance=2e-5):
  """Asserts that each array of `a` equals the array of `b`, up to float32 rounding relative to its largest entry."""
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * (np.abs(y).max() + 0.05)), a, b)


def slow(c, params, x_BTD, real_BT):
  """Returns (out_BTD, chosen experts) of the reference: a loop over experts that applies each expert to all tokens."""
  m = c.moe
  logits = x_BTD @ params['router_DE']
  score = jax.nn.sigmoid(logits) if m.router == 'sigmoid' else jax.nn.softmax(logits)
  ranked = score + params['router_bias_E'][None, None] if m.router == 'sigmoid' else score
  chosen = jax.lax.top_k(jax.lax.stop_gradient(ranked), m.experts_per_token)[1]
  share = jnp.take_along_axis(score, chosen, -1)
  share = m.routed_scale * share / share.sum(-1, keepdims=True)
  out = jnp.zeros_like(x_BTD)
  for e in range(m.experts):
    hidden = jax.nn.silu(x_BTD @ params['gate_EDF'][e]) * (x_BTD @ params['up_EDF'][e])
    out += (hidden @ params['down_EFD'][e]) * jnp.sum(share, -1, where=chosen == e)[..., None]
  out = jnp.where(real_BT[..., None], out, 0)
  if m.shared_d_ff:
    p = params['shared']
    out += (jax.nn.silu(x_BTD @ p['gate_DF']) * (x_BTD @ p['up_DF'])) @ p['down_FD']
  return out, chosen


def layer_forward(c, params, x_BTD, real_BT):
  graph = nnx.graphdef(nnx.eval_shape(lambda: moe.MixtureOfExperts(c, jax.random.key(0))))
  return nnx.merge(graph, params)(x_BTD, real_BT)


def fast(c, params, x_BTD, real_BT):
  out_BTD, routing = layer_forward(c, params, x_BTD, real_BT)
  return out_BTD, routing.choices_LBTk


def values_and_gradients(f, c):
  def loss(params, x_BTD, real_BT):
    out, chosen = f(c, params, x_BTD, real_BT)
    return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), (out, chosen)

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def layer(c, seed=0, batch=8, length=6):
  """Returns (parameters of one layer, inputs x_BTD, real_BT). real_BT is False for padding."""
  params = jax.tree.map(lambda x_L: x_L[0], parameters.random(c, seed, scale=0.5)['layers']['feed_forward'])
  rng = np.random.default_rng(seed + 1)
  x_BTD = jnp.asarray(rng.normal(size=(batch, length, c.d_model)), jnp.float32)
  return params, x_BTD, jnp.asarray(rng.random((batch, length)) < 0.8)


def check(c, params, x_BTD, real_BT):
  (_, (want, chosen)), want_grads = values_and_gradients(slow, c)(params, x_BTD, real_BT)
  (_, (got, choices)), grads = values_and_gradients(fast, c)(params, x_BTD, real_BT)
  np.testing.assert_array_equal(choices, chosen)
  same((got, grads), (want, want_grads))
  return chosen


@pytest.mark.parametrize('changes', [
  {}, {'kernel': 'ragged'}, {'kernel': 'pallas'}, {'kernel': 'triton'},
  {'experts': 7, 'experts_per_token': 3, 'expert_d_ff': 5}, {'experts': 1, 'experts_per_token': 1},
  {'experts': 5, 'experts_per_token': 5, 'routed_scale': 2.5}, dataclasses.asdict(SOFTMAX)])
def test_fast_equals_a_slow_loop_over_experts(changes):
  c = with_moe(**changes)
  check(c, *layer(c))


def test_empty_experts_and_all_tokens_to_one_expert():
  c = with_moe(experts_per_token=1)
  params, x_BTD, real_BT = layer(c)
  params['router_bias_E'] = params['router_bias_E'].at[5].set(2.0)  # more than any difference of scores
  chosen = check(c, params, x_BTD, real_BT)
  assert (chosen == 5).all()
  chosen = check(c, params, x_BTD, jnp.zeros_like(real_BT))  # all padding


MESHES = [((1, 2, 4, 1, 1), True, 'pallas'), ((1, 1, 4, 2, 1), False, 'triton'), ((2, 1, 2, 2, 1), True, 'tiles'),
          ((1, 2, 2, 1, 2), False, 'ragged')]


@pytest.mark.parametrize('shape, skew, kernel', MESHES)
def test_sharded_equals_a_slow_loop_on_one_device(shape, skew, kernel):
  """With skew, all tokens go to the experts of one device, which then needs several passes."""
  c = with_moe(kernel=kernel)
  params, x_BTD, real_BT = layer(c, batch=16, length=32)
  if skew:
    params['router_bias_E'] = params['router_bias_E'].at[:2].set(2.0)
  (_, (want, chosen)), want_grads = values_and_gradients(slow, c)(params, x_BTD, real_BT)
  mesh = model.make_mesh(model.MeshConfig(*shape))
  with jax.set_mesh(mesh):
    axes = jax.tree.map(
      lambda names: names[1:], model.abstract(c)[2]['layers']['feed_forward'], is_leaf=lambda a: isinstance(a, tuple))
    params = jax.device_put(params, model.shardings(mesh, axes))
    x_BTD = jax.device_put(x_BTD, jax.NamedSharding(mesh, model.spec('batch', 'length', None)))
    real_BT = jax.device_put(real_BT, jax.NamedSharding(mesh, model.spec('batch', 'length')))
    (_, (got, choices)), grads = values_and_gradients(fast, c)(params, x_BTD, real_BT)
  np.testing.assert_array_equal(choices, chosen)
  same((got, grads), (want, want_grads))


def row(*lengths, total=16, rows=1):
  """Returns (tokens, positions, segments), each int32 [rows, total], of packed rows with documents of these lengths."""
  tokens = np.random.default_rng(sum(lengths)).integers(0, 64, (rows, total))
  positions, segments = np.zeros((2, rows, total), np.int32)
  start = 0
  for i, n in enumerate(lengths):
    positions[:, start : start + n] = np.arange(n)
    segments[:, start : start + n] = i + 1
    start += n
  return jnp.asarray(tokens, jnp.int32), jnp.asarray(positions), jnp.asarray(segments)


forward = jax.jit(model.forward_routed, static_argnums=0)


@pytest.fixture(scope='module')
def params():
  return parameters.random(CONFIG)


def test_replayed_choices_give_the_same_bits_and_other_choices_are_followed(params):
  batch = row(9, 5, rows=2)
  hidden, _, routing = forward(CONFIG, params, *batch)
  assert routing.choices_LBTk.shape == (2, 2, 16, 2) and routing.choices_LBTk.dtype == jnp.int32
  again, _, replayed = forward(CONFIG, params, *batch, None, routing.choices_LBTk)
  np.testing.assert_array_equal(hidden, again)
  np.testing.assert_array_equal(routing.load_LE, replayed.load_LE)
  other, _, replayed = forward(CONFIG, params, *batch, None, (routing.choices_LBTk + 1) % 8)
  assert np.abs(other - hidden).max() > 1e-3
  np.testing.assert_array_equal(replayed.load_LE, np.roll(routing.load_LE, 1, axis=1))


def test_padding_counts_in_no_statistic_and_changes_no_other_token(params):
  tokens, positions, segments = row(7, 5)
  hidden, _, routing = forward(CONFIG, params, tokens, positions, segments)
  np.testing.assert_array_equal(routing.load_LE.sum(1), [12 * 2] * 2)
  assert (routing.entropy_L > 0).all() and (routing.entropy_L < 12 * np.log(8)).all()
  changed, _, other = forward(CONFIG, params, tokens.at[0, 12:].set(9), positions, segments)
  np.testing.assert_array_equal(hidden[:, :12], changed[:, :12])
  np.testing.assert_array_equal(routing.load_LE, other.load_LE)


def test_cached_decode_equals_the_full_forward_and_replays(params):
  batch = [x[:, :12] for x in row(12)]
  full, _, routing = forward(CONFIG, params, *batch)
  cache, hiddens, choices, start = model.empty_cache(CONFIG, 1, 5, 7, size=4), [], [], 0
  for n in (5, *[1] * 7):
    piece = [x[:, start : start + n] for x in batch]
    recorded = routing.choices_LBTk[:, :, start : start + n] if n > 1 else None
    hidden, cache, part = forward(CONFIG, params, *piece, cache, recorded)
    hiddens.append(hidden)
    choices.append(part.choices_LBTk)
    start += n
  same(jnp.concatenate(hiddens, 1), full)
  np.testing.assert_array_equal(jnp.concatenate(choices, 2), routing.choices_LBTk)


@pytest.mark.slow
def test_scan_equals_loop_and_remat_equals_plain(params):
  batch = row(9, 6)
  # A weighted sum, because the last norm makes the sum of squares constant, so that its gradient vanishes.
  weight_11D = jnp.arange(CONFIG.d_model)[None, None] % 5 - 2.0

  def value_and_grad(c):
    return jax.jit(jax.value_and_grad(lambda p: jnp.sum(model.forward(c, p, *batch)[0] * weight_11D)))(params)

  want = value_and_grad(CONFIG)
  for changes in ({'scan_layers': False, 'remat_policy': 'full'}, {'remat_policy': 'matmuls'}):
    same(value_and_grad(dataclasses.replace(CONFIG, **changes)), want)


def test_the_balance_loss_follows_its_formula_and_is_1_when_scores_are_even():
  c = dataclasses.replace(CONFIG, moe=SOFTMAX)
  params, x_BTD, real_BT = layer(c)
  router_DE = params['router_DE']
  for scale in (0.0, 1.0, 10.0):
    params['router_DE'] = scale * router_DE
    routing = jax.jit(layer_forward, static_argnums=0)(c, params, x_BTD, real_BT)[1]
    score_NE = jax.nn.softmax(x_BTD @ params['router_DE'])[real_BT]
    chosen_Nk = np.asarray(routing.choices_LBTk)[real_BT]
    f_E = np.bincount(chosen_Nk.reshape(-1), minlength=8) / chosen_Nk.size
    np.testing.assert_allclose(routing.balance_L, 8 * np.sum(f_E * score_NE.mean(0)) * len(score_NE), rtol=1e-5)
    if scale == 0:
      np.testing.assert_allclose(routing.balance_L, real_BT.sum(), rtol=1e-6)


def test_parameter_counts_of_the_paper():
  """The expected counts, in billions, are in the paper's table of models. Counts of active parameters leave out
  embeddings.

  The models have Qwen's vocabulary, tied embeddings and a head_dim of 128.
  """
  base = dataclasses.replace(CONFIG, vocab_size=151_936, head_dim=128)
  dense = dataclasses.replace(base, moe=model.MoeConfig())
  experts = dataclasses.replace(MOE, experts=384, experts_per_token=12, expert_d_ff=320)
  for c, total, active in (
    (dataclasses.replace(dense, layers=28, d_model=1536, d_ff=4608, heads=16, kv_heads=4), 1.05, None),
    (dataclasses.replace(dense, layers=36, d_model=2560, d_ff=9728, heads=32, kv_heads=8), 4.02, None),
    (dataclasses.replace(base, layers=12, d_model=1024, heads=32, kv_heads=4, moe=experts), 4.80, 0.26),
    (dataclasses.replace(base, layers=16, d_model=1536, heads=32, kv_heads=4, moe=experts), 9.53, 0.52),
  ):
    counts = model.parameter_counts(c)
    assert round(sum(counts.values()) / 1e9, 2) == total
    assert sum(counts.values()) == sum(x.size for x in jax.tree.leaves(model.abstract(c)[1]))
    if active:
      met = model.parameter_counts(c, active=True)
      assert round((sum(met.values()) - met['embedding']) / 1e9, 2) == active
      assert model.flops_per_token(c, 0) == 6 * (sum(met.values()) - met['norms'])


def test_a_dense_model_has_no_active_experts():
  c = dataclasses.replace(CONFIG, moe=model.MoeConfig(experts=0, experts_per_token=12, expert_d_ff=320))
  assert model.parameter_counts(c, active=True) == model.parameter_counts(c)


def test_parameter_counts_are_the_sizes_of_the_parameters():
  for m in (MOE, SOFTMAX):
    c = dataclasses.replace(CONFIG, moe=m)
    made = sum(x.size for x in jax.tree.leaves(model.abstract(c)[1]))
    assert sum(model.parameter_counts(c).values()) == made


@pytest.mark.parametrize('changes, message', [
  ({'experts_per_token': 9}, 'experts_per_token must be from 1 to experts = 8, got 9'),
  ({'expert_d_ff': 0}, 'expert_d_ff must be > 0, got 0'),
  ({'experts': -1}, 'experts must be >= 0, got -1'),
  ({'router': 'tanh'}, "router must be one of sigmoid, softmax, got 'tanh'"),
  ({'balance_weight': 0.1}, "balance_weight must be 0 for router 'sigmoid'"),
  ({'experts': 0, 'router': 'softmax', 'balance_weight': 0.1}, 'balance_weight must be 0 without experts, got 0.1'),
  ({'experts': 0, 'shared_d_ff': 24}, 'shared_d_ff must be 0 without experts, got 24'),
])
def test_sizes_that_do_not_fit_are_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(MOE, **changes)


def test_a_mesh_that_does_not_divide_the_experts_names_the_weight():
  _, shapes, axes = model.abstract(CONFIG)
  with pytest.raises(ValueError, match='expert: 3 devices do not divide experts = 8 of layers.feed_forward.'):
    model.check_divides(shapes, axes, {'data': 1, 'fsdp': 1, 'expert': 3, 'context': 1, 'tensor': 1})


@pytest.mark.parametrize('cores', [1, 2])
@pytest.mark.parametrize('rows, sums, width', [(700, 300, 256), (40, 1000, 5), (3, 1, 128)])
def test_the_row_kernel_sums_the_rows_of_each_destination(monkeypatch, cores, rows, sums, width):
  """Some blocks of sums get no row, some get many tiles. Rows without a destination are NaN, and must not have an
  effect.
  """
  monkeypatch.setattr(rows_tpu, 'cores', lambda: cores)
  rng = np.random.default_rng(rows)
  to_P = rng.integers(0, sums + sums // 4, rows).astype(np.int32)
  to_P[: rows // 3] = sums // 2
  to_P[0] = sums
  y_PD = rng.normal(size=(rows, width)).astype(np.float32)
  want = np.zeros((sums, width), np.float32)
  np.add.at(want, to_P[to_P < sums], y_PD[to_P < sums])
  y_PD[to_P >= sums] = np.nan
  same(rows_tpu.add(jnp.asarray(y_PD), jnp.asarray(to_P), sums), want)
  nothing = rows_tpu.add(jnp.full((rows, width), jnp.nan), jnp.full(rows, sums), sums)
  np.testing.assert_array_equal(nothing, 0)


@pytest.mark.parametrize('experts', [1, 7])
def test_two_cores_equal_one(monkeypatch, experts):
  """Covers tiles of the same expert on both cores, and a core without tiles."""
  c = with_moe(experts=experts, experts_per_token=1, kernel='pallas')
  monkeypatch.setattr(experts_tpu, 'cores', lambda: 2)
  check(c, *layer(c))
