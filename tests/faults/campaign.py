"""Runs the tiny runs that the faults hit, and compares what they leave with undisturbed runs of the same kind.

Each trial has a folder of its own, which is HOME of all its processes, and contains their folder for temporary files.
In this way, orphaned processes and forgotten files are found.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from betarank.runtime import checkpoint
from tests.runs import arrays, deadline_s, environment, free_port, metrics
from tests.soak.scale import Delay

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PATIENCE_S = 900.0  # for a run that takes seconds, or a minute with many processes, on an idle machine
SUMS = 'reasoning:chain_sum?max_terms=2&max_digits=1'
_killed: dict[int, pathlib.Path] = {}  # by `kill_all`: process id -> folder of its trial
# Keys of JSON files whose values say when and how a command was started, and of which code, but not what it computed.
OF_A_START = {'code_version', 'command', 'ended', 'exit', 'launches', 'processes', 'seconds', 'slot', 'started',
              'started_s', 'starts'}


class Missed(Exception):
  """Raised if the fault came too late or too early to hit anything. The trial is then repeated at another point."""


class Kind:
  """A kind of run: its steps and the command lines of its processes."""

  def __init__(self, name: str, steps: int, *commands: tuple[str, ...], processes: int = 1, of: str = ''):
    """of: the name of another kind. A run of this kind starts in the finished workdir of a run of that kind."""
    self.name, self.steps, self.commands, self.processes, self.of = name, steps, commands, processes, of
    self.took_s = 0.0  # duration of the undisturbed run, with all programs compiled before


class Campaign:
  """The inputs that all trials share, the undisturbed runs, and the methods that trials use."""

  def __init__(self, root: pathlib.Path, many: int = 8):
    """many: the number of processes of a run of the kind `many`."""
    self.root = root
    self.ready: set[str] = set()  # kinds that can be used
    self._expected: dict[str, dict] = {}  # what the undisturbed run of a kind left
    self.data, self.sums, self.trained = root / 'data', root / 'sums', root / 'trained'
    tiny, tiny_rl = f'--config=tests/tiny.py:dir={self.data}', 'tests/tiny_rl.py'
    config = f'--config={tiny_rl}:init_from={self.trained}'
    self.kinds = {kind.name: kind for kind in (
      Kind('train', 12, ('train', tiny, '--workdir={workdir}')),
      Kind('pair', 12, ('train', tiny, '--workdir={workdir}', '--config.model.layers=1', '--config.log.samples=0',
                        '--host_deadline_s=8'), processes=2),
      Kind('many', 12, ('train', tiny, '--workdir={workdir}', '--config.model.layers=1', '--config.log.samples=0',
                        f'--config.train.batch_size={many}', f'--config.train.tokens={many * 32 * 12}',
                        f'--host_deadline_s={deadline_s(many)}'), processes=many),
      Kind('rl', 6, ('rl', config, '--workdir={workdir}')),
      # The cache has room for 5 of the 16 rows at their greatest length, so samples stop and are drawn again.
      Kind('paged', 4, ('rl', config, '--workdir={workdir}', '--config.rl.steps=4', '--config.rl.cache_tokens=640')),
      # Problems whose answers go to the verifier's workers.
      Kind('workers', 3, ('rl', config, '--workdir={workdir}', '--config.rl.steps=3', '--config.rl.eval_prompts=2',
                          '--config.rl.task.uri=reasoning:decimal_chain_sum?max_terms=2&max_digits=1')),
      Kind('eval', 0, ('eval', 'sample', '--checkpoint={workdir}', f'--benchmark={SUMS}',
                       '--config.eval.sample.problems=24', '--config.eval.sample.samples=4',
                       '--config.eval.sample.max_new_tokens=24', '--config.eval.sample.decode_batch_size=8'), of='rl'),
      Kind('probe', 0, ('eval', 'probe', '--checkpoint={workdir}', '--all', '--config.eval.probe.rows=8'), of='train'),
      Kind('generate', 0, ('generate', '--checkpoint={workdir}', '--prompt=1 + 2 =', '--samples=2',
                           '--max_new_tokens=16'), of='train'),
      Kind('explore', 0, ('explore', '{workdir}', '--export={workdir}/view.html', '--text=1 + 2 = 3', '--samples=2',
                          '--max_new_tokens=16'), of='train'),
      Kind('watch', 0, ('watch', '{workdir}'), of='train'),
      Kind('report', 0, ('report', '{workdir}'), of='train'),
      Kind('plan', 0, ('plan', '--config=configs/smoke.py', '--topology=v5e-1', '--no_bundles')),
      Kind('data', 0, ('data', 'prepare', '--config=tests/tiny.py:dir={workdir}/prepared', '--workers=2',
                       '--config.data.sources.main.max_documents=20000')),
      Kind('sweep', 0, ('sweep', '--config=tests/tiny_sweep.py:dir={workdir}/data,arms=1', '--root={workdir}',
                        '--parallel=2')),
    )}

  def prepare(self, names: set[str]) -> None:
    """Creates the inputs. Runs each kind in `names` twice without a fault, and checks that both runs are equal."""
    self.ready = names
    done = self.root / 'undisturbed.json'  # {kind: seconds}, maybe from an earlier campaign in this folder
    took = json.loads(done.read_text()) if done.exists() else {}
    wanted = {name for name in self.kinds if name in names or any(self.kinds[n].of == name for n in names)}
    (self.root / 'setup').mkdir(parents=True, exist_ok=True)
    run = lambda *args: self.finish_well(self.start(self.root / 'setup', args))
    if wanted & {'train', 'pair', 'many'} and not self.data.exists():
      run('data', 'prepare', f'--config=tests/tiny.py:dir={self.data}')
    if wanted & {'rl', 'workers', 'paged'} and not self.trained.exists():
      source = '--config.data.sources.main.uri=reasoning:chain_sum'
      tiny = f'--config=tests/tiny.py:dir={self.sums},beta=0'
      run('data', 'prepare', tiny, source)
      run('train', tiny, source, f'--workdir={self.trained}', '--config.train.tokens=128000',
          '--config.checkpoint.every_steps=500', '--config.log.eval_every_steps=1000')
    for name in [name for name in self.kinds if name in wanted]:
      kind = self.kinds[name]
      for again in (False, True) if name not in took else ():  # the first run compiles
        place = self.root / ('again' if again else 'undisturbed') / name
        shutil.rmtree(place, ignore_errors=True)
        workdir = self.workdir(kind, place)
        began = time.monotonic()
        self.finish_well(*self.launch(kind, workdir))
        took[name] = time.monotonic() - began
        if again:
          self.check_same(kind, workdir)
          shutil.rmtree(place)
          done.write_text(json.dumps(took))
      kind.took_s = took[name]
    self._inputs = self._listing()

  # Trials

  def workdir(self, kind: Kind, place: pathlib.Path) -> pathlib.Path:
    """Returns a new workdir for a run of this kind. It is empty, or a copy of a finished workdir of kind.of."""
    (place / 'tmp').mkdir(parents=True)
    if kind.of:
      shutil.copytree(self.undisturbed(self.kinds[kind.of]), place / 'workdir')
    return place / 'workdir'

  def undisturbed(self, kind: Kind) -> pathlib.Path:
    return self.root / 'undisturbed' / kind.name / 'workdir'

  def start(self, place: pathlib.Path, args, fault: dict | None = None, env: dict | None = None,
            cwd: pathlib.Path = ROOT, module: str = 'betarank', devices: int = 1, **popen) -> subprocess.Popen:
    (place / 'tmp').mkdir(exist_ok=True)
    settings = {**environment(devices), **(env or {}), 'HOME': str(place), 'TMPDIR': str(place / 'tmp'),
                'PYTHONDONTWRITEBYTECODE': '1',
                # Compiled once: all runs have the same programs, and take five seconds instead of fifteen.
                'JAX_COMPILATION_CACHE_DIR': str(self.root / 'programs'),
                'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}
    module = 'tests.faults.child' if fault else module
    return subprocess.Popen(
      [sys.executable, '-m', module, *args], cwd=cwd, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, env={**settings, 'FAULT': json.dumps(fault)} if fault else settings, **popen)

  def launch(self, kind: Kind, workdir: pathlib.Path, *flags: str, processes: int = 0, delay_s: float = 0.0,
             env: dict[int, dict] | None = None, **options) -> list[subprocess.Popen]:
    """Starts the processes of a run, and returns them.

    processes: their number, if it isn't that of the kind. It must divide that of the kind. Each process then has more
      devices, so that the job has as many devices as before, and therefore the same bits.
    delay_s: how much later everything between process 0, which coordinates the job, and the others arrives.
    env: {index of a process: further environment variables}.
    """
    [command] = kind.commands
    args = [part.format(workdir=workdir) for part in command] + list(flags)
    processes = processes or kind.processes
    if processes == 1:
      return [self.start(workdir.parent, args, **options)]
    options['devices'] = kind.processes // processes
    port = free_port()
    others = Delay(port, delay_s).port if delay_s else port
    return [self.start(workdir.parent, [*args, f'--coordinator=127.0.0.1:{others if i else port}',
                                        f'--processes={processes}', f'--process_id={i}'], env=(env or {}).get(i),
                       module='tests.cached' if i else 'betarank', **options) for i in range(processes)]

  @staticmethod
  def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Waits until a process ends. Returns (exit status, output, errors).

    The errors say so if `kill_all` killed the process.

    Raises:
      AssertionError: the process didn't end within PATIENCE_S, and was killed.
    """
    if process.stdout.closed:
      return process.returncode, '', ''  # waited for before
    try:
      out, err = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
      process.kill()
      out, err = process.communicate()
      raise AssertionError(f'killed by the campaign, because it did not end within {PATIENCE_S:g} s: '
                           f'{err[-300:]}') from None
    if process.returncode == -signal.SIGKILL and process.pid in _killed:
      err += f'killed by the campaign, as all processes of {_killed[process.pid]}'
    return process.returncode, out, err

  def finish_well(self, *processes: subprocess.Popen) -> list[str]:
    """Waits until processes end, and checks that their exit status is 0. Returns their outputs."""
    outs = []
    for code, out, err in [self.finish(p) for p in processes]:
      assert code == 0 and 'Traceback' not in err, f'exit {code}: {err[-600:]}'
      outs.append(out)
    return outs

  def refused(self, processes: list[subprocess.Popen]) -> str:
    """Waits until a run ends, and checks that it ends with status 2 and one line of error. Returns this line."""
    (code, _, err), *_ = [self.finish(p) for p in processes]
    errors = [line for line in err.splitlines() if line.startswith('error: ')]
    assert code == 2 and len(errors) == 1 and 'Traceback' not in err, f'exit {code}: {err[-600:]}'
    return errors[0]

  def resume(self, kind: Kind, workdir: pathlib.Path, hits: Sequence[str] = ('',), *flags: str,
             all_kept: bool = True) -> Sequence[str]:
    """Runs the same command again until it ends, and compares what it leaves with the undisturbed run. Returns `hits`.

    hits: notes on what the faults hit. If there are none, raises Missed.
    all_kept: as in `check_same`.
    """
    if not hits:
      raise Missed('it had ended before')
    self.finish_well(*self.launch(kind, workdir, *flags))
    self.check_same(kind, workdir, all_kept)
    self.check_clean(workdir.parent)
    return hits

  # Comparing

  def check_same(self, kind: Kind, workdir: pathlib.Path, all_kept: bool = True) -> None:
    """Checks that a run left the same as the undisturbed run, to the last bit.

    Compares all metrics except times, the samples, all JSON files except times and paths, all arrays and cursors, and
    the names of all files.

    all_kept: whether to compare all checkpoints of each run; if False, only the last one.
    """
    if kind.name not in self._expected:
      self._expected[kind.name] = contents(self.undisturbed(kind))
    got, want = contents(workdir), self._expected[kind.name]
    if not all_kept:
      got, want = without_earlier(got), without_earlier(want)
    for name in sorted(want.keys() | got.keys()):
      assert name in got, f'{name} is missing'
      assert name in want, f'{name} is in no undisturbed run'
      assert got[name] == want[name], f'{name} differs from the undisturbed run'

  def check_clean(self, place: pathlib.Path) -> None:
    """Checks that no process and no temporary file of this trial is left, and that no input has changed."""
    until = time.monotonic() + 10
    while (left := orphans(place)) and time.monotonic() < until:
      time.sleep(0.1)
    assert not left, f'processes are left: {left}'
    files = sorted(str(p.relative_to(place)) for p in (place / 'tmp').rglob('*'))
    assert not files, f'temporary files are left: {files[:5]}'
    assert self._listing() == self._inputs, 'an input has changed'

  def _listing(self) -> dict[str, tuple[int, int]]:
    files = (p for folder in (self.data, self.sums, self.trained) for p in folder.rglob('*') if p.is_file())
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.name != '.lock'}


