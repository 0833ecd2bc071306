"""python -m tests.gloo ARGS: `betarank ARGS` in one process whose CPU devices add in the order of several processes.

In a job of one process XLA adds what its CPU devices hold in another order than gloo does between processes, so that
sums over more than two devices differ in their last bits. Here a single process uses gloo too.
"""

import runpy

import jax

from tests.runs import free_port


def main():
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'127.0.0.1:{free_port()}', num_processes=1, process_id=0)
  runpy.run_module('betarank', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main()
