"""Computes the token losses of policy-gradient RL. All functions are pure; gradients flow through `logp_BT` only.

The loss of a batch is computed in this order:

    loss of each token, times truncated importance weight, plus KL term -> (total, count) -> total / count

A row holds samples one after the other, which segments_BT numbers from 1; 0 is padding. mask_BT is True at sampled
tokens, including the end-of-text token. It is False at prompts and at padding. Values outside the mask, even NaN,
change neither the loss nor its gradient. The trainer computes all its log-probabilities with the same function
(objectives.shaped_linear_loss), at the sampling temperature. All floats are float32, and log-probabilities are in nats.

Sums and counts are returned separately and divided once at the end, so the result doesn't depend on which rows the
samples are in, nor on microbatches, padding or the number of devices.

# B rows  T tokens  pi, pi_old the policy now and when the samples were drawn  r = pi / pi_old  A advantage
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient as sg

from betarank.configs.settings import default

_MOST_LOG_RATIO = 20.0  # e^20 is far outside every clip range, and its square is still finite


class TokenLoss(NamedTuple):
  """The loss of each token. All arrays are [B, T]. Outside the mask they are 0 or False.

  Attributes:
    loss_BT: float32, the loss to minimize.
    ratio_BT: float32 without gradient, the token's ratio pi / pi_old. In gspo, it is the ratio of the whole sample.
    clipped_BT: bool, True if clipping changed this token's gradient.
  """

  loss_BT: jax.Array
  ratio_BT: jax.Array
  clipped_BT: jax.Array


def clip_higher(logp_BT, old_logp_BT, advantages_BT, mask_BT, *, eps_low=0.2, eps_high=0.28, dual_clip=0.0):
  """Computes PPO's clipped loss, with separate limits for the ratio below and above 1.

      L = -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A),   r = exp(logp - old_logp)

  A wider upper limit lets unlikely tokens gain probability faster. With eps_low = eps_high this is PPO (arXiv
  1707.06347 eq. 7). If old_logp = logp, the gradient is that of REINFORCE. Source: DAPO, arXiv 2503.14476 sec. 3.1.

  dual_clip: limits the loss of a token with A < 0 whose probability has grown a lot, so that the token can't dominate
    the batch. Where r > dual_clip, the loss is -dual_clip A and has no gradient. 0 means no limit. Source: arXiv
    1912.09729 sec. 3.3.
  """
  logp_BT, old_logp_BT, advantages_BT = _at_mask(mask_BT, logp_BT, old_logp_BT, advantages_BT)
  return _clipped(_ratio(logp_BT, old_logp_BT), advantages_BT, mask_BT, eps_low, eps_high, dual_clip)


def cispo(logp_BT, old_logp_BT, advantages_BT, mask_BT, *, eps_low=1.0, eps_high=4.0):
  """Computes a REINFORCE loss with a clipped importance weight. Unlike in PPO, clipped tokens keep a gradient.

      L = -sg(clip(r, 1 - eps_low, 1 + eps_high)) A logp,   r = exp(logp - old_logp)

  sg stops the gradient. eps_low = 1 means no lower limit, as in the source. The source doesn't give eps_high; the
  default limits the weight to 5, the value that ScaleRL (arXiv 2510.13786) chose. Source: CISPO in MiniMax-M1, arXiv
  2506.13585 sec. 3.1.
  """
  logp_BT, old_logp_BT, advantages_BT = _at_mask(mask_BT, logp_BT, old_logp_BT, advantages_BT)
  ratio_BT = sg(_ratio(logp_BT, old_logp_BT))
  weight_BT = jnp.clip(ratio_BT, 1 - eps_low, 1 + eps_high)
  return _token_loss(-weight_BT * advantages_BT * logp_BT, ratio_BT, weight_BT != ratio_BT, mask_BT)


def gspo(logp_BT, old_logp_BT, advantages_BT, mask_BT, *, eps_low=3e-4, eps_high=4e-4, segments_BT=None):
  """Computes PPO's clipped loss with one ratio per sequence, the geometric mean of its tokens' ratios.

      s = exp(mean_t(logp - old_logp)),   s_t = sg(s) exp(logp - sg(logp))
      L_t = -min(s_t A, clip(s_t, 1 - eps_low, 1 + eps_high) A)

  sg stops the gradient. s_t therefore has the value of s, but its gradient comes only from token t. The mean of L_t
  over a sample (aggregation 'sequence_mean') has the gradient of -min(s A, clip(s) A). Source: GSPO, arXiv 2507.18071:
  sec. 4.1, in the token form of sec. 4.3, with the limits of sec. 5.1 as defaults.
  """
  logp_BT, old_logp_BT, advantages_BT = _at_mask(mask_BT, logp_BT, old_logp_BT, advantages_BT)
  tokens_BT = jnp.maximum(_of_sample(mask_BT.astype(jnp.int32), segments_BT), 1)
  mean_BT = _of_sample(sg(logp_BT - old_logp_BT), segments_BT) / tokens_BT
  # The product of two exp, because inside one exp a mean of 1e-4 would be lost to the rounding of logp.
  ratio_BT = _ratio(mean_BT, 0.0) * jnp.exp(logp_BT - sg(logp_BT))
  return _clipped(ratio_BT, advantages_BT, mask_BT, eps_low, eps_high)


POLICY_LOSSES = {'clip_higher': clip_higher, 'cispo': cispo, 'gspo': gspo}


def _at_mask(mask_BT, *arrays):
  """Returns the arrays as float32, with 0 outside the mask.

  This function must be called before any arithmetic, because NaN times 0 is NaN, in gradients too.
  """
  return tuple(jnp.where(mask_BT, jnp.asarray(array, jnp.float32), 0) for array in arrays)


def _ratio(logp_BT, old_logp_BT):
  return jnp.exp(jnp.clip(logp_BT - sg(old_logp_BT), -_MOST_LOG_RATIO, _MOST_LOG_RATIO))


def _so_far(x_BT, segments_BT, reverse=False):
  """Returns, for each token, the sum of x from the first token of its sample to this token.

  The sums are computed by a scan. Scatter-adds would have no fixed order on a GPU. Differences between cumulative sums
  over the row would be inaccurate for short samples.

  reverse: sums from this token to the last token of its sample instead.
  """
  if segments_BT is None:
    segments_BT = jnp.zeros(x_BT.shape, jnp.int32)
  change_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
  starts_BT = jnp.pad(change_BT, ((0, 0), (0, 1) if reverse else (1, 0)), constant_values=True)

  def join(a, b):
    (sum_a, starts_a), (sum_b, starts_b) = a, b
    return jnp.where(starts_b, sum_b, sum_a + sum_b), starts_a | starts_b

  return jax.lax.associative_scan(join, (x_BT, starts_BT), reverse=reverse, axis=1)[0]


def _of_sample(x_BT, segments_BT):
  """Returns, for each token, the sum of x over all tokens of its sample, [B, T]."""
  return _so_far(x_BT, segments_BT) + _so_far(x_BT, segments_BT, reverse=True) - x_BT


def _clipped(ratio_BT, advantages_BT, mask_BT, eps_low, eps_high, dual_clip=0.0):
  plain_BT = -ratio_BT * advantages_BT
  clipped_BT = -jnp.clip(ratio_BT, 1 - eps_low, 1 + eps_high) * advantages_BT
  # jnp.maximum would halve the gradient at a tie, for example at a ratio of exactly 1.
  is_clipped_BT = clipped_BT > plain_BT
  loss_BT = jnp.where(is_clipped_BT, sg(clipped_BT), plain_BT)
  if dual_clip:
    is_beyond_BT = (advantages_BT < 0) & (ratio_BT > dual_clip)
    loss_BT = jnp.where(is_beyond_BT, -dual_clip * advantages_BT, loss_BT)
    is_clipped_BT |= is_beyond_BT
  return _token_loss(loss_BT, ratio_BT, is_clipped_BT, mask_BT)


def _token_loss(loss_BT, ratio_BT, clipped_BT, mask_BT):
  return TokenLoss(jnp.where(mask_BT, loss_BT, 0), sg(jnp.where(mask_BT, ratio_BT, 0)), clipped_BT & mask_BT)


def truncated_importance_weight(old_logp_BT, sampler_logp_BT, mask_BT, *, cap=2.0):
  """Returns min(pi_old / pi_sampler, cap) per token, float32 [B, T], without a gradient, 0 outside the mask.

  The weight corrects for numerical differences between sampler and trainer, which exist even if both have the same
  weights. The default cap is also the default of verl's rollout correction. Source: "Your Efficient RL Framework
  Secretly Brings You Off-Policy RL Training", F. Yao et al. 2025.
  """
  old_logp_BT, sampler_logp_BT = _at_mask(mask_BT, old_logp_BT, sampler_logp_BT)
  return sg(jnp.where(mask_BT, jnp.minimum(_ratio(old_logp_BT, sampler_logp_BT), cap), 0))


# Three estimators of KL(pi || ref) from samples of pi. Each returns float32 [B, T], 0 outside the mask.
# d = logp - ref_logp. Sources: J. Schulman, "Approximating KL Divergence"; for the gradients, arXiv 2506.09477.


def kl_k1(logp_BT, ref_logp_BT, mask_BT):
  """Estimates KL(pi || ref) as d = logp - ref_logp, which is unbiased but can be negative.

  Use this estimate for logging only. As a loss, its gradient has mean 0, so it would only add noise.
  """
  logp_BT, ref_logp_BT = _at_mask(mask_BT, logp_BT, ref_logp_BT)
  return logp_BT - sg(ref_logp_BT)


def kl_k2(logp_BT, ref_logp_BT, mask_BT):
  """Estimates KL(pi || ref) as d^2 / 2 with d = logp - ref_logp, which is biased.

  Use this estimate as a loss: on-policy, its expected gradient is the gradient of KL(pi || ref).
  """
  return 0.5 * kl_k1(logp_BT, ref_logp_BT, mask_BT) ** 2


def kl_k3(logp_BT, ref_logp_BT, mask_BT):
  """Estimates KL(pi || ref) as exp(-d) - 1 + d with d = logp - ref_logp, which is unbiased and never negative.

  As a loss, its expected gradient is the gradient of the reverse divergence, KL(ref || pi).
  """
  d_BT = kl_k1(logp_BT, ref_logp_BT, mask_BT)
  return jnp.expm1(-jnp.clip(d_BT, -_MOST_LOG_RATIO, _MOST_LOG_RATIO)) + d_BT


KL_ESTIMATORS = {'k1': kl_k1, 'k2': kl_k2, 'k3': kl_k3}


# Clip-Cov and KL-Cov select the tokens that lower the entropy most. They select from the whole batch at once, by the
# old log-probabilities, so the number of microbatches doesn't change the selection. The authors' code selects from each
# microbatch by the current log-probabilities, which differ from the old ones after the first update of a step. Source:
# arXiv 2505.22617 sec. 4.2.


def token_covariance(old_logp_BT, advantages_BT, mask_BT):
  """Returns each token's contribution to the covariance of log-probability and advantage, float32 [B, T].

  The contribution is (logp - mean logp) (A - mean A), with means over all tokens in the mask. It is 0 outside the mask.
  """
  logp_BT, advantages_BT = sg(_at_mask(mask_BT, old_logp_BT, advantages_BT))
  tokens = jnp.maximum(jnp.sum(mask_BT), 1)
  covariance_BT = (logp_BT - logp_BT.sum() / tokens) * (advantages_BT - advantages_BT.sum() / tokens)
  return jnp.where(mask_BT, covariance_BT, 0)


def clip_cov_tokens(old_logp_BT, advantages_BT, mask_BT, noise_BT, *, share=2e-4, low=1.0, high=5.0):
  """Selects the tokens that Clip-Cov removes from the gradient. Returns bool [B, T].

  The tokens are drawn at random from the candidates. A token is a candidate if its covariance (`token_covariance`) lies
  between `low` and `high`.

  Args:
    old_logp_BT, advantages_BT, mask_BT: as in `policy_loss`.
    noise_BT: float [B, T] in [0, 1), drawn by the caller. The candidates with the lowest noise are selected.
    share: the largest number of selected tokens, divided by the number of all tokens. At least one token is selected if
      there is a candidate.
    low, high: the limits of the covariance. A token at a limit is no candidate.
  """
  covariance_BT = token_covariance(old_logp_BT, advantages_BT, mask_BT)
  candidates_BT = mask_BT & (covariance_BT > low) & (covariance_BT < high)
  return _highest(-noise_BT, candidates_BT, jnp.sum(mask_BT), share)


def kl_cov_tokens(old_logp_BT, advantages_BT, mask_BT, *, share=2e-4):
  """Selects the tokens that get KL-Cov's penalty, those with the highest `token_covariance`. Returns bool [B, T].

  With KL-Cov, no ratio is clipped, at whatever token:

      L = -r A + kl_cov_weight |logp - old_logp|   at the selected tokens
      L = -r A                                     at all others

  share: the number of selected tokens, divided by the number of tokens in the mask. At least one token is selected.
  """
  return _highest(token_covariance(old_logp_BT, advantages_BT, mask_BT), mask_BT, jnp.sum(mask_BT), share)


def _highest(score_BT, candidates_BT, tokens, share):
  """Selects the max(1, floor(share * tokens)) candidates with the highest score. Returns bool [B, T].

  If several candidates tie for the last place, all of them are selected.
  """
  score_BT = jnp.where(candidates_BT, score_BT, -jnp.inf)
  k = jnp.maximum(jnp.floor(share * tokens).astype(jnp.int32), 1)
  return candidates_BT & (score_BT >= jnp.sort(score_BT.reshape(-1))[-k])


AGGREGATIONS = ('token_mean', 'sequence_mean', 'constant')


def aggregate(loss_BT, mask_BT, aggregation='token_mean', *, constant=1, segments_BT=None):
  """Sums the token losses of a batch, with the weights that `aggregation` gives to tokens.

  Args:
    loss_BT, mask_BT, segments_BT: [B, T], as in `policy_loss`.
    aggregation: one of
      'token_mean': every token of the batch has the same weight (DAPO, arXiv 2503.14476 sec. 3.3).
      'sequence_mean': every sample has the same weight, so each of its tokens has the weight 1 / length (GRPO). This
        favours right answers that are short.
      'constant': the sum over a sample's tokens is divided by `constant`, not by the sample's length (Dr. GRPO, arXiv
        2503.20783).
    constant: the number of tokens for the aggregation 'constant'.

  Returns (total, count): a float32 sum, and the int32 number to divide it by. Add the totals and the counts over
  microbatches, then divide once. A sample without a token in the mask adds nothing to the total or the count.
  """
  loss_BT = jnp.where(mask_BT, loss_BT, 0)
  if aggregation == 'token_mean':
    return jnp.sum(loss_BT), jnp.sum(mask_BT, dtype=jnp.int32)
  ones_BT = mask_BT.astype(jnp.int32)
  divisor_BT = jnp.maximum(_of_sample(ones_BT, segments_BT), 1) if aggregation == 'sequence_mean' else constant
  first_BT = mask_BT & (_so_far(ones_BT, segments_BT) == 1)
  return jnp.sum(loss_BT / divisor_BT), jnp.sum(first_BT, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class PolicyLossConfig:
  """Section `rl.loss`: the name of the loss, and its parameters.

  A default is the value that the paper (arXiv 2512.22955) states or, if it states none, DAPO's value.
  configs/settings.py describes each field.
  """

  name: str = default('rl.loss.name')
  eps_low: float = default('rl.loss.eps_low')
  eps_high: float = default('rl.loss.eps_high')
  dual_clip: float = default('rl.loss.dual_clip')
  aggregation: str = default('rl.loss.aggregation')
  constant: int = default('rl.loss.constant')
  importance_cap: float = default('rl.loss.importance_cap')
  kl: str = default('rl.loss.kl')
  kl_weight: float = default('rl.loss.kl_weight')
  cov: str = default('rl.loss.cov')
  cov_share: float = default('rl.loss.cov_share')
  kl_cov_weight: float = default('rl.loss.kl_cov_weight')

  def __post_init__(self):
    if self.name not in POLICY_LOSSES:
      raise ValueError(f'name must be one of {", ".join(POLICY_LOSSES)}, got {self.name!r}')
    if not 0 <= self.eps_low <= 1:
      raise ValueError(f'eps_low must be in [0, 1], got {self.eps_low}')
    if not 0 <= self.eps_high < math.inf:
      raise ValueError(f'eps_high must be >= 0, got {self.eps_high}')
    if self.dual_clip and not (self.name == 'clip_higher' and 1 + self.eps_high <= self.dual_clip < math.inf):
      raise ValueError(f'dual_clip must be 0, or at least 1 + eps_high with name = clip_higher, got {self.dual_clip}')
    if self.dual_clip and self.cov == 'kl_cov':
      raise ValueError(f'dual_clip must be 0 with cov = kl_cov, which clips nothing, got {self.dual_clip}')
    if self.cov != 'kl_cov':  # the defaults are those of clip_higher
      if self.name == 'cispo' and self.eps_low < 0.5:  # it only limits large weights
        raise ValueError(f'eps_low must be large for cispo (published: 1), got {self.eps_low}')
      for name in ('eps_low', 'eps_high'):
        if self.name == 'gspo' and getattr(self, name) > 0.05:  # its ratio, a geometric mean, stays near 1
          raise ValueError(f'{name} must be small for gspo (its paper: 3e-4, 4e-4), got {getattr(self, name)}')
    if self.aggregation not in AGGREGATIONS:
      raise ValueError(f'aggregation must be one of {", ".join(AGGREGATIONS)}, got {self.aggregation!r}')
    if self.aggregation == 'constant' and self.constant < 1:
      raise ValueError(f"constant must be a number of tokens for aggregation 'constant', got {self.constant}")
    if not (self.importance_cap == 0 or 1 <= self.importance_cap < math.inf):
      raise ValueError(f'importance_cap must be 0 or at least 1, got {self.importance_cap}')
    if self.kl not in KL_ESTIMATORS:
      raise ValueError(f'kl must be one of {", ".join(KL_ESTIMATORS)}, got {self.kl!r}')
    if self.kl == 'k1' and self.kl_weight:
      raise ValueError('kl must be k2 or k3 with a kl_weight: the gradient of k1 has mean 0')
    for name in ('kl_weight', 'kl_cov_weight'):
      if not 0 <= getattr(self, name) < math.inf:
        raise ValueError(f'{name} must be >= 0, got {getattr(self, name)}')
    if self.cov not in ('', 'clip_cov', 'kl_cov'):
      raise ValueError(f"cov must be clip_cov, kl_cov or '', got {self.cov!r}")
    if not 0 < self.cov_share <= 1:
      raise ValueError(f'cov_share must be in (0, 1], got {self.cov_share}')


def policy_loss(
  c: PolicyLossConfig, logp_BT, old_logp_BT, advantages_BT, mask_BT, *,
  segments_BT=None, sampler_logp_BT=None, ref_logp_BT=None, cov_tokens_BT=None,
):
  """Computes the loss that `c` describes, with all its terms.

  Args:
    c: the loss and its parameters.
    logp_BT: [B, T] float, log-probabilities of the current policy; gradients flow through them.
    old_logp_BT: [B, T] float, the trainer's log-probabilities at the weights that drew the samples. On-policy, pass
      `stop_gradient(logp_BT)`.
    advantages_BT: float, of shape [B, T] or [B, 1].
    mask_BT: [B, T] bool.
    segments_BT: [B, T] int32, numbers the samples of a row: 1, 2, ..., and 0 for padding. None if each row is one
      sample.
    sampler_logp_BT: [B, T] float, log-probabilities computed by the sampler. None means that no importance weight is
      applied, and that the difference between sampler and trainer isn't measured.
    ref_logp_BT: [B, T] float, log-probabilities of the KL reference. Required if c.kl_weight > 0.
    cov_tokens_BT: [B, T] bool, from `clip_cov_tokens` or `kl_cov_tokens` of the whole batch. Required if c.cov is set.

  Returns (total, count, sums). The loss is total / count (see `aggregate`). `means` turns sums into figures to log.

  Raises:
    ValueError: an array that `c` requires is missing, or an array has the wrong shape.
  """
  shapes = {'logp_BT': logp_BT, 'old_logp_BT': old_logp_BT, 'sampler_logp_BT': sampler_logp_BT,
            'ref_logp_BT': ref_logp_BT, 'cov_tokens_BT': cov_tokens_BT, 'segments_BT': segments_BT}
  _check_shapes(jnp.shape(mask_BT), advantages_BT, shapes)
  if c.kl_weight and ref_logp_BT is None:
    raise ValueError('ref_logp_BT must be given with a kl_weight')
  if c.cov and cov_tokens_BT is None:
    raise ValueError('cov_tokens_BT must be given with cov')
  old_logp_BT, mask_BT = sg(old_logp_BT), jnp.asarray(mask_BT, bool)
  options = {'dual_clip': c.dual_clip} if c.dual_clip else {'segments_BT': segments_BT} if c.name == 'gspo' else {}
  eps_low, eps_high = (1.0, math.inf) if c.cov == 'kl_cov' else (c.eps_low, c.eps_high)  # KL-Cov clips nothing
  token = POLICY_LOSSES[c.name](
    logp_BT, old_logp_BT, advantages_BT, mask_BT, eps_low=eps_low, eps_high=eps_high, **options)
  loss_BT = token.loss_BT
  token_ratio_BT = _ratio(*_at_mask(mask_BT, logp_BT, old_logp_BT))
  if c.cov:
    cov_tokens_BT &= mask_BT
  if c.cov == 'clip_cov':
    loss_BT = jnp.where(cov_tokens_BT, sg(loss_BT), loss_BT)
  elif c.cov == 'kl_cov':
    loss_BT += c.kl_cov_weight * jnp.where(cov_tokens_BT, jnp.abs(kl_k1(logp_BT, old_logp_BT, mask_BT)), 0)
  sums = {
    'ratio': jnp.sum(token.ratio_BT),
    'clipped': jnp.sum(token.clipped_BT, dtype=jnp.int32),
    'tokens': jnp.sum(mask_BT, dtype=jnp.int32),
  }
  if c.cov:
    sums['cov_tokens'] = jnp.sum(cov_tokens_BT, dtype=jnp.int32)
  if sampler_logp_BT is not None:
    gap_BT = sg(jnp.where(mask_BT, jnp.abs(_ratio(*_at_mask(mask_BT, old_logp_BT, sampler_logp_BT)) - 1), 0))
    sums |= {'gap': jnp.sum(gap_BT), 'gap_max': jnp.max(gap_BT)}
    if c.importance_cap:
      weight_BT = truncated_importance_weight(old_logp_BT, sampler_logp_BT, mask_BT, cap=c.importance_cap)
      loss_BT *= weight_BT
      sums |= {'weight': jnp.sum(weight_BT), 'weight_squared': jnp.sum(weight_BT**2)}
  if c.kl_weight:
    kl_BT = KL_ESTIMATORS[c.kl](logp_BT, ref_logp_BT, mask_BT)
    # The samples were drawn by the old policy, so the estimate needs an importance weight. On-policy it is 1.
    loss_BT += c.kl_weight * sg(token_ratio_BT) * kl_BT
    sums['kl'] = sg(jnp.sum(kl_BT))
  return *aggregate(loss_BT, mask_BT, c.aggregation, constant=c.constant, segments_BT=segments_BT), sums


def _check_shapes(shape, advantages_BT, arrays):
  """Raises ValueError if an array doesn't have the mask's shape [B, T]. Advantages may also be [B, 1].

  Without this check, an array of another shape could be broadcast silently.
  """
  if len(shape) != 2:
    raise ValueError(f'mask_BT must be [B, T], got {shape}')
  if jnp.shape(advantages_BT) not in (shape, (shape[0], 1)):
    raise ValueError(f'advantages_BT must be {shape} or {(shape[0], 1)}, got {jnp.shape(advantages_BT)}')
  for name, array in arrays.items():
    if array is not None and jnp.shape(array) != shape:
      raise ValueError(f'{name} must be {shape}, as mask_BT is, got {jnp.shape(array)}')


def add(a, b):
  """Adds the sums of two parts of a batch, on the host. Returns {name: sum}.

  If a name ends in `_max`, its value in the result is the larger of the two values.

  a, b: the sums of each part, {name: sum}.
  """
  return {name: np.maximum(a[name], b[name]) if name.endswith('_max') else a[name] + b[name] for name in a}


def means(c: PolicyLossConfig, sums) -> dict[str, np.ndarray]:
  """Returns the figures to log, computed from the sums of a whole batch, on the host.

  The figures are float32 scalars, most of them means per token. If there are no tokens, all figures are 0.

  sums: the third result of `policy_loss`, added up over the batch.
  """
  tokens = np.float32(max(sums['tokens'], 1))
  out = {'ratio_mean': sums['ratio'] / tokens, 'clip_fraction': sums['clipped'] / tokens}
  if 'gap' in sums:
    # |exp(difference of logp) - 1| between trainer and sampler, at the same weights
    out |= {'sampler_gap_mean': sums['gap'] / tokens, 'sampler_gap_max': sums['gap_max']}
  if 'weight' in sums:  # Kish's effective sample size as a share of the tokens: 1 if all weigh the same
    squares = sums['weight_squared'] if sums['weight_squared'] > 0 else np.float32(1)
    out |= {'importance_weight_mean': sums['weight'] / tokens,
            'effective_sample_share': sums['weight'] ** 2 / squares / tokens}
  if 'cov_tokens' in sums:
    out['cov_token_share'] = sums['cov_tokens'] / tokens
  if 'kl' in sums:
    out[f'kl_{c.kl}_nats'] = sums['kl'] / tokens
  return out
