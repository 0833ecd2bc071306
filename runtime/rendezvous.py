"""Brings the processes of a job together before JAX starts, and watches them until JAX has started.

Every process connects to process 0, on the coordinator's port, and sends its fingerprint as one line of JSON. Process 0
sends the same answer to all processes. The answer is the names of the processes, or an error that ends all of them. The
error names a process that didn't connect in time, or a process whose code, config or data differ.

The connections stay open until JAX has started, so that the death of a process is noticed at once. JAX alone would wait
for minutes and then abort.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from betarank.configs.errors import UserError, print_if_possible

EXIT_JOB_LOST = 3  # exit status if the job can't continue although its settings are valid; the same command resumes it


class JobError(UserError):
  """Raised if the processes can't form one job. The message is one line that names the process at fault."""


class ProcessInfo(NamedTuple):
  """The position of this process in its job.

  Attributes:
    coordinator: HOST:PORT of process 0; '' in a job of one process.
    processes: the number of processes.
    index: the number of this process, from 0.
    local_devices: the ids of the devices that this process uses; None for all devices that it finds.
  """

  coordinator: str
  processes: int
  index: int
  local_devices: list[int] | None


class _Connection:
  """A socket that sends and receives lines of text."""

  def __init__(self, connection: socket.socket):
    self._socket, self._reader = connection, connection.makefile('r', encoding='utf-8')

  def send(self, text: str) -> None:
    self._socket.sendall(f'{text}\n'.encode())

  def receive(self, timeout_s: float) -> str:
    """Returns the next line, or '' if the other process has closed the connection.

    Raises:
      TimeoutError: no line came within `timeout_s` seconds.
      OSError: the connection failed.
    """
    self._socket.settimeout(timeout_s)
    return self._reader.readline(1 << 20)

  def is_open(self) -> bool:
    """Returns False if the other process has closed the connection, or has ended."""
    timeout_s = self._socket.gettimeout()
    self._socket.settimeout(0)
    try:
      return bool(self._socket.recv(1, socket.MSG_PEEK))
    except BlockingIOError:  # nothing to receive
      return True
    except OSError:
      return False
    finally:
      self._socket.settimeout(timeout_s)

  def close(self) -> None:
    with contextlib.suppress(OSError):
      self._socket.shutdown(socket.SHUT_RDWR)  # ends a `receive` in another thread
    self._socket.close()


def rendezvous(info: ProcessInfo, fingerprint: Mapping[str, Any], deadline_s: float, refused: str = ''
               ) -> tuple[list[str], dict[int, _Connection]]:
  """Waits until all processes of the job have connected with the same fingerprint.

  Args:
    info: the position of this process in the job.
    fingerprint: values that must be equal in all processes.
    deadline_s: the seconds within which all processes must connect.
    refused: the reason why process 0 can't start; '' if it can start. With a reason, all processes end.

  Returns:
    (names, connections). names are the names of all processes, such as 'process 1 of 4 (HOST, pid 1234)'. connections
    are {process index: open connection}. Process 0 has a connection to every other process. Each other process has only
    a connection to process 0.

  Raises:
    JobError: the processes can't form a job. All processes that reached process 0 raise the same message.
  """
  own = {'index': info.index, 'host': socket.gethostname(), 'pid': os.getpid(),
         'fingerprint': {'--processes': info.processes, **fingerprint}}
  host, _, port = info.coordinator.rpartition(':')
  if info.index == 0:
    answer, connections = _coordinate(own, info.processes, int(port), deadline_s, refused)
  else:
    answer, connections = _register(own, host.strip('[]'), int(port), deadline_s)
  if answer['error']:
    for connection in connections.values():
      connection.close()
    raise JobError(answer['error'])
  return answer['names'], connections


