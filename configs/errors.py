"""Defines the errors that are shown to the user of the command line, and how they are shown."""

import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterable

_LONGEST_SHOWN = 2000  # characters of a message


class UserError(ValueError):
  """Raised for an error that the user of the command line can fix. The message is one line, written for that user."""


class ConfigError(UserError):
  """Raised for a setting that can't be used."""


def suggestion(name: str, candidates: Iterable[str]) -> str:
  """Returns '; did you mean X?' for the candidate X that is most similar to `name`, or '' if none is similar."""
  candidates = sorted(set(candidates) - {name})
  same_leaf = [c for c in candidates if c.rsplit('.', 1)[-1] == name.rsplit('.', 1)[-1]]
  # Someone may write `config.lr` for `config.optimizer.lr`: the last part is right, the section is missing.
  near = difflib.get_close_matches(name, same_leaf, n=1, cutoff=0) or difflib.get_close_matches(name, candidates, n=1)
  return f'; did you mean {near[0]}?' if near else ''


def one_line(error: object) -> str:
  """Returns the message on one line, without control characters, cut to 2000 characters."""
  text = ' '.join(str(error).split())
  text = text if len(text) <= _LONGEST_SHOWN else f'{text[:_LONGEST_SHOWN]} ...'
  return ''.join(c if c.isprintable() else '\ufffd' for c in text)


def run_main(main: Callable[[], None]) -> None:
  """Runs `main`. If it raises a UserError, prints the message on one line and exits with status 2.

  If the program that reads the output closes it early, as `head` does, exits without a message with status 141.
  """
  try:
    main()
    sys.stdout.flush()
  except BrokenPipeError:
    # So that flushing the output when Python exits doesn't fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)
  except UserError as error:
    print(f'error: {one_line(error)}', file=sys.stderr)
    sys.exit(2)
