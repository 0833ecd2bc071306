"""Tests that a damaged checkpoint can't be read, and that the error names the damaged file.

An earlier good checkpoint is used only if the user asks for it.
"""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath

from betarank.runtime import checkpoint, integrity
from betarank.runtime.checkpoint import CheckpointConfig, CheckpointError, Checkpoints
from betarank.runtime.state import abstract_state, create_state
from tests.bucket import Bucket
from tests.runtime.test_checkpoint import TX, C, mesh_of

KEEP = CheckpointConfig(every_steps=1, keep=3, keep_every_steps=0)
ONE = (1, 1, 1, 1, 1)


@pytest.fixture(scope='module')
def good(tmp_path_factory):
  """Returns the folder of the checkpoints of steps 1 and 2, both intact."""
  workdir = tmp_path_factory.mktemp('run')
  state = create_state(C, TX, mesh_of(ONE), seed=0)
  checkpoints = Checkpoints(workdir, KEEP)
  for step in (1, 2):
    best = {'metric': 'eval/held_out/avg_at_4', 'step': 1, 'value': 0.5}
    checkpoints.save(state, {'config': {'seed': 0}, 'cursor': {'best': best}, 'parent': ''}, step)
  checkpoints.wait()
  checkpoints.close()
  return workdir / 'checkpoints'


@pytest.fixture
def copied(good, tmp_path):
  return epath.Path(shutil.copytree(good, tmp_path / 'checkpoints'))


def files(folder):
  folder = pathlib.Path(folder)
  return sorted(str(p.relative_to(folder)) for item in ('state', 'meta') for p in (folder / item).rglob('*')
                if p.is_file())


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0x10
  path.write_bytes(bytes(data))


DAMAGE = {'flipped': (flip, 'not what was written'),
          'truncated': (lambda p: p.write_bytes(p.read_bytes()[:-1]), 'were written'),
          'missing': (lambda p: p.unlink(), 'missing')}


def test_the_manifest_is_of_every_file_and_sha256sum_agrees(good):
  manifest = json.loads((good / '2' / 'manifest.json').read_text())
  assert sorted(manifest['files']) == files(good / '2') and len(manifest['files']) > 8
  listing = ''.join(f'{f["sha256"]}  {name}\n' for name, f in manifest['files'].items())
  done = subprocess.run(['sha256sum', '--check', '--quiet'], input=listing, text=True, cwd=good / '2')
  assert done.returncode == 0


def test_all_files_and_folders_are_flushed_before_a_checkpoint_gets_its_name(tmp_path, monkeypatch):
  """After a power failure, a checkpoint with its final name therefore has all its content."""
  final, flushed, fsync = tmp_path / 'checkpoints' / '1', {}, os.fsync

  def record(descriptor):
    assert not final.exists()
    flushed[os.readlink(f'/proc/self/fd/{descriptor}')] = os.fstat(descriptor).st_size
    fsync(descriptor)

  monkeypatch.setattr(os, 'fsync', record)
  checkpoints = Checkpoints(tmp_path, KEEP)
  checkpoints.save(create_state(C, TX, mesh_of((1, 1, 1, 1, 1)), seed=0), {'config': {}}, 1)
  checkpoints.close()
  flushed = {path.partition('orbax-checkpoint-tmp')[2]: size for path, size in flushed.items()}
  own = [final / '_CHECKPOINT_METADATA', final / 'commit_success.txt']  # Orbax's own, from which nothing is restored
  for path in {final, *final.rglob('*')}.difference(own):
    name = str(path).removeprefix(str(final))
    assert name in flushed and (path.is_dir() or flushed[name] == path.stat().st_size), name


@pytest.mark.parametrize('how', DAMAGE)
def test_any_damaged_file_is_refused_by_name_with_the_good_checkpoint_named(copied, how):
  """Damages each file of the newest checkpoint in turn. The error also names the earlier good checkpoint."""
  act, message = DAMAGE[how]
  for name in files(copied / '2'):
    path = copied / '2' / name
    before = path.read_bytes()
    act(path)
    for refused in (lambda: Checkpoints(copied.parent, KEEP), lambda: checkpoint.check(copied / '2')):
      with pytest.raises(CheckpointError) as error:
        refused()
      line = str(error.value)
      assert line.startswith(f'{path}: ') and message in line and f'{copied / "1"} is good' in line, line
      assert len(line.splitlines()) == 1
    path.write_bytes(before)
  checkpoint.check(copied / '2')


