"""Computes the average score over the paper's 19 benchmarks for base models (arXiv 2512.22955, section 6).

    betarank eval paper --checkpoint=RUN [--all]

Runs lm-evaluation-harness for the benchmarks of knowledge and logic, and samples answers to the benchmarks of
mathematics and code. With --all, evaluates all checkpoints of the run. Benchmarks that already have results are
skipped. At the end, the command prints one table. The page of `betarank report` shows such a table for all arms
(pre-training objectives).
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from betarank.eval.config import CheckpointRef, EvalRun
from betarank.eval.report.reading import read_run
from betarank.eval.report.runs import SAME_SETTINGS, Run, Sweep

# Two categories of knowledge, three of reasoning.
CATEGORIES = {
  'general': ('mmlu', 'mmlu_pro', 'triviaqa', 'naturalquestions'),
  'commonsense': ('hellaswag', 'siqa', 'piqa', 'winogrande', 'openbookqa', 'commonsenseqa'),
  'logic': ('arc_easy', 'arc_challenge', 'bbh'),
  'math': ('gsm8k', 'math500', 'minerva', 'olympiadbench'),
  'code': ('humaneval_plus', 'mbpp_plus'),
}
KNOWLEDGE = ('general', 'commonsense')
AVERAGES = ('knowledge', 'reasoning', 'overall')
BENCHMARKS = tuple(name for names in CATEGORIES.values() for name in names)

# Number of worked examples -> {task of lm-evaluation-harness: the paper's benchmark}. None leaves the number to the
# task. These tasks use the paper's numbers, with chains of thought: 4 for MMLU, 5 for MMLU-Pro and 3 for BBH.
HARNESS_TASKS: dict[int | None, dict[str, str]] = {
  None: {'mmlu_flan_cot_fewshot': 'mmlu', 'mmlu_pro': 'mmlu_pro', 'bbh_cot_fewshot': 'bbh'},
  0: {'hellaswag': 'hellaswag', 'social_iqa': 'siqa', 'piqa': 'piqa', 'winogrande': 'winogrande',
      'arc_easy': 'arc_easy', 'arc_challenge': 'arc_challenge'},
  5: {'triviaqa': 'triviaqa', 'nq_open': 'naturalquestions', 'openbookqa': 'openbookqa',
      'commonsense_qa': 'commonsenseqa'},
}
SAMPLED = (*CATEGORIES['math'], *CATEGORIES['code'])  # by Pass@K
K = 64  # K of Pass@K, computed from 128 samples


def category_scores(scores: Mapping[str, float]) -> dict[str, float]:
  """Returns {category: mean score over the benchmarks of the category}. A category is left out if one of its benchmarks
  has no score.

  scores: {benchmark: score}.

  Raises:
    ValueError: a name isn't one of the paper's benchmarks.
  """
  if unknown := sorted(set(scores) - set(BENCHMARKS)):
    raise ValueError(f'scores must be of the paper\'s {len(BENCHMARKS)} benchmarks; unknown: {", ".join(unknown)}')
  return {category: statistics.fmean(scores[name] for name in names) for category, names in CATEGORIES.items()
          if all(name in scores for name in names)}


def paper_average(categories: Mapping[str, float]) -> dict[str, float]:
  """Averages the scores of the categories. Returns {'knowledge': score, 'reasoning': score, 'overall': score}.

  All categories have the same weight. There are two categories of knowledge and three of reasoning, so overall = 0.4
  knowledge + 0.6 reasoning. The paper's published scores agree with this formula to 0.01. An average is left out if one
  of its categories is missing.

  categories: {category: score}.

  Raises:
    ValueError: a category is unknown.
  """
  if unknown := sorted(set(categories) - set(CATEGORIES)):
    raise ValueError(f'scores must be of {", ".join(CATEGORIES)}; unknown: {", ".join(unknown)}')
  members = {'knowledge': KNOWLEDGE, 'reasoning': [name for name in CATEGORIES if name not in KNOWLEDGE],
             'overall': CATEGORIES}
  return {average: statistics.fmean(categories[name] for name in names) for average, names in members.items()
          if all(name in categories for name in names)}


def benchmark_scores(run: Run, step: int) -> dict[str, float]:
  """Returns {benchmark: score in [0, 1]} of the run's checkpoint at `step`. Benchmarks without results are left out."""
  harness = run.harness.get(step, {})
  scores = {name: harness[task]['score'] for tasks in HARNESS_TASKS.values() for task, name in tasks.items()
            if task in harness}
  for name in SAMPLED:
    found = run.sampled(name, step)
    if found and found[1].metrics['pass_at_k'].shape[1] >= K:
      pass_at_k_P = found[1].metrics['pass_at_k'][:, K - 1]
      if np.isfinite(pass_at_k_P).any():
        scores[name] = float(np.nanmean(pass_at_k_P))
  return scores


