import bz2
import contextlib
import dataclasses
import gzip
import io
import json
import lzma
import shutil
import sys
import tracemalloc

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from fsspec.implementations.memory import MemoryFileSystem
from rich.console import Console

from betarank.data import estimate, reasoning, sources
from betarank.data.config import DataError
from betarank.data.fields import Dialogue
from betarank.data.sources import Source
from tests.bucket import Bucket

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
  """Returns a folder with the same documents in each format. Each format has two files."""
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
    monkeypatch.setattr(sources, 'UNIT_BYTES', unit)
  source = Source(make_source(uri.format(files)), 1000)
  assert read_all(source) == DOCUMENTS
  assert (len(source.units()) > 1) == (unit == 7)


@pytest.mark.parametrize('unit', [10**9, 50, 333])
@pytest.mark.parametrize('document_bytes', [16, 40, 1000])
def test_text_is_cut_but_kept(tmp_path, make_source, unit, document_bytes, monkeypatch):
  monkeypatch.setattr(sources, 'UNIT_BYTES', unit)
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
  """There are only 200 sums of two one-digit numbers, so 1000 documents contain nearly all that aren't held out."""
  config = make_source('reasoning:chain_sum?max_terms=2&max_digits=1', 1000)
  questions = lambda fraction: {d.split('\n')[0].removeprefix('Question: ') for d in
                                read_all(Source(config, 1000, held_out_fraction=fraction))}
  every, some = questions(0.0), questions(0.2)
  assert len(every) > 190 and every - some == {q for q in every if reasoning.held_out(q, 0.2)} != set()


def test_units_are_few_and_the_input_decides_them(tmp_path, make_source, monkeypatch):
  monkeypatch.setattr(sources, 'UNIT_BYTES', 4)
  monkeypatch.setattr(sources, 'MOST_UNITS', 256)
  (tmp_path / 'a.txt').write_text('a line\n' * 5000)
  source = Source(make_source(f'text:{tmp_path}/a.txt'), 64)
  assert 250 <= len(source.units()) <= 257 and source.units() == source.units()


