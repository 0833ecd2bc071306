"""RL runs side by side: how each began and ended, and that runs of another kind are told apart."""

import json

import pytest

from betarank.configs.errors import ConfigError
from betarank.eval import compare_rl
from betarank.eval.compare import names, read_run


@pytest.fixture
def runs(tmp_path):
  """Two runs of 30 steps from two pre-trained arms; the second gains more."""
  for n, arm in enumerate(('beta=0', 'beta=-0.25'), 1):
    workdir = tmp_path / arm
    workdir.mkdir()
    config = {'train': {'init_from': f'runs/smoke/{arm}'}, 'rl': {'eval_samples': 4}}
    (workdir / 'config.json').write_text(json.dumps(config))
    lines = [{'step': s, 'eval/held_out/avg_at_4': 0.2 + n * s / 100, 'eval/held_out/standard_error': 0.01}
             for s in (0, 30)]
    lines += [{'step': s, 'train/pass_rate': 0.2 + n * s / 100, 'train/entropy_nats': 1.0 / s, 'time/tokens_per_s': 9.0,
               'train/length_tokens': 20.0, 'train/truncated_share': 0.1} for s in range(1, 31)]
    (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return [read_run(str(tmp_path / arm), 'train/pass_rate') for arm in ('beta=0', 'beta=-0.25')]


def test_the_table_has_start_and_end(runs):
  table = compare_rl.table(runs)
  first, second = zip(*(list(column.cells) for column in table.columns))
  assert names(runs) == ['init_from=beta=0', 'init_from=beta=-0.25'] == [first[0], second[0]]
  assert first[1:4] == ('30', '0.200 ± 0.010 -> 0.500 ± 0.010', '0.255 -> 0.455')  # means of steps 1-10 and 21-30
  assert second[2] == '0.200 ± 0.010 -> 0.800 ± 0.010' and first[5:] == ('20.0 -> 20.0', '10.0% -> 10.0%', '9')


def test_a_start_is_named_by_the_part_of_its_path_that_differs(runs):
  for run in runs:
    run['config']['train.init_from'] += '/pretrain'
  assert names(runs) == ['init_from=beta=0', 'init_from=beta=-0.25']


def test_the_plot_is_a_picture(runs, tmp_path):
  compare_rl.plot(runs, str(tmp_path / 'rl.png'))
  assert (tmp_path / 'rl.png').read_bytes().startswith(b'\x89PNG')


def test_a_run_of_another_kind_is_said(tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "train/ce_nats": 2.0}\n')
  with pytest.raises(ConfigError, match='no train/pass_rate in its metrics.jsonl'):
    read_run(str(tmp_path), 'train/pass_rate')
