"""Prepares a tiny corpus once for all tests: two sources with short and long documents of made-up words."""

import dataclasses
import json
import random

import pytest

from betarank.data.config import DataConfig, SourceConfig
from betarank.data.prepare import prepare_source
from betarank.data.tokenizer_training import train_tokenizer


def words(seed, documents, most_words):
  rng = random.Random(seed)
  syllables = [a + b for a in 'bdfgklmnprst' for b in 'aeiou']
  for _ in range(documents):
    count = rng.randint(1, most_words) if rng.random() < 0.9 else most_words * 3
    yield ' '.join(''.join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(count)) + '\n'


def write_jsonl(path, documents):
  path.write_text(''.join(json.dumps({'text': d}) + '\n' for d in documents))
  return path


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp('corpus')
  write_jsonl(folder / 'a.jsonl', words(1, 400, 12))
  write_jsonl(folder / 'b.jsonl', words(2, 150, 40))
  return folder


@pytest.fixture(scope='session')
def prepared_config(corpus, tmp_path_factory):
  """Returns a DataConfig whose data is prepared. Rows have 32 tokens, so that many documents are longer than a row."""
  config = DataConfig(
    dir=str(tmp_path_factory.mktemp('prepared')), tokenizer='', vocab_size=384,
    sources={'a': SourceConfig(f'jsonl:{corpus}/a.jsonl', weight=3.0, max_documents=0),
             'b': SourceConfig(f'jsonl:{corpus}/b.jsonl', weight=1.0, max_documents=0)},
    validation_fraction=0.1, sequence_length=32)
  train_tokenizer(config)
  for name in config.sources:
    prepare_source(config, name, workers=1)
  return config


@pytest.fixture
def config(prepared_config, tmp_path):
  """Returns `prepared_config` with an empty folder for the data. The tokenizer stays the same."""
  tokenizer = prepared_config.tokenizer_path
  return dataclasses.replace(prepared_config, dir=str(tmp_path / 'data'), tokenizer=tokenizer)


@pytest.fixture
def make_source():
  return lambda uri, max_documents=0, weight=1.0, **kwargs: SourceConfig(uri, weight, max_documents, **kwargs)
