"""What every experiment starts from: all settings with their units, and the reading of a config's argument.

A setting is here if some run changes it; all else is a constant beside the code that uses it. What follows
from other settings is computed from them where it is used (steps from `train.tokens`, the tokenizer's
vocabulary from the model's), so an override can't leave the two apart.
"""

from types import SimpleNamespace

from ml_collections import ConfigDict, FieldReference

from betarank.configs.errors import ConfigError, suggestion


def base() -> ConfigDict:
  """A 5M-parameter model on made-up reasoning problems; experiments change what they need."""
  c = ConfigDict()
  c.seed = 0  # one integer decides initial weights, data order and sampled text

  vocab_size = FieldReference(8192)
  c.model = ConfigDict(dict(
    vocab_size=vocab_size,  # tokens; the tokenizer is trained to the same number
    layers=4,
    d_model=256,
    d_ff=768,  # width of the gated feed-forward
    heads=4,  # query heads
    kv_heads=2,  # key and value heads, shared by heads / kv_heads query heads each
    head_dim=64,
    rope_base=1e4,  # 1e6 from 16k tokens of context on
    norm_eps=1e-6,
    tied_embeddings=True,  # one matrix embeds and predicts
    compute_dtype='auto',  # auto: bfloat16 on TPU and GPU, float32 on CPU. Parameters are float32 always
    attention='auto',  # plain | blocks (CPU) | splash (TPU) | hopper | triton | cudnn (GPU); auto: by the devices
    remat_policy='none',  # activations saved for the backward pass: none | matmuls | qkv | attention | full
    offload_activations=False,  # keep the saved activations in host memory
    scan_layers=True,  # false unrolls the layers: slower to compile, easy to step through, 5 % faster on a GPU
    moe=dict(  # a mixture of experts in place of the dense feed-forward
      experts=0,  # 0: dense
      experts_per_token=0,
      expert_d_ff=0,  # width of each; d_ff then plays no part
      shared_d_ff=0,  # width of one more that every token passes; 0: none
      router='sigmoid',  # sigmoid: a bias on the choice evens out the load; softmax: balance_weight does
      routed_scale=1.0,  # on the sum of the chosen experts
      bias_update_rate=1e-3,  # what the bias moves a step (sigmoid)
      balance_weight=0.0,  # of the load-balance loss, which is 1 when even (softmax)
      kernel='auto',  # tiles | ragged | pallas (TPU) | triton (GPU); auto: by the devices in use (model/moe.py)
    ),
  ))

  # All zero is plain cross-entropy. docs/objective.md has the equations.
  c.objective = ConfigDict(dict(
    form='power',  # the paper's; or product, focal, dft, label_smoothing, ... (objectives/family.py)
    beta=0.0,  # < 0 sharpens (precision), > 0 flattens (diversity)
    lambda_head=0.0,  # reward (> 0) or punishment (< 0) of wrong tokens among the top k
    lambda_tail=0.0,  # the same for all other wrong tokens
    top_k=100,
    schedule='constant',  # linear: from the values *_from at schedule_start to those above at schedule_end;
    beta_from=0.0,  # step: the values *_from until schedule_start, those above from there on
    lambda_head_from=0.0,
    lambda_tail_from=0.0,
    schedule_start=0,  # optimizer steps
    schedule_end=0,
    z_loss=0.0,  # factor of logsumexp(logits)^2
  ))

  c.data = ConfigDict(dict(
    dir='runs/data/base',  # tokenizer.model and one prepared folder a source; local or gs://
    tokenizer='',  # an existing SentencePiece .model to use; empty: the one trained into data.dir
    vocab_size=vocab_size,
    # Name -> where documents come from (see data/sources.py) and their share of the training rows.
    # max_documents: 0 takes all there are; `reasoning` has no end, so it needs a number. max_bad_rows: rows without
    # text that are skipped, at most; 0: the first one stops. template: of instruction data (data/fields.py).
    sources=dict(main=dict(uri='reasoning', weight=1.0, max_documents=100_000, max_bad_rows=0, template='')),
    validation_fraction=0.01,  # of the documents, chosen by a hash of their text
    sequence_length=512,  # tokens a row; documents are packed into rows
    document_bytes=65_536,  # longer ones are cut at line ends, plain text files too
    held_out_fraction=0.0,  # of all questions: `reasoning` leaves them out, so that RL can be tested on unseen ones
    tokenizer_sample_mb=0.0,  # MB of text to train the tokenizer on; 0: 1 KB per token of the vocabulary, 16 at least
    cache_dir='',  # local folder for copies of prepared sets in a bucket, for small ones; empty: they are read in place
    cache_gb=20.0,  # GB (10^9 bytes) of all copies in cache_dir; those not in use are deleted to make room
  ))

  c.train = ConfigDict(dict(
    tokens=10_000_000,  # budget; steps = ceil(tokens / (batch_size * sequence_length))
    batch_size=8,  # rows a step, over all devices
    microbatches=1,  # a step's rows are worked through in this many parts, to save memory
    mesh=dict(data=1, fsdp=-1, expert=1, context=1, tensor=1),  # devices an axis; one may be -1: the rest
    init_from='',  # a run's workdir or one of its checkpoints to start from; empty: random weights
    init_what='weights',  # weights | all (weights, optimizer, step and data cursor)
  ))

  c.optimizer = ConfigDict(dict(  # AdamW, warmup-stable-decay
    lr=3e-4,  # the plateau
    warmup_steps=100,
    decay_fraction=0.0,  # last share of the steps over which lr falls to final_lr
    final_lr=3e-5,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,  # on matrices only, not on norms
    clip_norm=1.0,  # of the whole gradient
    moment_dtype='float32',  # of the first moment; bfloat16 saves 2 of the 12 bytes that a parameter takes at rest
  ))

  c.checkpoint = ConfigDict(dict(
    every_steps=500,
    keep=2,  # newest ones kept
    keep_every_steps=0,  # these are kept for good; 0: none
  ))

  c.log = ConfigDict(dict(
    every_steps=10,
    eval_every_steps=500,  # also after the last step
    eval_batches=20,  # validation batches a source, the same ones each time
    samples=3,  # texts to write at each evaluation
    sample_tokens=64,  # length of each, at most
    tensorboard=True,
    head_tail_mass=True,  # log head and tail mass of every step. False skips their top-k, 5 to 7 % of a large model's
    # step on TPU and GPU, unless a lambda needs it. Validation always logs them
  ))
  return c


