"""Builds AdamW with a warmup-stable-decay schedule, and decides which parameters get weight decay."""

import dataclasses
from typing import Any

import jax
import optax

from betarank.configs.settings import default

MOMENT_DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Section `optimizer`."""

  lr: float
  warmup_steps: int
  decay_fraction: float
  final_lr: float
  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip_norm: float
  moment_dtype: str = default('optimizer.moment_dtype')

  def __post_init__(self):
    for name in ('lr', 'eps', 'clip_norm'):
      if getattr(self, name) <= 0:
        raise ValueError(f'{name} must be > 0, got {getattr(self, name)}')
    for name in ('final_lr', 'weight_decay', 'warmup_steps'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name} must be >= 0, got {getattr(self, name)}')
    for name in ('b1', 'b2'):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f'{name} must be in [0, 1), got {getattr(self, name)}')
    if self.moment_dtype not in MOMENT_DTYPES:
      raise ValueError(f'moment_dtype must be one of {", ".join(MOMENT_DTYPES)}, got {self.moment_dtype!r}')
    if not 0 <= self.decay_fraction <= 1:
      raise ValueError(f'decay_fraction must be in [0, 1], got {self.decay_fraction}')


def schedule(c: OptimizerConfig, steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of the step: a linear warm-up, then a constant, then a linear decay.

  The decay to final_lr takes the last `decay_fraction` of `steps`, but never begins before the warm-up has ended. At
  step 0 the rate is lr / (warmup_steps + 1), not 0, so that the first update has an effect. Source: WSD, arXiv
  2404.06395.
  """
  decay_steps = steps - decay_start(c, steps)
  parts = [optax.linear_schedule(c.lr / (c.warmup_steps + 1), c.lr, c.warmup_steps), optax.constant_schedule(c.lr)]
  boundaries = [c.warmup_steps]
  if decay_steps:
    parts.append(optax.linear_schedule(c.lr, c.final_lr, decay_steps))
    boundaries.append(decay_start(c, steps))
  return optax.join_schedules(parts, boundaries)


def decay_start(c: OptimizerConfig, steps: int) -> int:
  """Returns the number of steps before the learning rate begins to decay; `steps` if it never does."""
  return max(min(c.warmup_steps, steps), steps - round(c.decay_fraction * steps))


def make_optimizer(c: OptimizerConfig, steps: int, axes: Any) -> optax.GradientTransformation:
  """Returns the optimizer: clipping by the global norm, then AdamW (arXiv 1711.05101).

  Norms and router biases get no weight decay. Router biases have no gradient either, so AdamW doesn't change them.

  axes: the names of the dimensions of each parameter, from model.abstract.
  """
  decays = jax.tree.map(lambda names: names[-1] not in ('norm', 'bias'), axes, is_leaf=lambda a: isinstance(a, tuple))
  return optax.chain(
    optax.clip_by_global_norm(c.clip_norm),
    optax.adamw(schedule(c, steps), c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=decays,
                mu_dtype=c.moment_dtype),
  )
