"""The classes of faults. Each function breaks a run at a random point, starts it again, and compares it with an
undisturbed run.

A function returns notes on what was hit, for the table. It raises Missed if nothing was hit, and AssertionError if the
run didn't survive. `killed`, `killed_inside` and `interrupted` return such a function.
"""

import contextlib
import importlib.util
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import time

from tests.faults import buckets
from tests.faults.campaign import (
  ROOT,
  SUMS,
  Campaign,
  Kind,
  Missed,
  kill,
  kill_all,
  processes,
  wait,
)
from tests.runs import deadline_s, last_error

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
  """Returns whether there is an unfinished checkpoint that was written to after the time `since`."""
  with contextlib.suppress(FileNotFoundError):
    return any('tmp' in p.name and p.stat().st_mtime > since for p in (workdir / 'checkpoints').iterdir())
  return False


def hit(kind: Kind, workdir: pathlib.Path, running: list[subprocess.Popen], victim: int, rng: random.Random) -> str:
  """Kills a process of a run that has just started, with SIGKILL. Returns a note on where the run was.

  The process is killed at a random time, at a random step, or during a save.

  running: the processes of the run.
  victim: the index of the process to kill.
  """
  how, began, before = rng.choice(['time', 'step', 'save', 'save']), time.time(), last_step(workdir)
  if how == 'time':
    wait(running, lambda: True, rng.uniform(0, kind.took_s))
  elif how == 'step':
    step = rng.randint(min(before + 1, kind.steps), kind.steps)
    wait(running, lambda: last_step(workdir) >= step, rng.uniform(0, 0.05))
  else:
    after = rng.choice([0, kind.steps // 3, 2 * kind.steps // 3])
    wait(running, lambda: last_step(workdir) >= after and unfinished(workdir, began), rng.uniform(0, 0.1))
  kill(running[victim])
  return 'in a save' if unfinished(workdir, began) else 'after a save' if how == 'save' else f'by {how}'


# SIGKILL and SIGTERM

AS_PYTHON_STARTS_S = 0.15  # Python's own start; no program can answer a Ctrl-C before it
# Commands that leave their run as it is. `plan` needs libtpu.
READERS = ('generate', 'explore', 'watch', 'report', *(['plan'] if importlib.util.find_spec('libtpu') else []))
PROGRESS = 'loading |.*; the first tokens take a few seconds'  # lines of these commands on standard error
KILLS = 3  # per trial: more of them cost less than trials of their own, and the later ones hit a resumed run


def killed(name: str):
  """Returns a fault: SIGKILL at random points of a run of one process.

  The run is killed up to KILLS times. After each time it is resumed, so later kills hit a resumed run.
  """
  def fault(c: Campaign, place: pathlib.Path, rng: random.Random) -> list[str]:
    kind = c.kinds[name]
    workdir = c.workdir(kind, place)
    hits = []
    for _ in range(KILLS):
      running = c.launch(kind, workdir)
      try:
        hits.append(hit(kind, workdir, running, 0, rng))
      except Missed:
        c.finish_well(*running)
        break
    return c.resume(kind, workdir, hits)
  fault.points = KILLS
  return fault


def killed_inside(name: str, at: str, calls: int, longest_s: float):
  """Returns a fault: SIGKILL inside a function, up to KILLS times, each time in one of its first `calls` calls.

  at: the function; several functions, separated by spaces, are drawn from at random.
  longest_s: the longest time between the start of the call and the kill, in seconds.
  """
  def fault(c: Campaign, place: pathlib.Path, rng: random.Random) -> list[str]:
    kind = c.kinds[name]
    workdir = c.workdir(kind, place)
    hits = []
    for left in range(KILLS, 0, -1):  # a resumed run has fewer calls left
      spec = {'at': rng.choice(at.split()), 'call': rng.randint(1, -(-calls * left // KILLS)), 'do': 'kill',
              'after_s': rng.uniform(0, longest_s)}
      [process] = c.launch(kind, workdir, fault=spec)
      code, _, err = c.finish(process)
      assert code in (0, -signal.SIGKILL), err[-600:]
      if code == 0:
        break
      hits.append(f'{spec["at"].rpartition(":")[2]} {spec["call"]}')
    return c.resume(kind, workdir, hits)
  fault.points = KILLS
  return fault


def killed_parts(c: Campaign, place: pathlib.Path, rng: random.Random) -> list[str]:
  """SIGKILL in each of two parts of a preparation and in its end: the result is that of one machine."""
  kind = c.kinds['data']
  workdir = c.workdir(kind, place)
  config, hits = f'--config=tests/tiny.py:dir={workdir}/prepared', []
  size = '--config.data.sources.main.max_documents=20000'
  [tokenizer] = [c.start(place, ('data', 'tokenizer', config, size))]
  c.finish_well(tokenizer)
  for command in (['prepare', '--part=1/2'], ['prepare', '--part=2/2'], ['finish']):
    args = ('data', *command, config, size)
    process = c.start(place, args)
    with contextlib.suppress(Missed):
      wait([process], lambda: True, rng.uniform(0.3, 4.0))
      kill_all(place)
      kill(process)
      hits.append(' '.join(command))
    c.finish_well(c.start(place, args))
  c.check_same(kind, workdir)
  c.check_clean(place)
  if not hits:
    raise Missed('it had ended before')
  return hits


killed_parts.points = 2


def swapped_tokenizer(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """The tokenizer's file is replaced during a run, which may notice it; a resumed one is refused."""
  kind = c.kinds['train']
  workdir = c.workdir(kind, place)
  copy = shutil.copytree(c.data, place / 'data')
  path, flag = copy / 'tokenizer.model', f'--config=tests/tiny.py:dir={copy}'
  good, other = path.read_bytes(), (c.sums / 'tokenizer.model').read_bytes()
  assert good != other
  running = c.launch(kind, workdir, flag)
  wait(running, lambda: last_step(workdir) >= 1, rng.uniform(0, 0.5))
  path.write_bytes(other)
  if stopped := rng.random() < 0.7:
    running[0].kill()
  code, _, err = c.finish(running[0])
  assert code in (0, -signal.SIGKILL) or (code == 2 and 'tokenizer' in one_line(err)), err[-600:]
  line = c.refused(c.launch(kind, workdir, flag))
  assert 'tokenizer' in line, line
  path.write_bytes(good)
  c.resume(kind, workdir, [''], flag)
  return 'killed, refused, resumed' if stopped else f'status {code}, refused, resumed'


def killed_pair(c: Campaign, place: pathlib.Path, rng: random.Random) -> list[str]:
  """Kills one of two processes with SIGKILL, up to KILLS times. The other process must end by itself, and say why."""
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
      c.finish_well(*pair)
      break
    started = all(now > then for now, then in zip(sizes(), before))
    if not started:  # before the rendezvous no process notices: it waits minutes for a missing one
      pair[1 - victim].kill()
    code, _, err = c.finish(pair[1 - victim])
    assert not started or code == 0 or (code == 3 and 'error: ' in err), f'exit {code}: {err[-600:]}'
    hits.append(f'process {victim} {where}')
  return c.resume(kind, workdir, hits)


killed_pair.points = KILLS


def ends_of_others(c: Campaign, running: list[subprocess.Popen], victim: int, message: str) -> None:
  """Waits until all processes but `victim` end. Each must end with status 3 and a line that names the victim and
  contains `message`.
  """
  ends = [c.finish(process) for i, process in enumerate(running) if i != victim]
  assert {code for code, _, _ in ends} == {3}, [(code, err[-300:]) for code, _, err in ends]
  lines = [last_error(err) for _, _, err in ends]
  name = f'error: process {victim} of {len(running)} ('
  assert all(line.startswith(name) and message in line for line in lines), lines


def resumed_by_fewer(c: Campaign, kind: Kind, workdir: pathlib.Path, rng: random.Random, all_kept: bool = True) -> str:
  """Resumes a job with fewer processes, which have as many devices in total. The result must have the same bits."""
  processes = rng.choice([2, 4, kind.processes // 2])
  c.finish_well(*c.launch(kind, workdir, processes=processes))
  c.check_same(kind, workdir, all_kept)
  c.check_clean(workdir.parent)
  return f'resumed by {processes}'


def lost_of_many(is_coordinator: bool):
  """Returns a fault: SIGKILL of one of many processes. The others must name it. The run is resumed by fewer processes.

  is_coordinator: whether process 0 is killed, or one of the others.
  """
  def fault(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
    kind = c.kinds['many']
    workdir = c.workdir(kind, place)
    victim, step = 0 if is_coordinator else rng.randrange(1, kind.processes), rng.randint(1, 8)
    running = c.launch(kind, workdir)
    wait(running, lambda: last_step(workdir) >= step)
    kill(running[victim])
    ends_of_others(c, running, victim, f'--host_deadline_s={deadline_s(kind.processes)}' if victim else 'is gone')
    return resumed_by_fewer(c, kind, workdir, rng)

  return fault


def slow_of_many(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """One of many processes stands still: for less than the deadline, which changes nothing, or for longer."""
  kind = c.kinds['many']
  workdir = c.workdir(kind, place)
  running, victim, step = c.launch(kind, workdir), rng.randrange(kind.processes), rng.randint(1, 6)
  longer = rng.random() < 0.5
  name = 'another process' if victim else 'process 0'
  wait(running, lambda: last_step(workdir) >= step)
  running[victim].send_signal(signal.SIGSTOP)
  if longer:
    try:
      ends_of_others(c, running, victim, f'--host_deadline_s={deadline_s(kind.processes)}')
    finally:
      running[victim].kill()
      running[victim].communicate()
    return f'{name}, longer than the deadline, {resumed_by_fewer(c, kind, workdir, rng)}'
  time.sleep(rng.uniform(5, 15))
  running[victim].send_signal(signal.SIGCONT)
  c.finish_well(*running)
  c.check_same(kind, workdir)
  return f'{name}, up to 15 s'


def terminated_of_many(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """SIGTERM to one of many processes. All must save the same step and end with status 143."""
  kind = c.kinds['many']
  workdir = c.workdir(kind, place)
  running, asked, step = c.launch(kind, workdir), rng.randrange(kind.processes), rng.randint(1, 8)
  wait(running, lambda: last_step(workdir) >= step)
  running[asked].terminate()
  ends = [c.finish(process) for process in running]
  if all(code == 0 for code, _, _ in ends):
    raise Missed('it had ended before')
  assert all(code == 143 and 'Traceback' not in err for code, _, err in ends), ends
  assert 'asked to stop' in ends[0][1], ends
  # Its checkpoint takes the place of an earlier one.
  return f'{"another process" if asked else "process 0"}, {resumed_by_fewer(c, kind, workdir, rng, all_kept=False)}'


def other_code_of_many(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """One of many processes has a copy of the code with another commit. All must end with one line that names it."""
  kind = c.kinds['many']
  workdir = c.workdir(kind, place)
  copy, victim = place / 'path' / 'betarank', rng.randrange(kind.processes)
  shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.*', '__pycache__', 'runs', 'docs'))
  (copy / '.commit').write_text('0123456789ab')
  running = c.launch(kind, workdir, env={victim: {'PYTHONPATH': f'{copy.parent}:{os.environ.get("PYTHONPATH", "")}'}})
  ends = [c.finish(process) for process in running]
  lines = {one_line(err) for _, _, err in ends}
  assert {code for code, _, _ in ends} == {2} and len(lines) == 1, ends
  [line] = lines
  named = f'process {victim or 1} of {kind.processes} ('
  assert named in line and "code = '" in line and "'0123456789ab'" in line, line
  assert not (workdir / 'checkpoints').exists()
  c.check_clean(place)
  return 'another process' if victim else 'process 0'


def slow_network_of_many(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """All that process 0 and the others say to coordinate themselves arrives 0.2 s later. Collectives aren't delayed."""
  kind = c.kinds['many']
  workdir = c.workdir(kind, place)
  c.finish_well(*c.launch(kind, workdir, delay_s=0.2))
  c.check_same(kind, workdir)
  c.check_clean(workdir.parent)
  return '0.2 s in each direction'


def killed_sweep(c: Campaign, place: pathlib.Path, rng: random.Random) -> list[str]:
  """Kills the launcher of a sweep with SIGKILL, up to KILLS times. Half of these times, also kills all commands that it
  has started.
  """
  kind = c.kinds['sweep']
  workdir = c.workdir(kind, place)
  notes = []
  for _ in range(KILLS):
    [launcher] = c.launch(kind, workdir)
    time.sleep(rng.uniform(0.5, kind.took_s))
    if launcher.poll() is not None:
      c.finish_well(launcher)
      break
    launcher.kill()
    if rng.random() < 0.5:
      kill_all(place)
      notes.append('with its commands')
    else:
      notes.append('alone')
    launcher.communicate()
  return c.resume(kind, workdir, notes)


killed_sweep.points = KILLS


def terminated(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """Sends SIGTERM at a random point after the first log. The run must save, end with status 143, and resume."""
  kind = c.kinds[rng.choice([name for name in ('train', 'rl', 'pair') if name in c.ready])]
  workdir = c.workdir(kind, place)
  running = c.launch(kind, workdir)
  wait(running, (workdir / 'metrics.jsonl').exists, rng.uniform(0, kind.took_s / 3))  # compiling, then steps
  asked = rng.choice(running)
  asked.terminate()
  ends = [c.finish(p) for p in running]
  if all(code in (0, -signal.SIGTERM) for code, _, _ in ends):
    c.check_same(kind, workdir)  # a run that has ended handles the signal no more
    raise Missed('it had ended before')
  assert all(code == 143 and 'Traceback' not in err for code, _, err in ends) and 'asked to stop' in ends[0][1], ends
  return c.resume(kind, workdir, [kind.name], all_kept=False)[0]  # its checkpoint takes the place of an earlier one


def interrupted(*names: str):
  """Returns a fault: Ctrl-C at a random moment, up to KILLS times. The run must end with status 130 and one line.

  The later times hit the resumed run. As from a terminal, all processes of the group get the signal.

  names: the kind of run; several kinds are drawn from at random.
  """
  def fault(c: Campaign, place: pathlib.Path, rng: random.Random) -> list[str]:
    kind = c.kinds[rng.choice(names)]
    workdir = c.workdir(kind, place)
    hits = []
    for _ in range(KILLS):
      [process] = c.launch(kind, workdir, start_new_session=True)
      at = rng.uniform(AS_PYTHON_STARTS_S, kind.took_s)
      with contextlib.suppress(Missed):
        wait([process], lambda: True, at)
        os.killpg(process.pid, signal.SIGINT)
      code, out, err = c.finish(process)
      if code in (0, -signal.SIGINT):  # it had ended; the last part of Python's own end handles no signals
        assert 'Traceback' not in err, f'exit {code} after {at:.2f} s: {err[-600:]}'
        c.check_same(kind, workdir, all_kept=False)
        break
      said = [line for line in err.splitlines() if line and not re.match(PROGRESS, line)]
      ends = [line for line in [*said, *out.splitlines()] if re.match('stopped(;|$)|asked to stop', line)]
      notice = [line for line in said if line.startswith('stopping')]
      assert code == 130 and len(ends) == 1 and len(notice) <= 1, f'exit {code} after {at:.2f} s: {err[-600:]}'
      assert len(said) == len(notice) + (ends[0] in said), f'after {at:.2f} s: {err[-600:]}'
      hits.append(' '.join([*([kind.name] if len(names) > 1 else []), re.split('[:;]', ends[0])[0]]))
    return c.resume(kind, workdir, hits, all_kept=False)
  fault.points = KILLS
  return fault


# Disks


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, kilobytes: int):
  """Mounts a file system with a size of `kilobytes` kB at `folder`. Yields a function that changes the size, in kB."""
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
  """Returns the last line of a run's errors. Checks that it is one of betarank's errors, without a traceback."""
  assert err.splitlines()[-1].startswith('error: ') and 'Traceback' not in err, err[-1000:]
  return err.splitlines()[-1]


def full_disk(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """Lets the disk become full at a random point. Later, the disk has room again, and the run must resume.

  The disk is a small tmpfs. If that can't be mounted, a limit on the size of files is used instead.
  """
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
  code, _, err = c.finish(process)
  if code == 0:
    raise Missed('the disk was large enough')
  line = one_line(err)
  assert code == 2 and str(workdir) in line, f'exit {code}: {line}'
  make_room()
  c.resume(kind, workdir)
  return 'a save' if 'checkpoint could not be written' in line else 'a log or config'


def read_only(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """Makes the workdir of a run read-only in the middle of the run, with chattr +i, which also holds for root."""
  kind = c.kinds[rng.choice(['train', 'train', 'rl'])]
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
    code, _, err = c.finish(*running)
  finally:
    subprocess.run(['chattr', '-i', *locked], check=True)
  if code == 0:
    raise Missed('it had nothing left to write')
  line = one_line(err)
  assert code == 2 and str(workdir) in line, f'exit {code}: {line}'
  c.resume(kind, workdir)
  return kind.name


# Damage


def damaged_checkpoint(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """Damages a file of the newest checkpoint. The error must name this checkpoint and an earlier good one.

  With --fallback, the run must resume from the good checkpoint.
  """
  kind = c.kinds[rng.choice([name for name in ('train', 'rl', 'pair') if name in c.ready])]
  workdir = c.workdir(kind, place)
  shutil.copytree(c.undisturbed(kind), workdir, dirs_exist_ok=True)
  good, newest = sorted((workdir / 'checkpoints').iterdir(), key=lambda p: int(p.name))[-2:]
  files = sorted(p for p in newest.rglob('*') if p.is_file())
  path, how = rng.choice(files), rng.choice(sorted(DAMAGE))
  inside = path.parent != newest or (path.name == 'manifest.json' and how != 'missing')
  damage(path, how, rng)
  note = f'{kind.name} {path.relative_to(newest).parts[0]} {how}'
  if not inside:  # nothing is restored from Orbax's own files, and a checkpoint without a manifest is accepted
    c.finish_well(*c.launch(kind, workdir))
    return note + ', without effect'
  line = c.refused(c.launch(kind, workdir))
  # A damaged manifest may make another file look wrong.
  named = newest if path.name == 'manifest.json' else path
  assert str(named) in line and f'{good} is good, and --fallback resumes from it' in line, line
  c.resume(kind, workdir, [note], '--fallback')
  assert (workdir / 'damaged' / newest.name).exists()
  return note


def damaged_parent(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """Damages a file of the checkpoint from which RL or an evaluation starts. The command must end with an error that
  names the file.
  """
  (place / 'tmp').mkdir(parents=True)
  parent = shutil.copytree(c.undisturbed(c.kinds['rl']), place / 'parent')
  newest = max((parent / 'checkpoints').iterdir(), key=lambda p: int(p.name))
  path = rng.choice(sorted(p for item in ('state', 'meta') for p in (newest / item).rglob('*') if p.is_file()))
  how = rng.choice(sorted(DAMAGE))
  damage(path, how, rng)
  args = rng.choice([
    ('rl', f'--config=tests/tiny_rl.py:init_from={parent}', f'--workdir={place}/workdir'),
    ('eval', 'sample', f'--checkpoint={parent}', f'--benchmark={SUMS}', '--config.eval.sample.problems=4',
     '--config.eval.sample.samples=4', '--config.eval.sample.max_new_tokens=8')])
  line = c.refused([c.start(place, args)])
  assert (str(path) in line or str(path.relative_to(newest)) in line) and str(newest) in line, line
  c.check_clean(place)
  return f'{args[0]} {path.relative_to(newest).parts[0]} {how}'


def damaged_data(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """Damages a file of the prepared data. The run must end with an error, unless it never reads the file.

  After the file is restored, the run must resume.
  """
  kind = c.kinds['train']
  workdir = c.workdir(kind, place)
  copy = shutil.copytree(c.data, place / 'data')
  path = rng.choice(sorted(p for p in copy.rglob('*') if p.is_file()))
  how = rng.choice(sorted(DAMAGE))
  before = path.read_bytes()
  damage(path, how, rng)
  flag = f'--config=tests/tiny.py:dir={copy}'
  [process] = c.launch(kind, workdir, flag)
  code, _, err = c.finish(process)
  if code:
    line = one_line(err)
    # A damaged manifest may make other files look wrong; a damaged tokenizer isn't the one that the data was made with.
    assert (code == 2 and str(copy) in line) or 'tokenizer' in line or 'manifest' in path.name, line
  path.write_bytes(before)
  c.resume(kind, workdir, [how], flag)
  return f'{re.sub("-?[0-9]+.*", "", path.name)} {how}, ' + ('refused' if code else 'not needed')


# The rest


def jumping_clock(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """Lets the wall clock jump during the run, forward and back, by up to a day."""
  kind = c.kinds['train' if 'rl' not in c.ready else rng.choice(['train', 'rl'])]
  workdir = c.workdir(kind, place)
  jumps = [[rng.uniform(0, kind.took_s), rng.uniform(-86_400, 86_400)] for _ in range(4)]
  c.finish_well(*c.launch(kind, workdir, fault={'jumps': sorted(jumps)}))
  c.check_same(kind, workdir)
  c.resume(kind, workdir)
  return kind.name


def hung_source(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """Lets a read of the prepared data never return. The watchdog must end the run with one line that says for how long
  no step was done.
  """
  kind = c.kinds['train']
  workdir = c.workdir(kind, place)
  # Batches are prefetched: a hang in one of the first four comes before the first step, when the watchdog doesn't act.
  spec = {'at': 'betarank.data.prepared:Documents.request', 'call': rng.randint(6, 13), 'do': 'hang', 'stall_s': 4}
  [process] = c.launch(kind, workdir, fault=spec)
  code, _, err = c.finish(process)
  if code == 0:
    raise Missed('it made fewer calls')
  line = [text for text in err.splitlines() if text.startswith('error: ')][-1]
  assert code == 3 and 'no step for' in line and 'data/batches.py' in err, f'exit {code}: {err[-600:]}'
  c.resume(kind, workdir)
  return f'call {spec["call"]}'


def dead_verifiers(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """Kills all workers of the verifier with SIGKILL, several times, whether they are busy or not."""
  kind = c.kinds['workers']
  workdir = c.workdir(kind, place)
  [process] = c.launch(kind, workdir)
  pool = lambda: [pid for pid, command in processes(place).items() if 'verifier_worker' in command]
  hits = 0
  for _ in range(rng.randint(1, 4)):
    wait([], lambda: pool() or process.poll() is not None, rng.uniform(0, 1.5))
    for pid in pool():
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        hits += 1
  code, _, err = c.finish(process)
  if code:  # workers were killed three times before they had started: the run ends with one line
    assert hits and code == 2 and 'times at its start' in one_line(err), f'exit {code}: {err[-600:]}'
  elif not hits:
    raise Missed('it had ended before')
  else:
    c.check_same(kind, workdir)
  c.resume(kind, workdir)
  return 'ended, and resumed' if code else 'without effect'


def launched_twice(c: Campaign, place: pathlib.Path, rng: random.Random) -> str:
  """Starts the same run a second time in the same workdir. The second run must end with an error, without effect on the
  first.
  """
  kind = c.kinds[rng.choice(['train', 'rl', 'sweep', 'eval'])]
  workdir = c.workdir(kind, place)
  first = c.launch(kind, workdir)
  names = {'eval': 'eval/.lock-sample', 'sweep': '.sweep.lock'}
  wait(first, lambda: (lock := workdir / names.get(kind.name, '.lock')).exists() and lock.stat().st_size,
       rng.uniform(0, 0.3))
  first[0].send_signal(signal.SIGSTOP)  # so that it can't end before the second one looks
  try:
    line = c.refused(c.launch(kind, workdir))
  finally:
    first[0].send_signal(signal.SIGCONT)
  assert re.search('(at work|running) there', line) and str(first[0].pid) in line, line
  c.finish_well(*first)
  c.check_same(kind, workdir)
  c.resume(kind, workdir)
  return kind.name


# Name: (function, kinds of run that it needs (it uses others if they are ready), share of the points in percent).
CLASSES = {
  'pretrain SIGKILL': (killed('train'), 'train', 100),
  'pretrain SIGKILL in a save\'s manifest': (
    killed_inside('train', 'betarank.runtime.integrity:write', 3, 0.01), 'train', 50),
  'RL SIGKILL': (killed('rl'), 'rl', 100),
  'RL SIGKILL in paged sampling': (killed_inside(
    'paged', 'betarank.train.pages:Pages.grow betarank.train.pages:Pages.start', 60, 0.05), 'paged', 100),
  'RL SIGKILL in the replacement of groups': (killed_inside(
    'paged', 'betarank.rl.loop:prompts_wanted', 40, 0.05), 'paged', 50),
  'RL SIGKILL in a packed update': (killed_inside(
    'paged', 'betarank.rl.packing:microbatches betarank.rl.loop:learn', 3, 0.1), 'paged', 50),
  'data SIGKILL in parts': (killed_parts, 'data train rl', 100),
  'tokenizer swapped': (swapped_tokenizer, 'train rl', 25),
  'RL SIGKILL in a rollout': (killed_inside('rl', 'betarank.rl.loop:graded_groups', 12, 0.3), 'rl', 100),
  'eval SIGKILL': (killed_inside(
    'eval', 'betarank.eval.generate:judged betarank.eval.generate:SampleFile.append', 24, 0.02),
                   'eval', 100),
  'sweep SIGKILL': (killed_sweep, 'sweep', 100),
  'two processes, SIGKILL of one': (killed_pair, 'pair', 100),
  'many processes, one lost': (lost_of_many(False), 'many', 25),
  'many processes, coordinator lost': (lost_of_many(True), 'many', 25),
  'many processes, one slow': (slow_of_many, 'many', 50),
  'many processes, SIGTERM to one': (terminated_of_many, 'many', 25),
  'many processes, one with other code': (other_code_of_many, 'many', 25),
  'many processes, slow network': (slow_network_of_many, 'many', 10),
  'SIGTERM': (terminated, 'train', 50),
  **{f'Ctrl-C in {name}': (interrupted(name), name, 100) for name in ('data', 'train', 'rl', 'eval', 'probe', 'sweep')},
  'Ctrl-C in commands that only read': (interrupted(*READERS), ' '.join(READERS), 200),
  'full disk': (full_disk, 'train', 50),
  'read-only workdir': (read_only, 'train rl', 50),
  'damaged checkpoint': (damaged_checkpoint, 'train pair', 100),
  'damaged parent': (damaged_parent, 'rl', 50),
  'damaged data': (damaged_data, 'train', 50),
  'clock jumps': (jumping_clock, 'train', 25),
  'hung data source': (hung_source, 'train', 25),
  'dead verifier pool': (dead_verifiers, 'workers', 25),
  'two launches': (launched_twice, 'train rl eval sweep', 25),
  **buckets.CLASSES,
}
