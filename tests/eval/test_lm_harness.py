"""Tests that the harness gets the same numbers from a checkpoint as from the same weights in Hugging Face's format."""

import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip('lm_eval', reason='pip install -e .[lm_eval]')

import jax
import jax.numpy as jnp
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from betarank import model
from betarank.configs import load
from betarank.configs.errors import UserError
from betarank.eval import config as settings
from betarank.eval import lm_harness
from betarank.eval.command import main
from betarank.runtime.checkpoint import restore_weights
from tests import runs

MULTIPLE_CHOICE = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: SUMS, train: SUMS}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "Question: {{question}}\\nSolution:"
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: SUMS}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
CONTEXTS = ['', 'Question: what is 3 + 4?\nSolution:', 'Question: 3 + 4 ', '3  ', 'Question: ' + '12 - 7 + ' * 12,
            'é▁</s>']
CONTINUATIONS = [' 7', 'Answer: 12\n', '▁ü', 'a', ' 5 + 5 = 10 + 7']


def requests(kind, arguments):
  return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


PAIRS = requests('loglikelihood', [(a, b) for a in CONTEXTS for b in CONTINUATIONS])
TEXTS = requests('loglikelihood_rolling', [('What is 3 + 4?',), ('x',), ('12 - 7 + ' * 30,), ('é▁ü </s>\n\n' * 9,)])


@pytest.fixture(scope='module')
def ours(run_dir):
  """Returns the model as the harness creates it from the name 'betarank'."""
  made = get_model('betarank').create_from_arg_string(
    f'checkpoint={run_dir},eval.sample.decode_batch_size=8', {'batch_size': 8})
  assert isinstance(made, lm_harness.Betarank) and made._run.eval.sample.decode_batch_size == 8
  return made


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Returns a folder with the test's own tasks."""
  path = tmp_path_factory.mktemp('tasks')
  questions = [{'question': f'What is {i} + {i + 2}?' + ' and then' * i, 'choices': [f' {i}', f' {2 * i + 2}', ' no'],
                'label': 1} for i in range(8)]
  (path / 'sums.jsonl').write_text(''.join(json.dumps(q) + '\n' for q in questions))
  for name, text in (('sums', MULTIPLE_CHOICE), ('texts', ROLLING)):
    (path / f'{name}.yaml').write_text(text.replace('SUMS', str(path / 'sums.jsonl')))
  return path


def test_likelihoods_are_those_of_all_logits(ours, run_dir):
  run, tokenizer = ours._run, ours._tokens
  _, shapes, _ = model.abstract(run.model)
  [subject] = settings.find_checkpoints(str(run_dir))
  params = restore_weights(subject.path, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))[0]

  @jax.jit
  def logits(x):
    hidden = model.forward(run.model, params, x, jnp.arange(x.shape[1])[None], jnp.ones_like(x))[0]
    return hidden[0] @ model.head(run.model, params)

  def brute(tokens, count):
    """Returns (log-probability, greedy) of the last `count` tokens, given the tokens before them.

    Other tokens are appended, which can't change the result, so that all texts have the same length.
    """
    after = [7] * (ours.max_length + 1 - len(tokens))
    z = np.asarray(logits(jnp.array([[*tokens[:-1], *after]])), np.float64)
    logp = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
    at = np.arange(len(tokens) - 1)[-count:]
    return logp[at, tokens[-count:]].sum(), bool((logp[at].argmax(-1) == tokens[-count:]).all())

  for request, (logp, is_greedy) in zip(PAIRS, ours.loglikelihood(PAIRS)):
    context, continuation = request.args
    whole = [tokenizer.bos, *tokenizer.encode(context + continuation)]
    count = len(whole) - 1 - len(tokenizer.encode(context.rstrip()))
    want = brute(whole[-(ours.max_length + 1):], count)
    np.testing.assert_allclose(logp, want[0], atol=1e-4)
    assert is_greedy == want[1]
  for request, got in zip(TEXTS, ours.loglikelihood_rolling(TEXTS)):
    whole, size = [tokenizer.bos] * 2 + tokenizer.encode(request.args[0]).tolist(), ours.max_length
    parts = [(whole[:size + 1], min(size, len(whole) - 1))]
    for start in range(size + 1, len(whole), size):  # what a later window has no new tokens for, it fills with old ones
      end = min(start + size, len(whole))
      parts.append((whole[end - size - 1:end], end - start))
    np.testing.assert_allclose(got, sum(brute(*part)[0] for part in parts), atol=1e-4)


