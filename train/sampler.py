"""Samples from the model, through the trainer's own forward: prompts in, tokens and their log-probabilities out.

A prompt is prefilled once and shared by its samples. Samples fill a fixed number of rows of one cache; a row whose
sample has ended takes the next one, between dispatches of a few steps each, so a long answer doesn't hold up the
others. Shapes depend on the settings alone, so nothing compiles twice.

Left out: paging of the cache. A row has room for the longest prompt and answer from the start, and attention runs
over all of it.

# R rows  I rows filled at once  F prompts prefilled at once  P prompt slots  T steps of a dispatch  D width
# V vocabulary, N blocks of W tokens each
"""

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from betarank import model
from betarank.model.decode import CACHE_AXES
from betarank.model.sharding import constrain
from betarank.train import score

ROLLOUT_STREAM = 2  # fold_in(seed, stream, ...); rl/loop.py has 3
SHORTEST_BUCKET = 16
INSERTED = 16  # rows filled by one dispatch


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """How to sample. RL draws from the full distribution (temperature 1); top_p and top_k are for evaluation.

  Attributes:
    decode_batch_size: samples decoded at the same time; the cache's memory is proportional to it.
    max_prompt_tokens, max_new_tokens: room in a row; EOS is one of the new tokens.
    temperature: logits are divided by it; 0 takes the most probable token.
    top_k: keeps that many most probable tokens, ties as jax.lax.top_k breaks them; 0 keeps all.
    top_p: of what top_k left, keeps the fewest most probable tokens with at least this probability together.
    decode_steps: tokens a row draws between two visits of the host, which is when ended rows are refilled.
    record_choices: whether samples of a mixture of experts tell which experts their tokens went to.

  Raises ValueError, naming the field first.
  """

  decode_batch_size: int
  max_prompt_tokens: int
  max_new_tokens: int
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  decode_steps: int = 8
  record_choices: bool = False

  def __post_init__(self):
    for name in ('decode_batch_size', 'max_prompt_tokens', 'max_new_tokens', 'decode_steps'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be >= 1, got {getattr(self, name)}')
    if not 0 <= self.temperature < math.inf:
      raise ValueError(f'temperature must be >= 0 and finite, got {self.temperature}')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p must be in (0, 1], got {self.top_p}')
    if self.top_k < 0:
      raise ValueError(f'top_k must be >= 1, or 0 for all tokens, got {self.top_k}')


class Prompt(NamedTuple):
  """A prompt to sample continuations of. `id` (below 2^32) is folded into the random keys; `max_new_tokens` is a lower
  limit for this prompt than the setting's.
  """

  id: int
  tokens: Sequence[int]
  max_new_tokens: int | None = None


class Sample(NamedTuple):
  """One answer.

  Attributes:
    prompt_id, index: which sample of which prompt.
    tokens: int32 [n], n >= 1; the last is EOS if and only if `finish` is 'eos'.
    logp: float32 [n], nats, of each token under the distribution it was drawn from (temperature and truncation
      included), so 0 for all at temperature 0.
    finish: 'eos', or 'length' where the room was used up.
    choices: int16 [prompt + n - 1, L, k], the experts of each token that went through the model, if they were recorded.
  """

  prompt_id: int
  index: int
  tokens: np.ndarray
  logp: np.ndarray
  finish: str
  choices: np.ndarray | None = None


def decode_param_axes(c: model.ModelConfig) -> Any:
  """Returns the logical axes of `decode_params`: the model's axes, but unsharded along the width, and with layers as a
  list.
  """
  whole = lambda names: tuple(None if name == 'embed' else name for name in names)
  return jax.tree.map(
    lambda names: [whole(names[1:])] * c.layers if names[0] == 'layers' else whole(names), model.abstract(c)[2],
    is_leaf=_is_names)


def decode_params(c: model.ModelConfig, params: model.transformer.Params) -> Any:
  """Returns the sampler's copy of the parameters, in the compute type. Each layer is a separate array, because slicing
  stacked layers would copy them for every token.
  """
  float32 = {'norm', 'router', 'bias'}
  cast = lambda x, names: x if float32 & set(names) else x.astype(c.dtype)
  return jax.tree.map(
    lambda names, x: list(cast(x, names)) if names[0] == 'layers' else cast(x, names), model.abstract(c)[2], params,
    is_leaf=_is_names)


def _is_names(node: Any) -> bool:
  return isinstance(node, tuple)


class Sampler:
  """Draws samples; holds settings and no parameters, so each call may bring newer ones.

  Args:
    c: the model.
    s: settings.
    eos: id of the token that ends a sample.
    mesh: where the parameters are. Rows lie over data, fsdp and expert, key heads over tensor. Weights are copied in
      the compute type without their fsdp sharding, as gathering them for each token would take longer than the rest.

  Raises ValueError for rows that the mesh doesn't divide, and an eos outside the vocabulary.
  """

  def __init__(self, c: model.ModelConfig, s: SamplerConfig, eos: int, mesh: Mesh | None = None):
    ways = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in model.RULES['batch'])
    if s.decode_batch_size % ways:
      raise ValueError(f'decode_batch_size must be a multiple of {ways}, the devices that it is spread over, got '
                       f'{s.decode_batch_size}')
    if not 0 <= eos < c.vocab_size:
      raise ValueError(f'eos must be a token id below vocab_size = {c.vocab_size}, got {eos}')
    self.c, self.s, self.eos, self.mesh, self.prompts_at_once = c, s, eos, mesh, ways
    self._weights = jax.jit(
      functools.partial(decode_params, c),
      out_shardings=None if mesh is None else model.shardings(mesh, decode_param_axes(c)))

  def __call__(
    self, params: model.transformer.Params, prompts: Sequence[Prompt], *, samples: int | Sequence[int], seed: int,
    step: int, watch: Callable[[Sample], None] | None = None,
  ) -> Iterator[list[Sample]]:
    """Yields each prompt's samples, ordered by index, as soon as the last of them has ended.

    While the caller works on a group the device decodes on. Token t of a sample depends on nothing but the
    parameters, the prompt's tokens and (seed, step, prompt id, sample index, t): any sample can be drawn again
    alone, or with other settings of decode_batch_size and decode_steps. (A matrix product of another shape may round
    differently, which moves a draw that falls on the very edge between two tokens.)

    Args:
      params: float32, as model.init makes them.
      prompts: with different ids.
      samples: how many of each prompt, or their indices.
      seed, step: integers in [0, 2^32).
      watch: called after each dispatch with what it added to each sample: a Sample of the new tokens, whose `finish` is
        '' if there are more to come.

    Raises ValueError for prompts that don't fit, before any device work.
    """
    indices = list(range(samples)) if isinstance(samples, int) else list(samples)
    self._check(prompts, indices, seed, step)
    return self._run(params, list(prompts), indices, np.uint32(seed), np.uint32(step), watch)

  def lower_decode(self, params: model.transformer.Params) -> jax.stages.Lowered:
    """Returns the lowered program of one dispatch, which draws up to decode_steps tokens per row.

    For planning: nothing is allocated, and the mesh may be of devices that aren't here. params: abstract arrays.
    """
    place = lambda x, axes: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=self.mesh and NamedSharding(self.mesh, model.spec(*axes)))
    weights = jax.eval_shape(functools.partial(decode_params, self.c), params)
    weights = jax.tree.map(lambda axes, x: place(x, axes), decode_param_axes(self.c), weights, is_leaf=_is_names)
    rows = jax.tree.map(lambda x: place(x, CACHE_AXES[x.ndim]), jax.eval_shape(lambda: _empty(self.c, self.s)))
    return _decode.lower(self.c, self.s, self.eos, weights, rows)

  def _check(self, prompts, indices, seed, step):
    if not indices or len(set(indices)) < len(indices):
      raise ValueError(f'samples must be >= 1, or different indices, got {indices}')
    for name, value in (('seed', seed), ('step', step), *(('samples', i) for i in indices)):
      if not 0 <= value < 2**32:
        raise ValueError(f'{name} must be in [0, 2^32), got {value}')
    seen = set()
    for prompt in prompts:
      where = f'prompts: prompt {prompt.id}'
      if prompt.id in seen or not 0 <= prompt.id < 2**32:
        raise ValueError(f'{where}: ids must be in [0, 2^32) and differ')
      seen.add(prompt.id)
      if not 1 <= len(prompt.tokens) <= self.s.max_prompt_tokens:
        raise ValueError(
          f'{where} has {len(prompt.tokens)} tokens, not 1 to max_prompt_tokens = {self.s.max_prompt_tokens}')
      if min(prompt.tokens) < 0 or max(prompt.tokens) >= self.c.vocab_size:
        raise ValueError(f'{where} has a token id outside the vocabulary of {self.c.vocab_size}')
      if prompt.max_new_tokens is not None and not 1 <= prompt.max_new_tokens <= self.s.max_new_tokens:
        raise ValueError(
          f'{where} has max_new_tokens = {prompt.max_new_tokens}, not 1 to {self.s.max_new_tokens}')

  def _run(self, params, prompts, indices, seed, step, watch):
    c, s = self.c, self.s
    record = s.record_choices and c.moe.experts > 0
    # A generator must not hold the mesh while its caller runs.
    on_mesh = contextlib.nullcontext if self.mesh is None else lambda: jax.set_mesh(self.mesh)
    with on_mesh():
      weights, rows = self._weights(params), _empty(c, s)
    queue = collections.deque((p, i) for p in range(len(prompts)) for i in indices)
    prefilled: dict[int, tuple[model.Cache, int, Any]] = {}  # prompt -> where its keys, values and choices are
    # row -> prompt, index, tokens, log-probabilities, choices
    running: dict[int, tuple[int, int, list, list, list]] = {}
    free = list(range(s.decode_batch_size))
    ended: list[dict[int, Sample]] = [{} for _ in prompts]
    groups = []
    while queue or running:
      with on_mesh():
        while queue and free:
          first = queue[0][0]
          if first not in prefilled:
            prefilled = self._prefill(weights, prompts, first)
          # The next samples whose prompts are prefilled together, as many as there is room for.
          some = []
          while queue and free and len(some) < INSERTED and queue[0][0] in prefilled:
            some.append((free.pop(), *queue.popleft()))
          rows = self._insert(rows, prefilled, prompts, some, seed, step)
          running |= {row: (p, i, [], [], [prefilled[p]]) for row, p, i in some}
        rows, drawn = _decode(c, s, self.eos, weights, rows)
      yield from groups  # the device is at work
      token_TR, logp_TR, count_R, choice_TRLk = jax.device_get(drawn)
      groups = []
      for row, (p, i, tokens, logps, choices) in list(running.items()):
        new = count_R[row] - sum(map(len, tokens))
        tokens.append(token_TR[:new, row])
        logps.append(logp_TR[:new, row])
        choices.append(choice_TRLk[:new, row] if record else None)
        eos = tokens[-1][-1] == self.eos
        finish = 'eos' if eos else 'length' if count_R[row] == self._limit(prompts[p]) else ''
        if watch:
          watch(Sample(prompts[p].id, i, tokens[-1], logps[-1], finish))
        if finish:
          ended[p][i] = Sample(
            prompts[p].id, i, np.concatenate(tokens), np.concatenate(logps), finish,
            self._choices(prompts[p], *choices) if record else None)
          del running[row]
          free.append(row)
          if len(ended[p]) == len(indices):
            groups.append([ended[p][i] for i in sorted(indices)])
            ended[p].clear()
    yield from groups

  def _choices(self, prompt, prefilled, *drawn):
    _, f, choice_FPLk = prefilled
    return np.concatenate([np.asarray(choice_FPLk)[f, : len(prompt.tokens) - 1], *drawn])

  def _limit(self, prompt):
    return prompt.max_new_tokens or self.s.max_new_tokens

  def _prefill(self, weights, prompts, first):
    """Returns caches of prompts[first] and the prompts after it, without their last tokens, which decoding starts with.
    """
    some = [prompt.tokens[:-1] for prompt in prompts[first : first + self.prompts_at_once]]
    longest = max(map(len, some))
    bucket = min(max(SHORTEST_BUCKET, 1 << (longest - 1).bit_length()), self.s.max_prompt_tokens)
    token_FP = np.zeros((self.prompts_at_once, bucket), np.int32)
    length_F = np.zeros(self.prompts_at_once, np.int32)
    for f, tokens in enumerate(some):
      token_FP[f, : len(tokens)] = tokens
      length_F[f] = len(tokens)
    cache, choice_FPLk = _prefill(self.c, weights, token_FP, length_F)
    return {first + f: (cache, f, choice_FPLk) for f in range(len(some))}

  def _insert(self, rows, prefilled, prompts, some, seed, step):
    """Writes samples (row, prompt, index) into their rows. All their prompts are in one prefilled cache."""
    cache = prefilled[some[0][1]][0]
    task = _Start(*np.zeros((6, INSERTED), np.uint32))
    task.row[:] = self.s.decode_batch_size  # out of range: nothing to put there
    for j, (row, p, i) in enumerate(some):
      prompt = prompts[p]
      for field, value in zip(task, (row, prefilled[p][1], prompt.tokens[-1], self._limit(prompt), prompt.id, i)):
        field[j] = value
    return _insert(rows, cache, task, seed, step)


