"""Reads a compiled program's text (HLO): what runs how often, its matrix products, memory traffic and collectives.

XLA's own cost analysis counts the body of a loop once; here each instruction comes with the number of times it runs,
from the trip counts that loop conditions state. Nothing here needs a device, or JAX.
"""

import dataclasses
import functools
import math
import re

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute')
BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 's32': 4, 'u32': 4, 's64': 8, 'u64': 8,
         'bf16': 2, 'f16': 2, 'f32': 4, 'f64': 8, 'c64': 8, 'c128': 16}
# Opcodes that move nothing: names for parts of what is there, and the shells of what is counted inside them.
FREE = {'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'while', 'conditional', 'call', 'after-all',
        'copy-start', 'copy-done', 'async-start', 'async-update', 'async-done', 'partition-id', 'replica-id',
        'optimization-barrier'}


@dataclasses.dataclass(frozen=True)
class Array:
  dtype: str
  dims: tuple[int, ...]
  on_chip: bool  # in VMEM or scalar memory, so not HBM traffic

  @property
  def bytes(self) -> float:
    return BYTES.get(self.dtype, 1 if self.dtype.startswith('f8') else 0) * math.prod(self.dims)


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  opcode: str
  arrays: tuple[Array, ...]  # what it makes; several for a tuple
  operands: tuple[str, ...]
  text: str  # from the opcode on
  root: bool

  def called(self, key: str) -> str | None:
    """Name of the computation in attribute `key`: calls, to_apply, body, condition."""
    found = re.search(rf'\b{key}=%?([\w.\-]+)', self.text)
    return found and found[1]

  def attribute(self, pattern: str) -> str | None:
    found = re.search(pattern, self.text)
    return found and found[1]

  @functools.cached_property
  def estimated_cycles(self) -> int | None:
    """What XLA's cost model guesses; on TPU only, and not for kernels."""
    found = self.attribute(r'"estimated_cycles":"(\d+)"')
    return found and int(found)


@dataclasses.dataclass(frozen=True)
class Run:
  """An instruction that a device executes, outside of any fusion."""

  instruction: Instruction
  computation: str
  times: int


@dataclasses.dataclass(frozen=True)
class Collective:
  """A transfer between devices. bytes: what one device holds afterwards (reduce-scatter: before) each time."""

  kind: str
  bytes: float
  group: int
  times: int
  hidden: bool  # started and awaited apart, so that compute can run meanwhile
  computation: str


