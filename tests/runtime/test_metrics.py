"""Tests that files of metrics can be read again even after a kill, and that printed lines fit into the terminal."""

import functools
import json
import math
import sys
import types

import jax
import pytest
from etils import epath

from betarank.configs.terminal import fitted, progress_line, step_line
from betarank.runtime import metrics
from betarank.runtime.metrics import (
  Clock,
  JsonLines,
  Log,
  describe,
  describe_evaluation,
  lines_of,
  peak_flops,
)

FIGURES = {
  'train/loss_nats': 2.0, 'train/ce_nats': 1.9, 'train/entropy_nats': 1.8, 'train/rank1_accuracy': 0.5,
  'train/tail_mass': 0.1, 'train/grad_norm': 1.0, 'train/lr': 1e-3, 'time/step_s': 0.5, 'time/tokens_per_s': 1000.0,
  'time/input_wait_share': 0.01,
}


@pytest.fixture
def path(tmp_path):
  return epath.Path(tmp_path) / 'metrics.jsonl'


def test_reopening_at_a_step_drops_what_came_after(path):
  lines = JsonLines(path, step=0)
  for step in range(1, 6):
    lines.write(step, {'x': step})
  again = JsonLines(path, step=3)
  again.write(4, {'x': 'new'})
  assert [line['x'] for line in lines_of(path)] == [1, 2, 3, 'new']


def test_reopening_reads_only_what_it_removes(path, monkeypatch):
  """A run of a million steps resumes at once, and keeps none of its lines in memory."""
  path.write_text(''.join(f'{{"step": {step}, "x": 0}}\n' for step in range(1, 1001)) + '{"step": 1001, "x"')
  parsed, loads = [], json.loads
  monkeypatch.setattr(metrics.json, 'loads', lambda text: parsed.append(text) or loads(text))
  assert JsonLines(path, step=997).last == {'step': 997, 'x': 0} and len(parsed) == 4
  monkeypatch.undo()
  assert [line['step'] for line in lines_of(path)] == list(range(1, 998))
  assert JsonLines(path, step=-1).last == {} and path.read_text() == ''


@pytest.mark.parametrize('damage', ['{"step": 3, "x"', '\x00\x00', '[1]', '{"x": 1}', '{"step": "2"}', ''])
def test_a_half_written_line_is_left_out(path, damage):
  path.write_text('{"step": 1, "x": 1}\n' + damage + '\n{"step": 2, "x": 2}\n')
  assert [line['step'] for line in lines_of(path)] == [1, 2]


def test_a_missing_file_has_no_lines(path):
  assert list(lines_of(path)) == []


def test_log_writes_lines_samples_and_events_and_only_where_active(tmp_path, capsys):
  for name, active in (('on', True), ('off', False)):
    log = Log(epath.Path(tmp_path) / name, step=0, steps=4, every=2, tensorboard=True, active=active)
    for step in range(1, 5):
      log.train(step, FIGURES)
    log.evaluation(4, 'main', {'bits_per_byte': 1.0}, ['  eval main: fine'])
    log.sample(4, 'a', 'b')
    log.close()
  assert not (tmp_path / 'off').exists()
  lines = list(lines_of(epath.Path(tmp_path) / 'on' / 'metrics.jsonl'))
  assert [line['step'] for line in lines] == [1, 2, 3, 4, 4]
  assert 'eval/main/bits_per_byte' in lines[-1]
  assert json.loads((tmp_path / 'on' / 'samples.jsonl').read_text()) == {'step': 4, 'prompt': 'a', 'text': 'b'}
  assert list((tmp_path / 'on' / 'tensorboard').iterdir())
  shown = capsys.readouterr().out.splitlines()
  assert [line.split()[1] for line in shown] == ['2/4', '4/4', 'main:']


def test_the_line_says_whether_it_is_fine_and_when_it_ends():
  line = step_line(120, 1000, 3700, describe(FIGURES))
  for part in ('step  120/1000  12%', 'loss 2.0000', 'ce 1.9000', 'entropy 1.8000', '|g| 1.00', 'lr 1.0e-03',
               '1,000 tok/s', 'wait 1.0%', 'eta 1:01:40'):
    assert part in line
  assert 'mfu' not in line  # no known chip
  assert 'loss' not in ' '.join(describe({**FIGURES, 'train/loss_nats': 1.9}))  # plain: it is the ce
  assert 'mfu 43.2%' in describe({**FIGURES, 'time/mfu': 0.432})
  assert step_line(1, 2, math.inf, []).endswith('eta ?')


