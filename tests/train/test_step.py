"""Tests one update of training: microbatches give the update of the whole batch, and sharding and packing don't change
it.

With beta = 0, it is the update of cross-entropy.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from betarank import model
from betarank.data import Batch
from betarank.objectives import ObjectiveConfig, RewardShaping
from betarank.runtime.state import TrainState, compiler_options, create_state
from betarank.train import score
from betarank.train.optimizer import OptimizerConfig, make_optimizer, schedule
from betarank.train.score import means, sums
from betarank.train.step import make_evaluate, make_step
from tests import parameters

C = model.ModelConfig(
  vocab_size=64, layers=2, d_model=32, d_ff=48, heads=4, kv_heads=2, head_dim=8, rope_base=1e4, norm_eps=1e-6,
  tied_embeddings=True, compute_dtype='float32', remat_policy='none', scan_layers=True)
ADAMW = OptimizerConfig(lr=1e-2, warmup_steps=1, decay_fraction=0.0, final_lr=0.0, b1=0.9, b2=0.95, eps=1e-8,
                        weight_decay=0.1, clip_norm=1.0)
SHAPED = RewardShaping(beta=-0.25, lambda_head=0.05, lambda_tail=-0.1, top_k=8)
OBJECTIVE = ObjectiveConfig(beta=-0.25, lambda_head=0.05, lambda_tail=-0.1, top_k=8)
BYTES_V = np.arange(64) % 5
ONE_DEVICE = (1, 1, 1, 1, 1)


def batch(rows=8, length=16, seed=0):
  """Returns a batch. Each row has two documents and some padding, with other lengths in each row."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 64, (rows, length + 1)).astype(np.int32)
  positions, segments = np.zeros((2, rows, length), np.int32)
  for r in range(rows):
    a, b = 4 + r % 5, 9 + r % 7
    positions[r] = np.r_[np.arange(a), np.arange(b - a), np.zeros(length - b)]
    segments[r] = np.r_[np.full(a, 1), np.full(b - a, 2), np.zeros(length - b)]
  return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), positions, segments)


@functools.cache
def program(shape, microbatches, objective, c, optimizer):
  """Returns (mesh, optimizer, update), the same ones for the same arguments, so that an update is compiled once."""
  mesh = model.make_mesh(model.MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
  tx = make_optimizer(optimizer, 100, model.abstract(c)[2])
  return mesh, tx, make_step(c, objective, tx, BYTES_V, microbatches)


def updates(shape=ONE_DEVICE, microbatches=1, steps=3, objective=OBJECTIVE, the_batch=None, c=C,
            optimizer=ADAMW):
  """Returns (parameters, metrics) after `steps` steps on a mesh of this shape."""
  mesh, tx, step = program(shape, microbatches, objective, c, optimizer)
  with jax.set_mesh(mesh):
    state = create_state(c, tx, mesh, seed=0, params=parameters.random(c))
    placed = jax.device_put(the_batch or batch(), jax.NamedSharding(mesh, model.spec('batch', 'length')))
    for _ in range(steps):
      state, metrics = step(state, placed)
    return jax.device_get((state.params, metrics))


@pytest.fixture(scope='module')
def single():
  """Returns (parameters, metrics) after one step and after three, on one device."""
  return updates(steps=1), updates()


total = jax.jit(score.total, static_argnums=(0, 3))


def same(a, b, tolerance=3e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * (np.abs(y).max() + 1e-9)), a, b)


def assert_same_updates(single, *args, **kwargs):
  """Checks that `updates` with these arguments gives the same as `single`.

  The metrics of the first step are those before any update. After it, Adam's division makes the rounding of gradients
  near zero visible, in the parameters and in the gradient norm.
  """
  (_, first), (params, last) = single
  same(updates(*args, steps=1, **kwargs)[1], first, 2e-6)
  found, metrics = updates(*args, **kwargs)
  same({**metrics, 'grad_norm': 0.0}, {**last, 'grad_norm': 0.0})
  same(metrics['grad_norm'], last['grad_norm'], 1e-4)
  same(found, params, 2e-3)


@pytest.mark.parametrize('microbatches', [4])
def test_accumulated_equals_whole_batch(single, microbatches):
  assert_same_updates(single, microbatches=microbatches)


@pytest.mark.parametrize('shape', [(1, 8, 1, 1, 1), (2, 2, 1, 1, 2), (2, 1, 1, 2, 2)])
def test_sharded_equals_single(single, shape):
  assert_same_updates(single, shape)


