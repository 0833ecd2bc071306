"""Converts a model's config to Hugging Face's config.json, and back.

Dense models become Qwen3, or Qwen2 or Llama if they have no QK-norm. Mixtures of experts become Qwen3-MoE if they have
a softmax router, and Glm4-MoE if they have a sigmoid router. Glm4-MoE's block equals ours when two of its options are
set: full rotary width and QK-norm.
"""

import math
from typing import Any

from betarank.configs.errors import UserError
from betarank.model.attention import ROPE_CONTEXT, ROPE_TURNS
from betarank.model.config import ModelConfig

SOFTMAX, SIGMOID = 'Qwen3MoeForCausalLM', 'Glm4MoeForCausalLM'
QWEN3, QWEN2, LLAMA = DENSE = 'Qwen3ForCausalLM', 'Qwen2ForCausalLM', 'LlamaForCausalLM'
BLOCKS = {QWEN3: (True, False), QWEN2: (False, True), LLAMA: (False, False)}  # (qk_norm, qkv_bias)
TYPES = {QWEN3: 'qwen3', QWEN2: 'qwen2', LLAMA: 'llama', SOFTMAX: 'qwen3_moe', SIGMOID: 'glm4_moe'}
# Glm4-MoE always has a shared expert. A model without one is written with an expert of zeros, and with this key set.
ZERO_SHARED = 'shared_experts_are_zero'

SIZES = {  # ours -> theirs, in all architectures
  'vocab_size': 'vocab_size', 'layers': 'num_hidden_layers', 'd_model': 'hidden_size', 'd_ff': 'intermediate_size',
  'heads': 'num_attention_heads', 'kv_heads': 'num_key_value_heads', 'head_dim': 'head_dim',
}
# Options for which our block supports only one value: (this value, the default in transformers).
OPTIONS = {'hidden_act': ('silu', 'silu'), 'attention_bias': (False, False), 'mlp_bias': (False, False),
           'use_sliding_window': (False, False), 'quantization_config': (None, None)}
ROPE_OPTIONS = ('partial_rotary_factor',)
LLAMA3_ROPE = {'low_freq_factor': ROPE_TURNS[1], 'high_freq_factor': ROPE_TURNS[0],
               'original_max_position_embeddings': ROPE_CONTEXT}
MOE_OPTIONS = {
  SOFTMAX: {'decoder_sparse_step': (1, 1), 'mlp_only_layers': ([], [])},
  SIGMOID: {'n_group': (1, 1), 'topk_group': (1, 1), 'first_k_dense_replace': (0, 1), 'use_qk_norm': (True, False),
            'partial_rotary_factor': (1.0, 0.5), 'num_nextn_predict_layers': (0, 0)},
}
NORM_TOPK_PROB = {SOFTMAX: False, SIGMOID: True}  # the defaults in transformers


class HfError(UserError):
  """Raised if a model, directory or tokenizer can't be exported or imported. The message is one line with the reason.
  """


def architecture(c: ModelConfig) -> str:
  """Returns the name of the class in transformers that computes the same function as the model, e.g.
  'Qwen3ForCausalLM'.

  Raises:
    HfError: there is no such class.
  """
  moe, block = c.moe, (c.qk_norm, c.qkv_bias)
  if block not in (BLOCKS.values() if not moe.experts else [BLOCKS[QWEN3]]):
    raise HfError(f'model.qk_norm = {c.qk_norm} and model.qkv_bias = {c.qkv_bias}: no architecture of '
                  f'{"mixtures of experts" if moe.experts else "dense models"} has this')
  if not moe.experts:
    return next(name for name in DENSE if BLOCKS[name] == block)
  if moe.router == 'sigmoid':
    if moe.experts < 2:
      raise HfError(f'model.moe.experts = {moe.experts}: {SIGMOID} needs two or more')
    if moe.shared_d_ff % moe.expert_d_ff:
      raise HfError(f'model.moe.shared_d_ff = {moe.shared_d_ff}: {SIGMOID} needs a multiple of expert_d_ff = '
                    f'{moe.expert_d_ff}; no other architecture has it')
    return SIGMOID
  for name, wanted in (('shared_d_ff', 0), ('routed_scale', 1.0)):
    if getattr(moe, name) != wanted:
      raise HfError(f'model.moe.{name} = {getattr(moe, name)}: {SOFTMAX} has none; it takes {wanted}, or a sigmoid '
                    'router')
  return SOFTMAX


