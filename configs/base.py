"""Base: 317M parameters on 6.3B tokens of real text; takes hours on one GPU or a v5e-8.

    betarank plan --config=configs/base.py --topology=v5e-8 --config.train.mesh.fsdp=8
    betarank data prepare --config=configs/base.py
    betarank train --config=configs/base.py:objective=beta_low --workdir=runs/base/beta_low

The size lies between configs/small.py, where the objectives show no difference, and the paper's models. The budget is
20 tokens per parameter. The text is the 10B-token sample of FineWeb-Edu, read from Hugging Face (pip install
huggingface_hub). text=URI selects another source, such as text=parquet:corpus/*.parquet. The other arguments are
objective=ce|beta_low|beta_high|tail|head and seed=0.

No one has run this config yet. `betarank plan` predicts that it takes 6.3 to 7.3 hours on a v5e-8 (50 to 59
chip-hours), and needs 3.1 of the 16.9 GB of each chip.
"""

from betarank.configs import common, paper

FINEWEB = 'parquet:hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT'


def get_config(arg=None):
  a = common.parse(arg, objective='ce', seed=0, text=FINEWEB)
  common.check_choice('objective', a.objective, paper.OBJECTIVES)
  c = common.base()
  c.seed = a.seed
  c.model.update(vocab_size=32_768, layers=24, d_model=1024, d_ff=2816, heads=8, kv_heads=4, head_dim=128,
                 remat_policy='attention')
  c.objective.update(top_k=100, **paper.OBJECTIVES[a.objective])
  c.data.update(dir='runs/base/data', sequence_length=2048, validation_fraction=0.001)
  c.data.sources.main.update(uri=a.text, max_documents=0)
  c.train.update(tokens=6_300_000_000, batch_size=128, microbatches=4)  # 24,000 steps of 262k tokens
  c.optimizer.update(lr=6e-4, warmup_steps=500, decay_fraction=0.2, final_lr=6e-5)
  c.checkpoint.update(every_steps=500, keep=2, keep_every_steps=5000)
  c.log.update(every_steps=20, eval_every_steps=1000, head_tail_mass=False)
  return c


def sweep(add):
  for objective in paper.OBJECTIVES.values():
    add(**{f'objective.{name}': value for name, value in (objective or dict(beta=0.0)).items()})
