import collections
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from betarank.data import packing
from betarank.data.packing import Packer, permute


@given(st.integers(1, 3000), st.text(max_size=5))
@settings(max_examples=50, deadline=None)
def test_permute_is_a_bijection(size, key):
  assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def permuted(index, size, key):
  """Returns the position of `index` after the shuffle, computed by its definition with Python's integers.

  Resumed runs depend on every bit of this order, so it must never change.
  """
  bits = max(3, (size - 1).bit_length())
  digest = hashlib.shake_128(key.encode()).digest(96)
  keys = [int.from_bytes(digest[i:i + 8], 'little') for i in range(0, 96, 8)]
  while True:
    for add, multiply in zip(keys[::2], keys[1::2]):
      index = (index + add) * (multiply | 1) % 2**bits
      index ^= index >> (bits + 1) // 2
    if index < size:
      return index


@pytest.mark.parametrize('size', [2, 3, 9, 1000, 65_536, 500_000_000, 2**32, 2**32 + 1, 5 * 10**9, 2**40 + 3])
def test_the_order_never_changes(size):
  index = np.random.default_rng(size).integers(0, size, 50)
  assert permute(index, size, 'seed/a/0').tolist() == [permuted(int(i), size, 'seed/a/0') for i in index]


def test_permute_shuffles():
  n = 20_000
  x = permute(np.arange(n), n, 'a')
  assert abs(np.corrcoef(np.arange(n), x)[0, 1]) < 0.05
  assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 0.05
  assert (permute(np.arange(n), n, 'b') == x).mean() < 0.01


def pairs_of(packer, rows):
  """Counts (document, pair) over rows, and checks that no row is too full."""
  seen = collections.Counter()
  for row in rows:
    pieces = packer.row(row)
    assert 0 < pieces.length.sum() <= packer._T and (pieces.length > 0).all()
    for document, start, length in zip(*(field.tolist() for field in pieces)):
      seen.update((document, start + i) for i in range(length))
  return seen


def every_pair(lengths):
  return collections.Counter((d, i) for d, n in enumerate(lengths) for i in range(n - 1))


@given(lengths=st.lists(st.integers(2, 70), min_size=1, max_size=60), row_length=st.integers(1, 40),
       shuffle=st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_pair_once_an_epoch_and_rows_are_full(lengths, row_length, shuffle):
  packer = Packer(np.array(lengths), row_length, 'key', shuffle=shuffle)
  every = every_pair(lengths)
  for epoch in range(2):
    rows = range(epoch * packer.rows_per_epoch, (epoch + 1) * packer.rows_per_epoch)
    assert pairs_of(packer, rows) == every
  assert packer.efficiency == sum(every.values()) / (packer.rows_per_epoch * row_length)


def test_many_windows_and_chunks(monkeypatch):
  monkeypatch.setattr(packing, '_CHUNK', 16)
  monkeypatch.setattr(packing, '_WINDOW_PAIRS', 1)
  monkeypatch.setattr(packing, '_FEWEST_ROWS', 3)
  lengths = np.random.default_rng(0).integers(2, 90, 500)
  packer = Packer(lengths, 20, 'key')
  rows = range(packer.rows_per_epoch, 2 * packer.rows_per_epoch)
  assert pairs_of(packer, rows) == every_pair(lengths)


def test_rows_are_a_pure_function_of_the_index():
  lengths = np.random.default_rng(0).integers(2, 90, 500)
  forward, backward = Packer(lengths, 20, 'key'), Packer(lengths, 20, 'key')
  rows = list(range(0, 3 * forward.rows_per_epoch, 7))
  expected = [forward.row(r) for r in rows]
  for row, pieces in zip(reversed(rows), reversed(expected)):
    for a, b in zip(backward.row(row), pieces):
      np.testing.assert_array_equal(a, b)


def test_documents_stay_whole_where_they_can():
  lengths = np.random.default_rng(0).integers(2, 33, 5000)
  assert Packer(lengths, 128, 'key').cut_share() < 0.05


def test_epochs_differ():
  packer = Packer(np.full(1000, 11), 10, 'key')
  first = [packer.row(r).document[0] for r in range(1000)]
  second = [packer.row(1000 + r).document[0] for r in range(1000)]
  assert sorted(first) == sorted(second) and np.mean(np.array(first) == second) < 0.02


@pytest.mark.parametrize('far', [10**12])
def test_far_rows_cost_nothing_more(far):
  assert Packer(np.full(10, 5), 8, 'key').row(far).length.sum() <= 8


def test_an_epoch_begins_without_adding_up_the_others(monkeypatch):
  """Training never stops to add up the lengths of a whole epoch, neither at the first epoch nor at the second."""
  monkeypatch.setattr(packing, '_WINDOW_PAIRS', 1)
  lengths = np.random.default_rng(0).integers(2, 90, 1_000_000)
  packer, seen = Packer(lengths, 20, 'key'), []
  order = packer._order

  def counting(epoch, start, stop):
    seen.append(stop - start)
    return order(epoch, start, stop)

  monkeypatch.setattr(packer, '_order', counting)
  packer.row(0)
  packer.row(packer.rows_per_epoch)
  assert sum(seen) < len(lengths) / 5
  packer.row(2 * packer.rows_per_epoch - 1)
  assert sum(seen) > len(lengths)
