"""Tests the functions of an RL step without a model: which prompts are asked, and which samples are learned from."""

import dataclasses
import math
import types

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding

from betarank import model
from betarank.configs import load
from betarank.configs.errors import ConfigError
from betarank.data import DataError
from betarank.rl import loop, packing, rollout
from betarank.rl.config import rl_run
from betarank.rl.progress import Best, Progress
from betarank.rl.rollout import check_prompts, graded_groups
from betarank.rl.warnings import warnings
from betarank.tasks import task_set
from betarank.tasks.task_set import TaskSet
from betarank.tasks.verifiers import Verdict, Verifier, VerifierConfig
from tests.rl.scripted import Scripted, write

RIGHT, WRONG = '\nAnswer: 4', '\nAnswer: 5'


@pytest.fixture(scope='module')
def verifier():
  with Verifier(VerifierConfig(workers=1)) as verifier:
    yield verifier


@pytest.fixture
def parts(tmp_path, verifier):
  """Returns a function (texts, **settings) -> the parts of an RL step. It asks eight problems; two of their prompts are
  long.
  """
  words = lambda i: ' '.join(['word'] * (12 if i in (2, 5) else 1))
  path = write(tmp_path / 'q.jsonl', *({'question': f'{words(i)} {i}', 'answer': '4'} for i in range(8)))

  def make(texts, **settings):
    config = load.load('tests/tiny_rl.py:init_from=x', {
      'rl.task.uri': f'jsonl:{path}', 'rl.task.held_out_fraction': '0', 'rl.keep_best': '', 'rl.group_size': '2',
      'rl.minibatches': '1', 'rl.max_prompt_tokens': '8', **settings})
    run, scripted = rl_run(config), Scripted(texts)
    scripted.s.max_prompt_tokens = run.rl.max_prompt_tokens
    return types.SimpleNamespace(
      run=run, tokenizer=scripted, tasks=TaskSet(run.rl.task, seed=run.seed), verifier=verifier, samplers=[scripted])

  return make


def step(parts):
  return loop.sample_and_judge(parts, None, Progress(), 1)


def figures_of(parts, kept, seen, progress):
  return loop.describe_step({}, kept, seen, progress.prompts, parts.run.rl, 1)


def test_long_prompts_are_counted_before_the_run_and_refused_or_passed_over(parts):
  kept, seen, progress = step(p := parts([RIGHT, WRONG], **{'rl.long_prompts': 'skip'}))
  said = '2 of 8 prompts have more than 8 tokens, the longest 15'
  assert check_prompts(p.tokenizer, p.tasks, 8, skip=True) == said
  with pytest.raises(ConfigError, match=f'^config.rl.max_prompt_tokens: {said}; raise it, or leave them out with'):
    check_prompts(p.tokenizer, p.tasks, 8, skip=False)
  assert len(kept) == len(seen) == 4 and all(len(group.prompt) <= 8 for group in seen)
  assert progress.prompts == seen[-1].cursor + 1
  with pytest.raises(DataError, match='its prompt has 15 tokens, more than config.rl.max_prompt_tokens = 8'):
    graded_groups(p.samplers[0], None, p.verifier, p.tokenizer, {2: p.tasks[2]}, samples=1, seed=0, step=1)


@pytest.mark.parametrize('settings, kept, rounds', [
  ({}, 0, 3), ({'rl.zero_variance_groups': 'keep'}, 4, 1), ({'rl.advantage.name': 'w_reinforce'}, 4, 1)])
def test_groups_that_agree_are_replaced_or_kept(parts, settings, kept, rounds):
  found = step(parts([WRONG, WRONG], **settings, **{'rl.long_prompts': 'skip'}))
  assert len(found[0]) == kept and len(found[1]) == 4 * rounds


