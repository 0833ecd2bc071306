"""Times training steps, and compares them with steps that hold all logits in memory: python -m benchmarks.train

    --model=small      4 layers, width 256, vocabulary 8192, 8 x 512 tokens per step: for a CPU
    --model=small-moe  the same with 16 experts of width 192, 4 of them for each token
    --model=64m        configs/small.py: 12 layers, width 640, vocabulary 4096, 64 x 512 tokens per step
    --model=317m       configs/base.py: 24 layers, width 1024, vocabulary 32,768, 16 x 2048 tokens per step
    --model=1b         28 layers, width 1536, vocabulary 151,936, 8 x 4096 tokens per step: for an 80 GB accelerator
    --model=4b         the paper's 4B, 2 x 4096 tokens: the largest dense model for such a card
    --model=2b-moe     12 layers, width 1024, 128 experts of width 320, 12 of them for each token, 16 x 4096 tokens
    --model=3b-moe     the paper's 5B-A0.3B with 8 of its 12 layers, 384 experts: the largest mixture for such a card

Steps are those of train/step.py, on random tokens. The variant `all logits` differs only in the loss: it holds all
logits, and computes optax's cross-entropy without statistics. The variant `naive`, for the small models, also holds all
attention scores and recomputes nothing.

All variants are timed in each round, and ratios are computed per round. On a CPU they are ratios of CPU seconds,
because other work on the machine prolongs wall time. MFU is the FLOPs per second divided by the chip's peak. The FLOPs
are 6 per weight and token, plus those of attention, of which half count because it is causal (model.flops_per_token).
With --documents, attention counts within documents only, because kernels skip the rest. Recomputation doesn't count. No
peak is known for a CPU, so there the benchmark divides by the FLOPs per CPU second of a matrix product, which it
measures after the steps.
"""

import argparse
import collections
import dataclasses
import pathlib
import re
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from betarank import model
from betarank.data import Batch
from betarank.objectives import ObjectiveConfig
from betarank.runtime.metrics import peak_flops
from betarank.runtime.state import TrainState, compiler_options, create_state, donated
from betarank.train.optimizer import OptimizerConfig, make_optimizer
from betarank.train.step import make_step

ADAMW = OptimizerConfig(lr=1e-4, warmup_steps=1, decay_fraction=0.0, final_lr=0.0, b1=0.9, b2=0.95, eps=1e-8,
                        weight_decay=0.1, clip_norm=1.0)
SMALL = model.ModelConfig(
  vocab_size=8192, layers=4, d_model=256, d_ff=768, heads=4, kv_heads=2, head_dim=64, rope_base=1e4, norm_eps=1e-6,
  tied_embeddings=True, compute_dtype='auto', remat_policy='matmuls', scan_layers=True)
MODELS = {
  'small': (SMALL, 8, 512),
  'small-moe': (
    dataclasses.replace(SMALL, moe=model.MoeConfig(experts=16, experts_per_token=4, expert_d_ff=192)), 8, 512),
  '64m': (dataclasses.replace(SMALL, vocab_size=4096, layers=12, d_model=640, d_ff=1920, heads=10, kv_heads=5,
                              remat_policy='none'), 64, 512),
  '317m': (dataclasses.replace(SMALL, vocab_size=32_768, layers=24, d_model=1024, d_ff=2816, heads=8, kv_heads=4,
                               head_dim=128, remat_policy='attention'), 16, 2048),
  '1b': (dataclasses.replace(SMALL, vocab_size=151_936, layers=28, d_model=1536, d_ff=4608, heads=16, kv_heads=4,
                             head_dim=128), 8, 4096),
  '4b': (dataclasses.replace(SMALL, vocab_size=151_936, layers=36, d_model=2560, d_ff=9728, heads=32, kv_heads=8,
                             head_dim=128, remat_policy='full'), 2, 4096),
  '2b-moe': (dataclasses.replace(
    SMALL, vocab_size=151_936, layers=12, d_model=1024, heads=32, kv_heads=4, head_dim=128,
    moe=model.MoeConfig(experts=128, experts_per_token=12, expert_d_ff=320)), 16, 4096),
  '3b-moe': (dataclasses.replace(
    SMALL, vocab_size=151_936, layers=8, d_model=1024, heads=32, kv_heads=4, head_dim=128, remat_policy='attention',
    moe=model.MoeConfig(experts=384, experts_per_token=12, expert_d_ff=320)), 4, 4096),
}
OBJECTIVES = {
  'plain cross-entropy': ObjectiveConfig(),
  'beta = -0.25': ObjectiveConfig(beta=-0.25),
  'lambda_tail = -0.1, k = 100': ObjectiveConfig(lambda_tail=-0.1),
}