def test_tfds(tmp_path, make_source, config):
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
  some = dataclasses.replace(config, sources={'main': make_source(f'tfds:{folder}', 10)})
  size = sum(len(document.encode()) for document in DOCUMENTS) / 5
  assert estimate.estimate(some, 'main', 1, 1, 1.0).text_bytes == pytest.approx(size)  # all are in the sample
  with pytest.raises(DataError, match=r"no field 'body', only id, text; name the right one: tfds:.*#FIELD"):
    Source(make_source(f'tfds:{folder}#body'), 1000).units()
  for uri, message in [
      ('no_such_set', r'tfds:no_such_set: TFDS has no set of this name .* Name the folder of a prepared set'),
      ('mnisst', r'did you mean mnist\?'),
      ('lm1b', r"not on this machine .*: python -c .*tfds.builder\('lm1b', file_format='array_record'\)"),
      ('/nowhere', "tfds:/nowhere: can't be opened .* prepared by TFDS")]:
    with pytest.raises(DataError, match=message) as error:
      Source(make_source(f'tfds:{uri}'), 1000).units()
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('uri, max_documents, message', [
  ('josnl:x', 0, r"no such kind of source 'josnl'; did you mean jsonl\?"),
  ('zzz', 0, r'there are reasoning, text, jsonl'),
  ('reasoning', 0, 'has no end; set max_documents'),
  ('text:', 0, 'nothing after the kind; write text:PATH'),
  ('reasoning:chain_sums', 5, r'did you mean chain_sum\?'),
  ('text:/nowhere/*.txt', 0, r'/nowhere/\*.txt: no file matches'),
  ('arrayrecord:s3://b/*', 0, 'ArrayRecord is read from disks and gs:// only'),
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
  ('e.csv', b'body,id\nx,1\n', 'csv:', r"e\.csv: no field 'text', only body, id; name the right one: csv:.*#FIELD"),
  ('e.csv', b'text,id\n"x\ny",1\n\xff,2\n', 'csv:', r"e\.csv:4: field 'text' is not UTF-8"),
  ('e.csv', b'id,text\n1\n', 'csv:', r"e\.csv:2: field 'text' must be text, got NoneType"),
  ('e.csv', b'text\n"x"y\n', 'csv:', r"e\.csv:2: not CSV"),
  ('e.jsonl.zst', pyarrow.compress(b'{"text": "a"}\n' * 1000, 'zstd', asbytes=True)[:-5], 'jsonl:', "can't be unp"),
  ('e.jsonl.bz2', bz2.compress(b'{"text": "a"}\n' * 1000)[:-5], 'jsonl:', "can't be unpacked"),
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
  monkeypatch.setattr(sources, 'UNIT_BYTES', 20)
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


def test_the_size_of_parquet_is_that_of_its_text(tmp_path, make_source):
  rows = [{'id': i, 'text': f'{i} ' * 1000, 'meta': {'text': f'{i}'}} for i in range(40)]
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'a.parquet', compression='zstd')
  for field, size in (('text', sum(len(row['text']) for row in rows)), ('meta.text', 70)):
    found = Source(make_source(f'parquet:{tmp_path}/a.parquet#{field}'), 1000).total_bytes
    assert size < found < 1.05 * size + 500


def test_metadata_that_arrow_would_die_of_is_one_line(tmp_path, make_source):
  pyarrow.parquet.write_table(pyarrow.table({'text': ['a', None]}), tmp_path / 'a.parquet')
  content = (tmp_path / 'a.parquet').read_bytes()
  optional, required = b'\x25\x02\x18\x04text', b'\x25\x00\x18\x04text'  # as the footer's schema says it
  assert content.count(optional) == 1
  (tmp_path / 'a.parquet').write_bytes(content.replace(optional, required))
  with pytest.raises(DataError, match=r'a\.parquet: not a readable Parquet file \(Definition level histogram size'):
    Source(make_source(f'parquet:{tmp_path}/a.parquet'), 1000).units()


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


# Files as they are in the world


PACK = {'gz': gzip.compress, 'bz2': bz2.compress, 'xz': lzma.compress,
        'zst': lambda data: pyarrow.compress(data, 'zstd', asbytes=True)}


@pytest.mark.parametrize('kind', PACK)
@pytest.mark.parametrize('name', ['a.jsonl.{}', 'a.JSONL.{}', 'a.jsonl', 'a.gz', 'a'])
def test_packed_files_are_known_by_their_content(tmp_path, make_source, kind, name):
  lines = ''.join(json.dumps({'text': d}) + '\n' for d in DOCUMENTS).encode()
  # Two members, as tools that append to a packed file leave it.
  (tmp_path / name.format(kind.upper())).write_bytes(PACK[kind](lines[:777]) + PACK[kind](lines[777:]))
  assert read_all(Source(make_source(f'jsonl:{tmp_path}/a*'), 1000)) == DOCUMENTS


def test_a_plain_file_may_be_called_gz(tmp_path, make_source):
  (tmp_path / 'a.jsonl.gz').write_text('{"text": "x"}\n')
  assert read_all(Source(make_source(f'jsonl:{tmp_path}/a.jsonl.gz'), 1000)) == ['x']


@pytest.mark.parametrize('kind', PACK)
def test_packed_text_and_csv(tmp_path, make_source, kind):
  text = ''.join(DOCUMENTS)
  (tmp_path / f'a.txt.{kind}').write_bytes(PACK[kind](text.encode()))
  (tmp_path / f'a.csv.{kind}').write_bytes(PACK[kind](b'id,text\n1,"two\nlines, ""quoted"""\n2,x\n'))
  documents = read_all(Source(make_source(f'text:{tmp_path}/*.txt.*'), 100))
  assert ''.join(documents) == text and max(len(d.encode()) for d in documents) <= 100
  assert read_all(Source(make_source(f'csv:{tmp_path}/*.csv.*'), 1000)) == ['two\nlines, "quoted"', 'x']


def test_csv_with_tabs_and_a_mark_at_its_beginning(tmp_path, make_source):
  (tmp_path / 'a.tsv').write_bytes('\ufefftext\tid\né, ü\t1\n'.encode())
  assert read_all(Source(make_source(f'csv:{tmp_path}/a.tsv'), 1000)) == ['é, ü']


def test_a_field_inside_another(tmp_path, make_source):
  records = [{'content': {'text': d, 'deep': {'er': d * 2}}, 'content.id': d * 3} for d in ('a', 'b')]
  (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / 'a.parquet')
  for kind in ('jsonl', 'parquet'):
    read = lambda field: read_all(Source(make_source(f'{kind}:{tmp_path}/a.{kind}#{field}'), 1000))  # noqa: B023
    assert read('content.text') == ['a', 'b'] and read('content.deep.er') == ['aa', 'bb']
    for field in ('content.nope', 'nope.text', 'content.text.more'):
      with pytest.raises(DataError, match=rf"no field '{field}', only content.*; name the right .*#FIELD"):
        read(field)
  assert read_all(Source(make_source(f'jsonl:{tmp_path}/a.jsonl#content.id'), 1000)) == ['aaa', 'bbb']


@pytest.mark.parametrize('kind', [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.string_view(),
                                  pyarrow.dictionary(pyarrow.int32(), pyarrow.string())], ids=str)
def test_parquet_columns_of_every_kind_of_text(tmp_path, make_source, kind):
  column = pyarrow.array([d.encode() if kind == pyarrow.binary() else d for d in DOCUMENTS]).cast(kind)
  pyarrow.parquet.write_table(pyarrow.table({'text': column}), tmp_path / 'a.parquet')
  assert read_all(Source(make_source(f'parquet:{tmp_path}/a.parquet'), 1000)) == DOCUMENTS


def test_empty_files_are_skipped_and_counted(files, make_source):
  for name in ('p0a.jsonl', 'p2.jsonl', 'p0a.parquet', 'p2.array_record'):
    (files / name).write_bytes(b'')
  for uri, empty in (('jsonl:{}/p*.jsonl', 2), ('parquet:{}/*.parquet', 1), ('arrayrecord:{}/*.array_record', 1)):
    source = Source(make_source(uri.format(files)), 1000)
    assert read_all(source) == DOCUMENTS
    assert (source.listing['files'], source.listing['empty_files']) == (2, empty)
  pyarrow.parquet.write_table(pyarrow.table({'text': pyarrow.array([], pyarrow.string())}), files / 'p3.parquet')
  assert read_all(Source(make_source(f'parquet:{files}/*.parquet'), 1000)) == DOCUMENTS
  (files / 'q.jsonl').write_bytes(b'')
  with pytest.raises(DataError, match=r'all 2 files are empty; fetch the text again'):
    Source(make_source(f'jsonl:{files}/*[2q].jsonl'), 1000).units()


def test_a_folder_is_all_its_files_of_the_kind(tmp_path, make_source):
  for name, text in [('b/2.txt', 'two'), ('a/1.md', 'one'), ('.hidden/3.txt', 'x'), ('_SUCCESS', 'x'),
                     ('c.jsonl', 'x')]:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
  assert read_all(Source(make_source(f'text:{tmp_path}'), 1000)) == ['one', 'two']
  assert read_all(Source(make_source(f'text:{tmp_path}/b/'), 1000)) == ['two']
  with pytest.raises(DataError, match=r'the folder has no file of \.parquet, \.pq, only of \.jsonl, \.md, \.txt; name'):
    Source(make_source(f'parquet:{tmp_path}'), 1000).units()


def test_the_training_split_of_a_hugging_face_folder(tmp_path, make_source):
  for name in ('data/train-00000-of-00002', 'data/train-00001-of-00002', 'data/test-00000-of-00001',
               'data/validation-00000-of-00001'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({'text': [name]}), tmp_path / f'{name}.parquet')
  read = lambda uri: read_all(Source(make_source(uri), 1000))
  assert read(f'parquet:{tmp_path}') == ['data/train-00000-of-00002', 'data/train-00001-of-00002']
  assert len(read(f'parquet:{tmp_path}/data/*.parquet')) == 4  # what is named is taken
  shutil.rmtree(tmp_path / 'data')
  for name in ('trainer', 'contest'):  # these name no splits
    pyarrow.parquet.write_table(pyarrow.table({'text': [name]}), tmp_path / f'{name}.parquet')
  assert read(f'parquet:{tmp_path}') == ['contest', 'trainer']


BAD = {
  'jsonl': (b'{"text": "a"}\n{"text": null}\nnot JSON\n{"text": "\xff"}\n{"other": 1}\n[1]\n{"text": "b"}\n', 5, 2),
  'csv': (b'text,id\na,1\n\xff,2\nb,3\n', 1, 3),
  'txt': (b'a\n' * 8 + b'\xff\n' * 8 + b'b\n', 1, 2),
}


@pytest.mark.parametrize('kind', BAD)
def test_bad_rows_stop_or_are_skipped_up_to_a_limit(tmp_path, make_source, kind):
  content, bad, first = BAD[kind]
  (tmp_path / f'a.{kind}').write_bytes(content)
  uri = f'{"text" if kind == "txt" else kind}:{tmp_path}/a.{kind}'
  source = Source(make_source(uri, max_bad_rows=bad), 16 if kind == 'txt' else 1000)
  rows = sources.BadRows(bad)
  assert set(''.join(source.read(source.units()[0], rows))) - {'\n'} == {'a', 'b'} and rows.count == bad
  with pytest.raises(DataError, match=rf'a\.{kind}(:{first}:|: not UTF-8 at byte 16).*; or skip such rows'):
    read_all(source)
  if bad > 1:
    with pytest.raises(DataError, match=rf'{bad} bad rows, more than max_bad_rows={bad - 1}; the last: .*a\.{kind}'):
      list(source.read(source.units()[0], sources.BadRows(bad - 1)))


def test_bad_rows_of_parquet_and_records_are_numbered(tmp_path, make_source):
  values = [b'x'] * 30 + [None] + [b'x'] * 30 + [b'\xff'] + [b'x']
  pyarrow.parquet.write_table(pyarrow.table({'text': pyarrow.array(values, pyarrow.binary())}), tmp_path / 'a.parquet',
                              row_group_size=10)
  source, rows = Source(make_source(f'parquet:{tmp_path}/a.parquet'), 1000), []
  assert len(list(source.read(source.units()[0], rows.append))) == 61
  assert [str(row).partition('a.parquet')[2] for row in rows] == [
    ": row 30: field 'text' must be text, got NoneType", ": row 61: field 'text' is not UTF-8 at byte 0"]
  write_array_record(tmp_path / 'a.array_record', [v for v in values if v])
  source, rows = Source(make_source(f'arrayrecord:{tmp_path}/a.array_record'), 1000), []
  assert len(list(source.read(source.units()[0], rows.append))) == 61
  assert str(rows[0]).endswith('a.array_record: record 60: not UTF-8 at byte 0; convert the file')


@pytest.mark.parametrize('scheme, advice', [
  ('s3', 'pip install s3fs'), ('hf', 'pip install huggingface_hub'), ('https', 'pip install aiohttp'),
  ('gs', 'pip install gcsfs'), ('abfs', 'pip install adlfs'), ('nope', 'no reader of nope:// is known')])
def test_a_place_whose_reader_is_not_installed_says_which(make_source, scheme, advice, monkeypatch):
  import fsspec
  monkeypatch.delitem(sys.modules, 'fsspec.implementations.http', raising=False)  # which gcsfs imports
  for module in ('s3fs', 'huggingface_hub', 'aiohttp', 'gcsfs', 'adlfs'):
    monkeypatch.setitem(sys.modules, module, None)
  for name in list(fsspec.available_protocols()):
    monkeypatch.delitem(sys.modules['fsspec.registry']._registry, name, raising=False)
  with pytest.raises(DataError, match=rf'{scheme}://bucket/\*\.jsonl: .*{advice}') as error:
    Source(make_source(f'jsonl:{scheme}://bucket/*.jsonl'), 1000).units()
  assert '\n' not in str(error.value)


class _NoSizes(MemoryFileSystem):
  """Doesn't say the sizes of files, and can't seek in them, like a web server that sends no Content-Length."""

  protocol, store, pseudo_dirs = 'https', {}, ['']

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.replace('https://', 'memory://'))

  def info(self, path, **kwargs):
    return {**super().info(path, **kwargs), 'size': None}

  def find(self, path, *args, detail=False, **kwargs):
    found = super().find(path, *args, detail=True, **kwargs)
    return {name: {**about, 'size': None} for name, about in found.items()} if detail else list(found)

  def _open(self, path, mode='rb', **kwargs):
    file = super()._open(path, mode, **kwargs)
    return file if mode != 'rb' else _Stream(file.getvalue())


