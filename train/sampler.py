"""Samples from the model: takes prompts, and returns tokens and their log-probabilities.

The forward pass is the same function as in training. In each part of the mesh, a prompt is prefilled once, and all its
samples there share it.

The device decodes a fixed number of rows, in dispatches of a few steps each. Between dispatches, each row whose sample
has ended gets the next sample, so a long answer doesn't delay other samples. Once no samples wait and only few are
still being drawn, an accelerator's dispatches have fewer rows (`Sampler.sizes`). On an accelerator, the host reads the
results of a dispatch while the next dispatch runs.

The cache (model/decode.py) consists of pages. A row gets pages as its sample grows, so the cache may be much smaller
than all rows at their greatest length. The shapes of arrays depend only on the settings, except that a prefill has the
length of its longest prompt, rounded up to a power of two. Therefore only few programs are compiled.

# R rows  B rows of a dispatch, in C parts of the mesh
# F prompts prefilled at once  P tokens of a prompt  I pages of a prompt
# T steps of a dispatch  D width  V vocabulary, N blocks of W tokens each  K most probable tokens
# L layers  k experts per token  LP2KSH as in model/decode.py
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
from betarank.model import decode
from betarank.model.sharding import constrain, shards
from betarank.train import score
from betarank.train.decode_mesh import decode_mesh
from betarank.train.pages import Pages, Running

ROLLOUT_STREAM = 2  # fold_in(seed, stream, ...); rl/loop.py has 3
SHORTEST_BUCKET = 16
# The fewest rows of a dispatch in a part of the mesh. Matrix products of fewer rows would take as long. On a CPU, all
# dispatches have all rows, so that a sample's bits don't depend on the samples that are drawn with it.
FEWEST_ROWS = {'cpu': math.inf, 'gpu': 16, 'tpu': 16}
# Where a prefill has the prompts of all parts of the mesh, padded to the length of the longest. On a CPU, prompts that
# are padded to different lengths have prefills of their own, for the same reason.
TOGETHER = ('gpu', 'tpu')
# Dispatches in flight while the host reads another. On a CPU the host and the device are the same cores.
AHEAD = {'cpu': 0, 'gpu': 1, 'tpu': 1}
AXES = {1: ('batch',), 2: ('batch', None), 5: decode.PAGES_AXES}  # of arrays with a dimension R, by their dimensions


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """The settings of a sampler. RL leaves top_p and top_k at their defaults; other values are for evaluation.

  Attributes:
    decode_batch_size: the number of rows. At most this many samples are decoded at the same time.
    max_prompt_tokens, max_new_tokens: the largest number of tokens of a prompt, and of an answer including its EOS.
    temperature: the logits are divided by this number. 0 means that the most probable token is always drawn.
    top_k: tokens are drawn only from this number of most probable tokens; 0 means from all tokens. Of equally probable
      tokens, lower ids come first.
    top_p: tokens are drawn only from the smallest set of most probable tokens whose probabilities sum to at least
      top_p. The probabilities are those after top_k, renormalized.
    decode_steps: the number of tokens that a row draws per dispatch. Between dispatches, rows whose sample has ended
      get new samples.
    record_choices: whether each Sample of a mixture of experts records the experts that were chosen for each token.
    cache_tokens: the number of tokens that the cache has room for, on all devices together. 0 means room for all rows
      at their greatest length, each with a prompt of its own. When the cache is full, the sample that started last is
      stopped, and starts again later.
    decode_split: the number of devices that share one copy of the weights. 0 means `decode_mesh.default_split`.
    page_tokens: the number of tokens per page of the cache. It is reduced if even the longest prompts and answers can't
      fill a page.

  Raises:
    ValueError: a value is invalid. The message begins with the name of the field.
  """

  decode_batch_size: int
  max_prompt_tokens: int
  max_new_tokens: int
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  decode_steps: int = 8
  record_choices: bool = False
  cache_tokens: int = 0
  decode_split: int = 0
  page_tokens: int = 64

  def __post_init__(self):
    for name in ('decode_batch_size', 'max_prompt_tokens', 'max_new_tokens', 'decode_steps', 'page_tokens'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be >= 1, got {getattr(self, name)}')
    if not 0 <= self.temperature < math.inf:
      raise ValueError(f'temperature must be >= 0 and finite, got {self.temperature}')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p must be in (0, 1], got {self.top_p}')
    if self.top_k < 0:
      raise ValueError(f'top_k must be >= 1, or 0 for all tokens, got {self.top_k}')
    if self.cache_tokens < 0:
      raise ValueError(f'cache_tokens must be >= 1, or 0 for what all rows need, got {self.cache_tokens}')
    if self.decode_split < 0:
      raise ValueError(f'decode_split must be >= 1, or 0 for the default, got {self.decode_split}')
    # Pages that no prompt and no answer fills would only be read in vain.
    longest = max(self.max_prompt_tokens - 1, self.max_new_tokens)
    object.__setattr__(self, 'page_tokens', min(self.page_tokens, max(16, 1 << (longest - 1).bit_length())))

  @property
  def prompt_pages(self) -> int:
    """The number of pages for the longest prompt. A prompt's last token isn't in them, because decoding begins with
    this token.
    """
    return max(1, -(-(self.max_prompt_tokens - 1) // self.page_tokens))

  @property
  def row_pages(self) -> int:
    """The number of pages for the longest prompt and the longest answer together."""
    return self.prompt_pages - (-self.max_new_tokens // self.page_tokens)

  @property
  def pages(self) -> int:
    """The number of pages of the whole cache."""
    most = self.decode_batch_size * self.row_pages
    return min(self.cache_tokens // self.page_tokens, most) if self.cache_tokens else most


class Prompt(NamedTuple):
  """A prompt to sample answers to.

  Attributes:
    id: a number in [0, 2^32), which is part of the random keys. The prompts of a call must have different ids.
    tokens: the tokens of the prompt.
    max_new_tokens: the largest number of tokens of an answer to this prompt, at most SamplerConfig.max_new_tokens. None
      means SamplerConfig.max_new_tokens.
  """

  id: int
  tokens: Sequence[int]
  max_new_tokens: int | None = None


class Sample(NamedTuple):
  """One answer.

  Attributes:
    prompt_id: the id of the prompt.
    index: the index of this sample among the samples of the prompt.
    tokens: int32 [n], n >= 1, the tokens drawn. The last token is EOS if and only if `finish` is 'eos'.
    logp: float32 [n], the log-probability of each token in nats, after temperature, top_k and top_p have been applied.
      At temperature 0 all are 0.
    finish: 'eos', or 'length' if the answer reached its largest number of tokens without EOS.
    choices: int16 [m + n - 1, L, k] for a prompt of m tokens: the k experts chosen in each of the L layers, for every
      token except the last, which doesn't go through the model. None if they weren't recorded.
  """

  prompt_id: int
  index: int
  tokens: np.ndarray
  logp: np.ndarray
  finish: str
  choices: np.ndarray | None = None

  @property
  def text_tokens(self) -> np.ndarray:
    """The tokens of the answer's text, which are all tokens except EOS."""
    return self.tokens[:-1] if self.finish == 'eos' else self.tokens


