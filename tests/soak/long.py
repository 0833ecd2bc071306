"""python -m tests.soak.long [--lines=1000000] [--checkpoints=10000] [--points=1000] [--runs=200] [--only=metrics,...]

Writes what long lives leave, and measures the commands that read it: a metrics file of a million lines, a workdir with
ten thousand checkpoints, a sweep of a thousand points, a report on two hundred runs. Nothing is trained. Prints the
seconds, the CPU seconds and the peak memory of each command. On a busy machine, CPU seconds are more reliable.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from betarank.configs import load
from betarank.launch import points
from tests.eval import sweep
from tests.runs import environment

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = ('loss_nats', 'ce_nats', 'entropy_nats', 'tail_mass', 'head_mass', 'rank1_accuracy', 'bits_per_byte', 'lr',
         'grad_norm', 'parameter_norm', 'update_norm', 'tokens', 'rows', 'epochs', 'beta', 'top_gap_nats')


def measure(what: str, *arguments: object) -> None:
  """Runs `python ARGUMENTS`, and prints what it took."""
  with tempfile.TemporaryFile() as out:
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment(), stdout=out,
                               stderr=out)
    _, status, usage = os.wait4(process.pid, 0)
    took = time.monotonic() - began
    out.seek(0)
    said = out.read().decode().strip()
  if status:
    raise SystemExit(f'{what}: status {os.waitstatus_to_exitcode(status)}\n{said[-2000:]}')
  print(f'{what:44} {took:8.1f} s {usage.ru_utime + usage.ru_stime:8.1f} s CPU {usage.ru_maxrss / 1024:8,.0f} MB  '
        f'{(said.splitlines() or [""])[-1][:60]}', flush=True)


def metrics(root: pathlib.Path, lines: int) -> None:
  """Measures the readers of metrics.jsonl with two runs of `lines` steps each."""
  runs = [root / 'runs' / name for name in ('a', 'b')]
  for i, path in enumerate(runs):
    path.mkdir(parents=True)
    config = sweep.config(objective={'beta': -0.25} if i else {}, seed=0, steps=lines)
    (path / 'config.json').write_text(json.dumps(config, default=list))
    with open(path / 'metrics.jsonl', 'w', encoding='utf-8') as file:
      for step in range(1, lines + 1):
        figures = ', '.join(f'"train/{name}": {2 + (step * 7919 + j) % 1009 / step}' for j, name in enumerate(NAMES))
        file.write(f'{{"step": {step}, {figures}, "time/step_s": 0.1, "time/tokens_per_s": 1e4, '
                   f'"time/input_wait_share": 0.01, "time/elapsed_s": {step / 10}}}\n')
        if step % (lines // 1000) == 0:
          file.write(json.dumps({'step': step, 'eval/main/ce_nats': 2.0, 'eval/main/entropy_nats': 1.9}) + '\n')
  print(f'metrics.jsonl: {lines:,} steps, {(runs[0] / "metrics.jsonl").stat().st_size / 1e6:,.0f} MB each')
  measure('watch', '-m', 'betarank', 'watch', '--once', root / 'runs')
  measure('compare two runs, with plot', '-m', 'betarank', 'compare', *runs, f'--plot={root / "x.png"}')
  measure('report on two runs', '-m', 'betarank', 'report', root / 'runs')
  resume = ('import sys; from etils import epath; from betarank.runtime.metrics import JsonLines; '
            'JsonLines(epath.Path(sys.argv[1]), int(sys.argv[2])).write(int(sys.argv[2]) + 1, {}); import resource; '
            'print("process", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "MB")')
  measure('resume 100 steps before the end', '-c', resume, runs[0] / 'metrics.jsonl', lines - 100)
  measure('resume in the middle', '-c', resume, runs[0] / 'metrics.jsonl', lines // 2)
  last = (runs[0] / 'metrics.jsonl').read_bytes().splitlines()[-1]
  assert json.loads(last) == {'step': lines // 2 + 1}, last


def checkpoints(root: pathlib.Path, count: int) -> None:
  """Measures the commands that list checkpoints, in a workdir that has `count` of them."""
  path = root / 'kept'
  for step in range(1, count + 1):
    folder = path / 'checkpoints' / str(step)
    sweep.write(folder / 'state' / 'x', '')
    sweep.write(folder / 'meta' / 'metadata', json.dumps({
      'step': step, 'shapes': {}, 'config': {'seed': 0}, 'parent': '', 'cursor': {'step': step}}))
  measure('checkpoint inspect', '-m', 'betarank', 'checkpoint', 'inspect', path)
  measure('checkpoint verify (status 1: no manifest)', '-c',
          'import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]], stdout=-3) != 1)', '-m',
          'betarank', 'checkpoint', 'verify', path)
  opened = ('import sys; from betarank.runtime.checkpoint import CheckpointConfig, Checkpoints; '
            'c = Checkpoints(sys.argv[1], CheckpointConfig(1, 2, 1)); print(c.latest); c.close()')
  measure('a start opens the folder', '-c', opened, path)


def sweeps(root: pathlib.Path, count: int) -> None:
  """Measures a sweep of `count` points: its dry run, a launch that finds all points finished, and its table."""
  config, folder = f'tests/tiny_sweep.py:dir={root / "data"},arms=10,seeds={count // 20},probes=False', root / 'sweep'
  flags = ('-m', 'betarank', 'sweep', f'--config={config}', f'--root={folder}')
  measure('sweep --dry_run', *flags, '--dry_run')
  expanded = points.expand(config, str(folder))
  for point in expanded:
    if point.stage in points.TRAINS:
      path = pathlib.Path(point.workdir)
      settings = json.loads(load.to_json(point.config))
      sweep.write(path / 'config.json', json.dumps(settings))
      sweep.checkpoint(path, point.steps, settings, '', {})
      lines = [{'step': step, 'train/ce_nats': 2.0, 'time/step_s': 0.1} for step in range(1, point.steps + 1)]
      sweep.write(path / 'metrics.jsonl', ''.join(json.dumps(line) + '\n' for line in lines))
  states = ('import sys, pathlib; from betarank.launch import sweep, points; found = points.expand(*sys.argv[1:3]); '
            's = sweep.Sweep(found, pathlib.Path(sys.argv[2]), 1, None); s.write(); '
            'print(sum(x.state == "finished" for x in s.status.values()), "finished of", len(found))')
  measure('the states of a launch', '-c', states, config, folder)
  measure('watch', '-m', 'betarank', 'watch', '--once', folder)


def reports(root: pathlib.Path, runs: int) -> None:
  """Measures the report on `runs` runs: five arms, pre-training and RL, with probes and samples."""
  sweep.make(root / 'arms', seeds=runs // 10, steps=2000, rl_steps=200, problems=100, n=16)
  measure(f'report on {runs} runs', '-m', 'betarank', 'report', root / 'arms')


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m tests.soak.long', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  sizes = {'metrics': ('--lines', 1_000_000, metrics), 'checkpoints': ('--checkpoints', 10_000, checkpoints),
           'sweeps': ('--points', 1000, sweeps), 'reports': ('--runs', 200, reports)}
  for flag, size, _ in sizes.values():
    parser.add_argument(flag, type=int, default=size)
  parser.add_argument('--only', default=','.join(sizes))
  args = parser.parse_args()
  print(f'{"":44} {"wall":>10} {"CPU":>14} {"peak":>11}')
  for name in args.only.split(','):
    flag, _, run = sizes[name]
    with tempfile.TemporaryDirectory(prefix=f'long-{name}-') as folder:
      run(pathlib.Path(folder), getattr(args, flag.lstrip('-')))


if __name__ == '__main__':
  main()
