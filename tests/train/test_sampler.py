"""Tests the sampler: decoding equals the full forward pass, and tokens are drawn as often as their probabilities say.

A sample is the same alone, with padding, and in a batch whose finished rows are refilled.
"""

import collections
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from betarank import model
from betarank.model.sharding import MESH_AXES
from betarank.objectives import linear_token_stats
from betarank.train import sampler as module
from betarank.train.decode_mesh import default_split
from betarank.train.pages import Pages
from betarank.train.sampler import Prompt, Sampler, SamplerConfig
from tests import parameters

VOCAB = 384  # three blocks of 128
CONFIG = model.ModelConfig(
  vocab_size=VOCAB, layers=2, d_model=16, d_ff=32, heads=4, kv_heads=2, head_dim=8, rope_base=1e4, norm_eps=1e-6,
  tied_embeddings=True, compute_dtype='float32', remat_policy='none', scan_layers=True)
SETTINGS = SamplerConfig(decode_batch_size=4, max_prompt_tokens=16, max_new_tokens=10, decode_steps=3)
MANY = SamplerConfig(decode_batch_size=512, max_prompt_tokens=16, max_new_tokens=1, decode_steps=1)
EOS = 3


@pytest.fixture(scope='module')
def params():
  return parameters.random(CONFIG, seed=1)


def prompts(*lengths, first_id=100):
  """Returns random prompts of these lengths. The tokens of a prompt depend only on its id and length."""
  return [
    Prompt(first_id + i, np.random.default_rng(first_id + i).integers(4, VOCAB, n).tolist())
    for i, n in enumerate(lengths)
  ]


PROMPTS = prompts(5, 16, 1, 9, 2)


def draw(params, settings, what=PROMPTS, *, samples=3, seed=7, step=2, eos=EOS, mesh=None, config=CONFIG):
  """Returns {(prompt id, index): Sample} of the samples that the sampler draws."""
  groups = Sampler(config, settings, eos, mesh)(params, what, samples=samples, seed=seed, step=step)
  return {(sample.prompt_id, sample.index): sample for group in groups for sample in group}


@pytest.fixture(scope='module')
def reference(params):
  return draw(params, SETTINGS)


def same(got, want):
  assert got.keys() == want.keys()
  for name, sample in got.items():
    assert sample.tokens.tolist() == want[name].tokens.tolist()
    assert sample.finish == want[name].finish
    np.testing.assert_allclose(sample.logp, want[name].logp, rtol=1e-5, atol=1e-5)


@functools.partial(jax.jit, static_argnames=('config', 'temperature'))
def trainer(params, tokens_BT, *, config=CONFIG, temperature=1.0):
  """Runs the full forward pass. Returns (log-probability of each token but the first [B, T-1], logits [B, T, V])."""
  position_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
  hidden_BTD, _ = model.forward(config, params, tokens_BT, position_BT, jnp.ones_like(tokens_BT))
  head_DV = model.head(config, params)
  stats = linear_token_stats(hidden_BTD[:, :-1], head_DV, tokens_BT[:, 1:], temperature=temperature, top_k=10)
  return stats.target_logp, hidden_BTD.astype(jnp.float32) @ head_DV


def padded(rows, total=26):
  """Returns the rows with padding after each text, int32 [B, total]. Padding after a text doesn't change its
  log-probabilities.
  """
  return jnp.asarray([row + [0] * (total - len(row)) for row in rows])


def texts(drawn):
  return [prompt_of(sample) + sample.tokens.tolist() for sample in drawn]


def prompt_of(sample):
  return next(prompt.tokens for prompt in PROMPTS if prompt.id == sample.prompt_id)


def trainers_logps(params, drawn, **options):
  """Returns, for each sample, the log-probabilities of its tokens by the full forward pass."""
  logp_BT = np.asarray(trainer(params, padded(texts(drawn)), **options)[0])
  starts = [len(prompt_of(sample)) - 1 for sample in drawn]
  return [row[start : start + len(sample.tokens)] for row, start, sample in zip(logp_BT, starts, drawn)]


def logits(params, tokens):
  return np.asarray(trainer(params, padded([tokens]))[1][0, len(tokens) - 1])


