r"""MoE 20B-A1B (19.6B parameters, 0.95B active without the embedding): all three stages.

    betarank plan --config=configs/paper/moe_20b_a1b.py --topology=v5p-256 --usd_per_chip_hour=PRICE
    betarank data prepare --config=configs/paper/moe_20b_a1b.py
    betarank train --config=configs/paper/moe_20b_a1b.py:objective=beta_low --workdir=gs://BUCKET/moe_20b_a1b/pretrain
    betarank train --config=configs/paper/moe_20b_a1b.py:objective=beta_low,stage=midtrain \
        --config.train.init_from=gs://BUCKET/moe_20b_a1b/pretrain --workdir=gs://BUCKET/moe_20b_a1b/midtrain
    betarank rl --config=configs/paper/moe_20b_a1b.py:stage=rl \
        --config.train.init_from=gs://BUCKET/moe_20b_a1b/midtrain --workdir=gs://BUCKET/moe_20b_a1b/rl

The argument is stage=pretrain|midtrain|rl, objective=ce|beta_low|beta_high|tail|head, seed=0. configs/paper/__init__.py
has the paper's values, and marks those that the paper leaves open. Pre-training on v5p-256, which has 128 chips, takes
23.2 of 102.8 GB per chip and 60 to 62 hours, as `betarank plan` predicted with libtpu 0.0.52.

The paper's results in percent, averaged over 19 benchmarks (after RL: Avg@128, averaged over six math sets). Figures
that aren't known are left out.

    objective             ce     beta_low   beta_high   tail    head
    after pre-training    49.80  50.27      49.99       50.11
    after RL              34.79  36.06      32.41       36.02   34.13
"""

from betarank.configs import paper


def get_config(arg=None):
  a = paper.parse(arg)
  c = paper.base(a)
  # Open: the expert width and the heads of this model. With 448 and 32/4 it has the 20B and 1B of its name.
  c.model.update(layers=24, d_model=1536, heads=32, kv_heads=4, remat_policy='attention')
  # Sigmoid scores with a bias that balances the load, as in DeepSeek-V3. Open: the update rate of the bias, the
  # function of the router, and whether there are shared experts.
  c.model.moe.update(experts=384, experts_per_token=12, expert_d_ff=448, router='sigmoid', bias_update_rate=1e-3)
  c.train.mesh.update(fsdp=-1, expert=4)  # 96 experts per chip
  if a.stage == 'rl':
    c.rl.update(decode_batch_size=2048, cache_tokens=13_000_000)  # room for 6,300 tokens per row
  else:
    c.train.microbatches = 4
  return c


def sweep(add):
  paper.arms(add, stages=paper.STAGES)
