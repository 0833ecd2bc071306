"""Tests that differences are paired and corrected, and computed only between runs that agree in everything but the
objective.
"""

import dataclasses
import json

import numpy as np
import pytest

from betarank.eval import sampling_metrics
from betarank.eval.report import agreement, arms, comparisons, curves, runs, sections, words
from tests.eval import sweep

AFTER = 'pre-training → RL'


def compared(root):
  """Returns {(stage, metric, arm): comparison} for the samples and the distributions of a sweep."""
  found = arms.read_sweep(root)
  both = comparisons.benchmarks(found, k=8) + comparisons.distributions(found, ['entropy_nats', 'ce_nats'])
  return {(c.stage, c.metric, c.arm): c for c in both}


def sentences(root):
  found = arms.read_sweep(root)
  said = words.first_screen(found, comparisons.distributions(found, ['entropy_nats', 'ce_nats']),
                            comparisons.benchmarks(found, k=8))
  return [sentence.removeprefix('<p>').removesuffix('</p>') for sentence in said]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """Returns the root of a sweep of three arms with three seeds each. After RL, arm 1 is better than the others."""
  root = tmp_path_factory.mktemp('whole')
  sweep.make(root, arms=sweep.ARMS[:3], seeds=3)
  return root


def test_differences_are_paired_and_corrected(whole):
  found = compared(whole)
  after = {arm: found[AFTER, 'avg_at_n', arm] for arm in ('CE', 'β = -0.25', 'β = 0.5')}
  assert after['β = -0.25'].verdict == 'beyond' and after['β = -0.25'].difference.mean == pytest.approx(0.25, abs=0.06)
  assert after['β = 0.5'].verdict == 'within' and after['CE'].difference is None
  better = after['β = -0.25']
  assert better.difference.mean == pytest.approx(better.value.mean - after['CE'].value.mean)
  assert better.difference.high - better.difference.low < (better.value.high - better.value.low) / 2
  assert better.p_holm >= better.difference.p_value
  assert found['pre-training', 'avg_at_n', 'β = -0.25'].verdict == 'within'
  gains = {(c.metric, c.arm): c for c in comparisons.gains(arms.read_sweep(whole), k=8)}
  assert gains['avg_at_n', 'β = -0.25'].verdict == 'beyond' and gains['avg_at_n', 'CE'].verdict == 'within'


def test_three_sentences_say_what_was_put_in(whole):
  what, before, after = sentences(whole)
  assert what == ('CE, β = -0.25 and β = 0.5 saw the same data for the same steps, with 3 seeds each, and differ only '
                  'in the objective.')
  assert before.startswith('Before RL, relative to CE: on main, entropy is lower for β = -0.25 (−0.')
  assert before.endswith(' and cross-entropy differs for no arm beyond noise.')
  assert after.startswith('After RL, β = -0.25 is better than CE on amc23 (+2')
  assert after.endswith('; no other difference is beyond noise.') and 'β = 0.5' not in after


def test_every_source_is_named_in_the_findings_and_its_options_are_left_out(whole):
  """Only the first source was named, the one without a difference, and a benchmark's name took three lines."""
  found = arms.read_sweep(whole)
  main = comparisons.distributions(found, ['entropy_nats', 'ce_nats'])
  on = lambda subject, p_holm: [dataclasses.replace(c, subject=subject, p_holm=p_holm) for c in main]
  first = on('reasoning:gcd?max_value=9&seed=1+products?max_digits=1', 1.0)
  said = words.first_screen(found, [*first, *on('text', 0.0), *on('code', 1.0)], [])[1]
  assert 'on reasoning:gcd+products and code, entropy differs for no arm beyond noise' in said
  assert 'on text, entropy is lower for β = -0.25' in said and 'max_value' not in said
  apart = ['reasoning:gcd?max_value=9', 'reasoning:gcd?max_value=99']
  assert words.short([*apart, 'code?a=1']) == {apart[0]: apart[0], apart[1]: apart[1], 'code?a=1': 'code'}


