"""Computes the advantage of each sample over its group: ten-line pure functions, each with its source.

All take rewards_PG float32 and valid_PG bool: samples whose verdict is undecided are not valid. They count in
no mean and get advantage 0; NaN in their place does no harm. A group whose valid rewards are all equal, or
with fewer than two of them, holds no comparison and gets exactly 0. `w_reinforce` alone compares nothing, so
there a group that agrees keeps its signal.
"""
# P prompts  G samples of one prompt (a group)

import dataclasses
import math

import jax
import jax.numpy as jnp

from betarank.configs.settings import default


def grpo(rewards_PG, valid_PG, *, ddof=1, eps=1e-6):
  """A = (r - mean) / (std + eps) of the group. Source: GRPO, arXiv 2402.03300 sec. 4.1.2.

  The paper doesn't say which std. ddof=1 divides by n - 1 as verl, TRL and tunix do, ddof=0 by n.
  """
  centred_PG, n_P1 = _centred(rewards_PG, valid_PG)
  variance_P1 = jnp.sum(centred_PG**2, -1, keepdims=True) / jnp.maximum(n_P1 - ddof, 1)
  return centred_PG / (jnp.sqrt(variance_P1) + eps)


def dr_grpo(rewards_PG, valid_PG):
  """A = r - mean of the group: no division by std, which favours prompts of extreme pass rate.

  Source: Dr. GRPO, arXiv 2503.20783 sec. 3. Its other half is policy_losses' 'constant' aggregation.
  """
  return _centred(rewards_PG, valid_PG)[0]


def rloo(rewards_PG, valid_PG):
  """A_i = r_i - mean of the others = n / (n - 1) * (r_i - mean). Source: RLOO, arXiv 2402.14740."""
  centred_PG, n_P1 = _centred(rewards_PG, valid_PG)
  return centred_PG * n_P1 / jnp.maximum(n_P1 - 1, 1)


def pass_at_k(rewards_PG, valid_PG, *, k=4):
  """Returns the advantage for the joint reward of k samples, which is right if at least one of the k samples is right.

      R = 1 - C(W, k) / C(n, k),  s = sqrt(R (1 - R))       W wrong ones of n: the mean and std of Pass@k
      right: A = (1 - R) / s      wrong: A = (1 - R - C(W-1, k-1) / C(n-1, k-1)) / s

  Rewards count as right above 0.5. With W < k every k samples hold a right one: s = 0, and A is 0. k = 1 is
  `grpo` with ddof=0, eps=0. Source: Pass@k Training, arXiv 2508.10751, analytical derivation.
  """
  right_PG = valid_PG & (jnp.where(valid_PG, rewards_PG, 0) > 0.5)
  n_P1 = jnp.sum(valid_PG, -1, keepdims=True, dtype=jnp.float32)
  wrong_P1 = n_P1 - jnp.sum(right_PG, -1, keepdims=True, dtype=jnp.float32)

  def all_wrong(wrong, n, k):  # C(wrong, k) / C(n, k)
    ratios = (jnp.maximum(wrong - j, 0) / jnp.maximum(n - j, 1) for j in range(k))
    return math.prod(ratios, start=jnp.ones_like(n))

  miss_P1 = all_wrong(wrong_P1, n_P1, k)  # 1 - R
  std_P1 = jnp.sqrt(miss_P1 * (1 - miss_P1))
  advantage_PG = miss_P1 - jnp.where(right_PG, 0, all_wrong(wrong_P1 - 1, n_P1 - 1, k - 1))
  live_PG = valid_PG & (wrong_P1 >= k) & (wrong_P1 < n_P1) & (n_P1 >= 2)
  return jnp.where(live_PG, advantage_PG / jnp.where(std_P1 > 0, std_P1, 1), 0)