@dataclasses.dataclass(frozen=True)
class Program:
  computations: dict[str, dict[str, Instruction]]
  entry: str

  def runs(self) -> list[Run]:
    """Everything executed, with its count. Of a conditional's branches all are listed once."""
    found: list[Run] = []

    def walk(computation, times):
      for instruction in self.computations[computation].values():
        found.append(Run(instruction, computation, times))
        if instruction.opcode == 'while':
          walk(instruction.called('body'), times * self.trip_count(instruction))
        elif instruction.opcode in ('call', 'async-start'):
          inner = instruction.called('to_apply') or instruction.called('calls')
          if inner in self.computations:
            walk(inner, times)
        elif instruction.opcode == 'conditional':
          for branch in _branches(instruction):
            walk(branch, times)

    walk(self.entry, 1)
    return found

  def trip_count(self, loop: Instruction) -> int:
    """How often a while runs: XLA's own figure, or N of a condition `i < N` from zero; 1 where neither is stated."""
    known = loop.attribute(r'known_trip_count[^\d]*(\d+)')
    if known:
      return int(known)
    condition = self.computations[loop.called('condition')]
    compare = next((i for i in self._inside(condition) if i.opcode == 'compare'), None)
    limits = [int(i.attribute(r'constant\((\d+)\)') or 0) for i in condition.values() if i.opcode == 'constant']
    if compare is None or not limits:
      return 1
    return max(1, max(limits) + (compare.attribute(r'direction=(\w+)') == 'LE'))

  def _inside(self, computation):
    """Its instructions, those of its fusions included."""
    for instruction in computation.values():
      yield instruction
      inner = instruction.called('calls') if instruction.opcode == 'fusion' else None
      if inner in self.computations:
        yield from self._inside(self.computations[inner])

  def flops(self, run: Run) -> float:
    """2 per multiply-add of the matrix products in an instruction, executed once."""
    home = self.computations[run.computation]
    if run.instruction.opcode != 'fusion':
      return _product_flops(run.instruction, home)
    inner = self.computations[run.instruction.called('calls')]
    return sum(self.flops(Run(i, run.instruction.called('calls'), 1)) for i in inner.values()
               if i.opcode in ('fusion', 'dot', 'convolution'))

  def hbm_bytes(self, run: Run) -> float:
    """Bytes an instruction must read from and write to HBM when executed once: operands once each, and results.

    A slice counts itself, not what it is cut from; an update in place counts the update.
    """
    one, home = run.instruction, self.computations[run.computation]
    if one.opcode in FREE:
      return 0.0
    sizes = lambda arrays: sum(a.bytes for a in arrays if not a.on_chip)
    operands = [home[name] for name in one.operands if name in home]
    if one.opcode == 'dynamic-slice':
      return 2 * sizes(one.arrays)
    if one.opcode == 'dynamic-update-slice':
      return 2 * sizes(operands[1].arrays)
    inner = self.computations.get(one.called('calls') or '') if one.opcode == 'fusion' else None
    if inner is None:
      return sizes(one.arrays) + sum(sizes(o.arrays) for o in operands)
    total = 0.0
    for i in inner.values():
      if i.opcode == 'parameter' and not any(a.on_chip for a in i.arrays):
        index = int(i.attribute(r'parameter\((\d+)\)'))
        if index < len(operands) and not any(a.on_chip for a in operands[index].arrays):
          total += min(self._read(inner, i.name), sizes(i.arrays))
    root = next(i for i in inner.values() if i.root)
    parts = [inner[name] for name in root.operands if name in inner] if root.opcode == 'tuple' else [root]
    for part, array in zip(parts, one.arrays):
      while part.opcode == 'bitcast' and part.operands[0] in inner:
        part = inner[part.operands[0]]
      if not array.on_chip:
        total += inner[part.operands[1]].arrays[0].bytes if part.opcode == 'dynamic-update-slice' else array.bytes
    return total

  def _read(self, inner: dict[str, Instruction], name: str) -> float:
    """Bytes of the array `name` that the instructions of a fusion read: its slices, where all only slice it."""
    total = 0.0
    for user in inner.values():
      if name not in user.operands:
        continue
      if user.opcode == 'dynamic-slice':
        total += user.arrays[0].bytes
      elif user.opcode == 'bitcast':
        total += self._read(inner, user.name)
      elif user.opcode == 'fusion' and user.called('calls') in self.computations:
        nested = self.computations[user.called('calls')]
        for index, operand in enumerate(user.operands):
          if operand == name:
            total += self._read(nested, next(
              i.name for i in nested.values() if i.opcode == 'parameter' and f'parameter({index})' in i.text))
      elif user.opcode != 'dynamic-update-slice' or user.operands[0] != name:
        return math.inf
    return total

  def collectives(self) -> list[Collective]:
    """Each transfer once: one that XLA spread over several fusions keeps its channel."""
    listed = []
    for run in self.runs():
      fused = run.instruction.called('calls') if run.instruction.opcode == 'fusion' else None
      inside = self.computations.get(fused or '', {})
      spread = any('"AsyncCollective' in i.text for i in inside.values())
      home = inside or self.computations[run.computation]
      listed += [(i, home, run, spread) for i in inside.values() or [run.instruction]
                 if i.opcode.removesuffix('-start') in COLLECTIVES]
    channel = lambda i: i.attribute(r'channel_id=(\d+)')
    spread_channels = {channel(i) for i, _, _, spread in listed if spread}
    found, seen = [], set()
    for i, home, run, _ in listed:
      kind, group, spread = i.opcode.removesuffix('-start'), _group_size(i.text), channel(i) in spread_channels
      if group == 1 or (spread and channel(i) in seen):
        continue
      seen.add(channel(i))
      made = i.arrays
      if i.opcode in ('all-gather-start', 'collective-permute-start'):  # (operands, results, more)
        made = made[len(made) // 2 :] if kind == 'all-gather' else made[1:2]
      elif kind == 'reduce-scatter':
        made = [a for name in i.operands if name in home for a in home[name].arrays]
      hidden = spread or i.opcode.endswith('-start')
      found.append(Collective(kind, sum(a.bytes for a in made), group, run.times, hidden, run.computation))
    return found


def read(text: str) -> Program:
  """Parses what `compiled.as_text()` gives."""
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = '', None
  for line in text.splitlines():
    if line.startswith(('%', 'ENTRY')) and line.rstrip().endswith('{'):
      name = re.match(r'(?:ENTRY )?%?([\w.\-<>]+)', line)[1]
      current = computations[name] = {}
      if line.startswith('ENTRY'):
        entry = name
    elif line.rstrip() == '}':  # a kernel's metadata may also begin a line with one
      current = None
    elif current is not None:
      instruction = _instruction(line)
      if instruction:
        current[instruction.name] = instruction
  return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
  head = re.match(r'\s+(ROOT )?%?([\w.\-<>]+) = ', line)
  if not head:
    return None
  rest = line[head.end():]
  if rest.startswith('('):  # a tuple's type nests brackets
    end = _closing(rest, 0)
    kind, rest = rest[: end + 1], rest[end + 1:].lstrip()
  else:
    kind, _, rest = rest.partition(' ')
  opcode = re.match(r'[\w\-]+', rest)
  if not opcode:
    return None
  start = rest.find('(')
  operands = tuple(re.findall(r'%([\w.\-<>]+)', rest[start : _closing(rest, start)]))
  return Instruction(head[2], opcode[0], _arrays(kind), operands, rest, bool(head[1]))


def _closing(text: str, start: int) -> int:
  """Where the bracket that opens at `start` closes."""
  depth = 0
  for at in range(start, len(text)):
    depth += (text[at] == '(') - (text[at] == ')')
    if not depth:
      return at
  return len(text)


def _arrays(kind: str) -> tuple[Array, ...]:
  kind = re.sub(r'/\*.*?\*/', '', kind)
  return tuple(
    Array(dtype, tuple(int(d) for d in dims.split(',') if d), bool(layout and re.search(r'S\([1-9]\)', layout)))
    for dtype, dims, layout in re.findall(r'([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?', kind))


def _branches(conditional: Instruction) -> list[str]:
  named = conditional.attribute(r'branch_computations=\{([^}]*)\}')
  if named:
    return [name.strip().lstrip('%') for name in named.split(',')]
  return [name for key in ('true_computation', 'false_computation') if (name := conditional.called(key))]


def _product_flops(one: Instruction, home: dict[str, Instruction]) -> float:
  if one.opcode not in ('dot', 'convolution'):
    return 0.0
  left, right = (home[name].arrays[0].dims for name in one.operands[:2])
  out = one.arrays[0].dims
  if one.opcode == 'dot':
    contracted = one.attribute(r'lhs_contracting_dims=\{([\d,]*)\}') or ''
    return 2.0 * math.prod(out) * math.prod(left[int(d)] for d in contracted.split(',') if d)
  lhs, rhs, result = re.match(r'(\w+)_(\w+)->(\w+)', one.attribute(r'dim_labels=([\w>\-]+)')).groups()
  window = one.attribute(r'window=\{([^}]*)\}') or ''
  setting = lambda key, default: [part for part in (re.search(rf'(?:^| ){key}=(\S+)', window) or ['', ''])[1].split('x')
                                  if part] or [default] * 9
  pairs = 1
  for d, (stride, pad, lhs_by, rhs_by) in enumerate(zip(
      setting('stride', '1'), setting('pad', '0_0'), setting('lhs_dilate', '1'), setting('rhs_dilate', '1'))):
    if str(d) not in lhs:
      break
    size, kernel, outputs = left[lhs.index(str(d))], right[rhs.index(str(d))], out[result.index(str(d))]
    stride, low, lhs_by, rhs_by = int(stride), int(pad.split('_')[0]), int(lhs_by), int(rhs_by)
    # XLA writes batched products as convolutions whose window mostly lies in the padding: only real pairs count.
    pairs *= sum(0 <= at < (size - 1) * lhs_by + 1 and at % lhs_by == 0
                 for o in range(outputs) for k in range(kernel) if (at := o * stride + k * rhs_by - low) is not None)
  return 2.0 * out[result.index('b')] * out[result.index('f')] * right[rhs.index('i')] * pairs


def _group_size(text: str) -> int:
  """Devices that take part in one transfer."""
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text)
  if mesh:
    sizes = {name: int(size) for name, size in re.findall(r"'([\w.]+)'=(\d+)", mesh[1])}
    return math.prod(sizes.get(name, 1) for name in re.findall(r"'([\w.]+)'", mesh[2]))
  iota = re.search(r'replica_groups=\[(\d+),(\d+)\]<=', text)
  if iota:
    return int(iota[2])
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', text)
  if listed:
    return len(listed[1].split(','))
  return 2 if 'source_target_pairs=' in text else 0  # {}: all devices, for the caller to fill in
