"""Times how fast the hosts of a pod get their batches from a slow and faulty bucket (tests/bucket.py).

    python -m benchmarks.bucket [--processes=4] [--shards=200] [--seconds=20] [--latency_s=0.03] [--error_rate=0.01]

Each process reads what one host reads when the 1B model trains on v5e-256: 64 rows of 4,096 tokens per step. A host
should read more than 4 times as fast as its chips train. For each process, the benchmark prints tokens per second of
wall time and tokens per second of CPU time. The latter is the rate of a host that doesn't share its cores.

Then the benchmark kills all processes (SIGKILL), resumes the first from its cursor, and checks that this process gets
exactly the next batch. It also checks that a local disk gives the same batches, bit for bit and in the same order. At
the end, the benchmark prints how many bytes were written to disk.
"""

import argparse
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from benchmarks import made_up_set
from betarank.data.batches import TrainBatches
from betarank.data.config import DataConfig, SourceConfig

ROW, ROWS = 4096, 64
COMPARED = 3  # batches whose bits are compared
TRAINS = 500e9 / 33 / 3600 / 64  # tokens/s per host of the 1B on v5e-256, at the shorter time of docs/plans.md


def digest(batch) -> str:
  content = hashlib.sha256()
  for leaf in jax.tree.leaves(batch):
    content.update(np.ascontiguousarray(leaf).tobytes())
  return content.hexdigest()


def host(config: DataConfig, args: argparse.Namespace) -> None:
  """Reads batches for some seconds, prints figures as JSON, and waits until the process is killed.

  The figures include hashes of the first batches. The cursor after these batches is written to the file args.cursor. If
  this file already exists, the function resumes from the cursor in it, reads only one batch, and returns.
  """
  from tests.bucket import register
  register()
  cursor_file = pathlib.Path(args.cursor)
  cursor = json.loads(cursor_file.read_text()) if cursor_file.exists() else None
  start = time.perf_counter()
  batches = TrainBatches(config, batch_size=ROWS * args.processes, seed=0, process_index=args.host,
                         process_count=args.processes, cursor=cursor)
  found = [digest(next(batches)) for _ in range(1 if cursor else COMPARED)]
  if cursor is None:
    cursor_file.write_text(json.dumps(batches.cursor))
  first_s = time.perf_counter() - start
  print(json.dumps({'digests': found, 'first_s': first_s}), flush=True)
  start, cpu, tokens, waits = time.perf_counter(), time.process_time(), 0, []
  while not cursor and time.perf_counter() - start < args.seconds:
    before = time.perf_counter()
    tokens += int((next(batches).segments_BT > 0).sum())
    waits.append(time.perf_counter() - before)
  print(json.dumps({'tokens': tokens, 'wall_s': time.perf_counter() - start, 'cpu_s': time.process_time() - cpu,
                    'longest_wait_s': max(waits, default=0)}), flush=True)
  if not cursor:
    sys.stdin.read()  # until killed
  batches.close()


def start(folder: pathlib.Path, index: int, args: argparse.Namespace, environment: dict[str, str]) -> subprocess.Popen:
  command = [sys.executable, '-m', 'benchmarks.bucket', f'--host={index}', f'--folder={folder}',
             f'--cursor={folder}/cursor-{index}', f'--processes={args.processes}', f'--seconds={args.seconds}']
  return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--processes', type=int, default=4)
  parser.add_argument('--shards', type=int, default=200)
  parser.add_argument('--documents', type=int, default=100_000)
  parser.add_argument('--seconds', type=float, default=20.0)
  parser.add_argument('--latency_s', type=float, default=0.03)
  parser.add_argument('--error_rate', type=float, default=0.01)
  for name in ('host', 'folder', 'cursor'):
    parser.add_argument(f'--{name}', default='', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.folder:
    args.host = int(args.host)
    uri = json.loads((pathlib.Path(args.folder) / 'source.json').read_text())
    host(DataConfig('gs://bucket/data', '', made_up_set.VOCAB, {'main': SourceConfig(uri, 1.0, 0)}, 0.0, ROW), args)
    return
  with tempfile.TemporaryDirectory() as temporary:
    measure(pathlib.Path(temporary), args)


def measure(folder: pathlib.Path, args: argparse.Namespace) -> None:
  config = made_up_set.write(folder / 'bucket' / 'data', shards=args.shards, documents=args.documents, row=ROW)
  (folder / 'source.json').write_text(json.dumps(config.sources['main'].uri))
  size = sum(path.stat().st_size for path in (folder / 'bucket').rglob('*') if path.is_file())
  print(f'{args.documents:,} documents in {args.shards} shards, {size / 1e6:,.0f} MB; {args.processes} processes, '
        f'{1000 * args.latency_s:.0f} ms and {args.error_rate:.0%} errors per request', flush=True)
  server = subprocess.Popen([sys.executable, '-m', 'tests.bucket', folder, f'--latency_s={args.latency_s}',
                             f'--error_rate={args.error_rate}'], text=True, stdout=subprocess.PIPE)
  endpoint = server.stdout.readline().strip()
  scratch = folder / 'scratch'
  scratch.mkdir()
  environment = {**os.environ, 'TENSORSTORE_GCS_HTTP_URL': endpoint, 'BUCKET_FOR_TESTS': endpoint,
                 'GOOGLE_AUTH_TOKEN_FOR_TESTING': '', 'TMPDIR': str(scratch), 'HOME': str(scratch),
                 'JAX_PLATFORMS': 'cpu'}
  hosts = [start(folder, i, args, environment) for i in range(args.processes)]
  try:
    begun = [json.loads(process.stdout.readline()) for process in hosts]
    figures = [json.loads(process.stdout.readline()) for process in hosts]
    for process in hosts:
      process.kill()
      process.wait()
    for i, (one, first) in enumerate(zip(figures, begun)):
      rate = one['tokens'] / one['wall_s']
      print(f'process {i}: {rate:10,.0f} tokens/s ({rate / TRAINS:.1f} x what the host trains on), '
            f'{one["tokens"] / one["cpu_s"]:10,.0f} per CPU second ({one["tokens"] / one["cpu_s"] / TRAINS:.1f} x); '
            f'{COMPARED} batches after {first["first_s"]:.1f} s, longest wait {one["longest_wait_s"]:.1f} s',
            flush=True)
    resumed = start(folder, 0, args, environment)
    again = json.loads(resumed.stdout.readline())['digests']
    resumed.communicate()
  finally:
    server.kill()
  for i in range(args.processes):
    local = TrainBatches(config, batch_size=ROWS * args.processes, seed=0, process_index=i,
                         process_count=args.processes)
    want = [digest(next(local)) for _ in range(COMPARED + (i == 0))]
    local.close()
    assert begun[i]['digests'] == want[:COMPARED], f'process {i} read something else than a local disk has'
    if i == 0:
      assert again == want[COMPARED:], 'the resumed process read something else'
  print('order and bits: those of a local disk; a process that was killed and resumed reads on exactly')
  written = sum(path.stat().st_size for path in scratch.rglob('*') if path.is_file())
  print(f'written to disk by {args.processes} processes: {written / 1e6:.1f} MB')


if __name__ == '__main__':
  main()
