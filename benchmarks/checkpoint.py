"""Times how long a save stalls training, and how long checks delay a restore: python -m benchmarks.checkpoint

The state is that of a 100M-parameter model: weights and two AdamW moments, 1.2 GB in float32. Each round makes one
asynchronous save, as training does, and one blocking save. The benchmark prints two ratios:

- the time that the asynchronous save stalls training, divided by the time of the blocking save;
- the same, with the delay of the next update added to the stall. There is such a delay on a CPU, because the thread
  that writes the checkpoint uses the same cores as the update.

At the end, the last checkpoint is restored, first completely and then only its weights. Two checks of the files are
timed too: crc32 of every byte, which each restore computes, and sha256 of every byte, which `betarank checkpoint
verify` computes.
"""

import argparse
import logging
import statistics
import tempfile
import time

import jax

from betarank import model
from betarank.runtime import checkpoint, integrity
from betarank.runtime.checkpoint import CheckpointConfig, Checkpoints
from betarank.runtime.state import abstract_state, create_state, donated
from betarank.train.optimizer import OptimizerConfig, make_optimizer

MODEL = model.ModelConfig(
  vocab_size=32_768, layers=12, d_model=768, d_ff=2048, heads=12, kv_heads=4, head_dim=64, rope_base=1e4,
  norm_eps=1e-6, tied_embeddings=True, compute_dtype='float32', remat_policy='none', scan_layers=True)
ADAMW = OptimizerConfig(lr=1e-3, warmup_steps=1, decay_fraction=0.0, final_lr=0.0, b1=0.9, b2=0.95, eps=1e-8,
                        weight_decay=0.1, clip_norm=1.0)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  logging.getLogger('absl').setLevel(logging.ERROR)  # hides Orbax's warnings that saves follow each other closely
  mesh = model.make_mesh(model.MeshConfig(1, -1, 1, 1, 1))
  with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
    tx = make_optimizer(ADAMW, 10, model.abstract(MODEL)[2])
    state = create_state(MODEL, tx, mesh, seed=0)
    noise = lambda x: x + jax.random.normal(jax.random.key(0), x.shape).astype(x.dtype)  # zeros would compress
    state = jax.jit(lambda state: jax.tree.map(noise, state))(state)
    update = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=donated())
    state = jax.block_until_ready(update(state))
    parameters = sum(model.parameter_counts(MODEL).values())
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    print(f'{parameters / 1e6:.0f}M parameters, {size / 1e9:.2f} GB of state; seconds that a save holds up training')
    checkpoints = Checkpoints(folder, CheckpointConfig(every_steps=1, keep=1, keep_every_steps=0))
    shares, with_next = [], []
    for n in range(args.rounds + 1):
      alone = []
      for _ in range(3):
        seconds, state = timed(lambda state=state: update(state))
        alone.append(seconds)
      plain = statistics.median(alone)
      blocked, _ = timed(lambda state=state, n=n: checkpoints.save(state, {'config': {}}, 2 * n))
      after, state = timed(lambda state=state: update(state))
      checkpoints.wait()

      def save_and_wait(state=state, n=n):
        checkpoints.save(state, {'config': {}}, 2 * n + 1)
        checkpoints.wait()

      whole, _ = timed(save_and_wait)
      if n:  # the first round warms up
        shares.append(blocked / whole)
        with_next.append((blocked + max(after - plain, 0)) / whole)
        print(f'  save {blocked:.3f}, update after it {after:.3f} (alone {plain:.3f}); save waited for {whole:.3f}; '
              f'ratio {shares[-1]:.3f}, with what it slows the update {with_next[-1]:.3f}')
    checkpoints.close()
    print(f'median ratio {statistics.median(shares):.3f} ({min(shares):.3f} to {max(shares):.3f}), '
          f'with what it slows the next update {statistics.median(with_next):.3f}')
    del state
    _restores(checkpoint.find(folder), abstract_state(MODEL, tx, mesh), args.rounds)


def _restores(path, target, rounds: int) -> None:
  files = integrity.read(path)
  print(f'{sum(f["size"] for f in files.values()) / 1e9:.2f} GB in {len(files)} files; seconds')
  shares = []
  for n in range(rounds + 1):
    crc32, problem = timed(lambda: integrity.damage(path))
    sha256, worse = timed(lambda: integrity.damage(path, full=True))
    assert not problem and not worse
    whole, _ = timed(lambda: checkpoint.restore(path, target)[0])
    weights, _ = timed(lambda: checkpoint.restore_weights(path, target.params)[0])
    if n:
      shares.append((crc32 / (whole - crc32), crc32 / (weights - crc32), sha256 / (whole - crc32)))
      print(f'  restore {whole:.3f}, weights only {weights:.3f}, of which checking {crc32:.3f}; sha256 {sha256:.3f}')
  median = [statistics.median(column) for column in zip(*shares)]
  print(f'the check, relative to reading alone: restore {median[0]:.3f}, weights only {median[1]:.3f}; '
        f'sha256, relative to reading alone {median[2]:.3f}')


def timed(work):
  """Calls work() and waits for the arrays that it returns. Returns (seconds, result)."""
  start = time.perf_counter()
  result = jax.block_until_ready(work())
  return time.perf_counter() - start, result


if __name__ == '__main__':
  main()
