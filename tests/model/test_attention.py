"""Tests that every attention kernel gives the values and gradients of the plain implementation, with several documents
per row.
"""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from betarank import model
from betarank.model import attention
from betarank.model.attention import rows_attention
from betarank.model.transformer import remat_policy

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
