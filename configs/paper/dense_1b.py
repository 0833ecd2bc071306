"""Dense 1B (1.05B parameters): the paper's smallest model, pre-training only.

    betarank plan --config=configs/paper/dense_1b.py --topology=v5e-256 --usd_per_chip_hour=1.2
    betarank data prepare --config=configs/paper/dense_1b.py
    betarank train --config=configs/paper/dense_1b.py:objective=beta_low --workdir=gs://BUCKET/dense_1b/pretrain

The argument is stage=pretrain|midtrain|rl, objective=ce|beta_low|beta_high|tail|head, seed=0. configs/paper/__init__.py
has the paper's values, and marks those that the paper leaves open. Pre-training on 256 v5e chips takes 33 to 40
hours, as `betarank plan` predicts (docs/plans.md).

In the paper, all five objectives reach 31 to 32 % on average over 19 benchmarks. They show no difference at this size.
"""

from betarank.configs import paper


def get_config(arg=None):
  a = paper.parse(arg)
  c = paper.base(a)
  c.model.update(layers=28, d_model=1536, d_ff=4608, heads=16, kv_heads=4, remat_policy='attention')
  c.train.mesh.update(fsdp=16, data=-1)  # 96 rows of a weight per chip; with only 6, XLA would pad them with zeros
  if a.stage != 'rl':
    c.train.microbatches = 4
  return c


def sweep(add):
  paper.arms(add, stages=('pretrain',))