def naive_step(c: model.ModelConfig, tx):
  """Returns a jitted function (state, batch) -> (state, {'loss'}), a training step that holds all logits in memory."""
  def loss(params, batch):
    hidden_BTD, _ = model.forward(c, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    logits_BTV = (hidden_BTD @ model.head(c, params).astype(hidden_BTD.dtype)).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch.targets_BT).mean()

  def step(state, batch):
    value, grads = jax.value_and_grad(loss)(state.params, batch)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), {'loss': value}

  return jax.jit(step, donate_argnums=donated(), compiler_options=compiler_options())


def flops_per_step(c: model.ModelConfig, rows: int, length: int, documents: int) -> float:
  """Returns the FLOPs of a step, as MFU counts them. Each row has `documents` documents of about equal length."""
  return model.flops_per_token(c, length / documents) * rows * length


def matmul_rate(device) -> float:
  """Returns the FLOPs per CPU second of a float32 product of 2048 x 2048 matrices."""
  x = jax.device_put(np.ones((2048, 2048), np.float32), device)
  product = jax.jit(jnp.matmul).lower(x, x).compile()
  seconds = []
  for _ in range(6):
    start = time.process_time()
    jax.block_until_ready(product(x, x))
    seconds.append(time.process_time() - start)
  return 2 * 2048**3 / min(seconds)


