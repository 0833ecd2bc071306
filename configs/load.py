"""Reads the config of a command line, and applies its overrides.

A config is a Python file that defines `get_config(arg) -> ml_collections.ConfigDict`, or the JSON file that every run
writes to its workdir. `--config` accepts both kinds of file. Any value in the config can be overridden:
`--config.optimizer.lr=1e-3`. A misspelt key or a value of the wrong type raises a ConfigError. Its message is one line,
which names the key and, if there is one, the most similar key that exists.

    config, flags = load.from_command_line(parser, argv, settings=settings.PRETRAIN)
    model = section(ModelConfig, config.model, 'model')       # configs/sections.py
"""

import argparse
import contextlib
import importlib.util
import inspect
import json
import os
import pathlib
import re
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from betarank.configs import describe, renamed, settings
from betarank.configs.errors import ConfigError, suggestion
from betarank.configs.files import from_json, read_json
from betarank.configs.parser import Parser, at_home, not_a_place, place, underscored


def from_command_line(
  parser: Parser, argv: Sequence[str], *, settings: Mapping[str, Any] = settings.PRETRAIN,
  configure: Callable[[argparse.Namespace, Mapping[str, str]], ConfigDict] | None = None, needs_config: bool = True,
) -> tuple[ConfigDict, argparse.Namespace]:
  """Parses `--config=FILE[:ARG]`, `--config.KEY=VALUE` and the flags that `parser` already has.

  Args:
    parser: the parser of the command's own flags.
    argv: the command line without the program's name.
    settings: the part of configs/settings.py that the command reads; `--help` lists it.
    configure: a function (flags, overrides) -> config, which is called instead of reading the file of --config.
    needs_config: whether --config is required.

  Returns (config, flags). The config is locked.

  Raises:
    ConfigError: the config or a flag can't be used.
  """
  parser.add_argument('--config', required=needs_config, default='', metavar='FILE.py[:ARG] | FILE.json',
                      help='experiment to run; override any setting in it with --config.KEY=VALUE')
  if {'-h', '--help'} & set(argv):
    parser.epilog = describe.table(settings)
  words, own, overrides = list(argv), [], {}
  while words:  # before the parser could take the value in `--config.KEY VALUE` for an argument of its own
    flag = words.pop(0)
    key, equals, value = underscored(flag).removeprefix('--config.').partition('=')
    if not flag.startswith('--config.'):
      own.append(flag)
    elif equals:
      overrides[key] = value
    elif not words or words[0].startswith('--'):
      raise ConfigError(f'{flag}: has no value; write {flag}=VALUE')
    else:
      overrides[key] = words.pop(0)
  args, rest = parser.parse_known_args(own)
  if rest:
    raise parser.unknown(rest[0])
  return _finish(configure(args, overrides) if configure else read(args.config), overrides), args


