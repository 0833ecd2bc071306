"""The decoder: Qwen3's blocks (RMSNorm, rotary GQA with QK-norm, SwiGLU), stacked and scanned over layers. Settings
turn them into the blocks of Qwen2 or Llama 3.

NNX declares the parameters. All computation is plain JAX. `init` creates the parameters as a tree of arrays. `forward`
is a pure function of the parameters and the tokens. It serves training, prefill and, with a cache, decoding. Parameters
are float32, matmuls use the config's compute dtype, and norms and softmax use float32.

# B batch  T tokens  D width  N query heads  K key heads  H head width  F hidden width  L layers  V vocabulary
# k choices of experts per token  P pages of the cache  S tokens of a page  2 keys, values
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from betarank.model.attention import rotate, rows_attention
from betarank.model.config import REMAT, ModelConfig
from betarank.model.decode import Cache, attend_layers
from betarank.model.layers import FeedForward, lookup, ones, project, weight, zeros
from betarank.model.moe import CHOICES, MixtureOfExperts, Routing
from betarank.model.norm import add_norm, norm_rotate, rms_norm
from betarank.model.sharding import constrain

Params = dict[str, Any]


def remat_policy(names: tuple[str, ...], offload: bool = False) -> Callable[..., Any]:
  """Returns a policy for jax.checkpoint that saves the intermediates with these checkpoint names, and the routers'
  choices.

  offload: whether the saved intermediates are kept in host memory. The routers' choices always stay on the device, and
    so does the output of cuDNN's attention kernel. This output has no checkpoint name, so the policy recognizes it by
    its primitive.
  """
  named = jax.checkpoint_policies.save_only_these_names(*names, CHOICES)
  if offload:
    named = jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[CHOICES], names_which_can_be_offloaded=list(names), offload_src='device',
      offload_dst='pinned_host')

  def policy(primitive, *args, **params):
    kernel = primitive.name.startswith('dot_product_attention_fwd') and 'attention' in names
    return kernel or named(primitive, *args, **params)

  return policy


class Attention(nnx.Module):
  """Grouped-query attention with rotary positions: with QK-norm (Qwen3), biases (Qwen2), or neither (Llama 3)."""

  def __init__(self, c: ModelConfig, key: jax.Array):
    q, k, v, o = jax.random.split(key, 4)
    std = c.d_model**-0.5
    out_std = (c.heads * c.head_dim * 2 * c.layers) ** -0.5  # the residual stream sums 2L outputs
    self.c = c
    self.q_DNH = weight(q, (c.d_model, c.heads, c.head_dim), ('embed', 'heads', 'head_dim'), std=std)
    self.k_DKH = weight(k, (c.d_model, c.kv_heads, c.head_dim), ('embed', 'kv_heads', 'head_dim'), std=std)
    self.v_DKH = weight(v, (c.d_model, c.kv_heads, c.head_dim), ('embed', 'kv_heads', 'head_dim'), std=std)
    self.o_NHD = weight(o, (c.heads, c.head_dim, c.d_model), ('heads', 'head_dim', 'embed'), std=out_std)
    if c.qkv_bias:
      self.q_bias_NH = zeros((c.heads, c.head_dim), ('heads', 'bias'))
      self.k_bias_KH = zeros((c.kv_heads, c.head_dim), ('kv_heads', 'bias'))
      self.v_bias_KH = zeros((c.kv_heads, c.head_dim), ('kv_heads', 'bias'))
    if c.qk_norm:
      self.q_norm_H = ones(c.head_dim, 'norm')
      self.k_norm_H = ones(c.head_dim, 'norm')

  def __call__(self, x_BTD, positions_BT, attend):
    """Returns the output of attention, out_BTD.

    attend: a function (q_BTNH, k_BTKH, v_BTKH) -> out_BTNH, which applies attention with the right mask.
    """
    c = self.c
    with jax.named_scope('attention/qkv'):
      q_BTNH = checkpoint_name(project(x_BTD, self.q_DNH), 'qkv')
      k_BTKH = checkpoint_name(project(x_BTD, self.k_DKH), 'qkv')
      v_BTKH = checkpoint_name(project(x_BTD, self.v_DKH), 'qkv')
      if c.qkv_bias:
        q_BTNH, k_BTKH, v_BTKH = (
          x + bias[...].astype(x.dtype)[None, None] for x, bias in
          ((q_BTNH, self.q_bias_NH), (k_BTKH, self.k_bias_KH), (v_BTKH, self.v_bias_KH)))
    with jax.named_scope('attention/rope'):
      rope = positions_BT, c.rope_base, c.rope_factor
      if c.qk_norm:
        q_BTNH = norm_rotate(q_BTNH, self.q_norm_H, c.norm_eps, *rope)
        k_BTKH = norm_rotate(k_BTKH, self.k_norm_H, c.norm_eps, *rope)
      else:
        q_BTNH, k_BTKH = rotate(q_BTNH, *rope), rotate(k_BTKH, *rope)
    with jax.named_scope('attention/core'):
      out_BTNH = constrain(attend(q_BTNH, k_BTKH, v_BTKH), 'batch', 'length', 'act_heads', None)
    with jax.named_scope('attention/out'):
      return project(out_BTNH, self.o_NHD, 2)


class Block(nnx.Module):
  """A decoder layer: attention, then a feed-forward network.

  Both the attention and the network get normalized inputs, and their outputs are added to the residual stream.
  """

  def __init__(self, c: ModelConfig, key: jax.Array):
    attention, feed_forward = jax.random.split(key)
    self.c = c
    self.attention_norm_D = ones(c.d_model, 'norm')
    self.attention = Attention(c, attention)
    self.feed_forward_norm_D = ones(c.d_model, 'norm')
    self.feed_forward = MixtureOfExperts(c, feed_forward) if c.moe.experts else FeedForward(c, c.d_ff, feed_forward)

  def __call__(self, x_BTD, positions_BT, segments_BT, attend, choices_BTk):
    """Returns (x_BTD, routing): the residual stream after this layer, and the layer's Routing (None in a dense model).

    attend: as in `Attention.__call__`.
    choices_BTk: as in `MixtureOfExperts.__call__`.
    """
    with jax.named_scope('attention/norm'):
      x_BTD, normed_BTD = add_norm(x_BTD, None, self.attention_norm_D, self.c.norm_eps)
    out_BTD = self.attention(normed_BTD, positions_BT, attend)
    with jax.named_scope('feed_forward/norm'):
      x_BTD, normed_BTD = add_norm(x_BTD, out_BTD, self.feed_forward_norm_D, self.c.norm_eps)
    out_BTD, routing = self.feed_forward(normed_BTD, segments_BT > 0, choices_BTk)
    return constrain(x_BTD + out_BTD, 'batch', 'length', 'act_embed'), routing


class Transformer(nnx.Module):
  """The decoder without its head: the embedding, L layers, and the last norm.

  `__call__` has the arguments of `forward_routed` except c and params, and returns what `forward_routed` returns.
  """

  def __init__(self, c: ModelConfig, key: jax.Array):
    embed, layers, head = jax.random.split(key, 3)
    self.c = c
    # D^-1/2 gives the initial logits a standard deviation of about 1 at any width. At D = 2560 it is the usual 0.02.
    self.embed_VD = weight(embed, (c.vocab_size, c.d_model), ('vocab', 'embed'), std=c.d_model**-0.5)
    self.layers = jax.vmap(functools.partial(Block, c))(jax.random.split(layers, c.layers))  # adds a leading axis L
    self.norm_D = ones(c.d_model, 'norm')
    if not c.tied_embeddings:
      self.head_DV = weight(head, (c.d_model, c.vocab_size), ('embed', 'vocab'), std=c.d_model**-0.5)

  def __call__(self, tokens_BT, positions_BT, segments_BT, cache: Cache | None, choices_LBTk):
    c = self.c
    # The table's D is split over devices. Each device looks up its part of D for the tokens of all these devices, which
    # then exchange parts in an all-to-all. Without these constraints XLA may all-gather the table instead, which sends
    # more data, and the same again for its gradient.
    with jax.named_scope('embed'):
      tokens_BT = constrain(tokens_BT, 'lookup', 'length')
      x_BTD = constrain(lookup(self.embed_VD[...], tokens_BT, c.dtype), 'lookup', 'length', 'embed')
      x_BTD = constrain(x_BTD, 'batch', 'length', 'act_embed')
    if cache is not None:
      return self.cached(x_BTD, positions_BT, segments_BT, cache, choices_LBTk)
    with jax.named_scope('attention/mask'):
      attend = rows_attention(c.attention, segments_BT, c.dtype, c.kv_heads, c.head_dim)
    block = lambda x_BTD, layer: layer[0](x_BTD, positions_BT, segments_BT, attend, layer[1])
    if c.remat_policy != 'none':
      policy = remat_policy(REMAT[c.remat_policy], c.offload_activations)
      block = jax.checkpoint(block, policy=policy, prevent_cse=not c.scan_layers)
    unroll = 1 if c.scan_layers else c.layers
    with jax.named_scope('layers'):
      x_BTD, routing = jax.lax.scan(block, x_BTD, (self.layers, choices_LBTk), unroll=unroll)
    with jax.named_scope('final_norm'):
      return rms_norm(x_BTD, self.norm_D, c.norm_eps), None, routing

  def cached(self, x_BTD, positions_BT, segments_BT, cache: Cache, choices_LBTk):
    """Returns what `__call__` returns, for tokens that follow the tokens in the cache.

    x_BTD: the embedded tokens. The other arguments are those of `forward_routed`.
    """
    with jax.named_scope('attention/mask'):
      attend, after = attend_layers(cache, segments_BT, self.c)
    pages_LP2KSH, routings = list(cache.pages_LP2KSH), []

    @jax.jit  # traced and lowered once for all layers
    def one_layer(layer, pages_P2KSH, x_BTD, choices_BTk):
      def attend_cached(q_BTNH, k_BTKH, v_BTKH):
        nonlocal pages_P2KSH
        out_BTNH, pages_P2KSH = attend(pages_P2KSH, q_BTNH, k_BTKH, v_BTKH)
        return out_BTNH

      x_BTD, routing = layer(x_BTD, positions_BT, segments_BT, attend_cached, choices_BTk)
      return pages_P2KSH, x_BTD, routing

    for i in range(self.c.layers):  # a scan would copy the cache at every step
      with jax.named_scope('layers'):
        layer, choices_BTk = jax.tree.map(
          lambda x_L, i=i: x_L[i], (self.layers, choices_LBTk), is_leaf=lambda x_L: isinstance(x_L, list))
        pages_LP2KSH[i], x_BTD, routing = one_layer(layer, pages_LP2KSH[i], x_BTD, choices_BTk)
      routings.append(routing)
    cache = dataclasses.replace(after, pages_LP2KSH=tuple(pages_LP2KSH))
    with jax.named_scope('final_norm'):
      x_BTD = rms_norm(x_BTD, self.norm_D, self.c.norm_eps)
    return x_BTD, cache, jax.tree.map(lambda *x: jnp.stack(x), *routings)


@functools.lru_cache
def abstract(c: ModelConfig) -> tuple[nnx.GraphDef, Params, Params]:
  """Returns (graph definition, shapes, logical axes) of a model's parameters, without creating the parameters."""
  graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(c, jax.random.key(0))))

  def axes(path, variable):  # vmap adds the axis of layers before the axes that a Block declares
    names = variable.get_metadata('axes')
    return ('layers', *names) if path[0].key == 'layers' else names

  logical = jax.tree_util.tree_map_with_path(axes, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
  return graph, nnx.to_pure_dict(state), nnx.to_pure_dict(logical)


def init(c: ModelConfig, key: jax.Array) -> Params:
  """Returns initialized float32 parameters, with layers stacked. Jit it with `out_shardings` to create them sharded."""
  return nnx.to_pure_dict(nnx.split(Transformer(c, key))[1])


def forward_routed(
  c: ModelConfig,
  params: Params,
  tokens_BT: jax.Array,
  positions_BT: jax.Array,
  segments_BT: jax.Array,
  cache: Cache | None = None,
  choices_LBTk: jax.Array | None = None,
) -> tuple[jax.Array, Cache | None, Routing | None]:
  """Runs the decoder up to and including its last norm. `hidden @ head(c, params)` are the logits.

  Args:
    c: the model's config.
    params: the parameters, from `init`. With a cache, each array in params['layers'] may be replaced by a list with one
      array per layer.
    tokens_BT: int32 token ids.
    positions_BT: int32 positions, which restart at 0 in each document.
    segments_BT: int32, numbers the documents of a row from 1; 0 is padding.
    cache: the cache to which the keys and values of these tokens are added, with those of earlier tokens; None to run
      without a cache. Several tokens per row (T > 1) can only be added to an empty cache.
    choices_LBTk: int32, the experts to use instead of the routers' choice, as recorded by an earlier Routing.

  Returns:
    (hidden_BTD, cache, routing): hidden states in the compute dtype, the cache with these tokens added (None without a
    cache), and the Routing (None for a dense model).
  """
  return nnx.merge(abstract(c)[0], params)(tokens_BT, positions_BT, segments_BT, cache, choices_LBTk)


def forward(
  c: ModelConfig,
  params: Params,
  tokens_BT: jax.Array,
  positions_BT: jax.Array,
  segments_BT: jax.Array,
  cache: Cache | None = None,
) -> tuple[jax.Array, Cache | None]:
  """Returns (hidden_BTD, cache), the first two results of `forward_routed`. The arguments are the same."""
  return forward_routed(c, params, tokens_BT, positions_BT, segments_BT, cache)[:2]


def head(c: ModelConfig, params: Params) -> jax.Array:
  """Returns the head's weights [D, V], float32. With tied embeddings this is the transpose of the embedding table."""
  return params['embed_VD'].T if c.tied_embeddings else params['head_DV']
