"""Tests the difficulty filter and the best checkpoint. Both depend only on what is recorded, so a restart doesn't
change them.
"""

import json
import types

import numpy as np
import pytest

from betarank.configs import load
from betarank.configs.errors import ConfigError
from betarank.data import DataError
from betarank.rl.config import rl_run
from betarank.rl.progress import Best, Progress
from betarank.tasks.task_set import TaskSet

SIZE, SEED = 40, 3


@pytest.fixture
def tasks():
  """Returns a stand-in for a TaskSet of forty tasks, which have no texts."""
  found = types.SimpleNamespace(size=SIZE, seed=SEED, sha256='a' * 64, kept_sha256='c' * 64,
                                reward_sha256='e' * 64,
                                config=types.SimpleNamespace(uri='jsonl:x', reward_file='mine.py'))
  found.index = lambda cursor: TaskSet.index(found, cursor)
  found.at = found.index
  return found


def steps(progress, tasks, count, repeat):
  """Returns (indices of the tasks asked in `count` steps of 8 prompts, the new progress).

  Tasks with an index below 30 are always or never solved, so their groups have no reward variance.
  """
  asked = []
  for _ in range(count):
    numbers, progress = progress.next_prompts(tasks, 8, repeat)
    indices = [tasks.index(number) for number in numbers]
    progress = progress.recorded(tasks, [(number, index >= 30) for number, index in zip(numbers, indices)])
    asked += indices
  return asked, progress


def test_prompts_without_variance_are_asked_in_their_share_of_turns(tasks):
  asked, progress = steps(Progress.read({}, tasks, True), tasks, 500, repeat=0.25)
  counts = np.bincount(asked, minlength=SIZE)
  turns = progress.prompts / SIZE
  assert np.all(np.abs(counts[30:] - turns) <= 1)  # every turn
  assert abs(counts[:30].mean() / turns - 0.25) < 0.02


def test_a_prompt_that_varies_again_is_asked_at_every_turn_again(tasks):
  progress = Progress.read({}, tasks, True).recorded(tasks, [(0, False), (1, False), (0, True)])
  assert progress.zero_variance_N.nonzero()[0].tolist() == [tasks.index(1)]


def test_the_order_is_the_same_after_a_restart(tasks):
  whole, end = steps(Progress.read({}, tasks, True), tasks, 30, repeat=0.5)
  first, middle = steps(Progress.read({}, tasks, True), tasks, 17, repeat=0.5)
  rest, again = steps(Progress.read(json.loads(json.dumps(middle.cursor())), tasks, True), tasks, 13, repeat=0.5)
  assert first + rest == whole and again.cursor() == end.cursor()


def test_without_filter_every_prompt_has_its_turn(tasks):
  numbers, progress = Progress.read({'prompts': 5}, tasks, False).next_prompts(tasks, 3, 1.0)
  assert list(numbers) == [5, 6, 7] and progress.cursor() == {
    'prompts': 8, 'problems': 'a' * 64, 'kept': 'c' * 64, 'reward': 'e' * 64}
  assert progress.recorded(tasks, [(5, False)]) is progress


def test_prompts_that_do_not_fit_are_passed_over(tasks):
  asked, progress = Progress().next_prompts(tasks, SIZE, 1.0, lambda task: task % 2 == 0)
  assert sorted(asked.values()) == sorted(2 * list(range(0, SIZE, 2))) and progress.prompts >= 2 * SIZE - 2
  with pytest.raises(DataError, match='jsonl:x: 10000 prompts in a row are longer than config.rl.max_prompt_tokens'):
    Progress().next_prompts(tasks, 1, 1.0, lambda task: False)


def test_other_problems_are_refused(tasks):
  before = Progress.read({}, tasks, True).recorded(tasks, [(0, False)]).cursor()
  other = lambda **fields: types.SimpleNamespace(**{**vars(tasks), **fields})
  with pytest.raises(DataError, match='jsonl:x: holds other problems than when the run began'):
    Progress.read(before, other(sha256='b' * 64), True)
  with pytest.raises(DataError, match='jsonl:x: leaves other problems to training than when the run began'):
    Progress.read(before, other(kept_sha256='b' * 64), True)
  with pytest.raises(DataError, match='mine.py: holds another reward function than when the run began'):
    Progress.read(before, other(reward_sha256='b' * 64), True)
  assert Progress.read({**before, 'reward': ''}, tasks, True).reward == 'e' * 64  # an older cursor has none


def test_an_older_cursor_without_a_hash_of_what_is_left_to_training_is_read(tasks):
  before = Progress.read({}, tasks, True).recorded(tasks, [(0, False)]).cursor()
  del before['kept']
  assert Progress.read(before, tasks, True).zero_variance_N.any()
  tasks.size += 1
  with pytest.raises(DataError, match='jsonl:x: leaves other problems to training than when the run began'):
    Progress.read(before, tasks, True)


def test_the_best_evaluation_is_the_earliest_of_the_highest(tasks):
  progress = Progress.read({}, tasks, False)
  for step, value in ((0, float('nan')), (1, 0.2), (3, 0.5), (6, 0.5), (9, float('nan')), (12, 0.4)):
    progress = progress.evaluated(Best('eval/held_out/avg_at_4', step, value, 'f' * 64))
  assert progress.best == Best('eval/held_out/avg_at_4', 3, 0.5, 'f' * 64)
  cursor = json.loads(json.dumps(progress.cursor()))
  assert Progress.read(cursor, tasks, False) == progress
  # Figures of another metric, or of other problems, can't be compared.
  assert progress.evaluated(Best('eval/held_out/avg_at_16', 15, 0.1, 'f' * 64)).best.step == 15
  assert progress.evaluated(Best('eval/held_out/avg_at_4', 15, 0.1, 'b' * 64)).best.step == 15
  del cursor['best']['problems']  # an older cursor doesn't have them
  old = Progress.read(cursor, tasks, False)
  assert old.best == Best('eval/held_out/avg_at_4', 3, 0.5)
  assert old.evaluated(Best('eval/held_out/avg_at_4', 15, 0.4, 'f' * 64)).best.step == 3  # is still protected


@pytest.mark.parametrize('key, value, message', [
  ('rl.keep_best', 'aime24', r'config.rl.keep_best must be empty or an evaluation set of this run \(held_out\)'),
  ('rl.phase_steps', '[0]', r'config.rl.phase_steps must be >= 1 and rise, got \(0,\)'),
  ('rl.phase_steps', '[-5, 1]', 'config.rl.phase_steps must be >= 1 and rise'),
  ('rl.extra_prompts', '-1', 'config.rl.extra_prompts must be >= 0, got -1'),
  ('rl.repeat_zero_variance', '0', 'config.rl.repeat_zero_variance must be from 0.001 to 1, got 0'),
  ('rl.repeat_zero_variance', '1e-15', 'config.rl.repeat_zero_variance must be from 0.001 to 1, got 1e-15'),
  ('rl.repeat_zero_variance', '0.5', 'config.rl.repeat_zero_variance must be 1 with generated problems')])
def test_what_cannot_be_is_refused(key, value, message):
  with pytest.raises(ConfigError, match=message):
    rl_run(load.load('tests/tiny_rl.py:init_from=x', {key: value}))
