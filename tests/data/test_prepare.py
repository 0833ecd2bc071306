import dataclasses
import gzip
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest
from etils import epath

from betarank.data import command, prepare, prepared, publish, record_formats, records, sources, worker
from betarank.data.config import DataError, SourceConfig
from betarank.data.prepare import prepare_source
from betarank.data.tokenizer import read_tokenizer
from betarank.data.tokenizer_training import sample_bytes, train_tokenizer
from tests.runs import BETARANK

ROOT = pathlib.Path(__file__).resolve().parents[2]


def tokens(config, name, split):
  documents = prepared.Documents(config, name, split)
  return documents, documents.read(range(len(documents)))


def texts(config, name, split):
  tokenizer = read_tokenizer(config.tokenizer_path)
  return [tokenizer.decode(t) for t in tokens(config, name, split)[1]]


def only(config, **source):
  """Returns `config` with only its source `a`, in which the given fields are replaced."""
  return dataclasses.replace(config, sources={'a': dataclasses.replace(config.sources['a'], **source)})


def contents(folder):
  return {p.name: p.read_bytes() for p in sorted(pathlib.Path(folder).rglob('*')) if p.is_file()}


def source_texts(corpus):
  return [json.loads(line)['text'] for line in (corpus / 'a.jsonl').read_text().splitlines()]


def test_documents_and_counts(prepared_config, corpus):
  train, validation = texts(prepared_config, 'a', 'train'), texts(prepared_config, 'a', 'validation')
  every = source_texts(corpus)
  inside = set(validation)
  assert train == [t for t in every if t not in inside] and validation == [t for t in every if t in inside]
  assert 0.04 < len(validation) / len(every) < 0.2
  documents, read = tokens(prepared_config, 'a', 'train')
  assert documents.lengths.tolist() == [len(t) for t in read]
  tokenizer = read_tokenizer(prepared_config.tokenizer_path)
  assert all(t[0] == tokenizer.bos and t[-1] == tokenizer.eos for t in read)
  counts = documents.manifest['splits']['train']
  assert counts['tokens'] == sum(map(len, read))
  assert counts['bytes'] == sum(len(t.encode()) for t in train)


def test_tfds_reads_it(prepared_config):
  import tensorflow_datasets as tfds
  _, read = tokens(prepared_config, 'b', 'validation')
  by_name = tfds.data_source('b', split='validation', data_dir=prepared_config.dir)
  builder = tfds.builder_from_directory(prepared.folder(prepared_config, 'b'))
  by_folder = builder.as_data_source(split='validation')
  for found in (by_name, by_folder):
    assert len(found) == len(read)
    for record, expected in zip(found, read):
      np.testing.assert_array_equal(record['tokens'], expected)


def test_duplicates_fall_on_one_side(config, tmp_path):
  lines = [json.dumps({'text': f'sentence number {i % 40}'}) for i in range(400)]
  (tmp_path / 'd.jsonl').write_text('\n'.join(lines))
  c = dataclasses.replace(only(config, uri=f'jsonl:{tmp_path}/d.jsonl'), validation_fraction=0.4)
  prepare_source(c, 'a', workers=1)
  train, validation = texts(c, 'a', 'train'), texts(c, 'a', 'validation')
  assert len(train) + len(validation) == 400 and train and validation
  assert not set(train) & set(validation)


@pytest.mark.parametrize('row, documents', [(32, 2), (16_384, 1)])
def test_a_document_that_fits_into_a_long_row_is_not_cut(config, tmp_path, make_source, row, documents):
  """The document has 70,000 bytes. Rows of 16,384 tokens have room for it. For short rows, the limit is 65,536 bytes.
  """
  (tmp_path / 'long.jsonl').write_text(json.dumps({'text': 'word and word\n' * 5000}) + '\n{"text": "short"}\n')
  c = dataclasses.replace(config, sequence_length=row, validation_fraction=0.0,
                          sources={'long': make_source(f'jsonl:{tmp_path}/long.jsonl')})
  assert prepare_source(c, 'long', workers=1)['splits']['train']['documents'] == documents + 1


