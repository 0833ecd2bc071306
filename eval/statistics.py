"""Computes confidence intervals and p-values for means and differences, and corrects p-values for multiple testing.

There are two sources of noise. The problems of a benchmark, such as 30, are a sample from all problems that could have
been asked. The training seeds are another sample, usually of two to five.

**Noise of problems.** The intervals come from the symmetric studentized bootstrap, |t*| = |mean* - mean| / se*, with
resampled problems.

- Values with two bounds (fractions, differences of fractions) are studentized on the arcsine scale, asin(sqrt(u)) for u
  in [0, 1], because their variance is more even on this scale near a bound. If the values are skewed, the interval is
  skewed too. Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), sections 12.5 and 12.6; for the
  symmetric form, Hall, The Bootstrap and Edgeworth Expansion (1992), section 3.6.
- The half-width is multiplied by sqrt(1 + 2/P), because a small set of problems, such as P = 10, shows less skewness
  than all possible problems have.
- For values in a range [low, high], the interval is cut at Gaffke's limits. As far as is known, these are valid for any
  distribution of such values. To compute the upper limit, add one more value, `high`, to the values, and take a
  weighted mean with weights from a flat Dirichlet distribution. The limit is a quantile of this random mean. The lower
  limit is computed in the same way, with `low`. For scores of 0 or 1, the limits equal those of Clopper and Pearson. If
  all problems have the same value, only Gaffke's limits are used. Source: Gaffke, Mathematical Methods of Statistics 14
  (2005); Learned-Miller and Thomas, arXiv 1905.06208.

The coverage of a method is how often its 95 % intervals contain the true value. For the fraction of right answers on
ten problems, most of which are never solved, it is 96-99 %. For paired differences on ten problems, it is 96 % on
average. It falls to 90 % if a fifth of all problems gains 50 points, because one in nine sets of ten problems then
contains no problem that gains. `python -m benchmarks.intervals` prints a table of coverages, and
`tests/eval/test_statistics.py` checks them.

**Noise of seeds.** There are too few seeds to resample. So there are two intervals around the mean: one for the noise
of problems, from the bootstrap, and one for the noise of seeds, from Student's t distribution. On each side of the
mean, the distances a and b to the limits of both are combined as sqrt(a^2 + b^2) (MOVER, the method of variance
estimates recovery; Zou and Donner, Statistics in Medicine 27, 2008). The coverage is 95-97.5 %. An alternative is to
add the variances and use one t distribution with Satterthwaite's degrees of freedom. Its intervals are narrower, but
their coverage is only 92 % for three seeds, and less than 90 % for two.

The p-value is the smallest alpha whose 1 - alpha interval excludes zero, so p-value and interval always agree.

# S seeds  P problems  B resamples
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
SMALL_SET = 2.0  # the half-width grows by sqrt(1 + SMALL_SET / P)
_CHUNK = 2_000_000  # the number of resampled values that are computed at the same time
_ROUNDING = 1e-9  # values count as equal if their range is at most this share of the largest
_KEPT = 6_000_000  # up to this number of resampled values, their random numbers are kept in memory: 96 MB

Bounds = tuple[float, float]
Limits = Callable[[float], tuple[float, float]]  # alpha -> limits of the 1 - alpha interval


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean with its confidence interval, and a test of whether the true mean is zero.

  Attributes:
    mean: the mean over seeds and problems.
    low, high: the limits of the interval, a 95 % interval unless another `level` was asked for.
    p_value: the p-value of the hypothesis that the true mean is zero.
    smallest_detectable: the distance from zero that a true mean must have to be detected with a probability of about
      80 %; with few seeds it is less (see Noise.smallest_detectable).
    problems: the number of problems used; 0 from `over_seeds`.
    left_out: the number of problems that were left out, because they have no value in some seed or arm. From
      `over_seeds`, the number of seeds that were left out.
    seeds: the number of seeds used.

  From `over_seeds` with a single seed, or with the same value in all seeds, the limits, p_value and smallest_detectable
  are NaN, except that the p_value of zeros is 1.
  """

  mean: float
  low: float
  high: float
  p_value: float
  smallest_detectable: float
  problems: int
  left_out: int
  seeds: int

  @property
  def excludes_zero(self) -> bool:
    return self.low > 0 or self.high < 0


