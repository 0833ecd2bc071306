"""Trains a SentencePiece BPE tokenizer on the sources of a config."""

import io
import re
from collections.abc import Iterable, Iterator

from etils import epath

from betarank.configs.files import write_atomically
from betarank.data import sources
from betarank.data.config import DataConfig, DataError
from betarank.data.tokenizer import BOS, EOS, PAD, UNK

_LEAST_SAMPLE = 16e6  # the tokenizer is trained on at least so many bytes of text
_SAMPLE_PER_TOKEN = 1024  # bytes of text for each token of the vocabulary
_LINE_BYTES = 4096  # longer lines are cut, because the trainer's memory grows with the longest sentence
_SPACE = '▁'  # SentencePiece's character for a space


def sample_bytes(config: DataConfig) -> float:
  """Returns the size of the text that the tokenizer is trained on, in bytes."""
  if config.tokenizer_sample_mb:
    return config.tokenizer_sample_mb * 1e6
  return max(_LEAST_SAMPLE, _SAMPLE_PER_TOKEN * config.vocab_size)


def train_tokenizer(config: DataConfig) -> bool:
  """Trains the tokenizer in `config.dir`, on equal amounts of text from each source.

  If the sources have too little text for config.vocab_size tokens, the tokenizer gets as many tokens as the text
  allows.

  Returns:
    True if a tokenizer was trained; False if config.dir has one already, or if config.tokenizer names one.

  Raises:
    DataError: a source can't be read; or the sample is too small for config.vocab_size tokens, although the sources
      have more text.
  """
  path = config.tokenizer_path
  if config.tokenizer or epath.Path(path).exists():
    return False
  try:
    _train(config, config.vocab_size)
  except TooLittleTextError as error:
    every = sum(sources.open_source(config, name).total_bytes for name in config.sources)
    if every > sample_bytes(config):
      raise DataError(f'{path}: {sample_bytes(config) / 1e6:.0f} MB of text yield {error.tokens} tokens at most, fewer '
                      f'than vocab_size={config.vocab_size}; raise config.data.tokenizer_sample_mb (there are about '
                      f'{every / 1e6:,.0f} MB), or lower config.model.vocab_size') from None
    _train(config, error.tokens)
  return True


def _train(config: DataConfig, vocab_size: int) -> None:
  def texts() -> Iterator[str]:
    for name in config.sources:
      with sources.named(name):
        yield from sources.open_source(config, name).sample(sample_bytes(config) / len(config.sources))

  train(texts(), vocab_size, config.tokenizer_path, max_bytes=2 * int(sample_bytes(config)))


class TooLittleTextError(DataError):
  """Raised if the text is too small for a vocabulary of the size that was asked for.

  Attributes:
    tokens: the largest number of tokens that can be trained on the text.
  """

  def __init__(self, message: str, tokens: int):
    super().__init__(message)
    self.tokens = tokens


def train(documents: Iterable[str], vocab_size: int, path: str, max_bytes: int = int(_LEAST_SAMPLE)) -> None:
  """Trains a SentencePiece BPE tokenizer, and writes it to `path` atomically.

  The same documents give the same file. Each digit and each line end is a token. Characters without a token are encoded
  as bytes.

  Args:
    documents: the texts. Only about the first `max_bytes` bytes (UTF-8) are used.
    vocab_size: the number of tokens.
    path: the file to write.
    max_bytes: the number of bytes to train on.

  Raises:
    DataError: there are no documents, or SentencePiece can't train `vocab_size` tokens on them.
  """
  import sentencepiece

  model, lines = io.BytesIO(), _lines(documents, max_bytes)
  first = next(lines, None)
  if first is None:
    raise DataError(f'{path}: no text to train a tokenizer on; the sources gave no documents')

  failed: list[BaseException] = []  # SentencePiece would turn it into an error of its own

  def sentences():
    yield first
    try:
      yield from lines
    except (Exception, KeyboardInterrupt) as error:
      failed.append(error)
      raise

  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=sentences(), model_writer=model, model_type='bpe', vocab_size=vocab_size,
      byte_fallback=True, split_digits=True, normalization_rule_name='identity', add_dummy_prefix=False,
      remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, user_defined_symbols=['\n'],
      character_coverage=0.9995,  # rarer characters aren't worth a row of the embedding
      max_sentence_length=2 * _LINE_BYTES, num_threads=1, minloglevel=2,
      pad_id=PAD, unk_id=UNK, bos_id=BOS, eos_id=EOS)
  except RuntimeError as error:
    if failed:
      raise failed[0] from None
    raise _error(str(error), vocab_size, path) from None
  write_atomically(path, model.getvalue())


def _error(reason: str, vocab_size: int, path: str) -> DataError:
  """Returns a DataError that explains an error of SentencePiece.

  reason: the error message of SentencePiece.
  vocab_size: the number of tokens that SentencePiece should have trained.
  path: the file of the tokenizer.
  """
  if limit := re.search(r'set it to a value <= (\d+)', reason):
    return TooLittleTextError(
      f'{path}: the documents yield {limit[1]} tokens at most, fewer than vocab_size={vocab_size}; lower '
      'config.model.vocab_size or give more text', int(limit[1]))
  if limit := re.search(r'required_chars\D*(\d+)\D+(\d+)', reason):
    return DataError(f'{path}: vocab_size={vocab_size} is too small: bytes, special tokens and single characters '
                     f'alone need {max(map(int, limit.groups()))}; raise config.model.vocab_size')
  return DataError(f'{path}: SentencePiece could not train ({" ".join(reason.split())}); check vocab_size={vocab_size}')


def _lines(documents: Iterable[str], max_bytes: int) -> Iterator[str]:
  """Yields the lines of the documents, up to about `max_bytes` bytes in all. No token spans two lines.

  Documents are also split at NUL and at '▁', with which SentencePiece writes a space, because the trainer accepts
  neither character. Long lines are cut.
  """
  used = 0
  for document in documents:
    for line in re.split(f'[\n\0{_SPACE}]', document):
      for start in range(0, len(line), _LINE_BYTES // 4):
        piece = line[start:start + _LINE_BYTES // 4]  # a character has 4 bytes at most
        used += len(piece.encode()) + 1
        yield piece
      if used >= max_bytes:
        return