def load(spec: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
  """Returns the config at `spec` with overrides applied. The config is locked.

  spec: FILE.py, FILE.py:ARG or FILE.json.
  overrides: {dotted key: text of the value}, for example {'optimizer.lr': '1e-3'}.

  Raises:
    ConfigError: the config can't be read, or an override can't be applied.
  """
  return _finish(read(spec), overrides or {})


def read_stage(spec: str, stage: str) -> ConfigDict:
  """Returns the config at `spec` without overrides, after checking that it is a config for the command `stage`.

  stage: 'train' or 'rl'.

  Raises:
    ConfigError: the config is for the other command, or can't be read.
  """
  config = read(spec)
  found = 'rl' if 'rl' in config else 'train'
  if found != stage:
    raise ConfigError(f'--config={spec}: is a config of betarank {found}, not of betarank {stage}; '
                      f'configs/{"rl_smoke" if stage == "rl" else "smoke"}.py is one of that')
  return config


def read(spec: str) -> ConfigDict:
  """Returns the config at `spec` without overrides. The config isn't locked."""
  return _load_json(spec) if spec.endswith('.json') and '.py:' not in spec else _load_python(spec)


def _finish(config: ConfigDict, overrides: Mapping[str, str]) -> ConfigDict:
  for key, value in overrides.items():
    override(config, key, value)
  _check_places(config)
  return config.lock()


def apply_paths(config: ConfigDict, overrides: Mapping[str, str], keys: Sequence[str]) -> None:
  """Applies the overrides of some paths to a config in place, before the other overrides are read.

  Replaces `~` at the start of these paths by the home folder.

  keys: the dotted keys of the paths.

  Raises:
    ConfigError: an override can't be applied, or one of these paths looks like a misspelt bucket.
  """
  for key in keys:
    if key in overrides:
      override(config, key, overrides[key])
    *sections, name = key.split('.')
    section = config
    for part in sections:
      section = section.get(part, {})
    if isinstance(section.get(name), str):
      _check_place(section, name, f'config.{key}')


def _check_places(config: ConfigDict, prefix: str = 'config.') -> None:
  """Checks the paths in a config. Replaces `~` at the start of a path by the home folder, in place.

  prefix: the dotted name of `config` with a dot at the end, such as 'config.data.', for error messages.

  Raises:
    ConfigError: a path looks like a misspelt bucket, such as `gs:/x` instead of `gs://x`.
  """
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      _check_places(value, f'{prefix}{name}.')
    elif isinstance(value, str):
      _check_place(config, name, f'{prefix}{name}')


def _check_place(section: ConfigDict, name: str, key: str) -> None:
  if problem := not_a_place(section[name]):
    raise ConfigError(f'{key}: {problem}')
  if at_home(section[name]) != section[name]:
    section[name] = at_home(section[name])


def module(spec: str) -> tuple[types.ModuleType, str]:
  """Runs the Python file of `spec`, which is FILE.py or FILE.py:ARG. Returns (the module, ARG or '').

  Raises:
    ConfigError: the file doesn't exist, fails, or doesn't define get_config.
  """
  name, _, arg = spec.partition('.py:') if '.py:' in spec else (spec.removesuffix('.py'), '', '')
  if not spec.endswith('.py') and not arg:
    raise ConfigError(f'--config={spec}: expected FILE.py, FILE.py:ARG or FILE.json')
  path = _find(name + '.py')
  module_spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
  loaded = importlib.util.module_from_spec(module_spec)
  with _errors_of(path):
    module_spec.loader.exec_module(loaded)
  if not callable(getattr(loaded, 'get_config', None)):
    raise ConfigError(f'{path}: has no function get_config(arg)')
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
    raise ConfigError(f'{path}{line}: {_explain(error)}') from error


def _explain(error: Exception) -> str:
  """Returns a message for an error that a config file raised. Messages of ml_collections are made easier to read."""
  message = str(error.args[0]) if error.args else ''
  if found := re.match(r"Could not override field '(.+?)'.*?\. (.*) is of original type .* to type <class '([\w.]+)'>",
                       message, re.DOTALL):
    what = {'float': 'a number', 'int': 'a whole number', 'str': 'a text', 'bool': 'true or false'}
    kind = found[3].rpartition('.')[2]
    return f'{found[1]}: expected {what.get(kind, "a section" if kind == "ConfigDict" else kind)}, got {found[2]!r}'
  if found := re.match(r"'(\w+)'\nDid you mean \"(\w+)\"", message):
    return f'no such key: {found[1]}; did you mean {found[2]}?'
  if isinstance(error, AttributeError) and isinstance(error.obj, ConfigDict):
    return f'no such key: {error.name}{suggestion(error.name, error.obj) or "; there are " + ", ".join(error.obj)}'
  if isinstance(error, KeyError):
    return f'no such key: {message}'
  return f'{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}'


def _load_python(spec: str) -> ConfigDict:
  loaded, arg = module(spec)
  try:
    inspect.signature(loaded.get_config).bind(None)
  except TypeError:
    raise ConfigError(f'{loaded.__file__}: get_config must take one argument, as in get_config(arg=None)') from None
  with _errors_of(pathlib.Path(loaded.__file__)):
    config = loaded.get_config(arg or None)
  if not isinstance(config, ConfigDict):
    got = 'nothing' if config is None else type(config).__name__
    raise ConfigError(f'{loaded.__file__}: get_config must return the config, a ConfigDict; it returned {got}')
  return config


def _find(path: str) -> pathlib.Path:
  """Returns `path` if this file exists, else the file at this path in the package's folder.

  Raises:
    ConfigError: neither file exists.
  """
  root = pathlib.Path(__file__).resolve().parent.parent
  for candidate in (pathlib.Path(at_home(path)), root / path):
    if os.path.isfile(candidate):  # unlike candidate.is_file(), it doesn't raise for an impossible name
      return candidate
  raise ConfigError(f'--config={path}: no such file{suggestion(path, shipped())}')


def shipped() -> list[str]:
  """Returns the paths of the configs that ship with the package. These are the files that define get_config."""
  root = pathlib.Path(__file__).resolve().parent
  return [str(p.relative_to(root.parent)) for p in sorted(root.rglob('*.py'))
          if '\ndef get_config(' in p.read_text(encoding='utf-8')]


def _load_json(path: str) -> ConfigDict:
  try:
    values = read_json(epath.Path(place(path)))
    if not isinstance(values, dict):
      raise ValueError('the top level is no object')
    return from_dict(values)
  except FileNotFoundError:
    raise ConfigError(f'--config={path}: no such file') from None
  except argparse.ArgumentTypeError as error:  # a package for gs:// is missing
    raise ConfigError(f'--config={error}') from None
  except OSError as error:
    raise ConfigError(f'--config={path}: could not be read ({error.strerror or error})') from None
  except ValueError as error:
    raise ConfigError(f'--config={path}: not a resolved config ({error})') from None


def from_dict(values: Mapping[str, Any]) -> ConfigDict:
  """Returns a dictionary and all dictionaries in it as ConfigDicts.

  Raises:
    ValueError: a ConfigDict can't hold one of the keys, such as a key with a dot.
  """
  try:
    return ConfigDict(values)
  except (AttributeError, KeyError) as error:
    raise ValueError(str(error)) from None


def flatten(config: ConfigDict | Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns {dotted key: value} of a nested config, for example {'optimizer.lr': 1e-3, ...}.

  prefix: a text to put before each key.
  """
  flat = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict | dict) and len(value):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[prefix + key] = value
  return flat


def override(config: ConfigDict, key: str, text: str) -> None:
  """Sets the value of the dotted `key`.

  text: the new value. It is parsed as the type of the present value; lists and sections are written as JSON.

  Raises:
    ConfigError: the config doesn't have the key, or the text can't be parsed as this type.
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
  with section.ignore_type():
    section[leaf] = _read(f'config.{key}', text, section[leaf], settings.is_setting(key))


def _read(key: str, text: str, old: Any, typed: bool) -> Any:
  """Returns the value that `text` gives a setting. See `override`.

  Args:
    key: the dotted key, for the error message.
    text: the text.
    old: the present value.
    typed: whether the setting has the type of `old`. In an entry of data.sources, for example, `weight=2` is a whole
      number only because the config wrote it so; it may become 0.5.
  """
  try:
    if isinstance(old, bool):
      return {'true': True, '1': True, 'false': False, '0': False}[text.lower()]
    if isinstance(old, int):
      number = float(text) if any(c in text for c in '.eE') else int(text)
      if number != int(number) and typed:
        raise ValueError
      return int(number) if number == int(number) else number
    if isinstance(old, float):
      return float(text)
    if isinstance(old, str):
      return text
    value = from_json(text)
    if isinstance(old, tuple | list) and isinstance(value, list):
      return tuple(value)
    if not isinstance(old, ConfigDict) or not isinstance(value, dict):
      raise ValueError
  except (ValueError, KeyError, OverflowError):
    kind = {bool: 'true or false', int: 'a whole number', float: 'a number', tuple: 'a JSON list',
            list: 'a JSON list', ConfigDict: 'a JSON object'}.get(type(old), type(old).__name__)
    raise ConfigError(f'config.{key.removeprefix("config.")}: expected {kind}, got {text!r}') from None
  try:
    return from_dict(value)
  except ValueError as error:
    raise ConfigError(f'config.{key.removeprefix("config.")}: not a section ({error})') from None


def to_json(config: ConfigDict) -> str:
  """Returns the resolved config as JSON. Reading the JSON with `load` gives an equal config."""
  return json.dumps(config.to_dict(), indent=2) + '\n'