def bootstrap_interval(
  values: np.ndarray, *, bounds: Bounds = (-math.inf, math.inf), level: float = 0.95, resamples: int = RESAMPLES,
  seed: int = 0,
) -> Estimate:
  """Returns the mean of values over problems and seeds, with its interval, as the docstring of this module describes.

  Args:
    values: [P], or [S, P] with one row per seed. Problems that are NaN in any seed are left out.
    bounds: the smallest and the largest possible value.
    level: the confidence level of the interval.
    resamples: the number of bootstrap resamples.
    seed: the seed of the resampling. The same seed gives the same result.

  Raises:
    ValueError: no problem is left.
  """
  values_SP = np.atleast_2d(np.asarray(values, np.float64))
  kept_P = ~np.isnan(values_SP).any(0)
  x_SP = values_SP[:, kept_P]
  seeds, problems = x_SP.shape
  if not problems or not seeds:
    raise ValueError(f'no problem has a value in all of {seeds} seeds')
  x_P, mean = x_SP.mean(0), float(x_SP.mean())
  negligible = 1e-12 * max(float(np.abs(x_SP).max()), 1e-300)
  alike = np.ptp(x_P) <= negligible
  problem_limits = _alike_limits(mean, problems, bounds) if alike else _bootstrap_limits(
    x_P, bounds, resamples, seed)
  seed_se = _seed_error(x_SP) if seeds > 1 else 0.0

  def limits(alpha: float) -> tuple[float, float]:
    seed_half = seed_se * _t_quantile(seeds, 1 - alpha / 2) if seeds > 1 else 0.0
    low, high = problem_limits(alpha)
    return mean - math.hypot(mean - low, seed_half), mean + math.hypot(high - mean, seed_half)

  low, high = limits(1 - level)
  z = NormalDist().inv_cdf
  return Estimate(
    mean=mean, low=max(low, bounds[0]), high=min(high, bounds[1]),
    p_value=_p_value(mean, limits, 0.0 if alike else 1 / (resamples + 1)) if abs(mean) > negligible else 1.0,
    smallest_detectable=max(mean - low, high - mean) * (1 + z(0.8) / z(0.5 + level / 2)),
    problems=problems, left_out=len(kept_P) - problems, seeds=seeds)


def _alike_limits(mean: float, problems: int, bounds: Bounds) -> Limits:
  """Returns the confidence interval of the mean over problems, for problems that all have the same value.

  The result is a function alpha -> (low, high), the limits of the 1 - alpha interval. They are Gaffke's limits (see the
  docstring of this module), because the bootstrap can't be used: resamples of equal values have no variance.

  mean: the value of the problems.
  problems: the number of problems.
  """
  def limits(alpha: float) -> tuple[float, float]:
    unseen = 1 - (alpha / 2) ** (1 / problems)  # the largest share of problems that such a set may have missed
    return mean - unseen * (mean - bounds[0]), mean + unseen * (bounds[1] - mean)

  return limits


