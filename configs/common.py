"""Builds the configs from which all experiments start, and parses the argument of a config.

configs/settings.py says what each setting means.
"""

from collections.abc import Iterable
from types import SimpleNamespace

from ml_collections import ConfigDict, FieldReference

from betarank.configs import settings
from betarank.configs.errors import ConfigError, suggestion


def base() -> ConfigDict:
  """Returns a pre-training config: a 5M-parameter model on generated reasoning problems, with plain cross-entropy."""
  values = settings.defaults(settings.PRETRAIN)
  values['model']['vocab_size'] = values['data']['vocab_size'] = FieldReference(values['model']['vocab_size'])
  return ConfigDict(values)


def rl_base() -> ConfigDict:
  """Returns an RL config with the paper's recipe: on-policy GRPO, clip-higher, dynamic sampling, no KL term.

  Where the paper doesn't specify a value, it is a usual one, in most cases DAPO's. The config has no section `model`.
  Unless the caller adds this section, a run uses the model of the checkpoint that it starts from.
  """
  values = settings.defaults(settings.RL)
  del values['model']
  return ConfigDict(values)


def evaluation() -> ConfigDict:
  """Returns the section `eval`, which `betarank eval` adds to a checkpoint's config. Its sampling settings are the
  paper's.
  """
  return ConfigDict(settings.defaults(settings.EVAL))


def parse(arg: str | None, **defaults) -> SimpleNamespace:
  """Parses a config's argument, such as 'beta=-0.25,seed=1'. Returns the values as attributes.

  defaults: the allowed names with their default values. A value is parsed as the type of its default.

  Raises:
    ConfigError: a name isn't allowed, or a value has the wrong type.
  """
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
      what = {float: 'a number', int: 'a whole number', bool: 'true or false'}.get(kind, 'a text')
      raise ConfigError(f'config argument {item!r}: expected {key}=VALUE, where VALUE is {what}') from None
  return SimpleNamespace(**values)


def check_choice(name: str, value: str | int, known: Iterable[str | int]) -> None:
  """Checks the value of a config's argument that has a few possible values.

  name: the name of the argument, for the error message.

  Raises:
    ConfigError: the value isn't one of `known`.
  """
  names = [*map(str, known)]
  if str(value) not in names:
    raise ConfigError(f'config argument {name}={value}: must be one of {", ".join(names)}'
                      f'{suggestion(str(value), names)}')
