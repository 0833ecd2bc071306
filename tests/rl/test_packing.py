"""Tests how samples are packed: each whole in one row, in few shapes, with little padding, and always in the same way.
"""

import itertools

import numpy as np
import pytest

from betarank.rl import entropy, packing
from betarank.rl.packing import arrange, shapes

LONGEST = 1024 + 16_384  # of the paper's second phase


def answers(seed, sigma=0.7):
  """Returns the lengths of 2048 samples: prompts of 1024 tokens, and answers of up to 16,384 tokens.

  The lengths of answers are log-normal, with a mean of about 4096.
  """
  new = np.exp(np.random.default_rng(seed).normal(np.log(4096) - sigma**2 / 2, sigma, 2048)).clip(1, 16_384)
  return (1023 + new.astype(int)).tolist()


def positions(found):
  return sum(length * len(rows) for length, rows in found)


@pytest.mark.parametrize('longest, tokens, ways, first', [
  (LONGEST, 0, 256, (256, 17_408)),  # one row per device, however long
  (LONGEST, 40_000, 1, (2, 17_408)),
  (56, 0, 2, (32, 256)),  # short samples: four to a row, and 4096 tokens per device
  (2048, 0, 1, (1, 4096)),
  (57, 10, 1, (1, 57)),
])
def test_shapes_halve_and_have_room_for_the_longest_sample(longest, tokens, ways, first):
  found = shapes(longest, tokens, ways)
  assert found[0] == first and first[1] >= longest
  for (rows, length), (fewer, shorter) in itertools.pairwise(found):
    assert fewer % ways == 0 and 0 <= 2 * fewer * shorter - rows * length <= rows
    assert length < 1024 or shorter % 128 == 0  # the attention kernels need it


@pytest.mark.parametrize('longest, tokens, context', [(57, 10, 2), (96, 0, 4), (33, 33, 3), (LONGEST, 0, 4)])
def test_a_mesh_that_splits_rows_divides_their_length(longest, tokens, context):
  of = shapes(longest, tokens, 2, context)
  assert all(length % context == 0 for _, length in of)
  alone = shapes(longest, tokens, 2)
  assert [(rows, length + -length % context) for rows, length in alone] == of
  lengths = np.random.default_rng(0).integers(1, longest + 1, 100).tolist()
  found = arrange(lengths, of)
  assert sorted(i for _, rows in found for row in rows for i in row) == list(range(100))
  assert all(sum(lengths[i] for i in row) <= length for length, rows in found for row in rows)


@pytest.mark.parametrize('ways', [1, 8, 256])
def test_every_sample_is_in_one_row_and_at_most_a_tenth_is_padding(ways):
  for seed, sigma in ((0, 0.7), (1, 1.0)):
    lengths, of = answers(seed, sigma), shapes(LONGEST, 0, ways)
    found = arrange(lengths, of)
    assert sorted(i for _, rows in found for row in rows for i in row) == list(range(2048))
    assert all(sum(lengths[i] for i in row) <= length for length, rows in found for row in rows)
    assert {(len(rows), length) for length, rows in found} <= set(of)
    assert 1 - sum(lengths) / positions(found) < 0.1 and 1 - sum(lengths) / (2048 * LONGEST) > 0.7
    assert arrange(lengths, of) == found


@pytest.mark.parametrize('lengths, want', [
  ([17_408] * 9, [(17_408, 8), (17_408, 8)]),
  ([1], [(2176, 8)]),
  ([17_408] + [100] * 100, [(17_408, 8)]),
])
def test_the_ends(lengths, want):
  assert [(length, len(rows)) for length, rows in arrange(lengths, shapes(LONGEST, 0, 8))] == want


def test_each_process_fills_the_rows_of_its_own_devices(monkeypatch):
  """Acts as the second of two processes with four devices each, and checks that it fills only rows 4 to 7."""
  filled = []
  sharding = type('Sharding', (), {'addressable_devices_indices_map': lambda _, shape: {
    device: (slice(4 + device, 5 + device), slice(None)) for device in range(4)}})()
  monkeypatch.setattr(packing, 'fill', lambda rows, length, recorded: filled.append(rows))
  monkeypatch.setattr(packing.multihost, 'rows_to_global', lambda local, sharding, first, rows: (first, rows))
  sample = packing.Sample(0, 0, np.zeros(5, np.int32), np.zeros(5, np.float32), 'eos')
  all_of = [packing.Answer([1, 2], sample, float(i)) for i in range(8)]
  assert packing.microbatches(all_of, [(8, 6)], sharding) == [(4, 8)]
  assert [[(answer.advantage, number) for answer, number in row] for row in filled[0]] == [
    [(float(i), 5 * i)] for i in range(4, 8)]


def test_the_highest_entropies_from_a_histogram():
  rng = np.random.default_rng(0)
  entropies, mask = rng.gamma(0.5, 1.0, (8, 500)).clip(0, np.log(100)), rng.random((8, 500)) < 0.7
  count = np.asarray(entropy.histogram(entropies, mask, 100))
  assert count.sum() == mask.sum()
  for share in (1e-9, 0.2, 1.0):
    highest = np.sort(entropies[mask])[-max(1, round(share * mask.sum())):]
    assert entropy.mean_of_highest(count, share, 100) == pytest.approx(highest.mean(), abs=np.log(100) / 2**14)
