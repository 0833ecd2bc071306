"""Tests that a file that is replaced atomically always has the complete old or the complete new content.

This holds on a disk and in a bucket.
"""

import os
import threading

import pytest
from etils import epath

from betarank.configs.errors import UserError
from betarank.configs.files import open_no_follow, read_json, write_atomically
from tests.bucket import Bucket


@pytest.fixture(params=['disk', 'bucket'])
def folder(request, tmp_path):
  return epath.Path(tmp_path) if request.param == 'disk' else request.getfixturevalue('bucket')


def test_content_is_written_and_replaced_in_a_new_folder(folder):
  path = folder / 'new' / 'deep' / 'x.json'
  write_atomically(path, 'a\nβ')
  assert path.read_text() == 'a\nβ'
  write_atomically(str(path), b'\x00\r\n')
  assert path.read_bytes() == b'\x00\r\n' and [p.name for p in path.parent.iterdir()] == ['x.json']


def test_a_writer_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
  path = tmp_path / 'x'
  write_atomically(path, 'old')
  monkeypatch.setattr(os, 'fsync', lambda _: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    write_atomically(path, 'half of the new')
  assert path.read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['x']


def test_content_is_flushed_before_it_replaces_the_old_file_and_the_folder_after(tmp_path, monkeypatch):
  path = tmp_path / 'x'
  write_atomically(path, 'old')
  seen, fsync = [], os.fsync

  def record(descriptor):
    seen.append((os.readlink(f'/proc/self/fd/{descriptor}'), os.fstat(descriptor).st_size, path.read_text()))
    fsync(descriptor)

  monkeypatch.setattr(os, 'fsync', record)
  write_atomically(path, 'new content')
  [(file, size, before), (folder, _, after)] = seen
  assert os.path.dirname(file) == folder == str(tmp_path) and size == len('new content')
  assert (before, after) == ('old', 'new content')


def test_two_writers_at_once_both_write_a_whole_file(tmp_path, monkeypatch):
  path, fsync, second = tmp_path / 'x', os.fsync, threading.Thread(target=lambda: write_atomically(path, 'second'))

  def write_second(descriptor):
    monkeypatch.setattr(os, 'fsync', fsync)
    second.start()
    second.join()
    assert path.read_text() == 'second'

  monkeypatch.setattr(os, 'fsync', write_second)
  write_atomically(path, 'first, which ends last')
  assert path.read_text() == 'first, which ends last' and [p.name for p in tmp_path.iterdir()] == ['x']


def test_in_a_bucket_a_file_is_one_upload(tmp_path):
  """Nothing is left if the process is killed, and no name is asked for or renamed."""
  (tmp_path / 'bucket').mkdir()
  with Bucket(tmp_path) as bucket:
    write_atomically('gs://bucket/new/x.json', 'text')
    assert bucket.requests == {('POST', 200): 1}
  assert (tmp_path / 'bucket/new/x.json').read_text() == 'text'


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
  (tmp_path / 'outside').write_text('as it was')
  (tmp_path / 'x').symlink_to('outside')
  write_atomically(tmp_path / 'x', 'new')
  assert (tmp_path / 'outside').read_text() == 'as it was' and not (tmp_path / 'x').is_symlink()


def test_json_that_can_not_be_read_is_a_value_error(tmp_path):
  path = epath.Path(tmp_path / 'x')
  for content in (b'[' * 100_000, b'', b'\xff'):
    path.write_bytes(content)
    with pytest.raises(ValueError, match='.'):
      read_json(path)
  path.write_text('{"a": 1}')
  assert read_json(path) == {'a': 1}
  (tmp_path / 'zero').symlink_to('/dev/zero')
  os.mkfifo(tmp_path / 'pipe')
  for name in ('zero', 'pipe', ''):
    with pytest.raises(ValueError, match='not a regular file'):
      read_json(epath.Path(tmp_path / name))


@pytest.mark.parametrize('target', ['outside', 'nothing'])
def test_a_link_is_not_opened_for_writing(tmp_path, target):
  (tmp_path / 'outside').write_text('as it was')
  (tmp_path / 'x').symlink_to(target)
  for mode in ('a', 'a+', 'wb'):
    with pytest.raises(UserError, match=f'{tmp_path}/x: is a symbolic link'):
      open_no_follow(tmp_path / 'x', mode)
  assert (tmp_path / 'outside').read_text() == 'as it was' and not (tmp_path / 'nothing').exists()
  with open_no_follow(tmp_path / 'outside', 'a') as file:
    file.write('!')
  assert (tmp_path / 'outside').read_text() == 'as it was!'
