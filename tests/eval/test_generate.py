"""Tests that no sample is lost or drawn twice, whatever interrupts a command, and that files have what the verifier
judged.
"""

import contextlib
import dataclasses
import json
import signal
import time
import types

import numpy as np
import pytest
from etils import epath

from betarank.data import read_tokenizer
from betarank.eval import command, generate
from betarank.eval import config as settings
from betarank.eval.benchmarks import open_benchmark
from betarank.eval.sampling_metrics import collect
from betarank.runtime import workdir
from betarank.tasks.task_set import Task
from betarank.tasks.verifiers import Verdict, Verifier, VerifierConfig
from betarank.train.sampler import Sample
from tests import runs
from tests.runs import betarank

URI = 'reasoning:chain_sum?max_terms=2'
FOLDER = 'reasoning_chain_sum_max_terms=2'
PROBLEMS, N = 30, 4
SMALL = [f'--config.eval.sample.{setting}' for setting in (
  f'problems={PROBLEMS}', f'samples={N}', 'max_new_tokens=24', 'decode_batch_size=4')]


def start(run_dir, *extra):
  return betarank('eval', 'sample', f'--checkpoint={run_dir}', f'--benchmark={URI}', *SMALL, *extra)


def finish(process):
  return runs.finish([process])[0]


def lines(path):
  return [json.loads(text) for text in path.read_text().splitlines()]


def in_order(path):
  return sorted(lines(path), key=lambda line: (line['problem'], line['sample']))


@pytest.fixture(scope='module')
def undisturbed(run_dir):
  """Returns (path of the samples of checkpoint 8, output of the command) of a run of the command without interruption.
  """
  code, out, err = finish(start(run_dir))
  assert code == 0, err
  return run_dir / 'eval' / 'samples' / FOLDER / '8.jsonl', out


def test_every_sample_is_there_with_its_settings(undisturbed, run_dir):
  path, out = undisturbed
  got = in_order(path)
  assert [(line['problem'], line['sample']) for line in got] == [(p, s) for p in range(PROBLEMS) for s in range(N)]
  assert all(line.keys() == {'problem', 'question', 'sample', 'text', 'answer', 'verdict', 'logp', 'tokens', 'finish',
                             'group'}
             for line in got)
  assert all(1 <= line['tokens'] <= 24 and line['logp'] <= 0 and line['finish'] in ('stop', 'length') for line in got)
  about = json.loads(path.with_suffix('.json').read_text())
  assert about['benchmark'] == URI and about['checkpoint'] == str(run_dir / 'checkpoints' / '8')
  want = dict(step=8, parent='', n=N, problems=PROBLEMS, temperature=0.7, top_p=0.95, top_k=0, max_new_tokens=24,
              seed=0)
  assert {key: about[key] for key in want} == want and len(about['data_sha256']) == 64
  assert f'problem {PROBLEMS} of {PROBLEMS}' in out
  avg = 100 * np.mean([line['verdict'] == 'right' for line in got])
  assert f'Avg@{N}' in out and f'{avg:.1f} [' in out
  assert collect(got).score_PN.shape == (PROBLEMS, N)


def test_killed_and_started_again_gives_the_same_samples(undisturbed, run_dir):
  path = undisturbed[0]
  want = in_order(path)
  path.unlink()
  process = start(run_dir)
  while process.poll() is None and (not path.exists() or path.read_text().count('\n') < 5 * N):
    time.sleep(0.005)
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  kept = lines(path)
  assert 5 * N <= len(kept) < PROBLEMS * N
  # A kill in the middle of a write can leave less than a line, and less than a problem.
  path.write_text(''.join(json.dumps(line) + '\n' for line in kept[1:]) + '{"problem": 29, "sam')
  code, out, err = finish(start(run_dir))
  assert code == 0, err
  assert in_order(path) == want
  assert lines(path)[: len(kept) - N] == kept[N:]  # what was whole wasn't drawn again
  assert table(out) == table(undisturbed[1])


def test_a_line_cut_just_before_its_end_spoils_no_other(undisturbed, run_dir):
  """The last line lacks only its line end. The next line that is written must not be appended to it."""
  path = undisturbed[0]
  before = path.read_text()
  path.write_text(before[:-1])
  last = json.loads(before.splitlines()[-1])['problem']
  assert opened(run_dir).missing == [last]
  kept = path.read_text()
  path.write_text(before)
  assert kept.endswith('\n') and len(kept.splitlines()) == (PROBLEMS - 1) * N