class _Stream(io.BytesIO):
  def seek(self, *_):
    raise ValueError('Cannot seek streaming HTTP file')


@pytest.fixture
def no_sizes(files, monkeypatch):
  """Returns the URL of the folder `files` on a server that doesn't say the sizes of files."""
  monkeypatch.setitem(sys.modules['fsspec.registry']._registry, 'https', _NoSizes)
  monkeypatch.setattr(_NoSizes, 'store', {})
  (files / 'p.txt').write_text(''.join(DOCUMENTS))
  for file in files.iterdir():
    fsspec.filesystem('https').pipe_file(f'/corpus/{file.name}', file.read_bytes())
  return 'https://corpus'


@pytest.mark.parametrize('uri', ['jsonl:{}/p*.jsonl', 'jsonl:{}/p*.jsonl.gz', 'text:{}/p.txt'])
def test_files_of_unknown_size_are_read_to_their_end(no_sizes, files, make_source, uri, monkeypatch):
  monkeypatch.setattr(sources, 'UNIT_BYTES', 10)
  source, local = (Source(make_source(uri.format(place)), 10**6) for place in (no_sizes, files))
  assert ''.join(read_all(source)) == ''.join(read_all(local)) != ''
  count = len(source.segments)
  assert len(source.units()) == count and not any(segment.splittable for segment in source.segments)
  assert (source.listing['files'], source.listing['bytes'], source.listing['unknown_sizes']) == (count, 0, count)


