"""Tests tokenizers in Hugging Face's format, tokenizer.json: their ids, bytes and hashes, and the errors for unusable
files.
"""

import json
import os
import pathlib
import pickle
import random
import shutil
import unicodedata

import numpy as np
import pytest
import tokenizers

from betarank.data import tokenizer_json, tokenizer_training
from betarank.data.config import DataError
from betarank.data.tokenizer import read_tokenizer, sha256_of
from tests import tokenizer_files

ALPHABETS = [' \n\t▁ab01<>/s\r\0', '= -#*', 'éßø日本語😀a ', 'the sum of 12 ', 'e\u0301o\u0308\u1100\u1161\uff21\ufb01',
             '\ufeff\u2028\u200d\U0010ffff\uffff\u0300ا', "'s'TS'll 1234.5\n\n  "]
HOSTILE = [
  '', ' ', '\n', '\0', '  two  spaces \n\n▁ literal mark▁▁ ', '</s><s><pad><unk><0x41>', 'Ġ Ċ ĠĠthe', 'e\u0301',
  '\u212b', '<|endoftext|>', '<|im_start|>user\nhi<|im_end|>', '<think>1 + 1</think> <think>', '<|endoftext|',
  '<|begin_of_text|><|end_of_text|>', ' <|endoftext|> ', '<|ENDOFTEXT|>', '\r\n' * 5, "DON'T can'T it'S", 'a' * 3000,
  '\U0001f469\u200d\U0001f469\u200d\U0001f467', ' ' * 70, '1234567890' * 20, '\ufdfa', '\u0344\u0958',
  'x' * 500 + '\n' + ' ' * 500]
HOSTILE += [''.join(random.Random(i).choices(ALPHABETS[i % len(ALPHABETS)], k=i % 41))
            for i in range(200 - len(HOSTILE))]
SMALL = ('qwen', 'llama3', 'fallback', 'llama2')


def make(folder, kind):
  if kind in tokenizer_files.KINDS:
    return tokenizer_files.byte_level(folder, kind)
  return tokenizer_files.byte_fallback(folder, prefix=kind == 'llama2')


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Returns {kind: folder} of one small tokenizer of each kind."""
  root = tmp_path_factory.mktemp('tokenizers')
  return {kind: make(root / kind, kind) for kind in SMALL}


@pytest.fixture(scope='module', params=[*SMALL, 'published qwen', 'published llama3'])
def folder(request, folders, tmp_path_factory):
  if request.param in folders:
    return folders[request.param]
  name = request.param.split()[1]
  return tokenizer_files.published(tmp_path_factory.mktemp('published') / name, name)


def edited(source, target, name='tokenizer.json', **changes):
  """Copies a tokenizer's folder, and changes values in its JSON file `name`. The value None removes a key. Returns the
  path of the copy.
  """
  folder = shutil.copytree(source, target)
  content = json.loads((folder / name).read_text())
  content = {key: value for key, value in (content | changes).items() if value is not None}
  (folder / name).write_text(json.dumps(content))
  return str(folder)


def as_read(tokenizer, text):
  """Returns `text` after the tokenizer's normalizer."""
  normalizer = tokenizer._tokenizer.normalizer
  nfc = isinstance(normalizer, tokenizers.normalizers.NFC)
  text = unicodedata.normalize('NFC', text) if nfc else text
  if isinstance(normalizer, tokenizers.normalizers.Sequence) and text:
    text = ' ' + text
  return text if nfc or normalizer is None else text.replace('▁', ' ')


