"""Times betarank's sampler, and compares it with those of google-tunix and transformers, and with simpler variants.

    taskset -c 0 python -m benchmarks.rollout [--repeats=3] [--only=ours,theirs,refill,prefill]
    python -m benchmarks.rollout --size=1b --only=ours,refill --repeats=1
    python -m benchmarks.rollout --size=1b --only=theirs --repeats=1
    git worktree add /tmp/before 1f66ce9
    taskset -c 0 python -m benchmarks.rollout --before=/tmp/before --only=ours,refill,prefill,smoke

--only selects what to time. `ours` is betarank's sampler, and `theirs` are the samplers of tunix and transformers.
`refill` and `prefill` compare variants of betarank's sampler; see the functions with these names. `smoke` has the
shapes of configs/rl_smoke.py. If a card can't hold the models of all packages together, time `ours` and `theirs` in two
processes, as in the second and third command. With --before, each variant of betarank's sampler is also timed with the
sampler of commit 1f66ce9, whose cache had no pages.

The model has random weights, on the devices that JAX finds: 5.2M parameters (4 layers, width 256, vocabulary 8192),
1.05B, or a mixture of experts with 1.78B, which the peers don't have. Variants whose package isn't installed are left
out (pip install google-tunix transformers torch). No token ends an answer of `ours` and `theirs`, so all draw equally
many tokens. Each variant runs once to compile, and then --repeats times, interleaved with the other variants. The table
has the fastest run of each variant, in generated tokens per second, and per second of CPU time. On a GPU, all compute
in bfloat16. transformers runs there if torch finds it.
"""

import argparse
import dataclasses
import functools
import heapq
import importlib
import sys
import time
import types

import jax
import numpy as np

from benchmarks.train import MODELS
from betarank import model
from betarank.train import sampler as now

CONFIG, *_ = MODELS['small']
EOS, NO_TOKEN = 3, -1
PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 16, 8, 64, 128
PARTS = 'ours', 'theirs', 'refill', 'prefill', 'smoke'  # what --only selects
REFILL = 32, 512, 3.4, 0  # rows, longest answer, logarithm of the median, room of the cache in tokens (0: for all)
BANDWIDTH = {'NVIDIA H100': 3.35e12, 'NVIDIA H200': 4.8e12}  # bytes per second, by the data sheets
SMOKE = dataclasses.replace(CONFIG, vocab_size=1024, layers=2, d_model=96, d_ff=288, heads=3, kv_heads=1, head_dim=32)


def before(folder):
  """Returns a namespace with Prompt, Sampler and SamplerConfig from commit 1f66ce9, for the argument `of` below.

  In that commit, packages are imported without the prefix `betarank.`, ModelConfig is another class, and SamplerConfig
  has no field cache_tokens.

  folder: a checkout of the commit.
  """
  sys.path.insert(0, folder)
  then, config = importlib.import_module('rl.sampler'), importlib.import_module('model.config')
  sys.path.remove(folder)
  names = {field.name for field in dataclasses.fields(config.ModelConfig)} - {'moe'}

  def make(c, settings, eos):
    known = {name: getattr(c, name) for name in names if hasattr(c, name)}
    return then.Sampler(config.ModelConfig(**known, remat='none'), settings, eos)

  return types.SimpleNamespace(
    Prompt=then.Prompt, Sampler=make, SamplerConfig=lambda *sizes, cache_tokens=0: then.SamplerConfig(*sizes))


def make_prompts(count, length, of=now):
  token = np.random.default_rng(0).integers(4, CONFIG.vocab_size, (count, length))
  return [of.Prompt(i, row.tolist()) for i, row in enumerate(token)]


def count(groups):
  return sum(len(sample.tokens) for group in groups for sample in group)


def ours(params, of=now):
  settings = of.SamplerConfig(PROMPTS * SAMPLES, PROMPT_TOKENS, NEW_TOKENS)
  sampler, prompts = of.Sampler(CONFIG, settings, EOS), make_prompts(PROMPTS, PROMPT_TOKENS, of)
  sampler.eos = NO_TOKEN  # which the constructor refuses
  return {'betarank': lambda seed: count(sampler(params, prompts, samples=SAMPLES, seed=seed, step=0))}


