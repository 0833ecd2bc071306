"""Tests the page in a real browser: it shows every token, and what was predicted at the selected token.

The page sends requests only to its own server.
"""

import threading

import pytest

from betarank.eval.explore import command, page
from betarank.eval.explore.server import Server
from tests import browser as browsers

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
  not (browsers.CHROMIUM and browsers.DRIVER), reason='needs chromium and chromedriver')]
WIDTHS = (390, 1440)
TEXT = 'Question: What is 3 + 4?\nSolution: <img src="http://example.com/x"> 7'
FEW = '["samples", "max_new_tokens"].forEach((id) => document.getElementById(id).value = id == "samples" ? 2 : 8);'


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  with browsers.browser(tmp_path_factory.mktemp('profile')) as browser:
    yield browser


@pytest.fixture(scope='module')
def url(explorer):
  with Server(page.served(), command.actions(explorer)) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.url
    server.shutdown()


def shown(browser):
  """Returns the text of each panel, without the mark for the next token."""
  return browser.run('return [...document.querySelectorAll("#panels .tokens")].map('
                     '(box) => [...box.querySelectorAll(".t:not(.next)")].map((t) => t.textContent).join(""))')


def click(browser, selector):
  browser.run('document.querySelector(arguments[0]).click()', selector)


def requested(browser):
  return browser.run('return performance.getEntriesByType("resource").map((entry) => entry.name)')


def check_fits(browser):
  for width in WIDTHS:
    browser.resize(width)
    assert browser.run('return document.documentElement.scrollWidth') <= width


def test_a_text_is_shown_under_both_models_and_each_token_can_be_looked_into(browser, url, explorer):
  browser.open(url)
  browser.wait('return document.querySelectorAll("#panels .t").length')  # the first document
  browser.run('document.getElementById("text").value = arguments[0]', TEXT)
  click(browser, 'button.go')
  browser.wait('return document.querySelector("#panels").textContent.includes("example.com")')
  assert [text.replace('↵', '') for text in shown(browser)] == [TEXT, TEXT]  # as text, not as markup
  check_fits(browser)
  view = explorer.text(TEXT)
  underlined = browser.run('return [...document.querySelectorAll("#panels .panel:nth-child(2) .t:not(.next)")].map('
                           '(t) => Number(t.style.getPropertyValue("--ahead")) > 0)')  # where the second is sharper
  before, after = (f['entropy'] for f in view['prompt']['figures'])
  assert underlined == [x - y > 0.01 for x, y in zip(before, after)][:-1] and any(underlined)
  for at in (3, len(view['prompt']['tokens'])):  # a token, and what comes after the last one
    click(browser, f'#panels .panel:nth-child(2) .t[data-i="{at}"]')
    names = browser.run('return [...document.querySelectorAll("#inspector ol")].map((list) => '
                        '[...list.querySelectorAll("li:not(.far)")].map((row) => Number(row.dataset.token)))')
    assert names == [f['top'][at] for f in view['prompt']['figures']]
    check_fits(browser)
  click(browser, '#where')  # the differences in one panel, and a way back
  assert len(shown(browser)) == 1 and not browser.run('return document.getElementById("where")')
  click(browser, 'input[value=each]')
  for choice, panels in {'probability': 2, 'rank': 2, 'difference': 1, 'entropy': 1, 'each': 2}.items():
    click(browser, f'input[value={choice}]')
    assert len(shown(browser)) == panels
  click(browser, '.largest button')
  assert browser.run('return document.querySelectorAll(".t.chosen").length') == 2
  assert browser.messages() == [] and all(name.startswith(url) for name in requested(browser))


def test_answers_to_a_problem_are_shown_with_verdicts(browser, url):
  browser.open(url)
  browser.wait('return document.querySelectorAll("#panels .t").length')
  browser.run(FEW)
  click(browser, '#open-problem')
  browser.wait('return document.querySelectorAll(".sample").length == 4')
  assert browser.run('return document.querySelectorAll(".sample .badge").length') == 4
  click(browser, '.sample .t')
  assert browser.run('return document.querySelectorAll("#inspector ol").length') == 2
  check_fits(browser)
  browser.run('document.getElementById("document").value = 1e9')
  click(browser, '#open-document')
  browser.wait('return document.querySelector("#status.wrong")?.textContent.includes("documents 0 to")')
  [refused] = browser.messages()
  assert '400' in refused  # the request that was refused, and nothing else


def test_an_exported_view_needs_no_server(browser, explorer, problem, tmp_path):
  file = tmp_path / 'view.html'
  file.write_text(page.exported(explorer.about(), problem))
  browser.open(file.as_uri())
  assert [text.replace('↵', '') for text in shown(browser)] == [problem['text']] * 2
  click(browser, '.sample .t')
  assert browser.run('return document.querySelectorAll("#inspector ol").length') == 2
  check_fits(browser)
  assert browser.messages() == [] and requested(browser) == []
