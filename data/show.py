"""Prints what training reads (`betarank data show`), and how well a tokenizer fits the text (`betarank data
tokenizer`).
"""

from collections.abc import Iterable, Sequence

import numpy as np

from betarank.configs.errors import suggestion
from betarank.data import sources
from betarank.data.config import DataConfig, DataError
from betarank.data.packing import Packer
from betarank.data.prepared import Documents
from betarank.data.tokenizer import Tokenizer, read_tokenizer
from betarank.data.tokenizer_training import sample_bytes

_EXTREMES = 3  # so many of the longest and of the shortest documents are shown
_BEGINNING = 100  # the number of characters shown of each
_MOST_HELD_OUT = 8e6  # a tokenizer is judged on at most so many bytes of text


def read(config: DataConfig) -> Tokenizer:
  return read_tokenizer(config.tokenizer_path)


def printable(text: str) -> str:
  """Returns `text` with unprintable characters replaced by U+FFFD, so that no escape sequence reaches the terminal.

  Line ends and tabs are kept.
  """
  return ''.join(c if c.isprintable() or c in '\n\t' else '\ufffd' for c in text)


def show(config: DataConfig, names: Sequence[str], split: str, row: int, seed: int) -> None:
  """Prints, for each source, its counts, one packed row as text, and its longest and shortest documents.

  Args:
    config: the settings of the data.
    names: the sources.
    split: the split to show, 'train' or 'validation'.
    row: the number of the packed row.
    seed: decides the order of the documents, and thus the content of the row.

  Raises:
    DataError: a source doesn't exist or isn't prepared, or the row is negative.
  """
  if row < 0:
    raise DataError(f'--row must be >= 0, got {row}')
  for name in names:
    if name not in config.sources:
      raise DataError(f'--source={name}: no such source{suggestion(name, config.sources)}; there are '
                      f'{", ".join(config.sources)}')
  tokenizer = read(config)
  for name in names:
    for line in _source(config, name, split, row, seed, tokenizer):
      print(line)


def _source(config: DataConfig, name: str, split: str, row: int, seed: int, tokenizer: Tokenizer) -> Iterable[str]:
  documents = Documents(config, name, split)
  counts = documents.manifest['splits'][split]
  training = split == 'train'
  packer = Packer(documents.lengths, config.sequence_length, f'{seed}/{name}' if training else 'validation',
                  shuffle=training)
  yield (f'{name} ({config.sources[name].uri}), {split}: {counts["documents"]:,} documents, {counts["tokens"]:,} '
         f'tokens, {counts["bytes"] / counts["tokens"]:.2f} bytes per token; {packer.rows_per_epoch:,} rows of '
         f'{config.sequence_length:,} tokens per epoch, {packer.efficiency:.2%} filled')
  pieces = packer.row(row)
  found = documents.request(pieces.document)()
  yield (f'row {row}, epoch {row // packer.rows_per_epoch}: {pieces.length.sum():,} tokens of {len(found)} documents')
  for document, index, start, length in zip(found, *(field.tolist() for field in pieces)):
    tokens = document.tokens[start:start + length + 1]
    size = int(tokenizer.bytes_per_token_V[tokens].sum())
    whole = 'whole' if length + 1 == len(document.tokens) else f'tokens {start:,} to {start + length:,} of it'
    yield (f'---- document {index:,}: {len(document.tokens):,} tokens, {whole}, '
           f'{size / max(length, 1):.2f} bytes per token')
    mask = None if document.mask is None else document.mask[start:start + length + 1]
    yield printable(_text(tokenizer, tokens, mask))
  yield '----'
  for what, order in (('longest', -1), ('shortest', 1)):
    indices = _extreme(documents.lengths, order)
    for index, tokens in zip(indices, documents.read(indices)):
      text = ' '.join(printable(tokenizer.decode(tokens)).split())
      text = text if len(text) <= _BEGINNING else f'{text[:_BEGINNING]} ...'
      yield f'{what}: document {index:,}, {len(tokens):,} tokens: {text}'


def _text(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray | None) -> str:
  """Returns the text of tokens. If there is a mask, the parts that count in the loss are in brackets: ⟦...⟧."""
  if mask is None:
    return tokenizer.decode(tokens)
  edges = np.flatnonzero(np.diff(mask, prepend=not mask[0])).tolist()
  runs = zip(edges, [*edges[1:], len(tokens)])
  return ''.join(f'⟦{tokenizer.decode(tokens[a:b])}⟧' if mask[a] else tokenizer.decode(tokens[a:b]) for a, b in runs)


def _extreme(lengths_N: np.ndarray, order: int) -> list[int]:
  """Returns the indices of _EXTREMES documents: the shortest documents if `order` is 1, the longest if `order` is -1.

  The N lengths are compared in blocks, because sorting or copying all of them would need much memory.
  """
  best = np.array([], np.int64)
  for start in range(0, len(lengths_N), 2**20):
    part = np.arange(start, min(start + 2**20, len(lengths_N)))
    some = np.concatenate([best, part])
    keys = order * lengths_N[some].astype(np.int64)
    best = some[np.argsort(keys, kind='stable')[:_EXTREMES]]
  return best.tolist()


def tokenizer(config: DataConfig) -> None:
  """Prints, for each source, how many bytes of text a token stands for, on average.

  This is measured on text that the tokenizer wasn't trained on. If a source has no such text, a part of the tokenizer's
  training text is used, and the source's line says so. A last line says how many tokens of the vocabulary occur in
  none of the texts, and how many occur at most three times.
  """
  tokenizer, every = read(config), np.int64(0)
  share = sample_bytes(config) / len(config.sources)
  for name in config.sources:
    source = sources.open_source(config, name)
    room = min(_MOST_HELD_OUT / len(config.sources), share)
    counts, size, what = *_encoded(tokenizer, source.sample(share, held_out=room)), 'held-out text'
    if not size:
      counts, size, what = *_encoded(tokenizer, source.sample(room)), 'its training text, as there is no other'
    every = counts + every
    print(f'{name}: {size / max(counts.sum(), 1):.2f} bytes per token on {size / 1e6:.1f} MB of {what}')
  never, rare = int((every == 0).sum()), int((every <= 3).sum())
  special = int((tokenizer.bytes_per_token_V == 0).sum())
  print(f'of {tokenizer.vocab_size:,} tokens, {special} of them special, {never:,} ({never / len(every):.1%}) are '
        f'never used there, {rare:,} ({rare / len(every):.1%}) at most three times')


def _encoded(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[np.ndarray, int]:
  """Returns how often each token occurs in `texts`, int64 [vocab_size], and the size of the texts in bytes."""
  counts, size = np.zeros(tokenizer.vocab_size, np.int64), 0
  for text in texts:
    counts += np.bincount(tokenizer.encode(text), minlength=tokenizer.vocab_size)
    size += len(text.encode())
  return counts, size
