"""From a command line to the frozen dataclasses that code takes.

A config file is Python with `get_config(arg) -> ml_collections.ConfigDict`; a resolved config is the JSON
that every run writes to its workdir. Either can be passed as `--config`, and any value in it can be
overridden, `--config.optimizer.lr=1e-3`. The set of keys is closed: a misspelt key, a value of another type
or out of range is a `ConfigError`, one line that names the key and, where there is one, the nearest right one.

    config, args = load.from_command_line(parser)       # parser: argparse, for the entry point's own flags
    model = load.section(ModelConfig, config.model, 'model')
"""

import argparse
import dataclasses
import difflib
import importlib.util
import json
import os
import pathlib
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from etils import epath
from ml_collections import ConfigDict

T = TypeVar('T')


class UserError(ValueError):
  """Something the person at the command line can mend. The message is one line, meant for them."""


class ConfigError(UserError):
  """A setting that can't be used."""


def suggestion(name: str, candidates: Iterable[str]) -> str:
  """'; did you mean X?' for the candidate nearest to name, or '' if none is near."""
  candidates = sorted(set(candidates))
  same_leaf = [c for c in candidates if c.rsplit('.', 1)[-1] == name.rsplit('.', 1)[-1]]
  # `config.lr` for `config.optimizer.lr`: the last part alone is right, the way there isn't
  near = difflib.get_close_matches(name, same_leaf, n=1, cutoff=0) or difflib.get_close_matches(name, candidates, n=1)
  return f'; did you mean {near[0]}?' if near else ''


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
             if p.name not in ('__init__.py', 'common.py', 'load.py')]
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


def section(cls: type[T], values: ConfigDict | Mapping[str, Any], path: str = '') -> T:
  """`values` as the frozen dataclass `cls`; its keys, their types and the class's own checks must all hold."""
  prefix = f'{path}.' if path else ''
  _expect(isinstance(values, ConfigDict | Mapping), path, 'a section', values)
  hints = typing.get_type_hints(cls)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  for key in values:
    if key not in fields:
      known = [f'config.{prefix}{name}' for name in fields]
      raise ConfigError(f'config.{prefix}{key}: no such key{suggestion(f"config.{prefix}{key}", known)}')
  arguments = {}
  for name, field in fields.items():
    if name in values:
      arguments[name] = _convert(hints[name], values[name], prefix + name)
    elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
      raise ConfigError(f'config.{prefix}{name}: missing; {cls.__name__} needs it')
  try:
    return cls(**arguments)
  except ConfigError:
    raise
  except ValueError as error:
    raise ConfigError(f'config.{prefix}{error}') from None


def _convert(hint: Any, value: Any, path: str) -> Any:
  origin, parameters = typing.get_origin(hint), typing.get_args(hint)
  if dataclasses.is_dataclass(hint):
    _expect(isinstance(value, ConfigDict | dict), path, 'a section', value)
    return section(hint, value, path)
  if origin is dict:
    _expect(isinstance(value, ConfigDict | dict), path, 'a section', value)
    return {key: _convert(parameters[1], item, f'{path}.{key}') for key, item in value.items()}
  if origin is tuple:
    _expect(isinstance(value, tuple | list), path, 'a list', value)
    return tuple(_convert(parameters[0], item, f'{path}[{i}]') for i, item in enumerate(value))
  if origin in (typing.Union, types.UnionType):
    if value is None and type(None) in parameters:
      return None
    return _convert(next(p for p in parameters if p is not type(None)), value, path)
  if hint is float:
    _expect(isinstance(value, int | float) and not isinstance(value, bool), path, 'a number', value)
    _expect(abs(value) <= sys.float_info.max, path, 'a finite number', value)  # not NaN, nor an int beyond any float
    return float(value)
  if hint is int:
    _expect(isinstance(value, int) and not isinstance(value, bool), path, 'a whole number', value)
  elif hint in (str, bool):
    _expect(isinstance(value, hint), path, 'text' if hint is str else 'true or false', value)
  return value


def _expect(holds: bool, path: str, what: str, value: Any) -> None:
  if not holds:
    raise ConfigError(f'config.{path}: expected {what}, got {value!r}')


def to_json(config: ConfigDict) -> str:
  """The resolved config as text that `load` reads back to an equal config."""
  return json.dumps(config.to_dict(), indent=2) + '\n'


_MOST_SHOWN = 2000


def one_line(error: object) -> str:
  """The message as one line that a terminal shows and doesn't obey, whatever bad value it quotes."""
  text = ' '.join(str(error).split())
  text = text if len(text) <= _MOST_SHOWN else f'{text[:_MOST_SHOWN]} ...'
  return ''.join(c if c.isprintable() else '\ufffd' for c in text)


def run_main(main: Callable[[], None], *errors: type[Exception]) -> None:
  """Runs an entry point; a UserError, or one of `errors`, ends it with its message as one line, exit 2."""
  try:
    main()
  except (UserError, *errors) as error:
    print(f'error: {one_line(error)}', file=sys.stderr)
    sys.exit(2)