def test_an_estimate_says_which_sizes_are_assumed(no_sizes, config, make_source, capsys):
  c = dataclasses.replace(config, sources={'web': make_source(f'jsonl:{no_sizes}/p*.jsonl')})
  estimate.show(c, 1, 1, 1.0, 0.0, Console(file=io.StringIO()))
  out = capsys.readouterr().out
  assert "web: the server doesn't say the sizes of 2 files; each is assumed to have 16.8M bytes" in out


def test_parquet_of_unknown_size_is_refused(no_sizes, make_source):
  with pytest.raises(DataError, match=r"p0\.parquet: the server doesn't say how long the file is"):
    Source(make_source(f'parquet:{no_sizes}/p*.parquet'), 1000).units()


def test_every_kind_in_a_bucket(files, tmp_path, make_source):
  shutil.copytree(files, tmp_path / 'store/bucket/corpus', ignore=lambda *_: ['store'])
  with Bucket(tmp_path / 'store') as bucket:
    bucket.error_rate = 0.05
    for uri in ('jsonl:{}/p*.jsonl', 'jsonl:{}/p?.jsonl.gz', 'parquet:{}', 'arrayrecord:{}/*.array_record',
                'jsonl:{}/p0.jsonl'):
      source = Source(make_source(uri.format('gs://bucket/corpus')), 1000)
      assert read_all(source) == (DOCUMENTS if 'p0' not in uri else DOCUMENTS[:25])
    with pytest.raises(DataError, match='no file matches'):
      Source(make_source('jsonl:gs://bucket/nowhere/*.jsonl'), 1000).units()
    with pytest.raises(DataError, match='no file matches'):
      Source(make_source('jsonl:gs://bucket/nowhere.jsonl'), 1000).units()


