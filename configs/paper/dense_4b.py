r"""Dense 4B (4.02B parameters, Qwen3-4B's shape): all three stages.

    betarank plan --config=configs/paper/dense_4b.py --topology=v5e-256 --usd_per_chip_hour=1.2
    betarank data prepare --config=configs/paper/dense_4b.py
    betarank train --config=configs/paper/dense_4b.py:objective=beta_low --workdir=gs://BUCKET/dense_4b/pretrain
    betarank train --config=configs/paper/dense_4b.py:objective=beta_low,stage=midtrain \
        --config.train.init_from=gs://BUCKET/dense_4b/pretrain --workdir=gs://BUCKET/dense_4b/midtrain
    betarank rl --config=configs/paper/dense_4b.py:stage=rl \
        --config.train.init_from=gs://BUCKET/dense_4b/midtrain --workdir=gs://BUCKET/dense_4b/rl

The argument is stage=pretrain|midtrain|rl, objective=ce|beta_low|beta_high|tail|head, seed=0. configs/paper/__init__.py
has the paper's values, and marks those that the paper leaves open. Pre-training on 256 v5e chips takes 8.5 of 16.9 GB
per chip and 121 to 147 hours, as `betarank plan` predicts (docs/plans.md).

The paper's results in percent, averaged over 19 benchmarks (after RL: Avg@128, averaged over six math sets). Figures
that aren't known are left out.

    objective             ce     beta_low   beta_high   tail    head
    after pre-training    42.62  43.11      42.44       42.48
    after mid-training    52.75  52.76      52.23       53.00
    after RL              20.49  21.34      21.37       21.25   21.19
"""

from betarank.configs import paper


def get_config(arg=None):
  a = paper.parse(arg)
  c = paper.base(a)
  c.model.update(layers=36, d_model=2560, d_ff=9728, heads=32, kv_heads=8, remat_policy='full')
  c.train.mesh.update(fsdp=32, data=-1)  # 80 rows of a weight per chip; with 10 or 20, XLA would all-reduce weights
  if a.stage == 'rl':
    c.rl.update(decode_batch_size=2048, cache_tokens=13_000_000)  # room for 6,300 tokens per row
  else:
    c.train.microbatches = 4
  return c


def sweep(add):
  paper.arms(add, stages=paper.STAGES)
