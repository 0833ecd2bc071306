"""A bucket for tests: a file system in memory that answers to gs://."""

import uuid

import fsspec
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem


class _Buckets(MemoryFileSystem):
  protocol, store, pseudo_dirs = 'gs', {}, ['']

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.replace('gs://', 'memory://'))


def new():
  """Returns the path of a new, empty bucket in this process's memory."""
  fsspec.register_implementation('gcs', _Buckets, clobber=True)
  path = epath.Path(f'gs://{uuid.uuid4().hex}')
  path.mkdir()
  return path