def _bootstrap_limits(x_P: np.ndarray, bounds: Bounds, resamples: int, seed: int) -> Limits:
  """Returns the interval over problems from the studentized bootstrap, as a function alpha -> (low, high).

  The function returns the ends (low, high) of the 1 - alpha interval. If both `bounds` are finite, the interval never
  extends beyond Gaffke's limits (see the docstring of this module).

  x_P: the value of each problem.
  """
  problems, mean, variance, bounded = len(x_P), x_P.mean(), x_P.var(ddof=1), np.isfinite(bounds).all()
  scale, slope, back = _arcsine(bounds, problems) if bounded else _IDENTITY
  moments_P2 = np.stack([x_P - mean, (x_P - mean) ** 2], 1)
  t_B, low_B, high_B = [], [], []
  draw = _kept_draws if resamples * problems <= _KEPT else _draws
  for times_BP, weight_BP in draw(problems, resamples, seed, bounded):
    moved_B, square_B = (times_BP @ moments_P2 / problems).T
    mean_B, variance_B = mean + moved_B, np.maximum(square_B - moved_B**2, 0) * problems / (problems - 1)
    # Each se* includes the variance of the sample with the weight of one problem. Otherwise, if all but a few problems
    # are alike, a resample without those few would have variance 0, and the interval would be infinite.
    se_B = np.sqrt(((problems - 1) * variance_B + variance) / problems**2)
    t_B.append(np.abs(scale(mean_B) - scale(mean)) / (se_B * slope(mean_B)))
    if bounded:
      total_B, at_bound_B = weight_BP[:, :problems] @ x_P, weight_BP[:, problems]
      weight_B = weight_BP.sum(1)
      low_B.append((total_B + at_bound_B * bounds[0]) / weight_B)
      high_B.append((total_B + at_bound_B * bounds[1]) / weight_B)
  t_B, low_B, high_B = (np.sort(np.concatenate(parts)) if parts else np.array([]) for parts in (t_B, low_B, high_B))
  se = math.sqrt(variance / problems * (1 + SMALL_SET / problems)) * float(slope(mean))

  def limits(alpha: float) -> tuple[float, float]:
    half = se * t_B[_rank(1 - alpha, resamples)]
    low, high = float(back(scale(mean) - half)), float(back(scale(mean) + half))
    if len(low_B):
      low = max(low, float(low_B[resamples - 1 - _rank(1 - alpha / 2, resamples)]))
      high = min(high, float(high_B[_rank(1 - alpha / 2, resamples)]))
    return low, high

  return limits


def _rank(share: float, resamples: int) -> int:
  """Returns the index at which the quantile `share`, in [0, 1], is found in a sorted list of `resamples` values."""
  return min(max(math.ceil(share * (resamples + 1) - 1e-9), 1), resamples) - 1


