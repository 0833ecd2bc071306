"""Records which programs JAX compiles, and in which thread."""

import contextlib
import threading

import jax

COMPILED = '/jax/core/compile/backend_compile_duration'  # also if the program comes from the compilation cache


@contextlib.contextmanager
def compilations():
  """Yields a list. For each program that is compiled in the block, it gets a pair (in the main thread, name)."""
  found = []

  def event(name, _, fun_name='', **__):
    if name == COMPILED:
      found.append((threading.current_thread() is threading.main_thread(), fun_name))

  jax.clear_caches()
  jax.monitoring.register_event_duration_secs_listener(event)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(event)
