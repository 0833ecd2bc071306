"""Joins several processes into one job. Either all of them start or none does. If one fails, all of them end and name
the reason.

Before JAX starts, the processes compare what they are about to run (rendezvous.py). While the job runs, they watch each
other (watchdog.py). A job of one process has no rendezvous, but its watchdog ends it if it hangs.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import IO, Any

import jax
from etils import epath
from ml_collections import ConfigDict

from betarank.configs.errors import UserError
from betarank.configs.files import open_no_follow
from betarank.configs.load import flatten, to_json
from betarank.runtime import workdir
from betarank.runtime.rendezvous import JobError, ProcessInfo, StartupWatchdog, rendezvous
from betarank.runtime.watchdog import JobWatchdog, Watchdog

RENDEZVOUS_S = 300.0  # the time within which all processes must connect
_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)

_watchdog: Watchdog | None = None


def locate(coordinator: str, processes: int, index: int) -> ProcessInfo:
  """Returns the position of this process in its job.

  Args:
    coordinator: HOST:PORT of process 0. 'auto' reads the position from the environment of a TPU VM, GKE, Slurm or Open
      MPI, and ignores the other arguments. '' means a job of one process.
    processes: the number of processes.
    index: the number of this process, from 0.

  Raises:
    JobError: 'auto' found no such environment, or the arguments are invalid.
  """
  if coordinator == 'auto':
    from jax._src import clusters  # used by jax.distributed.initialize(); there is no public function
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      None, None, None, None, None, int(RENDEZVOUS_S))
    if None in found[:3]:
      raise JobError('--coordinator=auto: this is no TPU VM, Slurm or MPI job; give HOST:PORT, --processes and '
                     '--process_id')
    return ProcessInfo(*found)
  if not coordinator:
    if processes != 1 or index:
      raise JobError(f'--processes={processes} --process_id={index}: a job of several processes needs '
                     '--coordinator=HOST:PORT of process 0, or --coordinator=auto')
    return ProcessInfo('', 1, 0, None)
  if not coordinator.rpartition(':')[2].isdigit() or not 0 <= index < processes:
    raise JobError(f'--coordinator={coordinator} --processes={processes} --process_id={index}: needs HOST:PORT, and '
                   f'a process_id from 0 to {processes - 1}')
  return ProcessInfo(coordinator, processes, index, None)


def initialize(info: ProcessInfo, deadline_s: float) -> None:
  """Starts jax.distributed if the job has several processes. Must be called before JAX uses a device.

  Processes on CPUs communicate with gloo.

  deadline_s: the watchdog's deadline for heartbeats, in seconds. JAX's own deadline is longer.
  """
  if info.processes == 1:
    return
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(
    info.coordinator, info.processes, info.index, info.local_devices, initialization_timeout=int(RENDEZVOUS_S),
    heartbeat_timeout_seconds=int(max(100, 3 * deadline_s)), shutdown_timeout_seconds=int(max(60, deadline_s)))


def join(coordinator: str, processes: int, index: int) -> None:
  """Joins a job without a rendezvous or a watchdog, as `betarank eval` does. Must be called before JAX uses a device.

  The arguments are those of `locate`.
  """
  initialize(locate(coordinator, processes, index), deadline_s=100)


@contextlib.contextmanager
def job(args: argparse.Namespace, config: ConfigDict, inputs: Mapping[str, str]) -> Iterator[None]:
  """Makes this process a part of its job until the block ends.

  All processes must have the same code, the same config, and the same content in the files of `inputs`. Process 0 locks
  args.workdir. If the block raises an error, the other processes end too, with the message of that error.

  Args:
    args: the flags of runtime/flags.py, which describe the job.
    config: the resolved config.
    inputs: {description: path} of each file to compare.

  Raises:
    UserError: another command is running in the workdir, or the workdir's disk refused a write in the block.
    JobError: a process is missing, or its code, config or files differ.
  """
  global _watchdog
  info = locate(args.coordinator, args.processes, args.process_id)
  root = epath.Path(args.workdir)
  with contextlib.ExitStack() as stack:
    refused = ''
    if info.index == 0:
      try:
        stack.enter_context(workdir.claim(root))
      except UserError as error:
        refused = str(error)
    if info.processes == 1:
      if refused:
        raise UserError(refused)
      _watchdog = Watchdog()
    else:
      names, connections = rendezvous(info, _job_fingerprint(config, args.workdir, inputs), RENDEZVOUS_S, refused)
      with StartupWatchdog(info, names, connections, args.host_deadline_s):  # which tells the others of an error
        log = _open_log(root, info.index)
        initialize(info, args.host_deadline_s)
      _watchdog = JobWatchdog(info, names, args.host_deadline_s, log)
    with _watchdog, _storage_errors_as_user_errors(args.workdir):
      yield


def note_step(step: int) -> None:
  """Tells the watchdog that this process has reached a step. Every training loop must call this after each step."""
  if _watchdog:
    _watchdog.note_step(step)


@contextlib.contextmanager
def _storage_errors_as_user_errors(path: str) -> Iterator[None]:
  """Converts an OSError that comes from storage, such as a full disk, to UserError. Other errors stay as they are."""
  try:
    yield
  except OSError as error:
    if error.errno not in _STORAGE_ERRORS:
      raise
    raise UserError(f'--workdir={path}: {error.strerror} ({error.filename or "while a log was written"}); the same '
                    'command resumes from the last checkpoint') from error


def _job_fingerprint(config: ConfigDict, path: str, inputs: Mapping[str, str]) -> dict[str, Any]:
  """Returns {name: value} for everything that must be equal in all processes.

  If a value differs, the error message shows its name and both values.

  The values are the code's version, JAX's version, the workdir, each setting, and a hash of each file of `inputs`.
  """
  digest = lambda file: hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.exists() else 'missing'
  return {
    'code': workdir.code_version(), 'jax': jax.__version__, '--workdir': path,
    **{f'config.{key}': value for key, value in flatten(json.loads(to_json(config))).items()},
    **{name: digest(epath.Path(file)) for name, file in inputs.items()},
  }


def _open_log(root: epath.Path, index: int) -> IO[str]:
  """Opens the log of a process: WORKDIR/hosts/INDEX.log, or standard error if the workdir is in a bucket.

  Raises:
    UserError: the log is a symbolic link.
  """
  if '://' in str(root):
    return sys.stderr
  (root / 'hosts').mkdir(parents=True, exist_ok=True)
  # It is never closed, because it is used until the end.
  return open_no_follow(root / 'hosts' / f'{index}.log', 'a', buffering=1, encoding='utf-8')
