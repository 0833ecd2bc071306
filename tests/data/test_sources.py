import contextlib
import gzip
import json
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from betarank.data import formats, reasoning, record_formats, sources
from betarank.data.config import DataError
from betarank.data.sources import Source

DOCUMENTS = [f'document {i}\nwith naïve 日本語 text\n' + 'x' * (i % 7) for i in range(50)]


def read_all(source):
  return [document for unit in source.units() for document in source.read(unit)]


def write_array_record(path, records):
  writer = ArrayRecordWriter(str(path), 'group_size:1')
  for record in records:
    writer.write(record)
  writer.close()


@pytest.fixture
def files(tmp_path):
  """The same documents in each format, in two files each."""
  for part in (0, 1):
    half = DOCUMENTS[25 * part:25 * (part + 1)]
    lines = ''.join(json.dumps({'text': d, 'other': 1}) + '\n' for d in half)
    (tmp_path / f'p{part}.jsonl').write_text(lines)
    (tmp_path / f'p{part}.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
    table = pyarrow.table({'text': half})
    pyarrow.parquet.write_table(table, tmp_path / f'p{part}.parquet', row_group_size=10)
    write_array_record(tmp_path / f'p{part}.array_record', [d.encode() for d in half])
  return tmp_path


@pytest.mark.parametrize('uri', ['jsonl:{}/p*.jsonl', 'jsonl:{}/p?.jsonl.gz', 'jsonl:{}/**/*.jsonl#text',
                                 'parquet:{}/*.parquet', 'arrayrecord:{}/*.array_record'])
@pytest.mark.parametrize('unit', [None, 7])
def test_each_document_once_in_order(files, make_source, uri, unit, monkeypatch):
  if unit:
    for reader in (formats.Jsonl, record_formats.ArrayRecord):
      monkeypatch.setattr(reader, 'smallest_unit', unit)
  assert read_all(Source(make_source(uri.format(files)), 1000)) == DOCUMENTS


@pytest.mark.parametrize('unit', [10**9, 50, 333])
@pytest.mark.parametrize('document_bytes', [16, 40, 1000])
def test_text_is_cut_but_kept(tmp_path, make_source, unit, document_bytes, monkeypatch):
  monkeypatch.setattr(formats.Text, 'smallest_unit', unit)
  text = ''.join(DOCUMENTS) + '日本語' * 300 + '\r\n\n\nend without line end'
  (tmp_path / 'a.txt').write_text(text, newline='')
  documents = read_all(Source(make_source(f'text:{tmp_path}/*.txt'), document_bytes))
  assert ''.join(documents) == text
  assert max(len(d.encode()) for d in documents) <= document_bytes
  if document_bytes == 1000:
    assert documents[0].endswith('\n')


def test_cut():
  text = 'short line\n' * 30 + 'é' * 100
  pieces = list(sources.cut(text, 64))
  assert ''.join(pieces) == text and max(len(p.encode()) for p in pieces) <= 64
  assert pieces[0] == 'short line\n' * 5
  assert list(sources.cut('x', 64)) == ['x']


def test_reasoning_in_units(make_source):
  source = Source(make_source('reasoning:chain_sum+gcd', 5000), 1000)
  first, second = source.units()
  assert [(s.start, s.stop) for s in first + second] == [(0, 4096), (4096, 5000)]
  assert next(source.read(first)).startswith('Question: ')
  assert sum(1 for _ in source.sample(1000)) < 20


def test_held_out_questions_are_in_no_document(make_source):
  """Of sums of two digits there are 200, so 1000 documents would hold nearly every one."""
  config = make_source('reasoning:chain_sum?max_terms=2&max_digits=1', 1000)
  questions = lambda fraction: {d.split('\n')[0].removeprefix('Question: ') for d in
                                read_all(Source(config, 1000, held_out_fraction=fraction))}
  every, some = questions(0.0), questions(0.2)
  assert len(every) > 190 and every - some == {q for q in every if reasoning.held_out(q, 0.2)} != set()


def test_units_are_few_and_the_input_decides_them(tmp_path, make_source, monkeypatch):
  monkeypatch.setattr(formats.Text, 'smallest_unit', 4)
  (tmp_path / 'a.txt').write_text('a line\n' * 5000)
  source = Source(make_source(f'text:{tmp_path}/a.txt'), 64)
  assert 250 <= len(source.units()) <= 257 and source.units() == source.units()


def test_tfds(tmp_path, make_source):
  import tensorflow_datasets as tfds
  features = tfds.features.FeaturesDict({'text': tfds.features.Text(), 'id': np.int64})
  folder = tmp_path / 'tiny' / '1.0.0'
  folder.mkdir(parents=True)
  name = 'tiny-train.array_record-00000-of-00001'
  write_array_record(folder / name, [features.serialize_example(features.encode_example({'text': d, 'id': i}))
                                     for i, d in enumerate(DOCUMENTS)])
  file = tfds.core.ShardedFileTemplate(folder, dataset_name='tiny', split='train',
                                       filetype_suffix='array_record')
  split = tfds.core.SplitInfo(name='train', shard_lengths=[50], num_bytes=1, filename_template=file)
  tfds.folder_dataset.write_metadata(
    data_dir=folder, features=features, split_infos=[split], check_data=False)
  assert read_all(Source(make_source(f'tfds:{folder}'), 1000)) == DOCUMENTS
  assert len(read_all(Source(make_source(f'tfds:{folder}:train[:10]#text'), 1000))) == 10
  with pytest.raises(DataError, match=r"no field 'body', only id, text; name the right one: tfds:.*#FIELD"):
    Source(make_source(f'tfds:{folder}#body'), 1000).units()
  with pytest.raises(DataError, match=r"tfds:no_such_set: can't be opened .* prepared by TFDS"):
    Source(make_source('tfds:no_such_set'), 1000).units()


@pytest.mark.parametrize('uri, max_documents, message', [
  ('josnl:x', 0, r"no such kind of source 'josnl'; did you mean jsonl\?"),
  ('zzz', 0, r'there are reasoning, text, jsonl'),
  ('reasoning', 0, 'has no end; set max_documents'),
  ('text:', 0, 'nothing after the kind; write text:PATH'),
  ('reasoning:chain_sums', 5, r'did you mean chain_sum\?'),
  ('text:/nowhere/*.txt', 0, r'/nowhere/\*.txt: no file matches'),
  ('arrayrecord:gs://b/*', 0, 'mount the bucket'),
])
def test_uri_errors(make_source, uri, max_documents, message):
  with pytest.raises(DataError, match=message):
    Source(make_source(uri, max_documents), 1000).units()


@pytest.mark.parametrize('name, content, uri, message', [
  ('e.txt', b'', 'text:', r'e\.txt: the file is empty'),
  ('e.txt', b'fine\n' * 10 + b'\xff\xfe', 'text:', r'e\.txt: not UTF-8 at byte 50'),
  ('e.jsonl', b'{"text": "a"}\n\n{"text": oops}\n', 'jsonl:', r'e\.jsonl:3: not JSON'),
  ('e.jsonl', b'{"text": "\xff"}\n', 'jsonl:', r'e\.jsonl:1: not UTF-8 at byte 10'),
  ('e.jsonl', b'{"body": "a", "id": 1}\n', 'jsonl:', r"e\.jsonl:1: no field 'text', only body, id; .*#FIELD"),
  ('e.jsonl', b'{"text": 3}\n', 'jsonl:', r"e\.jsonl:1: field 'text' must be text, got int"),
  ('e.jsonl', b'[1]\n', 'jsonl:', r'e\.jsonl:1: expected an object'),
  ('e.jsonl.gz', gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20], 'jsonl:', r"e\.jsonl\.gz: can't be unp"),
  ('e.parquet', b'PAR1 no', 'parquet:', r'e\.parquet: not a readable Parquet file'),
  ('e.array_record', b'x' * 100_000, 'arrayrecord:', r'e\.array_record: cut short, or not an ArrayRecord'),
])
def test_file_errors(tmp_path, make_source, name, content, uri, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError, match=message):
    read_all(Source(make_source(f'{uri}{tmp_path / name}'), 1000))