def test_texts_end_where_the_task_says(ours):
  question = 'Question: what is 3 + 4?\nSolution:'
  asked = [dict(max_gen_toks=6), dict(max_gen_toks=6, until=[]), dict(max_gen_toks=6, do_sample=False),
           dict(max_gen_toks=6, do_sample=False, temperature=0.0), dict(until=['Q'], max_gen_toks=3)]
  whole, *same, short = ours.generate_until(requests('generate_until', [(question, a) for a in asked]))
  assert same == [whole] * 3 and whole.startswith(short)
  tokens = ours.tok_encode(question)
  for _ in range(6):
    likely = ours._score([(None, tokens, [t]) for t in range(384)])
    tokens.append(max(range(384), key=lambda t: likely[t][0]))
  assert whole == ours._tokens.decode(tokens[-6:])
  [cut] = ours.generate_until(requests('generate_until', [(question, dict(max_gen_toks=6, until=whole[2]))]))
  assert cut == whole[: whole.index(whole[2])]
  hot = dict(max_gen_toks=6, do_sample=True, temperature=2.0)
  drawn = ours.generate_until(requests('generate_until', [(question, hot), (question + ' ', hot)]))
  assert drawn[0] != whole and drawn == ours.generate_until(
    requests('generate_until', [(question, hot), (question + ' ', hot)]))


@pytest.mark.parametrize('asked, message', [
  (dict(num_beams=4), 'num_beams=4, which the sampler doesn\'t know'),
  (dict(max_gen_toks=32), 'leaves no room for its question in max_length = 32'),
  (dict(max_gen_toks=4, do_sample=True, temperature=1.0, top_p=2.0), 'top_p must be in'),
])
def test_what_the_sampler_cannot_do_is_refused(ours, asked, message):
  with pytest.raises(UserError, match=message) as error:
    ours.generate_until(requests('generate_until', [('x', asked)]))
  assert '\n' not in str(error.value)


def test_the_command_writes_what_the_harness_finds(run_dir, folder, capsys):
  command = ['harness', f'--checkpoint={run_dir}', '--tasks=sums,texts', '--limit=6',
             f'--include_path={folder}']
  main(command)
  path = run_dir / 'eval' / 'harness' / 'sums+texts' / '8.json'
  found = json.loads(path.read_text())
  assert found['step'] == 8 and found['tasks'] == ['sums', 'texts'] and found['limit'] == 6
  assert 0 <= found['results']['sums']['acc,none'] <= 1 and found['results']['texts']['bits_per_byte,none'] > 0
  assert 'word_perplexity' in capsys.readouterr().out
  main(command)
  assert 'is there already' in capsys.readouterr().out
  with pytest.raises(UserError, match='--tasks=hellaswagg: no such task; did you mean hellaswag.'):
    main([*command[:2], '--tasks=hellaswagg'])


def test_a_checkpoint_of_rl_is_evaluated_too(run_dir, folder):
  """Its own config has no data.sequence_length, and its problems were longer than the rows of the pre-training."""
  [subject] = settings.find_checkpoints(str(run_dir))
  pretrained = subject.meta['config']
  rl = json.loads(load.to_json(load.load('tests/tiny_rl.py:init_from=x')))
  subject = dataclasses.replace(subject, meta={
    **subject.meta, 'config': rl, 'inherited': {'data': pretrained['data'], 'objective': pretrained['objective']},
    'tokenizer': f'{pretrained["data"]["dir"]}/tokenizer.model'})
  run = settings.eval_run(settings.configure(subject), subject)
  lm_harness.harness(run, [subject], 'sums', num_fewshot=None, limit=2, include_path=str(folder), max_length=0)
  found = json.loads((run_dir / 'eval' / 'harness' / 'sums' / '8.json').read_text())
  assert found['max_length'] == 64 + 32 and 0 <= found['results']['sums']['acc,none'] <= 1


