"""Packs the samples of an update into rows, one after the other, as documents are packed in pre-training.

An update is computed in microbatches. A microbatch has one of four shapes. Each shape has half the positions of the
shape before it. So at most four programs are compiled, whatever the lengths of the samples, and little of an update is
padding.

All results are pure functions of their arguments, so all processes pack the same rows.

# R rows of a microbatch  T tokens of a row  L layers  k experts per token
"""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from betarank.data import Batch
from betarank.runtime import multihost
from betarank.train.sampler import Sample

TOKENS = 4096  # of a microbatch on a device, by default. With much fewer, a device would mostly add up gradients.
SAMPLES_PER_ROW = 4  # of the greatest length, in rows of at most TOKENS. Longer rows would cost time in attention.
HALVINGS = 3  # of the first shape
KERNEL_TOKENS = 128  # attention kernels need rows of a multiple of so many tokens


class Answer(NamedTuple):
  """A sample to learn from. It takes len(prompt) + len(sample.tokens) - 1 positions, one per (input, target) pair.

  Attributes:
    prompt: the tokens of the prompt, BOS first.
    sample: the answer.
    advantage: the advantage, which is the same for all tokens of the answer.
  """

  prompt: list[int]
  sample: Sample
  advantage: float

  @property
  def length(self) -> int:
    return len(self.prompt) + len(self.sample.tokens) - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Microbatch:
  """A part of an update, on the devices or on the host: R rows of T positions. Names of fields call the rows B.

  sampler_logp_BT, advantages_BT and numbers_BT are 0 except at tokens that were sampled.

  Attributes:
    batch: the tokens. Segments number the samples of a row. Only sampled tokens count in the loss.
    sampler_logp_BT: float32 [R, T], the log-probability that the sampler computed for each token, in nats.
    advantages_BT: float32 [R, T], the advantage of each token's sample.
    numbers_BT: int32 [R, T], a number for each sampled token: its index, from 0, among all sampled tokens of the
      update. The number doesn't depend on how the samples are packed.
    choices_BTLk: int16 [R, T, L, k], the experts that the sampler used for each token. None for a dense model.
  """

  batch: Batch
  sampler_logp_BT: Any
  advantages_BT: Any
  numbers_BT: Any
  choices_BTLk: Any = None


