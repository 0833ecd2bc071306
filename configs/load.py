"""Runs a config's Python file, and returns the module and ARG.

spec: FILE.py or FILE.py:ARG.

Raises:
  ConfigError: there is no such file, it doesn't define get_config, or it fails.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from betarank.configs import describe, renamed, settings
from betarank.configs.errors import ConfigError, suggestion


def from_command_line(
  parser: argparse.ArgumentParser, argv: Sequence[str] | None = None, *,
  settings: Mapping[str, Any] = settings.PRETRAIN,
  configure: Callable[[argparse.Namespace, Mapping[str, str]], ConfigDict] | None = None, needs_config: bool = True,
) -> tuple[ConfigDict, argparse.Namespace]:
  """Parses `--config=FILE[:ARG]`, `--config.KEY=VALUE` and the flags that `parser` already has.

  Args:
    parser: has the command's own flags.
    argv: the command line without the program's name; None: sys.argv.
    settings: the part of configs/settings.py that the command reads; `--help` lists it.
    configure: a function (flags, overrides) -> config, for commands whose config isn't simply that of --config.
    needs_config: whether --config is required.

  Returns (config, flags). The config is locked.

  Raises:
    ConfigError: the config can't be used. Errors in the command's own flags are reported by argparse.
  """
  parser.add_argument('--config', required=needs_config, default='', metavar='FILE.py[:ARG] | FILE.json',
                      help='experiment to run; override any setting in it with --config.KEY=VALUE')
  if {'-h', '--help'} & set(argv if argv is not None else sys.argv[1:]):
    parser.epilog = describe.table(settings)
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
  return _finish(configure(args, overrides) if configure else read(args.config), overrides), args


def load(spec: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
  """Returns the config at `spec`, with overrides, locked.

  spec: FILE.py, FILE.py:ARG or FILE.json.
  overrides: for example {'optimizer.lr': '1e-3'}.
  """
  return _finish(read(spec), overrides or {})


def read(spec: str) -> ConfigDict:
  """Returns the config at `spec` without overrides. It isn't locked yet."""
  return _load_json(spec) if spec.endswith('.json') else _load_python(spec)


def _finish(config: ConfigDict, overrides: Mapping[str, str]) -> ConfigDict:
  for key, value in overrides.items():
    override(config, key, value)
  check_places(flatten(config), 'config.')
  return config.lock()


# Matches what was probably meant as a bucket. `gs:/x` would be a local folder, lost with the machine; `GS://x` is
# neither a folder nor a bucket.
_BUCKET_MEANT = re.compile(r'\s*([a-z]+:)?(gs:|(s3|az|hf|file|https?|ftp):/)', re.IGNORECASE)
_BUCKET = re.compile(r'([a-z]+:)?(gs|s3|az|hf)://[^/\s]')


def check_places(values: Mapping[str, Any], prefix: str = '--') -> None:
  """Raises ConfigError for a value that was probably meant as a bucket but isn't written like one, such as `gs:/x`."""
  for name, text in values.items():
    if isinstance(text, str) and _BUCKET_MEANT.match(text) and not _BUCKET.match(text):
      raise ConfigError(f'{prefix}{name}={text!r}: neither a local path nor a bucket, which is gs://NAME/...')


def module(spec: str) -> tuple[types.ModuleType, str]:
  """Runs the Python file of `spec` (FILE.py or FILE.py:ARG); returns it as a module, and ARG.

  Raises ConfigError if it isn't an experiment or fails.
  """
  name, _, arg = spec.partition('.py:') if '.py:' in spec else (spec.removesuffix('.py'), '', '')
  if not spec.endswith('.py') and not arg:
    raise ConfigError(f'--config={spec}: expected FILE.py, FILE.py:ARG or FILE.json')
  path = _find(name + '.py')
  module_spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
  loaded = importlib.util.module_from_spec(module_spec)
  with _errors_of(path):
    module_spec.loader.exec_module(loaded)
  if not hasattr(loaded, 'get_config'):
    raise ConfigError(f'--config={spec}: {path} has no get_config(arg)')
  return loaded, arg


@contextlib.contextmanager
def _errors_of(path: pathlib.Path) -> Iterator[None]:
  """Converts any error that a config file raises to a ConfigError with the file and the line."""
  try:
    yield
  except ConfigError:
    raise
  except Exception as error:
    here = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = f':{here[-1]}' if here else f':{error.lineno}' if isinstance(error, SyntaxError) else ''
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    raise ConfigError(f'{path}{line}: {type(error).__name__}: {message}') from error


def _load_python(spec: str) -> ConfigDict:
  loaded, arg = module(spec)
  with _errors_of(pathlib.Path(loaded.__file__)):
    config = loaded.get_config(arg or None)
  if not isinstance(config, ConfigDict):
    raise ConfigError(f'{loaded.__file__}: get_config returned {type(config).__name__}, not a ConfigDict')
  return config


def _find(path: str) -> pathlib.Path:
  """Returns `path` as given if the file exists, or else the config of this name that ships with the package."""
  root = pathlib.Path(__file__).resolve().parent.parent
  for candidate in (pathlib.Path(path), root / path):
    if os.path.isfile(candidate):  # unlike candidate.is_file(), it doesn't raise for an impossible name
      return candidate
  raise ConfigError(f'--config={path}: no such file{suggestion(path, shipped())}')


def shipped() -> list[str]:
  """Returns the paths of the configs that ship with the package: the files that define get_config."""
  root = pathlib.Path(__file__).resolve().parent
  return [str(p.relative_to(root.parent)) for p in sorted(root.rglob('*.py'))
          if '\ndef get_config(' in p.read_text(encoding='utf-8')]


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
  except (ValueError, RecursionError, AttributeError, KeyError) as error:  # the last two: a key ConfigDict can't hold
    raise ConfigError(f'--config={path}: not a resolved config ({error})') from None


def flatten(config: ConfigDict | Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns the values of a nested config by their dotted keys, as in {'optimizer.lr': 1e-3, ...}."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict | dict) and len(value):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[prefix + key] = value
  return flat


def override(config: ConfigDict, key: str, text: str) -> None:
  """Sets the dotted `key` to `text`, which is parsed as the type of the present value. A section takes JSON.

  Raises:
    ConfigError: the config doesn't have the key, or the text isn't of this type.
  """
  *parents, leaf = key.split('.')
  section = config
  for parent in parents:
    section = section.get(parent) if isinstance(section, ConfigDict) else None
  if not isinstance(section, ConfigDict) or leaf not in section:
    if key in renamed.RENAMED:
      raise ConfigError(f'config.{key}: is called config.{renamed.RENAMED[key]} now')
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
  """Returns the resolved config as JSON. `load` reads it back to an equal config."""
  return json.dumps(config.to_dict(), indent=2) + '\n'