def tunix():
  """Returns a function seed -> number of tokens, which runs tunix's vanilla sampler.

  The sampler samples from the full distribution, and no token ends an answer.
  """
  from flax import nnx
  from tunix.generate import sampler as peer
  from tunix.models.qwen3 import model as qwen3

  class Words:  # tokens written as numbers
    encode = staticmethod(lambda text, **_: [int(word) for word in text.split()])
    decode = staticmethod(lambda tokens, **_: ' '.join(map(str, tokens)))
    bos_id = staticmethod(lambda: 1)
    eos_id = staticmethod(lambda: NO_TOKEN)
    pad_id = staticmethod(lambda: 0)

  transformer = qwen3.Qwen3(
    qwen3.ModelConfig(
      num_layers=CONFIG.layers, vocab_size=CONFIG.vocab_size, embed_dim=CONFIG.d_model, hidden_dim=CONFIG.d_ff,
      num_heads=CONFIG.heads, head_dim=CONFIG.head_dim, num_kv_heads=CONFIG.kv_heads, rope_theta=1_000_000,
      norm_eps=CONFIG.norm_eps, use_tied_embedding=True, dtype=CONFIG.dtype, param_dtype=CONFIG.dtype),
    rngs=nnx.Rngs(0))
  cache = peer.CacheConfig(PROMPT_TOKENS + NEW_TOKENS, CONFIG.layers, CONFIG.kv_heads, CONFIG.head_dim)
  sample = peer.Sampler(transformer, Words(), cache)
  texts = [' '.join(map(str, p.tokens)) for p in make_prompts(PROMPTS, PROMPT_TOKENS) for _ in range(SAMPLES)]

  def run(seed):
    out = sample(
      texts, max_generation_steps=NEW_TOKENS, max_prompt_length=PROMPT_TOKENS, temperature=1.0, top_p=1.0, seed=seed,
      eos_tokens=[NO_TOKEN])
    return sum(len(tokens) for tokens in out.tokens)

  return run


def transformers():
  """Returns a function seed -> number of tokens, which runs `generate` of transformers.

  `generate` samples from the full distribution, and no token ends an answer. With seed 0, which is for warming up, an
  answer has 8 tokens.
  """
  import torch
  import transformers as peer

  torch.manual_seed(0)
  device = 'cuda' if torch.cuda.is_available() and jax.default_backend() == 'gpu' else 'cpu'
  lm = peer.Qwen3ForCausalLM(peer.Qwen3Config(
    vocab_size=CONFIG.vocab_size, hidden_size=CONFIG.d_model, intermediate_size=CONFIG.d_ff,
    num_hidden_layers=CONFIG.layers, num_attention_heads=CONFIG.heads, num_key_value_heads=CONFIG.kv_heads,
    head_dim=CONFIG.head_dim, tie_word_embeddings=True, max_position_embeddings=4096)).eval()
  lm = lm.to(device, torch.bfloat16 if device == 'cuda' else torch.float32)
  token = torch.tensor([p.tokens for p in make_prompts(PROMPTS, PROMPT_TOKENS) for _ in range(SAMPLES)], device=device)

  def run(seed):
    torch.manual_seed(seed)
    with torch.inference_mode():
      out = lm.generate(
        token, attention_mask=torch.ones_like(token), max_new_tokens=NEW_TOKENS if seed else 8, do_sample=True,
        temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0)
    return out[:, PROMPT_TOKENS:].numel()

  return run


def smoke(params, of=now):
  """Returns one variant of the sampler, {name: function seed -> number of tokens}, with the shapes of
  configs/rl_smoke.py.

  It samples 8 answers to each of 40 prompts. 256 answers (8 to each of 32 prompts) are decoded at the same time. The
  maximum length of an answer differs between prompts, from 8 to 28 tokens.

  params: the parameters of the model SMOKE.
  of: the sampler's module, or the result of `before`.
  """
  length = np.random.default_rng(1).integers(8, 29, 40).tolist()
  token = np.random.default_rng(0).integers(4, SMOKE.vocab_size, (40, 20)).tolist()
  prompts = [of.Prompt(i, token[i], length[i]) for i in range(40)]
  sampler = of.Sampler(SMOKE, of.SamplerConfig(256, 28, 28), EOS)
  return {'smoke': lambda seed: count(sampler(params, prompts, samples=8, seed=seed, step=0))}


