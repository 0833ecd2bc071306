"""Writes the workdirs of a sweep as runs would write them, with known effects of the objective."""

import json

import numpy as np

from betarank.configs import common

ARMS = ({}, {'beta': -0.25}, {'beta': 0.5}, {'lambda_tail': -0.1}, {'lambda_head': 0.1})


def make(root, *, arms=ARMS, seeds=3, steps=40, rl_steps=10, problems=30, n=16, benchmarks=('amc23',), gain=0.3):
  """Writes pre-training runs under root/pre, and RL runs under root/rl.

  Arm i has 0.1·i nats less entropy than arm 0. After RL, arm 1 solves each problem of a benchmark with a probability
  that is higher by `gain`, at most 1.
  """
  rng = np.random.default_rng(0)
  level_BP = {name: rng.beta(0.5, 1, problems) for name in benchmarks}
  for i, objective in enumerate(arms):
    for seed in range(seeds):
      pre, rl = root / 'pre' / f'arm{i}-seed{seed}', root / 'rl' / f'arm{i}-seed{seed}'
      run(pre, objective=objective, seed=seed, steps=steps, entropy=2.0 - 0.1 * i)
      start = pre / 'checkpoints' / str(steps)
      run(rl, objective={}, seed=seed, steps=rl_steps, entropy=1.0 - 0.1 * i, init_from=start)
      for path, step, better in ((pre, steps, 0.0), (rl, rl_steps, gain * (i == 1))):
        small = 1e-4 * np.random.default_rng([i, seed]).normal(size=2)  # between seeds, as in real runs
        probe(path, step, entropy=2.0 - 0.1 * i + 0.01 * rng.normal(), ce_nats=2.0 + small[0], tail_mass=0.1 + small[1])
        for name in benchmarks:
          samples(path, step, name, np.clip(level_BP[name] + better, 0, 1), n, rng)


def config(*, objective, seed, steps, init_from='', rl=False):
  c = common.rl_base() if rl else common.base()
  c.seed = seed
  c.train.init_from = str(init_from)
  if rl:
    c.rl.steps = steps
  else:
    c.objective.update(objective)
    c.train.tokens = steps * c.train.batch_size * c.data.sequence_length
  return c.to_dict()


