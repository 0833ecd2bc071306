"""Records which programs JAX compiles, and in which thread."""

import contextlib
import threading

import jax

from betarank.runtime import ahead

COMPILED = '/jax/core/compile/backend_compile_duration'  # also if the program comes from the compilation cache


@contextlib.contextmanager
def compilations():
  """Yields a list. For each program that is compiled in the block, it gets a pair (in the main thread, name).

  Programs are compiled ahead in the block, however few cores there are.
  """
  found = []

  def event(name, _, fun_name='', **__):
    if name == COMPILED:
      found.append((threading.current_thread() is threading.main_thread(), fun_name))

  jax.clear_caches()
  cores, ahead.MIN_CORES = ahead.MIN_CORES, 1
  jax.monitoring.register_event_duration_secs_listener(event)
  try:
    yield found
  finally:
    ahead.MIN_CORES = cores
    jax.monitoring.unregister_event_duration_listener(event)
