"""Provides a model that gives prescribed answers, and writes files of problems."""

import json
import types

import numpy as np

from betarank.train.sampler import Sample


class Scripted:
  """A tokenizer and a sampler in one. The sampler answers every prompt with the same texts.

  A prompt has two tokens, and one more for each 'word ' in it.

  turn: a function (waiting prompts) -> the index of the prompt that is answered next.
  tokens: the number of tokens of each answer.
  first: after a call, the number of prompts that it began with; 0 before the first call.
  """

  bos = 0

  def __init__(self, texts, turn=lambda waiting: 0, tokens=2):
    self.texts, self.turn, self.s = texts, turn, types.SimpleNamespace(max_prompt_tokens=8)
    self.tokens, self.first = tokens, 0

  def encode(self, text):
    return np.array([1, 2] + [3] * text.count('word '))

  def decode(self, tokens):
    return self.texts[int(tokens[0])]

  def __call__(self, params, prompts, *, samples, seed, step, more=None):
    waiting = list(prompts)
    self.first = len(waiting)
    while waiting:
      prompt = waiting.pop(self.turn(waiting))
      yield [Sample(prompt.id, i, np.array([i] + [9] * (self.tokens - 1), np.int32),
                    np.zeros(self.tokens, np.float32), 'eos') for i in range(samples)]
      new = more() if more else []
      if new is None:
        return
      waiting += new


def write(path, *records):
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return path
