"""Runs `betarank ARGS` in a process of a job: python -m tests.cached ARGS

Unlike `betarank`, every process writes its compiled programs to the compilation cache. By default, JAX lets only
process 0 write. On CPUs, however, each process has programs of its own, which it would compile again each time that a
test starts it.
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
