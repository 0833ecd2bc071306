"""Several processes as one machine: joining, and which rows of a batch each has to read.

# B rows  T tokens
"""

import signal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from betarank.runtime import job


def join(coordinator: str, processes: int, process_id: int) -> None:
  """Joins `processes` into one; '' is a job of one, 'auto' asks the environment. Nothing watches over them.

  Must come before anything else touches a device. Training joins through train/job.py, which names who is missing.
  """
  job.initialize(job.locate(coordinator, processes, process_id), deadline_s=100)


def row_share(sharding: NamedSharding, rows: int, length: int) -> tuple[int, int]:
  """(index, count): this process reads part `index` of `count` equal contiguous parts of the global batch.

  Processes whose devices hold the same rows (tensor axis across hosts) have the same index. Raises ValueError
  if the mesh doesn't divide the rows.
  """
  slices = [s[0].indices(rows)[:2] for s in sharding.addressable_devices_indices_map((rows, length)).values()]
  start, stop = min(s[0] for s in slices), max(s[1] for s in slices)
  share = stop - start
  if sum(b - a for a, b in set(slices)) != share or rows % share or start % share:
    raise ValueError('train.mesh: a process would read rows that are not one even part of the batch')
  return start // share, rows // share


def check_rows(rows: int, mesh_shape, microbatches: int) -> None:
  """Raises ValueError if a (micro)batch of rows can't be split over the mesh's data axes."""
  ways = mesh_shape['data'] * mesh_shape['fsdp'] * mesh_shape['expert']
  if rows % (ways * microbatches):
    raise ValueError(f'train.batch_size must be a multiple of data x fsdp x expert x microbatches = '
                     f'{mesh_shape["data"]} x {mesh_shape["fsdp"]} x {mesh_shape["expert"]} x {microbatches}, '
                     f'got {rows}')


def local_to_global(local, sharding: NamedSharding, rows: int):
  """A batch of this process's rows as arrays of the whole batch, on the devices."""
  place = lambda x_BT: jax.make_array_from_process_local_data(sharding, np.asarray(x_BT), (rows, x_BT.shape[1]))
  return jax.tree.map(place, local)


def replicated_to_global(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """An array that every process holds, as one over the devices of all."""
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def max_over_processes(x: np.ndarray) -> np.ndarray:
  """Element by element the largest value that a process brings; every process must call."""
  return x if jax.process_count() == 1 else multihost_utils.process_allgather(x).max(0)


class StopSignal:
  """Whether somebody has asked the job to end (SIGTERM, a maintenance notice), answered alike by all processes."""

  def __init__(self):
    self._asked = False
    if jax.process_count() == 1:  # otherwise JAX's own handler has to see it, to tell the others
      signal.signal(signal.SIGTERM, self._ask)

  def _ask(self, *_):
    self._asked = True

  def __call__(self, step: int) -> bool:
    job.note_step(step)
    if jax.process_count() == 1:
      return self._asked
    return multihost_utils.reached_preemption_sync_point(step)
