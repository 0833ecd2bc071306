"""RL smoke: GRPO on sums of one-digit numbers, from a smoke checkpoint; one to two minutes on two CPU cores.

    betarank rl --config=configs/rl_smoke.py:init_from=runs/smoke/reasoning/beta=0 --workdir=runs/rl

The sums have two or three terms. Expect the share of right answers to rise, also on held-out questions, which occur in
no RL step and in no document of the pre-training. In the run of `make smoke` (one seed, 2026-11-29), Avg@8 on 256
different held-out questions rose from 0.471 ± 0.020 to 0.572 ± 0.021 (± one standard error over questions).
"""

from betarank.configs import common, smoke


def get_config(arg=None):
  a = common.parse(arg, seed=0, init_from='runs/smoke/reasoning/beta=0')
  c, pretraining = common.rl_base(), smoke.get_config()
  c.seed = a.seed
  c.model = pretraining.model
  c.train.init_from = a.init_from
  # With these values, both arms gain on all of ten seeds. With 128 samples per step, or a learning rate of 3e-4, some
  # seeds gain nothing (LOG.md, 2026-11-27).
  c.optimizer.update(lr=2e-4, b2=0.99, warmup_steps=0, weight_decay=0.0)
  c.checkpoint.every_steps = 20
  c.log.update(every_steps=5, eval_every_steps=20)
  c.rl.update(steps=40, prompts_per_step=32, group_size=8, max_prompt_tokens=28, max_new_tokens=(28,), phase_steps=(),
              decode_batch_size=256, eval_prompts=256, eval_samples=8)
  c.rl.task.update(uri=smoke.SUMS, held_out_fraction=pretraining.data.held_out_fraction)
  return c
