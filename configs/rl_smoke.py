"""RL smoke: GRPO on sums of a few numbers, from a checkpoint of the smoke config; minutes on two CPU cores.

    python -m rl --config=configs/rl_smoke.py --config.train.init_from=runs/smoke/reasoning/beta=0 --workdir=runs/rl

Expect: the share of right answers rises from the pre-trained model's.
"""

from configs import common, smoke


def get_config(arg=None):
  a = common.parse(arg, seed=0, init_from='runs/smoke/reasoning/beta=0')
  c = smoke.get_config()
  c.seed = a.seed
  c.train.init_from = a.init_from
  c.optimizer.update(lr=1e-4, warmup_steps=0, decay_fraction=0.0, weight_decay=0.0)
  c.checkpoint.every_steps = 20
  c.log.update(every_steps=1, eval_every_steps=20, samples=3)
  c.rl = common.rl()
  c.rl.update(steps=40, prompts=8, samples=8, rounds=2, max_prompt_tokens=64, max_new_tokens=(96,), phase_steps=(),
              rows=64)
  c.rl.task.uri = 'reasoning:chain_sum'
  return c
