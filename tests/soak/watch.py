"""Observes a process and its descendants from outside: memory, threads and open files, and whether they grow.

A figure that the system doesn't provide is left out.
"""

import dataclasses
import os
import pathlib
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

PAGE, TICKS = os.sysconf('SC_PAGE_SIZE'), os.sysconf('SC_CLK_TCK')
WARM_UP = 0.2  # of all steps, in which programs compile, pools fill and the allocator reaches its size
BLOCKS = 16  # a slope is fitted to the means of so many equal parts, because neighbouring samples aren't independent
# Growth per 1000 steps that is accepted, however significant it is.
BOUNDS = {'memory MB': 1.0, 'own memory MB': 1.0, 'threads': 0.5, 'open files': 0.5}
RATE_BOUND = 0.10  # of throughput, from one end to the other


@dataclasses.dataclass(frozen=True)
class Sample:
  """One observation of a command.

  position: the step that the command has reached.
  figures: {process id: {key of BOUNDS: value}}.
  gpu_mb: the memory in use on all GPUs, or None if it isn't observed.
  """

  time_s: float
  position: float
  cpu_s: float  # of all processes so far
  figures: dict[int, dict[str, float]]
  gpu_mb: float | None = None


class Watch:
  """Observes a running command in a thread until the command ends."""

  def __init__(self, name: str, process: subprocess.Popen, position: Callable[[], float], every_s: float = 0.5,
               gpu: bool = False):
    """Starts to observe.

    name: the name of the command.
    process: its process.
    position: a function that returns the step that the command has reached.
    every_s: the seconds between two observations.
    gpu: whether to observe the memory of the GPUs too.
    """
    self.samples: list[Sample] = []
    self.names = {process.pid: name}
    self._process, self._position, self._every_s, self._gpu = process, position, every_s, gpu
    self._thread = threading.Thread(target=self._observe, daemon=True)
    self._thread.start()

  def join(self) -> None:
    self._thread.join()

  def _observe(self) -> None:
    while self._process.poll() is None:
      figures, cpu = {}, 0.0
      for pid in tree(self._process.pid):
        try:
          figures[pid], used, name = observe(pid)
        except (OSError, ValueError, LookupError):
          continue  # the process has just ended
        cpu += used
        self.names.setdefault(pid, name)
      if self._process.pid in figures:
        used = gpu_mb() if self._gpu else None
        self.samples.append(Sample(time.monotonic(), self._position(), cpu, figures, used))
      time.sleep(self._every_s)


def tree(root: int) -> list[int]:
  """Returns the process ids of `root` and of all its descendants."""
  children: dict[int, list[int]] = {}
  for entry in os.listdir('/proc'):
    if entry.isdigit():
      try:
        stat = pathlib.Path('/proc', entry, 'stat').read_text()
      except OSError:
        continue
      children.setdefault(int(stat.rpartition(')')[2].split()[1]), []).append(int(entry))
  found = [root]
  for pid in found:
    found += children.get(pid, [])
  return found


def observe(pid: int) -> tuple[dict[str, float], float, str]:
  """Returns (figures, CPU seconds, name) of one process. The CPU seconds include those of its children that have ended.
  """
  folder = pathlib.Path('/proc', str(pid))
  fields = (folder / 'stat').read_text().rpartition(')')[2].split()
  status = dict(line.split(':', 1) for line in (folder / 'status').read_text().splitlines())
  mega = lambda *names: sum(int(status[name].split()[0]) for name in names) / 1024
  figures = {'memory MB': mega('VmRSS'), 'threads': int(fields[17]), 'open files': len(os.listdir(folder / 'fd'))}
  if 'RssAnon' in status:  # gVisor has no such line
    figures['own memory MB'] = mega('RssAnon', 'RssShmem')  # without mapped files, which the system may drop
  command = (folder / 'cmdline').read_bytes().split(b'\0')
  name = next((part.decode() for part in command if part.endswith(b'.py')), command[0].decode())
  return figures, sum(map(int, fields[11:15])) / TICKS, pathlib.Path(name).stem


def gpu_mb() -> float | None:
  """Returns the memory in use on all GPUs in MB, or None if nvidia-smi doesn't say.

  The memory of other programs is included. In containers, nvidia-smi often doesn't know which process uses how much.
  """
  command = ['nvidia-smi', '--query-gpu=memory.used', '--format=csv,noheader,nounits']
  try:
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    return float(sum(map(int, said))) if said else None
  except (OSError, subprocess.SubprocessError, ValueError):
    return None


