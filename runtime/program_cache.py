"""Keeps compiled programs on disk, so that a later command with the same programs doesn't compile them again."""

import contextlib
import os
import pathlib
import time

import jax

SHORTEST_S = 0.1  # programs that compile faster aren't kept. JAX's default, 1 s, leaves out dozens of small ones.
KEPT_DAYS = 30


def keep_programs() -> None:
  """Makes JAX keep compiled programs in ~/.cache/betarank/programs. $XDG_CACHE_HOME, if it is set, replaces ~/.cache.

  Must be called before the first program is compiled. Programs that were written more than KEPT_DAYS days ago are
  removed. JAX_COMPILATION_CACHE_DIR names another folder, and JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.

  Nothing is kept

  - if the folder can't be written, or if other users can write to it, because JAX runs the programs that it finds
    there,
  - in a job of several processes. Only its first process would write to the cache, and the others would still compile,
  - on a CPU, unless JAX_COMPILATION_CACHE_DIR is set. Another CPU with the same home folder may be unable to run the
    program, and XLA refuses its own programs on some Intel CPUs, with a line of error for each (jax-ml/jax issue
    38445).
  """
  if jax.process_count() > 1:
    return
  folder = jax.config.jax_compilation_cache_dir or ''
  if not folder and jax.default_backend() != 'cpu':
    folder = _own_folder()
    jax.config.update('jax_compilation_cache_dir', folder or None)
  if folder and '://' not in folder and 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', SHORTEST_S)


def _own_folder() -> str:
  """Creates the default folder for compiled programs, and removes old programs from it.

  Returns its path, or '' if the folder can't be used.
  """
  try:
    home = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
    home.mkdir(parents=True, exist_ok=True)
    for folder in (home / 'betarank', home / 'betarank' / 'programs'):
      folder.mkdir(mode=0o700, exist_ok=True)
      status = folder.stat()
      if status.st_uid != os.getuid() or status.st_mode & 0o022 or not os.access(folder, os.W_OK):
        return ''
    files = list(folder.rglob('*'))
  except (OSError, RuntimeError):  # pathlib raises RuntimeError if there is no home
    return ''
  for file in files:
    with contextlib.suppress(OSError):  # another command removes the same files
      if file.is_file() and file.stat().st_mtime < time.time() - KEPT_DAYS * 86400:
        file.unlink()
  return str(folder)