def test_loss_and_gradient_sharded_equal_single_before_any_optimizer():
  def gradients(shape):
    mesh = model.make_mesh(model.MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(mesh):
      shardings = model.shardings(mesh, model.abstract(C)[2])
      params = jax.device_put(parameters.random(C), shardings)
      placed = jax.device_put(batch(), jax.NamedSharding(mesh, model.spec('batch', 'length')))
      return jax.device_get(jax.jit(jax.value_and_grad(lambda p: score.total(C, p, placed, SHAPED)[0]))(params))

  same(gradients((2, 2, 1, 1, 2)), gradients(ONE_DEVICE), 1e-5)


def test_packed_equals_separate():
  """Documents that are packed into rows have the loss and gradient of the same documents in rows of their own."""
  packed = batch()
  alone = {name: [] for name in ('tokens', 'targets', 'positions', 'segments')}
  for r in range(8):
    for s in (1, 2):
      where = packed.segments_BT[r] == s
      pad = lambda x: np.pad(x, (0, 16 - len(x)))
      for name in alone:
        alone[name].append(pad(getattr(packed, f'{name}_BT')[r][where]))
      alone['segments'][-1] = np.minimum(alone['segments'][-1], 1)
  alone = Batch(*(np.stack(alone[name]) for name in ('tokens', 'targets', 'positions', 'segments')))
  params = parameters.random(C)
  grad = jax.jit(jax.value_and_grad(lambda p, b: score.total(C, p, b, SHAPED)[0]))
  same(grad(params, packed), grad(params, alone), 1e-5)


def test_answers_packed_with_a_mask_equal_answers_alone():
  """Loss, gradient and all figures are those of the answers. The targets in prompts don't matter."""
  packed = batch()
  counts = np.arange(16)[None] % 16 >= np.array([3, 6])[np.maximum(packed.segments_BT - 1, 0)]
  masked = dataclasses.replace(packed, counts_BT=counts)
  params = parameters.random(C)
  run = jax.jit(lambda p, b: jax.value_and_grad(
    lambda p: (lambda total, loss, stats, _: (total, sums(b, loss, stats, jnp.asarray(BYTES_V))))(
      *score.total(C, p, b, SHAPED)), has_aux=True)(p))
  (total, figures), grads = jax.device_get(run(params, masked))
  other = dataclasses.replace(masked, targets_BT=np.where(masked.counted_BT, packed.targets_BT, 10**6))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(run(params, other)), ((total, figures), grads))
  # Each document in a row of its own, with its prompt.
  rows = [(r, packed.segments_BT[r] == s) for r in range(8) for s in (1, 2)]
  alone = [np.stack([np.pad(x[r][where], (0, 16 - where.sum())) for r, where in rows])
           for x in (packed.tokens_BT, packed.targets_BT, packed.positions_BT, packed.segments_BT, counts)]
  alone[3] = np.minimum(alone[3], 1)
  same(jax.device_get(run(params, Batch(*alone))), ((total, figures), grads), 1e-5)
  assert figures['tokens'] == masked.counted_BT.sum() < (packed.segments_BT > 0).sum()


def test_what_stands_in_padding_changes_nothing():
  plain, dirty = batch(), batch()
  noise = np.random.default_rng(1).integers(0, 64, (8, 16))
  dirty.tokens_BT[:] = np.where(dirty.segments_BT > 0, dirty.tokens_BT, noise)
  dirty.targets_BT[:] = np.where(dirty.segments_BT > 0, dirty.targets_BT, 10**6)
  params = parameters.random(C)
  run = jax.jit(jax.value_and_grad(lambda p, b: score.total(C, p, b, SHAPED)[0]))
  jax.tree.map(np.testing.assert_array_equal, run(params, plain), run(params, dirty))


