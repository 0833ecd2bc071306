"""betarank sweep --config=configs/smoke.py --on=local|tpu|COMMAND --root=DIR [--only=PATTERN] [--parallel=N]
    [--chips=N] [--dry_run [--plan]]

Runs the points that `sweep(add)` in the config file adds (launch/points.py). At most --parallel points, by default 1,
run at the same time, each after the points it needs. If the same command is run again, it skips finished points,
resumes interrupted points and retries failed points. If a point fails, only the points that need it are skipped.

    DIR/sweep.json          points, their states, commands and configs, and the code versions of all launches
    DIR/NAME/               workdir of a point that trains
    DIR/.sweep/NAME.log     output of its command

With --on=tpu, points run on slices through launch/tpu.sh, which reads its settings from the environment (docs/tpu.md).
--parallel is then the number of slices. Workdirs must be in a bucket, so DIR is gs://...; sweep.json and the
logs are written to runs/sweeps on this machine instead. Data is prepared on this machine. If the config's data.dir is a
local folder, the data is written to DIR instead, so that the slices can read it.

With --on='COMMAND with {command} {name} {chips} {slot}', another engine such as Slurm or GKE runs the points.
launch/engine.py explains this, and launch/examples has commands.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from betarank.configs.errors import ConfigError, UserError
from betarank.configs.files import write_atomically
from betarank.configs.parser import Parser, install_hint, unopened_place
from betarank.configs.stop import listening
from betarank.configs.sweep_folder import sweep_folder
from betarank.configs.terminal import duration, waiting
from betarank.launch import engine
from betarank.launch.points import BETARANK, TRAINS, Point, check_workdirs, expand, local_files, resolved
from betarank.runtime import workdir

POLL_S = 0.2
PROGRESS_EVERY_S = 60.0  # the time between lines of progress, if there is no terminal
# If a result can't be read, as from a bucket, it is tried again every READ_AGAIN_S until GIVE_UP_S have passed.
READ_AGAIN_S, GIVE_UP_S = 10.0, 600.0
STATES = ('waiting', 'running', 'finished', 'stopped', 'failed', 'skipped')
OTHER = 7  # exit status of launch/tpu.sh babysit if the slice runs another command
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit statuses of a run that was asked to stop, and has saved
_COLOURS = {'running': 'cyan', 'finished': 'green', 'stopped': 'yellow', 'failed': 'red', 'skipped': 'yellow'}


@dataclasses.dataclass
class Status:
  """The state of a point.

  Attributes:
    state: one of STATES.
    note: a remark on the state, such as the reason of a failure; '' for none.
    starts: the number of times that the point's command was started, in all launches together.
    slot: the slot (see Sweep) of the last start; -1 if there was none.
    slice: the slice (see Sweep) of the last start; None if the point didn't run on a slice.
    exit: the exit status of the command; None if it hasn't ended or if the status is unknown.
  """

  state: str = 'waiting'
  note: str = ''
  starts: int = 0
  slot: int = -1  # the slot of the last start
  slice: dict[str, str] | None = None
  exit: int | None = None
  started: float = 0.0  # seconds since 1970
  ended: float = 0.0


class Sweep:
  """Runs the points of one sweep, and records their states in sweep.json.

  Each running point has a slot, a number that no other running point has. On TPUs, it is the number of the slice.

  Attributes:
    slices: the slices that this sweep has used, in this launch or an earlier one, and that aren't known to be deleted.
      Each is a dict of the environment variables that name the slice, as `slice_of` returns them.
    others: the slices that points of this launch couldn't use, because they run other commands. They aren't in
      `slices`, because deleting them would end these commands.
  """

  def __init__(self, points: Sequence[Point], folder: pathlib.Path, parallel: int,
               command: Callable[[Point, int], list[str]], slice_of: Callable[[int], dict[str, str]] | None = None,
               start_delete: Callable[[dict[str, str]], subprocess.Popen] | None = None):
    """Reads the states that earlier launches have recorded.

    Args:
      points: the points, each after the points that it needs.
      folder: where sweep.json and the logs are written.
      parallel: the largest number of points that run at the same time.
      command: a function (point, slot) -> command, a list of words.
      slice_of: a function slot -> slice; None if points don't run on slices.
      start_delete: a function that starts to delete a slice, and returns a process with exit status 0 for success;
        needed if points run on slices.
    """
    self.points, self.folder, self.parallel, self._command = list(points), folder, parallel, command
    self._slice_of, self._start_delete = slice_of, start_delete
    self.status = {point.name: Status() for point in points}
    self._processes: dict[str, subprocess.Popen | None] = {}  # None: started by an earlier launch, and still running
    # Points whose result couldn't be read: (first try, next try), in monotonic seconds.
    self._unread: dict[str, tuple[float, float]] = {}
    self._record = self._read()
    if 'slices' not in self._record:  # it is new, or from before 2026-11-28, when only slots were recorded
      states = [(point.stage, vars(self.status[point.name])) for point in points]
      states += [(point['stage'], point['status']) for point in self._record['points'].values() if 'status' in point]
      used = [state for stage, state in states if slice_of and stage != 'data' and state['slot'] >= 0]
      for state in used:
        state['slice'] = slice_of(state['slot'])
      self._record['slices'] = [slice_of(slot) for slot in sorted({state['slot'] for state in used})]
    self.slices: list[dict[str, str]] = self._record['slices']
    self.others: list[dict[str, str]] = []
    self._deletes: list[tuple[dict[str, str], subprocess.Popen]] = []  # one for each slice at most
    self.stopping = False

  def _read(self) -> dict[str, Any]:
    """Returns the content of sweep.json with this launch added.

    Also sets self.status from the recorded states: 'finished' if a point's result is still valid, otherwise 'waiting'.
    """
    path = self.folder / 'sweep.json'
    record = json.loads(path.read_text()) if path.exists() else {'launches': [], 'points': {}}
    configs = resolved(self.points)
    for point in self.points:
      before = record['points'].get(point.name)
      if before:
        status = self.status[point.name] = Status(**before['status'])
        # An evaluation leaves nothing that could be checked, so the record decides if its settings are the same.
        same = before['config'] == configs[point.name] and before['arguments'] == list(point.arguments)
        if status.state != 'finished' or point.finished() is False or not (same or point.stage in TRAINS):
          status.state, status.note = 'waiting', ''
      if point.finished():
        self.status[point.name].state = 'finished'
    record['launches'].append({'at': time.time(), 'code_version': workdir.code_version(), 'argv': sys.argv[1:]})
    for point in self.points:
      record['points'][point.name] = {
        'stage': point.stage, 'after': point.after, 'needs': list(point.needs), 'workdir': point.workdir,
        'arguments': list(point.arguments), 'config': configs[point.name]}
    return record

  def write(self) -> None:
    """Writes sweep.json, atomically."""
    for name, status in self.status.items():
      self._record['points'][name]['status'] = dataclasses.asdict(status)
    write_atomically(self.folder / 'sweep.json', json.dumps(self._record, indent=1) + '\n')

  def _lock_path(self, name: str) -> pathlib.Path:
    return self.folder / '.sweep' / f'{name}.lock'

  def log(self, point: Point) -> pathlib.Path:
    """Returns the file with the output of a point's command."""
    return self.folder / '.sweep' / f'{point.name}.log'

  def run(self, show: Callable[[], None]) -> None:
    """Runs points until no command is running and none can be started.

    If this launcher fails with an error, asks all running commands to stop, and waits for them.

    show: called regularly, to show the state of the sweep.
    """
    for point in self.points:
      self._adopt(point)
    self.write()
    try:
      while True:
        changed = [self._end(point) for point in self.points if point.name in self._processes]
        changed += [self._begin(point) for point in self.points if self.status[point.name].state == 'waiting']
        if self._slice_of:
          changed.append(self._delete_spare())
        if any(changed):
          self.write()
        show()
        if not self._processes and (self.stopping or not any(changed)):
          return
        time.sleep(POLL_S)
    finally:
      if self._processes:  # the launcher has failed, and no run may continue without it
        self.stop(hard=False)
        self._wait()
      if not self.stopping:
        for _, process in self._deletes:
          process.wait()

  def _begin(self, point: Point) -> bool:
    """Starts a point if the points that it needs are finished and fewer than `parallel` commands are running.

    If a point that it needs has failed or was skipped, marks the point as skipped instead. Returns whether the point's
    state has changed.
    """
    status = self.status[point.name]
    for name in point.needs:
      if self.status[name].state in ('failed', 'skipped'):
        status.state, status.note = 'skipped', f'needs {name}'
        return True
    if self.stopping or any(self.status[name].state != 'finished' for name in point.needs):
      return False
    if len(self._processes) >= self.parallel:
      return False
    taken = {self.status[name].slot for name in self._processes} | {status['slot'] for status in self._unselected()}
    status.slot = min(set(range(self.parallel + len(taken))) - taken)
    status.state, status.note, status.started, status.exit = 'running', '', time.time(), None
    status.starts += 1
    status.slice = None
    if self._slice_of and point.stage != 'data':  # data is prepared on this machine
      status.slice = self._slice_of(status.slot)
      self._move(status.slice, self.others, self.slices)
      self._deletes = [(item, process) for item, process in self._deletes if item != status.slice]
    self.write()  # before the command can create the slice
    with self._lock(point.name) as held, open(self.log(point), 'ab') as log:
      command = self._command(point, status.slot)
      log.write(f'$ {shlex.join(command)}\n'.encode())
      log.flush()
      process = self._processes[point.name] = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, pass_fds=(held.fileno(),),
        start_new_session=True)  # Ctrl-C reaches only the launcher, which asks its commands to stop
      held.write(str(process.pid))
    if self.stopping:  # a signal arrived while the command was being started
      self.stop(hard=False)
    return True

  @staticmethod
  def _move(item: dict[str, str], source: list[dict[str, str]], target: list[dict[str, str]]) -> None:
    """Removes an item from `source`, and adds it to `target`, unless it was done before."""
    if item in source:
      source.remove(item)
    if item not in target:
      target.append(item)

  def _delete_spare(self) -> bool:
    """Deletes the slices that no remaining point can use, in the background. Returns whether self.slices has changed.

    If deleting fails, it is left to the end of the sweep. If the sweep was asked to stop, slices are kept.
    """
    if self.stopping:
      return False
    for item in self._spare():
      if all(item != begun for begun, _ in self._deletes):
        self._deletes.append((item, self._start_delete(item)))
    deleted = [item for item, process in self._deletes if process.poll() == 0 and item in self.slices]
    for item in deleted:
      self.slices.remove(item)
    return bool(deleted)

  def _spare(self) -> list[dict[str, str]]:
    """Returns the slices that no remaining point can use."""
    remaining = set()  # the names of the points that run or can still start
    for point in self.points:
      state = self.status[point.name].state
      if state == 'running' or (state == 'waiting' and all(
          name in remaining or self.status[name].state == 'finished' for name in point.needs)):
        remaining.add(point.name)
    remaining = [point for point in self.points if point.name in remaining and point.stage != 'data']
    # A point needs at most one point that runs on a slice. Therefore, the points that no other point needs are the
    # largest set of points that could run at the same time.
    needed = {name for point in remaining for name in point.needs}
    most = min(self.parallel, sum(point.name not in needed for point in remaining))
    running = [self.status[name] for name in self._processes]
    used = [status.slice for status in running if status.slice]
    taken = {status.slot for status in running if status.slice} | {status['slot'] for status in self._unselected()}
    # As _begin will choose: other slots now than once the points that prepare data, and have no slice, have ended.
    data = sum(not status.slice for status in running)
    free = sorted(set(range(most + len(taken) + data)) - taken)
    used += [self._slice_of(slot) for slot in free[:max(0, most - len(used)) + data]] + self.held()
    return [item for item in self.slices if item not in used]

  def held(self) -> list[dict[str, str]]:
    """Returns the slices of the points that aren't selected, but whose commands still run since an earlier launch."""
    return [status['slice'] for status in self._unselected() if status['slice'] in self.slices]

  def _unselected(self) -> list[dict[str, Any]]:
    """Returns the recorded states of the points of `held`, each as a dict with the attributes of Status."""
    found = []
    for name, point in self._record['points'].items():
      if name not in self.status and point.get('status', {}).get('slice'):
        with self._lock(name) as held:
          if held is None:
            found.append(point['status'])
    return found

  def _lock(self, name: str) -> contextlib.AbstractContextManager[IO[str] | None]:
    """Returns a context manager that takes the lock of a point. It yields the lock's file, or None if another process
    holds the lock.

    The command of a point inherits the lock and holds it as long as it runs, even if this process dies. If a later
    launch finds the lock held, it knows that the command is still running. The lock's file contains the command's
    process id.
    """
    path = self._lock_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return workdir.lock_file(path)

  def _adopt(self, point: Point) -> bool:
    """Checks whether a command that an earlier launch started for this point is still running. If so, takes it over.

    Returns True if such a command is running.
    """
    with self._lock(point.name) as held:
      if held:
        return False
    status = self.status[point.name]
    self._processes[point.name] = None
    status.state, status.note = 'running', 'started by an earlier launch'
    return True

  def _end(self, point: Point) -> bool:
    """Updates the state of a point if its command has ended. Returns whether the state was updated.

    If the result of the command can't be read, the state isn't updated yet, and a later call tries again.
    """
    process, status, now = self._processes[point.name], self.status[point.name], time.monotonic()
    first, next_try = self._unread.get(point.name, (now, now))
    if now < next_try:
      return False
    if process is None:
      if self._adopt(point):
        return False
      code = None  # the status of a command that an earlier launch started isn't known
    elif (code := process.poll()) is None:
      return False
    try:
      state, note = self._outcome(point, code)
    except OSError as error:  # a launcher may run for weeks, during which buckets fail and tokens expire
      if now - first < GIVE_UP_S and not self.stopping:
        self._unread[point.name] = first, now + READ_AGAIN_S
        status.note = f'its result could not be read, which is tried again ({error})'[:200]
        return False
      state, note = 'failed', f'its result could not be read ({error})'[:200]
    self._unread.pop(point.name, None)
    del self._processes[point.name]
    status.exit, status.ended, status.state, status.note = code, time.time(), state, note
    if status.slice and code == OTHER:
      self._move(status.slice, self.slices, self.others)
    return True

  def _outcome(self, point: Point, code: int | None) -> tuple[str, str]:
    """Returns the state and the note (see Status) of a point whose command has ended.

    code: the exit status of the command; None if it is unknown.

    Raises:
      OSError: the result of the command can't be read.
    """
    finished = point.finished()
    if finished is None:
      finished = code == 0
    if finished and code in (0, None):
      return 'finished', ''
    if code in STOPPED:
      return 'stopped', f'at step {point.step()} of {point.steps}' if point.steps else ''
    if self.stopping or code is None:
      return 'waiting', ''
    return 'failed', self._reason(point, code)

  def _reason(self, point: Point, code: int) -> str:
    """Returns the reason why a command failed, on one line: its last error, or its exit status and its last line."""
    lines = self.log(point).read_text(errors='replace').splitlines()
    errors = [line.removeprefix('tpu.sh: ') for line in lines[-50:] if line.startswith(('error: ', 'tpu.sh: error: '))]
    if code == 0:
      return f'ended at step {point.step()} of {point.steps} with exit 0'
    how = f'killed by signal {-code}' if code < 0 else f'exit {code}'
    return errors[-1].removeprefix('error: ') if errors else f'{how}: {lines[-1] if lines else ""}'[:200]

  def _wait(self) -> None:
    """Waits until no command of this sweep is running."""
    for point in self.points:
      process = self._processes.get(point.name)
      if process:
        process.wait()
      elif point.name in self._processes:
        while self._adopt(point):
          time.sleep(POLL_S)

  def stop(self, hard: bool) -> None:
    """Asks the running commands to save and stop, and starts no others.

    hard: whether to kill the commands instead.
    """
    self.stopping = True
    for point in self.points:
      if point.name in self._processes:
        process = self._processes[point.name]
        pid = process.pid if process else workdir.holder(self._lock_path(point.name))
        with contextlib.suppress(ProcessLookupError, ValueError):
          os.killpg(int(pid), signal.SIGKILL) if hard else os.kill(int(pid), signal.SIGTERM)

  def progress(self, point: Point) -> tuple[int, float | None]:
    """Returns (step, seconds left) of a running point, read from the end of its metrics file.

    Returns (0, None) if the point doesn't train, or if no logged step can be read on this machine.
    """
    path = pathlib.Path(point.workdir) / 'metrics.jsonl'
    if point.stage not in TRAINS or not path.exists():
      return 0, None
    with open(path, 'rb') as file:
      file.seek(max(0, path.stat().st_size - 65_536))
      lines = file.read().decode(errors='replace').splitlines()
    steps = []
    for line in lines:
      with contextlib.suppress(json.JSONDecodeError):
        values = json.loads(line)
        if 'time/step_s' in values:
          steps.append((values['step'], values['time/step_s']))
    if not steps:
      return 0, None
    times = sorted(step_s for _, step_s in steps[-20:])
    return steps[-1][0], (point.steps - steps[-1][0]) * times[len(times) // 2]


class Screen:
  """Shows the state of the sweep.

  On a terminal, this is a live table. Elsewhere, a line is printed when a point's state changes, and progress is
  printed every minute.
  """

  def __init__(self, sweep: Sweep, console: Console):
    self._sweep, self._console = sweep, console
    self._live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
    self._printed: dict[str, tuple[str, str]] = {}
    self._next_progress = self._drawn = 0.0

  def __enter__(self):
    if self._live:
      self._live.start()
    return self

  def __exit__(self, *_):
    if self._live:
      self._live.stop()

  def __call__(self) -> None:
    now = time.monotonic()
    if self._live and now - self._drawn > 1:
      self._drawn = now
      self._live.update(self.table())
    if self._live:
      return
    for name, status in self._sweep.status.items():
      if status.state != 'waiting' and self._printed.get(name) != (status.state, status.note):
        self._printed[name] = status.state, status.note
        self._console.print(f'{status.state:9} {name}' + (f': {status.note}' if status.note else ''), markup=False)
    if now > self._next_progress:
      if self._next_progress:
        running = [p for p in self._sweep.points if self._sweep.status[p.name].state == 'running']
        for point in running:
          step, left = self._sweep.progress(point)
          left = duration(left) if left is not None else '?'
          self._console.print(f'          {point.name}: step {step}/{point.steps}, {left} left', markup=False)
      self._next_progress = now + PROGRESS_EVERY_S

  def table(self) -> Table:
    """Returns a table with a row per point: state, step, time left and note."""
    table = Table('point', 'state', 'step', 'left', 'note', box=None)
    for point in self._sweep.points:
      status = self._sweep.status[point.name]
      step, left = '', ''
      if status.state == 'running' and point.steps:
        at, seconds = self._sweep.progress(point)
        step, left = f'{at}/{point.steps}', duration(seconds) if seconds is not None else 'starting'
      style = _COLOURS.get(status.state, '')
      table.add_row(point.name, f'[{style}]{status.state}[/]' if style else status.state, step, left, status.note[:80])
    return table


def local_command(point: Point, _slot: int) -> list[str]:
  """Returns the command that runs a point on this machine."""
  return [*BETARANK, *point.arguments]


def main(argv: Sequence[str]) -> None:
  """Runs the command. The exit status is 0 if every point is finished, 129, 130 or 143 if it was asked to stop (SIGHUP,
  Ctrl-C, SIGTERM), else 1.
  """
  args = _parse(argv)
  remote = '://' in args.root
  root = args.root.rstrip('/')
  with waiting('resolving the config of every point'):
    points = expand(args.config, root, args.only)
  console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 240)
  command, problems = local_command, local_files(points) if remote else []
  slice_of = start_delete = clean_up = None
  if args.on == 'tpu':
    from betarank.launch import on_tpu
    command, slice_of = on_tpu.command(args.dry_run), on_tpu.slice_of
    start_delete, clean_up = on_tpu.start_delete, on_tpu.clean_up
    if args.dry_run:
      on_tpu.print_estimate(console, points, args.parallel, args.plan)
  elif args.on != 'local':
    command = engine.command(args.on, args.chips)
  if args.dry_run:
    for problem in problems:
      console.print(f'to be fixed before a launch: {problem}', markup=False)
    _print_points(console, points, command, remote)
    return
  if problems:
    raise ConfigError(problems[0])
  if remote and not importlib.util.find_spec('gcsfs'):
    raise ConfigError(f'--root={args.root}: a bucket needs gcsfs ({install_hint(root)})')
  check_workdirs(points)
  for point in points:
    if point.finished():
      continue
    # What is wrong with a command is said now, because an error when its stage starts would stop all other runs.
    if not shutil.which(program := command(point, 0)[0]):
      raise ConfigError(f'--on={args.on}: {program} is not installed on this machine')

  folder = pathlib.Path(sweep_folder(root))
  folder.mkdir(parents=True, exist_ok=True)
  with workdir.lock_file(folder / '.sweep.lock') as held:
    if held is None:
      raise UserError(f'--root={root}: another launch is running there, process '
                      f'{workdir.holder(folder / ".sweep.lock")}')
    held.write(str(os.getpid()))
    held.flush()
    sweep = Sweep(points, folder, args.parallel, command, slice_of, start_delete)
    signals: list[int] = []
    terminals = [stream.fileno() for stream in (sys.stdout, sys.stderr) if stream.isatty()]

    def stop(signum: int, _frame) -> None:
      signals.append(signum)
      if signum == signal.SIGHUP:  # the terminal was closed, so printing would raise an error
        with open(os.devnull, 'wb') as nowhere:
          for terminal in terminals:
            os.dup2(nowhere.fileno(), terminal)
      if len(signals) == 1:
        print('stopping: runs save after their step; Ctrl-C again ends them at once', file=sys.stderr, flush=True)
      # A closed terminal may send SIGHUP twice: a shell passes it on, and the kernel sends it when the shell ends.
      sweep.stop(hard=len(signals) > 1 and signum != signal.SIGHUP)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
      if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # ignored under nohup
        signal.signal(signum, stop)
    with listening(lambda count: None):  # instead of ending this process after the second Ctrl-C
      run(sweep, console, signals, clean_up)
  if not _all_finished(sweep):
    sys.exit(128 + signals[0] if signals else 1)
  print(f'try: {shlex.join(["betarank", "report", root])}')


