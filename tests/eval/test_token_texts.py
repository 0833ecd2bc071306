"""Tests that tokens are shown as text, also if a character's bytes are spread over several tokens."""

import types

import pytest

from betarank.eval.token_texts import texts_of, token_text

# Ids: EOS, a token without bytes, then bytes as byte-level BPE and byte fallback cut them.
PIECES = [b'', b'', b'na\xc3', b'\xafve', b' \xe2\x82', b'\xac', 'é'.encode(), b'\xf0', b'\x9f', b'\x98', b'\x80',
          b'\xff', b'x']
TOKENIZER = types.SimpleNamespace(eos=0, vocab_size=len(PIECES), token_bytes=PIECES)


@pytest.mark.parametrize('tokens, texts', [
  ([2, 3], ['naï', 've']), ([4, 5, 12], [' €', '', 'x']), ([7, 8, 9, 10], ['😀', '', '', '']), ([6, 0], ['é', '<end>']),
  ([2, 1, 3], ['na<C3>', '<1>', '<AF>ve']),  # nothing goes through a token without bytes
  ([7, 8, 12], ['<F0>', '<9F>', 'x']), ([3, 11], ['<AF>ve', '<FF>']), ([4, 99], [' <E2><82>', '<99>']), ([], [])])
def test_a_character_belongs_to_the_token_that_begins_it(tokens, texts):
  assert texts_of(TOKENIZER, tokens) == texts


def test_a_token_alone_shows_parts_of_characters_as_numbers():
  assert [token_text(TOKENIZER, i) for i in (0, 1, 2, 4, 6, 11, 99)] == [
    '<end>', '<1>', 'na<C3>', ' <E2><82>', 'é', '<FF>', '<99>']
