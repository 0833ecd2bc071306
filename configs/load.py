"""From a command line to the frozen dataclasses that code takes.

A config file is Python with `get_config(arg) -> ml_collections.ConfigDict`; a resolved config is the JSON
that every run writes to its workdir. Either can be passed as `--config`, and any value in it can be
overridden, `--config.optimizer.lr=1e-3`. The set of keys is closed: a misspelt key, a value of another type
or out of range is a `ConfigError`, one line that names the key and, where there is one, the nearest right one.

    config, args = load.from_command_line(parser)       # parser: argparse, for the entry point's own flags
    model = load.section(ModelConfig, config.model, 'model')
"""

import argparse
import importlib.util
import json
import os
import pathlib
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from betarank.configs.errors import ConfigError, suggestion


def from_command_line(
  parser: argparse.ArgumentParser, argv: Sequence[str] | None = None,
  configure: Callable[[argparse.Namespace], ConfigDict] | None = None,
) -> tuple[ConfigDict, argparse.Namespace]:
  """Parses `--config=FILE[:ARG]`, `--config.KEY=VALUE` and the flags that `parser` already has.

  configure: makes the config from the other flags where it isn't simply the file's; --config may then be left out.
  Raises ConfigError for a config that can't be used; argparse itself answers for its own flags.
  """
  parser.add_argument('--config', required=configure is None, default='', metavar='FILE.py[:ARG] | FILE.json',
                      help='experiment to run; override any value in it with --config.KEY=VALUE')
  args, rest = parser.parse_known_args(argv)
  overrides = {}
  rest = list(rest)
  while rest:
    flag = rest.pop(0)
    if not flag.startswith('--config.'):
      known = [option for action in parser._actions for option in action.option_strings]
      raise ConfigError(f'{flag}: no such flag{suggestion(flag.split("=")[0], known)}')
    key, equals, value = flag.removeprefix('--config.').partition('=')
    if not equals:
      if not rest or rest[0].startswith('--config.'):
        raise ConfigError(f'{flag}: has no value; write {flag}=VALUE')
      value = rest.pop(0)
    overrides[key] = value
  check_places(vars(args))
  return _finish(configure(args) if configure else read(args.config), overrides), args


