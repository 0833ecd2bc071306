"""Tests the forward function: packed documents equal separate documents, and decoding with a cache equals the full
pass.

A scan over layers equals a loop, remat changes nothing, and a sharded model equals a model on a single device.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from betarank import model
from tests import parameters

CONFIG = model.ModelConfig(
  vocab_size=64, layers=3, d_model=32, d_ff=48, heads=4, kv_heads=2, head_dim=8, rope_base=1e4, norm_eps=1e-6,
  tied_embeddings=True, compute_dtype='float32', remat_policy='none', scan_layers=True)


@pytest.fixture(scope='module')
def params():
  return parameters.random(CONFIG)


def row(*lengths, total=16):
  """Returns (tokens, positions, segments), each int32 [1, total], of one packed row with documents of these lengths."""
  tokens = np.random.default_rng(sum(lengths)).integers(0, 64, (1, total))
  positions, segments = np.zeros((2, 1, total), np.int32)
  start = 0
  for i, n in enumerate(lengths):
    positions[0, start : start + n] = np.arange(n)
    segments[0, start : start + n] = i + 1
    start += n
  return jnp.asarray(tokens, jnp.int32), jnp.asarray(positions), jnp.asarray(segments)


forward = jax.jit(model.forward, static_argnums=0)


def loss(config, params, tokens, positions, segments):
  hidden, _ = model.forward(config, params, tokens, positions, segments)
  logits = hidden @ model.head(config, params)
  return jnp.sum(jax.nn.logsumexp(logits, -1) - logits[..., 3], where=segments > 0)


value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)


def same(a, b, tolerance=2e-5):
  """Asserts that each array of `a` equals the array of `b`, up to float32 rounding relative to its largest entry."""
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max()), a, b)


def test_parameter_counts_are_the_sizes_of_the_parameters():
  for tied in (True, False):
    c = dataclasses.replace(CONFIG, tied_embeddings=tied)
    made = sum(x.size for x in jax.tree.leaves(model.abstract(c)[1]))
    assert sum(model.parameter_counts(c).values()) == made


def test_packed_equals_separate(params):
  tokens, positions, segments = row(7, 5, 2)
  packed, _ = forward(CONFIG, params, tokens, positions, segments)
  start = 0
  for n in (7, 5, 2):
    alone, _ = forward(
      CONFIG, params, tokens[:, start : start + n], positions[:, start : start + n], jnp.ones((1, n), jnp.int32))
    same(packed[:, start : start + n], alone)
    start += n


def test_nothing_sees_padding_or_the_future(params):
  tokens, positions, segments = row(7, 5)
  before, _ = forward(CONFIG, params, tokens, positions, segments)
  changed, _ = forward(CONFIG, params, tokens.at[0, 12:].set(9), positions, segments)
  np.testing.assert_array_equal(before[:, :12], changed[:, :12])
  changed, _ = forward(CONFIG, params, tokens.at[0, 5:7].set(9), positions, segments)
  np.testing.assert_array_equal(before[:, :5], changed[:, :5])
  assert np.abs(before[:, 5:7] - changed[:, 5:7]).max() > 1e-3


def test_scan_equals_loop_and_remat_equals_plain(params):
  batch = row(9, 6)
  want = value_and_grad(CONFIG, params, *batch)
  for changes in ({'scan_layers': False}, *({'remat_policy': name} for name in model.config.REMAT if name != 'none'),
                  {'remat_policy': 'matmuls', 'offload_activations': True}):
    same(value_and_grad(dataclasses.replace(CONFIG, **changes), params, *batch), want)


@pytest.mark.parametrize('chunks', [(1,) * 12, (5,) + (1,) * 7, (12,)])
def test_cached_decode_equals_full_forward(params, chunks):
  tokens, positions, segments = (x[:, :12] for x in row(12))
  full, _ = forward(CONFIG, params, tokens, positions, segments)
  cache, parts, start = model.empty_cache(CONFIG, 1, 12, 12, size=4), [], 0
  for n in chunks:
    piece = (x[:, start : start + n] for x in (tokens, positions, segments))
    hidden, cache = forward(CONFIG, params, *piece, cache)
    parts.append(hidden)
    start += n
  same(jnp.concatenate(parts, 1), full)
  assert cache.length_B.tolist() == [chunks.count(1)]


def test_padded_prefill_of_unequal_rows_equals_each_alone(params):
  a, b = row(8, total=8)[0], row(5, total=5)[0]
  pad = [(0, 0), (0, 3)]
  tokens = jnp.concatenate([a, jnp.pad(b, pad, constant_values=7)])
  positions = jnp.concatenate([jnp.arange(8)[None], jnp.pad(jnp.arange(5)[None], pad)])
  segments = jnp.concatenate([jnp.ones((1, 8), jnp.int32), jnp.pad(jnp.ones((1, 5), jnp.int32), pad)])
  _, cache = forward(CONFIG, params, tokens, positions, segments, model.empty_cache(CONFIG, 2, 8, 2, size=4))
  assert cache.table.prefix_B.tolist() == [8, 5]
  new = jnp.array([[11], [12]])
  ones = jnp.ones((2, 1), jnp.int32)
  got, _ = forward(CONFIG, params, new, jnp.array([[8], [5]]), ones, cache)
  for i, prompt in enumerate((a, b)):
    whole = jnp.concatenate([prompt, new[i : i + 1]], 1)
    n = whole.shape[1]
    want, _ = forward(CONFIG, params, whole, jnp.arange(n)[None], jnp.ones((1, n), jnp.int32))
    same(got[i], want[:, -1])


def test_a_row_that_does_not_decode_leaves_the_cache_as_it_is(params):
  tokens, positions, segments = (x[:, :6] for x in row(6))
  _, cache = forward(CONFIG, params, tokens, positions, segments, model.empty_cache(CONFIG, 1, 6, 6, size=4))
  _, after = forward(CONFIG, params, tokens[:, :1], positions[:, :1] + 6, segments[:, :1] * 0, cache)
  same(after.pages_LP2KSH, cache.pages_LP2KSH)
  assert after.length_B.tolist() == [0]


@pytest.mark.parametrize('shape', [(8, 1, 1, 1, 1), (1, 8, 1, 1, 1), (1, 4, 1, 1, 2), (1, 2, 1, 2, 2)])
def test_sharded_equals_single(params, shape):
  """The loss and all gradients equal those of one device, for data, FSDP, context and tensor axes, alone and combined.
  """
  batch = [jnp.concatenate([x] * 8) for x in row(9, 6)]
  want = value_and_grad(CONFIG, params, *batch)
  mesh = model.make_mesh(model.MeshConfig(*shape))
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, model.shardings(mesh, model.abstract(CONFIG)[2]))
    batch = jax.device_put(batch, jax.NamedSharding(mesh, model.spec('batch', 'length')))
    got = value_and_grad(CONFIG, placed, *batch)
  same(got, want)


def test_no_sharded_device_receives_the_whole_table(params):
  """A device looks up tokens in its part of the width D. So hidden states are sent, but the table isn't.

  The gradient of the table is sent only between devices that hold the same part of it.
  """
  mesh = model.make_mesh(model.MeshConfig(2, 4, 1, 1, 1))
  batch = [jnp.concatenate([x] * 8) for x in row(9, 6)]
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, model.shardings(mesh, model.abstract(CONFIG)[2]))
    batch = jax.device_put(batch, jax.NamedSharding(mesh, model.spec('batch', 'length')))
    summed = lambda params: jnp.sum(forward(CONFIG, params, *batch)[0] ** 2)
    hlo = jax.jit(jax.grad(summed)).lower(placed).compile().as_text()
  sent = re.findall(r'= (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)[-\w]*\(', hlo)
  assert sent and any('all-to-all' in line for line in hlo.splitlines())
  whole = f'[{CONFIG.vocab_size},{CONFIG.d_model}]'
  assert not [kinds for kinds in sent if whole in kinds]


def test_parameters_are_created_sharded_and_equal_on_any_mesh():
  mesh = model.make_mesh(model.MeshConfig(1, 4, 1, 1, 2))
  shardings = model.shardings(mesh, model.abstract(CONFIG)[2])
  born, alone = (jax.jit(model.init, static_argnums=0, out_shardings=out)(CONFIG, jax.random.key(0))
                 for out in (shardings, None))
  same(born, alone, 1e-6)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(born))
  q = born['layers']['attention']['q_DNH']
  assert q.sharding.shard_shape(q.shape) == (3, 32 // 4, 4 // 2, 8)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'kv_heads': 3}, 'kv_heads must divide heads = 4, got 3'),
    ({'head_dim': 7}, 'head_dim must be even'),
    ({'remat_policy': 'some'}, "remat_policy must be one of none, matmuls, qkv, attention, full, got 'some'"),
    ({'offload_activations': True}, "offload_activations needs a remat_policy that saves something .*, got 'none'"),
    ({'layers': 0}, 'layers must be > 0, got 0'),
  ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **changes)


def test_a_mesh_that_does_not_divide_the_model_names_the_weight():
  _, shapes, axes = model.abstract(CONFIG)
  with pytest.raises(ValueError, match='tensor: 8 devices do not divide kv_heads = 2 of layers.attention.k_DKH'):
    model.check_divides(shapes, axes, {'data': 1, 'fsdp': 1, 'expert': 1, 'context': 1, 'tensor': 8})


def test_a_mesh_must_make_up_the_devices():
  with pytest.raises(ValueError, match='does not make up the 8 devices'):
    model.MeshConfig(3, 1, 1, 1, 1).shape(8)
  assert model.MeshConfig(2, -1, 1, 1, 2).shape(8) == (2, 2, 1, 1, 2)