def test_long_documents_are_cut_onto_one_side(config, tmp_path):
  long = [f'document {i} ' + 'la ' * 100 for i in range(30)]
  (tmp_path / 'd.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in long))
  c = only(config, uri=f'jsonl:{tmp_path}/d.jsonl')
  c = dataclasses.replace(c, validation_fraction=0.3, document_bytes=100)
  prepare_source(c, 'a', workers=1)
  split = [''.join(texts(c, 'a', s)) for s in prepared.SPLITS]
  assert sorted(split[0].count(t) + split[1].count(t) for t in long) == [1] * 30


@pytest.mark.parametrize('max_documents', [0, 130, 400, 1000])
def test_the_number_of_workers_does_not_matter(config, corpus, monkeypatch, max_documents, tmp_path):
  monkeypatch.setattr(sources, 'UNIT_BYTES', 4000)  # several units
  one = only(config, max_documents=max_documents)
  manifest = prepare_source(one, 'a', workers=1)
  assert sum(s['documents'] for s in manifest['splits'].values()) == min(max_documents or 400, 400)
  assert len(manifest['splits']['train']['shards']) > 1
  if max_documents in (0, 130):
    two = dataclasses.replace(one, dir=str(tmp_path / 'two'))
    assert prepare_source(two, 'a', workers=2) == manifest
    assert contents(two.dir) == contents(one.dir)


def test_again_is_nothing_and_other_settings_stop(config):
  c = only(config)
  manifest = prepare_source(c, 'a', workers=1)
  before = {p: p.stat().st_mtime_ns for p in pathlib.Path(c.dir).rglob('*')}
  assert prepare_source(c, 'a', workers=1) == manifest
  assert {p: p.stat().st_mtime_ns for p in pathlib.Path(c.dir).rglob('*')} == before
  with pytest.raises(DataError, match=r'with other settings: max_documents is 0 there and 7 now. Restore'):
    prepare_source(only(c, max_documents=7), 'a', workers=1)
  with pytest.raises(DataError, match=r'validation_fraction is 0.1 there and 0.2 now'):
    prepare_source(dataclasses.replace(c, validation_fraction=0.2), 'a', workers=1)


def test_a_second_corpus_under_the_same_name_is_kept_apart(config, corpus):
  """Both stay readable, whichever was first, and each is prepared only once."""
  one, two = only(config), only(config, uri=f'jsonl:{corpus}/b.jsonl')
  manifests = [prepare_source(c, 'a', workers=1) for c in (one, two)]
  assert prepared.folder(one, 'a') == pathlib.Path(config.dir) / 'a' / '1.0.0' != prepared.folder(two, 'a')
  before = contents(config.dir)
  for c, manifest, count in zip((one, two), manifests, (400, 150)):
    assert prepare_source(c, 'a', workers=1) == manifest == prepared.check_prepared(c, 'a')
    assert prepared.verify(c, 'a') == count
  assert contents(config.dir) == before
  with pytest.raises(DataError, match='with other settings: max_documents is 0 there and 7 now. Restore'):
    prepare_source(only(two, max_documents=7), 'a', workers=1)
  with pytest.raises(DataError, match=r"source 'a' is not prepared from reasoning; run"):
    prepared.check_prepared(only(config, uri='reasoning', max_documents=9), 'a')
  shutil.rmtree(prepared.folder(one, 'a'))
  assert prepared.verify(two, 'a') == 150


def test_a_corpus_in_preparation_keeps_its_folder(config, corpus):
  one, two = only(config), only(config, uri=f'jsonl:{corpus}/b.jsonl')
  prepare.prepare_part(one, 'a', 0, 2, workers=1)
  prepare_source(two, 'a', workers=1)
  prepare.prepare_part(one, 'a', 1, 2, workers=1)
  prepare.finish(one, 'a')
  assert (prepared.verify(one, 'a'), prepared.verify(two, 'a')) == (400, 150)


def test_a_model_may_have_more_tokens_than_the_tokenizer_but_not_fewer(config):
  with pytest.raises(DataError, match=r'has 384 tokens, but config.model.vocab_size is 383; set that to 384 or more'):
    prepare_source(dataclasses.replace(only(config), vocab_size=383), 'a', workers=1)
  exact = prepare_source(only(config), 'a', workers=1)
  larger = dataclasses.replace(only(config), dir=f'{config.dir}/larger', vocab_size=2**16 + 1)  # ids of four bytes
  assert prepare_source(larger, 'a', workers=1)['token_dtype'] == 'uint32' != exact['token_dtype']
  for here, there in zip(tokens(only(config), 'a', 'train')[1], tokens(larger, 'a', 'train')[1]):
    np.testing.assert_array_equal(here, there)


def test_the_padding_of_the_vocabulary_does_not_matter_for_a_tokenizer_from_elsewhere(config, prepared_config):
  c = dataclasses.replace(only(config), vocab_size=400)
  manifest = prepare_source(c, 'a', workers=1)
  padded = dataclasses.replace(c, vocab_size=512)
  assert prepare_source(padded, 'a', workers=1) == manifest == prepared.check_prepared(padded, 'a')
  with pytest.raises(DataError, match='vocab_size is 400 there and 65537 now'):  # tokens of four bytes
    prepared.check_prepared(dataclasses.replace(c, vocab_size=2**16 + 1), 'a')
  with pytest.raises(DataError, match='vocab_size is 384 there and 512 now'):  # its tokenizer was trained for it
    prepared.check_prepared(dataclasses.replace(prepared_config, vocab_size=512), 'a')
  prepare.prepare_part(dataclasses.replace(c, dir=f'{c.dir}/part'), 'a', workers=1)
  prepare.finish(dataclasses.replace(padded, dir=f'{c.dir}/part'), 'a')


def test_a_template_that_was_removed_added_or_changed_is_noticed(config, tmp_path):
  """Also while the preparation isn't finished."""
  (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'q': f'what {i}', 'a': str(i)}) + '\n' for i in range(50)))
  with_template = lambda text: dataclasses.replace(
    only(config, uri=f'jsonl:{tmp_path}/a.jsonl#q+a', template=text), validation_fraction=0.0)
  old, other, none = map(with_template, ('{prompt}{answer}', '{prompt} {answer}', ''))
  prepare.prepare_part(old, 'a', workers=1)
  for finished in (False, True):
    for changed in (other, none):
      with pytest.raises(DataError, match=re.escape(
          f"template is '{{prompt}}{{answer}}' there and {changed.sources['a'].template!r} now")):
        prepare.finish(changed, 'a')
    if not finished:
      prepare.finish(old, 'a')
  with pytest.raises(DataError, match="template is '{prompt}{answer}' there and '' now"):
    prepared.Documents(none, 'a', 'train')

  elsewhere = dataclasses.replace(none, dir=f'{none.dir}/none')
  manifest = prepare_source(elsewhere, 'a', workers=1)
  place = pathlib.Path(prepared.folder(elsewhere, 'a')) / 'manifest.json'
  del manifest['settings']['template']  # as in a manifest of an older version
  place.write_text(json.dumps(manifest))
  assert prepared.check_prepared(elsewhere, 'a') == manifest
  with pytest.raises(DataError, match="template is '' there and '{prompt}{answer}' now"):
    prepared.check_prepared(dataclasses.replace(old, dir=elsewhere.dir), 'a')


