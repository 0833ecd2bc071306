"""Tests that prepared data is read directly from a bucket: the fake server of tests/bucket.py, slow and faulty."""

import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from betarank.data import batches, cache, prepare, prepared, storage
from betarank.data.batches import TrainBatches, validation_batches
from betarank.data.config import DataError
from tests.bucket import Bucket

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  monkeypatch.setattr(storage, 'RETRIES', {'max_retries': 8, 'initial_delay': '10ms', 'max_delay': '100ms'})
  for remembered in (storage._context, batches._open_validation):
    remembered.cache_clear()
  with Bucket(tmp_path / 'store') as found:
    yield found
  for remembered in (storage._context, batches._open_validation):
    remembered.cache_clear()


@pytest.fixture
def there(bucket, prepared_config):
  """Returns prepared_config for a copy of its data in the bucket. The tokenizer is still read from the disk."""
  shutil.copytree(prepared_config.dir, bucket.folder / 'bucket/data')
  return dataclasses.replace(prepared_config, dir='gs://bucket/data', tokenizer=prepared_config.tokenizer_path)


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def take(config, count, **kwargs):
  reader = TrainBatches(config, **{'batch_size': 8, 'seed': 0, **kwargs})
  found = list(itertools.islice(reader, count))
  reader.close()
  return found, reader.cursor


@pytest.mark.parametrize('faults', [{}, {'latency_s': 0.02}, {'error_rate': 0.1}, {'truncate_rate': 0.1}])
def test_same_order_bits_and_cursor_as_from_a_disk(prepared_config, there, bucket, faults):
  expected, cursor = take(prepared_config, 12)
  for name, value in faults.items():
    setattr(bucket, name, value)
  found, there_cursor = take(there, 12)
  equal(found, expected)
  assert there_cursor == cursor
  middle = take(there, 5)[1]
  equal(take(there, 7, cursor=json.loads(json.dumps(middle)))[0], expected[5:])
  equal(list(validation_batches(there, 'a', batch_size=4, count=3)),
        list(validation_batches(prepared_config, 'a', batch_size=4, count=3)))
  if 'latency_s' in faults:
    assert bucket.busiest > 16  # requests overlap
  shards = [p.stat().st_size for p in (bucket.folder / 'bucket/data').rglob('*array_record*')]
  assert bucket.largest_download < max(shards) / 4  # documents are read, not shards


def test_silence_is_asked_again(there, bucket, monkeypatch):
  """Requests that are never answered are repeated. The time limit is read once per process, so the test starts a new
  process.
  """
  code = ('from betarank.data import storage\n'
          'folder = storage.open_folder("gs://bucket/data/a/1.0.0")\n'
          'waits = [folder.start("manifest.json", i, i + 5) for i in range(100)]\n'
          'print(b"".join(wait() for wait in waits).decode()[:9])')
  bucket.hang_rate = 0.05
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60, cwd=ROOT,
                       env={**os.environ, 'TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS': '1'})
  assert bucket.requests['GET', 'hang'] and out.stdout, out.stderr


@pytest.mark.parametrize('fault, message', [
  ({'error_rate': 1.0, 'error_statuses': (503,)},
   r'gs://bucket/data/a/1.0.0/a-train.*: the store failed \(.*503.*\); check the network'),
  ({'error_rate': 1.0, 'error_statuses': (403,)},
   r'the store failed \(.*403.*\); check the network, the bucket and your access'),
])
def test_a_store_that_keeps_failing_is_named_in_one_line(there, bucket, fault, message):
  documents = prepared.Documents(there, 'a', 'train')
  for name, value in fault.items():
    setattr(bucket, name, value)
  with pytest.raises(DataError, match=message) as error:
    documents.read([0, 1])
  assert '\n' not in str(error.value) and len(str(error.value)) < 600


