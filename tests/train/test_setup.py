"""Tests the start of every run: its errors, in one line that names the key, and what it prints."""

import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from betarank.configs import load
from betarank.configs.errors import ConfigError
from betarank.rl.config import rl_run
from betarank.runtime import checkpoint
from betarank.runtime.state import TrainState
from betarank.train import setup
from betarank.train.config import run_config

KEEP = checkpoint.CheckpointConfig(every_steps=1, keep=2, keep_every_steps=0)
STATE = TrainState(jnp.zeros((), int), {'a': jnp.ones(8)}, ())

CASES = [  # overrides, devices, message; RL used to end in a traceback where pre-training had these lines
  ({'train.mesh.tensor': '4', 'train.mesh.fsdp': '1'}, 4, 'config.train.mesh: tensor: 4 devices do not divide'),
  ({'train.mesh.data': '3', 'train.mesh.fsdp': '1'}, 4, 'config.train.mesh: '),
]


@pytest.mark.parametrize('overrides, devices, message', CASES)
@pytest.mark.parametrize('config, checked', [
  ('tests/tiny.py:dir=/d', run_config), ('tests/tiny_rl.py:init_from=x', rl_run)])
def test_a_mesh_that_does_not_fit_is_one_line(config, checked, overrides, devices, message):
  run = checked(load.load(config, overrides))
  with pytest.raises(ConfigError) as error:
    setup.make_mesh(run.mesh, run.model, run.split_rows, jax.devices()[:devices])
  assert str(error.value).startswith(message)


@pytest.mark.parametrize('config, checked, overrides, message', [
  ('tests/tiny.py:dir=/d', run_config, {'train.batch_size': '6'},
   'config.train.batch_size must be a multiple of data x fsdp'),
  ('tests/tiny_rl.py:init_from=x', rl_run, {'rl.decode_batch_size': '3'},
   'config.rl.decode_batch_size must be a multiple of data x fsdp x expert = 1 x 4 x 1, got 3'),
])
def test_rows_that_the_mesh_does_not_divide_are_named_by_the_key_that_the_user_set(config, checked, overrides, message):
  run = checked(load.load(config, overrides))
  with pytest.raises(ConfigError) as error:
    setup.make_mesh(run.mesh, run.model, run.split_rows, jax.devices()[:4])
  assert str(error.value).startswith(message)


@pytest.mark.parametrize('changes, devices, message', [
  ({'data.sequence_length': '50', 'train.mesh.context': '4'}, 4,
   'config.data.sequence_length must be a multiple of config.train.mesh.context = 4, got 50'),
  ({'data.sequence_length': '100', 'model.attention': 'triton'}, 1,
   'config.model.attention=triton needs rows of a multiple of 128 tokens, got 100, for config.data.sequence_length'),
])
def test_a_length_that_does_not_fit_is_one_line(changes, devices, message):
  run = run_config(load.load('tests/tiny.py:dir=/d', changes))
  mesh = setup.make_mesh(run.mesh, run.model, run.split_rows, jax.devices()[:devices])
  with pytest.raises(ConfigError) as error:
    setup.check_length('data.sequence_length', run.sequence_length, run.model, mesh)
  assert str(error.value).startswith(message)


def test_a_gpu_that_is_too_old_is_one_line():
  run = run_config(load.load('tests/tiny.py:dir=/d'))
  card = types.SimpleNamespace(platform='gpu', device_kind='Tesla V100-SXM2-16GB', compute_capability='7.0')
  with pytest.raises(ConfigError, match=r'V100-SXM2-16GB: .* compute capability 8.0 \(Ampere\) or later, got 7.0'):
    setup.make_mesh(run.mesh, run.model, {}, [card])


def test_on_an_accelerator_the_memory_is_what_jax_may_use():
  card = types.SimpleNamespace(
    platform='gpu', device_kind='NVIDIA H200', memory_stats=lambda: {'bytes_limit': 112_600_000_000})
  alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  weights = jax.ShapeDtypeStruct((50_000_000_000,), jnp.float32, sharding=alone)
  state = TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=alone), {'a': weights}, ())
  with pytest.raises(ConfigError, match=r'take 200.0 GB, and JAX may use 112.6 GB of each NVIDIA H200'):
    setup._check_memory(state, types.SimpleNamespace(local_devices=[card]))


