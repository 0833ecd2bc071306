"""Tests that views of texts, documents and problems have what the page needs, and that errors say what can't be shown.
"""

import dataclasses
import html.parser
import json

import numpy as np
import pytest

from betarank.configs.errors import UserError
from betarank.eval.explore import command, page, views
from betarank.eval.explore.figures import figures
from betarank.eval.loaded import Sampling
from tests.eval.explore.conftest import FEW, TASK

TEXT = 'Question: 3 + 4?\nSolution: <b>7</b> ☃'


@pytest.fixture(scope='module')
def view(explorer):
  """Returns the view of a text, as the page gets it."""
  return json.loads(json.dumps(explorer.text(TEXT), allow_nan=False))


def test_a_text_is_its_tokens_with_what_each_model_predicts(view, explorer):
  prompt = view['prompt']
  texts = [prompt['texts'].get(str(i), view['vocabulary'][str(t)]) for i, t in enumerate(prompt['tokens'])]
  assert ''.join(texts) == TEXT and texts[-3:] == ['☃', '', '']  # the snowman is three tokens
  N = len(prompt['tokens'])
  a, b = prompt['figures']
  assert a != b and view['samples'] == [] and view['problem'] is None
  for f in (a, b):
    assert {name: len(values) for name, values in f.items()} == {
      'logp': N, 'rank': N, 'head': N, 'tail': N, 'entropy': N + 1, 'top': N + 1, 'top_logp': N + 1}
    assert {str(t) for row in f['top'] for t in row} | {str(t) for t in prompt['tokens']} <= view['vocabulary'].keys()


def test_figures_have_all_digits_that_the_page_shows(view, explorer):
  for shown, loaded in zip(view['prompt']['figures'], explorer.models):
    [exact] = figures(loaded, [view['prompt']['tokens']], explorer.top_k)
    for name in ('logp', 'entropy', 'head', 'tail', 'top_logp'):
      np.testing.assert_allclose(shown[name], getattr(exact, name), rtol=6e-6)


def test_an_answer_has_a_verdict_and_the_figures_of_both_models(problem, explorer):
  assert [s['by'] for s in problem['samples']] == [0, 0, 1, 1] and problem['problem']['reference']
  for shown in problem['samples']:
    assert shown['verdict'] in ('right', 'wrong', 'undecided') and 1 <= len(shown['tokens']) <= 8
    assert len(shown['figures']) == 2 and len(shown['figures'][0]['logp']) == len(shown['tokens'])
  text = explorer.text(problem['text'] + explorer.models[0].tokenizer.decode(problem['samples'][0]['tokens'][:4]))
  start = len(problem['prompt']['tokens'])
  np.testing.assert_allclose(text['prompt']['figures'][1]['entropy'][start:start + 2],
                             problem['samples'][0]['figures'][1]['entropy'][:2], rtol=1e-3)


def test_documents_are_those_of_the_validation_split(explorer):
  assert list(explorer.sources) == ['main'] and explorer.about()['sources']['main'] > 3
  whole = explorer.document('main', 2)
  assert 'Question' in whole['text'] and whole['note'] == ''


def test_problems_are_held_out_only_if_all_stages_left_them_out(models):
  """The last stage of the second model left out half of the questions, but an earlier one left out a tenth."""
  loaded = models[0]
  sources = {'main': {'uri': 'reasoning:chain_sum'}}

  def trained(last, before):
    meta = {**loaded.ref.meta, 'config': {**loaded.ref.meta['config'], 'data': {
      'sources': sources, 'held_out_fraction': last}}, 'inherited': {'held_out_fraction': before}}
    return loaded._replace(ref=dataclasses.replace(loaded.ref, meta=meta))

  share = lambda *models: views.open_tasks(models, 'reasoning:chain_sum').config.held_out_fraction
  assert share(trained(0.5, 1.0)) == 0.5 and share(trained(0.5, 1.0), trained(0.5, 0.1)) == 0.1
  assert share(trained(0.5, 1.0), trained(0.5, 0.0)) == 0.0


def test_a_document_that_is_cut_says_so(explorer, monkeypatch):
  [tokens] = explorer.sources['main'].read([2])
  monkeypatch.setattr(views, 'MOST_TOKENS', 16)
  view = explorer.document('main', 2)
  assert view['note'] == f'Only the first 8 of the {len(tokens)} tokens of this document are shown.'
  assert view['text'] == explorer.models[0].tokenizer.decode(tokens[:8].tolist())


