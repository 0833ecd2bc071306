"""Sweep of lambda_head and lambda_tail, the rewards of wrong tokens, and of k, the number of tokens in the head.

    betarank sweep --config=configs/sweeps/lambda_k.py --root=runs/lambda_k --parallel=2

The paper has only lambda_tail = -0.1 and lambda_head = 0.1, both at k = 100.
"""

from betarank.configs import sweeps

K = {'smoke': (5, 20, 80)}  # of a vocabulary of 1024
K_OF_PAPER = (25, 100, 400)


def get_config(arg=None):
  return sweeps.config(sweeps.parse(arg, seeds=1))


def sweep(add, arg):
  a = sweeps.parse(arg, seeds=1)
  for top_k in K.get(a.size, K_OF_PAPER):
    for name, value in (('lambda_tail', -0.1), ('lambda_tail', -0.3), ('lambda_head', 0.1), ('lambda_head', -0.1)):
      sweeps.chain(add, a, {name: value, 'top_k': top_k})
