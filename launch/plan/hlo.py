"""Reads a compiled program (HLO text): how often each instruction runs, its matmul FLOPs, HBM traffic and collectives.

XLA's own cost analysis counts the body of a loop only once. Here, each instruction is counted as often as it runs,
which follows from the trip counts of loops. Neither a device nor JAX is needed.
"""

import collections
import dataclasses
import functools
import math
import re

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute')
BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 's32': 4, 'u32': 4, 's64': 8, 'u64': 8,
         'bf16': 2, 'f16': 2, 'f32': 4, 'f64': 8, 'c64': 8, 'c128': 16}
# Opcodes that move no data: views of existing arrays, and wrappers whose contents are counted separately.
FREE = {'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'while', 'conditional', 'call', 'after-all',
        'copy-start', 'copy-done', 'async-start', 'async-update', 'async-done', 'partition-id', 'replica-id',
        'optimization-barrier'}
RARE = re.compile(r'op_name="[^"]*\boverflow/while')  # the loop over the overflow of experts, which rarely runs at all


@dataclasses.dataclass(frozen=True)
class Array:
  dtype: str
  dims: tuple[int, ...]
  on_chip: bool  # it is in VMEM or scalar memory, so reading it causes no HBM traffic

  @property
  def bytes(self) -> float:
    return BYTES.get(self.dtype, 1 if self.dtype.startswith('f8') else 0) * math.prod(self.dims)


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  opcode: str
  arrays: tuple[Array, ...]  # the result; several arrays for a tuple
  operands: tuple[str, ...]
  text: str  # the text of the instruction from the opcode on
  root: bool

  def called(self, key: str) -> str | None:
    """Returns the name of the computation in the attribute `key` (calls, to_apply, body or condition).

    Returns None if the instruction has no such attribute.
    """
    found = re.search(rf'\b{key}=%?([\w.\-]+)', self.text)
    return found and found[1]

  def attribute(self, pattern: str) -> str | None:
    """Returns what the first group of a regular expression matches in the instruction's text; None without a match."""
    found = re.search(pattern, self.text)
    return found and found[1]

  @functools.cached_property
  def estimated_cycles(self) -> int | None:
    """XLA's estimate of the instruction's cycles. It is None for kernels, and on devices other than TPUs."""
    found = self.attribute(r'"estimated_cycles":"(\d+)"')
    return found and int(found)


@dataclasses.dataclass(frozen=True)
class Run:
  """An instruction that a device executes, and how often. Instructions inside a fusion are counted with the fusion.

  computation: the name of the computation that contains the instruction.
  times: the number of executions.
  """

  instruction: Instruction
  computation: str
  times: int


@dataclasses.dataclass(frozen=True)
class Collective:
  """A transfer between devices.

  kind: one of COLLECTIVES.
  bytes: the bytes of the result on one device, for one execution. For a reduce-scatter, the bytes of the operand.
  group: the number of devices that take part; 0 means all devices.
  times: the number of executions.
  meanwhile: the names of the instructions that run between the start and the end of an asynchronous collective; None if
    the collective is synchronous.
  computation: the name of the computation that contains the collective.
  source: the operation and the functions that it comes from, as `Program.source` returns them.
  """

  kind: str
  bytes: float
  group: int
  times: int
  meanwhile: tuple[str, ...] | None
  computation: str
  source: str


