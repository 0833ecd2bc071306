"""Tests that the page shows the content of the runs, and says what is missing or odd, whatever the files contain."""

import errno
import html.parser
import json
import os
import re
import shutil
import subprocess
import time
import types

import numpy as np
import pytest
from etils import epath

from betarank.configs.errors import ConfigError
from betarank.eval.report import arms, command, curves, figures
from tests.eval import sweep
from tests.runs import BETARANK, environment

VOID = {'meta', 'link', 'br', 'path', 'use', 'rect', 'line', 'image', 'circle'}


class Page(html.parser.HTMLParser):
  """Parses a page. Checks that its tags are nested correctly, and keeps its text, tags, ids, and the addresses that it
  could load.
  """

  def __init__(self, source):
    super().__init__()
    self.stack, self.tags, self.text, self.links, self.ids = [], [], '', [], []
    self.feed(source)
    assert self.stack == []

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    if tag not in VOID:
      self.stack.append(tag)
    for name, value in attributes:
      assert not name.startswith('on'), f'an event handler: {name}'
      if name in ('src', 'href', 'xlink:href', 'action', 'data', 'poster'):
        self.links.append(value)
      self.ids += [value] if name == 'id' and tag in ('clippath', 'section') else []

  def handle_startendtag(self, tag, attributes):
    self.handle_starttag(tag, attributes)
    if tag not in VOID:
      self.stack.pop()

  def handle_endtag(self, tag):
    if tag not in VOID:
      assert self.stack.pop() == tag

  def handle_data(self, data):
    self.text += data


def made(root, **settings):
  """Writes the report of a sweep, and returns its page as a Page."""
  path = command.write_report(str(root), **settings)
  return Page(path.read_text())


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """Returns (root, Page) of a sweep of three arms with three seeds each. After RL, arm 1 is better than the others."""
  root = tmp_path_factory.mktemp('whole')
  sweep.make(root, arms=sweep.ARMS[:3], seeds=3, steps=60)
  return root, made(root)


def test_the_page_says_what_was_put_in(whole):
  root, page = whole
  assert 'β = -0.25 is better than CE on amc23 (+2' in page.text
  for title in ('Arms and settings', 'Training', 'The token distribution', 'RL as it went', 'Samples on benchmarks',
                'Runs, data and commands'):
    assert title in page.text
  assert 'betarank eval sample --checkpoint=' in page.text and '--config.eval.sample.samples=16' in page.text
  assert f'betarank rl --config={root}/rl/arm1-seed0/config.json' in page.text
  assert 'missing or odd' not in page.text
  seeds = (root / 'report' / 'tables' / 'seeds.csv').read_text().splitlines()
  assert {line.split(',')[5] for line in seeds[1:] if 'entropy_nats' in line} == {'0', '1', '2'}
  assert (root / 'report' / 'tables' / 'noise.csv').read_text().count('avg_at_n') > 5
  assert 'takes 7 to 9 % of the tail' in page.text and 'not measured' in page.text  # there is no such arm
  rows = (root / 'report' / 'tables' / 'settings.csv').read_text()
  assert rows.count('it is the baseline') == 2 and rows.count('yes, with CE') == 4 and 'no, with' not in rows


def test_a_forest_plot_has_every_arm_before_and_after_rl(whole):
  root, page = whole
  rows = (root / 'report' / 'figures' / 'forest_avg_at_n.csv').read_text().splitlines()
  assert rows[0] == 'arm,subject,when,difference,low,high,seeds'
  assert [row.split(',')[:3:2] for row in rows[1:]] == [
    ['β = -0.25', 'before RL'], ['β = -0.25', 'after RL'], ['β = 0.5', 'before RL'], ['β = 0.5', 'after RL']]
  before, after = (float(row.split(',')[3]) for row in rows[1:3])
  assert abs(before) < 0.06 and after == pytest.approx(0.25, abs=0.06)
  assert page.text.index('before RL') < page.text.index('Arms and settings')  # on the first screen


