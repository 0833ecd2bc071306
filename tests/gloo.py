"""Runs `betarank ARGS` in one process that adds in the same order as several processes: python -m tests.gloo ARGS

In a job of one process, XLA adds the values of its CPU devices in another order than gloo, which adds values of several
processes. Sums over more than two devices therefore differ in their last bits. With this module, a single process uses
gloo too.
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
