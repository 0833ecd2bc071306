"""Turns tokens into texts for display, even if the bytes of one character are spread over several tokens."""

import re
from collections.abc import Sequence

from betarank.data import Tokenizer

_NOT_UTF8 = re.compile('[\udc80-\udcff]')  # what `surrogateescape` makes of a byte that isn't part of a character


def token_text(tokenizer: Tokenizer, token: int) -> str:
  """Returns the text of one token.

  EOS is '<end>'. Bytes that aren't a whole character are shown in hexadecimal, such as 'na<C3>'. A token without any
  bytes is shown by its id, such as '<5>'.
  """
  found = _bytes(tokenizer, token)
  return _readable(found) if found else _without_bytes(tokenizer, token)


def texts_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
  """Returns a text for each token of a sequence. Joined, these texts are the text of the whole sequence.

  If the bytes of a character are spread over several tokens, the whole character is in the text of the first of them. A
  later token that has no other bytes gets ''. Invalid bytes and tokens without bytes are shown as by `token_text`.
  """
  texts: list[str] = []
  run: list[bytes] = []

  def end_run():
    texts.extend(_divided(run))
    run.clear()

  for token in tokens:
    if found := _bytes(tokenizer, token):
      run.append(found)
    else:
      end_run()
      texts.append(_without_bytes(tokenizer, token))
  end_run()
  return texts


def _divided(parts: Sequence[bytes]) -> list[str]:
  """Decodes the bytes of several tokens together. Returns a text for each token: the characters whose first byte is in
  the token.

  parts: the bytes of each token.
  """
  starts = [i for i, part in enumerate(parts) for _ in part]  # of each byte: its part
  texts, at = [''] * len(parts), 0
  for character in b''.join(parts).decode(errors='surrogateescape'):
    raw = character.encode(errors='surrogateescape')
    texts[starts[at]] += _readable(raw)
    at += len(raw)
  return texts


def _readable(found: bytes) -> str:
  return _NOT_UTF8.sub(lambda byte: f'<{ord(byte[0]) - 0xdc00:02X}>', found.decode(errors='surrogateescape'))


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
  known = token != tokenizer.eos and token < tokenizer.vocab_size
  return tokenizer.token_bytes[token] if known else b''


def _without_bytes(tokenizer: Tokenizer, token: int) -> str:
  return '<end>' if token == tokenizer.eos else f'<{token}>'
