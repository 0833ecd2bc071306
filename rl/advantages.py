"""Computes the advantage of each sample relative to the other samples of its prompt.

Every function takes rewards_PG (float32) and valid_PG (bool) and returns float32 [P, G]. Invalid samples (see `rewards`
in rl/rewards.py) are left out of all means and get advantage 0, even if their reward is NaN.

A group has zero variance if fewer than two of its rewards are valid, or if all valid rewards are equal. All samples of
such a group get exactly 0, except in `w_reinforce`, which doesn't compare samples with each other. `pass_at_k` also
gives 0 to all samples of a group with fewer than k wrong answers.

The functions use NumPy, not JAX: the number of groups changes from step to step, and JAX would compile every operation
again for each new shape.

# P prompts  G samples of one prompt (a group)
"""

import dataclasses
import math

import numpy as np

from betarank.configs.settings import default


def grpo(rewards_PG, valid_PG, *, ddof=1, eps=1e-6):
  """Computes how many standard deviations each reward lies above the mean of its group.

      A = (r - mean) / (std + eps)

  ddof: 1 divides the variance by n - 1, as verl, TRL and tunix do; 0 divides it by n. GRPO's paper doesn't say which.

  Source: GRPO, arXiv 2402.03300 sec. 4.1.2.
  """
  centred_PG, n_P1 = _centred(rewards_PG, valid_PG)
  variance_P1 = np.sum(centred_PG**2, -1, keepdims=True) / np.maximum(n_P1 - ddof, 1)
  return centred_PG / (np.sqrt(variance_P1) + eps)


def dr_grpo(rewards_PG, valid_PG):
  """Computes how much each reward exceeds the mean of its group.

      A = r - mean

  Unlike GRPO, Dr. GRPO doesn't divide by the standard deviation, because the division gives more weight to prompts that
  are almost always or almost never solved. Source: Dr. GRPO, arXiv 2503.20783 sec. 3. The paper's second change, the
  aggregation 'constant', is in policy_losses.py.
  """
  return _centred(rewards_PG, valid_PG)[0]


def rloo(rewards_PG, valid_PG):
  """Computes how much each reward exceeds the mean of the other rewards in its group (leave one out).

      A_i = r_i - mean of the others = n / (n - 1) * (r_i - mean)

  Source: RLOO, arXiv 2402.14740.
  """
  centred_PG, n_P1 = _centred(rewards_PG, valid_PG)
  return centred_PG * n_P1 / np.maximum(n_P1 - 1, 1)


def pass_at_k(rewards_PG, valid_PG, *, k=4):
  """Computes advantages for the reward Pass@k of k samples together, which is 1 if at least one of them is right.

      C(n, k)                       the binomial coefficient
      R = 1 - C(W, k) / C(n, k)     the mean of Pass@k, for n valid samples of which W are wrong
      s = sqrt(R (1 - R))           the standard deviation of Pass@k
      A = (1 - R) / s                                   for a right sample
      A = (1 - R - C(W-1, k-1) / C(n-1, k-1)) / s       for a wrong sample

  A reward above 0.5 counts as right. If W < k, any k samples include a right one, so s = 0 and all advantages are 0.
  With k = 1 this is `grpo` with ddof=0 and eps=0. Source: Pass@k Training, arXiv 2508.10751, analytical derivation.
  """
  right_PG = valid_PG & (np.where(valid_PG, rewards_PG, 0) > 0.5)
  n_P1 = np.sum(valid_PG, -1, keepdims=True, dtype=np.float32)
  wrong_P1 = n_P1 - np.sum(right_PG, -1, keepdims=True, dtype=np.float32)

  def all_wrong(wrong, n, k):  # C(wrong, k) / C(n, k)
    ratios = (np.maximum(wrong - j, 0) / np.maximum(n - j, 1) for j in range(k))
    return math.prod(ratios, start=np.ones_like(n))

  miss_P1 = all_wrong(wrong_P1, n_P1, k)  # 1 - R
  std_P1 = np.sqrt(miss_P1 * (1 - miss_P1))
  advantage_PG = miss_P1 - np.where(right_PG, 0, all_wrong(wrong_P1 - 1, n_P1 - 1, k - 1))
  live_PG = valid_PG & (wrong_P1 >= k) & (wrong_P1 < n_P1) & (n_P1 >= 2)
  return np.where(live_PG, advantage_PG / np.where(std_P1 > 0, std_P1, 1), 0)


