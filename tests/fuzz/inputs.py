"""The targets that read files and flags: configs, sources of documents, tokenizers, prepared data, and Hugging Face's
files.
"""

import bz2
import contextlib
import csv
import dataclasses
import gzip
import io
import itertools
import json
import lzma
import pathlib
import random
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from betarank.configs import common, load
from betarank.configs.errors import ConfigError, UserError
from betarank.configs.parser import Parser
from betarank.configs.sections import section
from betarank.data.config import DataConfig, DataError, SourceConfig
from betarank.model.hf_config import HfError
from tests.fuzz import mutate
from tests.fuzz.target import nothing, target

WORDS = ('one two three', 'State the final answer: 4 - 1 = 3', '日本語 ▁ é\n', 'def f(x):\n  return x', '9' * 50)


def documents(seed: int, count: int = 40) -> list[str]:
  rng = random.Random(seed)
  return [' '.join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(count)]


def read_all(uri: str, document_bytes: int = 512, template: str = '') -> None:
  """Reads all documents of a source, as `betarank data prepare` does."""
  from betarank.data import sources

  source = sources.Source(SourceConfig(uri, 1.0, 0, template=template), document_bytes)
  for unit in source.units():
    for document in source.read(unit):
      for piece in sources.cut(document, document_bytes):
        sources.text_of(piece).encode()


def files(path: pathlib.Path, goods: list[bytes], tokens: Iterable[bytes], read: Callable[[], Any]):
  """Returns (make, check, close), as in Target, for a reader of one file.

  path: the file to which a case is written.
  goods: valid contents of the file.
  tokens: byte strings with which contents are changed.
  read: reads the file.
  """
  def make(rng, good=False):
    content = rng.choice(goods)
    return content if good else mutate.data(rng, content, goods, tuple(tokens))

  def check(content):
    path.write_bytes(content)
    return read()

  return make, check, nothing


# Configs


def _json_values():
  leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
  return st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner,
                                                                                       max_size=4), max_leaves=8)


def _overrides():
  keys = st.sampled_from([*_all_settings(), 'model', 'data.sources.main', 'nope', 'model.', '.', '']) | st.text(
    max_size=12)
  values = st.text(max_size=30) | st.integers().map(str) | st.floats().map(str) | _json_values().map(json.dumps)
  return st.lists(st.tuples(keys, values), min_size=1, max_size=3).map(
    lambda pairs: ['--config=configs/smoke.py'] + [f'--config.{key}={value}' for key, value in pairs])


def _wholes():
  """Returns (a config of pre-training, a config of RL). Both have a section `eval`."""
  pretraining, rl = common.base(), common.rl_base()
  rl.model = pretraining.model
  rl.train.init_from = 'runs/x'
  pretraining.eval = rl.eval = common.evaluation()
  return pretraining, rl


def _all_settings():
  return {key: value for config in _wholes() for key, value in load.flatten(config).items()}


def _sections(config) -> None:
  from betarank.eval.config import EvalConfig
  from betarank.rl.config import rl_run
  from betarank.train.config import run_config

  (rl_run if 'rl' in config else run_config)({key: config[key] for key in config if key != 'eval'})
  if 'eval' in config:
    section(EvalConfig, config.eval, 'eval')


@target(100, UserError)
def config_file(folder):
  goods = [json.loads(load.to_json(config)) for config in _wholes()]
  for config in _wholes():
    _sections(config)  # its imports aren't growth
  path = folder / 'config.json'
  raw = [json.dumps(good).encode() for good in goods]

  def make(rng, good=False):
    if good:
      return rng.choice(raw)
    return mutate.json_text(rng, rng.choice(goods)) if rng.random() < 0.7 else mutate.data(rng, rng.choice(raw), raw)

  def check(content):
    path.write_bytes(content)
    config = load.load(str(path))
    _sections(config)
    load.to_json(config)

  return make, check, nothing


