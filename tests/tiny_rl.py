"""Config of an RL run that is small enough for tests: `betarank rl --config=tests/tiny_rl.py:init_from=RUN
--workdir=...`.
"""

from betarank.configs import common
from tests import tiny


def get_config(arg=None):
  a = common.parse(arg, init_from='')
  c = common.rl_base()
  c.model = tiny.get_config().model
  c.train.init_from = a.init_from
  c.optimizer.update(lr=1e-3, warmup_steps=0, weight_decay=0.0)
  c.checkpoint.every_steps = 2
  c.log.update(every_steps=1, eval_every_steps=3, samples=1, tensorboard=False)
  c.rl.update(steps=6, prompts_per_step=4, group_size=8, max_resampling_rounds=3, max_prompt_tokens=64,
              max_new_tokens=(32,), phase_steps=(), decode_batch_size=16, eval_prompts=4, eval_samples=4,
              keep_best='held_out')
  c.rl.task.update(uri='reasoning:chain_sum?max_terms=2&max_digits=1', held_out_fraction=0.2)
  return c
