"""Builds the page from the files in assets/: as several files for the server, or as one file that contains a view."""

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
  """Returns {path: (content type, content)} of the page's files. A path is relative to Server.url; '' is the page."""
  html = _fill('<link rel="stylesheet" href="page.css">', '<script src="page.js" defer></script>', '')
  return {'': ('text/html; charset=utf-8', html.encode()),
          'page.css': ('text/css; charset=utf-8', _asset('page.css').encode()),
          'page.js': ('text/javascript; charset=utf-8', _asset('page.js').encode())}


def exported(about: Mapping[str, Any], view: Mapping[str, Any]) -> str:
  """Returns the page as one HTML file that shows `view` and loads nothing else.

  about, view: the result of Explorer.about, and a view as described in views.py.
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
