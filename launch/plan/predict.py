"""How long a compiled step takes on a TPU that isn't here, and how far to trust that.

Every instruction takes the longest of: its final bundles, loops multiplied out (bundles.py); its matrix products at
the chip's peak; its operands and results once through HBM. Instructions run one after another, each as often as its
loop says. That is the lower end. The upper end adds the waits inside matrix products that bundles don't show
(Chip.interlock). To both come the collectives: whole where they are synchronous, and where they are not, what is longer
than the compute that the schedule has between their start and their end.

The method held three published dense MaxText runs (v5e-256 at 16B and 32B, v5p-128 at 32B) in its interval or missed
an end by 2 %, in another program's reading; this module has not been run on them. Nothing of v6e, of a mixture of
experts or of several slices has been checked: use those to rank settings. Not in it: input, checkpoints, the network
between slices, contention of transfers with compute, and imbalance of experts.
"""

import collections
import dataclasses
import pathlib
import re

from betarank.launch.plan import bundles, hlo
from betarank.launch.plan.chips import Topology

# The part of a step that each `jax.named_scope` belongs to. model/__init__.py and objectives/__init__.py describe the
# scopes; the optimizer's is in train/step.py and rl/update.py.
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
# Bundles a row that XLA gathers, or adds to others, of 1536 bfloat16: their loops' ends depend on the data, so
# bundles.py counts them once. Read from a v5e's: 4976 for 256 rows, and 2.8 million for 67,328, 49,152 of them real.
ROW_CYCLES = {'gather': 20, 'scatter': 40}
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
  parts: dict[str, tuple[float, float]]  # of PARTS: (seconds of compute, seconds of collectives, hidden or not)


def predict(program: hlo.Program, folder: pathlib.Path, topology: Topology) -> Prediction:
  """folder: where libtpu wrote the bundles of this program."""
  chip, runs = topology.chip, program.runs()
  cycles = bundles.read(folder, {
    r.instruction.name: _share(r.instruction) for r in runs if 'tpu_custom_call' in r.instruction.text})
  total, waits, flops = 0.0, 0.0, 0.0
  once = {}  # (computation, instruction) -> seconds of one execution
  by_computation = collections.Counter()
  by_operation = collections.Counter()
  of_part, sent_by_part = collections.Counter(), collections.Counter()
  unread = set()
  for run in runs:
    one = run.instruction
    # What a SparseCore gathers is asynchronous, too, but counted whole: the rest of a layer waits for it.
    asynchronous = one.opcode.endswith(('-start', '-done', '-update')) and one.opcode != 'custom-call-done'
    if one.opcode in hlo.FREE or asynchronous or program.is_transfer(run):
      continue
    product = program.flops(run)
    known = cycles.get(one.name)
    if known is None and one.estimated_cycles is not None:
      # XLA's estimate is good for products and 3 or more times too high for the rest.
      known = one.estimated_cycles if product else one.estimated_cycles / 3
    if known is None and 'tpu_custom_call' in one.text:
      unread.add(one.name)
    moved = program.rows_moved(run)
    rows = ROW_CYCLES['scatter'] * moved['scatter'] or ROW_CYCLES['gather'] * moved['gather']
    seconds = max(max(known or 0, rows) / chip.clock, product / chip.flops, program.hbm_bytes(run) / chip.hbm_rate)
    total += run.times * seconds
    waits += run.times * chip.interlock * product / chip.flops
    flops += run.times * product
    once[run.computation, one.name] = seconds
    by_computation[run.computation] += run.times * seconds
    by_operation[_label(one)] += run.times * seconds
    of_part[_part(program.source(run))] += run.times * seconds
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
    step_s=(total + exposed, total + waits + exposed), compute_s=(total, total + waits), exposed_s=exposed,
    collective_s=spent, collective_bytes=dict(sizes), matmul_flops=flops, unread=tuple(sorted(unread)),
    hottest=tuple(by_operation.most_common(12)),
    parts={name: (of_part[name], sent_by_part[name]) for name, _ in (of_part + sent_by_part).most_common()})


def scope(source: str) -> str | None:
  """Returns the innermost scope of PARTS that an instruction lies in, given what hlo.Program.source returns for it."""
  path, unwrapped = '', '/' + source.partition(' ')[0]
  while path != unwrapped:  # transformations wrap the first scope after them, as in jit(step)/transpose(jvp(embed))/add
    path, unwrapped = unwrapped, re.sub(r'\b(?!p?jit\b)\w+\(([^()]*)\)', r'\1', unwrapped)
  found = _SCOPE.findall(path)
  return found[-1] if found else None


def _part(source: str) -> str:
  return PARTS.get(scope(source), 'other')


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


def _share(kernel: hlo.Instruction) -> float:
  """Of a kernel's blocks, those with something to do: of splash attention's what is not after the query, for whose
  blocks its first operand has an entry each; else all."""
  grid = kernel.attribute(r'operand_layout_constraints=\{s8\[\d+,(\d+,\d+)\]')
  if not kernel.name.startswith('splash_mha') or not grid:
    return 1.0
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
