"""Training objectives as pure functions of arrays.

`reward_shaping.py` has the paper's loss in its most readable form. `head.py` computes the same loss from hidden states,
without ever holding all logits in memory.

Profiles and the planner (launch/plan/predict.py) identify this code by its `jax.named_scope` names:

    head/weights    all-gathers the head's weights and reduces their gradient
    head/logits     hidden states times the head's weights
    head/loss       sums over the vocabulary, the loss and the token statistics
    head/gradient   gradients with respect to the logits, the hidden states and the weights
    head            what the loop over chunks does outside these scopes
"""

from betarank.objectives.collectives import Layout
from betarank.objectives.config import ObjectiveConfig
from betarank.objectives.head import linear_token_stats, shaped_linear_loss, shaped_linear_total
from betarank.objectives.head_math import TokenStats, linear_logits
from betarank.objectives.leaders import leading_two
from betarank.objectives.reward_shaping import RewardShaping, shaped_loss

__all__ = [
  'Layout',
  'ObjectiveConfig',
  'RewardShaping',
  'TokenStats',
  'leading_two',
  'linear_logits',
  'linear_token_stats',
  'shaped_linear_loss',
  'shaped_linear_total',
  'shaped_loss',
]