@target(120, UserError, SystemExit, strategy=_overrides)  # argparse answers for its own flags by SystemExit
def command_line(folder):
  flat = {key: json.dumps(value) if isinstance(value, list | tuple) else str(value)
          for key, value in _all_settings().items()}
  for config in _wholes():
    _sections(config)  # its imports aren't growth

  def make(rng, good=False):
    if good:
      return ['--config=configs/smoke.py:beta=-0.25', '--config.optimizer.lr=1e-3', '--config.seed', '3']
    argv = ['--config=' + (mutate.text(rng, rng.choice(('configs/smoke.py:beta=-0.25,source=reasoning', 'configs/smoke',
                                                        'configs/rl_smoke.py', 'x.json', '.json', '/etc/passwd',
                                                        'configs/paper/../smoke.py:seed=1')))
                           if rng.random() < 0.4 else 'configs/smoke.py')]
    for _ in range(rng.randint(0, 3)):
      key = rng.choice(list(flat))
      text = mutate.text(rng, flat[key], ('1e3', '-1', 'true', 'inf', '{"a": 1}', '[1, 2]', '[' * 5000, '9' * 5000))
      flag = f'--config.{mutate.text(rng, key) if rng.random() < 0.2 else key}'
      argv += [flag, text] if rng.random() < 0.3 else [f'{flag}={text}']
    return argv

  def check(argv):
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
      config, _ = load.from_command_line(Parser('x'), argv)
    _sections(config)

  return make, check, nothing


@target(40, UserError)
def checkpoint(folder):
  """Builds the target of the files that describe a checkpoint, and of its run's config. The arrays stay intact."""
  from etils import epath

  from betarank.runtime import checkpoint_command, integrity, workdir

  config, run = load.load('configs/rl_smoke.py'), folder / 'run'
  resolved, step = json.loads(load.to_json(config)), run / 'checkpoints' / '1'
  meta = {'step': 1, 'shapes': {'params.x': [[4, 2], 'float32'], 'step': [[], 'int32']}, 'config': resolved,
          'cursor': {'best': {'metric': 'eval/x/avg_at_4', 'step': 1, 'value': 0.5}}, 'parent': 'x'}
  for name, content in (('state/x', 'arrays'), ('meta/metadata', json.dumps(meta))):
    (step / name).parent.mkdir(parents=True)
    (step / name).write_text(content)
  integrity.write(epath.Path(step))
  (run / 'config.json').write_text(json.dumps(resolved))
  goods = {path: json.loads(path.read_text()) for path in (
    step / 'meta/metadata', step / 'manifest.json', run / 'config.json')}
  raw = {path: path.read_bytes() for path in goods}

  def make(rng, good=False):
    path = rng.choice(list(raw))
    if good:
      return path, raw[path]
    return path, mutate.json_text(rng, goods[path]) if rng.random() < 0.7 else mutate.data(rng, raw[path])

  def check(case):
    path, content = case
    try:
      if path.name == 'metadata':  # otherwise, a changed file would be refused unread
        (step / 'manifest.json').unlink()
      path.write_bytes(content)
      integrity.damage(epath.Path(step), full=True)
      workdir.check_config(epath.Path(run), config)
      with contextlib.redirect_stdout(io.StringIO()):
        checkpoint_command.main(['inspect', str(run)])
    finally:
      for path, content in raw.items():
        path.write_bytes(content)

  return make, check, nothing


# Sources of documents


@target(140, DataError)
def jsonl(folder):
  lines = [json.dumps({'text': text, 'n': i}, ensure_ascii=i % 2 == 0) for i, text in enumerate(documents(1))]
  plain = '\n'.join(lines).encode()
  packed = gzip.compress(plain, mtime=0)

  def make(rng, good=False):
    kind = rng.randrange(4)
    if good or kind == 3:
      return kind == 1, ((packed if kind == 1 else plain) if good else mutate.data(rng, packed if kind == 1 else plain))
    if kind == 2:
      line = mutate.json_text(rng, json.loads(lines[0]))
      return False, plain + b'\n' + line + b'\n'
    return kind == 1, mutate.data(rng, packed if kind == 1 else plain, [packed, plain], [b'"text":', b'"text": 1'])

  def check(case):
    path = folder / ('x.jsonl.gz' if case[0] else 'x.jsonl')
    path.write_bytes(case[1])
    read_all(f'jsonl:{path}')

  return make, check, nothing


def _csv_bytes(separator: str) -> bytes:
  out = io.StringIO()
  rows = csv.writer(out, delimiter=separator)
  rows.writerows([('n', 'text'), *enumerate(documents(8)), (0, 'with "quotes", commas\nand lines')])
  return out.getvalue().encode()


@target(80, DataError)
def csv_rows(folder):
  path = folder / 'x.csv'
  goods = [_csv_bytes(','), b'\xef\xbb\xbf' + _csv_bytes(','), b'text\r\n"a"\r\n']
  words = [b'"', b'""', b'"\n', b',', b'\r', b'\n"', b'\xed\xa0\x80']
  return files(path, goods, words, lambda: read_all(f'csv:{path}'))


