"""Tests that the same seed gives the same bits: those lines of `Determinism` in docs/guarantees.md that no other test
checks.

Compared are all metrics except `time/...`, all samples, and all arrays of the last checkpoint.
"""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from betarank import model
from betarank.configs import load
from betarank.data import TrainBatches
from betarank.runtime import checkpoint, multihost
from betarank.train.config import run_config
from tests.runs import arrays, finish_well, metrics, prepare, start

SUMS = '--config.data.sources.main.uri=reasoning:chain_sum'
LAYOUTS = [(1, 4), (2, 2), (4, 1)]  # processes, CPU devices of each


def launch(command, config, workdir, *extra, processes=1, devices=1):
  """Runs `betarank COMMAND` in `processes` processes, and checks that they succeed. Returns the workdir."""
  one = {0: ('-m', 'tests.gloo', command)} if processes == 1 and devices > 1 else None
  finish_well(start(command, config, workdir, processes, *extra, '--host_deadline_s=100', devices=devices,
                    replaced=one))
  return workdir


def left(workdir):
  """Returns {name: value} of what a run left."""
  step = int(checkpoint.find(str(workdir)).name)
  samples = workdir / 'samples.jsonl'
  return {
    'metrics': metrics(workdir), 'samples': samples.read_text() if samples.exists() else '',
    'cursor': checkpoint.read_meta(checkpoint.find(str(workdir)))['cursor'],
    **{name: x.tobytes() for name, x in arrays(workdir, step).items()},
  }


def assert_same_bits(a, b):
  one, other = left(a), left(b)
  assert one.keys() == other.keys() and len(one) > 20
  assert not [name for name in one if one[name] != other[name]]


@pytest.fixture(scope='module')
def sums(tmp_path_factory):
  """Returns (folder of the data, workdir of a model that has learned the format of an answer)."""
  folder = tmp_path_factory.mktemp('sums')
  tiny = f'tests/tiny.py:dir={folder}/data,beta=0'
  prepare(tiny, SUMS)
  launch('train', tiny, folder / 'run', SUMS, '--config.train.tokens=128000', '--config.checkpoint.every_steps=500',
         '--config.log.eval_every_steps=1000')
  return folder / 'data', folder / 'run'


@pytest.mark.slow
def test_a_run_repeats_to_the_last_bit(data_dir, tmp_path):
  """tests/data/test_batches.py tests that another seed gives other batches."""
  short = ('--config.train.tokens=1536', '--config.model.layers=1')  # 6 steps
  a, b = (launch('train', f'tests/tiny.py:dir={data_dir}', tmp_path / name, *short) for name in 'ab')
  assert_same_bits(a, b)


@pytest.mark.parametrize('shape', [(1, 1), (2, 1), (1, 4), (4, 2)], ids=str)  # data, fsdp
@pytest.mark.parametrize('processes', [1, 2, 4])
def test_the_rows_of_a_step_are_the_same_for_any_number_of_processes_and_devices(data_dir, processes, shape):
  """Each process reads the part of a batch that runtime/multihost.py assigns to it. On the devices, the parts form one
  batch.
  """
  run = run_config(load.load(f'tests/tiny.py:dir={data_dir}', {}))
  rows = run.train.batch_size
  mesh = model.make_mesh(model.MeshConfig(*shape, 1, 1, 1), jax.devices()[: shape[0] * shape[1]])
  placement = NamedSharding(mesh, model.spec('batch', 'length'))
  read = lambda p, n: TrainBatches(run.data, batch_size=rows, seed=0, process_index=p, process_count=n, prefetch=0)
  whole, parts = read(0, 1), [read(p, processes) for p in range(processes)]
  for _ in range(3):
    want = next(whole)
    joined = jax.tree.map(lambda *x: np.concatenate(x), *(next(part) for part in parts))
    placed = jax.tree.map(np.asarray, multihost.local_to_global(joined, placement, rows))
    jax.tree.map(np.testing.assert_array_equal, placed, want)
  assert all(part.cursor == whole.cursor for part in parts)


@pytest.fixture(scope='module')
def one_process(data_dir, tmp_path_factory):
  return launch('train', f'tests/tiny.py:dir={data_dir}', tmp_path_factory.mktemp('one'), '--config.log.samples=0',
                devices=4)


@pytest.mark.slow
@pytest.mark.parametrize('processes, devices', LAYOUTS[1:])
def test_training_in_several_processes_is_training_in_one(one_process, data_dir, tmp_path, processes, devices):
  launch('train', f'tests/tiny.py:dir={data_dir}', tmp_path, '--config.log.samples=0', processes=processes,
         devices=devices)
  assert_same_bits(tmp_path, one_process)


# Two updates a step, a reference and covariance terms: everything that adds over devices.
RL = ('--config.rl.steps=3', '--config.rl.loss.kl_weight=0.1', '--config.rl.loss.cov=kl_cov',
      '--config.rl.minibatches=2', '--config.log.eval_every_steps=100')


def rl(sums, workdir, processes, devices):
  return launch('rl', f'tests/tiny_rl.py:init_from={sums[1]}', workdir, *RL, processes=processes, devices=devices)


@pytest.fixture(scope='module')
def rl_in_one(sums, tmp_path_factory):
  workdir = rl(sums, tmp_path_factory.mktemp('rl'), 1, 4)
  assert any(line.get('train/groups_learned_from') for line in metrics(workdir)), 'a run without signal tests nothing'
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize('processes, devices', LAYOUTS)  # the first one: the same again
def test_rl_in_several_processes_is_rl_in_one(rl_in_one, sums, tmp_path, processes, devices):
  assert_same_bits(rl(sums, tmp_path, processes, devices), rl_in_one)
