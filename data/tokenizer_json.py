"""Reads tokenizers in Hugging Face's format, tokenizer.json, as published with Qwen and Llama 3.

Only BPE tokenizers that keep all bytes of a text are accepted. Three files are read, as JSON: tokenizer.json,
tokenizer_config.json and generation_config.json. No code is run. Other files in the folder, such as chat templates and
Python files, are ignored.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from betarank.configs.errors import one_line
from betarank.configs.files import is_regular
from betarank.configs.parser import install_hint
from betarank.data.config import DataError

_LARGEST_BYTES = 100 * 10**6  # a larger file is refused; the largest published ones have 35 MB
_LARGEST_ID = 2**22  # a larger id is refused, because a table of all ids must fit in memory
_SPACE = '▁'  # how SentencePiece, and vocabularies converted from it, write a space

# Texts that show whether a tokenizer keeps every byte: case, accents, ligatures, spaces, line ends, digits, scripts
# with and without pieces of their own, control characters and emoji.
_PROBES = (
  "Don't CHANGE this:  two  spaces, 1234567890.50 + 3e-7 = ?!", ' leading and trailing ',
  '\ttab\n\n  \r\nline ends\n ', '\ufb01ne \xbd \uff21 café', 'cafe\u0301 naïve \u2126 Ω', '日本語 русский العربية',
  'हिन्दी ไทย 한국어', '\U0001f642\U0001f469\u200d\U0001f467 \U0010ffff', '\0\x1b\x7f\ufeff\u2028\u00a0\u200b',
  '<pad> </s> <0x41> [UNK] ##ing', 'a' * 300)


def read_file(path: epath.Path, advice: str) -> bytes:
  """Returns the content of a tokenizer's file.

  Raises:
    DataError: the file can't be read. The message ends with `advice`.
  """
  try:
    if not path.exists():
      raise DataError(f'{path}: no such tokenizer; {advice}')
    if not is_regular(path):
      raise DataError(f'{path}: not a file; {advice}')
    if (size := path.stat().length) > _LARGEST_BYTES:
      raise DataError(f'{path}: has {size:,} bytes, too many for a tokenizer; {advice}')
    return path.read_bytes()
  except ImportError as error:
    raise DataError(f'{path}: {error} ({install_hint(str(path))})') from None
  except OSError as error:
    raise DataError(f'{path}: could not be read ({error.strerror or error}); {advice}') from None


@dataclasses.dataclass(frozen=True)
class _Files:
  """The content of a tokenizer's files, before the `tokenizers` library reads it.

  Attributes:
    where: the path of tokenizer.json.
    data: the content of tokenizer.json.
    added: the added tokens, {text of the token: (id, whether the token is special)}.
    bos, eos, pad: the ids of these tokens. If there is no BOS or padding token, its id is that of EOS.
  """

  where: epath.Path
  data: bytes
  added: dict[str, tuple[int, bool]]
  bos: int
  eos: int
  pad: int

  @property
  def sha256(self) -> str:
    """A hash that identifies the tokenizer. It depends on tokenizer.json and on BOS and EOS, not on the path."""
    return hashlib.sha256(self.data + f'\nbos {self.bos} eos {self.eos}\n'.encode()).hexdigest()


def _read(where: epath.Path) -> _Files:
  """Reads the files of the tokenizer at `where`.

  Raises:
    DataError: a file is missing or broken, the tokenizer can't be used, or no file names a token that ends a document.
  """
  data = read_file(where, 'give config.data.tokenizer a folder with tokenizer.json')
  added = _added_tokens(data, where)
  optional = {}
  for name in ('tokenizer_config.json', 'generation_config.json'):
    side = where.parent / name
    optional[name] = _parse(read_file(side, 'fetch it again'), side) if side.exists() else {}
  role = lambda name: _role(name, optional, added, where)
  if (eos := role('eos')) is None:
    raise DataError(f'{where}: tokenizer_config.json and generation_config.json there name no EOS token to end a '
                    'document with; fetch them too, or give "eos_token" in tokenizer_config.json')
  bos, pad = role('bos'), role('pad')
  return _Files(where, data, added, eos if bos is None else bos, eos, eos if pad is None else pad)


def _parse(data: bytes, where: epath.Path) -> dict[str, Any]:
  try:
    content = json.loads(data)
  except (ValueError, RecursionError) as error:
    raise DataError(f'{where}: not JSON ({str(error)[:100]}); fetch it again') from None
  if not isinstance(content, dict):
    raise DataError(f'{where}: not a JSON object; fetch it again')
  return content


@functools.lru_cache(maxsize=1)  # because parsing 10 MB takes half a second, and each source of a run calls this
def _added_tokens(data: bytes, where: epath.Path) -> dict[str, tuple[int, bool]]:
  """Returns the added tokens of a tokenizer.json, {text of the token: (id, whether the token is special)}.

  Raises:
    DataError: the tokenizer can't be used.
  """
  content = _parse(data, where)
  model = content.get('model')
  if not isinstance(model, dict):
    raise DataError(f'{where}: has no model; fetch it again')
  if (kind := model.get('type', 'BPE')) != 'BPE':
    raise DataError(f'{where}: its model is {kind!r:.100}; only BPE can be used')
  if model.get('dropout'):
    raise DataError(f'{where}: has dropout, so a text would get other tokens each time; set it to null there')
  # These change text. With some files that have them, the library even ends the process.
  wrong = ('a continuing_subword_prefix' if model.get('continuing_subword_prefix') else
           'an end_of_word_suffix' if model.get('end_of_word_suffix') else
           'a Precompiled normalizer' if '"Precompiled"' in json.dumps(content.get('normalizer')) else '')
  if wrong:
    raise DataError(f'{where}: has {wrong}, so it would change text; use another tokenizer')
  try:
    added = {token['content']: (token['id'], token['special']) for token in content['added_tokens']}
    if all(isinstance(text, str) and type(id) is int and type(special) is bool
           for text, (id, special) in added.items()):
      return added
  except (KeyError, TypeError):
    pass
  raise DataError(f'{where}: has no added_tokens, each with id, content and special; fetch it again')


def _role(name: str, optional: dict[str, dict[str, Any]], added: dict[str, tuple[int, bool]],
          where: epath.Path) -> int | None:
  """Returns the id of the token with the role `name` ('bos', 'eos' or 'pad'); None if no file names such a token.

  If tokenizer_config.json names no token with this role, generation_config.json is used. For 'pad', the result is also
  None if the token isn't special.

  optional: the content of these two files, {name of the file: its JSON object}.
  added: the added tokens, as `_added_tokens` returns them.

  Raises:
    DataError: the BOS or EOS token isn't special. Such a token could be part of a text, which would then seem to begin
      or end a document.
  """
  special = {text: id for text, (id, special) in added.items() if special}
  token = optional['tokenizer_config.json'].get(f'{name}_token')
  if isinstance(token, dict):  # the form that transformers 4 wrote
    token = token.get('content')
  if isinstance(token, str) and token in special:
    return special[token]
  given = optional['generation_config.json'].get(f'{name}_token_id')
  if isinstance(given, list) and given:  # each of them ends a text; we write the first one
    given = given[0]
  if token is None and given is None:
    return None
  if token is None and type(given) is int and given in special.values():
    return given
  if name == 'pad':  # it isn't used here, so it may be unusable
    return None
  raise DataError(f'{where}: its {name.upper()} token {token if token is not None else given!r:.100} is not among the '
                  'special added_tokens; correct tokenizer_config.json or generation_config.json')


def sha256_of(where: epath.Path) -> str:
  """Returns JsonTokenizer(where).sha256, without building the tokenizer. Raises DataError as `_read` does."""
  return _read(where).sha256


class JsonTokenizer:
  """A tokenizer that is read from a tokenizer.json. Tokenizer in data/tokenizer.py describes its methods.

  Ids are the same as those of transformers' AutoTokenizer, called with add_special_tokens=False and
  split_special_tokens=True. The tokenizer may change a text in two ways: it may convert the text to Unicode's NFC (as
  Qwen's does), or add a space before the text (as vocabularies from SentencePiece may). `token_bytes` and
  `bytes_per_token_V` then describe the changed text. For a tokenizer that changes text in any other way, the
  constructor raises DataError.
  """

  def __init__(self, where: epath.Path):
    """Reads the tokenizer.json at `where`, and tokenizer_config.json and generation_config.json in the same folder.

    Raises:
      DataError: a file is missing or broken, no file names an EOS token, or the tokenizer isn't BPE, tokenizes at
        random, or loses or changes text.
    """
    import tokenizers

    files = _read(where)
    # Threads have no use here, because one text is encoded at a time. With them, a later fork of this process would
    # warn of deadlocks.
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    try:
      with _panics_as_data_errors(files.where):
        self._tokenizer = tokenizers.Tokenizer.from_buffer(files.data)
    except ValueError as error:
      raise DataError(f'{files.where}: not a tokenizer ({" ".join(str(error).split())[:200]}); fetch it again, or '
                      'upgrade tokenizers') from None
    self._where = files.where
    if not isinstance(self._tokenizer.model, tokenizers.models.BPE):  # old files don't say the type
      raise DataError(f'{files.where}: its model is {type(self._tokenizer.model).__name__}; only BPE can be used')
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True  # '<|endoftext|>' in a text stays thirteen characters
    self.bos, self.eos, self.pad, self.sha256 = files.bos, files.eos, files.pad, files.sha256
    for text, (id, _) in files.added.items():
      if (given := self._tokenizer.token_to_id(text)) != id:  # `tokenizers` renumbers added tokens that leave a gap
        raise DataError(f'{files.where}: gives the added token {text!r:.100} the id {id}, but `tokenizers` makes it '
                        f'{given}; number the added tokens without gaps')
    with _panics_as_data_errors(files.where):
      self.token_bytes = self._token_bytes()
    self.vocab_size = len(self.token_bytes)
    self.bytes_per_token_V = np.array([len(piece) for piece in self.token_bytes], np.int32)
    self._check_bytes()

  def _token_bytes(self) -> list[bytes]:
    """Returns the bytes that each id stands for; b'' for special tokens and for ids without a token."""
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
    added = self._tokenizer.get_added_tokens_decoder()
    size = max([*vocabulary.values(), *added, self.eos]) + 1
    if size > _LARGEST_ID:
      raise DataError(f'{self._where}: has the id {size - 1}; the largest that can be used is {_LARGEST_ID - 1}')
    out, to_bytes = [b''] * size, self._piece_bytes()
    for piece, id in vocabulary.items():
      out[id] = to_bytes(piece)
    for id, token in added.items():
      out[id] = b'' if token.special else token.content.encode()
    return out

  def _piece_bytes(self):
    """Returns a function that converts a piece of the vocabulary to its bytes.

    The tokenizer's decoder shows how pieces spell bytes: one character per byte (as in GPT-2), or <0x41> for a byte.

    Raises:
      DataError: the tokenizer would lose text, because it has neither byte-level pieces nor byte fallback.
    """
    decoder = self._tokenizer.decoder
    decode = decoder.decode if decoder else ''.join
    if decode(['aĠa']) == 'a a':
      byte_of = {char: byte for byte, char in enumerate(_byte_characters())}

      def of_characters(piece: str) -> bytes:
        try:
          return bytes(map(byte_of.__getitem__, piece))
        except KeyError:  # an added token that is also in the vocabulary
          return piece.encode()

      return of_characters
    if decode(['a', '<0x41>']) == 'aA':
      space = ' ' if decode([f'a{_SPACE}a']) == 'a a' else _SPACE

      def of_text(piece: str) -> bytes:
        if byte := re.fullmatch('<0x([0-9A-F]{2})>', piece):
          return bytes([int(byte[1], 16)])
        return piece.replace(_SPACE, space).encode()

      return of_text
    raise DataError(f'{self._where}: has neither byte-level pieces nor byte fallback, so it would lose text; use '
                    'another tokenizer')

  def _check_bytes(self) -> None:
    """Raises DataError if the tokenizer could lose bytes of a text, or change the text in a way that isn't allowed.

    Two changes are allowed: a conversion to NFC, and a space before the text.
    """
    single = {piece for piece in self.token_bytes if len(piece) == 1}
    if len(single) < 256:
      byte = next(byte for byte in range(256) if bytes([byte]) not in single)
      raise DataError(f'{self._where}: has no token for byte 0x{byte:02X}, so it would lose text; use another '
                      'tokenizer')
    for text in _PROBES:
      read = b''.join(self.token_bytes[id] for id in self.encode(text))
      same = (text.encode(), unicodedata.normalize('NFC', text).encode())
      if read not in same and read.removeprefix(b' ') not in same:
        raise DataError(f'{self._where}: changes text ({text[:40]!r} becomes {read[:40].decode(errors="replace")!r}); '
                        'use another tokenizer')

  def encode(self, text: str) -> np.ndarray:
    """Returns token ids, int32 [N], without BOS and EOS. Raises DataError if the text has lone surrogates."""
    try:  # 15 % faster than `encode`, which also computes the position of each token
      with _panics_as_data_errors(self._where):
        return np.array(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)
    except TypeError:
      raise surrogates(text) from None

  def decode(self, ids: np.ndarray | list[int]) -> str:
    """Returns the text of `ids`. Bytes that aren't UTF-8 become U+FFFD. Raises DataError if an id is negative."""
    size = self.vocab_size
    return b''.join(self.token_bytes[id] for id in checked(ids) if id < size).decode(errors='replace')


