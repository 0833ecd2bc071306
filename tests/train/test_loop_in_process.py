"""Tests what a run prints and writes for people. The runs are in this process."""

import json

import pytest

from betarank.configs import load
from betarank.train import loop
from tests.runs import prepare


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Returns the workdir of a run of three steps. Its data has no validation split, and two steps are profiled."""
  folder = tmp_path_factory.mktemp('run')
  without = '--config.data.validation_fraction=0'
  prepare(f'tests/tiny.py:dir={folder}/data', without)
  config = load.load(f'tests/tiny.py:dir={folder}/data', {
    'data.validation_fraction': '0', 'train.tokens': '768', 'model.layers': '1', 'optimizer.warmup_steps': '1',
    'log.profile_steps': '2-3', 'log.samples': '2', 'checkpoint.every_steps': '100'})
  loop.train(config, str(folder / 'run'))
  return folder / 'run'


def test_sample_texts_do_not_depend_on_a_validation_split(run):
  lines = [json.loads(line) for line in (run / 'samples.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [3, 3] and all(line['prompt'] for line in lines)


def test_chosen_steps_are_profiled(run):
  assert list((run / 'profile').rglob('*.xplane.pb'))


def test_a_run_records_its_command_and_devices(run):
  record = json.loads((run / 'run.json').read_text())
  assert record['devices'] == 8 and record['device_kind'] == 'cpu' and record['command'] and record['started_s'] > 0


@pytest.mark.parametrize('text', ['5', '3-2', '0-2', 'a-b'])
def test_steps_to_profile_are_first_to_last(text):
  from betarank.configs.errors import ConfigError
  from betarank.train.config import run_config
  with pytest.raises(ConfigError, match='config.log.profile_steps must be FIRST-LAST'):
    run_config(load.load('configs/smoke.py', {'log.profile_steps': text}))
