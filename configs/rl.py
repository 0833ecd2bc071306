"""RL with settings for a small model and short answers: what `betarank rl --from=RUN --task=URI` uses without --config.

    betarank rl --from=runs/smoke/reasoning/beta=0 --task='reasoning:chain_sum?max_terms=3&max_digits=1'

It runs 100 steps of 16 prompts. Each prompt gets 8 samples of at most 64 tokens. Prompts of more than 64 tokens are
left out. For a larger model, lower optimizer.lr (the paper has 1e-6), and raise rl.max_prompt_tokens and
rl.max_new_tokens.
"""

from betarank.configs import common, smoke


def get_config(arg=None):
  a = common.parse(arg, seed=0, init_from='runs/smoke/reasoning/beta=0')
  c = common.rl_base()
  c.seed = a.seed
  c.model = smoke.get_config().model  # betarank rl takes the model of the checkpoint instead
  c.train.init_from = a.init_from
  c.optimizer.update(lr=1e-4, b2=0.99, warmup_steps=0, weight_decay=0.0)
  c.checkpoint.every_steps = 20
  c.log.update(every_steps=5, eval_every_steps=50)
  c.rl.update(steps=100, prompts_per_step=16, group_size=8, max_prompt_tokens=64, max_new_tokens=(64,), phase_steps=(),
              decode_batch_size=128, eval_prompts=128, long_prompts='skip')
  c.rl.task.update(uri=smoke.SUMS, held_out_fraction=0.1)
  return c
