"""Tests whole RL runs in processes of their own. A killed run must resume to the same bits, and its files must be
right.
"""

import json

import pytest

from betarank.configs.errors import UserError
from betarank.rl import command
from betarank.runtime.checkpoint import find, read_meta
from betarank.tasks.task_set import TaskConfig, TaskSet
from tests import runs
from tests.runs import (
  assert_no_secret,
  assert_same_run,
  assert_stopped,
  finish,
  finish_well,
  metrics,
  refused,
  wait_for_step,
)

STEPS = 6
LONG = 1000  # steps; ended long before


def start(config, workdir, *extra, processes=1, **how):
  return runs.start('rl', config, workdir, processes, *extra, **how)


# The runs of the fast tests have a reference, a temperature and two devices. Their programs are the same, and compiled
# once.
SETTINGS = ('--config.rl.loss.kl_weight=0.1', '--config.rl.temperature=0.7')


@pytest.fixture(scope='module')
def undisturbed(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('undisturbed')
  finish_well(start(config, workdir, *SETTINGS, replaced={0: ('-m', 'tests.offline', 'rl')}, devices=2))
  return workdir


def test_an_undisturbed_run_says_what_happened(undisturbed):
  lines = metrics(undisturbed)
  steps = [line for line in lines if 'train/pass_rate' in line]
  assert [line['step'] for line in steps] == list(range(1, STEPS + 1))
  assert [line['step'] for line in lines if 'eval/held_out/avg_at_4' in line] == [0, 3, 6]
  assert any(line['train/groups_learned_from'] for line in steps), 'a run without signal tests nothing'
  for line in steps:
    assert 0 <= line['train/truncated_share'] <= 1 and line['train/undecided'] == 0
    assert line['train/entropy_drawn_nats'] > 0
    if not line['train/groups_learned_from']:
      assert not line.keys() & {'train/grad_norm', 'train/entropy_nats', 'train/ratio_mean'}, 'nothing was measured'
      continue
    assert line['train/clip_fraction'] == 0  # on-policy: nothing to clip,
    assert line['train/ratio_mean'] == pytest.approx(1, abs=1e-6)
    assert line['train/sampler_gap_max'] < 1e-4  # and the sampler is the trainer
  averages = {line['step']: line['eval/held_out/avg_at_4'] for line in lines if 'eval/held_out/avg_at_4' in line}
  best = read_meta(find(str(undisturbed)))['cursor']['best']
  assert best['step'] == max(averages, key=averages.get) and best['value'] == averages[best['step']]
  assert best['step'] in (0, *map(int, runs.checkpoints(undisturbed)))
  sample = json.loads((undisturbed / 'samples.jsonl').read_text().splitlines()[0])
  assert sample['prompt'].startswith('Question: ')
  assert_no_secret(undisturbed)


def test_the_kl_is_to_the_start(undisturbed):
  distances = [line['train/kl_k2_nats'] for line in metrics(undisturbed) if 'train/kl_k2_nats' in line]
  assert distances[0] < 1e-10 and min(distances) >= 0
  assert max(distances) > 1e-3  # the reference stays where it was


def test_killed_or_stopped_and_started_again_equals_uninterrupted(config, tmp_path):
  """There are only 14 problems, which therefore come again, so that the difficulty filter has problems to skip.

  Answers may be longer from step 3 on.

  The uninterrupted run has no extra prompts, which must make no difference.
  """
  problems = TaskSet(TaskConfig('reasoning:chain_sum?max_terms=2&max_digits=1'), split='all')
  (tmp_path / 'few.jsonl').write_text(''.join(
    json.dumps({'question': problems[i].question, 'answer': problems[i].reference}) + '\n' for i in range(14)))
  few = (f'--config.rl.task.uri=jsonl:{tmp_path}/few.jsonl', '--config.rl.repeat_zero_variance=0.5', *SETTINGS,
         '--config.rl.max_new_tokens=[8,32]', '--config.rl.phase_steps=[2]')
  extra = '--config.rl.extra_prompts=3'
  running = start(config, tmp_path, f'--config.rl.steps={LONG}', *few, extra, devices=2)
  wait_for_step(tmp_path, 1, running)
  running[0].kill()
  finish(running)
  running = start(config, tmp_path, f'--config.rl.steps={LONG}', *few, extra, devices=2)
  wait_for_step(tmp_path, metrics(tmp_path)[-1]['step'] + 1, running)
  running[0].terminate()
  steps = assert_stopped(finish(running), tmp_path) + 2
  undisturbed = tmp_path / 'undisturbed'
  for workdir, options in (tmp_path, [extra]), (undisturbed, []):
    finish_well(start(config, workdir, f'--config.rl.steps={steps}', *few, *options, devices=2))
  assert_same_run(tmp_path, undisturbed, steps)
  ends = [read_meta(find(str(workdir)))['cursor'] for workdir in (tmp_path, undisturbed)]
  assert ends[0] == ends[1] and any(line.get('train/prompts_passed_over') for line in metrics(tmp_path))
  lengths = {line['step']: line['train/length_tokens'] for line in metrics(tmp_path) if 'train/length_tokens' in line}
  assert max(lengths[1], lengths[2]) <= 8 < max(lengths.values())


# A reference, covariance terms and two updates a step, on two devices; samples enough for some to be right each step.
EVERYTHING = ('--config.rl.steps=4', '--config.rl.loss.kl_weight=0.1', '--config.rl.loss.cov=kl_cov',
              '--config.rl.minibatches=2', '--config.rl.group_size=16')


@pytest.fixture(scope='module')
def two_devices(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('two_devices')
  finish_well(start(config, workdir, *EVERYTHING, devices=2))
  return workdir


@pytest.mark.slow
def test_the_kl_is_to_the_start_in_two_updates_a_step(two_devices):
  steps = [line for line in metrics(two_devices) if 'train/kl_k2_nats' in line]
  assert len(steps) == 4 and any(line['train/cov_token_share'] > 0 for line in steps)
  distances = [line['train/kl_k2_nats'] for line in steps]
  assert distances[0] < 1e-2 < max(distances[1:]) and min(distances) >= 0  # the reference stays where it was


@pytest.mark.slow
def test_a_reference_survives_a_kill(two_devices, config, tmp_path):
  running = start(config, tmp_path, *EVERYTHING, devices=2)
  wait_for_step(tmp_path, 3, running)
  running[0].kill()
  assert finish(running)[0][0] == -9
  finish_well(start(config, tmp_path, *EVERYTHING, devices=2))
  assert_same_run(tmp_path, two_devices, 4)


@pytest.mark.parametrize(
  'override, message',
  [
    ('--config.rl.group_size=1', 'config.rl.group_size must be >= 2'),
    ('--config.rl.task.uri=reasonin:x', 'config.rl.task.uri must be'),
    ('--config.rl.loss.eps_low=2', 'config.rl.loss.eps_low must be in [0, 1]'),
    ('--config.rl.minibatches=3', 'config.rl.minibatches must divide prompts_per_step = 4'),
    ('--config.rl.loss.cov=kl_cov', "config.rl.minibatches must be > 1 with loss.cov = 'kl_cov'"),
    ('--config.train.init_from=nowhere', 'nowhere: no such folder'),
    ('--config.model.rope_base=1e6', 'config.model.rope_base is 10000.0 in the checkpoint'),
  ],
)
def test_what_cannot_be_is_refused(config, tmp_path, override, message):
  with pytest.raises(UserError) as error:
    command.main([f'--config={config}', f'--workdir={tmp_path}', override])
  assert message in str(error.value)


def test_what_cannot_be_ends_in_one_line(config, tmp_path):
  [process] = start(config, tmp_path, '--config.rl.max_prompt_tokens=5')
  assert '4 of 4 prompts of held_out have more than 5 tokens' in refused(process)