# Instruction data


def parts(make_source, tmp_path, records, uri, **kwargs):
  (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
  return [d.parts for d in read_all(Source(make_source(f'jsonl:{tmp_path}/a.jsonl#{uri}', **kwargs), 1000))]


def test_a_prompt_and_its_answer(make_source, tmp_path):
  records = [{'q': 'one?', 'a': {'b': '1'}}, {'q': '{answer}', 'a': {'b': '{prompt}'}}]
  assert parts(make_source, tmp_path, records, 'q+a.b') == [
    (('Question: one?\nSolution:', False), (' 1\n', True)),
    (('Question: {answer}\nSolution:', False), (' {prompt}\n', True))]
  assert parts(make_source, tmp_path, records[:1], 'q+a.b', template='{prompt}  {answer}!') == [
    (('one?', False), ('  1!', True))]


def test_the_messages_of_a_chat(make_source, tmp_path):
  chat = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'},
          {'role': 'assistant', 'content': 'Hello'}, {'from': 'user', 'value': 'Bye'},
          {'from': 'gpt', 'value': 'So long'}]
  template = '<|{role}|>{content}<|end|>\n'
  assert parts(make_source, tmp_path, [{'messages': chat}], 'messages', template=template) == [(
    ('<|system|>Be brief.<|end|>\n<|user|>Hi<|end|>\n<|assistant|>', False), ('Hello<|end|>\n', True),
    ('<|user|>Bye<|end|>\n<|gpt|>', False), ('So long<|end|>\n', True))]


