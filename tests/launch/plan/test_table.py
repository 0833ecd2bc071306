"""The table of docs/plans.md, and the command that makes it."""

import dataclasses
import importlib.metadata
import math
import os
import pathlib
import re
import subprocess

import pytest

from betarank import model
from betarank.configs import load
from betarank.configs.errors import ConfigError, UserError
from betarank.launch import on_tpu
from betarank.launch.plan import command, plans, predict, table
from betarank.launch.plan.chips import Topology
from betarank.launch.plan.workload import workload
from tests.runs import BETARANK

ROOT = pathlib.Path(__file__).parents[3]
DOCUMENT = (ROOT / 'docs/plans.md').read_text(encoding='utf-8')
NAMES = {name: file for file, name in table.MODELS.items()}


def cells(line):
  return [cell.strip() for cell in line.strip().strip('|').split('|')]


def numbers(text):
  return [float(number) for number in re.findall(r'[\d.]+', text)]


ROWS = [cells(line) for line in DOCUMENT.partition(table.HEAD + '\n')[2].partition('\n\n')[0].splitlines()]
assert ROWS, 'docs/plans.md has no table, so nothing below is tested'


def test_a_row_has_the_figures_of_its_plan_and_begins_with_the_slow_end():
  work = workload(load.load('configs/paper/dense_4b.py'))
  prediction = predict.Prediction((10.0, 12.5), (9.0, 11.5), 1.0, 2.0, {}, 0.0, (), (), {})
  plan = plans.Plan('train', 'v5e-256', 256, {'data': 8, 'fsdp': 32}, 4, 'full', True, '', 16.91e9, 10**9, 2 * 10**9,
                    6_400_000_000, 9_560_000_000, 60.0, prediction, (0.5, 0.625), 2**24)
  assert cells(table.row('4B', work, plan)) == [
    '4B, v5e-256', 'data 8 x fsdp 32, full', '6.40', '9.56 of 16.91', '12.50 to 10.00', '50 to 62 %', '116 to 145',
    f'{work.steps * 12.5 / 3600:.0f} to {work.steps * 10 / 3600:.0f}']
  quick = dataclasses.replace(plan, prediction=dataclasses.replace(prediction, unread=('splash_mha_fwd',)))
  assert cells(table.row('4B', work, quick))[3:] == ['9.56 of 16.91', '', '', '', '']
  less = dataclasses.replace(plan, fits=False, problem='needs 20G of 15.75G HBM', prediction=None)
  assert 'does not fit: needs 20G' in table.row('4B', work, less)


@pytest.mark.parametrize('row', ROWS, ids=lambda row: row[0])
def test_the_rows_of_the_document_agree_with_the_configs_and_with_themselves(row):
  """Mesh, remat, memory of a chip and batch are the config's of today; MFU, tokens and hours follow from the step."""
  name, pod = row[0].split(', ')
  work, topology = workload(load.load(f'configs/paper/{NAMES[name]}.py')), Topology(pod)
  mesh = {axis: int(n) for axis, n in re.findall(r'(\w+) (\d+)', row[1])}
  wanted = {axis: size for axis, size in vars(work.run.mesh).items() if size > 1}
  assert wanted.items() <= mesh.items() and topology.chips == math.prod(mesh.values())
  assert row[1].endswith(f', {work.run.model.remat_policy}')
  temporary, (peak, hbm) = numbers(row[2])[0], numbers(row[3])
  assert temporary < peak < hbm == pytest.approx(topology.chip.hbm_bytes / 1e9, abs=0.01)
  tokens = work.rows * work.length
  useful_s = model.flops_per_token(work.run.model, work.length) * tokens / topology.chips / topology.chip.flops
  for step_s, mfu, per_day, hours in zip(*map(numbers, row[4:8])):
    assert mfu == pytest.approx(100 * useful_s / step_s, abs=0.6, rel=0.01)
    assert per_day == pytest.approx(tokens * 86_400 / step_s / 1e9, abs=0.6, rel=0.01)
    assert hours == pytest.approx(work.steps * step_s / 3600, abs=0.6, rel=0.01)


MFU = r'.{0,250}? MFU of (\d+)(?: to |\.\.)(\d+) %'
PLANNED = {  # where the document has the MFU that a dry run of a sweep assumes
  ('v5e', False): r'\| 4B, v5e-256 \|.{0,100}? \| (\d+) to (\d+) % \|',
  ('v5e', True): f'A step of 10B-A0.5B at the paper\'s batch on v5e-256{MFU}',
  ('v6e', False): f'The 1B with 4 sequences per chip on v6e-256{MFU}'}
