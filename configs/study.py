"""Study: does a sharper objective give RL a better start? Five objectives, up to ten seeds, then RL.

    python -m betarank.data.installed --out=runs/study/corpus.jsonl                 # the text: what is installed here
    betarank sweep --config=configs/study.py --root=runs/study                      # everything, on one GPU
    betarank sweep --config=configs/study.py --root=runs/study --only='seed=3,*'              # one seed of it
    betarank report runs/study

Each objective is an arm of the study. For each arm and seed, a model is pre-trained on text and problems, mid-trained
on mostly problems while the learning rate falls, and then trained with RL. Samples and probes measure the model before
and after RL. docs/study.md has the design, written before the runs, and the schedule.

Arguments: size=10m (also 20m, 64m, and toy for CPUs), seeds=10, first_seed=N, lr=X (the learning rate of pre-training),
level=3 (how hard RL's problems are: also 1 and 2, and 0, which is the toy's), rl_steps=N, text=URI (another corpus),
arms=paper (also beta, family and change: the sets of arms, joined by +, as in arms=beta+family).
"""

from types import SimpleNamespace

from ml_collections import ConfigDict

from betarank.configs import common, paper

# Tokens: those of pre-training and mid-training together, 20 per parameter. A sixth is mid-training, as in the paper.
SIZES = {
  'toy': dict(tokens=240_000, lr=2e-3, model=dict(layers=2, d_model=96, d_ff=288, heads=3, kv_heads=1, head_dim=32)),
  '10m': dict(tokens=204_000_000, lr=4e-3, model=dict(layers=10, d_model=256, d_ff=768, heads=4, kv_heads=2)),
  '20m': dict(tokens=420_000_000, lr=2e-3, model=dict(layers=10, d_model=384, d_ff=1152, heads=6, kv_heads=3)),
  '64m': dict(tokens=1_290_000_000, lr=1e-3, model=dict(layers=12, d_model=640, d_ff=1920, heads=10, kv_heads=5)),
}
MIDTRAIN = 1 / 6
HELD_OUT = 0.05  # share of all questions that are in no document and in no RL step
# RL's families at each level, and the longest answer in tokens. Documents have levels 1 and 2; level 0 is the toy's.
LEVELS = {
  0: (('chain_sum?max_terms=2&max_digits=1', 'gcd?max_value=9', 'products?max_digits=1'), 32),
  1: (('chain_sum?max_terms=5&max_digits=3', 'gcd', 'products?max_digits=3'), 160),
  2: (('chain_sum?min_terms=4&max_terms=7&min_digits=2&max_digits=3', 'gcd?max_value=9999',
       'products?min_digits=2&max_digits=4'), 224),
  3: (('chain_sum?min_terms=6&max_terms=9&min_digits=3&max_digits=4', 'gcd?min_numbers=3&max_numbers=3&max_value=9999',
       'products?min_digits=3&max_digits=5'), 256),
}
# Each arm is (the objective of pre-training, that of mid-training): the study's arms, and three sets beyond the paper.
# Where the two differ, the name of the arm has the second beta.
ARMS = {
  'paper': [(objective or dict(beta=0.0),) * 2 for objective in paper.OBJECTIVES.values()],
  'beta': [(dict(beta=beta),) * 2 for beta in (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)],
  'family': [(objective,) * 2 for objective in (
    dict(beta=0.0), dict(form='dft'), dict(form='focal', beta=0.5), dict(beta=-0.25, lambda_tail=-0.1))],
  'change': [(dict(beta=early), dict(beta=late)) for early, late in ((-0.25, 0.0), (0.5, -0.25))],
}


def parse(arg: str | None) -> SimpleNamespace:
  a = common.parse(arg, size='10m', stage='pretrain', objective='ce', seed=0, seeds=10, first_seed=0, lr=0.0,
                   level=3, rl_steps=0, arms='paper', text='jsonl:runs/study/corpus.jsonl')
  known = [('size', a.size, SIZES), ('stage', a.stage, paper.STAGES), ('objective', a.objective, paper.OBJECTIVES),
           ('level', a.level, LEVELS), *(('arms', name, ARMS) for name in a.arms.split('+'))]
  for name, value, values in known:
    common.check_choice(name, value, values)
  a.toy = a.size == 'toy'
  return a


def get_config(arg=None) -> ConfigDict:
  a = parse(arg)
  return _rl(a) if a.stage == 'rl' else _training(a)


def _training(a) -> ConfigDict:
  """Returns the config of mid-training if `a.stage` is 'midtrain', else the config of pre-training.

  The two stages differ in mixture, tokens and learning rate.

  a: the parsed argument, from `parse`.
  """
  c, mid, size = common.base(), a.stage == 'midtrain', SIZES[a.size]
  c.seed = a.seed
  # Unrolled layers are 1.8 times as fast as a scan for 10M parameters on an H100.
  c.model.update(vocab_size=1024 if a.toy else 8192, scan_layers=a.toy, **size['model'])
  c.objective.update(top_k=100, **paper.OBJECTIVES[a.objective])
  c.data.update(dir='runs/study/data' + ('/toy' if a.toy else ''), sequence_length=256 if a.toy else 512,
                held_out_fraction=HELD_OUT, validation_fraction=0.02 if a.toy else 0.005)
  c.data.sources = {'text': _source(c, a.text, 0.3 if mid else 0.7, 300 if a.toy else 0), **_problems(c, a.toy, mid)}
  c.train.update(tokens=round(size['tokens'] * (MIDTRAIN if mid else 1 - MIDTRAIN)), batch_size=4 if a.toy else 128)
  lr = a.lr or size['lr']
  c.optimizer.update(lr=lr, warmup_steps=10 if a.toy else 100, decay_fraction=0.9 if mid else 0.0, final_lr=lr / 10)
  c.checkpoint.update(every_steps=40 if a.toy else 1000, keep=1)
  c.log.update(every_steps=10 if a.toy else 20, eval_every_steps=10**6, eval_batches=20 if a.toy else 8, samples=0,
               tensorboard=False, head_tail_mass=False)
  return c


