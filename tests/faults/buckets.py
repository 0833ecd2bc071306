"""Faults of a bucket: commands whose data and workdir are on gs://, served by tests/bucket.py in a process of its own.

Each trial has a server with a folder of its own. A command that meets a fault must end well, with the same bits as an
undisturbed one, or with one line and a documented status; the same command must then end with these bits. gcsfs must be
installed.
"""

import collections
import contextlib
import importlib.util
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

from tests import bucket
from tests.faults.campaign import ROOT, SUMS, Campaign, Missed, contents, kill, kill_all, wait
from tests.runs import free_port

DATA, RUN = 'gs://bucket/data', 'gs://bucket/run'
_TINY = f'--config=tests/tiny.py:dir={DATA}'
_RL = f'--config=tests/tiny_rl.py:init_from={RUN}/parent'
_SAMPLE = ('--config.eval.sample.problems=12', '--config.eval.sample.samples=4',
           '--config.eval.sample.max_new_tokens=16', '--config.eval.sample.decode_batch_size=8')
# Command -> its arguments. What it reads is in the bucket before: `data` and, except for `train`, a finished run.
WRITERS = {
  'data': ('data', 'prepare', f'--config=tests/tiny.py:dir={RUN}/prepared', '--workers=2',
           '--config.data.sources.main.max_documents=2000'),
  'train': ('train', _TINY, f'--workdir={RUN}'),
  'rl': ('rl', _RL, f'--workdir={RUN}', '--config.rl.steps=4'),
  'eval': ('eval', 'sample', f'--checkpoint={RUN}', f'--benchmark={SUMS}', *_SAMPLE),
  'probe': ('eval', 'probe', f'--checkpoint={RUN}', '--all', '--config.eval.probe.rows=8'),
  'sweep': ('sweep', f'--config={ROOT}/tests/tiny_sweep.py:dir={RUN}/data,arms=1', f'--root={RUN}', '--parallel=1'),
}
READERS = {
  'verify': ('checkpoint', 'verify', RUN), 'inspect': ('checkpoint', 'inspect', RUN),
  'watch': ('watch', 'gs://bucket', '--once'), 'report': ('report', RUN, '--out={place}/report'),
  'compare': ('compare', RUN), 'explore': ('explore', RUN, '--export={place}/x.html', '--text=1 + 2'),
  'data verify': ('data', 'verify', _TINY),
}
_COPIES = {'rl': 'trained', 'eval': 'train', 'probe': 'train', **dict.fromkeys(READERS, 'train')}
_undisturbed_runs = collections.defaultdict(threading.Lock)  # one lock per command


class Store:
  """A server over PLACE/store, which holds the inputs of a command."""

  def __init__(self, c: Campaign, place: pathlib.Path, command: str, seed: int = 0):
    if not importlib.util.find_spec('gcsfs'):
      raise PermissionError('gcsfs is not installed')
    (place / 'tmp').mkdir(parents=True)
    self.folder = place / 'store'
    shutil.copytree(c.data, self.folder / 'bucket/data')
    if of := _COPIES.get(command):
      parent = c.trained if of == 'trained' else undisturbed(c, of)
      shutil.copytree(parent, self.run / 'parent' if command == 'rl' else self.run)
      for step in (self.run / 'parent/checkpoints').glob('*'):  # a checkpoint of a disk lacks this file
        (step / 'commit_success.txt').touch()
    self._port, self._seed = free_port(), seed
    self.start()

  @property
  def run(self) -> pathlib.Path:
    """The folder of gs://bucket/run."""
    return self.folder / 'bucket/run'

  @property
  def environment(self) -> dict[str, str]:
    return bucket.Bucket(self.folder, port=self._port).environment

  def start(self) -> None:
    self._process = subprocess.Popen(
      [sys.executable, '-m', 'tests.bucket', str(self.folder), f'--port={self._port}', f'--seed={self._seed}'],
      cwd=ROOT, stdout=subprocess.PIPE, text=True)
    self._process.stdout.readline()  # it listens

  def kill(self) -> None:
    self._process.kill()
    self._process.communicate()

  def disturb(self, **faults) -> dict[str, int]:
    return bucket.disturb(f'http://127.0.0.1:{self._port}', **faults)


@contextlib.contextmanager
def served(c: Campaign, place: pathlib.Path, command: str, rng: random.Random) -> Iterator[Store]:
  store = Store(c, place, command, rng.randrange(2**30))
  try:
    yield store
  finally:
    kill_all(place)
    store.kill()


def launch(c: Campaign, place: pathlib.Path, store: Store, command: str, **options) -> subprocess.Popen:
  args = [word.format(place=place) for word in (WRITERS | READERS)[command]]
  # A sweep keeps its own files in a folder of the current one.
  return c.start(place, args, env=store.environment, **({'cwd': place} if command == 'sweep' else {}), **options)


