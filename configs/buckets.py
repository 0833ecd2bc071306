"""Makes a bucket (gs://) behave like a disk: files of other processes are seen, and errors are OSErrors.

fsspec and epath open buckets with gcsfs. gcsfs differs from a disk in three ways that programs don't expect:

- It lists a folder once and keeps the list, so it doesn't see files that other machines write later.
- Its errors have no common type, and many aren't OSErrors. If the bucket can't be reached, is_dir() returns False.
- mkdir() creates the bucket if it doesn't exist. A misspelt name therefore gives a new, empty bucket.

`register` replaces gcsfs's class by a subclass without these differences. If the store refuses a request for about half
a minute (429, 5xx, no connection, an expired token), the subclass raises OSError with errno EIO, the path, and the
store's reason in one line.
"""

import errno
import functools
import logging
import re
import urllib.parse
from collections.abc import Sequence
from typing import Any

from betarank.configs.errors import one_line

_PROTOCOLS = ('gs', 'gcs')


def register() -> None:
  """Makes fsspec and epath open gs:// with a subclass of gcsfs's class that behaves like a disk.

  Every process that may use a bucket must call this before it opens one, because fsspec keeps using the class that
  opened the first bucket. gcsfs itself is imported only when a bucket is opened.
  """
  import fsspec

  for protocol in _PROTOCOLS:
    if protocol not in fsspec.registry:
      fsspec.register_implementation(protocol, f'{__name__}.GoogleFiles', clobber=True,
                                     errtxt='Please install gcsfs to access Google Storage')


def __getattr__(name: str) -> type:
  if name != 'GoogleFiles':
    raise AttributeError(name)
  import gcsfs

  for name in ('gcsfs', 'fsspec'):  # they log a traceback for each error that they raise
    logging.getLogger(name).setLevel(logging.CRITICAL)
  return like_a_disk(gcsfs.GCSFileSystem)


@functools.cache
def like_a_disk(files: type) -> type:
  """Returns a subclass of `files` that behaves like a disk. This module's docstring lists what it changes.

  files: gcsfs.GCSFileSystem, or a class with the same methods.
  """
  from fsspec.asyn import sync_wrapper

  class Files(files):

    def __init__(self, *args, **kwargs):
      try:
        super().__init__(*args, **{**kwargs, 'use_listings_cache': False})
      except Exception as error:  # no credentials, for example
        raise _store_error('gs://', error) from error

    async def _call(self, method: str, path: str, *args, **kwargs) -> Any:
      try:
        return await super()._call(method, path, *args, **kwargs)
      except FileExistsError:
        raise
      except FileNotFoundError as error:
        if '/upload/' not in path:
          raise
        raise _store_error(_name(path, args), 'no such bucket') from error
      except Exception as error:  # of gcsfs, aiohttp, requests or google.auth
        raise _store_error(_name(path, args), error) from error

    async def _isdir(self, path: str) -> bool:
      try:
        return (await self._info(path))['type'] == 'directory'
      except FileNotFoundError:
        return False

    async def _isfile(self, path: str) -> bool:
      try:
        return (await self._info(path))['type'] == 'file'
      except FileNotFoundError:
        return False

    async def _mkdir(self, *_, **__) -> None:
      """Does nothing, because a bucket has no folders."""

    async def _makedirs(self, *_, **__) -> None:
      """Does nothing, because a bucket has no folders."""

    # gcsfs may define these itself, by its own coroutines.
    mkdir, makedirs = sync_wrapper(_mkdir), sync_wrapper(_makedirs)
    isdir, isfile = sync_wrapper(_isdir), sync_wrapper(_isfile)

  return Files


def _name(path: str, args: Sequence[str]) -> str:
  """Returns the name of the bucket or object that a request is about, gs://BUCKET or gs://BUCKET/NAME.

  Args:
    path: the request's path from gcsfs, a template such as b/{}/o/{}. For an upload or download, it is a whole URL.
    args: the values for the {} of a template, which are the names of the bucket and of the object.
  """
  url = urllib.parse.urlsplit(path)
  if whole := re.search('/b/([^/{]+)/o/?(.*)', url.path):
    names = urllib.parse.parse_qs(url.query).get('name', [urllib.parse.unquote(whole[2])])
    return '/'.join([f'gs://{whole[1]}', *filter(None, names)])
  return f'gs://{"/".join(map(str, args))}'


def _store_error(name: str, reason: object) -> OSError:
  """Returns an OSError with errno EIO for a request that the store refused.

  name: the bucket or object of the request, gs://BUCKET or gs://BUCKET/NAME.
  reason: the error that gcsfs raised, or its message.
  """
  text = one_line(reason)[:300] or type(reason).__name__
  return OSError(errno.EIO, f'the store failed ({text})', name)
