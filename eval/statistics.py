"""Is it more than noise? Intervals over problems and seeds, paired differences, correction for many comparisons.

Problems are the sample: a benchmark's 30 are drawn from all that could have been asked. They are resampled, and the
interval is studentised (the bootstrap-t, symmetric: mean ± q·se, with q from |mean* - mean| / se*). Per-problem scores
of hard benchmarks are skewed, many zeros and a few ones; there, with 30 problems, percentile and BCa intervals cover
88-93 % instead of 95 %, the studentised one 94-97 %. `tests/eval/test_statistics.py` holds that.
Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 12; Hall, The Bootstrap and Edgeworth
Expansion (1992), section 3.6.

Seeds are a second sample, of two to five, too few to resample: what they add beyond the noise of the problems gets
Student's t. Both half-widths add in quadrature (the method of variance estimates recovery; Zou and Donner, Statistics
in Medicine 27, 2008). That covers 95-97.5 %: never less than it says. Adding variances under one t with Satterthwaite's
degrees of freedom is narrower, but falls to 92 % for three seeds and below 90 % for two.

The p-value is the smallest alpha whose 1 - alpha interval excludes zero, so the two never disagree.

# S seeds  P problems  B resamples
"""

import dataclasses
import math
from statistics import NormalDist

import numpy as np
from scipy.special import stdtr, stdtrit

RESAMPLES = 10_000
_CHUNK = 2_000_000  # resampled values at once


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean with its interval at `level`, and the p-value of its being zero."""

  mean: float
  low: float
  high: float
  p_value: float
  smallest_detectable: float  # a true distance from zero that would be seen with 80 % power
  problems: int  # used
  left_out: int  # problems without a value in some seed or arm
  seeds: int

  @property
  def excludes_zero(self) -> bool:
    return self.low > 0 or self.high < 0


def bootstrap_interval(
  values: np.ndarray, *, bounds: tuple[float, float] = (-math.inf, math.inf), level: float = 0.95,
  resamples: int = RESAMPLES, seed: int = 0,
) -> Estimate:
  """The mean of values [P], or [S, P] with a row a seed, and its interval; repeatable from `seed`.

  Problems that are NaN anywhere are left out. Where all problems are alike there is nothing to resample: the interval
  is then what the unseen share of problems, at most 1 - (1-level)^(1/P), could change within `bounds`, and the p-value
  that of a sign test. Raises ValueError if no problem is left.
  """
  values_SP = np.atleast_2d(np.asarray(values, np.float64))
  kept_P = ~np.isnan(values_SP).any(0)
  x_SP = values_SP[:, kept_P]
  seeds, problems = x_SP.shape
  if not problems or not seeds:
    raise ValueError(f'no problem has a value in all of {seeds} seeds')
  x_P, mean = x_SP.mean(0), float(x_SP.mean())
  scale = max(float(np.abs(x_SP).max()), 1e-300)
  estimate = dict(mean=mean, problems=problems, left_out=len(kept_P) - problems, seeds=seeds)
  seed_se = _seed_error(x_SP) if seeds > 1 else 0.0

  if np.ptp(x_P) <= 1e-12 * scale:
    problem_half = lambda alpha: 0.0
    unseen = 1 - (1 - level) ** (1 / problems)
    slack = (unseen * (mean - bounds[0]), unseen * (bounds[1] - mean))
    floor = 2.0 ** (1 - problems)
  else:
    se = float(x_P.std(ddof=1) / math.sqrt(problems))
    t_B = np.sort(_studentised(x_P, mean, resamples, np.random.default_rng(seed)))
    # The ceil((1-alpha)(B+1))-th of the sorted: as the p-value of a permutation test, never below 1/(B+1).
    problem_half = lambda alpha: se * t_B[min(math.ceil((1 - alpha) * (resamples + 1) - 1e-9), resamples) - 1]
    slack, floor = (0.0, 0.0), 1 / (resamples + 1)

  def half(alpha: float) -> float:
    seed_half = seed_se * float(stdtrit(seeds - 1, 1 - alpha / 2)) if seeds > 1 else 0.0
    return math.hypot(problem_half(alpha), seed_half)

  width = half(1 - level)
  z = NormalDist().inv_cdf
  spread = max(width, *slack)
  return Estimate(
    low=max(mean - math.hypot(width, slack[0]), bounds[0]), high=min(mean + math.hypot(width, slack[1]), bounds[1]),
    p_value=_p_value(abs(mean), half, floor) if abs(mean) > 1e-12 * scale else 1.0,
    smallest_detectable=spread * (1 + z(0.8) / z(0.5 + level / 2)), **estimate)


def _seed_error(x_SP: np.ndarray) -> float:
  """Standard error of the mean that seeds add; what seed means owe to the rest of the noise is in the problems' own."""
  seeds, problems = x_SP.shape
  mean_S = x_SP.mean(1)
  rest_SP = x_SP - mean_S[:, None] - x_SP.mean(0) + x_SP.mean()
  rest = np.sum(rest_SP**2) / ((seeds - 1) * max(problems - 1, 1)) / (seeds * problems)
  return math.sqrt(max(mean_S.var(ddof=1) / seeds - rest, 0.0))