def w_reinforce(rewards_PG, valid_PG, *, positive_weight=0.1):
  """A = positive_weight for a right sample, -1 for a wrong one, whatever its siblings are.

  positive_weight=0 is negative reinforcement alone (NSR). Rewards count as right above 0.5. Source: Weighted-
  REINFORCE, arXiv 2506.01347 sec. 5, where the weight is 0.1.
  """
  right_PG = jnp.where(valid_PG, rewards_PG, 0) > 0.5
  return jnp.where(valid_PG, jnp.where(right_PG, jnp.float32(positive_weight), -1), 0)


ADVANTAGES = {
  'grpo': grpo, 'dr_grpo': dr_grpo, 'rloo': rloo, 'pass_at_k': pass_at_k, 'w_reinforce': w_reinforce,
}


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
  """The name of the advantage, and the parameters that some advantages have."""

  name: str = default('rl.advantage.name')
  ddof: int = default('rl.advantage.ddof')
  k: int = default('rl.advantage.k')
  positive_weight: float = default('rl.advantage.positive_weight')

  def __post_init__(self):
    if self.name not in ADVANTAGES:
      raise ValueError(f'name must be one of {", ".join(ADVANTAGES)}, got {self.name!r}')
    if self.ddof not in (0, 1):
      raise ValueError(f'ddof must be 0 or 1, got {self.ddof}')
    if self.k < 1:
      raise ValueError(f'k must be positive, got {self.k}')
    if not 0 <= self.positive_weight < float('inf'):
      raise ValueError(f'positive_weight must be >= 0, got {self.positive_weight}')


def advantages(c: AdvantageConfig, rewards_PG: jax.Array, valid_PG: jax.Array) -> jax.Array:
  """Returns float32 [P, G], as `c` says. Raises ValueError if the shapes aren't equal [P, G], or if G < 2 or G < k."""
  rewards_PG, valid_PG = jnp.asarray(rewards_PG, jnp.float32), jnp.asarray(valid_PG, bool)
  if rewards_PG.ndim != 2 or rewards_PG.shape != valid_PG.shape:
    raise ValueError(f'rewards and valid must both be [P, G], got {rewards_PG.shape} and {valid_PG.shape}')
  needed = {'w_reinforce': 1, 'pass_at_k': max(2, c.k)}.get(c.name, 2)
  if rewards_PG.shape[1] < needed:
    raise ValueError(f'rewards: {c.name} needs groups of {needed} samples, got {rewards_PG.shape[1]}')
  options = {
    'grpo': {'ddof': c.ddof}, 'pass_at_k': {'k': c.k}, 'w_reinforce': {'positive_weight': c.positive_weight},
  }
  return ADVANTAGES[c.name](rewards_PG, valid_PG, **options.get(c.name, {}))


def has_reward_variance(rewards_PG: jax.Array, valid_PG: jax.Array) -> jax.Array:
  """Returns bool [P]: True if the group's valid rewards differ. Dynamic sampling keeps only these groups (DAPO,
  arXiv 2503.14476 sec. 3.2).
  """
  high_P = jnp.max(rewards_PG, -1, where=valid_PG, initial=-jnp.inf)
  low_P = jnp.min(rewards_PG, -1, where=valid_PG, initial=jnp.inf)
  return high_P > low_P


def _centred(rewards_PG, valid_PG):
  """Returns (rewards minus their group's mean, n [P, 1] float32); 0 for invalid samples and groups without signal.

  Groups without signal are found by comparing rewards, because the mean of equal numbers can differ from them by
  rounding, and dividing that difference by a std near 0 would make noise of size one.
  """
  n_P1 = jnp.sum(valid_PG, -1, keepdims=True, dtype=jnp.float32)
  mean_P1 = jnp.sum(rewards_PG, -1, keepdims=True, where=valid_PG) / jnp.maximum(n_P1, 1)
  return jnp.where(valid_PG & has_reward_variance(rewards_PG, valid_PG)[:, None], rewards_PG - mean_P1, 0), n_P1