@pytest.mark.parametrize('dodge, apart', [(False, False), (True, True)])
def test_equal_curves_are_drawn_on_each_other_but_bars_of_pass_at_k_next_to_each_other(dodge, apart):
  drawn = []
  axis = types.SimpleNamespace(plot=lambda x, y, **_: drawn.append(list(x)), vlines=lambda *_, **__: None)
  x = np.array([1.0, 2.0, 4.0])
  panel = figures.Panel('name', 'title', 'k', [
    curves.Series(arm, x, x, x - 0.1, x + 0.1, 3) for arm in ('a', 'b')], x_scale='log', dodge=dodge)
  for i, series in enumerate(panel.series):
    figures._draw_line(axis, panel, series, i, i)
  assert (drawn[0] != drawn[1]) == apart and np.allclose(drawn, [x, x], rtol=0.12)


def test_data_device_speed_and_command_of_each_run_are_on_the_page(whole):
  root, page = whole
  assert f'betarank rl --config=mine.py --workdir={root}/rl/arm1-seed0' in page.text
  assert 'main dddddddddddd' in page.text and 'ffffffffffff' in page.text  # hashes of data and tokenizer
  assert 'reasoning:chain_sum bbbbbbbbbbbb' in page.text
  assert '4 x TPU v5e' in page.text and '10,000' in page.text and '2027-01-15 08:00 UTC' in page.text
  run = next(line for line in (root / 'report' / 'tables' / 'runs.csv').read_text().splitlines()
             if line.startswith('pre/arm0-seed0'))
  assert ',0:01:15,0:00:06,' in run and ',480,' in run  # 60 steps of 0.1 s, of 8 rows each, in a minute and a quarter


def test_what_a_run_did_not_record_is_said(tmp_path):
  sweep.make(tmp_path, arms=sweep.ARMS[:1], seeds=1)
  run = tmp_path / 'pre' / 'arm0-seed0'
  (run / 'run.json').unlink()
  meta = run / 'checkpoints' / '40' / 'meta' / 'metadata'
  meta.write_text(json.dumps(json.loads(meta.read_text()) | {'cursor': {}, 'tokenizer_sha256': ''}))
  made(tmp_path)
  row = next(line for line in (tmp_path / 'report' / 'tables' / 'runs.csv').read_text().splitlines()
             if line.startswith('pre/'))
  assert row.count('not recorded') == 6  # device, start, tokenizer, data, rows, command


def test_one_seed_has_no_mark_of_noise_anywhere(tmp_path):
  sweep.make(tmp_path, arms=sweep.ARMS[:2], seeds=1)
  text = made(tmp_path).text
  page, how = text[:text.rindex('How to read this')], text[text.rindex('How to read this'):]
  assert '▲' in how and not re.search('[▲▼]|beyond noise|within noise', page)
  assert 'no arm can be called better' in page and '(one seed)' in page


def test_scores_of_the_harness_and_the_papers_average_are_on_the_page(tmp_path):
  logic, general = {'arc_easy': 0.6, 'arc_challenge': 0.4, 'bbh_cot_fewshot': 0.2}, {'triviaqa': 0.3}
  for seed in (0, 1):
    for name, beta, more in (('ce', 0.0, 0.0), ('low', -0.25, 0.01 + 0.001 * seed)):
      path = tmp_path / f'{name}{seed}'
      sweep.run(path, objective={'beta': beta}, seed=seed, steps=20, entropy=1.0)
      sweep.harness(path, 20, {task: score + more for task, score in logic.items()})
      sweep.harness(path, 20, general)
  page = made(tmp_path)
  paper = [line.split(',') for line in (tmp_path / 'report' / 'tables' / 'paper.csv').read_text().splitlines()]
  scores = {row[2]: float(row[5]) for row in paper if row[3] == 'CE'}
  assert scores['logic'] == pytest.approx(0.4) and scores['triviaqa'] == 0.3
  assert 'overall' not in scores and 'general' not in scores  # not without all their benchmarks
  assert 'Not evaluated yet: mmlu, mmlu_pro, naturalquestions' in page.text
  assert '40.00' in page.text and 'Δ +1.05' in page.text
  assert 'bbh_cot_fewshot' in page.text and 'a_part_of_a_group' not in page.text


