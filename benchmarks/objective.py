"""Compares the shaped objective with plain cross-entropy: time and temporary memory, forward and backward.

    python -m benchmarks.objective                                # runs on the first device
    python -m benchmarks.objective --grid=2048x512x65536,8192x1024x32768
    python -m benchmarks.objective --tpu=v5e-4 --grid=32768x2048x131072 --dtype=bfloat16

The runs of the compared functions are interleaved. Each function runs `--repeats` times. The benchmark prints the
median of the wall seconds and the median of the CPU seconds. On a shared machine, CPU seconds vary less. tokamax (pip
install tokamax) is timed if it is installed.

With --tpu, the functions are only compiled, ahead of time (pip install "jax[tpu]"). Times are predicted from the
compiled programs as in `betarank plan`, for bfloat16. There are two figures for temporary memory. `allocated` is the
size of the program's one temporary allocation, from the compiler's buffer assignment. `temp` comes from JAX's
memory_analysis, which in libtpu 0.0.50.1 counts the logits of a chunk twice.
"""
# N tokens  D width  V vocabulary

import argparse
import collections
import os
import pathlib
import re
import statistics
import tempfile
import time
from unittest import mock

from betarank.launch.plan import hlo
from betarank.launch.plan.bundles import FLAGS as BUNDLE_FLAGS
from betarank.launch.plan.chips import Topology
from betarank.launch.plan.predict import predict

NO_KERNEL = 'ours: ranks, no TPU kernel'


def contenders(chunk_tokens, tpu):
  """Returns the functions to compare, {name: function (hidden, head, targets) -> (scalar loss, other results)}.

  chunk_tokens: the number of tokens per chunk in betarank's own functions; 0 means their default.
  tpu: whether the functions are compiled for a TPU.
  """
  import jax.numpy as jnp
  import optax

  from betarank.objectives import RewardShaping, shaped_linear_loss, shaped_linear_total

  chunk = {'chunk_tokens': chunk_tokens or None}

  def full(h, w, x):
    z = (h @ w).astype(jnp.float32)  # with preferred_element_type, the gradients' products would be in float32
    return optax.softmax_cross_entropy_with_integer_labels(z, x).sum(), ()

  def total(shaping, with_stats):
    def f(h, w, x):
      value, loss, stats = shaped_linear_total(h, w, x, shaping, **chunk)
      return value, (loss, stats) if with_stats else ()
    return f

  def per_token(h, w, x):
    return shaped_linear_loss(h, w, x, ranks, **chunk)[0].sum(), ()

  beta = RewardShaping(beta=-0.25)
  ranks = RewardShaping(beta=-0.25, lambda_head=0.1, lambda_tail=-0.1)
  found = {
    'optax, all logits': full,
    'ours: cross-entropy': total(RewardShaping(), False),
    'ours: beta': total(beta, False),
    'ours: beta + statistics': total(beta, True),
    'ours: ranks': total(ranks, False),
    'ours: ranks + statistics': total(ranks, True),
    'ours: ranks per token': per_token,
  }
  if tpu:
    found[NO_KERNEL] = total(ranks, True)
    return found
  try:
    import tokamax
  except ImportError:
    return found
  peer = lambda h, w, x: (tokamax.linear_softmax_cross_entropy_loss(
    h, x, w, reduction='sum', implementation='chunked_xla'), ())
  return {'tokamax chunked_xla': peer} | found


def allocated_bytes(folder):
  """Returns the bytes of HBM for temporary values in a program compiled for a TPU.

  folder: the folder to which XLA has dumped the program, with its buffer assignment.
  """
  texts = (f.read_text() for f in folder.glob('*.after_optimizations-buffer-assignment.txt'))
  sizes = (re.findall(r'^allocation \d+: size (\d+), page 0, preallocated-temp:', text, re.MULTILINE) for text in texts)
  return max(sum(map(int, found)) for found in sizes)


