"""Predicts, as an interval, how long a compiled step takes on a TPU that this machine doesn't have.

The time of an instruction is the longest of three times:

- the time of its final bundles, with the body of a loop counted as often as it runs (bundles.py)
- the time of its matrix products at the chip's peak FLOPs. For a kernel, it is computed from the rows that the busiest
  matrix unit multiplies, so it is longer if a product doesn't fill the unit
- the time to read its operands from HBM and to write its results to HBM, once each

Instructions run one after the other. The lower end of the interval is the sum of their times, each multiplied by how
often the instruction runs. It is at least the time to move all bytes through HBM, including those of copies in the
background, for example of weights to the chip's own memory. The upper end adds the time that matrix products wait for
the matrix unit, which bundles don't show (Chip.interlock).

Both ends include collectives. A synchronous collective adds its whole time. An asynchronous collective runs at the same
time as the instructions between its start and its end. It adds only the time by which it is longer than these.

How accurate this is: another program with the same method predicted three published dense MaxText runs (v5e-256 at 16B
and 32B, v5p-128 at 32B). The published times were inside the predicted interval, or within 2 % of one of its ends. This
module hasn't been run on those three runs. Nothing has been checked for v6e, mixtures of experts or several slices, so
use predictions for those only to rank settings. Predictions leave out input, checkpoints, the network between slices,
contention between transfers and computation, and imbalance of experts.
"""

import collections
import dataclasses
import pathlib
import re
from typing import Any

from betarank.launch.plan import bundles, hlo
from betarank.launch.plan.chips import Topology

