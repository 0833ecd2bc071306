"""Tests that a restored checkpoint equals the saved state, on any mesh, and that errors name what can't be restored."""

import dataclasses
import errno
import itertools
import json
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath
from jax.experimental import multihost_utils

from betarank import model
from betarank.runtime import checkpoint
from betarank.runtime.checkpoint import CheckpointConfig, CheckpointError, Checkpoints
from betarank.runtime.state import abstract_state, create_state
from betarank.train.optimizer import OptimizerConfig, make_optimizer
from tests.bucket import Bucket

C = model.ModelConfig(
  vocab_size=64, layers=2, d_model=32, d_ff=48, heads=4, kv_heads=2, head_dim=8, rope_base=1e4, norm_eps=1e-6,
  tied_embeddings=False, compute_dtype='float32', remat_policy='none', scan_layers=True)
TX = make_optimizer(OptimizerConfig(lr=1e-2, warmup_steps=1, decay_fraction=0.0, final_lr=0.0, b1=0.9, b2=0.95,
                                    eps=1e-8, weight_decay=0.1, clip_norm=1.0), 10, model.abstract(C)[2])
KEEP = CheckpointConfig(every_steps=1, keep=2, keep_every_steps=0)
MESHES = [(1, 8, 1, 1, 1), (8, 1, 1, 1, 1), (2, 2, 1, 1, 2), (1, 2, 1, 2, 2)]


