"""A server that answers what gcloud asks of Google's TPU API and of the Compute API, from memory.

It answers the requests that launch/tpu.sh causes: create, describe and delete slices and queued resources, the update
that adds an ssh key, and the project's metadata. It isn't a model of Google's service: slices are READY at once.
"""

import http.server
import json
import pathlib
import re
import shutil
import threading
import urllib.parse

from tests.launch import stub_workers


class FakeTpu(http.server.ThreadingHTTPServer):
  """Serves on a free port of this machine until `close`.

  Attributes:
    requests: (method, path without query, parameters, body) of each request, in order.
    errors: [method, text of the path, HTTP code, status, message, how many times] of requests to refuse.
    outcome: the error of the operations that create something, such as {'code': 8, 'message': 'no capacity'}, which
      Google's service reports only after it has accepted the request.
    created_state: the state of new slices, e.g. 'READY'.
    failure: the message of queued resources whose slices are FAILED.
    workers: the number of workers of a new slice.
    stub: a folder. nodes/NAME/I is the home folder of worker I of a slice, addresses/ADDRESS has the path of one.
  """

  daemon_threads = True

  def __init__(self, stub: pathlib.Path, workers: int = 1):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.stub, self.workers = stub, workers
    self.requests, self.errors, self.nodes, self.queued, self.made = [], [], {}, {}, 0
    self.created_state, self.failure, self.outcome = 'READY', '', None
    (stub / 'addresses').mkdir()
    self.lock = threading.Lock()
    threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

  @property
  def settings(self) -> dict[str, str]:
    """The environment variables with which gcloud uses this server, without credentials."""
    url = f'http://127.0.0.1:{self.server_port}/'
    return {'CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU': url, 'CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE': url + 'compute/v1/',
            'CLOUDSDK_AUTH_DISABLE_CREDENTIALS': 'true', 'CLOUDSDK_CORE_DISABLE_USAGE_REPORTING': 'true',
            'CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK': 'true'}

  def close(self) -> None:
    self.shutdown()
    self.server_close()

  def verbs(self) -> list[str]:
    """Returns the requests that change something, such as 'POST nodes' and 'DELETE queuedResources/pod'."""
    return [f'{method} {path.partition("/locations/")[2].partition("/")[2]}' for method, path, _, _ in self.requests
            if method in ('POST', 'DELETE') and ':' not in path]

  def answer(self, method: str, path: str, parameters: dict[str, str], body: dict) -> tuple[int, dict]:
    """Returns the HTTP code and the body of the answer to one request."""
    with self.lock:
      self.requests.append((method, path, parameters, body))
      for rule in self.errors:
        if rule[0] == method and rule[1] in path and rule[5] > 0:
          rule[5] -= 1
          return _error(*rule[2:5])
      if path.startswith('/compute/'):
        return 200, {'name': 'my-project', 'commonInstanceMetadata': {'items': []}}
      match = re.fullmatch(r'/v2(?:alpha1)?/(projects/[^/]+/locations/[^/]+/)(\w+)(?:/([^:]+))?(?::(\w+))?', path)
      if not match:
        return _error(404, 'NOT_FOUND', f'unknown {path}')
      where, kind, name, action = match.groups()
      if kind == 'operations':
        verb, of, which = name.split('.')
        failed = self.outcome and verb == 'create'
        outcome = {'error': self.outcome} if failed else {'response': {'name': f'{where}{of}/{which}'}}
        return 200, {'name': f'{where}operations/{name}', 'done': True, **outcome}
      if action == 'getGuestAttributes':
        return _error(404, 'NOT_FOUND', 'no attributes')
      if kind == 'nodes':
        return self._node(method, where, name or parameters.get('nodeId', ''), body)
      if kind == 'queuedResources':
        return self._queued(method, where, name or parameters.get('queuedResourceId', ''), body)
      return _error(404, 'NOT_FOUND', f'unknown {path}')

  def _node(self, method: str, where: str, name: str, body: dict) -> tuple[int, dict]:
    if method == 'POST':
      if not self.outcome:
        self._make(where, name, body)
      return _operation(where, 'create.nodes', name)
    elif name not in self.nodes:
      return _error(404, 'NOT_FOUND', f"Resource '{where}nodes/{name}' was not found")
    elif method == 'DELETE':
      self.remove(name)
    elif method == 'PATCH':
      self.nodes[name]['metadata'] = body.get('metadata', {})
    else:
      return 200, self.nodes[name]
    return _operation(where, 'change.nodes', name)

  def _queued(self, method: str, where: str, name: str, body: dict) -> tuple[int, dict]:
    if method == 'POST':
      [spec] = body['tpu']['nodeSpec']
      many = spec.get('multisliceParams')
      names = ([f'{many["nodeIdPrefix"]}-{i}' for i in range(int(many['nodeCount']))] if many else [spec['nodeId']])
      if self.created_state == 'READY':
        for node in names:
          self._make(where, node, spec['node'])
      state = {'READY': 'ACTIVE'}.get(self.created_state, self.created_state)
      self.queued[name] = {'name': f'{where}queuedResources/{name}', 'tpu': body['tpu'], 'state': {'state': state},
                           'nodes': names}
      if state == 'FAILED':
        self.queued[name]['state']['failedData'] = {'error': {'code': 8, 'message': self.failure}}
      return _operation(where, 'create.queuedResources', name)
    elif name not in self.queued:
      return _error(404, 'NOT_FOUND', f"Resource '{where}queuedResources/{name}' was not found")
    elif method == 'DELETE':
      for node in self.queued.pop(name)['nodes']:
        self.remove(node)
    else:
      return 200, {key: value for key, value in self.queued[name].items() if key != 'nodes'}
    return _operation(where, 'change.queuedResources', name)

  def _make(self, where: str, name: str, node: dict) -> None:
    self.made += 1
    endpoints = []
    for i in range(self.workers):
      home, address = self.stub / 'nodes' / name / str(i), f'10.{self.made}.0.{i + 1}'
      home.mkdir(parents=True)
      (self.stub / 'addresses' / address).write_text(str(home))
      endpoints.append({'ipAddress': address, 'port': 8470})
    self.nodes[name] = {**node, 'name': f'{where}nodes/{name}', 'id': str(self.made), 'state': self.created_state,
                        'apiVersion': 'V2', 'health': 'HEALTHY', 'networkEndpoints': endpoints}

  def remove(self, name: str) -> None:
    if self.nodes.pop(name, None):
      stub_workers.end_sessions(self.stub / 'nodes' / name)
      shutil.rmtree(self.stub / 'nodes' / name)


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def _any(self):
    url = urllib.parse.urlsplit(self.path)
    parameters = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
    text = self.rfile.read(int(self.headers.get('Content-Length') or 0))
    code, body = self.server.answer(self.command, url.path, parameters, json.loads(text or '{}'))
    data = json.dumps(body).encode()
    self.send_response(code)
    self.send_header('Content-Type', 'application/json')
    self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  do_GET = do_POST = do_DELETE = do_PATCH = _any

  def log_message(self, *_):
    pass


def _operation(where: str, what: str, name: str) -> tuple[int, dict]:
  """An operation that isn't done yet, so gcloud asks for it again."""
  return 200, {'name': f'{where}operations/{what}.{name}', 'done': False}


def _error(code: int, status: str, message: str) -> tuple[int, dict]:
  return code, {'error': {'code': code, 'message': message, 'status': status}}
