"""Counts the cycles of a TPU program in its final bundles, which are very long instruction words written by libtpu.

A TPU core issues one bundle per cycle. With FLAGS, libtpu writes one file of bundles per HLO instruction. The number of
bundles, with the body of a loop counted as often as it runs, is the time of the HLO instruction in cycles if the core
never waits. Waits for memory and, on v5e and v5p, for the matrix unit aren't included; predict.py adds them.
"""

import pathlib
import re
from collections.abc import Sequence

FLAGS = ('--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true '
         '--xla_jf_dump_llo_pass_label_regex=final_bundles|deduplication-map')
# The assumed trip counts of a kernel's data-dependent loops, in order; the last number is used for all following loops.
# In other kernels, such a loop counts as one iteration. For find_head (objectives/kernels) it is 32 for the bisection
# among the kept logits, which is its bound (12 to 17 on random logits), and 0 for the loops of rare cases, which come
# last.
DATA_TRIPS = {'find_head': (32, 0)}
SKIPPABLE = 0.5  # if a branch can skip a region in a loop, the region is assumed to run in this share of iterations


def read(folder: pathlib.Path, shares: dict[str, float] | None = None) -> dict[str, float]:
  """Returns {name: cycles} of each HLO instruction whose bundles are in `folder`.

  In a loop, a branch can skip a region of code. The bundles don't say how often the region runs, so this is assumed.
  The largest such region of a kernel in `shares` runs in shares[kernel] of the iterations. Any other such region runs
  in the share SKIPPABLE of the iterations.

  shares: {name of a kernel: the share of its grid steps that have work}.
  """
  twins: dict[str, str] = {}  # instruction -> the identical instruction that was compiled instead
  for path in sorted(folder.glob('*deduplication-map.txt')):
    key = ''
    for line in path.read_text(errors='replace').splitlines():
      if line.startswith('key:'):
        key = line.removeprefix('key:')
      elif line.startswith('  '):
        twins[line.strip()] = key
  cycles = {}
  for path in sorted(folder.glob('*-final_bundles.txt')):
    named = re.fullmatch(r'\d+-(.*)-\d+-final_bundles\.txt', path.name)
    if named and not named[1].startswith(('<', 'TLP')) and 'schedule-analysis' not in path.name:
      known = {twins.get(name, name): share for name, share in (shares or {}).items()} | (shares or {})
      share = known.get(named[1])
      trips = next((trips for kernel, trips in DATA_TRIPS.items() if named[1].startswith(kernel)), (1,))
      cycles[named[1]] = count(path.read_text(errors='replace'), share, trips)
  cycles.update({name: cycles[key] for name, key in twins.items() if key in cycles})
  return cycles


def count(text: str, share: float | None = None, data_trips: Sequence[int] = (1,)) -> float:
  """Returns the number of cycles that an HLO instruction takes, counted from its bundles.

  Args:
    text: the content of the file that libtpu wrote for the HLO instruction.
    share: if the instruction is a kernel in `shares` of `read`, its share; otherwise None.
    data_trips: the assumed trip counts of the loops whose trip count depends on data, in the order of these loops. If
      there are more loops than counts, the last count is used for the remaining loops.
  """
  exits: dict[str, int | None] = {}  # predicate of a loop's exit test -> trip count; None if it depends on data
  for predicate, test in re.findall(r'(%p\w+) = ([^;}]*)/\* loop exit test', text):
    limit = re.match(r'scmp\.(?:ge|eq)\.s32\.totalorder %\w+, (\d+)', test)
    exits[predicate] = max(1, int(limit[1])) if limit else None
  size, loops, spans = 0, [], []  # spans: (first bundle, last bundle, trip count) of each loop
  skips, regions = [], {}  # (bundle of the branch, region that it jumps to); region -> its first bundle
  for line in text.splitlines():
    bundle = re.match(r'\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:', line)
    if not bundle:
      continue
    if bundle[1] == 'LB':
      loops.append(size)
    regions.update(dict.fromkeys(re.findall(r'empty region (\d+)', line), size))
    branch = re.search(r'sbr\.rel \(!?(%p\w+)\) target = \$region(\d+)', line)
    if branch and branch[1] in exits and loops:
      trips = exits[branch[1]]
      if trips is None:
        trips, *rest = data_trips
        data_trips = rest or [trips]
      spans.append((loops.pop(), size, trips))
    elif branch:
      skips.append((size, branch[2]))
    size += 1
  weight = [1.0] * size
  for first, last, trips in spans:
    for i in range(first, last + 1):
      weight[i] *= trips
  inside = []  # regions in a loop that a branch can skip, except those that fill the whole loop
  for first, region in skips:
    last = regions.get(region, 0)
    around = min((s for s in spans if s[0] <= first and last <= s[1]), key=lambda s: s[1] - s[0], default=None)
    if around and 0 < last - first < 0.95 * (around[1] - around[0]):
      inside.append((first, last))
  largest = max(inside, key=lambda s: s[1] - s[0], default=None)
  for span in inside:
    runs = share if share is not None and span == largest else SKIPPABLE
    for i in range(span[0] + 1, span[1]):
      weight[i] *= runs
  return sum(weight)