def _pack(kind: str, content: bytes) -> bytes:
  import pyarrow

  pack = {'gz': lambda data: gzip.compress(data, mtime=0), 'bz2': bz2.compress, 'xz': lzma.compress,
          'zst': lambda data: pyarrow.compress(data, 'zstd', asbytes=True)}
  return pack[kind](content)


@target(120, DataError)
def packed(folder):
  """Compressed files: damaged, with a false suffix, in several parts, compressed twice, and far larger inside."""
  lines = '\n'.join(json.dumps({'text': text}) for text in documents(9)).encode()
  contents = {'jsonl': lines, 'csv': _csv_bytes(','), 'tsv': _csv_bytes('\t'), 'txt': lines}
  kinds = ('gz', 'bz2', 'xz', 'zst')
  goods = {(name, kind): _pack(kind, content) for name, content in contents.items() for kind in kinds}
  bombs = {(name, kind): _pack(kind, contents[name][:40] + b'a' * 2**24) for name, kind in goods}

  def make(rng, good=False):
    name, kind = rng.choice(list(goods))
    if good:
      return name, kind, goods[name, kind]
    how = rng.randrange(8)
    if how == 0 and rng.random() < 0.1:  # these take long
      return name, kind, bombs[name, kind]
    if how == 1:
      return name, rng.choice(kinds), goods[name, kind]
    if how == 2:
      return name, kind, goods[name, kind] + rng.choice((goods[name, kind], goods[name, rng.choice(kinds)], b'\0' * 9))
    if how == 3:
      return name, kind, _pack(rng.choice(kinds), goods[name, kind])
    if how == 4:
      return name, kind, _pack(kind, mutate.data(rng, contents[name]))
    return name, kind, mutate.data(rng, goods[name, kind], list(goods.values()))

  def check(case):
    name, kind, content = case
    path = folder / f'x.{name}.{kind}'
    path.write_bytes(content)
    reader = {'txt': 'text', 'tsv': 'csv'}.get(name, name)
    read_all(f'{reader}:{path}', 4096)

  return make, check, nothing


@target(60, DataError)
def hf_folder(folder):
  """Folders as Hugging Face lays data sets out: splits in names, compressed files, and what else may lie there."""
  import pyarrow
  import pyarrow.parquet

  sink = io.BytesIO()
  pyarrow.parquet.write_table(pyarrow.table({'text': documents(3)}), sink)
  lines = '\n'.join(json.dumps({'text': text}) for text in documents(9)).encode()
  contents = {'.parquet': sink.getvalue(), '.jsonl': lines, '.jsonl.zst': _pack('zst', lines), '.csv': _csv_bytes(','),
              '.json': json.dumps({'citation': '', 'splits': {'train': {'num_bytes': 2**63}}}).encode(), '.txt': lines}
  words = ('train', 'test', 'validation', 'data/train-00000-of-00002', 'a/b/c/train', '.hidden', '_', 'x\ny', 'é',
           '..x', '*', '[a', '#', '?', 'train-' + 'x' * 200)

  def make(rng, good=False):
    kind = rng.choice(('parquet', 'jsonl', 'csv', 'text'))
    if good:
      return kind, '', {'dataset_infos.json': contents['.json'], 'README.md': b'# Words', **{
        f'data/train-0{suffix}': content for suffix, content in contents.items() if suffix != '.json'}}
    tree = {}
    for _ in range(rng.randint(1, 5)):
      suffix = rng.choice(list(contents))
      content = contents[suffix]
      tree[rng.choice(words) + suffix] = mutate.data(rng, content) if rng.random() < 0.3 else content
    return kind, rng.choice(('', '', '/', '/**/*', '/*', '/data', '#text', '#nope', '/*#text')), tree

  def check(case):
    kind, end, tree = case
    place = folder / 'set'
    shutil.rmtree(place, ignore_errors=True)
    for name, content in tree.items():
      (place / name).parent.mkdir(parents=True, exist_ok=True)
      (place / name).write_bytes(content)
    read_all(f'{kind}:{place}{end}')

  return make, check, nothing


@target(100, DataError)
def text(folder):
  path = folder / 'x.txt'
  return files(path, ['\n'.join(documents(2)).encode(), ('é' * 3000).encode()], [b'\xe6\x97', b'\r\n'],
               lambda: read_all(f'text:{path}'))