def w_reinforce(rewards_PG, valid_PG, *, positive_weight=0.1):
  """Gives every right sample the advantage `positive_weight`, and every wrong sample the advantage -1.

  A sample's advantage doesn't depend on the other samples of its group. A reward above 0.5 counts as right. With
  positive_weight=0, only wrong samples have an effect (the paper's NSR). Source: Weighted-REINFORCE, arXiv 2506.01347
  sec. 5, which uses the weight 0.1.
  """
  right_PG = np.where(valid_PG, rewards_PG, 0) > 0.5
  return np.where(valid_PG, np.where(right_PG, np.float32(positive_weight), -1), 0)


ADVANTAGES = {
  'grpo': grpo, 'dr_grpo': dr_grpo, 'rloo': rloo, 'pass_at_k': pass_at_k, 'w_reinforce': w_reinforce,
}


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
  """Section `rl.advantage`: the name of the advantage function, and its parameters.

  Each function uses only its own parameters. configs/settings.py describes each field.
  """

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


def advantages(c: AdvantageConfig, rewards_PG: np.ndarray, valid_PG: np.ndarray) -> np.ndarray:
  """Returns the advantages of P groups of G samples, float32 [P, G], from the function that `c` names.

  Raises:
    ValueError: the arrays don't have the same shape [P, G], or a group has too few samples. pass_at_k needs at least 2
      and at least k samples, w_reinforce needs 1, and the other functions need 2.
  """
  rewards_PG, valid_PG = np.asarray(rewards_PG, np.float32), np.asarray(valid_PG, bool)
  if rewards_PG.ndim != 2 or rewards_PG.shape != valid_PG.shape:
    raise ValueError(f'rewards and valid must both be [P, G], got {rewards_PG.shape} and {valid_PG.shape}')
  needed = {'w_reinforce': 1, 'pass_at_k': max(2, c.k)}.get(c.name, 2)
  if rewards_PG.shape[1] < needed:
    raise ValueError(f'rewards: {c.name} needs groups of {needed} samples, got {rewards_PG.shape[1]}')
  options = {
    'grpo': {'ddof': c.ddof}, 'pass_at_k': {'k': c.k}, 'w_reinforce': {'positive_weight': c.positive_weight},
  }
  return ADVANTAGES[c.name](rewards_PG, valid_PG, **options.get(c.name, {}))


def has_reward_variance(rewards_PG: np.ndarray, valid_PG: np.ndarray) -> np.ndarray:
  """Returns bool [P], one entry per group: True if the group's valid rewards differ.

  Dynamic sampling keeps only these groups (DAPO, arXiv 2503.14476 sec. 3.2).
  """
  high_P = np.max(rewards_PG, -1, where=valid_PG, initial=-np.inf)
  low_P = np.min(rewards_PG, -1, where=valid_PG, initial=np.inf)
  return high_P > low_P


def _centred(rewards_PG, valid_PG):
  """Returns (each reward minus the mean of its group, the number of valid samples per group [P, 1]), both float32.

  The difference is exactly 0 for invalid samples and for zero-variance groups. To find such groups, the function
  compares the rewards themselves, because the computed mean of equal numbers can differ from them by a rounding error.
  Divided by a standard deviation near 0, this error would give advantages of about 1.
  """
  n_P1 = np.sum(valid_PG, -1, keepdims=True, dtype=np.float32)
  mean_P1 = np.sum(rewards_PG, -1, keepdims=True, where=valid_PG) / np.maximum(n_P1, 1)
  return np.where(valid_PG & has_reward_variance(rewards_PG, valid_PG)[:, None], rewards_PG - mean_P1, 0), n_P1