def test_a_damaged_checkpoint_is_nobody_s_start(copied):
  """RL, evaluations and exports read checkpoints with these two functions, so they can't start from it either."""
  name = files(copied / '2')[-1]
  (copied / '2' / name).write_bytes(b'')
  target = abstract_state(C, TX, mesh_of(ONE))
  for read in (lambda p: checkpoint.restore(p, target), lambda p: checkpoint.restore_weights(p, target.params)):
    with pytest.raises(CheckpointError, match=f'2/{name}: 0 bytes'):
      read(checkpoint.find(str(copied.parent)))


def manifest_of(name):
  entry = {'size': 0, 'sha256': '', 'crc32': []}
  return json.dumps({'version': 1, 'block_bytes': integrity.BLOCK_BYTES, 'files': {name: entry}})


@pytest.mark.parametrize('content', [
  '{}', '[]', 'null', '', '{"version": 1, "files": {"state/x": 3}}', '\x00', '[' * 100_000, manifest_of('/dev/zero'),
  manifest_of('state/../../x'), manifest_of('x')])
def test_a_damaged_manifest_is_damage_too(copied, content):
  (copied / '2' / 'manifest.json').write_text(content)
  with pytest.raises(CheckpointError, match=r'2/manifest.json: not a manifest .*; .*checkpoints/1 is good'):
    checkpoint.check(copied / '2')


def test_a_device_in_place_of_a_file_is_not_read(copied):
  """It has 0 bytes, but reading it would never end."""
  (copied / '2' / 'manifest.json').write_text(manifest_of('state/x'))
  os.symlink('/dev/zero', copied / '2' / 'state' / 'x')
  assert integrity.damage(copied / '2', full=True) == 'state/x: not a regular file'


def test_fallback_moves_what_is_damaged_aside_and_goes_on_from_the_good_one(copied):
  flip(copied / '2' / files(copied / '2')[0])
  checkpoints = Checkpoints(copied.parent, KEEP, fallback=True)
  assert checkpoints.latest == 1 and checkpoint.steps(copied) == [1]
  state, meta = checkpoints.restore(abstract_state(C, TX, mesh_of(ONE)))
  assert meta['step'] == 1
  checkpoints.save(state, {'config': {}}, 2)  # the step is free again
  checkpoints.close()
  assert (copied.parent / 'damaged' / '2' / 'meta').exists() and checkpoint.steps(copied) == [1, 2]
  checkpoint.check(copied / '2')


def test_a_store_that_fails_is_no_damage(good, bucket, monkeypatch):
  """Else --fallback would move a good checkpoint aside."""
  def fail(*_):
    raise OSError(errno.EIO, 'the store failed (503)', 'gs://bucket/x')

  for name in ('manifest.json', *files(good / '2')):
    path = bucket / '2' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((good / '2' / name).read_bytes())
  for broken in ('_check_size', '_check_block', 'read'):
    with monkeypatch.context() as patch:
      patch.setattr(integrity, broken, fail)
      with pytest.raises(OSError, match='the store failed'):
        integrity.damage(bucket / '2')
      assert integrity.damage(epath.Path(good / '2')).endswith('the store failed (503)')  # of a disk, it is
  assert not integrity.damage(bucket / '2')


def test_fallback_in_a_bucket(good, tmp_path):
  run = tmp_path / 'bucket/run'
  for step in '12':
    shutil.copytree(good / step, run / 'checkpoints' / step)
    (run / 'checkpoints' / step / checkpoint.COMMITTED).touch()
  (run / 'checkpoints/2/meta/metadata').unlink()
  (run / 'damaged/2').mkdir(parents=True)
  (run / 'damaged/2/left').write_text('by an earlier fallback')
  with Bucket(tmp_path):
    checkpoint._ensure_newest_is_valid(epath.Path('gs://bucket/run/checkpoints'), fallback=True)
    assert checkpoint.steps(epath.Path('gs://bucket/run/checkpoints')) == [1]
  moved = {str(path.relative_to(run / 'damaged/2')) for path in (run / 'damaged/2').rglob('*') if path.is_file()}
  assert {'manifest.json', *files(good / '2')} - moved == {'meta/metadata'} and 'left' not in moved


def test_without_a_good_one_fallback_is_refused_and_nothing_moved(copied):
  for step in ('1', '2'):
    flip(copied / step / files(copied / step)[0])
  with pytest.raises(CheckpointError, match='no earlier checkpoint is good'):
    Checkpoints(copied.parent, KEEP, fallback=True)
  assert checkpoint.steps(copied) == [1, 2]


