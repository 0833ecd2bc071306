"""Runs cases in this process: python -m tests.fuzz.worker FOLDER SEED TARGET FIRST COUNT ...

Prints one JSON line after each case, so that the parent process knows which case crashed or hung.
"""

import json
import os
import pathlib
import random
import resource
import shutil
import sys
import time
import traceback

import hypothesis

from tests.fuzz.targets import TARGETS, Target

EXTRA_BYTES = 2**31  # of address space beyond that of the process at its start; more is a MemoryError
WARM, WARM_S = 20, 3.0  # good cases before memory is measured, and the seconds that they may take
HYPOTHESIS_SHARE = 0.3  # of the cases, if a target has a strategy


def main() -> None:
  folder, seed, *rest = sys.argv[1:]
  out = os.fdopen(os.dup(1), 'w')
  null = os.open(os.devnull, os.O_RDWR)
  os.dup2(null, 0)
  os.dup2(null, 1)  # libraries print too

  def say(**message):
    out.write(json.dumps(message) + '\n')
    out.flush()

  for name, first, count in zip(rest[::3], rest[1::3], rest[2::3]):
    place = pathlib.Path(folder) / name
    shutil.rmtree(place, ignore_errors=True)  # what a worker that died has left
    place.mkdir(parents=True)
    run(TARGETS[name], int(seed), int(first), int(count), place, say)


def run(target: Target, seed: int, first: int, count: int, folder: pathlib.Path, say) -> None:
  make, check, close = target.build(folder)
  begin = time.monotonic()
  for i in range(WARM):
    check(make(random.Random(i), good=True))  # the test is worth nothing if a good case fails
    if time.monotonic() - begin > WARM_S:
      break
  _limit_memory()
  _reset_peak()
  before, samples = _memory('VmRSS'), []
  say(target=target.name, ready=True)

  def one(i: int, case) -> None:
    start = time.monotonic()
    result = outcome(target, check, case)
    say(target=target.name, i=i, seconds=round(time.monotonic() - start, 4), **result)

  last = first + count
  drawn = int(count * HYPOTHESIS_SHARE) if target.strategy else 0
  for i in range(first, last - drawn):
    one(i, make(case_random(seed, target.name, i)))
    if i % 20 == 0:
      samples.append((i, _memory('VmRSS')))
  peak = _memory('VmHWM') - before
  if drawn:  # after memory is measured, because Hypothesis remembers what it has drawn
    _by_hypothesis(target, seed + first, range(last - drawn, last), one)
  say(target=target.name, done=True, peak_mb=peak / 2**20,
      slope_kb=_slope(samples[len(samples) // 2:]) / 2**10)
  close()


def case_random(seed: int, name: str, i: int) -> random.Random:
  return random.Random(f'{seed}/{name}/{i}')


def outcome(target: Target, check, case) -> dict[str, str]:
  """Runs a case. Returns {'outcome': 'good' | 'refused' | 'crash', 'what': ..., 'where': ...}.

  'refused' means that a documented error was raised. 'what' is the error, and 'where' the line of code that crashed. A
  key without a value is missing.
  """
  try:
    check(case)
  except target.errors as error:
    return {'outcome': 'refused', 'what': type(error).__name__}
  except (KeyboardInterrupt, GeneratorExit):
    raise
  except BaseException as error:  # SystemExit too
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if '/site-packages/' not in f.filename and '/tests/' not in f.filename
            and f'{os.sep}lib{os.sep}python' not in f.filename]
    frame = (ours or frames)[-1]
    return {'outcome': 'crash', 'what': f'{type(error).__name__}: {str(error)[:200]}',
            'where': f'{pathlib.Path(frame.filename).name}:{frame.lineno}'}
  return {'outcome': 'good'}


def _by_hypothesis(target: Target, seed: int, numbers: range, one) -> None:
  """Runs the cases with the numbers `numbers`, made by the target's Hypothesis strategy.

  If the strategy can't make so many different cases, fewer cases are run.

  one: a function (number, case) that runs a case.
  """
  left = iter(numbers)

  @hypothesis.seed(seed)
  @hypothesis.settings(max_examples=len(numbers), database=None, deadline=None, phases=[hypothesis.Phase.generate],
                       suppress_health_check=list(hypothesis.HealthCheck))
  @hypothesis.given(target.strategy())
  def each(case):
    if (i := next(left, None)) is not None:
      one(i, case)

  each()


def _limit_memory() -> None:
  limit = _memory('VmSize') + EXTRA_BYTES
  resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _memory(name: str) -> int:
  """Returns a memory figure of this process in bytes. name: VmSize, VmRSS or VmHWM (the peak of VmRSS), from /proc."""
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith(f'{name}:'):
      return int(line.split()[1]) * 1024
  return 0


def _reset_peak() -> None:
  pathlib.Path('/proc/self/clear_refs').write_text('5')


def _slope(samples: list[tuple[int, int]]) -> float:
  """Returns the growth of memory in bytes per thousand cases, by least squares.

  samples: (case number, memory in bytes).
  """
  if len(samples) < 3:
    return 0.0
  x, y = zip(*samples)
  middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
  spread = sum((a - middle_x)**2 for a in x)
  return 1000 * sum((a - middle_x) * (b - middle_y) for a, b in samples) / spread if spread else 0.0


if __name__ == '__main__':
  main()