def test_processes_that_are_asked_for_other_texts_end_with_one_line(ours, monkeypatch):
  """Processes compute all rows together. With different texts, each process would get results of another process's
  texts.
  """
  monkeypatch.setattr(lm_harness.multihost, 'of_first_process', lambda x: x ^ 1)
  for ask in (lambda: ours.loglikelihood(PAIRS[:1]),
              lambda: ours.generate_until(requests('generate_until', [('x', dict(max_gen_toks=2))]))):
    with pytest.raises(UserError, match='process 0: the task asks for other texts here than in process 0'):
      ask()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(run_dir, folder):
  command = ['eval', 'harness', f'--checkpoint={run_dir}', '--tasks=sums,texts', '--limit=5',
             f'--include_path={folder}', '--config.eval.probe.batch_size=8']
  path = run_dir / 'eval' / 'harness' / 'sums+texts' / '8.json'
  found = []
  for processes in (1, 2):
    path.unlink(missing_ok=True)
    job = [f'--coordinator=127.0.0.1:{runs.free_port()}', '--processes=2', '--config.train.mesh.fsdp=2']
    pair = [runs.betarank(*command, *(job if processes > 1 else []), f'--process_id={i}') for i in range(processes)]
    results = runs.finish_well(pair)
    assert [('written' in out) for _, out, _ in results] == [True, False][:processes]
    found.append(json.loads(path.read_text())['results'])
  for task in ('sums', 'texts'):
    for name, value in found[0][task].items():
      assert found[1][task][name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name


def test_hugging_face_says_the_same(ours, run_dir, folder, tmp_path, monkeypatch):
  """Exports the weights, and evaluates them with the harness's own model for transformers."""
  for name in ('torch', 'transformers', 'accelerate', 'safetensors'):
    pytest.importorskip(name)
  import lm_eval
  from lm_eval.models.huggingface import HFLM
  from lm_eval.tasks import TaskManager

  from betarank.train.hf import export

  export(str(run_dir), str(tmp_path / 'hf'))
  theirs = HFLM(pretrained=str(tmp_path / 'hf'), device='cpu', dtype='float32', batch_size=4)
  assert theirs.max_length == ours.max_length and theirs.prefix_token_id == ours.prefix_token_id
  for mine, other in zip(ours.loglikelihood(PAIRS), theirs.loglikelihood(PAIRS), strict=True):
    assert mine[0] == pytest.approx(other[0], abs=1e-4) and mine[1] == other[1]
  assert ours.loglikelihood_rolling(TEXTS) == pytest.approx(theirs.loglikelihood_rolling(TEXTS), abs=1e-4)
  # Bytes that are no character are written differently there.
  monkeypatch.setattr(ours._tokens, 'decode', lambda ids: theirs.tok_decode(ids.tolist()))
  drawn = [requests('generate_until', [(c, dict(until=['\n'], max_gen_toks=9)) for c in CONTEXTS[1:]]) for _ in '12']
  assert ours.generate_until(drawn[0]) == theirs.generate_until(drawn[1])
  manager = TaskManager(include_path=str(folder))
  found = [lm_eval.simple_evaluate(lm, tasks=['sums', 'texts'], num_fewshot=shots, task_manager=manager,
                                   bootstrap_iters=0) for lm in (ours, theirs) for shots in (0, 2)]
  for mine, other in zip(found[:2], found[2:]):
    for task in ('sums', 'texts'):
      a, b = ([s['resps'] for s in x['samples'][task]] for x in (mine, other))
      assert len(a) == 8
      np.testing.assert_allclose(np.array(a, np.float64), np.array(b, np.float64), atol=1e-4)
