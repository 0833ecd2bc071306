"""Tests that `betarank generate` prints tokens as they are drawn, and that they are the tokens of the sampler."""

import io
import re

import numpy as np
import pytest

from betarank.configs.errors import UserError
from betarank.data.show import printable
from betarank.eval import loaded as loading
from betarank.eval import prompt, prompt_command
from betarank.eval.loaded import Sampling, load_model, sample
from betarank.train.sampler import Sample

TEXT = 'Question: What is 3 + 4?\nSolution:'
FEW = ['--max_new_tokens=8']


@pytest.fixture(scope='module')
def loaded(run_dir):
  return load_model(str(run_dir))


@pytest.fixture
def generate(loaded, run_dir, monkeypatch, capsys):
  """Returns a function (*flags) that runs the command and returns its output. The checkpoint is loaded only once."""
  monkeypatch.setattr(loading, 'load_model', lambda path, tokenizer: loaded)

  def run(*flags):
    prompt_command.main([f'--checkpoint={run_dir}', *FEW, *flags])
    return capsys.readouterr().out
  return run


def test_what_is_printed_as_it_comes_is_the_sample(loaded, generate):
  tokens = loaded.tokenizer.encode(TEXT).tolist()
  parts = []
  drawn = [sample(loaded, tokens, Sampling(max_new_tokens=8), [i], watch=parts.append)[0] for i in (0, 1)]
  assert [part.finish for part in parts if part.finish] == [one.finish for one in drawn] and len(parts) > 2
  np.testing.assert_array_equal(np.concatenate([part.tokens for part in parts]),
                                np.concatenate([one.tokens for one in drawn]))
  out = generate('--samples=2', '--prompt=' + TEXT.replace('\n', '\\n'))
  for i, one in enumerate(drawn):
    end = {'eos': 'ended', 'length': 'cut'}[one.finish]
    text = loaded.tokenizer.decode(one.text_tokens)
    assert f'{TEXT}{printable(text)}\n[{i + 1} of 2, {end} after {len(one.tokens)} tokens]\n' in out


def test_tokens_are_listed_with_probability_rank_and_entropy(generate):
  out = generate('--prompt=' + TEXT, '--entropy')
  count = int(re.search(r'after (\d+) tokens', out)[1])
  rows = re.findall(r'  (\d\.\d{4})  +(\d+)  (\d+\.\d{4})$', out, re.M)
  assert len(rows) == count and all(0 <= float(p) <= 1 <= int(rank) for p, rank, _ in rows)
  mean = float(re.search(r'mean: entropy (\d+\.\d+)', out)[1])
  assert mean == pytest.approx(np.mean([float(entropy) for *_, entropy in rows]), abs=2e-4)


def test_lines_of_standard_input_are_prompts_until_it_ends(generate, monkeypatch):
  monkeypatch.setattr('sys.stdin', io.StringIO('Question: What is 5 + 6?\\nSolution:\n\nQuestion: What is 7 + 8?\n'))
  out = generate()
  assert out.startswith('Question: What is 5 + 6?\nSolution:') and '\nQuestion: What is 7 + 8?' in out
  assert len(re.findall(r' after \d+ tokens\]', out)) == 2


def test_a_backslash_can_be_written(generate, monkeypatch):
  monkeypatch.setattr('sys.stdin', io.StringIO('1 \\\\neq 2\n'))
  assert generate().startswith(r'1 \neq 2')
  assert generate(r'--prompt=1 \\neq 2\n\frac').startswith('1 \\neq 2\n\\frac')


def test_no_escape_sequence_reaches_the_terminal(generate, loaded, monkeypatch):
  tokens = loaded.tokenizer.encode('\x1b[2J\x9b\rx')
  drawn = Sample(0, 0, tokens, np.zeros(len(tokens)), 'length')

  def draw(*_, watch, **__):
    watch(drawn)
    return [drawn]
  monkeypatch.setattr(prompt, 'sample', draw)
  out = generate('--prompt=\x1b[31mred')
  assert '\x1b' not in out and '\x9b' not in out and '\r' not in out and 'red' in out and '[2J' in out


def test_standard_input_that_is_no_text_is_one_line(generate, monkeypatch):
  monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(b'1 + \xff\n'), 'utf-8'))
  with pytest.raises(UserError, match='standard input is not UTF-8 .invalid start byte.'):
    generate()


@pytest.mark.parametrize('flag, words', [
  ('--temperature=-1', '--temperature must be >= 0'), ('--top_p=0', r'--top_p must be in \(0, 1\]'),
  ('--max_new_tokens=0', '--max_new_tokens must be >= 1'), ('--seed=-1', '--seed must be in'),
  ('--samples=0', '--samples: expected a whole number above 0')])
def test_a_setting_that_cannot_be_is_named(generate, flag, words):
  with pytest.raises(UserError, match=words):
    generate(flag)


def test_a_run_that_is_not_there_is_named(tmp_path):
  with pytest.raises(UserError, match='no checkpoint there'):
    prompt_command.main([f'--checkpoint={tmp_path}', '--prompt=x'])
