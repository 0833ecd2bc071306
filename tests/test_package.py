"""Tests that commands work in a folder with the user's own modules and folders, both from a checkout and from a wheel.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from betarank import __main__ as betarank
from betarank.configs import load

ROOT = pathlib.Path(__file__).resolve().parent.parent
HOSTILE = ('data', 'model', 'configs', 'train', 'rl', 'eval', 'launch', 'objectives', 'runtime', 'tasks', 'betarank')


@pytest.fixture
def hostile(tmp_path):
  """Returns a folder with files and folders that have the names of betarank's packages."""
  for name in HOSTILE:
    (tmp_path / name).mkdir()
  for name in ('train.py', 'data.py', 'model.py'):
    (tmp_path / name).write_text('print("a file of the user was run")\nraise SystemExit(9)\n')
  return tmp_path


def without_pythonpath():
  return {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}


def run(folder, *command, env=None, python=sys.executable):
  """Runs a command in `folder` as the installed script runs it: without this folder on the module path."""
  return subprocess.run([python, '-P', '-m', 'betarank', *command], cwd=folder, capture_output=True, text=True, env=env)


def test_help_lists_each_command_with_a_line():
  text = betarank.usage()
  for name, (_, about) in betarank.COMMANDS.items():
    assert f'  {name} ' in text and about in text
  assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize('command', ['data', 'train'])  # tests/test_imports.py starts all of them
def test_a_command_starts_in_a_folder_of_the_user_s_own(hostile, command):
  done = run(hostile, command, '--help')
  assert done.returncode == 0, done.stderr
  assert f'betarank {command}' in done.stdout and 'of the user' not in done.stdout


def test_a_config_that_ships_is_found_from_any_folder_and_printed(hostile):
  done = run(hostile, 'config', 'configs/smoke.py:beta=-0.25', '--config.optimizer.lr=1e-3')
  assert done.returncode == 0, done.stderr
  lines = dict(line.split(' = ', 1) for line in done.stdout.splitlines())
  assert lines['objective.beta'].split() == ['-0.25', '#', 'default', '0.0']
  assert lines['optimizer.lr'].split() == ['0.001', '#', 'default', '0.0003'] and '#' not in lines['optimizer.b1']


def test_the_configs_that_ship_are_listed(hostile):
  done = run(hostile, 'config', '--list')
  assert [line.split()[0] for line in done.stdout.splitlines()] == load.shipped()


@pytest.mark.parametrize('command, status, words', [
  (['trian'], 2, 'trian: no such command; did you mean train?'),
  (['config'], 2, 'name a config, or --list'),
  (['config', 'configs/smok.py'], 2, 'no such file; did you mean configs/smoke.py?')])
def test_a_mistake_is_one_line(hostile, command, status, words):
  done = run(hostile, *command)
  assert done.returncode == status and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_settings_are_listed_with_default_and_meaning(hostile):
  done = run(hostile, 'train', '--help')
  assert '--config.objective.beta=0.0\n' in done.stdout and 'scales the reward of the target' in done.stdout
  assert '--config.rl.steps' not in done.stdout
  assert '--config.objective.beta' not in run(hostile, 'rl', '--help').stdout


@pytest.mark.slow
def test_a_wheel_holds_one_package_and_all_it_needs(hostile, tmp_path_factory):
  folder = tmp_path_factory.mktemp('wheel')
  ignored = shutil.ignore_patterns('.git', '.venv', 'runs', 'build', '*.egg-info')
  copied = shutil.copytree(ROOT, folder / 'source', ignore=ignored)
  built = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--wheel-dir', str(folder),
                          str(copied)], capture_output=True, text=True)
  assert built.returncode == 0, built.stderr
  [wheel] = folder.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
    archive.extractall(folder / 'site')
  assert {name.split('/')[0] for name in names if '.dist-info/' not in name} == {'betarank'}
  for needed in ('launch/tpu.sh', 'launch/worker.sh', 'launch/lock/tpu.txt', 'configs/paper/dense_4b.py',
                 'eval/explore/assets/page.html', 'eval/explore/assets/page.css', 'eval/explore/assets/page.js'):
    assert f'betarank/{needed}' in names
  assert not [name for name in names if name.startswith(('betarank/tests', 'betarank/benchmarks'))]
  env = {**without_pythonpath(), 'PYTHONPATH': str(folder / 'site')}  # comes before the checkout's own finder
  for command in betarank.COMMANDS:
    done = run(hostile, command, '--help', env=env)
    assert done.returncode == 0, done.stderr
  dry = run(hostile, 'sweep', '--config=configs/paper/dense_1b.py', '--on=tpu', '--dry_run', env=env)
  assert dry.returncode == 0 and 'chip hours' in dry.stdout, dry.stderr
