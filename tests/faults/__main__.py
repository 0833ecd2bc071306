"""python -m tests.faults [--seed=0] [--points=20] [--only=WORDS,...] [--minutes=N] [--parallel=2] [--keep=DIR]
                       [--processes=8]

Kills and damages tiny runs of every kind at random points, starts them again, and checks that they end with the same
bits as undisturbed runs.
"""

import argparse
import collections
import concurrent.futures
import math
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time

from tests.faults.campaign import ROOT, Campaign, Missed, kill_all
from tests.faults.classes import CLASSES

TRIES = 4  # per point, until the fault hits something


def attempt(campaign, name, number, seed):
  """Runs one trial. Returns (survived, notes).

  survived: whether the run survived the fault; None if the fault could hit nothing.
  notes: what was hit, or why the run didn't survive.
  """
  fault, _, _ = CLASSES[name]
  for again in range(TRIES):
    place = campaign.root / 'trials' / f'{name.replace(" ", "_").replace(chr(39), "")}-{number}-{again}'
    shutil.rmtree(place, ignore_errors=True)  # of an earlier campaign in the same folder
    try:
      hit = fault(campaign, place, random.Random(f'{seed}/{name}/{number}/{again}'))
      shutil.rmtree(place)
      return True, [hit] if isinstance(hit, str) else list(hit)
    except Missed:
      kill_all(place)
      shutil.rmtree(place, ignore_errors=True)
    except PermissionError as error:
      return None, [f'skipped: {error}']
    except Exception as error:  # any error means that the fault wasn't survived
      kill_all(place)
      return False, [f'{place}: {type(error).__name__}: {error}']
  return None, ['missed']


def run(seed, points, names, parallel, root, say=print, minutes=float('inf'), processes=8):
  """Runs a campaign. Returns ({class: Counter of the points tried and survived}, {class: Counter of what was hit}).

  names: the names of the classes.
  """
  c = Campaign(root, processes)
  began = time.monotonic()
  c.prepare({kind for name in names for kind in CLASSES[name][1].split()})
  say(f'undisturbed runs, each run twice and equal: {", ".join(sorted(c.ready))} ({time.monotonic() - began:.0f} s)')
  counts = {name: collections.Counter() for name in names}
  notes = {name: collections.Counter() for name in names}
  count_of = lambda name: math.ceil(points * CLASSES[name][2] / 100 / getattr(CLASSES[name][0], 'points', 1))
  # All classes advance equally, in case time runs out.
  trials = sorted((number / count_of(name), name, number) for name in names for number in range(count_of(name)))
  in_time = lambda: time.monotonic() - began < 60 * minutes
  with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
    todo = {pool.submit(lambda name=name, number=number: attempt(c, name, number, seed) if in_time() else None): name
            for _, name, number in trials}
    for future in concurrent.futures.as_completed(todo):
      if future.result() is None:
        continue
      name, (survived, hits) = todo[future], future.result()
      counts[name].update({'tried': len(hits) * (survived is not None), 'survived': len(hits) * (survived is True)})
      notes[name].update(hits)
      say(f'{"NOT " if survived is False else ""}{"survived" if survived is not None else "no point"}: {name}: '
          f'{", ".join(hits)}')
  return counts, notes


def main():
  parser = argparse.ArgumentParser(prog='python -m tests.faults', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--points', type=int, default=20, help='per class; classes with little variety take fewer')
  parser.add_argument('--only', default='', help='classes with one of these words in their name')
  parser.add_argument('--minutes', type=float, default=float('inf'), help='no trial begins later')
  parser.add_argument('--parallel', type=int, default=2, help='trials at once')
  parser.add_argument('--keep', default='', metavar='DIR',
                      help='a folder for the inputs, which are reused, and for the trials that fail')
  parser.add_argument('--processes', type=int, default=8,
                      help='of the classes with many processes; a folder of --keep is for one number')
  args = parser.parse_args()
  os.environ['JAX_PLATFORMS'] = 'cpu'
  path = filter(None, [os.environ.get('PYTHONPATH')])
  os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), *path])  # configs in tests/ import from there
  root = pathlib.Path(args.keep or tempfile.mkdtemp(prefix='faults-')).resolve()
  root.mkdir(parents=True, exist_ok=True)
  began = time.monotonic()
  words = [word for word in args.only.split(',') if word]
  names = [name for name in CLASSES if not words or any(word in name for word in words)]
  counts, notes = run(args.seed, args.points, names, args.parallel, root, lambda line: print(line, flush=True),
                      args.minutes, args.processes)
  width = max(map(len, counts)) + 2
  print(f'\n{"fault class":{width}} tried | survived | where')
  for name, count in counts.items():
    where = ', '.join(f'{note} {n}' for note, n in sorted(notes[name].items()) if len(note) < 60)
    print(f'{name:{width}} {count["tried"]:5} | {count["survived"]:8} | {where}')
  tried, survived = (sum(count[key] for count in counts.values()) for key in ('tried', 'survived'))
  print(f'{survived} of {tried} survived, seed {args.seed}, {(time.monotonic() - began) / 60:.0f} min')
  if survived == tried and not args.keep:
    shutil.rmtree(root)
  sys.exit(survived < tried or not tried)


if __name__ == '__main__':
  main()