def test_microbatches_are_part_of_what_must_divide():
  shape = {'data': 2, 'fsdp': 2, 'expert': 1}
  setup.check_rows('train.batch_size', 16, shape, 2)
  with pytest.raises(ConfigError, match='data x fsdp x expert x microbatches = 2 x 2 x 1 x 3, got 16'):
    setup.check_rows('train.batch_size', 16, shape, 3)


@pytest.mark.parametrize('overrides, message', [
  ({'seed': '-1'}, 'config.seed must be from 0'),
  ({'optimizer.warmup_steps': '100000'}, 'config.optimizer.warmup_steps must be < 6')])
def test_rl_refuses_what_pre_training_refuses(overrides, message):
  with pytest.raises(ConfigError) as error:
    rl_run(load.load('tests/tiny_rl.py:init_from=x', overrides))
  assert str(error.value).startswith(message)


def test_a_tokenizer_of_the_same_size_that_the_checkpoint_was_not_trained_with_is_refused(data_dir):
  c = run_config(load.load(f'tests/tiny.py:dir={data_dir}')).model
  path = f'{data_dir}/tokenizer.model'
  own = setup.read_tokenizer(path, c).sha256
  assert setup.read_tokenizer(path, c, {'tokenizer_sha256': own}).sha256 == own
  with pytest.raises(ConfigError, match='is not the tokenizer that the checkpoint was trained with'):
    setup.read_tokenizer(path, c, {'tokenizer_sha256': '0' * 64})


def test_what_follows_a_step():
  due = lambda step, **changes: setup.due(step, 12, **{
    'stopping': False, 'eval_every': 6, 'save_every': 4, **changes})
  assert [due(step) for step in (1, 4, 6, 12)] == [
    (False, False, False), (False, True, False), (True, False, False), (True, True, False)]
  assert due(5, stopping=True) == (False, True, True) and due(12, stopping=True) == (True, True, False)


def test_a_checkpoint_of_rl_tells_of_the_data_it_descends_from():
  data = {'dir': 'd', 'tokenizer': '', 'sources': {}, 'sequence_length': 8}
  pretrained = {'config': {'data': data, 'objective': {'beta': 0.5}}}
  rl = {'config': {'data': {'tokenizer': ''}, 'rl': {}}, 'tokenizer': 'd/tokenizer.model',
        'inherited': setup._inherited(pretrained)}
  assert setup.trained_tokenizer(pretrained) == 'd/tokenizer.model'
  whole = setup.whole_config(rl)
  assert whole == {'data': data | {'tokenizer': 'd/tokenizer.model'}, 'objective': {'beta': 0.5}, 'rl': {}}
  assert setup._inherited(rl)['data']['dir'] == 'd', 'RL that continues RL'


def test_counts_have_a_unit_at_every_size():
  assert [setup.short(n) for n in (950, 12_345, 64_300_000, 1_048_000_000)] == ['950', '12.3k', '64.3M', '1.05B']


@pytest.fixture
def slow_save(monkeypatch):
  """Lets saves continue in the background until the returned event is set."""
  go, write = threading.Event(), checkpoint.integrity.write
  monkeypatch.setattr(checkpoint.integrity, 'write', lambda folder: go.wait(20) and write(folder))
  yield go
  go.set()


@pytest.mark.parametrize('ends', [ValueError('step 2 failed'), SystemExit(1), KeyboardInterrupt()])
def test_whatever_ends_a_run_its_save_in_flight_is_finished_and_said(slow_save, tmp_path, capsys, ends):
  with pytest.raises(type(ends)), setup.open_checkpoints(epath.Path(tmp_path), KEEP, False) as checkpoints:
    checkpoints.save(STATE, {'config': {}}, 1)
    assert checkpoints.describe() == 'no checkpoint yet, and that of step 1 is being written'
    threading.Timer(0.3, slow_save.set).start()
    raise ends
  assert checkpoint.steps(tmp_path / 'checkpoints') == [1]
  assert capsys.readouterr().err.splitlines() == [
    'waiting for the checkpoint of step 1, at most 1800 s', 'the checkpoint of step 1 is complete']


