"""Converts a config section, which is a dictionary, to the frozen dataclass that other modules take.

model = section(ModelConfig, config.model, 'model')
"""

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from betarank.configs.errors import ConfigError, suggestion
from betarank.configs.renamed import RENAMED

T = TypeVar('T')

# Whole numbers are below 2**31, because sizes and counts become shapes, loops and int32; these may reach 2**63.
_MAY_BE_LARGER = {'tokens', 'max_documents', 'document_bytes'}


def section(cls: type[T], values: ConfigDict | Mapping[str, Any], path: str = '') -> T:
  """Returns an instance of the frozen dataclass `cls` with the values of a config section.

  path: the dotted key of the section, such as 'eval.sample', for error messages.

  Raises:
    ConfigError: a key is unknown or missing, a value has the wrong type, a whole number is too large to be meant, or
      `cls` raises a ValueError. The message of such a ValueError must begin with the name of the field, because `path`
      is put before it.
  """
  prefix = f'{path}.' if path else ''
  _expect(isinstance(values, ConfigDict | Mapping), path, 'a section', values)
  hints = typing.get_type_hints(cls)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  for key in values:
    if f'{prefix}{key}' in RENAMED:
      raise ConfigError(f'config.{prefix}{key}: is called config.{RENAMED[prefix + key]} now')
    if key not in fields:
      known = [f'config.{prefix}{name}' for name in fields]
      raise ConfigError(f'config.{prefix}{key}: no such key{suggestion(f"config.{prefix}{key}", known)}')
  arguments = {}
  for name, field in fields.items():
    if name in values:
      arguments[name] = _convert(hints[name], values[name], prefix + name)
    elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
      raise ConfigError(f'config.{prefix}{name}: missing; a config begins with common.base() or '
                        'common.rl_base() of betarank.configs, which have every setting')
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
    power = 63 if path.rpartition('.')[2] in _MAY_BE_LARGER else 31
    _expect(abs(value) < 2**power, path, f'a whole number below 2**{power}', value)
  elif hint in (str, bool):
    _expect(isinstance(value, hint), path, 'text' if hint is str else 'true or false', value)
  return value


def _expect(holds: bool, path: str, what: str, value: Any) -> None:
  if not holds:
    raise ConfigError(f'config.{path}: expected {what}, got {value!r}')
