"""A bucket is like a disk: what others write is seen, what fails is an OSError that names the path."""

import errno
import importlib
import types

import fsspec
import fsspec.asyn
import pytest
import tensorstore
from etils import epath
from etils.epath import backend

from betarank.__main__ import _run
from betarank.configs import buckets
from betarank.configs.errors import ConfigError, run_main
from betarank.data import storage
from betarank.runtime import lease
from tests.bucket import Bucket

REGISTRY = importlib.import_module('fsspec.registry')  # fsspec.registry is a dictionary in it


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """The server, to which epath and fsspec speak with gcsfs, as they do outside tests."""
  gcsfs = pytest.importorskip('gcsfs')
  monkeypatch.setattr(gcsfs.retry, 'asyncio', type('Hasty', (), {'sleep': staticmethod(lambda _: _nothing())}))
  with Bucket(tmp_path) as found:
    (tmp_path / 'bucket').mkdir()
    for protocol in ('gs', 'gcs'):
      monkeypatch.setitem(REGISTRY._registry, protocol, buckets.GoogleFiles)
    buckets.GoogleFiles.clear_instance_cache()  # of another server
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield found
  backend.fsspec_backend._get_filesystem.cache_clear()


async def _nothing():
  pass


def test_what_another_process_writes_is_seen(bucket):
  folder = epath.Path('gs://bucket/run')
  (folder / 'a').write_text('1')
  assert [path.name for path in folder.iterdir()] == ['a'] and not (folder / 'b').exists()
  (bucket.folder / 'bucket/run/b').write_text('of another machine')
  (bucket.folder / 'bucket/run/a').write_text('longer than before')
  assert (folder / 'b').exists() and [path.name for path in folder.iterdir()] == ['a', 'b']
  assert (folder / 'a').read_text() == 'longer than before'


ASK = {
  'exists': lambda path: path.exists(), 'is_dir': lambda path: path.is_dir(), 'is_file': lambda path: path.is_file(),
  'list': lambda path: list(path.iterdir()), 'read': lambda path: path.read_text(),
  'write': lambda path: path.write_text('x'), 'delete': lambda path: path.unlink(),
  'rename': lambda path: path.replace(path.parent / 'y')}


@pytest.mark.parametrize('ask', ASK)
@pytest.mark.parametrize('status', [401, 403, 429, 503])
def test_a_refused_request_is_an_error_of_the_path_and_not_a_no(bucket, ask, status):
  epath.Path('gs://bucket/run/x').write_text('x')
  bucket.disturb(error_rate=1.0, error_statuses=[status])
  with pytest.raises(OSError, match=r'the store failed \(') as error:
    ASK[ask](epath.Path('gs://bucket/run/x'))
  assert error.value.errno == errno.EIO and error.value.filename.startswith('gs://bucket')
  assert '\n' not in error.value.strerror


@pytest.mark.parametrize('name, read', [
  ('metrics.jsonl', lambda path: path.read_bytes()), ('part', lambda path: path.open('rb').read(5))])
def test_nothing_but_the_error_is_said(bucket, name, read, capfd):
  """gcsfs and fsspec log the tracebacks of what they raise."""
  path = epath.Path(f'gs://bucket/run/{name}')
  path.write_bytes(b'x' * 2**16)
  bucket.disturb(error_rate=1.0, error_statuses=[403])
  with pytest.raises(OSError) as error:
    read(path)
  assert error.value.filename == str(path) and 'Traceback' not in capfd.readouterr().err


def test_no_connection_is_an_error_too(bucket, monkeypatch):
  monkeypatch.setattr(buckets.GoogleFiles, '_location', 'http://127.0.0.1:9', raising=False)
  with pytest.raises(OSError, match='the store failed .*Cannot connect'):
    epath.Path('gs://bucket/x').exists()


def test_a_misspelt_bucket_is_not_created(bucket):
  folder = epath.Path('gs://bukcet/run')
  folder.mkdir(parents=True, exist_ok=True)
  assert not folder.exists() and not (bucket.folder / 'bukcet').exists()
  with pytest.raises(OSError, match=r'no such bucket') as error:
    (folder / 'x').write_text('x')
  assert error.value.errno == errno.EIO


class Store(fsspec.asyn.AsyncFileSystem):
  """A stand-in for gcsfs.GCSFileSystem, for those who haven't installed it."""

  protocol, raises = 'store', None

  async def _call(self, method, path, *args, **_):
    raise self.raises

  async def _info(self, path, **_):
    await self._call('GET', 'b/{}/o/{}', 'bucket', 'x')


@pytest.mark.parametrize('error', [KeyError('any\nkind'), OSError('Forbidden: x'), TimeoutError()])
def test_any_error_of_the_store_becomes_one(error):
  store = buckets.like_a_disk(Store)(skip_instance_cache=True)
  store.raises = error
  for ask in (store.exists, store.isdir, store.isfile):
    with pytest.raises(OSError, match=r'the store failed \(') as found:
      ask('bucket/x')
    assert found.value.errno == errno.EIO and found.value.filename == 'gs://bucket/x'
  store.raises = FileNotFoundError('x')
  assert not store.exists('bucket/x') and not store.isdir('bucket/x') and not store.isfile('bucket/x')


def seconds(max_retries, initial_delay, max_delay):
  """Returns how long TensorStore waits in all between a request and its last repetition."""
  number = lambda text: float(text.removesuffix('ms')) / 1000 if text.endswith('ms') else float(text.removesuffix('s'))
  return sum(min(number(initial_delay) * 2**n, number(max_delay)) for n in range(max_retries))


def test_requests_are_repeated_for_as_long_as_the_guarantees_say(bucket, monkeypatch):
  """docs/guarantees.md: half a minute; data for five minutes; parts of a checkpoint for a quarter of an hour."""
  waits = []
  retry = importlib.import_module('gcsfs.retry')
  monkeypatch.setattr(retry, 'asyncio', types.SimpleNamespace(sleep=lambda s: waits.append(s) or _nothing()))
  bucket.disturb(error_rate=1.0, error_statuses=[503])
  files = fsspec.filesystem('gs')
  with pytest.raises(OSError, match='the store failed'):
    fsspec.asyn.sync(files.loop, files._call, 'GET', 'b/{}/o/{}', 'bucket', 'x')
  assert 25 < sum(waits) < 40 and 25 < seconds(**lease._RETRIES) < 40
  of = lambda context: context['gcs_request_retries'].to_json(include_defaults=True)
  assert 270 < seconds(**of(storage._context())) < 345
  assert 800 < seconds(**of(tensorstore.Context())) < 1000  # Orbax reads with TensorStore's own


def test_a_command_ends_with_one_line(capsys):
  def fail():
    raise OSError(errno.EIO, 'the store failed (503)', 'gs://bucket/x')

  with pytest.raises(SystemExit) as end:
    run_main(fail)
  assert end.value.code == 2 and capsys.readouterr().err == 'error: gs://bucket/x: the store failed (503)\n'


def test_every_command_opens_buckets_so(monkeypatch):
  known, opened = REGISTRY.known_implementations, REGISTRY._registry
  for protocol in ('gs', 'gcs'):
    monkeypatch.setitem(known, protocol, known[protocol])
    monkeypatch.delitem(opened, protocol, raising=False)
  with pytest.raises(ConfigError, match='name a config'):
    _run(['config'])
  assert {known[protocol]['class'] for protocol in ('gs', 'gcs')} == {'betarank.configs.buckets.GoogleFiles'}
