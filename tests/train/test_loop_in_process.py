"""Tests what a run prints and writes for people, and what it compiles. The runs are in this process."""

import collections
import json

import pytest

from betarank.configs import load
from betarank.train import loop
from tests.compilations import compilations
from tests.runs import prepare


@pytest.fixture(scope='module')
def compiled():
  """Returns the list of the programs that the run compiled (see tests/compilations.py)."""
  return []


@pytest.fixture(scope='module')
def run(tmp_path_factory, compiled):
  """Returns the workdir of a run of three steps. Its data has no validation split, and two steps are profiled."""
  folder = tmp_path_factory.mktemp('run')
  without = '--config.data.validation_fraction=0'
  prepare(f'tests/tiny.py:dir={folder}/data', without)
  config = load.load(f'tests/tiny.py:dir={folder}/data', {
    'data.validation_fraction': '0', 'train.tokens': '768', 'model.layers': '1', 'optimizer.warmup_steps': '1',
    'log.profile_steps': '2-3', 'log.samples': '2', 'checkpoint.every_steps': '100'})
  with compilations() as found:
    loop.train(config, str(folder / 'run'))
  compiled.extend(found)
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


def test_the_programs_of_a_run_are_compiled_once_and_ahead(run, compiled):
  check_compiled(compiled, {'step'})


@pytest.mark.slow
@pytest.mark.parametrize('changed', [
  {'train.mesh.data': '2', 'train.mesh.fsdp': '2', 'train.mesh.tensor': '2', 'train.microbatches': '2'},
  {'train.mesh.expert': '2', 'model.moe.experts': '8', 'model.moe.experts_per_token': '2',
   'model.moe.expert_d_ff': '64'}])
def test_so_are_those_of_every_mesh_and_model(data_dir, tmp_path, changed):
  config = load.load(f'tests/tiny.py:dir={data_dir}', {
    'train.tokens': '768', 'optimizer.warmup_steps': '1', 'checkpoint.every_steps': '100', **changed})
  with compilations() as found:
    loop.train(config, str(tmp_path))
  check_compiled(found, {'step', 'evaluate'})


def check_compiled(found, programs):
  """Checks that `programs` and the sampler's were compiled once, and not in the main thread."""
  ahead = collections.Counter(name for main, name in found if not main)
  sampler = {'decode_params', '_empty', '_prefill', '_put', '_decode'}
  assert ahead == {f'jit({name})': 1 for name in programs | sampler}
  assert not ahead.keys() & {name for main, name in found if main}