def table(out):
  return out[out.index(f'{PROBLEMS} problems, {N} samples'):]


def opened(run_dir, writes=True, **overrides):
  """Returns the SampleFile of checkpoint 8, opened as the command opens it."""
  [subject] = settings.find_checkpoints(str(run_dir))
  config = settings.configure(subject)
  config.eval.sample.update({
    'problems': PROBLEMS, 'samples': N, 'max_new_tokens': 24, 'decode_batch_size': 4, **overrides})
  run = settings.eval_run(config, subject)
  return generate.SampleFile(subject, open_benchmark(URI, run.eval.sample), run, writes)


def test_other_processes_draw_what_process_0_lacks_and_change_no_file(undisturbed, run_dir, monkeypatch):
  before = undisturbed[0].read_text()
  undisturbed[0].write_text(before[:-1])  # the file may be taken up, and cut, by process 0 alone
  monkeypatch.setattr(generate.multihost, 'of_first_process', lambda lacks_P: np.arange(len(lacks_P)) == 7)
  file = opened(run_dir, writes=False)
  asked = []

  def sampler(params, prompts, **_):
    yield from asked.extend(prompts) or [[], []]

  generate._fill(file, types.SimpleNamespace(name=URI), sampler, None, list('abcdefghij'), None, None, 0)
  assert file.missing == [7] and asked == ['h'] and undisturbed[0].read_text() == before[:-1]
  undisturbed[0].write_text(before)


@pytest.mark.parametrize('allowed, want', [(2, 'bcd'), (9, 'bcde')])
def test_asked_to_stop_it_keeps_what_is_drawn(allowed, want, monkeypatch):
  """`stop` isn't called after the last problem, because nothing is left to stop then."""
  line = {'verdict': 'right', 'tokens': 3, 'finish': 'stop'}
  monkeypatch.setattr(generate, 'judged', lambda group, *_: [line | {'problem': group[0].prompt_id}] * N)
  written, calls = [], []
  file = types.SimpleNamespace(path='FILE', missing=[1, 2, 3, 4], problems=5, n=N, about={'benchmark': URI, 'step': 8},
                               close=lambda: written.append('closed'),
                               append=lambda lines: written.append('abcde'[lines[0]['problem']]))

  def stop():
    calls.append(1)
    if len(calls) > allowed:
      raise SystemExit(130)

  sampler = lambda params, prompts, **_: ([types.SimpleNamespace(prompt_id=p)] for p in prompts)
  benchmark = types.SimpleNamespace(name=URI, tasks=range(5))
  with pytest.raises(SystemExit) if allowed < 3 else contextlib.nullcontext():
    generate._fill(file, benchmark, sampler, None, range(5), None, 'a verifier', 0, stop)
  assert written == [*want, 'closed'] and len(calls) == 3


@pytest.mark.slow
def test_two_processes_draw_the_samples_of_one(undisturbed, run_dir):
  """The two processes resume a file of which one process has written the first three problems."""
  path = undisturbed[0]
  want = in_order(path)
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines(path)[:3 * N]))
  job = [f'--coordinator=127.0.0.1:{runs.free_port()}', '--processes=2', '--config.train.mesh.fsdp=2']
  pair = [betarank('eval', 'sample', f'--checkpoint={run_dir}', f'--benchmark={URI}', *SMALL, *job,
                   f'--process_id={i}') for i in range(2)]
  (_, out, _), (_, silent, _) = runs.finish_well(pair)
  exact = lambda found: [{key: line[key] for key in line if key != 'logp'} for line in found]
  assert exact(in_order(path)) == exact(want) and table(out) == table(undisturbed[1]) and 'problem' not in silent
  np.testing.assert_allclose([line['logp'] for line in in_order(path)], [line['logp'] for line in want], atol=1e-3)


