"""What many samples a problem say: Avg@n, Cons@n, Pass@k, diversity, length. Pure NumPy; a value a problem.

Everything is kept by problem, so that eval/statistics.py can resample problems and pair them between checkpoints.

Rules. An *undecided* sample (its verifier ran out of time) is as good as not drawn: it counts neither as right nor as
wrong, and casts no vote. A sample *without an answer* is wrong and casts no vote. A problem for which nothing is left
has NaN, which the statistics leave out and count.

# P problems  N samples  K = N, column k-1 is Pass@k
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

FIELDS = ('problem', 'sample', 'verdict', 'group', 'tokens', 'finish')  # of a stored sample, what is counted
VERDICTS = {'right': 1.0, 'wrong': 0.0, 'undecided': np.nan}


@dataclasses.dataclass(frozen=True)
class Samples:
  """The samples of one checkpoint on one benchmark. Rows are `problems`; a slot with no sample is NaN, group -1."""

  problems: tuple[str, ...]
  score_PN: np.ndarray  # float64: 1 right, 0 wrong, NaN undecided or not there
  group_PN: np.ndarray  # int64: equal answers share a number >= 0; -1 no answer
  tokens_PN: np.ndarray  # float64: length
  truncated_PN: np.ndarray  # float64: 1 if the length limit ended it

  @property
  def undecided(self) -> int:
    """Samples that are there but have no verdict."""
    return int(np.sum(np.isnan(self.score_PN) & ~np.isnan(self.tokens_PN)))

  def metrics(self) -> dict[str, np.ndarray]:
    """{'avg_at_n': [P], 'cons_at_n': [P], 'pass_at_k': [P, K], ...}, float64."""
    return {
      'avg_at_n': avg_at_n(self.score_PN),
      'cons_at_n': cons_at_n(self.score_PN, self.group_PN),
      'pass_at_k': pass_at_k(self.score_PN),
      'distinct_answers': distinct_answers(self.group_PN),
      'answer_entropy_nats': answer_entropy(self.group_PN),
      'length_tokens': mean(self.tokens_PN),
      'truncated_share': mean(self.truncated_PN),
    }


def collect(lines: Iterable[Mapping[str, Any]]) -> Samples:
  """Samples from their stored lines (`problem`, `sample`, `verdict`, `group`, `tokens`, `finish`), in any order.

  Of two lines for one (problem, sample) the first counts. Raises ValueError as `parse` does.
  """
  by_problem: dict[str, dict[int, tuple[float, int, float, float]]] = {}
  for line in lines:
    problem, sample, row = parse(line)
    by_problem.setdefault(problem, {}).setdefault(sample, row)
  problems = tuple(sorted(by_problem, key=lambda name: (len(name), name)))  # '2' before '10'
  most = max((len(rows) for rows in by_problem.values()), default=0)
  table = np.full((len(problems), most, 4), np.nan)
  table[..., 1] = -1
  for p, name in enumerate(problems):
    for n, sample in enumerate(sorted(by_problem[name])):
      table[p, n] = by_problem[name][sample]
  return Samples(problems, table[..., 0], table[..., 1].astype(np.int64), table[..., 2], table[..., 3])


def parse(line: Mapping[str, Any]) -> tuple[str, int, tuple[float, int, float, float]]:
  """(problem, sample number, (score, group, tokens, truncated)). Raises ValueError naming what is missing or wrong."""
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
  """[P]: the mean of what isn't NaN; NaN where nothing is left."""
  there_PN = ~np.isnan(values_PN)
  total_P = np.sum(np.where(there_PN, values_PN, 0.0), axis=-1)
  return _divide(total_P, there_PN.sum(-1))


def avg_at_n(score_PN: np.ndarray) -> np.ndarray:
  """[P]: the share of right samples; an unbiased estimate of Pass@1."""
  return mean(score_PN)


def cons_at_n(score_PN: np.ndarray, group_PN: np.ndarray) -> np.ndarray:
  """[P]: is the answer that most samples give right? Source: majority voting, arXiv 2203.11171.

  Ties count with their expectation under a fair draw among the tied answers: the mean of their rightness. That of a
  group is the share of its samples judged right (equivalence isn't quite transitive, so they may differ). Where no
  sample has an answer the vote is wrong.
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
  """[P, K]: for every k <= n, the chance that k of a problem's n samples hold a right one; NaN for k > n.

      Pass@k = 1 - C(n-c, k) / C(n, k) = 1 - prod_{i=1..k} (n-c-i+1) / (n-i+1),   c of n right

  Unbiased, from one set of samples (arXiv 2107.03374, equation 1). The product has no large binomials, and each factor
  is at most 1, so its relative error stays below k rounding errors.
  """
  n_P1 = np.sum(~np.isnan(score_PN), axis=-1, keepdims=True)
  c_P1 = np.nansum(score_PN, axis=-1, keepdims=True)
  i_K = np.arange(1, score_PN.shape[-1] + 1)
  left_PK = np.maximum(n_P1 - i_K + 1, 0)
  fail_PK = np.cumprod(_divide(np.maximum(n_P1 - c_P1 - i_K + 1, 0), left_PK), axis=-1)
  return np.where(left_PK > 0, 1 - fail_PK, np.nan)


def distinct_answers(group_PN: np.ndarray) -> np.ndarray:
  """[P]: how many different answers the samples give. It grows with n, so compare equal n only."""
  return np.array([len(np.unique(group_N[group_N >= 0])) for group_N in group_PN], dtype=np.float64)


def answer_entropy(group_PN: np.ndarray) -> np.ndarray:
  """[P]: entropy in nats of the empirical distribution of answers, samples without one left out; 0 without any.

  The plug-in estimate: too low by about (distinct - 1) / 2n, so compare equal n only.
  """
  out_P = np.zeros(len(group_PN))
  for p, group_N in enumerate(group_PN):
    _, votes_A = np.unique(group_N[group_N >= 0], return_counts=True)
    share_A = votes_A / max(votes_A.sum(), 1)
    out_P[p] = np.sum(-share_A * np.log(share_A))
  return out_P


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return np.divide(a, b, out=np.full(np.broadcast_shapes(a.shape, b.shape), np.nan), where=b > 0)
