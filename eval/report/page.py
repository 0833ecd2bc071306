"""Builds the HTML of the report: one page that loads no other file, for phones, screens and paper.

Everything that comes from a file is escaped. `text` escapes all values that aren't of type `Html`, which only
betarank's own code creates. The page has no scripts. As a second safeguard, its content security policy forbids scripts
and requests.
"""

import html
import string
from collections.abc import Iterable, Sequence
from typing import Any


class Html(str):
  """Markup that is already escaped, so it can be put into the page as it is."""


def text(value: Any) -> Html:
  """Returns `value` as escaped text. If it is Html, returns it unchanged.

  Characters that can't be shown or that would change the direction of text are replaced by U+FFFD.
  """
  if isinstance(value, Html):
    return value
  shown = ''.join(c if c in '\n\t' or (c.isprintable() and c not in _REORDER) else '\ufffd' for c in str(value))
  return Html(html.escape(shown))


_REORDER = '\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069'  # would change the direction of other text


def join(parts: Iterable[Any], between: str = '') -> Html:
  return Html(between.join(text(part) for part in parts))


def tag(name: str, *inside: Any, **attributes: Any) -> Html:
  """Returns an HTML element. Example: tag('p', 'a < b', class_='note') gives <p class="note">a &lt; b</p>."""
  written = ''.join(f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items())
  return Html(f'<{name}{written}>{join(inside)}</{name}>')


def html_section(title: str, *inside: Any, id_: str) -> Html:
  return tag('section', tag('h2', title), *inside, id=id_)


def table(titles: Sequence[str], rows: Iterable[Sequence[Any]], caption: Any = '', class_: str = '') -> Html:
  """Returns an HTML table; '' if there are no rows.

  On a narrow screen, each row becomes a card, in which every cell has its column title next to it.

  class_: the CSS class of the table.
  """
  body = [tag('tr', tag('th', row[0], scope='row'),
              *(tag('td', tag('div', cell), data_title=title) for title, cell in zip(titles[1:], row[1:])))
          for row in rows]
  if not body:
    return Html('')
  head = tag('thead', tag('tr', *(tag('th', title, scope='col') for title in titles)))
  shown = tag('table', *([tag('caption', caption)] if caption else []), head, tag('tbody', *body), class_=class_)
  # If the table is wider than the screen, its box scrolls. It can have the focus, so that a keyboard can scroll it.
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
main { max-width: 1400px; margin: 0 auto; padding: 1rem clamp(0.9rem, 3vw, 2.5rem) 4rem; }
h1 { font-size: clamp(1.35rem, 4vw, 1.9rem); line-height: 1.2; margin: 0.6rem 0 0.2rem; text-wrap: balance; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 0.6rem; padding-top: 0.5rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 0.4rem; }
p { max-width: 80ch; margin: 0.5rem 0; overflow-wrap: break-word; }
.soft, figcaption, caption { color: var(--soft); font-size: 0.875rem; }
figcaption { max-width: 100ch; }
.answer { background: var(--wash); border-left: 4px solid var(--ink); padding: 0.6rem 1.1rem; margin: 1.1rem 0; }
.answer p { font-size: 1.05rem; max-width: 100ch; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.3rem 1.1rem; list-style: none; padding: 0; margin: 0.6rem 0; }
a { color: #004a80; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 0.7rem 0 1.1rem; border: 1px solid var(--line); border-radius: 4px; }
table { border-collapse: collapse; width: 100%; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0.45rem 0.7rem; position: sticky; left: 0; max-width: min(86vw, 120ch); }
th, td { padding: 0.4rem 0.7rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-top: 1px solid var(--line); }
thead th { border-top: 0; background: var(--wash); font-weight: 600; vertical-align: bottom; white-space: normal;
  min-width: 5rem; overflow-wrap: break-word; }
tbody th, thead th:first-child { text-align: left; position: sticky; left: 0; background: #fff; font-weight: 600;
  width: 12rem; min-width: 7.5rem; max-width: 20rem; white-space: normal; overflow-wrap: anywhere; }
thead th:first-child { background: var(--wash); }
table.words thead th { text-align: left; }
table.words td { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 6rem; }
@media (min-width: 641px) { table.claims tbody th { min-width: 22rem; max-width: 30rem; } }
td .range, th .range, td .delta { display: block; color: var(--soft); font-size: 0.8rem; font-weight: 400; }
td .delta { color: var(--ink); margin-top: 0.3rem; }
td .within { color: var(--soft); }
td .why { white-space: normal; max-width: 22rem; margin-left: auto; }
.beyond { color: var(--mark); font-weight: 700; }
figure { margin: 1rem 0 1.6rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 0.9rem 1.4rem; }
.forest { grid-template-columns: repeat(auto-fill, minmax(min(100%, 270px), 1fr)); }
@media (min-width: 700px) and (max-width: 1280px) { .forest { grid-template-columns: repeat(2, minmax(0, 440px)); } }
.panels svg { width: 100%; max-width: 440px; height: auto; display: block; }
.panels svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif !important; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.3rem; list-style: none; margin: 0.5rem 0; padding: 0;
  font-size: 0.9rem; }
.legend li { overflow-wrap: anywhere; }
.swatch, .mark { vertical-align: middle; margin-right: 0.45rem; display: inline-block; width: 36px; height: 8px; }
.mark { width: 12px; height: 12px; }
details { margin: 0.6rem 0; font-size: 0.9rem; }
summary { cursor: pointer; color: #004a80; padding: 0.25rem 0; }
pre { background: var(--wash); padding: 0.7rem; overflow-x: auto; font-size: 0.8rem; line-height: 1.45;
  margin: 0.4rem 0; border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere; }
code { font-size: 0.85em; overflow-wrap: anywhere; }
ul.notes { padding-left: 1.1rem; max-width: 100ch; }
ul.notes li { overflow-wrap: anywhere; margin: 0.25rem 0; }
@media (max-width: 640px) {
  .scroll { border: 0; overflow: visible; }
  table, tbody, tr, caption { display: block; }
  caption { position: static; max-width: none; padding: 0 0 0.3rem; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tr { border: 1px solid var(--line); border-radius: 4px; margin-bottom: 0.7rem; overflow: hidden; }
  tbody th { display: block; position: static; width: auto; max-width: none; background: var(--wash); border: 0; }
  td, table.words td { display: flex; justify-content: space-between; gap: 1rem; text-align: right; min-width: 0;
    white-space: normal; }
  td::before { content: attr(data-title); color: var(--soft); text-align: left; flex: 0 0 38%;
    overflow-wrap: anywhere; }
  td > div { min-width: 0; }
}
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
}
'''