@dataclasses.dataclass(frozen=True)
class Program:
  """A parsed program.

  computations: {name of a computation: {name of an instruction: instruction}}, in the order of the schedule.
  entry: the name of the computation where the program starts.
  frames: {number of a stack frame: its functions, innermost first, as 'file:function file:function ...'}.
  """

  computations: dict[str, dict[str, Instruction]]
  entry: str
  frames: dict[int, str] = dataclasses.field(default_factory=dict)

  def source(self, run: Run) -> str:
    """Returns the operation and the functions that `run.instruction` comes from, with the innermost function first.

    An example is `.../gather model/moe.py:_take ...`. If the instruction has no functions, they are taken from the
    instructions that are fused into it, or else from its operands. If these have none either, returns only the
    operation, or '' if the operation is unknown too.
    """
    home, seen = self.computations[run.computation], set()
    listed = [run.instruction, *reversed(self._inside_fusion(run.instruction).values())]
    while listed:
      for one in listed:
        operation, number = one.attribute(r'op_name="([^"]*)"'), one.attribute(r'stack_frame_id=(\d+)')
        if number and int(number) in self.frames:
          return f'{operation or ""} {self.frames[int(number)]}'
      seen |= {one.name for one in listed}
      operands = dict.fromkeys(name for one in listed for name in one.operands)
      listed = [home[name] for name in operands if name in home and name not in seen]
    return run.instruction.attribute(r'op_name="([^"]*)"') or ''

  def is_transfer(self, run: Run) -> bool:
    """Returns whether `run.instruction` is a collective without other work, or starts an asynchronous collective, or is
    a fusion that ends one.

    A reduce-scatter counts as a collective. On TPU, it is a fusion of an all-reduce and a slice.
    """
    one, inside = run.instruction, self._inside_fusion(run.instruction)
    ends = any('"AsyncCollective' in i.text for i in inside.values())
    return one.opcode.removesuffix('-start') in COLLECTIVES or ends or _scatters(inside)

  def _inside_fusion(self, one: Instruction) -> dict[str, Instruction]:
    return self.computations.get(one.called('calls') or '', {}) if one.opcode == 'fusion' else {}

  def runs(self) -> list[Run]:
    """Returns every executed instruction and how often it runs. All branches of a conditional count as executed."""
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
    """Returns how often the body of a loop runs.

    If XLA states the number, it is used. Otherwise, a loop with the condition `i < N` is assumed to run N times. Any
    other loop is assumed to run once, or not at all if its text matches RARE, since such a loop rarely has anything to
    do.
    """
    known = loop.attribute(r'known_trip_count[^\d]*(\d+)')
    if known:
      return int(known)
    condition = self.computations[loop.called('condition')]
    compare = next((i for i in self._inside(condition) if i.opcode == 'compare'), None)
    limits = [int(i.attribute(r'constant\((\d+)\)') or 0) for i in condition.values() if i.opcode == 'constant']
    if compare is None or not limits:
      return 0 if RARE.search(loop.text) else 1
    return max(1, max(limits) + (compare.attribute(r'direction=(\w+)') == 'LE'))

  def _inside(self, computation):
    """Yields the instructions of a computation, and those of its fusions."""
    for instruction in computation.values():
      yield instruction
      inner = instruction.called('calls') if instruction.opcode == 'fusion' else None
      if inner in self.computations:
        yield from self._inside(self.computations[inner])

  def flops(self, run: Run) -> float:
    """Returns the FLOPs of the matrix products in one execution of `run.instruction`. A multiply-add has 2 FLOPs."""
    home = self.computations[run.computation]
    if run.instruction.opcode != 'fusion':
      return _product_flops(run.instruction, home)
    inner = self.computations[run.instruction.called('calls')]
    return sum(self.flops(Run(i, run.instruction.called('calls'), 1)) for i in inner.values()
               if i.opcode in ('fusion', 'dot', 'convolution'))

  def rows_moved(self, run: Run) -> dict[str, int]:
    """Returns how many rows one execution of `run.instruction` moves, as {'gather': number, 'scatter': number}.

    A missing key means 0. Rows with fewer than 128 numbers aren't counted.
    """
    def count(one, home):
      if one.opcode == 'fusion':
        inside = self._inside_fusion(one)
        return sum((count(i, inside) for i in inside.values()), collections.Counter())
      if one.opcode == 'gather':
        width = math.prod(int(n) for n in one.attribute(r'slice_sizes=\{([\d,]*)\}').split(','))
        return collections.Counter(gather=math.prod(one.arrays[0].dims) // width * (width >= 128))
      if one.opcode == 'scatter':
        added, window = home[one.operands[-1]].arrays[0].dims, one.attribute(r'update_window_dims=\{([\d,]*)\}')
        width = math.prod(added[int(d)] for d in window.split(',') if d)
        return collections.Counter(scatter=math.prod(added) // width * (width >= 128))
      return collections.Counter()

    return count(run.instruction, self.computations[run.computation])

  def hbm_bytes(self, run: Run) -> float:
    """Returns the bytes that one execution of `run.instruction` reads from and writes to HBM.

    Each operand and each result is counted once. If the instruction reads only slices or rows of an operand, only these
    are counted. If the instruction updates an operand in place, only the update is counted. The buffers of a collective
    in a fusion aren't counted.
    """
    one, home = run.instruction, self.computations[run.computation]
    if one.opcode in FREE:
      return 0.0
    sizes = lambda arrays: sum(a.bytes for a in arrays if not a.on_chip)
    operands = [home[name] for name in one.operands if name in home]
    if one.opcode in ('dynamic-slice', 'custom-call-done'):  # custom-call-done: rows gathered by a SparseCore
      return 2 * sizes(one.arrays)
    if one.opcode == 'dynamic-update-slice':
      return 2 * sizes(operands[1].arrays)
    inner = self.computations.get(one.called('calls') or '') if one.opcode == 'fusion' else None
    if inner is None:
      distinct = {o.name: o for o in operands}  # a kernel may take several blocks of an array
      aliases = one.attribute(r'output_to_operand_aliasing=\{(.*?\))\}') or ''
      updated = {int(index or 0) for index in re.findall(r'\{(\d*)\}: \(', aliases)}  # results written in place
      made = [array for index, array in enumerate(one.arrays) if index not in updated]
      return sizes(made) + sum(sizes(o.arrays) for o in distinct.values())
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
      if not array.on_chip and part.opcode != 'parameter' and part.opcode not in COLLECTIVES:
        total += inner[part.operands[1]].arrays[0].bytes if part.opcode == 'dynamic-update-slice' else array.bytes
    return total

  def prefetched_bytes(self, run: Run) -> float:
    """Returns the bytes that `run.instruction`, the end of an asynchronous copy, moves through HBM in one execution.

    For all other instructions, returns 0. XLA uses such copies to move weights to the chip's own memory while other
    instructions run. The instructions that use the weights then read them from the chip's own memory.
    """
    one = run.instruction
    return sum(a.bytes for a in one.arrays) if one.opcode in ('copy-done', 'slice-done') else 0.0

  def _read(self, inner: dict[str, Instruction], name: str) -> float:
    """Returns how many bytes of an array a fusion reads. Returns infinity if it may read more than slices or rows.

    inner: the instructions of the fusion.
    name: the name that the array has in the fusion.
    """
    total = 0.0
    for user in inner.values():
      if name not in user.operands:
        continue
      if user.opcode == 'dynamic-slice' or (user.opcode == 'gather' and user.operands[0] == name):
        total += user.arrays[0].bytes
      elif user.opcode == 'bitcast' and not user.root:  # if it is the root, a fusion around this one may read it all
        total += self._read(inner, user.name)
      elif user.opcode == 'fusion' and user.called('calls') in self.computations:
        nested = self.computations[user.called('calls')]
        for index, operand in enumerate(user.operands):
          if operand == name:
            total += self._read(nested, next(
              i.name for i in nested.values() if i.opcode == 'parameter' and f'parameter({index})' in i.text))
      elif user.opcode in COLLECTIVES or (user.root and user.opcode == 'tuple'):
        continue
      elif user.opcode != 'dynamic-update-slice' or user.operands[0] != name:
        return math.inf
    return total

  def collectives(self) -> list[Collective]:
    """Returns the collectives of the program. A collective that XLA has split over several fusions is returned once."""
    found, seen = [], set()
    for run in self.runs():
      inside = self._inside_fusion(run.instruction)
      home = inside or self.computations[run.computation]
      for i in inside.values() or [run.instruction]:
        kind, group, chain = i.opcode.removesuffix('-start'), _group_size(i.text), _chain(i)
        if kind not in COLLECTIVES or group == 1 or (chain and (run.computation, chain) in seen):
          continue
        seen.add((run.computation, chain))
        made = i.arrays
        if i.opcode in ('all-gather-start', 'collective-permute-start'):  # (operands, results, more)
          made = made[len(made) // 2 :] if kind == 'all-gather' else made[1:2]
        elif kind == 'reduce-scatter':
          made = [a for name in i.operands if name in home for a in home[name].arrays]
        elif kind == 'all-reduce' and _scatters(inside):
          kind = 'reduce-scatter'
        source = self.source(Run(i, run.computation, 1)) or self.source(run)
        found.append(Collective(
          kind, sum(a.bytes for a in made), group, run.times, self._meanwhile(run, chain), run.computation, source))
    return found

  def _meanwhile(self, run: Run, chain: str | None) -> tuple[str, ...] | None:
    """Returns the names of the instructions that run between the start and the end of an asynchronous collective.

    Returns None if the collective is synchronous. Instructions run in the order of the program's text.

    run: the collective, or the instruction that starts it.
    chain: the chain_id of the collective, if it has one.
    """
    one, home = run.instruction, self.computations[run.computation]
    if not chain and not one.opcode.endswith('-start'):
      return None
    names = list(home)
    after = names[names.index(one.name) + 1 :]
    for count, name in enumerate(after):
      inside = self._inside_fusion(home[name])
      ended = any('"AsyncCollectiveDone"' in i.text for i in inside.values())
      if (one.name in home[name].operands and home[name].opcode.endswith('-done')) or (
          ended and chain in map(_chain, inside.values())):
        return tuple(after[:count])
    return tuple(names)  # it ends in the next iteration of a loop


def _chain(one: Instruction) -> str | None:
  """Returns the chain_id of an instruction, or None. All parts of an asynchronous collective share one chain_id."""
  return one.attribute(r'chain_id="(\d+)"')


def _scatters(computation: dict[str, Instruction]) -> bool:
  """Returns whether the instructions of a fusion make up a reduce-scatter.

  They do if there is an all-reduce and a slice of its result, and no matrix product.
  """
  opcodes = {i.opcode for i in computation.values()}
  return {'all-reduce', 'dynamic-slice'} <= opcodes and not {'fusion', 'dot', 'convolution'} & opcodes


def read(text: str) -> Program:
  """Parses a program.

  text: the result of `compiled.as_text()`.
  """
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = '', None
  for line in text.splitlines():
    if line.startswith(('%', 'ENTRY')) and line.rstrip().endswith('{'):
      name = re.match(r'(?:ENTRY )?%?([\w.\-<>]+)', line)[1]
      current = computations[name] = {}
      if line.startswith('ENTRY'):
        entry = name
    elif line.rstrip() == '}':  # lines of a kernel's metadata may also begin with a brace
      current = None
    elif current is not None:
      instruction = _instruction(line)
      if instruction:
        current[instruction.name] = instruction
  return Program(computations, entry, _frames(text.partition('\n%')[0]))


def _frames(head: str) -> dict[int, str]:
  """Returns {number of a stack frame: 'file:function file:function ...'}, with the innermost function first.

  head: the text before the first computation, which has tables of files, functions and frames.
  """
  rows = lambda pattern: {int(number): rest for number, *rest in re.findall(rf'^(\d+) {pattern}$', head, re.M)}
  name = lambda table: dict(re.findall(r'^(\d+) "(.*)"$', head.partition(f'{table}\n')[2].partition('\n\n')[0], re.M))
  files, functions = name('FileNames'), name('FunctionNames')
  places = rows(r'\{file_name_id=(\d+) function_name_id=(\d+) .*\}')
  stack = rows(r'\{file_location_id=(\d+) parent_frame_id=(\d+)\}')
  shift = any(int(parent) == number for number, (_, parent) in stack.items())  # some versions number parents from 1
  found: dict[int, str] = {}
  for number, (place, parent) in sorted(stack.items()):  # parents come before their children
    file, function = places[int(place)]
    found[number] = f'{files[file]}:{functions[function]} {found.get(int(parent) - shift, "")}'
  return found


def _instruction(line: str) -> Instruction | None:
  head = re.match(r'\s+(ROOT )?%?([\w.\-<>]+) = ', line)
  if not head:
    return None
  rest = line[head.end():]
  if rest.startswith('('):  # the type of a tuple has nested parentheses
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
  """Returns the index of the parenthesis that closes the parenthesis at `start`."""
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
    # XLA writes batched matmuls as convolutions whose window is mostly in the padding, which doesn't count.
    pairs *= sum(0 <= at < (size - 1) * lhs_by + 1 and at % lhs_by == 0
                 for o in range(outputs) for k in range(kernel) if (at := o * stride + k * rhs_by - low) is not None)
  return 2.0 * out[result.index('b')] * out[result.index('f')] * right[rhs.index('i')] * pairs


def _group_size(text: str) -> int:
  """Returns the number of devices that take part in a collective; 0 means all devices.

  text: the text of the collective.
  """
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
  return 2 if 'source_target_pairs=' in text else 0
