"""Provides a bucket for tests: a file system in memory, whose paths begin with gs://."""

import uuid

import fsspec
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem


class _Buckets(MemoryFileSystem):
  protocol, store, pseudo_dirs = 'gs', {}, ['']

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.replace('gs://', 'memory://'))


def new():
  """Returns the path of a new, empty bucket in this process's memory."""
  for name in ('gcs', 'gs'):
    fsspec.register_implementation(name, _Buckets, clobber=True)
  backend.fsspec_backend._get_filesystem.cache_clear()  # it may hold the one of tests/bucket.py
  path = epath.Path(f'gs://{uuid.uuid4().hex}')
  path.mkdir()
  return path
