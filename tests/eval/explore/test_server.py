"""Tests that the server answers requests of its own page on this machine, and refuses all other requests."""

import http.client
import json
import threading
import urllib.parse

import pytest

from betarank.configs.errors import UserError
from betarank.eval.explore import page
from betarank.eval.explore.server import MOST_BYTES, Server

JSON = {'Content-Type': 'application/json'}


def fail(_):
  raise UserError('the reason,\nin words')


def crash(_):
  raise RuntimeError('out of memory, at /home/secret')


@pytest.fixture(scope='module')
def server():
  actions = {'echo': lambda request: request, 'fail': fail, 'broken': lambda request: request['missing'],
             'crash': crash, 'number': lambda request: float(request['x'])}
  with Server(page.served(), actions) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def ask(server):
  """Returns a function (method, path below the token, ...) -> (status, headers, content)."""
  place = urllib.parse.urlsplit(server.url)

  def ask(method, path, body=None, headers=None, root=place.path):
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
    connection.request(method, root + path, body, headers or {})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content
  return ask


def test_the_page_and_its_parts_are_served_with_a_strict_policy(ask):
  for name, kind in {'': 'text/html', 'page.css': 'text/css', 'page.js': 'text/javascript'}.items():
    status, headers, content = ask('GET', name)
    assert status == 200 and headers.get_content_type() == kind and len(content) > 1000
    assert "default-src 'none'" in headers['Content-Security-Policy']
    assert 'unsafe' not in headers['Content-Security-Policy'] and headers['X-Content-Type-Options'] == 'nosniff'
    assert b'http://' not in content.replace(b'http://www.w3.org/2000/svg', b'') and b'https://' not in content


def test_an_action_gets_json_and_answers_json(ask):
  assert json.loads(ask('POST', 'api/echo', '{"text": "\\u03b2"}', JSON)[2]) == {'text': 'β'}


def test_an_error_is_told_in_one_line_without_details(ask):
  status, _, content = ask('POST', 'api/fail', '{}', JSON)
  assert status == 400 and json.loads(content) == {'error': 'the reason, in words'}
  for action, body in (('broken', '{}'), ('echo', '{'), ('echo', '[' * 60_000), ('broken', '[]'), ('echo', b'\xff'),
                       ('number', '{"x": ' + '9' * 400 + '}')):
    status, _, content = ask('POST', f'api/{action}', body, JSON)
    assert status == 400 and json.loads(content) == {'error': 'not a request that the page makes'}


def test_a_computation_that_fails_is_shown_in_the_terminal_only(ask, capfd):
  status, _, content = ask('POST', 'api/crash', '{}', JSON)
  assert status == 500 and b'secret' not in content and 'secret' in capfd.readouterr().err
  assert ask('GET', '')[0] == 200


@pytest.mark.parametrize('status, method, path, headers', [
  (404, 'GET', 'page.html', {}), (404, 'GET', '../page.py', {}), (404, 'GET', '..%2fpage.py', {}),
  (404, 'GET', '/etc/passwd', {}), (404, 'GET', 'api/echo', {}), (404, 'POST', 'api/other', JSON),
  (404, 'POST', 'echo', JSON), (415, 'POST', 'api/echo', {}),
  (415, 'POST', 'api/echo', {'Content-Type': 'text/plain'}), (501, 'PUT', '', {}), (501, 'OPTIONS', 'api/echo', {}),
  (403, 'GET', '', {'Host': 'example.com'}), (403, 'GET', '', {'Host': '127.0.0.1.example.com:80'}),
  (403, 'POST', 'api/echo', {**JSON, 'Origin': 'http://example.com'}),
  (403, 'POST', 'api/echo', {**JSON, 'Sec-Fetch-Site': 'cross-site'}), (403, 'GET', '', {'Host': ''})])
def test_anything_else_is_refused(ask, status, method, path, headers):
  got, _, content = ask(method, path, '{}' if method == 'POST' else None, headers)
  assert got == status and b'passwd' not in content and b'root' not in content


@pytest.mark.parametrize('root', ['/', '/x/', '//', '', '/' + 'a' * 22 + '/'])
def test_without_the_token_there_is_nothing(ask, root):
  assert ask('GET', '', root=root or '*')[0] == 404
  assert ask('POST', 'api/echo', '{}', JSON, root=root or '*')[0] == 404


@pytest.mark.parametrize('status, length', [(413, str(MOST_BYTES + 1)), (413, '9' * 30), (411, '-1'), (411, 'many')])
def test_a_large_request_is_refused_before_it_is_read(ask, status, length):
  assert ask('POST', 'api/echo', None, {**JSON, 'Content-Length': length})[0] == status


def test_the_server_listens_on_this_machine_only(server):
  assert server.server_address[0] == '127.0.0.1' and len(server.token) >= 20
  with pytest.raises(OSError):
    Server({}, {}, server.server_address[1])
