"""python -m tests.soak.scale [--processes=64] [--delay_ms=0] [--documents=2000000]

Measures the start of a job of many hosts at its coordinator: the rendezvous with the fingerprint of a real run, and the
connections that watch the start of JAX. The processes are light: they have the code of runtime/rendezvous.py, but
neither JAX nor a model. With --delay_ms, everything between process 0 and the others arrives so much later, in both
directions. Then repeats the rendezvous with a process of other code, and with one that doesn't come. At last, as many
processes at once do what each host does with its data: hash the manifest, check the files, and read the lengths. Then
they start JAX, gather a value of each, and send each other heartbeats. If a process fails otherwise, the others are
killed, and the last line names it.
"""

import argparse
import asyncio
import json
import os
import pathlib
import sys
import tempfile
import threading
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from benchmarks import made_up_set
from betarank.configs import load
from betarank.data.packing import Packer
from betarank.data.prepared import Documents
from betarank.data.prepared import folder as data_folder
from betarank.runtime.job import _job_fingerprint, initialize
from betarank.runtime.rendezvous import ProcessInfo
from betarank.runtime.watchdog import JobWatchdog
from tests.runs import environment, free_port
from tests.soak import hosts

ROOT = pathlib.Path(__file__).resolve().parents[2]
# argv: PORT PROCESSES INDEX FINGERPRINT.json DEADLINE_S [KEY=VALUE]
LIGHT = '''
import json, sys, time
from betarank.runtime import rendezvous as r
sent = received = 0
class Counted(r._Connection):
  def send(self, text):
    global sent
    sent += len(text.encode()) + 1
    super().send(text)
  def receive(self, timeout_s):
    global received
    text = super().receive(timeout_s)
    received += len(text.encode())
    return text
r._Connection = Counted
port, processes, index, path, deadline_s, *other = sys.argv[1:]
info = r.ProcessInfo(f"127.0.0.1:{port}", int(processes), int(index), None)
fingerprint = json.load(open(path)) | dict(text.split("=") for text in other)
print("ready", flush=True)
sys.stdin.readline()
began = time.monotonic()
try:
  names, connections = r.rendezvous(info, fingerprint, float(deadline_s))
except r.JobError as error:
  print(json.dumps({"s": time.monotonic() - began, "error": str(error)}))
  sys.exit(3)
met, at = time.monotonic() - began, (sent, received)
with r.StartupWatchdog(info, names, connections, 10.0):
  time.sleep(5.0)  # as if JAX started
print(json.dumps({"s": met, "sent": at[0], "received": at[1], "sent later": sent - at[0],
                  "received later": received - at[1], "CPU s": time.process_time(),
                  "MB": int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024}))
'''


class Delay:
  """A proxy on this machine that passes everything on to a port, `delay_s` later in each direction.

  Attributes:
    port: the port of the proxy.
    bytes: the number of bytes that it has passed on, in both directions.
  """

  def __init__(self, port: int, delay_s: float):
    self.port, self._to, self._delay_s = free_port(), port, delay_s
    self.bytes = 0
    self._ready = threading.Event()
    threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()
    self._ready.wait()

  async def _serve(self) -> None:
    server = await asyncio.start_server(self._connect, '127.0.0.1', self.port, backlog=1024)
    self._ready.set()
    await server.serve_forever()

  async def _connect(self, reader, writer) -> None:
    await asyncio.sleep(self._delay_s)
    try:
      there = await asyncio.open_connection('127.0.0.1', self._to)
    except OSError:
      writer.close()
      return
    await asyncio.gather(self._pass_on(reader, there[1]), self._pass_on(there[0], writer))

  async def _pass_on(self, reader, writer) -> None:
    queue: asyncio.Queue = asyncio.Queue()

    async def write() -> None:
      while True:
        due, content = await queue.get()
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        if not content:
          writer.close()
          return
        writer.write(content)

    writing = asyncio.create_task(write())
    content = b'x'
    while content:
      try:
        content = await reader.read(1 << 16)
      except OSError:
        content = b''
      self.bytes += len(content)
      await queue.put((time.monotonic() + self._delay_s, content))
    await writing


def meet(processes: int, fingerprint: pathlib.Path, delay_s: float, deadline_s: float = 300.0, missing: int = -1,
         other: int = -1) -> dict[int, dict]:
  """Starts light processes, and returns what each of them printed, by index.

  missing: a process that doesn't come.
  other: a process with another version of the code.
  """
  port = free_port()
  proxy = Delay(port, delay_s).port if delay_s else port
  commands = {i: [sys.executable, '-c', LIGHT, proxy if i else port, processes, i, fingerprint, deadline_s,
                  *(['code=another'] if i == other else [])] for i in range(processes) if i != missing}
  return {i: json.loads(out) for i, out in hosts.run(commands, cwd=ROOT, env=environment()).items()}