# Samples and their log-probabilities.


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_log_probabilities_are_the_scorers(params, temperature):
  """If they are equal, each token was drawn from exactly the hidden state that the full forward pass gives."""
  drawn = list(draw(params, dataclasses.replace(SETTINGS, temperature=temperature)).values())
  assert len(drawn) == 15
  for sample, want in zip(drawn, trainers_logps(params, drawn, temperature=temperature)):
    np.testing.assert_allclose(sample.logp, want, rtol=0, atol=5e-6)


def test_log_probabilities_in_bfloat16_stay_within_a_percent(params):
  config = dataclasses.replace(CONFIG, compute_dtype='bfloat16')
  drawn = list(draw(params, SETTINGS, config=config).values())
  gaps = [sample.logp - want for sample, want in zip(drawn, trainers_logps(params, drawn, config=config))]
  assert np.exp(np.abs(np.concatenate(gaps))).mean() <= 1.01


def test_log_probability_keeps_its_digits_near_certainty():
  z = np.zeros((3, VOCAB), np.float32)
  z[:, 200] = 10, 20, 40
  token, logp = module._draw(SETTINGS, jnp.asarray(z), jnp.full((3, 2), 0.5))
  assert token.tolist() == [200] * 3
  want = -np.log1p((VOCAB - 1) * np.exp(-z[:, 200].astype(np.float64)))
  np.testing.assert_allclose(logp, want, rtol=1e-5)


def test_refilled_equals_padded_equals_alone_in_any_order(params, reference):
  same(draw(params, dataclasses.replace(SETTINGS, decode_batch_size=15, decode_steps=10)), reference)  # one dispatch
  same(draw(params, SETTINGS, PROMPTS[::-1]), reference)
  prompt = PROMPTS[3]
  same(draw(params, SETTINGS, [prompt], samples=[2]), {(prompt.id, 2): reference[prompt.id, 2]})


def test_samples_do_not_depend_on_pages_their_number_or_dispatches_in_flight(params, reference, monkeypatch):
  stopped = []
  grow = module.Pages.grow
  monkeypatch.setattr(module.Pages, 'grow', lambda *args: stopped.append(grow(*args)) or stopped[-1])
  same(draw(params, dataclasses.replace(SETTINGS, page_tokens=4)), reference)
  assert not any(stopped)  # room for all
  tight = dataclasses.replace(SETTINGS, page_tokens=4, cache_tokens=28)  # for one longest prompt and answer
  for ahead in (0, 2):
    monkeypatch.setitem(module.AHEAD, 'cpu', ahead)
    same(draw(params, tight), reference)
  assert any(stopped)  # samples made way for older ones, and were drawn again
  same(draw(params, dataclasses.replace(tight, decode_batch_size=1, decode_steps=1)), reference)  # alone


def test_a_cache_gives_all_pages_back_and_a_group_shares_its_prompt_s():
  queue = {0: collections.deque(range(5)), 1: collections.deque(range(2))}
  pages = Pages(rows=8, pages=40, parts=1, size=4, prompt_pages=4, row_pages=7, unit_rows=2)
  started, prefixes = pages.start(queue, lambda p: 15, lambda p: 9, tokens=5)
  assert ([sample.prompt for sample in started], [prefix.prompt for prefix in prefixes]) == ([0] * 5, [0])
  assert [len(sample.pages) for sample in started] == [2] * 5 and len(prefixes[0].pages) == 4
  more, prefixes = pages.start(queue, lambda p: 15, lambda p: 9, tokens=5)  # a prompt at a time
  assert ([sample.prompt for sample in more], [prefix.prompt for prefix in prefixes], queue) == ([1] * 2, [1], {})
  table = pages.table()
  assert sorted(table.count_U.tolist()) == [0, 0, 0, 0, 1, 2, 2, 2]
  assert len({*map(tuple, table.pages_BJ[[sample.row for sample in started], :4])}) == 1
  used = [page for sample in started + more for page in sample.pages] + prefixes[0].pages + started[0].prefix.pages
  assert len(set(used)) == len(used) == 7 * 2 + 2 * 4
  for sample in started + more:
    pages.stop(sample)
  assert pages.start(queue, None, None, 5) == ([], [None]) and not pages.running
  started, _ = pages.start({2: collections.deque([0])}, lambda p: 15, lambda p: 9, tokens=9)
  assert len(started) == 1