def _source(c, uri: str, weight: float, max_documents: int) -> dict:
  return dict(c.data.sources.main, uri=uri, weight=weight, max_documents=max_documents)


def _problems(c, toy: bool, mid: bool) -> dict:
  """Returns {name of the source: its settings} for problems with worked solutions.

  c: a config, whose source `main` has the settings that aren't changed here.
  toy: True for the size `toy`, which has fewer and easier problems.
  mid: whether the source is for mid-training. This source has half as many problems, and lists the families in another
    order. All of its problems are in the source of pre-training too, because the n-th problem of a family doesn't
    depend on the order.
  """
  kinds = LEVELS[0][0] if toy else (*LEVELS[1][0], *LEVELS[2][0], 'gsm_symbolic')
  if mid:
    return {'more_problems': _source(c, f'reasoning:{"+".join(reversed(kinds))}', 0.7, 2_000 if toy else 600_000)}
  return {'problems': _source(c, f'reasoning:{"+".join(kinds)}', 0.3, 4_000 if toy else 1_200_000)}


def _task(a) -> tuple[str, int]:
  """Returns (the URI of RL's problems, the largest length of an answer in tokens).

  a: the parsed argument, from `parse`.
  """
  kinds, longest = LEVELS[0 if a.toy else a.level]
  return f'reasoning:{"+".join(kinds)}', longest


def _rl(a) -> ConfigDict:
  c = common.rl_base()
  c.seed = a.seed
  c.model = _training(a).model
  c.optimizer.update(lr=2e-4 if a.toy else 5e-5, b2=0.99, warmup_steps=0, weight_decay=0.0)
  c.checkpoint.update(every_steps=2 if a.toy else 20, keep=1)
  c.log.update(every_steps=1, eval_every_steps=10**6, samples=0, tensorboard=False)
  uri, longest = _task(a)
  c.rl.update(max_prompt_tokens=128, max_new_tokens=(longest,), phase_steps=(), eval_samples=4)
  if a.toy:
    c.rl.update(steps=4, prompts_per_step=4, group_size=4, decode_batch_size=16, eval_prompts=4)
  else:
    c.rl.update(steps=100, prompts_per_step=64, decode_batch_size=2048, extra_prompts=64,
                microbatch_tokens=2**16, eval_prompts=64)
  c.rl.steps = a.rl_steps or c.rl.steps
  c.rl.task.update(uri=uri, held_out_fraction=HELD_OUT)
  c.rl.verifier.workers = 2 if a.toy else 4
  return c


def _sampled(a) -> dict:
  """Returns the settings of `betarank eval sample`, {dotted key: value}.

  There are 576 held-out problems, 192 of each family, with 64 samples each. If the size is `toy`, there are only 12
  problems, with 4 samples each.

  a: the parsed argument, from `parse`.
  """
  sample = dict(problems=12, samples=4, decode_batch_size=16) if a.toy else dict(
    problems=576, samples=64, decode_batch_size=2048)
  sample |= {'max_new_tokens': _task(a)[1], 'temperature': 1.0, 'top_p': 1.0, 'held_out_fraction': HELD_OUT,
             'verifier.workers': 2 if a.toy else 4}
  return {f'eval.sample.{name}': value for name, value in sample.items()}


def sweep(add, arg):
  a = parse(arg)
  rows = {'eval.probe.rows': 32 if a.toy else 512, 'eval.probe.batch_size': 8 if a.toy else 64}
  arms = []
  for name in a.arms.split('+'):
    arms += [arm for arm in ARMS[name] if arm not in arms]
  for seed in range(a.first_seed, a.first_seed + a.seeds):
    pretrained = {}
    for early, late in arms:
      if str(early) not in pretrained:
        pretrained[str(early)] = add(arg='stage=pretrain', seed=seed, **_objective(early))
      start = pretrained[str(early)]
      name = '' if late == early else f'{start.rpartition("/")[0]},then_beta={late["beta"]}'
      before = add(name, arg='stage=midtrain', after=start, seed=seed, **_objective(late))
      after = add(stage='rl', arg='stage=rl', after=before, seed=seed)
      for point in (before, after):
        add(point, stage='probe', after=point, **rows)
        add(point, stage='sample', after=point, benchmark=_task(a)[0], **_sampled(a))


def _objective(objective: dict) -> dict:
  """Returns the settings of section `objective`, by dotted key."""
  return {f'objective.{name}': value for name, value in objective.items()}
