"""Continues a prompt and prints the tokens as they are drawn."""

import codecs

import numpy as np

from betarank.data.show import printable
from betarank.eval.explore.figures import figures
from betarank.eval.loaded import Loaded, Sampling, sample
from betarank.eval.token_texts import token_text
from betarank.train.sampler import Sample


def generate(
  loaded: Loaded, text: str, sampling: Sampling, samples: int, number: int = 0, entropy: bool = False,
) -> None:
  """Prints continuations of a text as they are drawn, token by token. The text itself is printed before each
  continuation. Unprintable characters are replaced, as in data.show.printable.

  Args:
    samples: the number of continuations.
    number: the index of the prompt among the prompts of this session. With another index, the same text is continued
      differently.
    entropy: whether to print, after each continuation, a table with the entropy at each token.

  Raises:
    DataError: the text can't be encoded.
  """
  tokenizer = loaded.tokenizer
  prompt = tokenizer.encode(text).tolist()
  for i in range(samples):
    decoder = codecs.getincrementaldecoder('utf-8')('replace')  # bytes wait until their character is complete
    print(printable(text), end='', flush=True)

    def show(part: Sample, decoder=decoder) -> None:
      drawn = b''.join(tokenizer.token_bytes[t] for t in part.text_tokens if t < tokenizer.vocab_size)
      print(printable(decoder.decode(drawn, final=part.finish != '')), end='', flush=True)

    [drawn] = sample(loaded, prompt, sampling, [i], step=number, watch=show)
    ended = {'eos': 'ended', 'length': 'cut'}[drawn.finish]
    print(f'\n[{f"{i + 1} of {samples}, " if samples > 1 else ""}{ended} after {len(drawn.tokens)} tokens]', flush=True)
    if entropy:
      print(table(loaded, prompt, drawn), flush=True)


def table(loaded: Loaded, prompt: list[int], drawn: Sample) -> str:
  """Returns a table of a continuation, with one line per token: its probability, its rank and the entropy in nats.

  The values are those at temperature 1, whatever the temperature of sampling was. The last line has means.

  prompt: the token ids of the prompt.
  drawn: the continuation.
  """
  [f] = figures(loaded, [[*prompt, *drawn.tokens.tolist()]], loaded.run.top_k)
  logp, rank, entropy = (x[len(prompt):len(prompt) + len(drawn.tokens)] for x in (f.logp, f.rank, f.entropy))
  lines = [f'{"token":>14}  {"p":>6}  {"rank":>5}  entropy, nats']
  for token, *values in zip(drawn.tokens.tolist(), np.exp(logp), rank + 1, entropy):
    text = token_text(loaded.tokenizer, token)
    whole = text == loaded.tokenizer.decode([token])  # no part of a character, and not EOS
    lines.append('{:>14}  {:6.4f}  {:5d}  {:6.4f}'.format(repr(text) if whole else text, *values))
  return '\n'.join([*lines, f'mean: entropy {entropy.mean():.4f} nats, -log p {-logp.mean():.4f} nats'])