@target(80, DataError)
def parquet(folder):
  import pyarrow
  import pyarrow.parquet

  path, goods = folder / 'x.parquet', []
  for compression, dictionary, groups in (('snappy', True, 10), ('none', False, 100), ('zstd', True, 100),
                                          ('gzip', False, 20)):
    sink = io.BytesIO()
    table = pyarrow.table({'text': documents(3), 'n': list(range(40))})
    pyarrow.parquet.write_table(table, sink, row_group_size=groups, compression=compression, use_dictionary=dictionary)
    goods.append(sink.getvalue())
  return files(path, goods, [], lambda: read_all(f'parquet:{path}'))


@target(60, DataError)
def parquet_footer(folder):
  """Builds the target of Parquet files whose metadata is damaged, but found, and whose data is intact."""
  import pyarrow
  import pyarrow.parquet

  path, goods = folder / 'x.parquet', []
  texts = documents(2)
  chats = [[{'role': 'user', 'content': text}, {'role': 'assistant', 'content': text}] for text in texts]
  tables = {
    '': pyarrow.table({'text': texts, 'n': [float(i) for i in range(len(texts))]}),
    '#a.text': pyarrow.table({'a': [{'text': text, 'n': [1, 2], 'x': None} for text in texts]}),
    '#messages': pyarrow.table({'messages': chats}),
    '#text+answer': pyarrow.table({'text': texts, 'answer': pyarrow.array(texts).dictionary_encode()})}
  for field, table in tables.items():
    for version, groups in (('1.0', 7), ('2.6', 100)):
      sink = io.BytesIO()
      pyarrow.parquet.write_table(table, sink, row_group_size=groups, version=version, write_page_index=groups == 7)
      content = sink.getvalue()
      start = len(content) - 8 - int.from_bytes(content[-8:-4], 'little')
      goods.append((field, content[:start], content[start:-8]))

  def make(rng, good=False):
    field, data, footer = rng.choice(goods)
    if not good:
      footer = mutate.data(rng, footer, [other for _, _, other in goods])
    return field, data + footer + len(footer).to_bytes(4, 'little') + b'PAR1'

  def check(case):
    field, content = case
    path.write_bytes(content)
    read_all(f'parquet:{path}{field}', template='{role}: {content}' if field == '#messages' else '')

  return make, check, nothing


@target(80, DataError)
def arrayrecord(folder):
  from array_record.python import array_record_module

  path, goods = folder / 'x.array_record', []
  for options in ('group_size:1', 'group_size:8', 'group_size:1,uncompressed'):
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    for document in documents(4):
      writer.write(document.encode())
    writer.close()
    goods.append(path.read_bytes())
  return files(path, goods, [], lambda: read_all(f'arrayrecord:{path}'))


@target(20, DataError)
def tfds(folder):
  """Builds the target of the JSON files that describe a TFDS data set. The records stay intact."""
  import tensorflow_datasets as tfds
  from array_record.python import array_record_module

  from betarank.data import record_formats
  from betarank.data.records import to_record

  place = folder / 'a' / '1.0.0'
  place.mkdir(parents=True)
  writer = array_record_module.ArrayRecordWriter(str(place / 'a-train.array_record-00000-of-00001'), 'group_size:1')
  for document in documents(8):
    writer.write(to_record(np.frombuffer(document.encode(), np.uint8)))
  writer.close()
  name = tfds.core.ShardedFileTemplate(data_dir=place, dataset_name='a', filetype_suffix='array_record', split='train')
  tfds.folder_dataset.write_metadata(
    data_dir=place, features=tfds.features.FeaturesDict({'tokens': tfds.features.Text()}), version='1.0.0',
    split_infos=[tfds.core.SplitInfo(name='train', filename_template=name, shard_lengths=[40], num_bytes=9000)],
    check_data=False)
  raw = {path.name: path.read_bytes() for path in place.glob('*.json')}
  goods = {name: json.loads(content) for name, content in raw.items()}

  def make(rng, good=False):
    name = rng.choice(list(goods))
    content = raw[name] if good else mutate.json_text(rng, goods[name]) if rng.random() < 0.7 else mutate.data(
      rng, raw[name], list(raw.values()))
    return name, content

  def check(case):
    record_formats._tfds.cache_clear()
    try:
      (place / case[0]).write_bytes(case[1])
      read_all(f'tfds:{place}#tokens')
    finally:
      (place / case[0]).write_bytes(raw[case[0]])

  return make, check, nothing