@pytest.mark.slow
def test_ctrl_c_to_one_of_two_processes_ends_both_after_a_problem(undisturbed, run_dir):
  path = undisturbed[0]
  want = in_order(path)
  path.unlink()
  job = [f'--coordinator=127.0.0.1:{runs.free_port()}', '--processes=2', '--config.train.mesh.fsdp=2']
  pair = [betarank('eval', 'sample', f'--checkpoint={run_dir}', f'--benchmark={URI}', *SMALL, *job,
                   f'--process_id={i}') for i in range(2)]
  while pair[0].poll() is None and (not path.exists() or path.read_text().count('\n') < 2 * N):
    time.sleep(0.005)
  pair[1].send_signal(signal.SIGINT)
  (first, out, _), (second, _, err) = runs.finish(pair)
  assert (first, second) == (143, 130), (out, err)
  assert 'asked to stop: results so far are kept' in out and 'stopping after this problem' in err
  assert 2 * N <= len(lines(path)) < PROBLEMS * N and len(lines(path)) % N == 0
  assert finish(start(run_dir))[0] == 0
  exact = lambda found: [{key: line[key] for key in line if key != 'logp'} for line in found]
  assert exact(in_order(path)) == exact(want)


def test_other_settings_are_not_mixed_in(undisturbed, run_dir):
  before = undisturbed[0].read_text()
  assert opened(run_dir).missing == [] and opened(run_dir, decode_batch_size=8).missing == []
  for setting, message in ((dict(temperature=1.0), 'temperature = 0.7, now 1.0'), (dict(samples=8), 'n = 4, now 8'),
                           (dict(prompt='Say {question}\n'), 'data_sha256 = '), (dict(seed=1), 'seed = 0, now 1'),
                           (dict(verifier=dict(answer_chars=20)), 'answer_chars = 10000, now 20')):
    with pytest.raises(settings.EvalError, match=message):
      opened(run_dir, **setting)
  with pytest.raises(settings.UserError, match='config.eval.sample.top_p must be in'):
    opened(run_dir, top_p=0.0)
  assert undisturbed[0].read_text() == before
  about = undisturbed[0].with_suffix('.json')
  stored = json.loads(about.read_text())
  about.write_text(json.dumps({key: value for key, value in stored.items() if key != 'answer_chars'}))  # an older file
  try:
    assert opened(run_dir).missing == []
    with pytest.raises(settings.EvalError, match='answer_chars = 10000, now 20'):
      opened(run_dir, verifier=dict(answer_chars=20))
  finally:
    about.write_text(json.dumps(stored))


def test_two_samplings_of_a_run_are_not_mixed_but_a_probe_may_go_on_beside(run_dir):
  with workdir.claim(epath.Path(run_dir) / 'eval', lock='.lock-probe'):
    code, _, err = finish(start(run_dir))
    assert code == 0, err
  with workdir.claim(epath.Path(run_dir) / 'eval', lock='.lock-sample'):
    code, _, err = finish(start(run_dir))
  assert code == 2 and err.count('\n') == 1 and 'is at work there; stop it first' in err


@pytest.mark.parametrize('other', ['sample', 'harness'])
def test_the_papers_average_and_a_command_whose_files_it_writes_exclude_each_other(run_dir, monkeypatch, other):
  monkeypatch.setattr(command, '_harness', lambda *_: pytest.fail('two commands write the same files'))
  there = workdir.claim(epath.Path(run_dir) / 'eval', lock=f'.lock-{other}')
  with there, pytest.raises(settings.UserError, match='is at work there; stop it first'):
    command.main(['paper', f'--checkpoint={run_dir}'])


def test_a_sample_is_judged_as_it_is_stored(run_dir):
  [subject] = settings.find_checkpoints(str(run_dir))
  tokenizer = read_tokenizer(settings.eval_run(settings.configure(subject), subject).data.tokenizer_path)
  task = Task('id', 'Q', 'Question: Q\nSolution:', '1/2', 'math', 'line')
  texts = [' so\nAnswer: 0.5\n', ' hm\nAnswer: 3', ' hm', ' hm\nAnswer: 1/2']
  tokens = [[*tokenizer.encode(text), *([tokenizer.eos] if i else [])] for i, text in enumerate(texts)]
  group = [Sample(7, i, np.array(ids), np.full(3, -0.5, np.float32), 'eos' if i else 'length')
           for i, ids in enumerate(tokens)]
  with Verifier(VerifierConfig(workers=1)) as verifier:
    got = generate.judged(group, task, tokenizer, verifier)
  assert [line['text'] for line in got] == texts
  assert [line['answer'] for line in got] == ['0.5', '3', None, '1/2']
  assert [line['verdict'] for line in got] == ['right', 'wrong', 'wrong', 'right']
  assert [line['group'] for line in got] == [0, 1, -1, 0]
  assert [line['finish'] for line in got] == ['length', 'stop', 'stop', 'stop']
  assert {line['logp'] for line in got} == {-1.5} and {line['problem'] for line in got} == {7}