# The part of a step that each `jax.named_scope` belongs to. model/__init__.py and objectives/__init__.py describe the
# scopes. That of the optimizer is in train/step.py and rl/update.py.
PARTS = {
  'embed': 'embedding',
  'layers': 'layers, other',
  'attention/norm': 'norms',
  'attention/mask': 'attention',
  'attention/qkv': 'attention',
  'attention/rope': 'attention',
  'attention/core': 'attention',
  'attention/out': 'attention',
  'feed_forward/norm': 'norms',
  'feed_forward/in': 'feed-forward',
  'feed_forward/out': 'feed-forward',
  'moe/router': 'router',
  'moe/weights': 'expert weights',
  'moe/dispatch': 'dispatch',
  'moe/experts': 'experts',
  'moe/combine': 'dispatch',
  'final_norm': 'norms',
  'head': 'head and loss',
  'head/weights': 'head and loss',
  'head/logits': 'head and loss',
  'head/loss': 'head and loss',
  'head/gradient': 'head and loss',
  'optimizer': 'optimizer',
}
# Longer names come first, because an alternation takes the first one that matches.
_SCOPE = re.compile(f'/({"|".join(sorted(PARTS, key=len, reverse=True))})(?=/)')
# The number of bundles per row of 1536 bfloat16 that XLA gathers or scatter-adds. The loops over rows are
# data-dependent, so bundles.py counts only one iteration. The numbers are from bundles for v5e: 4976 for 256 rows, and
# 2.8 million for 67,328 rows, of which 49,152 were real.
ROW_CYCLES = {'gather': 20, 'scatter': 40}
ERROR = 'an interval, not measured on a chip; use it to rank settings (docs/plans.md)'


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Time and traffic of one execution of a program on one chip. Intervals are (least, most).

  step_s is the time of the whole execution in seconds. It is the sum of compute_s, the time without collectives, and
  exposed_s, the part of the collectives' time that isn't hidden behind computation.
  """

  step_s: tuple[float, float]
  compute_s: tuple[float, float]
  exposed_s: float  # the part of the collectives' time that compute doesn't hide
  collective_s: float
  collective_bytes: dict[str, float]  # by kind
  matmul_flops: float  # with recomputation, without kernels
  unread: tuple[str, ...]  # kernels with neither bundles nor an estimate; their time is missing
  hottest: tuple[tuple[str, float], ...]  # (operation, seconds), the longest first
  parts: dict[str, tuple[float, float]]  # part in PARTS -> (seconds of compute, seconds of collectives, also hidden)


def predict(program: hlo.Program, folder: pathlib.Path, topology: Topology) -> Prediction:
  """Predicts the time and the traffic of one execution of a program on one chip.

  folder: the folder to which libtpu wrote the bundles of the program.
  """
  chip, runs = topology.chip, program.runs()
  read = bundles.read(folder, {
    r.instruction.name: shares(r.instruction) for r in runs if 'tpu_custom_call' in r.instruction.text})
  total, waits, flops, moved_bytes = 0.0, 0.0, 0.0, 0.0
  once: dict[tuple[str, str], float] = {}  # (computation, instruction) -> seconds of one execution
  by_computation = collections.Counter()
  by_operation = collections.Counter()
  of_part, sent_by_part = collections.Counter(), collections.Counter()
  unread = set()
  for run in runs:
    one = run.instruction
    moved_bytes += run.times * program.prefetched_bytes(run)
    # A SparseCore's gather is asynchronous too, but its whole time counts, because the rest of the layer waits for it.
    asynchronous = one.opcode.endswith(('-start', '-done', '-update')) and one.opcode != 'custom-call-done'
    if one.opcode in hlo.FREE or asynchronous or program.is_transfer(run):
      continue
    product, kernel, work = program.flops(run), 'tpu_custom_call' in one.text, read.get(one.name)
    cycles = work.issued if work else 0.0
    if work is None and one.estimated_cycles is not None:
      # XLA's estimate is good for matrix products, but at least 3 times too high for other instructions.
      cycles = one.estimated_cycles if product else one.estimated_cycles / 3
    elif work is None and kernel:
      unread.add(one.name)
    product_s = work.rows / chip.matrix_rate if kernel and work else product / chip.flops
    moved = program.rows_moved(run)
    rows = ROW_CYCLES['scatter'] * moved['scatter'] or ROW_CYCLES['gather'] * moved['gather']
    own_bytes = program.hbm_bytes(run)
    seconds = max(max(cycles, rows) / chip.clock, product_s, own_bytes / chip.hbm_rate)
    moved_bytes += run.times * own_bytes
    total += run.times * seconds
    waits += run.times * chip.interlock * product_s
    flops += run.times * product
    once[run.computation, one.name] = seconds
    by_computation[run.computation] += run.times * seconds
    by_operation[_label(one)] += run.times * seconds
    of_part[_part(program.source(run))] += run.times * seconds
  least = moved_bytes / chip.hbm_rate
  compute_s = max(total, least), max(total + waits, least)
  sizes, spent, exposed = collections.Counter(), 0.0, 0.0
  for collective in program.collectives():
    group = collective.group or topology.chips
    seconds = collective.times * transfer_s(collective.kind, collective.bytes, group, topology)
    sizes[collective.kind] += collective.times * collective.bytes
    spent += seconds
    sent_by_part[_part(collective.source)] += seconds
    cover = sum(once.get((collective.computation, name), 0.0) for name in collective.meanwhile or ())
    exposed += max(0.0, seconds - collective.times * cover)
  return Prediction(
    step_s=(compute_s[0] + exposed, compute_s[1] + exposed), compute_s=compute_s, exposed_s=exposed,
    collective_s=spent, collective_bytes=dict(sizes), matmul_flops=flops, unread=tuple(sorted(unread)),
    hottest=tuple(by_operation.most_common(12)),
    parts={name: (of_part[name], sent_by_part[name]) for name, _ in (of_part + sent_by_part).most_common()})


def memory_bytes(memory: Any) -> tuple[int, int]:
  """Returns (bytes of temporary arrays, bytes of all arrays) at the time when a program needs the most memory.

  The bytes of all arrays are total_allocation_bytes, which a TPU's compiler reports. In older versions of jaxlib, which
  don't have this number, they are the sum of the arguments, results and temp_size_in_bytes. This sum may be too large:
  for a program that fits into 16.9 GB, temp_size_in_bytes was 17.6 GB.

  memory: the result of `compiled.memory_analysis()`.
  """
  kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  peak = getattr(memory, 'total_allocation_bytes', 0) or kept + memory.temp_size_in_bytes
  return max(0, peak - kept), peak


def scope(source: str) -> str | None:
  """Returns the innermost `jax.named_scope` of an instruction, of those that are keys of PARTS. None if there is none.

  source: the instruction's source, as `hlo.Program.source` returns it.
  """
  path, unwrapped = '', '/' + source.partition(' ')[0]
  while path != unwrapped:  # transformations wrap the scope that follows, as in jit(step)/transpose(jvp(embed))/add
    path, unwrapped = unwrapped, re.sub(r'\b(?!p?jit\b)\w+\(([^()]*)\)', r'\1', unwrapped)
  found = _SCOPE.findall(path)
  return found[-1] if found else None


def _part(source: str) -> str:
  return PARTS.get(scope(source), 'other')


def transfer_s(kind: str, size: float, group: int, topology: Topology) -> float:
  """Returns the seconds that one collective takes at the full rate of the links.

  Args:
    kind: one of hlo.COLLECTIVES.
    size: the bytes of the collective's result on one device; for a reduce-scatter, the bytes of its operand.
    group: the number of chips that take part.
  """
  rate = topology.links(group) * topology.chip.link_rate
  moved = size * (group - 1) / group
  if kind == 'all-reduce':
    return 2 * moved / rate
  if kind in ('all-to-all', 'ragged-all-to-all'):  # on average, a row crosses a quarter of the ring
    return moved * max(1.0, min(group, max(topology.dims)) / 4) / rate
  if kind == 'collective-permute':
    return size / topology.chip.link_rate
  return moved / rate


def shares(kernel: hlo.Instruction) -> bundles.Shares:
  """Returns the Shares of a kernel: the share of the kernel's steps in which each skippable region runs.

  The grid of splash attention has one step per block of scores. The main (largest) region runs for the blocks that the
  causal mask doesn't cover completely. The other regions run for the first and the last block of a row. The numbers of
  blocks are read from the shape of the first operand, which has one entry per block. In kernels other than splash
  attention, the main region runs in all steps.
  """
  grid = kernel.attribute(r'operand_layout_constraints=\{s8\[\d+,(\d+,\d+)\]')
  if not kernel.name.startswith('splash_mha') or not grid:
    return bundles.Shares(main=1.0)
  rows, columns = (int(n) for n in grid.split(','))
  # Block (i, j) has work if its last query comes after its first key.
  working = sum((i + 1) * columns > j * rows for i in range(rows) for j in range(columns))
  return bundles.Shares(working / (rows * columns), 1 / columns)


def _label(one: hlo.Instruction) -> str:
  """Returns a short name for an instruction: the name of a kernel, or the last two meaningful parts of the op_name."""
  if 'tpu_custom_call' in one.text:
    return one.name.rstrip('0123456789').rstrip('.')
  source = one.attribute(r'op_name="([^"]*)"') or one.name.rstrip('0123456789').rstrip('.')
  parts = [p for p in source.split('/') if p not in ('while', 'body', 'eval_jaxpr', 'checkpoint', 'shard_map')
           and not p.startswith(('jit(', 'jvp', 'transpose', 'rematted', 'closed_call', 'vmap'))]
  return '/'.join(parts[-2:]) or source.split('/')[-1]