def test_samples_depend_on_all_that_names_them(params, reference):
  """Another seed, step or index gives another sample. The same prompt with another id gives another sample too."""
  distinct = {tuple(sample.tokens) for sample in reference.values()}
  other_ids = [prompt._replace(id=prompt.id + 50) for prompt in PROMPTS]
  for changes in ({'seed': 8}, {'step': 3}, {'samples': [3, 4, 5]}, {'what': other_ids}):
    distinct |= {tuple(sample.tokens) for sample in draw(params, SETTINGS, **changes).values()}
  assert len(distinct) == 5 * 15


def test_eos_ends_a_sample_once_and_lengths_are_kept(params, reference):
  """With another end token, or with less room, a sample has the same tokens up to its end."""
  eos = int(reference[101, 1].tokens[4])
  ended = draw(params, SETTINGS, eos=eos)
  for name, sample in ended.items():
    tokens = reference[name].tokens.tolist()
    want = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
    assert sample.tokens.tolist() == want
    assert sample.finish == ('eos' if eos in tokens else 'length')
    assert len(sample.logp) == len(want)
  assert {sample.finish for sample in ended.values()} == {'eos', 'length'}
  short = draw(params, SETTINGS, [p._replace(max_new_tokens=1 + i) for i, p in enumerate(PROMPTS)])
  for i, prompt in enumerate(PROMPTS):
    for index in range(3):
      assert short[prompt.id, index].tokens.tolist() == reference[prompt.id, index].tokens[: 1 + i].tolist()
      assert short[prompt.id, index].finish == 'length'


def test_groups_come_whole_and_as_soon_as_they_end(params):
  what = [p._replace(max_new_tokens=n) for p, n in zip(PROMPTS[:3], (10, 1, 5))]
  groups = list(Sampler(CONFIG, SETTINGS, EOS)(params, what, samples=1, seed=0, step=0))
  assert [group[0].prompt_id for group in groups] == [101, 102, 100]
  groups = list(Sampler(CONFIG, SETTINGS, EOS)(params, PROMPTS, samples=3, seed=0, step=0))
  assert [[sample.index for sample in group] for group in groups] == [[0, 1, 2]] * 5


# Distributions.


@pytest.mark.parametrize('ahead', [0, 1])
def test_prompts_that_come_later_are_drawn_while_others_go_on(params, reference, monkeypatch, ahead):
  """The last three prompts arrive one by one, each after another group has ended."""
  monkeypatch.setitem(module.AHEAD, 'cpu', ahead)
  sampler, later, got, ended = Sampler(CONFIG, SETTINGS, EOS), list(PROMPTS[2:]), {}, []

  def more():
    return [later.pop(0)] if later and len(ended) > 3 - len(later) - 1 else []

  watched = []
  for group in sampler(params, PROMPTS[:2], samples=3, seed=7, step=2, more=more,
                       watch=lambda sample: watched.append((len(ended), sample.prompt_id))):
    got |= {(sample.prompt_id, sample.index): sample for sample in group}
    ended.append(group[0].prompt_id)
  same(got, reference)
  assert any(ended_before < 2 and prompt == PROMPTS[2].id for ended_before, prompt in watched), 'rounds, not a flow'


@pytest.mark.parametrize('ahead', [0, 1])
def test_a_call_ends_when_no_more_samples_are_wanted(params, reference, monkeypatch, ahead):
  monkeypatch.setitem(module.AHEAD, 'cpu', ahead)
  groups, short = [], [PROMPTS[0]._replace(max_new_tokens=1), *PROMPTS[1:]]
  for group in Sampler(CONFIG, SETTINGS, EOS)(
      params, short, samples=3, seed=7, step=2, more=lambda: None if groups else []):
    groups.append(group)
  assert [group[0].prompt_id for group in groups] == [PROMPTS[0].id]
  assert [sample.tokens[0] for sample in groups[0]] == [reference[PROMPTS[0].id, i].tokens[0] for i in range(3)]


