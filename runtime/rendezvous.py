"""The processes of a job come together before JAX starts, and are watched until it has started.

Each sends one line of JSON to process 0, on the coordinator's own port, and gets one: the verdict for all. Who doesn't
come in time is named, and so is who comes with something else. The connections stay open until JAX is up: it would wait
for a process that dies meanwhile, for minutes, and then abort.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from betarank.configs.errors import UserError

LOST = 3  # exit status of a process that ends because of another one; the same command goes on


class HostError(UserError):
  """The processes don't make one job. One line that names the process."""


class Place(NamedTuple):
  """Where this process stands in its job."""

  coordinator: str  # HOST:PORT of process 0; '' in a job of one
  processes: int
  index: int
  local_devices: list[int] | None


class _Line:
  """A connection to another process, which carries lines of text."""

  def __init__(self, connection: socket.socket):
    self._socket, self._reader = connection, connection.makefile('r', encoding='utf-8')

  def say(self, text: str) -> None:
    self._socket.sendall(f'{text}\n'.encode())

  def hear(self, timeout_s: float) -> str:
    """The next line; '' if there will be none. Raises OSError, TimeoutError among them."""
    self._socket.settimeout(timeout_s)
    return self._reader.readline(1 << 20)

  def close(self) -> None:
    with contextlib.suppress(OSError):
      self._socket.shutdown(socket.SHUT_RDWR)  # who listens here hears the end
    self._socket.close()


def rendezvous(place: Place, facts: Mapping[str, Any], deadline_s: float, refused: str = ''
              ) -> tuple[list[str], dict[int, _Line]]:
  """Returns 'process I of N (HOST, pid P)' for every process once all have come with the same facts; and open lines,
  process 0's to all, the others' to process 0.

  refused: process 0's reason not to start. Raises HostError, the same one everywhere.
  """
  mine = {'index': place.index, 'host': socket.gethostname(), 'pid': os.getpid(),
          'facts': {'--processes': place.processes, **facts}}
  host, _, port = place.coordinator.rpartition(':')
  until = time.monotonic() + deadline_s
  verdict, lines = _preside(mine, place.processes, int(port), until, refused) if place.index == 0 else _attend(
    mine, host.strip('[]'), int(port), until)
  if verdict['error']:
    for line in lines.values():
      line.close()
    raise HostError(verdict['error'])
  return verdict['names'], lines


def _preside(mine: dict[str, Any], processes: int, port: int, until: float, error: str
             ) -> tuple[dict[str, Any], dict[int, _Line]]:
  came, lines = {0: mine}, []
  name = lambda entry: f'process {entry["index"]} of {processes} ({entry["host"]}, pid {entry["pid"]})'
  family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
  try:
    server = socket.create_server(('', port), family=family, dualstack_ipv6=family == socket.AF_INET6)
  except OSError as problem:
    raise HostError(f'--coordinator: process 0 can\'t listen on port {port} ({problem.strerror})') from None
  with server:
    while len(came) < processes and (left := until - time.monotonic()) > 0:
      server.settimeout(left)
      try:
        line = _Line(server.accept()[0])
        entry = json.loads(line.hear(5))
        index = entry['index']
      except (OSError, ValueError, KeyError, TypeError):
        continue  # not one of ours, or too late
      lines.append((index, line))
      if index in came:
        error = error or f'{name(came[index])} and {name(entry)} have the same --process_id'
        break
      came[index] = entry
    missing = [str(i) for i in range(processes) if i not in came]
    if missing and not error:
      error = (f'process {", ".join(missing)} of {processes} did not come; there are '
               + ', '.join(f'{i} on {came[i]["host"]}' for i in sorted(came)))
    for _, entry in sorted(came.items()):
      for key in sorted(mine['facts'].keys() | entry['facts'].keys()):
        ours, theirs = mine['facts'].get(key), entry['facts'].get(key)
        if ours != theirs and not error:
          error = f'{name(entry)} has {key} = {theirs!r}, {name(mine)} {ours!r}; start all with the same'
    verdict = {'error': error, 'names': [name(came[i]) for i in sorted(came)]}
    for _, line in lines:
      with contextlib.suppress(OSError):
        line.say(json.dumps(verdict))
  return verdict, dict(lines)


def _attend(mine: dict[str, Any], host: str, port: int, until: float) -> tuple[dict[str, Any], dict[int, _Line]]:
  why = 'it did not answer'
  while (left := until - time.monotonic()) > 0:
    try:
      line = _Line(socket.create_connection((host, port), timeout=min(left, 10)))
      line.say(json.dumps(mine))
      if answer := line.hear(left + 10):  # process 0 waits for the others as long
        return json.loads(answer), {0: line}
    except (OSError, ValueError) as error:
      why = str(error)
    time.sleep(0.2)
  raise HostError(f'process 0 of {mine["facts"]["--processes"]} could not be reached at {host}:{port} ({why})')


class Vigil:
  """Watches over the processes while JAX starts. Who dies closes its line, who hangs says nothing for the deadline:
  process 0 tells the others, and all end. Leaving the block says that here JAX is up, or why it isn't."""

  def __init__(self, place: Place, names: list[str], lines: Mapping[int, _Line], deadline_s: float):
    self._place, self._names, self._lines, self._deadline_s = place, names, lines, deadline_s
    self._up, self._ending = threading.Event(), threading.Lock()

  def __enter__(self):
    for index, line in self._lines.items():
      threading.Thread(target=self._listen, args=(index, line), name=f'vigil {index}', daemon=True).start()
    threading.Thread(target=self._beat, name='vigil', daemon=True).start()
    return self

  def __exit__(self, _, error: BaseException | None, __):
    self._up.set()
    self._tell('up' if error is None else f'{self._names[self._place.index]} ended while JAX started: {error}')
    for line in self._lines.values():
      line.close()

  def _tell(self, text: str) -> None:
    for line in self._lines.values():
      with contextlib.suppress(OSError):
        line.say(' '.join(text.split()))

  def _beat(self) -> None:
    while not self._up.wait(min(2.0, self._deadline_s / 5)):
      self._tell('starting')

  def _listen(self, index: int, line: _Line) -> None:
    try:
      while (said := line.hear(self._deadline_s).strip()) == 'starting':
        pass
    except TimeoutError:
      said = f'{self._names[index]} gave no sign of life for {self._deadline_s:.0f} s while JAX started'
    except OSError:
      said = ''
    if said != 'up' and not self._up.is_set() and self._ending.acquire(blocking=False):
      text = said or f'{self._names[index]} died while JAX started'
      print(f'error: {text}; start all again', file=sys.stderr, flush=True)
      self._tell(text)
      os._exit(LOST)
