"""The faults. Each function does one to a run, at a point that its random numbers choose, and starts the run again.

It returns what it hit, for the table; it raises Missed where nothing was hit, AssertionError where not all is well.
"""

import contextlib
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import time

from tests.faults.campaign import SUMS, Campaign, Kind, Missed, kill_all, processes

DAMAGE = {
  'flipped': lambda data, rng: flip(data, rng.randrange(len(data)), rng.randrange(8)) if data else b'\1',
  'truncated': lambda data, rng: data[:rng.randrange(len(data))] if data else b'\1',
  'missing': lambda data, rng: None,
}


def flip(data: bytes, at: int, bit: int) -> bytes:
  return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:]


def damage(path: pathlib.Path, how: str, rng: random.Random) -> None:
  data = DAMAGE[how](path.read_bytes(), rng)
  path.unlink() if data is None else path.write_bytes(data)


# Points in time


def last_step(workdir: pathlib.Path) -> int:
  path = workdir / 'metrics.jsonl'
  found = re.findall(r'^{"step": (\d+), "train', path.read_text(), re.M) if path.exists() else []
  return int(found[-1]) if found else 0


def unfinished(workdir: pathlib.Path, since: float) -> bool:
  """Whether a checkpoint that was begun after `since` is being written."""
  with contextlib.suppress(FileNotFoundError):
    return any('tmp' in p.name and p.stat().st_mtime > since for p in (workdir / 'checkpoints').iterdir())
  return False


def wait(running: list[subprocess.Popen], holds, delay_s: float = 0.0) -> None:
  until = time.monotonic() + 300
  while not holds():
    if any(p.poll() is not None for p in running) or time.monotonic() > until:
      raise Missed('it was through before')
    time.sleep(0.0005)
  time.sleep(delay_s)