def test_frequencies_match_probabilities_and_samples_are_independent(params):
  n = 8192
  prompt = PROMPTS[0]
  token = np.array([sample.tokens[0] for sample in draw(params, MANY, [prompt], samples=n).values()])
  expected = n * np.asarray(jax.nn.softmax(logits(params, prompt.tokens)), np.float64)
  rare = expected < 5
  count = np.bincount(token, minlength=VOCAB)
  got, want = (np.append(x[~rare], x[rare].sum()) for x in (count, expected))
  assert len(got) > 50
  assert stats.chisquare(got, want * n / want.sum()).pvalue > 1e-3
  # Neighbours in a group, by three classes of about the same probability.
  order = np.argsort(-expected)
  kind = np.empty(VOCAB, int)
  kind[order] = np.minimum(np.cumsum(expected[order]) * 3 / n, 2).astype(int)
  pairs = kind[token].reshape(-1, 2)
  table = np.zeros((3, 3))
  np.add.at(table, (pairs[:, 0], pairs[:, 1]), 1)
  assert stats.chi2_contingency(table).pvalue > 1e-3


def test_greedy_is_the_full_forwards_argmax(params):
  drawn = list(draw(params, dataclasses.replace(SETTINGS, temperature=0.0), samples=1).values())
  best_BT = np.asarray(trainer(params, padded(texts(drawn)))[1].argmax(-1))
  for sample, best_T in zip(drawn, best_BT):
    start = len(prompt_of(sample)) - 1
    assert sample.tokens.tolist() == best_T[start : start + len(sample.tokens)].tolist()
    assert not sample.logp.any()


@pytest.mark.parametrize('changes', [{'top_k': 7}, {'top_p': 0.3}, {'top_k': 20, 'top_p': 0.5, 'temperature': 0.8}])
def test_truncation_keeps_exactly_what_it_says_and_renormalises(params, changes):
  settings = dataclasses.replace(MANY, **changes)
  prompt = PROMPTS[1]
  z = np.float64(logits(params, prompt.tokens)) / settings.temperature
  kept = np.argsort(-z, kind='stable')[: settings.top_k or VOCAB]
  p = np.exp(z[kept]) / np.exp(z[kept]).sum()
  kept = kept[np.cumsum(p) - p < settings.top_p]
  log_total = np.log(np.exp(z[kept]).sum())
  drawn = draw(params, settings, [prompt], samples=4096).values()
  assert {int(sample.tokens[0]) for sample in drawn} == set(kept.tolist())
  for sample in drawn:
    np.testing.assert_allclose(sample.logp[0], z[sample.tokens[0]] - log_total, atol=2e-5)


# Devices and compilations.


def placed(params, mesh, config=CONFIG):
  return jax.device_put(params, model.shardings(mesh, model.abstract(config)[2]))


@pytest.mark.parametrize('shape, split, parts', [((1, 2, 1, 2, 2), 0, 4), ((2, 4, 1, 1, 1), 2, 4)])
def test_eight_devices_equal_one(params, shape, split, parts):
  """With the mesh that training's gives, and with weights that pairs of devices share only while they sample."""
  settings = dataclasses.replace(SETTINGS, decode_batch_size=8)
  mesh = model.make_mesh(model.MeshConfig(*shape))
  want = draw(params, settings)
  settings = dataclasses.replace(settings, decode_split=split)
  assert Sampler(CONFIG, settings, EOS, mesh).ways == parts
  same(draw(placed(params, mesh), settings, mesh=mesh), want)
  if not split:
    tight = dataclasses.replace(settings, page_tokens=4, cache_tokens=parts * 28)  # each part has room for one
    same(draw(placed(params, mesh), tight, mesh=mesh), want)


def test_on_a_cpu_the_bits_of_a_sample_do_not_depend_on_prompts_in_other_parts_of_the_mesh(params):
  """An evaluation that was killed draws its last problems with others beside them than before."""
  settings = dataclasses.replace(SETTINGS, max_prompt_tokens=256, decode_batch_size=8)
  mesh = model.make_mesh(model.MeshConfig(2, 1, 1, 1, 1), jax.devices()[:2])
  short, long = prompts(12, 200)
  alone, beside = (draw(placed(params, mesh), settings, what, mesh=mesh) for what in ([short], [short, long]))
  for name, sample in alone.items():
    np.testing.assert_array_equal(beside[name].tokens, sample.tokens)
    np.testing.assert_array_equal(beside[name].logp, sample.logp)


