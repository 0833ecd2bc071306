"""How long a compiled step takes on a TPU that isn't here, and how far to trust that.

Every instruction takes the longest of: its final bundles, loops multiplied out (bundles.py); its matrix products at
the chip's peak; its operands and results once through HBM. Instructions run one after another, each as often as its
loop says. That is the lower end. The upper end adds the waits inside matrix products that bundles don't show
(Chip.interlock). To both come the collectives: whole where they are synchronous, and where they are not, what is longer
than the compute of the same loop.

The method held three published dense MaxText runs (v5e-256 at 16B and 32B, v5p-128 at 32B) in its interval or missed
an end by 2 %, in another program's reading; this module has not been run on them. Nothing of v6e, of a mixture of
experts or of several slices has been checked: use those to rank settings. Not in it: input, checkpoints, the network
between slices, contention of transfers with compute, and imbalance of experts.
"""

import collections
import dataclasses
import pathlib

from launch import bundles, hlo
from launch.chips import Topology

ERROR = 'an interval, never measured on a chip, to rank settings with (docs/plans.md)'


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Of one execution of a program, for one chip."""

  step_s: tuple[float, float]
  compute_s: tuple[float, float]
  exposed_s: float  # of the collectives, what nothing hides
  collective_s: float
  collective_bytes: dict[str, float]  # by kind
  matmul_flops: float  # recomputation included, kernels not
  unread: tuple[str, ...]  # kernels with neither bundles nor an estimate: not in the time
  hottest: tuple[tuple[str, float], ...]  # (operation, seconds), the longest first


def predict(program: hlo.Program, folder: pathlib.Path, topology: Topology) -> Prediction:
  """folder: where libtpu wrote the bundles of this program."""
  chip, runs = topology.chip, program.runs()
  cycles = bundles.read(folder, {r.instruction.name: share for r in runs if (share := _causal_share(r.instruction))})
  total, waits, flops = 0.0, 0.0, 0.0
  by_computation = collections.Counter()
  by_operation = collections.Counter()
  unread = set()
  for run in runs:
    one = run.instruction
    asynchronous = one.opcode.endswith(('-start', '-done', '-update'))
    if one.opcode in hlo.FREE or asynchronous or one.opcode.removesuffix('-start') in hlo.COLLECTIVES:
      continue
    product = program.flops(run)
    known = cycles.get(one.name)
    if known is None and one.estimated_cycles is not None:
      # XLA's estimate is good for products and 3 or more times too high for the rest.
      known = one.estimated_cycles if product else one.estimated_cycles / 3
    if known is None and 'tpu_custom_call' in one.text:
      unread.add(one.name)
    seconds = max((known or 0) / chip.clock, product / chip.flops, program.hbm_bytes(run) / chip.hbm_rate)
    total += run.times * seconds
    waits += run.times * chip.interlock * product / chip.flops
    flops += run.times * product
    by_computation[run.computation] += run.times * seconds
    by_operation[_label(one)] += run.times * seconds
  sizes, spent, exposed = collections.Counter(), 0.0, 0.0
  hidden = collections.Counter()
  for collective in program.collectives():
    group = collective.group or topology.chips
    seconds = collective.times * transfer_s(collective.kind, collective.bytes, group, topology)
    sizes[collective.kind] += collective.times * collective.bytes
    spent += seconds
    if collective.hidden:
      hidden[collective.computation] += seconds
    else:
      exposed += seconds
  exposed += sum(max(0.0, seconds - by_computation[name]) for name, seconds in hidden.items())
  return Prediction(
    step_s=(total + exposed, total + waits + exposed), compute_s=(total, total + waits), exposed_s=exposed,
    collective_s=spent, collective_bytes=dict(sizes), matmul_flops=flops, unread=tuple(sorted(unread)),
    hottest=tuple(by_operation.most_common(12)))


def transfer_s(kind: str, size: float, group: int, topology: Topology) -> float:
  """Seconds of one collective at the links' full rate."""
  rate = topology.links(group) * topology.chip.link_rate
  moved = size * (group - 1) / group
  if kind == 'all-reduce':
    return 2 * moved / rate
  if kind in ('all-to-all', 'ragged-all-to-all'):  # a row passes a quarter of the ring on average
    return moved * max(1.0, min(group, max(topology.dims)) / 4) / rate
  if kind == 'collective-permute':
    return size / topology.chip.link_rate
  return moved / rate


def _causal_share(kernel: hlo.Instruction) -> float | None:
  """Of splash attention's blocks, those with something to do; its first operand has an entry for each."""
  grid = kernel.attribute(r'operand_layout_constraints=\{s8\[\d+,(\d+,\d+)\]')
  if not kernel.name.startswith('splash_mha') or not grid:
    return None
  rows, columns = (int(n) for n in grid.split(','))
  # Block (i, j) has work if its last query comes after its first key.
  return sum((i + 1) * columns > j * rows for i in range(rows) for j in range(columns)) / (rows * columns)


def _label(one: hlo.Instruction) -> str:
  """What of the source an instruction is: its last meaningful names."""
  if 'tpu_custom_call' in one.text:
    return one.name.rstrip('0123456789').rstrip('.')
  source = one.attribute(r'op_name="([^"]*)"') or one.name.rstrip('0123456789').rstrip('.')
  parts = [p for p in source.split('/') if p not in ('while', 'body', 'eval_jaxpr', 'checkpoint', 'shard_map')
           and not p.startswith(('jit(', 'jvp', 'transpose', 'rematted', 'closed_call', 'vmap'))]
  return '/'.join(parts[-2:]) or source.split('/')[-1]
