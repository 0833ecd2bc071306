import contextlib
import dataclasses
import io
import os

import pytest
from rich.console import Console

from betarank.configs.errors import ConfigError
from betarank.data import command, estimate, reasoning
from betarank.data.config import DataError
from tests import tokenizer_files


@pytest.fixture
def large(config, make_source, tmp_path):
  """Returns a config whose source has two files of 1 TB each. The files are sparse, so they take no space."""
  for name in ('a', 'b'):
    (tmp_path / f'{name}.txt').touch()
    os.truncate(tmp_path / f'{name}.txt', 10**12)
  return dataclasses.replace(config, sources={'web': make_source(f'text:{tmp_path}/*.txt')})


def test_text_divided_by_cores_and_rate(large):
  one, four = (estimate.estimate(large, 'web', machines, 96, 1.25) for machines in (1, 4))
  assert (one.files, one.file_bytes) == (2, 2 * 10**12) and one.text_bytes == pytest.approx(2e12)
  assert one.machine_s == pytest.approx(2e12 / 96 / 1.25e6) == pytest.approx(4 * four.machine_s, rel=0.01)
  assert one.pieces == pytest.approx(2e12 / 2**27, rel=0.1)


def test_a_file_that_cannot_be_divided_is_the_work_of_one_core(config, make_source, tmp_path):
  (tmp_path / 'a.jsonl.gz').write_bytes(b'\x1f\x8b')
  os.truncate(tmp_path / 'a.jsonl.gz', 10**10)
  c = dataclasses.replace(config, sources={'web': make_source(f'jsonl:{tmp_path}/*')})
  assert estimate.estimate(c, 'web', 16, 96, 1.0).machine_s == pytest.approx(4e10 / 1e6)


def test_generated_problems_are_measured_on_a_sample(config, make_source, monkeypatch):
  now = iter((0.0, 2.56))  # 10 ms for each problem of the sample
  monkeypatch.setattr(estimate.time, 'perf_counter', lambda: next(now))
  count = 10**6
  c = dataclasses.replace(config, sources={'made_up': make_source('reasoning:chain_sum', count)})
  found = estimate.estimate(c, 'made_up', 2, 50, 1.0)
  texts = [reasoning.problem(reasoning.parse('chain_sum'), i).document for i in range(100)]
  assert found.text_bytes == pytest.approx(count * sum(map(len, texts)) / 100, rel=0.1)
  assert (found.files, found.file_bytes) == (0, 0)
  assert found.machine_s == pytest.approx((found.text_bytes / 1e6 + count * 0.01) / 100, rel=0.01)


def test_what_is_printed_and_that_nothing_is_written(large, prepared_config, make_source, tmp_path):
  (tmp_path / 'a.txt').unlink()
  c = dataclasses.replace(prepared_config, vocab_size=2**17, sources={
    **prepared_config.sources, **large.sources, 'made_up': make_source('reasoning', 10),
    'absent': make_source('tfds:/nowhere'),
    'some': make_source(f'text:{tmp_path}/*.txt', 7)})
  before = sorted(tmp_path.rglob('*'))
  with contextlib.redirect_stdout(io.StringIO()) as out:
    estimate.show(c, 4, 100, 1.0, 3.0, Console(file=out, width=100))
  text = ' '.join(out.getvalue().split())
  assert 'a prepared b prepared web 1 1T 1T 250G 1T 8,192 0.694 made_up 2.' in text
  assert 'absent ? some' in text and 'absent: not included: tfds:/nowhere: can\'t be opened' in text
  assert 'made_up: from a sample of up to 256 documents, read on this machine' in text
  assert 'some: at most this, because max_documents=7' in text
  assert 'in all 1.39 hours on 4 machines with 100 processes each, 556 core hours, $16.67' in text
  assert sorted(tmp_path.rglob('*')) == before


def test_the_rate_is_that_of_the_tokenizer(config, tmp_path):
  assert estimate.mb_per_s(config) == estimate.MB_PER_S['.model']
  folder = tokenizer_files.byte_level(tmp_path / 'qwen', 'qwen')
  assert estimate.mb_per_s(dataclasses.replace(config, tokenizer=folder)) == estimate.MB_PER_S['.json']
  with pytest.raises(DataError, match='x.json: no such tokenizer'):
    estimate.mb_per_s(dataclasses.replace(config, tokenizer=f'{tmp_path}/x.json'))


def test_the_command(tmp_path, capsys):
  setting = f'--config.data.dir={tmp_path}/data'
  command.main(['prepare', '--config=configs/smoke.py', setting, '--dry_run', '--part=1/3', '--workers=2'])
  assert 'on 3 machines with 2 processes each' in capsys.readouterr().out and not os.listdir(tmp_path)
  for wrong, message in (
      (['finish'], '--dry_run is for prepare'), (['prepare', '--mb_per_s=-1'], '--mb_per_s: expected a number above 0'),
      (['prepare', '--mb_per_s=nan'], '--mb_per_s: expected a number above 0'),
      (['prepare', '--dollars_per_hour=nan'], '--dollars_per_hour: expected a number above 0'),
      (['prepare', '--dollars_per_hour=inf'], '--dollars_per_hour: expected a number above 0')):
    with pytest.raises(ConfigError, match=message):
      command.main([*wrong, '--config=configs/smoke.py', setting, '--dry_run'])