def contents(workdir: pathlib.Path) -> dict[str, object]:
  """Returns {name: value} of everything that a run left. The values can be compared with those of another run."""
  found: dict[str, object] = {}
  for path in sorted(p for p in workdir.rglob('*') if p.is_file()):
    name = str(path.relative_to(workdir))
    if re.search(r'(^|/)(damaged|hosts|\.sweep|data)/', name):
      continue  # checkpoints that were moved aside, logs, and a sweep's data, which shows in its results
    if inside := re.match(r'(.*checkpoints/\d+)/', name):
      if inside[1] not in found:
        found[inside[1]] = checkpoint_contents(workdir / inside[1])
    elif path.name == 'metrics.jsonl':
      found[name] = metrics(path.parent)
    elif name.startswith('prepared/'):
      found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    elif path.suffix == '.jsonl':
      found[name] = sorted(path.read_text().splitlines())  # evaluations write in any order
    elif path.suffix == '.json':
      text = re.sub(r'(?<![\w:/])/[^"\s:=]*/', '', path.read_text())  # of an absolute path, the last name stays
      found[name] = json.loads(text, object_hook=lambda x: {k: v for k, v in x.items() if k not in OF_A_START})
    else:
      found[name] = 'present'
  return found


def without_earlier(found: dict[str, object]) -> dict[str, object]:
  """Returns `found` with only the last checkpoint of each run."""
  last: dict[str, int] = {}
  for name in found:
    folder, _, step = name.rpartition('checkpoints/')
    if step.isdigit():
      last[folder] = max(last.get(folder, 0), int(step))
  earlier = lambda folder, _, step: step.isdigit() and int(step) < last[folder]
  return {name: x for name, x in found.items() if not earlier(*name.rpartition('checkpoints/'))}


