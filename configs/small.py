"""Small: the paper's five objectives with RL at 62M parameters; 11 minutes on one H100.

    betarank sweep --config=configs/small.py --root=runs/small --parallel=5     # five arms share one GPU
    betarank train --config=configs/small.py:objective=beta_low --workdir=runs/mine

All objectives have the same token budget, and RL follows each. Before and after RL, a probe measures the token
distribution on held-out documents, and 64 samples per problem measure Avg@64 and Pass@k on held-out problems. The
argument seeds=N runs more seeds, and tokens=N changes the budget. docs/small.md has the results.
"""

from betarank.configs import common, paper

TASK = 'reasoning:chain_sum?max_terms=5&max_digits=3+gcd+products?max_digits=3'
HELD_OUT = 0.02  # share of questions that are kept out of all documents and RL steps, for evaluation
SAMPLE = {'eval.sample.problems': 128, 'eval.sample.samples': 64, 'eval.sample.max_new_tokens': 128,
          'eval.sample.temperature': 1.0, 'eval.sample.top_p': 1.0, 'eval.sample.decode_batch_size': 2048,
          'eval.sample.held_out_fraction': HELD_OUT, 'eval.sample.verifier.workers': 4}


def parse(arg):
  a = common.parse(arg, stage='pretrain', objective='ce', seed=0, seeds=1, tokens=0)
  common.check_choice('stage', a.stage, ('pretrain', 'rl'))
  common.check_choice('objective', a.objective, paper.OBJECTIVES)
  return a


def get_config(arg=None):
  a = parse(arg)
  return _pretrain(a) if a.stage == 'pretrain' else _rl(a)


def _pretrain(a):
  c = common.base()
  c.seed = a.seed
  c.model.update(vocab_size=4096, layers=12, d_model=640, d_ff=1920, heads=10, kv_heads=5, remat_policy='attention')
  c.objective.update(top_k=100, **paper.OBJECTIVES[a.objective])
  c.data.update(dir='runs/small/data', sequence_length=512, held_out_fraction=HELD_OUT)
  c.data.sources.main.max_documents = 120_000
  c.train.update(tokens=10_000_000, batch_size=64)
  c.optimizer.update(lr=1e-3, warmup_steps=50, decay_fraction=0.2, final_lr=1e-4)
  c.log.update(every_steps=20, eval_every_steps=150)
  return c


def _rl(a):
  c = common.rl_base()
  c.seed = a.seed
  c.model = _pretrain(a).model
  c.optimizer.update(lr=5e-5, b2=0.99, warmup_steps=0, weight_decay=0.0)
  c.log.update(every_steps=2, eval_every_steps=10)
  c.rl.update(steps=40, prompts_per_step=64, max_prompt_tokens=64, max_new_tokens=(128,), phase_steps=(),
              decode_batch_size=1024, microbatch_tokens=2**16, eval_prompts=128)
  c.rl.task.update(uri=TASK, held_out_fraction=HELD_OUT)
  c.rl.verifier.workers = 4
  return c


def sweep(add, arg):
  a = parse(arg)
  budget = {'train.tokens': a.tokens} if a.tokens else {}
  for seed in range(a.seeds):
    for objective in paper.OBJECTIVES.values():
      changed = {f'objective.{name}': value for name, value in (objective or dict(beta=0.0)).items()}
      base = add(arg='stage=pretrain', seed=seed, **changed, **budget)
      rl = add(stage='rl', arg='stage=rl', after=base, seed=seed)
      for point in (base, rl):
        add(point, stage='probe', after=point)
        add(point, stage='sample', after=point, benchmark=TASK, **SAMPLE)
