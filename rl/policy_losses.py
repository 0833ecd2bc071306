"""Computes token losses of policy-gradient RL: arrays in, arrays out, and gradients through `logp_BT` alone.

    token loss -> x truncated importance weight -> + KL -> (total, count) -> total / count of the whole batch

Row b holds one sample; mask_BT is true at its sampled tokens, end of text included, and false at the prompt,
at padding, and all along a row whose verdict is undecided. Values outside the mask, NaN included, change
neither loss nor gradient. All log-probabilities come from the one scorer (objectives.shaped_linear_loss), at
the sampling temperature; everything here is float32 and in nats.

Sums and counts are returned separately and divided once, so microbatches, padding and devices can't matter.
"""
# B rows (samples)  T tokens

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient as sg

from betarank.configs.settings import default

_MOST_LOG_RATIO = 20.0  # e^20 is far outside every clip range, and its square is still finite


class TokenLoss(NamedTuple):
  """The loss of each token. Arrays are [B, T], and 0 or False outside the mask."""

  loss_BT: jax.Array  # float32, to be minimised
  ratio_BT: jax.Array  # float32, no gradient: pi / pi_old, of the whole sequence for gspo
  clipped_BT: jax.Array  # bool: clipping has changed this token's gradient


def clip_higher(logp_BT, old_logp_BT, advantages_BT, mask_BT, *, eps_low=0.2, eps_high=0.28, dual_clip=0.0):
  r"""PPO's clipped surrogate with a wider upper side.

      L = -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A),   r = exp(logp - old_logp)

  eps_low = eps_high is PPO (arXiv 1707.06347 eq. 7); with old_logp = logp it is REINFORCE. Source: DAPO,
  arXiv 2503.14476 sec. 3.1.

  dual_clip: where A < 0 and r > dual_clip, the loss is -dual_clip A, without a gradient, so that one token whose
  probability has grown can't dominate the batch; 0 for no limit. Source: arXiv 1912.09729 sec. 3.3.
  """
  logp_BT, old_logp_BT, advantages_BT = _at_mask(mask_BT, logp_BT, old_logp_BT, advantages_BT)
  return _clipped(_ratio(logp_BT, old_logp_BT), advantages_BT, mask_BT, eps_low, eps_high, dual_clip)


def cispo(logp_BT, old_logp_BT, advantages_BT, mask_BT, *, eps_low=1.0, eps_high=4.0):
  r"""Clips the importance weight, not the update: no token loses its gradient.

      L = -sg(clip(r, 1 - eps_low, 1 + eps_high)) A logp

  eps_low = 1 is no lower limit, as in the source, which leaves eps_high open; a weight of at most 5 is what
  ScaleRL (arXiv 2510.13786) settled on. Source: CISPO in MiniMax-M1, arXiv 2506.13585 sec. 3.1.
  """
  logp_BT, old_logp_BT, advantages_BT = _at_mask(mask_BT, logp_BT, old_logp_BT, advantages_BT)
  ratio_BT = sg(_ratio(logp_BT, old_logp_BT))
  weight_BT = jnp.clip(ratio_BT, 1 - eps_low, 1 + eps_high)
  return _token_loss(-weight_BT * advantages_BT * logp_BT, ratio_BT, weight_BT != ratio_BT, mask_BT)


