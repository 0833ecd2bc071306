"""A model that answers as it is told, and files of problems."""

import json
import types

import numpy as np

from betarank.train.sampler import Sample


class Scripted:
  """A tokenizer and a sampler that answer every prompt with the same texts. A prompt has a token per 'word '.

  turn: a function (prompts that wait) -> the index of the one that is answered next.
  """

  bos = 0

  def __init__(self, texts, turn=lambda waiting: 0):
    self.texts, self.turn, self.s = texts, turn, types.SimpleNamespace(max_prompt_tokens=8)

  def encode(self, text):
    return np.array([1, 2] + [3] * text.count('word '))

  def decode(self, tokens):
    return self.texts[int(tokens[0])]

  def __call__(self, params, prompts, *, samples, seed, step, more=None):
    waiting = list(prompts)
    while waiting:
      prompt = waiting.pop(self.turn(waiting))
      yield [Sample(prompt.id, i, np.array([i, 9], np.int32), np.zeros(2, np.float32), 'eos')
             for i in range(samples)]
      waiting += more() if more else []


def write(path, *records):
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return path