def to_hf(c: ModelConfig, *, positions: int, dtype: str) -> dict[str, Any]:
  """Returns the content of config.json, from which transformers builds the same model.

  positions: the length of the longest text that the model supports, in tokens.
  dtype: the dtype of the stored weights.
  """
  name, moe = architecture(c), c.moe
  rope = {'rope_type': 'default'}
  if c.rope_factor != 1:
    rope = {'rope_type': 'llama3', 'factor': c.rope_factor, **LLAMA3_ROPE}
  experts = {
    SOFTMAX: {'num_experts': moe.experts, 'router_aux_loss_coef': moe.balance_weight},
    SIGMOID: {'n_routed_experts': moe.experts, 'n_shared_experts': max(1, moe.shared_d_ff // max(1, moe.expert_d_ff)),
              ZERO_SHARED: moe.shared_d_ff == 0, 'routed_scaling_factor': moe.routed_scale},
  }.get(name, {})
  if moe.experts:
    experts |= {'num_experts_per_tok': moe.experts_per_token, 'moe_intermediate_size': moe.expert_d_ff,
                'norm_topk_prob': moe.norm_topk_prob}
    experts |= {option: wanted for option, (wanted, _) in MOE_OPTIONS[name].items()}
  if name == SIGMOID:
    rope['partial_rotary_factor'] = 1.0
  return {
    'architectures': [name],
    'model_type': TYPES[name],
    **{theirs: getattr(c, ours) for ours, theirs in SIZES.items()},
    'rms_norm_eps': c.norm_eps,
    'tie_word_embeddings': c.tied_embeddings,
    'max_position_embeddings': positions,
    'rope_theta': c.rope_base,  # transformers 4 reads this and rope_scaling, 5 reads rope_parameters
    'rope_scaling': rope if c.rope_factor != 1 else None,
    'rope_parameters': {'rope_theta': c.rope_base, **rope},
    'hidden_act': 'silu',
    **({} if name == QWEN2 else {'attention_bias': False}),  # Qwen2 always has biases, and no such option
    'attention_dropout': 0.0,
    **experts,
    'dtype': dtype,
    'torch_dtype': dtype,
    'use_cache': True,
  }


def from_hf(config: Any, where: str) -> dict[str, Any]:
  """Returns the values of section `model` that a config.json determines.

  where: the path of config.json, for messages.

  Raises:
    HfError: config.json has an option that our block doesn't support, or a value is missing or wrong. The message names
      its key.
  """
  if not isinstance(config, dict):
    raise HfError(f'{where}: not a JSON object')
  names = config.get('architectures')
  name = names[0] if isinstance(names, list) and len(names) == 1 else names
  if not isinstance(name, str) or name not in TYPES:
    raise HfError(f'{where}: architectures is {names!r}; only {", ".join(TYPES)} can be imported')
  rope = _rope(config, where)
  for option, (wanted, default) in {**OPTIONS, **MOE_OPTIONS.get(name, {})}.items():
    place = rope if option in ROPE_OPTIONS and option in rope else config
    value = place.get(option, default)
    if value != wanted and not (value is None and not wanted):
      raise HfError(f'{where}: {option} is {value!r}; only {name} with {wanted!r} can be imported')
  kinds = config.get('layer_types') or []
  if not isinstance(kinds, list) or any(kind != 'full_attention' for kind in kinds):
    raise HfError(f"{where}: layer_types is {kinds!r:.80}; only 'full_attention' can be imported")

  integer = lambda *keys: _number(config, keys, int, where)
  if name in (QWEN2, LLAMA) and config.get('head_dim') is None:
    config = config | {'head_dim': integer('hidden_size') // integer('num_attention_heads')}
  model = {ours: integer(theirs) for ours, theirs in SIZES.items()}
  model['qk_norm'], model['qkv_bias'] = BLOCKS.get(name, BLOCKS[QWEN3])
  model |= {'rope_base': _number(rope, ('rope_theta',), float, where), 'rope_factor': _rope_factor(rope, where),
            'norm_eps': _number(config, ('rms_norm_eps',), float, where),
            'tied_embeddings': _boolean(config, 'tie_word_embeddings', False, where)}
  if name in DENSE:
    return model
  expert_d_ff = integer('moe_intermediate_size')
  moe = {'experts_per_token': integer('num_experts_per_tok'), 'expert_d_ff': expert_d_ff,
         'norm_topk_prob': _boolean(config, 'norm_topk_prob', NORM_TOPK_PROB[name], where)}
  if name == SOFTMAX:
    moe |= {'router': 'softmax', 'experts': integer('num_experts', 'num_local_experts'), 'shared_d_ff': 0,
            'routed_scale': 1.0}
  else:
    shared = 0 if config.get(ZERO_SHARED) is True else integer('n_shared_experts') * expert_d_ff
    moe |= {'router': 'sigmoid', 'experts': integer('n_routed_experts', 'num_local_experts'), 'shared_d_ff': shared,
            'routed_scale': _number(config, ('routed_scaling_factor',), float, where)}
  return {**model, 'moe': moe}


def _rope(config: dict[str, Any], where: str) -> dict[str, Any]:
  """Returns the rotary settings of a config.json as one dictionary.

  transformers 4 writes these settings at the top level and in rope_scaling. transformers 5 writes them in
  rope_parameters.

  where: the path of config.json, for messages.

  Raises:
    HfError: rope_scaling or rope_parameters isn't a JSON object.
  """
  rope = {'rope_theta': config.get('rope_theta')}
  for key in ('rope_scaling', 'rope_parameters'):
    given = config.get(key) or {}
    if not isinstance(given, dict):
      raise HfError(f'{where}: {key} is {given!r}; it must be a JSON object or null')
    rope |= given
  if 'type' in rope:
    rope.setdefault('rope_type', rope['type'])
  return rope


def _rope_factor(rope: dict[str, Any], where: str) -> float:
  """Returns the factor of Llama 3.1's rope scaling; 1 if there is no scaling.

  rope: the result of `_rope`. where: the path of config.json, for messages.

  Raises:
    HfError: config.json has another kind of scaling, or its values differ from those of the published Llama models.
  """
  kind = rope.get('rope_type') or 'default'
  if kind == 'default':
    return 1.0
  for key, value, wanted in (('rope_type', kind, 'llama3'), *((k, rope.get(k), v) for k, v in LLAMA3_ROPE.items())):
    if value != wanted:
      raise HfError(f'{where}: {key} is {value!r}; only {wanted!r}, or no rope scaling, can be imported')
  return _number(rope, ('factor',), float, where)


def _number(config: dict[str, Any], keys: tuple[str, ...], kind: type, where: str) -> Any:
  """Returns the value of the first of `keys` that is in config.json and isn't null.

  kind: int or float.
  where: the path of config.json, for messages.

  Raises:
    HfError: the value is missing, isn't a number of type `kind`, or isn't between 0 and 2^31 (both excluded).
  """
  key = next((key for key in keys if config.get(key) is not None), keys[0])
  value = config.get(key)
  good = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
  if not good or not 0 < value < 2**31 or not math.isfinite(value):
    what = 'is missing' if key not in config else f'is {value!r}'
    raise HfError(f'{where}: {key} {what}; it must be a {"whole number" if kind is int else "number"} > 0')
  return kind(value)


def _boolean(config: dict[str, Any], key: str, default: bool, where: str) -> bool:
  value = config.get(key, default)
  if not isinstance(value, bool):
    raise HfError(f'{where}: {key} is {value!r:.100}; it must be true or false')
  return value


def positions(config: dict[str, Any]) -> int:
  """Returns the length of the longest text that a config.json allows, in tokens, or 0 if config.json has no such
  length.
  """
  value = config.get('max_position_embeddings')
  return value if type(value) is int and 0 < value < 2**31 else 0