def checkpoint_contents(path: pathlib.Path) -> dict[str, object]:
  """Returns hashes of a checkpoint's arrays, its step and cursor, and the names of its files."""
  checkpoint.check(checkpoint.epath.Path(path))
  meta = checkpoint.read_meta(checkpoint.epath.Path(path))
  hashes = {name: hashlib.sha256(x.tobytes()).hexdigest() for name, x in arrays(path.parent.parent, path.name).items()}
  files = sorted(p.name for p in path.iterdir())
  return {'arrays': hashes, 'step': meta['step'], 'cursor': meta['cursor'], 'files': files}


def processes(place: pathlib.Path) -> dict[int, str]:
  """Returns {process id: command} of all running processes with this trial's HOME."""
  found = {}
  for entry in pathlib.Path('/proc').iterdir():
    with contextlib.suppress(OSError):
      if entry.name.isdigit() and f'HOME={place}\0'.encode() in (entry / 'environ').read_bytes():
        command = (entry / 'cmdline').read_bytes().replace(b'\0', b' ').decode(errors='replace').strip()
        if command:  # a zombie has none
          found[int(entry.name)] = command
  return found


def orphans(place: pathlib.Path) -> list[str]:
  return [f'{pid} {command[-80:]}' for pid, command in processes(place).items()]


