"""How long a program compiled ahead of time would take on a TPU that isn't there.

libtpu writes the instruction bundles of every compiled operation if it is asked to before it is loaded, see
launch.bundles.FLAGS. XLA's own estimated_cycles are no clock: they are several times too high for elementwise work, and
Pallas kernels and some library calls have none.
"""

import functools
import math
import re

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'f32': 4, 's32': 4, 'u32': 4}
# Trips of the kernel's loops whose length the data decide, in order: halving among the kept logits at its bound
# (12 to 17 on random ones), and the rare ways, which come last, never. Any other loop of that kind counts as one.
DATA_TRIPS = {'find_head': (32, 0)}


def bundles(path, data_trips):
  """Instruction bundles that a compiled operation issues: those of its final program times their loops' trips."""
  rows = []  # (label, depth of loops, text)
  for line in path.read_text(errors='replace').splitlines():
    row = re.match(r'\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*((?:>\s*)*)\{(.*)', line)
    if row:
      rows.append((row.group(1), row.group(2).count('>'), row.group(3)))
  count, data_trips, rare = [1] * len(rows), list(data_trips), False
  for start, (label, depth, _) in enumerate(rows):
    if label != 'LB':
      continue
    later = range(start + 1, len(rows))
    end = next((i for i in later if rows[i][0] == 'LB' and rows[i][1] <= depth), len(rows))
    end = max(i for i in range(start, end) if rows[i][1] >= depth) + 1
    test = r'scmp\.\w+\.s32\.totalorder [^,;]*?, (\d+) /\* loop exit test'
    tests = [re.search(test, text) for _, d, text in rows[start:end] if d == depth]
    trips = next((int(found.group(1)) for found in tests if found), None)
    if trips is None:
      trips = data_trips.pop(0) if data_trips else 1
    rare |= trips == 0
    for i in range(start, end):
      count[i] *= 0 if rare else trips
  return sum(count)


def operations(hlo):
  """({computation: {name: (result, opcode, operands, line)}}, the entry's name) of a compiled program."""
  found, current, entry = {}, None, None
  for line in hlo.split('\n'):
    head = re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{$', line)
    if head:
      current = found.setdefault(head.group(2), {})
      entry = head.group(2) if head.group(1) else entry
    instruction = re.match(r'\s+(?:ROOT )?%([\w.\-]+) = (.*)', line)
    if instruction:
      opcode = re.search(r'(?:^| )([a-z][\w\-]*)\((.*)', instruction.group(2))
      operands = re.findall(r'%([\w.\-]+)', opcode.group(2).split('), ')[0])
      result = instruction.group(2)[:opcode.start()]
      current[instruction.group(1)] = result, opcode.group(1), operands, line
  return found, entry


def arrays(result):
  """(elements, bytes in HBM) of each array in a result's type; S(1) and the like are on the chip."""
  for dtype, dims, layout in re.findall(r'(\w+)\[([\d,]*)\](?:\{([^}]*)\})?', result):
    elements = math.prod(int(d) for d in dims.split(',') if d)
    yield elements, 0 if 'S(' in layout else elements * BYTES.get(dtype, 4)


def seconds(hlo, dumps, chip):
  """(least, likely) seconds of a program compiled ahead of time, every operation by itself.

  An operation takes the longest of its bundles, its matrix products at the chip's peak, and its operands and
  results once through HBM. `likely` adds the chip's interlock to the bundles of operations with a product.
  """
  computations, entry = operations(hlo)
  programs, same = {}, {}
  for path in dumps:
    name = re.sub(r'^\d+-', '', path.name)
    if name.endswith('deduplication-map.txt'):
      for block in path.read_text().split('key:')[1:]:
        key, *rest = block.split('\n')
        same |= {other.strip(): key for other in rest if other.startswith('  ')}
    elif re.search(r'-\d+-final_bundles.txt$', name):
      programs[re.sub(r'-\d+-final_bundles.txt$', '', name)] = path

  @functools.cache
  def product_flops(computation):
    total = 0
    for result, opcode, operands, line in computations[computation].values():
      if opcode in ('convolution', 'dot'):
        sizes = [next(arrays(computations[computation][o][0]))[0] for o in operands[:2]]
        out = next(arrays(result))[0]
        total += 2 * math.sqrt(sizes[0] * sizes[1] * out)  # (m k)(k n)(m n) = (m k n)^2
      called = re.search(r'calls=%?([\w.\-]+)', line)
      total += product_flops(called.group(1)) if called and opcode == 'fusion' else 0
    return total

  @functools.cache
  def issued(name):
    kind = next((k for k in DATA_TRIPS if name.startswith(k)), None)
    return bundles(programs[name], DATA_TRIPS.get(kind, ())) / chip.clock

  def total(computation):
    least = likely = 0.0
    for name, (result, opcode, operands, line) in computations[computation].items():
      if opcode == 'while':
        condition, body = re.search(r'condition=%?([\w.\-]+), body=%?([\w.\-]+)', line).groups()
        # Scans count from 0 up to the one s32 constant that their condition holds.
        limits = re.findall(r's32\[\]\S* constant\((\d+)\)', '\n'.join(o[3] for o in computations[condition].values()))
        inner = total(body)
        least, likely = (t + max(map(int, limits)) * i for t, i in zip((least, likely), inner))
      program = same.get(name, name)
      if program not in programs or 'AllocateBuffer' in line:
        continue
      called = re.search(r'calls=%?([\w.\-]+)', line)
      product = product_flops(called.group(1)) / chip.flops if called else 0.0
      touched = [result] + [computations[computation][o][0] for o in operands if o in computations[computation]]
      moved = sum(size for text in touched for _, size in arrays(text)) / chip.hbm_rate
      least += max(issued(program), product, moved)
      likely += max(issued(program) + chip.interlock * product, product, moved)
    return least, likely

  return total(entry)