def test_an_all_padding_batch_is_no_update_from_the_data_and_no_nan():
  empty = batch()
  empty.segments_BT[:] = 0
  params, metrics = updates(the_batch=empty, steps=1)
  assert metrics['loss'] == 0 and metrics['tokens'] == 0 and metrics['grad_norm'] == 0
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_plain_cross_entropy_equals_optax_and_metrics_are_what_they_say():
  b = batch()
  params = parameters.random(C)
  hidden, _ = jax.jit(model.forward, static_argnums=0)(C, params, b.tokens_BT, b.positions_BT, b.segments_BT)
  logits = np.asarray(hidden @ model.head(C, params), np.float64)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  mask = b.segments_BT > 0
  target_logp = np.take_along_axis(logp, b.targets_BT[..., None], -1)[..., 0]
  got = means(make_evaluate(C, ObjectiveConfig(top_k=8), BYTES_V)(TrainState(jnp.int32(0), params, None), b))
  entropy = -(np.exp(logp) * logp).sum(-1)
  rank = (logp > target_logp[..., None]).sum(-1)
  ordered = np.argsort(-logp, -1, kind='stable')[..., 8:]
  tail = np.where(ordered == b.targets_BT[..., None], 0, np.take_along_axis(np.exp(logp), ordered, -1)).sum(-1)
  n = mask.sum()
  for name, want in {
    'loss_nats': -target_logp[mask].mean(), 'ce_nats': -target_logp[mask].mean(), 'entropy_nats': entropy[mask].mean(),
    'rank1_accuracy': (rank == 0)[mask].mean(), 'tail_mass': tail[mask].mean(), 'tokens': n,
    'bits_per_byte': -target_logp[mask].sum() / BYTES_V[b.targets_BT][mask].sum() / np.log(2),
  }.items():
    np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-7, err_msg=name)
  want = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits, jnp.float32), b.targets_BT)[mask].sum()
  np.testing.assert_allclose(total(C, params, b, RewardShaping(top_k=8))[0], want, rtol=1e-6)


def test_sums_of_parts_add_to_the_whole():
  b = batch()
  params = parameters.random(C)
  part = lambda rows: jax.tree.map(lambda x: x[rows], b)
  run = jax.jit(lambda b: sums(b, *score.total(C, params, b, SHAPED)[1:3], jnp.asarray(BYTES_V)))
  whole, a, c = jax.device_get((run(b), run(part(slice(0, 4))), run(part(slice(4, 8)))))
  assert a['tokens'] != c['tokens']
  for name in whole:
    np.testing.assert_allclose(a[name] + c[name], whole[name], rtol=1e-5)


def test_sums_over_a_long_validation_do_not_overflow():
  """The bytes of 30 batches of 16.8M tokens are more than an int32 holds."""
  part, total = {'bytes': np.int32(75_497_472), 'nats': np.float32(2**24 + 2)}, {}
  for _ in range(30):
    total = score.add(total, part)
  assert total == {'bytes': 30 * 75_497_472, 'nats': 30 * (2**24 + 2)}


def test_training_learns_a_repeated_batch():
  _, first = updates(steps=1, objective=ObjectiveConfig(top_k=8))
  _, last = updates(steps=30, objective=ObjectiveConfig(top_k=8))
  assert last['ce'] < 0.6 * first['ce']


def test_a_scheduled_objective_is_what_it_is_at_each_step_and_is_traced_once():
  """beta changes linearly from 0 to -0.5 over two steps. The third update must equal that of a constant -0.5."""
  traces = []

  class Counted(ObjectiveConfig):
    def at(self, step):
      traces.append(step)
      return super().at(step)

  objective = Counted(schedule='linear', beta_from=0.0, beta=-0.5, schedule_start=0, schedule_end=2, top_k=8)
  tx = make_optimizer(ADAMW, 100, model.abstract(C)[2])
  mesh = model.make_mesh(model.MeshConfig(*ONE_DEVICE), jax.devices()[:1])
  with jax.set_mesh(mesh):
    state = create_state(C, tx, mesh, seed=0, params=parameters.random(C))
    step = make_step(C, objective, tx, BYTES_V)
    for beta in (0.0, -0.25, -0.5, -0.5):
      shaping = RewardShaping(beta=beta, top_k=8)
      want, *_ = total(C, state.params, batch(), shaping)
      state, metrics = step(state, batch())
      np.testing.assert_allclose(metrics['loss'], want, rtol=1e-5)
  assert len(traces) == 1


@pytest.mark.parametrize('beta, lambda_tail, masses, microbatches',
                         [(-0.25, 0.0, False, 2), (0.0, -0.1, True, 1)])