def test_one_seed_gives_no_verdict_and_no_rank(tmp_path):
  """A gain of 30 points with one seed per arm used to be called 'beyond noise'."""
  sweep.make(tmp_path, arms=sweep.ARMS[:2], seeds=1)
  found = compared(tmp_path)
  better = found[AFTER, 'avg_at_n', 'β = -0.25']
  assert better.difference.excludes_zero and better.verdict == '' and better.remark == 'one seed: no verdict'
  assert not any(c.verdict for c in found.values())
  what, before, after = sentences(tmp_path)
  assert '1 seed each' in what and 'this is one seed per arm, and what another would give is not known' in before
  assert after.startswith('After RL, with one seed per arm, no arm can be called better: on amc23, relative to CE')
  assert after.endswith('these intervals hold the noise of problems only, not that of seeds.')
  assert 'beyond' not in before + after


def test_runs_on_other_data_are_not_compared(tmp_path):
  """The data of one run has the same name and settings as that of the others, but another hash."""
  for name, beta, data in (('ce', 0.0, 'd' * 64), ('low', -0.25, 'e' * 64), ('high', 0.5, 'd' * 64)):
    sweep.run(tmp_path / name, objective={'beta': beta}, seed=0, steps=20, entropy=1.0 - beta, data=data)
  found = compared(tmp_path)
  low, high = (found['pre-training', 'entropy_nats', arm] for arm in ('β = -0.25', 'β = 0.5'))
  assert low.difference is None
  assert low.remark == 'not compared with CE: other data in source main (eeeeeeeeeeee against dddddddddddd)'
  assert high.difference.mean == pytest.approx(-0.5)
  what, before, _ = sentences(tmp_path)
  assert what == ('CE and β = 0.5 saw the same data for the same steps, with 1 seed each, and differ only in the '
                  'objective; β = -0.25 is not compared with CE: other data in source main (eeeeeeeeeeee against '
                  'dddddddddddd).')
  assert 'β = -0.25' not in before
  assert not curves.difference(arms.read_sweep(tmp_path / 'low'), 'pre-training', 'train/entropy_nats')[0]


def test_only_seeds_that_agree_are_counted(tmp_path):
  """All seeds of an arm used to be counted, as soon as one of them agreed with its baseline."""
  for seed in range(3):
    for name, beta, data in (('ce', 0.0, 'd'), ('low', -0.25, 'd' if seed else 'e'), ('high', 0.5, 'd')):
      sweep.run(tmp_path / f'{name}{seed}', objective={'beta': beta}, seed=seed, entropy=1.0, data=data * 64,
                steps=5 if (name, seed) == ('high', 1) else 20, changes={'train.tokens': 20 * 8 * 512})
  assert sentences(tmp_path)[0] == (
    'CE, β = -0.25 and β = 0.5 saw the same data for the same steps, with 2 seeds each, and differ only in the '
    'objective; some seeds of β = -0.25 are not compared with CE: other data in source main (eeeeeeeeeeee against '
    'dddddddddddd); some seeds of β = 0.5 are not compared with CE: step 5 (20,480 tokens) against 20 (81,920 tokens).')


def test_arms_with_other_baselines_are_counted_apart(tmp_path):
  for lr, seeds in ((3e-4, 1), (1e-3, 2)):
    for seed in range(seeds):
      for name, beta in (('ce', 0.0), ('low', -0.25)):
        sweep.run(tmp_path / f'{name}{lr}{seed}', objective={'beta': beta}, seed=seed, steps=20, entropy=1.0,
                  changes={'optimizer.lr': lr})
  assert sentences(tmp_path)[0] == (
    'CE, lr = 0.0003 and β = -0.25, lr = 0.0003 saw the same data for the same steps, with 1 seed each, and differ '
    'only in the objective; CE, lr = 0.001 and β = -0.25, lr = 0.001 saw the same data for the same steps, with 2 '
    'seeds each, and differ only in the objective; CE, lr = 0.001 is not compared with CE, lr = 0.0003: optimizer.lr '
    '0.001 against 0.0003.')


