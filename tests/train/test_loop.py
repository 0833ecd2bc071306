"""Tests whole runs in processes of their own: what happens at a kill, a stop, a full disk or a wrong setting.

Runs are equal if metrics.jsonl without `time/` entries, and every array of the last checkpoint, are equal to the last
bit.
"""

import json
import resource
import shutil
import signal

import numpy as np
import pytest
from etils import epath

from betarank.runtime import checkpoint
from betarank.train import setup
from tests import runs
from tests.runs import (
  arrays,
  assert_same_run,
  assert_stopped,
  betarank,
  finish,
  finish_well,
  metrics,
  wait_for_checkpoint,
  wait_for_step,
)

STEPS = 12


def start(data_dir, workdir, *extra, **how):
  """Starts the tiny run, and returns its process."""
  return betarank('train', f'--config=tests/tiny.py:dir={data_dir}', f'--workdir={workdir}', *extra, **how)


def refused(*args, **how):
  return runs.refused(start(*args, **how))


def tokens(steps):
  """Returns the flag with which a run has `steps` steps."""
  return f'--config.train.tokens={steps * 8 * 32}'


LONG = tokens(8000)  # ended long before


def start_pair(data_dir, workdir, *extra):
  """Starts the tiny run as two processes of one device each, and returns the processes."""
  return runs.start('train', f'tests/tiny.py:dir={data_dir}', workdir, 2, *extra)


@pytest.fixture(scope='module')
def undisturbed(data_dir, tmp_path_factory):
  """Returns the workdir of a run that wasn't interrupted and used no network, in one process on one device."""
  workdir = tmp_path_factory.mktemp('undisturbed')
  finish_well(runs.start('train', f'tests/tiny.py:dir={data_dir}', workdir, 1,
                         replaced={0: ('-m', 'tests.offline', 'train')}))
  return workdir


def test_an_undisturbed_run_leaves_what_it_should(undisturbed):
  lines = metrics(undisturbed)
  assert [line['step'] for line in lines if 'train/ce_nats' in line] == list(range(1, STEPS + 1))
  assert [line['step'] for line in lines if 'eval/main/ce_nats' in line] == [6, 12]
  assert lines[0]['train/loss_nats'] != lines[0]['train/ce_nats']  # shaped, and plain cross-entropy beside it
  meta = checkpoint.read_meta(undisturbed / 'checkpoints' / '12')
  assert meta['step'] == 12 and meta['cursor']['step'] == 12 and meta['parent'] == ''
  assert meta['config'] == json.loads((undisturbed / 'config.json').read_text())
  assert sorted(p.name for p in (undisturbed / 'checkpoints').iterdir()) == ['12', '8']  # keep = 2
  sample = json.loads((undisturbed / 'samples.jsonl').read_text().splitlines()[-1])
  assert sample.keys() == {'step', 'prompt', 'text'}


def test_killed_or_stopped_and_started_again_equals_uninterrupted(data_dir, tmp_path):
  at = 5
  for number, status in ((signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)):
    process = start(data_dir, tmp_path, LONG)
    wait_for_step(tmp_path, at, [process])
    process.send_signal(number)
    results = finish([process])
    assert results[0][0] == status, results
    at = metrics(tmp_path)[-1]['step'] + 3
    if status > 0:
      saved = assert_stopped(results, tmp_path, [status])
      assert saved == metrics(tmp_path)[-1]['step']
  undisturbed = tmp_path / 'undisturbed'
  for workdir in (tmp_path, undisturbed):
    finish_well([start(data_dir, workdir, tokens(saved + 4))])
  assert_same_run(tmp_path, undisturbed, saved + 4)


def test_two_processes_killed_and_started_again_equal_uninterrupted_ones_and_one_with_two_devices(data_dir, tmp_path):
  pair = start_pair(data_dir, tmp_path, LONG)
  wait_for_step(tmp_path, 6, pair)
  wait_for_checkpoint(tmp_path, 4, pair)
  for process in pair:
    process.kill()
  assert [code for code, _, _ in finish(pair)] == [-9, -9]
  end = int(checkpoint.find(str(tmp_path)).name) + 4
  undisturbed, alone = tmp_path / 'undisturbed', tmp_path / 'alone'
  for workdir in (tmp_path, undisturbed):
    finish_well(start_pair(data_dir, workdir, tokens(end)))
  assert_same_run(tmp_path, undisturbed, end)
  finish_well([start(data_dir, alone, tokens(end), '--config.log.samples=0', devices=2)])
  for mine, theirs in zip(metrics(undisturbed), metrics(alone), strict=True):
    assert mine == pytest.approx(theirs, rel=1e-4)