# Small corpora


def small(config, tmp_path, text, **changes):
  (tmp_path / 'small.txt').write_text(text)
  return dataclasses.replace(only(config, uri=f'text:{tmp_path}/small.txt'), validation_fraction=0.02, **changes)


@pytest.mark.parametrize('text', [
  'words and words on one line ' * 3600, 'a line of text\n' * 7000, 'one short line', 'x' * 5000, 'é\n', 'ab'])
def test_a_small_text_has_a_validation_split(config, tmp_path, text):
  """The end of each document goes to the validation split, even in a file of one line or of a few characters."""
  c = small(config, tmp_path, text)
  manifest = prepare_source(c, 'a', workers=1)
  train, validation = texts(c, 'a', 'train'), texts(c, 'a', 'validation')
  assert manifest['divided'] == 'text'
  assert ''.join(a + b for a, b in zip(train, validation, strict=True)) == text
  share = sum(map(len, validation)) / len(text)
  assert 0.015 < share < 0.06 or len(text) < 100
  if ' ' in text and len(text) > 1000:
    assert all(t.endswith((' ', '\n')) for t in train)  # no word is cut


def test_a_small_text_is_prepared_the_same_way_after_a_kill(config, tmp_path, monkeypatch):
  whole = small(config, tmp_path, 'a line of text\n' * 7000)
  stopped = dataclasses.replace(whole, dir=str(tmp_path / 'stopped'))
  prepare_source(whole, 'a', workers=1)
  with monkeypatch.context() as patch:
    patch.setattr(prepare, 'publish', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      prepare_source(stopped, 'a', workers=1)
  prepare_source(stopped, 'a', workers=1)
  assert contents(whole.dir) == contents(stopped.dir)


def test_a_text_that_cannot_be_divided(config, tmp_path):
  c = small(config, tmp_path, 'x')
  with pytest.raises(DataError, match=r"source 'a': the validation split is empty \(1 documents, .*give more text"):
    prepare_source(c, 'a', workers=1)
  c = dataclasses.replace(c, validation_fraction=0.0)
  prepare_source(c, 'a', workers=1)
  with pytest.raises(DataError, match='there is no validation split'):
    prepared.Documents(c, 'a', 'validation')


def test_other_files_under_the_same_name_are_noticed(config, tmp_path):
  c = small(config, tmp_path, 'words ' * 100)
  prepare_source(c, 'a', workers=1)
  small(config, tmp_path, 'other words ' * 100)
  with pytest.raises(DataError, match=r'from other files: 1 files of 600 bytes then, 1 files of 1,200 bytes now'):
    prepare_source(c, 'a', workers=1)
  (tmp_path / 'small.txt').unlink()
  prepare_source(c, 'a', workers=1)  # what is prepared doesn't need its source


# Tokenizers


def test_a_small_text_makes_a_small_tokenizer(config, tmp_path):
  c = small(config, tmp_path, 'one line of text', tokenizer='', vocab_size=1024)
  assert train_tokenizer(c)
  assert 256 < read_tokenizer(c.tokenizer_path).vocab_size < 300
  prepare_source(c, 'a', workers=1)


def test_a_sample_too_small_for_the_vocabulary_says_what_to_raise(config, tmp_path):
  c = small(config, tmp_path, 'line of text number seven\n' * 10_000, tokenizer='', vocab_size=1024,
            tokenizer_sample_mb=0.01)
  with pytest.raises(DataError, match=r'0 MB of text yield \d+ tokens at most, fewer than vocab_size=1024; raise '
                                      r'config.data.tokenizer_sample_mb \(there are about 0 MB\), or lower'):
    train_tokenizer(c)


def test_the_sample_grows_with_the_vocabulary(config):
  size = lambda **changes: sample_bytes(dataclasses.replace(config, **changes))
  assert size(vocab_size=1024) == 16e6 and size(vocab_size=151_936) > 100e6 and size(tokenizer_sample_mb=3.5) == 3.5e6


@pytest.mark.parametrize('content, message', [
  ('{"text": "fine"}\nnot JSON\n', r"^source 'a': .*x.jsonl:2: not JSON"), ('{"text": 3}', 'must be text, got int')])
def test_what_stops_the_sample_is_said_as_it_is(config, tmp_path, content, message):
  (tmp_path / 'x.jsonl').write_text(content)
  with pytest.raises(DataError, match=message):
    train_tokenizer(dataclasses.replace(only(config, uri=f'jsonl:{tmp_path}/x.jsonl'), tokenizer=''))


def test_ctrl_c_while_the_sample_is_read(config, monkeypatch):
  def interrupted(*_):
    yield 'some text'
    raise KeyboardInterrupt

  monkeypatch.setattr(sources.Source, 'sample', interrupted)
  with pytest.raises(KeyboardInterrupt):
    train_tokenizer(dataclasses.replace(config, tokenizer=''))


def test_files_are_looked_into_once(config, tmp_path, monkeypatch):
  import pyarrow.parquet
  for i in range(3):
    table = pyarrow.table({'text': [f'{i} some words {j}' for j in range(300)]})
    pyarrow.parquet.write_table(table, tmp_path / f'{i}.parquet', row_group_size=100)
  c = dataclasses.replace(only(config, uri=f'parquet:{tmp_path}'), tokenizer='', vocab_size=300)
  looked, segment = [], record_formats.Parquet._segment
  monkeypatch.setattr(record_formats.Parquet, '_segment',
                      lambda self, file: looked.append(file.path) or segment(self, file))
  train_tokenizer(c)
  with monkeypatch.context() as patch:
    patch.setattr(prepare, 'publish', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      prepare_source(c, 'a', workers=1)
  assert len(looked) == 3
  sources.open_source.cache_clear()
  prepare_source(c, 'a', workers=1)  # another start takes the plan that is there
  assert len(looked) == 3


# Bad rows


def test_bad_rows_are_counted_in_the_manifest_once(config, tmp_path, monkeypatch):
  monkeypatch.setattr(sources, 'UNIT_BYTES', 1000)
  monkeypatch.setattr(worker, 'PIECE_BYTES', 300)
  lines = [json.dumps({'text': f'document {i}' if i % 10 else None}) for i in range(200)]
  (tmp_path / 'x.jsonl').write_text('\n'.join(lines))
  c = only(config, uri=f'jsonl:{tmp_path}/x.jsonl', max_bad_rows=20)
  seen = []
  manifest = prepare_source(c, 'a', workers=1, report=seen.append)
  assert manifest['input']['bad_rows'] == 20 == seen[-1].bad_rows
  assert sum(counts['documents'] for counts in manifest['splits'].values()) == 180
  limited = dataclasses.replace(only(c, max_bad_rows=19), dir=str(tmp_path / 'limited'))
  with pytest.raises(DataError, match=r"source 'a': 20 bad rows, more than max_bad_rows=19; the last: .*x.jsonl:191"):
    prepare_source(limited, 'a', workers=1)
  with pytest.raises(DataError, match=r"x.jsonl:1: field 'text' must be text, got NoneType; or skip such rows"):
    prepare_source(dataclasses.replace(only(c, max_bad_rows=0), dir=str(tmp_path / 'strict')), 'a', workers=1)


# Parts


def test_parts_are_one_preparation_byte_for_byte(config, tmp_path, monkeypatch):
  monkeypatch.setattr(sources, 'UNIT_BYTES', 4000)
  monkeypatch.setattr(worker, 'PIECE_BYTES', 1500)
  whole, parted = only(config), dataclasses.replace(only(config), dir=str(tmp_path / 'parted'))
  prepare_source(whole, 'a', workers=1)
  with pytest.raises(DataError, match='nothing is prepared yet; run: betarank data prepare'):
    prepare.finish(parted, 'a')
  for part in (2, 0, 3):
    prepare.prepare_part(parted, 'a', part, 4, workers=1)
  with pytest.raises(DataError, match=r'2 of 7 units are not prepared yet, the first is unit 1, which is in part 1 m'):
    prepare.finish(parted, 'a')
  prepare.prepare_part(parted, 'a', 1, 4, workers=1)
  manifest = prepare.finish(parted, 'a')
  assert contents(whole.dir) == contents(parted.dir) and len(manifest['splits']['train']['shards']) > 7
  assert prepare.finish(parted, 'a') == manifest
  prepare.prepare_part(parted, 'a', 1, 4, workers=1)  # as a machine that comes late


def test_parts_stop_at_max_documents_together(config, tmp_path, monkeypatch):
  monkeypatch.setattr(sources, 'UNIT_BYTES', 4000)
  monkeypatch.setattr(worker, 'PIECE_BYTES', 1500)
  whole = only(config, max_documents=130)
  parted = dataclasses.replace(whole, dir=str(tmp_path / 'parted'))
  prepare_source(whole, 'a', workers=1)
  for part in range(2):
    prepare.prepare_part(parted, 'a', part, 2, workers=1)
  manifest = prepare.finish(parted, 'a')
  assert sum(counts['documents'] for counts in manifest['splits'].values()) == 130
  assert contents(whole.dir) == contents(parted.dir)


def test_a_packed_file_resumes_after_its_last_whole_piece(config, corpus, tmp_path, monkeypatch):
  """A compressed file can't be split, so it is one unit. Pieces that were complete aren't tokenized again."""
  monkeypatch.setattr(worker, 'PIECE_BYTES', 3000)
  (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress((corpus / 'a.jsonl').read_bytes()))
  whole = only(config, uri=f'jsonl:{tmp_path}/a.jsonl.gz')
  stopped = dataclasses.replace(whole, dir=str(tmp_path / 'stopped'))
  manifest = prepare_source(whole, 'a', workers=1)
  assert len(manifest['splits']['train']['shards']) > 5
  closed, tokenized, tokens_of = [], [], worker._tokens

  def close(piece, **about):
    if len(closed) == 4:
      raise KeyboardInterrupt
    closed.append(piece)
    return real_close(piece, **about)

  real_close = worker._Piece.close
  with monkeypatch.context() as patch:
    patch.setattr(worker._Piece, 'close', close)
    with pytest.raises(KeyboardInterrupt):
      prepare_source(stopped, 'a', workers=1)
  monkeypatch.setattr(worker, '_tokens', lambda *args: tokenized.append(1) or tokens_of(*args))
  prepare_source(stopped, 'a', workers=1)
  assert contents(whole.dir) == contents(stopped.dir)
  assert len(tokenized) == 400 - sum(piece._documents for piece in closed)


def test_pieces_are_ordered_by_their_numbers_and_not_by_their_names(config, corpus, tmp_path, monkeypatch):
  """The names have three digits, so piece 1000 comes before piece 101. Without zeros, 10 comes before 2."""
  (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress((corpus / 'a.jsonl').read_bytes()))
  c = only(config, uri=f'jsonl:{tmp_path}/a.jsonl.gz')
  monkeypatch.setattr(worker, 'PIECE_BYTES', 2000)
  manifest = prepare_source(c, 'a', workers=1)
  assert len(manifest['splits']['train']['shards']) > 10
  bare = lambda job, unit, piece: epath.Path(job.folder) / f'unit-{unit}-{piece}.json'
  monkeypatch.setattr(worker.Job, 'marker', bare)
  assert prepare_source(dataclasses.replace(c, dir=str(tmp_path / 'bare')), 'a', workers=1) == manifest


@pytest.mark.parametrize('workers', [1, 2])
def test_asked_to_stop_it_ends_after_a_piece_and_resumes(workers, config, tmp_path, monkeypatch):
  """With two workers, the patched PIECE_BYTES has no effect in the workers, so each unit is one piece there."""
  monkeypatch.setattr(sources, 'UNIT_BYTES', 4000)
  monkeypatch.setattr(worker, 'PIECE_BYTES', 1500)
  whole, stopped = only(config), dataclasses.replace(only(config), dir=str(tmp_path / 'stopped'))
  prepare_source(whole, 'a', workers=workers)
  seen = []
  # Asked after the first report that has documents.
  asked = lambda: bool(seen) and seen[-1].documents > 0
  assert not prepare.prepare_part(stopped, 'a', workers=workers, report=seen.append, asked=asked)
  assert 0 < seen[-1].documents < 400 and seen[-1].units_done < seen[-1].units
  with pytest.raises(DataError, match='units are not prepared yet'):
    prepare.finish(stopped, 'a')
  assert prepare.prepare_part(stopped, 'a', workers=workers, asked=lambda: False)
  prepare.finish(stopped, 'a')
  assert contents(whole.dir) == contents(stopped.dir)
  assert prepare.prepare_part(stopped, 'a', workers=workers, asked=lambda: True)  # nothing is left to stop


def test_missing_and_damaged_data(prepared_config, tmp_path):
  empty = dataclasses.replace(prepared_config, dir=str(tmp_path), tokenizer=prepared_config.tokenizer_path)
  with pytest.raises(DataError, match=r"source 'a' is not prepared from jsonl:.*; run: betarank data prepare"):
    prepared.Documents(empty, 'a', 'train')
  copy = dataclasses.replace(prepared_config, dir=str(tmp_path / 'copy'))
  shutil.copytree(prepared_config.dir, copy.dir)
  shard = prepared.folder(copy, 'a') / 'a-train.array_record-00000-of-00001'
  data = shard.read_bytes()
  shard.write_bytes(data[:-1])
  with pytest.raises(DataError, match=rf'{shard.name}: {len(data) - 1} bytes where .* says {len(data)}'):
    prepared.Documents(copy, 'a', 'train')
  flipped = bytearray(data)
  at = flipped.index(b'tokens') + 20
  flipped[at] ^= 1
  shard.write_bytes(flipped)
  with pytest.raises(DataError, match=r'00000-of-00001: damaged .*copy it again'):
    documents = prepared.Documents(copy, 'a', 'train')
    documents.read(range(len(documents)))
  with pytest.raises(DataError, match=r'00000-of-00001: damaged'):
    prepared.verify(copy, 'a')
  shard.write_bytes(data)
  assert prepared.verify(copy, 'a') == sum(len(prepared.Documents(copy, 'a', s)) for s in prepared.SPLITS)
  lengths = prepared.folder(copy, 'a') / 'lengths-train.npy'
  content = lengths.read_bytes()
  lengths.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  with pytest.raises(DataError, match=r'lengths-train.npy: damaged \(sha256 differs\)'):
    prepared.Documents(copy, 'a', 'train')
  lengths.write_bytes(content)
  manifest = prepared.folder(copy, 'a') / 'manifest.json'  # whole records, but others than were written
  written = json.loads(manifest.read_text())
  written['splits']['train']['shards'][0]['sha256'] = '0' * 64
  manifest.write_text(json.dumps(written))
  with pytest.raises(DataError, match=r'00000-of-00001: damaged \(its records are not what was written\)'):
    prepared.verify(copy, 'a')
  shard.write_bytes(b'\1' * len(data))
  with pytest.raises(DataError, match='00000-of-00001: damaged'):
    prepared.Documents(copy, 'a', 'train').read([0])
  shard.unlink()
  with pytest.raises(DataError, match='00000-of-00001: missing; copy it back'):
    prepared.Documents(copy, 'a', 'train')


def test_a_set_of_an_older_version_is_read(config, monkeypatch):
  """Records of older versions have no checksums. Their content is the same, so the fingerprint is the same too."""
  c = only(config)
  new = prepare_source(c, 'a', workers=1)
  expected = tokens(c, 'a', 'train')[1]
  old = dataclasses.replace(c, dir=f'{c.dir}/old')
  with monkeypatch.context() as patch:
    to_record, strip, form = records.to_record, records.without_checksum, records.Form
    patch.setattr(records, 'Form', lambda *about: form(*about, checksum=False))
    patch.setattr(records, 'to_record', lambda *document: bytes(strip(to_record(*document))))
    patch.setattr(records, 'without_checksum', bytes)
    prepare_source(old, 'a', workers=1)
  place = pathlib.Path(prepared.folder(old, 'a')) / 'manifest.json'
  manifest = json.loads(place.read_text())
  del manifest['record']
  place.write_text(json.dumps(manifest))
  assert manifest['fingerprint'] == new['fingerprint']
  for found, wanted in zip(tokens(old, 'a', 'train')[1], expected, strict=True):
    np.testing.assert_array_equal(found, wanted)


def test_retrained_tokenizer_is_noticed(prepared_config, tmp_path):
  copy = dataclasses.replace(prepared_config, dir=str(tmp_path / 'copy'))
  shutil.copytree(prepared_config.dir, copy.dir)
  other = dataclasses.replace(copy, sources={'a': SourceConfig('reasoning', 1.0, 300)})
  os.unlink(copy.tokenizer_path)
  with pytest.raises(DataError, match=r'tokenizer\.model: no such tokenizer'):
    prepared.Documents(copy, 'a', 'train')
  assert train_tokenizer(other) and not train_tokenizer(other)
  with pytest.raises(DataError, match=r"tokenizer_sha256 is '\w+' there and '\w+' now"):
    prepared.Documents(copy, 'a', 'train')


RUN = '''
import dataclasses, pathlib, sys, time
from betarank.data import config, prepare, sources
sources.UNIT_BYTES = 4000
work = prepare.Worker.run
def told(worker, unit, *rest):
  print(unit, flush=True)
  time.sleep(float(sys.argv[2]))
  yield from work(worker, unit, *rest)
prepare.Worker.run = told
prepare.prepare_source(eval(sys.argv[1], vars(config)), 'a', workers=1)
'''


def run(config, unit_s=0.0):
  """Starts to prepare the source. The process prints the number of each unit, and first waits for `unit_s` seconds."""
  return subprocess.Popen([sys.executable, '-c', RUN, repr(config), str(unit_s)], cwd=ROOT, stdout=subprocess.PIPE,
                          text=True)


def test_killed_and_started_again(config, tmp_path):
  whole, killed = only(config), dataclasses.replace(only(config), dir=str(tmp_path / 'killed'))
  out, _ = (process := run(whole)).communicate()
  assert process.returncode == 0
  units = {int(line) for line in out.splitlines()}
  process = run(killed, unit_s=0.2)
  partial = pathlib.Path(prepared.folder(killed, 'a')) / 'partial'
  deadline = time.monotonic() + 30
  while len(list(partial.glob('unit-*.json'))) < 2 and time.monotonic() < deadline:
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  kept = {json.loads(path.read_text())['unit'] for path in partial.glob('unit-*.json')}
  assert kept and not (partial.parent / 'manifest.json').exists()
  with pytest.raises(DataError, match='is not prepared'):
    prepared.Documents(killed, 'a', 'train')
  with pytest.raises(DataError, match='max_documents is 0 there and 5 now'):
    prepare_source(only(killed, max_documents=5), 'a', workers=1)
  out, _ = (process := run(killed)).communicate()
  assert process.returncode == 0 and {int(line) for line in out.splitlines()} == units - kept
  assert contents(whole.dir) == contents(killed.dir)


def test_a_shard_that_a_killed_run_renames_at_the_last_moment_is_there(tmp_path, monkeypatch):
  """A bucket may get the last request of a run that was killed after the next run has looked."""
  stage, final = epath.Path(tmp_path / 'partial'), epath.Path(tmp_path / 'final')

  def replace(path, target):
    os.replace(path, target)
    raise FileNotFoundError(path)

  stage.write_text('a shard')
  monkeypatch.setattr(type(stage), 'replace', replace)
  publish._rename(stage, final)
  assert final.read_text() == 'a shard' and not stage.exists()
  final.unlink()
  with pytest.raises(DataError, match='vanished'):
    publish._rename(stage, final)


def test_in_a_bucket_no_file_has_a_temporary_name(config, bucket, monkeypatch):
  """The last request of a killed run can't leave one behind."""
  written, of = [], type(fsspec.filesystem('gs'))

  def record(self, path, mode='rb', **kwargs):
    written.extend([path] * ('w' in mode))
    return open_(self, path, mode, **kwargs)

  open_ = of._open
  monkeypatch.setattr(of, '_open', record)
  c = dataclasses.replace(only(config), dir=str(bucket / 'data'), tokenizer=str(config.tokenizer_path))
  prepare_source(c, 'a', workers=1)
  assert len(written) > 6 and all(re.fullmatch(r'[a-z][\w.-]*', path.rpartition('/')[2]) for path in written), written


def test_killed_while_it_deletes_the_pieces(config, tmp_path, monkeypatch):
  whole, killed = only(config), dataclasses.replace(only(config), dir=str(tmp_path / 'killed'))
  prepare_source(whole, 'a', workers=1)
  with monkeypatch.context() as patch:
    patch.setattr(type(prepared.folder(killed, 'a')), 'rmtree', lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      prepare_source(killed, 'a', workers=1)
  prepare_source(killed, 'a', workers=1)
  assert not (prepared.folder(killed, 'a') / 'partial').exists() and contents(whole.dir) == contents(killed.dir)


def test_another_process_deletes_the_pieces_too(config, monkeypatch):
  path = type(prepared.folder(config, 'a'))
  rmtree = path.rmtree
  monkeypatch.setattr(path, 'rmtree', lambda folder: (rmtree(folder), rmtree(folder)))
  prepare_source(only(config), 'a', workers=1)
  assert not (prepared.folder(config, 'a') / 'partial').exists()


def test_stopped_in_the_last_step_and_started_again(config, tmp_path, monkeypatch):
  whole, stopped = only(config), dataclasses.replace(only(config), dir=str(tmp_path / 'stopped'))
  prepare_source(whole, 'a', workers=1)
  with monkeypatch.context() as patch:
    patch.setattr(publish, '_write_tfds', lambda *_: 1 / 0)  # shards have been renamed by then
    with pytest.raises(ZeroDivisionError):
      prepare_source(stopped, 'a', workers=1)
  prepare_source(stopped, 'a', workers=1)
  assert contents(whole.dir) == contents(stopped.dir)


def test_workers_follow_a_killed_parent(config, tmp_path):
  """If the parent is killed with SIGKILL, its worker processes end too, instead of waiting for work forever."""
  script = tmp_path / 'parent.py'
  script.write_text(
    'import concurrent.futures, multiprocessing, os, signal, sys\n'
    f'sys.path.insert(0, {str(ROOT)!r})\n'
    'from betarank.data import prepare\n'
    'from betarank.data.config import DataConfig, SourceConfig\n'
    'if __name__ == "__main__":\n'
    f'  job = prepare.Job("a", {only(config)!r}, "unused")\n'
    '  spawn = multiprocessing.get_context("spawn")\n'
    '  pool = concurrent.futures.ProcessPoolExecutor(1, spawn, prepare._start_worker, (job, None, None))\n'
    '  print(pool.submit(os.getpid).result(), flush=True)\n'
    '  os.kill(os.getpid(), signal.SIGKILL)\n')
  out = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
  worker = int(out.stdout)
  deadline = time.monotonic() + 60
  while time.monotonic() < deadline:
    try:
      if pathlib.Path(f'/proc/{worker}/stat').read_text().split()[2] == 'Z':
        return
    except FileNotFoundError:
      return
    time.sleep(0.05)
  os.kill(worker, signal.SIGKILL)
  pytest.fail('the worker outlived its parent')


def test_the_commands_of_parts(config, corpus, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sources, 'UNIT_BYTES', 4000)

  def data(*arguments):
    command.main([
      *arguments, f'--config=tests/tiny.py:dir={tmp_path}/d', f'--config.data.tokenizer={config.tokenizer}',
      f'--config.data.sources.main.uri=jsonl:{corpus}/a.jsonl', '--config.data.sources.main.max_documents=0'])
    return capsys.readouterr().out

  said = 'part {} of 2 is there; when all are, run: betarank data finish --config=...\n'
  assert data('prepare', '--part=2/2', '--workers=1').endswith(said.format(2))
  with pytest.raises(DataError, match='units are not prepared yet, the first is unit 0'):
    data('finish')
  assert data('prepare', '--part=1/2', '--workers=1').endswith(said.format(1))
  assert f'finished: {tmp_path}/d is ready\n' in data('finish')
  folder = tmp_path / 'd/main/1.0.0'
  assert data('verify') == f'{folder}: 400 documents, all as they were written\n'
  shard = next(folder.glob('main-validation.array_record-*'))
  content = bytearray(shard.read_bytes())
  content[content.index(b'tokens') + 20] ^= 1
  shard.write_bytes(content)
  with pytest.raises(DataError, match=f'{shard.name}: damaged'):
    data('verify')


def test_command_line(config, tmp_path):
  file = tmp_path / 'c.py'
  file.write_text('from betarank.configs import common\n\ndef get_config(arg=None):\n  c = common.base()\n'
                  '  c.model.vocab_size = 400\n  c.data.sources.main.max_documents = 300\n'
                  f'  c.data.update(dir={str(tmp_path / "d")!r}, validation_fraction=0.1)\n  return c\n')

  def command(*args):
    return subprocess.run([*BETARANK, 'data', *args, f'--config={file}'], cwd=ROOT,
                          capture_output=True, text=True)

  first = command('tokenizer')
  assert first.returncode == 0 and '400 tokens, trained' in first.stdout, first.stderr
  second = command('prepare', '--workers=1')
  assert second.returncode == 0, second.stderr
  assert 'train' in second.stdout and 'bytes/token' in second.stdout
  assert second.stdout.endswith(f'{tmp_path}/d is ready\ntry:      betarank data show --config={file}\n'
                                f'          betarank train --config={file} --workdir=RUN\n')
  shown = command('show', '--source=main', '--row=1')
  assert shown.returncode == 0 and 'row 1, epoch 0: ' in shown.stdout and 'Question: ' in shown.stdout, shown.stderr
  third = command('prepare', '--config.data.sources.main.uri=resoning')
  assert third.returncode == 2
  assert third.stderr.count('\n') == 1 and 'did you mean reasoning?' in third.stderr
