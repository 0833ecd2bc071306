"""Times the sampling of an RL step with different numbers of extra prompts (config.rl.extra_prompts).

    taskset -c 0 python -m benchmarks.extra_prompts [--share=0.4] [--extra=0,8,16,32] [--repeats=5]
    python -m benchmarks.extra_prompts --simulate

A step learns from up to 32 groups of 8 answers, which are decoded at the same time. The model has 0.2M random weights.
One of its 64 tokens ends an answer, so answers have about 60 tokens in the mean, and at most 128. Instead of a
verifier, a hash decides which groups have zero variance: a share of them, whatever their length. All numbers of extra
prompts must give the same samples. The table has the fastest of the interleaved runs, relative to the first number.

--simulate counts decoding steps instead, for 64 prompts x 16 answers, and for different numbers of rows and shares of
zero-variance groups. Lengths are log-normal around 80 tokens, and at most 224. The simulation assumes that a decoding
step takes the same time however many rows are live. It prints the decoding steps and the tokens drawn, both relative to
no extra prompts.
"""

import argparse
import collections
import dataclasses
import hashlib
import heapq
import time
import types

import jax
import numpy as np

from benchmarks.rollout import SMOKE
from betarank import model
from betarank.rl import loop
from betarank.rl.advantages import AdvantageConfig
from betarank.rl.progress import Progress
from betarank.rl.rewards import RewardRule
from betarank.tasks.verifiers import Grade, Verdict
from betarank.train.sampler import Sampler, SamplerConfig

PROMPTS, SAMPLES, ROUNDS, LONGEST = 32, 8, 3, 128
CONFIG = dataclasses.replace(SMOKE, vocab_size=64)


class Problems:
  """Stands in for a task set, a tokenizer and a verifier. A task is only a number."""

  bos, size = 0, None

  def __init__(self, share):
    self._share = share

  def at(self, number):
    return types.SimpleNamespace(number=number, prompt=str(number))

  def encode(self, text):
    return np.array([4 + int(digit) for digit in text])

  def decode(self, tokens):
    return ''

  def grade(self, items):
    number = items[0][1].number
    digest = hashlib.blake2b(str(number).encode(), digest_size=6).digest()
    agree = int.from_bytes(digest, 'big') < self._share * 2**48
    right = [i % 2 == 1 and not agree for i in range(len(items))]
    return [Grade(Verdict.RIGHT, 1.0) if each else Grade(Verdict.WRONG, 0.0) for each in right]


def make_step(sampler, problems, extra):
  """Returns a function (params, step) -> groups, which samples the groups of one RL step.

  problems: a `Problems`, the source of prompts and rewards.
  extra: the number of extra prompts (config.rl.extra_prompts).
  """
  rl = types.SimpleNamespace(
    prompts_per_step=PROMPTS, group_size=SAMPLES, max_resampling_rounds=ROUNDS, extra_prompts=extra,
    keeps_zero_variance=False, repeat_zero_variance=1.0, long_prompts='refuse', phase=lambda step: 0,
    reward_rule=lambda step: RewardRule('zero', LONGEST), advantage=AdvantageConfig())
  parts = types.SimpleNamespace(
    run=types.SimpleNamespace(rl=rl, seed=0), tasks=problems, tokenizer=problems, verifier=problems, samplers=[sampler])
  return lambda params, step: loop.sample_and_judge(parts, params, Progress(prompts=1000 * step), step)[1]


def measure(share, extras, repeats):
  sampler = Sampler(CONFIG, SamplerConfig(PROMPTS * SAMPLES, 16, LONGEST), eos=3)
  params = jax.jit(model.init, static_argnums=0)(CONFIG, jax.random.key(0))
  steps = {extra: make_step(sampler, Problems(share), extra) for extra in extras}
  best = dict.fromkeys(extras, float('inf'))
  for repeat in range(repeats + 1):  # the first one compiles
    found = {}
    for extra, step in steps.items():
      start = time.perf_counter()
      groups = step(params, 1)
      if repeat:
        best[extra] = min(best[extra], time.perf_counter() - start)
      found[extra] = [sample.tokens.tolist() for group in groups for sample in group.samples]
    if any(tokens != found[extras[0]] for tokens in found.values()):
      raise SystemExit('extra prompts changed the samples')
  learned = sum(group.has_reward_variance(RewardRule('zero', LONGEST), AdvantageConfig()) for group in groups)
  tokens = np.mean([len(tokens) for tokens in found[extras[0]]])
  print(f'{len(groups)} groups, {learned} to learn from, {tokens:.0f} tokens per answer')
  print(f'{"extra prompts":>13}{"seconds":>9}{"relative":>10}')
  for extra, seconds in best.items():
    print(f'{extra:13}{seconds:9.2f}{seconds / best[extras[0]]:10.2f}')


def simulate(rng, rows, share, extra, prompts=64, samples=16):
  """Simulates the sampling of one RL step. Returns (decoding steps, tokens drawn).

  rows: the number of answers that are decoded at the same time.
  share: the share of zero-variance groups.
  extra: the number of extra prompts.
  prompts, samples: the number of groups that the step wants, and of answers per group.
  """
  agree = rng.random(prompts * ROUNDS) < share
  median = 80 * np.exp(rng.normal(0, 0.25, prompts * ROUNDS))
  length = np.exp(np.log(median)[:, None] + rng.normal(0, 0.5, (prompts * ROUNDS, samples))).astype(int).clip(1, 224)
  known, left, waiting, running, now, tokens = np.zeros(len(agree), bool), {}, collections.deque(), [], 0, 0
  while True:
    least = loop.prompts_wanted((agree & known).tolist(), prompts, ROUNDS)
    if known[:least].all():
      return now, tokens
    most = loop.prompts_wanted((agree | ~known).tolist(), prompts, ROUNDS)
    for new in range(len(left), min(least + extra, most)):
      left[new] = samples
      waiting.extend((new, i) for i in range(samples))
    while waiting and len(running) < rows:
      prompt, i = waiting.popleft()
      heapq.heappush(running, (now + length[prompt, i], prompt))
      tokens += length[prompt, i]
    now, prompt = heapq.heappop(running)
    left[prompt] -= 1
    known[prompt] = not left[prompt]


def show_simulation(extras):
  print('rows  zero variance  ' + ''.join(f'{f"{extra} extra":>16}' for extra in extras))
  for rows in (1024, 512, 256):
    for share in (0.1, 0.2, 0.4, 0.6):
      mean = [np.mean([simulate(np.random.default_rng(seed), rows, share, extra) for seed in range(10)], 0)
              for extra in extras]
      print(f'{rows:4}  {share:13}  ' + ''.join(f'{a / mean[0][0]:9.2f} {b / mean[0][1]:6.2f}' for a, b in mean))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--share', type=float, default=0.4, help='of zero-variance groups')
  parser.add_argument('--extra', default='0,8,16,32')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--simulate', action='store_true')
  args = parser.parse_args()
  extras = [int(extra) for extra in args.extra.split(',')]
  if args.simulate:
    show_simulation(extras)
  else:
    measure(args.share, extras, args.repeats)


if __name__ == '__main__':
  main()
