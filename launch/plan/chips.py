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
    clock: cycles per second. In each cycle, a core issues at most one bundle. The clock is computed as `flops` divided
      by the matrix unit's FLOPs per cycle. The value is certain for v5e and v6e, and fairly certain for v5p.
    hbm_bytes: the memory that libtpu lets a program use.
    hbm_rate: bytes per second between the chip and this memory, reads and writes together.
    link_rate: bytes per second of one link of the torus, in one direction.
    interlock: the waits inside matrix products that bundles don't show, as a share of the products' time. It was
      determined from single products compiled for each chip.
    cores_in_name: the number of cores per chip in a pod's name: 2 on v5p, where v5p-128 has 64 chips; otherwise 1.
  """

  name: str
  flops: float
  clock: float
  hbm_bytes: float
  hbm_rate: float
  link_rate: float
  interlock: float
  cores_in_name: int = 1


CHIPS = {chip.name: chip for chip in (
  Chip('v5e', 197e12, 1.503e9, 15.75 * 2**30, 819e9, 45e9, 0.26),
  Chip('v5p', 459e12, 1.751e9, 95.7 * 2**30, 2765e9, 90e9, 0.26, cores_in_name=2),
  Chip('v6e', 918e12, 1.751e9, 31.25 * 2**30, 1640e9, 90e9, 0.03),
)}
SHAPES = {  # number of chips -> shape of the torus
  'v5e': {4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'},
  'v5p': {4: '2x2x1', 8: '2x2x2', 16: '2x2x4', 32: '2x4x4', 64: '4x4x4', 128: '4x4x8', 256: '4x8x8', 512: '8x8x8',
          1024: '8x8x16', 2048: '8x16x16', 4096: '16x16x16'},
}
SHAPES['v6e'] = SHAPES['v5e']


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
    names = [f'{chip.name}-{n * chip.cores_in_name}' for chip in CHIPS.values() for n in SHAPES[chip.name]]
    if kind not in CHIPS:
      raise PlanError(f'--topology={self.name}: no such chip; there are {", ".join(CHIPS)}, as in v5e-256')
    if self.name not in names:
      sizes = ', '.join(n for n in names if n.startswith(kind))
      raise PlanError(f'--topology={self.name}: no such pod; {kind} comes as {sizes}{suggestion(self.name, names)}')
    if self.slices < 1:
      raise PlanError(f'--slices={self.slices}: must be 1 or more')

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

  def links(self, group: int) -> int:
    """Returns the number of links of a chip that a transfer among `group` chips can use, estimated from the group's
    size.

    A chip has two usable links along each axis of the torus that the group fills, and one along an axis that the group
    fills only in part, because then the ends of the axis aren't connected within the group.
    """
    dims = [d for d in self.dims if d > 1]
    sizes = [(math.prod(axes), len(axes)) for count in range(len(dims) + 1)
             for axes in itertools.combinations(dims, count)]
    filled, axes = max((size, count) for size, count in sizes if group % size == 0)
    return 2 * axes + (filled < group and axes < len(dims))
