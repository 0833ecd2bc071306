"""Every setting, once: its default, its role, and what it means, with its unit.

`betarank COMMAND --help` prints this table, configs/common.py makes configs of it, and dataclasses that can be made
without a config take their defaults from it. Whatever has to know which settings matter for what asks `role`.

A setting is here if some run changes it; everything else is a constant next to the code that uses it. What follows from
other settings is computed where it is used (steps from `train.tokens`), so that an override can't leave the two apart.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

# The role of a setting. Every setting has exactly one.
IDENTITY = 'identity'  # what is learned: fixed for the life of a run, and runs that differ in it are different arms
DATA = 'data'  # what is read from now on: may change when a run resumes, but makes another arm
EXECUTION = 'execution'  # how and where it is computed: may change when a run resumes, and makes no other arm
LENGTH = 'length'  # how long the run lasts: may change when it resumes
REPORTING = 'reporting'  # what is logged, evaluated and kept along the way: may change when a run resumes


class Setting(NamedTuple):
  """One setting.

  Attributes:
    default: its value unless a config says otherwise; the type of an override is the type of this value.
    role: one of the constants above.
    help: what it means, with the unit and the values it can take.
  """

  default: Any
  role: str
  help: str


S = Setting

VERIFIER = dict(
  workers=S(2, EXECUTION, 'processes that compare answers'),
  deadline_s=S(5.0, EXECUTION, 'seconds per comparison; one that takes longer leaves the answer undecided'),
  memory_mb=S(2048, EXECUTION, 'MB of memory per worker'),
  answer_chars=S(10_000, IDENTITY, 'longest answer that is read, in characters; a longer one is wrong'),
)

# The jail that programs run in (tasks/code_jail.py).
CODE_JAIL = dict(
  workers=S(2, EXECUTION, 'programs at the same time'),
  cpu_s=S(5.0, EXECUTION, 'CPU seconds per process of a program'),
  deadline_s=S(20.0, EXECUTION, 'wall-clock seconds per program'),
  memory_mb=S(1024, EXECUTION, 'MB of memory per process'),
  processes=S(4, EXECUTION, 'processes at the same time, threads included'),
  accept_no_isolation=S(False, EXECUTION, 'where the kernel offers no isolation, run what a model wrote as you'),
)

# What `betarank train` reads, but for `train.mesh` and the like, which RL shares.
MODEL = dict(
  vocab_size=S(8192, IDENTITY, 'tokens; a tokenizer that is trained for the run gets the same number'),
  layers=S(4, IDENTITY, 'transformer blocks'),
  d_model=S(256, IDENTITY, 'width of the residual stream'),
  d_ff=S(768, IDENTITY, 'width of the gated feed-forward'),
  heads=S(4, IDENTITY, 'query heads'),
  kv_heads=S(2, IDENTITY, 'key and value heads, each shared by heads / kv_heads query heads'),
  head_dim=S(64, IDENTITY, 'width of a head'),
  rope_base=S(1e4, IDENTITY, 'base of the rotary embedding; 1e6 from 16k tokens of context on'),
  norm_eps=S(1e-6, IDENTITY, 'epsilon of RMSNorm'),
  tied_embeddings=S(True, IDENTITY, 'one matrix both embeds and predicts'),
  compute_dtype=S('auto', EXECUTION, 'auto (bfloat16 on TPU and GPU, float32 on CPU) | float32 | bfloat16. Parameters '
                  'are always float32'),
  attention=S('auto', EXECUTION, 'auto (chosen by device) | plain | blocks (CPU) | splash (TPU) | hopper | triton | '
              'cudnn (GPU)'),
  remat_policy=S('none', EXECUTION, 'activations saved for the backward pass: none (all of them are) | matmuls | qkv | '
                 'attention | full (only the input of each block)'),
  offload_activations=S(False, EXECUTION, 'keep the saved activations in host memory'),
  scan_layers=S(True, EXECUTION, 'scan over layers; false unrolls them: slower to compile, 5 % faster on a GPU, easy '
                'to step through'),
  moe=dict(
    experts=S(0, IDENTITY, 'experts per layer, in place of the dense feed-forward; 0: a dense model'),
    experts_per_token=S(0, IDENTITY, 'experts that each token is sent to'),
    expert_d_ff=S(0, IDENTITY, 'width of an expert; d_ff then has no effect'),
    shared_d_ff=S(0, IDENTITY, 'width of an expert that every token passes; 0: none'),
    router=S('sigmoid', IDENTITY, 'sigmoid (a bias balances the load) | softmax (balance_weight does)'),
    norm_topk_prob=S(True, IDENTITY, 'divide the scores of the chosen experts by their sum; false: as in the config of '
                     'Qwen3-MoE'),
    routed_scale=S(1.0, IDENTITY, 'factor of the weighted sum of the chosen experts'),
    bias_update_rate=S(1e-3, IDENTITY, "router bias update per step (DeepSeek-V3's gamma); sigmoid only"),
    balance_weight=S(0.0, IDENTITY, 'factor of the load-balance loss, which is 1 for an even load; softmax only'),
    kernel=S('auto', EXECUTION, 'auto (chosen by device) | tiles | ragged | pallas (TPU) | triton (GPU)'),
  ),
)

OBJECTIVE = dict(
  form=S('power', IDENTITY, "power (the paper's) | product | focal | dft | label_smoothing | ...; see "
         'docs/objective.md'),
  beta=S(0.0, IDENTITY, 'scales the reward of the target: < 0 sharpens (precision), > 0 flattens (diversity); at least '
         '-1. Other forms take their own parameter from it, see docs/objective.md'),
  lambda_head=S(0.0, IDENTITY, 'reward (> 0) or penalty (< 0) of wrong tokens among the top k'),
  lambda_tail=S(0.0, IDENTITY, 'reward or penalty of all other wrong tokens'),
  top_k=S(100, IDENTITY, 'tokens in the head'),
  schedule=S('constant', IDENTITY, 'constant | linear (from the values *_from at schedule_start to those above at '
             'schedule_end) | step (the values *_from until schedule_start, those above from then on)'),
  beta_from=S(0.0, IDENTITY, 'first value of beta under a schedule'),
  lambda_head_from=S(0.0, IDENTITY, 'first value of lambda_head under a schedule'),
  lambda_tail_from=S(0.0, IDENTITY, 'first value of lambda_tail under a schedule'),
  schedule_start=S(0, IDENTITY, 'optimizer step'),
  schedule_end=S(0, IDENTITY, 'optimizer step'),
  z_loss=S(0.0, IDENTITY, 'factor of logsumexp(logits)^2'),
)

DATA_SECTION = dict(
  dir=S('runs/data/base', EXECUTION, 'holds tokenizer.model and one folder of prepared data per source; local or '
        'gs://'),
  tokenizer=S('', EXECUTION, 'tokenizer to use: a SentencePiece .model, a tokenizer.json, or a folder with one of '
              'them; empty: the one that was trained into data.dir'),
  vocab_size=S(8192, IDENTITY, 'always equal to model.vocab_size'),
  sources=S(dict(main=dict(uri='reasoning', weight=1.0, max_documents=100_000, max_bad_rows=0, template='')), DATA,
            'name -> uri (see docs/data.md), weight (share of the training rows), max_documents (0: all; a number is '
            'needed where there is no end of them, as in `reasoning`), max_bad_rows (rows without text that are '
            'skipped; 0: the first one stops), template (of instruction data)'),
  validation_fraction=S(0.01, IDENTITY, 'share of the documents, chosen by a hash of their text'),
  sequence_length=S(512, IDENTITY, 'tokens per row; documents are packed into rows'),
  document_bytes=S(65_536, IDENTITY, 'longer documents are split at line ends'),
  held_out_fraction=S(0.0, IDENTITY, 'share of all questions that `reasoning` leaves out of documents, so that RL can '
                      'be tested on unseen ones'),
  tokenizer_sample_mb=S(0.0, IDENTITY, 'MB of text to train the tokenizer on; 0: 1 KB per token of the '
                        'vocabulary, at least 16 MB'),
  cache_dir=S('', EXECUTION, 'local folder for copies of prepared sets that are in a bucket, for small ones; empty: '
              'they are read in place'),
  cache_gb=S(20.0, EXECUTION, 'GB (10^9 bytes) of all copies in cache_dir; those not in use are deleted to make room'),
)

MESH = dict(
  data=S(1, EXECUTION, 'devices that hold copies of the model, each with its own rows; -1: the rest'),
  fsdp=S(-1, EXECUTION, 'devices that split weights and rows; -1: the rest'),
  expert=S(1, EXECUTION, 'devices that split the experts'),
  context=S(1, EXECUTION, 'devices that split the sequence'),
  tensor=S(1, EXECUTION, 'devices that split heads, hidden width and vocabulary'),
)

TRAIN = dict(
  tokens=S(10_000_000, LENGTH, 'budget; steps = ceil(tokens / (batch_size * sequence_length))'),
  batch_size=S(8, IDENTITY, 'rows per step, over all devices'),
  microbatches=S(1, EXECUTION, 'parts in which the rows of a step are computed one after the other, to save memory'),
  mesh=MESH,
  init_from=S('', EXECUTION, 'workdir or checkpoint to start from; empty: random weights'),
  init_what=S('weights', IDENTITY, 'weights | all (weights, optimizer, step and data cursor)'),
)

OPTIMIZER = dict(
  lr=S(3e-4, IDENTITY, 'learning rate after warm-up'),
  warmup_steps=S(100, IDENTITY, 'optimizer steps of linear warm-up'),
  decay_fraction=S(0.0, IDENTITY, 'last share of the steps, over which lr falls to final_lr'),
  final_lr=S(3e-5, IDENTITY, 'learning rate at the end of the decay'),
  b1=S(0.9, IDENTITY, 'AdamW decay of the first moment'),
  b2=S(0.95, IDENTITY, 'AdamW decay of the second moment'),
  eps=S(1e-8, IDENTITY, 'AdamW epsilon'),
  weight_decay=S(0.1, IDENTITY, 'of matrices only, not of norms'),
  clip_norm=S(1.0, IDENTITY, 'largest norm of the whole gradient'),
  moment_dtype=S('float32', IDENTITY, 'of the first moment: float32 | bfloat16, which saves 2 of the 12 bytes per '
                 'parameter at rest'),
)

CHECKPOINT = dict(
  every_steps=S(500, REPORTING, 'steps between checkpoints; the last step is always saved'),
  keep=S(2, REPORTING, 'newest checkpoints that are kept'),
  keep_every_steps=S(0, REPORTING, 'checkpoints of multiples of this step are kept for good; 0: none'),
)

LOG = dict(
  every_steps=S(10, REPORTING, 'steps between lines of the log'),
  eval_every_steps=S(500, REPORTING, 'steps between evaluations; the last step is always evaluated'),
  eval_batches=S(20, REPORTING, 'validation batches per source, the same ones each time'),
  samples=S(3, REPORTING, 'texts written at each evaluation'),
  sample_tokens=S(64, REPORTING, 'longest such text, in tokens'),
  tensorboard=S(True, REPORTING, 'write TensorBoard event files to WORKDIR/tensorboard'),
  head_tail_mass=S(True, REPORTING, "log head and tail mass at every step; false skips their top-k (5 to 7 % of a "
                   "large model's step on TPU and GPU) unless a lambda needs it. Validation always logs them"),
  profile_steps=S('', REPORTING, 'FIRST-LAST: steps of which a profile is written to WORKDIR/profile (TensorBoard, '
                  'xprof); empty: none'),
)

PRETRAIN = dict(
  seed=S(0, IDENTITY, 'one integer decides initial weights, data order and sampled text'),
  model=MODEL, objective=OBJECTIVE, data=DATA_SECTION, train=TRAIN, optimizer=OPTIMIZER, checkpoint=CHECKPOINT, log=LOG,
)

RL_SECTION = dict(
  steps=S(1000, LENGTH, 'RL steps'),
  prompts_per_step=S(128, IDENTITY, 'groups to learn from per step'),
  group_size=S(16, IDENTITY, 'samples per prompt'),
  max_resampling_rounds=S(3, IDENTITY, 'dynamic sampling: draws per step, the first included; each draw replaces the '
                          'zero-variance groups of the one before'),
  max_prompt_tokens=S(1024, IDENTITY, 'longest prompt, in tokens'),
  max_new_tokens=S((8192, 16_384), IDENTITY, 'longest answer, in tokens, one number per phase'),
  phase_steps=S((700,), IDENTITY, 'last step of each phase but the last'),
  decode_batch_size=S(256, EXECUTION, 'samples decoded at the same time'),
  cache_tokens=S(0, EXECUTION, 'tokens that the cache of keys and values has room for, on all devices together; 0: '
                 'decode_batch_size prompts and answers of full length'),
  truncated_reward=S('zero', IDENTITY, 'of an answer cut off by the length limit: zero | masked (overlong filtering). '
                     'The paper leaves it open'),
  overlong_buffer=S(0, IDENTITY, 'soft penalty for long answers (DAPO): from 0 to -1 over the last so many tokens '
                    'before the limit; 0: none'),
  temperature=S(1.0, IDENTITY, 'of sampling, and of the log-probabilities that are learned from'),
  long_prompts=S('refuse', DATA, 'prompts of more than max_prompt_tokens: refuse (before the run starts, if the task'
                 ' has an end) | skip (left out and counted)'),
  zero_variance_groups=S('auto', IDENTITY, 'groups whose rewards are all equal: replace (dynamic sampling) | keep | '
                         'auto (keep for w_reinforce, whose advantages compare nothing; else replace)'),
  minibatches=S(1, IDENTITY, 'updates per step; 1 is on-policy. The paper leaves it open'),
  microbatches=S(1, EXECUTION, 'parts in which an update is computed one after the other, to save memory'),
  eval_prompts=S(64, REPORTING, 'problems per evaluation'),
  eval_samples=S(16, REPORTING, 'samples per problem of an evaluation'),
  eval_tasks=S({}, REPORTING, 'more problems to evaluate on, name -> uri as rl.task.uri, such as '
               '{"aime24": "jsonl:aime24.jsonl"}; the first eval_prompts of each'),
  task=dict(
    uri=S('reasoning:chain_sum', IDENTITY, 'reasoning:TASK?OPTION=VALUE, jsonl:GLOB, tfds:NAME or code:GLOB '
          '(docs/rl.md)'),
    prompt=S('Question: {question}\nSolution:', IDENTITY, 'what the model sees; as in the pre-training documents'),
    answer_format=S('line', IDENTITY, "line ('Answer: X') | boxed (\\boxed{X})"),
    held_out_fraction=S(0.02, IDENTITY, 'share of the questions that are never trained on; for pre-training: '
                        'data.held_out_fraction'),
    reward=S('', IDENTITY, 'FILE.py:FUNCTION or MODULE:FUNCTION, a reward of your own (docs/extend.md); empty: 1 '
             'for right answers, 0 for wrong ones'),
  ),
  verifier=VERIFIER,
  code=CODE_JAIL,
  advantage=dict(
    name=S('grpo', IDENTITY, 'grpo | dr_grpo | rloo | pass_at_k | w_reinforce'),
    ddof=S(1, IDENTITY, 'degrees of freedom taken off in the standard deviation; grpo'),
    k=S(4, IDENTITY, 'pass_at_k'),
    positive_weight=S(0.1, IDENTITY, 'weight of right answers; w_reinforce'),
  ),
  loss=dict(
    name=S('clip_higher', IDENTITY, 'clip_higher | cispo | gspo | ...; see docs/rl.md'),
    eps_low=S(0.2, IDENTITY, 'the ratio is clipped below 1 - eps_low; published: gspo 3e-4, cispo 1 (no limit)'),
    eps_high=S(0.28, IDENTITY, 'the ratio is clipped above 1 + eps_high; published: gspo 4e-4, cispo 4'),
    dual_clip=S(0.0, IDENTITY, 'largest ratio that counts where the advantage is negative (dual clip, usually 3); '
                'clip_higher. 0: no limit'),
    aggregation=S('token_mean', IDENTITY, 'token_mean | sequence_mean | constant'),
    constant=S(0, IDENTITY, 'divisor of a sequence for aggregation=constant: the longest answer, in tokens'),
    importance_cap=S(2.0, IDENTITY, 'cap of the weight trainer / sampler probability; 0: no such weight'),
    kl=S('k2', IDENTITY, 'estimator of the KL to the start: k2 | k3'),
    kl_weight=S(0.0, IDENTITY, 'factor of the KL term, in nats of loss per nat; 0: no such term'),
    cov=S('', IDENTITY, 'covariance-based control of entropy: clip_cov | kl_cov; empty: none'),
    cov_share=S(2e-4, IDENTITY, 'share of tokens that it singles out'),
    kl_cov_weight=S(1.0, IDENTITY, 'factor of |logp - old_logp| of those tokens; kl_cov. 0 in an on-policy update'),
  ),
)

# What `betarank rl` reads. The objective has no part in RL, and all it needs of the data is the tokenizer.
RL = dict(
  seed=S(0, IDENTITY, 'one integer decides which problems come when, and every sampled text'),
  model=MODEL,
  data=dict(tokenizer=S('', EXECUTION, 'tokenizer to use; empty: the one that the start was trained with')),
  train=dict(mesh=MESH, init_from=S('', EXECUTION, 'pre-trained workdir or checkpoint to start from')),
  optimizer=OPTIMIZER,
  checkpoint=CHECKPOINT,
  log={name: LOG[name] for name in ('every_steps', 'eval_every_steps', 'samples', 'tensorboard', 'profile_steps')},
  rl=RL_SECTION,
)

# Section `eval`, which `betarank eval` adds to the config of a checkpoint.
EVAL = dict(
  probe=dict(
    rows=S(64, IDENTITY, 'validation rows of data.sequence_length tokens per source, the same for every checkpoint'),
    batch_size=S(8, EXECUTION, 'rows computed at the same time, over all devices'),
    top_k=S(0, IDENTITY, 'tokens in the head; 0: objective.top_k'),
  ),
  sample=dict(
    seed=S(0, IDENTITY, 'the same for all checkpoints, so that they are compared on the same random numbers'),
    samples=S(128, IDENTITY, 'samples per problem'),
    problems=S(0, IDENTITY, 'the first ones of a benchmark; 0: all. A number is needed where there is no end of them '
               '(reasoning:...)'),
    temperature=S(0.7, IDENTITY, 'of sampling; 0 takes the most probable token'),
    top_p=S(0.95, IDENTITY, 'nucleus sampling; 1: off'),
    top_k=S(0, IDENTITY, 'most probable tokens that are kept; 0: all'),
    max_new_tokens=S(4096, IDENTITY, 'longest answer, in tokens; the paper: 4096 after pre-training, 16,384 after '
                     'mid-training and RL'),
    decode_batch_size=S(256, EXECUTION, 'samples decoded at the same time'),
    cache_tokens=S(0, EXECUTION, 'tokens that the cache of keys and values has room for, on all devices together; 0: '
                   'decode_batch_size prompts and answers of full length'),
    data_dir=S('runs/data/benchmarks', EXECUTION, "holds the benchmarks' files (docs/eval.md); local or gs://"),
    shots=S(-1, IDENTITY, 'worked examples before each question; -1: as many as the paper gives'),
    prompt=S('Question: {question}\nSolution:', IDENTITY, 'what the model sees'),
    answer_format=S('', IDENTITY, "line ('Answer: X') | boxed (\\boxed{X}); empty: the benchmark's own"),
    held_out_fraction=S(0.02, IDENTITY, 'share of the questions of reasoning:... that are asked; at most '
                        'rl.task.held_out_fraction'),
    verifier=VERIFIER,
  ),
  code=CODE_JAIL,
)

_ALL = {**PRETRAIN, 'rl': RL_SECTION, 'eval': EVAL}


def flat(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Setting]:
  """Returns {'optimizer.lr': Setting, ...} for a nested dictionary of settings."""
  found = {}
  for key, value in tree.items():
    found |= {prefix + key: value} if isinstance(value, Setting) else flat(value, f'{prefix}{key}.')
  return found


_FLAT = flat(_ALL)


def defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the defaults of a nested dictionary of settings, as a nested dictionary."""
  copied = lambda value: {key: copied(item) for key, item in value.items()} if isinstance(value, dict) else value
  return {key: copied(value.default) if isinstance(value, Setting) else defaults(value) for key, value in tree.items()}


def default(key: str) -> Any:
  """Returns the default of the setting `key` (a dotted name), for use as the default of a dataclass field."""
  return _FLAT[key].default


def role(key: str) -> str:
  """Returns the role of the dotted `key`, which may lie inside a setting that is a section (data.sources.main.uri).

  Raises KeyError if the key isn't a setting.
  """
  name = key
  while name not in _FLAT:
    if '.' not in name:
      raise KeyError(key)
    name = name.rpartition('.')[0]
  return _FLAT[name].role