@dataclasses.dataclass(frozen=True)
class Row:
  """A figure of a process after the warm-up. The slope and its standard error `error` are per 1000 steps."""

  process: str
  figure: str
  first: float  # mean of the first tenth
  last: float  # mean of the last tenth
  slope: float
  error: float
  bound: float

  @property
  def flat(self) -> bool:
    """True if the figure doesn't grow. It may fall."""
    return self.slope < max(3 * self.error, self.bound)


def slope(position_N: Sequence[float], value_N: Sequence[float]) -> tuple[float, float]:
  """Returns (growth per 1000 steps, its standard error). Fits the means of BLOCKS equal parts by least squares.

  position_N, value_N: the step and the value of each observation.
  """
  position_N, value_N = np.asarray(position_N, float), np.asarray(value_N, float)
  edges = np.linspace(position_N.min(), position_N.max(), BLOCKS + 1)
  block_N = np.clip(np.searchsorted(edges, position_N, 'right') - 1, 0, BLOCKS - 1)
  masks = [block_N == b for b in range(BLOCKS) if (block_N == b).any()]
  if len(masks) < 4:
    raise ValueError(f'only {len(position_N)} observations after the warm-up; take more steps')
  x, y = (np.array([values[mask].mean() for mask in masks]) for values in (position_N / 1000, value_N))
  x = x - x.mean()
  per_1000 = float(x @ y / (x @ x))
  rest = y - y.mean() - per_1000 * x
  return per_1000, float(np.sqrt(rest @ rest / (len(x) - 2) / (x @ x)))


def rows(samples: Sequence[Sample], names: dict[int, str], known_mb: float = 0.0) -> list[Row]:
  """Returns a row for each figure of each process that exists for most of the run, one for the number of processes, one
  for the memory of the GPUs if it was observed, and those of `speed`.

  names: {process id: name}.
  known_mb: the growth of the first process's memory that is accepted, in MB per 1000 steps.

  Raises:
    ValueError: the run was too short for enough observations.
  """
  warm = samples[0].position + WARM_UP * (samples[-1].position - samples[0].position)
  kept = [s for s in samples if s.position > warm]
  if len(kept) < 2 * BLOCKS:
    raise ValueError(f'only {len(kept)} observations after the warm-up; take more steps')
  lasting = [pid for pid in names if sum(pid in s.figures for s in kept) > len(kept) / 2]
  out = []

  def add(process: str, figure: str, at: list[float], values: list[float], bound: float) -> None:
    tenth = max(1, len(values) // 10)
    out.append(Row(process, figure, float(np.mean(values[:tenth])), float(np.mean(values[-tenth:])),
                   *slope(at, values), bound))

  for number, pid in enumerate(lasting):
    own = [s for s in kept if pid in s.figures]
    at = [s.position for s in own]
    name = f'{names[pid]} {number}' if number else names[pid]
    for figure, bound in BOUNDS.items():
      if any(figure not in s.figures[pid] for s in own):
        continue
      known = known_mb if 'MB' in figure and not number else 0.0
      add(name, figure, at, [s.figures[pid][figure] for s in own], bound + known)
  add('all', 'processes', [s.position for s in kept], [len(s.figures) for s in kept], BOUNDS['threads'])
  on_gpu = [s for s in kept if s.gpu_mb is not None]
  if len(on_gpu) > len(kept) / 2:
    add('all', 'GPU MB', [s.position for s in on_gpu], [s.gpu_mb for s in on_gpu], BOUNDS['memory MB'])
  return out + speed(kept)


def speed(samples: Sequence[Sample]) -> list[Row]:
  """Returns the rows for wall time and CPU time per step. On a busy machine, CPU time is more reliable."""
  edges = np.linspace(samples[0].position, samples[-1].position, BLOCKS + 1)
  at_N = np.array([s.position for s in samples])
  out = []
  values = {'ms per step': [s.time_s for s in samples], 'CPU ms per step': [s.cpu_s for s in samples]}
  for figure, value_N in values.items():
    # Several observations may have the same position; the time at an edge is interpolated between those that moved.
    moved = np.concatenate([[True], np.diff(at_N) > 0])
    reached = np.interp(edges, at_N[moved], np.asarray(value_N)[moved])
    ms = np.diff(reached) / np.diff(edges) * 1000
    per_1000, error = slope(edges[:-1] + np.diff(edges) / 2, ms)
    bound = RATE_BOUND * ms.mean() / (edges[-1] - edges[0]) * 1000
    out.append(Row('all', figure, float(ms[:2].mean()), float(ms[-2:].mean()), per_1000, error, bound))
  return out