def test_the_page_requests_nothing_and_shows_every_figure(whole):
  root, page = whole
  assert not [link for link in page.links if not link.startswith(('#', 'figures/', 'data:,'))]
  source = (root / 'report' / 'report.html').read_text()
  assert not re.findall(r'@import|url\((?!#)', source)
  assert 'script' not in page.tags and 'img' not in page.tags
  assert len(page.ids) == len(set(page.ids))  # else one figure's clipping would hide another's curves
  names = [p.stem for p in (root / 'report' / 'figures').glob('*.svg')]
  assert len(names) == 4 + 6 + 6 + 5 + 2 and page.tags.count('figure') == 5
  for name in names:
    assert (root / 'report' / 'figures' / f'{name}.png').read_bytes().startswith(b'\x89PNG')
    assert (root / 'report' / 'figures' / f'{name}.csv').read_text().startswith('arm,')
  for link in page.links:
    assert not link.startswith('figures/') or (root / 'report' / link).exists()


HOSTILE = '</pre></svg><script>fetch("http://evil.example/")</script><img src=x onerror=alert(1)> $\\frac{1 "\'&\u202e'


def test_what_files_hold_is_never_markup(tmp_path):
  sweep.make(tmp_path, arms=sweep.ARMS[:1], seeds=1)
  path = tmp_path / '<b onload=alert(1)>run'
  sweep.run(path, objective={}, seed=0, steps=20, entropy=1.0)
  settings = json.loads((path / 'config.json').read_text())
  settings['objective']['form'] = HOSTILE
  settings['optimizer'][HOSTILE] = HOSTILE
  (path / 'config.json').write_text(json.dumps(settings))
  sweep.probe(path, 20, entropy=1.0, domain=HOSTILE)
  rng = np.random.default_rng(0)
  sweep.samples(path, 20, 'amc23', [0.5, 0.5], 4, rng, data_sha256=HOSTILE)
  lines = path / 'eval' / 'samples' / 'amc23' / '20.jsonl'
  lines.write_text(lines.read_text().replace('so it is ', json.dumps(HOSTILE)[1:-1]))
  about = lines.with_suffix('.json')
  about.write_text(json.dumps(json.loads(about.read_text()) | {'benchmark': HOSTILE}))
  sweep.write(path / 'samples.jsonl', json.dumps({'step': 20, 'prompt': HOSTILE, 'text': HOSTILE}) + '\n')
  page = made(tmp_path)
  assert not {'script', 'img', 'b'} & set(page.tags)
  assert 'evil.example' in page.text  # shown, as text
  assert '\u202e' not in page.text
  assert not [link for link in page.links if not link.startswith(('#', 'figures/', 'data:,'))]


