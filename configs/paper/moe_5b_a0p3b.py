"""MoE 5B-A0.3B (4.80B parameters, 0.26B active without the embedding): pre-training only.

    betarank plan --config=configs/paper/moe_5b_a0p3b.py --topology=v5p-256 --usd_per_chip_hour=PRICE
    betarank data prepare --config=configs/paper/moe_5b_a0p3b.py
    betarank train --config=configs/paper/moe_5b_a0p3b.py:objective=beta_low --workdir=gs://BUCKET/moe_5b_a0p3b/pretrain

The argument is stage=pretrain|midtrain|rl, objective=ce|beta_low|beta_high|tail|head, seed=0. configs/paper/__init__.py
has the paper's values, and marks those that the paper leaves open. Pre-training on v5p-256, which has 128 chips, takes
11.6 of 102.8 GB per chip and 23 to 24 hours, as `betarank plan` predicted with libtpu 0.0.52.

The paper only pre-trains this size, and gives no figures for it. The later stages here are those of the other sizes.
"""

from betarank.configs import paper


def get_config(arg=None):
  a = paper.parse(arg)
  c = paper.base(a)
  c.model.update(layers=12, d_model=1024, heads=32, kv_heads=4, remat_policy='attention')
  # Sigmoid scores with a bias that balances the load, as in DeepSeek-V3. Open: the update rate of the bias, the
  # function of the router, and whether there are shared experts.
  c.model.moe.update(experts=384, experts_per_token=12, expert_d_ff=320, router='sigmoid', bias_update_rate=1e-3)
  c.train.mesh.update(fsdp=-1, expert=4)  # 96 experts per chip
  if a.stage != 'rl':
    c.train.microbatches = 4
  return c


def sweep(add):
  paper.arms(add, stages=('pretrain',))