@pytest.mark.parametrize('shape', [(), (1, 2, 1, 2, 2)])
def test_dispatches_of_fewer_rows_draw_the_same(params, monkeypatch, shape):
  """A dispatch has as few rows as `Sampler.sizes` allows for the samples that run, in each part of a mesh."""
  sizes, live_rows = [], module.Pages.live_rows

  def recording(pages, allowed):
    rows_CB = live_rows(pages, allowed)
    running = collections.Counter(row // allowed[0] for row in pages.running)
    sizes.append((allowed[0] if rows_CB is None else rows_CB.shape[1], max(running.values())))
    return rows_CB

  what = [prompt._replace(max_new_tokens=n) for prompt, n in zip(PROMPTS, (10, 3, 4, 7, 4))]
  want = draw(params, SETTINGS, what, samples=1)
  monkeypatch.setattr(module, 'FEWEST_ROWS', dict.fromkeys(module.FEWEST_ROWS, 1))
  monkeypatch.setattr(module.Pages, 'live_rows', recording)
  mesh = model.make_mesh(model.MeshConfig(*shape)) if shape else None
  settings = dataclasses.replace(SETTINGS, decode_batch_size=16, decode_steps=1)
  same(draw(placed(params, mesh) if mesh else params, settings, what, samples=1, mesh=mesh), want)
  allowed = [4, 1] if mesh else [16, 4, 1]
  assert {size for size, _ in sizes} == set(allowed)
  assert all(size == min(n for n in allowed if n >= running) for size, running in sizes)


@pytest.mark.slow
def test_experts_split_only_while_sampling_draw_the_same(monkeypatch):
  # Dispatches of 8 and of 2 rows without a mesh.
  monkeypatch.setattr(module, 'FEWEST_ROWS', dict.fromkeys(module.FEWEST_ROWS, 1))
  moe = model.MoeConfig(experts=8, experts_per_token=2, expert_d_ff=16, router='sigmoid')
  config, mesh = dataclasses.replace(CONFIG, layers=1, moe=moe), model.make_mesh(model.MeshConfig(2, 4, 1, 1, 1))
  params = parameters.random(config)
  settings = dataclasses.replace(SETTINGS, decode_batch_size=8, record_choices=True)
  want = draw(params, settings, PROMPTS[:1], config=config)
  got = draw(placed(params, mesh, config), dataclasses.replace(settings, decode_split=4), PROMPTS[:1], mesh=mesh,
             config=config)
  same(got, want)
  assert all((got[name].choices == want[name].choices).all() for name in want)


def test_how_many_devices_share_the_weights():
  """As many as training splits them over; on TPUs so many that each has at most 2^29 weights."""
  dense = dataclasses.replace(CONFIG, vocab_size=2**16, d_model=2**11, heads=16, kv_heads=8, d_ff=2**13, layers=32)
  mixture = dataclasses.replace(dense, moe=model.MoeConfig(experts=96, experts_per_token=8, expert_d_ff=512))
  cpus = model.make_mesh(model.MeshConfig(2, 1, 2, 1, 2))
  assert [default_split(c, cpus) for c in (dense, mixture)] == [2, 2]
  tpus = types.SimpleNamespace(
    devices=np.array([types.SimpleNamespace(platform='tpu')] * 64), size=64, shape=dict.fromkeys(MESH_AXES, 1))
  assert [default_split(c, tpus) for c in (CONFIG, dense, mixture)] == [1, 4, 32]


def test_the_cache_is_sharded_and_in_the_compute_type(params):
  config = dataclasses.replace(CONFIG, compute_dtype='bfloat16')
  with jax.set_mesh(model.make_mesh(model.MeshConfig(2, 2, 1, 1, 2))):
    pages = module._empty(config, dataclasses.replace(SETTINGS, decode_batch_size=8)).pages_LP2KSH[0]
  assert pages.dtype == jnp.bfloat16
  assert pages.sharding.shard_shape(pages.shape) == (2 * 8 // 4, 2, 2 // 2, 16, 8)


def test_nothing_compiles_twice(params):
  functions = (module._empty, module._prefill, module._put, module._decode)
  draw(params, SETTINGS)
  before = [f._cache_size() for f in functions]
  newer = jax.tree.map(lambda x: x * 1.1, params)
  draw(newer, SETTINGS, prompts(8, 3, 12, 7, 7, 1, first_id=900), samples=2, seed=1, step=9)
  draw(params, dataclasses.replace(SETTINGS), PROMPTS[:1], samples=[5])
  assert [f._cache_size() for f in functions] == before


# Refusals.


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'decode_batch_size': 0}, 'decode_batch_size must be >= 1, got 0'),
    ({'max_prompt_tokens': 0}, 'max_prompt_tokens must be >= 1'),
    ({'max_new_tokens': -1}, 'max_new_tokens must be >= 1'),
    ({'decode_steps': 0}, 'decode_steps must be >= 1'),
    ({'cache_tokens': -1}, 'cache_tokens must be >= 1, or 0 for'),
    ({'decode_split': -1}, 'decode_split must be >= 1, or 0 for'),
    ({'temperature': -0.1}, 'temperature must be >= 0 and finite'),
    ({'temperature': float('nan')}, 'temperature must be >= 0 and finite'),
    ({'top_p': 0.0}, r'top_p must be in \(0, 1\], got 0.0'),
    ({'top_k': -1}, 'top_k must be >= 1, or 0'),
  ],
)
def test_bad_settings_are_refused_by_name(changes, message):
  with pytest.raises(ValueError, match='^' + message):
    dataclasses.replace(SETTINGS, **changes)


