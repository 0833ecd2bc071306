"""Serves the page of `betarank explore` to this machine only.

The server listens on 127.0.0.1. It answers a request only if all of these are true: the Host header has a loopback
name, the request doesn't come from another web page, and the path begins with the server's random token. Only the URL
that the command prints contains this token. The Host header is checked because another web page could use a domain name
of its own that resolves to 127.0.0.1.

All other requests get a 4xx status before their body is read. The only paths that exist are those in Server's arguments
`files` and `actions`.
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
  """A server on 127.0.0.1. `serve_forever` answers requests until `shutdown` is called.

  Attributes:
    url: the page's address. Its path begins with a random secret, and requests without this secret are refused.
  """

  daemon_threads = True

  def __init__(
    self, files: Mapping[str, tuple[str, bytes]], actions: Mapping[str, Callable[[Any], Any]], port: int = 0,
  ):
    """Opens the port.

    Args:
      files: {path: (content type, content)}, for GET. A path is relative to `url`.
      actions: {name: function}, for POST to api/NAME. The function takes and returns JSON values. If it raises
        UserError, the page shows the message.
      port: the port to listen on; 0 means any free port.

    Raises:
      OSError: the port can't be opened, for example because it is in use.
    """
    self.files, self.actions, self.token = files, actions, secrets.token_urlsafe(16)
    super().__init__((ADDRESS, port), _Handler)
    self.url = f'http://{ADDRESS}:{self.server_address[1]}/{self.token}/'

  def handle_error(self, request, client_address):
    """Prints an error that occurred during a request, unless the browser has closed the connection or timed out."""
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
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
      return 400, {'error': 'not a request that the page makes'}
    except Exception:  # such as a device that is out of memory: the page stays up
      traceback.print_exc()
      return 500, {'error': 'the computation failed; the terminal shows why'}

  def _path(self):
    """Returns the path of the request, relative to Server.url.

    If the request isn't allowed, answers it with a 4xx status and returns None.
    """
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
    """Returns whether the request can come from this server's own page: False if its headers name another web page."""
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
    """Does nothing, so that requests aren't logged in the user's terminal."""
