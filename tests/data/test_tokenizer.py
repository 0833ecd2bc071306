import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from betarank.data import reasoning, tokenizer, tokenizer_training
from betarank.data.config import DataError
from betarank.data.tokenizer import read_tokenizer, sha256_of

TEXT = [reasoning.problem(reasoning.parse('chain_sum+gcd'), i).document for i in range(300)]


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  path = str(tmp_path_factory.mktemp('tokenizer') / 't.model')
  tokenizer_training.train(TEXT, 400, path)
  return path


@pytest.fixture(scope='module')
def trained(path):
  return read_tokenizer(path)


@given(text=st.text() | st.text(alphabet=' \n\t▁ab01<>/s\r\0') | st.sampled_from(TEXT))
@example(text='  two  spaces \n\n▁ literal mark▁▁ ')
@example(text='</s><s><pad><unk><0x41>')
@example(text='e\u0301 \ufeff \u2028 \U0010ffff 日本語')
@settings(max_examples=300, deadline=None)
def test_round_trip_and_bytes(trained, text):
  ids = trained.encode(text)
  assert ids.dtype == np.int32
  assert trained.decode(ids) == text
  assert trained.bytes_per_token_V[ids].sum() == len(text.encode())
  assert not np.isin(ids, [tokenizer.PAD, tokenizer.UNK, tokenizer.BOS, tokenizer.EOS]).any()


def test_specials_digits_and_line_ends(trained):
  assert (trained.bos, trained.eos) == (tokenizer.BOS, tokenizer.EOS)
  assert (trained.bytes_per_token_V[:4] == 0).all() and (trained.bytes_per_token_V[4:] > 0).all()
  assert len(trained.encode('1234')) == 4
  assert len(trained.encode('\n\n')) == 2
  assert trained.decode([tokenizer.BOS, *trained.encode('State'), tokenizer.EOS]) == 'State'


def test_a_prompt_s_tokens_begin_the_document_s(trained):
  """RL encodes prompts alone, so a prompt must have the same tokens as in the documents of pre-training."""
  kinds = (*reasoning.parse(''), *reasoning.parse('leg_counting'))
  for i in range(100):
    p = reasoning.problem(kinds, i)
    parts = p.prompt, p.document.removeprefix(p.prompt)
    ids = np.concatenate([trained.encode(part) for part in parts])
    np.testing.assert_array_equal(ids, trained.encode(p.document))


def test_same_text_same_file(trained, tmp_path):
  tokenizer_training.train(TEXT, 400, str(tmp_path / 'again.model'))
  again = str(tmp_path / 'again.model')
  assert read_tokenizer(again).sha256 == sha256_of(again) == trained.sha256


def test_training_text_is_bounded(tmp_path):
  def endless():
    while True:
      yield from TEXT

  tokenizer_training.train(endless(), 320, str(tmp_path / 't.model'), max_bytes=20_000)


@pytest.mark.parametrize('documents, vocab_size, message', [
  (['too little text'], 5000, r'the documents yield \d+ tokens at most, fewer than vocab_size=5000; lower'),
  (TEXT, 100, r'vocab_size=100 is too small: .* need \d+; raise'),
  ([], 300, 'no text to train a tokenizer on'),
])
def test_training_errors(documents, vocab_size, message, tmp_path):
  with pytest.raises(DataError, match=message):
    tokenizer_training.train(documents, vocab_size, str(tmp_path / 't.model'))
  assert not list(tmp_path.iterdir())


def test_bytes_of_each_token(trained):
  pieces = trained.token_bytes
  assert pieces[tokenizer.EOS] == b'' and {bytes([byte]) for byte in range(256)} <= set(pieces)
  assert b''.join(pieces[id] for id in trained.encode('  \n▁ é😀')) == '  \n▁ é😀'.encode()
  assert trained.bytes_per_token_V.tolist() == [len(piece) for piece in pieces]
  assert trained.pad == tokenizer.PAD


def spm(path, **options):
  import sentencepiece
  settings = dict(model_type='bpe', vocab_size=320, byte_fallback=True, normalization_rule_name='identity',
                  minloglevel=2, hard_vocab_limit=False)
  with open(path, 'wb') as file:
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXT), model_writer=file, **settings | options)
  return str(path)


def test_without_bos_a_document_begins_with_eos(tmp_path):
  other = read_tokenizer(spm(tmp_path / 't.model', bos_id=-1, eos_id=1, unk_id=0, pad_id=-1))
  assert other.bos == other.eos == other.pad == 1
  with pytest.raises(DataError, match=r't\.model: has no EOS token to end a document with'):
    read_tokenizer(spm(tmp_path / 't.model', bos_id=1, eos_id=-1, unk_id=0))


def test_errors(tmp_path, trained, path):
  with pytest.raises(DataError, match=r'none\.model: no such tokenizer; give .* and run: betarank data'):
    read_tokenizer(str(tmp_path / 'none.model'))
  (tmp_path / 'bad.model').write_bytes(b'no model')
  with pytest.raises(DataError, match=r'bad\.model: not a SentencePiece model'):
    read_tokenizer(str(tmp_path / 'bad.model'))
  (tmp_path / 'zero.model').symlink_to('/dev/zero')
  with pytest.raises(DataError, match=r'zero\.model: not a file'):
    read_tokenizer(str(tmp_path / 'zero.model'))
  with pytest.raises(DataError, match=r'token ids must be >= 0, got -1'):
    trained.decode([-1, 7])
  with pytest.raises(DataError, match=r'half of a surrogate pair \(U\+DFFF\) at character 3'):
    trained.encode('▁x\udfff')
  with pytest.raises(DataError, match=r'has 400 tokens, but config\.model\.vocab_size is 399; set that to 400 or more'):
    read_tokenizer(path, 399)


def test_a_larger_model_may_draw_ids_without_a_token(trained, path):
  assert read_tokenizer(path, 512).decode([511, *trained.encode('State'), 400]) == 'State'


@pytest.mark.parametrize('error', [DataError('line 2: no JSON'), KeyboardInterrupt()])
def test_an_error_of_the_documents_is_not_blamed_on_the_trainer(error, tmp_path):
  def documents():
    yield 'a few words\n' * 100
    raise error

  with pytest.raises(type(error)) as raised:
    tokenizer_training.train(documents(), 300, str(tmp_path / 'tokenizer.model'))
  assert raised.value is error and not list(tmp_path.iterdir())