def undisturbed(c: Campaign, command: str) -> pathlib.Path:
  """Returns the folder of gs://bucket/run after the command, which is run once for all trials.

  Other trials wait for the run: two runs in its folder would write the same files and kill each other's processes.
  """
  with _undisturbed_runs[command]:
    return _undisturbed(c, command)


def _undisturbed(c: Campaign, command: str) -> pathlib.Path:
  place = c.root / 'undisturbed' / f'bucket-{command.replace(" ", "-")}'
  done, took = place / 'store/bucket/run', place / 'took.json'
  if not took.exists():
    shutil.rmtree(place, ignore_errors=True)
    for _ in range(2):  # the first one compiles
      shutil.rmtree(place, ignore_errors=True)
      began = time.monotonic()
      with served(c, place, command, random.Random(0)) as store:
        c.finish_well(launch(c, place, store, command))
    took.write_text(json.dumps(time.monotonic() - began))
  return done


def took_s(c: Campaign, command: str) -> float:
  return json.loads((undisturbed(c, command).parents[2] / 'took.json').read_text())


def check(c: Campaign, place: pathlib.Path, store: Store, command: str) -> None:
  """Checks that the bucket holds what an undisturbed command leaves, and nothing is left on this machine."""
  got, want = contents(store.run), contents(undisturbed(c, command))
  for name in sorted(got.keys() | want.keys()):
    assert name in got, f'{name} is missing'
    assert name in want, f'{name} is in no undisturbed run'
    assert got[name] == want[name], f'{name} differs from the undisturbed run'
  c.check_clean(place)


def ended(c: Campaign, process: subprocess.Popen, statuses: tuple[int, ...] = (0, 2)) -> tuple[int, str]:
  """Waits for a command; returns its status and its one line of error, '' if it ended well.

  A sweep whose points failed ends with status 1 and a table that says why; its line is the table then.
  """
  code, out, err = c.finish(process)
  if code == 1 and 'sweep' in process.args and 'failed' in out and 'Traceback' not in out + err:
    return 1, out
  errors = [line for line in err.splitlines() if line.startswith('error: ')]
  assert code in statuses and 'Traceback' not in err and len(errors) == (code in (2, 3)), f'exit {code}: {err[-1500:]}'
  return code, ''.join(errors)


def finish(c: Campaign, place: pathlib.Path, store: Store, command: str, code: int) -> str:
  """Runs the command again if it had ended with `code`, and checks what it leaves. Returns how it went."""
  store.disturb()
  if code:
    c.finish_well(launch(c, place, store, command))
  check(c, place, store, command)
  return f'{command}, {"one line, resumed" if code else "survived"}'


# Faults

STEADY = {
  'slow': {'latency_s': 0.1},
  '429 and 503': {'error_rate': 0.1, 'error_statuses': [429, 503]},
  '500, 502 and 504': {'error_rate': 0.1, 'error_statuses': [500, 502, 504]},
  'truncated': {'truncate_rate': 0.1},
  'lost answers': {'lost_rate': 0.1},
  'stale lists': {'stale_s': 1.0},
}


