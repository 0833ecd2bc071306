"""Runs the Python blocks of docs/extend.md exactly as written."""

import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from betarank import objectives
from betarank.data import Batch, reasoning
from betarank.data.formats import Segment
from betarank.objectives import family
from betarank.rl import advantages
from betarank.tasks import verifier_worker
from betarank.tasks.task_set import TaskConfig, TaskSet
from betarank.train.config import run_config

DOCUMENT = pathlib.Path(__file__).resolve().parent.parent / 'docs' / 'extend.md'
SECTIONS = dict(re.findall(r'^## (.+?)\n(.*?)(?=^## |\Z)', DOCUMENT.read_text(encoding='utf-8'), re.M | re.S))


@pytest.fixture
def run(tmp_path, monkeypatch):
  """Returns a function (section) -> the names that the section's blocks define.

  The blocks run in an empty folder. Tables that they change are restored afterwards.
  """
  monkeypatch.chdir(tmp_path)
  tables = [(table, dict(table)) for table in (family.FAMILY, reasoning.TASKS, advantages.ADVANTAGES)]

  def blocks(section):
    names = {}
    for block in re.findall(r'^```python\n(.*?)^```', SECTIONS[section], re.M | re.S):
      exec(compile(block, f'docs/extend.md, {section}', 'exec'), names)
    return types.SimpleNamespace(**names)

  yield blocks
  for table, before in tables:
    table.clear()
    table.update(before)


def test_every_section_is_run():
  assert set(SECTIONS) == {'An objective', 'A model size', 'A kind of data', 'A task', 'A reward', 'A metric'}


def test_objective(run):
  run('An objective')
  rng = np.random.default_rng(0)
  hidden, head = rng.normal(size=(1, 6, 8)).astype(np.float32), rng.normal(size=(8, 16)).astype(np.float32)
  targets, shaping = np.arange(6)[None], objectives.RewardShaping(beta=0.1, form='unlearned')
  logits = hidden @ head
  logp = logits[0, range(6), range(6)] - np.log(np.exp(logits[0]).sum(-1))
  expected = np.where(np.exp(logp) < 0.1, -logp, 0)
  np.testing.assert_allclose(objectives.shaped_loss(logits, targets, shaping)[0], expected, rtol=1e-4)
  chunked, _ = jax.jit(lambda h: objectives.shaped_linear_loss(h, head, targets, shaping))(hidden)
  np.testing.assert_allclose(chunked[0], expected, rtol=1e-4)
  assert 0 < np.count_nonzero(expected) < 6
  with pytest.raises(ValueError, match='beta must be <= 1 for unlearned'):
    objectives.ObjectiveConfig(form='unlearned', beta=1.5)


def test_model_size(run):
  made = run_config(run('A model size').get_config('beta=-0.25')).model
  assert (made.layers, made.d_model, made.vocab_size) == (8, 256, 1024)


def test_kind_of_data(run, tmp_path):
  (tmp_path / 'a.txt').write_text('one\ntwo\nthree\n')
  reader = run('A kind of data').Lines(f'{tmp_path}/*.txt')
  [segment] = reader.segments()
  assert segment == Segment(f'{tmp_path}/a.txt', 0, 3)
  parts = [Segment(segment.path, 0, 2), Segment(segment.path, 2, 3)]
  assert [text for part in parts for text in reader.read(part)] == ['one\n', 'two\n', 'three\n']


def test_task(run, capsys):
  names = run('A task')
  assert names.tasks[0].prompt == 'Question: What is 2 times 2?\nSolution:' and names.tasks[0].reference == '4'
  held_out = TaskSet(TaskConfig(uri='jsonl:times.jsonl', held_out_fraction=0.1), split='held_out')
  assert len(names.tasks) + len(held_out) == 18 * 18 and len(held_out) > 0
  problem = reasoning.problem(reasoning.parse('lcm'), 0)
  assert problem.solution.endswith(f'= {problem.answer}') and problem.document in capsys.readouterr().out


def test_reward(run, tmp_path):
  run('A reward')
  (tmp_path / 'brief.py').write_text(re.search(r'^```python\n(.*?)^```', SECTIONS['A reward'], re.M | re.S)[1])
  grade = verifier_worker.reward_grader('brief.py:brief')
  rewards = [grade({'text': text, 'answer': answer, 'reference': '4', 'question': 'What is 2 + 2?'})['reward']
             for text, answer in (('4', '4'), ('4' + ' ' * 200, '4'), ('5', '5'), ('', ''))]
  assert rewards == [1.0, 0.5, 0.0, 0.0] and TaskConfig(uri='jsonl:x', reward='brief.py:brief')
  found = advantages.advantages(advantages.AdvantageConfig(name='sign'), np.array([[1.0, 0, 0, 0]]), np.ones((1, 4)))
  assert found.tolist() == [[1, -1, -1, -1]]


def test_metric(run):
  names = run('A metric')
  ranks_BT, ones_BT = jnp.array([[0, 4, 5, 2]]), jnp.ones((1, 4), jnp.int32)
  segments_BT = jnp.array([[1, 1, 1, 0]])  # the last one is padding
  batch = Batch(ones_BT, ones_BT, ones_BT, segments_BT)
  zeros_BT = jnp.zeros((1, 4))
  stats = objectives.TokenStats(zeros_BT, zeros_BT, ranks_BT, None, None, ones_BT > 0)
  figures = names.means(names.sums(batch, zeros_BT, stats, jnp.ones(2, jnp.int32)))
  assert figures['rank5_accuracy'] == pytest.approx(2 / 3)
