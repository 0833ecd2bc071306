"""Tests the blocks of Qwen3, Qwen2 and Llama 3: each equals a plain float64 implementation. Biases also work on a mesh
and when the model decodes with a cache. tests/train/test_hf.py compares them with transformers.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from betarank import model

QWEN3 = model.ModelConfig(
  vocab_size=64, layers=1, d_model=32, d_ff=48, heads=4, kv_heads=2, head_dim=16, rope_base=5e5, norm_eps=1e-5,
  tied_embeddings=False, compute_dtype='float32', remat_policy='none', scan_layers=True)
BLOCKS = {
  'qwen3': QWEN3,
  'qwen2': dataclasses.replace(QWEN3, qk_norm=False, qkv_bias=True),
  'llama': dataclasses.replace(QWEN3, qk_norm=False, rope_factor=8.0),
}
T = 12
POSITIONS_T = np.arange(T) * 500  # so far apart that all frequencies of the rotary embedding matter


def random_params(c):
  random = np.random.default_rng(0)
  return jax.tree.map(lambda x: random.normal(size=x.shape, scale=0.3).astype(np.float32), model.abstract(c)[1])


def frequency(c, i):
  """Returns the frequency of dimension pair i as transformers computes it for rope_type `llama3`."""
  plain = c.rope_base ** (-2 * i / c.head_dim)
  wavelength = 2 * math.pi / plain
  if c.rope_factor == 1 or wavelength < 8192 / 4:
    return plain
  if wavelength > 8192 / 1:
    return plain / c.rope_factor
  smooth = (8192 / wavelength - 1) / (4 - 1)
  return (1 - smooth) * plain / c.rope_factor + smooth * plain


def rotate(c, x_TH):
  half = c.head_dim // 2
  out_TH = np.empty_like(x_TH)
  for i in range(half):
    turn_T = np.exp(1j * POSITIONS_T * frequency(c, i)) * (x_TH[:, i] + 1j * x_TH[:, half + i])
    out_TH[:, i], out_TH[:, half + i] = turn_T.real, turn_T.imag
  return out_TH


def norm(x, scale, eps):
  return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


def reference(c, params, tokens_T):
  """Returns the logits [T, V], computed one head at a time."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  x_TD = params['embed_VD'][tokens_T]
  for i in range(c.layers):
    layer = jax.tree.map(lambda x, i=i: x[i], params['layers'])
    a, normed_TD = layer['attention'], norm(x_TD, layer['attention_norm_D'], c.norm_eps)
    for n in range(c.heads):
      q, k, v = (normed_TD @ a[name][:, head] + (a[bias][head] if c.qkv_bias else 0) for name, bias, head in (
        ('q_DNH', 'q_bias_NH', n), ('k_DKH', 'k_bias_KH', n // 2), ('v_DKH', 'v_bias_KH', n // 2)))
      if c.qk_norm:
        q, k = norm(q, a['q_norm_H'], c.norm_eps), norm(k, a['k_norm_H'], c.norm_eps)
      score_TS = rotate(c, q) @ rotate(c, k).T / math.sqrt(c.head_dim)
      weight_TS = np.exp(score_TS) * np.tri(T)
      x_TD = x_TD + weight_TS / weight_TS.sum(-1, keepdims=True) @ v @ a['o_NHD'][n]
    normed_TD, f = norm(x_TD, layer['feed_forward_norm_D'], c.norm_eps), layer['feed_forward']
    gate_TF = normed_TD @ f['gate_DF']
    x_TD = x_TD + gate_TF / (1 + np.exp(-gate_TF)) * (normed_TD @ f['up_DF']) @ f['down_FD']
  return norm(x_TD, params['norm_D'], c.norm_eps) @ params['head_DV']


def case(name):
  """Returns (config, parameters, (tokens, positions, segments), a function that compares hidden states with reference
  logits from a position on).
  """
  c = BLOCKS[name]
  params = random_params(c)
  tokens_T = np.random.default_rng(1).integers(0, 64, T)
  want_TV = reference(c, params, tokens_T)
  row = [jnp.asarray(x, jnp.int32)[None] for x in (tokens_T, POSITIONS_T, np.ones(T))]
  return c, params, row, lambda hidden_BTD, start=0: np.testing.assert_allclose(
    hidden_BTD[0] @ params['head_DV'], want_TV[start:], rtol=0, atol=2e-5 * np.abs(want_TV).max())


@pytest.mark.parametrize('name', BLOCKS)
def test_logits_are_those_of_a_plain_implementation(name):
  c, params, row, close = case(name)
  assert sum(model.parameter_counts(c).values()) == sum(x.size for x in jax.tree.leaves(params))
  forward = jax.jit(model.forward, static_argnums=0)
  close(forward(c, params, *row)[0])
  if name != 'qwen2':  # tests/model/test_transformer.py tests decoding with Qwen3's block
    return
  cache = model.empty_cache(c, 1, T - 1, 1, 4)
  _, cache = forward(c, params, *(x[:, :-1] for x in row), cache)
  close(forward(c, params, *(x[:, -1:] for x in row), cache)[0], T - 1)


def test_biases_on_a_mesh():  # tests/model/test_transformer.py tests meshes with Qwen3's block
  c, params, row, close = case('qwen2')
  mesh = model.make_mesh(model.MeshConfig(1, 2, 1, 2, 2))
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, model.shardings(mesh, model.abstract(c)[2]))
    close(jax.jit(model.forward, static_argnums=0)(c, placed, *(jnp.concatenate([x] * 2) for x in row))[0])


def test_a_factor_of_rope_below_one_is_refused():
  with pytest.raises(ValueError, match='rope_factor must be >= 1, got 0.5'):
    dataclasses.replace(QWEN3, rope_factor=0.5)
