"""Defines the config section `data`, and DataError, the error that all modules of the package `data` raise.

The settings are checked before any file is read.
"""

import dataclasses
import math
import re

from betarank.configs.errors import UserError
from betarank.configs.settings import default


class DataError(UserError):
  """Raised if data, or a setting that concerns data, can't be used.

  The message is one line that names the file or the setting, and says what to do.
  """


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """One source of documents, and the share of training rows that come from it."""

  uri: str  # see data/sources.py for the kinds of URI
  weight: float  # the share of training rows, on any scale
  max_documents: int  # 0: all documents of the source
  max_bad_rows: int = 0  # the largest number of rows without text to skip; 0: the first one stops the preparation
  template: str = ''  # for instruction data and chats; see data/fields.py

  def __post_init__(self):
    if not self.uri:
      raise ValueError('uri must be KIND:PATH, got an empty text')
    if not (math.isfinite(self.weight) and self.weight >= 0):
      raise ValueError(f'weight must be a number >= 0, got {self.weight}')
    if self.max_documents < 0:
      raise ValueError(f'max_documents must be >= 0 (0: all), got {self.max_documents}')
    if self.max_bad_rows < 0:
      raise ValueError(f'max_bad_rows must be >= 0 (0: none), got {self.max_bad_rows}')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Section `data`: all settings that decide what the model reads, except the seed and the batch size."""

  dir: str
  tokenizer: str
  vocab_size: int
  sources: dict[str, SourceConfig]
  validation_fraction: float
  sequence_length: int
  document_bytes: int = default('data.document_bytes')
  held_out_fraction: float = default('data.held_out_fraction')
  tokenizer_sample_mb: float = default('data.tokenizer_sample_mb')
  cache_dir: str = default('data.cache_dir')
  cache_gb: float = default('data.cache_gb')

  def __post_init__(self):
    if not self.dir:
      raise ValueError('dir must be a folder, got an empty text')
    if self.vocab_size < 1:
      raise ValueError(f'vocab_size must be positive, got {self.vocab_size}')
    if not self.sources:
      raise ValueError('sources must name one source or more, got none')
    for name in self.sources:
      if not re.fullmatch(r'[a-z]\w*', name):  # it becomes the name of a TFDS data set, and part of file names
        raise ValueError(f'sources must have names of lower-case letters, digits and _, got {name!r}')
    if not any(source.weight for source in self.sources.values()):
      raise ValueError('sources must have a weight > 0 somewhere, got none')
    if not 0 <= self.validation_fraction < 1:
      raise ValueError(f'validation_fraction must be in [0, 1), got {self.validation_fraction}')
    if not 0 <= self.held_out_fraction < 1:
      raise ValueError(f'held_out_fraction must be in [0, 1), got {self.held_out_fraction}')
    if self.sequence_length < 1:
      raise ValueError(f'sequence_length must be positive, got {self.sequence_length}')
    if self.document_bytes and self.document_bytes < 16:
      raise ValueError(f'document_bytes must be 16 or more, or 0 for the default, got {self.document_bytes}')
    if self.tokenizer_sample_mb < 0:
      raise ValueError(f'tokenizer_sample_mb must be >= 0 (0: by the vocabulary), got {self.tokenizer_sample_mb}')
    if '://' in self.cache_dir:
      raise ValueError(f'cache_dir must be a local folder, got {self.cache_dir!r}')
    if self.cache_gb <= 0:
      raise ValueError(f'cache_gb must be positive, got {self.cache_gb}')

  def __hash__(self) -> int:  # needed because caches of opened data use the settings as keys
    return hash((self.dir, self.tokenizer, self.sequence_length, *self.sources))

  @property
  def longest_document(self) -> int:
    """The largest size of a document in bytes. Longer documents are split.

    The setting document_bytes gives this size. 0 means 8 bytes for each token of a row, but at least 64 KiB.
    """
    return self.document_bytes or max(65_536, 8 * self.sequence_length)

  @property
  def tokenizer_path(self) -> str:
    """The path in the setting `tokenizer` or, if this is empty, the path of the tokenizer that is trained in `dir`."""
    return self.tokenizer or f'{self.dir.rstrip("/")}/tokenizer.model'