def test_basic_statistics_spare_the_masses_where_no_lambda_needs_them_and_change_nothing_else(
    beta, lambda_tail, masses, microbatches):
  objective = ObjectiveConfig(beta=beta, lambda_tail=lambda_tail, top_k=8)
  tx = make_optimizer(ADAMW, 100, model.abstract(C)[2])
  after = {}
  for stats in ('full', 'basic'):
    state = TrainState(jnp.zeros((), jnp.int32), params := parameters.random(C), jax.jit(tx.init)(params))
    after[stats] = make_step(C, objective, tx, BYTES_V, microbatches, stats)(state, batch())
  (full_state, full), (basic_state, basic) = after['full'], after['basic']
  assert ('tail_mass' in basic, 'head_mass' in basic, 'tail_mass' in full) == (masses, masses, True)
  for name in basic:
    np.testing.assert_allclose(basic[name], full[name], rtol=1e-6)
  for a, b in zip(jax.tree.leaves(basic_state.params), jax.tree.leaves(full_state.params)):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_schedule_is_warmup_stable_decay():
  c = OptimizerConfig(lr=1.0, warmup_steps=10, decay_fraction=0.2, final_lr=0.1, b1=0.9, b2=0.95, eps=1e-8,
                      weight_decay=0.1, clip_norm=1.0)
  rate = schedule(c, 100)
  assert 0 < rate(0) < rate(5) < rate(10) == rate(50) == rate(79) == 1.0
  assert rate(79) > rate(90) > rate(99)
  np.testing.assert_allclose(rate(100), 0.1, rtol=1e-6)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_only_matrices_decay(name):
  axes = model.abstract(C)[2]
  tx = make_optimizer(OptimizerConfig(lr=1.0, warmup_steps=0, decay_fraction=0.0, final_lr=0.0, b1=0.9, b2=0.95,
                                      eps=1e-8, weight_decay=0.5, clip_norm=1.0, name=name), 10, axes)
  params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), model.abstract(C)[1])
  updates = jax.jit(lambda p: tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)[0])(params)
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    decays = 'norm' not in jax.tree_util.keystr(path)
    np.testing.assert_allclose(update, -0.5 if decays else 0.0)


def test_adamw_is_that_of_its_paper_after_clipping():
  """The first gradient is longer than clip_norm, the second one isn't. Source: arXiv 1711.05101, algorithm 2."""
  rng, c = np.random.default_rng(0), ADAMW
  want = {'matrix': rng.normal(size=(4, 3)), 'norm': rng.normal(size=4)}
  first, second = ({name: np.zeros_like(x) for name, x in want.items()} for _ in range(2))  # moments
  tx = make_optimizer(c, 100, {'matrix': ('embed', 'mlp'), 'norm': ('norm',)})
  params = jax.tree.map(np.float32, want)
  state, update = tx.init(params), jax.jit(tx.update)
  for t, (norm, rate) in enumerate([(5 * c.clip_norm, c.lr / 2), (0.3 * c.clip_norm, c.lr)], 1):  # one step of warm-up
    grads = {name: rng.normal(size=x.shape) for name, x in want.items()}
    grads = jax.tree.map(lambda g: g * norm / np.sqrt(sum((x**2).sum() for x in grads.values())), grads)  # noqa: B023
    updates, state = update(jax.tree.map(np.float32, grads), state, params)
    params = jax.tree.map(np.add, params, updates)
    for name, decay in (('matrix', c.weight_decay), ('norm', 0.0)):
      g = grads[name] * min(1, c.clip_norm / norm)
      first[name] = c.b1 * first[name] + (1 - c.b1) * g
      second[name] = c.b2 * second[name] + (1 - c.b2) * g**2
      change = first[name] / (1 - c.b1**t) / (np.sqrt(second[name] / (1 - c.b2**t)) + c.eps)
      want[name] = want[name] - rate * (change + decay * want[name])
      np.testing.assert_allclose(params[name], want[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize('name, value, message', [
  ('lr', 0.0, 'lr must be > 0'), ('b2', 1.0, r'b2 must be in \[0, 1\)'), ('decay_fraction', 1.5, 'decay_fraction must'),
  ('warmup_steps', -1, 'warmup_steps must be >= 0'), ('name', 'sgd', "name must be one of adamw, muon, got 'sgd'"),
  ('decay_shape', 'sqrt', "decay_shape must be one of linear, cosine, 1-sqrt, got 'sqrt'")])
def test_bad_optimizer_values_are_refused_by_name(name, value, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(ADAMW, **{name: value})


MOE = dataclasses.replace(C, moe=model.MoeConfig(experts=8, experts_per_token=2, expert_d_ff=16))


def test_experts_even_out_from_a_skewed_start_and_the_bias_moves_choices_only():
  """The busiest expert's load falls below 1.3 times the mean. Gradients and weight decay don't change the router's
  bias.
  """
  mesh = model.make_mesh(model.MeshConfig(*ONE_DEVICE), jax.devices()[:1])
  c = dataclasses.replace(MOE, moe=dataclasses.replace(MOE.moe, bias_update_rate=0.01))
  with jax.set_mesh(mesh):
    tx = make_optimizer(dataclasses.replace(ADAMW, lr=1e-3), 100, model.abstract(c)[2])
    state = create_state(c, tx, mesh, seed=0, params=parameters.random(c))
    skew_LE = jnp.tile(jnp.array([0.5, 0.3] + [0.0] * 6), (2, 1))
    router = state.params['layers']['feed_forward']
    router['router_bias_E'] = jax.device_put(skew_LE, router['router_bias_E'].sharding)
    step = make_step(c, ObjectiveConfig(top_k=8), tx, BYTES_V)
    figures, batches = [], [batch(rows=48, seed=seed) for seed in range(5)]
    for n in range(80):
      before = state.params['layers']['feed_forward']['router_bias_E']
      state, metrics = step(state, batches[n % 5])
      load_LE = metrics['expert_load']
      moved = state.params['layers']['feed_forward']['router_bias_E'] - before
      np.testing.assert_allclose(moved, 0.01 * np.sign(load_LE.mean(1, keepdims=True) - load_LE), atol=1e-6)
      figures.append(means(metrics)['expert_load_max_over_mean'])
  assert figures[0] > 2
  assert np.mean(figures[-20:]) < 1.3
  assert metrics['router_bias_min'] == state.params['layers']['feed_forward']['router_bias_E'].min()


def test_a_mixture_of_experts_sharded_and_accumulated_equals_single():
  want_params, want = updates(c=MOE)
  params, metrics = updates((1, 2, 2, 1, 2), microbatches=2, c=dataclasses.replace(MOE, remat_policy='full'))
  assert metrics['expert_load'].sum() == metrics['tokens'] * 2 * 2
  np.testing.assert_array_equal(metrics['expert_load'], want['expert_load'])
  same({k: metrics[k] for k in ('loss', 'grad_norm', 'router_entropy')},
       {k: want[k] for k in ('loss', 'grad_norm', 'router_entropy')})
  same(params, want_params, 2e-3)


def test_the_balance_loss_is_in_the_total_and_not_in_the_reported_loss():
  b = batch()
  c = [dataclasses.replace(MOE, moe=dataclasses.replace(MOE.moe, router='softmax', balance_weight=w)) for w in (0, 0.1)]
  params = parameters.random(c[0])
  (plain, loss_BT, *_), (with_loss, same_BT, _, routing) = (total(c, params, b, RewardShaping(top_k=8)) for c in c)
  np.testing.assert_array_equal(loss_BT, same_BT)
  np.testing.assert_allclose(with_loss - plain, 0.1 * routing.balance_L.mean(), rtol=1e-3)


def test_the_balance_loss_of_microbatches_is_their_mean_over_tokens():
  """Each microbatch has its own f (shares of tokens) and p (mean probabilities) of the experts.

  The balance loss of the whole batch would have another gradient.
  """
  softmax = dataclasses.replace(MOE.moe, router='softmax', balance_weight=10.0)
  c = dataclasses.replace(MOE, layers=1, moe=softmax)
  b, params = batch(rows=4), parameters.random(c)
  tx = make_optimizer(ADAMW, 100, model.abstract(c)[2])
  _, metrics = make_step(c, ObjectiveConfig(top_k=8), tx, BYTES_V, microbatches=2)(
    TrainState(jnp.int32(0), params, jax.jit(tx.init)(params)), b)
  gradient = jax.jit(jax.grad(lambda p, part: score.total(c, p, part, RewardShaping(top_k=8))[0]))
  parts = [jax.device_get(gradient(params, jax.tree.map(lambda x: x[i::2], b))) for i in range(2)]  # noqa: B023
  whole = jax.tree.map(lambda x, y: (x + y) / (b.segments_BT > 0).sum(), *parts)
  norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(whole)))
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-5)