def decode_param_axes(c: model.ModelConfig) -> Any:
  """Returns the logical names of the dimensions of each array that `decode_params` returns.

  The names are the same as in the model's parameters, but without `layers`, because the sampler has a list of layers.
  """
  return jax.tree.map(
    lambda names: [names[1:]] * c.layers if names[0] == 'layers' else names, model.abstract(c)[2], is_leaf=_is_names)


def decode_params(c: model.ModelConfig, mesh: Mesh | None, params: model.transformer.Params) -> Any:
  """Returns the sampler's copy of the parameters. Norms, routers and biases are float32, all others have the compute
  dtype.

  Each layer is a separate array, because slicing stacked layers would copy them for every token.

  mesh: the mesh of the parameters; None for one device.
  """
  float32 = {'norm', 'router', 'bias'}

  def copy(names, x):
    x = x if float32 & set(names) else x.astype(c.dtype)
    if names[0] == 'layers':
      return list(x)
    # Embedding and head go from shards of the width to shards of the vocabulary. XLA gathers them in between, and would
    # warn if this weren't asked for.
    whole = model.spec(*(None if name == 'embed' else name for name in names))
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, whole))

  return jax.tree.map(copy, model.abstract(c)[2], params, is_leaf=_is_names)


def _is_names(node: Any) -> bool:
  return isinstance(node, tuple)


