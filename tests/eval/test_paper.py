"""Tests the paper's average: its categories, its weights, and the table made from the results of evaluations."""

import numpy as np
import pytest

from betarank.eval import paper
from betarank.eval.benchmarks import TABLE
from betarank.eval.report.arms import read_sweep
from tests.eval import sweep


def test_the_papers_averages():
  scores = dict(general=41.0, commonsense=53.0, logic=60.0, math=50.0, code=70.0)
  assert paper.paper_average(scores) == pytest.approx(dict(knowledge=47.0, reasoning=60.0,
                                                           overall=0.4 * 47 + 0.6 * 60))
  # 4B after mid-training, as published: 0.4 of knowledge and 0.6 of reasoning are the overall score to rounding.
  for knowledge, reasoning, overall in ((41.37, 60.35, 52.76), (41.30, 60.39, 52.75)):
    half = dict(general=knowledge, commonsense=knowledge)
    made = paper.paper_average({**half, **dict.fromkeys(('logic', 'math', 'code'), reasoning)})
    assert made['overall'] == pytest.approx(overall, abs=0.011)
  by_name = {name: float(len(name)) for name in paper.BENCHMARKS}
  assert paper.category_scores(by_name)['math'] == pytest.approx((5 + 7 + 7 + 13) / 4)


def test_no_average_without_all_its_benchmarks():
  scores = {name: 1.0 for name in paper.BENCHMARKS if name != 'bbh'}
  categories = paper.category_scores(scores)
  assert 'logic' not in categories and len(categories) == 4
  assert paper.paper_average(categories) == {'knowledge': 1.0}
  with pytest.raises(ValueError, match='unknown: bb'):
    paper.category_scores({'bb': 1.0})
  with pytest.raises(ValueError, match='unknown: maths'):
    paper.paper_average({'maths': 1.0})


def test_every_benchmark_is_reached_by_the_command():
  harness = [name for tasks in paper.HARNESS_TASKS.values() for name in tasks.values()]
  assert sorted([*harness, *paper.SAMPLED]) == sorted(paper.BENCHMARKS) and len(paper.BENCHMARKS) == 19
  assert set(paper.SAMPLED) <= set(TABLE)


def test_the_table_is_made_of_what_evaluations_wrote(tmp_path, monkeypatch):
  monkeypatch.setattr(paper, 'K', 4)  # of 8 samples, where the paper has 64 of 128
  sweep.run(tmp_path / 'run', objective={}, seed=0, steps=20, entropy=1.0)
  rng = np.random.default_rng(0)
  for number, tasks in enumerate(paper.HARNESS_TASKS.values()):
    sweep.harness(tmp_path / 'run', 20, dict.fromkeys(tasks, 0.1 * (number + 1)))
  for name in paper.SAMPLED:
    sweep.samples(tmp_path / 'run', 20, name, [1.0, 0.0], 8, rng)
  run = read_sweep(tmp_path).runs[0]
  scores = paper.benchmark_scores(run, 20)
  assert set(scores) == set(paper.BENCHMARKS) and scores['gsm8k'] == 0.5 and scores['hellaswag'] == pytest.approx(0.2)
  general, commonsense, logic = (0.1 + 0.1 + 0.3 + 0.3) / 4, (4 * 0.2 + 2 * 0.3) / 6, (2 * 0.2 + 0.1) / 3
  overall = 0.4 * (general + commonsense) / 2 + 0.6 * (logic + 0.5 + 0.5) / 3
  lines = {line.split()[0]: line.split()[1:] for line in paper.table([('step 20', scores), ('none', {})]).splitlines()}
  assert lines['overall'] == [f'{100 * overall:.2f}', '-'] and lines['siqa'] == ['20.00', '-']
  assert paper.newest_step(run) == 20
  sweep.samples(tmp_path / 'run', 20, 'gsm8k', [1.0, 0.0], 2, rng)  # too few samples for Pass@4
  assert 'gsm8k' not in paper.benchmark_scores(read_sweep(tmp_path).runs[0], 20)
