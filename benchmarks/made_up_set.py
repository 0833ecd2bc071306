"""Writes data sets of random tokens for benchmarks, in the format of prepared data.

Tokenizing a large set of real text would take hours, and the speed of opening and reading a set doesn't depend on its
content.
"""

import json
import pathlib

import numpy as np
from etils import epath

from betarank.data import prepared, publish, records
from betarank.data.config import DataConfig, SourceConfig
from betarank.data.tokenizer import read_tokenizer
from betarank.data.tokenizer_training import train
from betarank.data.worker import Job, ShardWriter

VOCAB = 151_936  # the paper's, which needs uint32 tokens
MEAN_TOKENS = 1000  # of a document, about what web text has


def texts(count: int) -> list[str]:
  """Returns documents of made-up words, 200 words each."""
  rng = np.random.default_rng(0)
  words = [bytes(rng.integers(97, 123, rng.integers(2, 9), np.uint8)).decode() for _ in range(2000)]
  return [' '.join(words[i] for i in row) for row in rng.zipf(1.3, (count, 200)) % 2000]


def write_text(path: pathlib.Path, size: float) -> None:
  """Writes a JSON Lines file with about `size` bytes of made-up documents (see `texts`)."""
  some = texts(1000)
  line = ''.join(json.dumps({'text': text}) + '\n' for text in some)
  path.write_text(line * max(1, round(size / sum(map(len, some)))))


def write(folder: pathlib.Path, *, shards: int, documents: int, row: int, contents: bool = True) -> DataConfig:
  """Writes a data set with one source, `main`, below `folder`. Returns its DataConfig.

  Args:
    shards: the number of shards.
    documents: the number of documents in all shards together.
    row: the number of tokens of a row.
    contents: whether shards have content. Without content, they only have the right size, so the set can be opened, but
      not read.
  """
  rng = np.random.default_rng(0)
  folder.mkdir(parents=True)
  write_text(folder / 'x.jsonl', 1)
  source = SourceConfig(f'jsonl:{folder}/x.jsonl', 1.0, 0)
  config = DataConfig(str(folder), '', VOCAB, {'main': source}, 0.0, row)
  train(iter(texts(50)), 384, config.tokenizer_path)
  job = Job('main', config, str(prepared.folder(config, 'main') / 'partial'))
  epath.Path(job.folder).mkdir(parents=True)
  form = records.Form(records.token_dtype(VOCAB), False)
  tokens = rng.integers(3, VOCAB, 2**22, dtype=form.dtype)
  markers = []
  for shard in range(shards):
    count = documents * (shard + 1) // shards - documents * shard // shards
    lengths_N = np.clip(rng.lognormal(np.log(MEAN_TOKENS) - 0.5, 1.0, count), 8, 2**15).astype(np.uint32)
    stage = job.stage(shard, 0, 'train')
    counts = _real(stage, form, tokens, lengths_N) if contents else _empty(stage, form, lengths_N)
    markers.append({'unit': shard, 'piece': 0, 'documents': count, 'bad_rows': 0, 'last': True,
                    'splits': {'train': counts, 'validation': {'documents': 0}}})
  publish.publish(job, read_tokenizer(config.tokenizer_path), markers, {'files': 1, 'empty_files': 0})
  return config


def _real(stage, form, tokens, lengths_N) -> dict:
  writer, at = ShardWriter(stage, form), 0
  for length in lengths_N.tolist():
    at = (at + 7919) % (len(tokens) - 2**15)
    writer.add(tokens[at:at + length], None, 4 * length)
  return writer.close()


def _empty(stage, form, lengths_N) -> dict:
  [size] = records.Places(lengths_N, [0, len(lengths_N)], form).sizes
  with open(stage, 'wb') as file:
    file.truncate(size)
  np.save(stage.with_suffix('.npy'), lengths_N)
  total = int(lengths_N.sum())
  return {'documents': len(lengths_N), 'tokens': total, 'bytes': 4 * total, 'size': int(size),
          'longest': int(lengths_N.max()), 'sha256': ''}
