"""python -m tests.fuzz [--cases=100000] [--seed=0] [--only=TARGET,...] [--jobs=2] [--case=N]

Gives hostile input to everything that reads input, and prints the outcomes. A case passes if the input is read, or if
the reader raises its documented error of one line. Any other exception is a crash, and a case that exceeds its deadline
is a hang. If any case crashes or hangs, the exit status is 1. --case runs one case of one target in this process, with
its traceback.
"""

import argparse
import pathlib
import sys
import tempfile
import time

from rich.console import Console
from rich.table import Table

from tests.fuzz import campaign, worker
from tests.fuzz.targets import TARGETS


def plan(cases: int, only: list[str]) -> dict[str, int]:
  """Returns {target: number of cases}. The numbers are proportional to the targets' weights, and their sum is at least
  `cases`.
  """
  chosen = {name: TARGETS[name].weight for name in only}
  return {name: max(1, -(-cases * weight // sum(chosen.values()))) for name, weight in chosen.items()}


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m tests.fuzz', description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--cases', type=int, default=100_000)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', default='', help=f'some of {", ".join(TARGETS)}')
  parser.add_argument('--jobs', type=int, default=2, help='processes at once')
  parser.add_argument('--case', type=int, default=-1, help='the number of one case, of the target that --only names')
  args = parser.parse_args()
  only = args.only.split(',') if args.only else [name for name in TARGETS if TARGETS[name].weight]
  if unknown := [name for name in only if name not in TARGETS]:
    parser.error(f'--only={unknown[0]}: there are {", ".join(TARGETS)}')
  if args.case >= 0:
    _one(only[0], args.seed, args.case)
    return
  start = time.monotonic()
  results = campaign.run(plan(args.cases, only), args.seed, args.jobs,
                         report=lambda r: print(f'{r.name}: {r.cases} cases', file=sys.stderr, flush=True))
  columns = ('target', 'cases', 'read', 'refused', 'crashes', 'hangs', 'slowest s', 'peak MB', 'KB/1000 cases')
  table = Table(*columns, box=None)
  for column in table.columns[1:]:
    column.justify = 'right'
  for r in results:
    table.add_row(r.name, *(f'{n:,}' for n in (r.cases, r.good, r.refused, r.crashes, r.hangs)), f'{r.slowest_s:.2f}',
                  f'{r.peak_mb:.0f}', f'{r.slope_kb:.0f}')
  total = lambda name: f'{sum(getattr(r, name) for r in results):,}'
  table.add_row('all', *map(total, ('cases', 'good', 'refused', 'crashes', 'hangs')), '', '', '')
  Console(width=120).print(table)
  print(f'seed {args.seed}, {time.monotonic() - start:.0f} s')
  for r in results:
    for (_, where), cases in sorted(r.bad.items(), key=lambda item: -len(item[1])):
      number, what = cases[0]
      print(f'{r.name}: {len(cases)} times, first in --only={r.name} --case={number}: {what} {where}')
  sys.exit(any(r.crashes or r.hangs for r in results))


def _one(name: str, seed: int, number: int) -> None:
  target = TARGETS[name]
  with tempfile.TemporaryDirectory() as folder:
    make, check, close = target.build(pathlib.Path(folder))
    case = make(worker.case_random(seed, name, number))
    print(repr(case)[:2000])
    try:
      print(check(case))
    except target.errors as error:
      print(f'{type(error).__name__}: {error}')
    finally:
      close()


if __name__ == '__main__':
  main()
