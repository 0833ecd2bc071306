"""The report's HTML: one page that asks for nothing, on a phone, on a screen and on paper.

Whatever comes from a file is escaped: `text` does it for all but `Html`, which only this project's own code makes.
The page has no script, and its policy forbids scripts and requests should anything get through.
"""

import html
import string
from collections.abc import Iterable, Sequence
from typing import Any


class Html(str):
  """Markup that is already safe."""


def text(value: Any) -> Html:
  """`value` as markup: escaped, with what can't be shown (control characters, lone surrogates) replaced."""
  if isinstance(value, Html):
    return value
  shown = ''.join(c if c in '\n\t' or (c.isprintable() and c not in _REORDER) else '\ufffd' for c in str(value))
  return Html(html.escape(shown))


_REORDER = '\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069'  # would turn the text around them


def join(parts: Iterable[Any], between: str = '') -> Html:
  return Html(between.join(text(part) for part in parts))


def tag(name: str, *inside: Any, **attributes: Any) -> Html:
  """tag('p', 'a < b', class_='note') -> <p class="note">a &lt; b</p>"""
  written = ''.join(f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items())
  return Html(f'<{name}{written}>{join(inside)}</{name}>')


def html_section(title: str, *inside: Any, id_: str) -> Html:
  return tag('section', tag('h2', title), *inside, id=id_)


def table(titles: Sequence[Any], rows: Iterable[Sequence[Any]], caption: Any = '', class_: str = '') -> Html:
  """A table in a box of its own that scrolls sideways; the first column stays. Empty without rows."""
  body = [tag('tr', tag('th', row[0], scope='row'), *(tag('td', cell) for cell in row[1:])) for row in rows]
  if not body:
    return Html('')
  head = tag('thead', tag('tr', *(tag('th', title, scope='col') for title in titles)))
  # The box takes focus, so that a keyboard can scroll it.
  shown = tag('table', *([tag('caption', caption)] if caption else []), head, tag('tbody', *body), class_=class_)
  return tag('div', shown, class_='scroll', tabindex='0', role='region', aria_label='table')


def details(summary: Any, *inside: Any) -> Html:
  return tag('details', tag('summary', summary), *inside)


def page(title: str, *body: Any) -> str:
  return _PAGE.substitute(title=text(title), style=_STYLE, body=join(body, '\n'))


_PAGE = string.Template('''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
''')

_STYLE = '''
:root { --ink: #1a1a1a; --soft: #595959; --line: #d4d4d4; --wash: #f5f5f2; --mark: #8a3b00; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; color: var(--ink); background: #fff; line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 1rem clamp(0.9rem, 3vw, 2.5rem) 4rem; }
h1 { font-size: clamp(1.35rem, 4vw, 1.9rem); line-height: 1.2; margin: 0.6rem 0 0.2rem; text-wrap: balance; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 0.6rem; padding-top: 0.5rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 0.4rem; }
p { max-width: 76ch; margin: 0.5rem 0; }
.soft, figcaption, caption { color: var(--soft); font-size: 0.875rem; }
.answer { background: var(--wash); border-left: 4px solid var(--ink); padding: 0.6rem 1.1rem; margin: 1.1rem 0; }
.answer p, .answer li { font-size: 1.05rem; max-width: 90ch; }
.answer ul { margin: 0.3rem 0 0.7rem; padding-left: 1.2rem; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.3rem 1.1rem; list-style: none; padding: 0; margin: 0.6rem 0; }
a { color: #004a80; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 0.7rem 0 1.1rem; border: 1px solid var(--line); border-radius: 4px; }
table { border-collapse: collapse; width: 100%; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0.45rem 0.7rem; position: sticky; left: 0; max-width: min(86vw, 110ch); }
th, td { padding: 0.4rem 0.7rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-top: 1px solid var(--line); }
thead th { border-top: 0; background: var(--wash); font-weight: 600; vertical-align: bottom; }
tbody th, thead th:first-child { text-align: left; position: sticky; left: 0; background: #fff; font-weight: 600;
  width: 11rem; min-width: 7.5rem; max-width: 42vw; white-space: normal; overflow-wrap: break-word; }
thead th:first-child { background: var(--wash); }
table.words thead th { text-align: left; }
table.words td { text-align: left; white-space: normal; min-width: 8rem; overflow-wrap: anywhere; }
.wrap { white-space: normal; overflow-wrap: break-word; display: inline-block; min-width: 14rem; text-align: left; }
td .range, th .range, td .delta { display: block; color: var(--soft); font-size: 0.8rem; font-weight: 400; }
td .delta { color: var(--ink); margin-top: 0.3rem; }
td .within { color: var(--soft); }
td .beyond { color: var(--mark); font-weight: 700; }
figure { margin: 1rem 0 1.6rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 0.9rem 1.4rem; }
.panels svg { width: 100%; height: auto; display: block; }
.panels svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif !important; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.3rem; list-style: none; margin: 0.5rem 0; padding: 0;
  font-size: 0.9rem; }
.legend li { overflow-wrap: anywhere; }
.swatch { width: 36px; height: 8px; vertical-align: middle; margin-right: 0.45rem; display: inline-block; }
details { margin: 0.6rem 0; font-size: 0.9rem; }
summary { cursor: pointer; color: #004a80; padding: 0.25rem 0; }
pre { background: var(--wash); padding: 0.7rem; overflow-x: auto; font-size: 0.8rem; line-height: 1.45;
  margin: 0.4rem 0; border-radius: 4px; }
pre.wrap { display: block; white-space: pre-wrap; overflow-wrap: anywhere; }
code { font-size: 0.85em; overflow-wrap: anywhere; }
ul.notes { padding-left: 1.1rem; max-width: 100ch; }
ul.notes li { overflow-wrap: anywhere; margin: 0.25rem 0; }
@page { margin: 15mm; }
@media print {
  main { max-width: none; padding: 0; }
  h2, h3, figcaption { break-after: avoid; }
  figure .panels > *, tr { break-inside: avoid; }
  details:not([open]) { display: none; }
  .panels { grid-template-columns: repeat(2, 1fr); }
  .scroll { overflow: visible; border: 0; }
  table { font-size: 0.68rem; }
  th, td { padding: 0.15rem 0.3rem; white-space: normal; }
  tbody th, thead th:first-child, caption { position: static; }
  nav { display: none; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
}
'''
