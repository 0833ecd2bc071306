"""RL with settings for a small model and short answers: the default config of `betarank rl --from=RUN --task=URI`.

    betarank rl --from=runs/smoke/reasoning/beta=0 --task='reasoning:chain_sum?max_terms=3&max_digits=1'

A run has 100 steps of 32 prompts. Each prompt gets 8 samples of at most 64 tokens. Prompts of more than 64 tokens are
left out. For a larger model, lower optimizer.lr (the paper has 1e-6), and raise rl.max_prompt_tokens and
rl.max_new_tokens.
"""

from betarank.configs import rl_smoke


def get_config(arg=None):
  c = rl_smoke.get_config(arg)  # betarank rl takes the model of the checkpoint instead of this one
  c.log.eval_every_steps = 50
  c.rl.update(steps=100, max_prompt_tokens=64, max_new_tokens=(64,), long_prompts='skip')
  return c