def test_classes_of_answers_are_those_of_the_verifier():
  math = Task('id', 'Q', 'Q', r'\frac{\sqrt{2}}{2}', 'math', 'boxed')
  answers = [r'\frac{1}{\sqrt{2}}', 'x+1', None, '1+x', '7', '7.0', r'\sqrt{2}/2', 'x + 2', '$7$']
  verdicts = [Verdict.RIGHT if 'sqrt' in (a or '') else Verdict.WRONG for a in answers]
  with Verifier(VerifierConfig(workers=1)) as verifier:
    assert generate.answer_classes(answers, verdicts, math, verifier) == [0, 1, -1, 1, 2, 2, 0, 3, 2]
    exact = dataclasses.replace(math, verifier='exact')
    assert generate.answer_classes(['7', '7.0', '7'], [Verdict.WRONG] * 3, exact, verifier) == [0, 1, 0]


def test_rl_and_evaluation_cut_the_same_answer_out_of_a_text():
  """In the text, the model doesn't stop after its answer, but continues with a question of its own."""
  task = Task('id', 'Q', 'Question: 1+1\nSolution: 2\n\nQuestion: Q\nSolution:', '5', 'math', 'boxed')
  own = ' \\boxed{5}\n\nQuestion: other\nSolution: \\boxed{6}'
  tokenizer = types.SimpleNamespace(decode=lambda tokens: own)
  group = [Sample(0, 0, np.array([1, 0], np.int32), np.zeros(2, np.float32), 'eos')]
  with Verifier(VerifierConfig(workers=1)) as verifier:
    [line] = generate.judged(group, task, tokenizer, verifier)
    assert (line['answer'], line['verdict']) == ('5', 'right')
    assert verifier.grade([(own, task)])[0].answer == '5'  # as rl/rollout.py asks


def test_made_up_problems_are_ones_that_rl_never_sees(run_dir):
  from betarank.tasks.task_set import TaskConfig, TaskSet

  [subject] = settings.find_checkpoints(str(run_dir))
  c = dataclasses.replace(settings.eval_run(settings.configure(subject), subject).eval.sample, problems=20)
  asked = open_benchmark('reasoning:chain_sum', c).tasks
  trained = TaskSet(TaskConfig('reasoning:chain_sum', held_out_fraction=c.held_out_fraction))
  assert not {task.id for task in asked} & {trained[i].id for i in range(2000)}


def test_only_made_up_problems_need_what_rl_held_out(run_dir, tmp_path):
  """RL on files holds nothing out by default. Such a run can still be loaded, and asked problems from files."""
  [subject] = settings.find_checkpoints(str(run_dir))
  after_rl = lambda uri, share: dataclasses.replace(subject, meta={**subject.meta, 'config': {
    **subject.meta['config'], 'rl': {'task': {'uri': uri, 'held_out_fraction': share}}}})
  of_files, made_up = after_rl('jsonl:problems.jsonl', 0.0), after_rl('reasoning:chain_sum', 0.01)
  config = settings.configure(made_up)
  config.eval.sample.data_dir = str(tmp_path)
  run = settings.eval_run(config, subject)  # all commands call it: generate, explore, eval probe, ...
  with pytest.raises(settings.UserError, match='--benchmark=reasoning:.*: .* held out 0.01 of its RL, .*'
                     'held_out_fraction must be at most that, got 0.02$'):
    generate.sample(run, [made_up], f'gsm8k,{URI}')
  for of, names in ((made_up, 'gsm8k'), (of_files, f'gsm8k,{URI}')):
    with pytest.raises(settings.UserError, match='gsm8k_test.jsonl: no such file'):
      generate.sample(run, [of], names)