def gspo(logp_BT, old_logp_BT, advantages_BT, mask_BT, *, eps_low=3e-4, eps_high=4e-4):
  r"""One ratio for the whole sequence: s = exp(mean_t(logp - old_logp)), clipped as a whole.

      L_t = -min(s_t A, clip(s_t, 1 - eps_low, 1 + eps_high) A),   s_t = sg(s) exp(logp - sg(logp))

  Averaged over a row ('sequence_mean') its gradient is that of -min(s A, clip(s) A). Source: GSPO, arXiv
  2507.18071 sec. 4.1, in the token form of sec. 4.3; the limits are those of sec. 5.1.
  """
  logp_BT, old_logp_BT, advantages_BT = _at_mask(mask_BT, logp_BT, old_logp_BT, advantages_BT)
  tokens_B1 = jnp.maximum(jnp.sum(mask_BT, -1, keepdims=True), 1)
  mean_B1 = sg(jnp.sum(logp_BT - old_logp_BT, -1, keepdims=True) / tokens_B1)
  # Two factors: added up inside one exp, a mean of 1e-4 would drown in the rounding of logp.
  ratio_BT = _ratio(mean_B1, 0.0) * jnp.exp(logp_BT - sg(logp_BT))
  return _clipped(ratio_BT, advantages_BT, mask_BT, eps_low, eps_high)


POLICY_LOSSES = {'clip_higher': clip_higher, 'cispo': cispo, 'gspo': gspo}


def _at_mask(mask_BT, *arrays):
  """Returns the arrays with 0 outside the mask. Needed before any arithmetic: NaN times 0 is NaN, also in gradients."""
  return tuple(jnp.where(mask_BT, jnp.asarray(array, jnp.float32), 0) for array in arrays)


def _ratio(logp_BT, old_logp_BT):
  return jnp.exp(jnp.clip(logp_BT - sg(old_logp_BT), -_MOST_LOG_RATIO, _MOST_LOG_RATIO))