def test_a_sampler_that_fits_neither_mesh_nor_vocabulary_is_refused():
  with pytest.raises(ValueError, match='^decode_batch_size must be a multiple of 8'):
    Sampler(CONFIG, SETTINGS, EOS, model.make_mesh(model.MeshConfig(8, 1, 1, 1, 1)))
  with pytest.raises(ValueError, match='^decode_split must divide the 8 devices and the model .its kv_heads = 2, .* 4'):
    Sampler(CONFIG, dataclasses.replace(SETTINGS, decode_split=4), EOS, model.make_mesh(
      model.MeshConfig(8, 1, 1, 1, 1)))
  with pytest.raises(ValueError, match='^cache_tokens must be >= 32, or 0 for what all rows need'):
    Sampler(CONFIG, dataclasses.replace(SETTINGS, cache_tokens=31), EOS)
  with pytest.raises(ValueError, match='^eos must be a token id below vocab_size = 384, got 384'):
    Sampler(CONFIG, SETTINGS, VOCAB)


@pytest.mark.parametrize(
  'what, message',
  [
    ([Prompt(5, [9] * 17)], 'prompts: prompt 5 has 17 tokens, not 1 to max_prompt_tokens = 16'),
    ([Prompt(5, [])], 'prompts: prompt 5 has 0 tokens'),
    ([Prompt(5, [VOCAB])], 'prompts: prompt 5 has a token id outside the vocabulary of 384'),
    ([Prompt(5, [9]), Prompt(5, [8])], 'prompts: prompt 5: ids must be'),
    ([Prompt(-1, [9])], 'prompts: prompt -1: ids must be'),
    ([Prompt(5, [9], 11)], 'prompts: prompt 5 has max_new_tokens = 11, not 1 to 10'),
  ],
)
def test_prompts_that_do_not_fit_are_refused_at_once(params, what, message):
  with pytest.raises(ValueError, match='^' + message):
    Sampler(CONFIG, SETTINGS, EOS)(params, what, samples=1, seed=0, step=0)


@pytest.mark.parametrize('changes', [{'samples': 0}, {'samples': [1, 1]}, {'seed': -1}, {'step': 2**32}])
def test_numbers_out_of_range_are_refused_by_name(params, changes):
  with pytest.raises(ValueError, match='^' + next(iter(changes))):
    Sampler(CONFIG, SETTINGS, EOS)(params, PROMPTS, **{'samples': 1, 'seed': 0, 'step': 0, **changes})
