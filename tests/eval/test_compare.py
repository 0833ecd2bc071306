"""Tests that runs are compared in 80 columns, that figures aren't cut, and that a run's figures come from one
validation.

RL runs and pre-training runs can't be mixed.
"""

import json

import numpy as np
import pytest

from betarank.configs.errors import ConfigError
from betarank.eval import compare
from betarank.eval.columns import Columns

VALIDATION = ('ce_nats', 'bits_per_byte', 'entropy_nats', 'tail_mass', 'rank1_accuracy')


def write(workdir, config, lines):
  workdir.mkdir(parents=True)
  (workdir / 'config.json').write_text(json.dumps(config))
  (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines) + '{"step": 30, "tr')
  return str(workdir)


def pretraining(workdir, *, beta, steps=29, validated=29, sources=('main',), **settings):
  lines = [{'step': n, 'train/ce_nats': 2.0 / n, 'train/entropy_nats': 2.1 / n + beta, 'train/tail_mass': 0.1,
            'time/tokens_per_s': 1000.0 * n} for n in range(1, steps + 1)]
  lines += [{'step': validated, **{f'eval/{source}/{name}': 0.5 + beta for name in VALIDATION}} for source in sources]
  return write(workdir, {'seed': 0, 'objective': {'beta': beta}, 'data': {'dir': str(beta)}, **settings}, lines)


def rl(workdir, *, gain, start, steps=30):
  lines = [{'step': s, 'eval/held_out/avg_at_4': 0.2 + gain * s / 100, 'eval/held_out/standard_error': 0.01}
           for s in (0, steps)]
  lines += [{'step': s, 'train/pass_rate': 0.2 + gain * s / 100, 'train/entropy_nats': 1.0 / s,
             'time/tokens_per_s': 9.0, 'train/length_tokens': 20.0, 'train/truncated_share': 0.1}
            for s in range(1, steps + 1)]
  return write(workdir, {'train': {'init_from': start}, 'rl': {'eval_samples': 4}}, lines)


@pytest.fixture
def two(tmp_path):
  """Returns the paths of two pre-training runs that differ in beta."""
  return [pretraining(tmp_path / f'beta={beta}', beta=beta) for beta in (0.0, -0.25)]


@pytest.fixture
def two_rl(tmp_path):
  """Returns the paths of two RL runs of 30 steps, which start from different pre-trained arms. The second run gains
  more.
  """
  arms = ('beta=0', 'beta=-0.25')
  return [rl(tmp_path / 'rl' / arm, gain=n, start=f'runs/smoke/{arm}') for n, arm in enumerate(arms, 1)]


def table(paths, width=80):
  lines = compare.report(compare.read_runs(paths), width).splitlines()
  assert all(len(line) <= width for line in lines), max(lines, key=len)
  return lines


def test_runs_are_named_by_what_differs(two):
  assert compare.names(compare.read_runs(two)) == ['beta=0.0', 'beta=-0.25']
  assert compare.names(compare.read_runs(two[:1])) == [two[0]]


def test_the_table_has_the_last_validation_and_the_median_speed(two):
  title, *heads, first, second = table(two)
  assert title == 'Last validation of each run, and its step'
  assert [' '.join(head.split()) for head in heads] == [
    'CE entropy tail', 'run step (nats) bits/byte (nats) mass rank-1 tokens/s']
  assert first.split() == ['beta=0.0', '29', *['0.5000'] * 3, '0.50000', '0.5000', '15,000']
  assert second.split() == ['beta=-0.25', '29', *['0.2500'] * 3, '0.25000', '0.2500', '15,000']


def test_figures_and_step_are_of_one_validation(tmp_path):
  """An unfinished run used to be shown with its last step, but with the figures of an earlier validation."""
  paths = [pretraining(tmp_path / 'a', beta=0.0), pretraining(tmp_path / 'b', beta=-0.25, steps=21, validated=10)]
  lines = table(paths)
  assert next(line for line in lines if line.startswith('beta=-0.25 ')).split()[1] == '10'
  assert 'beta=-0.25: at step 21; last validation: step 10' in lines
  assert lines[-1] == 'The validations are of different steps: their figures can\'t be compared.'


def test_many_differing_settings_and_sources_leave_every_figure_whole(tmp_path):
  """With 14 differing settings, the figures used to be missing at 140 columns, and their last digits at 80 columns."""
  paths = [pretraining(tmp_path / str(i), beta=-0.1 * i, sources=('main', 'a_source_with_quite_a_long_name'),
                       model={f'setting_{n}': 1000 * i + n for n in range(14)}) for i in range(3)]
  for width in (80, 60):
    lines = table(paths, width)
    text = '\n'.join(lines)
    assert 'setting_13=2013' in text.replace('\n   ', ' ') and '…' not in text
    assert text.count('0.50000') == 2 and text.count('0.40000') == 2 and text.count('0.30000') == 2
    assert text.count('15,000') == 6


