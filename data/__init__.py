"""Tokenizes documents of any source once into indexed shards, and reads the shards as packed batches in a fixed order.

    sources -> tokenizer -> prepare             before training: betarank data prepare --config=...
    prepared -> packing, mixture -> batches     during training

The order of documents, the packing and the mixture are pure functions of (settings, seed, index). A run can therefore
resume without reading any earlier batch again. Names are imported when they are first used, so that a process which
only tokenizes doesn't import JAX.
"""

import importlib

_HOME = {
  'DataConfig': 'config', 'DataError': 'config', 'SourceConfig': 'config',
  'Tokenizer': 'tokenizer', 'read_tokenizer': 'tokenizer',
  'check_prepared': 'prepared',
  'prepare_source': 'prepare', 'train_tokenizer': 'tokenizer_training',
  'Batch': 'batches', 'PackingStats': 'batches', 'TrainBatches': 'batches', 'validation_batches': 'batches',
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
  if name not in _HOME:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(f'{__name__}.{_HOME[name]}'), name)