def write_odd(root):
  """Writes a sweep in which files are damaged in every way that the report must handle.

  root/pre/arm0-seed0 and its RL run are intact.
  """
  sweep.make(root, arms=sweep.ARMS[:4], seeds=2)
  pre, rl = root / 'pre', root / 'rl'
  with open(pre / 'arm0-seed1' / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 41, "train/ce_na')
  (pre / 'arm1-seed0' / 'metrics.jsonl').write_bytes(
    b'{"step": 1, "train/ce_nats": NaN, "train/entropy_nats": Infinity}\n\xff\xfe garbage\n[1, 2]\nnull\n'
    b'{"step": "2", "train/ce_nats": 1}\n{"train/ce_nats": 1}\n'
    b'{"step": 3, "train/ce_nats": "low", "train/tail_mass": {}}\n'
    b'{"step": 4, "train/ce_nats": 1e999, "train/entropy_nats": 1' + b'0' * 400 + b'}\n' + b'[' * 100_000 + b'\n')
  (pre / 'arm1-seed1' / 'config.json').write_text('{"seed": 1, "objective"')
  (pre / 'arm2-seed0' / 'config.json').write_text('[]')
  (pre / 'arm2-seed1' / 'config.json').write_text(
    '{"seed": "one", "train": 3, "data": null, "objective": {"beta": []}}')
  (pre / 'arm3-seed0' / 'config.json').unlink()
  (pre / 'arm3-seed1' / 'metrics.jsonl').unlink()
  shutil.rmtree(rl / 'arm0-seed1')  # a missing run
  settings = json.loads((rl / 'arm0-seed0' / 'config.json').read_text())
  sweep.write(root / 'orphan' / 'config.json', json.dumps(settings | {'train': {'init_from': '/gone/run'}}))
  sweep.write(root / 'loop' / 'config.json', json.dumps(settings | {'train': {'init_from': str(root / 'loop')}}))
  sweep.write(root / 'half' / 'config.json', json.dumps(sweep.config(objective={'beta': 9}, seed=0, steps=99)))
  sweep.write(root / 'half' / 'metrics.jsonl', '{"step": 7, "train/ce_nats": 2.0}\n')
  sweep.write(root / 'half' / 'checkpoints' / '7' / 'meta' / 'metadata', 'not json')
  sweep.write(root / 'half' / 'checkpoints' / '7' / 'state' / 'x', '')
  probes = rl / 'arm0-seed0' / 'eval' / 'probe'
  for step, text in ((11, '{'), (12, '{"domains": []}'), (13, '{"domains": {"main": {"ce_nats": null, "rank_histogram":'
                     ' {"edges": [0, "a"], "counts": [null]}, "entropy_histogram": 3}}}')):
    sweep.write(probes / f'{step}.json', text)
  samples = rl / 'arm0-seed0' / 'eval' / 'samples'
  sweep.write(samples / 'amc23' / '11.jsonl', '{"problem": 0}\n{"problem": 0, "sample": 0, "verdict": "maybe", '
              '"group": 0, "tokens": 1, "finish": "stop"}\nnull\n')
  sweep.write(samples / 'amc23' / '11.json', 'nope')
  sweep.write(samples / 'aime24' / '5.json', '{"n": 4, "problems": 9}')
  sweep.write(samples / 'aime24' / '5.jsonl', '{"problem": 0, "sample": 0, "verdict": "undecided", "group": -1, '
              '"tokens": 1, "finish": "length"}\n')


def test_malformed_and_missing_things_are_said_not_raised(tmp_path):
  write_odd(tmp_path)
  page = made(tmp_path)
  for said in (
    'pre/arm0-seed1/metrics.jsonl: the last line is half written',
    'pre/arm1-seed0/metrics.jsonl: 4 malformed lines left out (line 2, 3, 4, 9)',
    'train/ce_nats is NaN or infinite at 2 steps, first at step 1',
    'pre/arm1-seed0: 2 lines of metrics.jsonl have no step',
    'pre/arm1-seed0: metrics.jsonl has values of train/tail_mass that are no numbers',
    'pre/arm1-seed1/config.json: not JSON', 'pre/arm2-seed0/config.json: no JSON object',
    'pre/arm3-seed0: no config.json', 'pre/arm3-seed1: no metrics.jsonl yet',
    'arm CE: no run with seed 1 in stage pre-training → RL',
    'orphan: its parent /gone/run was not found, so its arm is unknown',
    'half: unfinished: step 7 of 99', 'half: checkpoints/7: meta is missing or damaged',
    'rl/arm0-seed0/eval/probe/11.json: not JSON', 'rl/arm0-seed0/eval/probe/12.json: a probe without domains',
    "rl/arm0-seed0/eval/samples/amc23/11.jsonl: 2 samples left out: a sample has no 'sample'",
    'eval/samples/aime24/5.jsonl: 1 of 9 problems so far',
    'half: not probed yet, as others are', 'half: no samples on amc23 yet, as others have',
    '1 samples undecided',
  ):
    assert said in page.text, said


def test_a_folder_without_runs_is_refused_and_left_alone(tmp_path):
  (tmp_path / 'corpus.txt').write_text('text')
  for root, said in ((tmp_path, 'no run under it (a folder with config.json or metrics.jsonl)'),
                     (tmp_path / 'none', 'no such folder')):
    done = subprocess.run([*BETARANK, 'report', str(root)], capture_output=True, text=True, env=environment())
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == f'error: {root}: {said}'
  assert [path.name for path in tmp_path.iterdir()] == ['corpus.txt']
  with pytest.raises(ConfigError, match='no run under it'):
    command.write_report(str(tmp_path))


def test_runs_without_an_objective_or_alone_have_nothing_to_compare(tmp_path):
  sweep.write(tmp_path / 'a' / 'config.json', '{"seed": 0}')
  assert 'no run here with a known objective' in made(tmp_path).text
  sweep.run(tmp_path / 'b', objective={}, seed=0, steps=20, entropy=1.0)
  assert 'There is one arm only, CE' in made(tmp_path).text


def test_signs_in_rl_that_a_person_should_look_at_are_listed(tmp_path):
  sweep.make(tmp_path, arms=sweep.ARMS[:1], seeds=1, rl_steps=40)
  path = tmp_path / 'rl' / 'arm0-seed0' / 'metrics.jsonl'
  lines = [json.loads(line) | {'train/groups_learned_from': 0.0, 'train/truncated_share': 1.0, 'train/pass_rate': 0.0,
                               'train/entropy_nats': 0.001 if i > 20 else 1.0}
           for i, line in enumerate(path.read_text().splitlines())]
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  page = made(tmp_path)
  for said in ('no reward signal', 'every sample is truncated', 'the reward does not move', 'the entropy collapses'):
    assert f'rl/arm0-seed0: {said}' in page.text
  assert '4 things are missing or odd' in page.text


def test_a_watched_report_waits_for_a_folder_that_can_not_be_read(tmp_path, monkeypatch, capsys):
  results = iter([tmp_path / 'report.html', OSError(errno.EIO, 'the store failed (503)', 'gs://bucket/x'),
                  KeyboardInterrupt()])

  def write(*_):
    if isinstance(result := next(results), BaseException):
      raise result
    return result

  monkeypatch.setattr(command, 'write_report', write)
  monkeypatch.setattr(time, 'sleep', lambda _: None)
  with pytest.raises(KeyboardInterrupt):
    command.main([str(tmp_path), '--watch'])
  assert capsys.readouterr().err.endswith('gs://bucket/x: the store failed (503); tried again in 60 s\n')


def test_a_folder_that_can_not_be_read_is_noted(tmp_path, monkeypatch):
  sweep.make(tmp_path, arms=({},), seeds=1, steps=3, rl_steps=2, problems=2, n=2)
  (tmp_path / 'locked/inner').mkdir(parents=True)
  listed = os.listdir

  def refuse(path, *_):
    if str(path).endswith('locked'):
      raise PermissionError(errno.EACCES, 'Permission denied', str(path))
    return listed(path)

  monkeypatch.setattr(os, 'listdir', refuse)
  found = arms.read_sweep(epath.Path(tmp_path))
  assert len(found.runs) == 2
  told = 'locked: could not be read (Permission denied); its runs are left out'
  assert [note for note in found.notes if note.endswith(told)]


def test_a_watched_report_is_written_again_until_it_is_interrupted(tmp_path, monkeypatch):
  written = []

  def sleep(_):
    if len(written) == 3:
      raise KeyboardInterrupt
  monkeypatch.setattr(command, 'write_report', lambda *arguments: written.append(arguments))
  monkeypatch.setattr(time, 'sleep', sleep)
  with pytest.raises(KeyboardInterrupt):  # run_main turns it into one line and status 130
    command.main([str(tmp_path), '--watch'])
  assert [root for root, _ in written] == [str(tmp_path)] * 3


@pytest.mark.slow
def test_five_arms_three_seeds_ten_thousand_steps_in_half_a_minute(tmp_path):
  sweep.make(tmp_path, steps=10_000, rl_steps=1000, n=128, benchmarks=('amc23', 'aime24'))
  began = time.process_time()  # of this process alone: other work on the machine is none of it
  command.write_report(str(tmp_path))
  assert time.process_time() - began < 30


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('chromium'), reason='needs a browser')
def test_a_browser_prints_nothing_on_its_console(whole, tmp_path):
  """The page's security policy blocks all requests. A browser would report a blocked request on its console."""
  root, _ = whole
  frame = tmp_path / 'frame.html'
  for width in (390, 1440):  # a window has at least 500 pixels, a frame in it any number
    frame.write_text(f'<iframe style="border:0;width:{width}px;height:4000px" src="file://{root}/report/report.html">')
    done = subprocess.run(
      ['chromium', '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
       '--disable-background-networking', '--disable-component-update', '--enable-logging=stderr',
       f'--window-size={max(width, 500)},4000', f'--user-data-dir={tmp_path}/profile',
       f'--screenshot={tmp_path}/{width}.png', f'file://{frame}'],
      capture_output=True, text=True, timeout=120)
    assert (tmp_path / f'{width}.png').stat().st_size > 50_000
    assert 'CONSOLE' not in done.stderr