def load(spec: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
  """The config at `spec` (FILE.py, FILE.py:ARG or FILE.json) with `overrides` ({'optimizer.lr': '1e-3'})."""
  return _finish(read(spec), overrides or {})


# Files of this folder that aren't experiments.
NOT_EXPERIMENTS = ('command.py', 'common.py', 'errors.py', 'load.py', 'roles.py', 'sections.py')


def read(spec: str) -> ConfigDict:
  """The config at `spec` as it is there, not locked yet."""
  return _load_json(spec) if spec.endswith('.json') else _load_python(spec)


def _finish(config: ConfigDict, overrides: Mapping[str, str]) -> ConfigDict:
  for key, value in overrides.items():
    override(config, key, value)
  check_places(flatten(config), 'config.')
  return config.lock()


# What is meant as a bucket. `gs:/x` would be a folder here, lost with the machine; `GS://x` nothing at all.
_BUCKET_MEANT = re.compile(r'\s*([a-z]+:)?(gs:|(s3|az|hf|file|https?|ftp):/)', re.IGNORECASE)
_BUCKET = re.compile(r'([a-z]+:)?(gs|s3|az|hf)://[^/\s]')


def check_places(values: Mapping[str, Any], prefix: str = '--') -> None:
  """Raises ConfigError for a text that is neither a local path nor a bucket, but was meant as one."""
  for name, text in values.items():
    if isinstance(text, str) and _BUCKET_MEANT.match(text) and not _BUCKET.match(text):
      raise ConfigError(f'{prefix}{name}={text!r}: neither a local path nor a bucket, which is gs://NAME/...')


def module(spec: str) -> tuple[types.ModuleType, str]:
  """The Python file of `spec` (FILE.py or FILE.py:ARG), run, and ARG. Raises ConfigError if it isn't an experiment."""
  name, _, arg = spec.partition('.py:') if '.py:' in spec else (spec.removesuffix('.py'), '', '')
  if not spec.endswith('.py') and not arg:
    raise ConfigError(f'--config={spec}: expected FILE.py, FILE.py:ARG or FILE.json')
  path = _find(name + '.py')
  module_spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
  loaded = importlib.util.module_from_spec(module_spec)
  module_spec.loader.exec_module(loaded)
  if not hasattr(loaded, 'get_config'):
    raise ConfigError(f'--config={spec}: {path} has no get_config(arg)')
  return loaded, arg


def _load_python(spec: str) -> ConfigDict:
  loaded, arg = module(spec)
  return loaded.get_config(arg or None)


def _find(path: str) -> pathlib.Path:
  """`path` as given or, so that an installed package works from any folder, beside the configs package."""
  root = pathlib.Path(__file__).resolve().parent.parent
  for candidate in (pathlib.Path(path), root / path):
    if os.path.isfile(candidate):  # unlike its own method, no error for a name that can't be one
      return candidate
  shipped = [str(p.relative_to(root)) for p in sorted((root / 'configs').rglob('*.py'))
             if p.name not in ('__init__.py', *NOT_EXPERIMENTS)]
  raise ConfigError(f'--config={path}: no such file{suggestion(path, shipped)}')


def _load_json(path: str) -> ConfigDict:
  try:
    values = json.loads(epath.Path(path).read_text())
    if not isinstance(values, dict):
      raise ValueError('the top level is no object')
    return ConfigDict(values)
  except FileNotFoundError:
    raise ConfigError(f'--config={path}: no such file') from None
  except ImportError as error:
    raise ConfigError(f'--config={path}: {error} (pip install gcsfs for gs://)') from None
  except OSError as error:
    raise ConfigError(f'--config={path}: could not be read ({error.strerror or error})') from None
  except (ValueError, RecursionError, AttributeError, KeyError) as error:  # the last two: names no ConfigDict can have
    raise ConfigError(f'--config={path}: not a resolved config ({error})') from None


def flatten(config: ConfigDict | Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'optimizer.lr': 1e-3, ...}: every value that is not itself a section, by its dotted key."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict | dict) and len(value):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[prefix + key] = value
  return flat


def override(config: ConfigDict, key: str, text: str) -> None:
  """Sets the dotted `key` to `text`, read as the type of the value that is there; a section takes JSON."""
  *parents, leaf = key.split('.')
  section = config
  for parent in parents:
    section = section.get(parent) if isinstance(section, ConfigDict) else None
  if not isinstance(section, ConfigDict) or leaf not in section:
    keys = [f'config.{k}' for k in flatten(config)]
    raise ConfigError(f'config.{key}: no such key{suggestion(f"config.{key}", keys)}')
  section[leaf] = _read(f'config.{key}', text, section[leaf])


def _read(key: str, text: str, old: Any) -> Any:
  try:
    if isinstance(old, bool):
      return {'true': True, '1': True, 'false': False, '0': False}[text.lower()]
    if isinstance(old, int):
      number = float(text) if any(c in text for c in '.eE') else int(text)
      if number != int(number):
        raise ValueError
      return int(number)
    if isinstance(old, float):
      return float(text)
    if isinstance(old, str):
      return text
    value = json.loads(text)
    if isinstance(old, tuple | list) and isinstance(value, list):
      return tuple(value)
    if isinstance(old, ConfigDict) and isinstance(value, dict):
      return ConfigDict(value)
    raise ValueError
  except (ValueError, KeyError, OverflowError):
    kind = {bool: 'true or false', int: 'a whole number', float: 'a number', tuple: 'a JSON list',
            list: 'a JSON list', ConfigDict: 'a JSON object'}.get(type(old), type(old).__name__)
    raise ConfigError(f'config.{key.removeprefix("config.")}: expected {kind}, got {text!r}') from None


def to_json(config: ConfigDict) -> str:
  """The resolved config as text that `load` reads back to an equal config."""
  return json.dumps(config.to_dict(), indent=2) + '\n'