def run(sweep: Sweep, console: Console, signals: Sequence[int],
        clean_up: Callable[..., list[dict[str, str]]] | None) -> None:
  """Runs a sweep, shows its progress on the screen, and prints how it ended.

  Args:
    signals: the signals received so far. The signal handlers append to this list.
    clean_up: a function (console, slices, others, keep) -> the slices that are left. It is always called at the end, to
      delete the slices; None if there are no slices. `others` are the slices that run other commands. If the sweep was
      asked to stop, `keep` is True, and no slice is deleted. After SIGHUP they are deleted, because the line that names
      the kept slices would be lost with the terminal.
  """
  try:
    with Screen(sweep, console) as screen:
      sweep.run(screen)
      table = screen.table()
    if console.is_terminal:
      console.print(table)
    _conclude(sweep, console)
    if signals and not _all_finished(sweep):
      print('asked to stop; the same command resumes the sweep', file=sys.stderr)
  finally:
    if clean_up:
      held = sweep.held()
      slices = [item for item in sweep.slices if item not in held]
      keep = bool(signals) and signal.SIGHUP not in signals
      sweep.slices[:] = clean_up(console, slices, sweep.others + held, keep) + held
      sweep.write()


def _parse(argv: Sequence[str]) -> argparse.Namespace:
  """Parses and checks the flags. Raises ConfigError for values that can't be used; argparse reports other errors."""
  parser = Parser('betarank sweep', __doc__)
  parser.add_argument('--config', required=True, metavar='FILE.py[:ARG]', help='an experiment with sweep(add)')
  parser.add_argument('--on', default='local', metavar='local|tpu|COMMAND',
                      help='where points run; COMMAND has {command} in it, and may have {name}, {chips} and {slot}')
  parser.add_argument('--chips', action='append', default=[], metavar='[STAGE=]N',
                      help='the number for {chips} in --on; repeatable')
  parser.add_argument('--root', type=unopened_place, metavar='DIR', help='folder of the sweep; gs://... for --on=tpu')
  parser.add_argument('--only', action='append', default=[], metavar='PATTERN',
                      help='run only the points whose names match this shell pattern, and those they need; repeatable')
  parser.add_argument('--parallel', type=int, default=1, help='points, or slices, at once (default 1)')
  parser.add_argument('--dry_run', action='store_true', help='print what would be run, and start nothing')
  parser.add_argument('--plan', action='store_true',
                      help='with --on=tpu --dry_run: hours from betarank plan, which compiles for minutes')
  args = parser.parse_args(argv)
  if args.parallel < 1:
    parser.error('--parallel must be 1 or more')
  if not args.root:
    if not args.dry_run:
      parser.error('--root is needed')
    args.root = ('gs://BUCKET/' if args.on == 'tpu' else 'runs/') + pathlib.Path(args.config.partition('.py')[0]).name
  if args.on == 'tpu' and '://' not in args.root:
    raise ConfigError(f'--root={args.root}: slices share no disk with this machine; give a bucket, gs://BUCKET/FOLDER')
  return args


