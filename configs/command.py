"""betarank config FILE[:ARG] [--config.KEY=VALUE ...]     prints the resolved config and what differs from the defaults
betarank config --list                                  lists the configs that ship

The command only reads the config. No device and no data is needed.
"""

import ast
import json
import pathlib
from collections.abc import Sequence

from betarank.configs import common, describe, load, settings
from betarank.configs.errors import ConfigError
from betarank.configs.parser import Parser


def main(argv: Sequence[str]) -> None:
  parser = Parser('betarank config', __doc__)
  parser.add_argument('file', nargs='?', default='', metavar='FILE[:ARG]', help='the config to print')
  parser.add_argument('--list', action='store_true', help='list the configs that ship')

  def configure(args, _):
    if args.list:
      return common.base()
    if not args.file and not args.config:
      raise ConfigError('betarank config: name a config, or --list those that ship')
    if args.file and args.config:
      raise ConfigError(f'betarank config: {args.file} and --config={args.config}: name one of them')
    return load.read(args.file or args.config)

  config, args = load.from_command_line(
    parser, argv, settings=settings.STAGES, configure=configure, needs_config=False)
  if args.list:
    print(_listing())
    return
  flat = lambda config: load.flatten(json.loads(load.to_json(config)))  # a tuple is a list, as in a config.json
  defaults, values = flat(common.rl_base() if 'rl' in config else common.base()), flat(config)
  lines = {key: f'{key} = {describe.value(value)}' for key, value in values.items()}
  width = min(60, max(map(len, lines.values())))
  for key, line in lines.items():
    if key not in defaults:
      line = f'{line:{width}}  # no default'
    elif defaults[key] != values[key]:
      line = f'{line:{width}}  # default {describe.value(defaults[key])}'
    print(line)


def _listing() -> str:
  """Returns one line per config: its path and the first line of its docstring."""
  root = pathlib.Path(__file__).resolve().parent.parent
  names = load.shipped()
  width = max(map(len, names))
  about = [(ast.get_docstring(ast.parse((root / name).read_text(encoding='utf-8'))) or '').partition('\n')[0]
           for name in names]
  return '\n'.join(f'{name:{width}}  {text}' for name, text in zip(names, about))