def test_line_numbers_count_from_the_file_s_beginning(tmp_path, make_source, monkeypatch):
  monkeypatch.setattr(formats.Jsonl, 'smallest_unit', 20)
  (tmp_path / 'a.jsonl').write_text('{"text": "some text"}\n' * 9 + 'oops\n')
  with pytest.raises(DataError, match=r'a\.jsonl:10: not JSON'):
    read_all(Source(make_source(f'jsonl:{tmp_path}/a.jsonl'), 1000))


@pytest.mark.parametrize('keep', [0.3, 0.999])
def test_array_record_cut_short(tmp_path, make_source, keep):
  path = tmp_path / 'a.array_record'
  write_array_record(path, [b'text %d' % i for i in range(3000)])
  data = path.read_bytes()
  path.write_bytes(data[:int(keep * len(data))])
  with pytest.raises(DataError, match=r'a\.array_record: cut short'):
    read_all(Source(make_source(f'arrayrecord:{path}'), 1000))


def test_parquet_column(files, make_source):
  with pytest.raises(DataError, match=r"p0\.parquet: no field 'body', only text"):
    Source(make_source(f'parquet:{files}/*.parquet#body'), 1000).units()


def test_half_surrogates_become_replacement_characters(tmp_path, make_source):
  (tmp_path / 'a.jsonl').write_text('{"text": "a\\ud800b \\ud83d\\ude00 \\ufeffé"}\n')
  assert read_all(Source(make_source(f'jsonl:{tmp_path}/a.jsonl'), 1000)) == ['a\ufffdb 😀 \ufeffé']


def test_a_huge_line_is_streamed(tmp_path, make_source):
  path = tmp_path / 'a.txt'
  with path.open('w') as file:
    for _ in range(50):
      file.write('é' * 2**19)  # 50 MB, no line end
  source, size = Source(make_source(f'text:{path}'), 65_536), 0
  tracemalloc.start()
  with contextlib.closing(source.read(source.units()[0])) as documents:
    for document in documents:
      size += len(document.encode())
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert size >= 2**24 and peak < 2**20
