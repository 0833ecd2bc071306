"""Tests what RL rewards: right answers, programs that pass their tests, and the results of a user's own function."""

import pytest

from betarank.rl.advantages import AdvantageConfig
from betarank.rl.rewards import RewardRule
from betarank.rl.rollout import graded_groups
from betarank.tasks.code_jail import Jail, JailConfig, JailError
from betarank.tasks.task_set import TaskConfig, TaskSet
from betarank.tasks.verifiers import Verdict, Verifier, VerifierConfig
from tests.rl.scripted import Scripted, write

RIGHT, WRONG, UNDECIDED = Verdict.RIGHT, Verdict.WRONG, Verdict.UNDECIDED


def graded(tasks, texts, jail=None):
  model = Scripted(texts)
  with Verifier(VerifierConfig(workers=1), jail) as verifier:
    [group] = graded_groups(model, None, verifier, model, {0: tasks[0]}, samples=len(texts), seed=0, step=1)
  return group


def test_a_text_is_cut_as_evaluation_cuts_it(tmp_path):
  uri = f'jsonl:{write(tmp_path / "q.jsonl", {"question": "What is 2+2?", "answer": "4"})}'
  tasks = TaskSet(TaskConfig(uri, answer_format='boxed', held_out_fraction=0.0))
  group = graded(tasks, [' \\boxed{4}.\n\nQuestion: What is 3+4?\nSolution: \\boxed{7}', ' \\boxed{7}'])
  assert group.verdicts == [RIGHT, WRONG] and group.rewards(RewardRule('zero', 8)) == ([1.0, 0.0], [True, True])


def test_a_reward_of_the_users_own_is_that_of_its_answer(tmp_path):
  (tmp_path / 'mine.py').write_text("def reward(answer, **_):\n  return {'a': 0.25, 'b': -2}[answer]\n")
  uri = f'jsonl:{write(tmp_path / "q.jsonl", {"question": "Q", "answer": "a"})}'
  tasks = TaskSet(TaskConfig(uri, held_out_fraction=0.0, reward=f'{tmp_path}/mine.py:reward'))
  group = graded(tasks, ['\nAnswer: a', '\nAnswer: b', '\nAnswer: c'])
  assert group.verdicts == [WRONG, WRONG, UNDECIDED]
  assert group.rewards(RewardRule('zero', 8)) == ([0.25, -2.0, 0.0], [True, True, False])
  assert group.has_reward_variance(RewardRule('zero', 8), AdvantageConfig())


def test_programs_are_rewarded_through_the_jail(tmp_path):
  try:
    jail = Jail(JailConfig(deadline_s=30), 'config.rl.code')
  except JailError as error:  # tests/tasks/test_code_jail.py asks why
    pytest.skip(str(error))
  record = {'task_id': 1, 'text': 'Write inc.', 'code': '', 'test_list': ['assert inc(1) == 2']}
  tasks = TaskSet(TaskConfig(f'code:{write(tmp_path / "p.jsonl", record)}', held_out_fraction=0.0))
  group = graded(tasks, ['def inc(x):\n  return x + 1\n[DONE]\nnonsense', 'def inc(x):\n  return x\n', 'exit('], jail)
  assert group.verdicts == [RIGHT, WRONG, WRONG] and group.rewards(RewardRule('zero', 8))[0] == [1.0, 0.0, 0.0]