def profile(run, program: str, most: int):
  """Calls `run` once, and prints the GPU kernels that take longest, each with the operation that it computes.

  run: a function without arguments that runs the program.
  program: the HLO of the compiled program as text, which names the operations.
  most: the largest number of kernels to print.
  """
  # A kernel has the name of the operation that it computes. In a CUDA graph, nothing else is known of it.
  names = {re.sub(r'\W', '_', name): of for name, of in re.findall(r'([\w.-]+) = .*?op_name="([^"]*)"', program)}
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      run()
    file, = pathlib.Path(folder).rglob('*.xplane.pb')
    data = jax.profiler.ProfileData.from_file(str(file))
  total, count = collections.Counter(), collections.Counter()
  for plane in data.planes:
    if '/device:' not in plane.name:
      continue
    for line in plane.lines:
      if not line.name.startswith('Stream'):
        continue
      for event in line.events:
        of = names.get(event.name, '').removeprefix('jit(step)/')
        key = event.name[:40], of[-100:]
        total[key] += event.duration_ns / 1e6
        count[key] += 1
  print(f'kernels {sum(total.values()):.1f} ms')
  for (name, of), ms in total.most_common(most):
    print(f'{ms:9.2f} ms {count[name, of]:5}  {name:40}  {of}')


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', choices=MODELS, default='small')
  parser.add_argument('--rows', type=int, default=0, help='per step; 0: the default of the model')
  parser.add_argument('--remat', choices=model.config.REMAT, default='')
  parser.add_argument('--expert_kernel', choices=model.config.EXPERT_KERNELS, default='auto')
  parser.add_argument('--attention', choices=model.config.KERNELS, default='auto')
  parser.add_argument('--scan_layers', action=argparse.BooleanOptionalAction, default=True)
  parser.add_argument('--documents', type=int, default=1, help='of about equal length in each row')
  parser.add_argument('--head_tail_mass', action=argparse.BooleanOptionalAction, default=True,
                      help='compute head and tail mass, which need a top k, even if the objective needs none')
  parser.add_argument('--only', default='', help='objectives whose names start with one of these, separated by commas')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=1, help='per round, each dispatched before the one before it ends')
  parser.add_argument('--profile', type=int, default=0, metavar='N',
                      help="also print the N kernels that took longest in a step of the last way")
  parser.add_argument('--naive', action=argparse.BooleanOptionalAction, default=True)
  args = parser.parse_args()
  only = tuple(args.only.split(','))
  if args.documents < 1:
    parser.error(f'--documents must be >= 1, got {args.documents}')
  if not any(name.startswith(only) for name in OBJECTIVES):
    parser.error(f'no objective starts with --only={args.only}; they are {"; ".join(OBJECTIVES)}')
  c, rows, length = MODELS[args.model]
  rows = args.rows or rows
  c = dataclasses.replace(
    c, remat_policy=args.remat or c.remat_policy, attention=args.attention, scan_layers=args.scan_layers,
    moe=dataclasses.replace(c.moe, kernel=args.expert_kernel))
  device = jax.devices()[0]
  mesh = model.make_mesh(model.MeshConfig(1, -1, 1, 1, 1))
  tokens = np.random.default_rng(0).zipf(1.3, (rows, length + 1)) % c.vocab_size
  tokens = tokens.astype(np.int32)
  segments = np.arange(length, dtype=np.int32) * args.documents // length
  positions = np.concatenate([np.arange(n, dtype=np.int32) for n in np.bincount(segments)])
  batch = Batch(tokens[:, :-1], tokens[:, 1:], np.tile(positions, (rows, 1)), np.tile(segments + 1, (rows, 1)))
  print(f'{sum(model.parameter_counts(c).values()) / 1e6:,.1f}M parameters, {rows} x {length} tokens per step, '
        f'{args.documents} documents a row, {c.dtype}, remat {c.remat_policy}, '
        f'{"" if c.scan_layers else "layers unrolled, "}{device.device_kind} x {jax.device_count()}, '
        f'jax {jax.__version__}')
  with jax.set_mesh(mesh):
    tx = make_optimizer(ADAMW, 10_000, model.abstract(c)[2])
    stats = 'full' if args.head_tail_mass else 'basic'
    ways = {}
    if args.naive and args.model.startswith('small'):
      ways['naive'] = naive_step(dataclasses.replace(c, attention='plain', remat_policy='none'), tx)
    if args.naive:
      ways['all logits'] = naive_step(c, tx)
    ways |= {name: make_step(c, objective, tx, np.ones(c.vocab_size), 1, stats)
             for name, objective in OBJECTIVES.items() if name.startswith(only)}
    batch = jax.device_put(batch, jax.NamedSharding(mesh, model.spec('batch', 'length')))
    state = create_state(c, tx, mesh, seed=0)
    compiled = {}
    for name, step in ways.items():
      start = time.perf_counter()
      compiled[name] = step.lower(state, batch).compile()
      print(f'{name}: compiled in {time.perf_counter() - start:.0f} s', flush=True)
    on_cpu = device.platform == 'cpu'
    clock = time.process_time if on_cpu else time.perf_counter
    seconds, wall = {name: [] for name in ways}, {name: [] for name in ways}
    for n in range(args.rounds + 1):
      for name, step in compiled.items():
        start = clock(), time.perf_counter()
        for _ in range(args.steps):
          state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        if n:  # the first round only warms up
          seconds[name].append((clock() - start[0]) / args.steps)
          wall[name].append((time.perf_counter() - start[1]) / args.steps)
    if args.profile:
      profile(lambda: jax.block_until_ready(step(state, batch)), compiled[name].as_text(), args.profile)
  base = next(iter(seconds))
  peak = matmul_rate(device) if on_cpu else peak_flops(device)
  print(f'{"":30}{"step s":>9}{"tokens/s":>12}{"CPU s":>9}{"MFU":>8}{"temp GB":>9}{"time / first":>14}')
  for name, times in seconds.items():
    step_s, clock_s = statistics.median(wall[name]), statistics.median(times)
    ratio = statistics.median(a / b for a, b in zip(times, seconds[base]))
    flops = flops_per_step(c, rows, length, args.documents)
    mfu = f'{flops / clock_s / peak / jax.device_count():.1%}' if peak else '-'
    temp = compiled[name].memory_analysis().temp_size_in_bytes / 1e9
    print(f'{name:30}{step_s:9.3f}{rows * length / step_s:12,.0f}{f"{clock_s:.3f}" if on_cpu else "-":>9}{mfu:>8}'
          f'{temp:9.2f}{ratio:14.2f}')


if __name__ == '__main__':
  main()