def _clipped(ratio_BT, advantages_BT, mask_BT, eps_low, eps_high, dual_clip=0.0):
  plain_BT = -ratio_BT * advantages_BT
  clipped_BT = -jnp.clip(ratio_BT, 1 - eps_low, 1 + eps_high) * advantages_BT
  # where, not maximum: at a tie, such as a ratio of exactly 1, maximum would halve the gradient between both
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

  The samples come from the sampler's distribution, which can differ numerically from the trainer's at equal
  weights. Source: "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", F. Yao et al.
  2025; verl's rollout correction, whose default cap is 2.
  """
  old_logp_BT, sampler_logp_BT = _at_mask(mask_BT, old_logp_BT, sampler_logp_BT)
  return sg(jnp.where(mask_BT, jnp.minimum(_ratio(old_logp_BT, sampler_logp_BT), cap), 0))


# Estimators of KL(pi || ref) from samples of pi, float32 [B, T] and 0 outside the mask, and their gradients.
# Source: J. Schulman, "Approximating KL Divergence"; gradients: arXiv 2506.09477. With d = logp - ref_logp:


def kl_k1(logp_BT, ref_logp_BT, mask_BT):
  """Returns d: unbiased, can be negative. Its gradient has mean 0, so it is noise as a loss. For logging."""
  logp_BT, ref_logp_BT = _at_mask(mask_BT, logp_BT, ref_logp_BT)
  return logp_BT - sg(ref_logp_BT)


def kl_k2(logp_BT, ref_logp_BT, mask_BT):
  """Returns d^2 / 2: biased, but on-policy its gradient is that of KL(pi || ref). Use this estimator as a loss."""
  return 0.5 * kl_k1(logp_BT, ref_logp_BT, mask_BT) ** 2


def kl_k3(logp_BT, ref_logp_BT, mask_BT):
  """Returns exp(-d) - 1 + d: unbiased and >= 0, but its gradient is that of the other direction, KL(ref || pi)."""
  d_BT = kl_k1(logp_BT, ref_logp_BT, mask_BT)
  return jnp.expm1(-jnp.clip(d_BT, -_MOST_LOG_RATIO, _MOST_LOG_RATIO)) + d_BT


KL_ESTIMATORS = {'k1': kl_k1, 'k2': kl_k2, 'k3': kl_k3}


# Which tokens lower the entropy most: chosen once over the whole batch, from old log-probabilities, so that
# microbatches of an update see parts of one choice. Source: arXiv 2505.22617 sec. 4.2 (Clip-Cov, KL-Cov).


def token_covariance(old_logp_BT, advantages_BT, mask_BT):
  """Returns (logp - mean logp) (A - mean A), with means over all tokens in the mask; float32 [B, T], 0 elsewhere."""
  logp_BT, advantages_BT = sg(_at_mask(mask_BT, old_logp_BT, advantages_BT))
  tokens = jnp.maximum(jnp.sum(mask_BT), 1)
  covariance_BT = (logp_BT - logp_BT.sum() / tokens) * (advantages_BT - advantages_BT.sum() / tokens)
  return jnp.where(mask_BT, covariance_BT, 0)


def clip_cov_tokens(old_logp_BT, advantages_BT, mask_BT, noise_BT, *, share=2e-4, low=1.0, high=5.0):
  """Returns bool [B, T]: tokens to remove from the gradient, drawn from the tokens with covariance in (low, high).

  noise_BT: float [B, T] in [0, 1), drawn by the caller from (seed, step, sample): the lowest ones are chosen.
  At most share of all tokens, but one if there is a candidate.
  """
  covariance_BT = token_covariance(old_logp_BT, advantages_BT, mask_BT)
  candidates_BT = mask_BT & (covariance_BT > low) & (covariance_BT < high)
  return _highest(-noise_BT, candidates_BT, jnp.sum(mask_BT), share)


def kl_cov_tokens(old_logp_BT, advantages_BT, mask_BT, *, share=2e-4):
  """Returns bool [B, T]: the `share` of tokens with the highest covariance, at least one token, to get a KL penalty."""
  return _highest(token_covariance(old_logp_BT, advantages_BT, mask_BT), mask_BT, jnp.sum(mask_BT), share)


def _highest(score_BT, candidates_BT, tokens, share):
  """Returns the max(1, floor(share * tokens)) candidates of highest score, including all ties for the last place."""
  score_BT = jnp.where(candidates_BT, score_BT, -jnp.inf)
  k = jnp.maximum(jnp.floor(share * tokens).astype(jnp.int32), 1)
  return candidates_BT & (score_BT >= jnp.sort(score_BT.reshape(-1))[-k])


AGGREGATIONS = ('token_mean', 'sequence_mean', 'constant')


def aggregate(loss_BT, mask_BT, aggregation='token_mean', *, constant=1):
  """Returns (total, count): float32 sum and int32 count. Add both over microbatches, then divide once.

    token_mean     every token of the batch weighs the same (DAPO, arXiv 2503.14476 sec. 3.3)
    sequence_mean  every sample weighs the same, its tokens 1 / length (GRPO; favours short right answers)
    constant       a sample's sum over `constant` tokens, whatever its length (Dr. GRPO, arXiv 2503.20783)

  Rows without a masked-in token count for nothing.
  """
  loss_BT = jnp.where(mask_BT, loss_BT, 0)
  if aggregation == 'token_mean':
    return jnp.sum(loss_BT), jnp.sum(mask_BT, dtype=jnp.int32)
  tokens_B = jnp.sum(mask_BT, -1, dtype=jnp.int32)
  divisor_B = jnp.maximum(tokens_B, 1) if aggregation == 'sequence_mean' else constant
  return jnp.sum(jnp.sum(loss_BT, -1) / divisor_B), jnp.sum(tokens_B > 0, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class PolicyLossConfig:
  """The name of the loss and its parameters. The defaults are the paper's if it gives them, else DAPO's."""

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
  sampler_logp_BT=None, ref_logp_BT=None, cov_tokens_BT=None,
):
  """Returns the whole loss that `c` describes, as (total, count, sums); see `aggregate` and `means`.

  Args:
    logp_BT: [B, T] float, log-probabilities that gradients flow through.
    old_logp_BT: [B, T] float, the trainer's at the weights that sampled; `stop_gradient(logp_BT)` on-policy.
    advantages_BT: float, of shape [B, T] or [B, 1].
    mask_BT: [B, T] bool.
    sampler_logp_BT: [B, T] float as the sampler saw them; None: no weight, and no gap among the sums.
    ref_logp_BT: [B, T] float of the reference, needed with a kl_weight.
    cov_tokens_BT: [B, T] bool from `clip_cov_tokens` or `kl_cov_tokens` of the whole batch, needed with cov.

  Raises:
    ValueError: an array that `c` needs is missing, or has another shape.
  """
  shapes = {'logp_BT': logp_BT, 'old_logp_BT': old_logp_BT, 'sampler_logp_BT': sampler_logp_BT,
            'ref_logp_BT': ref_logp_BT, 'cov_tokens_BT': cov_tokens_BT}
  _check_shapes(jnp.shape(mask_BT), advantages_BT, shapes)
  if c.kl_weight and ref_logp_BT is None:
    raise ValueError('ref_logp_BT must be given with a kl_weight')
  if c.cov and cov_tokens_BT is None:
    raise ValueError('cov_tokens_BT must be given with cov')
  old_logp_BT, mask_BT = sg(old_logp_BT), jnp.asarray(mask_BT, bool)
  options = {'dual_clip': c.dual_clip} if c.dual_clip else {}
  token = POLICY_LOSSES[c.name](
    logp_BT, old_logp_BT, advantages_BT, mask_BT, eps_low=c.eps_low, eps_high=c.eps_high, **options)
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
    # The samples are of the old policy: off-policy, the estimate needs their importance weight. On-policy it is 1.
    loss_BT += c.kl_weight * sg(token_ratio_BT) * kl_BT
    sums['kl'] = sg(jnp.sum(kl_BT))
  return *aggregate(loss_BT, mask_BT, c.aggregation, constant=c.constant), sums


def _check_shapes(shape, advantages_BT, arrays):
  """Raises ValueError, naming the array, for a shape that would broadcast instead of matching the mask's [B, T]."""
  if len(shape) != 2:
    raise ValueError(f'mask_BT must be [B, T], got {shape}')
  if jnp.shape(advantages_BT) not in (shape, (shape[0], 1)):
    raise ValueError(f'advantages_BT must be {shape} or {(shape[0], 1)}, got {jnp.shape(advantages_BT)}')
  for name, array in arrays.items():
    if array is not None and jnp.shape(array) != shape:
      raise ValueError(f'{name} must be {shape}, as mask_BT is, got {jnp.shape(array)}')