def hit(kind: Kind, workdir: pathlib.Path, running: list[subprocess.Popen], victim: int, rng: random.Random) -> str:
  """SIGKILL at a random point of what has just been started: in its time, its progress, or a save. Returns where."""
  how, began, before = rng.choice(['time', 'step', 'save', 'save']), time.time(), last_step(workdir)
  if how == 'time':
    wait(running, lambda: True, rng.uniform(0, kind.took_s))
  elif how == 'step':
    step = rng.randint(min(before + 1, kind.steps), kind.steps)
    wait(running, lambda: last_step(workdir) >= step, rng.uniform(0, 0.05))
  else:
    after = rng.choice([0, kind.steps // 3, 2 * kind.steps // 3])
    wait(running, lambda: last_step(workdir) >= after and unfinished(workdir, began), rng.uniform(0, 0.1))
  running[victim].kill()
  running[victim].communicate()
  if running[victim].returncode != -signal.SIGKILL:
    raise Missed('it was through before')
  return 'in a save' if unfinished(workdir, began) else 'after a save' if how == 'save' else f'by {how}'


# SIGKILL and SIGTERM

KILLS = 3  # in one trial: each costs less than a trial of its own, and the later ones hit a run that is going on


def killed(name: str):
  """SIGKILL at a random point of a run of one process, up to KILLS times, also while it is going on after the last."""
  def fault(c: Campaign, place: pathlib.Path, rng: random.Random) -> list[str]:
    kind = c.kinds[name]
    workdir = c.workdir(kind, place)
    hits = []
    for _ in range(KILLS):
      running = c.launch(kind, workdir)
      try:
        hits.append(hit(kind, workdir, running, 0, rng))
      except Missed:
        c.well(*running)
        break
    return c.go_on(kind, workdir, hits)
  fault.points = KILLS
  return fault


def killed_inside(name: str, at: str, calls: int, longest_s: float):
  """The same inside one of the first `calls` calls of a function; several are separated by spaces."""
  def fault(c: Campaign, place: pathlib.Path, rng: random.Random) -> list[str]:
    kind = c.kinds[name]
    workdir = c.workdir(kind, place)
    hits = []
    for left in range(KILLS, 0, -1):  # the later ones have fewer calls left to make
      spec = {'at': rng.choice(at.split()), 'call': rng.randint(1, -(-calls * left // KILLS)), 'do': 'kill',
              'after_s': rng.uniform(0, longest_s)}
      [process] = c.launch(kind, workdir, fault=spec)
      code, _, err = c.end(process)
      assert code in (0, -signal.SIGKILL), err[-600:]
      if code == 0:
        break
      hits.append(f'{spec["at"].rpartition(":")[2]} {spec["call"]}')
    return c.go_on(kind, workdir, hits)
  fault.points = KILLS
  return fault


def killed_pair(c: Campaign, place: pathlib.Path, rng: random.Random) -> list[str]:
  """SIGKILL of either process, up to KILLS times: the other one ends, says why, and leaves nothing running."""
  kind = c.kinds['pair']
  workdir = c.workdir(kind, place)
  hits = []
  for _ in range(KILLS):
    logs = [workdir / 'hosts' / f'{i}.log' for i in range(2)]
    sizes = lambda logs=logs: [log.stat().st_size if log.exists() else 0 for log in logs]
    pair, victim, before = c.launch(kind, workdir), rng.randrange(2), sizes()
    try:
      where = hit(kind, workdir, pair, victim, rng)
    except Missed:
      c.well(*pair)
      break
    started = all(now > then for now, then in zip(sizes(), before))
    if not started:  # while they gather there is nobody to notice: who is missing is waited for, for minutes
      pair[1 - victim].kill()
    code, _, err = c.end(pair[1 - victim])
    assert not started or code == 0 or (code == 3 and 'error: ' in err), f'exit {code}: {err[-600:]}'
    hits.append(f'process {victim} {where}')
  return c.go_on(kind, workdir, hits)


killed_pair.points = KILLS


def killed_sweep(c: Campaign, place: pathlib.Path, rng: random.Random) -> list[str]:
  """SIGKILL of the launcher, up to KILLS times, half the time with all that it has started."""
  kind = c.kinds['sweep']
  workdir = c.workdir(kind, place)
  notes = []
  for _ in range(KILLS):
    [launcher] = c.launch(kind, workdir)
    time.sleep(rng.uniform(0.5, kind.took_s))
    if launcher.poll() is not None:
      c.well(launcher)
      break
    launcher.kill()
    if rng.random() < 0.5:
      kill_all(place)
      notes.append('with its commands')
    else:
      notes.append('alone')
    launcher.communicate()
  return c.go_on(kind, workdir, notes)


killed_sweep.points = KILLS


def terminated(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """SIGTERM at a random point from its first log on: the run saves and ends well, and goes on."""
  kind = c.kinds[rng.choice([name for name in ('train', 'rl', 'pair') if name in c.ready])]
  workdir = c.workdir(kind, place)
  running = c.launch(kind, workdir)
  wait(running, (workdir / 'metrics.jsonl').exists, rng.uniform(0, kind.took_s / 3))  # compiling, then steps
  asked = rng.choice(running)
  asked.terminate()
  ends = [c.end(p) for p in running]
  if asked.returncode == -signal.SIGTERM:  # before it listened: as good as killed
    return c.go_on(kind, workdir, [f'{kind.name}, too early'])[0]
  assert all(code == 0 and 'Traceback' not in err for code, _, err in ends), ends
  if 'asked to stop' not in ends[0][1]:
    raise Missed('it was through before')
  return c.go_on(kind, workdir, [kind.name], all_kept=False)[0]  # the one that was asked for takes the place of another


# Disks


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, kilobytes: int):
  """A file system of so many kB at `folder`; yields resize(kB)."""
  folder.mkdir()
  mount = lambda *args: subprocess.run(['mount', *args], capture_output=True, text=True)
  done = mount('-t', 'tmpfs', '-o', f'size={kilobytes}k', 'tmpfs', str(folder))
  if done.returncode:
    raise PermissionError(f'mount: {done.stderr.strip()}')
  try:
    yield lambda kilobytes: mount('-o', f'remount,size={kilobytes}k', str(folder))
  finally:
    kill_all(folder.parent)
    time.sleep(0.2)
    subprocess.run(['umount', '--lazy', str(folder)], check=True)


def one_line(err: str) -> str:
  """The last line of a run that ended for a reason, which it must be."""
  # What tensorstore prints where it has results for a save that has failed meanwhile; there is no way to it.
  err = re.sub(r'Traceback .*\n(  .*\n)+RuntimeError: Event loop is closed\n', '', err)
  assert err.splitlines()[-1].startswith('error: ') and 'Traceback' not in err, err[-1000:]
  return err.splitlines()[-1]


def full_disk(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """The disk fills up at a random point, and later has room. A small tmpfs; a limit on file size where mount fails."""
  kind = c.kinds['train' if 'rl' not in c.ready else rng.choice(['train', 'train', 'rl'])]
  size = rng.randint(8, 1200)
  c.workdir(kind, place)
  try:
    with small_disk(place / 'workdir', size) as resize:
      note = _filled(c, kind, place / 'workdir', lambda: resize(100_000))
      return f'{kind.name}, tmpfs, {note}'
  except PermissionError:
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size * 300, size * 300))
    return f'{kind.name}, file-size limit, ' + _filled(c, kind, place / 'workdir', lambda: None, preexec_fn=limit)


def _filled(c: Campaign, kind: Kind, workdir: pathlib.Path, make_room, **options) -> str:
  [process] = c.launch(kind, workdir, **options)
  code, _, err = c.end(process)
  if code == 0:
    raise Missed('there was room enough')
  line = one_line(err)
  assert code == 2 and str(workdir) in line, f'exit {code}: {line}'
  make_room()
  c.go_on(kind, workdir)
  return 'a save' if 'checkpoint could not be written' in line else 'a log or config'


def read_only(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """In the middle of a run no file can be made in its workdir any more, not even by root: chattr +i."""
  kind = c.kinds['train' if 'rl' not in c.ready else rng.choice(['train', 'train', 'rl'])]
  workdir = c.workdir(kind, place)
  running = c.launch(kind, workdir)
  step = rng.randint(1, kind.steps - 2)
  wait(running, lambda: last_step(workdir) >= step and (workdir / 'checkpoints').exists())
  locked = [workdir, workdir / 'checkpoints']
  done = subprocess.run(['chattr', '+i', *locked], capture_output=True, text=True)
  if done.returncode:
    kill_all(place)
    raise PermissionError(f'chattr: {done.stderr.strip()}')
  try:
    code, _, err = c.end(*running)
  finally:
    subprocess.run(['chattr', '-i', *locked], check=True)
  if code == 0:
    raise Missed('it had nothing to write any more')
  line = one_line(err)
  assert code == 2 and str(workdir) in line, f'exit {code}: {line}'
  c.go_on(kind, workdir)
  return kind.name


# Damage


def damaged_checkpoint(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """One file of the newest checkpoint: the run is refused, the file and the good one are named; --fallback mends it."""
  kind = c.kinds[rng.choice([name for name in ('train', 'rl', 'pair') if name in c.ready])]
  workdir = c.workdir(kind, place)
  shutil.copytree(c.undisturbed(kind), workdir, dirs_exist_ok=True)
  good, newest = sorted((workdir / 'checkpoints').iterdir(), key=lambda p: int(p.name))[-2:]
  files = sorted(p for p in newest.rglob('*') if p.is_file())
  path, how = rng.choice(files), rng.choice(sorted(DAMAGE))
  inside = path.parent != newest or (path.name == 'manifest.json' and how != 'missing')
  damage(path, how, rng)
  note = f'{kind.name} {path.relative_to(newest).parts[0]} {how}'
  if not inside:  # Orbax's notes to itself are no part of what is restored; without a manifest it is taken as it is
    c.well(*c.launch(kind, workdir))
    return note + ', of no consequence'
  line = c.refused(c.launch(kind, workdir))
  # A manifest that was damaged may say something wrong of another file.
  named = newest if path.name == 'manifest.json' else path
  assert str(named) in line and f'{good} is good, and --fallback goes on from it' in line, line
  c.go_on(kind, workdir, [note], '--fallback')
  assert (workdir / 'damaged' / newest.name).exists()
  return note


def damaged_parent(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """One file of a checkpoint that RL or an evaluation would start from: both are refused, with the file named."""
  (place / 'tmp').mkdir(parents=True)
  parent = shutil.copytree(c.undisturbed(c.kinds['rl']), place / 'parent')
  newest = max((parent / 'checkpoints').iterdir(), key=lambda p: int(p.name))
  path = rng.choice(sorted(p for item in ('state', 'meta') for p in (newest / item).rglob('*') if p.is_file()))
  how = rng.choice(sorted(DAMAGE))
  damage(path, how, rng)
  args = rng.choice([
    ('rl', f'--config=tests/tiny_rl.py:dir={c.sums},init_from={parent}', f'--workdir={place}/workdir'),
    ('eval', 'sample', f'--checkpoint={parent}', f'--benchmark={SUMS}', '--config.eval.sample.problems=4',
     '--config.eval.sample.samples=4', '--config.eval.sample.max_new_tokens=8')])
  line = c.refused([c.start(place, args)])
  assert (str(path) in line or str(path.relative_to(newest)) in line) and str(newest) in line, line
  c.clean(place)
  return f'{args[0]} {path.relative_to(newest).parts[0]} {how}'


def damaged_data(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """One file of the prepared data: it is named, or what it held was never needed; put back, all goes on."""
  kind = c.kinds['train']
  workdir = c.workdir(kind, place)
  copy = shutil.copytree(c.data, place / 'data')
  path = rng.choice(sorted(p for p in copy.rglob('*') if p.is_file()))
  how = rng.choice(sorted(DAMAGE))
  before = path.read_bytes()
  damage(path, how, rng)
  flag = f'--config=tests/tiny.py:dir={copy}'
  [process] = c.launch(kind, workdir, flag)
  code, _, err = c.end(process)
  if code:
    line = one_line(err)
    # A damaged manifest may say something wrong of the files it lists; a damaged tokenizer isn't the data's any more.
    assert (code == 2 and str(copy) in line) or 'tokenizer' in line or 'manifest' in path.name, line
  path.write_bytes(before)
  c.go_on(kind, workdir, [how], flag)
  return f'{re.sub("-?[0-9]+.*", "", path.name)} {how}, ' + ('refused' if code else 'not needed')


# The rest


def jumping_clock(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """The wall clock goes forward and back by up to a day while the run goes on."""
  kind = c.kinds['train' if 'rl' not in c.ready else rng.choice(['train', 'rl'])]
  workdir = c.workdir(kind, place)
  jumps = [[rng.uniform(0, kind.took_s), rng.uniform(-86_400, 86_400)] for _ in range(4)]
  c.well(*c.launch(kind, workdir, fault={'jumps': sorted(jumps)}))
  c.same(kind, workdir)
  c.go_on(kind, workdir)
  return kind.name


def hung_source(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """A read of the prepared data never returns: the run ends, in time, with a line that says since when; and goes on."""
  kind = c.kinds['train']
  workdir = c.workdir(kind, place)
  # Batches are read ahead: the first four hang before there is a step to be stalled after.
  spec = {'at': 'betarank.data.prepared:Documents.request', 'call': rng.randint(6, 13), 'do': 'hang', 'stall_s': 4}
  [process] = c.launch(kind, workdir, fault=spec)
  code, _, err = c.end(process)
  if code == 0:
    raise Missed('it made fewer calls')
  line = [text for text in err.splitlines() if text.startswith('error: ')][-1]
  assert code == 3 and 'no step for' in line and 'data/batches.py' in err, f'exit {code}: {err[-600:]}'
  c.go_on(kind, workdir)
  return f'call {spec["call"]}'


def dead_verifiers(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """SIGKILL to all of the verifier's workers, again and again, busy or not."""
  kind = c.kinds['workers']
  workdir = c.workdir(kind, place)
  [process] = c.launch(kind, workdir)
  pool = lambda: [pid for pid, command in processes(place).items() if 'verifier_worker' in command]
  hits = 0
  for _ in range(rng.randint(1, 4)):
    with contextlib.suppress(Missed):
      wait([process], pool, rng.uniform(0, 1.5))
      for pid in pool():
        with contextlib.suppress(ProcessLookupError):
          os.kill(pid, signal.SIGKILL)
          hits += 1
  if not hits:
    raise Missed('it was through before')
  code, _, err = c.end(process)
  if code:  # workers that are killed three times before they have started: it gives up, in one line
    assert code == 2 and 'times at its start' in one_line(err), f'exit {code}: {err[-600:]}'
  else:
    c.same(kind, workdir)
  c.go_on(kind, workdir)
  return 'given up, and gone on' if code else 'not noticed'


def launched_twice(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """A second launch in the same workdir is refused, and the first one doesn't notice."""
  kind = c.kinds[rng.choice([name for name in ('train', 'rl', 'sweep', 'eval') if name in c.ready])]
  workdir = c.workdir(kind, place)
  first = c.launch(kind, workdir)
  names = {'eval': 'eval/.lock-sample', 'sweep': '.sweep.lock'}
  wait(first, lambda: (lock := workdir / names.get(kind.name, '.lock')).exists() and lock.stat().st_size,
       rng.uniform(0, 0.3))
  first[0].send_signal(signal.SIGSTOP)  # so that it can't be through before the second one looks
  try:
    line = c.refused(c.launch(kind, workdir))
  finally:
    first[0].send_signal(signal.SIGCONT)
  assert 'at work there' in line and str(first[0].pid) in line, line
  c.well(*first)
  c.same(kind, workdir)
  c.go_on(kind, workdir)
  return kind.name


# Name: (what does it, kinds of run that it needs; it uses others where they are there, how many points of a hundred).
CLASSES = {
  'pretrain SIGKILL': (killed('train'), 'train', 100),
  'pretrain SIGKILL in a save\'s manifest': (
    killed_inside('train', 'betarank.runtime.integrity:write', 3, 0.01), 'train', 50),
  'RL SIGKILL': (killed('rl'), 'rl', 100),
  'RL SIGKILL in a rollout': (killed_inside('rl', 'betarank.rl.loop:graded_groups', 12, 0.3), 'rl', 100),
  'eval SIGKILL': (killed_inside(
    'eval', 'betarank.eval.generate:judged betarank.eval.generate:SampleFile.append', 24, 0.02),
                   'eval', 100),
  'sweep SIGKILL': (killed_sweep, 'sweep', 100),
  'two processes, SIGKILL of one': (killed_pair, 'pair', 100),
  'SIGTERM': (terminated, 'train', 50),
  'full disk': (full_disk, 'train', 50),
  'read-only workdir': (read_only, 'train', 50),
  'damaged checkpoint': (damaged_checkpoint, 'train pair', 100),
  'damaged parent': (damaged_parent, 'rl', 50),
  'damaged data': (damaged_data, 'train', 50),
  'clock jumps': (jumping_clock, 'train', 25),
  'hung data source': (hung_source, 'train', 25),
  'dead verifier pool': (dead_verifiers, 'workers', 25),
  'two launches': (launched_twice, 'train', 25),
}
