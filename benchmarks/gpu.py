"""Runs all GPU benchmarks and tests, one command at a time: python -m benchmarks.gpu [--only=train,head]

Each part is a separate process, because JAX keeps the card's memory. If a part fails, for example because a package
isn't installed or a model doesn't fit, the other parts still run. The output ends with one table of all parts. The exit
status is 1 if a part failed or took longer than --timeout_s.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

MODULE = [sys.executable, '-m']
TRAIN = [*MODULE, 'benchmarks.train', '--no-naive', '--rounds=3', '--no-head_tail_mass', '--no-scan_layers']
HEAD = '--grid=32768x2048x131072'
ROLLOUT = [*MODULE, 'benchmarks.rollout', '--size=1b', '--repeats=1']
PARTS = {
  'attention': [*MODULE, 'benchmarks.attention'],
  'attention-documents': [*MODULE, 'benchmarks.attention', '--documents=4'],
  'train': [*TRAIN, '--model=1b', '--rows=14'],
  'train-documents': [*TRAIN, '--model=1b', '--rows=14', '--documents=4', '--only=beta'],
  'train-moe': [*TRAIN, '--model=2b-moe', '--only=beta'],
  'train-largest': [*TRAIN, '--model=4b', '--only=beta', '--scan_layers'],  # as it was measured
  'train-largest-moe': [*TRAIN, '--model=3b-moe', '--rows=8', '--only=beta'],
  'train-torch': [*MODULE, 'benchmarks.torch_train', '--model=1b'],
  'head': [*MODULE, 'benchmarks.objective', HEAD, '--dtype=bfloat16'],
  'head-torch': [*MODULE, 'benchmarks.torch_head', HEAD],
  'rollout': [*ROLLOUT, '--only=ours'],
  'rollout-peers': [*ROLLOUT, '--only=theirs'],
  'rollout-torch': [*MODULE, 'benchmarks.torch_rollout'],
  'tests': [*MODULE, 'pytest', '-m', 'not slow', '-vv', '-n', '12', '-k', 'not mesh and not eight and not sharded',
            'tests/model', 'tests/objectives', 'tests/test_on_card.py'],
  'tests-two': [*MODULE, 'pytest', '-m', '', '-rf', '-n', '2', 'tests/train/test_two_devices.py'],
}
# In these parts, JAX doesn't allocate the card's memory in advance.
TORCH = 'train-torch', 'head-torch', 'rollout-peers', 'rollout-torch'
TESTS = 'tests', 'tests-two'  # the latter needs two GPUs
TABLE_LINES = 9  # the table has the last so many lines of each part's output


def run(name: str, argv: list[str], timeout_s: float) -> tuple[str, float, list[str]]:
  """Runs one of PARTS and shows its output. Returns (state, seconds, the last lines of its output).

  The state is 'done', 'exit STATUS' or 'too long'. When `run` returns, all processes that the part started have ended,
  except those that formed a session of their own.
  """
  start = time.perf_counter()
  environment = {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.92', 'TF_CPP_MIN_LOG_LEVEL': '2', **os.environ}
  if name in TORCH:
    environment['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  if name in TESTS:  # for tests/conftest.py; several processes share the card, and TF32 isn't as accurate as float32
    environment |= {'TEST_ON': 'gpu', 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
                    'JAX_DEFAULT_MATMUL_PRECISION': 'highest'}
  process = subprocess.Popen(
    argv, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)

  def kill():
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)

  timer = threading.Timer(timeout_s, kill)
  timer.start()
  lines = []
  try:
    for line in process.stdout:
      print(line, end='', flush=True)
      lines.append(line.rstrip())
    status = process.wait()
  finally:
    timer.cancel()
    kill()
  seconds = time.perf_counter() - start
  state = 'too long' if seconds >= timeout_s else f'exit {status}' if status else 'done'
  return state, seconds, [line for line in lines if line][-TABLE_LINES:]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default='', help=f'some of {",".join(PARTS)}')
  parser.add_argument('--timeout_s', type=float, default=400, help='of each part')
  args = parser.parse_args()
  names = args.only.split(',') if args.only else list(PARTS)
  for name in names:
    if name not in PARTS:
      parser.error(f'--only={name}: the parts are {", ".join(PARTS)}')
  results = {}
  for name in names:
    print(f'\n== {name}: {" ".join(PARTS[name][1:])}', flush=True)
    results[name] = run(name, PARTS[name], args.timeout_s)
  print()
  for name, (state, seconds, lines) in results.items():
    print(f'{name:18}{state:10}{seconds:6.0f} s')
    for line in lines:
      print(f'    {line}')
  if any(state != 'done' for state, *_ in results.values()):
    sys.exit(1)


if __name__ == '__main__':
  main()
