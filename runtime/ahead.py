"""Compiles programs in another thread before they are called, while the run opens its data or does its first steps.

    [ready] = ahead.compiling(lambda: ahead.outputs(update.lower(state, batch)))     # arguments are abstract arrays
    ...
    ready()                                                                          # waits until it is compiled
    update(state, batch)                                                             # compiles nothing

The programs are those that the calls would compile, because JAX finds them by their arguments. If the arguments here
differ from those of the call, the call compiles its own program, and only time is lost; tests hold that this doesn't
happen. Shardings over mesh axes of size 1 may be written in another way, so the compilation cache may have another
entry for such a program; its results are the same.

XLA compiles without Python's global lock, but tracing and lowering need it.
"""

import os
import threading
from collections.abc import Callable
from typing import Any

import jax

# With fewer, nothing is compiled ahead: XLA uses several cores for one program, so that programs would only compete.
MIN_CORES = 4


def compiling(*works: Callable[[], Any]) -> list[Callable[[], None]]:
  """Does `works` one after the other in another thread, with the current mesh. Returns a function for each of them,
  which waits until it is done.

  With fewer than MIN_CORES cores, or if JAX_DISABLE_JIT is set, nothing is done.

  Errors are ignored: the call of a program that doesn't compile raises the same error, at its place. If the process
  ends, it waits for the work in progress and leaves out the rest.
  """
  mesh, done = jax.sharding.get_mesh(), [threading.Event() for _ in works]

  def run():
    for work, event in zip(works, done):
      try:
        if threading.main_thread().is_alive():
          with jax.set_mesh(mesh):
            work()
      except Exception:
        pass
      finally:
        event.set()

  if jax.config.jax_disable_jit or len(os.sched_getaffinity(0)) < MIN_CORES:
    return [lambda: None for _ in works]
  threading.Thread(target=run, name='compiling ahead').start()
  return [event.wait for event in done]


def outputs(program: jax.stages.Lowered) -> Any:
  """Compiles a program. Returns the shapes, dtypes and shardings of its outputs, as arguments for another program."""
  compiled = program.compile()
  return jax.tree.map(
    lambda out, sharding: jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=sharding),
    compiled.out_info, compiled.output_shardings)