class Sampler:
  """Draws samples. It holds settings but no parameters, so each call may pass newer parameters.

  Args:
    c: the model.
    s: the settings.
    eos: the id of the token that ends a sample.
    mesh: the mesh of the parameters; None for one device. Each call copies the weights to the sampler's own mesh, which
      has the same devices (decode_mesh.py). There, the axes data and expert split the rows, and the axis tensor splits
      the key heads.

  Raises:
    ValueError: the mesh doesn't divide the rows, the cache is too small for one sample in each part of the mesh,
      decode_split doesn't divide the devices or the model, or `eos` isn't in the vocabulary.
  """

  def __init__(self, c: model.ModelConfig, s: SamplerConfig, eos: int, mesh: Mesh | None = None):
    of_params = mesh
    if mesh is not None:
      mesh = decode_mesh(c, mesh, s.decode_split)
    ways = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in model.RULES['batch'])
    if s.decode_batch_size % ways:
      raise ValueError(f'decode_batch_size must be a multiple of {ways}, the devices that it is spread over, got '
                       f'{s.decode_batch_size}')
    if s.pages < ways * s.row_pages:
      raise ValueError(f'cache_tokens must be >= {ways * s.row_pages * s.page_tokens}, or 0 for what all rows need: '
                       f'the longest prompt and answer on each of {ways} devices, got {s.cache_tokens}')
    if not 0 <= eos < c.vocab_size:
      raise ValueError(f'eos must be a token id below vocab_size = {c.vocab_size}, got {eos}')
    s = dataclasses.replace(s, cache_tokens=s.pages // ways * ways * s.page_tokens)
    self.c, self.s, self.eos, self.mesh, self.ways = c, s, eos, mesh, ways
    self._weights = jax.jit(
      functools.partial(decode_params, c, of_params),
      out_shardings=None if mesh is None else model.shardings(mesh, decode_param_axes(c)))

  def __call__(
    self, params: model.transformer.Params, prompts: Sequence[Prompt], *, samples: int | Sequence[int], seed: int,
    step: int, watch: Callable[[Sample], None] | None = None, more: Callable[[], Sequence[Prompt] | None] | None = None,
  ) -> Iterator[list[Sample]]:
    """Yields the samples of each prompt, ordered by index, as soon as all samples of the prompt have ended.

    While the caller works on these samples, the device continues to decode.

    Token t of a sample depends only on the parameters, the prompt's tokens, the temperature, top_k, top_p and (seed,
    step, prompt id, sample index, t). Any sample can therefore be drawn again, alone or with another decode_batch_size
    or decode_steps. There is one exception: matrix products of different shapes may round differently, which changes a
    draw that falls on the very edge between two tokens. On an accelerator, the shapes also depend on how many samples
    are being drawn (see `sizes`). The same call always has the same shapes.

    Args:
      params: the parameters, float32, with the structure of model.init.
      prompts: the prompts. Their ids must differ.
      samples: the number of samples per prompt, or the list of their indices.
      seed, step: integers in [0, 2^32).
      watch: called after each dispatch, once for each sample that has new tokens. The argument is a Sample that has
        only the new tokens, and whose `finish` is '' if the sample isn't complete. A sample that was stopped because
        the cache was full begins again with its first token.
      more: a function that returns further prompts. It is called after each dispatch, once the caller has taken all
        samples that have ended. Further prompts start after all prompts that still wait for a row. If it returns None,
        the call ends, and drops the samples that haven't ended.

    Raises:
      ValueError: a prompt is too long or otherwise invalid, or another argument is invalid. This is checked before any
        device work.
    """
    indices = list(range(samples)) if isinstance(samples, int) else list(samples)
    self._check(prompts, indices, seed, step)
    return self._run(params, list(prompts), indices, np.uint32(seed), np.uint32(step), watch, more)

  def describe_split(self) -> str:
    """Returns a text for the log header: how many devices share one copy of the weights; '' if each has its own."""
    split = 1 if self.mesh is None else self.mesh.size // self.mesh.shape['data']
    return f'; to sample, {split} devices share a copy of the weights' if split > 1 else ''

  @property
  def sizes(self) -> list[int]:
    """The numbers of rows that a dispatch may have in each part of the mesh, in descending order.

    Each is a quarter of the one before, because each needs a program of its own.
    """
    found = [self.s.decode_batch_size // self.ways]
    while found[-1] // 4 >= FEWEST_ROWS[model.platform()]:
      found.append(found[-1] // 4)
    return found

  def lower_decode(self, params: model.transformer.Params) -> jax.stages.Lowered:
    """Returns the lowered program of one dispatch, which draws up to decode_steps tokens per row.

    The program is for planning: no memory is allocated, and the mesh may consist of devices that this machine doesn't
    have.

    params: the shapes and dtypes of the parameters.
    """
    place = lambda x, axes: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=self.mesh and NamedSharding(self.mesh, model.spec(*axes)))
    weights = jax.eval_shape(functools.partial(decode_params, self.c, None), params)
    weights = jax.tree.map(lambda axes, x: place(x, axes), decode_param_axes(self.c), weights, is_leaf=_is_names)
    rows = jax.tree.map(lambda x: place(x, AXES[x.ndim]), jax.eval_shape(lambda: _empty(self.c, self.s)))
    table = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._pages().table())
    return _decode.lower(self.c, self.s, self.eos, weights, rows, table, None)

  def lower_weights(self, params: model.transformer.Params) -> jax.stages.Lowered:
    """Returns the lowered program that copies the parameters to the sampler's mesh. Each call of the sampler runs it.

    params: the parameters as jax.ShapeDtypeStruct with shardings.
    """
    return self._weights.lower(params)

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

  def _pages(self) -> Pages:
    s = self.s
    return Pages(rows=s.decode_batch_size, pages=s.pages, parts=self.ways, size=s.page_tokens,
                 prompt_pages=s.prompt_pages, row_pages=s.row_pages, unit_rows=decode.unit_rows(self.c))

  def _run(self, params, prompts, indices, seed, step, watch, more):
    s = self.s
    record = s.record_choices and self.c.moe.experts > 0
    # A generator must not hold the mesh while its caller runs.
    on_mesh = contextlib.nullcontext if self.mesh is None else lambda: jax.set_mesh(self.mesh)
    weights = self._weights(params)  # from the mesh of the parameters to this one
    with on_mesh():
      rows = _empty(self.c, s)
      ahead = AHEAD[model.platform()]
    pages = self._pages()
    queue = {p: collections.deque(indices) for p in range(len(prompts))}
    # For each dispatch: what it draws, and its samples, each with its column.
    flying: collections.deque[tuple[Any, list[tuple[Running, int]]]] = collections.deque()
    ended: list[dict[int, Sample]] = [{} for _ in prompts]
    groups = []
    while queue or pages.running or groups:
      while (queue or pages.running) and (
          not flying or (len(flying) <= ahead and pages.unfinished(s.decode_steps * len(flying)))):
        tokens = s.decode_steps * (len(flying) + 1)
        with on_mesh():
          stopped = pages.grow(tokens)
          for sample in stopped:
            queue.setdefault(sample.prompt, collections.deque()).appendleft(sample.index)
          rows, started = self._start(weights, rows, pages, queue, prompts, tokens)
          if stopped or started:
            rows = _put(rows, self._starts(stopped, started, prompts), seed, step)
          rows_CB = pages.live_rows(self.sizes)
          rows, drawn = _decode(self.c, s, self.eos, weights, rows, pages.table(rows_CB), rows_CB)
          jax.tree.map(lambda x: x.copy_to_host_async(), drawn)
        column_R = pages.columns(rows_CB)
        flying.append((drawn, [(sample, column_R[row]) for row, sample in pages.running.items()]))
      yield from groups  # the device is at work
      groups = []
      new = more() if more else []
      if new is None:
        return
      if new:
        new = list(new)
        self._check([*prompts, *new], indices, seed, step)
        queue |= {p: collections.deque(indices) for p in range(len(prompts), len(prompts) + len(new))}
        prompts += new
        ended += [{} for _ in new]
      if not flying:
        continue
      drawn, samples = flying.popleft()
      token_TB, logp_TB, count_B, choice_TBLk = jax.device_get(drawn)
      for sample, b in samples:
        p = sample.prompt
        if pages.running.get(sample.row) is not sample:  # it has ended or was stopped
          continue
        new = count_B[b] - sample.count
        sample.count += new
        sample.drawn.append((token_TB[:new, b], logp_TB[:new, b], choice_TBLk[:new, b] if record else None))
        eos = new and token_TB[new - 1, b] == self.eos
        finish = 'eos' if eos else 'length' if sample.count == sample.limit else ''
        if watch and new:
          watch(Sample(prompts[p].id, sample.index, token_TB[:new, b], logp_TB[:new, b], finish))
        if finish:
          ended[p][sample.index] = self._ended(prompts[p], sample)
          pages.stop(sample)
          if len(ended[p]) == len(indices):
            groups.append([ended[p][i] for i in sorted(indices)])
            ended[p].clear()
    yield from groups

  def _ended(self, prompt: Prompt, sample: Running) -> Sample:
    tokens, logps, choices = zip(*sample.drawn)
    tokens = np.concatenate(tokens)
    if choices[0] is not None:
      choice_FPLk, f = sample.prefix.routed
      choices = np.concatenate([np.asarray(choice_FPLk)[f, : len(prompt.tokens) - 1], *choices])
    return Sample(prompt.id, sample.index, tokens, np.concatenate(logps), 'eos' if tokens[-1] == self.eos else 'length',
                  None if choices[0] is None else choices)

  def _start(self, weights, rows, pages, queue, prompts, tokens) -> tuple['_Rows', list[Running]]:
    """Starts samples from the queue while there are free rows and pages, and prefills their prompts.

    Returns (the updated rows, the started samples). The caller must still put the samples into their rows, with `_put`.

    weights: the result of `decode_params`.
    rows: the _Rows on the device.
    pages: the Pages on the host. queue and tokens are arguments of `Pages.start`.
    prompts: all prompts. A prompt's number is its index in this list.
    """
    limit = lambda p: prompts[p].max_new_tokens or self.s.max_new_tokens
    started = []
    while True:
      samples, prefixes = pages.start(queue, lambda p: len(prompts[p].tokens) - 1, limit, tokens)
      if any(prefixes):
        rows = self._prefill(weights, rows, pages, prefixes, prompts)
      if not samples:
        return rows, started
      started += samples

  def _starts(self, stopped: list[Running], started: list[Running], prompts) -> '_Start':
    """Returns the _Start with which `_put` empties the rows of stopped samples and puts started samples into their
    rows.
    """
    new = _Start(*np.zeros((5, self.s.decode_batch_size), np.uint32))
    for sample in stopped:
      new.put[sample.row] = True
    for sample in started:
      prompt = prompts[sample.prompt]
      for field, value in zip(new, (True, prompt.tokens[-1], sample.limit, prompt.id, sample.index)):
        field[sample.row] = value
    return new

  def _prefill(self, weights, rows, pages, prefixes, prompts) -> '_Rows':
    """Writes prompts into the cache, at most one in each part of the mesh. Returns the updated rows.

    A prompt's last token isn't written, because decoding begins with it.

    prefixes: for each part of the mesh, the Prefix of the prompt to write, or None.
    prompts: all prompts. The attribute `prompt` of a Prefix is an index in this list.
    weights, rows, pages: as in `_start`.
    """
    tokens_F = [prompts[prefix.prompt].tokens[:-1] if prefix else [] for prefix in prefixes]
    bucket_F = [min(max(SHORTEST_BUCKET, 1 << (len(tokens) - 1).bit_length()), max(2, self.s.max_prompt_tokens))
                if prefix else 0 for prefix, tokens in zip(prefixes, tokens_F)]
    if model.platform() in TOGETHER:
      bucket_F = [max(bucket_F) if bucket else 0 for bucket in bucket_F]
    cache = rows.pages_LP2KSH
    for bucket in sorted(set(bucket_F) - {0}):
      now = [prefix if of == bucket else None for prefix, of in zip(prefixes, bucket_F)]
      token_FP, length_F = np.zeros((len(now), bucket), np.int32), np.zeros(len(now), np.int32)
      for f, prefix in enumerate(now):
        if prefix:
          length_F[f] = len(tokens_F[f])
          token_FP[f, : length_F[f]] = tokens_F[f]
      cache, choice_FPLk = _prefill(self.c, weights, cache, token_FP, length_F, pages.filled(now, self.s.pages))
      for f, prefix in enumerate(now):
        if prefix:
          prefix.routed = choice_FPLk, f
    return dataclasses.replace(rows, pages_LP2KSH=cache)


# What runs on the device.


class _Start(NamedTuple):
  """The changes that `_put` makes to the rows of the cache. Every field is uint32 [R].

  Attributes:
    put: 1 if the row changes, else 0.
    token: the last token of the prompt.
    limit: the greatest number of tokens to draw. 0 empties the row, and starts no sample in it.
    prompt_id: the id of the prompt.
    index: the index of the sample among the samples of the prompt.
  """

  put: Any
  token: Any
  limit: Any
  prompt_id: Any
  index: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
  pages_LP2KSH: tuple[jax.Array, ...]
  token_R: jax.Array  # int32, the last one, not yet in the cache
  count_R: jax.Array  # int32, tokens drawn; as many of the row are in the cache
  limit_R: jax.Array  # int32, what count_R goes up to; equal in a row at rest
  key_R2: jax.Array  # uint32, the sample's random key


def _pinned(tree):
  return jax.tree.map(lambda x: constrain(x, *AXES[x.ndim]), tree)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty(c, s) -> _Rows:
  R = s.decode_batch_size
  zeros = lambda *shape, dtype=jnp.int32: jnp.zeros(shape, dtype)
  return _pinned(_Rows(
    decode.empty_pages(c, s.pages, s.page_tokens), zeros(R), zeros(R), zeros(R), zeros(R, 2, dtype=jnp.uint32)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(c, weights, pages_LP2KSH, token_FP, length_F, pages_FI) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
  position_FP = jnp.broadcast_to(jnp.arange(token_FP.shape[1]), token_FP.shape)
  segment_FP = (position_FP < length_F[:, None]).astype(jnp.int32)
  empty_F = jnp.zeros_like(length_F)
  table = decode.Table(pages_FI, empty_F, empty_F[:, None], empty_F)
  cache = model.Cache(pages_LP2KSH, table, empty_F, pages_FI.shape[1])
  _, cache, routing = model.forward_routed(c, weights, token_FP, position_FP, segment_FP, cache)
  return _pinned(cache.pages_LP2KSH), _choices(routing)


def _choices(routing: model.Routing | None) -> jax.Array | None:
  """Returns the experts chosen for each of P tokens of F prompts, int16 [F, P, L, k], as an array that isn't sharded.

  Returns None for a dense model.
  """
  if routing is None:
    return None
  return constrain(jnp.moveaxis(routing.choices_LBTk, 0, 2).astype(jnp.int16), None, None, None, None)


@functools.partial(jax.jit, donate_argnums=0)
def _put(rows, new, seed, step) -> _Rows:
  """Returns the rows after emptying some of them and putting samples into others.

  new: a _Start, which says what to change.
  seed, step: uint32, for the random keys of the samples.
  """
  new = _pinned(new)

  def put(old, x):
    return jnp.where(new.put.reshape(-1, *[1] * (old.ndim - 1)) > 0, x.astype(old.dtype), old)

  def key(prompt_id, index):
    parts = (ROLLOUT_STREAM, step, prompt_id, index)
    return jax.random.key_data(functools.reduce(jax.random.fold_in, parts, jax.random.key(seed, impl='threefry2x32')))

  return _pinned(_Rows(
    rows.pages_LP2KSH,
    put(rows.token_R, new.token),
    put(rows.count_R, jnp.zeros_like(rows.count_R)),
    put(rows.limit_R, new.limit),
    put(rows.key_R2, jax.vmap(key)(new.prompt_id, new.index)),
  ))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _decode(c, s, eos, weights, rows, table, rows_CB):
  """Draws up to s.decode_steps tokens for every row whose sample hasn't ended.

  Returns (rows, drawn). `drawn` is what the host reads: (token_TB, logp_TB, count_B, choice_TBLk). count_B is the
  number of tokens of each sample so far. If a row's count has grown by n, the row's new tokens are the first n entries
  of its column of token_TB. choice_TBLk is None if the chosen experts aren't recorded.

  c, s, eos: the model, the settings of the sampler, and the id of the token that ends a sample.
  weights: the result of `decode_params`.
  rows: all rows.
  table: the pages of each row of this dispatch.
  rows_CB: int32, the rows of this dispatch in each part of the mesh, numbered from 0. None means all rows.
  """
  head_DV = model.head(c, weights)
  table = _pinned(table)

  def uniform(key_2, count):
    return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key_2, impl='threefry2x32'), count), (2,))

  def body(rows, _):
    live_B = rows.count_R < rows.limit_R
    cache = model.Cache(rows.pages_LP2KSH, table, rows.count_R, s.prompt_pages)
    hidden_B1D, cache, routing = model.forward_routed(
      c, weights, rows.token_R[:, None], (table.prefix_B + rows.count_R)[:, None],
      live_B[:, None].astype(jnp.int32), cache)
    logits_BV = score.logits(c, hidden_B1D[:, 0], head_DV, s.temperature or 1.0)
    # The devices of a group exchange logits, so that each draws for a part of the group's rows, from all of V.
    rows_axis = 'drawn' if len(logits_BV) % shards('drawn') == 0 else 'batch'
    z_BV = constrain(constrain(logits_BV, 'batch', 'vocab'), rows_axis, None)
    token_B, logp_B = _draw(s, z_BV, jax.vmap(uniform)(rows.key_R2, rows.count_R))
    count_B = rows.count_R + live_B
    rows = _Rows(
      cache.pages_LP2KSH,
      token_R=jnp.where(live_B, token_B, rows.token_R),
      count_R=count_B,
      limit_R=jnp.where(live_B & (token_B == eos), count_B, rows.limit_R),
      key_R2=rows.key_R2,
    )
    recorded = s.record_choices and c.moe.experts
    return _pinned(rows), (token_B, logp_B, _choices(routing)[:, 0] if recorded else None)

  some = rows if rows_CB is None else _taken(rows, _pinned(rows_CB))
  some, (token_TB, logp_TB, choice_TBLk) = _scan(body, some, s.decode_steps)
  # Every host sees all rows and takes the same decisions.
  drawn = constrain(token_TB, None, None), constrain(logp_TB, None, None), constrain(some.count_R, None), choice_TBLk
  rows = some if rows_CB is None else _put_back(rows, some, _pinned(rows_CB))
  return _pinned(rows), drawn  # else count_R would be as the hosts see it, and the next dispatch another program