def shapes(longest: int, tokens: int, ways: int, context: int = 1) -> list[tuple[int, int]]:
  """Returns the shapes (R, T) of microbatches, the largest first.

  In the first shape, a row has room for the longest sample. In later shapes, rows may be shorter.

  Args:
    longest: the greatest length of a sample, in positions.
    tokens: the approximate number of positions per device in the first shape; 0 means TOKENS. The exact number differs,
      because a row has room for the longest sample and the number of rows is a power of two.
    ways: the number of devices over which rows are distributed. R is a multiple of this number.
    context: the number of devices that share the positions of a row. T is a multiple of this number.
  """
  tokens = max(tokens or TOKENS, longest)
  length = longest * min(SAMPLES_PER_ROW, max(min(tokens, TOKENS) // longest, 1))
  rows = 1 << (tokens // length).bit_length() - 1
  # A single row is halved in length.
  unit = KERNEL_TOKENS << max(HALVINGS + 1 - rows.bit_length(), 0)
  if length >= unit:
    length += -length % unit
  found = [(rows, length)]
  for _ in range(HALVINGS):
    rows, length = found[-1]
    found.append((rows // 2, length) if rows > 1 else (1, -(-length // 2)))
  return [(rows * ways, length + -length % context) for rows, length in found]


def arrange(lengths: Sequence[int], of: Sequence[tuple[int, int]]) -> list[tuple[int, list[list[int]]]]:
  """Assigns samples to the rows of microbatches: best fit, the longest sample first. Samples are never cut.

  The function first finds how many microbatches of the first shape are needed to hold all samples. It then tries to
  replace the last of them by smaller microbatches, and takes the replacement with the fewest positions.

  Args:
    lengths: the length of each sample. There must be at least one.
    of: the shapes that microbatches may have, from `shapes`, the largest first.

  Returns the microbatches, as tuples (row length, for each row the indices of its samples).
  """
  whole = 2 ** (len(of) - 1)  # so many of the smallest microbatches have the positions of the first shape
  rows = max(_best_fit(lengths, [of[0][1]] * len(lengths))) + 1
  most = -(-rows // of[0][0]) * whole
  for parts in range(most - whole + 1, most + 1):
    halves = [shape for i, shape in enumerate(of[1:], 1) if parts & whole >> i]
    chosen = [of[0]] * (parts // whole) + halves
    row_of = _best_fit(lengths, [length for rows, length in chosen for _ in range(rows)])
    if row_of is not None:
      break
  members: list[list[int]] = [[] for _ in range(sum(rows for rows, _ in chosen))]
  for sample, row in enumerate(row_of):
    members[row].append(sample)
  found, first = [], 0
  for rows, length in chosen:
    found.append((length, members[first : first + rows]))
    first += rows
  return found


def _best_fit(lengths: Sequence[int], rows: Sequence[int]) -> list[int] | None:
  """Returns the index of each sample's row, or None if best fit finds no place for some sample.

  If several rows have the same free space, the first of them is filled.

  lengths: the length of each sample.
  rows: the length of each row.
  """
  holes = sorted((length, row) for row, length in enumerate(rows))
  found = [0] * len(lengths)
  for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
    at = bisect.bisect_left(holes, (lengths[sample], 0))
    if at == len(holes):
      return None
    hole, found[sample] = holes.pop(at)
    bisect.insort(holes, (hole - lengths[sample], found[sample]))
  return found


def microbatches(
  answers: Sequence[Answer], of: Sequence[tuple[int, int]], sharding: NamedSharding
) -> list[Microbatch]:
  """Packs the samples of an update into microbatches, and puts these on the devices.

  Each process fills only its own devices' rows.

  Args:
    answers: the samples. There must be at least one.
    of: the shapes that microbatches may have, from `shapes`.
    sharding: the sharding of a microbatch's arrays [R, T].
  """
  first = np.cumsum([0, *(len(answer.sample.tokens) for answer in answers)])
  found = []
  for length, members in arrange([answer.length for answer in answers], of):
    mine = multihost.rows_of_process(sharding, len(members), length)
    recorded = answers[0].sample.choices
    local = fill([[(answers[i], int(first[i])) for i in row] for row in members[mine]], length,
                 None if recorded is None else recorded.shape[1:])
    found.append(multihost.rows_to_global(local, sharding, mine.start, len(members)))
  return found


def fill(
  rows: Sequence[Sequence[tuple[Answer, int]]], length: int, recorded: tuple[int, int] | None = None
) -> Microbatch:
  """Writes samples into rows of `length` positions, on the host.

  Args:
    rows: for each row, a list of (sample, number). In Microbatch.numbers_BT, the sampled tokens of this sample are
      numbered consecutively, beginning with `number`.
    length: T, the number of positions of a row.
    recorded: (L, k) if the samples hold the experts that were chosen for their tokens, else None.
  """
  shape = (len(rows), length)
  tokens, targets, positions, segments, numbers = (np.zeros(shape, np.int32) for _ in range(5))
  logp, advantages, sampled = np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape, bool)
  choices = None if recorded is None else np.zeros((*shape, *recorded), np.int16)
  for r, row in enumerate(rows):
    start = 0
    for segment, (answer, number) in enumerate(row, 1):
      stop = start + answer.length
      place, new = np.s_[r, start:stop], np.s_[r, start + len(answer.prompt) - 1 : stop]
      whole = np.concatenate([answer.prompt, answer.sample.tokens])
      tokens[place], targets[place] = whole[:-1], whole[1:]
      positions[place], segments[place] = np.arange(answer.length), segment
      sampled[new], logp[new], advantages[new] = True, answer.sample.logp, answer.advantage
      numbers[new] = number + np.arange(len(answer.sample.tokens))
      if choices is not None:
        choices[place] = answer.sample.choices
      start = stop
  return Microbatch(Batch(tokens, targets, positions, segments, sampled), logp, advantages, numbers, choices)