def opened(processes: int, path: pathlib.Path, documents: int) -> list[dict[str, float]]:
  """Lets processes open a data set all at once. Returns what each of them took and read.

  The processes are forks of this one, because 64 imports would take minutes. The set has a shard for each 125,000
  documents, without content, as in benchmarks/opening.py.
  """
  made = made_up_set.write(path / 'data', shards=max(1, documents // 125_000), documents=documents, row=4096,
                           contents=False)
  config = load.load('configs/paper/dense_4b.py')
  inputs = {'tokenizer': made.tokenizer_path, 'data manifest of main': str(data_folder(made, 'main') / 'manifest.json')}

  def count(name: str) -> int:
    return int(pathlib.Path('/proc/self/io').read_text().split(f'{name}: ')[1].split()[0])

  def start_host(_, pipe) -> None:
    pipe.send('ready')
    pipe.recv()
    began, cpu, read, calls = time.monotonic(), time.process_time(), count('rchar'), count('syscr')
    _job_fingerprint(config, 'x', inputs)
    fingerprint_s = time.process_time() - cpu
    Packer(Documents(made, 'main', 'train').lengths, 4096, '0/main').row(0)
    pipe.send({'s': time.monotonic() - began, 'CPU s': time.process_time() - cpu, 'fingerprint, CPU s': fingerprint_s,
               'bytes': count('rchar') - read, 'reads': count('syscr') - calls})

  with hosts.Forks(processes, start_host) as forks:
    forks.hear()
    forks.tell()
    found = forks.hear()
    forks.join()
  return found


def started(processes: int, delay_s: float, watched_s: float = 20.0) -> tuple[list[dict[str, float]], int, float]:
  """Starts JAX in processes that are forks of this one, each with one CPU device and without a model.

  Returns (what each of them took in seconds, the bytes to and from process 0 until the first collective, the bytes per
  second while all of them run with a watchdog).

  watched_s: the seconds for which they run with a watchdog.
  """
  port = free_port()
  names = [f'process {i} of {processes} (here)' for i in range(processes)]

  def run_host(index: int, pipe) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # gloo prints each connection
    pipe.send('ready')
    others = pipe.recv()
    began, took = time.monotonic(), {}
    info = ProcessInfo(f'127.0.0.1:{others if index else port}', processes, index, None)
    initialize(info, 60.0)
    took['JAX'] = time.monotonic() - began
    jax.devices()
    took['devices'] = time.monotonic() - began
    assert multihost_utils.process_allgather(np.int32(index)).tolist() == list(range(processes))
    took['gather'] = time.monotonic() - began
    pipe.send(took)
    pipe.recv()
    with open(os.devnull, 'w', encoding='utf-8') as log, JobWatchdog(info, names, 60.0, log):
      time.sleep(watched_s)
      pipe.send('watched')
      pipe.recv()
    jax.distributed.shutdown()

  with hosts.Forks(processes, run_host) as forks:
    proxy = Delay(port, delay_s)  # after the forks, because it has a thread
    forks.hear()
    forks.tell(proxy.port)
    took = forks.hear()
    until_gather = proxy.bytes
    forks.tell()
    began = time.monotonic()
    forks.hear()
    rate = (proxy.bytes - until_gather) / (time.monotonic() - began)
    forks.tell()
    forks.join()
  return took, until_gather, rate


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m tests.soak.scale', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--processes', type=int, default=64)
  parser.add_argument('--delay_ms', type=float, default=0.0)
  parser.add_argument('--documents', type=int, default=2_000_000, help='of the data set')
  args = parser.parse_args()
  n, delay_s = args.processes, args.delay_ms / 1000
  config = load.flatten(json.loads(load.to_json(load.load('configs/paper/dense_4b.py'))))
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'fingerprint.json'
    path.write_text(json.dumps({'code': 'c0de', 'jax': '0.12.0', **{f'config.{k}': v for k, v in config.items()},
                                'data manifest of main': 'd' * 12}))
    found = meet(n, path, delay_s)
    first = found[0]
    print(f'{n} processes, {args.delay_ms:.0f} ms: all met after {max(x["s"] for x in found.values()):.2f} s; the '
          f'coordinator received {first["received"]:,} bytes and sent {first["sent"]:,}, then in 5 s '
          f'{first["received later"]:,} and {first["sent later"]:,}; {first["CPU s"]:.2f} s CPU, {first["MB"]:.0f} MB')
    found = meet(n, path, delay_s, other=n - 1)
    assert len({x['error'] for x in found.values()}) == 1 and "code = 'another'" in found[0]['error'], found
    print(f'other code: after {max(x["s"] for x in found.values()):.2f} s all say: {found[0]["error"]}')
    found = meet(n, path, delay_s, deadline_s=20, missing=n // 2)
    assert all(f'process {n // 2} of {n} did not come within 20 s' in x['error'] for x in found.values()), found
    print(f'one missing, deadline 20 s: after {max(x["s"] for x in found.values()):.2f} s all say: '
          f'{found[0]["error"][:60]}...')
    found = opened(n, pathlib.Path(folder), args.documents)
    each = {key: sorted(host[key] for host in found)[n // 2] for key in found[0]}
    print(f'data of {args.documents:,} documents: all opened after {max(x["s"] for x in found):.2f} s; each took '
          f'{each["CPU s"]:.2f} s CPU, of which {each["fingerprint, CPU s"]:.2f} for the fingerprint, and read '
          f'{each["bytes"]:,} bytes in {each["reads"]} reads (medians)')
  took, until_gather, rate = started(n, delay_s)
  last = {key: max(host[key] for host in took) for key in took[0]}
  print(f'JAX has started everywhere after {last["JAX"]:.1f} s, all devices are known after {last["devices"]:.1f} s, '
        f'all values are gathered after {last["gather"]:.1f} s; {until_gather:,} bytes to and from process 0, then '
        f'{rate:,.0f} bytes/s for heartbeats')


if __name__ == '__main__':
  main()