# What runs on the device.


class _Start(NamedTuple):
  """Samples to start; fields uint32 [I]."""

  row: Any
  source: Any  # which prompt of the prefilled cache
  token: Any  # the prompt's last
  limit: Any
  prompt_id: Any
  index: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
  cache: model.Cache
  token_R: jax.Array  # int32, the last one, not yet in the cache
  count_R: jax.Array  # int32, tokens drawn
  limit_R: jax.Array  # int32, what count_R goes up to; equal in a row at rest
  key_R2: jax.Array  # uint32, the sample's random key


def _pinned(tree):
  return jax.tree.map(lambda x: constrain(x, *CACHE_AXES[x.ndim]), tree)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty(c, s) -> _Rows:
  zeros = lambda *shape, dtype=jnp.int32: jnp.zeros(shape, dtype)
  cache = model.empty_cache(c, s.decode_batch_size, s.max_prompt_tokens + s.max_new_tokens)
  R = s.decode_batch_size
  return _pinned(_Rows(cache, zeros(R), zeros(R), zeros(R), zeros(R, 2, dtype=jnp.uint32)))


@functools.partial(jax.jit, static_argnums=0)
def _prefill(c, weights, token_FP, length_F) -> tuple[model.Cache, jax.Array | None]:
  position_FP = jnp.broadcast_to(jnp.arange(token_FP.shape[1]), token_FP.shape)
  segment_FP = (position_FP < length_F[:, None]).astype(jnp.int32)
  empty = model.empty_cache(c, *token_FP.shape)
  _, cache, routing = model.forward_routed(c, weights, token_FP, position_FP, segment_FP, empty)
  return _pinned(cache), _choices(routing)


