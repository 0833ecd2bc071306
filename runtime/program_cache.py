"""Keeps compiled programs on disk, so that a later command with the same programs doesn't compile them again."""

import os
import pathlib
import time

import jax

SHORTEST_S = 0.1  # programs that compile faster aren't kept. JAX's default, 1 s, leaves out dozens of small ones.
KEPT_DAYS = 30


def keep_programs() -> None:
  """Makes JAX keep compiled programs in ~/.cache/betarank/programs, or betarank/programs in $XDG_CACHE_HOME.

  Must be called before the first program is compiled, by commands of a single process. Of a job of several processes,
  only the first would write to the cache, and the others would compile alone. Programs that were written more than
  KEPT_DAYS days ago are removed. If the folder can't be written, nothing is kept.

  JAX_COMPILATION_CACHE_DIR names another folder, and JAX_ENABLE_COMPILATION_CACHE=false turns the cache off. On a CPU,
  nothing is kept unless JAX_COMPILATION_CACHE_DIR is set: code for one CPU may not run on another one that has the same
  home folder, and XLA refuses its own code on some Intel CPUs, with a line of error for each program (jax-ml/jax
  issue 38445).
  """
  folder = jax.config.jax_compilation_cache_dir or ''
  if not folder and jax.default_backend() != 'cpu':
    folder = _own_folder()
    jax.config.update('jax_compilation_cache_dir', folder or None)
  if folder and '://' not in folder and 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', SHORTEST_S)


def _own_folder() -> str:
  """Creates the default folder if there is none, and removes old programs from it. Returns '' if this fails."""
  folder = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'betarank' / 'programs'
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # its content is run, so others must not write to it
    for file in folder.rglob('*'):
      if file.is_file() and file.stat().st_mtime < time.time() - KEPT_DAYS * 86400:
        file.unlink()
  except (OSError, RuntimeError):  # pathlib raises RuntimeError if there is no home
    return ''
  return str(folder) if os.access(folder, os.W_OK) else ''
