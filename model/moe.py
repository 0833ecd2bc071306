"""Mixture of experts: a router sends each token to k of E small feed-forwards. No token is ever dropped.

The (token, choice) pairs are sorted by expert and laid out in tiles of R rows, each of one expert, so that a tile is
three plain matrix products. Experts are split over the mesh's `expert` axis. Its devices gather each other's tokens,
work on the pairs of their own experts and sum what comes out. On a ring of 16 chips at 12 choices a token that loads
a link a third as much as sending each pair to its expert, which takes four links on average. The number of tiles
depends on the data, so they are worked through in pieces of a fixed number: one where the load is about even, more
where it isn't.

# B batch  T tokens  D width  F hidden  E experts  k choices a token  L layers
# N a device's tokens  G tokens of the X devices along the expert axis  e a device's experts  C tiles of R rows
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
from betarank.model.layers import FeedForward, product32, weight
from betarank.model.sharding import RULES, platform, shards, spec

ROOM = 1.25  # rows of a piece over those of an even load
SAVED = 'choices'  # by this name (jax.ad_checkpoint); every remat policy saves them, or rounding could change them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
  """Where the tokens of all layers went. All but the choices are sums over tokens that aren't padding, so they add.

  Attributes:
    choices_LBTk: int32, the experts of each token, best first; in padding they mean nothing.
    load_LE: int32, tokens that each expert got.
    entropy_L: float32, nats, of a token's scores as shares of their sum.
    balance_L: float32, E·Σ_e f_e·p_e a token, with f the expert's share of the choices and p its mean share of the
      scores; 1 when even. Only p has a gradient. f and p are means over the tokens of one forward call, so that of
      several microbatches is their mean, not that of the whole batch. Source: Switch, arXiv 2101.03961, eq. 4.
  """

  choices_LBTk: jax.Array
  load_LE: jax.Array
  entropy_L: jax.Array
  balance_L: jax.Array


class MixtureOfExperts(nnx.Module):
  """k of E experts for each token, and an expert that all share, if there is one.

  router: `sigmoid` scores each expert by itself, chooses by score + bias and weighs by the scores of the chosen as
  shares of their sum; train/step.py moves the bias against the load (DeepSeek-V3, arXiv 2412.19437, eq. 12 to 16).
  `softmax` has no bias and relies on the loss in Routing (Qwen3-MoE). norm_topk_prob=False: weighs by the scores as
  they are.
  """

  def __init__(self, c: ModelConfig, key: jax.Array):
    router, gate, up, down, shared = jax.random.split(key, 5)
    m, std = c.moe, c.d_model**-0.5
    out_std = (m.experts_per_token * m.expert_d_ff * 2 * c.layers) ** -0.5
    self.c = c
    self.router_DE = weight(router, (c.d_model, m.experts), ('embed', 'router'), std=std)
    if m.router == 'sigmoid':
      self.router_bias_E = nnx.Param(jnp.zeros(m.experts, jnp.float32), axes=('bias',), eager_sharding=False)
    self.gate_EDF = weight(gate, (m.experts, c.d_model, m.expert_d_ff), ('experts', 'embed', 'mlp'), std=std)
    self.up_EDF = weight(up, (m.experts, c.d_model, m.expert_d_ff), ('experts', 'embed', 'mlp'), std=std)
    self.down_EFD = weight(down, (m.experts, m.expert_d_ff, c.d_model), ('experts', 'mlp', 'embed'), std=out_std)
    if m.shared_d_ff:
      self.shared = FeedForward(c, m.shared_d_ff, shared)

  def __call__(self, x_BTD: jax.Array, real_BT: jax.Array, choices_BTk: jax.Array | None = None):
    """(out_BTD, the layer's Routing). Padding (not real_BT) goes to no expert. choices_BTk: instead of the router's."""
    m, dtype = self.c.moe, x_BTD.dtype
    logits_BTE = product32(x_BTD, self.router_DE[...])
    score_BTE = jax.nn.sigmoid(logits_BTE) if m.router == 'sigmoid' else jax.nn.softmax(logits_BTE)
    if choices_BTk is None:
      bias_E = self.router_bias_E[...] if m.router == 'sigmoid' else 0.0
      choices_BTk = lax.top_k(lax.stop_gradient(score_BTE + bias_E), m.experts_per_token)[1]
    choices_BTk = checkpoint_name(choices_BTk, SAVED)
    # Comparisons instead of a gather: on a TPU they fuse, also in the backward pass.
    chosen_BTkE = (choices_BTk[..., None] == jnp.arange(m.experts)) & real_BT[..., None, None]
    weight_BTk = jnp.sum(score_BTE[..., None, :], -1, where=chosen_BTkE)
    weight_BTk *= m.routed_scale / (jnp.sum(weight_BTk, -1, keepdims=True) + 1e-20 if m.norm_topk_prob else 1.0)
    routing = _routing(choices_BTk, chosen_BTkE, score_BTE, real_BT)
    nowhere_BTk = jnp.where(real_BT[..., None], choices_BTk, m.experts)
    weights = [w[...].astype(dtype) for w in (self.gate_EDF, self.up_EDF, self.down_EFD)]
    out_BTD = _experts(self.c, x_BTD, nowhere_BTk, weight_BTk, *weights)
    return out_BTD + self.shared(x_BTD)[0] if m.shared_d_ff else out_BTD, routing


def _routing(choices_BTk, chosen_BTkE, score_BTE, real_BT) -> Routing:
  share_BTE = score_BTE / jnp.sum(score_BTE, -1, keepdims=True)
  total = lambda x_BTE: jnp.sum(x_BTE, (0, 1), where=real_BT[..., None])
  load_E = jnp.sum(chosen_BTkE, (0, 1, 2), dtype=jnp.int32)
  tokens = jnp.maximum(jnp.sum(real_BT), 1)
  experts, k = score_BTE.shape[-1], choices_BTk.shape[-1]
  return Routing(
    choices_BTk, load_E, lax.stop_gradient(jnp.sum(total(-share_BTE * jnp.log(share_BTE + 1e-20)))),
    experts / (k * tokens) * jnp.sum(load_E * total(share_BTE)))


def update_router_bias(c: ModelConfig, params: dict[str, Any], load_LE: jax.Array) -> tuple[dict[str, Any], jax.Array]:
  """Returns (params, bias_LE) with b + bias_update_rate · sign(mean load - load): busy experts are chosen less."""
  layers = params['layers']
  mean_L1 = jnp.mean(load_LE, -1, keepdims=True)
  bias_LE = layers['feed_forward']['router_bias_E'] + c.moe.bias_update_rate * jnp.sign(mean_L1 - load_LE)
  feed_forward = {**layers['feed_forward'], 'router_bias_E': bias_LE}
  return {**params, 'layers': {**layers, 'feed_forward': feed_forward}}, bias_LE


def _experts(c: ModelConfig, x_BTD, choices_BTk, weight_BTk, gate_EDF, up_EDF, down_EFD) -> jax.Array:
  """[B, T, D]: Σ over a token's choices of weight · expert(x); a choice of E is none. Each device does its part."""
  local = functools.partial(_local, c.moe)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return local(x_BTD, choices_BTk, weight_BTk, gate_EDF, up_EDF, down_EFD)
  batch, length = x_BTD.shape[:2]
  pad = ((0, -batch % shards('batch')), (0, -length % shards('length')), (0, 0))
  x_BTD, weight_BTk = jnp.pad(x_BTD, pad), jnp.pad(weight_BTk, pad)
  choices_BTk = jnp.pad(choices_BTk, pad, constant_values=c.moe.experts)
  tokens = spec('batch', 'length', None)
  # Weights come in as parts and are gathered inside, so that their gradient is scattered as it is reduced. A step of
  # decoding has no gradient, and its sampler has copied the weights whole.
  embed = None if length == 1 else 'embed'
  inward, outward = spec('experts', embed, 'mlp'), spec('experts', 'mlp', embed)
  out_BTD = jax.shard_map(
    local, in_specs=(tokens, tokens, tokens, inward, inward, outward), out_specs=tokens, check_vma=False,
  )(x_BTD, choices_BTk, weight_BTk, gate_EDF, up_EDF, down_EFD)
  return out_BTD[:batch, :length]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Plan:
  """Which pair stands in which row. Pair g·k + j is choice j of token g; rows are those of all pieces.

  The pairs of this device's experts are put in order of (expert, device they come from); `run` is such a group.
  """

  pieces: jax.Array  # int32 []: how many have tiles
  count_e: jax.Array  # pairs of each expert
  tile_end_e: jax.Array  # tiles of the experts up to and with this one
  order_p: jax.Array  # pairs, device by device in order of all E experts
  run_start: jax.Array  # [e·X] where a run starts in this device's order
  run_shift: jax.Array  # [e·X] from there to its start in order_p
  row_p: jax.Array | None  # row of each pair, where one device has all experts


def _local(m: MoeConfig, x_BTD, choices_BTk, weight_BTk, gate_eDF, up_eDF, down_eFD) -> jax.Array:
  """What one device does: its experts, on the tokens of all devices along the expert axis."""
  k, width, ways = m.experts_per_token, x_BTD.shape[-1], shards('experts')
  if gate_eDF.shape[1] < width:
    gate_eDF, up_eDF, down_eFD = _whole(gate_eDF, up_eDF, down_eFD)
  x_ND = x_BTD.reshape(-1, width)
  x_GD = _collect(x_ND) if ways > 1 else x_ND
  weight_p = _gather('experts', weight_BTk.reshape(-1))
  experts, pairs = gate_eDF.shape[0], choices_BTk.size
  rows = _tile_rows(pairs, experts)
  tiles = lambda pairs: min(pairs, (pairs + experts * (rows - 1)) // rows)  # at most, however they are spread
  most = len(x_GD) * min(k, experts)
  size = tiles(min(most, int(ROOM * pairs)))
  plan = _make_plan(m, choices_BTk.reshape(-1), experts, rows, size)
  work = _piece if size == tiles(most) else _in_pieces
  y_GD = work((m, rows, size), plan, 0, x_GD, weight_p, gate_eDF, up_eDF, down_eFD)
  y_ND = _return(y_GD) if ways > 1 else y_GD
  if shards('mlp') > 1:
    y_ND = lax.psum(y_ND, RULES['mlp'])
  return y_ND.reshape(x_BTD.shape)


# To all devices along the expert axis, and back: each is the other's transpose. JAX's own transposes would keep the
# form of what they transpose, and a TPU copies all tokens unless they are gathered on an axis of their own but
# scattered on one that they share.


@jax.custom_vjp
def _collect(x_ND) -> jax.Array:
  """[G, D]: the tokens of all devices."""
  return lax.all_gather(x_ND, RULES['experts']).reshape(-1, x_ND.shape[-1])


@jax.custom_vjp
def _return(y_GD) -> jax.Array:
  """[N, D]: the sum of what the devices have for each of this one's tokens."""
  return lax.psum_scatter(y_GD, RULES['experts'], scatter_dimension=0, tiled=True)


_collect.defvjp(lambda x_ND: (_collect(x_ND), None), lambda _, dx_GD: (_return(dx_GD),))
_return.defvjp(lambda y_GD: (_return(y_GD), None), lambda _, dy_ND: (_collect(dy_ND),))


def _whole(gate_eDF, up_eDF, down_eFD):
  """Weights whose width is spread, whole; in the backward pass their gradients are summed and spread again."""
  return _gather('embed', gate_eDF, 1), _gather('embed', up_eDF, 1), _gather('embed', down_eFD, 2)


def _gather(name: str, x: jax.Array, axis: int = 0) -> jax.Array:
  return lax.all_gather(x, RULES[name], axis=axis, tiled=True) if shards(name) > 1 else x


def _tile_rows(pairs: int, experts: int) -> int:
  """R: small against an expert's even share, as an expert's last tile is half empty; large enough for a matmul."""
  share = max(pairs // experts, 1)
  least = 128 if platform() != 'cpu' and share >= 64 else 16
  return min(max(1 << (share // 8).bit_length() >> 1, least), 512)


def _make_plan(m, choice_n, experts, rows, size) -> _Plan:
  ways = shards('experts')
  order_n = checkpoint_name(jnp.argsort(choice_n), SAVED)
  count_XE = _gather('experts', jnp.sum(choice_n == jnp.arange(m.experts)[:, None], 1)[None])
  first = lax.axis_index(RULES['experts']) * experts if ways > 1 else 0
  source_X = jnp.arange(ways) * len(choice_n)
  order_Xn = _gather('experts', order_n[None]) + source_X[:, None]
  mine = lambda x_XE: lax.dynamic_slice_in_dim(x_XE, first, experts, 1)
  count_eX = mine(count_XE).T
  found_eX = mine(jnp.cumsum(count_XE, 1) - count_XE + source_X[:, None]).T
  count_e = count_eX.sum(1)
  start = jnp.cumsum(count_eX.reshape(-1)) - count_eX.reshape(-1)
  tile_end_e = jnp.cumsum(-(-count_e // rows))
  row_n = None
  if ways == 1:
    rank_n = jnp.argsort(order_n)  # the inverse
    tile_start_e = tile_end_e - -(-count_e // rows)
    shift_E = jnp.append(tile_start_e * rows - start, size * rows)  # the last: pairs of padding have no row
    row_n = checkpoint_name(rank_n + shift_E[choice_n], SAVED)
  return _Plan(
    -(-tile_end_e[-1] // size), count_e, tile_end_e, order_Xn.reshape(-1), start, found_eX.reshape(-1) - start, row_n)


def _piece(sizes, plan: _Plan, i, x_GD, weight_p, gate_eDF, up_eDF, down_eFD) -> jax.Array:
  """y_GD of the tiles i·C to (i + 1)·C."""
  m, rows, size = sizes
  tile_C = i * size + jnp.arange(size)
  expert_C = jnp.minimum(jnp.sum(tile_C[:, None] >= plan.tile_end_e, 1), len(plan.count_e) - 1)
  tile_start_e = plan.tile_end_e - -(-plan.count_e // rows)
  within_CR = ((tile_C - tile_start_e[expert_C]) * rows)[:, None] + jnp.arange(rows)
  real_CR = within_CR < plan.count_e[expert_C][:, None]
  place_CR = within_CR + (jnp.cumsum(plan.count_e) - plan.count_e)[expert_C][:, None]
  if plan.row_p is None:  # the sum of the steps between runs is the shift of the run that the place is in
    step = jnp.diff(plan.run_shift, prepend=0)
    place_CR += jnp.sum(jnp.where(place_CR[..., None] >= plan.run_start, step, 0), -1)
  pair_CR = jnp.where(real_CR, plan.order_p.at[place_CR].get(mode='clip'), len(weight_p))
  kernel = _kernel(m.kernel, gate_eDF)
  add = rows_tpu.add if kernel is experts_tpu.experts else _scatter
  x_CRD = _take(m.experts_per_token, add, x_GD, pair_CR, plan.row_p)
  weight_CR = jnp.where(real_CR, _take(1, _scatter, weight_p[:, None], pair_CR, plan.row_p)[..., 0], 0)
  used = jnp.minimum(plan.tile_end_e[-1] - i * size, size)
  y_CRD = kernel(x_CRD, weight_CR, expert_C, used, gate_eDF, up_eDF, down_eFD)
  return _sum(m.experts_per_token, add, y_CRD, pair_CR, plan.row_p, len(x_GD))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_pieces(sizes, plan: _Plan, _, *args) -> jax.Array:
  """All pieces that have tiles, one after the other. The backward pass does each again, as a loop can't save.

  The first, mostly the only one, is outside of the loop, which would add it to zeros. launch/hlo.py knows the loop by
  its name.
  """
  y_GD = _piece(sizes, plan, 0, *args)
  with jax.named_scope('overflow'):
    return lax.fori_loop(1, plan.pieces, lambda i, y_GD: y_GD + _piece(sizes, plan, i, *args), y_GD)


def _in_pieces_forward(sizes, plan, _, *args):
  return _in_pieces(sizes, plan, _, *args), (plan, args)


def _in_pieces_backward(sizes, saved, dy_GD):
  plan, args = saved
  gradients = lambda i: jax.vjp(functools.partial(_piece, sizes, plan, i), *args)[1](dy_GD)
  first = gradients(0)
  with jax.named_scope('overflow'):
    return None, None, *lax.fori_loop(
      1, plan.pieces, lambda i, grads: jax.tree.map(jnp.add, grads, gradients(i)), first)


_in_pieces.defvjp(_in_pieces_forward, _in_pieces_backward)


# Tokens to rows, and rows to tokens: each is the other's transpose. Where a device has all of a token's pairs (row_p),
# both are gathers, as scattered sums are slow on a CPU and in no fixed order on a GPU. Elsewhere `add` sums rows.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _take(k: int, add, x_GD, pair_CR, row_p) -> jax.Array:
  """[C, R, D]: the token of each row; an empty row gets any token's."""
  return x_GD.at[pair_CR // k].get(mode='clip')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 5))
def _sum(k: int, add, y_CRD, pair_CR, row_p, tokens: int) -> jax.Array:
  """[G, D]: the sum of each token's rows; empty rows count for nothing."""
  y_PD = y_CRD.reshape(-1, y_CRD.shape[-1])
  if row_p is None:
    return add(y_PD, pair_CR.reshape(-1) // k, tokens)
  some = lambda row_G: y_PD.at[row_G].get(mode='fill', fill_value=0).astype(jnp.float32)
  return sum(map(some, row_p.reshape(-1, k).T)).astype(y_PD.dtype)


def _scatter(y_PD, to_P, sums: int) -> jax.Array:
  return jnp.zeros((sums, y_PD.shape[1]), y_PD.dtype).at[to_P].add(y_PD, mode='drop')


_take.defvjp(
  lambda k, add, x_GD, pair_CR, row_p: (_take(k, add, x_GD, pair_CR, row_p), (pair_CR, row_p, len(x_GD))),
  lambda k, add, saved, dx_CRD: (_sum(k, add, dx_CRD, *saved), None, None))
_sum.defvjp(
  lambda k, add, y_CRD, pair_CR, row_p, tokens: (_sum(k, add, y_CRD, pair_CR, row_p, tokens), (pair_CR, row_p)),
  lambda k, add, tokens, saved, dy_GD: (_take(k, add, dy_GD, *saved), None, None))


# Kernels: (x_CRD, weight_CR, expert_C, used, gate_eDF, up_eDF, down_eFD) -> weight · down(silu(gate(x)) · up(x)),
# [C, R, D]. What comes out of tiles from number `used` on doesn't matter.


def _kernel(name: str, gate_eDF):
  """The one choice between backends. Only for a TPU has XLA a grouped product: elsewhere ragged_dot multiplies all rows
  by all experts, as the FLOPs of the compiled program show."""
  if name == 'auto':
    name = 'tiles'
    if platform() == 'tpu':
      name = 'pallas' if experts_tpu.fits(*gate_eDF.shape[1:]) else 'ragged'
    if platform() == 'gpu' and experts_triton.fits(*gate_eDF.shape[1:]):
      name = 'triton'
  kernels = {
    'tiles': _tiles, 'ragged': _ragged, 'pallas': experts_tpu.experts, 'triton': experts_triton.experts}
  return kernels[name]


def _tiles(x_CRD, weight_CR, expert_C, used, gate_eDF, up_eDF, down_eFD):
  """Each tile with a copy of its expert's weights."""
  gate_CRF = checkpoint_name(jnp.einsum('CRD,CDF->CRF', x_CRD, gate_eDF[expert_C]), 'mlp')
  up_CRF = checkpoint_name(jnp.einsum('CRD,CDF->CRF', x_CRD, up_eDF[expert_C]), 'mlp')
  return jnp.einsum('CRF,CFD->CRD', _hidden(gate_CRF, up_CRF, weight_CR), down_eFD[expert_C])


def _ragged(x_CRD, weight_CR, expert_C, used, gate_eDF, up_eDF, down_eFD):
  """XLA's own grouped product; an expert's tiles are one group."""
  rows = weight_CR.shape[1]
  group_e = rows * jnp.sum(expert_C == jnp.arange(len(gate_eDF))[:, None], 1, dtype=jnp.int32)
  x_PD, weight_P = x_CRD.reshape(-1, x_CRD.shape[-1]), weight_CR.reshape(-1)
  gate_PF = checkpoint_name(lax.ragged_dot(x_PD, gate_eDF, group_e), 'mlp')
  up_PF = checkpoint_name(lax.ragged_dot(x_PD, up_eDF, group_e), 'mlp')
  return lax.ragged_dot(_hidden(gate_PF, up_PF, weight_P), down_eFD, group_e).reshape(x_CRD.shape)


def _hidden(gate, up, weight):
  """silu(gate) · up · weight. The weight comes here and not after the last product, as F is the narrower side."""
  return (jax.nn.silu(gate.astype(jnp.float32)) * up * weight[..., None]).astype(gate.dtype)
