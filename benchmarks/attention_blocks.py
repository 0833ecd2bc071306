"""Predicts the time of splash attention on a TPU for several block sizes, from kernels compiled on this machine.

    python -m benchmarks.attention_blocks [--chips=v5e,v5p,v6e] [--rows=1]

Prints milliseconds, first with and then without interlocks of the matrix unit (docs/plans.md), for rows of 4096 tokens
with 32 query heads and 8 key heads of width 128. Needs libtpu. All combinations take about ten minutes on one core.
"""

import argparse
import pathlib
import tempfile

from betarank.launch.plan.command import configure_libtpu

SIZES = ((512, 512, 512), (1024, 1024, 512), (1024, 1024, 1024), (1024, 1024, 256), (512, 1024, 512),
         (1024, 512, 512), (2048, 1024, 512), (1024, 2048, 512), (2048, 2048, 512))
HEADS, KEY_HEADS, LENGTH, WIDTH = 32, 8, 4096, 128


def predict_ms(chip: str, sizes: tuple[int, int, int], backward: bool, rows: int, folder: pathlib.Path) -> str:
  """Returns the predicted time of one kernel, such as '2.10 to 1.80', or 'no room' if it doesn't fit into VMEM.

  Both numbers are milliseconds. Only the first one includes the interlocks of the matrix unit (docs/plans.md).

  sizes: (queries per block, keys per block, keys that are multiplied at a time).
  backward: whether to predict the backward kernel instead of the forward kernel.
  rows: the batch size.
  folder: the folder to which libtpu writes the compiled kernel. Old files in it are deleted.
  """
  import jax
  import jax.numpy as jnp
  from jax.experimental.pallas.ops.tpu import splash_attention as splash
  from jax.sharding import SingleDeviceSharding

  from betarank.launch.plan import bundles, chips, hlo, predict
  names = [name + '_dkv' * backward for name in ('block_q', 'block_kv')]
  names.append('block_kv_dkv_compute' if backward else 'block_kv_compute')
  blocks = dict(block_q=512, block_kv=512, block_kv_compute=512) | dict(zip(names, sizes))
  mask = splash.MultiHeadMask([splash.CausalMask((LENGTH, LENGTH))] * HEADS)
  kernel = splash.make_splash_mha(mask, block_sizes=splash.BlockSizes(**blocks, use_fused_bwd_kernel=backward),
                                  head_shards=1, q_seq_shards=1)

  def attend(q, k, v, segments):
    return jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=splash.SegmentIds(s, s)))(q, k, v, segments)

  def gradients(*inputs):
    return jax.grad(lambda q, k, v: attend(q, k, v, inputs[3]).astype(jnp.float32).sum(), (0, 1, 2))(*inputs[:3])

  topology = chips.Topology('v5p-8' if chip == 'v5p' else f'{chip}-4')
  placement = SingleDeviceSharding(topology.devices()[0])
  array = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=placement)
  keys = array(jnp.bfloat16, KEY_HEADS, LENGTH, WIDTH)
  inputs = array(jnp.bfloat16, HEADS, LENGTH, WIDTH), keys, keys, array(jnp.int32, LENGTH)
  for old in folder.iterdir():
    old.unlink()
  try:
    compiled = jax.jit(gradients if backward else attend).lower(*inputs).compile()
  except jax.errors.JaxRuntimeError as error:
    if 'vmem' not in str(error):
      raise
    return 'no room'
  kernels = {run.instruction.name: predict.shares(run.instruction) for run in hlo.read(compiled.as_text()).runs()
             if ('mha_dkv' if backward else 'mha_fwd') in run.instruction.name}
  [work] = [bundles.read(folder, kernels)[name] for name in kernels]
  product_s = work.rows / topology.chip.matrix_rate
  low = max(work.issued / topology.chip.clock, product_s)
  return f'{1e3 * (low + topology.chip.interlock * product_s):.2f} to {1e3 * low:.2f}'


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--chips', default='v5e,v5p,v6e')
  parser.add_argument('--rows', type=int, default=1)
  args = parser.parse_args()
  columns = [(chip, backward) for chip in args.chips.split(',') for backward in (False, True)]
  print(f'| block | {" | ".join(chip + (" backward" if backward else " forward") for chip, backward in columns)} |')
  with tempfile.TemporaryDirectory() as folder:
    configure_libtpu(pathlib.Path(folder), True)
    for sizes in SIZES:
      cells = [predict_ms(chip, sizes, backward, args.rows, pathlib.Path(folder)) for chip, backward in columns]
      print(f'| {", ".join(map(str, sizes))} | {" | ".join(cells)} |', flush=True)


if __name__ == '__main__':
  main()