@pytest.mark.parametrize(('key', 'value', 'said'), [
  ('optimizer.lr', 1e-3, 'optimizer.lr 0.001 against 0.0003'),
  ('train.tokens', 10**6, 'train.tokens 1,000,000 against 81,920'),
  ('model.layers', 5, 'model.layers 5 against 4'),
  ('train.microbatches', 2, ''),  # how a run is executed changes nothing
  ('log.every_steps', 3, ''),
  ('model.qk_norm', None, ''),  # an older version wrote the config, without this setting; its default is True
])
def test_a_difference_needs_all_but_the_objective_to_be_alike(tmp_path, key, value, said):
  """value: the value of the setting in one of the runs; None if its config lacks the setting."""
  for name, beta in (('ce', 0.0), ('low', -0.25)):
    sweep.run(tmp_path / name, objective={'beta': beta}, seed=0, steps=20, entropy=1.0)
  config = json.loads((tmp_path / 'low' / 'config.json').read_text())
  section, name = key.split('.')
  if value is None:
    del config[section][name]
  else:
    config[section][name] = value
  (tmp_path / 'low' / 'config.json').write_text(json.dumps(config))
  c = next(c for (_, metric, arm), c in compared(tmp_path).items() if metric == 'entropy_nats' and 'β' in arm)
  assert (c.difference is None) == bool(said) and said in c.remark


def test_figures_of_other_steps_are_not_compared(tmp_path):
  """A run at step 12 used to be compared with a finished run, as if both had seen the same tokens."""
  for name, beta, steps in (('ce', 0.0, 20), ('low', -0.25, 12)):
    sweep.run(tmp_path / name, objective={'beta': beta}, seed=0, steps=steps, entropy=1.0)
    config = json.loads((tmp_path / name / 'config.json').read_text())
    config['train']['tokens'] = 20 * 8 * 512
    (tmp_path / name / 'config.json').write_text(json.dumps(config))
  c = compared(tmp_path)['pre-training', 'entropy_nats', 'β = -0.25']
  assert c.difference is None and 'step 12 (49,152 tokens) against 20 (81,920 tokens)' in c.remark
  assert sentences(tmp_path)[0] == ('β = -0.25 is not compared with CE: step 12 (49,152 tokens) against 20 (81,920 '
                                    'tokens); so no change is put down to an objective.')


def test_only_seeds_of_the_same_length_are_averaged(tmp_path):
  """The mean of runs of 20, 20 and 200 steps used to be shown as that of three seeds, without a remark."""
  for name, beta in (('ce', 0.0), ('low', -0.25)):
    for seed, steps in ((0, 200), (1, 20), (2, 20)):
      path = tmp_path / name / str(seed)
      sweep.run(path, objective={'beta': beta}, seed=seed, steps=steps, entropy=1.0 if steps == 20 else 9.0)
      sweep.probe(path, steps, entropy=1.0 if steps == 20 else 9.0, domain='probed')
  found = compared(tmp_path)
  plain, low = (found['pre-training', 'entropy_nats', arm] for arm in ('CE', 'β = -0.25'))
  assert plain.value.mean == 1.0 and plain.value.seeds == 2 and plain.by_seed == {1: 1.0, 2: 1.0}
  assert plain.remark == 'some seeds are not in the mean: step 200 (819,200 tokens) against 20 (81,920 tokens)'
  assert list(low.differences) == [1, 2] and low.difference.seeds == 2
  assert low.remark.endswith('some seeds are not compared: step 200 (819,200 tokens) against 20 (81,920 tokens)')
  there = arms.read_sweep(tmp_path)
  for lines in (curves.curve(there, 'pre-training', 'train/ce_nats')[0],
                curves.difference(there, 'pre-training', 'train/ce_nats')[0],
                curves.histogram(there, 'pre-training', 'probed', 'rank_histogram'),
                curves.coverage(there, 'pre-training', 'probed')):
    assert {line.seeds for line in lines} == {2}


def test_seeds_at_one_step_of_runs_of_other_lengths_are_not_averaged(tmp_path):
  """The learning rate at a step depends on the length, also in the run that RL started from."""
  for seed, tokens in ((0, 20), (1, 20), (2, 40)):
    sweep.run(tmp_path / 'pre' / str(seed), objective={}, seed=seed, steps=20, entropy=1.0,
              changes={'train.tokens': tokens * 8 * 512})
    sweep.run(tmp_path / 'rl' / str(seed), objective={}, seed=seed, steps=5, entropy=1.0,
              init_from=tmp_path / 'pre' / str(seed) / 'checkpoints' / '20')
  found = arms.read_sweep(tmp_path)
  (before,) = comparisons.distributions(found, ['entropy_nats'])
  assert before.value.seeds == 2 and before.remark.endswith('a run of 40 steps against one of 20')
  after = comparisons.dynamics(found, ['entropy_nats'])
  assert {c.value.seeds for c in after} == {2} and after[0].remark.endswith('one of 20 (before RL)')