def test_hostile_texts_keep_every_byte(folder):
  tokenizer = read_tokenizer(folder)
  special = [tokenizer.bos, tokenizer.eos, tokenizer.pad]
  assert len(HOSTILE) == 200
  for text in [*HOSTILE, *tokenizer_files.TEXT[-4:]]:
    ids, read = tokenizer.encode(text), as_read(tokenizer, text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == read
    assert tokenizer.bytes_per_token_V[ids].sum() == len(read.encode())
    assert b''.join(tokenizer.token_bytes[id] for id in ids) == read.encode()
    assert not np.isin(ids, special).any(), text


def test_a_pattern_that_takes_too_long_is_one_line(folders, tmp_path, capfd):
  """The library panics then, which is no Exception."""
  content = json.loads((pathlib.Path(folders['llama3']) / 'tokenizer.json').read_text())
  split = content['pre_tokenizer']['pretokenizers'][0]
  words = split['pattern']['Regex']
  split['pattern']['Regex'] = rf'(?:~|~~|~~~)+!|{words}'  # no probe has such a text
  tokenizer = read_tokenizer(edited(folders['llama3'], tmp_path / 'late', **content))
  with pytest.raises(DataError, match=r'tokenizer.json: `tokenizers` can.t use it on a text .*retry-limit'):
    tokenizer.encode('~' * 100)
  split['pattern']['Regex'] = rf'(?:a|aa|aaa)+!|{words}'
  with pytest.raises(DataError, match=r'tokenizer.json: `tokenizers` can.t use it on a text .*retry-limit'):
    read_tokenizer(edited(folders['llama3'], tmp_path / 'early', **content))


def test_ids_are_those_of_the_tokenizers_library(folder):
  tokenizer = read_tokenizer(folder)
  theirs = tokenizers.Tokenizer.from_file(f'{folder}/tokenizer.json')
  plain = [text for text in HOSTILE if '<|' not in text and '<s>' not in text]
  assert len(plain) > 180
  for text in plain:
    assert tokenizer.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids


def test_auto_tokenizer_gives_the_same_ids(folder):
  transformers = pytest.importorskip('transformers')
  ours, theirs = read_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
  for text in HOSTILE:
    ids = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert ours.encode(text).tolist() == ids, text
  assert ours.eos == theirs.eos_token_id
  if theirs.bos_token_id is not None:
    assert ours.bos == theirs.bos_token_id


def test_roles_and_the_bytes_of_special_tokens(folders):
  qwen, llama3, fallback = (read_tokenizer(folders[kind]) for kind in ('qwen', 'llama3', 'fallback'))
  text = lambda tokenizer, id: tokenizer._tokenizer.id_to_token(id)
  # Of several EOS ids the name in tokenizer_config.json decides; a BOS that it leaves out is in generation_config.json.
  assert [text(qwen, id) for id in (qwen.bos, qwen.eos, qwen.pad)] == ['<|endoftext|>', '<|im_end|>', '<|endoftext|>']
  assert [text(llama3, id) for id in (llama3.bos, llama3.eos, llama3.pad)] == [
    '<|begin_of_text|>', '<|end_of_text|>', '<|end_of_text|>']
  assert [text(fallback, id) for id in (fallback.bos, fallback.eos)] == ['<s>', '</s>']
  for tokenizer in (qwen, llama3, fallback):
    assert not any(tokenizer.token_bytes[id] for id in (tokenizer.bos, tokenizer.eos, tokenizer.pad))
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode('sum'), tokenizer.eos]).strip() == 'sum'
  think = qwen._tokenizer.token_to_id('<think>')
  assert qwen.token_bytes[think] == b'<think>' and think in qwen.encode('so <think>')  # added, but not special
  assert qwen.vocab_size == 400 == len(qwen.bytes_per_token_V)


def test_without_bos_a_document_begins_with_eos(folders, tmp_path):
  tokenizer = read_tokenizer(edited(folders['llama3'], tmp_path / 't', 'tokenizer_config.json', bos_token=None))
  assert tokenizer.bos == tokenizer.eos == tokenizer.pad


def test_truncation_and_padding_in_the_file_are_ignored(folders, tmp_path):
  cut = {'direction': 'Right', 'max_length': 8, 'strategy': 'LongestFirst', 'stride': 0}
  pad = {'strategy': {'Fixed': 64}, 'direction': 'Right', 'pad_to_multiple_of': None, 'pad_id': 0, 'pad_type_id': 0,
         'pad_token': '!'}
  tokenizer = read_tokenizer(edited(folders['qwen'], tmp_path / 't', truncation=cut, padding=pad))
  for text in ('a b c d e f g h i j k l m n', 'a'):
    np.testing.assert_array_equal(tokenizer.encode(text), read_tokenizer(folders['qwen']).encode(text))


def test_identity(folders, tmp_path):
  """The hash depends on the files and on the BOS and EOS tokens, not on the path. It is computed without building the
  tokenizer.
  """
  first = read_tokenizer(folders['qwen'])
  again = shutil.copytree(folders['qwen'], tmp_path / 'elsewhere')
  (again / 'chat_template.jinja').write_text('{{ anything }}')
  for path in (str(again), f'{again}/tokenizer.json', f'{again}/'):
    assert read_tokenizer(path).sha256 == sha256_of(path) == first.sha256
  other_eos = edited(again, tmp_path / 'eos', 'tokenizer_config.json', eos_token='<|endoftext|>')
  other_bos = edited(again, tmp_path / 'bos', 'tokenizer_config.json', bos_token='<|im_start|>')
  other_text = edited(again, tmp_path / 'text', normalizer={'type': 'Sequence', 'normalizers': []})
  others = {sha256_of(path) for path in (other_eos, other_bos, other_text, folders['llama3'])}
  assert len(others) == 4 and first.sha256 not in others
  assert sha256_of(other_eos) == read_tokenizer(other_eos).sha256
  # The same roles, told by ids instead of names, are the same tokenizer.
  ids = edited(again, tmp_path / 'ids', 'generation_config.json', eos_token_id=first.eos)
  config = json.loads(pathlib.Path(ids, 'tokenizer_config.json').read_text())
  pathlib.Path(ids, 'tokenizer_config.json').write_text(json.dumps(config | {'eos_token': None}))
  assert sha256_of(ids) == first.sha256


