"""How long a save holds up training, beside the same save waited for: python -m benchmarks.checkpoint

The state is that of a 100M-parameter model (weights and two AdamW moments, 1.2 GB in float32). Each round saves
once in the background (what training does) and once waiting for the disk; the ratio is taken round by round.
"""

import argparse
import statistics
import tempfile
import time

import jax
import model
from train.checkpoint import CheckpointConfig, Checkpoints
from train.optimizer import OptimizerConfig, make_optimizer
from train.state import create_state

MODEL = model.ModelConfig(
  vocab_size=32_768, layers=12, d_model=768, d_ff=2048, heads=12, kv_heads=4, head_dim=64, rope_base=1e4,
  norm_eps=1e-6, tied_embeddings=True, compute_dtype='float32', remat='none', scan_layers=True)
ADAMW = OptimizerConfig(lr=1e-3, warmup_steps=1, decay_fraction=0.0, final_lr=0.0, b1=0.9, b2=0.95, eps=1e-8,
                        weight_decay=0.1, clip_norm=1.0)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  mesh = model.make_mesh(model.MeshConfig(1, -1, 1, 1, 1))
  with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
    state = create_state(MODEL, make_optimizer(ADAMW, 10, model.abstract(MODEL)[2]), mesh, seed=0)
    jax.block_until_ready(state)
    parameters = sum(model.parameter_counts(MODEL).values())
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    print(f'{parameters / 1e6:.0f}M parameters, {size / 1e9:.2f} GB of state; seconds a save holds up training')
    checkpoints = Checkpoints(folder, CheckpointConfig(every_steps=1, keep=1, keep_every_steps=0))
    ratios = []
    for n in range(args.rounds + 1):
      start = time.perf_counter()
      checkpoints.save(state, {}, 2 * n)
      blocked = time.perf_counter() - start
      checkpoints.wait()
      start = time.perf_counter()
      checkpoints.save(state, {}, 2 * n + 1)
      checkpoints.wait()
      whole = time.perf_counter() - start
      if n:  # the first pair warms up
        ratios.append(blocked / whole)
        print(f'  in the background {blocked:6.3f}   waiting {whole:6.3f}   ratio {ratios[-1]:.3f}')
    checkpoints.close()
    print(f'median ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})')


if __name__ == '__main__':
  main()
