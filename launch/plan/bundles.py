"""Reads libtpu's final bundles, the very long instruction words that a TPU core issues one of each cycle.

libtpu writes a file an instruction when asked to (FLAGS). A count of bundles, loops multiplied out, is how long an
instruction takes if it never waits: it misses waits for memory and, on v5e and v5p, for the matrix unit, which
predict.py adds.
"""

import pathlib
import re
from collections.abc import Sequence

FLAGS = ('--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true '
         '--xla_jf_dump_llo_pass_label_regex=final_bundles|deduplication-map')
# Turns of a kernel's loops whose end the data decide, in order, the last for all that follow; any other such loop
# counts as one. find_head (objectives/kernels): halving among the kept logits at its bound (12 to 17 on random ones),
# and the rare ways, which come last, never.
DATA_TURNS = {'find_head': (32, 0)}
SKIPPABLE = 0.5  # share of a loop's turns that a region is taken to run in, if a branch can skip it


def read(folder: pathlib.Path, shares: dict[str, float] | None = None) -> dict[str, float]:
  """Cycles of each instruction (HLO name) that has bundles in `folder`.

  shares: for kernels by name, the share of their grid's steps that have work; it replaces SKIPPABLE for the kernel's
    largest region.
  """
  twins: dict[str, str] = {}  # instruction -> the one that was compiled for it
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
      turns = next((turns for kernel, turns in DATA_TURNS.items() if named[1].startswith(kernel)), (1,))
      cycles[named[1]] = count(path.read_text(errors='replace'), share, turns)
  cycles.update({name: cycles[key] for name, key in twins.items() if key in cycles})
  return cycles


def count(text: str, share: float | None = None, data_turns: Sequence[int] = (1,)) -> float:
  """Cycles of one program of bundles; share as in `read`, data_turns as in DATA_TURNS."""
  exits: dict[str, int | None] = {}  # predicate of a loop's end -> its turns, where they are a constant
  for predicate, test in re.findall(r'(%p\w+) = ([^;}]*)/\* loop exit test', text):
    limit = re.match(r'scmp\.(?:ge|eq)\.s32\.totalorder %\w+, (\d+)', test)
    exits[predicate] = max(1, int(limit[1])) if limit else None
  size, loops, spans = 0, [], []  # spans: (first bundle, last bundle, turns) of each loop
  skips, regions = [], {}  # (bundle, region it skips to); region -> its bundle
  for line in text.splitlines():
    bundle = re.match(r'\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:', line)
    if not bundle:
      continue
    if bundle[1] == 'LB':
      loops.append(size)
    regions.update(dict.fromkeys(re.findall(r'empty region (\d+)', line), size))
    branch = re.search(r'sbr\.rel \(!?(%p\w+)\) target = \$region(\d+)', line)
    if branch and branch[1] in exits and loops:
      turns = exits[branch[1]]
      if turns is None:
        turns, *rest = data_turns
        data_turns = rest or [turns]
      spans.append((loops.pop(), size, turns))
    elif branch:
      skips.append((size, branch[2]))
    size += 1
  weight = [1.0] * size
  for first, last, turns in spans:
    for i in range(first, last + 1):
      weight[i] *= turns
  inside = []  # what a branch in a loop can skip, unless that is all of the loop: then it only starts and ends it
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
