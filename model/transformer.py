"""The decoder: Qwen3's block (RMSNorm, rotary GQA with QK-norm, SwiGLU), layers stacked and scanned.

NNX declares the parameters; all else is plain JAX. `init` makes the parameters as a tree of arrays, `forward`
is a pure function of them that serves training, prefill and decoding (with a cache). Parameters are float32;
matmuls run in the config's compute type; norms and softmax in float32.

# B batch  T tokens  S cache slots  D width  N query heads  K key heads  H head width  F hidden  L layers  V vocabulary
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model.attention import attend, rotate, rows_attention, visible
from model.config import REMAT, ModelConfig
from model.decode import Cache, slots_for, write, write_heads
from model.sharding import constrain

Params = dict[str, Any]


def weight(key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...], *, std: float) -> nnx.Param:
  """A weight in one line: shape, logical axes (model/sharding.py) and the width of its normal start."""
  value = std * jax.random.truncated_normal(key, -3, 3, shape, jnp.float32)
  return nnx.Param(value, axes=axes, eager_sharding=False)


def ones(size: int, axis: str) -> nnx.Param:
  return nnx.Param(jnp.ones(size, jnp.float32), axes=(axis,), eager_sharding=False)


def saves(names: tuple[str, ...]) -> Callable[..., bool]:
  """A policy for jax.checkpoint: keep what has one of these names; cuDNN's kernel is known by its primitive."""
  named = jax.checkpoint_policies.save_only_these_names(*names)

  def policy(primitive, *args, **params):
    kernel = primitive.name.startswith('dot_product_attention_fwd') and 'attention' in names
    return kernel or named(primitive, *args, **params)

  return policy


def rms_norm(x: jax.Array, scale: nnx.Param, eps: float) -> jax.Array:
  """x / rms(x) · scale over the last dimension, computed in float32."""
  x32 = x.astype(jnp.float32)
  x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  return (x32 * scale[...]).astype(x.dtype)


class Attention(nnx.Module):
  def __init__(self, c: ModelConfig, key: jax.Array):
    q, k, v, o = jax.random.split(key, 4)
    std = c.d_model**-0.5
    out_std = (c.heads * c.head_dim * 2 * c.layers) ** -0.5  # the residual stream sums 2L outputs
    self.c = c
    self.q_DNH = weight(q, (c.d_model, c.heads, c.head_dim), ('embed', 'heads', 'head_dim'), std=std)
    self.k_DKH = weight(k, (c.d_model, c.kv_heads, c.head_dim), ('embed', 'kv_heads', 'head_dim'), std=std)
    self.v_DKH = weight(v, (c.d_model, c.kv_heads, c.head_dim), ('embed', 'kv_heads', 'head_dim'), std=std)
    self.o_NHD = weight(o, (c.heads, c.head_dim, c.d_model), ('heads', 'head_dim', 'embed'), std=out_std)
    self.q_norm_H = ones(c.head_dim, 'norm')
    self.k_norm_H = ones(c.head_dim, 'norm')

  def __call__(self, x_BTD, positions_BT, attend):
    """[B, T, D]; attend(q_BTNH, k_BTKH, v_BTKH) -> out_BTNH is what a query sees and how it is computed."""
    c, dtype = self.c, x_BTD.dtype
    q_BTNH = checkpoint_name(jnp.einsum('BTD,DNH->BTNH', x_BTD, self.q_DNH[...].astype(dtype)), 'qkv')
    k_BTKH = checkpoint_name(jnp.einsum('BTD,DKH->BTKH', x_BTD, self.k_DKH[...].astype(dtype)), 'qkv')
    v_BTKH = checkpoint_name(jnp.einsum('BTD,DKH->BTKH', x_BTD, self.v_DKH[...].astype(dtype)), 'qkv')
    q_BTNH = rotate(rms_norm(q_BTNH, self.q_norm_H, c.norm_eps), positions_BT, c.rope_base)
    k_BTKH = rotate(rms_norm(k_BTKH, self.k_norm_H, c.norm_eps), positions_BT, c.rope_base)
    out_BTNH = constrain(attend(q_BTNH, k_BTKH, v_BTKH), 'batch', 'length', 'act_heads', None)
    return jnp.einsum('BTNH,NHD->BTD', out_BTNH, self.o_NHD[...].astype(dtype))


class FeedForward(nnx.Module):
  """SwiGLU. A mixture of experts is another class with this signature."""

  def __init__(self, c: ModelConfig, key: jax.Array):
    gate, up, down = jax.random.split(key, 3)
    std = c.d_model**-0.5
    self.gate_DF = weight(gate, (c.d_model, c.d_ff), ('embed', 'mlp'), std=std)
    self.up_DF = weight(up, (c.d_model, c.d_ff), ('embed', 'mlp'), std=std)
    self.down_FD = weight(down, (c.d_ff, c.d_model), ('mlp', 'embed'), std=(c.d_ff * 2 * c.layers) ** -0.5)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    dtype = x_BTD.dtype
    gate_BTF = checkpoint_name(jnp.einsum('BTD,DF->BTF', x_BTD, self.gate_DF[...].astype(dtype)), 'mlp')
    up_BTF = checkpoint_name(jnp.einsum('BTD,DF->BTF', x_BTD, self.up_DF[...].astype(dtype)), 'mlp')
    hidden_BTF = constrain(jax.nn.silu(gate_BTF) * up_BTF, 'batch', 'length', 'act_mlp')
    return jnp.einsum('BTF,FD->BTD', hidden_BTF, self.down_FD[...].astype(dtype))