def refill(params, of=now):
  """Returns variants of betarank's sampler, {name: function seed -> number of tokens}.

  The lengths of answers are log-normal. The sampler decodes a fixed number of rows together, one answer per row.
  'padded batches' gives it only as many prompts at a time as it has rows, so that short answers wait for the longest
  answer. 'refilled rows' gives it all prompts, so that the row of a finished answer gets the next prompt. For the
  larger models, whose answers have up to 8192 tokens, only 'refilled rows' is returned. With seed 0, which is for
  compiling, answers are a 64th as long.

  params: the parameters of the model CONFIG.
  of: the sampler's module, or the result of `before`.
  """
  rows, longest, middle, cache_tokens = REFILL
  if cache_tokens and of is not now:  # without pages, the same memory is enough for fewer rows
    rows = cache_tokens // (PROMPT_TOKENS + longest)
  length = np.exp(np.random.default_rng(1).normal(middle, 1.0, 8 * 32)).astype(int).clip(1, longest).tolist()
  prompts = [p._replace(max_new_tokens=n) for p, n in zip(make_prompts(len(length), PROMPT_TOKENS, of), length)]
  sampler = of.Sampler(CONFIG, of.SamplerConfig(rows, PROMPT_TOKENS, longest, cache_tokens=cache_tokens), EOS)
  print(f'{len(length)} answers of {np.mean(length):.0f} tokens in the mean, {max(length)} at most, {rows} rows'
        + bound(length, rows))

  def sample(prompts, seed):
    prompts = prompts if seed else [p._replace(max_new_tokens=-(-p.max_new_tokens // 64)) for p in prompts]
    return count(sampler(params, prompts, samples=1, seed=seed, step=0))

  padded = lambda seed: sum(sample(prompts[i : i + rows], seed) for i in range(0, len(prompts), rows))
  refilled = functools.partial(sample, prompts)
  return {'padded batches': padded, 'refilled rows': refilled} if longest == 512 else {'refilled rows': refilled}


def bound(length, rows):
  """Returns a text with the rate that the bandwidth of the card's memory allows for `refill`; '' for an unknown device.

  Each decoding step reads all weights once, and the keys and values of the tokens that each live row has at that step,
  its prompt among them. Everything else is left out: prefill, the products' own time, and the start of kernels.

  length: the number of tokens of each answer, in the order in which they start.
  rows: the number of rows. A row that becomes free gets the next answer at once.
  """
  bandwidth = BANDWIDTH.get(' '.join(jax.devices()[0].device_kind.split()[:2]))
  if not bandwidth:
    return ''
  free = [0] * rows  # the step at which each row becomes free
  for n in length:
    heapq.heapreplace(free, free[0] + n)
  weights = 2 * sum(model.parameter_counts(CONFIG).values())
  token = 2 * 2 * CONFIG.layers * CONFIG.kv_heads * CONFIG.head_dim
  read = max(free) * weights + token * sum(n * PROMPT_TOKENS + n * (n + 1) // 2 for n in length)
  return f'; {sum(length) * bandwidth / read:,.0f} tokens/s at {bandwidth / 1e12} TB/s, {max(free)} steps'


def prefill(params, of=now):
  """Returns two variants of betarank's sampler, {name: function seed -> number of tokens}, for 16 answers to one long
  prompt.

  The prompt has 1024 tokens. 'prefill shared' processes the prompt once, and 'prefill repeated' processes it 16 times.

  params: the parameters of the model CONFIG.
  of: the sampler's module, or the result of `before`.
  """
  (prompt,) = make_prompts(1, 1024, of)
  copies = [prompt._replace(id=i) for i in range(16)]
  sampler = of.Sampler(CONFIG, of.SamplerConfig(16, 1024, 64), EOS)
  return {
    'prefill repeated': lambda seed: count(sampler(params, copies, samples=1, seed=seed, step=0)),
    'prefill shared': lambda seed: count(sampler(params, [prompt], samples=16, seed=seed, step=0)),
  }


def measure(ways, repeats):
  """Returns {variant: (tokens per second, tokens per CPU second of this process)}.

  Each of the two figures is the best of all runs of the variant. The runs of all variants are interleaved.

  ways: the variants, {name: function seed -> number of generated tokens}.
  repeats: the number of timed runs of each variant. An untimed run with seed 0, which compiles, comes before them.
  """
  best = dict.fromkeys(ways, (0.0, 0.0))
  for run in ways.values():
    run(0)
  for repeat in range(repeats):
    for name, run in list(ways.items())[:: -1 if repeat % 2 else 1]:
      start, cpu_start = time.perf_counter(), time.process_time()
      tokens = run(1 + repeat)
      rates = tokens / (time.perf_counter() - start), tokens / (time.process_time() - cpu_start)
      best[name] = max(best[name][0], rates[0]), max(best[name][1], rates[1])
  return best


def show(title, rates, ours):
  """Prints the rates of all variants, and the rate of the variant `ours` divided by each of them.

  If other jobs use the CPU too, compare tokens per CPU second.

  rates: the result of `measure`.
  ours: the name of a variant in `rates`.
  """
  print(f'{title:46}{"tokens/s":>10}{"ours / this":>13}{"tokens/CPU s":>14}{"ours / this":>13}')
  for name, (rate, cpu_rate) in rates.items():
    print(f'{name:46}{rate:10,.0f}{rates[ours][0] / rate:13.2f}{cpu_rate:14,.0f}{rates[ours][1] / cpu_rate:13.2f}')
  print(flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--size', choices=('small', '1b', '2b-moe'), default='small')
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--only', default='ours,theirs,refill,prefill')
  parser.add_argument('--before', help='a checkout of commit 1f66ce9, whose sampler is timed too')
  args = parser.parse_args()
  only = args.only.split(',')
  for name in only:
    if name not in PARTS:
      parser.error(f'--only={name}: the parts are {", ".join(PARTS)}')
  if args.size == '2b-moe' and 'theirs' in only:
    parser.error('--size=2b-moe: the peers have dense models only; leave out theirs in --only')
  if args.size != 'small':
    global CONFIG, SAMPLES, PROMPT_TOKENS, NEW_TOKENS, REFILL
    (CONFIG, *_), SAMPLES, PROMPT_TOKENS, NEW_TOKENS = MODELS[args.size], 16, 1024, 1024
    REFILL = 128, 8192, 6.93, 400_000
  params = functools.cache(lambda c=CONFIG: jax.jit(model.init, static_argnums=0)(c, jax.random.key(0)))
  then = before(args.before) if args.before else None

  def both(make, params):
    return make(params) | ({f'{name}, 1f66ce9': run for name, run in make(params, then).items()} if then else {})

  ways = {}
  if 'theirs' in only:
    for make in (tunix, transformers):
      try:
        ways[make.__name__] = make()
      except ImportError as error:
        print(f'{make.__name__}: left out ({error})')
  if 'ours' in only:
    ways |= both(ours, params())
  if ways:
    title = f'{PROMPTS} prompts x {SAMPLES} samples x {NEW_TOKENS} tokens'
    show(title, measure(ways, args.repeats), 'betarank' if 'ours' in only else list(ways)[-1])
  if 'refill' in only:
    show('long-tailed lengths', measure(both(refill, params()), args.repeats), 'refilled rows')
  if 'prefill' in only:
    show('1024-token prompt, 16 samples x 64 tokens', measure(both(prefill, params()), args.repeats), 'prefill shared')
  if 'smoke' in only:
    show('0.3M parameters, 320 answers of 8 to 28 tokens', measure(both(smoke, params(SMOKE)), args.repeats), 'smoke')


if __name__ == '__main__':
  main()