_URIS = ('chain_sum?max_terms=3&max_digits=1', 'gcd', 'chain_sum+gcd', 'products?max_digits=2', 'gsm_symbolic',
         'chain_sum?level=1', 'countdown?min_numbers=3', 'prime_factorization?max_value=50', 'basic_arithmetic')


@target(10, DataError)
def reasoning_uri(folder):
  from reasoning_gym.factory import DATASETS

  from betarank.data import reasoning

  words = ('?', '&', '=', '+', 'level=', 'level=-1', 'level=3', 'seed=1', 'size=-1', 'max_digits=', '%00', '%ff',
           'codeio')
  values = ('-1', '0', '1', '2', '3', '50', '1000000000', '9' * 30, '9' * 5000, '-0.5', '1e400', 'NaN', 'true', 'null',
            '""', 'x', '[]', '[1,2]', '[2,1]', '["+"]', '{"a": 1}', '[' * 3000, '1e18')
  options = {name: [field.name for field in dataclasses.fields(DATASETS[name][1])] for name in sorted(DATASETS)}

  def make(rng, good=False):
    if good:
      return rng.choice(_URIS)
    if rng.random() < 0.2:
      return mutate.text(rng, rng.choice(_URIS), words)
    task = rng.choice([uri.partition('?')[0] for uri in _URIS if '+' not in uri] + list(options))
    chosen = [rng.choice([*options[task], 'level']) for _ in range(rng.choice((1, 1, 2, 3)))]
    return f'{task}?' + '&'.join(f'{option}={rng.choice(values)}' for option in chosen)

  return make, reasoning.parse, nothing


# Tokenizers and prepared data


def _prepared(folder: pathlib.Path) -> DataConfig:
  """Prepares a small source `a` and its tokenizer in `folder`. Returns the DataConfig."""
  from betarank.data.prepare import prepare_source
  from betarank.data.tokenizer_training import train_tokenizer

  (folder / 'a.jsonl').write_text('\n'.join(json.dumps({'text': t}) for t in documents(5, 200)))
  config = DataConfig(str(folder), '', 320, {'a': SourceConfig(f'jsonl:{folder}/a.jsonl', 1.0, 0)}, 0.1, 32)
  train_tokenizer(config)
  prepare_source(config, 'a', workers=1)
  return config


def _tokenizers(folder: pathlib.Path) -> list[bytes]:
  """Returns two serialized SentencePiece models: one trained by betarank, and one that isn't BPE, normalizes text and
  adds spaces.
  """
  import sentencepiece

  from betarank.data.tokenizer_training import train

  train(documents(6, 200), 320, str(folder / 'good.model'))
  other = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(documents(7, 200)), model_writer=other, model_type='unigram', vocab_size=100,
    hard_vocab_limit=False, minloglevel=2)
  return [(folder / 'good.model').read_bytes(), other.getvalue()]


@target(80, DataError)
def tokenizer(folder):
  from betarank.data.tokenizer import read_tokenizer

  path = folder / 'x.model'

  def read():
    tokens = read_tokenizer(str(path))
    for word in (*WORDS, '▁', ''):
      tokens.decode(tokens.encode(word))

  return files(path, _tokenizers(folder), [b'<s>', b'</s>', b'<0x41>', b'\xe2\x96\x81'], read)


@target(40, DataError)
def tokenizer_json(folder):
  from betarank.data.tokenizer import read_tokenizer
  from tests import tokenizer_files

  kinds = (*(tokenizer_files.byte_level(folder / kind, kind) for kind in tokenizer_files.KINDS),
           tokenizer_files.byte_fallback(folder / 'fallback'))
  raw = {path: path.read_bytes() for kind in kinds for path in sorted(pathlib.Path(kind).iterdir())}

  def make(rng, good=False):
    path = rng.choice(list(raw))
    if good:
      return path, raw[path]
    spoilt = mutate.json_text(rng, json.loads(raw[path])) if rng.random() < 0.7 else mutate.data(rng, raw[path])
    return path, spoilt

  def check(case):
    path, content = case
    try:
      path.write_bytes(content)
      tokens = read_tokenizer(str(path.parent))
      for word in (*WORDS, '▁', ''):
        tokens.decode(tokens.encode(word))
    finally:
      path.write_bytes(raw[path])

  return make, check, nothing


