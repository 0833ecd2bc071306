"""Errors for the person at the command line, and how an entry point shows them."""

import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterable

_LONGEST_SHOWN = 2000  # characters of a message


class UserError(ValueError):
  """An error that the person at the command line can fix. Its message is one line, written for them."""


class ConfigError(UserError):
  """The error for a setting that can't be used."""


def suggestion(name: str, candidates: Iterable[str]) -> str:
  """Returns '; did you mean X?' for the candidate nearest to `name`, or '' if none is near."""
  candidates = sorted(set(candidates) - {name})
  same_leaf = [c for c in candidates if c.rsplit('.', 1)[-1] == name.rsplit('.', 1)[-1]]
  # `config.lr` for `config.optimizer.lr`: the last part is right, the sections before it aren't.
  near = difflib.get_close_matches(name, same_leaf, n=1, cutoff=0) or difflib.get_close_matches(name, candidates, n=1)
  return f'; did you mean {near[0]}?' if near else ''


def one_line(error: object) -> str:
  """Returns the message as one printable line: no line ends, no control characters, at most 2000 characters."""
  text = ' '.join(str(error).split())
  text = text if len(text) <= _LONGEST_SHOWN else f'{text[:_LONGEST_SHOWN]} ...'
  return ''.join(c if c.isprintable() else '\ufffd' for c in text)


def run_main(main: Callable[[], None]) -> None:
  """Runs an entry point; a UserError ends it with its message on one line and exit status 2.

  If the reader of its output goes away, as `head` does, it ends silently with status 141, as programs in C do.
  """
  try:
    main()
    sys.stdout.flush()
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more fails when Python closes it
    sys.exit(128 + signal.SIGPIPE)
  except UserError as error:
    print(f'error: {one_line(error)}', file=sys.stderr)
    sys.exit(2)
