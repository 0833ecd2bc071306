"""Parses command lines. All commands use this parser, so that all of them report bad flags in the same way.

The parser differs from argparse in four ways. A mistake is a ConfigError, which is printed as one line, without the
usage text. The error for an unknown flag suggests a similar flag. A flag may be written with - instead of _, as in
--dry-run. A flag can't be abbreviated.
"""

import argparse
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from betarank.configs.errors import ConfigError, suggestion

# Matches what was probably meant as a bucket. `gs:/x` would be a local folder, lost with the machine; `GS://x` is
# neither a folder nor a bucket.
_BUCKET_MEANT = re.compile(r'\s*([a-z]+:)?(gs:|(s3|az|hf|file|https?|ftp):/)', re.IGNORECASE)
_BUCKET = re.compile(r'([a-z]+:)?(gs|s3|az|hf)://[^/\s]')
_HOME = re.compile(r'([a-z]+:)?(?=~/|~$)')
_LARGEST_COUNT = 2**31 - 1


class Parser(argparse.ArgumentParser):
  """An ArgumentParser that raises ConfigError and suggests similar flags.

  This module's docstring lists all differences to argparse.
  """

  def __init__(self, prog: str, doc: str | None = None, **options: Any):
    """Creates the parser of a command.

    prog: the command, such as 'betarank train'.
    doc: the text that --help prints above the flags.
    """
    super().__init__(prog=prog, description=doc, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter, **options)

  def parse_known_args(self, args: Sequence[str], namespace: argparse.Namespace | None = None):
    words = [underscored(word) for word in args]
    known = self._flags()
    for word in words:  # before argparse, which would only say that the flag is missing that this one was meant for
      flag = word.partition('=')[0]
      if flag.startswith('--') and flag not in known and not ('--config' in known and flag.startswith('--config.')):
        raise self.unknown(word)
    return super().parse_known_args(words, namespace)

  def parse_args(self, args: Sequence[str], namespace: argparse.Namespace | None = None):
    found, rest = self.parse_known_args(args, namespace)
    if rest:
      raise self.unknown(rest[0])
    return found

  def unknown(self, word: str) -> ConfigError:
    """Returns the error for a word that isn't a flag of this command."""
    if not word.startswith('-'):
      return ConfigError(f'{self.prog}: unexpected {word!r}; {self.prog} --help shows what it takes')
    flag = word.partition('=')[0]
    return ConfigError(f'{flag}: no such flag{suggestion(flag, self._flags())}; {self.prog} --help lists them')

  def _flags(self) -> list[str]:
    """Returns the flags of this parser and of its subcommands, and '--', which ends the flags."""
    groups = [action.choices.values() for action in self._actions if isinstance(action, argparse._SubParsersAction)]
    parsers = [self, *(parser for group in groups for parser in group)]
    return ['--', *(flag for parser in parsers for action in parser._actions for flag in action.option_strings)]

  def error(self, message: str) -> NoReturn:
    """Raises ConfigError with a reworded message of argparse. argparse calls this method for a bad command line."""
    if found := re.fullmatch(r'argument (.*?): invalid choice: (.+) \(choose from (.*)\)', message):
      choices = [choice.strip(" '") for choice in found[3].split(',')]
      wrong = found[2].strip("'")
      message = f'{found[1]} can be {", ".join(choices)}, not {wrong!r}{suggestion(wrong, choices)}'
    elif found := re.fullmatch(r'the following arguments are required: (.*)', message):
      choices = {action.dest: f'{action.dest} ({", ".join(action.choices)})' for action in self._actions
                 if action.choices}
      message = 'missing ' + ' and '.join(choices.get(name, name) for name in found[1].split(', '))
    else:
      message = re.sub(r'^argument ', '', message)
      message = re.sub(r'invalid int value: (.*)', r'expected a whole number, got \1', message)
      message = re.sub(r'invalid float value: (.*)', r'expected a number, got \1', message)
    raise ConfigError(f'{self.prog}: {message}')


def underscored(word: str) -> str:
  """Returns a word of a command line, with every - in a flag's name replaced by _. Other words are returned unchanged.
  """
  flag, equals, value = word.partition('=')
  return f'--{flag[2:].replace("-", "_")}{equals}{value}' if flag.startswith('--') else word