def rl() -> ConfigDict:
  """Section `rl`: the paper's recipe (on-policy GRPO, clip-higher, dynamic sampling, no KL), and DAPO's where it is
  silent.
  """
  return ConfigDict(dict(
    steps=1000,
    prompts_per_step=128,  # a step; groups to learn from
    group_size=16,  # samples per prompt, at temperature 1
    max_resampling_rounds=3,  # dynamic sampling: draws per step, the first included; each replaces zero-variance groups
    max_prompt_tokens=1024,
    max_new_tokens=(8192, 16_384),  # a phase
    phase_steps=(700,),  # last step of each phase but the last
    decode_batch_size=256,  # samples decoded at the same time
    # Reward of an answer cut off by the length limit: zero | masked (overlong filtering). The paper leaves it open.
    truncated_reward='zero',
    minibatches=1,  # updates a step; 1 is on-policy. The paper leaves it open
    microbatches=1,  # an update is worked through in this many parts, to save memory
    eval_prompts=64,  # held-out problems
    eval_samples=16,
    task=dict(
      uri='reasoning:chain_sum',  # reasoning:TASK?OPTION=VALUE, jsonl:GLOB or tfds:NAME (rl/tasks.py)
      prompt='Question: {question}\nSolution:',  # as in the pre-training documents (data/reasoning.py)
      answer_format='line',  # line: 'Answer: X'; boxed: \\boxed{X}
      held_out_fraction=0.02,  # of the questions, never trained on; pre-training: data.held_out_fraction
    ),
    verifier=dict(workers=2, deadline_s=5.0, memory_mb=2048, answer_chars=10_000),
    advantage=dict(name='grpo', ddof=1, k=4, positive_weight=0.1),  # k: of pass_at_k; weight: of w_reinforce
    loss=dict(
      name='clip_higher', eps_low=0.2, eps_high=0.28, aggregation='token_mean', constant=0,
      importance_cap=2.0,  # of trainer over sampler probability; 0: no such weight
      kl='k2', kl_weight=0.0, cov='', cov_share=2e-4, kl_cov_weight=1.0,
    ),
  ))


def evaluation() -> ConfigDict:
  """Section `eval`, which `betarank eval` adds to a run's config: the probe's tokens, and the paper's sampling."""
  return ConfigDict(dict(
    probe=dict(
      rows=64,  # validation rows of data.sequence_length tokens, of each source; the same ones for every checkpoint
      batch_size=8,  # rows at once, over all devices
      top_k=0,  # tokens that make up the head; 0: objective.top_k
    ),
    sample=dict(
      seed=0,  # the same for all checkpoints, so that they are compared on the same random numbers
      samples=128,  # n, of each problem
      problems=0,  # the first ones of a benchmark; 0: all. A number where there is no end of them (reasoning:...)
      temperature=0.7,
      top_p=0.95,
      top_k=0,  # 0: all tokens
      max_new_tokens=4096,  # the paper: 4096 after pre-training, 16,384 after mid-training and RL
      decode_batch_size=256,  # samples decoded at the same time
      data_dir='runs/data/benchmarks',  # holds the benchmarks' files (eval/benchmarks.py); local or gs://
      shots=-1,  # worked examples before each question; -1: as many as the paper gives
      prompt='Question: {question}\nSolution:',
      answer_format='',  # line: 'Answer: X'; boxed: \\boxed{X}; empty: the benchmark's own
      held_out_fraction=0.02,  # of the questions of reasoning:..., asked here; no more than rl.task.held_out_fraction
      verifier=dict(workers=2, deadline_s=5.0, memory_mb=2048, answer_chars=10_000),
    ),
    code=dict(  # the jail that programs run in (eval/code_jail.py)
      workers=2,  # programs at once
      cpu_s=5.0,  # of each process of a program
      deadline_s=20.0,  # by the clock
      memory_mb=1024,  # of each process
      processes=4,  # at once, threads included
      accept_no_isolation=False,  # where the kernel offers none, true runs what a model wrote as you
    ),
  ))


def parse(arg: str | None, **defaults) -> SimpleNamespace:
  """Reads 'beta=-0.25,seed=1' by the types of `defaults`, e.g. parse(arg, beta=0.0, seed=0)."""
  values = dict(defaults)
  for item in (arg or '').split(','):
    if not item:
      continue
    key, equals, text = item.partition('=')
    if key not in defaults:
      raise ConfigError(f'config argument {key!r}: this file takes {", ".join(defaults)}{suggestion(key, defaults)}')
    kind = type(defaults[key])
    try:
      if not equals:
        raise ValueError
      values[key] = {'true': True, 'false': False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
      raise ConfigError(f'config argument {item!r}: {key} takes a value of type {kind.__name__}') from None
  return SimpleNamespace(**values)
