"""Defines every setting, once: its default, its role, and its meaning with the unit.

`betarank COMMAND --help` prints this table, and configs/common.py builds configs from it. Dataclasses that can be
created without a config take their defaults from here. Code that needs to know what a setting affects calls `role`.

A value is a setting only if some run changes it. All other values are constants next to the code that uses them. A
value that follows from settings is computed where it is needed, so that no override can contradict those settings. For
example, the number of steps is computed from `train.tokens`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

# The roles. Every setting has exactly one. An arm is a set of runs that reports treat as repetitions of one experiment.
IDENTITY = 'identity'  # what is learned. It can't change when a run resumes. Runs that differ in it are different arms.
DATA = 'data'  # what is read from now on. It can change when a run resumes. Runs that differ in it are different arms.
EXECUTION = 'execution'  # how and where it is computed. It can change when a run resumes, and doesn't matter for arms.
LENGTH = 'length'  # how long the run lasts. It can change when a run resumes.
REPORTING = 'reporting'  # what is logged, evaluated and kept during a run. It can change when a run resumes.


class Setting(NamedTuple):
  """One setting.

  Attributes:
    default: the value if no config changes it. Overrides must have the type of this value.
    role: what the setting affects: IDENTITY, DATA, EXECUTION, LENGTH or REPORTING. Comments in this file explain them.
    help: what the setting means, with its unit and the possible values.
  """

  default: Any
  role: str
  help: str


S = Setting

VERIFIER = dict(
  workers=S(2, EXECUTION, 'processes that compare answers'),
  deadline_s=S(5.0, EXECUTION, 'CPU seconds per comparison; one that takes longer leaves the answer undecided'),
  memory_mb=S(2048, EXECUTION, 'limit on the memory of each worker, in MB'),
  answer_chars=S(10_000, IDENTITY, 'longest answer that is read, in characters; a longer one is wrong'),
)

# The jail that programs run in (tasks/code_jail.py).
CODE_JAIL = dict(
  workers=S(2, EXECUTION, 'programs that run at the same time'),
  cpu_s=S(5.0, EXECUTION, 'limit on each process of a program, in CPU seconds'),
  deadline_s=S(20.0, EXECUTION, 'limit on each program, in wall-clock seconds; one that takes longer is undecided'),
  memory_mb=S(1024, EXECUTION, 'limit on the memory of each process, in MB'),
  processes=S(4, EXECUTION, 'limit on the processes and threads of a program at the same time'),
  accept_no_isolation=S(False, EXECUTION, "if the kernel offers no isolation, run the model's programs with your own "
                        'rights, under these limits only'),
)

# The sections of `betarank train`. RL reads some of them too.
MODEL = dict(
  vocab_size=S(8192, IDENTITY, 'tokens in the vocabulary, and in a tokenizer that is trained for the run'),
  layers=S(4, IDENTITY, 'transformer blocks'),
  d_model=S(256, IDENTITY, 'width of the residual stream'),
  d_ff=S(768, IDENTITY, 'width of the gated feed-forward'),
  heads=S(4, IDENTITY, 'query heads'),
  kv_heads=S(2, IDENTITY, 'key and value heads, each shared by heads / kv_heads query heads'),
  head_dim=S(64, IDENTITY, 'width of a head'),
  rope_base=S(1e4, IDENTITY, 'base of the rotary embedding; usually 1e6 for a context of 16k tokens or more. If '
              '`betarank train` starts from a checkpoint, an override or a value other than the default replaces '
              "the checkpoint's; the same holds for rope_factor"),
  rope_factor=S(1.0, IDENTITY, "factor of Llama 3.1's rope scaling, for longer texts; 1: none"),
  qk_norm=S(True, IDENTITY, 'normalize queries and keys, as Qwen3 does; Qwen2 and Llama 3 do not'),
  qkv_bias=S(False, IDENTITY, 'add biases to queries, keys and values, as Qwen2 does'),
  norm_eps=S(1e-6, IDENTITY, 'epsilon of RMSNorm'),
  tied_embeddings=S(True, IDENTITY, 'use the embedding matrix for the output head too'),
  compute_dtype=S('auto', EXECUTION, 'auto (bfloat16 on TPU and GPU, float32 on CPU) | float32 | bfloat16. Parameters '
                  'are always float32'),
  attention=S('auto', EXECUTION, 'auto (chosen by device) | plain | blocks (CPU) | splash (TPU) | hopper | triton | '
              'cudnn (GPU). The sampler always reads prompts with auto'),
  remat_policy=S('none', EXECUTION, 'what is saved for the backward pass, which computes the rest again; from most to '
                 'least memory: none (everything is saved) | matmuls | qkv | attention | full (only the input of each '
                 'block)'),
  offload_activations=S(False, EXECUTION, 'keep the saved activations in host memory'),
  scan_layers=S(True, EXECUTION, 'scan over layers; false unrolls them: slower to compile, easy to step through, and '
                'on a GPU faster: 1.05 times for 1B parameters, 1.8 times for 10M'),
  moe=dict(
    experts=S(0, IDENTITY, 'experts per layer, in place of the dense feed-forward; 0: a dense model'),
    experts_per_token=S(0, IDENTITY, 'experts that each token is sent to'),
    expert_d_ff=S(0, IDENTITY, 'width of an expert; d_ff then has no effect'),
    shared_d_ff=S(0, IDENTITY, 'width of a shared expert, which every token uses; 0: none'),
    router=S('sigmoid', IDENTITY, 'sigmoid (a bias balances the load) | softmax (balance_weight does)'),
    norm_topk_prob=S(True, IDENTITY, "divide the scores of the chosen experts by their sum; transformers' default for "
                     'Qwen3-MoE is false'),
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
  top_k=S(100, IDENTITY, 'number of most probable tokens, which form the head'),
  schedule=S('constant', IDENTITY, 'constant | linear (from the values *_from at schedule_start to those above at '
             'schedule_end) | step (the values *_from until schedule_start, those above from then on)'),
  beta_from=S(0.0, IDENTITY, 'first value of beta under a schedule'),
  lambda_head_from=S(0.0, IDENTITY, 'first value of lambda_head under a schedule'),
  lambda_tail_from=S(0.0, IDENTITY, 'first value of lambda_tail under a schedule'),
  schedule_start=S(0, IDENTITY, 'optimizer step at which a linear schedule begins, or a step schedule changes'),
  schedule_end=S(0, IDENTITY, 'optimizer step at which a linear schedule ends'),
  z_loss=S(0.0, IDENTITY, 'factor of logsumexp(logits)^2, which is added to the loss'),
)

DATA_SECTION = dict(
  dir=S('runs/data/base', EXECUTION, 'holds tokenizer.model and one folder of prepared data per source; local or '
        'gs://'),
  tokenizer=S('', EXECUTION, 'tokenizer to use: a SentencePiece .model, a tokenizer.json, or a folder with one of '
              'them; empty: the one that was trained into data.dir'),
  vocab_size=S(8192, IDENTITY, 'tokens in the vocabulary of the tokenizer; always equal to model.vocab_size'),
  sources=S(dict(main=dict(uri='reasoning', weight=1.0, max_documents=100_000, max_bad_rows=0, template='')), DATA,
            'name -> uri (see docs/data.md), weight (share of the training rows), max_documents (0: all; sources '
            'without end, such as `reasoning`, need a number), max_bad_rows (rows without text that may be skipped; '
            'one more is an error), template (how instruction data is written as text)'),
  validation_fraction=S(0.01, IDENTITY, 'share of the documents used for validation, chosen by a hash of their text'),
  sequence_length=S(512, IDENTITY, 'tokens per row; documents are packed into rows'),
  document_bytes=S(0, IDENTITY, 'longest document, in bytes; longer ones are split, at line ends if possible; 0: 8 '
                   'bytes per token of a row, at least 65,536'),
  held_out_fraction=S(0.0, IDENTITY, 'share of all questions that `reasoning` leaves out of documents, so that RL can '
                      'be tested on unseen ones'),
  tokenizer_sample_mb=S(0.0, IDENTITY, 'MB of text to train the tokenizer on; 0: 1 KB per token of the '
                        'vocabulary, at least 16 MB'),
  cache_dir=S('', EXECUTION, 'local folder to which prepared data in a bucket is copied, for small data sets; empty: '
              'it is read from the bucket'),
  cache_gb=S(20.0, EXECUTION, 'largest size of all copies in cache_dir, in GB (10^9 bytes); copies not in use are '
             'deleted to make room'),
)

MESH = dict(
  data=S(1, EXECUTION, 'devices that hold copies of the model, each with its own rows; -1: all that remain'),
  fsdp=S(-1, EXECUTION, 'devices that split weights and rows; -1: all that remain'),
  expert=S(1, EXECUTION, 'devices that split the experts'),
  context=S(1, EXECUTION, 'devices that split the sequence; data.sequence_length must be a multiple of it'),
  tensor=S(1, EXECUTION, 'devices that split heads, hidden width and vocabulary'),
)

TRAIN = dict(
  tokens=S(10_000_000, LENGTH, 'tokens to train on; steps = ceil(tokens / (batch_size * sequence_length))'),
  batch_size=S(8, IDENTITY, 'rows per step, over all devices'),
  microbatches=S(1, EXECUTION, 'parts in which the rows of a step are computed one after the other, to save memory'),
  mesh=MESH,
  init_from=S('', EXECUTION, 'workdir or checkpoint to start from; empty: random weights'),
  init_what=S('weights', IDENTITY, 'what is taken from init_from: weights | all (weights, optimizer, step and data '
              'cursor)'),
)

OPTIMIZER = dict(
  name=S('adamw', IDENTITY, "adamw | muon (the layers' matrices by Muon, the rest by Adam)"),
  lr=S(3e-4, IDENTITY, 'learning rate after warm-up'),
  warmup_steps=S(100, IDENTITY, 'optimizer steps of linear warm-up'),
  decay_fraction=S(0.0, IDENTITY, 'share of the steps, at the end, in which lr falls to final_lr; 0: no decay'),
  decay_shape=S('linear', IDENTITY, 'linear | cosine | 1-sqrt: how lr falls to final_lr'),
  final_lr=S(3e-5, IDENTITY, 'learning rate at the end of the decay; at most lr'),
  b1=S(0.9, IDENTITY, "decay of the first moment; of Muon's momentum too, for which 0.95 is usual"),
  b2=S(0.95, IDENTITY, 'AdamW decay of the second moment'),
  eps=S(1e-8, IDENTITY, 'AdamW epsilon'),
  weight_decay=S(0.1, IDENTITY, 'AdamW weight decay of matrices; norms and biases have none'),
  clip_norm=S(1.0, IDENTITY, 'largest norm of the whole gradient; a larger gradient is scaled down to it'),
  moment_dtype=S('float32', IDENTITY, 'dtype of the first moment: float32 | bfloat16 (saves 2 of the 12 bytes per '
                 'parameter of the training state)'),
)

CHECKPOINT = dict(
  every_steps=S(500, REPORTING, 'steps between checkpoints; the last step is always saved'),
  keep=S(2, REPORTING, 'number of newest checkpoints that are kept'),
  keep_every_steps=S(0, REPORTING, 'checkpoints at multiples of this number of steps are never deleted; 0: none'),
)

LOG = dict(
  every_steps=S(10, REPORTING, 'steps between lines of the log'),
  eval_every_steps=S(500, REPORTING, 'steps between evaluations; the last step is always evaluated'),
  eval_batches=S(20, REPORTING, 'validation batches per source, the same ones each time'),
  samples=S(3, REPORTING, 'texts that the model writes at each evaluation; in pre-training, at most as many as '
            'process 0 has rows of a batch'),
  sample_tokens=S(64, REPORTING, 'longest such text, in tokens'),
  tensorboard=S(True, REPORTING, 'write TensorBoard event files to WORKDIR/tensorboard'),
  wandb=S('', REPORTING, "project of Weights & Biases to send the figures to (pip install 'betarank[wandb]'); empty: "
          'none'),
  head_tail_mass=S(True, REPORTING, 'log head and tail mass at every step; false skips their top-k (about 4 % of the '
                   'step of a 1B model on a GPU, docs/performance.md) unless a lambda needs it. Validation always logs '
                   'them'),
  profile_steps=S('', REPORTING, 'FIRST-LAST: steps of which a profile is written to WORKDIR/profile (TensorBoard, '
                  'xprof); empty: none'),
)

PRETRAIN = dict(
  seed=S(0, IDENTITY, 'one integer decides initial weights, data order and sampled text'),
  model=MODEL, objective=OBJECTIVE, data=DATA_SECTION, train=TRAIN, optimizer=OPTIMIZER, checkpoint=CHECKPOINT, log=LOG,
)

DECODING = dict(
  decode_batch_size=S(256, EXECUTION, 'samples decoded at the same time'),
  cache_tokens=S(0, EXECUTION, 'tokens that the cache of keys and values has room for, on all devices together; 0: '
                 'decode_batch_size prompts and answers of full length'),
  decode_split=S(0, EXECUTION, 'devices that share one copy of the weights while they sample; 0: the model and the '
                 'devices decide'),
)

RL_SECTION = dict(
  steps=S(1000, LENGTH, 'RL steps'),
  prompts_per_step=S(128, IDENTITY, 'prompts to learn from per step, each with a group of samples'),
  group_size=S(16, IDENTITY, 'samples per prompt'),
  max_resampling_rounds=S(3, IDENTITY, 'dynamic sampling: a zero-variance group is replaced, its replacement too, and '
                          'so on, up to this number of groups, the first included'),
  extra_prompts=S(0, EXECUTION, 'further prompts to start before it is known whether the step needs them in place of '
                  'zero-variance groups; changes the time of a step, but not its groups'),
  max_prompt_tokens=S(1024, IDENTITY, 'longest prompt, in tokens'),
  max_new_tokens=S((8192, 16_384), IDENTITY, 'longest answer, in tokens, one number per phase'),
  phase_steps=S((700,), IDENTITY, 'last step of each phase but the last'),
  **DECODING,
  truncated_reward=S('zero', IDENTITY, 'answers that are cut off by the length limit and not right: zero (get at '
                     'most 0) | masked (are left out of the loss). Right answers keep their reward. The paper leaves '
                     'it open'),
  overlong_buffer=S(0, IDENTITY, 'soft penalty for long answers (DAPO): the number of tokens before the length limit '
                    'in which it falls from 0 to -1; 0: no penalty'),
  temperature=S(1.0, IDENTITY, 'temperature of sampling, and of the log-probabilities in the loss'),
  long_prompts=S('refuse', DATA, 'prompts of more than max_prompt_tokens: refuse (an error: before the run starts or, '
                 'if problems to train on are unlimited, when such a prompt comes) | skip (left out and counted)'),
  zero_variance_groups=S('auto', IDENTITY, 'groups whose rewards are all equal, with pass_at_k also groups with fewer '
                         'than k wrong answers: replace (dynamic sampling) | keep | auto (keep for w_reinforce, whose '
                         'advantages compare nothing; else replace)'),
  repeat_zero_variance=S(1.0, IDENTITY, 'difficulty filter: prompts whose last group had zero variance are asked again '
                         'in this share of their turns, at least 0.001, and passed over in the others; 1: no filter'),
  minibatches=S(1, IDENTITY, 'updates per step; 1 is on-policy. The paper leaves it open'),
  microbatch_tokens=S(0, EXECUTION, 'tokens of an update that a device computes at the same time; 0: 4096. At '
                      'least those of the longest prompt and answer'),
  eval_prompts=S(64, REPORTING, 'problems per evaluation, with different questions'),
  eval_samples=S(16, REPORTING, 'samples per problem of an evaluation'),
  eval_tasks=S({}, REPORTING, 'more problems to evaluate on, name -> uri (in the form of rl.task.uri), such as '
               '{"aime24": "jsonl:aime24.jsonl"}; the first eval_prompts of each, which are left out of training'),
  keep_best=S('', REPORTING, 'held_out, or a name of eval_tasks: the checkpoint with the highest avg_at_N on it is '
              'kept, however old; empty: none'),
  task=dict(
    uri=S('reasoning:chain_sum', IDENTITY, 'reasoning:TASK?OPTION=VALUE, jsonl:GLOB, tfds:NAME or code:GLOB '
          '(docs/rl.md)'),
    prompt=S('Question: {question}\nSolution:', IDENTITY, 'template of the prompt; by default that of the pre-training '
             'documents'),
    answer_format=S('line', IDENTITY, "form of the final answer: line ('Answer: X') | boxed (\\boxed{X})"),
    held_out_fraction=S(0.02, IDENTITY, 'share of the questions that are never trained on; for pre-training: '
                        'data.held_out_fraction'),
    reward=S('', IDENTITY, 'FILE.py:FUNCTION or MODULE:FUNCTION, a reward of your own (docs/extend.md); empty: 1 '
             'for right answers, 0 for wrong ones'),
  ),
  verifier=VERIFIER,
  code=CODE_JAIL,
  advantage=dict(
    name=S('grpo', IDENTITY, 'how advantages are computed: grpo | dr_grpo | rloo | pass_at_k | w_reinforce'),
    ddof=S(1, IDENTITY, 'grpo only: the variance of n rewards is computed with the divisor n - ddof; 0 or 1'),
    k=S(4, IDENTITY, 'pass_at_k only: k, the samples of which one must be right; at most rl.group_size'),
    positive_weight=S(0.1, IDENTITY, 'w_reinforce only: weight of right answers'),
  ),
  loss=dict(
    name=S('clip_higher', IDENTITY, 'policy loss: clip_higher | cispo | gspo'),
    eps_low=S(0.2, IDENTITY, 'the ratio is clipped below 1 - eps_low, but not with cov=kl_cov; published: gspo 3e-4, '
              'cispo 1 (no limit)'),
    eps_high=S(0.28, IDENTITY, 'the ratio is clipped above 1 + eps_high, but not with cov=kl_cov; published: gspo '
               '4e-4, cispo 4'),
    dual_clip=S(0.0, IDENTITY, 'clip_higher only: largest ratio that counts where the advantage is negative (dual '
                'clip, usually 3); 0: no limit'),
    aggregation=S('token_mean', IDENTITY, 'how token losses are averaged: token_mean | sequence_mean | constant'),
    constant=S(0, IDENTITY, 'divisor of the loss of each answer with aggregation=constant; usually the longest '
               'answer, in tokens'),
    importance_cap=S(2.0, IDENTITY, 'largest importance weight (trainer probability / sampler probability); 0: no '
                     'such weight'),
    kl=S('k2', IDENTITY, 'estimator of the KL divergence from the policy at the start: k2 | k3'),
    kl_weight=S(0.0, IDENTITY, 'factor of the KL term in the loss; 0: no KL term'),
    cov=S('', IDENTITY, 'covariance-based control of entropy: clip_cov | kl_cov; empty: none'),
    cov_share=S(2e-4, IDENTITY, 'share of the tokens that cov selects'),
    kl_cov_weight=S(1.0, IDENTITY, 'kl_cov only: factor of the penalty |logp - old_logp| on the selected tokens. The '
                    'penalty is 0 in an on-policy update'),
  ),
)

# The settings of `betarank rl`. It has no objective, and needs only the tokenizer from section `data`.
RL = dict(
  seed=S(0, IDENTITY, 'one integer decides which problems come when, and every sampled text'),
  model=MODEL,
  data=dict(tokenizer=S('', EXECUTION, 'tokenizer to use; empty: that of the checkpoint to start from')),
  train=dict(mesh=MESH, init_from=S('', EXECUTION, 'pre-trained workdir or checkpoint to start from')),
  optimizer=OPTIMIZER,
  checkpoint=CHECKPOINT,
  log={name: LOG[name] for name in ('every_steps', 'eval_every_steps', 'samples', 'tensorboard', 'wandb',
                                 'profile_steps')},
  rl=RL_SECTION,
)

# Section `eval`, which `betarank eval` adds to the config of a checkpoint.
EVAL = dict(
  probe=dict(
    rows=S(64, IDENTITY, 'validation rows of data.sequence_length tokens per source, the same for every checkpoint'),
    batch_size=S(8, EXECUTION, 'rows that are computed at the same time, over all devices'),
    top_k=S(0, IDENTITY, 'number of most probable tokens, which form the head; 0: objective.top_k'),
  ),
  sample=dict(
    seed=S(0, IDENTITY, 'seed of the samples; the same for all checkpoints, so that they use the same random numbers'),
    samples=S(128, IDENTITY, 'samples per problem'),
    problems=S(0, IDENTITY, 'problems to ask, the first ones of a benchmark; 0: all. Benchmarks without end '
               '(reasoning:...) need a number'),
    temperature=S(0.7, IDENTITY, 'temperature of sampling; 0: always the most probable token'),
    top_p=S(0.95, IDENTITY, 'probability mass of nucleus sampling; 1: off'),
    top_k=S(0, IDENTITY, 'number of most probable tokens to sample from; 0: all'),
    max_new_tokens=S(4096, IDENTITY, 'longest answer, in tokens; the paper has 4096 after pre-training, 16,384 after '
                     'mid-training and RL'),
    **DECODING,
    data_dir=S('runs/data/benchmarks', EXECUTION, "holds the benchmarks' files (docs/eval.md); local or gs://"),
    shots=S(-1, IDENTITY, 'worked examples before each question; -1: as many as the paper gives'),
    prompt=S('Question: {question}\nSolution:', IDENTITY, 'template of the prompt'),
    answer_format=S('', IDENTITY, "form of the final answer: line ('Answer: X') | boxed (\\boxed{X}); empty: the "
                    "benchmark's own"),
    held_out_fraction=S(0.02, IDENTITY, 'share of the questions of reasoning:... that are asked; at most '
                        'rl.task.held_out_fraction'),
    verifier=VERIFIER,
  ),
  code=CODE_JAIL,
)

STAGES = {**PRETRAIN, 'rl': RL_SECTION}  # of pre-training and RL together
_ALL = {**STAGES, 'eval': EVAL}


def flat(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Setting]:
  """Returns {dotted key: Setting} of a nested dictionary of settings, for example {'optimizer.lr': Setting, ...}.

  prefix: a text to put before each key.
  """
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
  """Returns the default of the setting with the dotted key `key`. Dataclass fields take their defaults from here."""
  return _FLAT[key].default


def is_setting(key: str) -> bool:
  """Returns True if `key` is the dotted key of a setting, and not of an entry in one, such as data.sources.main.uri."""
  return key in _FLAT


def when_missing(key: str) -> Any:
  """Returns the value to assume for a setting that is missing in the recorded config of a run.

  A setting is missing if it didn't exist yet in the version that wrote the config. The value is the setting's default,
  or None if the present version doesn't have the setting.
  """
  return _FLAT[key].default if key in _FLAT else None


def role(key: str) -> str:
  """Returns the role of a setting.

  key: the dotted key of a setting, or of an entry in a setting that is a dictionary, such as data.sources.main.uri.

  Raises:
    KeyError: there is no such setting.
  """
  name = key
  while name not in _FLAT:
    if '.' not in name:
      raise KeyError(key)
    name = name.rpartition('.')[0]
  return _FLAT[name].role