def _draws(
  problems: int, resamples: int, seed: int, bounded: bool
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
  """Yields the random numbers of the resamples, in chunks of B resamples that fit in memory.

  Yields (times_BP, weight_BP). `times_BP` says how often each problem is in each resample. `weight_BP` [B, P + 1] holds
  the weights of Gaffke's limits, which are proportional to a flat Dirichlet distribution; it is None if `bounded` is
  False.
  """
  rng = np.random.default_rng(seed)
  size = max(1, _CHUNK // problems)
  for start in range(0, resamples, size):
    count = min(size, resamples - start)
    cell_BP = rng.integers(0, problems, (count, problems)) + problems * np.arange(count)[:, None]
    times_BP = np.bincount(cell_BP.ravel(), minlength=count * problems).reshape(count, problems).astype(np.float64)
    yield times_BP, rng.standard_exponential((count, problems + 1)) if bounded else None


@functools.lru_cache(maxsize=2)  # a report asks for many intervals over the same number of problems, one after another
def _kept_draws(*args) -> list[tuple[np.ndarray, np.ndarray | None]]:
  """Returns all that `_draws` yields, and keeps it for the next call."""
  return list(_draws(*args))


_IDENTITY = (lambda x: x, lambda x: np.ones_like(x), lambda x: x)


def _arcsine(bounds: Bounds, problems: int) -> tuple[Callable, Callable, Callable]:
  """Returns the arcsine scale for values between `bounds`, as three functions: the scale, its derivative and its
  inverse.

  The derivative is infinite at a bound. For a value that is closer to a bound than (high - low) / problems, the
  derivative at this distance is therefore used.
  """
  start, width = bounds[0], bounds[1] - bounds[0]
  margin = min(1 / problems, 0.5)

  def scale(x):
    return np.arcsin(np.sqrt(np.clip((x - start) / width, 0, 1)))

  def slope(x):
    u = np.clip((x - start) / width, margin, 1 - margin)
    return 0.5 / np.sqrt(u * (1 - u)) / width

  def back(angle):
    return start + width * np.sin(np.clip(angle, 0, np.pi / 2)) ** 2

  return scale, slope, back


def _seed_error(x_SP: np.ndarray) -> float:
  """Returns the standard error of the mean that is due to differences between seeds alone.

  The noise of problems contributes to the differences between the seeds' means. This contribution is estimated and
  subtracted.
  """
  seeds, problems = x_SP.shape
  mean_S = x_SP.mean(1)
  rest_SP = x_SP - mean_S[:, None] - x_SP.mean(0) + x_SP.mean()
  rest = np.sum(rest_SP**2) / ((seeds - 1) * max(problems - 1, 1)) / (seeds * problems)
  return math.sqrt(max(mean_S.var(ddof=1) / seeds - rest, 0.0))


def _p_value(mean: float, limits: Limits, floor: float) -> float:
  """Returns the smallest alpha >= `floor` whose 1 - alpha interval excludes zero, found by bisection.

  mean: the mean that the intervals contain.
  limits: a function alpha -> limits of the 1 - alpha interval. The intervals must become narrower as alpha rises.
  """
  def excludes_zero(alpha: float) -> bool:
    low, high = limits(alpha)
    return low > 0 if mean > 0 else high < 0

  low, high = 0.0, 1.0
  for _ in range(50):
    middle = (low + high) / 2
    low, high = (low, middle) if excludes_zero(max(middle, 1e-15)) else (middle, high)
  return max(high, floor)


def paired_difference(
  a: np.ndarray, b: np.ndarray, *, bounds: Bounds = (-math.inf, math.inf), level: float = 0.95,
  resamples: int = RESAMPLES, seed: int = 0,
) -> Estimate:
  """Returns the mean of a - b with its interval, for values that are paired by problem and seed.

  a, b: values of the same problems, both [P], or both [S, P] with the same seeds.
  bounds: the smallest and the largest possible difference, such as (-1, 1) for differences of fractions.
  level, resamples, seed: as in `bootstrap_interval`.

  Raises:
    ValueError: the shapes differ, or no problem has a value in all seeds.
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.shape != b.shape:
    raise ValueError(f'the same problems and seeds are needed in both, got shapes {a.shape} and {b.shape}')
  return bootstrap_interval(a - b, bounds=bounds, level=level, resamples=resamples, seed=seed)


def over_seeds(
  values_S: np.ndarray, *, bounds: Bounds = (-math.inf, math.inf), level: float = 0.95
) -> Estimate:
  """Returns the mean of a metric that has one value per seed, with Student's t interval, cut at `bounds`.

  Use this function for metrics without problems to resample, such as a loss. For a single seed, the limits and the
  p-value are NaN. So they are if all seeds have the same value, as happens with shares of few problems: such seeds
  don't show how much others would differ. Only the p-value of zeros is 1.

  values_S: the value of each seed. Values that aren't finite are left out.
  level: the confidence level of the interval.

  Raises:
    ValueError: no seed has a value.
  """
  values_S = np.asarray(values_S, np.float64)
  x_S = values_S[np.isfinite(values_S)]
  if not len(x_S):
    raise ValueError('no seed has a value')
  mean, seeds, z = float(x_S.mean()), len(x_S), NormalDist().inv_cdf
  half = p_value = math.nan
  if seeds > 1:
    if _equal(x_S):
      p_value = math.nan if mean else 1.0
    else:
      se = float(x_S.std(ddof=1)) / math.sqrt(seeds)
      half, p_value = se * _t_quantile(seeds, 0.5 + level / 2), _t_p_value(seeds, mean / se)
  low, high = (float(np.clip(x, *bounds)) for x in (mean - half, mean + half))
  return Estimate(mean, low, high, p_value, half * (1 + z(0.8) / z(0.5 + level / 2)), problems=0,
                  left_out=len(values_S) - seeds, seeds=seeds)


def _equal(values: np.ndarray) -> bool:
  """Returns whether all values are equal, up to rounding."""
  return bool(np.ptp(values) <= _ROUNDING * np.abs(values).max())


def _t_quantile(seeds: int, level: float) -> float:
  """Returns the quantile `level` of Student's t distribution with seeds - 1 degrees of freedom."""
  from scipy.special import stdtrit  # takes 0.4 s to import, and most commands compute no such interval

  return float(stdtrit(seeds - 1, level))


def _t_p_value(seeds: int, t: float) -> float:
  """Returns the two-sided p-value of `t` under Student's t distribution with seeds - 1 degrees of freedom."""
  from scipy.special import stdtr

  return 2 * float(stdtr(seeds - 1, -abs(t)))


@dataclasses.dataclass(frozen=True)
class Noise:
  """The parts of the noise in a metric or a paired difference, as standard deviations.

  The value of a problem in one seed is modelled as the true mean + an effect of the seed + an effect of the problem + a
  remainder. The last two parts are 0 if the metric has one value per run.

  Attributes:
    seed: the standard deviation of the effect of the seed.
    problem: the standard deviation of the effect of the problem.
    rest: the standard deviation of the remainder.
    problems: the number of problems that were used; 0 if the metric has one value per run.
  """

  seed: float
  problem: float = 0.0
  rest: float = 0.0
  problems: int = 0

  def smallest_detectable(self, seeds: int, level: float = 0.95, power: float = 0.8) -> float:
    """Returns how far from zero the true mean must be, to be detected in an experiment with `seeds` seeds and as many
    problems as `self.problems`.

    The mean counts as detected if the interval of `bootstrap_interval` or `over_seeds` excludes zero. The calculation
    assumes enough problems for a normal distribution, and adds a normal quantile for the power to a quantile of
    Student's t. With few seeds, the mean is therefore detected a little less often than `power` says. If all noise is
    between seeds, 0.8 is in truth 0.71 with 2 seeds, 0.74 with 3, 0.76 with 4, 0.77 with 5, and 0.79 with 8 or 10.

    seeds: the number of seeds, at least 2.
    level: the confidence level of the interval.
    power: the wanted probability of detecting the mean.
    """
    z = NormalDist().inv_cdf
    of_problems = math.sqrt((self.problem**2 + self.rest**2 / seeds) / self.problems) if self.problems else 0.0
    of_seeds = self.seed / math.sqrt(seeds)
    half = math.hypot(z(0.5 + level / 2) * of_problems, _t_quantile(seeds, 0.5 + level / 2) * of_seeds)
    return half + z(power) * math.hypot(of_problems, of_seeds)


def noise(values_SP: np.ndarray) -> Noise | None:
  """Divides the noise in values into its parts, by analysis of variance. Returns None if there is only one seed, or no
  problem, or if all values are equal, so that no noise is seen.

  values_SP: one row per seed, and one column per problem; [S, 1] for a metric with one value per run. Problems that are
    NaN in any seed are left out.
  """
  values_SP = np.asarray(values_SP, np.float64)
  x_SP = values_SP[:, ~np.isnan(values_SP).any(0)]
  seeds, problems = x_SP.shape
  if seeds < 2 or not problems or _equal(x_SP):
    return None
  mean_S, mean_P = x_SP.mean(1), x_SP.mean(0)
  if problems == 1:
    return Noise(float(mean_S.std(ddof=1)))
  rest = float(np.sum((x_SP - mean_S[:, None] - mean_P + x_SP.mean())**2)) / ((seeds - 1) * (problems - 1))
  of_seed, of_problem = mean_S.var(ddof=1) - rest / problems, mean_P.var(ddof=1) - rest / seeds
  return Noise(math.sqrt(max(of_seed, 0.0)), math.sqrt(max(of_problem, 0.0)), math.sqrt(rest), problems)


def holm(p_values: np.ndarray) -> np.ndarray:
  """Returns p-values corrected for multiple testing (Holm, Scandinavian Journal of Statistics 6, 1979).

  If only differences with a corrected p-value <= alpha are claimed, the chance of at least one false claim is at most
  alpha, even if the tests depend on each other. A p-value of NaN stays NaN and doesn't count as a test.
  """
  p = np.asarray(p_values, np.float64)
  out = np.full(p.shape, np.nan)
  there = np.flatnonzero(~np.isnan(p))
  order = there[np.argsort(p[there], kind='stable')]
  out[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1.0)
  return out
