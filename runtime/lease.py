"""Reserves a folder in a bucket for one command, as a lock file does on a disk.

    with hold('gs://bucket/run', '.lease') as holder:
      ...  # holder is '' if this process has the lease, else a text that names the process that has it

The lease is a small object in the bucket that names its process. It is created only if it doesn't exist, and replaced
only if no other process has replaced it. The store checks both conditions, so two commands never hold the same lease.
The process renews its lease every RENEW_S seconds, and deletes it at the end.

A command that finds a lease waits for a renewal. It doesn't compare clocks. If no renewal comes within STALE_S seconds,
the command takes the lease over. It doesn't wait if the lease names a process of its own machine, because it can check
whether this process is alive.

A process that was suspended, or had no connection, may lose its lease while it still runs. It notices the loss at its
next renewal, and ends. Until then, it may have written to the folder.
"""

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from betarank.configs.errors import STORE_ERRORS, UserError, one_line, print_if_possible
from betarank.configs.files import from_json
from betarank.runtime.rendezvous import EXIT_JOB_LOST

RENEW_S = 15.0
STALE_S = 60.0  # four renewals
SCHEMES = ('gs', 's3')  # whose conditional writes TensorStore knows
_RETRIES = {'max_retries': 6, 'initial_delay': '500ms', 'max_delay': '16s'}  # about half a minute in all


@contextlib.contextmanager
def hold(folder: str, name: str) -> Iterator[str]:
  """Takes the lease FOLDER/NAME and keeps it until the block ends.

  Yields '' if this process has the lease, otherwise a text that names the process that has it. If the folder isn't in
  gs:// or s3://, yields '' without a lease.

  Raises:
    UserError: the lease can't be read or written.
  """
  if folder.partition('://')[0] not in SCHEMES:
    yield ''
    return
  lease = _Lease(folder, name)
  if holder := lease.take():
    yield holder
    return
  ended = threading.Event()
  renewing = threading.Thread(target=lease.renew, args=(ended,), name='lease', daemon=True)
  renewing.start()
  try:
    yield ''
  finally:
    ended.set()
    renewing.join(RENEW_S)  # a renewal may be on its way
    lease.release()


class _Lease:

  def __init__(self, folder: str, name: str):
    import tensorstore

    self._path, self._name = f'{folder}/{name}', name
    retries = {f'{scheme}_request_retries': _RETRIES for scheme in ('gcs', 's3')}
    with self._store_errors_as_user_errors():
      self._store = tensorstore.KvStore.open(f'{folder.rstrip("/")}/', context=tensorstore.Context(retries)).result()
    self._content = {'holder': f'process {os.getpid()} on {socket.gethostname()}', 'id': uuid.uuid4().hex,
                     **_process(os.getpid())}
    self._generation = b''  # of the object that this process has written

  def take(self) -> str:
    """Takes the lease if no other process has it. Returns '' on success, otherwise a text that names the holder."""
    with self._store_errors_as_user_errors():
      waited_for, since = b'', time.monotonic()  # the generation whose renewal is waited for
      while True:
        found, generation = self._read()
        if waited_for and found and generation != waited_for:
          return found['holder']
        if found is None or _is_gone(found) or time.monotonic() - since >= STALE_S:
          if self._write(self._content, generation) or self._is_own():
            return ''
          waited_for, since = b'', time.monotonic()  # another command was faster
        elif found['place'] and found['place'] == self._content['place']:
          return found['holder']
        else:
          if not waited_for:
            print_if_possible(f'{self._path} is held by {found["holder"]}; waiting {STALE_S:.0f} s to see whether it '
                              'still runs')
          waited_for = generation
          time.sleep(RENEW_S / 3)

  def renew(self, ended: threading.Event) -> None:
    """Renews the lease until `ended` is set. Ends this process if another process has taken the lease."""
    while not ended.wait(RENEW_S):
      with contextlib.suppress(*STORE_ERRORS):  # the store is away; the command notices it too
        # A renewal may be refused because the answer to an earlier one was lost, or because the lease was deleted.
        if self._write(self._content, self._generation) or self._is_own() or ended.is_set():
          continue
        found, generation = self._read()
        if found:
          print_if_possible(f'error: {self._path}: {found["holder"]} has taken over, because this process did not '
                            f'renew it for {STALE_S:.0f} s; it ends without saving')
          os._exit(EXIT_JOB_LOST)
        self._write(self._content, generation)

  def release(self) -> None:
    """Deletes the lease, unless another process has taken it."""
    with contextlib.suppress(*STORE_ERRORS):
      if not self._write(None, self._generation) and self._is_own():  # the answer to the last renewal was lost
        self._write(None, self._generation)

  def _write(self, content: dict[str, Any] | None, generation: bytes) -> bool:
    """Writes `content` to the lease's object; None deletes the object. Returns False if the store has refused.

    A generation is the store's number for one version of an object. The store refuses if the object's generation isn't
    `generation`, because the object has then been changed: by another process, or by a write of this process whose
    answer was lost.
    """
    data = None if content is None else json.dumps(content)
    stamp = self._store.write(self._name, data, if_equal=generation).result()
    self._generation = stamp.generation or self._generation
    return bool(stamp.generation)

  def _is_own(self) -> bool:
    """Returns True if the object in the store is this process's lease.

    Also stores the object's generation for the next write. Call this after `_write` has returned False: the write may
    have succeeded although the store's answer was lost.
    """
    found, generation = self._read()
    if found is None or found['id'] != self._content['id']:
      return False
    self._generation = generation
    return True

  def _read(self) -> tuple[dict[str, Any] | None, bytes]:
    """Returns (content, generation) of the lease's object. The content is None if there is no object."""
    found = self._store.read(self._name).result()
    if found.state == 'missing':
      return None, found.stamp.generation
    unknown = {'holder': 'an unknown process', 'id': '', 'place': '', 'pid': 0, 'start': ''}
    try:
      content = from_json(found.value)
      return {key: type(value)(content[key]) for key, value in unknown.items()}, found.stamp.generation
    except (ValueError, TypeError, KeyError):  # no lease of this version
      return unknown, found.stamp.generation

  @contextlib.contextmanager
  def _store_errors_as_user_errors(self) -> Iterator[None]:
    try:
      yield
    except UserError:
      raise
    except STORE_ERRORS as error:
      raise UserError(f'{self._path}: can\'t be read or written ({one_line(error)[:300]}); check the bucket and your '
                      'access to it') from None


def _process(pid: int) -> dict[str, Any]:
  """Returns values that identify a process of this machine: {'place', 'pid', 'start'}.

  place: a text that identifies the machine, its last boot, and the container (PID namespace); '' if unknown, as on
    systems other than Linux.
  start: when the process started, in clock ticks after the boot; '' if there is no such process.
  """
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()
    place = f'{boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return {'place': '', 'pid': pid, 'start': ''}
  try:
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text(encoding='utf-8', errors='replace')
    state, *fields = stat.rpartition(')')[2].split()
    start = '' if state in 'ZX' else fields[18]
  except OSError:
    start = ''
  return {'place': place, 'pid': pid, 'start': start}


def _is_gone(lease: dict[str, Any]) -> bool:
  """Returns True if it is certain that the process of a lease has ended.

  lease: the content of the lease's object.
  """
  now = _process(lease['pid'])
  return bool(now['place']) and lease['place'] == now['place'] and lease['start'] != now['start']