def test_xla_knows_the_options_for_a_gpu(monkeypatch):
  """XLA raises an error for an option that it doesn't have any more."""
  monkeypatch.setattr(model, 'platform', lambda: 'gpu')
  options = compiler_options()
  assert options and jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
  with pytest.raises(jax.errors.JaxRuntimeError, match='No such compile option'):
    jax.jit(lambda x: x + 1, compiler_options={next(iter(options)) + '_': False})(1)


@pytest.mark.parametrize('microbatches', [1, 2])
def test_the_update_holds_no_constant_on_a_device(microbatches):
  """To compile such a constant into the program, JAX would read it back, which the training loop forbids. On a CPU it
  isn't a transfer, so only this test shows it there.
  """
  tx = make_optimizer(ADAMW, 100, model.abstract(C)[2])
  mesh = model.make_mesh(model.MeshConfig(*ONE_DEVICE), jax.devices()[:1])
  with jax.set_mesh(mesh):
    state = create_state(C, tx, mesh, seed=0)
    for program in make_step(C, OBJECTIVE, tx, BYTES_V, microbatches), make_evaluate(C, OBJECTIVE, BYTES_V):
      constants = program.trace(state, batch()).jaxpr.consts
      assert len(constants) == 1 and not isinstance(constants[0], jax.Array)
