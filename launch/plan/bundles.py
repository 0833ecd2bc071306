"""Counts the cycles of a TPU program in its final bundles, the very long instruction words that libtpu writes.

With FLAGS, libtpu writes one file of bundles per HLO instruction. A TPU core issues one bundle per cycle. If it never
waits, the time of an HLO instruction in cycles is therefore the number of issued bundles, where a bundle in a loop
counts once per iteration. predict.py adds the times that a core waits for memory or for a matrix unit.
"""

import collections
import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Work:
  """The work of one core for an HLO instruction.

  Attributes:
    issued: the number of bundles (very long instruction words) that the core issues, one in each cycle.
    rows: the number of rows that the core's busiest matrix unit multiplies by the weights it holds.
  """

  issued: float
  rows: float


@dataclasses.dataclass(frozen=True)
class Shares:
  """The shares of a loop's iterations in which the skippable regions of a kernel are assumed to run, from 0 to 1.

  A skippable region is a sequence of bundles that a branch in the loop can skip.

  Attributes:
    main: the share of the largest region, which does the kernel's work.
    other: the share of each other region, such as one that runs only at the first or last block of a row.
  """

  main: float = SKIPPABLE
  other: float = SKIPPABLE


def read(folder: pathlib.Path, shares: dict[str, Shares] | None = None) -> dict[str, Work]:
  """Returns {name of an HLO instruction: its Work} for the instructions whose bundles are in `folder`.

  shares: {name of a kernel: its Shares}. In HLO instructions without Shares, a region that a branch can skip is
    assumed to run in half of the loop's iterations.
  """
  twins: dict[str, str] = {}  # instruction -> the identical instruction that was compiled instead
  for path in sorted(folder.glob('*deduplication-map.txt')):
    key = ''
    for line in path.read_text(errors='replace').splitlines():
      if line.startswith('key:'):
        key = line.removeprefix('key:')
      elif line.startswith('  '):
        twins[line.strip()] = key
  found = {}
  for path in sorted(folder.glob('*-final_bundles.txt')):
    named = re.fullmatch(r'\d+-(.*)-\d+-final_bundles\.txt', path.name)
    if named and not named[1].startswith(('<', 'TLP')) and 'schedule-analysis' not in path.name:
      known = {twins.get(name, name): share for name, share in (shares or {}).items()} | (shares or {})
      trips = next((trips for kernel, trips in DATA_TRIPS.items() if named[1].startswith(kernel)), (1,))
      found[named[1]] = count(path.read_text(errors='replace'), known.get(named[1]), trips)
  found.update({name: found[key] for name, key in twins.items() if key in found})
  return found


def count(text: str, shares: Shares | None = None, data_trips: Sequence[int] = (1,)) -> Work:
  """Returns the work of an HLO instruction, counted from its bundles.

  A bundle in a loop counts once per iteration. If a branch in the loop can skip the bundle, it counts only in an
  assumed share of the iterations. Regions for which `_runs_always` is True count in every iteration.

  Args:
    text: the content of the file that libtpu wrote for the HLO instruction.
    shares: the assumed shares; None if the instruction isn't a kernel.
    data_trips: the assumed trip counts of the loops whose trip count depends on data, in the order of these loops. If
      there are more loops than counts, the last count is used for the remaining loops.
  """
  exits: dict[str, int | None] = {}  # predicate of a loop's exit test -> trip count; None if it depends on data
  for predicate, test in re.findall(r'(%p\w+) = ([^;}]*)/\* loop exit test', text):
    limit = re.match(r'scmp\.(?:ge|eq)\.s32\.totalorder %\w+, (\d+)', test)
    exits[predicate] = max(1, int(limit[1])) if limit else None
  rows: list[dict[str, int]] = []  # for each bundle, {matrix unit: rows that it multiplies}
  loops, spans = [], []  # spans: (first bundle, last bundle, trip count) of each loop
  skips, regions = [], {}  # (bundle of the branch, region that it jumps to); region -> its first bundle
  for line in text.splitlines():
    bundle = re.match(r'\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:', line)
    if not bundle:
      continue
    size = len(rows)
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
    rows.append(_matrix_rows(line))
  weight = [1.0] * len(rows)
  for first, last, trips in spans:
    for i in range(first, last + 1):
      weight[i] *= trips
  inside = []  # (first bundle, last bundle, its loop) of each region in a loop that a branch can skip
  for first, region in skips:
    last = regions.get(region, 0)
    around = min((s for s in spans if s[0] <= first and last <= s[1]), key=lambda s: s[1] - s[0], default=None)
    if around and first < last:
      inside.append((first, last, around))
  inside = [span for span in inside if not _runs_always(span, inside, kernel=shares is not None)]
  largest = max(inside, key=lambda s: s[1] - s[0], default=None)
  shares = shares or Shares()
  for span in inside:
    for i in range(span[0] + 1, span[1]):
      weight[i] *= shares.main if span == largest else shares.other
  busy = collections.Counter()
  for times, units in zip(weight, rows):
    for unit, number in units.items():
      busy[unit] += times * number
  return Work(sum(weight), max(busy.values(), default=0.0))


def _runs_always(span, regions, kernel: bool) -> bool:
  """Returns True if a region does the work of a pipelined loop, and so runs in nearly all iterations of the loop.

  Each iteration of a pipelined loop starts a transfer for the next iteration, and then does its own work. Only the
  first or last iterations, which fill or drain the pipeline, skip the work. The region of the work is recognized by its
  place: it fills more than half of the loop, encloses another region, and no other region encloses it. In an HLO
  instruction that isn't a kernel, a region that fills 95 % of the loop or more is recognized too.

  span: (first bundle, last bundle, the loop) of the region.
  regions: the spans of all regions inside loops. Each region consists of bundles that a branch can skip.
  kernel: whether the HLO instruction is a kernel.
  """
  first, last, loop = span
  part = (last - first) / (loop[1] - loop[0])
  near = [other for other in regions if other[2] == loop and other != span]
  encloses = any(first < other[0] and other[1] <= last for other in near)
  enclosed = any(other[0] < first and last <= other[1] for other in near)
  return (part > 0.5 and encloses and not enclosed) or (part >= 0.95 and not kernel)


def _matrix_rows(bundle: str) -> dict[str, int]:
  """Returns {matrix unit: number of rows that it multiplies in this bundle}.

  A matrix instruction multiplies one register: 16 rows of bfloat16, or 8 rows of float32. If the instruction's name
  contains `lmr`, the matrix unit itself holds the rows, and 8 of them are multiplied. With these numbers, the rows of
  XLA's own matrix products agree with their FLOPs.
  """
  found = re.findall(r'= vmatmul\.((?:\w+\.)*?)(bf16|f32)\.[\w.]*(mxu\d)', bundle)
  return {unit: 16 if dtype == 'bf16' and 'lmr' not in kind else 8 for kind, dtype, unit in found}
