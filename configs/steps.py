"""Computes the number of steps of a run from its config.

Commands that only show runs use this module too, because importing it doesn't import JAX.
"""

import math
from collections.abc import Mapping
from typing import Any


def budget_steps(tokens: int, tokens_per_step: int) -> int:
  """Returns the number of pre-training steps for a budget of `tokens`, rounded up."""
  return math.ceil(tokens / tokens_per_step)


def planned_steps(config: Mapping[str, Any]) -> int:
  """Returns the number of steps of a complete run of `betarank train` or `betarank rl`.

  config: the resolved config of the run.

  Raises:
    KeyError, TypeError, ValueError or ZeroDivisionError: the config lacks a value, or has one of the wrong kind.
  """
  if 'rl' in config:
    return int(config['rl']['steps'])
  return budget_steps(config['train']['tokens'], config['train']['batch_size'] * config['data']['sequence_length'])
