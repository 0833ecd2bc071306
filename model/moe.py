"""Mixture of experts: a router sends each token to k of E small feed-forward networks. No token is ever dropped.

The (token, choice) pairs are sorted by expert and laid out in tiles of R rows. All rows of a tile belong to one expert,
so a tile takes three plain matrix products.

Experts are split over the mesh's `expert` axis. The devices along this axis all-gather their tokens, process the pairs
of their own experts, and reduce-scatter the results. The alternative would be to send each pair to the device of its
expert. With 16 chips in a ring and 12 choices per token, a pair would cross four links on average, and each link would
carry three times as much data.

The number of tiles depends on the data, but one pass over tiles has a fixed size, set by CAPACITY_FACTOR. If the load
is nearly even, one pass is enough. Otherwise further passes process the remaining tiles, called overflow.

# B batch  T tokens  D width  F hidden width  E experts  k choices per token  L layers
# X devices along the expert axis  N tokens of a device  G tokens of the X devices  e experts of a device
# C tiles of a pass  R rows of a tile  n pairs of a device  p pairs of the X devices  P rows of a pass
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from betarank.model.config import ModelConfig, MoeConfig
from betarank.model.kernels import experts_tpu, experts_triton, rows_tpu
from betarank.model.layers import FeedForward, matmul_bf16x3, weight, zeros
from betarank.model.sharding import RULES, platform, shards, spec

CAPACITY_FACTOR = 1.25  # the number of pairs that a pass has tiles for, relative to an even load
# The checkpoint name of the router's choices. Every remat policy saves them, because recomputed choices could differ by
# rounding.
CHOICES = 'choices'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
  """The experts that tokens were sent to, and load statistics, for all layers.

  All fields except the choices are sums over tokens without padding, so the values of several calls can be added.

  Attributes:
    choices_LBTk: int32, the experts of each token, best first; arbitrary in padding.
    load_LE: int32, the number of tokens that each expert received.
    entropy_L: float32, the entropy of a token's normalized scores, in nats, summed over tokens.
    balance_L: float32, the load-balance loss E·Σ_e f_e·p_e times the number of tokens. f_e is the expert's fraction of
      the choices, and p_e its mean normalized score. An even load gives 1 per token. Gradients flow through p but not
      through f. Both are means over the tokens of one forward call. With several microbatches, the result therefore
      differs from the loss of the whole batch. Source: Switch, arXiv 2101.03961, eq. 4.
  """

  choices_LBTk: jax.Array
  load_LE: jax.Array
  entropy_L: jax.Array
  balance_L: jax.Array


class MixtureOfExperts(nnx.Module):
  """A layer that sends each token to k of E experts, and to one shared expert if shared_d_ff > 0.

  There are two kinds of routers. Both weight the outputs of the chosen experts by the experts' scores. If
  norm_topk_prob is True, the scores of a token's chosen experts are first divided by their sum.

  The 'sigmoid' router scores each expert independently, and chooses the experts with the largest score + bias. After
  each update, train/step.py changes the bias to even out the load (DeepSeek-V3, arXiv 2412.19437, eq. 12 to 16). The
  'softmax' router chooses the experts with the largest score. It has no bias; a load-balance loss evens out its load
  (Qwen3-MoE).
  """

  def __init__(self, c: ModelConfig, key: jax.Array):
    router, gate, up, down, shared = jax.random.split(key, 5)
    m, std = c.moe, c.d_model**-0.5
    out_std = (m.experts_per_token * m.expert_d_ff * 2 * c.layers) ** -0.5
    self.c = c
    self.router_DE = weight(router, (c.d_model, m.experts), ('embed', 'router'), std=std)
    if m.router == 'sigmoid':
      self.router_bias_E = zeros((m.experts,), ('bias',))
    self.gate_EDF = weight(gate, (m.experts, c.d_model, m.expert_d_ff), ('experts', 'embed', 'mlp'), std=std)
    self.up_EDF = weight(up, (m.experts, c.d_model, m.expert_d_ff), ('experts', 'embed', 'mlp'), std=std)
    self.down_EFD = weight(down, (m.experts, m.expert_d_ff, c.d_model), ('experts', 'mlp', 'embed'), std=out_std)
    if m.shared_d_ff:
      self.shared = FeedForward(c, m.shared_d_ff, shared)

  def __call__(self, x_BTD: jax.Array, real_BT: jax.Array, choices_BTk: jax.Array | None = None):
    """Returns (out_BTD, this layer's Routing).

    Args:
      x_BTD: float; the output has the same dtype.
      real_BT: bool, False for padding, which is sent to no expert.
      choices_BTk: int32, the experts to use. None means that the router chooses.
    """
    m, dtype = self.c.moe, x_BTD.dtype
    with jax.named_scope('moe/router'):
      logits_BTE = matmul_bf16x3(x_BTD, self.router_DE[...])
      score_BTE = jax.nn.sigmoid(logits_BTE) if m.router == 'sigmoid' else jax.nn.softmax(logits_BTE)
      if choices_BTk is None:
        bias_11E = self.router_bias_E[...][None, None] if m.router == 'sigmoid' else 0.0
        choices_BTk = lax.top_k(lax.stop_gradient(score_BTE + bias_11E), m.experts_per_token)[1]
      choices_BTk = checkpoint_name(choices_BTk, CHOICES)
      # Comparisons are used instead of a gather, because a TPU fuses them, in the backward pass too.
      chosen_BTkE = jax.nn.one_hot(choices_BTk, m.experts, dtype=bool) & real_BT[..., None, None]
      weight_BTk = jnp.sum(score_BTE[..., None, :], -1, where=chosen_BTkE)
      weight_BTk *= m.routed_scale / (jnp.sum(weight_BTk, -1, keepdims=True) + 1e-20 if m.norm_topk_prob else 1.0)
      routing = _routing(choices_BTk, chosen_BTkE, score_BTE, real_BT)
      expert_BTk = jnp.where(real_BT[..., None], choices_BTk, m.experts)  # E means no expert
    with jax.named_scope('moe/weights'):
      weights = [w[...].astype(dtype) for w in (self.gate_EDF, self.up_EDF, self.down_EFD)]
    out_BTD = _experts(self.c, x_BTD, expert_BTk, weight_BTk, *weights)
    return out_BTD + self.shared(x_BTD)[0] if m.shared_d_ff else out_BTD, routing


def _routing(choices_BTk, chosen_BTkE, score_BTE, real_BT) -> Routing:
  """Returns the Routing of one layer, whose fields have no axis L.

  choices_BTk: int32, the chosen experts.
  chosen_BTkE: bool, one-hot vectors of choices_BTk, all False in padding.
  score_BTE: float32, the router's scores.
  """
  share_BTE = score_BTE / jnp.sum(score_BTE, -1, keepdims=True)
  total = lambda x_BTE: jnp.sum(x_BTE, (0, 1), where=real_BT[..., None])
  load_E = jnp.sum(chosen_BTkE, (0, 1, 2), dtype=jnp.int32)
  tokens = jnp.maximum(jnp.sum(real_BT), 1)
  experts, k = score_BTE.shape[-1], choices_BTk.shape[-1]
  return Routing(
    choices_BTk, load_E, lax.stop_gradient(jnp.sum(total(-share_BTE * jnp.log(share_BTE + 1e-20)))),
    experts / (k * tokens) * jnp.sum(load_E * total(share_BTE)))


def update_router_bias(c: ModelConfig, params: dict[str, Any], load_LE: jax.Array) -> tuple[dict[str, Any], jax.Array]:
  """Adds bias_update_rate · sign(mean load - load) to the router bias, in float32. Returns (new params, new bias [L,
  E]).

  An expert that received more than the mean load is chosen less often afterwards.

  load_LE: int32, the number of tokens that each expert received in the update.
  """
  layers = params['layers']
  mean_L1 = jnp.mean(load_LE, -1, keepdims=True)
  bias_LE = layers['feed_forward']['router_bias_E'] + c.moe.bias_update_rate * jnp.sign(mean_L1 - load_LE)
  feed_forward = {**layers['feed_forward'], 'router_bias_E': bias_LE}
  return {**params, 'layers': {**layers, 'feed_forward': feed_forward}}, bias_LE


def _experts(c: ModelConfig, x_BTD, choices_BTk, weight_BTk, gate_EDF, up_EDF, down_EFD) -> jax.Array:
  """Returns, for each token, the sum of weight · expert(x) over the token's choices: [B, T, D].

  choices_BTk: int32; the number E means no expert. With a mesh, each device processes its own experts.
  """
  local = functools.partial(_local_experts, c.moe)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return local(x_BTD, choices_BTk, weight_BTk, gate_EDF, up_EDF, down_EFD)
  batch, length = x_BTD.shape[:2]
  pad = ((0, -batch % shards('batch')), (0, -length % shards('length')), (0, 0))
  with jax.named_scope('moe/dispatch'):
    x_BTD, weight_BTk = jnp.pad(x_BTD, pad), jnp.pad(weight_BTk, pad)
    choices_BTk = jnp.pad(choices_BTk, pad, constant_values=c.moe.experts)
  tokens = spec('batch', 'length', None)
  # The weights are passed as shards and all-gathered inside, so that their gradient is reduce-scattered. A decoding
  # step has no gradient, and the sampler's copies of the weights aren't sharded over `embed`.
  embed = None if length == 1 else 'embed'
  inward, outward = spec('experts', embed, 'mlp'), spec('experts', 'mlp', embed)
  out_BTD = jax.shard_map(
    local, in_specs=(tokens, tokens, tokens, inward, inward, outward), out_specs=tokens, check_vma=False,
  )(x_BTD, choices_BTk, weight_BTk, gate_EDF, up_EDF, down_EFD)
  with jax.named_scope('moe/combine'):
    return out_BTD[:batch, :length]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Plan:
  """Says which (token, choice) pair each row of each tile computes. Arrays are int32.

  Pair g·k + j is choice j of token g. A device computes the pairs of its own e experts, sorted by expert, then by the
  device of the token. The index of a pair in this order is called its place. Each expert's pairs fill consecutive rows,
  from the first row of the expert's first tile.

  `order_p` has the pairs of all experts, sorted by the device of the token, then by expert. Pairs with the same expert
  and the same device of the token form a run, which is contiguous in both orders. So the pair at a place is
  order_p[place + run_shift[i]], where i is the run that contains the place.

  Attributes:
    passes: scalar, the number of passes needed for all tiles that have pairs. A pass processes C tiles.
    count_e: for each of this device's experts, the number of its pairs.
    tile_end_e: for each of this device's experts, the number of tiles of the experts up to and including this one.
    order_p: the numbers of the pairs of all X devices, in the order described above.
    run_start: [e·X], the place of the first pair of each of this device's runs.
    run_shift: [e·X], the index in order_p of this first pair, minus its place.
    row_p: the row of each pair; None unless one device has all experts.
  """

  passes: jax.Array
  count_e: jax.Array
  tile_end_e: jax.Array
  order_p: jax.Array
  run_start: jax.Array
  run_shift: jax.Array
  row_p: jax.Array | None


def _local_experts(m: MoeConfig, x_BTD, choices_BTk, weight_BTk, gate_eDF, up_eDF, down_eFD) -> jax.Array:
  """Returns the output for this device's tokens, [B, T, D].

  Each device gets the tokens of all devices along the expert axis, and applies its own experts to them. The sums of the
  experts' outputs then return to the device of the token.
  """
  k, width, ways = m.experts_per_token, x_BTD.shape[-1], shards('experts')
  if gate_eDF.shape[1] < width:
    gate_eDF, up_eDF, down_eFD = _all_gather_weights(gate_eDF, up_eDF, down_eFD)
  experts, pairs = gate_eDF.shape[0], choices_BTk.size
  rows = _tile_rows(pairs, experts)
  tiles = lambda pairs: min(pairs, (pairs + experts * (rows - 1)) // rows)  # enough for any distribution of the pairs
  with jax.named_scope('moe/dispatch'):
    x_ND = x_BTD.reshape(-1, width)
    x_GD = _all_gather_tokens(x_ND) if ways > 1 else x_ND
    weight_p = _all_gather('experts', weight_BTk.reshape(-1))
    most = len(x_GD) * min(k, experts)
    size = tiles(min(most, int(CAPACITY_FACTOR * pairs)))
    plan = _make_plan(m, choices_BTk.reshape(-1), experts, rows, size)
  run = _expert_tiles if size == tiles(most) else _with_overflow
  y_GD = run((m, rows, size), plan, 0, x_GD, weight_p, gate_eDF, up_eDF, down_eFD)
  with jax.named_scope('moe/combine'):
    y_ND = _reduce_scatter_tokens(y_GD) if ways > 1 else y_GD
    if shards('mlp') > 1:
      y_ND = lax.psum(y_ND, RULES['mlp'])
    return y_ND.reshape(x_BTD.shape)


# The next two functions are each other's transposes. They are written out because a TPU avoids copying all tokens only
# if the all-gather makes a new axis and the reduce-scatter doesn't (tiled=True). JAX's own transpose of such an
# all-gather is a reduce-scatter over a separate axis.


@jax.custom_vjp
def _all_gather_tokens(x_ND) -> jax.Array:
  """Returns the tokens of all devices along the expert axis, [G, D]."""
  return lax.all_gather(x_ND, RULES['experts']).reshape(-1, x_ND.shape[-1])


@jax.custom_vjp
def _reduce_scatter_tokens(y_GD) -> jax.Array:
  """Sums y over the devices along the expert axis and returns the sums of this device's tokens, [N, D]."""
  return lax.psum_scatter(y_GD, RULES['experts'], scatter_dimension=0, tiled=True)


_all_gather_tokens.defvjp(
  lambda x_ND: (_all_gather_tokens(x_ND), None), lambda _, dx_GD: (_reduce_scatter_tokens(dx_GD),))
_reduce_scatter_tokens.defvjp(
  lambda y_GD: (_reduce_scatter_tokens(y_GD), None), lambda _, dy_ND: (_all_gather_tokens(dy_ND),))


@jax.named_scope('moe/weights')
def _all_gather_weights(gate_eDF, up_eDF, down_eFD):
  """Returns the weights with their full width D. In the backward pass, their gradients are reduce-scattered."""
  return _all_gather('embed', gate_eDF, 1), _all_gather('embed', up_eDF, 1), _all_gather('embed', down_eFD, 2)


def _all_gather(name: str, x: jax.Array, axis: int = 0) -> jax.Array:
  """All-gathers dimension `axis` of x over the mesh axes that split the logical axis `name`."""
  return lax.all_gather(x, RULES[name], axis=axis, tiled=True) if shards(name) > 1 else x


def _tile_rows(pairs: int, experts: int) -> int:
  """Returns R, the number of rows of a tile: enough for a fast matmul, but few compared with the pairs per expert.

  R must be small because, on average, half of the last tile of each expert is empty.

  pairs: the number of (token, choice) pairs of this device.
  experts: the number of experts of this device.
  """
  share = max(pairs // experts, 1)
  least = 128 if platform() != 'cpu' and share >= 64 else 16
  return min(max(1 << (share // 8).bit_length() >> 1, least), 512)


def _make_plan(m, choice_n, experts, rows, size) -> _Plan:
  """Returns this device's _Plan.

  m: the MoeConfig.
  choice_n: int32, the expert of each of this device's pairs; the number E means no expert.
  experts: the number of experts of this device.
  rows, size: the number of rows per tile, and the number of tiles per pass.
  """
  ways = shards('experts')
  order_n = checkpoint_name(jnp.argsort(choice_n), CHOICES)
  count_XE = _all_gather('experts', jnp.sum(choice_n[None] == jnp.arange(m.experts)[:, None], 1)[None])
  first = lax.axis_index(RULES['experts']) * experts if ways > 1 else 0
  source_X = jnp.arange(ways) * len(choice_n)
  order_Xn = _all_gather('experts', order_n[None]) + source_X[:, None]
  mine = lambda x_XE: lax.dynamic_slice_in_dim(x_XE, first, experts, 1)
  count_eX = mine(count_XE).T
  found_eX = mine(jnp.cumsum(count_XE, 1) - count_XE + source_X[:, None]).T
  count_e = count_eX.sum(1)
  start = jnp.cumsum(count_eX.reshape(-1)) - count_eX.reshape(-1)
  tile_end_e = jnp.cumsum(-(-count_e // rows))
  row_n = None
  if ways == 1:
    rank_n = jnp.argsort(order_n)  # the inverse permutation
    tile_start_e = tile_end_e - -(-count_e // rows)
    shift_E = jnp.append(tile_start_e * rows - start, size * rows)  # pairs of padding, expert E, get a row out of range
    row_n = checkpoint_name(rank_n + shift_E[choice_n], CHOICES)
  return _Plan(
    -(-tile_end_e[-1] // size), count_e, tile_end_e, order_Xn.reshape(-1), start, found_eX.reshape(-1) - start, row_n)


def _expert_tiles(sizes, plan: _Plan, i, x_GD, weight_p, gate_eDF, up_eDF, down_eFD) -> jax.Array:
  """Returns the experts' outputs of pass i, summed for each token, [G, D].

  Pass i, counted from 0, processes the tiles i·C to (i + 1)·C - 1.

  sizes: (the config, R rows per tile, C tiles per pass).
  weight_p: float32, the router's weight of each (token, choice) pair.
  """
  m, rows, size = sizes
  kernel = _kernel(m.kernel, gate_eDF)
  add = rows_tpu.add if kernel is experts_tpu.experts else _scatter_add
  with jax.named_scope('moe/dispatch'):
    tile_C = i * size + jnp.arange(size)
    expert_C = jnp.minimum(jnp.sum(tile_C[:, None] >= plan.tile_end_e[None], 1), len(plan.count_e) - 1)
    tile_start_e = plan.tile_end_e - -(-plan.count_e // rows)
    within_CR = ((tile_C - tile_start_e[expert_C]) * rows)[:, None] + jnp.arange(rows)[None]
    real_CR = within_CR < plan.count_e[expert_C][:, None]
    place_CR = within_CR + (jnp.cumsum(plan.count_e) - plan.count_e)[expert_C][:, None]
    if plan.row_p is None:  # adds the shift of the place's run, computed as the sum of all changes of the shift so far
      change = jnp.diff(plan.run_shift, prepend=0)
      place_CR += jnp.sum(jnp.where(place_CR[..., None] >= plan.run_start[None, None], change[None, None], 0), -1)
    pair_CR = jnp.where(real_CR, plan.order_p.at[place_CR].get(mode='clip'), len(weight_p))
    x_CRD = _dispatch(m.experts_per_token, add, x_GD, pair_CR, plan.row_p)
    weight_CR = jnp.where(real_CR, _dispatch(1, _scatter_add, weight_p[:, None], pair_CR, plan.row_p)[..., 0], 0)
    used = jnp.minimum(plan.tile_end_e[-1] - i * size, size)
  with jax.named_scope('moe/experts'):
    y_CRD = kernel(x_CRD, weight_CR, expert_C, used, gate_eDF, up_eDF, down_eFD)
  with jax.named_scope('moe/combine'):
    return _combine(m.experts_per_token, add, y_CRD, pair_CR, plan.row_p, len(x_GD))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_overflow(sizes, plan: _Plan, _, *args) -> jax.Array:
  """Returns the sum of `_expert_tiles` over all passes that have tiles, [G, D].

  Usually there is only one pass. The first pass runs before the loop over further passes, because inside the loop its
  result would have to be added to an array of zeros. The backward pass recomputes each pass, because a loop of unknown
  length can't save intermediates. launch/plan/hlo.py recognizes the loop by its named scope.

  sizes, plan, args: arguments of `_expert_tiles`. The third argument is in the place of the pass number, and isn't
    used.
  """
  y_GD = _expert_tiles(sizes, plan, 0, *args)
  with jax.named_scope('moe/combine/overflow'):
    return lax.fori_loop(1, plan.passes, lambda i, y_GD: y_GD + _expert_tiles(sizes, plan, i, *args), y_GD)


def _with_overflow_forward(sizes, plan, _, *args):
  return _with_overflow(sizes, plan, _, *args), (plan, args)


def _with_overflow_backward(sizes, saved, dy_GD):
  plan, args = saved
  gradients = lambda i: jax.vjp(functools.partial(_expert_tiles, sizes, plan, i), *args)[1](dy_GD)
  first = gradients(0)
  with jax.named_scope('moe/combine/overflow'):
    return None, None, *lax.fori_loop(
      1, plan.passes, lambda i, grads: jax.tree.map(jnp.add, grads, gradients(i)), first)


_with_overflow.defvjp(_with_overflow_forward, _with_overflow_backward)


# The next two functions are each other's transposes. If a device has all pairs of its tokens (row_p isn't None), both
# are gathers. Scatter-adds would be slow on a CPU, and would have no fixed order on a GPU. Otherwise `add` sums the
# rows.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dispatch(k: int, add, x_GD, pair_CR, row_p) -> jax.Array:
  """Returns the values of each row's token, [C, R, D]. Empty rows get the values of an arbitrary token.

  k: the number of pairs per token. With k = 1, x_GD may have the values of pairs instead of tokens.
  add: the function that sums rows in the backward pass, such as `_scatter_add`. It isn't used if row_p is given.
  x_GD: the values of the G tokens.
  pair_CR: int32, the number of each row's pair. In an empty row, the number is at least G·k.
  row_p: int32, the row of each pair, or None (see `_Plan`).
  """
  return x_GD.at[pair_CR // k].get(mode='clip')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 5))
def _combine(k: int, add, y_CRD, pair_CR, row_p, tokens: int) -> jax.Array:
  """Returns the sum of y over the rows of each token, [G, D], where G is `tokens`. Empty rows are ignored.

  k, add, pair_CR, row_p: as in `_dispatch`, but `add` is used in the forward pass.
  """
  y_PD = y_CRD.reshape(-1, y_CRD.shape[-1])
  if row_p is None:
    return add(y_PD, pair_CR.reshape(-1) // k, tokens)
  some = lambda row_G: y_PD.at[row_G].get(mode='fill', fill_value=0).astype(jnp.float32)
  return sum(map(some, row_p.reshape(-1, k).T)).astype(y_PD.dtype)


def _scatter_add(y_PD, to_P, sums: int) -> jax.Array:
  """Returns an array [sums, D]. Its row s is the sum of all rows y_PD[p] for which to_P[p] = s.

  Rows with to_P[p] >= sums are ignored.
  """
  return jnp.zeros((sums, y_PD.shape[1]), y_PD.dtype).at[to_P].add(y_PD, mode='drop')


_dispatch.defvjp(
  lambda k, add, x_GD, pair_CR, row_p: (_dispatch(k, add, x_GD, pair_CR, row_p), (pair_CR, row_p, len(x_GD))),
  lambda k, add, saved, dx_CRD: (_combine(k, add, dx_CRD, *saved), None, None))
_combine.defvjp(
  lambda k, add, y_CRD, pair_CR, row_p, tokens: (_combine(k, add, y_CRD, pair_CR, row_p, tokens), (pair_CR, row_p)),
  lambda k, add, tokens, saved, dy_GD: (_dispatch(k, add, dy_GD, *saved), None, None))


# The kernels. Each takes (x_CRD, weight_CR, expert_C, used, gate_eDF, up_eDF, down_eFD) and returns
# weight · down(silu(gate(x)) · up(x)), [C, R, D]. Only the first `used` tiles of the output are defined.


def _kernel(name: str, gate_eDF):
  """Returns the kernel of this name; 'auto' chooses by platform and sizes.

  All kernels compute the same function, which a comment above `_kernel` describes.

  'auto' uses ragged_dot only on a TPU. On other platforms, XLA has no grouped matrix product, and ragged_dot multiplies
  all rows by all experts, as the FLOPs of the compiled program show.

  gate_eDF: an array of weights, from which the sizes are taken.
  """
  if name == 'auto':
    name = 'tiles'
    if platform() == 'tpu':
      name = 'pallas' if experts_tpu.fits(*gate_eDF.shape[1:]) else 'ragged'
    if platform() == 'gpu' and experts_triton.fits(*gate_eDF.shape[1:]):
      name = 'triton'
  kernels = {
    'tiles': _gathered_matmuls, 'ragged': _ragged_matmuls, 'pallas': experts_tpu.experts,
    'triton': experts_triton.experts}
  return kernels[name]


def _gathered_matmuls(x_CRD, weight_CR, expert_C, used, gate_eDF, up_eDF, down_eFD):
  """Computes what `experts_triton.experts` computes. Each tile is multiplied by a copy of its expert's weights."""
  gate_CRF = checkpoint_name(jnp.einsum('CRD,CDF->CRF', x_CRD, gate_eDF[expert_C]), 'mlp')
  up_CRF = checkpoint_name(jnp.einsum('CRD,CDF->CRF', x_CRD, up_eDF[expert_C]), 'mlp')
  return jnp.einsum('CRF,CFD->CRD', _swiglu(gate_CRF, up_CRF, weight_CR), down_eFD[expert_C])


def _ragged_matmuls(x_CRD, weight_CR, expert_C, used, gate_eDF, up_eDF, down_eFD):
  """Computes what `experts_triton.experts` computes, with XLA's grouped matrix product, lax.ragged_dot.

  The tiles of an expert form one group.
  """
  rows = weight_CR.shape[1]
  group_e = rows * jnp.sum(expert_C[None] == jnp.arange(len(gate_eDF))[:, None], 1, dtype=jnp.int32)
  x_PD, weight_P = x_CRD.reshape(-1, x_CRD.shape[-1]), weight_CR.reshape(-1)
  gate_PF = checkpoint_name(lax.ragged_dot(x_PD, gate_eDF, group_e), 'mlp')
  up_PF = checkpoint_name(lax.ragged_dot(x_PD, up_eDF, group_e), 'mlp')
  return lax.ragged_dot(_swiglu(gate_PF, up_PF, weight_P), down_eFD, group_e).reshape(x_CRD.shape)


def _swiglu(gate, up, weight):
  """Returns silu(gate) · up · weight, [..., F].

  The router's weight of each row is applied here, which takes F products per row. Applying it to the experts' output
  would take D products, and D is usually larger.
  """
  return (jax.nn.silu(gate.astype(jnp.float32)) * up * weight[..., None]).astype(gate.dtype)
