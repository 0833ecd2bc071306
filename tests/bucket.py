"""Serves a folder as a fake Google Cloud Storage, as slow and as faulty as a test asks for.

    with Bucket(tmp_path) as bucket:             # object gs://b/data/x is the file tmp_path/b/data/x
      bucket.latency_s = 0.03                    # before every answer
      bucket.error_rate = 0.01                   # share of requests answered with a status of `error_statuses`
      bucket.truncate_rate = 0.01                # share of downloads that end after half of the body
      ...                                        # TensorStore, ArrayRecord, gcsfs, fsspec and epath use this server
    python -m tests.bucket FOLDER [--port=N] [--latency_s=0.03] [--error_rate=0.01] ...    # in a process of its own
    disturb(endpoint, latency_s=0.03, ...)       # changes the faults of such a process

The server supports those parts of the JSON and XML interfaces that these libraries use: download with ranges, upload
(media, multipart, resumable), list, copy, move, delete, and preconditions on generations. The same seed and the same
requests give the same faults.
"""

import argparse
import asyncio
import collections
import email.parser
import http
import json
import mimetypes
import os
import pathlib
import random
import re
import shutil
import sys
import threading
import time
import urllib.parse
import urllib.request
from typing import Any

FAULTS = {
  'latency_s': 'before every answer',
  'error_rate': 'share of requests answered with a status of `error_statuses`',
  'truncate_rate': 'share of downloads that end after half of the body',
  'hang_rate': 'share of requests never answered',
  'lost_rate': 'share of writes and deletions that are done, but whose connection is cut instead of an answer',
  'stale_s': 'how long lists show neither new objects nor that objects are gone',
  'bytes_per_s': 'of each download; 0: no limit',
  'objects_only': '1: requests about the bucket itself are refused, as to roles/storage.objectAdmin',
}
_CONTROL = '/disturb'
_REASONS = {401: 'Invalid Credentials', 403: 'Insufficient Permission'}
_PAGE = 1000  # names in one answer to a list request, as the real service gives


