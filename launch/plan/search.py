"""Which mesh, microbatches and remat policy: compiles the likely ones, the likeliest first, and ranks what fits."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable

from ml_collections import ConfigDict

from betarank.configs import errors, load
from betarank.launch.plan import command, programs
from betarank.launch.plan.chips import PlanError, Topology
from betarank.model.config import REMAT, parameter_counts
from betarank.rl.config import RlRun

ROWS_A_CHIP = (1, 2, 4, 8)  # of a microbatch


@dataclasses.dataclass(frozen=True)
class Candidate:
  mesh: tuple[tuple[str, int], ...]
  microbatches: int
  remat_policy: str
  guess_bytes: float  # state, gradients and what the remat policy saves: a lower bound on memory

  def __str__(self):
    mesh = ' x '.join(f'{axis} {n}' for axis, n in self.mesh if n > 1) or 'one device'
    return f'{mesh}, {self.microbatches} microbatches, remat {self.remat_policy}'


def candidates(run, topology: Topology) -> list[Candidate]:
  """All settings that divide, those that need the least recomputation and the fewest transfers first."""
  rows, _ = programs.run_rows(run)
  c, chips = run.model, topology.chips
  length = run.rl.max_prompt_tokens + max(run.rl.max_new_tokens) if isinstance(run, RlRun) else run.data.sequence_length
  experts = [e for e in (1, 8, 16, 32) if c.moe.experts and c.moe.experts % e == 0] or [1]
  found = []
  for fsdp, expert, a_chip, remat in itertools.product(_powers(chips), experts, ROWS_A_CHIP, list(REMAT)[1:]):
    data, rest = divmod(chips, fsdp * expert)
    if rest or not data or data % topology.slices or c.d_model % fsdp or rows % (chips * a_chip):
      continue
    mesh = (('data', data), ('fsdp', fsdp), ('expert', expert), ('context', 1), ('tensor', 1))
    least = _least_bytes(c, fsdp, expert, a_chip * length, remat)
    found.append(Candidate(mesh, rows // (chips * a_chip), remat, least))
  order = list(REMAT)
  fits = [f for f in found if f.guess_bytes < topology.chip.hbm_bytes]
  # Little recomputation, then many rows a chip, then the widest fsdp but one: it leaves room, and gathers stay short.
  return sorted(fits, key=lambda f: (order.index(f.remat_policy), f.microbatches, f.guess_bytes))


def _powers(limit):
  return [2**i for i in range(limit.bit_length()) if limit % 2**i == 0]


def _least_bytes(c, fsdp: int, expert: int, tokens: int, remat: str) -> float:
  """State and gradients in float32 (16 bytes a parameter), and the layers' saved activations, of a chip."""
  counts = parameter_counts(c)
  state = 16 * (counts['experts'] / expert + sum(counts.values()) - counts['experts']) / fsdp
  hidden = c.moe.experts_per_token * c.moe.expert_d_ff + c.moe.shared_d_ff if c.moe.experts else c.d_ff
  widths = {'qkv': (c.heads + 2 * c.kv_heads) * c.head_dim, 'attention': c.heads * c.head_dim, 'mlp': 2 * hidden}
  saved = c.d_model + sum(widths[name] for name in REMAT[remat])
  return state + 2 * c.layers * tokens * saved


def search(config: ConfigDict, topology: Topology, devices, folder: pathlib.Path, tries: int,
           say: Callable[[str], None]) -> list[command.Plan]:
  """The plans that were made, the fastest first; prints one line for each, and the ranking."""
  run = command._run(config)
  section = 'rl' if isinstance(run, RlRun) else 'train'
  wanted = candidates(run, topology)
  if not wanted:
    raise PlanError('--search: no mesh of data, fsdp and expert holds the state and one row a chip; take more chips')
  chosen = _spread(wanted, tries)
  say(f'{len(wanted)} settings could fit; compiling {len(chosen)} of them, minutes each')
  found: list[tuple[Candidate, command.Plan]] = []
  for number, candidate in enumerate(chosen, 1):
    overrides = {f'train.mesh.{axis}': str(n) for axis, n in candidate.mesh}
    overrides |= {f'{section}.microbatches': str(candidate.microbatches), 'model.remat_policy': candidate.remat_policy}
    changed = config.copy_and_resolve_references().unlock()
    for key, value in overrides.items():
      load.override(changed, key, value)
    try:
      # Decoding depends on none of these.
      first = next(command.make_plans(command._run(changed), topology, devices, folder))
    except (errors.UserError, ValueError) as error:
      say(f'[{number}/{len(chosen)}] {candidate}: {error}')
      continue
    found.append((candidate, first))
    say(f'[{number}/{len(chosen)}] {candidate}: ' + (_line(first) if first.fits else f'does not fit, {first.problem}'))
  found.sort(key=lambda pair: pair[1].prediction.step_s[1] / pair[1].tokens if pair[1].fits else float('inf'))
  say('\nfastest first:')
  for candidate, made in found:
    if made.fits:
      say(f'  {_line(made)}   {candidate}')
  return [made for _, made in found]


def _spread(wanted: list[Candidate], tries: int) -> list[Candidate]:
  """The first of each (mesh, remat) pair in turn, so that few tries still see every policy."""
  groups: dict[str, list[Candidate]] = {}
  for candidate in wanted:
    groups.setdefault(candidate.remat_policy, []).append(candidate)
  turns = itertools.chain.from_iterable(itertools.zip_longest(*groups.values()))
  return [candidate for candidate in turns if candidate][:tries]


def _line(made: command.Plan) -> str:
  low, high = made.prediction.step_s
  return (f'{low * 1e3:,.0f} to {high * 1e3:,.0f} ms, MFU {made.mfu[0]:.0%} to {made.mfu[1]:.0%}, '
          f'{made.peak_bytes / 1e9:.1f} of {made.hbm_bytes / 1e9:.1f} GB')