def test_a_finished_seed_is_shown_rather_than_several_unfinished_ones(tmp_path):
  for seed, steps in ((0, 5), (1, 20), (2, 5)):
    sweep.run(tmp_path / str(seed), objective={}, seed=seed, steps=steps, entropy=1.0,
              changes={'train.tokens': 20 * 8 * 512})
  c = compared(tmp_path)['pre-training', 'entropy_nats', 'CE']
  assert list(c.by_seed) == [1] and c.remark.endswith('step 5 (20,480 tokens) against 20 (81,920 tokens)')


def test_only_samples_drawn_alike_are_averaged(tmp_path):
  """Samples at temperatures 0.7 and 0 used to be averaged, without a remark."""
  rng = np.random.default_rng(0)
  for seed, right, temperature in ((0, 0.0, 0.7), (1, 1.0, 0.0)):
    pre, rl = tmp_path / 'pre' / str(seed), tmp_path / 'rl' / str(seed)
    sweep.run(pre, objective={}, seed=seed, steps=20, entropy=1.0)
    sweep.run(rl, objective={}, seed=seed, steps=5, entropy=1.0, init_from=pre / 'checkpoints' / '20')
    for path, step in ((pre, 20), (rl, 5)):
      sweep.samples(path, step, 'amc23', [right] * 20, 16, rng, temperature=temperature)
  found = arms.read_sweep(tmp_path)
  for c in (*comparisons.benchmarks(found, k=8), *comparisons.gains(found, k=8)):
    if c.metric == 'avg_at_n':
      assert c.value.mean == 0.0 and c.value.seeds == 1
      assert c.remark.startswith('some seeds are not in the mean: sampled with other temperature')
  assert [line.seeds for line in curves.pass_curve(found, 'pre-training', 'amc23')] == [1]


def test_samples_are_paired_by_question():
  """The first two problems have the same question. One of two sets of samples lacks the third problem."""
  line = lambda problem, question, verdict: {'problem': problem, 'question': question, 'sample': 0, 'verdict': verdict,
                                             'group': 0, 'tokens': 1, 'finish': 'stop'}
  lines = [line(0, 'a', 'right'), line(1, 'a', 'wrong'), line(2, 'b', 'right'), line(3, 'c', 'wrong')]
  sets = [runs.SampleSet({}, sampling_metrics.collect(some), []) for some in (lines, lines[:2] + lines[3:])]
  values_SP, problems = comparisons.aligned(sets, lambda metrics: metrics['avg_at_n'])
  assert problems == ['0', '3'] and values_SP.tolist() == [[0.5, 0.0]] * 2


@pytest.mark.parametrize('key, what', [
  ('kept', 'other problems left to training by the evaluations'), ('reward', 'another reward function')])
def test_runs_with_other_problems_left_to_training_or_another_reward_function_are_not_compared(tmp_path, key, what):
  for name, beta, known in (('ce', 0.0, 'c' * 64), ('low', -0.25, 'd' * 64), ('high', 0.5, None)):
    sweep.run(tmp_path / 'pre' / name, objective={'beta': beta}, seed=0, steps=20, entropy=1.0)
    rl = tmp_path / 'rl' / name
    sweep.run(rl, objective={}, seed=0, steps=5, entropy=1.0, init_from=tmp_path / 'pre' / name / 'checkpoints' / '20')
    (path,) = rl.glob('checkpoints/5/meta/metadata')
    meta = json.loads(path.read_text())
    meta['cursor'] |= {key: known} if known else {}
    path.write_text(json.dumps(meta))
  found = {run.path.name: run for run in arms.read_sweep(tmp_path).runs if run.is_rl}
  differing = lambda name: agreement.disagreements(found['ce'], found[name])
  assert differing('low') == [f'{what} (cccccccccccc against dddddddddddd)']
  assert differing('high') == []  # from before this was recorded


