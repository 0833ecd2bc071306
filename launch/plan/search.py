"""Searches for fast settings that fit into memory, by compiling candidates.

`search` varies the mesh, the number of microbatches and the remat policy. `search_decoding` varies the number of chips
that share one copy of the sampler's weights in RL.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from betarank import model
from betarank.configs import errors, load
from betarank.launch.plan.chips import PlanError, Topology
from betarank.launch.plan.plans import Plan, make_plans
from betarank.launch.plan.report import summary
from betarank.launch.plan.workload import Workload, workload
from betarank.model.config import REMAT, ModelConfig
from betarank.model.sharding import MESH_AXES
from betarank.runtime.state import abstract_state
from betarank.train.optimizer import make_optimizer

ROWS_PER_CHIP = (1, 2, 4, 8)  # the numbers of rows per chip of a microbatch that are tried
EXPERT_AXES = (1, 2, 4, 8, 16, 32)  # the numbers of chips that split the experts that are tried


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A mesh, a number of microbatches and a remat policy to try. The mesh divides the model and the batch evenly."""

  mesh: tuple[tuple[str, int], ...]
  microbatches: int
  rows_per_chip: int  # sequences of the greatest length for which a microbatch has room
  remat_policy: str
  least_bytes: float  # a lower bound on the memory per chip; see `_least_bytes`

  def __str__(self):
    mesh = ' x '.join(f'{axis} {n}' for axis, n in self.mesh if n > 1) or 'one device'
    return f'{mesh}, {self.microbatches} microbatches, remat {self.remat_policy}'


