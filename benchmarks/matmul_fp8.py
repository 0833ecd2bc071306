"""Times the matrix products of the 1B's layers in bfloat16 and in fp8, and the casts that fp8 needs:
python -m benchmarks.matmul_fp8 [--tokens=57344]

One table row per product of a layer (benchmarks/train.py, `1b`), for the forward pass. fp8 is float8_e4m3fn, with the
result in bfloat16. The tensor cores of a Hopper GPU multiply fp8 only if both operands have the summed dimension last,
so weights are transposed in advance, and a training step would need each activation twice: as it is, and transposed for
the gradient of the weights. The last two columns time these casts. Without a scale per tensor, the casts only show the
time, not what fp8 training would compute. Each time is the best of five.
"""
# N tokens  K summed dimension  M outputs

import argparse
import time

import jax
import jax.numpy as jnp

PRODUCTS = {'q': (1536, 2048), 'gate, up': (1536, 4608), 'down': (4608, 1536), 'out': (2048, 1536)}
CALLS = 4  # in one timing, so that the host's part doesn't count


def milliseconds(f, *args) -> float:
  """Returns the time of one call of the jitted `f`."""
  f = jax.jit(f)
  jax.block_until_ready(f(*args))
  times = []
  for _ in range(5):
    start = time.perf_counter()
    for _ in range(CALLS):
      out = f(*args)
    jax.block_until_ready(out)
    times.append(time.perf_counter() - start)
  return 1e3 * min(times) / CALLS


def product(a_NK, b_MK):
  return jax.lax.dot_general(a_NK, b_MK, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)


def cast(x):
  return jnp.clip(x, -448, 448).astype(jnp.float8_e4m3fn)  # beyond 448, the largest number, a cast gives NaN


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tokens', type=int, default=14 * 4096)
  args = parser.parse_args()
  print(f'{args.tokens} tokens  ({jax.devices()[0].device_kind}, jax {jax.__version__}); ms, and TFLOP/s of products')
  print(f'{"":10}{"K x M":>12}{"bfloat16":>10}{"TFLOP/s":>9}{"fp8":>8}{"TFLOP/s":>9}{"cast":>8}{"cast both ways":>16}')
  for name, (k, m) in PRODUCTS.items():
    x_NK = jax.random.normal(jax.random.key(0), (args.tokens, k), jnp.bfloat16)
    w_KM = jax.random.normal(jax.random.key(1), (k, m), jnp.bfloat16) * k**-0.5
    plain = milliseconds(lambda x_NK, w_KM: x_NK @ w_KM, x_NK, w_KM)
    fp8 = milliseconds(product, cast(x_NK), cast(w_KM.T))
    once, twice = milliseconds(cast, x_NK), milliseconds(lambda x_NK: (cast(x_NK), cast(x_NK).T), x_NK)
    tflops = lambda ms, flops=2e-9 * args.tokens * k * m: flops / ms
    print(f'{name:10}{f"{k} x {m}":>12}{plain:10.3f}{tflops(plain):9.0f}{fp8:8.3f}{tflops(fp8):9.0f}{once:8.3f}'
          f'{twice:16.3f}', flush=True)


if __name__ == '__main__':
  main()