def above_zero(kind: type[float]) -> Callable[[str], float]:
  """Returns a function that reads a number above 0. Use it as the `type` of a flag, or for an environment variable.

  kind: `int` for a whole number below 2**31, or `float` for a finite number.

  The function raises argparse.ArgumentTypeError if its argument isn't such a number.
  """
  largest, what = (_LARGEST_COUNT, 'a whole number') if kind is int else (math.inf, 'a number')

  def read(text: str) -> float:
    try:
      value = kind(text)
    except ValueError:
      value = 0
    if not 0 < value <= largest or value == math.inf:
      raise argparse.ArgumentTypeError(f'expected {what} above 0, got {text!r}')
    return value

  return read


def line_ends(text: str) -> str:
  r"""Returns `text` with \n replaced by a line end, and \\ by one backslash. Use it as the `type` of a flag with text.

  So \\n stands for a backslash and an n, as in the LaTeX of \\neq. Other backslashes are kept.
  """
  return re.sub(r'\\([n\\])', lambda found: '\n' if found[1] == 'n' else '\\', text)


def place(text: str) -> str:
  """Returns the path of a file or folder that a flag names. Use this function as the `type` of a flag.

  `~` at the start of the path is replaced by the home folder. The path may be local or remote (gs://, s3://, ...).

  Raises:
    argparse.ArgumentTypeError: the path is empty, looks like a misspelt bucket, or needs a package that isn't
      installed.
  """
  path = unopened_place(text)
  scheme, remote, _ = path.partition('://')
  if remote:
    import fsspec
    try:
      fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
      raise argparse.ArgumentTypeError(f'{path}: {error} ({install_hint(path)})') from None
  return path


def unopened_place(text: str) -> str:
  """Returns what `place` returns, without checking that the package for a remote path is installed.

  Use this function for a path that perhaps only another process opens, such as the folder of a sweep on TPUs.

  Raises:
    argparse.ArgumentTypeError: the path is empty, or looks like a misspelt bucket.
  """
  if not text.strip():
    raise argparse.ArgumentTypeError('is empty; is the variable set that it was made from?')
  if problem := not_a_place(text):
    raise argparse.ArgumentTypeError(problem)
  return at_home(text)


def run_place(text: str) -> str:
  """Returns what `place` returns, for a folder that a run saves checkpoints to.

  Raises:
    argparse.ArgumentTypeError: `place` refuses the path, or it is in another store than gs://.
  """
  if problem := not_for_runs(text):
    raise argparse.ArgumentTypeError(problem)
  return place(text)


def not_for_runs(path: str) -> str:
  """Returns an error message if no run can save its checkpoints in the folder `path`; '' otherwise.

  Of all stores, Orbax knows only in gs:// which checkpoints are complete.
  """
  if '://' not in path or path.startswith('gs://') or not_a_place(path):
    return ''
  return f'{path}: a run can\'t be saved there, only on a disk or in gs://'


def install_hint(path: str) -> str:
  """Returns the pip command that installs what fsspec needs to read a URI such as `path` (gs://, s3://, ...).

  If no package for this kind of URI is known, returns a text that says so.
  """
  packages = {'gs': 'gcsfs', 'gcs': 'gcsfs', 's3': 's3fs', 's3a': 's3fs', 'hf': 'huggingface_hub', 'az': 'adlfs',
              'abfs': 'adlfs', 'http': 'aiohttp', 'https': 'aiohttp', 'ssh': 'paramiko', 'sftp': 'paramiko'}
  scheme = path.partition('://')[0]
  return f'pip install {packages[scheme]}' if scheme in packages else f'no reader of {scheme}:// is known'


def not_a_place(text: str) -> str:
  """Returns an error message for a text that looks like a misspelt bucket, such as `gs:/x`; '' for other texts."""
  if _BUCKET_MEANT.match(text) and not _BUCKET.match(text):
    return f'{text!r} is neither a local path nor a bucket, which is gs://NAME/...'
  return ''


def at_home(text: str) -> str:
  """Returns `text` with `~` at the start of its path replaced by the home folder.

  This is needed for --workdir=~/runs, because the shell replaces `~` only at the start of a word.

  text: a path, or a URI such as text:~/books/*.txt.
  """
  home = _HOME.match(text)
  return text[:home.end()] + os.path.expanduser(text[home.end():]) if home else text
