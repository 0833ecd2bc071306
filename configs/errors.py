"""Defines the errors that the user of the command line sees, and shows them."""

import contextlib
import difflib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import IO, NoReturn

_LONGEST_NAME = 500  # longer names get no suggestion
_LONGEST_SHOWN = 2000  # characters of a message
# Errors of the file system that are about the place, not about the program.
_PLACE_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOSPC,
                 errno.EDQUOT, errno.ENAMETOOLONG, errno.EIO)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # of a write, whose error names no file
# TensorStore has no error types of its own. Its status codes become these Python errors.
STORE_ERRORS = (ValueError, RuntimeError, OSError, KeyError, IndexError, NotImplementedError)


class UserError(ValueError):
  """Raised for an error that the user of the command line can fix. The message is one line, written for this user."""


class ConfigError(UserError):
  """Raised for a config, setting or flag that can't be used."""


class Interrupted(SystemExit):
  """Raised to end the process after Ctrl-C, with exit status 130."""


def suggestion(name: str, candidates: Iterable[str]) -> str:
  """Returns '; did you mean X?' for the candidate X that is most similar to `name`, or '' if no candidate is similar.
  """
  if len(name) > _LONGEST_NAME:  # comparing takes quadratic time
    return ''
  candidates = sorted(set(candidates) - {name})
  leaf = lambda text: text.rpartition('.')[2]
  same_leaf = [c for c in candidates if '.' in c and leaf(c) == leaf(name)]
  if len(same_leaf) == 1 and '/' not in name:  # the section is missing or wrong, as in config.lr
    return f'; did you mean {same_leaf[0]}?'
  initials = ''.join(word[0] for word in leaf(name).split('_') if word)  # lr for learning_rate
  if (short := name.removesuffix(leaf(name)) + initials) in candidates:
    return f'; did you mean {short}?'
  # What a name and a candidate begin with, such as `config.` or a folder, must not make them similar. Candidates of the
  # same section come first, then those of the section around it.
  start = name[:max(name.rfind('.'), name.rfind('/')) + 1]
  while True:
    inside = [c.removeprefix(start) for c in candidates if c.startswith(start)]
    if near := difflib.get_close_matches(name.removeprefix(start), inside, n=1, cutoff=0.7):
      return f'; did you mean {start}{near[0]}?'
    if len(inside) == len(candidates):
      return ''
    start = start[:max(start[:-1].rfind('.'), start[:-1].rfind('/')) + 1]


def one_line(error: object) -> str:
  """Returns the message of an error on one line, for the terminal.

  Characters after the 2000th are cut off, and characters that can't be printed become U+FFFD.
  """
  text = ' '.join(str(error).split())
  text = text if len(text) <= _LONGEST_SHOWN else f'{text[:_LONGEST_SHOWN]} ...'
  return ''.join(c if c.isprintable() else '\ufffd' for c in text)


def print_if_possible(text: str, file: IO[str] | None = None) -> None:
  """Prints a line to `file`, or to standard error if `file` is None. Does nothing if the line can't be written.

  Use this function before a process ends, because a full disk or a closed terminal must not keep it from ending.
  """
  with contextlib.suppress(OSError, ValueError):  # ValueError: the file is closed, or its encoding lacks a character
    print(text, file=file or sys.stderr, flush=True)


def run_main(main: Callable[[], None]) -> None:
  """Runs `main`. Turns these errors into a short message on stderr and an exit status:

  - A UserError, or an OSError about a path that can't be read or written, or about a full disk: one line, status 2.
  - Ctrl-C (KeyboardInterrupt): the line 'stopped', or 'stopped; MESSAGE' if the exception has a message; status 130.
  - BrokenPipeError, because the program that reads the output, such as `head`, has ended: no message, status 141.
  """
  try:
    main()
    sys.stdout.flush()
  except BrokenPipeError:
    _discard_output()
    sys.exit(128 + signal.SIGPIPE)
  except UserError as error:
    _refuse(error)
  except KeyboardInterrupt as error:
    print_if_possible(f'\nstopped{"; " if str(error) else ""}{error}')
    raise Interrupted(128 + signal.SIGINT) from None
  except OSError as error:
    if error.errno not in (_PLACE_ERRORS if error.filename else _DISK_ERRORS):
      raise
    _refuse(f'{error.filename or "standard output or a file"}: {error.strerror}')


def _discard_output() -> None:
  """Discards the output that is still in the buffer. Otherwise, writing it when Python exits would fail again."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(error: object) -> NoReturn:
  print_if_possible(f'error: {one_line(error)}')
  if sys.stdout and not sys.stdout.closed:
    try:
      sys.stdout.flush()
    except OSError:
      _discard_output()
  sys.exit(2)
