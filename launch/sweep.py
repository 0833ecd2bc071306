"""betarank sweep --config=configs/smoke.py --on=local|tpu --root=DIR [--only=PATTERN] [--parallel=N]
    [--dry_run [--plan]]

Runs the points that `sweep(add)` in the config file names (launch/points.py): those that nothing holds up, at most N
at once, then what comes after them. Started again, it skips what is finished, goes on with what is half done and
tries once more what failed. A point that fails takes only those with it that need it.

    DIR/sweep.json          points, their states, commands and configs, and the code versions they ran with
    DIR/NAME/               workdir of a point that trains
    DIR/.sweep/NAME.log     what its command printed

With --on=tpu a point runs on a slice through launch/tpu.sh, which reads its settings from the environment
(docs/tpu.md); N is the number of slices, which take points in turn. Workdirs are then gs:// and DIR's own files are
under runs/sweeps. Data is prepared on this machine, into DIR where the config names a local folder.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from betarank.configs import load
from betarank.configs.errors import ConfigError, UserError
from betarank.launch.points import BETARANK, TRAINS, Point, check_workdirs, expand, resolved
from betarank.runtime import workdir
from betarank.runtime.metrics import duration

POLL_S = 0.2
SAY_EVERY_S = 60.0  # without a terminal: how often progress is printed
STATES = ('waiting', 'running', 'finished', 'failed', 'skipped')
_COLOURS = {'running': 'cyan', 'finished': 'green', 'failed': 'red', 'skipped': 'yellow'}


@dataclasses.dataclass
class Status:
  """How a point stands. `starts` counts how often its command was started, over all launches; `slot`: of the last."""

  state: str = 'waiting'
  note: str = ''
  starts: int = 0
  slot: int = -1
  exit: int | None = None
  started: float = 0.0  # seconds since 1970
  ended: float = 0.0


class Sweep:
  """The points of one root, their states on disk, and the processes that run them."""

  def __init__(self, points: Sequence[Point], folder: pathlib.Path, parallel: int,
               command: Callable[[Point, int], list[str]]):
    """command(point, slot): what to run; slot in [0, parallel) is held by one point at a time."""
    self.points, self.folder, self.parallel, self._command = list(points), folder, parallel, command
    self.status = {point.name: Status() for point in points}
    self._processes: dict[str, subprocess.Popen | None] = {}  # None: started by an earlier launch, still running
    self._record = self._read()
    self.stopping = False

  def _read(self) -> dict[str, Any]:
    """What an earlier launch left; takes over the states that still mean something."""
    path = self.folder / 'sweep.json'
    record = json.loads(path.read_text()) if path.exists() else {'launches': [], 'points': {}}
    configs = resolved(self.points)
    for point in self.points:
      before = record['points'].get(point.name)
      if before:
        status = self.status[point.name] = Status(**before['status'])
        # Where the result itself can't be looked at, the record says whether it is there, and of which settings.
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
    for name, status in self.status.items():
      self._record['points'][name]['status'] = dataclasses.asdict(status)
    temporary = self.folder / 'sweep.json.tmp'
    temporary.write_text(json.dumps(self._record, indent=1) + '\n')
    temporary.replace(self.folder / 'sweep.json')

  def log(self, point: Point) -> pathlib.Path:
    return self.folder / '.sweep' / f'{point.name}.log'

  def run(self, show: Callable[[], None]) -> None:
    """Returns when nothing runs and nothing more can be started."""
    for point in self.points:
      self._adopt(point)
    self.write()
    while True:
      changed = [self._end(point) for point in self.points if point.name in self._processes]
      changed += [self._begin(point) for point in self.points if self.status[point.name].state == 'waiting']
      if any(changed):
        self.write()
      show()
      if not self._processes and (self.stopping or not any(changed)):
        return
      time.sleep(POLL_S)

  def _begin(self, point: Point) -> bool:
    """Starts a point if it can be started; whether anything changed."""
    status = self.status[point.name]
    for name in point.needs:
      if self.status[name].state in ('failed', 'skipped'):
        status.state, status.note = 'skipped', f'needs {name}'
        return True
    if self.stopping or any(self.status[name].state != 'finished' for name in point.needs):
      return False
    if len(self._processes) >= self.parallel:
      return False
    taken = {self.status[name].slot for name in self._processes}
    status.slot = min(set(range(self.parallel + len(taken))) - taken)
    status.state, status.note, status.started, status.exit = 'running', '', time.time(), None
    status.starts += 1
    self.write()
    with self._lock(point) as held, open(self.log(point), 'ab') as log:
      command = self._command(point, status.slot)
      log.write(f'$ {shlex.join(command)}\n'.encode())
      log.flush()
      process = self._processes[point.name] = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, pass_fds=(held.fileno(),),
        start_new_session=True)  # Ctrl-C reaches the launcher alone, which asks its commands to stop
      held.write(str(process.pid))
    if self.stopping:  # the signal came while it was being started
      self.stop(hard=False)
    return True

  def _lock(self, point: Point):
    """The lock that a point's command inherits and holds as long as it lives, whatever becomes of this process: who
    finds it taken knows that an earlier launch's command is still at work. The file has the command's process id.
    """
    path = self.log(point).with_suffix('.lock')
    path.parent.mkdir(parents=True, exist_ok=True)
    return workdir.lock_file(path)

  def _adopt(self, point: Point) -> bool:
    """Whether a command that an earlier launch started for this point still runs; it is waited for then."""
    with self._lock(point) as held:
      if held:
        return False
    status = self.status[point.name]
    self._processes[point.name] = None
    status.state, status.note = 'running', 'started by an earlier launch'
    return True

  def _end(self, point: Point) -> bool:
    """Takes note of a point that is no longer running; whether anything changed."""
    process, status = self._processes[point.name], self.status[point.name]
    if process is None:
      if self._adopt(point):
        return False
      code = None
    elif (code := process.poll()) is None:
      return False
    del self._processes[point.name]
    status.exit, status.ended, status.note = code, time.time(), ''
    finished = point.finished()
    if finished is None:
      finished = code == 0
    if finished and code in (0, None):
      status.state = 'finished'
    elif self.stopping or code is None:  # what an earlier launch started and didn't finish is simply started again
      status.state = 'waiting'
    else:
      status.state, status.note = 'failed', self._why(point, code)
    return True

  def _why(self, point: Point, code: int) -> str:
    lines = self.log(point).read_text(errors='replace').splitlines()
    errors = [line for line in lines[-50:] if line.startswith('error: ')]
    if code == 0:
      return f'ended at step {point.step()} of {point.steps}, as if asked to stop'
    how = f'killed by signal {-code}' if code < 0 else f'exit {code}'
    return errors[-1].removeprefix('error: ') if errors else f'{how}: {lines[-1] if lines else ""}'[:200]

  def stop(self, hard: bool) -> None:
    """Asks what runs to save and end, or ends it."""
    self.stopping = True
    for point in self.points:
      if point.name in self._processes:
        process = self._processes[point.name]
        pid = process.pid if process else workdir.holder(self.log(point).with_suffix('.lock'))
        with contextlib.suppress(ProcessLookupError, ValueError):
          os.killpg(int(pid), signal.SIGKILL) if hard else os.kill(int(pid), signal.SIGTERM)

  def progress(self, point: Point) -> tuple[int, float | None]:
    """(step, seconds left) of a running point, from the end of its metrics file."""
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
  """The live table, or lines where there is no terminal."""

  def __init__(self, sweep: Sweep, console: Console):
    self._sweep, self._console = sweep, console
    self._live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
    self._said: dict[str, tuple[str, str]] = {}
    self._next = self._drawn = 0.0

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
      if status.state != 'waiting' and self._said.get(name) != (status.state, status.note):
        self._said[name] = status.state, status.note
        self._console.print(f'{status.state:9} {name}' + (f': {status.note}' if status.note else ''), markup=False)
    if now > self._next:
      if self._next:
        running = [p for p in self._sweep.points if self._sweep.status[p.name].state == 'running']
        for point in running:
          step, left = self._sweep.progress(point)
          left = duration(left) if left is not None else '?'
          self._console.print(f'          {point.name}: step {step}/{point.steps}, {left} left', markup=False)
      self._next = now + SAY_EVERY_S

  def table(self) -> Table:
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
  return [*BETARANK, *point.arguments]


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(prog='betarank sweep', description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', required=True, metavar='FILE.py[:ARG]', help='an experiment with sweep(add)')
  parser.add_argument('--on', choices=('local', 'tpu'), default='local')
  parser.add_argument('--root', default='', metavar='DIR', help='where the sweep is; gs://... for --on=tpu')
  parser.add_argument('--only', action='append', default=[], metavar='PATTERN',
                      help='points by name, as the shell matches; with what they need. May be repeated')
  parser.add_argument('--parallel', type=int, default=1, help='points, or slices, at once (default 1)')
  parser.add_argument('--dry_run', action='store_true', help='print what would be run, and start nothing')
  parser.add_argument('--plan', action='store_true',
                      help='with --on=tpu --dry_run: hours from launch.plan, which compiles for minutes')
  args = parser.parse_args(argv)
  load.check_places(vars(args))
  if args.parallel < 1:
    parser.error('--parallel must be 1 or more')
  if not args.root:
    if not args.dry_run:
      parser.error('--root is needed')
    args.root = ('gs://BUCKET/' if args.on == 'tpu' else 'runs/') + pathlib.Path(args.config.partition('.py')[0]).name
  remote = '://' in args.root
  if args.on == 'tpu' and not remote:
    raise ConfigError(f'--root={args.root}: slices share nothing with this machine; give a bucket, gs://BUCKET/FOLDER')
  root = args.root.rstrip('/')
  points = expand(args.config, root, args.only)
  console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 240)

  command = local_command
  if args.on == 'tpu':
    from betarank.launch import on_tpu
    command = on_tpu.command(args.dry_run)
    if args.dry_run:
      on_tpu.print_plan(console, points, args.parallel, args.plan)
    elif problems := on_tpu.unreadable(points):
      raise ConfigError(problems[0])
  if args.dry_run:
    for point in points:
      state = ''
      if not remote:  # a dry run needs no credentials
        state = 'finished' if point.finished() else f'from step {point.step()}' if point.step() else 'to do'
      notes = ', '.join(filter(None, (state, point.needs and f'after {", ".join(point.needs)}')))
      console.print(f'{point.name}  {notes and f"({notes})"}', markup=False)
      console.print(f'  {shlex.join(command(point, 0))}', markup=False)
    return
  if remote and not importlib.util.find_spec('gcsfs'):
    raise ConfigError(f'--root={args.root}: a bucket needs gcsfs: pip install gcsfs')
  check_workdirs(points)

  folder = pathlib.Path('runs/sweeps') / root.partition('://')[2] if remote else pathlib.Path(root)
  folder.mkdir(parents=True, exist_ok=True)
  with workdir.lock_file(folder / '.sweep.lock') as held:
    if held is None:
      raise UserError(f'--root={root}: process {workdir.holder(folder / ".sweep.lock")} is a launch at work there')
    held.write(str(os.getpid()))
    held.flush()
    sweep = Sweep(points, folder, args.parallel, command)
    asked = 0

    def ask(*_):
      nonlocal asked
      asked += 1
      sweep.stop(hard=asked > 1)

    for name in (signal.SIGINT, signal.SIGTERM):
      signal.signal(name, ask)
    with Screen(sweep, console) as screen:
      sweep.run(screen)
      table = screen.table()
    if args.on == 'tpu' and not sweep.stopping:
      on_tpu.clean_up(console, args.parallel)
    if console.is_terminal:
      console.print(table)
  _conclude(sweep, console)


def _conclude(sweep: Sweep, console: Console) -> None:
  """The last lines, and the exit status: 0 only if every point is finished."""
  count = lambda state: sum(status.state == state for status in sweep.status.values())
  console.print(', '.join(f'{count(state)} {state}' for state in STATES if count(state)) + f', of {len(sweep.points)}')
  for point in sweep.points:
    status = sweep.status[point.name]
    if status.state in ('failed', 'skipped'):
      console.print(f'{status.state} {point.name}: {status.note}'
                    + (f' ({sweep.log(point)})' if status.state == 'failed' else ''), markup=False)
  if count('finished') < len(sweep.points):
    sys.exit('asked to stop; the same command goes on from there' if sweep.stopping else 1)
