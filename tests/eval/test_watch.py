"""Tests that the table of runs shows what the files of the runs say, within 80 columns."""

import errno
import io
import json
import os
import time

import pytest
from etils import epath
from rich.console import Console

from betarank.configs.errors import UserError
from betarank.eval import watch
from tests.eval import sweep


def line(step, **figures):
  return json.dumps({'step': step, 'time/step_s': 2.0, 'time/tokens_per_s': 1234.5 + step, **figures}) + '\n'


def write_run(path, *, steps=100, done=40, rl=False, age=0.0):
  path.mkdir(parents=True)
  config = sweep.config(objective={}, seed=0, steps=steps, rl=rl)
  (path / 'config.json').write_text(json.dumps(config, default=list))
  figures = {'train/entropy_nats': 1.5, **({'train/pass_rate': 0.25} if rl else {'train/ce_nats': 2.0})}
  if done:
    whole = ''.join(line(i, **figures) for i in range(1, done + 1))
    (path / 'metrics.jsonl').write_text(whole + '{"step": 99, "train/ce_n')
    if age:
      os.utime(path / 'metrics.jsonl', (time.time() - age,) * 2)
  return path


@pytest.fixture
def root(tmp_path):
  write_run(tmp_path / 'beta=0' / 'train')
  write_run(tmp_path / 'beta=0' / 'rl', rl=True, steps=40)
  write_run(tmp_path / 'beta=-0.25' / 'train', age=3600)
  write_run(tmp_path / 'beta=-0.25' / 'rl', rl=True, done=0)
  (tmp_path / 'data' / 'not').mkdir(parents=True)
  return tmp_path


def printed(rows, width=80):
  out = io.StringIO()
  Console(file=out, width=width).print(watch.table(rows, width))
  return out.getvalue().splitlines()


def test_each_run_has_a_row_with_state_and_figures(root):
  rows = {row.name: row for row in watch.read_folder(epath.Path(root))}
  assert {name: row.state for name, row in rows.items()} == {
    'beta=0/train': 'running', 'beta=0/rl': 'finished', 'beta=-0.25/train': 'stopped', 'beta=-0.25/rl': 'starting'}
  assert rows['beta=0/train'].cells()[2:] == ['40/100', '2.000', '1.500', '', '1,270', '0:02:00']
  assert rows['beta=0/rl'].cells()[2:] == ['40/40', '', '1.500', '0.250', '1,270', '']
  [alone] = watch.read_folder(epath.Path(root) / 'beta=0' / 'rl')
  assert alone.name == 'rl' and alone.state == 'finished'


def test_only_the_end_of_a_long_file_is_read(root, monkeypatch):
  monkeypatch.setattr(watch, 'TAIL_BYTES', 400)
  row = watch.read_run(epath.Path(root) / 'beta=0' / 'train', 'x')
  assert row.step == 40 and row.ce == 2.0


def test_a_sweep_s_own_states_are_shown(root):
  states = {
    'beta=0/train': 'running', 'beta=-0.25/train': 'failed', 'beta=-0.25/rl': 'skipped', 'beta=1/train': 'waiting'}
  points = {name: {'stage': name.rpartition('/')[2], 'status': {'state': state}} for name, state in states.items()}
  points['beta=0/probe'] = {'stage': 'probe', 'status': {'state': 'waiting'}}
  (root / 'sweep.json').write_text(json.dumps({'points': points}))
  rows = {row.name: row.state for row in watch.read_folder(epath.Path(root))}
  assert rows == {**states, 'beta=0/rl': 'finished'}


@pytest.mark.parametrize('width', [80, 100])
def test_the_table_fits_and_long_names_keep_their_ends(width):
  figures = (250_000, 250_000, 11.123, 10.123, 0.123, 1_234_567, 360_000.0)
  rows = [watch.Row('a/very/long/name/' * 4 + f'seed={i}', 'finished', *figures) for i in range(3)]
  lines = printed(rows, width)
  assert len(lines) == 4 and max(map(len, lines)) <= width
  assert all(f'seed={i}' in text and '100:00:00' in text for i, text in enumerate(lines[1:]))