def test_a_finished_run_started_again_changes_nothing(undisturbed, data_dir):
  before = metrics(undisturbed)
  [(_, out, _)] = finish_well([start(data_dir, undisturbed)])
  assert metrics(undisturbed) == before
  assert f'finished: {STEPS} steps, 3.07k tokens, ' in out and f'saved:    {undisturbed}/checkpoints/{STEPS}\n' in out
  assert f'finished already: step {STEPS} of {STEPS}' in out and 'a larger config.train.tokens continues the run' in out


@pytest.mark.slow
def test_a_checkpoint_with_damaged_metadata_is_refused_with_advice_and_moved_aside(undisturbed, data_dir, tmp_path):
  workdir = shutil.copytree(undisturbed, tmp_path / 'run')
  meta = workdir / 'checkpoints/12/meta/metadata'
  meta.write_bytes(meta.read_bytes()[:100])
  message = refused(data_dir, workdir)
  assert f'{meta}: 100 bytes' in message
  assert f'{workdir}/checkpoints/8 is good, and --fallback resumes from it' in message
  finish_well([start(data_dir, workdir, '--fallback')])
  assert_same_run(workdir, undisturbed, STEPS)


def test_metadata_comes_from_the_newest_checkpoint_that_has_it_undamaged(undisturbed, tmp_path):
  folder = shutil.copytree(undisturbed, tmp_path / 'run') / 'checkpoints'
  assert setup.parent_meta(epath.Path(folder.parent), '')['step'] == 12
  (folder / '12/meta/metadata').write_text('{')
  assert setup.parent_meta(epath.Path(folder.parent), '')['step'] == 8
  (folder / '8/meta/metadata').unlink()
  with pytest.raises(checkpoint.CheckpointError, match='checkpoints/12: meta is missing or damaged'):
    setup.parent_meta(epath.Path(folder.parent), '')


def test_a_workdir_of_another_config_is_refused(undisturbed, data_dir):
  message = refused(data_dir, undisturbed, '--config.optimizer.lr=0.5')
  assert f'--workdir={undisturbed}: holds a run with config.optimizer.lr = 0.01, now 0.5' in message
  assert metrics(undisturbed)[-1]['step'] == STEPS


def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(data_dir, tmp_path):
  message = refused(data_dir, tmp_path, '--config.model.vocab_size=512')
  assert 'vocab_size' in message and '384' in message and '512' in message


def test_figures_that_are_no_numbers_stop_the_run_before_anything_is_saved(data_dir, tmp_path):
  message = refused(data_dir, tmp_path / 'bad', '--config.optimizer.lr=1e38', '--config.optimizer.weight_decay=0')
  assert 'error: step 2: loss is' in message and 'nan' in message and 'no checkpoint yet' in message
  assert not list((tmp_path / 'bad' / 'checkpoints').iterdir())


def test_init_from_takes_weights_only_or_all(undisturbed, data_dir, tmp_path):
  weights, everything = tmp_path / 'weights', tmp_path / 'all'
  finish_well([start(data_dir, weights, f'--config.train.init_from={undisturbed}')])
  first = metrics(weights)[0]
  assert first['step'] == 1 and first['train/ce_nats'] < metrics(undisturbed)[0]['train/ce_nats']
  assert checkpoint.read_meta(weights / 'checkpoints' / '12')['parent'].endswith('checkpoints/12')
  # All of step 8, then on to 12: the same end as the run it came from.
  at_8 = undisturbed / 'checkpoints' / '8'
  finish_well([start(data_dir, everything, f'--config.train.init_from={at_8}', '--config.train.init_what=all')])
  want, got = arrays(undisturbed, STEPS), arrays(everything, STEPS)
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_a_full_disk_while_saving_leaves_the_old_checkpoint_good(data_dir, tmp_path):
  """A limit on the size of files makes every large write fail, as on a full disk."""
  finish_well([start(data_dir, tmp_path, tokens(6))])
  good = checkpoint.find(str(tmp_path))
  before = arrays(tmp_path, good.name)
  limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
  message = runs.refused(start(data_dir, tmp_path, LONG, preexec_fn=limit), alone=False)  # tensorstore prints too
  assert 'could not be written' in message and f'the last good one is {good}' in message
  after = arrays(tmp_path, checkpoint.find(str(tmp_path)).name)
  for name in before:
    np.testing.assert_array_equal(after[name], before[name])
  finish_well([start(data_dir, tmp_path, tokens(int(good.name) + 4))])
  assert checkpoint.find(str(tmp_path)).name == str(int(good.name) + 4)