def _taken(rows, rows_CB) -> _Rows:
  """Returns some of the rows, rows_CB [C, B/C] of each part of the mesh, with all pages."""
  def take(x):
    return jax.vmap(lambda x_R, row_B: x_R[row_B])(_in_parts(x, rows_CB), rows_CB).reshape(-1, *x.shape[1:])

  return _pinned(dataclasses.replace(
    jax.tree.map(take, dataclasses.replace(rows, pages_LP2KSH=())), pages_LP2KSH=rows.pages_LP2KSH))


def _put_back(rows, some, rows_CB) -> _Rows:
  """Returns `rows` with `some` in place of the rows that `_taken` gave, and with the pages of `some`."""
  def put(x, new):
    return jax.vmap(lambda x_R, row_B, new_B: x_R.at[row_B].set(new_B))(
      _in_parts(x, rows_CB), rows_CB, _in_parts(new, rows_CB)).reshape(x.shape)

  state = [dataclasses.replace(each, pages_LP2KSH=()) for each in (rows, some)]
  return dataclasses.replace(jax.tree.map(put, *state), pages_LP2KSH=some.pages_LP2KSH)


def _in_parts(x, rows_CB):
  return x.reshape(len(rows_CB), -1, *x.shape[1:])


def _scan(body, rows, steps):
  """Returns what `jax.lax.scan(body, rows, length=steps)` returns. On a CPU, stops early if all samples have ended.

  The results of steps that weren't taken are zeros. Other devices always take all steps, because a GPU would have to
  wait for the host to decide after each step whether to continue.
  """
  if model.platform() != 'cpu':
    return jax.lax.scan(body, rows, length=steps)
  room = jax.tree.map(
    lambda x: jnp.zeros((steps, *x.shape), x.dtype), jax.eval_shape(lambda rows: body(rows, None)[1], rows))

  def step(carry):
    t, rows, found = carry
    rows, new = body(rows, None)
    return t + 1, rows, jax.tree.map(lambda x, x_new: x.at[t].set(x_new), found, new)

  live = lambda carry: (carry[0] < steps) & jnp.any(carry[1].count_R < carry[1].limit_R)
  return jax.lax.while_loop(live, step, (0, rows, room))[1:]


