"""RL smoke: GRPO on sums of two or three one-digit numbers, from a smoke checkpoint; a minute on two cores.

    betarank rl --config=configs/rl_smoke.py:init_from=runs/smoke/reasoning/beta=0 --workdir=runs/rl

Expect: the share of right answers rises, also on the held-out questions, which no step and no document has shown.
"""

from betarank.configs import common, smoke


def get_config(arg=None):
  a = common.parse(arg, seed=0, init_from='runs/smoke/reasoning/beta=0')
  c, pretraining = common.rl_base(), smoke.get_config()
  c.seed = a.seed
  c.model = pretraining.model
  c.train.init_from = a.init_from
  # A step of a few hundred samples is noisy: at 3e-4 the same run unlearns how to add.
  c.optimizer.update(lr=1e-4, b2=0.99, warmup_steps=0, weight_decay=0.0)
  c.checkpoint.every_steps = 20
  c.log.update(every_steps=5, eval_every_steps=30)
  c.rl.update(steps=60, prompts_per_step=16, group_size=8, max_prompt_tokens=28, max_new_tokens=(28,), phase_steps=(),
              decode_batch_size=128, eval_prompts=128)
  c.rl.task.update(uri=smoke.SUMS, held_out_fraction=pretraining.data.held_out_fraction)
  return c
