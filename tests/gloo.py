"""python -m tests.gloo MODULE ARGS: that module in one process whose CPU devices add up as those of several do.

In a process on its own XLA adds what its CPU devices hold in another order than gloo does between processes, so that
sums over more than two differ in their last bits. Here one process takes gloo too.
"""

import runpy
import socket

import jax


def main():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'127.0.0.1:{port}', num_processes=1, process_id=0)
  runpy.run_module('betarank', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main()
