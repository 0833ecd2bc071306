"""Times our attention kernels and others on a GPU, forward and backward: python -m benchmarks.attention

The batch is that of the 1B model: 8 rows of 4096 tokens, 16 query heads and 4 key heads of width 128, bfloat16.
`--documents=N` cuts each row into N documents of about equal length. For TFLOP/s, the benchmark counts
4·T/2·heads·width FLOPs per token forward, where T is the length of a row, and 2.5 times as many backward. Documents
don't change this count, although a kernel may skip FLOPs because of them.

cuDNN is timed twice. In the line `cudnn causal`, it gets no mask of documents, so tokens attend across documents. In
the line `cudnn`, it gets such a mask, which shows what the mask costs.

The last columns are the errors in the first row relative to float32, with documents: the norm of the difference,
divided by the norm. With --documents, `cudnn causal` computes something else, so its errors are large.
"""

import argparse
import functools
import importlib.util
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from betarank.model.kernels import attention_hopper as hopper
from betarank.model.kernels import attention_triton as triton


def cudnn(segments_BT, documents: bool):
  same_B1TT = segments_BT[:, None, :, None] == segments_BT[:, None, None, :] if documents else None
  return lambda q, k, v: jax.nn.dot_product_attention(
    q, k, v, mask=same_B1TT, is_causal=True, implementation='cudnn')


def ours(kernels, segments_BT):
  start_BT, end_BT = triton.documents(segments_BT)
  return lambda q, k, v: kernels.attention(q, k, v, start_BT, end_BT)


def tokamax(segments_BT):
  from tokamax._src.ops.attention import base
  from tokamax._src.ops.attention import pallas_mosaic_gpu as fwd
  from tokamax._src.ops.attention import pallas_mosaic_gpu_vjp as bwd
  vjp = bwd.PallasMosaicGpuFlashAttentionVjp(config=bwd.Config(
    block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64, num_stages=2, compute_wgs=2))
  op = fwd.PallasMosaicGpuFlashAttention(config=fwd.ConfigSM90(block_q=64, block_kv=128, num_stages=2), vjp=vjp)
  start_BT = triton.documents(segments_BT)[0]
  mask = base.Mask(k_start=start_BT[:, None], is_causal=True)
  return lambda q, k, v: op(q, k, v, mask=mask)


def with_gradients(attend, q, k, v, dout):
  out, vjp = jax.vjp(attend, q, k, v)
  return out, *vjp(dout)


def exact(segments_BT, q, k, v, dout):
  """Returns what `with_gradients` returns for the first row, with documents, computed in float32 by XLA."""
  same_11TT = segments_BT[:1, None, :, None] == segments_BT[:1, None, None, :]
  attend = functools.partial(
    jax.nn.dot_product_attention, mask=same_11TT, is_causal=True, implementation='xla')
  with jax.default_matmul_precision('highest'):
    return with_gradients(attend, *(x[:1].astype(jnp.float32) for x in (q, k, v, dout)))


def errors(got, reference) -> list[float]:
  """Returns the norm of the difference in the first row, divided by the norm of the reference, for each array."""
  return [float(jnp.linalg.norm(x[:1].astype(jnp.float32) - y) / jnp.linalg.norm(y)) for x, y in zip(got, reference)]


def seconds(run, args, rounds=5, calls=10) -> float:
  jax.block_until_ready(run(*args))
  times = []
  for _ in range(rounds):
    start = time.perf_counter()
    for _ in range(calls):
      out = run(*args)
    jax.block_until_ready(out)
    times.append((time.perf_counter() - start) / calls)
  return statistics.median(times)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rows', type=int, default=8)
  parser.add_argument('--length', type=int, default=4096)
  parser.add_argument('--heads', default='16,4,128')
  parser.add_argument('--documents', type=int, default=1)
  parser.add_argument('--random', action='store_true', help='cut at random places')
  parser.add_argument('--only', default='')
  args = parser.parse_args()
  heads, kv_heads, width = map(int, args.heads.split(','))
  rng = np.random.default_rng(0)
  draw = lambda n: jnp.asarray(rng.normal(size=(args.rows, args.length, n, width)), jnp.bfloat16)
  q, k, v, dout = draw(heads), draw(kv_heads), draw(kv_heads), draw(heads)
  cuts = np.tile(np.arange(1, args.documents) * args.length // args.documents, (args.rows, 1))
  if args.random:
    cuts = np.sort(rng.integers(1, args.length, cuts.shape))
  segments = jnp.asarray([np.searchsorted(row, np.arange(args.length), 'right') + 1 for row in cuts], jnp.int32)
  ways = {
    'cudnn causal': lambda: cudnn(segments, False),
    'cudnn': lambda: cudnn(segments, True),
    'hopper': lambda: ours(hopper, segments),
    'triton': lambda: ours(triton, segments),
  }
  if importlib.util.find_spec('tokamax'):
    ways['tokamax (mosaic)'] = lambda: tokamax(segments)
  forward_flops = 4 * args.length / 2 * heads * width * args.rows * args.length
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {args}', flush=True)
  try:
    reference = jax.block_until_ready(jax.jit(exact)(segments, q, k, v, dout))
  except jax.errors.JaxRuntimeError as e:  # its [T, T] scores don't fit into memory
    print(f'no errors are given: {str(e)[:200]}', flush=True)
    reference = None
  print(f'{"":36}{"forward ms":>12}{"TFLOP/s":>9}{"backward ms":>13}{"TFLOP/s":>9}   error of out, dq, dk, dv',
        flush=True)
  for name, make in ways.items():
    if args.only and not any(name.startswith(o) for o in args.only.split('+')):
      continue
    try:
      attend = make()
      forward = jax.jit(attend)
      both = jax.jit(functools.partial(with_gradients, attend))
      a, ab = seconds(forward, (q, k, v)), seconds(both, (q, k, v, dout))
      error = errors(both(q, k, v, dout), reference) if reference else []
      print(f'{name:36}{a * 1e3:12.3f}{forward_flops / a / 1e12:9.0f}{(ab - a) * 1e3:13.3f}'
            f'{2.5 * forward_flops / (ab - a) / 1e12:9.0f}   {" ".join(f"{e:.1e}" for e in error)}', flush=True)
    except Exception as e:  # the kernel isn't installed, or doesn't support these sizes
      print(f'{name:36}{type(e).__name__}: {str(e)[:300]}', flush=True)


if __name__ == '__main__':
  main()
