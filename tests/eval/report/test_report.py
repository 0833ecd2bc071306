"""The report says what was put into the runs, and says what is missing or odd, whatever the files hold."""

import html.parser
import json
import re
import shutil
import subprocess
import time

import numpy as np
import pytest

from betarank.eval.report import arms, command, comparisons
from tests.eval import sweep
from tests.runs import BETARANK, environment

VOID = {'meta', 'link', 'br', 'path', 'use', 'rect', 'line', 'image'}


class Page(html.parser.HTMLParser):
  """Checks that tags nest; keeps the text, the tags, and what attributes could fetch."""

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
  """The page of a sweep, parsed."""
  path = command.write_report(str(root), **settings)
  return Page(path.read_text())


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """Three arms, two seeds; arm 1 is better after RL."""
  root = tmp_path_factory.mktemp('whole')
  sweep.make(root, arms=sweep.ARMS[:3], seeds=3, steps=60)
  return root, made(root)


def test_the_page_says_what_was_put_in(whole):
  root, page = whole
  assert 'β = -0.25 Avg@n on amc23 +2' in page.text and 'beyond noise' in page.text
  assert 'β = 0.5 Avg@n on amc23' not in page.text  # no better: not in the answer
  for title in ('Arms and settings', 'Training', 'The token distribution', 'RL as it went', 'Samples on benchmarks',
                'Runs and lineage'):
    assert title in page.text
  assert 'betarank eval sample --checkpoint=' in page.text and '--config.eval.sample.samples=16' in page.text
  assert f'betarank rl --config={root}/rl/arm1-seed0/config.json' in page.text
  assert 'missing or odd' not in page.text
  rows = (root / 'report' / 'tables' / 'settings.csv').read_text()
  assert rows.count('matched') == 6 and 'differs' not in rows


def test_the_page_asks_for_nothing_and_shows_every_figure(whole):
  root, page = whole
  assert not [link for link in page.links if not link.startswith(('#', 'figures/', 'data:,'))]
  source = (root / 'report' / 'report.html').read_text()
  assert not re.findall(r'@import|url\((?!#)', source)
  assert 'script' not in page.tags and 'img' not in page.tags
  assert len(page.ids) == len(set(page.ids))  # else one figure's clipping would hide another's curves
  names = [p.stem for p in (root / 'report' / 'figures').glob('*.svg')]
  assert len(names) == 6 + 6 + 5 + 2 and page.tags.count('figure') == 4
  for name in names:
    assert (root / 'report' / 'figures' / f'{name}.png').read_bytes().startswith(b'\x89PNG')
    assert (root / 'report' / 'figures' / f'{name}.csv').read_text().startswith('arm,x,mean,low,high,seeds\n')
  for link in page.links:
    assert not link.startswith('figures/') or (root / 'report' / link).exists()


def test_differences_are_paired_and_corrected(whole):
  found = {(c.stage, c.metric, c.arm): c for c in comparisons.benchmarks(arms.read_sweep(whole[0]), k=8)}
  after = {arm: found['pre-training → RL', 'avg_at_n', arm] for arm in ('CE', 'β = -0.25', 'β = 0.5')}
  assert after['β = -0.25'].verdict == 'beyond' and after['β = -0.25'].difference.mean == pytest.approx(0.25, abs=0.06)
  assert after['β = 0.5'].verdict == 'within' and after['CE'].difference is None
  better = after['β = -0.25']
  assert better.difference.mean == pytest.approx(better.value.mean - after['CE'].value.mean)
  assert better.difference.high - better.difference.low < (better.value.high - better.value.low) / 2
  assert better.p_holm >= better.difference.p_value
  assert found['pre-training', 'avg_at_n', 'β = -0.25'].verdict == 'within'
  gains = {(c.metric, c.arm): c for c in comparisons.gains(arms.read_sweep(whole[0]), k=8)}
  assert gains['avg_at_n', 'β = -0.25'].verdict == 'beyond' and gains['avg_at_n', 'CE'].verdict == 'within'


def test_curves_are_means_over_seeds_of_means_over_bins(tmp_path):
  for seed, values in ((0, [1.0, 3.0]), (1, [3.0, 5.0])):
    path = tmp_path / str(seed)
    sweep.write(path / 'config.json', json.dumps(sweep.config(objective={}, seed=seed, steps=2)))
    sweep.write(path / 'metrics.jsonl', ''.join(json.dumps({'step': i + 1, 'train/x': v}) + '\n'
                                                for i, v in enumerate(values)))
  series, = comparisons.curve(arms.read_sweep(tmp_path), 'pre-training', 'train/x')
  assert series.x_X.tolist() == [1, 2] and series.mean_X.tolist() == [2, 4]
  assert series.low_X.tolist() == [1, 3] and series.high_X.tolist() == [3, 5]
  values, x = np.array([7.0, 1, 4, 5, np.nan, np.inf]), np.array([2.0, 4, 6])
  np.testing.assert_allclose(comparisons._binned(np.arange(6), values, x), [4, 5, np.nan])


@pytest.mark.parametrize(('objective', 'name'), [
  ({}, 'CE'), ({'beta': -0.25}, 'β = -0.25'), ({'lambda_tail': -0.1}, 'λ̂ = -0.1'),
  ({'lambda_tail': -0.1, 'top_k': 50}, 'λ̂ = -0.1, k = 50'), ({'top_k': 50}, 'CE'),
  ({'beta': 1, 'form': 'product'}, 'β = 1, form = product'),
])
def test_arms_are_named_by_what_differs_from_cross_entropy(objective, name):
  assert arms.label(sweep.config(objective=objective, seed=0, steps=1)['objective']) == name