@target(40, HfError)
def tokenizer_export(folder):
  from betarank.model.hf_tokenizer import convert

  goods = _tokenizers(folder)[:1]

  def make(rng, good=False):
    return goods[0] if good else mutate.data(rng, goods[0], goods)

  return make, lambda content: convert(content, 'x.model'), nothing


@target(30, DataError)
def prepared(folder):
  """Builds the target of the manifest, lengths and shards of prepared data."""
  from betarank.data.prepared import VERSION, Documents

  config = _prepared(folder)
  place = folder / 'a' / VERSION
  raw = {p.name: p.read_bytes() for p in place.iterdir() if p.suffix != '.json' or p.name == 'manifest.json'}
  manifest = json.loads(raw['manifest.json'])

  def make(rng, good=False):
    name = rng.choice(['manifest.json', *raw])
    if good or name == 'manifest.json':
      return name, raw[name] if good else mutate.json_text(rng, manifest)
    return name, mutate.data(rng, raw[name], list(raw.values()))[:len(raw[name])]  # a longer one is refused unread

  def check(case):
    try:
      (place / case[0]).write_bytes(case[1])
      for split in ('train', 'validation'):
        found = Documents(config, 'a', split)
        found.read(range(len(found)))
    finally:
      (place / case[0]).write_bytes(raw[case[0]])

  return make, check, nothing


# Hugging Face's files


def _model():
  from betarank import model
  from betarank.model.config import MoeConfig

  dense = model.ModelConfig(
    vocab_size=20, layers=1, d_model=8, d_ff=12, heads=2, kv_heads=1, head_dim=4, rope_base=1e4, norm_eps=1e-6,
    tied_embeddings=True, compute_dtype='float32', remat_policy='none', scan_layers=True)
  sparse = MoeConfig(experts=2, experts_per_token=1, expert_d_ff=4)
  return [dense, dataclasses.replace(dense, moe=dataclasses.replace(sparse, router='softmax')),
          dataclasses.replace(dense, moe=sparse)]


@target(80, HfError, ConfigError)
def hf_config(folder):
  from betarank.model import ModelConfig
  from betarank.model import hf_config as exchange
  from betarank.model.hf_weights import leaves, read_json

  goods = [exchange.to_hf(c, positions=32, dtype='float32') for c in _model()]
  path = folder / 'config.json'

  def make(rng, good=False):
    config = rng.choice(goods)
    raw = json.dumps(config).encode()
    return raw if good else mutate.json_text(rng, config) if rng.random() < 0.7 else mutate.data(rng, raw)

  def check(content):
    path.write_bytes(content)
    config = common.base()
    config.model.update(exchange.from_hf(read_json(path), str(path)))
    for leaf in leaves(section(ModelConfig, config.model, 'model')):
      list(itertools.islice(leaf.tensors(), 100))

  return make, check, nothing


@target(80, HfError)
def safetensors(folder):
  from betarank.model import hf_weights

  c = _model()[0]
  wanted = hf_weights.leaves(c)
  tensors = [(name, 'F32', leaf.their_shape) for leaf in wanted for name, _ in leaf.tensors()]
  one, many = folder / 'one', folder / 'many'
  for place, size in ((one, 10**9), (many, 1000)):
    place.mkdir()
    for view in hf_weights.create(place, tensors, size).values():
      view[:] = 0.5
  raw = {path: path.read_bytes() for place in (one, many) for path in sorted(place.iterdir())}
  index = many / 'model.safetensors.index.json'

  def header(rng, content):
    size = int.from_bytes(content[:8], 'little')
    written = mutate.json_text(rng, json.loads(content[8:8 + size]))
    size = len(written) if rng.random() < 0.8 else rng.choice(mutate.NUMBERS) % 2**64
    return size.to_bytes(8, 'little') + written + content[8 + size:]

  def make(rng, good=False):
    path = rng.choice(list(raw))
    if good:
      return path, raw[path]
    if path == index:
      return path, mutate.json_text(rng, json.loads(raw[index]))
    change = header if rng.random() < 0.5 else lambda rng, content: mutate.data(rng, content, list(raw.values()))
    return path, change(rng, raw[path])

  def check(case):
    path, content = case
    try:
      path.write_bytes(content)
      found = hf_weights.Files(path.parent)
      found.check(wanted)
      found.copy_in(wanted, {leaf.path: np.zeros(leaf.shape, np.float32) for leaf in wanted if leaf.path}, nothing)
    finally:
      path.write_bytes(raw[path])

  return make, check, nothing
