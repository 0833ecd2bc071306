"""Writes small tokenizer.json files of each kind, and those of Qwen and Llama 3 if an installed package has their
tokens.
"""

import base64
import importlib.util
import json
import pathlib

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from betarank.data import reasoning

TEXT = [reasoning.problem(reasoning.parse('chain_sum+gcd'), i).document for i in range(300)]
TEXT += ['def f(x):\n  return  x * 12\n', 'Ist das schön? Ja, sehr schön!', '日本語の文章です。', 'naïve café 😀'] * 20
QWEN_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r'|\s+(?!\S)|\s+')
LLAMA_WORDS = QWEN_WORDS.replace(r'\p{N}|', r'\p{N}{1,3}|')
CONFIG = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
# name -> (pattern, normalizer, special tokens, added tokens that aren't special, tokenizer_config, generation_config)
KINDS = {
  'qwen': (QWEN_WORDS, {'type': 'NFC'}, ['<|endoftext|>', '<|im_start|>', '<|im_end|>'], ['<think>', '</think>'],
           {'bos_token': None, 'eos_token': '<|im_end|>', 'pad_token': {
             '__type': 'AddedToken', 'content': '<|endoftext|>', 'lstrip': False, 'normalized': False, 'rstrip': False,
             'single_word': False}},
           {'bos_token_id': '<|endoftext|>', 'eos_token_id': ['<|im_end|>', '<|endoftext|>']}),
  'llama3': (LLAMA_WORDS, None, ['<|begin_of_text|>', '<|end_of_text|>'], [],
             {'bos_token': '<|begin_of_text|>', 'eos_token': '<|end_of_text|>'}, None),
}


def write(folder, tokenizer, config, generation=None):
  """Writes a tokenizer and its side files to a folder. Returns the folder as text.

  tokenizer: an object of the `tokenizers` library, or its JSON.
  config, generation: the content of tokenizer_config.json and generation_config.json; None for no file.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  content = json.loads(tokenizer.to_str()) if isinstance(tokenizer, tokenizers.Tokenizer) else tokenizer
  (folder / 'tokenizer.json').write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding='utf-8')
  for name, values in (('tokenizer_config.json', config), ('generation_config.json', generation)):
    if values is not None:
      (folder / name).write_text(json.dumps(values, indent=2))
  return str(folder)


def byte_level(folder, kind, vocab_size=400):
  """Writes a byte-level BPE like that of Qwen or Llama 3, trained on TEXT. Returns the folder."""
  words, normalizer, special, plain, config, generation = KINDS[kind]
  t = tokenizers.Tokenizer(models.BPE())
  t.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(tokenizers.Regex(words), 'isolated'),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  t.decoder = decoders.ByteLevel()
  t.normalizer = normalizers.NFC() if normalizer else None
  added = len(special) + len(plain)
  t.train_from_iterator(TEXT, trainers.BpeTrainer(
    vocab_size=vocab_size - added, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
  t.add_special_tokens(special)
  t.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in plain])
  generation = generation and {
    name: [t.token_to_id(x) for x in value] if isinstance(value, list) else t.token_to_id(value)
    for name, value in generation.items()}
  return write(folder, t, {**CONFIG, **config}, generation)


def byte_fallback(folder, prefix=False):
  """Writes a BPE with byte fallback that writes a space as '▁'. Returns the folder.

  prefix: whether a space is added before each text, as for Llama 2.
  """
  special = ['<unk>', '<s>', '</s>']
  t = tokenizers.Tokenizer(models.BPE(unk_token='<unk>', byte_fallback=True, fuse_unk=True))
  replace = normalizers.Replace(' ', '▁')
  t.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), replace]) if prefix else replace
  t.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()])
  t.train_from_iterator(TEXT, trainers.BpeTrainer(
    vocab_size=500, limit_alphabet=90, show_progress=False,
    special_tokens=[*special, *(f'<0x{byte:02X}>' for byte in range(256))]))
  content = json.loads(t.to_str())
  content['added_tokens'] = [token for token in content['added_tokens'] if token['content'] in special]
  return write(folder, content, {**CONFIG, 'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>'})


PUBLISHED = {  # package, file, pattern, special tokens, others, tokenizer_config, generation_config
  'qwen': ('dashscope', 'resources/qwen.tiktoken', QWEN_WORDS,
           ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|object_ref_start|>', '<|object_ref_end|>',
            '<|box_start|>', '<|box_end|>', '<|quad_start|>', '<|quad_end|>', '<|vision_start|>', '<|vision_end|>',
            '<|vision_pad|>', '<|image_pad|>', '<|video_pad|>'],
           ['<tool_call>', '</tool_call>', '<|fim_prefix|>', '<|fim_middle|>', '<|fim_suffix|>', '<|fim_pad|>',
            '<|repo_name|>', '<|file_sep|>', '<tool_response>', '</tool_response>', '<think>', '</think>'],
           {'bos_token': None, 'eos_token': '<|endoftext|>', 'pad_token': '<|endoftext|>',
            'tokenizer_class': 'Qwen2Tokenizer'},
           {'bos_token_id': 151_643, 'eos_token_id': 151_643}),
  'llama3': ('llama_models', 'llama3/tokenizer.model', LLAMA_WORDS,
             ['<|begin_of_text|>', '<|end_of_text|>', *(f'<|reserved_special_token_{i}|>' for i in range(254))], [],
             {'bos_token': '<|begin_of_text|>', 'eos_token': '<|end_of_text|>'}, None),
}


def published(folder, name):
  """Writes the tokenizer.json of Qwen 2.5 and 3, or of Llama 3, made from the token ranks in an installed package.

  If the package isn't installed, skips the test.
  """
  package, file, words, special, plain, config, generation = PUBLISHED[name]
  spec = importlib.util.find_spec(package)
  if spec is None:
    pytest.skip(f'{package}, which ships the vocabulary, is not installed')
  lines = (pathlib.Path(spec.submodule_search_locations[0]) / file).read_bytes().splitlines()
  rank = {base64.b64decode(token): int(number) for token, number in (line.split() for line in lines if line)}
  keep = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
  char = {byte: chr(byte) for byte in keep}
  char |= {byte: chr(0x100 + n) for n, byte in enumerate(b for b in range(256) if b not in char)}
  written = lambda token: ''.join(char[byte] for byte in token)
  merges = []
  for token, number in rank.items():
    splits = [(token[:i], token[i:]) for i in range(1, len(token))]
    pairs = [(rank[a], rank[b], a, b) for a, b in splits if a in rank and b in rank]
    merges += [(number, written(a), written(b)) for *_, a, b in sorted(pairs)]
  merges.sort(key=lambda merge: merge[0])
  byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': False}
  split = {'type': 'Split', 'pattern': {'Regex': words}, 'behavior': 'Isolated', 'invert': False}
  return write(folder, {
    'version': '1.0', 'truncation': None, 'padding': None,
    'added_tokens': [
      {'id': len(rank) + i, 'content': text, 'single_word': False, 'lstrip': False, 'rstrip': False,
       'normalized': False, 'special': text in special} for i, text in enumerate([*special, *plain])],
    'normalizer': {'type': 'NFC'} if name == 'qwen' else None,
    'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [split, byte_level]},
    'post_processor': byte_level, 'decoder': byte_level,
    'model': {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': '',
              'end_of_word_suffix': '', 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': name == 'llama3',
              'vocab': {written(token): number for token, number in rank.items()},
              'merges': [[a, b] for _, a, b in merges]}},
    {**CONFIG, **config}, generation)