def _choices(routing: model.Routing | None) -> jax.Array | None:
  """int16 [F, P, L, k] on every host; None of a dense model."""
  if routing is None:
    return None
  return constrain(jnp.moveaxis(routing.choices_LBTk, 0, 2).astype(jnp.int16), None, None, None, None)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(rows, prompts, task, seed, step) -> _Rows:
  slots = rows.cache.segments_BS.shape[1] - prompts.segments_BS.shape[1]
  heads = lambda old, new: old.at[task.row, :, : new.shape[2]].set(new[task.source], mode='drop')
  # Whole rows, so that the slots of the row's last sample become empty.
  slot = lambda old, new: old.at[task.row].set(jnp.pad(new[task.source], ((0, 0), (0, slots))), mode='drop')
  put = lambda old, new: old.at[task.row].set(new.astype(old.dtype), mode='drop')
  cache = model.Cache(
    jax.tree.map(heads, rows.cache.k_LBKSH, prompts.k_LBKSH),
    jax.tree.map(heads, rows.cache.v_LBKSH, prompts.v_LBKSH),
    slot(rows.cache.positions_BS, prompts.positions_BS),
    slot(rows.cache.segments_BS, prompts.segments_BS),
    put(rows.cache.length_B, prompts.length_B[task.source]),
  )

  def key(prompt_id, index):
    parts = (ROLLOUT_STREAM, step, prompt_id, index)
    return jax.random.key_data(functools.reduce(jax.random.fold_in, parts, jax.random.key(seed, impl='threefry2x32')))

  return _pinned(_Rows(
    cache,
    put(rows.token_R, task.token),
    put(rows.count_R, jnp.zeros_like(task.row)),
    put(rows.limit_R, task.limit),
    put(rows.key_R2, jax.vmap(key)(task.prompt_id, task.index)),
  ))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _decode(c, s, eos, weights, rows):
  """Draws up to s.decode_steps tokens for every unfinished row, and stops early once all rows are finished.

  Returns the rows, and for the host (token_TR, logp_TR, count_R, choice_TRLk, which is None unless they are recorded);
  a row's tokens are the first ones of its column.
  """
  head_DV = model.head(c, weights)

  def uniform(key_2, count):
    return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key_2, impl='threefry2x32'), count), (2,))

  def body(carry):
    t, rows, token_TR, logp_TR, choice_TRLk = carry
    live_R = rows.count_R < rows.limit_R
    hidden_R1D, cache, routing = model.forward_routed(
      c, weights, rows.token_R[:, None], rows.cache.length_B[:, None], live_R[:, None].astype(jnp.int32), rows.cache)
    logits_RV = score.logits(c, hidden_R1D[:, 0], head_DV, s.temperature or 1.0)
    z_RV = constrain(logits_RV, 'batch', 'vocab')
    token_R, logp_R = _draw(s, z_RV, jax.vmap(uniform)(rows.key_R2, rows.count_R))
    count_R = rows.count_R + live_R
    rows = _Rows(
      cache,
      token_R=jnp.where(live_R, token_R, rows.token_R),
      count_R=count_R,
      limit_R=jnp.where(live_R & (token_R == eos), count_R, rows.limit_R),
      key_R2=rows.key_R2,
    )
    if choice_TRLk is not None:
      choice_TRLk = choice_TRLk.at[t].set(_choices(routing)[:, 0])
    return t + 1, _pinned(rows), token_TR.at[t].set(token_R), logp_TR.at[t].set(logp_R), choice_TRLk

  def go_on(carry):
    t, rows, *_ = carry
    return (t < s.decode_steps) & jnp.any(rows.count_R < rows.limit_R)

  shape = (s.decode_steps, s.decode_batch_size)
  recorded = s.record_choices and c.moe.experts
  choices = jnp.zeros((*shape, c.layers, c.moe.experts_per_token), jnp.int16) if recorded else None
  carry = (0, rows, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32), choices)
  _, rows, token_TR, logp_TR, choices = jax.lax.while_loop(go_on, body, carry)
  # Every host sees all rows and takes the same decisions.
  drawn = constrain(token_TR, None, None), constrain(logp_TR, None, None), constrain(rows.count_R, None), choices
  return _pinned(rows), drawn  # else count_R would be as the hosts see it, and the next dispatch another program


