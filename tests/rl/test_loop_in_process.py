"""Tests what an RL run compiles. The runs are in this process."""

import collections

import pytest

from betarank.configs import load
from betarank.rl import loop
from tests.compilations import compilations

UPDATE = {'jit(zeros)', 'jit(gradient)', 'jit(apply)'}


@pytest.mark.slow
@pytest.mark.parametrize('changed', [
  {},
  {'rl.minibatches': '2', 'rl.loss.kl_weight': '0.1', 'rl.loss.cov': 'kl_cov', 'train.mesh.data': '2',
   'train.mesh.fsdp': '2', 'train.mesh.tensor': '2'}])
def test_the_programs_of_the_update_are_compiled_once_and_ahead(config, tmp_path, changed):
  with compilations() as found:
    loop.train(load.load(config, {'rl.steps': '2', **changed}), str(tmp_path))
  ahead = collections.Counter(name for main, name in found if not main)
  assert ahead.keys() == UPDATE and ahead['jit(zeros)'] == ahead['jit(apply)'] == 1 <= ahead['jit(gradient)'] <= 4
  assert not UPDATE & {name for main, name in found if main}