def test_a_model_may_be_larger_than_its_tokenizer_but_not_smaller(folders):
  tokenizer = read_tokenizer(folders['qwen'], 512)
  assert tokenizer.decode([511, *tokenizer.encode('sum'), 400, 10**6]) == 'sum'  # a model may draw ids without a token
  with pytest.raises(DataError, match=r'has 400 tokens, but config\.model\.vocab_size is 399; set that to 400 or more'):
    read_tokenizer(folders['qwen'], 399)
  with pytest.raises(DataError, match='token ids must be >= 0, got -1'):
    tokenizer.decode([-1, 7])


def test_half_a_surrogate_pair_is_one_line(folders):
  with pytest.raises(DataError, match=r'half of a surrogate pair \(U\+D800\) at character 2'):
    read_tokenizer(folders['qwen']).encode('x\ud800y')


# What can't be used. Each case changes a good Qwen-like folder.


def change(name='tokenizer.json', **values):
  def edit(folder):
    content = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value != 'absent'}))
  return edit


def change_model(**values):
  return lambda folder: change(model=json.loads((folder / 'tokenizer.json').read_text())['model'] | values)(folder)


def change_added(**values):
  """Returns a function that changes the last added token in a tokenizer's folder."""
  def edit(folder):
    added = json.loads((folder / 'tokenizer.json').read_text())['added_tokens']
    change(added_tokens=[*added[:-1], added[-1] | values])(folder)
  return edit


def whole(content, name='tokenizer.json'):
  return lambda folder: (folder / name).write_bytes(content)


def drop_byte(folder):
  model = json.loads((folder / 'tokenizer.json').read_text())['model']
  vocabulary = {piece: id for piece, id in model['vocab'].items() if piece != 'Ā'}
  change_model(vocab=vocabulary | {'unused': model['vocab']['Ā']},
               merges=[m for m in model['merges'] if 'Ā' not in ''.join(m)])(folder)


def link(folder):
  (folder / 'tokenizer.json').unlink()
  (folder / 'tokenizer.json').symlink_to('/dev/zero')


def large(folder):
  os.truncate(folder / 'tokenizer.json', 10**8 + 1)


WORD_PIECE = {'type': 'WordPiece', 'unk_token': '[UNK]', 'continuing_subword_prefix': '##',
              'max_input_chars_per_word': 100, 'vocab': {'[UNK]': 0}}
