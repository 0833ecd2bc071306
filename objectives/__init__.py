"""Training objectives: arrays in, arrays out. `reward_shaping.py` has the loss as the paper writes it."""

from objectives.chunk import TokenStats
from objectives.family import ObjectiveConfig
from objectives.layout import Layout
from objectives.linear_head import linear_token_stats, shaped_linear_loss, shaped_linear_total
from objectives.reward_shaping import RewardShaping, shaped_loss

__all__ = [
  'Layout',
  'ObjectiveConfig',
  'RewardShaping',
  'TokenStats',
  'linear_token_stats',
  'shaped_linear_loss',
  'shaped_linear_total',
  'shaped_loss',
]