def _print_points(console: Console, points: Sequence[Point], command: Callable[[Point, int], list[str]],
                  remote: bool) -> None:
  """Prints each point with its state and command.

  remote: if True, states are left out, because they can't be read without credentials.
  """
  for point in points:
    state = ''
    if not remote:
      state = 'finished' if point.finished() else f'from step {point.step()}' if point.step() else 'to do'
    notes = ', '.join(filter(None, (state, point.needs and f'after {", ".join(point.needs)}')))
    console.print(f'{point.name}  {notes and f"({notes})"}', markup=False)
    console.print(f'  {shlex.join(command(point, 0))}', markup=False)


def _all_finished(sweep: Sweep) -> bool:
  return all(status.state == 'finished' for status in sweep.status.values())


def _conclude(sweep: Sweep, console: Console) -> None:
  """Prints how many points are in each state, and one line for each point that was stopped, failed or skipped."""
  count = lambda state: sum(status.state == state for status in sweep.status.values())
  console.print(', '.join(f'{count(state)} {state}' for state in STATES if count(state)) + f', of {len(sweep.points)}')
  for point in sweep.points:
    status = sweep.status[point.name]
    if status.state in ('stopped', 'failed', 'skipped'):
      console.print(f'{status.state} {point.name}: {status.note}'
                    + (f' ({sweep.log(point)})' if status.state == 'failed' else ''), markup=False)
