"""Config of a run that is small enough for tests: `betarank train --config=tests/tiny.py:dir=DATA --workdir=...`."""

from betarank.configs import common


def get_config(arg=None):
  a = common.parse(arg, dir='', beta=-0.25)
  c = common.base()
  c.model.update(vocab_size=384, layers=2, d_model=32, d_ff=64, heads=4, kv_heads=2, head_dim=8)
  c.objective.update(beta=a.beta, top_k=10)
  c.data.update(dir=a.dir, sequence_length=32, validation_fraction=0.1, held_out_fraction=0.2)
  c.data.sources.main.update(max_documents=300)
  c.train.update(tokens=32 * 8 * 12, batch_size=8)  # 12 steps
  # No decay: the compiled update is then the same one for any number of steps.
  c.optimizer.update(lr=1e-2, warmup_steps=2, decay_fraction=0.0, final_lr=1e-3)
  c.checkpoint.update(every_steps=4)
  c.log.update(every_steps=1, eval_every_steps=6, eval_batches=2, samples=1, sample_tokens=4, tensorboard=False)
  return c
