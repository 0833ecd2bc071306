"""Tests that the tables of docs/study.md are what the seeds' figures give."""

import csv
import pathlib
import sys

import pytest

from benchmarks import study_seeds
from betarank.eval.statistics import over_seeds

DOCS = pathlib.Path(__file__).resolve().parents[3] / 'docs'
PLACES = {'%': 1, 'points': 1, 'tokens': 1, 'nats': 3, 'tau': 2}
SAYS = {'yes': {'β = -0.25 against CE, ce_nats, text': 'equal', 'β = -0.25 against CE, entropy_nats, text': 'below',
                'β = 0.5 against CE, entropy_nats, text': 'above'},
        'no': {'λ̂ = -0.1 against CE, tail_mass, text': 'less than 7 to 9 %'}}
ARMS = {'plain cross-entropy': 'beta=0.0', 'β = -0.25': 'beta=-0.25', 'β = 0.5': 'beta=0.5',
        'λ̂ = -0.1': 'lambda_tail=-0.1', 'λ̃ = 0.1': 'lambda_head=0.1'}
MIDTRAIN = 'pre-training → mid-training'


def section():
  page = (DOCS / 'study.md').read_text(encoding='utf-8')
  return page[page.index('### 20M parameters'):page.index('### Beyond the paper')]


def cells(lines):
  return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


def interval(e, factor, places, sign='+'):
  mean, low, high = (f'{factor * x:.{places}f}' for x in (e.mean, e.low, e.high))
  mean, low, high = (x.lstrip('-') if float(x) == 0 else x for x in (mean, low, high))
  return f'{sign if float(mean) > 0 else ""}{mean} [{low}, {high}]'


def test_the_claims_are_those_of_the_seeds():
  rows = [row for row in cells(section().splitlines()) if len(row) == 5 and (' against ' in row[2] or 'tau' in row[2])]
  judged = study_seeds.judge(study_seeds.read([DOCS / 'study_20m_seeds.csv'], pool=False), k=32)
  found = []
  for claim in judged:
    for test in claim.tests:
      places = 4 if (claim.letter, test.unit) == ('c', 'nats') else PLACES[test.unit]
      says = SAYS.get(test.verdict, {}).get(test.what, '')
      found.append((interval(test.effect, test.factor, places), says))
  shown = [row[3].partition(':') for row in rows]
  for unit in (' points', ' nats', ' tokens', ' %'):
    shown = [(before.replace(f'{unit} [', ' ['), colon, after) for before, colon, after in shown]
  assert [(before, after.strip()) for before, _, after in shown] == found
  assert [row[1].strip('*').partition(' (')[0] for row in rows if row[0]] == [claim.verdict for claim in judged]


def test_the_tables_before_and_after_rl_are_those_of_the_seeds():
  figures = study_seeds.read([DOCS / 'study_20m_seeds.csv'], pool=False)
  of = {(c.stage, c.subject.partition(':')[0], c.metric, c.arm): c for c in study_seeds.compared(figures, 'beta=0.0')}
  before, after = [row for row in cells(section().splitlines()) if len(row) == 6 and row[0] in ARMS][:5], [
    row for row in cells(section().splitlines()) if len(row) == 6 and row[0] in ARMS][5:]

  def figure(stage, subject, metric, arm, factor, places, ratio=False):
    c = of[stage, subject, metric, arm]
    if c.difference is None:
      return f'{c.value.mean * factor:.{places}f}'
    if ratio:
      return interval(over_seeds([d / c.theirs[s] for s, d in c.differences.items()]), 100, 1).replace(' [', ' % [')
    return interval(c.difference, factor, places)

  for name, *shown in before:
    arm = ARMS[name]
    assert shown == [
      figure(MIDTRAIN, 'text', 'ce_nats', arm, 1, 3), figure(MIDTRAIN, 'text', 'entropy_nats', arm, 1, 3),
      figure(MIDTRAIN, 'text', 'tail_mass', arm, 1, 4, ratio=True),
      figure(MIDTRAIN, 'reasoning', 'avg_at_n', arm, 100, 1), figure(MIDTRAIN, 'reasoning', 'pass_at_32', arm, 100, 1)]
  for name, *shown in after:
    arm, stage = ARMS[name], f'{MIDTRAIN} → RL'
    gains = []
    for metric in ('avg_at_n', 'pass_at_32'):
      early, late = (of[s, 'reasoning', metric, arm].by_seed for s in (MIDTRAIN, stage))
      gains.append(interval(over_seeds([late[seed] - early[seed] for seed in late]), 100, 1))
    assert shown == [*(figure(stage, 'reasoning', metric, arm, 100, 1)
                       for metric in ('avg_at_n', 'cons_at_n', 'pass_at_32')), *gains]


def test_the_seeds_of_10m_give_the_verdicts_of_the_report_on_their_runs():
  """Figures of (d) differ a little: the report separates the noise of problems, and compares λ̂ with β = 0.5 on the
  problems that λ̂ has.
  """
  judged = study_seeds.judge(study_seeds.read([DOCS / 'study_seeds.csv'], pool=False), k=32)
  with open(DOCS / 'study_claims.csv', newline='', encoding='utf-8') as file:
    rows = list(csv.DictReader(file))
  tests = [(claim, test) for claim in judged for test in (*claim.tests, *claim.shown)]
  assert [row['test'] for row in rows] == [test.what for _, test in tests]
  for row, (claim, test) in zip(rows, tests, strict=True):
    assert row['claim_verdict'] == claim.verdict and row['verdict'] == test.verdict, row
    assert float(row['effect']) == pytest.approx(
      test.factor * test.effect.mean, abs=1e-9 if row['problems'] == '0' else 0.05)
    assert row['problems'] != '0' or float(row['low']) == pytest.approx(test.factor * test.effect.low)


def test_a_seed_counts_once(tmp_path, monkeypatch, capsys):
  copy = tmp_path / 'seeds.csv'
  copy.write_bytes((DOCS / 'study_20m_seeds.csv').read_bytes())
  files = [str(DOCS / 'study_20m_seeds.csv'), str(copy)]
  monkeypatch.setattr(sys, 'argv', ['study_seeds', *files])
  with pytest.raises(SystemExit, match='is there already'):
    study_seeds.main()
  monkeypatch.setattr(sys, 'argv', ['study_seeds', '--pool', *files])
  study_seeds.main()
  assert '| 14 |' in capsys.readouterr().out
