"""SentencePiece BPE that loses nothing: decode(encode(text)) == text, and every token knows its bytes."""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epath

from betarank.data.config import DataError

PAD, UNK, BOS, EOS = 0, 1, 2, 3  # of the tokenizers trained here; one from outside may have others
TRAIN_BYTES = 16 * 2**20  # more text changes few merges and costs minutes
_LINE_BYTES = 4096  # the trainer's memory grows with its longest sentence
_SPACE = '▁'  # SentencePiece writes a space as this, so this itself must go by another way


def train(documents: Iterable[str], vocab_size: int, path: str, max_bytes: int = TRAIN_BYTES) -> None:
  """Trains on the first `max_bytes` (UTF-8) of `documents`; writes the model to `path`, whole or not at all.

  The same documents give the same file. Digits are single tokens, a line end is one too, and what has no
  token falls back to bytes. Raises DataError where the documents don't yield `vocab_size` tokens.
  """
  import sentencepiece

  model, lines = io.BytesIO(), _lines(documents, max_bytes)
  first = next(lines, None)
  if first is None:
    raise DataError(f'{path}: no text to train a tokenizer on; the sources gave no documents')

  def sentences():
    yield first
    yield from lines

  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=sentences(), model_writer=model, model_type='bpe', vocab_size=vocab_size,
      byte_fallback=True, split_digits=True, normalization_rule_name='identity', add_dummy_prefix=False,
      remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, user_defined_symbols=['\n'],
      character_coverage=0.9995,  # a character rarer than that isn't worth a row of the embedding
      max_sentence_length=2 * _LINE_BYTES, num_threads=1, minloglevel=2,
      pad_id=PAD, unk_id=UNK, bos_id=BOS, eos_id=EOS)
  except RuntimeError as error:
    raise DataError(_explain(str(error), vocab_size, path)) from None
  out = epath.Path(path)
  out.parent.mkdir(parents=True, exist_ok=True)
  temporary = out.parent / (out.name + '.partial')
  temporary.write_bytes(model.getvalue())
  temporary.replace(out)


def _explain(error: str, vocab_size: int, path: str) -> str:
  if limit := re.search(r'set it to a value <= (\d+)', error):
    return (f'{path}: the documents yield {limit[1]} tokens at most, fewer than vocab_size={vocab_size}; '
            'lower config.model.vocab_size or give more text')
  if limit := re.search(r'required_chars\D*(\d+)\D+(\d+)', error):
    return (f'{path}: vocab_size={vocab_size} is too small: bytes, special tokens and single characters '
            f'alone need {max(map(int, limit.groups()))}; raise config.model.vocab_size')
  return f'{path}: SentencePiece could not train ({" ".join(error.split())}); check vocab_size={vocab_size}'


def _lines(documents: Iterable[str], max_bytes: int) -> Iterator[str]:
  """Lines, as no token spans one. What the trainer can't take (NUL, its own space mark) splits them too."""
  used = 0
  for document in documents:
    for line in re.split(f'[\n\0{_SPACE}]', document):
      for start in range(0, len(line), _LINE_BYTES // 4):
        piece = line[start:start + _LINE_BYTES // 4]  # a character has 4 bytes at most
        used += len(piece.encode()) + 1
        yield piece
      if used >= max_bytes:
        return


class Tokenizer:
  """A SentencePiece model file.

  Attributes: vocab_size, bos, eos (ids), sha256 (of the file) and bytes_per_token_V, int32 [vocab_size]: the
  UTF-8 bytes that a token stands for, 0 for specials. For tokenizers trained here they add up over
  encode(text) to len(text.encode()); one that adds a space or normalises text is off by what it changes.
  """

  def __init__(self, path: str):
    """Raises DataError if the file is missing, isn't a SentencePiece model or has no BOS or EOS token."""
    import sentencepiece

    try:
      model = epath.Path(path).read_bytes()
    except FileNotFoundError:
      raise DataError(f'{path}: no such tokenizer; run: betarank data tokenizer --config=...') from None
    except OSError as error:
      raise DataError(f'{path}: could not be read ({error.strerror or error}); give a SentencePiece model') from None
    self._processor = sentencepiece.SentencePieceProcessor()
    try:
      self._processor.LoadFromSerializedProto(model)
    except (RuntimeError, UnicodeDecodeError):  # the second: of its own message, when that quotes the file
      raise DataError(f'{path}: not a SentencePiece model; use another file or train one') from None
    self.sha256 = hashlib.sha256(model).hexdigest()
    self.vocab_size: int = self._processor.vocab_size()
    self.bos: int = self._processor.bos_id()
    self.eos: int = self._processor.eos_id()
    if self.bos < 0 or self.eos < 0:
      raise DataError(f'{path}: has no BOS or EOS token to mark where documents begin and end; use another')
    self._mark_ids = [self._processor.piece_to_id(f'<0x{byte:02X}>') for byte in _SPACE.encode()]
    try:
      self.bytes_per_token_V = np.array([self._bytes(i) for i in range(self.vocab_size)], np.int32)
    except UnicodeDecodeError:
      raise DataError(f'{path}: damaged, as one of its pieces is no text; fetch it again or train one') from None

  def _bytes(self, token: int) -> int:
    p = self._processor
    if p.is_control(token) or p.is_unknown(token) or p.is_unused(token):
      return 0
    return 1 if p.is_byte(token) else len(p.id_to_piece(token).replace(_SPACE, ' ').encode())

  def encode(self, text: str) -> np.ndarray:
    """Token ids, int32 [N], without BOS and EOS."""
    if _SPACE not in text:
      return np.array(self._processor.encode(text), np.int32)
    ids = []
    for i, part in enumerate(text.split(_SPACE)):
      ids += self._mark_ids * (i > 0) + self._processor.encode(part)
    return np.array(ids, np.int32)

  def decode(self, ids: np.ndarray | list[int]) -> str:
    """The text of `ids`; specials give nothing, and bytes that aren't UTF-8 give U+FFFD.

    Raises DataError for an id outside the vocabulary.
    """
    ids = np.asarray(ids, np.int64).reshape(-1)
    if ids.size and not (ids.min() >= 0 and ids.max() < self.vocab_size):
      raise DataError(f'token ids must be in [0, {self.vocab_size}), got {ids.min()} to {ids.max()}')
    return self._processor.decode(ids.tolist())
