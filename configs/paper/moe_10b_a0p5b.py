r"""MoE 10B-A0.5B (9.53B parameters, 0.52B active without the embedding): all three stages.

    betarank plan --config=configs/paper/moe_10b_a0p5b.py --topology=v5p-256 --usd_per_chip_hour=PRICE
    betarank data prepare --config=configs/paper/moe_10b_a0p5b.py
    betarank train --config=configs/paper/moe_10b_a0p5b.py:objective=beta_low --workdir=gs://BUCKET/moe_10b_a0p5b/pretrain
    betarank train --config=configs/paper/moe_10b_a0p5b.py:objective=beta_low,stage=midtrain \
        --config.train.init_from=gs://BUCKET/moe_10b_a0p5b/pretrain --workdir=gs://BUCKET/moe_10b_a0p5b/midtrain
    betarank rl --config=configs/paper/moe_10b_a0p5b.py:stage=rl \
        --config.train.init_from=gs://BUCKET/moe_10b_a0p5b/midtrain --workdir=gs://BUCKET/moe_10b_a0p5b/rl

The argument is stage=pretrain|midtrain|rl, objective=ce|beta_low|beta_high|tail|head, seed=0. configs/paper/__init__.py
has the paper's values, and marks those that the paper leaves open. Pre-training on v5p-256, which has 128 chips, takes
17.5 of 102.8 GB per chip and 38 to 40 hours, as `betarank plan` predicted with libtpu 0.0.52.

The paper's results in percent, averaged over 19 benchmarks (after RL: Avg@128, averaged over six math sets). Figures
that aren't known are left out.

    objective             ce     beta_low   beta_high   tail    head
    after pre-training    44.11  44.89      44.52
    after mid-training    50.85  51.13      50.60       50.92   51.06
    after RL              14.37  16.18      14.49       16.50   14.74
"""

from betarank.configs import paper


def get_config(arg=None):
  a = paper.parse(arg)
  c = paper.base(a)
  c.model.update(layers=16, d_model=1536, heads=32, kv_heads=4, remat_policy='attention')
  # Sigmoid scores with a bias that balances the load, as in DeepSeek-V3. Open: the update rate of the bias, the
  # function of the router, and whether there are shared experts.
  c.model.moe.update(experts=384, experts_per_token=12, expert_d_ff=320, router='sigmoid', bias_update_rate=1e-3)
  c.train.mesh.update(fsdp=-1, expert=4)  # 96 experts per chip
  if a.stage == 'rl':
    c.rl.update(decode_batch_size=2048, cache_tokens=13_000_000)  # room for 6,300 tokens per row
  else:
    c.train.microbatches = 4
  return c


def sweep(add):
  paper.arms(add, stages=paper.STAGES)
