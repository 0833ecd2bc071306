"""Runs cases in worker processes. Kills processes that hang, replaces processes that die, and counts the outcomes."""

import collections
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping

from tests.fuzz.targets import TARGETS

ROOT = pathlib.Path(__file__).resolve().parents[2]
START_S = 180.0  # for a worker's imports and its good cases
MOST_LOST = 20  # workers per target, after which it is given up


@dataclasses.dataclass
class Result:
  """The outcomes of the cases of one target.

  bad: {(type of error, line): [(case number, message), ...]}.
  """

  name: str
  cases: int = 0
  good: int = 0
  refused: int = 0
  crashes: int = 0
  hangs: int = 0
  peak_mb: float = 0.0
  slope_kb: float = 0.0
  slowest_s: float = 0.0
  bad: dict[tuple[str, str], list[tuple[int, str]]] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(list))

  def lose(self, case: int, what: str, where: str = '') -> None:
    """Counts a failed case: a hang if `what` is 'deadline', else a crash."""
    self.crashes += what != 'deadline'
    self.hangs += what == 'deadline'
    self.bad[what.split(':')[0], where].append((case, what))


def run(plan: Mapping[str, int], seed: int, jobs: int = 1, together: bool = False,
        report: Callable[[Result], None] = lambda _: None) -> list[Result]:
  """Runs the plan {target: number of cases}. Returns the results in the plan's order.

  together: whether to run all targets in one process, one after the other, which starts fewer processes.
  """
  costly_first = sorted(plan, key=lambda name: TARGETS[name].weight)  # so that no core is idle at the end
  lanes = [dict(plan)] if together else [{name: plan[name]} for name in costly_first]
  with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    futures = [pool.submit(_lane, lane, seed, pathlib.Path(folder), report) for lane in lanes]
    results = {result.name: result for future in futures for result in future.result()}
  return [results[name] for name in plan]


def _lane(plan: dict[str, int], seed: int, folder: pathlib.Path, report) -> list[Result]:
  results = {name: Result(name) for name in plan}
  todo = {name: (0, count) for name, count in plan.items()}  # first, how many
  lost = 0
  while todo:
    name, first, why = _worker(todo, results, seed, folder, report)
    if not todo:
      break
    if name is None:
      raise RuntimeError(f'{", ".join(todo)}: {why}')
    lost += 1
    results[name].lose(first, why)
    results[name].cases += 1
    left = todo[name][0] + todo[name][1] - first - 1
    todo[name] = (first + 1, left)
    if left <= 0 or lost >= MOST_LOST:
      report(results[name])
      del todo[name]
      lost = 0
  return list(results.values())


def _worker(todo: dict[str, tuple[int, int]], results: dict[str, Result], seed: int, folder: pathlib.Path,
            report) -> tuple[str | None, int, str]:
  """Runs the targets of `todo` in a worker process, and removes finished targets from `todo`.

  Returns (target, case, reason) of the case that ended the worker early; the target is None if there is none.
  """
  arguments = [str(word) for name, (first, count) in todo.items() for word in (name, first, count)]
  with tempfile.TemporaryFile() as errors, subprocess.Popen(
      [sys.executable, '-m', 'tests.fuzz.worker', str(folder), str(seed), *arguments], cwd=ROOT,
      stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONHASHSEED': '0', 'OMP_NUM_THREADS': '1',
           'TF_CPP_MIN_LOG_LEVEL': '3'}) as process, selectors.DefaultSelector() as selector:
    selector.register(process.stdout, selectors.EVENT_READ)
    name, at, buffer = None, 0, b''
    deadline = time.monotonic() + START_S
    why = ''
    while True:
      if not selector.select(max(0.0, deadline - time.monotonic())):
        why = 'deadline'
        break
      chunk = os.read(process.stdout.fileno(), 2**16)
      if not chunk:
        break
      *lines, buffer = (buffer + chunk).split(b'\n')
      for line in lines:
        message = json.loads(line)
        name = message['target']
        result = results[name]
        deadline = time.monotonic() + TARGETS[name].deadline_s
        if 'ready' in message:
          at = todo[name][0]
        elif 'done' in message:
          result.peak_mb = max(result.peak_mb, message['peak_mb'])
          result.slope_kb = message['slope_kb']
          report(result)
          del todo[name]
          name, deadline = None, time.monotonic() + START_S
        else:
          at = message['i'] + 1
          result.cases += 1
          result.slowest_s = max(result.slowest_s, message['seconds'])
          if message['outcome'] == 'crash':
            result.lose(message['i'], message['what'], message['where'])
          elif message['outcome'] == 'good':
            result.good += 1
          else:
            result.refused += 1
    if process.poll() is None and why:
      os.killpg(process.pid, signal.SIGKILL)
    status = process.wait()
    errors.seek(max(0, errors.seek(0, 2) - 2000))
    tail = errors.read().decode(errors='replace').strip().splitlines()
    return name, at, why or f'worker ended with status {status}: {tail[-1][:300] if tail else ""}'
