"""Runs side by side: what differs names them, what is missing is said."""

import json

import pytest

from betarank.configs.errors import ConfigError
from betarank.eval import compare


@pytest.fixture
def runs(tmp_path):
  """Two runs of a few steps that differ in beta."""
  for beta in (0.0, -0.25):
    workdir = tmp_path / f'beta={beta}'
    workdir.mkdir()
    config = {'seed': 0, 'objective': {'beta': beta}, 'data': {'dir': str(beta)}}
    (workdir / 'config.json').write_text(json.dumps(config))
    lines = [{'step': n, 'train/ce_nats': 2.0 / n, 'train/entropy_nats': 2.1 / n + beta, 'train/tail_mass': 0.1,
              'time/tokens_per_s': 1000.0 * n} for n in range(1, 30)]
    lines.append({'step': 29, **{f'eval/main/{name}': 0.5 + beta for name in
                                 ('ce_nats', 'bits_per_byte', 'entropy_nats', 'tail_mass', 'rank1_accuracy')}})
    (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines) + '{"step": 30, "tr')
  return [compare.read_run(str(tmp_path / f'beta={beta}')) for beta in (0.0, -0.25)]


def test_runs_are_named_by_what_differs(runs):
  assert compare.names(runs) == ['beta=0.0', 'beta=-0.25']
  assert compare.names(runs[:1]) == [runs[0]['path']]


def test_the_table_has_the_last_validation_and_the_median_speed(runs):
  table = compare.table(runs)
  cells = [list(column.cells) for column in table.columns]
  assert cells[0] == ['beta=0.0', 'beta=-0.25'] and cells[1] == ['29', '29']
  assert cells[2] == ['0.5000', '0.2500'] and cells[-1] == ['15,000', '15,000']


def test_the_plot_is_a_picture(runs, tmp_path):
  compare.plot(runs, str(tmp_path / 'curves.png'))
  assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_no_run_and_no_step_are_said(tmp_path):
  with pytest.raises(ConfigError, match='no run there'):
    compare.read_run(str(tmp_path))
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(ConfigError, match='has not finished a step'):
    compare.read_run(str(tmp_path))


def test_smoothing_keeps_the_mean_of_a_window():
  assert compare.smooth([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]