def test_another_setting_makes_another_arm_and_unequal_tokens_are_flagged(tmp_path):
  for name, lr, steps in (('a', 3e-4, 20), ('b', 1e-3, 20), ('c', 3e-4, 30)):
    sweep.run(tmp_path / name, objective={'beta': -0.25 * (name == 'c')}, seed=0, steps=steps, entropy=1.0)
    settings = json.loads((tmp_path / name / 'config.json').read_text())
    settings['optimizer']['lr'] = lr
    (tmp_path / name / 'config.json').write_text(json.dumps(settings))
  page = made(tmp_path)
  assert 'CE, lr = 0.0003' in page.text and 'CE, lr = 0.001' in page.text
  assert 'optimizer.lr 0.001 against 0.0003' in page.text
  assert 'step 30 against 20' in page.text and 'noise unknown' in page.text


def test_samples_drawn_otherwise_are_not_compared(tmp_path):
  sweep.make(tmp_path, arms=sweep.ARMS[:2], seeds=1)
  settings = tmp_path / 'rl' / 'arm1-seed0' / 'eval' / 'samples' / 'amc23' / '10.json'
  settings.write_text(json.dumps(json.loads(settings.read_text()) | {'temperature': 1.0}))
  found = {(c.stage, c.arm): c for c in comparisons.benchmarks(arms.read_sweep(tmp_path), k=8)}
  after = found['pre-training → RL', 'β = -0.25']
  assert after.remark == 'not comparable with CE: temperature differ' and after.difference is None
  assert found['pre-training', 'β = -0.25'].difference is not None


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
  """One of everything that can be wrong; root/pre/arm0-seed0 and its RL run stay whole."""
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


def test_nothing_at_all_and_no_folder(tmp_path):
  page = made(tmp_path)
  assert 'nothing to compare yet' in page.text and 'no run found' in page.text
  done = subprocess.run([*BETARANK, 'report', str(tmp_path / 'none')], capture_output=True, text=True)
  assert done.returncode == 2 and done.stderr.splitlines()[-1] == f'error: {tmp_path}/none: no such folder'


def test_a_moved_sweep_still_finds_its_parents(tmp_path):
  sweep.make(tmp_path / 'here', arms=sweep.ARMS[:2], seeds=1)
  shutil.move(tmp_path / 'here', tmp_path / 'there')
  found = arms.read_sweep(tmp_path / 'there')
  assert {run.name: run.parent.name for run in found.runs if run.is_rl} == {
    'rl/arm0-seed0': 'pre/arm0-seed0', 'rl/arm1-seed0': 'pre/arm1-seed0'}
  # The parents lie beside, where the config doesn't say; runs of the same name are not taken for them.
  (tmp_path / 'there' / 'rl' / 'again').mkdir()
  shutil.copytree(tmp_path / 'there' / 'rl' / 'arm0-seed0', tmp_path / 'there' / 'rl' / 'again' / 'arm0-seed0')
  alone = arms.read_sweep(tmp_path / 'there' / 'rl')
  assert all('unknown' in run.arm for run in alone.runs) and len(alone.notes) >= 3


def test_a_parent_beside_the_sweep_names_the_arm(tmp_path):
  sweep.make(tmp_path, arms=sweep.ARMS[1:2], seeds=1)
  found = arms.read_sweep(tmp_path / 'rl')
  assert [(run.arm, run.stage) for run in found.runs] == [('β = -0.25', 'pre-training → RL')] and not found.notes


@pytest.mark.slow
def test_five_arms_three_seeds_ten_thousand_steps_in_half_a_minute(tmp_path):
  sweep.make(tmp_path, steps=10_000, rl_steps=1000, n=128, benchmarks=('amc23', 'aime24'))
  began = time.process_time()  # of this process alone: other work on the machine is none of it
  command.write_report(str(tmp_path))
  assert time.process_time() - began < 30


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('chromium'), reason='needs a browser')
def test_a_browser_has_nothing_to_complain_of(whole, tmp_path):
  """The page's policy blocks whatever it would ask for, and a browser says so on its console: there must be nothing."""
  root, _ = whole
  for width in (500, 1440):
    done = subprocess.run(
      ['chromium', '--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr',
       f'--window-size={width},4000', f'--user-data-dir={tmp_path}/profile', f'--screenshot={tmp_path}/{width}.png',
       f'file://{root}/report/report.html'],
      capture_output=True, text=True, timeout=120)
    assert (tmp_path / f'{width}.png').stat().st_size > 50_000
    assert 'CONSOLE' not in done.stderr


@pytest.mark.slow
def test_real_runs_of_every_stage_make_a_page_with_nothing_odd(tmp_path):
  """What train, rl and eval really write is what the report reads."""
  source = '--config.data.sources.main.uri=reasoning:chain_sum'
  tiny, pre = f'tests/tiny.py:dir={tmp_path}/data', tmp_path / 'runs' / 'pre'

  def run(module, *arguments):
    done = subprocess.run([*BETARANK, module, *map(str, arguments)], capture_output=True, text=True,
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
  out = run('eval.report', tmp_path / 'runs', f'--out={tmp_path}/page')
  assert out.strip() == f'report: {tmp_path}/page/report.html'
  page = Page((tmp_path / 'page' / 'report.html').read_text())
  assert 'missing or odd' not in page.text and 'There is one arm only, β = -0.25' in page.text
  names = {p.stem for p in (tmp_path / 'page' / 'figures').glob('*.png')}
  assert {'pre-training_ce_nats', 'pre-training_main_rank', 'pre-training_then_RL_main_coverage',
          'pre-training_then_RL_train_pass_rate', 'pre-training_then_RL_eval_held_out_avg_at_4'} <= names
  assert sum('pass_at_k' in name for name in names) == 2 and 'What RL changed' in page.text