class Block(nnx.Module):
  def __init__(self, c: ModelConfig, key: jax.Array):
    attention, feed_forward = jax.random.split(key)
    self.c = c
    self.attention_norm_D = ones(c.d_model, 'norm')
    self.attention = Attention(c, attention)
    self.feed_forward_norm_D = ones(c.d_model, 'norm')
    self.feed_forward = FeedForward(c, feed_forward)

  def __call__(self, x_BTD, positions_BT, attend):
    x_BTD = x_BTD + self.attention(rms_norm(x_BTD, self.attention_norm_D, self.c.norm_eps), positions_BT, attend)
    x_BTD = x_BTD + self.feed_forward(rms_norm(x_BTD, self.feed_forward_norm_D, self.c.norm_eps))
    return constrain(x_BTD, 'batch', 'length', 'act_embed')


class Transformer(nnx.Module):
  def __init__(self, c: ModelConfig, key: jax.Array):
    embed, layers, head = jax.random.split(key, 3)
    self.c = c
    # D^-1/2 gives first logits a spread of about 1 at any width; at D = 2560 it is the usual 0.02.
    self.embed_VD = weight(embed, (c.vocab_size, c.d_model), ('vocab', 'embed'), std=c.d_model**-0.5)
    self.layers = jax.vmap(functools.partial(Block, c))(jax.random.split(layers, c.layers))  # leading axis L
    self.norm_D = ones(c.d_model, 'norm')
    if not c.tied_embeddings:
      self.head_DV = weight(head, (c.d_model, c.vocab_size), ('embed', 'vocab'), std=c.d_model**-0.5)

  def __call__(self, tokens_BT, positions_BT, segments_BT, cache: Cache | None = None):
    c = self.c
    x_BTD = constrain(self.embed_VD[...].astype(c.dtype)[tokens_BT], 'batch', 'length', 'act_embed')
    if cache is not None:
      return self.cached(x_BTD, positions_BT, segments_BT, cache)
    attend = rows_attention(c.attention, segments_BT, c.dtype, c.head_dim)
    block = lambda x_BTD, layer: (layer(x_BTD, positions_BT, attend), None)
    if c.remat != 'none':
      block = jax.checkpoint(block, policy=saves(REMAT[c.remat]), prevent_cse=not c.scan_layers)
    x_BTD, _ = jax.lax.scan(block, x_BTD, self.layers, unroll=1 if c.scan_layers else c.layers)
    return rms_norm(x_BTD, self.norm_D, c.norm_eps), None

  def cached(self, x_BTD, positions_BT, segments_BT, cache: Cache):
    """The rest of the forward pass for tokens that follow those in the cache."""
    slot_BT = slots_for(cache, segments_BT)
    cache = dataclasses.replace(
      cache,
      positions_BS=write(cache.positions_BS, positions_BT, slot_BT),
      segments_BS=write(cache.segments_BS, segments_BT, slot_BT),
      length_B=cache.length_B + jnp.sum(segments_BT > 0, axis=1, dtype=jnp.int32),
    )
    visible_BTS = visible(positions_BT, segments_BT, cache.positions_BS, cache.segments_BS)
    k_LBKSH, v_LBKSH = list(cache.k_LBKSH), list(cache.v_LBKSH)
    for i in range(self.c.layers):  # a scan would copy the cache every step

      def attend_cached(q_BTNH, k_BTKH, v_BTKH, i=i):
        k_LBKSH[i] = write_heads(k_LBKSH[i], k_BTKH, slot_BT)
        v_LBKSH[i] = write_heads(v_LBKSH[i], v_BTKH, slot_BT)
        return attend(q_BTNH, k_LBKSH[i], v_LBKSH[i], visible_BTS)

      layer = jax.tree.map(lambda x_L, i=i: x_L[i], self.layers)
      x_BTD = layer(x_BTD, positions_BT, attend_cached)
    cache = dataclasses.replace(cache, k_LBKSH=tuple(k_LBKSH), v_LBKSH=tuple(v_LBKSH))
    return rms_norm(x_BTD, self.norm_D, self.c.norm_eps), cache


@functools.lru_cache
def abstract(c: ModelConfig) -> tuple[nnx.GraphDef, Params, Params]:
  """(graph definition, shapes, logical axes) of a model's parameters, without making them."""
  graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(c, jax.random.key(0))))

  def axes(path, variable):  # vmap put the layers in front of what one Block declared
    names = variable.get_metadata('axes')
    return ('layers', *names) if path[0].key == 'layers' else names

  logical = jax.tree_util.tree_map_with_path(axes, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
  return graph, nnx.to_pure_dict(state), nnx.to_pure_dict(logical)


def init(c: ModelConfig, key: jax.Array) -> Params:
  """Fresh float32 parameters, layers stacked; jit it with `out_shardings` and they are born sharded."""
  return nnx.to_pure_dict(nnx.split(Transformer(c, key))[1])


def forward(
  c: ModelConfig,
  params: Params,
  tokens_BT: jax.Array,
  positions_BT: jax.Array,
  segments_BT: jax.Array,
  cache: Cache | None = None,
) -> tuple[jax.Array, Cache | None]:
  """Final hidden states [B, T, D] in the compute type, and the cache with these tokens added.

  Args are int32 [B, T]; positions restart in each document, segments number the documents from 1, 0 is padding.
  Multiply the result with `head(c, params)` for logits; `objectives.shaped_linear_loss` does so piece by piece.
  """
  return nnx.merge(abstract(c)[0], params)(tokens_BT, positions_BT, segments_BT, cache)


def head(c: ModelConfig, params: Params) -> jax.Array:
  """The prediction matrix [D, V], float32; with tied embeddings the embedding's transpose."""
  return params['embed_VD'].T if c.tied_embeddings else params['head_DV']
