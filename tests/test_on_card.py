"""Tests that both loops run on a GPU: TEST_ON=gpu, as `python -m benchmarks.gpu --only=tests` sets it.

Numeric tests call the update alone. Only whole runs show a transfer between host and device that the loops forbid: on a
CPU, nothing is transferred.
"""

import math
import os

import pytest
from etils import epath

from betarank.configs import load
from betarank.rl import loop as rl_loop
from betarank.runtime.metrics import lines_of
from betarank.train import loop
from tests.runs import prepare

WIDE = {'model.d_model': '128', 'model.heads': '2', 'model.kv_heads': '1', 'model.head_dim': '64'}
MIXTURE = {'model.moe.experts': '8', 'model.moe.experts_per_token': '2', 'model.moe.expert_d_ff': '64'}


@pytest.mark.skipif(os.environ.get('TEST_ON') != 'gpu', reason='needs TEST_ON=gpu')
@pytest.mark.parametrize('model', [WIDE, WIDE | MIXTURE], ids=['dense', 'mixture'])
def test_training_evaluation_and_rl_run(tmp_path, model):
  tiny, source = f'tests/tiny.py:dir={tmp_path}/data', {'data.sources.main.uri': 'reasoning:chain_sum'}
  prepare(tiny, '--config.data.sources.main.uri=reasoning:chain_sum')
  pretrained, trained = tmp_path / 'run', tmp_path / 'rl'
  loop.train(load.load(tiny, model | source), str(pretrained))
  rl_loop.train(load.load(f'tests/tiny_rl.py:init_from={pretrained}', model), str(trained))
  for folder, key in ((pretrained, 'eval/main/ce_nats'), (trained, 'train/pass_rate')):
    found = [line[key] for line in lines_of(epath.Path(folder) / 'metrics.jsonl') if key in line]
    assert found and all(map(math.isfinite, found))
