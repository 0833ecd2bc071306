"""Several processes as one machine: joining, and which rows of a batch each has to read.

# B rows  T tokens
"""

import signal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding


def join(coordinator: str, processes: int, process_id: int) -> None:
  """Joins `processes` into one job; '' is a job of one, 'auto' asks the environment (TPU VMs, Slurm).

  CPU processes talk through gloo. Must come before anything else touches a device.
  """
  if not coordinator:
    return
  if coordinator == 'auto':
    jax.distributed.initialize()
    return
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(coordinator, processes, process_id)


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
  ways = mesh_shape['data'] * mesh_shape['fsdp']
  if rows % (ways * microbatches):
    raise ValueError(f'train.batch_size must be a multiple of data x fsdp x microbatches = '
                     f'{mesh_shape["data"]} x {mesh_shape["fsdp"]} x {microbatches}, got {rows}')


def to_global(local, sharding: NamedSharding, rows: int):
  """A batch of this process's rows as arrays of the whole batch, on the devices."""
  place = lambda x_BT: jax.make_array_from_process_local_data(sharding, np.asarray(x_BT), (rows, x_BT.shape[1]))
  return jax.tree.map(place, local)


class StopSignal:
  """Whether somebody has asked the job to end (SIGTERM, a maintenance notice), answered alike by all processes."""

  def __init__(self):
    self._asked = False
    if jax.process_count() == 1:  # otherwise JAX's own handler has to see it, to tell the others
      signal.signal(signal.SIGTERM, self._ask)

  def _ask(self, *_):
    self._asked = True

  def __call__(self, step: int) -> bool:
    if jax.process_count() == 1:
      return self._asked
    return multihost_utils.reached_preemption_sync_point(step)
