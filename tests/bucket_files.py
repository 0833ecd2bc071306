"""Lets fsspec and epath read and write `gs://` on the fake server of tests/bucket.py, in place of gcsfs."""

import http.client
import json
import os
import threading
import time
import urllib.parse

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

_TRIES = 8


class BucketFiles(AbstractFileSystem):
  """A file system that lists, reads, writes, copies and deletes objects. Like gcsfs, it repeats requests that fail with
  429 or 5xx.
  """

  protocol = ('gs', 'gcs')
  cachable = True

  def __init__(self, **kwargs):
    super().__init__(use_listings_cache=False)
    self._local = threading.local()

  def _request(self, method: str, target: str, body: bytes = b'', headers: dict[str, str] | None = None):
    """Sends a request until the answer isn't 429 or 5xx, at most _TRIES times. Returns (status, body)."""
    server = urllib.parse.urlsplit(os.environ['BUCKET_FOR_TESTS'])
    for attempt in range(_TRIES):
      connection = getattr(self._local, server.netloc, None)
      if connection is None:
        connection = http.client.HTTPConnection(server.hostname, server.port, timeout=30)
        setattr(self._local, server.netloc, connection)
      try:
        connection.request(method, target, body or None, headers or {})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 429 and answer.status < 500:
          return answer.status, content
      except (http.client.HTTPException, OSError):
        connection.close()
      time.sleep(0.01 * 2**attempt)
    raise OSError(f'{method} {target}: failed {_TRIES} times')

  def _object(self, path: str) -> str:
    bucket, _, name = self._strip_protocol(path).partition('/')
    return f'/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe="")}'

  def ls(self, path, detail=True, **_):
    bucket, _, name = self._strip_protocol(path).rstrip('/').partition('/')
    found, token = [], ''
    while True:
      query = urllib.parse.urlencode({'prefix': f'{name}/' if name else '', 'delimiter': '/', 'pageToken': token})
      status, content = self._request('GET', f'/storage/v1/b/{bucket}/o?{query}')
      if status == 404:
        raise FileNotFoundError(path)
      page = json.loads(content)
      found += [{'name': f'{bucket}/{item["name"]}', 'size': int(item['size']), 'type': 'file'}
                for item in page['items']]
      found += [{'name': f'{bucket}/{prefix.rstrip("/")}', 'size': 0, 'type': 'directory'}
                for prefix in page['prefixes']]
      token = page.get('nextPageToken')
      if not token:
        break
    if not found:
      found = [self.info(path)]
      if found[0]['type'] == 'directory':
        found = []
    return found if detail else [item['name'] for item in found]

  def info(self, path, **_):
    path = self._strip_protocol(path).rstrip('/')
    bucket, _, name = path.partition('/')
    if name:
      status, content = self._request('GET', self._object(path))
      if status == 200:
        return {'name': path, 'size': int(json.loads(content)['size']), 'type': 'file'}
    query = urllib.parse.urlencode({'prefix': f'{name}/' if name else '', 'maxResults': 1})
    status, content = self._request('GET', f'/storage/v1/b/{bucket}/o?{query}')
    if status == 200 and (json.loads(content)['items'] or not name):
      return {'name': path, 'size': 0, 'type': 'directory'}
    raise FileNotFoundError(path)

  def mkdir(self, path, create_parents=True, **_):
    pass  # a bucket has no folders

  def makedirs(self, path, exist_ok=False):
    pass

  def _rm(self, path):
    if self._request('DELETE', self._object(path))[0] == 404:
      raise FileNotFoundError(path)

  def rm(self, path, recursive=False, maxdepth=None):
    for name in [path] if isinstance(path, str) else path:
      for file in self.find(name) if recursive else [name]:
        self._rm(file)

  def cp_file(self, path1, path2, **_):
    bucket, _, name = self._strip_protocol(path2).partition('/')
    target = f'{self._object(path1)}/rewriteTo/b/{bucket}/o/{urllib.parse.quote(name, safe="")}'
    if self._request('POST', target)[0] == 404:
      raise FileNotFoundError(path1)

  def cat_file(self, path, start=None, end=None, **_):
    headers = {} if start is None and end is None else {'range': f'bytes={start or 0}-{"" if end is None else end - 1}'}
    status, content = self._request('GET', f'{self._object(path)}?alt=media', headers=headers)
    if status == 404:
      raise FileNotFoundError(path)
    return b'' if status == 416 else content

  def pipe_file(self, path, value, **_):
    bucket, _, name = self._strip_protocol(path).partition('/')
    query = urllib.parse.urlencode({'uploadType': 'media', 'name': name})
    self._request('POST', f'/upload/storage/v1/b/{bucket}/o?{query}', bytes(value))

  def _open(self, path, mode='rb', block_size=None, autocommit=True, cache_options=None, **_):
    return _File(self, path, mode, block_size or 2**22, cache_type='readahead')


class _File(AbstractBufferedFile):

  def _fetch_range(self, start, end):
    return self.fs.cat_file(self.path, start, end)

  def _initiate_upload(self):
    self._parts = []

  def _upload_chunk(self, final=False):
    self._parts.append(self.buffer.getvalue())
    if final:
      self.fs.pipe_file(self.path, b''.join(self._parts))
    return True