@pytest.mark.parametrize('turn, extra', [
  (lambda waiting: -1, 0), (lambda waiting: len(waiting) // 2, 0),
  (lambda waiting: hash(waiting[0].id) % len(waiting), 0),
  (lambda waiting: 0, 1), (lambda waiting: -1, 4), (lambda waiting: len(waiting) // 2, 100)])
def test_neither_the_order_in_which_groups_end_nor_extra_prompts_decide_anything(parts, turn, extra, monkeypatch):
  """Groups are asked and learned from as if each round of prompts were drawn only after the round before it."""
  for seed in range(8):
    agrees = lambda number: (number * 7919 + seed) % 97 < 60  # noqa: B023
    monkeypatch.setattr(rollout.Group, 'has_reward_variance', lambda group, *_: not agrees(group.cursor))  # noqa: B023
    p = parts([RIGHT, WRONG], **{
      'rl.max_prompt_tokens': '64', 'rl.prompts_per_step': '6', 'rl.extra_prompts': str(extra)})
    p.samplers[0].turn = turn
    kept, seen, progress = step(p)
    assert p.samplers[0].first == min(6 + extra, 3 * 6)  # at most three rounds are ever wanted
    wanted, last = 6, 0
    for _ in range(3):
      last, wanted = wanted + last, sum(agrees(number) for number in range(last, last + wanted))
    assert [group.cursor for group in seen] == list(range(last)) and progress.prompts == last
    assert [group.cursor for group in kept] == [number for number in range(last) if not agrees(number)]


def test_a_step_without_a_group_to_learn_from_changes_nothing_and_measures_nothing(parts):
  kept, seen, progress = step(p := parts([WRONG, WRONG], **{'rl.long_prompts': 'skip'}))
  p.rows_by_token, state = one_device(), object()
  assert loop.minibatches(p, kept, 1) == [] and loop.learn(p, state, [], 1) == (state, {})
  figures = figures_of(p, kept, seen, progress)
  assert figures['train/groups_learned_from'] == 0 and figures['train/pass_rate'] == 0
  assert not figures.keys() & {'train/entropy_nats', 'train/ratio_mean', 'train/grad_norm'}
  assert any('no update' in part for part in loop.describe_figures({**figures, 'time/tokens_per_s': 1.0}))


def one_device():
  return NamedSharding(model.make_mesh(model.MeshConfig(1, 1, 1, 1, 1), jax.devices()[:1]),
                       model.spec('batch', 'length'))


@pytest.mark.parametrize('number, phase', [(1, 0), (2, 1), (3, 1)])
def test_a_step_has_the_sampler_of_its_phase_and_room_for_its_longest_answers(parts, number, phase):
  lengths = 2, 60
  p = parts([RIGHT, WRONG], **{
    'rl.max_new_tokens': str(list(lengths)), 'rl.phase_steps': '[1]', 'rl.long_prompts': 'skip'})
  p.samplers, p.rows_by_token = [Scripted([], tokens=n) for n in lengths], one_device()
  kept, *_ = loop.sample_and_judge(p, None, Progress(), number)
  assert {len(s.tokens) for group in kept for s in group.samples} == {lengths[phase]}
  [[part]] = loop.minibatches(p, kept, number)
  assert part.batch.tokens_BT.shape[1] == packing.shapes(8 + lengths[phase], 0, 1)[0][1]


@pytest.mark.parametrize('number, phase', [(0, 0), (1, 0), (2, 1)])
def test_an_evaluation_has_the_sampler_of_its_phase(parts, number, phase):
  p = parts([RIGHT, WRONG], **{
    'rl.max_new_tokens': '[2, 60]', 'rl.phase_steps': '[1]', 'rl.eval_samples': '2'})
  p.samplers, p.evaluated = [Scripted([]), Scripted([])], {'mine': [p.tasks[0]]}
  log = types.SimpleNamespace(evaluation=lambda *_: None, sample=lambda *_: None)
  loop.evaluate(p, None, Progress(), number, log)
  assert [sampler.first for sampler in p.samplers] == [int(phase == 0), int(phase == 1)]


KEEP = {'rl.zero_variance_groups': 'keep'}
MOSTLY_RIGHT = [RIGHT] * 5 + [WRONG] * 3


@pytest.mark.parametrize('texts, settings, kept, updates, learned', [
  (MOSTLY_RIGHT, {'rl.advantage.name': 'pass_at_k'}, 0, 0, 0),  # any 4 of the 8 include a right one
  (MOSTLY_RIGHT, {'rl.advantage.name': 'pass_at_k', **KEEP}, 4, 0, 0),
  ([WRONG] * 8, KEEP, 4, 0, 0),
  ([WRONG] * 8, {'rl.loss.kl_weight': '0.1', **KEEP}, 4, 1, 0),  # the KL term has a gradient
  ([RIGHT] * 8, {'rl.advantage.name': 'w_reinforce', 'rl.advantage.positive_weight': '0'}, 4, 0, 0),
  ([WRONG] * 8, {'rl.advantage.name': 'w_reinforce'}, 4, 1, 4)])  # which compares nothing
def test_an_update_whose_advantages_are_all_zero_is_left_out(parts, texts, settings, kept, updates, learned):
  p = parts(texts, **{'rl.group_size': '8', 'rl.long_prompts': 'skip', **settings})
  p.rows_by_token = one_device()
  groups, seen, progress = step(p)
  assert len(groups) == kept and len(seen) == (4 if kept else 12) and len(loop.minibatches(p, groups, 1)) == updates
  figures = figures_of(p, groups, seen, progress)
  assert figures['train/groups_learned_from'] == learned and figures['train/zero_variance_groups'] == 1
  assert ('no signal' in warnings([figures] * 10)) == (not learned)
  assert 'zero-variance groups 100%' in loop.describe_figures({**figures, 'time/tokens_per_s': 1.0})


def undecided(group):
  return group._replace(verdicts=[Verdict.UNDECIDED] * len(group.samples), scores=[math.nan] * len(group.samples))


def test_an_update_without_samples_is_left_out(parts):
  """Momentum and weight decay would move the weights although nothing was learned.

  There are two groups per update. In turn, the second update lacks its groups, the first has only undecided answers,
  and both have only undecided answers.
  """
  p = parts([RIGHT, WRONG], **{
    'rl.long_prompts': 'skip', 'rl.minibatches': '2', 'rl.zero_variance_groups': 'keep'})
  p.rows_by_token = one_device()
  kept, seen, progress = step(p)
  whole = loop.minibatches(p, kept, 1)
  lost = [undecided(group) for group in kept]
  for groups, updates in ((kept, whole), (kept[:2], whole[:1]), (lost[:2] + kept[2:], whole[1:]), (lost, [])):
    jax.tree.map(np.testing.assert_array_equal, loop.minibatches(p, groups, 1), updates)  # also checks the structure
    assert figures_of(p, groups, seen, progress)['train/groups_learned_from'] == 2 * len(updates)


def test_what_counts_is_learned_from_with_its_advantage(parts, tmp_path):
  """There are two updates of two groups each. The second group lacks its last sample, and the fourth group is missing.
  """
  (tmp_path / 'mine.py').write_text("def reward(answer, **_):\n  return {'4': 0.75, '5': -1.25}[answer]\n")
  p = parts([RIGHT, WRONG, WRONG], **{
    'rl.task.reward': f'{tmp_path}/mine.py:reward', 'rl.long_prompts': 'skip', 'rl.minibatches': '2',
    'rl.group_size': '3', 'rl.advantage.name': 'dr_grpo'})
  p.rows_by_token = NamedSharding(model.make_mesh(model.MeshConfig(2, 1, 1, 1, 1), jax.devices()[:2]),
                                  model.spec('batch', 'length'))
  kept, *_ = step(p)
  kept[1] = kept[1]._replace(verdicts=[*kept[1].verdicts[:2], Verdict.UNDECIDED])
  (one,), (other,) = loop.minibatches(p, kept[:3], 1)
  per_token = lambda part: sorted(np.asarray(part.advantages_BT)[np.asarray(part.batch.counts_BT)].tolist())
  np.testing.assert_allclose(per_token(one), sorted([4 / 3, -2 / 3, -2 / 3] * 2 + [1, -1] * 2), rtol=1e-6)
  np.testing.assert_allclose(per_token(other), sorted([4 / 3, -2 / 3, -2 / 3] * 2), rtol=1e-6)
  assert one.batch.tokens_BT.sharding == p.rows_by_token and one.choices_BTLk is None


def test_settled_prompts_are_asked_less_often(parts):
  for texts, share in (([WRONG, WRONG], 0.25), ([RIGHT, RIGHT], 0.25), ([RIGHT, WRONG], 1)):
    p = parts(texts, **{'rl.repeat_zero_variance': '0.25', 'rl.max_prompt_tokens': '64'})
    progress, asked = Progress.read({}, p.tasks, True), 0
    for number in range(1, 40):
      _, seen, progress = loop.sample_and_judge(p, None, progress, number)
      asked += len(seen)
    assert asked / progress.prompts == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize('texts, settled', [
  ([WRONG, WRONG, WRONG], False), ([RIGHT, WRONG, WRONG], False), ([RIGHT, RIGHT, WRONG], True)])
def test_a_group_with_fewer_than_two_decided_answers_does_not_settle_its_prompt(parts, tmp_path, texts, settled):
  (tmp_path / 'mine.py').write_text("def reward(answer, **_):\n  return {'4': 1}[answer]\n")  # undecided without a 4
  p = parts(texts, **{'rl.task.reward': f'{tmp_path}/mine.py:reward', 'rl.group_size': '3',
                      'rl.repeat_zero_variance': '0.5', 'rl.max_prompt_tokens': '64'})
  for before in (False, True):
    progress = dataclasses.replace(Progress.read({}, p.tasks, True), zero_variance_N=np.full(8, before))
    _, seen, progress = loop.sample_and_judge(p, None, progress, 1)
    asked = [p.tasks.index(group.cursor) for group in seen]
    assert all(progress.zero_variance_N[asked] == (before or settled))


def test_figures_of_a_reward_of_ones_own_are_its_means(parts, tmp_path):
  (tmp_path / 'mine.py').write_text("def reward(answer, **_):\n  return {'4': 0.75, '5': -1.25}[answer]\n")
  p = parts([RIGHT, WRONG], **{'rl.task.reward': f'{tmp_path}/mine.py:reward', 'rl.long_prompts': 'skip'})
  kept, seen, progress = step(p)
  figures = figures_of(p, kept, seen, progress)
  assert figures['train/pass_rate'] == -0.25 and figures['train/undecided'] == 0
  assert loop.describe_figures({**figures, 'time/tokens_per_s': 1.0}, 'reward')[0] == 'reward -0.250'
  assert figures['train/tokens'] == 2 * 2 * 4 and figures['train/prompts_passed_over'] == progress.prompts - 4


def test_problems_to_evaluate_on_need_no_held_out_ones(parts, tmp_path):
  other = write(tmp_path / 'aime.jsonl', *({'question': f'Q{i}', 'answer': '4'} for i in range(5)))
  alone = parts([RIGHT, WRONG]).run
  assert loop.evaluation_sets(alone) == {}
  found = loop.evaluation_sets(parts([RIGHT], **{'rl.eval_tasks': f'{{"aime": "jsonl:{other}"}}'}).run)
  assert found.keys() == {'aime'} and [task.question for task in found['aime']] == ['Q0', 'Q1', 'Q2', 'Q3']


def test_an_evaluation_asks_the_first_problems_with_random_numbers_of_its_own(parts):
  """The order in which training would ask them doesn't matter."""
  p = parts([RIGHT, WRONG], **{'rl.eval_prompts': '3', 'rl.eval_samples': '2', 'rl.max_prompt_tokens': '64'})
  path = p.run.rl.task.uri
  p.evaluated = loop.evaluation_sets(parts([], **{'rl.eval_prompts': '3', 'rl.eval_tasks': f'{{"all": "{path}"}}'}).run)
  asked, steps, lines = [], [], []
  p.samplers[0].__class__ = type('Listening', (Scripted,), {'__call__': lambda self, params, prompts, **kw: (
    asked.extend(prompt.id for prompt in prompts), steps.append(kw['step']),
    Scripted.__call__(self, params, prompts, **kw))[-1]})
  log = types.SimpleNamespace(evaluation=lambda step, name, values, line: lines.append((name, values)),
                              sample=lambda *_: None, say=lambda _: None)
  for number in (0, 3):
    loop.evaluate(p, None, Progress(), number, log)
  assert asked == [0, 1, 2] * 2 and lines[0][1]['avg_at_2'] == 0.5
  assert steps[1] - steps[0] == 3 and steps[0] > 10**9, 'a step of training may have these random numbers'


def test_sets_that_cannot_be_evaluated_on_are_refused(parts):
  with pytest.raises(ConfigError, match=r'^config.rl.eval_tasks.mine: uri must be'):
    loop.evaluation_sets(parts([], **{'rl.eval_tasks': '{"mine": "reasonin:x"}'}).run)


@pytest.fixture
def evaluate(parts, monkeypatch):
  """Returns a function (list of undecided problems, **settings) -> (the figures, the line, the best evaluation).

  Four problems are evaluated on, with two answers each, of which one is right.
  """
  def run(lost, **settings):
    p = parts([RIGHT, WRONG], **{
      'rl.eval_samples': '2', 'rl.max_prompt_tokens': '64', 'rl.task.held_out_fraction': '0.5',
      'rl.keep_best': 'held_out', **settings})
    p.evaluated = loop.evaluation_sets(p.run)
    monkeypatch.setattr(loop, 'graded_groups', lambda *args, **how: [
      undecided(group) if i in lost else group for i, group in enumerate(graded_groups(*args, **how))])
    lines = []
    log = types.SimpleNamespace(evaluation=lambda step, name, values, line: lines.append((values, line[0])),
                                sample=lambda *_: None, say=lambda _: None)
    best = loop.evaluate(p, None, Progress(), 0, log).best
    [(values, line)] = lines
    return values, line, best

  return run


def test_undecided_problems_have_no_weight_in_an_evaluation(evaluate):
  values, line, best = evaluate([])
  count = int(line.split()[-2])
  assert values['avg_at_2'] == best.value == 0.5 and count > 1 and line.endswith(f'over {count} problems')
  values, line, best = evaluate([0])
  assert values['avg_at_2'] == best.value == 0.5 and line.endswith(f'over {count - 1} problems, 1 undecided')
  values, line, best = evaluate(range(count))
  assert math.isnan(values['avg_at_2']) and best is None and line.endswith(f'over 0 problems, {count} undecided')


def test_the_standard_error_is_that_of_the_mean_over_problems(parts, monkeypatch):
  p = parts([RIGHT, WRONG], **{'rl.eval_samples': '2', 'rl.keep_best': 'mine', 'rl.max_prompt_tokens': '64',
                               'rl.eval_tasks': f'{{"mine": "{parts([]).run.rl.task.uri}"}}'})
  p.evaluated = {'mine': [p.tasks[i] for i in range(4)]}
  scores = [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
  monkeypatch.setattr(loop, 'graded_groups', lambda *args, **how: [
    group._replace(scores=of_group) for group, of_group in zip(graded_groups(*args, **how), scores)])
  figures = []
  log = types.SimpleNamespace(evaluation=lambda step, name, values, line: figures.append(values),
                              sample=lambda *_: None, say=lambda _: None)
  best = loop.evaluate(p, None, Progress(), 3, log).best
  # The rates are 1, 1/2, 0 and 1/2. Their variance is (1/4 + 1/4) / 3.
  assert figures == [{'avg_at_2': 0.5, 'standard_error': pytest.approx(math.sqrt(1 / 6) / 2)}]
  assert best == Best('eval/mine/avg_at_2', 3, 0.5, task_set.digest(p.evaluated['mine']))


class Devices(Exception):
  """Raised where a run begins to use devices."""


@pytest.fixture
def begin(monkeypatch, tmp_path):
  """Returns a function (config) that begins a run, until the run raises Devices, where it would use devices."""

  def make_mesh(*_):
    raise Devices

  for name, fake in (('parent_meta', lambda *_: {'config': {'data': {}}}), ('trained_tokenizer', lambda _: ''),
                     ('check_same_function', lambda *_: None), ('read_tokenizer', lambda *_: Scripted([])),
                     ('make_mesh', make_mesh)):
    monkeypatch.setattr(loop.setup, name, fake)
  return lambda config: loop.train(config, str(tmp_path / 'run'))


@pytest.mark.parametrize('longest, how, error, message', [
  (64, 'refuse', Devices, ''), (8, 'skip', Devices, ''),
  (8, 'refuse', ConfigError, '1 of 3 prompts of mine have more than 8 tokens, the longest 15; raise it, or leave'),
  (3, 'skip', ConfigError, '3 of 3 prompts of mine have more than 3 tokens, the longest 15; raise it$')])
def test_long_prompts_of_an_evaluation_are_refused_before_devices_are_used(
    parts, tmp_path, begin, longest, how, error, message):
  """The prompts of the problems to train on are short."""
  short = write(tmp_path / 'short.jsonl', *({'question': f'{i}', 'answer': '4'} for i in range(5)))
  mine = parts([]).run.rl.task.uri
  config = load.load('tests/tiny_rl.py:init_from=x', {
    'rl.task.uri': f'jsonl:{short}', 'rl.task.held_out_fraction': '0', 'rl.keep_best': 'mine', 'rl.eval_prompts': '3',
    'rl.eval_tasks': f'{{"mine": "{mine}"}}', 'rl.max_prompt_tokens': str(longest), 'rl.long_prompts': how})
  with pytest.raises(error, match=f'^config.rl.max_prompt_tokens: {message}' if message else None):
    begin(config)


@pytest.mark.parametrize('uri, eval_prompts, error', [
  ('jsonl', 3, Devices), ('reasoning:chain_sum?max_digits=6', 64, Devices),
  ('reasoning:gcd?max_value=2', 64, DataError)])
def test_a_run_is_not_trained_on_what_it_is_evaluated_on(parts, begin, monkeypatch, uri, eval_prompts, error):
  """If there is nothing else to train on, the run ends before it uses devices."""
  made = []
  monkeypatch.setattr(loop, 'TaskSet', lambda *args, **how: made.append(TaskSet(*args, **how)) or made[-1])
  uri = parts([]).run.rl.task.uri if uri == 'jsonl' else uri
  config = load.load('tests/tiny_rl.py:init_from=x', {
    'rl.task.uri': uri, 'rl.task.held_out_fraction': '0', 'rl.keep_best': '', 'rl.eval_prompts': str(eval_prompts),
    'rl.eval_tasks': f'{{"mine": "{uri}"}}'})
  with pytest.raises(error, match='to leave out because they are evaluated on' if error is DataError else None):
    begin(config)
  if error is Devices:
    evaluated, train = made
    asked = {task.question for task in evaluated.distinct(eval_prompts)}
    assert len(asked) == eval_prompts and not asked & {train.at(i).question for i in range(64)}


def test_all_processes_must_have_the_same_problems_and_reward_function(parts):
  uri = parts([]).run.rl.task.uri
  config = load.load('tests/tiny_rl.py:init_from=x', {'rl.task.uri': uri, 'rl.task.reward': 'mine.py:reward'})
  path = uri.partition(':')[2]
  assert loop.inputs(config) == {f'problems {path}': path, 'reward mine.py': 'mine.py'}
  config.rl.task.reward = 'mine:reward'
  assert loop.inputs(config) == {f'problems {path}': path}


def test_a_step_without_a_decided_answer_has_no_pass_rate(parts):
  _, seen, progress = step(p := parts([WRONG, WRONG], **{'rl.long_prompts': 'skip'}))
  figures = figures_of(p, [], list(map(undecided, seen)), progress)
  assert figures['train/undecided'] == 2 * len(seen) and 'train/pass_rate' not in figures
  assert loop.describe_figures({**figures, 'time/tokens_per_s': 1.0})[0] == 'undecided'
  for rates in ([], [0.5], [0.5, 0.9], [0.5, 0.5], [0.5] * 49):
    known = [{**figures, 'train/pass_rate': rate} for rate in rates]
    assert 'flat' not in warnings([figures] * (100 - len(rates)) + known)
  assert 'flat' in warnings([figures, {**figures, 'train/pass_rate': 0.5}] * 50)  # half of the steps are known


def test_fewer_steps_than_are_done_are_refused(tmp_path):
  rl = rl_run(load.load('configs/rl_smoke.py', {'rl.steps': '60'})).rl
  (tmp_path / 'checkpoints' / '60').mkdir(parents=True)
  loop.check_steps(rl, epath.Path(tmp_path))
  (tmp_path / 'checkpoints' / '61').mkdir()
  with pytest.raises(ConfigError, match='config.rl.steps must be at least 61, .* got 60'):
    loop.check_steps(rl, epath.Path(tmp_path))