@pytest.mark.parametrize('record, uri, template, message', [
  ({'q': 'x', 'a': None}, 'q+a', '', "a.jsonl:1: field 'a' must be text, got NoneType"),
  ({'m': [{'role': 'user', 'content': 'x'}]}, 'm', '{role}: {content}\n', 'there is no answer for the loss to count'),
  ({'m': 'x'}, 'm', '{role}: {content}', "field 'm' must be a list of messages, got str"),
  ({'m': ['x']}, 'm', '{role}: {content}', 'must hold objects with role and content, got str'),
  ({'m': [{'role': 'user'}]}, 'm', '{role}: {content}', "field 'm.content' must be text, got NoneType"),
  ({'m': [{'role': 'user'}]}, 'm', '', r"field 'm' must be text, got list; a list of messages needs a template"),
  ({}, 'q+a', '{prompt}', r'its template of a prompt and an answer .* must hold \{prompt\} and \{answer\} once each'),
  ({}, 'm', '{content} x', r'its template of messages must hold \{role\} and \{content\} once each'),
  ({}, 'q+a', '{answer} {prompt}', r'template must have \{prompt\} before \{answer\}'),
])
def test_instruction_data_that_cannot_be_used(make_source, tmp_path, record, uri, template, message):
  with pytest.raises(DataError, match=message):
    parts(make_source, tmp_path, [record], uri, template=template)


def test_a_dialogue_is_cut_into_pieces_that_have_something_to_learn():
  dialogue = Dialogue((('ask ' * 30, False), ('answer ' * 30, True), ('ask ' * 30, False)))
  pieces = list(sources.cut(dialogue, 64))
  assert all(len(piece.text.encode()) <= 64 and any(counts for _, counts in piece.parts) for piece in pieces)
  counted = ''.join(text for piece in pieces for text, counts in piece.parts if counts)
  assert counted == 'answer ' * 30
  assert list(sources.cut(dialogue, 1000)) == [dialogue]


# The tokenizer's sample


def test_the_sample_is_spread_over_all_files(tmp_path, make_source):
  for i in range(40):
    (tmp_path / f'{i:02}.txt').write_text(''.join(f'file {i} line {j}\n' for j in range(20_000)))
  source = Source(make_source(f'text:{tmp_path}/*.txt'), 1000)
  texts = list(source.sample(40 * 2**16))
  files_seen = {text.split()[1] for text in texts}
  lines = [int(text.split()[3]) for text in texts]
  assert files_seen == set(map(str, range(40)))
  assert 38 * 2**16 < sum(map(len, texts)) < 42 * 2**16
  assert max(lines) > 10_000 and len(set(lines)) > 1000  # not the files' beginnings alone
  held_out = list(source.sample(40 * 2**16, held_out=2**18))
  assert not set(texts) & set(held_out) and 2**18 * 0.9 < sum(map(len, held_out)) < 2**18 * 1.1
  assert len({text.split()[1] for text in held_out}) > 35


def test_a_small_source_is_sampled_as_a_whole(files, make_source):
  source = Source(make_source(f'jsonl:{files}/p*.jsonl'), 1000)
  assert list(source.sample(10**6)) == DOCUMENTS and list(source.sample(10**6, held_out=100)) == []