def test_an_rl_table_has_start_and_end(two_rl):
  lines = table(two_rl)
  text = ' '.join(' '.join(lines).split())
  assert compare.names(compare.read_runs(two_rl)) == ['from beta=0', 'from beta=-0.25']
  assert 'from beta=0 30 0.200 ± 0.010 -> 0.500 ± 0.010 0.255 -> 0.455' in text  # means of steps 1-10 and 21-30
  assert 'from beta=-0.25 30 0.200 ± 0.010 -> 0.800 ± 0.010' in text
  assert '20.0 -> 20.0 10.0% -> 10.0%' in text and 'held_out Avg@4' in text


def test_a_start_is_named_by_the_part_of_its_path_that_differs(tmp_path):
  paths = [rl(tmp_path / arm, gain=1, start=f'runs/smoke/{arm}/pretrain') for arm in ('beta=0', 'beta=-0.25')]
  assert compare.names(compare.read_runs(paths)) == ['from beta=0', 'from beta=-0.25']


@pytest.mark.parametrize(('kind', 'said'), [
  ('two', ['step (each point: mean of the last 20 steps)', 'entropy (nats) less that of beta=0.0',
           'step (each point: mean of the last 50 steps)']),
  ('two_rl', ['reward on training prompts', 'step (each point: mean of the last 10 steps)',
              'held_out Avg@4, ± standard error']),
])
def test_the_plot_is_a_picture_that_says_what_it_smooths(kind, said, request, tmp_path):
  paths = request.getfixturevalue(kind)
  compare.main([*paths, f'--plot={tmp_path}/curves.svg'])
  svg = (tmp_path / 'curves.svg').read_text()
  assert all(text in svg for text in said)  # text stays text
  compare.main([*paths, f'--plot={tmp_path}/curves.png'])
  assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')
  with pytest.raises(ConfigError, match=r'--plot=x.pdf: must end in .png or .svg'):
    compare.main([*paths, '--plot=x.pdf'])


def test_the_plot_makes_its_folder_and_may_be_in_a_bucket(two, tmp_path, bucket):
  for path in (tmp_path / 'new' / 'curves.png', bucket / 'new' / 'curves.png'):
    compare.main([*two, f'--plot={path}'])
    assert path.read_bytes().startswith(b'\x89PNG')


def test_what_cannot_be_compared_is_refused_in_one_line(two, two_rl, tmp_path):
  with pytest.raises(ConfigError, match='a run of RL, and .* is one of pre-training; compare runs of one kind'):
    compare.read_runs([two[0], two_rl[0]])
  with pytest.raises(ConfigError, match='no run there'):
    compare.read_run(str(tmp_path))
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(ConfigError, match='has not finished a step'):
    compare.read_run(str(tmp_path))


def test_smoothing_keeps_the_mean_of_a_window():
  assert compare.smooth(np.array([1.0, 2.0, 3.0, 4.0]), 2).tolist() == [1.0, 1.5, 2.5, 3.5]
  assert compare.smooth(np.array([]), 2).tolist() == []
  assert (compare.smooth(np.ones(1_000_000), 40_000) == 1.0).all()  # as many steps as a long run has


def test_of_several_figures_of_a_step_the_last_counts():
  columns = Columns()
  for step, value in ((1, 1.0), (2, 2.0), (5, 5.0), (2, 2.5), (3, 3.0)):
    columns.add(step, 'x', value)
  steps, values = columns.curves()['x']
  assert steps.tolist() == [1, 2, 3, 5] and values.tolist() == [1.0, 2.5, 3.0, 5.0]


def test_no_name_in_the_legend_is_cut(tmp_path):
  paths = [pretraining(tmp_path / str(i), beta=i / 8, optimizer={'lr': 1e-3 * i, 'b2': 0.9, 'warmup_steps': 10 * i},
                       train={'tokens': 10**6 * i, 'batch_size': i, 'microbatches': i}) for i in range(1, 5)]
  figure = compare.draw(compare.read_runs(paths))
  figure.canvas.draw()
  [legend] = figure.legends
  box, whole = legend.get_window_extent(), figure.bbox
  assert box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0
  assert all('warmup_steps' in text.get_text() for text in legend.get_texts())