def compare(shape, args, dump_folder):
  import jax
  import jax.numpy as jnp

  from betarank.objectives.head import default_chunk
  from betarank.objectives.kernels import top_k_tpu as kernel

  tokens, width, vocab = shape
  dtype = jnp.dtype(args.dtype)
  sharding = None
  if args.tpu:
    topology = Topology(args.tpu)
    sharding = jax.sharding.SingleDeviceSharding(topology.devices()[0])
  abstract = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  weights = abstract((tokens, width), dtype), abstract((width, vocab), dtype)
  arguments = *weights, abstract((tokens,), jnp.int32)

  chunk_tokens = args.chunk_tokens
  if args.tpu and not chunk_tokens:  # otherwise the head would choose it for the CPU that compiles
    chunk_tokens = default_chunk(tokens, vocab, 'accelerator')
  compiled, seconds, allocated = {}, {}, {}
  for name, f in contenders(chunk_tokens, bool(args.tpu)).items():
    if name.startswith(args.only):
      with mock.patch.object(kernel, 'fits', kernel.fits if name != NO_KERNEL else lambda *_: False):
        compiled[name] = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True)).lower(*arguments).compile()
      if args.tpu:
        seconds[name] = predict(hlo.read(compiled[name].as_text()), dump_folder, topology).step_s
        allocated[name] = allocated_bytes(dump_folder)
        for dumped in dump_folder.rglob('*.*'):
          if dumped.is_file():
            dumped.unlink()

  full_bytes = 4 * tokens * vocab
  where = f'{args.tpu}, compiled only' if args.tpu else jax.devices()[0].device_kind
  print(f'\ntokens {tokens}  D {width}  V {vocab}  {dtype}  ({where}, jax {jax.__version__})', flush=True)
  memory = {name: c.memory_analysis().temp_size_in_bytes for name, c in compiled.items()}
  if args.tpu:
    base = seconds.get('ours: cross-entropy', next(iter(seconds.values())))
    print(f'{"":30}{"temp MiB":>10}{"of logits":>11}{"allocated":>11}{"of logits":>11}'
          f'{"least ms":>10}{"ratio":>8}{"likely ms":>11}{"ratio":>8}')
    for name, (least, likely) in seconds.items():
      print(f'{name:30}{memory[name] / 2**20:10.0f}{memory[name] / full_bytes:11.4f}'
            f'{allocated[name] / 2**20:11.0f}{allocated[name] / full_bytes:11.4f}'
            f'{1e3 * least:10.1f}{least / base[0]:8.3f}{1e3 * likely:11.1f}{likely / base[1]:8.3f}')
    return

  keys = jax.random.split(jax.random.key(0), 3)
  h = jax.random.normal(keys[0], (tokens, width), dtype)
  w = jax.random.normal(keys[1], (width, vocab), dtype) * 0.05
  x = jax.random.randint(keys[2], (tokens,), 0, vocab)
  runs = collections.defaultdict(list)
  for round_ in range(args.repeats + 1):  # the first round only warms up
    for name, run in compiled.items():
      start = time.perf_counter(), time.process_time()
      jax.block_until_ready(run(h, w, x))
      if round_:
        runs[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
  wall, cpu = ({name: statistics.median(run[n] for run in found) for name, found in runs.items()} for n in (0, 1))
  base = 'tokamax chunked_xla' if 'tokamax chunked_xla' in compiled else next(iter(compiled))
  print(f'ratios to {base}')
  print(f'{"":30}{"wall s":>9}{"ratio":>8}{"cpu s":>9}{"ratio":>8}{"temp MiB":>10}{"of logits":>11}')
  for name in compiled:
    print(f'{name:30}{wall[name]:9.3f}{wall[name] / wall[base]:8.2f}'
          f'{cpu[name]:9.2f}{cpu[name] / cpu[base]:8.2f}'
          f'{memory[name] / 2**20:10.0f}{memory[name] / full_bytes:11.4f}')


def sizes(text):
  """Returns [(tokens, D, vocabulary)] from a text such as '8192x512x65536,8192x1024x32768'."""
  grid = [tuple(map(int, shape.split('x'))) for shape in text.split(',')]
  if any(len(shape) != 3 or min(shape) < 1 for shape in grid):
    raise ValueError(text)
  return grid


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--grid', type=sizes, default='8192x512x65536', help='tokens x D x V, separated by commas')
  parser.add_argument('--only', default='', help='functions whose names start with one of these, separated by commas')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32', help='of hidden states and head')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--chunk_tokens', type=int, default=0,
                      help="tokens per chunk of betarank's functions; 0: the head's default where it runs")
  parser.add_argument('--tpu', default='', help='a topology to compile for instead of running, such as v5e-4')
  args = parser.parse_args()
  args.only = tuple(args.only.split(','))
  with tempfile.TemporaryDirectory() as folder:
    if args.tpu:  # no TPU is attached, so libtpu must not search for one
      os.environ |= {
        'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
        'TPU_WORKER_HOSTNAMES': 'localhost', 'LIBTPU_INIT_ARGS': BUNDLE_FLAGS.format(folder=folder),
        'XLA_FLAGS': f'--xla_dump_to={folder} --xla_dump_hlo_as_text'}
    names = contenders(args.chunk_tokens, bool(args.tpu))  # this imports JAX
    if not any(name.startswith(args.only) for name in names):
      parser.error(f'no function starts with --only={",".join(args.only)}; they are {", ".join(names)}')
    for shape in args.grid:
      compare(shape, args, pathlib.Path(folder))


if __name__ == '__main__':
  main()