@pytest.mark.parametrize('ask, words', [
  (lambda e: e.document('mian', 0), 'no source'), (lambda e: e.document('main', 10**9), 'documents 0 to'),
  (lambda e: e.problem(-1, 1, FEW), 'numbered 0 to'), (lambda e: e.problem(10**30, 1, FEW), 'numbered 0 to'),
  (lambda e: e.text('x ' * 5000), 'at most 2048 are shown'),
  (lambda e: e.text('x', 17, FEW), r'samples must be in \[0, 16\]'),
  (lambda e: e.text('x', 1, Sampling(max_new_tokens=10**6)), 'max_new_tokens must be at most'),
  (lambda e: dataclasses.replace(e, tasks=None).problem(0, 1, FEW), 'name a task with --task'),
  (lambda e: views.open_tasks(e.models, 'code:x.jsonl'), 'programs are not judged here'),
  (lambda e: views.open_tasks(e.models, 'sums'), '--task=sums: uri must be')])
def test_what_cannot_be_shown_is_one_line(explorer, ask, words):
  with pytest.raises(UserError, match=words):
    ask(explorer)


def test_models_are_named_by_what_differs(models):
  def other(loaded, objective, name='runs/a', rl=False, step=4):
    meta = {'config': {**loaded.ref.meta['config'], **({'rl': {}} if rl else {})}}
    ref = dataclasses.replace(loaded.ref, meta=meta, step=step)
    return loaded._replace(objective=objective, name=name, ref=ref)
  plain, shaped = other(models[0], 'CE'), other(models[0], 'β = -0.25')
  assert views.labels([plain, shaped]) == ['β = 0', 'β = -0.25']
  assert views.labels([shaped, other(models[0], 'β = -0.25', rl=True)]) == ['β = -0.25', 'β = -0.25 + RL']
  assert views.labels([shaped, other(models[0], 'β = -0.25', step=8)]) == ['β = -0.25, step 4', 'β = -0.25, step 8']
  assert views.labels([shaped, plain, other(models[0], 'β = -0.25', name='runs/b')]) == [
    'β = -0.25, a', 'β = 0', 'β = -0.25, b']
  tokenizer = type('T', (), {'sha256': 'other'})
  with pytest.raises(UserError, match='have different tokenizers'):
    views.check_same_tokens([plain, shaped._replace(tokenizer=tokenizer)])


class Parts(html.parser.HTMLParser):
  """Collects the tags of a page, and the addresses in its attributes."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.addresses = [], []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.addresses += [value for name, value in attributes if name in ('src', 'href', 'action', 'srcset')]


def test_an_export_is_one_file_that_requests_nothing(explorer, problem):
  hostile = {**problem, 'text': '</script><img src=x onerror=alert(1)><!--'}
  text = page.exported(explorer.about(), hostile)
  parts = Parts(text)
  assert 'img' not in parts.tags and parts.addresses == ['data:,'] and parts.tags.count('script') == 2
  assert "default-src 'none'" in text and 'unsafe' not in text
  start = text.index('id="data">') + len('id="data">')
  assert json.loads(text[start:text.index('</script>', start)])['view']['text'] == hostile['text']


@pytest.mark.parametrize('flags, words', [
  (['--export=x.html'], 'name what to show'), (['--text=x'], '--text is for --export'),
  (['--top_k=-1'], '--top_k must be'), (['--export=x.html', '--text=x', '--max_new_tokens=0'], '--max_new_tokens'),
  (['--export=x.html', '--text=x', '--problem=1'], 'name what to show'), ([], 'no checkpoint there')])
def test_a_command_that_cannot_be_is_one_line(tmp_path, flags, words):
  with pytest.raises(UserError, match=words):
    command.main([str(tmp_path), *flags])


def test_the_command_writes_a_view(models, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr('betarank.eval.loaded.load_model', lambda path, tokenizer: models['ab'.index(path)])
  out = tmp_path / 'view.html'
  command.main(['a', 'b', f'--task={TASK}', f'--export={out}', '--problem=0', '--samples=2', '--max_new_tokens=8'])
  assert '"verdict"' in out.read_text() and 'written' in capsys.readouterr().out
