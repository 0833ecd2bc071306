import itertools

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from betarank.data import records
from betarank.data.records import Form, Places

# On both sides of every length at which a header grows, and across several of Riegeli's blocks.
LENGTHS = [2, 3, *range(30, 70), *range(8150, 8210), 32_000, 2**16, 100_000, *range(2, 400)]


def documents(dtype, masked, seed=0):
  rng = np.random.default_rng(seed)
  lengths = rng.permutation(LENGTHS)
  return [(rng.integers(0, 2**16, n).astype(dtype), rng.random(n) < 0.5 if masked else None) for n in lengths]


def write(path, found):
  writer = ArrayRecordWriter(str(path), 'group_size:1,uncompressed')
  for document in found:
    writer.write(records.to_record(*document))
  writer.close()
  return path.read_bytes()


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('dtype', ['<u2', '<u4'])
def test_every_document_lies_where_its_place_says(tmp_path, dtype, masked, monkeypatch):
  monkeypatch.setattr(records, '_PIECE', 128)
  found = documents(dtype, masked)
  starts = [0, 1, 200, len(found)]
  shards = [write(tmp_path / str(start), found[start:stop]) for start, stop in itertools.pairwise(starts)]
  lengths = np.array([len(tokens) for tokens, _ in found], np.uint32)
  form = Form(np.dtype(dtype), masked)
  for table in (2**20, 10):  # sizes looked up, and computed
    monkeypatch.setattr(records, '_TABLE', table)
    places = Places(lengths, starts, form)
    assert all(least <= len(shard) for least, shard in zip(places.sizes, shards))
    order = np.random.default_rng(1).permutation(len(found))
    for index, shard, begin, end in zip(order, *places.of(order)):
      record = records.record_in(shards[shard][begin:end], int(begin))
      tokens, mask = records.from_record(record, int(lengths[index]), form)
      np.testing.assert_array_equal(tokens, found[index][0])
      np.testing.assert_array_equal(mask, found[index][1])


def test_arrayrecord_itself_reads_the_same(tmp_path):
  found = documents('<u2', False)
  write(tmp_path / 'x', found)
  reader = ArrayRecordReader(str(tmp_path / 'x'))
  assert reader.read_all() == [records.to_record(*document) for document in found]


def test_records_are_tf_examples():
  from tensorflow_datasets.proto import tf_example_pb2
  for n in (1, 50, 130, 5000, 70_000):
    array = np.arange(n, dtype=np.uint32)
    for mask in (None, np.arange(n) % 3 == 0):
      example = tf_example_pb2.Example.FromString(records.to_record(array, mask))
      assert example.features.feature['tokens'].bytes_list.value == [array.tobytes()]


@pytest.mark.parametrize('masked', [False, True])
def test_a_flipped_bit_anywhere_is_noticed(masked):
  tokens, mask = np.arange(2, 40, dtype='<u2'), np.arange(38) % 2 == 0 if masked else None
  record, form = records.to_record(tokens, mask), Form(np.dtype('<u2'), masked)
  records.from_record(record, 38, form)
  for at in range(len(record)):
    damaged = bytearray(record)
    damaged[at] ^= 1 << at % 8
    with pytest.raises(ValueError, match=r'checksum does not match|not as long'):
      records.from_record(bytes(damaged), 38, form)
  for wrong in (record[:-1], record + b'\0', b''):
    with pytest.raises(ValueError, match='not as long'):
      records.from_record(wrong, 38, form)


def test_records_of_older_sets_have_no_checksum():
  tokens = np.arange(2, 40, dtype='<u2')
  old = bytes(records.without_checksum(records.to_record(tokens)))
  read, mask = records.from_record(old, 38, Form(np.dtype('<u2'), checksum=False))
  np.testing.assert_array_equal(read, tokens)
  assert mask is None
