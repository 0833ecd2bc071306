import collections
import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest

from betarank.data.batches import Batch, TrainBatches, validation_batches
from betarank.data.config import DataError, SourceConfig
from betarank.data.prepare import prepare_source
from betarank.data.prepared import Documents, folder
from betarank.data.tokenizer import read_tokenizer

SIZE = 8


@pytest.fixture
def open_batches(prepared_config):
  opened = []

  def open(config=prepared_config, **kwargs):
    opened.append(TrainBatches(config, **{'batch_size': SIZE, 'seed': 0, **kwargs}))
    return opened[-1]

  yield open
  for batches in opened:
    batches.close()


def take(batches, count):
  return list(itertools.islice(batches, count))


def stack(batches):
  return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def concatenate(batches):
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def rows_of(batches):
  """Returns the tokens and targets of each row as bytes, so that equal rows can be counted."""
  return [(b.tokens_BT[r].tobytes(), b.targets_BT[r].tobytes()) for b in batches for r in range(SIZE)]


def test_layout(prepared_config, open_batches):
  for batch in take(open_batches(), 30):
    for leaf in jax.tree.leaves(batch):
      assert leaf.shape == (SIZE, 32) and leaf.dtype == np.int32
    same = batch.segments_BT[:, 1:] == batch.segments_BT[:, :-1]
    real = batch.segments_BT[:, 1:] > 0
    np.testing.assert_array_equal(batch.targets_BT[:, :-1][same & real], batch.tokens_BT[:, 1:][same & real])
    np.testing.assert_array_equal(batch.positions_BT[:, 1:][same & real],
                                  batch.positions_BT[:, :-1][same & real] + 1)
    assert (batch.positions_BT[:, 1:][~same] == 0).all()
    assert (np.diff(batch.segments_BT, axis=1)[real] >= 0).all()
    assert (batch.targets_BT[batch.segments_BT > 0] != 2).all()  # nothing predicts a document's beginning


def test_every_pair_once_an_epoch(prepared_config, open_batches):
  config = dataclasses.replace(prepared_config, sources={'a': prepared_config.sources['a']})
  documents = Documents(config, 'a', 'train')
  batches = open_batches(config, batch_size=1)
  assert batches.stats['a'].documents == len(documents) and batches.stats['a'].efficiency > 0.99
  expected = collections.Counter()
  for tokens in documents.read(range(len(documents))):
    expected.update(zip(tokens[:-1].tolist(), tokens[1:].tolist()))
  for _ in range(2):
    seen = collections.Counter()
    for batch in take(batches, batches.stats['a'].rows_per_epoch):
      mask = batch.segments_BT > 0
      seen.update(zip(batch.tokens_BT[mask].tolist(), batch.targets_BT[mask].tolist()))
    assert seen == expected


@pytest.mark.parametrize('processes', [2, 8])
def test_same_order_for_any_number_of_processes(open_batches, processes):
  alone = stack(take(open_batches(), 6))
  parts = [stack(take(open_batches(process_index=p, process_count=processes), 6)) for p in range(processes)]
  assert_equal(jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *parts), alone)