def test_validations_on_other_tokens_are_not_compared(tmp_path):
  """The last validation of 20 batches used to be compared with one of 80, as if on the same tokens."""
  for name, beta, batches, prompts in (('ce', 0.0, 20, 64), ('low', -0.25, 80, 64), ('high', 0.5, 20, 32)):
    sweep.run(tmp_path / 'pre' / name, objective={'beta': beta}, seed=0, steps=20, entropy=1.0,
              changes={'log.eval_batches': batches})
    rl = tmp_path / 'rl' / name
    sweep.run(rl, objective={}, seed=0, steps=5, entropy=1.0, changes={'rl.eval_prompts': prompts},
              init_from=tmp_path / 'pre' / name / 'checkpoints' / '20')
    with (rl / 'metrics.jsonl').open('a') as file:
      file.write(json.dumps({'step': 5, 'eval/held_out/avg_at_16': 0.5}) + '\n')
  found = compared(tmp_path)
  low, high = (found['pre-training', 'entropy_nats', arm] for arm in ('β = -0.25', 'β = 0.5'))
  assert low.difference is None and 'measured on other tokens or with other settings' in low.remark
  assert high.difference is not None
  lines, _ = curves.curve(arms.read_sweep(tmp_path), AFTER, 'eval/held_out/avg_at_16')
  assert [line.arm for line in lines] == ['CE', 'β = -0.25']
  assert len(curves.curve(arms.read_sweep(tmp_path), AFTER, 'train/entropy_nats')[0]) == 3


def test_the_same_difference_in_all_seeds_gives_no_verdict(tmp_path):
  """Scores of few items often differ by the same number of items, which used to be beyond noise with p = 0."""
  for i, beta in enumerate((0.0, -0.25, 0.5)):
    for seed in range(2):
      path = tmp_path / f'{i}{seed}'
      sweep.run(path, objective={'beta': beta}, seed=seed, steps=20, entropy=1.0 + (i == 1))
      sweep.harness(path, 20, {'piqa': 0.6 + 0.02 * (seed + (i == 1)) + 0.04 * seed * (i == 2)}, limit=50)
  same, spread = comparisons.harness(arms.read_sweep(tmp_path))[1:]
  assert same.difference.mean == pytest.approx(0.02) and same.verdict == ''
  assert same.remark == 'no spread between seeds: no verdict' and same.difference_noise is None
  assert spread.verdict == 'within' and spread.p_holm == spread.difference.p_value  # of the only test
  assert 'no spread between seeds)' in sections._cell(same, 'score')
  assert sentences(tmp_path)[1] == (
    'Before RL, relative to CE: on main (validation in training), entropy differs for no arm beyond noise (no verdict '
    'on β = -0.25) and cross-entropy differs for no arm beyond noise.')


def test_arms_of_another_version_of_the_code_are_named(tmp_path):
  for name, beta, code in (('ce', 0.0, 'c0de'), ('low', -0.25, 'c0de'), ('high', 0.5, 'f00d+'), ('one', 1.0, '')):
    sweep.run(tmp_path / name, objective={'beta': beta}, seed=0, steps=20, entropy=1.0, code=code)
  assert sentences(tmp_path)[0] == (
    'CE, β = -0.25, β = 0.5 and β = 1 saw the same data for the same steps, with 1 seed each, and differ only in the '
    'objective, and in the code for β = 0.5 (f00d+ against c0de).')
  assert arms.read_sweep(tmp_path).notes == [
    'pre-training: runs of different versions of the code: CE c0de; β = -0.25 c0de; β = 0.5 f00d+']


def test_parents_must_agree_too(tmp_path):
  sweep.make(tmp_path, arms=sweep.ARMS[:2], seeds=1)
  meta = tmp_path / 'pre' / 'arm1-seed0' / 'checkpoints' / '40' / 'meta' / 'metadata'
  meta.write_text(meta.read_text().replace('d' * 64, 'e' * 64))
  c = compared(tmp_path)[AFTER, 'avg_at_n', 'β = -0.25']
  assert c.difference is None and 'other data in source main' in c.remark and '(before RL)' in c.remark