def settings(run: Run, step: int, benchmark: str) -> dict[str, Any] | None:
  """Returns the settings with which the run's checkpoint at `step` was evaluated on a benchmark; None if it wasn't
  evaluated.

  Two scores may be compared only if their settings are equal.
  """
  if benchmark in SAMPLED:
    found = run.sampled(benchmark, step)
    return {key: found[1].settings.get(key) for key in SAME_SETTINGS} if found else None
  task = next(task for tasks in HARNESS_TASKS.values() for task, name in tasks.items() if name == benchmark)
  return run.harness.get(step, {}).get(task, {}).get('settings')


def newest_step(run: Run) -> int | None:
  """Returns the newest step at which the run was evaluated on any of the paper's benchmarks; None if there is no such
  step.
  """
  tasks = {task for group in HARNESS_TASKS.values() for task in group}
  steps = [step for step, found in run.harness.items() if tasks & found.keys()]
  steps += [step for name in SAMPLED for step in run.samples.get(name, {})]
  return max(steps, default=None)


def table(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
  """Returns a table of scores in percent as text, with a line for each benchmark, each category and each average.

  rows: pairs (name, {benchmark: score in [0, 1]}). Each pair becomes a column of the table.
  """
  columns = []
  for _, scores in rows:
    categories = category_scores(scores)
    columns.append({**scores, **categories, **paper_average(categories)})
  width = max(8, *(len(name) for name, _ in rows))
  lines = [' ' * 20 + ''.join(f'{name:>{width + 2}}' for name, _ in rows)]

  def line(name: str, indent: str = '') -> str:
    cells = ''.join(f'{f"{100 * column[name]:.2f}" if name in column else "-":>{width + 2}}' for column in columns)
    return f'{indent + name:20}{cells}'

  for category, names in CATEGORIES.items():
    lines += [*(line(name, '  ') for name in names), line(category)]
  lines += [line(name) for name in AVERAGES]
  if missing := [name for name in BENCHMARKS if any(name not in scores for _, scores in rows)]:
    lines.append(f'not evaluated yet: {", ".join(missing)}')
  return '\n'.join(lines)


def evaluate(run: EvalRun, subjects: Sequence[CheckpointRef], *, limit: int | None, include_path: str,
             max_length: int) -> None:
  """Evaluates checkpoints of one run on the 19 benchmarks, and prints the table of scores.

  Benchmarks that already have results aren't evaluated again. The arguments have the same meaning as in
  lm_harness.harness.

  Raises:
    UserError: an evaluation can't be done.
  """
  from betarank.eval import benchmarks, generate, lm_harness

  for name in SAMPLED:  # so that a missing file is reported before hours of evaluation
    benchmarks.open_benchmark(name, run.eval.sample)
  for shots, tasks in HARNESS_TASKS.items():
    lm_harness.harness(run, subjects, ','.join(tasks), num_fewshot=shots, limit=limit, include_path=include_path,
                       max_length=max_length)
  generate.sample(run, subjects, ','.join(SAMPLED))
  if jax.process_index():
    return
  found = read_run(subjects[0].run, subjects[0].run.name, Sweep(subjects[0].run))  # all subjects belong to one run
  print(table([(f'step {subject.step}', benchmark_scores(found, subject.step)) for subject in subjects]))
