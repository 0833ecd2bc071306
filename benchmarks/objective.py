"""Compares the shaped objective with plain cross-entropy: time and temporary memory, forward and backward.

    python -m benchmarks.objective                                # runs on the first device
    python -m benchmarks.objective --grid=2048x512x65536,8192x1024x32768
    python -m benchmarks.objective --tpu=v5e-4 --grid=32768x2048x131072 --dtype=bfloat16

The runs of the compared functions are interleaved. Each function runs `--repeats` times. The benchmark prints the
smallest number of wall seconds and the smallest number of CPU seconds. On a shared machine, CPU seconds vary less.
tokamax (pip install tokamax) is timed if it is installed.

With --tpu, the functions are only compiled, ahead of time (pip install "jax[tpu]"). Times are predicted from the
compiled programs as in `betarank plan`, for bfloat16. There are two figures for temporary memory. `allocated` is the
size of the program's one temporary allocation, from the compiler's buffer assignment. `temp` comes from JAX's
memory_analysis, which in libtpu 0.0.50.1 counts the logits of a chunk twice.
"""
# N tokens  D width  V vocabulary

import os
import pathlib
import re
import tempfile
import time
from unittest import mock

from absl import app, flags

from betarank.launch.plan import hlo
from betarank.launch.plan.bundles import FLAGS as BUNDLE_FLAGS
from betarank.launch.plan.chips import Topology
from betarank.launch.plan.predict import predict

GRID = flags.DEFINE_list('grid', ['8192x512x65536'], 'tokens x D x V, several by commas')
ONLY = flags.DEFINE_list('only', [], 'Names (or their starts) of what to compare; empty: all.')
DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of hidden states and head.')
REPEATS = flags.DEFINE_integer('repeats', 3, 'Timed runs of each.')
CHUNK = flags.DEFINE_integer('chunk_tokens', 0, "Ours: tokens a chunk; 0: the head's default where it runs.")
TPU = flags.DEFINE_string('tpu', '', 'Topology to compile for instead of running, e.g. v5e-4.')

NO_KERNEL = 'ours: ranks, no TPU kernel'


def contenders(chunk_tokens):
  """Returns the functions to compare, {name: function (hidden, head, targets) -> (scalar loss, other results)}.

  chunk_tokens: the number of tokens per chunk in betarank's own functions; 0 means their default.
  """
  import jax.numpy as jnp
  import optax

  from betarank.objectives import RewardShaping, shaped_linear_loss, shaped_linear_total

  chunk = {'chunk_tokens': chunk_tokens or None}

  def full(h, w, x):
    z = jnp.matmul(h, w, preferred_element_type=jnp.float32)
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
  if TPU.value:
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


def compare(shape, run_names, dump_folder):
  import jax
  import jax.numpy as jnp

  from betarank.objectives.head import default_chunk
  from betarank.objectives.kernels import top_k_tpu as kernel

  tokens, width, vocab = (int(n) for n in shape.split('x'))
  dtype = jnp.dtype(DTYPE.value)
  sharding = None
  if TPU.value:
    topology = Topology(TPU.value)
    sharding = jax.sharding.SingleDeviceSharding(topology.devices()[0])
  abstract = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  weights = abstract((tokens, width), dtype), abstract((width, vocab), dtype)
  arguments = *weights, abstract((tokens,), jnp.int32)

  chunk_tokens = CHUNK.value
  if TPU.value and not chunk_tokens:  # otherwise the head would choose it for the CPU that compiles
    chunk_tokens = default_chunk(tokens, vocab, 'accelerator')
  compiled, seconds, allocated = {}, {}, {}
  for name, f in contenders(chunk_tokens).items():
    if not run_names or any(name.startswith(start) for start in run_names):
      with mock.patch.object(kernel, 'fits', kernel.fits if name != NO_KERNEL else lambda *_: False):
        compiled[name] = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True)).lower(*arguments).compile()
      if TPU.value:
        seconds[name] = predict(hlo.read(compiled[name].as_text()), dump_folder, topology).step_s
        allocated[name] = allocated_bytes(dump_folder)
        for dumped in dump_folder.rglob('*.*'):
          if dumped.is_file():
            dumped.unlink()

  full_bytes = 4 * tokens * vocab
  where = f'{TPU.value}, compiled only' if TPU.value else jax.devices()[0].device_kind
  print(f'\ntokens {tokens}  D {width}  V {vocab}  {dtype}  ({where}, jax {jax.__version__})', flush=True)
  memory = {name: c.memory_analysis().temp_size_in_bytes for name, c in compiled.items()}
  if TPU.value:
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
  wall, cpu = {}, {}
  for round_ in range(REPEATS.value + 1):  # the first round only warms up
    for name, run in compiled.items():
      start = time.perf_counter(), time.process_time()
      jax.block_until_ready(run(h, w, x))
      if round_:
        wall[name] = min(wall.get(name, float('inf')), time.perf_counter() - start[0])
        cpu[name] = min(cpu.get(name, float('inf')), time.process_time() - start[1])
  base = 'tokamax chunked_xla' if 'tokamax chunked_xla' in compiled else next(iter(compiled))
  print(f'ratios to {base}')
  print(f'{"":30}{"wall s":>9}{"ratio":>8}{"cpu s":>9}{"ratio":>8}{"temp MiB":>10}{"of logits":>11}')
  for name in compiled:
    print(f'{name:30}{wall[name]:9.3f}{wall[name] / wall[base]:8.2f}'
          f'{cpu[name]:9.2f}{cpu[name] / cpu[base]:8.2f}'
          f'{memory[name] / 2**20:10.0f}{memory[name] / full_bytes:11.4f}')


def main(argv):
  del argv
  with tempfile.TemporaryDirectory() as folder:
    if TPU.value:  # no TPU is attached, so libtpu must not search for one
      os.environ |= {
        'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
        'TPU_WORKER_HOSTNAMES': 'localhost', 'LIBTPU_INIT_ARGS': BUNDLE_FLAGS.format(folder=folder),
        'XLA_FLAGS': f'--xla_dump_to={folder} --xla_dump_hlo_as_text'}
    for shape in GRID.value:
      compare(shape, ONLY.value, pathlib.Path(folder))


if __name__ == '__main__':
  app.run(main)
