"""python -m tests.faults.saves FOLDER SEED COUNT: saves checkpoints to a faulty bucket, and reads them back.

Each trial saves three states, maybe with an error, while the faults of its seed last. Afterwards every complete
checkpoint must be what was saved as this step, none that was reported as written may be missing, and a restart saves
the rest. Everything is in one process, so a trial takes seconds. Prints a line for each trial in which a fault hit a
request.
"""

import random
import sys
import threading

import fsspec
import jax
import numpy as np
from etils import epath
from etils.epath import backend

from betarank.configs import buckets
from betarank.runtime import checkpoint, integrity
from betarank.runtime.checkpoint import CheckpointError, Checkpoints
from betarank.runtime.state import abstract_state, create_state
from tests.bucket import Bucket
from tests.runtime.test_checkpoint import KEEP, TX, C, mesh_of

FAULTS = ({'latency_s': 0.02}, {'error_rate': 0.2}, {'truncate_rate': 0.3}, {'lost_rate': 0.2},
          {'error_rate': 0.2, 'error_statuses': [500, 502, 504]}, {'lost_rate': 0.1, 'error_rate': 0.1},
          {'objects_only': 1}, {'error_rate': 1.0}, {'error_rate': 1.0, 'error_statuses': [403]},
          {'error_rate': 1.0, 'error_statuses': [401]})


def main():
  folder, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
  (epath.Path(folder) / 'bucket').mkdir(parents=True)
  mesh = mesh_of((1, 1, 1, 1, 1))
  first = create_state(C, TX, mesh, seed=seed)
  states = {step: jax.tree.map(lambda x, step=step: x + x.dtype.type(step), first) for step in (1, 2, 3)}
  states = {step: jax.device_get(state) for step, state in states.items()}
  placed = {step: jax.tree.map(lambda x, of: jax.device_put(x, of.sharding), state, first)
            for step, state in states.items()}
  with Bucket(folder, seed=seed) as bucket:
    for protocol in ('gs', 'gcs'):
      fsspec.register_implementation(protocol, buckets.GoogleFiles, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    for number in range(count):
      trial(bucket, f'gs://bucket/{number}', random.Random(f'{seed} {number}'), placed, states,
            abstract_state(C, TX, mesh))


def trial(bucket, workdir, rng, placed, states, target):
  faults, ends_s = rng.choice(FAULTS), rng.uniform(0.2, 3.0)
  struck = bucket.struck
  timers = [threading.Timer(rng.uniform(0.0, 0.8), lambda: bucket.disturb(**faults))]
  timers.append(threading.Timer(timers[0].interval + ends_s, bucket.disturb))
  for timer in timers:
    timer.start()
  written, problem = [], ''
  try:
    checkpoints = Checkpoints(workdir, KEEP)
    for step in (1, 2, 3):
      checkpoints.save(placed[step], {'config': {}, 'cursor': step}, step)
      checkpoints.wait()
      written.append(step)
    checkpoints.close()
  except (CheckpointError, OSError) as error:
    problem = str(error)
    assert '\n' not in problem and 'gs://bucket' in problem, problem
  for timer in timers:
    timer.join()
  folder = epath.Path(workdir) / 'checkpoints'
  found = checkpoint.steps(folder)
  assert set(written[-KEEP.keep:]) <= set(found), (written, found)
  check(folder, found, target, states)
  checkpoints = Checkpoints(workdir, KEEP)
  for step in range((checkpoints.latest or 0) + 1, 4):
    checkpoints.save(placed[step], {'config': {}, 'cursor': step}, step)
  checkpoints.close()
  assert checkpoint.steps(folder) == [2, 3], checkpoint.steps(folder)
  check(folder, [2, 3], target, states)
  if bucket.struck > struck:
    print(f'{" ".join(map(str, faults))}, {"one line, resumed" if problem else "survived"}', flush=True)


def check(folder, steps, target, states):
  for step in steps:
    assert not integrity.damage(folder / str(step), full=True)
    state, meta = checkpoint.restore(folder / str(step), target)
    assert meta['step'] == meta['cursor'] == step
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), states[step])


if __name__ == '__main__':
  main()
