"""Converts a task's generation_kwargs of lm-evaluation-harness to settings of the sampler.

This file doesn't import lm_eval, so that its tests don't need it.
"""

from collections.abc import Mapping
from typing import Any

from betarank.eval.config import EvalError
from betarank.train.sampler import SamplerConfig


def sampler_config(asked: Mapping[str, Any], max_length: int, rows: int) -> tuple[list[str], SamplerConfig]:
  """Returns (stop strings, settings of the sampler).

  The sampler accepts prompts of up to max_length - max_gen_toks tokens, so that there is room for the answer. The
  caller removes the first tokens of longer prompts.

  asked: the task's generation_kwargs, as lm_eval's normalize_gen_kwargs returns them.
  max_length: the maximum sequence length in tokens.
  rows: the number of rows that decode together.

  Raises:
    EvalError: generation_kwargs has a value that isn't supported.
  """
  left = dict(asked)
  until, new, samples = left.pop('until'), left.pop('max_gen_toks'), left.pop('do_sample')
  temperature = float(left.pop('temperature', 0.0))
  top_p, top_k = float(left.pop('top_p', 1.0)), int(left.pop('top_k', 0))
  if left:
    raise EvalError(f'a task asks for {", ".join(f"{k}={v!r}" for k, v in left.items())}, which the sampler doesn\'t '
                    'know; it knows until, max_gen_toks, do_sample, temperature, top_p and top_k')
  if new >= max_length:
    raise EvalError(f'a task asks for {new} new tokens, which leaves no room for its question in max_length = '
                    f'{max_length}; give a larger --max_length')
  try:
    return until, SamplerConfig(rows, max_length - new, new, temperature if samples else 0.0, top_p, top_k)
  except ValueError as error:
    raise EvalError(f'a task, or config.eval.sample, asks for what can\'t be: {error}') from None
