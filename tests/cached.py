"""python -m tests.cached ARGS: `betarank ARGS` in a process of a job that writes its programs to the compilation cache.

JAX lets only process 0 write them, though on CPUs each process has programs of its own. Without this the others would
compile again each time that a test starts them.
"""

import runpy

from jax._src import compiler, distributed


def main():
  write, state = compiler._cache_write, distributed.global_state

  def write_anyway(*arguments):
    index, state.process_id = state.process_id, 0
    try:
      write(*arguments)
    finally:
      state.process_id = index

  compiler._cache_write = write_anyway
  runpy.run_module('betarank', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main()