def _draw(s, z_RV, u_R2):
  """Draws one token per row. Returns (tokens, log-probabilities) [R].

  Each token is drawn with two uniform numbers. The first number picks a block of the vocabulary, the second a token in
  this block. Drawing a number for each of the V tokens (the Gumbel method) takes 30 times as long on a CPU. With a
  single number, a token of probability below 2^-23 might never be drawn. With two numbers, this limit applies to the
  probability of a block, and to a token's share of its block.

  s: the settings of the sampler.
  z_RV: float32 logits, divided by the temperature.
  u_R2: uniform random numbers in [0, 1).
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
  but = lambda x, taken_R: jnp.sum(x, -1, where=jnp.arange(x.shape[1])[None] != taken_R[:, None])
  other_R = but(block_RN, block_R) + but(e_RW, place_R)
  return block_R * width + place_R, -jnp.log1p(other_R / drawn_R)


def _pick(mass_RN, u_R):
  """Returns one index per row [R], drawn with probabilities proportional to mass_RN >= 0.

  An index with mass 0 is never drawn, even if sums are rounded.

  u_R: uniform random numbers in [0, 1).
  """
  upto_RN = jnp.where(mass_RN > 0, jnp.cumsum(mass_RN, -1), 0)
  return jnp.argmax(upto_RN > u_R[:, None] * upto_RN.max(-1, keepdims=True), -1)


def _kept(s, z_RV):
  """Returns bool [R, V]: True for the tokens that may be drawn.

  These are the row's top_k most probable tokens, except for those that top_p excludes. At temperature 0, only the most
  probable token may be drawn.
  """
  k = 1 if s.temperature == 0 else s.top_k or z_RV.shape[1]
  value_RK, id_RK = jax.lax.top_k(z_RV, min(k, z_RV.shape[1]))
  p_RK = jax.nn.softmax(value_RK)
  keep_RK = jnp.cumsum(p_RK, -1) - p_RK < s.top_p
  return jnp.zeros(z_RV.shape, bool).at[jnp.arange(len(z_RV))[:, None], id_RK].set(keep_RK)