def wait(running: Sequence[subprocess.Popen], holds: Callable[[], object], delay_s: float = 0.0) -> None:
  """Waits until `holds()` is true, and then for delay_s seconds.

  Raises:
    Missed: a process in `running` has ended well by then.
    AssertionError: a process has failed by then, or `holds()` wasn't true within PATIENCE_S.
  """
  until = time.monotonic() + PATIENCE_S
  while not holds():
    _check_running(running)
    assert time.monotonic() < until, f'the point of the fault did not come within {PATIENCE_S:g} s'
    time.sleep(0.0005)
  time.sleep(delay_s)
  _check_running(running)


def _check_running(processes: Sequence[subprocess.Popen]) -> None:
  ended = [process for process in processes if process.poll() is not None]
  for process in ended:
    assert process.returncode == 0, f'exit {process.returncode} before the fault: {Campaign.finish(process)[2][-600:]}'
  if ended:
    raise Missed('it had ended before')


def kill(process: subprocess.Popen) -> None:
  """Kills a process with SIGKILL. If the process has ended before, raises the errors of `wait`."""
  process.kill()
  if process.wait() != -signal.SIGKILL:
    _check_running([process])
  Campaign.finish(process)


def kill_all(place: pathlib.Path) -> None:
  """Kills the processes of a trial that are still running."""
  for pid in processes(place):
    with contextlib.suppress(ProcessLookupError):
      _killed[pid] = place
      os.kill(pid, signal.SIGKILL)
