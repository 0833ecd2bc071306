"""Serves the page to this machine only.

A request is answered if it comes to a loopback address under a loopback name (so that no page of the web reaches the
server by a name that it points here), and if its path begins with a random token that only the printed URL has.
Everything else gets 404, 403 or 413, before its body is read. Paths are looked up in a table; there are no others.
"""

import hmac
import http.server
import json
import secrets
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from betarank.configs.errors import UserError, one_line
from betarank.eval.explore.page import POLICY

ADDRESS = '127.0.0.1'
HOSTS = ('127.0.0.1', 'localhost')
MOST_BYTES = 64 * 1024  # of a request's body
_TIMEOUT_S = 30.0  # for a request to arrive
_HEADERS = {
  'Content-Security-Policy': POLICY, 'X-Content-Type-Options': 'nosniff', 'Referrer-Policy': 'no-referrer',
  'Cache-Control': 'no-store', 'Cross-Origin-Opener-Policy': 'same-origin',
  'Cross-Origin-Resource-Policy': 'same-origin', 'X-Frame-Options': 'DENY',
}


class Server(http.server.ThreadingHTTPServer):
  """A server on 127.0.0.1; `serve_forever` answers requests until `shutdown`.

  Attributes:
    url: the page's address, token included.
  """

  daemon_threads = True

  def __init__(
    self, files: Mapping[str, tuple[str, bytes]], actions: Mapping[str, Callable[[Any], Any]], port: int = 0,
  ):
    """Opens the port.

    Args:
      files: {path below the token: (content type, content)}, for GET.
      actions: {name: function}, for POST to api/NAME: JSON in, JSON out. A UserError of theirs is shown to the user.
      port: 0 for any that is free.

    Raises:
      OSError: the port is taken.
    """
    self.files, self.actions, self.token = files, actions, secrets.token_urlsafe(16)
    super().__init__((ADDRESS, port), _Handler)
    self.url = f'http://{ADDRESS}:{self.server_address[1]}/{self.token}/'

  def handle_error(self, request, client_address):
    """Says nothing of a browser that went away; other errors are shown."""
    if not isinstance(sys.exception(), ConnectionError | TimeoutError):
      super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
  server: Server
  timeout = _TIMEOUT_S
  server_version, sys_version = 'betarank', ''

  def do_GET(self):
    path = self._path()
    if path is None:
      return
    if path not in self.server.files:
      self._refuse(404)
      return
    self._answer(200, *self.server.files[path])

  def do_POST(self):
    path = self._path()
    if path is None:
      return
    action = self.server.actions.get(path.removeprefix('api/')) if path.startswith('api/') else None
    length = self.headers.get('Content-Length', '')
    if action is None:
      self._refuse(404)
    elif self.headers.get_content_type() != 'application/json':  # what a form of another page can't send
      self._refuse(415)
    elif not (length.isascii() and length.isdigit()):
      self._refuse(411)
    elif len(length) > 9 or int(length) > MOST_BYTES:
      self._refuse(413)
    else:
      self._json(*self._do(action, self.rfile.read(int(length))))

  def _do(self, action, body):
    try:
      return 200, action(json.loads(body))
    except UserError as error:
      return 400, {'error': one_line(error)}
    except (ValueError, TypeError, KeyError, RecursionError):
      return 400, {'error': 'not a request that the page makes'}
    except Exception:  # such as a device that is out of memory: the page stays up
      traceback.print_exc()
      return 500, {'error': 'the computation failed; the terminal shows why'}

  def _path(self):
    """Returns the path below the token; None, and an answer, for a request that has no right to one."""
    host, _, port = self.headers.get('Host', '').rpartition(':')
    if (host if port.isdigit() else self.headers.get('Host', '')) not in HOSTS or not self._from_here():
      self._refuse(403)
      return None
    _, token, *rest = [*self.path.split('/', 2), '']
    if not hmac.compare_digest(token.encode(), self.server.token.encode()) or self.path.count('/') < 2:
      self._refuse(404)
      return None
    return rest[0]

  def _from_here(self):
    """Returns False for a request that a browser says was made by another page."""
    origin = self.headers.get('Origin')
    return origin in (None, f'http://{self.headers.get("Host")}') and self.headers.get('Sec-Fetch-Site') in (
      None, 'none', 'same-origin')

  def _json(self, status, value):
    self._answer(status, 'application/json', json.dumps(value, allow_nan=False).encode())

  def _refuse(self, status):
    self.close_connection = True  # what else it sent isn't read
    self._answer(status, 'text/plain; charset=utf-8', b'no\n')

  def _answer(self, status, kind, content):
    self.send_response(status)
    for name, value in {**_HEADERS, 'Content-Type': kind, 'Content-Length': str(len(content))}.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(content)

  def log_message(self, *_):
    """Logs nothing: the terminal is the user's."""
