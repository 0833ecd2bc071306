"""Tests the page in a real browser: it shows every token, and what was predicted at the selected token.

The page sends requests only to its own server.
"""

import dataclasses
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


@pytest.fixture(scope='module')
def exported(explorer, problem, tmp_path_factory):
  """Returns the address of an exported view of two models."""
  file = tmp_path_factory.mktemp('exported') / 'view.html'
  file.write_text(page.exported(explorer.about(), {**problem, 'note': 'Only a part is shown.'}))
  return file.as_uri()


def test_the_page_of_one_model_shows_everything(browser, explorer, tmp_path):
  one = dataclasses.replace(explorer, models=explorer.models[:1])
  file = tmp_path / 'view.html'
  file.write_text(page.exported(one.about(), one.text(TEXT)))
  browser.open(file.as_uri())
  for choice in ('probability', 'rank', 'entropy'):
    click(browser, f'input[value={choice}]')
    assert [text.replace('↵', '') for text in shown(browser)] == [TEXT]
    assert browser.run('return document.querySelectorAll("#scale .ticks span").length') == 5
    assert choice in browser.run('return document.querySelector("figcaption").textContent').replace('surprise', choice)
  click(browser, '#panels .t')
  assert browser.run('return document.querySelectorAll("#inspector ol").length') == 1
  assert browser.messages() == []


class Slow:
  """The actions of an explorer, whose answers wait until `go` is set. `requests` are the names of all requests."""

  def __init__(self, explorer):
    self.go, self.requests = threading.Event(), []
    self.actions = {name: self._slow(name, action) for name, action in command.actions(explorer).items()}

  def _slow(self, name, action):
    def answer(request):
      self.requests.append(name)
      assert name == 'about' or self.go.wait(60)
      return action(request)
    return answer


@pytest.fixture
def slow(browser, explorer):
  """Opens a page whose first document isn't answered yet. Yields its server's actions, as Slow."""
  slow = Slow(explorer)
  with Server(page.served(), slow.actions) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser.open(server.url)
    browser.wait('return document.getElementById("status").textContent.startsWith("computing")')
    yield slow
    slow.go.set()
    server.shutdown()


def focus(browser, selector):
  browser.run('document.querySelector(arguments[0]).focus()', selector)


def text_field(browser):
  return browser.run('return document.getElementById("text").value')


def answered(browser):
  browser.wait('return document.getElementById("status").textContent == ""')


def test_what_is_typed_during_a_request_is_kept_and_sends_no_second_one(browser, slow):
  focus(browser, '#text')
  for key in 'ab':
    browser.press(key)
  browser.press('Control', 'Enter')
  slow.go.set()
  browser.wait('return document.querySelectorAll("#panels .t").length')
  answered(browser)
  assert text_field(browser) == 'ab' and slow.requests == ['about', 'document']
  slow.go.clear()
  browser.press('Control', 'Enter')
  browser.press('c')
  slow.go.set()
  answered(browser)
  assert text_field(browser) == 'abc' and shown(browser) == ['ab', 'ab'] and slow.requests[2:] == ['text']
  click(browser, '#open-document')
  browser.wait('return document.getElementById("text").value.includes("Question")')  # unchanged since the request


def test_enter_presses_the_button_of_its_field(browser, slow):
  slow.go.set()
  answered(browser)
  browser.run('document.querySelector("details").open = true')
  browser.run(FEW)
  for field, name in {'document': 'document', 'problem': 'problem', 'seed': 'continue'}.items():
    focus(browser, f'#{field}')
    browser.press('Enter')
    answered(browser)
    assert slow.requests[-1] == name
  assert slow.requests.count('text') == 0


def test_look_does_not_depend_on_the_fields_of_sampling(browser, slow):
  slow.go.set()
  answered(browser)
  browser.run('[["temperature", 0.75], ["top_p", 0.99]].forEach(([id, x]) => document.getElementById(id).value = x)')
  click(browser, 'button.go')
  answered(browser)
  assert slow.requests[-1] == 'text'


def inspected(browser):
  return browser.run('return document.querySelector("#panels .t.chosen")?.dataset.i ?? null')


def test_keys_choose_tokens_and_the_focus_stays(browser, exported):
  browser.open(exported)
  click(browser, '#panels .t[data-i="3"]')
  for by, at in ((2, '4'), (2, '5'), (1, '4')):
    focus(browser, f'#inspector .buttons button:nth-child({by})')
    browser.press('Enter')
    assert inspected(browser) == at
    assert browser.run('return [...document.querySelectorAll("#inspector .buttons button")].indexOf('
                       'document.activeElement)') == by - 1
  browser.press('Right')
  assert inspected(browser) == '5'
  for modifier in ('Shift', 'Control'):
    browser.press(modifier, 'Right')
    assert inspected(browser) == '5'
  focus(browser, 'input[value=entropy]')
  browser.press('Escape')
  assert inspected(browser) is None and browser.run('return document.getElementById("inspector").hidden')


@pytest.mark.parametrize('measure, places', [
  ('entropy', {'0.2': 0.166, '0.8': 0.381, '2': 0.660}), ('probability', {'50 %': 0.200, '10 %': 0.463, '1 %': 0.753}),
  ('rank', {'4': 0.342, '20': 0.634, '60': 0.814})])
def test_a_label_of_the_scale_is_where_its_colour_is(browser, exported, measure, places):
  browser.open(exported)
  click(browser, f'input[value={measure}]')
  found = browser.run('const ramp = document.querySelector("#scale .ramp").getBoundingClientRect();'
                      'return Object.fromEntries([...document.querySelectorAll("#scale .ticks span")].map((tick) => {'
                      '  const box = tick.getBoundingClientRect();'
                      '  return [tick.textContent, ((box.left + box.right) / 2 - ramp.left) / ramp.width]; }))')
  assert {text: found[text] for text in places} == pytest.approx(places, abs=0.01)


def test_differences_have_the_unit_of_their_measure(browser, exported):
  browser.open(exported)
  units = {'entropy': ('nat', 'factor'), 'probability': ('nat', 'factor'), 'rank': ('factor', 'nat')}
  for measure, (unit, other) in units.items():
    for compare in ('each', 'difference'):
      click(browser, f'input[value={measure}]')
      click(browser, f'input[value={compare}]')
      texts = browser.run('return [...document.querySelectorAll("#verdict p.soft, figcaption")].map('
                          '(node) => node.textContent).join(" ")')
      assert unit in texts and f' {other}' not in texts, (measure, compare)


def test_the_note_is_shown_and_restored_choices_count(browser, explorer, problem, exported, tmp_path):
  browser.open(exported)
  assert browser.run('return document.querySelector("#verdict .note").textContent') == 'Only a part is shown.'
  text = page.exported(explorer.about(), problem).replace('value="entropy" checked', 'value="entropy"')
  file = tmp_path / 'view.html'  # as a browser restores it
  file.write_text(text.replace('value="rank"', 'value="rank" checked').replace('value="each" checked', 'value="each"')
                  .replace('value="difference"', 'value="difference" checked'))
  browser.open(file.as_uri())
  assert len(shown(browser)) == 1
  assert 'rank' in browser.run('return document.querySelector("#verdict p.soft").textContent')
