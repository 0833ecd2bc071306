"""Builds AdamW or Muon with a warmup-stable-decay schedule, and decides which parameters get weight decay."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from betarank.configs.settings import default

NAMES = ('adamw', 'muon')
MOMENT_DTYPES = ('float32', 'bfloat16')
# The height of the learning rate above final_lr, from 1 to 0, as a function of the decay's progress from 0 to 1.
DECAY_SHAPES = {
  'linear': lambda x: 1 - x,
  'cosine': lambda x: (1 + jnp.cos(math.pi * x)) / 2,
  '1-sqrt': lambda x: 1 - jnp.sqrt(x),  # arXiv 2405.18392
}
# The root mean square of Muon's updates, before the learning rate. It is about that of AdamW's, so that a learning rate
# and a weight decay found for AdamW also suit Muon. Source: arXiv 2502.16982, section 2.2.
MUON_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Section `optimizer`: AdamW or Muon, the schedule of the learning rate, and weight decay.

  configs/settings.py describes each field.
  """

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
  name: str = default('optimizer.name')
  decay_shape: str = default('optimizer.decay_shape')

  def __post_init__(self):
    for name, choices in (('name', NAMES), ('decay_shape', DECAY_SHAPES), ('moment_dtype', MOMENT_DTYPES)):
      if getattr(self, name) not in choices:
        raise ValueError(f'{name} must be one of {", ".join(choices)}, got {getattr(self, name)!r}')
    for name in ('lr', 'eps', 'clip_norm'):
      if getattr(self, name) <= 0:
        raise ValueError(f'{name} must be > 0, got {getattr(self, name)}')
    for name in ('final_lr', 'weight_decay', 'warmup_steps'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name} must be >= 0, got {getattr(self, name)}')
    for name in ('b1', 'b2'):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f'{name} must be in [0, 1), got {getattr(self, name)}')
    if not 0 <= self.decay_fraction <= 1:
      raise ValueError(f'decay_fraction must be in [0, 1], got {self.decay_fraction}')
    if self.decay_fraction and self.final_lr > self.lr:
      raise ValueError(f'final_lr must be <= lr = {self.lr} if decay_fraction is > 0, got {self.final_lr}')


def schedule(c: OptimizerConfig, steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of the step: a linear warm-up, then a constant rate, then a decay.

  The decay to final_lr takes the last `decay_fraction` of `steps`, but never begins before the warm-up has ended. The
  setting `decay_shape` is the form of the decay. At step 0 the rate is lr / (warmup_steps + 1) instead of 0, so that
  the first update has an effect. Source: WSD, arXiv 2404.06395.
  """
  start = decay_start(c, steps)
  parts = [optax.linear_schedule(c.lr / (c.warmup_steps + 1), c.lr, c.warmup_steps), optax.constant_schedule(c.lr)]
  boundaries = [c.warmup_steps]
  if start < steps:
    shape = DECAY_SHAPES[c.decay_shape]
    parts.append(lambda step: (c.lr - c.final_lr) * shape(jnp.clip(step / (steps - start), 0, 1)) + c.final_lr)
    boundaries.append(start)
  return optax.join_schedules(parts, boundaries)


def decay_start(c: OptimizerConfig, steps: int) -> int:
  """Returns the step after which the learning rate begins to decay; `steps` if it never decays."""
  return max(min(c.warmup_steps, steps), steps - round(c.decay_fraction * steps))


def make_optimizer(c: OptimizerConfig, steps: int, axes: Any) -> optax.GradientTransformation:
  """Returns the optimizer: clipping by the global norm, then AdamW (arXiv 1711.05101) or Muon.

  Muon orthogonalizes the momentum of each matrix in a layer; each expert has its own matrices. As in optax, it updates
  the embedding, the head, norms and biases by Adam with Nesterov momentum. It therefore stores one moment for the
  layers' matrices, and two moments for all other parameters. Sources: optax.contrib.muon, arXiv 2502.16982.

  Norms and biases get no weight decay. Router biases get no gradient and no weight decay, so the optimizer doesn't
  change them.

  axes: the names of the dimensions of each parameter, from model.abstract.
  """
  by_names = lambda f: jax.tree.map(f, axes, is_leaf=lambda a: isinstance(a, tuple))
  decays = by_names(lambda names: names[-1] not in ('norm', 'bias'))
  rate, clip = schedule(c, steps), optax.clip_by_global_norm(c.clip_norm)
  if c.name == 'adamw':
    return optax.chain(clip, optax.adamw(rate, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=decays,
                                         mu_dtype=c.moment_dtype))
  return optax.chain(
    clip,
    optax.contrib.muon(rate, beta=c.b1, eps=c.eps, mu_dtype=c.moment_dtype, adam_b1=c.b1, adam_b2=c.b2,
                       muon_weight_dimension_numbers=by_names(matrix), consistent_rms=MUON_RMS),
    # Added here for all parameters alike, because optax.contrib.muon has no mask for those that Adam updates.
    optax.add_decayed_weights(lambda step: -c.weight_decay * rate(step), decays))


def matrix(names: tuple[str, ...]) -> optax.contrib.MuonDimensionNumbers | None:
  """Returns, for Muon, which dimensions of a parameter form its matrices; None if Adam updates the parameter.

  The first side of a matrix is the dimension `embed`. The second side is all other dimensions together, such as heads x
  head_dim. `layers` and `experts` belong to neither side, because each layer and each expert has its own matrix.

  names: the names of the parameter's dimensions.
  """
  if 'embed' not in names or 'vocab' in names:
    return None
  columns = [i for i, name in enumerate(names) if name not in ('layers', 'experts', 'embed')]
  return optax.contrib.MuonDimensionNumbers(names.index('embed'), tuple(columns))