def steady(name: str):
  """The fault is there from the first to the last request."""
  def fault(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
    # Commands that only read lose no answers to writes.
    command = rng.choice([*WRITERS, 'train', 'rl', *(READERS if name not in ('lost answers', 'stale lists') else ())])
    undisturbed(c, command)
    with served(c, place, command, rng) as store:
      store.disturb(**STEADY[name])
      code, _ = ended(c, launch(c, place, store, command))
      if not store.disturb()['struck']:
        raise Missed('the fault hit no request')
      return finish(c, place, store, command, code) if command in WRITERS else f'{command}, status {code}'
  return fault


def _window(begin: Callable[[Store], object], end: Callable[[Store], object], longest_s: float, sign: str = 'struck'):
  """A fault that begins at a random time of a command, and ends a random time later.

  sign: what the server must have counted at the end, unless the command ended with an error. A server that was dead has
    counted no fault; it counts the requests after it.
  """
  def fault(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
    command = rng.choice([*WRITERS, 'train', 'rl', *READERS])
    undisturbed(c, command)
    at, length = rng.uniform(1.0, took_s(c, command)), rng.choice([rng.uniform(0.5, 5), rng.uniform(5, longest_s)])
    with served(c, place, command, rng) as store:
      process = launch(c, place, store, command)
      wait([process], lambda: True, at)
      begin(store)
      until = time.monotonic() + length
      while process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
      end(store)
      code, line = ended(c, process)
      assert not code or 'bucket' in line or '127.0.0.1' in line, line
      if not code and not store.disturb()[sign]:
        raise Missed('the fault hit no request')
      return finish(c, place, store, command, code) if command in WRITERS else f'{command}, status {code}'
  return fault


def killed(c: Campaign, place: pathlib.Path, rng: random.Random) -> list[str]:
  """SIGKILL at random times, up to three times, the later ones in the resumed command."""
  command = rng.choice([*WRITERS, 'train', 'rl'])
  undisturbed(c, command)
  hits = 0
  with served(c, place, command, rng) as store:
    store.disturb(latency_s=rng.choice([0.0, 0.05]))  # more of the time is spent in writing
    for _ in range(3):
      process = launch(c, place, store, command)
      try:
        wait([process], lambda: True, rng.uniform(1.0, 1.2 * took_s(c, command)))
        kill(process)
      except Missed:
        break
      if command == 'sweep':
        kill_all(place)
      hits += 1
    if not hits:
      raise Missed('it had ended before')
    store.disturb()
    c.finish_well(launch(c, place, store, command))
    check(c, place, store, command)
  return hits * [command]


killed.points = 2


def launched_twice(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """A second command in the same workdir is refused, also if it seems to come from another machine."""
  command = rng.choice(['train', 'rl', 'eval', 'probe'])
  undisturbed(c, command)
  lock = {'eval': 'eval/.lock-sample', 'probe': 'eval/.lock-probe'}.get(command, '.lock')
  with served(c, place, command, rng) as store:
    first = launch(c, place, store, command)
    wait([first], (store.run / lock).exists)
    elsewhere, told = rng.random() < 0.5, threading.Event()
    first.send_signal(signal.SIGSTOP)  # so that it can't end before the second one looks
    if elsewhere:  # it gives signs of life, but not as a process of this machine
      lease = json.loads((store.run / lock).read_text())

      def renew():
        while not told.wait(2.0):
          (store.run / lock).write_text(json.dumps({**lease, 'place': 'another machine'}))

      (store.run / lock).write_text(json.dumps({**lease, 'place': 'another machine'}))
      renewing = threading.Thread(target=renew)
      renewing.start()
    try:
      _, line = ended(c, launch(c, place, store, command), (2,))
      assert f'process {first.pid} on' in line and 'is at work there' in line, line
    finally:
      told.set()
      if elsewhere:
        renewing.join()
      first.send_signal(signal.SIGCONT)
    c.finish_well(first)
    check(c, place, store, command)
    return f'{command}, of {"another" if elsewhere else "this"} machine'


def damaged(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """A file of the newest checkpoint is damaged. Refused, or unnoticed because a bucket checks large files itself."""
  with served(c, place, 'eval', rng) as store:  # a finished run
    good, newest = sorted((store.run / 'checkpoints').iterdir(), key=lambda path: int(path.name))[-2:]
    path = rng.choice(sorted(p for item in ('state', 'meta') for p in (newest / item).rglob('*')
                             if p.is_file() and p.name != 'commit_success.txt'))
    data, how = path.read_bytes(), rng.choice(['flipped', 'truncated', 'missing'])
    if how == 'flipped':
      at = rng.randrange(len(data))
      path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:])
    elif how == 'truncated':
      path.write_bytes(data[:rng.randrange(len(data))])
    else:
      path.unlink()
    _, line = ended(c, launch(c, place, store, 'train'), (2,))
    named = str(path.relative_to(store.folder))
    assert f'gs://{named}' in line and f'{RUN}/checkpoints/{good.name} is good, and --fallback' in line, line
    args = [*WRITERS['train'], '--fallback']
    c.finish_well(c.start(place, args, env=store.environment))
    check(c, place, store, 'train')
    return f'{path.relative_to(newest).parts[0]} {how}'


def saved(c: Campaign, place: pathlib.Path, rng: random.Random) -> list[str]:
  """Saves in one process, see tests/faults/saves.py."""
  (place / 'tmp').mkdir(parents=True)
  process = subprocess.Popen(
    [sys.executable, '-m', 'tests.faults.saves', str(place / 'store'), str(rng.randrange(2**30)), str(saved.points)],
    cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  code, out, err = c.finish(process)
  assert code == 0, f'after {out.splitlines()}: {err[-1500:]}'
  if not out:
    raise Missed('the faults hit no request')
  return out.splitlines()


saved.points = 5
_down = lambda store: store.kill()
_up = lambda store: store.start()
_calm = lambda store: store.disturb()
# Name: (function, kinds of run that it needs, share of the points in percent).
CLASSES = {
  **{f'bucket: {name}': (steady(name), 'train rl', 50) for name in STEADY},
  'bucket: dies and comes back': (_window(_down, _up, 45, 'requests'), 'train rl', 100),
  'bucket: token expires': (
    _window(lambda store: store.disturb(error_rate=1.0, error_statuses=[401]), _calm, 45), 'train rl', 50),
  'bucket: access is lost': (
    _window(lambda store: store.disturb(error_rate=1.0, error_statuses=[403]), _calm, 5), 'train rl', 50),
  'bucket: SIGKILL': (killed, 'train rl', 100),
  'bucket: a second command': (launched_twice, 'train rl', 50),
  'bucket: damaged checkpoint': (damaged, 'train', 50),
  'bucket: saves': (saved, '', 100),
}