def test_a_checkpoint_without_a_manifest_is_taken_as_it_is(copied):
  (copied / '2' / 'manifest.json').unlink()
  checkpoints = Checkpoints(copied.parent, KEEP)
  assert checkpoints.restore(abstract_state(C, TX, mesh_of(ONE)))[1]['step'] == 2
  checkpoints.close()


def test_processes_share_the_work(good):
  """If one byte of a small file is flipped, exactly one of two processes finds it."""
  folder = epath.Path(good / '2')
  names = sorted(integrity.read(folder))
  assert integrity.damage(folder, share=(0, 2)) == integrity.damage(folder, share=(1, 2)) == ''
  path = folder / names[3]
  before = path.read_bytes()
  flip(path)
  found = [integrity.damage(folder, share=(i, 2)) for i in range(2)]
  path.write_bytes(before)
  assert found[0] == '' and found[1].startswith(names[3])


def test_large_files_are_checked_block_by_block(tmp_path, monkeypatch):
  monkeypatch.setattr(integrity, 'BLOCK_BYTES', 4 * integrity._PIECE_BYTES)
  path = epath.Path(tmp_path)
  for item in integrity.ITEMS:
    (path / item).mkdir()
  data = np.random.default_rng(0).bytes(11 * integrity._PIECE_BYTES + 7)
  (path / 'state' / 'big').write_bytes(data)
  integrity.write(path)
  assert len(integrity.read(path)['state/big']['crc32']) == 3 and not integrity.damage(path)
  for at, block in ((0, 0), (len(data) // 2, 1), (len(data) - 1, 2)):
    (path / 'state' / 'big').write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
    assert f'block {block} differs' in integrity.damage(path) and 'sha256' in integrity.damage(path, full=True)


def test_in_a_bucket_a_start_compares_sizes_and_small_files_and_verify_all(bucket):
  folder = bucket / 'run' / 'checkpoints'
  for step in ('1', '2'):
    for item in integrity.ITEMS:
      (folder / step / item).mkdir(parents=True, exist_ok=True)
    (folder / step / 'state' / 'big').write_bytes(b'x' * (integrity._SMALL_BYTES + 1))
    (folder / step / 'meta' / 'metadata').write_text('{"config": {}, "shapes": {}, "step": 1}')
    integrity.write(folder / step)
  assert checkpoint.steps(folder) == []  # Orbax hasn't committed them
  for step in ('1', '2'):
    (folder / step / checkpoint.COMMITTED).write_text('')
  assert checkpoint.find(str(bucket / 'run')).name == '2' and not integrity.damage(folder / '2')
  (folder / '2' / 'state' / 'big').write_bytes(b'y' * (integrity._SMALL_BYTES + 1))
  assert integrity.damage(folder / '2') == ''
  assert integrity.damage(folder / '2', full=True) == 'state/big: not what was written (sha256 differs)'
  (folder / '2' / 'meta' / 'metadata').write_text('{"config": {}, "shapes": {}, "step": 2}')
  with pytest.raises(CheckpointError, match='meta/metadata: not what was written'):
    checkpoint.check(folder / '2')
  (folder / '2' / 'state' / 'big').unlink()
  with pytest.raises(CheckpointError, match=f'state/big: missing; {folder}/1 is good'):
    checkpoint.check(folder / '2')


NO_DEVICES = '''
import sys
from betarank.runtime import checkpoint_command
try:
  checkpoint_command.main(sys.argv[1:])
finally:
  from jax._src import xla_bridge
  assert not xla_bridge._backends, 'a device was touched'
'''


def command(*args):
  return subprocess.run([sys.executable, '-c', NO_DEVICES, *map(str, args)], text=True, capture_output=True)


def test_inspect_and_verify_need_no_devices(copied):
  done = command('inspect', copied.parent)
  assert done.returncode == 0, done.stderr
  parameters = sum(x.size for x in jax.tree.leaves(abstract_state(C, TX, mesh_of(ONE)).params))
  assert f'checkpoints/2: step 2, {parameters:,} parameters' in done.stdout and 'seed = 0' in done.stdout
  assert 'best so far: eval/held_out/avg_at_4 0.5000 at step 1\n' in done.stdout
  done = command('verify', copied.parent)
  assert [line.rsplit('/', 1)[1] for line in done.stdout.splitlines()] == ['1: good', '2: good']
  assert done.returncode == 0
  name = files(copied / '1')[5]
  flip(copied / '1' / name)
  done = command('verify', copied.parent)
  assert done.returncode == 1 and f'checkpoints/1/{name}: not what was written (sha256 differs)' in done.stdout
  assert 'checkpoints/2: good' in done.stdout and command('verify', copied / '2').returncode == 0