def mesh_of(shape):
  return model.make_mesh(model.MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Returns (a workdir with a checkpoint of step 3, saved on a mesh of 8 devices; its state)."""
  workdir = tmp_path_factory.mktemp('run')
  with jax.set_mesh(mesh_of((2, 2, 1, 1, 2))) as mesh:
    state = create_state(C, TX, mesh_of((2, 2, 1, 1, 2)), seed=3)
    checkpoints = Checkpoints(workdir, KEEP)
    checkpoints.save(state, {'config': {'seed': 3}, 'cursor': {'row': 5}, 'parent': 'x'}, 3)
    checkpoints.wait()
    checkpoints.close()
  del mesh
  return workdir, jax.device_get(state)


@pytest.mark.parametrize('shape', [*MESHES, (1, 1, 1, 1, 1)])
def test_restored_on_any_mesh_it_is_the_same(saved, shape):
  workdir, want = saved
  mesh = mesh_of(shape)
  checkpoints = Checkpoints(workdir, KEEP)
  assert checkpoints.latest == 3
  state, meta = checkpoints.restore(abstract_state(C, TX, mesh))
  checkpoints.close()
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), want)
  assert meta['cursor'] == {'row': 5} and meta['step'] == 3
  q = state.params['layers']['attention']['q_DNH']
  assert q.sharding.mesh.shape == mesh.shape


def test_saving_leaves_the_stop_of_a_job_to_others(saved, tmp_path, monkeypatch):
  """The number in a call of this function decides at which step a job of several processes stops after SIGTERM."""
  workdir, _ = saved
  checkpoints = Checkpoints(workdir, KEEP)
  state, _ = checkpoints.restore(abstract_state(C, TX, mesh_of((1, 1, 1, 1, 1))))
  checkpoints.close()
  calls = []
  monkeypatch.setattr(multihost_utils, 'reached_preemption_sync_point', lambda step: bool(calls.append(step)))
  checkpoints = Checkpoints(tmp_path, KEEP)
  checkpoints.save(state, {'config': {}}, 1)
  checkpoints.close()
  assert calls == []


def test_a_wall_clock_that_jumps_ends_no_save(saved, tmp_path, monkeypatch):
  """Orbax measures on it how long a save takes."""
  workdir, _ = saved
  checkpoints = Checkpoints(workdir, KEEP)
  state, _ = checkpoints.restore(abstract_state(C, TX, mesh_of((1, 1, 1, 1, 1))))
  checkpoints.close()
  now, real = itertools.count(0, 86_400), time.time
  monkeypatch.setattr(time, 'time', lambda: real() + next(now))  # a day at each look
  checkpoints = Checkpoints(tmp_path, KEEP)
  checkpoints.save(state, {'config': {}}, 1)
  checkpoints.close()
  assert checkpoint.steps(tmp_path / 'checkpoints') == [1]


STORE = ("ABORTED: Error opening \"zarr\" driver: Error reading gs://b/x: All 32 retry attempts failed: busy "
         "[http_response_body='{\\\"error\\\": {\\\"code\\\": 503, \\\"message\\\": \\\"can\\'t\\\"}}'] "
         "[http_response_code='503'] [tensorstore_spec='{\\\"driver\\\":\\\"zarr\\\",\\\"dtype\\\":\\\"float32\\\"}']")


@pytest.mark.parametrize('processes', [1, 2])
def test_what_a_store_refuses_is_told_by_its_own_process(saved, processes, monkeypatch):
  """Not by the watchdog, which would look for a lost process; and with the reason, not with the end of a long text."""
  workdir, _ = saved
  checkpoints = Checkpoints(workdir, KEEP)
  monkeypatch.setattr(checkpoint.multihost, 'index_and_count', lambda: (0, processes))

  def write():
    raise ValueError(STORE)

  with pytest.raises(CheckpointError, match=r"attempts failed: busy \[http_response_code='503'\]\); the last good one"):
    checkpoints._guard(write)
  checkpoints.close()


def test_a_store_that_can_not_be_listed_either_hides_no_error(saved, monkeypatch):
  workdir, _ = saved
  checkpoints = Checkpoints(workdir, KEEP)

  def fail(*_):
    raise OSError(errno.EIO, 'the store failed (403)', 'gs://bucket/x')

  monkeypatch.setattr(checkpoint, 'steps', fail)
  told = r'not be written to .*the store failed \(403\).*last good one is the newest in .*, which can.t be listed now'
  with pytest.raises(CheckpointError, match=told):
    checkpoints._guard(fail)
  assert checkpoints.describe().endswith("which can't be listed now")
  checkpoints.close()


def test_old_checkpoints_in_a_bucket_are_deleted_by_who_may_only_use_its_objects(saved, tmp_path):
  """As roles/storage.objectAdmin, which docs/tpu.md gives to workers: Orbax asks for the bucket's description first."""
  workdir, _ = saved
  checkpoints = Checkpoints(workdir, KEEP)
  state, _ = checkpoints.restore(abstract_state(C, TX, mesh_of((1, 1, 1, 1, 1))))
  checkpoints.close()
  (tmp_path / 'bucket').mkdir()
  with Bucket(tmp_path, objects_only=1):
    checkpoints = Checkpoints('gs://bucket/run', dataclasses.replace(KEEP, keep=1))
    for step in (1, 2):
      checkpoints.save(state, {'config': {}}, step)
    checkpoints.close()
    assert checkpoint.steps(epath.Path('gs://bucket/run/checkpoints')) == [2]
  assert not [path for path in (tmp_path / 'bucket/run/checkpoints/1').rglob('*') if path.is_file()]


def test_weights_alone(saved):
  workdir, want = saved
  target = abstract_state(C, TX, mesh_of((1, 8, 1, 1, 1)))
  params, meta = checkpoint.restore_weights(checkpoint.find(str(workdir)), target.params)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), want.params)
  assert meta['parent'] == 'x'


def test_fresh_states_are_the_same_on_every_mesh():
  states = [jax.device_get(create_state(C, TX, mesh_of(shape), seed=0)) for shape in (MESHES[2], (1, 1, 1, 1, 1))]
  for state in states[1:]:
    jax.tree.map(np.testing.assert_array_equal, state, states[0])


def test_another_shape_is_refused_naming_the_array(saved):
  import dataclasses
  other = dataclasses.replace(C, d_ff=64)
  with pytest.raises(CheckpointError, match=r'params.layers.feed_forward.down_FD'):
    checkpoint.restore(checkpoint.find(str(saved[0])), abstract_state(other, TX, mesh_of((1, 1, 1, 1, 1))))


@pytest.mark.parametrize('item', ['meta', 'state'])
def test_a_damaged_checkpoint_is_refused_naming_the_path(saved, tmp_path, item):
  import shutil
  shutil.copytree(saved[0] / 'checkpoints' / '3', tmp_path / '3')
  for file in (tmp_path / '3' / item).rglob('*'):
    if file.is_file():
      file.write_bytes(b'\x00' * 10)
  with pytest.raises(CheckpointError, match=str(tmp_path / '3')):
    checkpoint.restore(epath.Path(tmp_path / '3'), abstract_state(C, TX, mesh_of((1, 1, 1, 1, 1))))


