"""Tests that the building blocks of the decoder equal plain implementations."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from betarank import model
from betarank.model import layers, norm
from betarank.model.kernels import norm_triton, swiglu_triton
from tests import parameters


@pytest.mark.parametrize(
  'shape', [None, (2, 2, 1, 2, 1), (1, 2, 2, 1, 2), (1, 1, 1, 3, 1)],
  ids=lambda shape: f'mesh{shape}' if shape else 'alone')
def test_the_lookup_for_gpus_has_the_gradient_of_the_plain_one(monkeypatch, shape):
  """Some tokens occur never, some once, some often. The second mesh splits rows, length and width. The other two split
  the vocabulary and don't divide the length, so the plain lookup is used.
  """
  rng = np.random.default_rng(0)
  tokens_BT = jnp.asarray(rng.zipf(1.3, (4, 64)) % 50, jnp.int32)
  table_VD, weight_BTD = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((50, 8), (4, 64, 8)))
  assert 0 < len(np.unique(tokens_BT)) < 50

  def run():
    total = lambda table_VD: jnp.sum(layers.lookup(table_VD, tokens_BT, jnp.float32) * weight_BTD)
    return jax.jit(jax.value_and_grad(total))(table_VD)

  want = run()
  monkeypatch.setattr(layers, 'platform', lambda: 'gpu')
  used = []
  find = layers._lookup_sorted
  monkeypatch.setattr(layers, '_lookup_sorted', lambda *args: used.append(1) or find(*args))
  with mesh_of(shape):
    got = run()
  assert bool(used) == (shape in (None, (2, 2, 1, 2, 1)))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('shape', [None, (2, 1, 1, 2, 2), (1, 1, 1, 3, 1)],
                         ids=lambda shape: f'mesh{shape}' if shape else 'alone')
@pytest.mark.parametrize('dtype, error', [('float32', 1e-6), ('bfloat16', 2**-8)])
def test_swiglu_for_gpus_has_the_gradient_of_the_plain_one(monkeypatch, shape, dtype, error):
  """The kernel's last block is only partly filled. The last mesh doesn't divide the length."""
  rng = np.random.default_rng(0)
  gate, up, dout = (jnp.asarray(rng.normal(size=(2, 8, 150)), dtype) for _ in range(3))

  def run(*arrays):
    out, gradient = jax.vjp(layers.swiglu, *arrays[:2])
    return [np.asarray(x, np.float64) for x in (out, *gradient(arrays[2]))]

  want = run(*(x.astype(jnp.float32) for x in (gate, up, dout)))
  monkeypatch.setattr(layers, 'platform', lambda: 'gpu')
  used = []
  gradient = functools.partial(swiglu_triton.gradient, interpret=True)
  monkeypatch.setattr(swiglu_triton, 'gradient', lambda *args: used.append(1) or gradient(*args))
  with mesh_of(shape):
    got = run(gate, up, dout)
  assert bool(used) == (shape != (1, 1, 1, 3, 1))
  for a, b in zip(got, want, strict=True):
    assert np.linalg.norm(a - b) < error * np.linalg.norm(b)


def test_swiglu_for_gpus_has_a_gradient_for_arrays_beyond_the_kernels_offsets(monkeypatch):
  monkeypatch.setattr(layers, 'platform', lambda: 'gpu')
  x = jax.ShapeDtypeStruct((1, 2**18, 2**13), jnp.bfloat16)  # 2^31 elements
  total = lambda gate, up: jnp.sum(layers.swiglu(gate, up).astype(jnp.float32))
  assert jax.eval_shape(jax.grad(total, (0, 1)), x, x) == (x, x)


@pytest.mark.parametrize('shape', [None, (2, 1, 1, 2, 2), (1, 1, 1, 3, 1)],
                         ids=lambda shape: f'mesh{shape}' if shape else 'alone')
@pytest.mark.parametrize('dtype, error', [('float32', 1e-6), ('bfloat16', 2**-8)])
@pytest.mark.parametrize('added', [True, False])
def test_add_norm_for_gpus_equals_the_plain_one(monkeypatch, added, shape, dtype, error):
  """The width isn't a power of 2, and a block of rows of the kernels is only partly filled. The last mesh doesn't
  divide the length.
  """
  rng = np.random.default_rng(0)
  x, out, dsum, dnormed = (jnp.asarray(rng.normal(size=(2, 10, 160)), dtype) for _ in range(4))
  scale = jnp.asarray(rng.normal(size=160), jnp.float32)
  out = out if added else None

  def run(*arrays):
    *arrays, dsum, dnormed = arrays
    results, gradient = jax.vjp(lambda x, out, scale: norm.add_norm(x, out, nnx.Param(scale), 1e-6), *arrays)
    return [np.asarray(x, np.float64) for x in jax.tree.leaves((results, gradient((dsum, dnormed))))]

  monkeypatch.setattr(norm, 'platform', lambda: 'cpu')
  want = run(*jax.tree.map(lambda x: x.astype(jnp.float32), (x, out, scale, dsum, dnormed)))
  used = use_kernels(monkeypatch)
  with mesh_of(shape):
    got = run(x, out, scale, dsum, dnormed)
  assert used == (set() if shape == (1, 1, 1, 3, 1) else {'add_norm', 'add_norm_gradient'})
  assert len(got) == (5 if added else 4)
  for a, b in zip(got, want, strict=True):
    assert np.linalg.norm(a - b) < error * np.linalg.norm(b)


@pytest.mark.parametrize('shape', [None, (2, 1, 1, 2, 2), (1, 1, 1, 1, 3)],
                         ids=lambda shape: f'mesh{shape}' if shape else 'alone')
@pytest.mark.parametrize('dtype, error', [('float32', 2e-6), ('bfloat16', 2**-8)])
def test_norm_rotate_for_gpus_equals_the_plain_one(monkeypatch, shape, dtype, error):
  """Half a head's width isn't a power of 2, positions are large, and a block of the kernels is only partly filled. The
  last mesh doesn't divide the heads.
  """
  rng = np.random.default_rng(0)
  x, dout = (jnp.asarray(rng.normal(size=(2, 10, 4, 96)), dtype) for _ in range(2))
  scale = jnp.asarray(rng.normal(size=96), jnp.float32)
  positions = jnp.asarray(rng.integers(0, 100_000, (2, 10)), jnp.int32)

  def run(x, scale, dout):
    results, gradient = jax.vjp(
      lambda x, scale: norm.norm_rotate(x, nnx.Param(scale), 1e-6, positions, 1e4, 1.0), x, scale)
    return [np.asarray(x, np.float64) for x in (results, *gradient(dout))]

  monkeypatch.setattr(norm, 'platform', lambda: 'cpu')
  want = run(x.astype(jnp.float32), scale, dout.astype(jnp.float32))
  used = use_kernels(monkeypatch)
  with mesh_of(shape):
    got = run(x, scale, dout)
  assert used == (set() if shape == (1, 1, 1, 1, 3) else {'norm_rotate', 'norm_rotate_gradient'})
  for a, b in zip(got, want, strict=True):
    assert np.linalg.norm(a - b) < error * np.linalg.norm(b)


@pytest.mark.parametrize('remat_policy, scan_layers', [('none', False), ('attention', True)])
def test_a_model_with_these_kernels_has_the_gradient_of_the_plain_one(monkeypatch, remat_policy, scan_layers):
  c = model.ModelConfig(
    vocab_size=64, layers=2, d_model=32, d_ff=48, heads=2, kv_heads=1, head_dim=32, rope_base=1e4, norm_eps=1e-6,
    tied_embeddings=True, compute_dtype='float32', remat_policy=remat_policy, scan_layers=scan_layers)
  rng, params = np.random.default_rng(0), parameters.random(c)
  tokens = jnp.asarray(rng.integers(0, 64, (2, 16)), jnp.int32)
  positions, weight = jnp.tile(jnp.arange(16)[None], (2, 1)), jnp.asarray(rng.normal(size=(2, 16, 32)), jnp.float32)

  def run():
    total = lambda params: jnp.sum(model.forward(c, params, tokens, positions, jnp.ones_like(tokens))[0] * weight)
    return jax.jit(jax.grad(total))(params)

  monkeypatch.setattr(norm, 'platform', lambda: 'cpu')
  want = run()
  used = use_kernels(monkeypatch)
  monkeypatch.setattr(norm_triton, 'ELEMENTS_BACK', 256)  # four blocks and more
  got = run()
  assert used == {'add_norm', 'add_norm_gradient', 'norm_rotate', 'norm_rotate_gradient'}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max()), got, want)


def test_on_a_mesh_the_largest_array_of_a_kernel_is_the_part_of_a_device(monkeypatch):
  monkeypatch.setattr(norm, 'platform', lambda: 'gpu')
  x_BTD = jax.ShapeDtypeStruct((2, 2**15, 2**15), jnp.bfloat16)
  assert not norm._has_kernel(x_BTD, norm.STREAM)
  with mesh_of((2, 1, 1, 1, 1)):
    assert norm._has_kernel(x_BTD, norm.STREAM)


def use_kernels(monkeypatch):
  """Makes model/norm.py use the kernels for GPUs. Without a GPU, they are interpreted.

  A gradient has at most two programs, so that a program processes several blocks if there are more than two. Returns a
  set, to which each call of a kernel adds the kernel's name.
  """
  used = set()
  monkeypatch.setattr(norm, 'platform', lambda: 'gpu')
  monkeypatch.setattr(norm_triton, 'PROGRAMS', 2)

  def use(name):
    def call(*args, **named):
      used.add(name)
      return kernel(*args, **named, interpret=jax.default_backend() != 'gpu')

    kernel = getattr(norm_triton, name)
    monkeypatch.setattr(norm_triton, name, call)

  for name in ('add_norm', 'add_norm_gradient', 'norm_rotate', 'norm_rotate_gradient'):
    use(name)
  return used


def mesh_of(shape):
  """Returns a context with a mesh of this shape; without one if it is None."""
  if shape is None:
    return contextlib.nullcontext()
  return jax.set_mesh(model.make_mesh(model.MeshConfig(*shape), jax.devices()[:math.prod(shape)]))


def test_a_bf16x3_matmul_is_as_accurate_as_a_float32_one():
  rng = np.random.default_rng(0)
  x_BTD = jnp.asarray(rng.normal(size=(2, 24, 64)), jnp.bfloat16)
  w_DE, dout_BTE = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((64, 16), (2, 24, 16)))
  x, w, dout = (np.asarray(value).astype(np.float64) for value in (x_BTD, w_DE, dout_BTE))

  @jax.jit
  def run(x_BTD, w_DE, dout_BTE):
    out_BTE, gradient = jax.vjp(layers.matmul_bf16x3, x_BTD, w_DE)
    return out_BTE, *gradient(dout_BTE)

  wanted = x @ w, dout @ w.T, np.einsum('btd,bte->de', x, dout)
  for got, want, limit in zip(run(x_BTD, w_DE, dout_BTE), wanted, (2e-7, 2**-8, 2e-7), strict=True):
    assert np.linalg.norm(got - want) < limit * np.linalg.norm(want)
  once = run(x_BTD, w_DE.astype(jnp.bfloat16).astype(jnp.float32), dout_BTE)[0]  # with w rounded to bfloat16
  assert np.linalg.norm(once - x @ w) > 1e-4 * np.linalg.norm(x @ w)
