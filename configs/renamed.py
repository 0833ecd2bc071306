"""Handles config keys that have been renamed.

An old key in a config file or an override raises a ConfigError that gives the new name. The config in a checkpoint
can't be edited, so its old keys are renamed when the checkpoint is read.
"""

from collections.abc import Mapping
from typing import Any

# Old key -> new key.
RENAMED = {
  'model.remat': 'model.remat_policy',
  'model.offload': 'model.offload_activations',
  'model.moe.d_expert': 'model.moe.expert_d_ff',
  'model.moe.bias_rate': 'model.moe.bias_update_rate',
  'log.masses': 'log.head_tail_mass',
  'rl.prompts': 'rl.prompts_per_step',
  'rl.samples': 'rl.group_size',
  'rl.rounds': 'rl.max_resampling_rounds',
  'rl.rows': 'rl.decode_batch_size',
  'rl.truncated': 'rl.truncated_reward',
  'eval.sample.rows': 'eval.sample.decode_batch_size',
}
# New key -> old value -> new value.
VALUES = {'rl.truncated_reward': {'wrong': 'zero', 'left_out': 'masked'}}
# Keys that were removed from RL configs: `rl.microbatches`, because microbatches now follow from the tokens, and the
# others because `betarank rl` never read them.
NOT_IN_RL = ('rl.microbatches', 'objective', 'data.dir', 'data.vocab_size', 'data.sources', 'data.validation_fraction',
             'data.sequence_length', 'data.document_bytes', 'data.held_out_fraction', 'train.tokens',
             'train.batch_size', 'train.microbatches', 'train.init_what', 'log.eval_batches', 'log.sample_tokens',
             'log.head_tail_mass')


def update(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the resolved config of a run as a dictionary, with old keys and old values replaced by the new ones."""
  return _section(config, '')


def _section(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  new = {}
  for key, value in values.items():
    name = RENAMED.get(prefix + key, prefix + key)
    leaf = name.rpartition('.')[2]
    if isinstance(value, Mapping):
      new[leaf] = _section(value, f'{prefix}{key}.')
    else:
      new[leaf] = VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value
  return new
