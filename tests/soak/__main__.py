"""python -m tests.soak [--steps=20000] [--rl_steps=300] [--prompts=100000] [--gb=10] [--only=train,rl,eval,data]
                     [--platform=cpu]

Runs tiny models with as many steps, checkpoints, evaluations and prompts as a day of real training: an hour on two
CPU cores. Every process is observed from outside, twice per second. A figure, such as memory, is flat if it grows by
less than three standard errors of its slope, or by less than the bound in tests/soak/watch.py. The first fifth of the
run doesn't count, and the rest must last 20 seconds or more. Each load prints how long it took. The exit status is 1 if
a figure grows, a load fails or is too short to tell, or temporary files are left.

With --platform=gpu the same loads run on this machine's GPUs, with heads and rows that the GPU kernels support. The
memory in use on the GPUs is then observed too, that of other programs included. An H100 with 16 CPU cores takes 7 ms
per training step, the checkpoint of every 50th step included.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

import jax

from tests.soak import loads, watch


def main():
  parser = argparse.ArgumentParser(prog='python -m tests.soak', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--steps', type=int, default=20_000, help='of pre-training')
  parser.add_argument('--rl_steps', type=int, default=300)
  parser.add_argument('--prompts', type=int, default=100_000, help='of the evaluation')
  parser.add_argument('--gb', type=float, default=10.0, help='of prepared data')
  parser.add_argument('--only', default='train,rl,eval,data')
  parser.add_argument('--platform', choices=loads.PLATFORMS, default='cpu')
  parser.add_argument('--keep', default='', metavar='DIR', help='a new folder for the runs, which is kept')
  args = parser.parse_args()
  todo = {'train': (loads.train, args.steps), 'rl': (loads.rl, args.rl_steps),
          'eval': (loads.evaluation, args.prompts), 'data': (loads.data, args.gb)}
  if unknown := set(args.only.split(',')) - set(todo):
    parser.error(f'--only={args.only}: no load {", ".join(sorted(unknown))}; there are {", ".join(todo)}')
  jax.config.update('jax_platforms', 'cpu')  # this process itself never uses a GPU
  root = pathlib.Path(args.keep or tempfile.mkdtemp(prefix='soak-')).resolve()
  root.mkdir(parents=True, exist_ok=True)
  soak, bad = loads.Soak(root, args.platform), 0
  for name, (load, size) in todo.items():
    if name in args.only.split(','):
      began = time.monotonic()
      try:
        done = load(soak, size)
      except AssertionError as error:  # the other loads may still tell something
        print(f'\n{name} failed: {error}', flush=True)
        bad += 1
        continue
      (root / f'{name}.json').write_text(json.dumps([dataclasses.asdict(sample) for sample in done.watch.samples]))
      bad += show(name, done, time.monotonic() - began)
  if soak.left:
    print(f'\n{len(soak.left)} temporary files are left, such as {", ".join(sorted(soak.left)[:5])}')
    bad += 1
  if not args.keep:
    shutil.rmtree(root)
  sys.exit(bad > 0)


def show(name: str, load: loads.Load, took_s: float) -> int:
  """Prints the table of a load. Returns how many of its figures aren't flat, or 1 if the load was too short to tell.

  took_s: the seconds that the load took.
  """
  known_mb = loads.CHECKPOINT_MB * load.checkpoints_per_1000
  print(f'\n{name}: {load.did}; {took_s / 60:.1f} min, load {os.getloadavg()[1]:.1f} on {os.cpu_count()} processors')
  try:
    rows = watch.rows(load.watch.samples, load.watch.names, known_mb)
  except ValueError as error:
    print(f'no table: {error}', flush=True)
    return 1
  print(f'{"process":18} {"figure":14} {"first":>9} {"last":>9} {"per 1000 steps":>20} {"bound":>9}')
  for row in rows:
    growth = f'{row.slope:+.3f} ± {row.error:.3f}'
    print(f'{row.process:18} {row.figure:14} {row.first:9.2f} {row.last:9.2f} {growth:>20} '
          f'{max(3 * row.error, row.bound):9.3f}  {"flat" if row.flat else "GROWS"}')
  peak = max(sum(p['memory MB'] for p in s.figures.values()) for s in load.watch.samples)
  on_gpu = [s.gpu_mb for s in load.watch.samples if s.gpu_mb is not None]
  print(f'peak memory of all processes {peak:,.0f} MB' + (f', of all GPUs {max(on_gpu):,.0f} MB' if on_gpu else ''),
        flush=True)
  return sum(not row.flat for row in rows)


if __name__ == '__main__':
  main()
