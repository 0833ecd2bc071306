"""Defines what the configs of the paper's five models share: the stages, the five objectives and the sweep.

The paper is arXiv 2512.22955.

Not all of the paper's text was available. A comment "open" marks a value that the paper doesn't give, or that couldn't
be found. In such a place, the config has a usual value.
"""

from ml_collections import ConfigDict

from betarank.configs import common

# Section 4 of the paper. It runs one seed of each, doesn't combine them, and uses only k = 100.
OBJECTIVES = {
  'ce': dict(),
  'beta_low': dict(beta=-0.25),  # global low entropy: precision
  'beta_high': dict(beta=0.5),  # global high entropy: diversity
  'tail': dict(lambda_tail=-0.1),  # punishes tokens ranked below the top 100: local precision
  'head': dict(lambda_head=0.1),  # rewards wrong tokens among the top 100: local diversity
}
STAGES = ('pretrain', 'midtrain', 'rl')


def parse(arg: str | None):
  """Parses a config's argument, and returns the values as attributes.

  arg: `stage=pretrain|midtrain|rl,objective=ce|beta_low|beta_high|tail|head,seed=N`, or a part of it. The defaults are
    pretrain, ce and 0.

  Raises:
    ConfigError: a name or a value isn't one of these.
  """
  a = common.parse(arg, stage='pretrain', objective='ce', seed=0)
  common.check_choice('stage', a.stage, STAGES)
  common.check_choice('objective', a.objective, OBJECTIVES)
  return a


def base(a) -> ConfigDict:
  """Returns the config of a stage, complete except for the model's sizes and the mesh.

  a: the parsed argument, from `parse`.
  """
  c = common.rl_base() if a.stage == 'rl' else common.base()
  c.seed = a.seed
  if a.stage == 'rl':
    c.model = common.base().model
  # Open: tokenizer and vocabulary. With Qwen3's vocabulary size, tied embeddings and heads of width 128, the models
  # have as many parameters as their names say. To use Qwen3's tokenizer, add --config.data.tokenizer=FOLDER to all
  # commands of the first two stages. RL takes the tokenizer of its checkpoint.
  c.model.update(vocab_size=151_936, head_dim=128, tied_embeddings=True, remat_policy='full')
  c.optimizer.update(lr=3e-4, weight_decay=0.1, clip_norm=1.0, b1=0.9, b2=0.95, eps=1e-8)  # open: b1, b2, eps
  c.checkpoint.update(every_steps=500, keep=2, keep_every_steps=5000)
  {'pretrain': _pretrain, 'midtrain': _midtrain, 'rl': _rl}[a.stage](c)
  if a.stage != 'rl':
    c.objective.update(top_k=100, **OBJECTIVES[a.objective])
    c.data.dir = f'runs/data/paper/{a.stage}'
    # Open: corpora and mixture. Pre-training used mostly general knowledge, mid-training much more reasoning.
    c.data.sources.main.update(uri=f'parquet:corpus/{a.stage}/*.parquet', max_documents=0)
    c.log.update(every_steps=10, eval_every_steps=1000, head_tail_mass=False)
  return c


def _pretrain(c):
  """Sets the values of pre-training: 500B tokens in batches of 16.8M, which makes 29,803 steps.

  The learning rate is constant after the warm-up; it decays only in mid-training.
  """
  c.train.update(tokens=500_000_000_000, batch_size=4096)
  c.data.sequence_length = 4096
  c.model.rope_base = 1e4
  c.optimizer.update(warmup_steps=2000, decay_fraction=0.0)


def _midtrain(c):
  """Sets the values of mid-training: 100B tokens at 16k context, with a learning rate that falls from 3e-4 to 3e-5.

  The paper leaves three things open. Here, the decay is linear (optimizer.decay_shape has other forms). The optimizer
  starts with new moments instead of those of pre-training. The objective is the one that the argument objective=...
  names, as in pre-training.
  """
  c.train.update(tokens=100_000_000_000, batch_size=1024)
  c.data.sequence_length = 16_384
  c.data.tokenizer = 'runs/data/paper/pretrain/tokenizer.model'
  c.model.rope_base = 1e6
  c.optimizer.update(warmup_steps=0, decay_fraction=1.0, final_lr=3e-5)


def _rl(c):
  """Sets the values of RL: GRPO with clip-higher and dynamic sampling, 128 prompts with 16 answers each per step.

  Answers have at most 8k tokens for the first 700 steps, then at most 16k.
  """
  c.train.init_from = 'runs/paper/midtrain'  # a placeholder: name your run with --config.train.init_from=
  c.model.rope_base = 1e6
  c.optimizer.update(lr=1e-6, warmup_steps=0, decay_fraction=0.0, weight_decay=0.0)  # open: weight decay
  c.checkpoint.every_steps = 100
  c.log.update(every_steps=1, eval_every_steps=100)
  # Open: prompts and verifier. Here: math with verifiable answers, in rows {"question": ..., "answer": ...}.
  c.rl.task.update(uri='jsonl:corpus/math/*.jsonl', answer_format='boxed')


def arms(add, seeds=1, stages=STAGES):
  """Adds the runs of all five objectives to a sweep. For each objective and seed, there is one run per stage. Each run
  starts from the run of the stage before.

  add: the function that adds a run to the sweep (launch/points.py).
  seeds: the number of seeds; the paper ran one seed of each objective.
  stages: the stages to run; 'pretrain' is always run.
  """
  for seed in range(seeds):
    for changed in OBJECTIVES.values():
      objective = {f'objective.{key}': value for key, value in (changed or dict(beta=0.0)).items()}
      point = add(arg='stage=pretrain', seed=seed, **objective)
      if 'midtrain' in stages:
        point = add(arg='stage=midtrain', after=point, seed=seed, **objective)
      if 'rl' in stages:
        add(stage='rl', arg='stage=rl', after=point, seed=seed)
