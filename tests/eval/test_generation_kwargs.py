"""Tests of the settings that the tasks of lm-evaluation-harness ask of the sampler."""

import pytest

from betarank.eval.config import EvalError
from betarank.eval.generation_kwargs import sampler_config

NORMALIZED = {'until': ['Q:'], 'max_gen_toks': 12}  # what normalize_gen_kwargs always returns, with do_sample


@pytest.mark.parametrize('asked, temperature', [
  (dict(do_sample=False), 0.0),
  (dict(do_sample=False, temperature=0.0), 0.0),  # what it makes of do_sample=False
  (dict(do_sample=True, temperature=0.7), 0.7),
])
def test_decoding_is_greedy_unless_the_task_samples(asked, temperature):
  until, s = sampler_config({**NORMALIZED, **asked, 'top_p': 0.9, 'top_k': 5}, max_length=32, rows=4)
  assert until == ['Q:'] and (s.decode_batch_size, s.max_prompt_tokens, s.max_new_tokens) == (4, 20, 12)
  assert (s.temperature, s.top_p, s.top_k) == (temperature, 0.9, 5)


@pytest.mark.parametrize('asked, message', [
  (dict(num_beams=4), "num_beams=4, which the sampler doesn't know"),
  (dict(max_gen_toks=32), 'leaves no room for its question in max_length = 32'),
  (dict(do_sample=True, temperature=1.0, top_p=2.0), 'top_p must be in'),
])
def test_what_the_sampler_cannot_do_is_refused(asked, message):
  with pytest.raises(EvalError, match=message):
    sampler_config({**NORMALIZED, 'do_sample': False, **asked}, max_length=32, rows=4)
