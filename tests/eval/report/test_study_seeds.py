"""Tests that the tables of docs/study.md on 20M parameters are what the seeds' figures give."""

import pathlib
import sys

import pytest

from benchmarks import study_seeds

DOCS = pathlib.Path(__file__).resolve().parents[3] / 'docs'
PLACES = {'%': 1, 'points': 1, 'tokens': 1, 'nats': 3, 'tau': 2}


def test_the_study_s_claims_are_those_of_its_seeds():
  page = (DOCS / 'study.md').read_text(encoding='utf-8')
  section = page[page.index('### 20M parameters'):page.index('### Beyond the paper')]
  rows = [[cell.strip() for cell in line.split('|')] for line in section.splitlines() if line.count('|') == 6]
  told = [row[4].replace(' points', '').replace(' nats', '').replace(' tokens', '').replace(' %', '').split(':')[0]
          for row in rows if ', plain' not in row[3] and ('against' in row[3] or 'tau' in row[3])]
  judged = study_seeds.judge(study_seeds.read([DOCS / 'study_20m_seeds.csv'], pool=False), k=32)
  found = []
  for claim in judged:
    for test in claim.tests:
      places = 4 if (claim.letter, test.unit) == ('c', 'nats') else PLACES[test.unit]
      mean, low, high = (f'{test.factor * x:.{places}f}' for x in (test.effect.mean, test.effect.low, test.effect.high))
      found.append(f'{"" if mean[0] == "-" else "+"}{mean} [{low}, {high}]')
  assert told == found
  assert [claim.verdict for claim in judged] == ["can't tell", 'no', "can't tell", "can't tell", "can't tell"]


def test_a_seed_counts_once(tmp_path, monkeypatch, capsys):
  copy = tmp_path / 'seeds.csv'
  copy.write_bytes((DOCS / 'study_20m_seeds.csv').read_bytes())
  files = [str(DOCS / 'study_20m_seeds.csv'), str(copy)]
  monkeypatch.setattr(sys, 'argv', ['study_seeds', *files])
  with pytest.raises(SystemExit, match='is there already'):
    study_seeds.main()
  monkeypatch.setattr(sys, 'argv', ['study_seeds', '--pool', *files])
  study_seeds.main()
  assert '| 12 |' in capsys.readouterr().out