BAD = [
  (whole(b'{'), r'tokenizer\.json: not JSON'),
  (whole(b'[' * 100_000), r'tokenizer\.json: not JSON'),
  (whole(b'\xff\xfe'), r'tokenizer\.json: not JSON'),
  (whole(b'[]'), r'tokenizer\.json: not a JSON object'),
  (whole(b'{}'), r'tokenizer\.json: has no model'),
  (whole(b''), r'tokenizer\.json: not JSON'),
  (whole(pickle.dumps(print)), r'tokenizer\.json: not JSON'),
  (whole(b'7', 'tokenizer_config.json'), r'tokenizer_config\.json: not a JSON object'),
  (whole(b'{', 'generation_config.json'), r'generation_config\.json: not JSON'),
  (link, r'tokenizer\.json: not a file'),
  (large, r'tokenizer\.json: has 100,000,001 bytes, too many'),
  (change(added_tokens=[{'id': 3}]), r'has no added_tokens, each with id, content and special'),
  (change(added_tokens={'a': 1}), r'has no added_tokens'),
  (change(model='absent'), r'tokenizer\.json: has no model'),
  (change(model={'type': 'Other'}), r"its model is 'Other'; only BPE"),
  (change(model=WORD_PIECE), r"its model is 'WordPiece'; only BPE"),
  (change(model={'vocab': {'a': 0}, 'unk_token': 'a'}), r'its model is WordLevel; only BPE'),
  (change_model(dropout=0.1), r'has dropout, so a text would get other tokens each time'),
  (change_model(merges=[['a', 'zzz']]), r'not a tokenizer \(.*zzz'),
  (change_model(end_of_word_suffix='</w>'), r'has an end_of_word_suffix, so it would change text'),
  (change_model(continuing_subword_prefix='##'), r'has a continuing_subword_prefix, so it would change text'),
  (change(normalizer={'type': 'Sequence', 'normalizers': [{'type': 'Precompiled'}]}), r'has a Precompiled normalizer'),
  (change_added(id=2**31), r'gives the added token .* the id 2147483648, but `tokenizers` makes it 399'),
  (change_added(id=700), r'gives the added token .* the id 700, but `tokenizers` makes it 399'),
  (drop_byte, r'has no token for byte 0x00, so it would lose text'),
  (change(decoder=None), r'has neither byte-level pieces nor byte fallback'),
  (change(normalizer={'type': 'Lowercase'}), r"changes text \(.* becomes .don't change this"),
  (change(normalizer={'type': 'NFKC'}), r'changes text \('),
  (change(normalizer={'type': 'Strip', 'strip_left': True, 'strip_right': True}), r'changes text \('),
  (change(pre_tokenizer={'type': 'Whitespace'}), r'changes text \('),
  (change(pre_tokenizer={'type': 'Split', 'pattern': {'Regex': '('}, 'behavior': 'Isolated', 'invert': False}),
   r'not a tokenizer \('),
  (lambda folder: [(folder / name).unlink() for name in ('tokenizer_config.json', 'generation_config.json')],
   r'name no EOS token to end a document with; fetch them too'),
  (change('tokenizer_config.json', eos_token='<think>'), r"its EOS token '<think>' is not among the special added"),
  (change('tokenizer_config.json', eos_token='a'), r"its EOS token 'a' is not among the special added_tokens"),
  (change('tokenizer_config.json', eos_token=['a']), r"its EOS token \['a'\] is not among"),
  (change('generation_config.json', bos_token_id=5), r'its BOS token 5 is not among the special added_tokens'),
  (change('generation_config.json', bos_token_id='x' * 10_000), r"its BOS token 'x{90,100} is not among"),
]


@pytest.mark.parametrize('edit, message', BAD, ids=[message[:50] for _, message in BAD])
def test_what_cannot_be_used_is_one_line(edit, message, folders, tmp_path):
  folder = shutil.copytree(folders['qwen'], tmp_path / 't')
  edit(folder)
  with pytest.raises(DataError, match=message) as caught:
    read_tokenizer(str(folder))
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 600


def test_an_id_that_would_need_all_memory_is_refused(folders, tmp_path):
  model = json.loads(pathlib.Path(folders['qwen'], 'tokenizer.json').read_text())['model']
  vocabulary = model['vocab'] | {'unused': 2**32 - 2}
  with pytest.raises(DataError, match=r'has the id 4294967294; the largest that can be used|the id \d+, but'):
    read_tokenizer(edited(folders['qwen'], tmp_path / 't', model=model | {'vocab': vocabulary}))


def test_nothing_beside_the_three_files_is_read(folders, tmp_path, monkeypatch):
  folder = shutil.copytree(folders['qwen'], tmp_path / 't')
  (folder / 'tokenization_qwen.py').write_text('raise SystemExit')
  (folder / 'tokenizer.py').write_text('raise SystemExit')
  change('tokenizer_config.json', auto_map={'AutoTokenizer': ['tokenization_qwen.Tokenizer', None]},
         chat_template="{{ cycler.__init__.__globals__.os.system('touch /tmp/x') }}")(folder)
  seen, read = [], tokenizer_json.read_file
  monkeypatch.setattr(tokenizer_json, 'read_file', lambda path, advice: seen.append(path.name) or read(path, advice))
  monkeypatch.chdir(folder)
  read_tokenizer('.')
  assert seen == ['tokenizer.json', 'tokenizer_config.json', 'generation_config.json']


def test_a_folder_may_hold_either_kind(folders, tmp_path):
  with pytest.raises(DataError, match=r'empty/tokenizer\.model: no such tokenizer'):
    (tmp_path / 'empty').mkdir()
    read_tokenizer(str(tmp_path / 'empty'))
  (tmp_path / 'spm').mkdir()
  tokenizer_training.train(tokenizer_files.TEXT, 400, str(tmp_path / 'spm' / 'tokenizer.model'))
  for path in (str(tmp_path / 'spm'), str(tmp_path / 'spm' / 'tokenizer.model')):
    assert read_tokenizer(path).sha256 == sha256_of(path)
  shutil.copytree(folders['llama3'], tmp_path / 'spm', dirs_exist_ok=True)  # tokenizer.json is what transformers reads
  assert sha256_of(str(tmp_path / 'spm')) == sha256_of(folders['llama3'])