GOOD = {'step': 1, 'shapes': {'params.a': [[1], 'float32']}, 'config': {}}
HOSTILE = ['[' * 100_000, '', '[]', *(json.dumps({**GOOD, **changes}) for changes in (
  {'shapes': [1]}, {'shapes': {'params.a': 5}}, {'shapes': {'params.a': [['x'], 'float32']}},
  {'shapes': {'params.a': [[2**62, 4], 'float32']}}, {'shapes': {'params.a': [[1], 'zzz']}},
  {'shapes': {'params.a': [[1], '01f4']}}, {'shapes': {'params.a': [[1], 5]}}, {'step': None}, {'step': '1'},
  {'config': {'__class__': {}}}, {'config': 5}))]


@pytest.mark.parametrize('content', HOSTILE)
def test_hostile_metadata_is_one_line(tmp_path, content):
  (tmp_path / 'meta').mkdir()
  (tmp_path / 'meta' / 'metadata').write_text(json.dumps(GOOD))
  assert checkpoint.read_meta(epath.Path(tmp_path)) == GOOD
  (tmp_path / 'meta' / 'metadata').write_text(content)
  with pytest.raises(CheckpointError, match='meta is missing or damaged') as error:
    checkpoint.read_meta(epath.Path(tmp_path))
  assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize('cursor', [None, {}, {'best': 1}, {'best': {'a': 1}}, {'best': {
  'step': 1, 'metric': 'x', 'value': '0.5'}}])
def test_a_best_evaluation_without_its_fields_is_none(cursor):
  assert checkpoint.best({'cursor': cursor}) == {}
  whole = {'step': 1, 'metric': 'x', 'value': 0.5, 'more': 2}
  assert checkpoint.best({'cursor': {'best': whole}}) == whole


def test_find_takes_a_workdir_its_checkpoints_or_one_of_them(saved):
  workdir = saved[0]
  for path in (workdir, workdir / 'checkpoints', workdir / 'checkpoints' / '3'):
    assert checkpoint.find(str(path)).name == '3'
  with pytest.raises(CheckpointError, match='did you mean'):
    checkpoint.find(str(workdir) + 'x')


def test_a_checkpoint_in_a_bucket_whose_save_was_interrupted_is_none(bucket):
  folder = bucket / 'run/checkpoints'
  for name in ('8/state/x', '8/meta/metadata', '8/commit_success.txt', '12/state/x', '12/meta/metadata'):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text('')
  assert checkpoint.find(str(bucket / 'run')) == checkpoint.find(str(folder / '8')) == folder / '8'
  with pytest.raises(CheckpointError, match='checkpoints/12: incomplete, because its save was interrupted'):
    checkpoint.find(str(folder / '12'))
  (folder / '12/manifest.json').write_text('{}')  # it lists the files, which are compared with it before use
  assert checkpoint.find(str(folder / '12')) == folder / '12'


def test_old_checkpoints_go_and_chosen_ones_stay(tmp_path):
  mesh = mesh_of((1, 1, 1, 1, 1))
  state = create_state(C, TX, mesh, seed=0)
  checkpoints = Checkpoints(tmp_path, CheckpointConfig(every_steps=1, keep=1, keep_every_steps=4))
  for step in range(1, 7):
    checkpoints.save(state, {'config': {}}, step)
  checkpoints.wait()
  checkpoints.close()
  assert sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir()) == [4, 6]


def test_what_a_killed_run_left_to_delete_goes_when_it_starts_again(saved, tmp_path):
  folder = shutil.copytree(saved[0], tmp_path / 'run') / 'checkpoints'
  for step in (2, 1):
    shutil.copytree(folder / '3', folder / str(step))
  (folder / '1/manifest.json').unlink()  # deleted in part
  checkpoints = Checkpoints(tmp_path / 'run', KEEP)
  assert checkpoint.steps(epath.Path(folder)) == [1, 2, 3]  # nothing goes before the newest is read
  checkpoints.restore(abstract_state(C, TX, mesh_of((1, 1, 1, 1, 1))))
  checkpoints.close()
  assert checkpoint.steps(epath.Path(folder)) == [2, 3]


