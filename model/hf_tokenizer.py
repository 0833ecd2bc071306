"""Converts a SentencePiece model to a tokenizer.json that gives the same ids.

SentencePiece's pieces have '▁' in place of a space, but the pieces in tokenizer.json have real spaces. A literal '▁' in
a text is therefore encoded as bytes; data/tokenizer.py does the same. Text is never encoded as special tokens: '<s>' in
a text doesn't become the BOS token. BOS is added before the text.
"""

import json
import pathlib
from typing import Any

from etils import epath

from betarank.model.hf_config import HfError

_SPACE = '▁'


def export(model_file: str, folder: pathlib.Path, vocab_size: int) -> dict[str, int]:
  """Writes tokenizer.json, tokenizer_config.json and a copy of the SentencePiece model to `folder`.

  Returns the ids of bos, eos and, if there is one, pad.

  Raises:
    HfError: the SentencePiece model is missing, can't be converted (see `convert`), or has more than vocab_size tokens.
  """
  try:
    data = epath.Path(model_file).read_bytes()
  except OSError:
    raise HfError(f'{model_file}: no such tokenizer; give --tokenizer=PATH, or none to leave it out') from None
  tokenizer, ids = convert(data, model_file)
  if (tokens := len(tokenizer['model']['vocab'])) > vocab_size:
    raise HfError(f'{model_file}: has {tokens} tokens, but the model {vocab_size}; give the one it was trained with')
  token = lambda id: next(t['content'] for t in tokenizer['added_tokens'] if t['id'] == id)
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'model_input_names': ['input_ids', 'attention_mask'],
    'clean_up_tokenization_spaces': False,
    'add_bos_token': True,
    'add_eos_token': False,
    'split_special_tokens': True,  # '</s>' in a text stays four characters, and isn't the EOS token
    'unk_token': tokenizer['model']['unk_token'],
    **{f'{name}_token': token(id) for name, id in ids.items()},
  }
  (folder / 'tokenizer.json').write_bytes(to_bytes(tokenizer))
  (folder / 'tokenizer_config.json').write_bytes(to_bytes(config))
  (folder / 'tokenizer.model').write_bytes(data)
  return ids


def to_bytes(content: dict[str, Any]) -> bytes:
  return (json.dumps(content, ensure_ascii=False, indent=1) + '\n').encode()


def convert(data: bytes, name: str) -> tuple[dict[str, Any], dict[str, int]]:
  """Converts a serialized SentencePiece model. Returns (tokenizer.json as a dictionary, the ids of bos, eos and pad).

  name: the path of the SentencePiece model, for messages.

  Raises:
    HfError: the model is damaged, or tokenizer.json can't express it. The model must be BPE with byte fallback, leave
      text (such as its spaces) unchanged, have BOS and EOS tokens, and not have two pieces with the same text.
  """
  from google.protobuf.message import DecodeError
  from sentencepiece import sentencepiece_model_pb2 as proto

  spm = proto.ModelProto()
  try:
    spm.ParseFromString(data)
  except DecodeError:
    raise HfError(f'{name}: not a SentencePiece model; give the one that the run was trained with') from None
  if not all(isinstance(p.piece, str) for p in spm.pieces):
    raise HfError(f'{name}: damaged, as one of its pieces is not text; give the one that the run was trained with')
  _check(spm, name)
  kinds = proto.ModelProto.SentencePiece
  text = [p.piece if p.type in (kinds.BYTE, kinds.CONTROL, kinds.UNKNOWN) else p.piece.replace(_SPACE, ' ')
          for p in spm.pieces]
  vocabulary = {piece: id for id, piece in enumerate(text)}
  if len(vocabulary) < len(text):
    raise HfError(f'{name}: two of its pieces are the same text; train a tokenizer without such pieces')
  special = [id for id, p in enumerate(spm.pieces) if p.type in (kinds.CONTROL, kinds.UNKNOWN)]
  # Pieces of one character aren't included. Nothing merges with them, so they needn't be searched for in the text.
  whole = [id for id, p in enumerate(spm.pieces) if p.type == kinds.USER_DEFINED and len(text[id]) > 1]
  normal = {text[id]: (-p.score, id) for id, p in enumerate(spm.pieces) if p.type == kinds.NORMAL}
  ids = {'bos': spm.trainer_spec.bos_id, 'eos': spm.trainer_spec.eos_id, 'pad': spm.trainer_spec.pad_id}
  ids = {kind: id for kind, id in ids.items() if id in special}
  bos = {'id': text[ids['bos']], 'ids': [ids['bos']], 'tokens': [text[ids['bos']]]}
  text_a, text_b = ({'Sequence': {'id': name, 'type_id': 0}} for name in 'AB')
  single = [{'SpecialToken': {'id': bos['id'], 'type_id': 0}}, text_a]
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': [
      {'id': id, 'content': text[id], 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
       'special': id in special} for id in sorted(special + whole)],
    'normalizer': None,
    'pre_tokenizer': None,
    'post_processor': {'type': 'TemplateProcessing', 'single': single, 'pair': [*single, text_b],
                       'special_tokens': {bos['id']: bos}},
    'decoder': {'type': 'Sequence', 'decoders': [{'type': 'ByteFallback'}, {'type': 'Fuse'}]},
    'model': {'type': 'BPE', 'dropout': None, 'unk_token': text[spm.trainer_spec.unk_id],
              'continuing_subword_prefix': None, 'end_of_word_suffix': None, 'fuse_unk': True, 'byte_fallback': True,
              'ignore_merges': False, 'vocab': vocabulary, 'merges': _merges(normal)},
  }, ids


def _merges(normal: dict[str, tuple[float, int]]) -> list[list[str]]:
  """Returns the merges for tokenizer.json: all pairs of pieces whose concatenation is also a piece, best pair first.

  SentencePiece has no list of merges, because it may merge any such pair. The best pair is the one whose concatenation
  has the highest score; of equal scores, lower ids come first.

  normal: {text of a piece: (its negated score, its id)}.
  """
  merges = []
  for piece in sorted(normal, key=normal.get):
    splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
    merges += [[a, b] for a, b in splits if a in normal and b in normal]
  return merges


def _check(spm: Any, name: str) -> None:
  """Raises HfError if a SentencePiece model isn't BPE with byte fallback, changes text, or has no BOS or EOS token."""
  trainer, normalizer = spm.trainer_spec, spm.normalizer_spec
  wrong = (
    'is not BPE' if trainer.model_type != trainer.BPE else
    'has no byte fallback' if not trainer.byte_fallback else
    f'normalises text ({normalizer.name})' if normalizer.precompiled_charsmap else
    'puts a space before the text' if normalizer.add_dummy_prefix else
    'removes spaces' if normalizer.remove_extra_whitespaces else
    'has no BOS or EOS token' if min(trainer.bos_id, trainer.eos_id) < 0 else '')
  if wrong:
    raise HfError(f'{name}: {wrong}, which has no exact counterpart in tokenizer.json; export with '
                  '--tokenizer=none, or train a tokenizer with betarank data')