def test_rl_on_other_problems_is_not_compared(tmp_path):
  """The files of problems have the same name in both runs, but another content."""
  sweep.make(tmp_path, arms=sweep.ARMS[:2], seeds=1)
  meta = tmp_path / 'rl' / 'arm1-seed0' / 'checkpoints' / '10' / 'meta' / 'metadata'
  meta.write_text(meta.read_text().replace('b' * 64, 'c' * 64))
  c = compared(tmp_path)[AFTER, 'avg_at_n', 'β = -0.25']
  assert c.difference is None and 'other problems (cccccccccccc against bbbbbbbbbbbb)' in c.remark


def test_samples_drawn_otherwise_are_not_compared(tmp_path):
  sweep.make(tmp_path, arms=sweep.ARMS[:2], seeds=1)
  settings = tmp_path / 'rl' / 'arm1-seed0' / 'eval' / 'samples' / 'amc23' / '10.json'
  settings.write_text(json.dumps(json.loads(settings.read_text()) | {'temperature': 1.0}))
  found = compared(tmp_path)
  after = found[AFTER, 'avg_at_n', 'β = -0.25']
  assert after.remark == 'not compared with CE: sampled with other temperature' and after.difference is None
  assert found['pre-training', 'avg_at_n', 'β = -0.25'].difference is not None


@pytest.mark.parametrize(('chars', 'remark'), [(20, 'not compared with CE: sampled with other answer_chars'),
                                               (10_000, 'one seed: no verdict')])
def test_samples_judged_otherwise_are_not_compared(tmp_path, chars, remark):
  """A longer answer than answer_chars is wrong. An older file lacks the number, usually the default."""
  for name, beta, more in (('ce', 0.0, {}), ('low', -0.25, {'answer_chars': chars})):
    sweep.run(tmp_path / name, objective={'beta': beta}, seed=0, steps=20, entropy=1.0)
    sweep.samples(tmp_path / name, 20, 'amc23', [0.5] * 10, 16, np.random.default_rng(0), **more)
  assert compared(tmp_path)['pre-training', 'avg_at_n', 'β = -0.25'].remark == remark
  again = sections._commands(arms.read_sweep(tmp_path).runs[1], False, 'amc23')[-1]
  assert ('--config.eval.sample.verifier.answer_chars=20' in again) == (chars == 20)


def test_gains_are_measured_from_the_checkpoint_that_rl_started_from(tmp_path):
  sweep.make(tmp_path, arms=sweep.ARMS[:1], seeds=1)
  rng = np.random.default_rng(0)
  later = tmp_path / 'pre' / 'arm0-seed0'
  sweep.samples(later, 99, 'amc23', [1.0] * 30, 16, rng)  # of a step that RL never saw
  gain = next(c for c in comparisons.gains(arms.read_sweep(tmp_path), k=8) if c.metric == 'avg_at_n')
  assert abs(gain.difference.mean) < 0.1


def test_curves_are_means_over_seeds_of_means_over_bins(tmp_path):
  for seed, values in ((0, [1.0, 3.0]), (1, [3.0, 5.0])):
    path = tmp_path / str(seed)
    sweep.write(path / 'config.json', json.dumps(sweep.config(objective={}, seed=seed, steps=2)))
    sweep.write(path / 'metrics.jsonl', ''.join(json.dumps({'step': i + 1, 'train/x': v}) + '\n'
                                                for i, v in enumerate(values)))
  (series,), size = curves.curve(arms.read_sweep(tmp_path), 'pre-training', 'train/x')
  assert size == 1
  assert series.x_X.tolist() == [1, 2] and series.mean_X.tolist() == [2, 4]
  assert series.low_X.tolist() == [1, 3] and series.high_X.tolist() == [3, 5]
  values, x = np.array([7.0, 1, 4, 5, np.nan, np.inf]), np.array([2.0, 4, 6])
  np.testing.assert_allclose(curves._binned((np.arange(6), values), x), [4, 5, np.nan])


def test_long_curves_say_how_many_steps_a_point_is_the_mean_of(tmp_path):
  sweep.run(tmp_path / 'a', objective={}, seed=0, steps=1000, entropy=1.0)
  (series,), size = curves.curve(arms.read_sweep(tmp_path), 'pre-training', 'train/ce_nats')
  assert size == 10 and len(series.x_X) == 100