class Bucket:
  """The server. It runs in a thread of this process while the `with` block runs.

  The attributes named in FAULTS, and error_statuses, may be changed at any time.

  Attributes that tests read:
    requests: a Counter of requests, by (method, status of the answer).
    struck: the number of requests that a fault has hit; `bytes_per_s` isn't counted.
    downloads: a Counter of downloads, by BUCKET/NAME of the object.
    bytes_sent: the bytes of all downloads.
    largest_download: the bytes of the largest download.
    busiest: the largest number of requests that were in progress at the same time.
  """

  def __init__(self, folder: str | os.PathLike, *, port: int = 0, seed: int = 0, **faults: float):
    self.folder = pathlib.Path(folder)
    self.error_statuses: tuple[int, ...] = (429, 503)
    self.disturb(**faults)
    self._deleted: dict[str, tuple[float, dict[str, Any]]] = {}  # what stale lists still show: name -> (time, item)
    self.requests: collections.Counter = collections.Counter()
    self.downloads: collections.Counter = collections.Counter()
    self.bytes_sent = self.largest_download = self.busiest = self.in_flight = self.struck = 0
    self._seed, self._random, self._port = seed, random.Random(seed), port
    self._moved: set[str | None] = set()  # tokens of moves that were done
    self._asked: collections.Counter = collections.Counter()
    self._uploads: dict[str, tuple[str, str, bytearray]] = {}
    self._finished: set[str] = set()  # uploads

  def disturb(self, **faults: float) -> None:
    """Sets these faults, and ends all others."""
    for name in FAULTS:
      setattr(self, name, faults.pop(name, 0.0))
    self.error_statuses = tuple(faults.pop('error_statuses', (429, 503)))
    assert not faults, faults

  def unlucky(self, fault: str, method: str, target: str) -> bool:
    """Returns whether this fault hits this request. It depends on the seed and on how often the same was asked."""
    if not (rate := getattr(self, f'{fault}_rate')):
      return False
    self._asked[fault, method, target] += 1
    draw = random.Random(f'{self._seed} {fault} {method} {target} {self._asked[fault, method, target]}')
    hit = draw.random() < rate
    self.struck += hit
    return hit

  @property
  def endpoint(self) -> str:
    return f'http://127.0.0.1:{self._port}'

  @property
  def environment(self) -> dict[str, str]:
    """The environment variables with which clients talk to this server, in this process and in its children."""
    return {'TENSORSTORE_GCS_HTTP_URL': self.endpoint, 'CLOUD_STORAGE_EMULATOR_ENDPOINT': self.endpoint,
            'STORAGE_EMULATOR_HOST': self.endpoint, 'GOOGLE_AUTH_TOKEN_FOR_TESTING': '',
            'BUCKET_FOR_TESTS': self.endpoint}

  def __enter__(self) -> 'Bucket':
    self._loop, started = asyncio.new_event_loop(), threading.Event()

    def serve():
      asyncio.set_event_loop(self._loop)
      self._server = self._loop.run_until_complete(self._listen())
      started.set()
      self._loop.run_forever()
      self._server.close()
      for task in asyncio.all_tasks(self._loop):
        task.cancel()
      self._loop.run_until_complete(asyncio.sleep(0))
      self._loop.close()

    self._thread = threading.Thread(target=serve, daemon=True)
    self._thread.start()
    started.wait()
    self._before = {name: os.environ.get(name) for name in self.environment}
    os.environ.update(self.environment)
    register()
    return self

  def __exit__(self, *_) -> None:
    for name, value in self._before.items():
      os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    unregister()
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()

  async def _listen(self) -> asyncio.Server:
    server = await asyncio.get_running_loop().create_server(lambda: _Connection(self), '127.0.0.1', self._port)
    self._port = server.sockets[0].getsockname()[1]
    return server

  async def run(self) -> None:
    """Serves requests until the task is cancelled."""
    async with await self._listen() as server:
      print(self.endpoint, flush=True)
      await server.serve_forever()

  # What a request gets: (status, headers, body)

  def _path(self, bucket: str, name: str) -> pathlib.Path:
    path = self.folder / bucket / name
    if '..' in path.parts:
      raise ValueError(name)
    return path

  def _item(self, bucket: str, name: str) -> dict[str, Any] | None:
    try:
      stat = self._path(bucket, name).stat()
    except (FileNotFoundError, NotADirectoryError):
      return None
    if not self._path(bucket, name).is_file():
      return None
    return {'kind': 'storage#object', 'bucket': bucket, 'name': name, 'size': str(stat.st_size),
            'generation': str(stat.st_mtime_ns), 'metageneration': '1', 'timeCreated': '2026-01-01T00:00:00.000Z',
            'updated': '2026-01-01T00:00:00.000Z', 'id': f'{bucket}/{name}/{stat.st_mtime_ns}',
            'storageClass': 'STANDARD',
            'contentType': mimetypes.guess_type(name)[0] or 'application/octet-stream', 'etag': str(stat.st_mtime_ns)}

  def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> tuple[int, dict, bytes]:
    parts = urllib.parse.urlsplit(target)
    if parts.path == _CONTROL:
      self.disturb(**json.loads(body))
      return _json({'requests': self.requests.total(), 'struck': self.struck})
    query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    unquote = urllib.parse.unquote
    if match := re.fullmatch(r'/upload/storage/v1/b/([^/]+)/o', parts.path):
      return self._upload(method, unquote(match[1]), query, headers, body)
    if match := re.fullmatch(r'/storage/v1/b/([^/]+)/o/(.+)/(?:copyTo|rewriteTo)/b/([^/]+)/o/(.+)', parts.path):
      source, target = (self._path(unquote(match[i]), unquote(match[i + 1])) for i in (1, 3))
      if not source.is_file():
        return _missing()
      target.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(source, target)
      item = self._item(unquote(match[3]), unquote(match[4]))
      if 'copyTo' in parts.path:
        return _json(item)
      return _json({'kind': 'storage#rewriteResponse', 'done': True, 'resource': item,
                    'totalBytesRewritten': item['size'], 'objectSize': item['size']})
    if match := re.fullmatch(r'/storage/v1/b/([^/]+)/o/(.+)/moveTo/o/(.+)', parts.path):
      bucket, source, target = map(unquote, match.groups())
      if (token := headers.get('x-goog-gcs-idempotency-token')) and token in self._moved:
        return _json(self._item(bucket, target))
      if not self._path(bucket, source).is_file():
        return _missing()
      self._path(bucket, target).parent.mkdir(parents=True, exist_ok=True)
      content = self._path(bucket, source).read_bytes()
      self._delete(bucket, source)
      self._moved.add(token)
      return self._store(bucket, target, content, {})
    if match := re.fullmatch(r'(?:/download)?/storage/v1/b/([^/]+)/o/(.+)', parts.path):
      return self._object(method, unquote(match[1]), unquote(match[2]), query, headers)
    if match := re.fullmatch(r'/storage/v1/b/([^/]+)/o/?', parts.path):
      return self._list(unquote(match[1]), query)
    if match := re.fullmatch(r'/storage/v1/b/([^/]+)', parts.path):
      if self.objects_only:
        self.struck += 1
        return _json({'error': {'code': 403, 'message': 'no storage.buckets.get access'}}, 403)
      return _json({'kind': 'storage#bucket', 'name': match[1], 'id': match[1], 'location': 'US',
                    'storageClass': 'STANDARD'}) if (self.folder / match[1]).is_dir() else _missing()
    if match := re.fullmatch(r'/([^/]+)/(.+)', parts.path):  # the XML interface
      return self._object(method, unquote(match[1]), unquote(match[2]), {'alt': 'media'}, headers)
    return _missing()

  def _object(self, method, bucket, name, query, headers) -> tuple[int, dict, bytes]:
    item = self._item(bucket, name)
    if (wanted := query.get('ifGenerationMatch')) is not None and wanted != (item['generation'] if item else '0'):
      return 412, {}, b'{}'
    if item is None:
      return _missing()
    if method == 'DELETE':
      self._delete(bucket, name)
      return 204, {}, b''
    if query.get('ifGenerationNotMatch') == item['generation']:
      return 304, {}, b''
    if query.get('alt') != 'media':
      return _json(item)
    self.downloads[f'{bucket}/{name}'] += 1
    size, first = int(item['size']), 0
    last, status = size - 1, 200
    if match := re.fullmatch(r'bytes=(\d*)-(\d*)', headers.get('range', '')):
      status = 206
      if match[1]:
        first, last = int(match[1]), min(int(match[2] or size - 1), size - 1)
      else:
        first = max(0, size - int(match[2]))
      if first >= size:
        return 416, {'content-range': f'bytes */{size}'}, b''
    with self._path(bucket, name).open('rb') as file:
      content = os.pread(file.fileno(), last - first + 1, first)
    out = {'content-type': item['contentType'], 'x-goog-generation': item['generation'], 'etag': f'"{item["etag"]}"',
           'x-goog-stored-content-length': str(size)}
    if status == 206:
      out['content-range'] = f'bytes {first}-{last}/{size}'
    return status, out, content

  def _delete(self, bucket: str, name: str) -> None:
    self._deleted[f'{bucket}/{name}'] = time.time(), self._item(bucket, name)
    self._path(bucket, name).unlink()

  def _list(self, bucket: str, query: dict[str, str]) -> tuple[int, dict, bytes]:
    root = self.folder / bucket
    if not root.is_dir():
      return _missing()
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter', '')
    # Only the folder that the prefix ends in can hold a match.
    below = root / prefix.rpartition('/')[0]
    names = {str(p.relative_to(root)): p for p in below.rglob('*') if p.is_file()} if below.is_dir() else {}
    gone = {}
    if self.stale_s:
      since = time.time() - self.stale_s
      now, names = names, {name: p for name, p in names.items() if p.stat().st_mtime < since}
      gone = {item['name']: item for when, item in self._deleted.values() if when > since and item['bucket'] == bucket}
      self.struck += any(name.startswith(prefix) for name in now.keys() ^ (names.keys() | gone.keys()))
    names = sorted(names | gone)
    items, prefixes = [], set()
    for name in names:
      if not name.startswith(prefix) or name < query.get('startOffset', '') or name <= query.get('pageToken', ''):
        continue
      if 'endOffset' in query and query['endOffset'] and name >= query['endOffset']:
        continue
      if delimiter and delimiter in name[len(prefix):]:
        prefixes.add(prefix + name[len(prefix):].partition(delimiter)[0] + delimiter)
      else:
        items.append(name)
    page = items[:min(int(query.get('maxResults', _PAGE)), _PAGE)]
    found = {'kind': 'storage#objects', 'items': [gone.get(name) or self._item(bucket, name) for name in page],
             'prefixes': sorted(prefixes)}
    if len(page) < len(items):
      found['nextPageToken'] = page[-1]
    return _json(found)

  def _upload(self, method, bucket, query, headers, body) -> tuple[int, dict, bytes]:
    kind = query.get('uploadType')
    if not (self.folder / bucket).is_dir():
      return _missing()
    if 'upload_id' in query:
      if query['upload_id'] not in self._uploads:
        return _missing()
      _, name, content = self._uploads[query['upload_id']]
      if query['upload_id'] in self._finished:  # asked again, because the answer was lost
        return _json(self._item(bucket, name))
      match = re.fullmatch(r'bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)', headers.get('content-range', ''))
      if match and match[1]:
        del content[int(match[1]):]
      content += body
      if match and match[3] == '*':
        return 308, {'range': f'bytes=0-{len(content) - 1}'} if content else {}, b''
      self._finished.add(query['upload_id'])
      return self._store(bucket, name, bytes(content), query)
    if kind == 'media':
      return self._store(bucket, query['name'], body, query)
    if kind == 'multipart':
      head = f'content-type: {headers["content-type"]}\n\n'.encode()
      message = email.parser.BytesParser().parsebytes(head + body)
      about, content = message.get_payload()
      return self._store(bucket, json.loads(about.get_payload())['name'], content.get_payload(decode=True), query)
    upload = str(len(self._uploads) + self._random.randrange(10**9))
    self._uploads[upload] = bucket, query.get('name') or json.loads(body)['name'], bytearray()
    place = f'{self.endpoint}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={upload}'
    return 200, {'location': place}, b''

  def _store(self, bucket: str, name: str, content: bytes, query: dict[str, str]) -> tuple[int, dict, bytes]:
    item = self._item(bucket, name)
    if (wanted := query.get('ifGenerationMatch')) is not None and wanted != (item['generation'] if item else '0'):
      return 412, {}, b'{}'
    path = self._path(bucket, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = self.folder / f'.{self._random.randrange(10**12)}'
    temporary.write_bytes(content)
    temporary.replace(path)
    return _json(self._item(bucket, name))


def _json(value: Any, status: int = 200) -> tuple[int, dict, bytes]:
  return status, {'content-type': 'application/json; charset=UTF-8'}, json.dumps(value).encode()


def _missing() -> tuple[int, dict, bytes]:
  return _json({'error': {'code': 404, 'message': 'Not Found', 'errors': [{'reason': 'notFound'}]}}, 404)


class _Connection(asyncio.Protocol):
  """A connection over HTTP/1.1. It stays open after a request, and serves one request after the other."""

  def __init__(self, bucket: Bucket):
    self.bucket, self.received, self.queue = bucket, bytearray(), None

  def connection_made(self, transport):
    self.transport = transport
    self.queue = asyncio.Queue()
    self.worker = asyncio.get_running_loop().create_task(self._serve())

  def connection_lost(self, _):
    self.worker.cancel()

  def data_received(self, data: bytes) -> None:
    self.received += data
    while (request := self._parse()) is not None:
      self.queue.put_nowait(request)

  def _parse(self):
    end = self.received.find(b'\r\n\r\n')
    if end < 0:
      return None
    first, *lines = self.received[:end].decode('latin1').split('\r\n')
    method, target, _ = first.split(' ')
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(':') for line in lines)}
    if headers.get('transfer-encoding') == 'chunked':
      body, at = bytearray(), end + 4
      while (line_end := self.received.find(b'\r\n', at)) >= 0:
        size = int(self.received[at:line_end], 16)
        if len(self.received) < line_end + 4 + size:
          return None
        body += self.received[line_end + 2:line_end + 2 + size]
        at = line_end + 4 + size
        if not size:
          del self.received[:at]
          return method, target, headers, bytes(body)
      return None
    size = int(headers.get('content-length', 0))
    if headers.get('expect') and len(self.received) == end + 4 and size:
      self.transport.write(b'HTTP/1.1 100 Continue\r\n\r\n')
    if len(self.received) < end + 4 + size:
      return None
    body = bytes(self.received[end + 4:end + 4 + size])
    del self.received[:end + 4 + size]
    return method, target, headers, body

  async def _serve(self) -> None:
    while True:
      request = await self.queue.get()
      bucket = self.bucket
      bucket.in_flight += 1
      bucket.busiest = max(bucket.busiest, bucket.in_flight)
      try:
        await self._answer(bucket, *request)
      finally:
        bucket.in_flight -= 1

  async def _answer(self, bucket: Bucket, method: str, target: str, headers: dict[str, str], body: bytes) -> None:
    if target != _CONTROL:
      bucket.struck += bucket.latency_s > 0
      await asyncio.sleep(bucket.latency_s)
      if bucket.unlucky('hang', method, target):
        bucket.requests[method, 'hang'] += 1
        await asyncio.sleep(3600)
    if target != _CONTROL and bucket.unlucky('error', method, target):
      status, out, content = bucket._random.choice(bucket.error_statuses), {}, b''
      _, _, content = _json({'error': {'code': status, 'message': _REASONS.get(status, 'made to fail')}})
    else:
      status, out, content = bucket.answer(method, target, headers, body)
      if method != 'GET' and target != _CONTROL and bucket.unlucky('lost', method, target):
        bucket.requests[method, 'lost'] += 1
        self.transport.abort()
        return
    if target != _CONTROL:
      bucket.requests[method, status] += 1
    download = method == 'GET' and status in (200, 206) and 'x-goog-generation' in out
    out = {'content-length': str(len(content)), 'date': 'Thu, 01 Jan 2026 00:00:00 GMT', **out}
    head = ''.join(f'{name}: {value}\r\n' for name, value in out.items())
    head = f'HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n{head}\r\n'.encode('latin1')
    if method == 'HEAD':
      content = b''
    if download:
      bucket.largest_download = max(bucket.largest_download, len(content))
      if bucket.unlucky('truncate', method, target):
        bucket.requests[method, 'truncated'] += 1
        self.transport.write(head + content[:len(content) // 2])
        self.transport.close()
        return
    bucket.bytes_sent += len(content)
    if bucket.bytes_per_s and download:
      self.transport.write(head)
      for start in range(0, len(content), 2**16):
        self.transport.write(content[start:start + 2**16])
        await asyncio.sleep(min(2**16, len(content) - start) / bucket.bytes_per_s)
    else:
      self.transport.write(head + content)


def disturb(endpoint: str, **faults: float) -> dict[str, int]:
  """Sets the faults of the server at `endpoint`, and ends all others.

  Returns {'requests': the number of requests that it has answered, 'struck': how many of them a fault has hit}.
  """
  request = urllib.request.Request(endpoint + _CONTROL, json.dumps(faults).encode(), method='POST')
  with urllib.request.urlopen(request, timeout=60) as answer:
    return json.load(answer)


def register() -> None:
  """Makes `gs://` of fsspec and epath talk to the server whose address is in BUCKET_FOR_TESTS. gcsfs isn't used."""
  import fsspec
  from etils.epath import backend

  from tests.bucket_files import BucketFiles

  fsspec.register_implementation('gcs', BucketFiles, clobber=True)
  fsspec.register_implementation('gs', BucketFiles, clobber=True)
  backend.fsspec_backend._get_filesystem.cache_clear()


def unregister() -> None:
  """Makes `gs://` of fsspec and epath what it is without this server."""
  from etils.epath import backend

  for protocol in ('gcs', 'gs'):
    sys.modules['fsspec.registry']._registry.pop(protocol, None)
  backend.fsspec_backend._get_filesystem.cache_clear()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('folder')
  parser.add_argument('--port', type=int, default=0)
  parser.add_argument('--seed', type=int, default=0)
  for name, what in FAULTS.items():
    parser.add_argument(f'--{name}', type=float, default=0.0, help=what)
  asyncio.run(Bucket(**vars(parser.parse_args())).run())


if __name__ == '__main__':
  main()
