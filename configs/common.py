"""What every experiment starts from, and the reading of a config's argument. configs/settings.py says what each
setting means.
"""

from types import SimpleNamespace

from ml_collections import ConfigDict, FieldReference

from betarank.configs import settings
from betarank.configs.errors import ConfigError, suggestion


def base() -> ConfigDict:
  """Returns a pre-training config: a 5M-parameter model on made-up reasoning problems, with plain cross-entropy."""
  values = settings.defaults(settings.PRETRAIN)
  values['model']['vocab_size'] = values['data']['vocab_size'] = FieldReference(values['model']['vocab_size'])
  return ConfigDict(values)


def rl_base() -> ConfigDict:
  """Returns an RL config with the paper's recipe (on-policy GRPO, clip-higher, dynamic sampling, no KL), and DAPO's
  where the paper is silent. It has no section `model`: a run takes that of the checkpoint it starts from, unless the
  config gives one.
  """
  values = settings.defaults(settings.RL)
  del values['model']
  return ConfigDict(values)


def evaluation() -> ConfigDict:
  """Returns section `eval`, which `betarank eval` adds to a checkpoint's config: the paper's way of sampling."""
  return ConfigDict(settings.defaults(settings.EVAL))


def parse(arg: str | None, **defaults) -> SimpleNamespace:
  """Reads 'beta=-0.25,seed=1' by the types of `defaults`, e.g. parse(arg, beta=0.0, seed=0).

  Raises ConfigError for a name that isn't among them and for a value of another type.
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
      raise ConfigError(f'config argument {item!r}: {key} takes a value of type {kind.__name__}') from None
  return SimpleNamespace(**values)
