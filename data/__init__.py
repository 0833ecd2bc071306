"""Documents from anywhere, tokenised once into indexed shards, read back as packed batches in a fixed order.

    sources -> tokenizer -> prepare   offline: betarank data prepare --config=...
    prepared -> packing, mixture -> batches   during training

Order, packing and mixing are pure functions of (settings, seed, index): nothing has to be replayed to resume.
Names are imported when first used, so that a worker process which only tokenises doesn't wait for JAX.
"""

import importlib

_HOME = {
  'DataConfig': 'config', 'DataError': 'config', 'SourceConfig': 'config',
  'Tokenizer': 'tokenizer', 'read_tokenizer': 'tokenizer',
  'check_prepared': 'prepared',
  'prepare_source': 'prepare', 'train_tokenizer': 'prepare',
  'Batch': 'batches', 'PackingStats': 'batches', 'TrainBatches': 'batches', 'validation_batches': 'batches',
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
  if name not in _HOME:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(f'{__name__}.{_HOME[name]}'), name)
