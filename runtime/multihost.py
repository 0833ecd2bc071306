"""Handles the data of a job of several processes: which rows each process reads, how global arrays are built, and how
processes exchange data.

# B rows  T tokens
"""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding


def row_share(sharding: NamedSharding, rows: int, length: int, mesh_key: str = 'train.mesh') -> tuple[int, int]:
  """Returns (index, count): this process reads part `index` of `count` equal parts of the global batch's rows.

  Processes whose devices hold the same rows get the same index, for example if the tensor axis spans processes.

  Args:
    sharding: the sharding of the global batch.
    rows, length: the shape of the global batch.
    mesh_key: the config key of the mesh, for the error.

  Raises:
    ValueError: the rows of this process don't form such a part. The message begins with `mesh_key`.
  """
  slices = [s[0].indices(rows)[:2] for s in sharding.addressable_devices_indices_map((rows, length)).values()]
  start, stop = min(s[0] for s in slices), max(s[1] for s in slices)
  share = stop - start
  if sum(b - a for a, b in set(slices)) != share or rows % share or start % share:
    raise ValueError(f'{mesh_key}: a process would read rows that are not one even part of the batch')
  return start // share, rows // share


def local_to_global(local, sharding: NamedSharding, rows: int):
  """Returns a global batch, a tree of arrays [rows, T], built from the rows that each process has read.

  T is the number of tokens per row.

  local: the rows of this process, as a tree of arrays [rows of this process, T].
  sharding: the sharding of the result.
  """
  build = lambda x_BT: jax.make_array_from_process_local_data(sharding, np.asarray(x_BT), (rows, x_BT.shape[1]))
  return jax.tree.map(build, local)


def rows_of_process(sharding: NamedSharding, rows: int, length: int) -> slice:
  """Returns the rows of an array [rows, length] that this process's devices need, as one slice.

  If the devices hold several ranges of rows, the slice goes from the first row to the last.
  """
  slices = [s[0].indices(rows)[:2] for s in sharding.addressable_devices_indices_map((rows, length)).values()]
  return slice(min(s[0] for s in slices), max(s[1] for s in slices))


def rows_to_global(local, sharding: NamedSharding, first: int, rows: int):
  """Returns a tree of global arrays [rows, ...], built from the rows of each process.

  local: a tree of arrays with the rows in the range that `rows_of_process` returns.
  sharding: the sharding of the result.
  first: the start of this range.
  """
  def build(x):
    own = lambda index: x[(slice(*(n - first for n in index[0].indices(rows)[:2])), *index[1:])]
    return jax.make_array_from_callback((rows, *x.shape[1:]), sharding, own)

  return jax.tree.map(build, local)


def index_and_count() -> tuple[int, int]:
  """Returns (index of this process, number of processes).

  In a job of one process, JAX's backend isn't initialized by this.
  """
  return (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)


def first_message(text: str) -> str:
  """Returns the text of the first process whose `text` isn't empty; '' if all are empty. Every process must call this.
  """
  if index_and_count()[1] == 1:
    return text
  text_PC = multihost_utils.process_allgather(np.frombuffer(text.encode()[:500].ljust(500), np.uint8))
  return next((line for text_C in text_PC if (line := text_C.tobytes().decode(errors='replace').strip())), '')


def max_over_processes(x: np.ndarray) -> np.ndarray:
  """Returns the elementwise maximum of the arrays of all processes.

  Every process must call this with an array of the same shape and dtype.
  """
  return x if jax.process_count() == 1 else multihost_utils.process_allgather(x).max(0)


def of_first_process(x: np.ndarray) -> np.ndarray:
  """Returns the array `x` of process 0, in every process.

  Every process must call this with an array of the same shape and dtype.
  """
  return x if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(x))


def wait_for_all(what: str) -> None:
  """Waits until every process has called this function.

  what: a name for the place of the call. If processes wait at different places, JAX raises an error that has this name.
  """
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)
