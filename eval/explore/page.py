"""Builds the HTML page of `betarank explore` from the files in assets/.

The page consists of several files for the server, or of one file that shows a single text or problem.
"""

import base64
import hashlib
import json
import pathlib
import string
from collections.abc import Mapping
from typing import Any

ASSETS = pathlib.Path(__file__).parent / 'assets'
# Of the served page: its own files and its own server, and nothing else.
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def served() -> dict[str, tuple[str, bytes]]:
  """Returns the files of the page for the server: {path: (content type, content)}.

  A path is relative to Server.url. The path of the page itself is ''.
  """
  html = _fill('<link rel="stylesheet" href="page.css">', '<script src="page.js" defer></script>', '')
  return {'': ('text/html; charset=utf-8', html.encode()),
          'page.css': ('text/css; charset=utf-8', _asset('page.css').encode()),
          'page.js': ('text/javascript; charset=utf-8', _asset('page.js').encode())}


def exported(about: Mapping[str, Any], view: Mapping[str, Any]) -> str:
  """Returns the page as one HTML file that shows `view`. The file doesn't load any other file.

  about: the result of Explorer.about.
  view: the text or problem to show, as returned by the methods of Explorer (see views.py).
  """
  style, script = _asset('page.css'), _asset('page.js')
  policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:"
  data = json.dumps({'about': about, 'view': view}, ensure_ascii=False, allow_nan=False).replace('<', '\\u003c')
  return _fill(
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>',
    f'<script type="application/json" id="data">{data}</script>\n<script>{script}</script>', 'exported')


def _asset(name: str) -> str:
  return (ASSETS / name).read_text(encoding='utf-8')


def _fill(head: str, scripts: str, kind: str) -> str:
  return string.Template(_asset('page.html')).substitute(head=head, scripts=scripts, kind=kind)


def _hash(content: str) -> str:
  return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