def _coordinate(own: dict[str, Any], processes: int, port: int, deadline_s: float, error: str
                ) -> tuple[dict[str, Any], dict[int, _Connection]]:
  """Collects the entries of all processes, and sends the answer to each process that connected. Runs in process 0.

  Args:
    own: the entry of process 0. An entry holds the index, host, pid and fingerprint of a process.
    processes: the number of processes.
    port: the port to listen on.
    deadline_s: the seconds within which all processes must connect.
    error: the reason why process 0 can't start; '' if it can start.

  Returns (answer, {process index: connection}). The answer is {'error': text or '', 'names': [name of each process]}.
  """
  until = time.monotonic() + deadline_s
  entries, connections = {0: own}, []
  name = lambda entry: f'process {entry["index"]} of {processes} ({entry["host"]}, pid {entry["pid"]})'
  family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
  try:
    server = socket.create_server(('', port), family=family, dualstack_ipv6=family == socket.AF_INET6)
  except OSError as problem:
    raise JobError(f'--coordinator: process 0 can\'t listen on port {port} ({problem.strerror})') from None
  with server:
    while len(entries) < processes and (left := until - time.monotonic()) > 0:
      server.settimeout(left)
      try:
        connection = _Connection(server.accept()[0])
        entry = json.loads(connection.receive(5))
        index = entry['index']
      except (OSError, ValueError, KeyError, TypeError, RecursionError):
        continue  # another program connected, or no process did before the deadline
      for pair in [pair for pair in connections if not pair[1].is_open()]:  # it died, and may be started again
        pair[1].close()
        connections.remove(pair)
        del entries[pair[0]]
      connections.append((index, connection))
      if index in entries:
        error = error or f'{name(entries[index])} and {name(entry)} have the same --process_id'
        break
      entries[index] = entry
    missing = [str(i) for i in range(processes) if i not in entries]
    if missing and not error:
      error = (f'process {", ".join(missing)} of {processes} did not come within {deadline_s:.0f} s; there are '
               + ', '.join(f'{i} on {entries[i]["host"]}' for i in sorted(entries)))
    for _, entry in sorted(entries.items()):
      for key in sorted(own['fingerprint'].keys() | entry['fingerprint'].keys()):
        ours, theirs = own['fingerprint'].get(key), entry['fingerprint'].get(key)
        if ours != theirs and not error:
          error = f'{name(entry)} has {key} = {theirs!r}, {name(own)} {ours!r}; start all with the same'
    answer = {'error': error, 'names': [name(entries[i]) for i in sorted(entries)]}
    for _, connection in connections:
      with contextlib.suppress(OSError):
        connection.send(json.dumps(answer))
  return answer, dict(connections)


def _register(own: dict[str, Any], host: str, port: int, deadline_s: float
              ) -> tuple[dict[str, Any], dict[int, _Connection]]:
  """Sends this process's entry to process 0, and waits for the answer. Runs in every process except process 0.

  Returns (answer, {0: the connection}). Entry and answer are described at `_coordinate`.

  own: the entry of this process.
  host, port: the address of process 0.
  deadline_s: the seconds within which process 0 must be reached. Its answer may arrive about 10 seconds after that, or
    20 seconds if connecting takes long.

  Raises:
    JobError: process 0 couldn't be reached, or didn't answer.
  """
  until, reason = time.monotonic() + deadline_s, 'it did not answer'
  while (left := until - time.monotonic()) > 0:
    try:
      connection = _Connection(socket.create_connection((host, port), timeout=min(left, 10)))
      connection.send(json.dumps(own))
      if answer := connection.receive(left + 10):  # process 0 waits for the others until the same deadline
        return json.loads(answer), {0: connection}
    except (OSError, ValueError) as error:
      reason = str(error)
    time.sleep(0.2)
  raise JobError(f'process 0 of {own["fingerprint"]["--processes"]} could not be reached at {host}:{port} within '
                 f'{deadline_s:.0f} s ({reason})')


class StartupWatchdog:
  """A context manager around the start of JAX. It ends this process if another process dies or hangs during the start.

  A process counts as dead if its connection closes, and as hung if it sends nothing for `deadline_s` seconds. If
  process 0 notices this, it tells all other processes. At the end of the block, this process sends a message over its
  connections: that JAX has started here, or the error that prevented it.
  """

  def __init__(self, info: ProcessInfo, names: list[str], connections: Mapping[int, _Connection], deadline_s: float):
    self._info, self._names, self._connections, self._deadline_s = info, names, connections, deadline_s
    self._started, self._ending = threading.Event(), threading.Lock()

  def __enter__(self):
    for index, connection in self._connections.items():
      threading.Thread(target=self._listen, args=(index, connection), name=f'startup {index}', daemon=True).start()
    threading.Thread(target=self._send_heartbeats, name='startup', daemon=True).start()
    return self

  def __exit__(self, _, error: BaseException | None, __):
    self._started.set()
    self._send('started' if error is None else f'{self._names[self._info.index]} ended while JAX started: {error}')
    for connection in self._connections.values():
      connection.close()

  def _send(self, text: str) -> None:
    for connection in self._connections.values():
      with contextlib.suppress(OSError):
        connection.send(' '.join(text.split()))

  def _send_heartbeats(self) -> None:
    while not self._started.wait(min(2.0, self._deadline_s / 5)):
      self._send('starting')

  def _listen(self, index: int, connection: _Connection) -> None:
    try:
      while (message := connection.receive(self._deadline_s).strip()) == 'starting':
        pass
    except TimeoutError:
      message = (f'{self._names[index]} sent no heartbeat for {self._deadline_s:.0f} s (--host_deadline_s) while JAX '
                 'started')
    except OSError:
      message = ''
    if message != 'started' and not self._started.is_set() and self._ending.acquire(blocking=False):
      reason = message or f'{self._names[index]} died while JAX started'
      print_if_possible(f'error: {reason}; start all again')
      self._send(reason)
      os._exit(EXIT_JOB_LOST)