def test_what_is_missing_or_damaged_in_a_bucket(there, bucket):
  shard = bucket.folder / 'bucket/data/a/1.0.0/a-train.array_record-00000-of-00001'
  data = shard.read_bytes()
  documents = prepared.Documents(there, 'a', 'train')
  damaged = bytearray(data)
  damaged[data.index(b'tokens') + 20] ^= 1
  shard.write_bytes(damaged)
  with pytest.raises(DataError, match=r'gs://.*-00000-of-00001: damaged \(a document.s checksum does not match'):
    documents.read(range(len(documents)))
  shard.write_bytes(data[:100])
  with pytest.raises(DataError, match=r'00000-of-00001: damaged'):
    documents.read([len(documents) - 1])
  with pytest.raises(DataError, match=r'00000-of-00001: 100 bytes where the manifest says'):
    prepared.Documents(there, 'a', 'train')
  shard.unlink()
  with pytest.raises(DataError, match=r'00000-of-00001: missing; copy it back'):
    documents.read([0])
  with pytest.raises(DataError, match=r'00000-of-00001: missing; copy it back'):
    prepared.Documents(there, 'a', 'train')
  with pytest.raises(DataError, match=r'prepared data is read from a disk, gs:// or s3://'):
    storage.open_folder('hf://datasets/x')


def test_a_document_damaged_on_its_way_is_read_again(there, bucket, monkeypatch):
  documents = prepared.Documents(there, 'a', 'train')
  expected = documents.read([3])[0]
  start, calls = documents._folder.start, []

  def damaging(*place):
    calls.append(place)
    wait = start(*place)
    return (lambda: wait()[:-1] + b'?') if len(calls) < 3 else wait

  monkeypatch.setattr(documents._folder, 'start', damaging)
  np.testing.assert_array_equal(documents.read([3])[0], expected)
  assert len(calls) == 3


def test_evaluations_open_the_set_once(there, bucket):
  for expected in ({'manifest.json', 'lengths-validation.npy'}, set()):
    bucket.downloads.clear()
    list(validation_batches(there, 'a', batch_size=2, count=1))
    names = {name.rpartition('/')[2] for name in bucket.downloads}
    assert names == expected | {'a-validation.array_record-00000-of-00001'}


def test_prepare_into_a_bucket(config, corpus, bucket, tmp_path):
  """If the corpus, the tokenizer and the prepared data are in a bucket, the prepared data has the same content as on a
  disk.
  """
  place = bucket.folder / 'bucket'
  place.mkdir(parents=True)
  (place / 'a.jsonl').write_text((corpus / 'a.jsonl').read_text())
  (place / 't.model').write_bytes(pathlib.Path(config.tokenizer).read_bytes())
  here = dataclasses.replace(config, sources={'a': config.sources['a']})
  there = dataclasses.replace(here, dir='gs://bucket/data', tokenizer='gs://bucket/t.model', sources={
    'a': dataclasses.replace(config.sources['a'], uri='jsonl:gs://bucket/*.jsonl')})
  one, other = (prepare.prepare_source(c, 'a', workers=1) for c in (here, there))
  assert one['fingerprint'] == other['fingerprint']
  for a, b in zip(*(prepared.Documents(c, 'a', 'train').read(range(100)) for c in (here, there))):
    np.testing.assert_array_equal(a, b)
  assert prepared.verify(there, 'a') == 400


# The cache, for those who ask for it


def test_a_cache_is_filled_once_and_read_from_then_on(prepared_config, there, bucket, tmp_path):
  cached = dataclasses.replace(there, cache_dir=str(tmp_path / 'cache'), cache_gb=0.01)
  expected = take(prepared_config, 6)[0]
  equal(take(cached, 6)[0], expected)
  assert any('lengths' in name for name in bucket.downloads)
  bucket.downloads.clear()
  equal(take(cached, 6)[0], expected)
  assert {name.rpartition('/')[2] for name in bucket.downloads} == {'manifest.json'}


def test_half_a_copy_never_blocks_a_start(prepared_config, there, bucket, tmp_path):
  cached = dataclasses.replace(there, cache_dir=str(tmp_path / 'cache'), cache_gb=0.01)
  place = tmp_path / 'cache' / prepared.read_manifest(prepared.folder(prepared_config, 'a'))['fingerprint']
  place.mkdir(parents=True)
  (place / 'lengths-train.npy').write_bytes(b'half')
  (place / 'a-train.array_record-00000-of-00001.partial').write_bytes(b'x' * 1000)
  equal(take(cached, 3)[0], take(prepared_config, 3)[0])
  assert not list(place.glob('*.partial'))


