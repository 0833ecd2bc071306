"""Computes metrics from many samples per problem: Avg@n, Cons@n, Pass@k, diversity, length.

Every metric has one value per question, so that eval/statistics.py can resample questions and pair them between
checkpoints. Generated problems may repeat a question: its value is then the mean over its problems. If repeated
problems counted as independent ones, intervals would be too narrow.

A sample is undecided if its verifier reached no verdict, for example because it ran out of time. Avg@n, Cons@n and
Pass@k ignore undecided samples, as if they had not been drawn. A sample without an answer is wrong, and isn't a vote in
Cons@n. If a problem has no decided sample, these three metrics are NaN. The statistics leave such problems out, and
report their number.

Arrays [P, K] have Pass@k in column k - 1, for k from 1 to K = N.

# P problems  Q questions  N samples per problem  A distinct answers of one problem
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

FIELDS = ('problem', 'sample', 'verdict', 'group', 'tokens', 'finish')  # what every stored sample has
QUESTION = 'question'  # a hash of the question; samples from before 2026-11-29 don't have it
VERDICTS = {'right': 1.0, 'wrong': 0.0, 'undecided': np.nan}


@dataclasses.dataclass(frozen=True)
class Samples:
  """The samples of one checkpoint on one benchmark.

  Arrays have one row per problem and one column per sample. If a problem has fewer samples than another, the entries of
  the missing samples are -1 in group_PN, and NaN in the other arrays.

  Attributes:
    problems: the names of the P problems.
    question_P: int64, the index of the first problem with the same question.
    score_PN: float64, 1 for right, 0 for wrong, NaN for undecided samples.
    group_PN: int64, the number of the answer. Equal answers to a problem have the same number; -1 means no answer.
    tokens_PN: float64, the length in tokens.
    truncated_PN: float64, 1 if the sample was cut off at the length limit, else 0.
  """

  problems: tuple[str, ...]
  question_P: np.ndarray
  score_PN: np.ndarray
  group_PN: np.ndarray
  tokens_PN: np.ndarray
  truncated_PN: np.ndarray

  @property
  def questions(self) -> tuple[str, ...]:
    """The names of the Q different questions: of each, the name of the first problem."""
    return tuple(self.problems[p] for p in np.unique(self.question_P))

  @property
  def undecided(self) -> int:
    """The number of samples that the verifier couldn't decide."""
    return int(np.sum(np.isnan(self.score_PN) & ~np.isnan(self.tokens_PN)))

  def metrics(self) -> dict[str, np.ndarray]:
    """Returns {metric: float64 array}. Every metric is [Q], except 'pass_at_k', which is [Q, K] (see `pass_at_k`).

    The rows are in the order of `questions`.
    """
    by_problem = {
      'avg_at_n': avg_at_n(self.score_PN),
      'cons_at_n': cons_at_n(self.score_PN, self.group_PN),
      'pass_at_k': pass_at_k(self.score_PN),
      'distinct_answers': distinct_answers(self.group_PN),
      'answer_entropy_nats': answer_entropy(self.group_PN),
      'length_tokens': mean(self.tokens_PN),
      'truncated_share': mean(self.truncated_PN),
    }
    return {name: by_question(values, self.question_P) for name, values in by_problem.items()}


def collect(lines: Iterable[Mapping[str, Any]]) -> Samples:
  """Reads samples from stored lines, which may be in any order.

  If two lines have the same problem and sample number, only the first line is used.

  lines: the lines of a file of samples, as parsed JSON objects. FIELDS lists the fields that each of them must have.

  Raises:
    ValueError: a field is missing or wrong.
  """
  by_problem: dict[str, dict[int, tuple[float, int, float, float]]] = {}
  question_of: dict[str, str] = {}
  for line in lines:
    problem, sample, row = parse(line)
    by_problem.setdefault(problem, {}).setdefault(sample, row)
    question_of.setdefault(problem, str(line.get(QUESTION, problem)))
  problems = tuple(sorted(by_problem, key=lambda name: (len(name), name)))  # '2' before '10'
  most = max((len(rows) for rows in by_problem.values()), default=0)
  table = np.full((len(problems), most, 4), np.nan)
  table[..., 1] = -1
  for p, name in enumerate(problems):
    for n, sample in enumerate(sorted(by_problem[name])):
      table[p, n] = by_problem[name][sample]
  first: dict[str, int] = {}
  question_P = np.array([first.setdefault(question_of[name], p) for p, name in enumerate(problems)], np.int64)
  return Samples(problems, question_P, table[..., 0], table[..., 1].astype(np.int64), table[..., 2], table[..., 3])


