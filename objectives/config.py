"""Defines the config section `objective`: the parameters of the objective, and how they change during training."""

import dataclasses

import jax.numpy as jnp

from betarank.configs.settings import default
from betarank.objectives.reward_shaping import RewardShaping, check_parameters

SCHEDULES = ('constant', 'linear', 'step')


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """Section `objective`. `at(step)` returns the objective of one optimizer step, which the loss functions take.

  Attributes:
    form: a name of `family.FAMILY`. 'power' is the paper's form. If beta and both lambdas are 0, 'power' is plain
      cross-entropy, bit for bit.
    beta: the parameter of the form: β for 'power' and 'product', γ for 'focal', ε for 'label_smoothing', α for
      'likelihood_power', N for 'coverage'. 'cross_entropy' and 'dft' have no parameter and require 0.
    lambda_head: λ̃, the reward of wrong tokens among the top k.
    lambda_tail: λ̂, the reward of all other wrong tokens.
    top_k: k, the number of most probable tokens that make up the head.
    schedule: how beta and both lambdas change. 'constant' keeps the values above. 'linear' moves from the `*_from`
      values at step schedule_start to the values above at step schedule_end. 'step' uses the `*_from` values before
      step schedule_start, and the values above from this step on.
    beta_from, lambda_head_from, lambda_tail_from: the values at the start of a schedule.
    schedule_start, schedule_end: optimizer steps.
    z_loss: z_loss · logsumexp(logits)^2 is added to the loss of every token.

  Raises:
    ValueError: a value is out of range. The message begins with the field's name.
  """

  form: str = default('objective.form')
  beta: float = default('objective.beta')
  lambda_head: float = default('objective.lambda_head')
  lambda_tail: float = default('objective.lambda_tail')
  top_k: int = default('objective.top_k')
  schedule: str = default('objective.schedule')
  beta_from: float = default('objective.beta_from')
  lambda_head_from: float = default('objective.lambda_head_from')
  lambda_tail_from: float = default('objective.lambda_tail_from')
  schedule_start: int = default('objective.schedule_start')
  schedule_end: int = default('objective.schedule_end')
  z_loss: float = default('objective.z_loss')

  def __post_init__(self):
    if self.schedule not in SCHEDULES:
      raise ValueError(f'schedule must be one of {", ".join(SCHEDULES)}, got {self.schedule!r}')
    if self.schedule == 'linear' and self.schedule_end <= self.schedule_start:
      raise ValueError(
        f'schedule_end must be > schedule_start = {self.schedule_start}, got {self.schedule_end}')
    RewardShaping(self.beta, self.lambda_head, self.lambda_tail, self.top_k, self.form, self.z_loss)
    if self.schedule != 'constant':
      check_parameters(self.form, self.beta_from, self.lambda_head_from, self.lambda_tail_from, suffix='_from')

  def at(self, step):
    """Returns the RewardShaping of an optimizer step.

    step: an int, or a traced int32 scalar. With a traced step, the parameters that the schedule changes are traced too.
      All other parameters stay Python numbers, so a lambda that is always 0 is known to need no top k.
    """
    beta, lambda_head, lambda_tail = (
      self._value(step, getattr(self, f'{name}_from'), getattr(self, name))
      for name in ('beta', 'lambda_head', 'lambda_tail'))
    return RewardShaping(beta, lambda_head, lambda_tail, self.top_k, self.form, self.z_loss)

  def _value(self, step, start, end):
    if self.schedule == 'constant' or start == end:
      return end
    if self.schedule == 'step':
      return jnp.where(step >= self.schedule_start, end, start).astype(jnp.float32)
    done = (step - self.schedule_start) / (self.schedule_end - self.schedule_start)
    done = jnp.clip(jnp.asarray(done, jnp.float32), 0, 1)
    return (1 - done) * start + done * end  # exact at both ends
