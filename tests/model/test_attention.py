"""Tests that every attention kernel gives the values and gradients of the plain implementation, with several documents
per row.
"""

import contextlib
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from betarank import model
from betarank.model import attention
from betarank.model.attention import rows_attention
from betarank.model.transformer import remat_policy
from tests import parameters

B, T, N, K, H = 2, 256, 4, 2, 128
on_cpu = pytest.mark.skipif(jax.default_backend() == 'gpu', reason='interpreted; float32 blocks do not fit a card')


@pytest.fixture(scope='module')
def inputs():
  rng = np.random.default_rng(0)
  normal = lambda heads: jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32)
  segments_BT = np.zeros((B, T), np.int32)  # padding at the end of row 1, and documents that end within a block
  segments_BT[0, :100], segments_BT[0, 100:] = 1, 2
  segments_BT[1, :30], segments_BT[1, 30:240] = 1, 2
  return normal(N), normal(K), normal(K), normal(N), jnp.asarray(segments_BT)


def output_and_gradients(kernel, q, k, v, weight, segments_BT):
  """Returns (output of the kernel, gradients with respect to q, k and v of the sum of output * weight)."""
  real = (segments_BT > 0)[..., None, None]

  def total(q, k, v):
    out = rows_attention(kernel, segments_BT, q.dtype, *k.shape[2:])(q, k, v)
    return jnp.sum(out * weight, where=real), jnp.where(real, out, 0)

  (_, out), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  return out, *grads


@pytest.mark.parametrize('mesh', [None, (2, 1, 1, 2, 2), (1, 2, 1, 1, 2)])
def test_splash_equals_plain(inputs, mesh):
  want = output_and_gradients('plain', *inputs)
  if mesh is None:
    got = output_and_gradients('splash', *inputs)
  else:
    devices = jax.devices()[: int(np.prod(mesh))]
    with jax.set_mesh(model.make_mesh(model.MeshConfig(*mesh), devices)):
      got = output_and_gradients('splash', *inputs)
  for a, b in zip(want, got, strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5)


@pytest.mark.parametrize('mesh', [None, (2, 1, 1, 1, 2)])
def test_blocks_equal_plain(inputs, mesh):
  """The length isn't a multiple of the block, and there is padding."""
  cut = [x[:, :200] for x in inputs]
  want = output_and_gradients('plain', *cut)
  with jax.set_mesh(model.make_mesh(model.MeshConfig(*mesh), jax.devices()[:4])) if mesh else contextlib.nullcontext():
    got = output_and_gradients('blocks', *cut)
  for a, b in zip(want, got, strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5)


@on_cpu
@pytest.mark.parametrize('mesh', [None, (2, 1, 1, 1, 2), (1, 2, 1, 2, 1)])
def test_triton_equals_plain(inputs, mesh):
  want = output_and_gradients('plain', *inputs)
  with jax.set_mesh(model.make_mesh(model.MeshConfig(*mesh), jax.devices()[:4])) if mesh else contextlib.nullcontext():
    got = output_and_gradients('triton', *inputs)
  for a, b in zip(want, got, strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5)


@on_cpu
def test_triton_equals_plain_for_documents_of_any_length():
  """There are documents of one token, documents that end at a block's end or inside a block, and padding between
  documents.

  Each query head has a key head of its own.
  """
  rng = np.random.default_rng(1)
  rows, length = 3, 512
  ends = [[128, 256, 512], [1, 2, 3, 63, 64, 65, 200, 201, 383, 384, 511, 512], [7, 130, 131, 400, 512]]
  segments_BT = jnp.asarray([np.searchsorted(e, np.arange(length), 'right') + 1 for e in ends], jnp.int32)
  segments_BT = jnp.where(segments_BT == 4, 0, segments_BT)
  inputs = [jnp.asarray(rng.normal(size=(rows, length, 2, 32)), jnp.float32) for _ in range(4)]
  want, got = (output_and_gradients(kernel, *inputs, segments_BT) for kernel in ('plain', 'triton'))
  for a, b in zip(want, got, strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5)


