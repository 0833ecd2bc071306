"""Describes TPU chips and pods: the speed and memory of a chip, and the shapes of the pods."""

import dataclasses
import itertools
import math

from betarank.configs.errors import UserError, suggestion


class PlanError(UserError):
  """Raised if a plan asks for something that isn't possible. The message says what is possible."""


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip, which is one JAX device. The two cores of a v5p chip are one device.

  Attributes:
    flops: the peak bfloat16 FLOPs per second, the denominator of MFU.
    clock: cycles per second. In each cycle, a core issues at most one bundle (a very long instruction word). The clock
      is computed as `flops` divided by the FLOPs per cycle of all matrix units. The value is certain for v5e and v6e,
      and fairly certain for v5p.
    hbm_bytes: the memory that libtpu lets a program use.
    hbm_rate: bytes per second between the chip and this memory, reads and writes together.
    matrix_rate: rows per second that one matrix unit multiplies by the weights it holds. It is computed as `flops`
      divided by the number of units (v5e: 4, v5p: 8, v6e: 2) and by the FLOPs per row (2 x 128 x 128 on v5e and v5p,
      2 x 256 x 256 on v6e).
    link_rate: bytes per second of one link of the torus, in one direction.
    interlock: the time for which the core waits in a matrix product, although its bundles don't show this, divided by
      the product's time at `flops`. It was determined from single products compiled for each chip.
    cores_in_name: what a chip adds to the number in a pod's name. It is 2 on v5p, so v5p-128 has 64 chips; otherwise 1.
  """

  name: str
  flops: float
  clock: float
  hbm_bytes: float
  hbm_rate: float
  matrix_rate: float
  link_rate: float
  interlock: float
  cores_in_name: int = 1


CHIPS = {chip.name: chip for chip in (
  Chip('v5e', 197e12, 1.503e9, 15.75 * 2**30, 819e9, 1.503e9, 45e9, 0.26),
  Chip('v5p', 459e12, 1.751e9, 95.7 * 2**30, 2765e9, 1.751e9, 90e9, 0.26, cores_in_name=2),
  Chip('v6e', 918e12, 1.751e9, 31.25 * 2**30, 1640e9, 3.502e9, 90e9, 0.03),
)}


def _v5p_shapes() -> dict[int, str]:
  """Returns {number of chips: shape of the torus} for slices of v5p.

  A slice is a part of one cube of 4x4x4 chips, or consists of 1 to 96 whole cubes. Whole cubes are arranged as
  compactly as their number allows: 8 cubes as 2x2x2 cubes, not as 1x2x4. Numbers of cubes that would need an axis of
  more than 256 chips are left out.
  """
  shapes = {4: '2x2x1', 8: '2x2x2', 16: '2x2x4', 32: '2x4x4'}
  for cubes in range(1, 97):
    ways = [(a, b, cubes // (a * b)) for a in range(1, cubes + 1) if cubes % a == 0
            for b in range(a, cubes // a + 1) if cubes // a % b == 0 and b <= cubes // (a * b)]
    nearest = min(ways, key=sum)
    if nearest[-1] <= 64:
      shapes[64 * cubes] = 'x'.join(str(4 * d) for d in nearest)
  return shapes


SHAPES = {  # number of chips -> shape of the torus
  'v5e': {1: '1x1', 4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'},
  'v5p': _v5p_shapes(),
}
SHAPES['v6e'] = SHAPES['v5e']
MOST_SLICES = 999  # for each chip of all slices a device is made
LISTED = 1024  # an error message lists the pods up to this number of chips, and the largest one


@dataclasses.dataclass(frozen=True)
class Topology:
  """One or more pods (slices) of the same shape.

  Raises:
    PlanError: there is no such pod.
  """

  name: str  # the name of one slice: v5e-256, v5p-128, v6e-64
  slices: int = 1

  def __post_init__(self):
    kind = self.name.partition('-')[0]
    if kind not in CHIPS:
      raise PlanError(f'--topology={self.name}: no such chip; there are {", ".join(CHIPS)}, as in v5e-256')
    names = {n: f'{kind}-{n * CHIPS[kind].cores_in_name}' for n in SHAPES[kind]}
    if self.name not in names.values():
      listed = [name for n, name in names.items() if n <= LISTED]
      more = f', and more up to {names[max(names)]}' if max(names) > LISTED else ''
      raise PlanError(f'--topology={self.name}: no such pod; {kind} comes as {", ".join(listed)}{more}'
                      f'{suggestion(self.name, [*names.values()])}')
    if not 1 <= self.slices <= MOST_SLICES:
      raise PlanError(f'--slices={self.slices}: must be from 1 to {MOST_SLICES}')

  @property
  def chip(self) -> Chip:
    return CHIPS[self.name.partition('-')[0]]

  @property
  def shape(self) -> str:
    return SHAPES[self.chip.name][int(self.name.partition('-')[2]) // self.chip.cores_in_name]

  @property
  def dims(self) -> tuple[int, ...]:
    return tuple(int(d) for d in self.shape.split('x'))

  @property
  def chips(self) -> int:
    """The number of chips in all slices."""
    return self.slices * math.prod(self.dims)

  def devices(self) -> list:
    """Returns JAX devices of this topology, for which programs can be compiled without a TPU.

    Raises:
      PlanError: libtpu is missing, or it can't describe this topology.
    """
    from jax.experimental import topologies
    try:
      more = {'num_slices': self.slices} if self.slices > 1 else {}
      return topologies.get_topology_desc(
        platform='tpu', topology_name=f'{self.chip.name}:{self.shape}', **more).devices
    except Exception as error:  # its type depends on the version of jaxlib
      first = str(error).splitlines()[0]
      raise PlanError(f'--topology={self.name}: libtpu is needed to compile for it, pip install -e ".[tpu]" ({first})'
                      ) from None

  @property
  def wraps(self) -> tuple[bool, ...]:
    """For each axis of `dims`, whether it is a ring, which means that its two ends are connected.

    On v5e and v6e, an axis of 16 chips is a ring, and a shorter axis isn't. On v5p, all axes are rings if the slice is
    made of whole cubes of 4x4x4 chips; otherwise none is.
    """
    if self.chip.name == 'v5p':
      return (all(d % 4 == 0 for d in self.dims),) * len(self.dims)
    return tuple(d == 16 for d in self.dims)

  def links(self, group: int) -> int:
    """Returns the number of links of a chip that a transfer among `group` chips can use.

    The number is estimated from the size of the group. Along an axis that the group fills, a chip has two usable links
    if the axis is a ring. If the axis is a line, only one link counts, because the chips at its ends have only one.
    Along an axis that the group fills only in part, one link counts too.
    """
    axes = [(d, 1 + wraps) for d, wraps in zip(self.dims, self.wraps) if d > 1]
    ways = [(math.prod(d for d, _ in chosen), sum(links for _, links in chosen), len(chosen))
            for count in range(len(axes) + 1) for chosen in itertools.combinations(axes, count)]
    filled, links, count = max(way for way in ways if group % way[0] == 0)
    return links + (filled < group and count < len(axes))


def topology(name: str, slices: int = 1) -> Topology:
  """Returns the Topology with this name, such as 'v5e-256'. Google's name 'v5litepod-256' is accepted too."""
  return Topology(name.replace('v5litepod-', 'v5e-'), slices)