@contextlib.contextmanager
def _panics_as_data_errors(where: epath.Path) -> Iterator[None]:
  """Converts a panic of the `tokenizers` library inside the block to DataError.

  The library panics if a pattern of the tokenizer takes too many steps on a text. `except Exception` doesn't catch a
  panic.
  """
  try:
    yield
  except BaseException as error:
    if type(error).__name__ != 'PanicException':
      raise
    reason = one_line(error)[:200]
    raise DataError(f'{where}: `tokenizers` can\'t use it on a text ({reason}); use another tokenizer') from None


def checked(ids: np.ndarray | list[int]) -> list[int]:
  """Returns token ids as a flat list of int. Raises DataError if an id is negative."""
  ids = np.asarray(ids, np.int64).reshape(-1)
  if ids.size and ids.min() < 0:
    raise DataError(f'token ids must be >= 0, got {ids.min()}')
  return ids.tolist()


def surrogates(text: str) -> DataError:
  """Returns the error for a text with a lone surrogate, which no tokenizer library accepts."""
  position = next((i for i, char in enumerate(text) if '\ud800' <= char <= '\udfff'), 0)
  return DataError(f'a text has half of a surrogate pair (U+{ord(text[position]):04X}) at character {position + 1}; '
                   'that is no character: remove it')


def _byte_characters() -> list[str]:
  """Returns the 256 printable characters that stand for bytes in byte-level pieces (GPT-2's table)."""
  printable = {*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)}
  others = iter(range(0x100, 0x200))
  return [chr(byte if byte in printable else next(others)) for byte in range(256)]