def _studentised(x_P: np.ndarray, mean: float, resamples: int, rng: np.random.Generator) -> np.ndarray:
  """[B]: |mean* - mean| / se* of resampled problems.

  The sample's own variance has the weight of one problem in each se*. Otherwise, where all but a few problems are
  alike, resamples without those few have none, and the interval no end; coverage stays what it is.
  """
  parts, problems, variance = [], len(x_P), x_P.var(ddof=1)
  for start in range(0, resamples, max(1, _CHUNK // problems)):
    size = min(max(1, _CHUNK // problems), resamples - start)
    star_BP = x_P[rng.integers(0, problems, (size, problems))]
    se_B = np.sqrt(((problems - 1) * star_BP.var(1, ddof=1) + variance) / problems**2)
    parts.append(np.abs(star_BP.mean(1) - mean) / se_B)
  return np.concatenate(parts)


def _p_value(distance: float, half, floor: float) -> float:
  """The smallest alpha with half(alpha) < distance, by bisection; half falls as alpha rises."""
  low, high = 0.0, 1.0
  for _ in range(50):
    middle = (low + high) / 2
    low, high = (low, middle) if half(max(middle, 1e-15)) < distance else (middle, high)
  return min(max(high, floor), 1.0)


def paired_difference(
  a: np.ndarray, b: np.ndarray, *, bounds: tuple[float, float] = (-math.inf, math.inf), level: float = 0.95,
  resamples: int = RESAMPLES, seed: int = 0,
) -> Estimate:
  """The mean of a - b on the same problems, [P] or [S, P] with the same seeds in both, with interval and p-value.

  `bounds` are those of a difference: (-1, 1) for shares. Raises ValueError if the shapes differ.
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.shape != b.shape:
    raise ValueError(f'the same problems and seeds are needed in both, got shapes {a.shape} and {b.shape}')
  return bootstrap_interval(a - b, bounds=bounds, level=level, resamples=resamples, seed=seed)


def over_seeds(
  values_S: np.ndarray, *, bounds: tuple[float, float] = (-math.inf, math.inf), level: float = 0.95
) -> Estimate:
  """The mean of one figure a seed, with Student's t interval cut at `bounds`; of one seed alone there is none (NaN).

  For figures that have no problems to resample: a loss, a share. Raises ValueError if no seed has a value.
  """
  values_S = np.asarray(values_S, np.float64)
  x_S = values_S[np.isfinite(values_S)]
  if not len(x_S):
    raise ValueError('no seed has a value')
  mean, seeds, z = float(x_S.mean()), len(x_S), NormalDist().inv_cdf
  half = p_value = math.nan
  if seeds > 1:
    se = float(x_S.std(ddof=1)) / math.sqrt(seeds)
    half = se * float(stdtrit(seeds - 1, 0.5 + level / 2))
    p_value = 2 * float(stdtr(seeds - 1, -abs(mean) / se)) if se else float(mean == 0)
  low, high = (float(np.clip(x, *bounds)) for x in (mean - half, mean + half))
  return Estimate(mean, low, high, p_value, half * (1 + z(0.8) / z(0.5 + level / 2)), problems=0,
                  left_out=len(values_S) - seeds, seeds=seeds)


def holm(p_values: np.ndarray) -> np.ndarray:
  """p-values corrected for being many (Holm, Scandinavian Journal of Statistics 6, 1979); any dependence is allowed.

  Rejecting where the result is <= alpha keeps the chance of even one false claim below alpha. NaN is no comparison:
  it stays NaN and doesn't count.
  """
  p = np.asarray(p_values, np.float64)
  out = np.full(p.shape, np.nan)
  there = np.flatnonzero(~np.isnan(p))
  order = there[np.argsort(p[there], kind='stable')]
  out[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1.0)
  return out