@pytest.mark.parametrize('step', [0, 1, 7, 40])  # 40 is in the second epoch of both sources
def test_resumed_is_uninterrupted(open_batches, step):
  whole = take(open_batches(), step + 5)
  first = open_batches()
  take(first, step)
  cursor = json.loads(json.dumps(first.cursor))
  assert cursor['step'] == step and cursor['row'] == step * SIZE
  assert_equal(take(open_batches(cursor=cursor), 5), whole[step:])
  again = open_batches(cursor=cursor)
  take(again, 2)
  assert_equal(take(open_batches(cursor=again.cursor, process_count=2, process_index=1), 3),
               [jax.tree.map(lambda x: x[SIZE // 2:], b) for b in whole[step + 2:]])


def reweighted(config, **weights):
  return dataclasses.replace(config, sources={name: dataclasses.replace(config.sources[name], weight=weight)
                                              for name, weight in weights.items()})


def test_weights_changed_on_resume(prepared_config, open_batches):
  """A source's rows come in the same order as without other sources, however the weights change."""
  alone = {name: rows_of(take(open_batches(reweighted(prepared_config, **{name: 1.0})), 40)) for name in 'ab'}
  config, cursor, got = reweighted(prepared_config, a=3.0, b=1.0), None, []
  for weights, steps in [({'a': 3.0, 'b': 1.0}, 3), ({'a': 1.0, 'b': 5.0}, 4), ({'b': 1.0}, 2),
                         ({'a': 1.0, 'b': 0.0}, 2), ({'a': 1.0, 'b': 1.0}, 5)]:
    config = reweighted(prepared_config, **weights)
    batches = open_batches(config, cursor=cursor)
    got += rows_of(take(batches, steps))
    cursor = batches.cursor
  used = {name: cursor['sources'][name]['rows'] for name in 'ab'}
  assert sum(used.values()) == len(got) == 16 * SIZE and cursor['step'] == 16
  assert collections.Counter(got) == collections.Counter(alone['a'][:used['a']] + alone['b'][:used['b']])


def test_batch_size_changed_on_resume(open_batches):
  first = open_batches()
  take(first, 3)
  halves = take(open_batches(cursor=first.cursor, batch_size=SIZE // 2), 4)
  wholes = take(open_batches(cursor=first.cursor), 2)
  assert_equal(concatenate(halves), concatenate(wholes))


def test_mixture_follows_weights(prepared_config, open_batches):
  batches = open_batches()
  take(batches, 10)
  assert batches.cursor['sources']['a']['rows'] == 60 and batches.cursor['sources']['b']['rows'] == 20


def test_seed_changes_the_order(open_batches):
  assert rows_of(take(open_batches(), 3)) != rows_of(take(open_batches(seed=1), 3))


def test_cursor_errors(prepared_config, open_batches):
  cursor = open_batches().cursor | {'sources': {'a': {'rows': 3, 'fingerprint': 'other'}}}
  for change, message in [
      ({'seed': 5}, 'cursor: made with seed 0, now it is 5'),
      ({'config': dataclasses.replace(prepared_config, sequence_length=16)}, 'length 32, now it is 16'),
      ({}, "source 'a' was prepared again with other content")]:
    with pytest.raises(DataError, match=message):
      open_batches(**change, cursor=cursor)
  with pytest.raises(DataError, match='cursor: has no row, seed'):
    open_batches(cursor={k: cursor[k] for k in cursor if k not in ('row', 'seed')})


def test_argument_errors(prepared_config, open_batches):
  with pytest.raises(DataError, match=r'batch_size must be a positive multiple of .* got 8 rows for 3'):
    open_batches(process_count=3)
  with pytest.raises(DataError, match=r'process_index must be in \[0, 2\), got 2'):
    open_batches(process_count=2, process_index=2)
  with pytest.raises(DataError, match=r"no source 'c'; there are a, b"):
    validation_batches(prepared_config, 'c', batch_size=8, count=1)
  with pytest.raises(DataError, match='vocab_size is 384 there and 999 now'):
    open_batches(dataclasses.replace(prepared_config, vocab_size=999))
  with pytest.raises(DataError, match=r"source 'a' is not prepared from text:x; run"):
    open_batches(dataclasses.replace(prepared_config, sources={'a': SourceConfig('text:x', 1.0, 0)}))


def test_damage_found_while_training(prepared_config, open_batches, tmp_path):
  copy = dataclasses.replace(prepared_config, dir=str(tmp_path / 'copy'))
  shutil.copytree(prepared_config.dir, copy.dir)
  shard = folder(copy, 'a') / 'a-train.array_record-00000-of-00001'
  data = bytearray(shard.read_bytes())
  data[data.index(b'tokens') + 20] ^= 1
  shard.write_bytes(data)
  with pytest.raises(DataError, match='00000-of-00001: damaged'):
    take(open_batches(copy), 100)


def test_validation(prepared_config):
  def read(**kwargs):
    return list(validation_batches(prepared_config, 'a', **{'batch_size': 4, 'count': 1000, **kwargs}))

  batches = read()
  assert_equal(batches, read())
  assert_equal(batches[:2], read(count=2))
  documents = Documents(prepared_config, 'a', 'validation')
  assert sum((b.segments_BT > 0).sum() for b in batches) == (documents.lengths - 1).sum()
  assert all(b.tokens_BT.shape == (4, 32) for b in batches)
  assert (batches[-1].segments_BT[-1] == 0).all()  # these 400 documents happen to leave rows of padding
  halves = [read(process_count=2, process_index=p) for p in range(2)]
  assert_equal([concatenate(pair) for pair in zip(*halves)], batches)


@pytest.fixture
def instructions(config, corpus, make_source, tmp_path):
  """Returns the config of two prepared sources: questions with answers, of which the loss counts only the answers, and
  plain text.
  """
  rng = np.random.default_rng(0)
  records = [{'q': f'what is {i}?', 'a': 'just ' * int(rng.integers(1, 9)) + str(i)} for i in range(60)]
  (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
  c = dataclasses.replace(config, sources={
    'asked': make_source(f'jsonl:{tmp_path}/a.jsonl#q+a'), 'plain': make_source(f'jsonl:{corpus}/a.jsonl')})
  for name in c.sources:
    prepare_source(c, name, workers=1)
  return c


def test_the_loss_counts_answers_only_in_packed_rows_too(instructions, open_batches):
  """This also holds for documents that are cut at the end of a row. All tokens of plain text count."""
  tokenizer = read_tokenizer(instructions.tokenizer_path, 384)
  alone = dataclasses.replace(instructions, sources={'asked': instructions.sources['asked']})
  documents = Documents(alone, 'asked', 'train')
  opened = open_batches(alone, batch_size=1)
  batches = take(opened, opened.stats['asked'].rows_per_epoch)
  found = documents.request(np.arange(len(documents)))()
  assert sum(b.counted_BT.sum() for b in batches) == sum(d.mask[1:].sum() for d in found) > 0
  targets = np.concatenate([b.targets_BT[b.counted_BT] for b in batches])
  assert 'what' not in tokenizer.decode(targets) and 'just' in tokenizer.decode(targets)
  for batch in take(open_batches(instructions), 20):
    assert batch.counts_BT.dtype == bool and not batch.counted_BT[batch.segments_BT == 0].any()
    for r in range(SIZE):
      real = batch.segments_BT[r] > 0
      text = tokenizer.decode(batch.tokens_BT[r][real])
      assert 'Question' in text or batch.counted_BT[r][real].all()
  assert take(open_batches(dataclasses.replace(instructions, sources={
    'plain': instructions.sources['plain']})), 1)[0].counts_BT is None
  assert next(validation_batches(instructions, 'asked', batch_size=4, count=1)).counts_BT is not None


def test_batch_is_a_pytree():
  batch = Batch(*(np.full((1, 2), i) for i in range(4)))
  assert [leaf[0, 0] for leaf in jax.tree.leaves(batch)] == [0, 1, 2, 3]
  assert jax.tree.map(lambda x: x + 1, batch).segments_BT[0, 0] == 4