def test_a_copy_is_flushed_before_it_counts_as_whole(there, tmp_path, monkeypatch):
  """Only its size is checked later, which a power failure may keep without the content."""
  flushed, fsync = {}, os.fsync

  def record(descriptor):
    flushed[os.readlink(f'/proc/self/fd/{descriptor}')] = os.fstat(descriptor).st_size
    fsync(descriptor)

  monkeypatch.setattr(os, 'fsync', record)
  prepared.Documents(dataclasses.replace(there, cache_dir=str(tmp_path / 'cache')), 'a', 'train')
  [place] = tmp_path.glob('cache/*/')
  for path in place.glob('*train*'):
    assert flushed[f'{path}.partial'] == path.stat().st_size
  assert str(place) in flushed


@pytest.mark.parametrize('file', ['lengths-train.npy', 'a-train.array_record-00000-of-00001'])
def test_damage_in_a_copy_is_not_blamed_on_the_bucket(prepared_config, there, tmp_path, file):
  cached = dataclasses.replace(there, cache_dir=str(tmp_path / 'cache'))
  prepared.Documents(cached, 'a', 'train')
  [path] = tmp_path.glob(f'cache/*/{file}')
  path.write_bytes(bytes(path.stat().st_size))
  message = rf'^{path}: damaged \(.*\); delete {path.parent}, a copy of gs://bucket/data/a/1.0.0, to have it copied'
  with pytest.raises(DataError, match=message):
    prepared.Documents(cached, 'a', 'train').read([0])
  shutil.rmtree(path.parent)
  storage._open_file.cache_clear()  # as in another process
  equal(prepared.Documents(cached, 'a', 'train').read([0]), prepared.Documents(prepared_config, 'a', 'train').read([0]))


def test_a_copier_that_is_killed_leaves_nothing_that_blocks(prepared_config, there, bucket, tmp_path):
  cached = dataclasses.replace(there, cache_dir=str(tmp_path / 'cache'), cache_gb=0.01)
  code = ('from betarank.data import prepared; from betarank.data.config import *; from tests import bucket\n'
          'bucket.register()\n'
          f'prepared.Documents({cached!r}, "a", "train")')
  bucket.bytes_per_s = 10_000
  process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT)
  deadline = time.monotonic() + 60
  while not list(tmp_path.glob('cache/*/*.partial')) and time.monotonic() < deadline:
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait(10)
  assert list(tmp_path.glob('cache/*/*.partial'))
  bucket.bytes_per_s = 0
  equal(take(cached, 3)[0], take(prepared_config, 3)[0])
  assert not list(tmp_path.glob('cache/*/*.partial'))


def test_the_cache_keeps_its_limit(there, bucket, tmp_path, monkeypatch):
  size = lambda name: sum(f.stat().st_size for f in (bucket.folder / f'bucket/data/{name}/1.0.0').glob('*train*'))
  limited = lambda bytes_: dataclasses.replace(there, cache_dir=str(tmp_path / 'cache'), cache_gb=bytes_ / 1e9)
  with pytest.raises(DataError, match=r'the set takes .* more than data.cache_gb=.*; raise it, or leave'):
    prepared.Documents(limited(size('a') - 1), 'a', 'train')
  enough = limited(max(size('a'), size('b')) + 1000)
  prepared.Documents(enough, 'a', 'train')
  with pytest.raises(DataError, match='with those in use'):  # this process may still read a
    prepared.Documents(enough, 'b', 'train')
  for held in cache._IN_USE.values():  # as if it had ended
    held.close()
  cache._IN_USE.clear()
  prepared.Documents(enough, 'b', 'train')
  kept = sum(f.stat().st_size for f in (tmp_path / 'cache').rglob('*') if f.is_file())
  assert kept <= enough.cache_gb * 1e9 and len(list((tmp_path / 'cache').glob('*/used'))) == 1


def test_no_room_on_the_disk_is_said(there, bucket, tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(cache.storage, 'read_pieces', full)
  with pytest.raises(DataError, match=r'cache/\w+: no space left; free some, choose another data.cache_dir'):
    prepared.Documents(dataclasses.replace(there, cache_dir=str(tmp_path / 'cache')), 'a', 'train')
  assert not list(tmp_path.glob('cache/*/*.partial'))
