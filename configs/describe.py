"""Formats settings as text, for --help and for `betarank config`."""

import json
import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

from betarank.configs import settings


def table(tree: Mapping[str, Any], width: int = 0) -> str:
  """Returns a text that lists settings with key, default and meaning, grouped by section.

  tree: a nested dictionary of settings, as in configs/settings.py.
  width: the largest length of a line, in characters; 0 means the width of the terminal.
  """
  width = width or shutil.get_terminal_size().columns
  flat = settings.flat(tree)
  shown = {key: f'  --config.{key}={value(setting.default)}' for key, setting in flat.items()}
  lines, before = ['settings, with their defaults before an experiment changes them:'], None
  for key, setting in flat.items():
    part = key.partition('.')[0]
    if part != before:
      lines.append('')
    before = part
    lines += [shown[key], *textwrap.wrap(setting.help, max(40, width - 1), initial_indent=' ' * 6,
                                         subsequent_indent=' ' * 6)]
  return '\n'.join(lines)


def value(default: Any) -> str:
  """Returns `default`, the value of a setting, as it is written on a command line."""
  if isinstance(default, bool):
    return str(default).lower()
  if isinstance(default, str):
    return default.replace('\n', '\\n')
  return json.dumps(default) if isinstance(default, list | tuple | dict) else f'{default}'