def test_a_save_that_hangs_is_given_up_at_its_deadline(slow_save, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(setup, 'SAVE_DEADLINE_S', 0.2)
  with pytest.raises(ValueError), setup.open_checkpoints(epath.Path(tmp_path), KEEP, False) as checkpoints:
    checkpoints.save(STATE, {'config': {}}, 1)
    raise ValueError
  assert capsys.readouterr().err.splitlines()[1] == 'the checkpoint of step 1 did not finish within 0.2 s'
  slow_save.set()
  checkpoints.wait()


def test_a_save_that_fails_does_not_hide_the_error_of_the_run(tmp_path, capsys, monkeypatch):
  def full(folder):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(checkpoint.integrity, 'write', full)
  with pytest.raises(ValueError), setup.open_checkpoints(epath.Path(tmp_path), KEEP, False) as checkpoints:
    checkpoints.save(STATE, {'config': {}}, 1)
    raise ValueError
  assert 'the checkpoint of step 1 failed: a checkpoint could not be written' in capsys.readouterr().err


def test_without_a_save_in_flight_nothing_is_said(tmp_path, capsys):
  with pytest.raises(ValueError), setup.open_checkpoints(epath.Path(tmp_path), KEEP, False) as checkpoints:
    checkpoints.save(STATE, {'config': {}}, 1)
    checkpoints.wait()
    assert checkpoints.describe() == f'the last good checkpoint is {tmp_path}/checkpoints/1'
    raise ValueError
  assert capsys.readouterr().err == ''


def test_transfers_are_allowed_only_without_compilation():
  """Without compilation, each operation transfers its constants. The README runs JAX_DISABLE_JIT=1 betarank train."""
  x = jnp.ones(3)
  with setup.no_implicit_transfers(), pytest.raises(Exception, match='Disallowed host-to-device transfer'):
    _ = x + np.ones(3, np.float32)
  with jax.disable_jit(), setup.no_implicit_transfers():
    _ = x + np.ones(3, np.float32)


def test_the_trained_length_of_an_rl_checkpoint_comes_from_its_pre_training_too():
  """The config of an RL run has no data.sequence_length; its checkpoints inherit that of the pre-training."""
  meta = lambda config: {'config': config.to_dict(), 'tokenizer': 't'}
  pretrained = meta(load.load('tests/tiny.py:dir=/d'))
  assert setup.trained_length(pretrained) == 32
  lengths = {}
  for new in (4, 100):
    rl = load.load('tests/tiny_rl.py:init_from=x', {'rl.max_prompt_tokens': '20', 'rl.max_new_tokens': f'[{new}]'})
    lengths[new] = setup.trained_length({**meta(rl), 'inherited': {'data': pretrained['config']['data']}})
  assert lengths == {4: 32, 100: 120}


def test_what_earlier_stages_were_trained_on_is_kept():
  stage = lambda length, uri, left_out: {'config': {'data': {
    'dir': 'd', 'sources': {'main': {'uri': uri}}, 'sequence_length': length, 'held_out_fraction': left_out}}}
  rl = {'config': {'data': {'tokenizer': ''}, 'rl': {'max_prompt_tokens': 4, 'max_new_tokens': [4]}}, 'tokenizer': 't'}
  after = lambda parent, child: {**child, 'inherited': setup._inherited(parent)}
  known = lambda meta: (setup.longest_text(meta), setup.left_out(meta))
  long = stage(64, 'reasoning', 0.1)
  assert known(long) == (64, 0.1)
  short = after(long, stage(32, 'text:/any', 0.0))
  for meta in (short, after(short, rl), after(after(short, rl), rl)):
    assert known(meta) == (64, 0.1)
  assert known(after(short, stage(32, 'reasoning:gcd', 0.02))) == (64, 0.02)
  imported = {**stage(32, 'reasoning', 0.0), 'positions': 40_960}  # its sources are only defaults
  for meta in (imported, after(imported, rl), after(imported, stage(32, 'text:/any', 0.0))):
    assert known(meta) == (40_960, 1.0)
  assert known(after(imported, long)) == (40_960, 0.1)
  before = {**rl, 'inherited': {'data': long['config']['data']}}  # as earlier versions wrote it
  assert known(before) == (64, 0.1)