PLANNED_RL = {('v5e', False): f'RL of the 4B on v5e-256{MFU}', ('v5e', True): f'RL of the 10B on v5e-256{MFU}'}


def test_a_dry_run_of_a_sweep_assumes_the_planned_mfu():
  """As in the document, so a new plan can't leave an old constant behind. Of RL, this is the MFU of the update."""
  text = ' '.join(DOCUMENT.split())
  said = lambda places: {key: tuple(int(n) / 100 for n in re.search(place, text).groups())
                         for key, place in places.items()}
  planned = said(PLANNED)
  assert {**planned, ('v5p', False): planned['v5e', False]} == on_tpu.PLANNED_MFU  # v5p isn't in the document
  assert {key: update for key, (update, _) in on_tpu.PLANNED_RL_MFU.items()} == said(PLANNED_RL)


def pinned(name):
  return re.search(rf'^{name}==(.*)$', (ROOT / 'launch/constraints.txt').read_text(), re.M)[1]


def test_the_document_names_the_versions_that_setup_installs():
  assert f'jax {pinned("jax")} and libtpu {pinned("libtpu")}' in DOCUMENT


def installed(name):
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


@pytest.mark.slow
@pytest.mark.skipif(any(installed(name) != pinned(name) for name in ('jax', 'libtpu')),
                    reason='needs the jax and libtpu of launch/constraints.txt')
def test_the_memory_of_a_row_still_comes_out():
  """Without bundles, because these change no memory: some minutes on one core."""
  done = subprocess.run([*BETARANK, 'plan', '--table=dense_4b/v5e-256', '--no_bundles'], capture_output=True, text=True,
                        env={**os.environ, 'XLA_FLAGS': ''})
  assert done.returncode == 0, done.stderr
  head, row = done.stdout.strip().rsplit('\n', 1)
  assert head == table.HEAD
  assert cells(row)[:4] == next(found for found in ROWS if found[0] == '4B, v5e-256')[:4]


def test_a_pattern_that_matches_no_row():
  assert table.choose('moe_*/v6e-256') == [(name, 'v6e-256') for name in table.MODELS if name.startswith('moe')]
  with pytest.raises(ConfigError, match='--table=x: matches no row; there are dense_1b/v5e-256'):
    table.choose('x')


SMOKE = ['--config=configs/smoke.py', '--topology=v5e-4']


@pytest.mark.parametrize('flags, message', [
  (['--table', '--config=configs/smoke.py'], "--config: can't be combined with --table"),
  (['--table', '--slices=2'], "--slices: can't be combined with --table"),
  (['--table', '--usd_per_chip_hour=1'], "--usd_per_chip_hour: can't be combined with --table"),
  (['--table', '--mean_answer=9'], "--mean_answer: can't be combined with --table"),
  (['--table', '--tries=3'], "--tries: can't be combined with --table"),
  ([*SMOKE, '--tries=3'], '--tries: is for --search'),
  ([*SMOKE, '--search', '--usd_per_chip_hour=1'], "--usd_per_chip_hour: can't be combined with --search"),
  ([*SMOKE, '--search', '--tries=0'], "--tries: expected a whole number above 0, got '0'"),
  ([*SMOKE, '--search', '--tries=-3'], '--tries: expected a whole number'),
  ([*SMOKE, '--usd_per_chip_hour=-3'], "--usd_per_chip_hour: expected a number above 0, got '-3'"),
  ([*SMOKE, '--usd_per_chip_hour=nan'], '--usd_per_chip_hour: expected a number'),
  ([*SMOKE, '--usd_per_chip_hour=inf'], '--usd_per_chip_hour: expected a number'),
  ([*SMOKE, '--slices=1000000000000'], '--slices: expected a whole number'),
  ([*SMOKE, '--slices=1000000'], '--slices=1000000: must be from 1 to 999'),
  (['--config=configs/rl_smoke.py', '--topology=v5e-1', '--mean_answer=99999'],
   '--mean_answer=99999: no answer is longer than config.rl.max_new_tokens = 28'),
  (['--topology=v5e-4'], '--config is needed'), (['--config=configs/smoke.py'], '--topology is needed')])
def test_flags_that_are_missing_in_excess_or_out_of_range(flags, message, monkeypatch):
  monkeypatch.setattr(command, 'configure_libtpu', lambda *_: None)  # it changes the environment of this process
  with pytest.raises(UserError, match=message):
    command.main(flags)