def add(a, b):
  """Returns the sums of two parts of a batch, added. Of sums named `_max` the larger one is returned."""
  return {name: jnp.maximum(a[name], b[name]) if name.endswith('_max') else a[name] + b[name] for name in a}


def means(c: PolicyLossConfig, sums) -> dict[str, jax.Array]:
  """Returns the figures to log, from the sums of a whole batch: per token, scalar float32. All are 0 without tokens."""
  tokens = jnp.maximum(sums['tokens'], 1)
  out = {'ratio_mean': sums['ratio'] / tokens, 'clip_fraction': sums['clipped'] / tokens}
  if 'gap' in sums:
    # |exp(dlogp) - 1|, of trainer and sampler at the same weights
    out |= {'sampler_gap_mean': sums['gap'] / tokens, 'sampler_gap_max': sums['gap_max']}
  if 'weight' in sums:  # Kish's effective sample size as a share of the tokens: 1 if all weigh the same
    squares = jnp.where(sums['weight_squared'] > 0, sums['weight_squared'], 1)
    out |= {'importance_weight_mean': sums['weight'] / tokens,
            'effective_sample_share': sums['weight'] ** 2 / squares / tokens}
  if 'cov_tokens' in sums:
    out['cov_token_share'] = sums['cov_tokens'] / tokens
  if 'kl' in sums:
    out[f'kl_{c.kl}_nats'] = sums['kl'] / tokens
  return out