def candidates(work: Workload, topology: Topology) -> list[Candidate]:
  """Returns the candidates that may fit, which means that a lower bound on their memory is below the memory of a chip.

  They include the sizes of `fsdp` and `expert` that the config has.

  Candidates that are likely to be fast come first. They are sorted by the amount of recomputation, then by the number
  of microbatches, then by memory, with the smallest first.
  """
  c, chips, own = work.run.model, topology.chips, work.run.mesh
  widths = sorted({*_powers_of_2(chips), max(own.fsdp, 1)})  # -1 stands for all chips that remain, a power of 2
  experts = sorted({*EXPERT_AXES, max(own.expert, 1)}) if c.moe.experts else [1]
  state, found = _state_bytes(work), []
  for fsdp, expert, per_chip, remat in itertools.product(widths, experts, ROWS_PER_CHIP, list(REMAT)[1:]):
    data, rest = divmod(chips, fsdp * expert)
    if (rest or not data or data % topology.slices or c.d_model % fsdp or c.moe.experts % expert
        or work.rows % (chips * per_chip)):
      continue
    mesh = (('data', data), ('fsdp', fsdp), ('expert', expert), ('context', 1), ('tensor', 1))
    least = _least_bytes(c, state, dict(mesh), per_chip * work.length, remat)
    found.append(Candidate(mesh, work.rows // (chips * per_chip), per_chip, remat, least))
  order = list(REMAT)
  fits = [f for f in found if f.least_bytes < topology.chip.hbm_bytes]
  return sorted(fits, key=lambda f: (order.index(f.remat_policy), f.microbatches, f.least_bytes))


def _powers_of_2(limit: int) -> list[int]:
  """Returns the powers of 2 that divide `limit`."""
  return [2**i for i in range(limit.bit_length()) if limit % 2**i == 0]


def _state_bytes(work: Workload) -> dict[tuple[str, ...], int]:
  """Returns {mesh axes: bytes of all arrays that these axes split}.

  The arrays are those of the train state, the gradients and, if there is one, the KL reference.
  """
  c, run = work.run.model, work.run
  tx = make_optimizer(run.optimizer, run.updates, model.abstract(c)[2])
  state = abstract_state(c, tx, AbstractMesh((1,) * len(MESH_AXES), MESH_AXES))
  copies = 3 if work.keeps_reference else 2  # gradients have the shapes and the dtype of the parameters
  found: dict[tuple[str, ...], int] = {}
  for leaf in jax.tree.leaves([state.opt_state, *[state.params] * copies]):
    dims = ((dim,) if isinstance(dim, str) else dim or () for dim in leaf.sharding.spec)
    axes = tuple(itertools.chain.from_iterable(dims))
    found[axes] = found.get(axes, 0) + leaf.size * leaf.dtype.itemsize
  return found


def _least_bytes(
  c: ModelConfig, state: Mapping[tuple[str, ...], int], mesh: Mapping[str, int], tokens: int, remat: str
) -> float:
  """Returns a lower bound on the bytes per chip.

  It counts parameters, optimizer state, gradients and the KL reference of RL, and the activations that are saved for
  the backward pass.

  state: the result of `_state_bytes`.
  mesh: the sizes of the mesh axes.
  tokens: the number of tokens of a microbatch per chip.
  remat: the remat policy.
  """
  kept = sum(size / math.prod(mesh[axis] for axis in axes) for axes, size in state.items())
  hidden = c.moe.experts_per_token * c.moe.expert_d_ff + c.moe.shared_d_ff if c.moe.experts else c.d_ff
  widths = {'qkv': (c.heads + 2 * c.kv_heads) * c.head_dim, 'attention': c.heads * c.head_dim, 'mlp': 2 * hidden}
  saved = c.d_model + sum(widths[name] for name in REMAT[remat])
  return kept + 2 * c.layers * tokens * saved


def search(config: ConfigDict, topology: Topology, devices: Sequence[Any], folder: pathlib.Path, tries: int,
           say: Callable[[str], None]) -> list[Plan]:
  """Compiles the config with up to `tries` candidates. Prints a line for each candidate, and a ranking.

  A candidate is a mesh, a number of microbatches and a remat policy.

  Args:
    devices: the devices of the topology.
    folder: where libtpu writes bundles, from which times are predicted. All files in it are deleted.
    tries: the largest number of candidates to compile.
    say: prints a line.

  Returns the plans of the candidates that could be compiled, fastest first. Plans that don't fit into memory come last.
  In RL, these are plans of the gradient program, and the plans of `search_decoding` for the fastest candidate follow.

  Raises:
    PlanError: no candidate could fit, or the rows of an update can't be divided evenly among the chips.
  """
  work = workload(config)
  if work.rows % topology.chips:
    below = work.rows // topology.chips * topology.chips
    near = ' or '.join(str(n) for n in (below, below + topology.chips) if n)
    what = ('samples of an update (rl.prompts_per_step * rl.group_size / rl.minibatches)' if work.rl else
            'rows of an update (train.batch_size)')
    raise PlanError(f'--search: the {work.rows} {what} can\'t be divided evenly among {topology.chips} chips; {near} '
                    'would do')
  possible = candidates(work, topology)
  if not possible:
    raise PlanError('--search: no mesh of data, fsdp and expert holds the state and one row per chip; take more chips')
  chosen = _spread(possible, tries)
  say(f'{len(possible)} settings could fit; compiling {len(chosen)} of them, minutes each')
  found: list[tuple[Candidate, Plan]] = []
  for number, candidate in enumerate(chosen, 1):
    changed = _override(config, _overrides(work, topology, candidate))
    try:
      first = next(make_plans(workload(changed), topology, devices, folder))
    except (errors.UserError, ValueError) as error:
      say(f'[{number}/{len(chosen)}] {candidate}: {error}')
      continue
    found.append((candidate, first))
    say(f'[{number}/{len(chosen)}] {candidate}: '
        + (summary(first) if first.fits else f'does not fit, {first.problem}'))
  found.sort(key=lambda pair: pair[1].prediction.step_s[1] / pair[1].tokens if pair[1].fits else float('inf'))
  say('\nfastest first:')
  for candidate, plan in found:
    if plan.fits:
      say(f'  {summary(plan)}   {candidate}')
  plans = [plan for _, plan in found]
  if work.rl and plans and plans[0].fits:
    config = _override(config, _overrides(work, topology, found[0][0]))
    plans += search_decoding(config, topology, devices, folder, say)
  return plans


def _overrides(work: Workload, topology: Topology, candidate: Candidate) -> dict[str, str]:
  return {f'train.mesh.{axis}': str(n) for axis, n in candidate.mesh} | {
    'model.remat_policy': candidate.remat_policy, **work.microbatch_override(candidate.rows_per_chip, topology.chips)}


def _override(config: ConfigDict, overrides: dict[str, str]) -> ConfigDict:
  changed = config.copy_and_resolve_references().unlock()
  for key, value in overrides.items():
    load.override(changed, key, value)
  return changed


def search_decoding(config: ConfigDict, topology: Topology, devices: Sequence[Any], folder: pathlib.Path,
                    say: Callable[[str], None]) -> list[Plan]:
  """Compiles RL's decode program for each possible number of chips that share one copy of the sampler's weights.

  Prints a line for each number, the fastest first. Training uses the mesh of the config.

  devices, folder, say: as for `search`.

  Returns the plans of the decode program, fastest first. Plans that don't fit into memory come last.
  """
  say('\ndecoding, by the number of chips that share the weights:')
  found: list[tuple[int, Plan]] = []
  for split in _powers_of_2(topology.chips):
    changed = _override(config, {'rl.decode_split': str(split)})
    try:
      found += [(split, plan) for plan in make_plans(workload(changed), topology, devices, folder, only='decode')]
    except PlanError:  # the model can't be split so
      continue
  found.sort(key=lambda pair: pair[1].prediction.step_s[1] if pair[1].fits else float('inf'))
  for split, plan in found:
    rate = f'{plan.tokens / plan.prediction.step_s[1]:,.0f} tokens/s' if plan.fits else f'does not fit, {plan.problem}'
    say(f'  rl.decode_split={split}: {rate}')
  return [plan for _, plan in found]


def _spread(ordered: list[Candidate], tries: int) -> list[Candidate]:
  """Returns the first candidate of each remat policy, then the second of each, and so on, up to `tries` candidates.

  In this order, even a few tries cover every policy.
  """
  groups: dict[str, list[Candidate]] = {}
  for candidate in ordered:
    groups.setdefault(candidate.remat_policy, []).append(candidate)
  turns = itertools.chain.from_iterable(itertools.zip_longest(*groups.values()))
  return [candidate for candidate in turns if candidate][:tries]
