"""Training objectives: arrays in, arrays out. `reward_shaping.py` has the loss as the paper writes it."""

from betarank.objectives.collectives import Layout
from betarank.objectives.family import ObjectiveConfig
from betarank.objectives.head import linear_token_stats, shaped_linear_loss, shaped_linear_total
from betarank.objectives.head_math import TokenStats
from betarank.objectives.leaders import leading_two
from betarank.objectives.reward_shaping import RewardShaping, shaped_loss

__all__ = [
  'Layout',
  'ObjectiveConfig',
  'RewardShaping',
  'TokenStats',
  'leading_two',
  'linear_token_stats',
  'shaped_linear_loss',
  'shaped_linear_total',
  'shaped_loss',
]