@pytest.mark.slow
def test_real_runs_of_every_stage_make_a_page_with_nothing_odd(tmp_path):
  """Checks the report on runs of `betarank train`, `rl` and `eval`. Other tests write the files of runs themselves."""
  source = '--config.data.sources.main.uri=reasoning:chain_sum'
  tiny, pre = f'tests/tiny.py:dir={tmp_path}/data', tmp_path / 'runs' / 'pre'

  def run(command, *arguments):
    done = subprocess.run([*BETARANK, command, *map(str, arguments)], capture_output=True, text=True,
                          env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout

  run('data', 'prepare', f'--config={tiny}', source)
  run('train', f'--config={tiny}', f'--workdir={pre}', source)
  run('rl', f'--config=tests/tiny_rl.py:init_from={pre}', '--config.rl.steps=2',
      f'--workdir={tmp_path}/runs/rl')
  for name in ('pre', 'rl'):
    run('eval', 'probe', f'--checkpoint={tmp_path}/runs/{name}', '--config.eval.probe.rows=8')
    run('eval', 'sample', f'--checkpoint={tmp_path}/runs/{name}', '--benchmark=reasoning:chain_sum?max_terms=2',
        *(f'--config.eval.sample.{x}' for x in ('samples=4', 'problems=5', 'max_new_tokens=8', 'decode_batch_size=4')))
  out = run('report', tmp_path / 'runs', f'--out={tmp_path}/page')
  assert out.strip() == f'report: {tmp_path}/page/report.html'
  page = Page((tmp_path / 'page' / 'report.html').read_text())
  assert 'missing or odd' not in page.text and 'There is one arm only, β = -0.25' in page.text
  names = {p.stem for p in (tmp_path / 'page' / 'figures').glob('*.png')}
  assert {'pre-training_ce_nats', 'pre-training_main_rank', 'pre-training_then_RL_main_coverage',
          'pre-training_then_RL_train_pass_rate', 'pre-training_then_RL_eval_held_out_avg_at_4'} <= names
  assert sum('pass_at_k' in name for name in names) == 2 and 'What RL changed' in page.text
