"""Tests what a run prints and writes for people. The runs are in this process."""

import json

import pytest
from etils import epath

from betarank.configs import load
from betarank.runtime.profile import Profile
from betarank.train import loop
from tests.runs import prepare


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Returns the workdir of a run of three steps. Its data has no validation split.

  The steps from 2 on are profiled. The run ends before the last step to profile.
  """
  folder = tmp_path_factory.mktemp('run')
  without = '--config.data.validation_fraction=0'
  prepare(f'tests/tiny.py:dir={folder}/data', without)
  config = load.load(f'tests/tiny.py:dir={folder}/data', {
    'data.validation_fraction': '0', 'train.tokens': '768', 'model.layers': '1', 'optimizer.warmup_steps': '1',
    'log.profile_steps': '2-9', 'log.samples': '2', 'checkpoint.every_steps': '100'})
  loop.train(config, str(folder / 'run'))
  return folder / 'run'


def test_sample_texts_do_not_depend_on_a_validation_split(run):
  lines = [json.loads(line) for line in (run / 'samples.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [3, 3] and all(line['prompt'] for line in lines)


def test_a_profile_is_written_although_the_run_ends_before_its_last_step(run):
  assert list((run / 'profile').rglob('*.xplane.pb'))


def test_a_profile_ends_after_its_last_step(tmp_path):
  profile = Profile(epath.Path(tmp_path), (2, 2))
  for step, files in ((1, 0), (2, 1), (3, 1)):
    with profile.at(step):
      pass
    assert len(list((tmp_path / 'profile').rglob('*.xplane.pb'))) == files
  profile.close()


def test_a_run_records_its_command_and_devices(run):
  record = json.loads((run / 'run.json').read_text())
  assert record['devices'] == 8 and record['device_kind'] == 'cpu' and record['command'] and record['started_s'] > 0


@pytest.mark.parametrize('text', ['5', '3-2', '0-2', 'a-b'])
def test_steps_to_profile_are_first_to_last(text):
  from betarank.configs.errors import ConfigError
  from betarank.train.config import run_config
  with pytest.raises(ConfigError, match='config.log.profile_steps must be FIRST-LAST'):
    run_config(load.load('configs/smoke.py', {'log.profile_steps': text}))