@pytest.mark.parametrize('kernel, length, kv_heads, shape, message', [
  ('triton', 200, 2, None, 'attention=triton needs rows of a multiple of 128 tokens, got 200'),
  ('hopper', 12, 2, None, 'attention=hopper needs rows of a multiple of 128 tokens, got 12'),
  ('splash', 200, 2, None, 'attention=splash needs rows of a multiple of 128 tokens, got 200'),
  ('splash', 384, 2, (1, 1, 1, 2, 1), 'attention=splash needs rows of a multiple of 256 tokens, got 384'),
  ('triton', 256, 2, (1, 1, 1, 2, 2), r'needs kv_heads that 4 devices \(tensor x context\) divide, got 2'),
  ('hopper', 256, 2, None, 'attention=hopper does not support head_dim=128 and bfloat16 on cpu with jax'),
])
@on_cpu
def test_a_kernel_that_does_not_support_the_rows_is_refused_by_name(kernel, length, kv_heads, shape, message):
  mesh = shape and model.make_mesh(model.MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
  with jax.set_mesh(mesh) if mesh else contextlib.nullcontext(), pytest.raises(ValueError, match=message):
    rows_attention(kernel, jnp.ones((B, length), jnp.int32), jnp.bfloat16, kv_heads, H)


@pytest.mark.parametrize('kernel, card, width, dtype', [
  ('hopper', 'NVIDIA A100-SXM4-80GB', 128, 'bfloat16'), ('hopper', 'NVIDIA H100 80GB HBM3', 128, 'float32'),
  ('triton', 'NVIDIA A100-SXM4-80GB', 48, 'float32'), ('cudnn', 'NVIDIA A100-SXM4-80GB', 128, 'float32')])
def test_a_kernel_that_does_not_support_the_card_or_the_heads_is_refused_by_name(kernel, card, width, dtype):
  card = jax.sharding.AbstractDevice(device_kind=card, num_cores=132, platform='gpu')
  mesh = jax.sharding.AbstractMesh(
    (1,) * 5, model.sharding.MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 5, abstract_device=card)
  with jax.sharding.use_abstract_mesh(mesh), pytest.raises(
      ValueError, match=f'attention={kernel} does not support head_dim={width} and {dtype} on {card.device_kind} with'):
    model.check_kernel(kernel, 256, 2, width, jnp.dtype(dtype))


@pytest.mark.parametrize('kernel', ['triton', 'splash', 'hopper', 'cudnn'])
def test_a_prefill_of_any_length_runs_whatever_kernel_is_named(kernel):
  c = model.ModelConfig(
    vocab_size=64, layers=1, d_model=32, d_ff=48, heads=4, kv_heads=2, head_dim=32, rope_base=1e4, norm_eps=1e-6,
    tied_embeddings=True, compute_dtype='float32', remat_policy='none', scan_layers=True, attention=kernel)
  params, length = parameters.random(c), 13
  tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 64, (B, length)), jnp.int32)
  args = params, tokens_BT, jnp.tile(jnp.arange(length)[None], (B, 1)), jnp.ones_like(tokens_BT)
  want = model.forward(dataclasses.replace(c, attention='plain'), *args)[0]
  got = model.forward(c, *args, model.empty_cache(c, B, length, 3))[0]
  np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize('capability, width, want', [('8.0', 128, 'cudnn'), ('8.0', 256, 'plain'),
                                                     ('9.0', 256, 'cudnn'), ('10.0', 256, 'cudnn')])
def test_cudnn_is_chosen_only_for_heads_that_it_supports(monkeypatch, capability, width, want):
  card = types.SimpleNamespace(device_kind='NVIDIA A100', compute_capability=capability)
  monkeypatch.setattr(attention, 'platform', lambda: 'gpu')
  monkeypatch.setattr(jax, 'devices', lambda: [card])
  assert next(attention._supported(130, 2, width, jnp.bfloat16)) == want  # no kernel of ours supports this length


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='cuDNN needs an NVIDIA GPU')
def test_cudnn_equals_plain(inputs):
  want = output_and_gradients('plain', *inputs)
  got = output_and_gradients('cudnn', *(x.astype(jnp.bfloat16) for x in inputs[:4]), inputs[4])
  for a, b in zip(want, got, strict=True):
    a, b = np.asarray(a), np.asarray(b, np.float32)
    assert np.max(np.abs(a - b)) < 0.02 * np.max(np.abs(a))  # bfloat16 has 8 significant bits


@pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason='the Hopper kernels need a newer JAX')
@pytest.mark.parametrize('width', [64, 128])
def test_hopper_kernels_are_lowered_for_an_h100(width):
  """The kernels run only on such a card. This test lowers them on any machine, in a scan with remat."""
  card = jax.sharding.AbstractDevice(device_kind='NVIDIA H100 80GB HBM3', num_cores=132, platform='gpu')
  shape = lambda heads: jax.ShapeDtypeStruct((2, 256, heads, width), jnp.bfloat16)

  def total(q, k, v, segments_BT):
    run = rows_attention('auto', segments_BT, q.dtype, 2, width)
    layer = jax.checkpoint(lambda q, _: (run(q, k, v), None), policy=remat_policy(('attention',)))
    return jnp.sum(jax.lax.scan(layer, q, jnp.arange(2))[0].astype(jnp.float32))

  mesh = jax.sharding.AbstractMesh(
    (1,) * 5, model.sharding.MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 5, abstract_device=card)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(
      shape(4), shape(2), shape(2), jax.ShapeDtypeStruct((2, 256), jnp.int32))
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('attention_backward') and 'mosaic_gpu' in text


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs a Hopper GPU')
@pytest.mark.parametrize('kernel', ['hopper', 'triton'])
@pytest.mark.parametrize('heads', [(4, 2, 128), (2, 2, 64)])
def test_hopper_and_triton_equal_plain_on_a_card(kernel, heads):
  rng = np.random.default_rng(1)
  n, k, width = heads
  length, ends = 512, [[128, 256, 512], [1, 2, 3, 63, 64, 65, 200, 201, 383, 384, 511, 512], [7, 130, 131, 400, 512]]
  segments_BT = jnp.asarray([np.searchsorted(e, np.arange(length), 'right') + 1 for e in ends], jnp.int32)
  inputs = [jnp.asarray(rng.normal(size=(3, length, h, width)), jnp.bfloat16) for h in (n, k, k, n)]
  want = output_and_gradients('plain', *(x.astype(jnp.float32) for x in inputs), segments_BT)
  got = output_and_gradients(kernel, *inputs, segments_BT)
  for a, b in zip(want, got, strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) < 5e-3 * np.linalg.norm(a)  # bfloat16 has 8 significant bits