def parse(line: Mapping[str, Any]) -> tuple[str, int, tuple[float, int, float, float]]:
  """Returns (problem, sample number, (score, group, tokens, truncated)) from a line of a file of samples.

  The last four have the meanings that `Samples` describes.

  Raises:
    ValueError: a field is missing or wrong. The message names it.
  """
  for name in FIELDS:
    if name not in line:
      raise ValueError(f'a sample has no {name!r}')
  if not isinstance(line['verdict'], str) or line['verdict'] not in VERDICTS:
    raise ValueError(f'a sample has the verdict {line["verdict"]!r}; known are {", ".join(VERDICTS)}')
  try:
    row = (VERDICTS[line['verdict']], int(line['group']), float(line['tokens']), float(line['finish'] == 'length'))
    if not abs(row[1]) < 2**53:
      raise ValueError(f'group {str(row[1])[:40]}')
    return str(line['problem']), int(line['sample']), row
  except (TypeError, ValueError, OverflowError) as error:
    raise ValueError(f'a sample is malformed ({error})') from None


def mean(values_PN: np.ndarray) -> np.ndarray:
  """Returns [P]: the mean of each problem's values that aren't NaN; NaN if all of them are NaN."""
  there_PN = ~np.isnan(values_PN)
  total_P = np.sum(np.where(there_PN, values_PN, 0.0), axis=-1)
  return _divide(total_P, there_PN.sum(-1))


def by_question(values: np.ndarray, question_P: np.ndarray) -> np.ndarray:
  """Returns [Q, ...]: the mean of `values` [P, ...] over the problems of each question; NaN if all of them are NaN."""
  questions, index_P = np.unique(question_P, return_inverse=True)
  there = ~np.isnan(values)
  total, count = np.zeros((2, len(questions), *values.shape[1:]))
  np.add.at(total, index_P, np.where(there, values, 0.0))
  np.add.at(count, index_P, there)
  return _divide(total, count)


def avg_at_n(score_PN: np.ndarray) -> np.ndarray:
  """Returns [P]: the fraction of each problem's samples that are right, which is an unbiased estimate of Pass@1."""
  return mean(score_PN)


def cons_at_n(score_PN: np.ndarray, group_PN: np.ndarray) -> np.ndarray:
  """Returns [P]: 1 if the most frequent answer to a problem is right, else 0 (majority voting, arXiv 2203.11171).

  - If several answers are equally frequent, the result is the mean of their scores. This is the expected score of one
    of them, drawn at random.
  - Samples with the same answer can get different verdicts. The score of an answer is therefore the fraction of its
    samples that were judged right.
  - If no sample has an answer (all groups are -1), the result is 0.
  """
  out_P = np.full(len(score_PN), np.nan)
  for p, (score_N, group_N) in enumerate(zip(score_PN, group_PN)):
    decided_N = ~np.isnan(score_N)
    if not decided_N.any():
      continue
    votes_N = decided_N & (group_N >= 0)
    _, index, votes_A = np.unique(group_N[votes_N], return_inverse=True, return_counts=True)
    if not len(votes_A):
      out_P[p] = 0.0
      continue
    right_A = np.bincount(index, weights=score_N[votes_N]) / votes_A
    out_P[p] = right_A[votes_A == votes_A.max()].mean()
  return out_P


def pass_at_k(score_PN: np.ndarray) -> np.ndarray:
  """Returns [P, K]: for every k <= n, the chance that k of a problem's n samples include a right one; NaN for k > n.

      Pass@k = 1 - C(n-c, k) / C(n, k) = 1 - prod_{i=1..k} (n-c-i+1) / (n-i+1),   where c of the n samples are right

  The estimate is unbiased, and uses one set of samples for all k (arXiv 2107.03374, equation 1). The product avoids
  large binomials. Its relative error is at most about k times the machine epsilon.
  """
  n_P1 = np.sum(~np.isnan(score_PN), axis=-1, keepdims=True)
  c_P1 = np.nansum(score_PN, axis=-1, keepdims=True)
  i_K = np.arange(1, score_PN.shape[-1] + 1)
  left_PK = np.maximum(n_P1 - i_K + 1, 0)
  fail_PK = np.cumprod(_divide(np.maximum(n_P1 - c_P1 - i_K + 1, 0), left_PK), axis=-1)
  return np.where(left_PK > 0, 1 - fail_PK, np.nan)


def distinct_answers(group_PN: np.ndarray) -> np.ndarray:
  """Returns [P]: the number of different answers to each problem.

  This number grows with the number of samples, so compare it only between runs with the same number of samples.
  """
  return np.array([len(np.unique(group_N[group_N >= 0])) for group_N in group_PN], dtype=np.float64)


def answer_entropy(group_PN: np.ndarray) -> np.ndarray:
  """Returns [P]: the entropy of the distribution of answers to each problem, in nats; 0 if no sample has an answer.

  Samples without an answer are left out. The probability of an answer is estimated by its frequency. This estimate is
  too low by about (distinct answers - 1) / 2n for n samples. Therefore compare it only between runs with the same
  number of samples.
  """
  out_P = np.zeros(len(group_PN))
  for p, group_N in enumerate(group_PN):
    _, votes_A = np.unique(group_N[group_N >= 0], return_counts=True)
    share_A = votes_A / max(votes_A.sum(), 1)
    out_P[p] = np.sum(-share_A * np.log(share_A))
  return out_P


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return np.divide(a, b, out=np.full(np.broadcast_shapes(a.shape, b.shape), np.nan), where=b > 0)
