"""Computes the objective in float64 with NumPy, directly from its formulas. Tests compare both implementations with it.
"""

import numpy as np


def top_k(z, k):
  """Returns a mask, bool [V], of the k largest values of z [V]. Among equal values, lower ids come first."""
  mask = np.zeros(len(z), bool)
  mask[np.argsort(-z, kind='stable')[:k]] = True
  return mask


def one(z, x, beta=0.0, lambda_head=0.0, lambda_tail=0.0, top_k_size=100, form='power', sizes=False):
  """Returns (loss, dloss/dz [V], statistics) of one position with logits z [V] and target x.

  sizes: if True, returns two sums of absolute values in place of the loss and its gradient: those of their terms (one
    each for w, λ̃ and λ̂). Rounding errors are relative to these sums, because terms may cancel.
  """
  z = np.asarray(z, np.float64)
  wrong = np.arange(len(z)) != x
  lse = lambda a: a.max() + np.log(np.exp(a - a.max()).sum())
  p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
  margin = z[x] - lse(z[wrong])
  log_p, log_1mp = -np.logaddexp(0, -margin), -np.logaddexp(0, margin)
  if form == 'power':  # log w = log p (1 - (1-p)^β), or its limit where log p underflows in the product
    far = margin > 30
    w = np.exp(np.exp(-(1 + beta) * margin) - np.exp(-margin) if far else log_p * -np.expm1(beta * log_1mp))
  else:
    w = np.exp(min(beta * log_1mp, np.log(30)))  # capped at 30
  in_k = top_k(z, top_k_size)
  head, tail = in_k & wrong, ~in_k & wrong
  head_mass, tail_mass = p[head].sum(), p[tail].sum()
  p_minus_1 = np.where(wrong, p, -np.exp(log_1mp))
  # 1 - P as the sum of all probabilities that aren't in P
  minus_head = np.where(head, p[~head].sum(), -head_mass)
  minus_tail = np.where(tail, p[~tail].sum(), -tail_mass)
  loss_terms = np.array([-w * log_p, -lambda_head * head_mass, -lambda_tail * tail_mass])
  grad_terms = np.array([w * p_minus_1, -lambda_head * p * minus_head, -lambda_tail * p * minus_tail])
  if sizes:
    loss_terms, grad_terms = abs(loss_terms), abs(grad_terms)
  log_all = z - lse(z)
  stats = {
    'target_logp': log_p, 'entropy': -np.sum(np.where(p > 0, p * log_all, 0)),
    'target_rank': int(np.flatnonzero(np.argsort(-z, kind='stable') == x)[0]),
    'head_mass': head_mass, 'tail_mass': tail_mass,
  }
  return loss_terms.sum(), grad_terms.sum(0), stats


def many(z, x, **kwargs):
  """Returns (losses [N], gradients [N, V], {name: statistic [N]}) for logits z [N, V] and targets x [N]."""
  results = [one(zi, xi, **kwargs) for zi, xi in zip(np.asarray(z, np.float64), np.asarray(x))]
  loss, grad, stats = zip(*results)
  return np.array(loss), np.stack(grad), {name: np.array([s[name] for s in stats]) for name in stats[0]}
