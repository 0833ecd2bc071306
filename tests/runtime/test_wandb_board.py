"""Tests that figures are sent to Weights & Biases only if the user asks for it, and under one run, also after resuming.
"""

import importlib.util
import json
import sys
import types

import pytest
from etils import epath

from betarank.configs.errors import ConfigError
from betarank.runtime import wandb_board
from betarank.runtime.metrics import Log
from tests.runtime.test_metrics import FIGURES


@pytest.fixture
def wandb(monkeypatch):
  """Replaces the module wandb. Returns the list of the calls that it gets."""
  calls = []

  def init(**arguments):
    calls.append(arguments)
    record = lambda name: lambda *given, **named: calls.append((name, *given, *named.values()))
    return types.SimpleNamespace(log=record('log'), define_metric=record('define'), finish=record('finish'))
  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
  return calls


def run(workdir, start, stop, project='mine'):
  log = Log(epath.Path(workdir), step=start, steps=4, every=2, tensorboard=False, active=True,
            wandb=(project, {'seed': 7}))
  for step in range(start + 1, stop + 1):
    log.train(step, FIGURES)
  log.evaluation(stop, 'main', {'bits_per_byte': 1.0}, ['  eval main: fine'])
  log.close()


def test_a_resumed_run_is_the_same_run(wandb, tmp_path):
  run(tmp_path / 'beta=0', 0, 2)
  run(tmp_path / 'beta=0', 2, 4)
  starts = [call for call in wandb if isinstance(call, dict)]
  assert [(s['project'], s['resume'], s['name'], s['config']) for s in starts] == [
    ('mine', 'allow', 'beta=0', {'seed': 7})] * 2
  sent = [call[1] for call in wandb if isinstance(call, tuple) and call[0] == 'log']
  assert [(line['step'], 'train/ce_nats' in line) for line in sent] == [(2, True), (2, False), (4, True), (4, False)]
  assert sent[1]['eval/main/bits_per_byte'] == 1.0 and wandb.count(('finish',)) == 2
  run(tmp_path / 'beta=0', 2, 4, project='other')
  first, second, third = (call['id'] for call in wandb if isinstance(call, dict))
  assert first == second != third


def test_without_wandb_the_setting_is_refused_in_one_line(monkeypatch):
  wandb_board.check('')
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match='config.log.wandb=mine: wandb is not installed; pip install'):
    wandb_board.check('mine')


def test_offline_a_run_and_its_resumption_are_written_under_one_id(tmp_path, monkeypatch):
  pytest.importorskip('wandb')
  for name, value in {'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true', 'WANDB_CONSOLE': 'off',
                      'WANDB_DISABLE_CODE': 'true'}.items():
    monkeypatch.setenv(name, value)
  workdir = tmp_path / 'beta=0'
  run(workdir, 0, 2)
  run(workdir, 2, 4)
  [known] = {json.loads((workdir / 'wandb.json').read_text())['id']}
  folders = [path.name for path in (workdir / 'wandb').iterdir() if path.name.startswith('offline-run-')]
  assert folders and all(name.endswith(f'-{known}') for name in folders)