def run(path, *, objective, seed, steps, entropy, init_from='', data='d' * 64, code='c0de', changes=()):
  """Writes a finished run: config, run.json, metrics and the metadata of its last checkpoint.

  data: the hash of the run's prepared data.
  code: the version of the code that wrote the checkpoint.
  changes: {'section.name': value} of settings that differ from the defaults.
  """
  path.mkdir(parents=True)
  rl = bool(init_from)
  settings = config(objective=objective, seed=seed, steps=steps, init_from=init_from, rl=rl)
  for key, value in dict(changes).items():
    section, name = key.split('.')
    settings[section][name] = value
  (path / 'config.json').write_text(json.dumps(settings, default=list))
  write(path / 'run.json', json.dumps({
    'command': ['/usr/bin/betarank', 'rl' if rl else 'train', '--config=mine.py', f'--workdir={path}'],
    'device_kind': 'TPU v5e', 'devices': 4, 'started_s': 1.8e9}))
  checkpoint(path, steps, settings, init_from, {'prompts': 8 * steps, 'problems': 'b' * 64} if rl else {
    'sources': {'main': {'rows': 8 * steps, 'fingerprint': data}}}, code)
  noise = np.random.default_rng(seed).normal(0, 0.01, steps + 1)
  lines = []
  for step in range(1, steps + 1):
    line = {'step': step, 'train/entropy_nats': entropy + 1 / step + noise[step], 'train/grad_norm': 1.0}
    if rl:
      line |= {'train/pass_rate': min(0.9, step / steps), 'train/tokens': 100.0, 'train/length_tokens': 50.0 + step,
               'train/truncated_share': 0.1, 'train/zero_variance_groups': 0.3, 'train/sampler_gap_mean': 1e-6}
    else:
      line |= {'train/ce_nats': 2 + 1 / step + noise[step], 'train/tail_mass': 0.1 + noise[step] / 10,
               'train/loss_nats': 2 + 1 / step, 'train/bits_per_byte': 1.0, 'train/lr': 1e-3, 'train/tokens': 4096.0}
    lines.append(json.dumps(line | {'time/step_s': 0.1, 'time/tokens_per_s': 1e4, 'time/elapsed_s': 15.0 + step}))
  if not rl:
    lines.append(json.dumps({'step': steps, **{f'eval/main/{k}': v for k, v in (
      ('ce_nats', 2.0), ('entropy_nats', entropy), ('tail_mass', 0.1), ('bits_per_byte', 1.0))}}))
  (path / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')


def checkpoint(path, step, settings, parent, cursor, code):
  """Writes that part of a checkpoint that a report reads, its metadata."""
  folder = path / 'checkpoints' / str(step)
  write(folder / 'state' / 'x', '')
  write(folder / 'meta' / 'metadata', json.dumps({
    'step': step, 'shapes': {}, 'config': settings, 'parent': str(parent), 'code_version': code,
    'tokenizer_sha256': 'f' * 64, 'cursor': cursor}, default=list))


def probe(path, step, *, entropy, domain='main', **figures):
  """Writes the result of a probe. figures: {metric: value} of those that differ from the ones below."""
  counts = [500, 200, 150, 100, 50]
  found = {
    'tokens': 1000, 'ce_nats': 2.0, 'bits_per_byte': 1.0, 'perplexity': 7.4, 'entropy_nats': entropy,
    'entropy_top20_nats': entropy + 1, 'head_mass': 0.3, 'tail_mass': 0.1, 'top_gap_nats': 1.0, 'ece': 0.02,
    'rank_histogram': {'edges': [0, 1, 2, 4, 8, 16], 'counts': counts},
    'coverage': {'2': 0.5, '4': 0.3, '16': 0.1, '64': 0.0},
    'entropy_histogram': {'edges': [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], 'counts': counts},
  } | figures
  write(path / 'eval' / 'probe' / f'{step}.json', json.dumps({'step': step, 'domains': {domain: found}}))


def harness(path, step, scores, **settings):
  """Writes results of lm-evaluation-harness. scores: {task: accuracy}."""
  found = {task: {'alias': task, 'acc,none': score, 'acc_stderr,none': 0.01, 'acc_norm,none': 0.9}
           for task, score in scores.items()}
  write(path / 'eval' / 'harness' / '+'.join(scores) / f'{step}.json', json.dumps({
    'step': step, 'tasks': list(scores), 'num_fewshot': 0, 'limit': None, 'lm_eval': '0.4.13', 'max_length': 512,
    'seed': 0, 'results': {**found, 'a_part_of_a_group': {'acc,none': 0.1}}} | settings))


def samples(path, step, benchmark, right_P, n, rng, **settings):
  """Writes n samples for each problem. Samples of problem p are right with probability right_P[p]. There are three
  different wrong answers.
  """
  lines = []
  for p, right in enumerate(right_P):
    for i, hit in enumerate(rng.random(n) < right):
      lines.append(json.dumps({
        'problem': p, 'sample': i, 'text': f'so it is {p}', 'answer': str(p), 'verdict': 'right' if hit else 'wrong',
        'logp': -3.0, 'tokens': int(20 + rng.integers(5)), 'finish': 'stop',
        'group': 0 if hit else int(1 + rng.integers(3))}))
  folder = path / 'eval' / 'samples' / benchmark
  write(folder / f'{step}.jsonl', '\n'.join(lines) + '\n')
  write(folder / f'{step}.json', json.dumps({
    'benchmark': benchmark, 'n': n, 'problems': len(right_P), 'temperature': 0.7, 'top_p': 0.95, 'top_k': 0,
    'max_new_tokens': 64, 'data_sha256': 'same', 'step': step} | settings))


def write(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
