"""Gives all kinds of tokenizers one interface.

    tokenizer = read_tokenizer(path)     a SentencePiece .model, a tokenizer.json, or a folder with one of them

The model must have at least as many tokens as the tokenizer. It may have more, because models are often padded to a
round vocabulary size.
"""

import hashlib
from typing import Protocol

import numpy as np
from etils import epath

from betarank.data import tokenizer_json
from betarank.data.config import DataError
from betarank.data.tokenizer_json import JsonTokenizer, checked, read_file, surrogates

PAD, UNK, BOS, EOS = 0, 1, 2, 3  # the ids in tokenizers of data/tokenizer_training.py; others may have other ids
_SPACE = '▁'  # SentencePiece's character for a space; so the character itself must be encoded as bytes
_ADVICE = ('give config.data.tokenizer a SentencePiece model or a tokenizer.json, or leave it empty and run: '
           'betarank data prepare --config=...')


class Tokenizer(Protocol):
  """The interface of all tokenizers.

  Attributes:
    vocab_size: the largest id plus 1.
    bos, eos: the ids that begin and end a document. A tokenizer without BOS, such as Qwen's, begins documents with EOS.
    pad: the id of the padding token, or of EOS if there is no padding token. Only exports use it: padding is masked in
      betarank's own batches, so its id doesn't matter there.
    sha256: a hash that identifies the tokenizer. It depends on the content of the file and on BOS and EOS, not on the
      path.
    token_bytes: the UTF-8 bytes that each id stands for; b'' for special tokens and for ids without a token.
    bytes_per_token_V: int32 [vocab_size], the length of each item of token_bytes. Summed over the ids in encode(text),
      it gives the size of the text in bytes. Some tokenizers first change a text: Qwen's normalizes Unicode to NFC,
      Llama 2's adds a space before the text. The sum is then the size of the changed text.
  """

  vocab_size: int
  bos: int
  eos: int
  pad: int
  sha256: str
  token_bytes: list[bytes]
  bytes_per_token_V: np.ndarray

  def encode(self, text: str) -> np.ndarray:
    """Returns the N token ids of `text`, int32 [N], without BOS and EOS.

    If the text contains the name of a special token, such as '<|endoftext|>', the name is encoded as ordinary
    characters.

    Raises:
      DataError: the text has lone surrogates.
    """

  def decode(self, ids: np.ndarray | list[int]) -> str:
    """Returns the text of `ids`. Bytes that aren't UTF-8 become U+FFFD.

    Special tokens and ids >= vocab_size add nothing to the text. A model may draw ids >= vocab_size if its vocabulary
    is larger than the tokenizer's.

    Raises:
      DataError: an id is negative.
    """


def read_tokenizer(path: str, model_vocab_size: int | None = None) -> Tokenizer:
  """Reads the tokenizer at `path`: a SentencePiece model, a tokenizer.json, or a folder with one of them.

  Raises:
    DataError: the tokenizer is missing, broken or unusable, or has more than `model_vocab_size` tokens (if this is
      given).
  """
  file = find(path)
  tokenizer = JsonTokenizer(file) if file.suffix == '.json' else SentencePieceTokenizer(file)
  if model_vocab_size is not None and tokenizer.vocab_size > model_vocab_size:
    raise DataError(f'{path}: has {tokenizer.vocab_size} tokens, but config.model.vocab_size is {model_vocab_size}; '
                    f'set that to {tokenizer.vocab_size} or more, or use another tokenizer')
  return tokenizer


def sha256_of(path: str) -> str:
  """Returns the same as read_tokenizer(path).sha256, but faster. Raises DataError as read_tokenizer does."""
  file = find(path)
  return tokenizer_json.sha256_of(file) if file.suffix == '.json' else _sha256(read_file(file, _ADVICE))


def find(path: str) -> epath.Path:
  """Returns the path of the tokenizer's file. For a folder: tokenizer.json or, if there is none, tokenizer.model."""
  place = epath.Path(path)
  if not place.is_dir():
    return place
  return file if (file := place / 'tokenizer.json').exists() else place / 'tokenizer.model'


def _sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


class SentencePieceTokenizer:
  """A tokenizer that is a SentencePiece model. Tokenizer describes its methods.

  Tokenizers that betarank trains are lossless: decode(encode(text)) == text. Other SentencePiece models may change the
  text, for example by adding a space before it. `token_bytes` and `bytes_per_token_V` then describe the changed text.
  """

  def __init__(self, path: epath.Path):
    """Reads the model.

    Raises:
      DataError: the file is missing, isn't a SentencePiece model, or has no EOS token.
    """
    import sentencepiece

    model = read_file(path, _ADVICE)
    self._processor = p = sentencepiece.SentencePieceProcessor()
    try:
      p.LoadFromSerializedProto(model)
    except (RuntimeError, UnicodeDecodeError):  # the second if its own message quotes bytes of the file
      raise DataError(f'{path}: not a SentencePiece model; {_ADVICE}') from None
    self.sha256 = _sha256(model)
    self.vocab_size: int = p.vocab_size()
    self.eos: int = p.eos_id()
    if self.eos < 0:
      raise DataError(f'{path}: has no EOS token to end a document with; use another tokenizer')
    self.bos: int = p.bos_id() if p.bos_id() >= 0 else self.eos
    self.pad: int = p.pad_id() if p.pad_id() >= 0 else self.eos
    self._mark_ids = [p.piece_to_id(f'<0x{byte:02X}>') for byte in _SPACE.encode()]
    try:
      self.token_bytes = [self._bytes(i) for i in range(self.vocab_size)]
    except ValueError:  # a piece isn't UTF-8, or that of a byte has no number
      raise DataError(f'{path}: damaged, as one of its pieces is no text; fetch it again or train one') from None
    self.bytes_per_token_V = np.array([len(piece) for piece in self.token_bytes], np.int32)

  def _bytes(self, token: int) -> bytes:
    p = self._processor
    if p.is_control(token) or p.is_unknown(token) or p.is_unused(token):
      return b''
    piece = p.id_to_piece(token)
    return bytes([int(piece[3:5], 16)]) if p.is_byte(token) else piece.replace(_SPACE, ' ').encode()

  def encode(self, text: str) -> np.ndarray:
    """Returns token ids, int32 [N], without BOS and EOS. Raises DataError if the text has lone surrogates."""
    try:
      if _SPACE not in text:
        return np.array(self._processor.encode(text), np.int32)
      ids = []
      for i, part in enumerate(text.split(_SPACE)):
        ids += self._mark_ids * (i > 0) + self._processor.encode(part)
      return np.array(ids, np.int32)
    except (RuntimeError, TypeError):  # raised by the bindings, by version, if the text can't be UTF-8
      raise surrogates(text) from None

  def decode(self, ids: np.ndarray | list[int]) -> str:
    """Returns the text of `ids`. Special tokens and ids >= vocab_size add nothing. Raises DataError if an id is
    negative.
    """
    return self._processor.decode([id for id in checked(ids) if id < self.vocab_size])
