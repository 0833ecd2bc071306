"""A workdir in a bucket is held by one command at a time, whatever dies, and whatever answers get lost."""

import concurrent.futures
import contextlib
import json
import os
import sys
import threading
import time

import pytest
from etils import epath

from betarank.configs.errors import UserError
from betarank.runtime import lease, workdir
from tests.bucket import Bucket

HERE = lease._process(os.getpid())


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """The server. If a lease is lost, the test fails, but the process doesn't end, which runs other tests too."""
  ended = []

  def end(status):
    ended.append(status)
    raise SystemExit  # of the thread that renews

  monkeypatch.setattr(os, '_exit', end)
  monkeypatch.setattr(lease, 'RENEW_S', 0.1)
  monkeypatch.setattr(lease, 'STALE_S', 60.0)
  with Bucket(tmp_path) as found:
    (tmp_path / 'bucket').mkdir()
    yield found
  assert not ended


@pytest.fixture
def there(bucket):
  """The file of the lease gs://bucket/run/.lock in the server's folder."""
  return bucket.folder / 'bucket/run/.lock'


@pytest.fixture
def elsewhere(monkeypatch):
  """This process can't know whether the holder of a lease is alive, as if it were on another machine."""
  monkeypatch.setattr(lease, '_process', lambda pid: {'place': f'machine {time.monotonic()}', 'pid': pid, 'start': '1'})


def hold():
  return lease.hold('gs://bucket/run', '.lock')


def test_a_second_command_is_told_and_the_folder_is_free_afterwards(there):
  with workdir.claim(epath.Path('gs://bucket/run')):
    told = rf'--workdir=gs://bucket/run: process {os.getpid()} on .* is at work there; stop it first'
    with pytest.raises(UserError, match=told), workdir.claim(epath.Path('gs://bucket/run')):
      pass
    assert there.exists()
  assert not there.exists()
  with pytest.raises(KeyError), hold() as holder:
    assert holder == ''
    raise KeyError
  assert not there.exists()


def test_the_lease_of_another_machine_is_waited_for_once_and_respected(there, elsewhere, capfd):
  with hold() as first, hold() as second:
    assert first == '' and second == f'process {os.getpid()} on {os.uname().nodename}'
  assert 'waiting 60 s to see whether it still runs' in capfd.readouterr().err


@pytest.mark.parametrize('content', [
  json.dumps({'holder': 'x', 'id': 'y', 'place': 'z', 'pid': 1, 'start': '2'}), '', '[]', '{"holder": 1}', '\xff'])
def test_a_lease_without_renewals_is_taken_over(there, content, monkeypatch):
  monkeypatch.setattr(lease, 'STALE_S', 0.4)
  there.parent.mkdir()
  there.write_text(content)
  began = time.monotonic()
  with hold() as holder:
    assert holder == '' and time.monotonic() - began >= lease.STALE_S


@pytest.mark.parametrize('dead', [{**HERE, 'pid': 2**22 + 1}, {**HERE, 'start': '1'}])
def test_a_process_that_died_on_this_machine_is_not_waited_for(there, dead, monkeypatch):
  monkeypatch.setattr(lease, 'STALE_S', 1000.0)
  there.parent.mkdir()
  there.write_text(json.dumps({'holder': 'x', 'id': 'y', **dead}))
  with hold() as holder:
    assert holder == ''


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
@pytest.mark.parametrize('full', [False, True])
def test_who_has_lost_the_lease_ends_and_does_not_delete_that_of_the_other(there, full, monkeypatch, capfd):
  ended = threading.Event()

  def end(status):
    assert status == 3
    ended.set()
    raise SystemExit  # of the thread that renews

  monkeypatch.setattr(os, '_exit', end)
  if full:  # standard error can't be written, and then not be closed without an error
    monkeypatch.setattr(sys, 'stderr', open('/dev/full', 'w', buffering=1))  # noqa: SIM115
  with hold():
    other = json.dumps({'holder': 'process 7 on b', 'id': 'y', 'place': 'z', 'pid': 7, 'start': '2'})
    there.write_text(other)
    assert ended.wait(60)
  assert ('error: gs://bucket/run/.lock: process 7 on b has taken over' in capfd.readouterr().err) != full
  assert there.read_text() == other


def test_a_lease_is_deleted_though_the_answer_to_its_renewal_was_lost(there, monkeypatch):
  monkeypatch.setattr(lease, 'RENEW_S', 1000.0)
  with hold():
    there.write_text(there.read_text())  # another generation, unknown to this process
    monkeypatch.setattr(lease, 'RENEW_S', 0.1)
  assert not there.exists()


def test_a_deleted_lease_is_written_again(there):
  with hold():
    there.unlink()
    until = time.monotonic() + 60
    while not there.exists():
      assert time.monotonic() < until
      time.sleep(0.01)


@pytest.mark.parametrize('faults', [{}, {'lost_rate': 0.3}, {'error_rate': 0.2}])
def test_of_several_at_once_one_gets_it(bucket, faults, elsewhere, monkeypatch):
  monkeypatch.setattr(lease, '_RETRIES', {'max_retries': 20, 'initial_delay': '1ms', 'max_delay': '10ms'})
  bucket.disturb(**faults)
  over = threading.Event()

  def one():
    with hold() as holder:
      if not holder:
        over.wait(60)
    return holder

  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    running = [pool.submit(one) for _ in range(6)]
    with contextlib.suppress(TimeoutError):
      for _ in zip(range(5), concurrent.futures.as_completed(running, timeout=60)):
        pass
    over.set()
    assert sorted(bool(future.result()) for future in running) == [False] + 5 * [True]


def test_what_the_store_refuses_is_one_line(bucket, monkeypatch):
  told = r'gs://nowhere/run/.lock: can.t be read or written \(.*404'
  with pytest.raises(UserError, match=told), lease.hold('gs://nowhere/run', '.lock'):
    pass
  bucket.disturb(error_rate=1.0, error_statuses=[403])
  with pytest.raises(UserError, match=r'.lock: can.t be read or written \(.*403') as error, hold():
    pass
  assert '\n' not in str(error.value)