def test_runs_in_a_bucket_are_read(bucket, root):
  for name in ('config.json', 'metrics.jsonl'):
    target = bucket / 'sweep' / 'beta=0' / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text((root / 'beta=0' / 'train' / name).read_text())
  [row] = watch.read_folder(bucket / 'sweep')
  assert (row.name, row.step, row.ce) == ('beta=0', 40, 2.0)


def test_a_sweep_in_a_bucket_has_the_states_that_this_machine_recorded(bucket, root, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  target = bucket / 'sweep' / 'beta=0' / 'train' / 'config.json'
  target.parent.mkdir(parents=True)
  target.write_text((root / 'beta=0' / 'train' / 'config.json').read_text())
  folder = tmp_path / 'runs' / 'sweeps' / bucket.name / 'sweep'
  folder.mkdir(parents=True)
  points = {name: {'stage': 'train', 'status': {'state': state}} for name, state in (
    ('beta=0/train', 'running'), ('beta=1/train', 'waiting'))}
  (folder / 'sweep.json').write_text(json.dumps({'points': points}))
  rows = {row.name: row.state for row in watch.read_folder(bucket / 'sweep')}
  assert rows == {'beta=0/train': 'running', 'beta=1/train': 'waiting'}


def test_a_table_taller_than_the_terminal_says_how_many_rows_are_missing():
  rows = [watch.Row(f'seed={i}', 'waiting') for i in range(30)]
  for count, problem, shown, last in ((30, '', 8, '22 more; with --once, all are shown'), (9, '', 9, 'seed=8 waiting'),
                                      (30, 'no bucket', 7, 'no bucket')):
    console = Console(file=io.StringIO(), width=80, height=10)
    console.print(watch.screen(rows[:count], console, problem))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert len(lines) == 10 and sum('seed=' in line for line in lines) == shown and lines[-1].split() == last.split()


def test_all_rows_remain_on_the_terminal(root, monkeypatch, capsys):
  monkeypatch.setenv('LINES', '4')
  monkeypatch.setattr(time, 'sleep', interrupt)
  with pytest.raises(KeyboardInterrupt):
    watch.main([str(root)])
  out = capsys.readouterr().out
  assert all(f'\nbeta={name} ' in out for name in ('0/train', '0/rl', '-0.25/train', '-0.25/rl'))


def interrupt(_):
  raise KeyboardInterrupt


def test_the_command_prints_once_and_names_what_is_wrong(root, tmp_path, capsys):
  watch.main([str(root), '--once'])
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].split() == ['run', 'state', 'step', 'CE', 'entropy', 'pass', 'tokens/s', 'left'] and len(lines) == 5
  for argv, words in (([str(root / 'data'), '--once'], 'no runs there'),
                      ([str(root), '--every=-1'], '--every: expected a number above 0'),
                      ([str(tmp_path / 'nothing')], 'no runs there'), (['gs:/x'], 'neither a local path nor a bucket')):
    with pytest.raises(UserError, match=words):
      watch.main(argv)


def test_watching_goes_on_when_a_folder_can_not_be_read_for_a_while(root, monkeypatch, capsys):
  for name in ('beta=0/train', 'beta=-0.25/train', 'beta=-0.25/rl'):
    (root / name / 'config.json').unlink()
  write_run(root / 'late', done=99)
  read, sleeps = watch.read_folder, iter([fail, fail, None])

  def sleep(_):
    monkeypatch.setattr(watch, 'read_folder', next(sleeps) or read)
    if watch.read_folder is read:
      (root / 'late' / 'metrics.jsonl').write_text(line(100))
  monkeypatch.setattr(time, 'sleep', sleep)
  watch.main([str(root)])
  out = capsys.readouterr().out
  assert '100/100' in out


def fail(_):
  raise OSError(errno.EIO, 'the store failed (503)', 'gs://bucket/x')


def test_watching_ends_when_all_have_finished(root, monkeypatch, capsys):
  for name in ('beta=0/train', 'beta=-0.25/train', 'beta=-0.25/rl'):
    (root / name / 'config.json').unlink()
  write_run(root / 'late', done=99)

  def finish(_):
    (root / 'late' / 'metrics.jsonl').write_text(line(100))
  monkeypatch.setattr(time, 'sleep', finish)
  watch.main([str(root)])
  assert '100/100' in capsys.readouterr().out
