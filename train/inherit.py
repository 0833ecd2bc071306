"""Copies the model's settings from the checkpoint that a run starts from, so that no command has to repeat them."""

from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from betarank.configs import load, settings
from betarank.configs.errors import ConfigError
from betarank.model import ModelConfig

# Settings that training may change, for longer texts. No parameter's shape depends on them.
ROPE = ('model.rope_base', 'model.rope_factor')


def inherit_model(
  config: ConfigDict, trained: Mapping[str, Any], overrides: Mapping[str, str], may_change: Collection[str] = (),
) -> None:
  """Replaces settings of the section `model` of a config by those of a checkpoint.

  Only settings with the role IDENTITY (configs/settings.py) are replaced. These settings decide what is learned.
  Settings that decide how the model is computed keep their values. If the config has no section `model`, the whole
  section of the checkpoint is added.

  Args:
    config: the config to change. It must not be locked, and the overrides must not be applied yet.
    trained: the checkpoint's metadata.
    overrides: the overrides of the command line, as in `load.load`.
    may_change: dotted keys of settings that are replaced only if no override sets them and the config has their
      default. All other overrides must agree with the checkpoint.

  Raises:
    ConfigError: an override contradicts the checkpoint.
  """
  model = ConfigDict(trained['config']['model'])
  if 'model' not in config:
    config.model = model
  asked = ConfigDict({'model': model.copy_and_resolve_references()})
  for key, text in overrides.items():
    if key.startswith('model.') and key in load.flatten(asked):
      load.override(asked, key, text)
  wanted, present = load.flatten(asked), load.flatten(ConfigDict({'model': config.model}))
  for key, value in load.flatten({'model': trained['config']['model']}).items():
    if key not in present or settings.role(key) != settings.IDENTITY:
      continue
    if key in may_change and (key in overrides or present[key] != settings.default(key)):
      continue
    if wanted[key] != value:
      raise ConfigError(f'config.{key} is {value} in the checkpoint to start from, and can\'t be {wanted[key]}; leave '
                        'it out')
    if present[key] != value:
      config.update_from_flattened_dict({key: value})
  if 'vocab_size' in config.get('data', {}):
    config.data.vocab_size = model.vocab_size


def describe_rope(model: ModelConfig, trained: Mapping[str, Any]) -> str:
  """Returns a text for the log header, which names the settings of ROPE that differ from the checkpoint's.

  trained: the checkpoint's metadata; {} if there is no checkpoint.
  """
  before = load.flatten({'model': trained.get('config', {}).get('model', {})})
  now = {key: getattr(model, key.removeprefix('model.')) for key in ROPE}
  return '; '.join(f'{key}: {before[key]:,.10g} in the checkpoint, {now[key]:,.10g} from now on'
                   for key in ROPE if key in before and before[key] != now[key])