@pytest.mark.parametrize('width', [80, 100, 120, 160])
def test_the_live_line_has_bar_percentage_and_eta_at_any_width(width):
  figures = describe({**FIGURES, 'time/mfu': 0.432, 'time/hbm_bytes': 2.0**36})
  line = progress_line(250, 1000, 3700, figures, width)
  assert line.startswith('━━━━╌╌╌╌╌╌╌╌╌╌╌╌  25%  eta 1:01:40  step  250/1000  loss 2.0000') and len(line) <= width
  assert width - len(line) < 16  # as many figures as have room
  assert len(step_line(250, 1000, 3700, figures, width)) <= width


@pytest.mark.parametrize('width', [40, 80, 100, 140])
def test_a_line_has_as_many_figures_as_fit(width):
  start, *parts = describe_evaluation('main', {'ce_nats': 2.0971, 'bits_per_byte': 1.2861, 'entropy_nats': 2.124,
                                               'rank1_accuracy': 0.519, 'tail_mass': 0.1424})
  line = fitted(start, parts, width)
  assert line.startswith('  eval main: ce 2.0971 nats') and len(line) <= width
  assert ('rank1' in line) == (width >= 80) and ('tail mass' in line) == (width >= 100)
  assert fitted(start, parts, None) == '  '.join([start, *parts])


def test_a_terminal_keeps_the_step_lines(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(metrics, 'Console', functools.partial(metrics.Console, force_terminal=True, width=80))
  log = Log(epath.Path(tmp_path), step=0, steps=4, every=2, tensorboard=False, active=True)
  for step in range(1, 5):
    log.train(step, FIGURES)
  log.close()
  shown = capsys.readouterr().out
  assert 'compiling' in shown and 'step 2/4  50%  loss 2.0000' in shown and '100%  eta 0:00:00' in shown


def test_the_clock_keeps_evaluation_apart_and_knows_the_wait(monkeypatch):
  now = [0.0]
  monkeypatch.setattr('time.perf_counter', lambda: now[0])
  clock = Clock()
  with clock.waiting():
    now[0] += 1
  now[0] += 3
  with clock.apart():
    now[0] += 100
  assert clock.lap() == (4.0, 0.25)
  now[0] += 2
  assert clock.lap() == (2.0, 0.0)


def test_known_chips_have_a_peak_and_a_cpu_has_none():
  class Device:
    def __init__(self, kind):
      self.device_kind = kind

  assert peak_flops(Device('TPU v5 lite')) == 197e12
  assert peak_flops(Device('TPU v5p')) == 459e12
  assert peak_flops(Device('NVIDIA H100 80GB HBM3')) == 989e12
  assert peak_flops(jax.devices()[0]) is None


def test_the_elapsed_time_goes_on_in_a_resumed_run(tmp_path, monkeypatch):
  """The time counts from the start of the run. It doesn't include steps that are repeated, and the pause between two
  starts.
  """
  now = iter([100.0, 107.0, 109.0, 500.0, 503.0])
  monkeypatch.setattr(metrics, 'time', types.SimpleNamespace(perf_counter=lambda: next(now)))
  settings = {'steps': 9, 'every': 9, 'tensorboard': False, 'active': True}
  log = Log(epath.Path(tmp_path), step=0, **settings)
  log.train(1, {**FIGURES, 'time/step_s': 1.0})
  log.train(2, {**FIGURES, 'time/step_s': 1.0})
  log = Log(epath.Path(tmp_path), step=1, **settings)
  log.evaluation(1, 'main', {}, ['eval main'])
  lines = list(lines_of(epath.Path(tmp_path) / 'metrics.jsonl'))
  assert [(line['step'], line['time/elapsed_s']) for line in lines] == [(1, 7.0), (1, 10.0)]


def test_tensorboard_does_not_import_pytorch(tmp_path, monkeypatch):
  """tensorboardX imports it if it is installed."""
  (tmp_path / 'torch.py').write_text("raise AssertionError('imported')\n")
  monkeypatch.syspath_prepend(tmp_path)
  for name in [name for name in sys.modules if name.split('.')[0] in ('tensorboardX', 'torch')]:
    monkeypatch.delitem(sys.modules, name)
  Log(epath.Path(tmp_path), step=0, steps=4, every=2, tensorboard=True, active=True).close()
  assert 'torch' not in sys.modules