def test_the_best_checkpoint_stays_until_there_is_a_better_one(tmp_path):
  state = create_state(C, TX, mesh_of((1, 1, 1, 1, 1)), seed=0)
  kept = lambda: checkpoint.steps(epath.Path(tmp_path) / 'checkpoints')
  for first, best, left in ((1, 2, [2, 5, 6]), (7, 2, [2, 11, 12]), (13, 14, [14, 17, 18])):  # started three times
    checkpoints = Checkpoints(tmp_path, KEEP)
    recorded = {'best': {'step': best, 'metric': 'x', 'value': 0.5}}
    for step in range(first, first + 6):
      checkpoints.save(state, {'config': {}, 'cursor': recorded if step >= best else {}}, step)
    checkpoints.wait()
    checkpoints.close()
    assert kept() == left


def test_a_checkpoint_in_the_background_holds_the_state_of_its_own_step(tmp_path):
  """Updates continue while a checkpoint is written. None of them may change the checkpoint."""
  from betarank.runtime.state import donated
  mesh = mesh_of((1, 1, 1, 1, 1))
  state = create_state(C, TX, mesh, seed=0)
  update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=donated())
  checkpoints = Checkpoints(tmp_path, KEEP)
  for step in range(1, 4):
    want = jax.tree.map(lambda x: np.array(x, copy=True), state)
    checkpoints.save(state, {'config': {}}, step)
    for _ in range(20):
      state = update(state)
  checkpoints.wait()
  got, _ = checkpoints.restore(abstract_state(C, TX, mesh))
  checkpoints.close()
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), want)


NO_FOLDER = '''
import os, sys
import jax.numpy as jnp
from betarank.runtime import checkpoint
from betarank.runtime.state import TrainState
checkpoints = checkpoint.Checkpoints(sys.argv[1], checkpoint.CheckpointConfig(1, 1, 0))
os.symlink('nowhere', checkpoints.path / '1.orbax-checkpoint-tmp')  # no folder can be made of it
try:
  checkpoints.save(TrainState(jnp.zeros((), int), {'a': jnp.ones(8)}, ()), {'config': {}}, 1)
  checkpoints.wait()
except checkpoint.CheckpointError as error:
  print(error)
'''


def test_a_save_that_cannot_begin_lets_the_process_end(tmp_path):
  """Otherwise, threads of Orbax would wait 20 minutes for the folder, and the process would wait for these threads."""
  done = subprocess.run([sys.executable, '-c', NO_FOLDER, str(tmp_path)], text=True, capture_output=True, timeout=240)
  assert f'could not be written to {tmp_path}/checkpoints' in done.stdout, done.stderr[-500:]


LATE = '''
import asyncio, sys, threading
import tensorstore
from betarank.configs.stop import interruptible
from betarank.runtime import checkpoint
with interruptible():  # as every command
  checkpoint.Checkpoints(sys.argv[1], checkpoint.CheckpointConfig(1, 1, 0)).close()
loop, writes = asyncio.new_event_loop(), [tensorstore.Promise.new() for _ in range(2)]
async def wait(future):
  return await future
async def save():
  waiting.extend(asyncio.ensure_future(wait(future)) for _, future in writes)
  await asyncio.gather(*waiting)
waiting = []
writes[0][0].set_exception(OSError(28, 'No space left on device'))
try:
  loop.run_until_complete(save())
except OSError as error:
  print(error)
loop.close()
thread = threading.Thread(target=writes[1][0].set_result, args=[None])
thread.start()
thread.join()
'''


def test_writes_that_end_after_another_failed_print_no_traceback(tmp_path):
  """On a full disk, Orbax closes its event loop while other arrays are being written."""
  done = subprocess.run([sys.executable, '-c', LATE, str(tmp_path)], text=True, capture_output=True, timeout=240)
  assert done.returncode == 0 and 'No space left on device' in done.stdout, done.stderr
  assert 'Traceback' not in done.stderr, done.stderr