def _draw(s, z_RV, u_R2):
  """Returns tokens and their log-probabilities. Each token is drawn with two uniform numbers: the first picks a block
  of the vocabulary, the second a token in that block.

  Drawing a number for each of the V tokens (the Gumbel method) takes 30 times as long on a CPU. Two numbers resolve
  probabilities down to 2^-23 of a block; a single number would resolve only 2^-23 of the whole distribution.
  """
  e_RV = jnp.exp(z_RV - z_RV.max(-1, keepdims=True))
  if s.temperature == 0 or s.top_k or s.top_p < 1:
    e_RV = jnp.where(_kept(s, z_RV), e_RV, 0)
  rows, vocab = z_RV.shape
  width = min((w for w in range(1, vocab + 1) if vocab % w == 0), key=lambda w: abs(w - 128))
  e_RNW = e_RV.reshape(rows, -1, width)
  block_RN = e_RNW.sum(-1)
  block_R = _pick(block_RN, u_R2[:, 0])
  e_RW = jnp.take_along_axis(e_RNW, block_R[:, None, None], 1)[:, 0]
  place_R = _pick(e_RW, u_R2[:, 1])
  drawn_R = jnp.take_along_axis(e_RW, place_R[:, None], 1)[:, 0]
  # 1 - p is summed, not subtracted, which keeps the digits of log p where p is near 1.
  but = lambda x, taken_R: jnp.sum(x, -1, where=jnp.arange(x.shape[1]) != taken_R[:, None])
  other_R = but(block_RN, block_R) + but(e_RW, place_R)
  return block_R * width + place_R, -jnp.log1p(other_R / drawn_R)


def _pick(mass_RN, u_R):
  """Returns an index drawn in proportion to mass >= 0. An index with mass 0 is never drawn, however the sums round."""
  upto_RN = jnp.where(mass_RN > 0, jnp.cumsum(mass_RN, -1), 0)
  return jnp.argmax(upto_RN > u_R[:, None] * upto_RN.max(-1, keepdims=True), -1)


def _kept(s, z_RV):
  """Returns bool [R, V]: the tokens that remain after temperature 0, top_k and then top_p."""
  k = 1 if s.temperature == 0 else s.top_k or z_RV.shape[1]
  value_RK, id_RK = jax.lax.top_k(z_RV, min(k, z_RV.shape[1]))
  p_RK = jax.nn.softmax(value_RK)
  keep_RK = jnp.cumsum(p_RK, -1) - p_RK < s.top_p
  return jnp.zeros(z_RV.shape, bool).at[jnp.arange(len(z_RV))[:, None], id_RK].set(keep_RK)
