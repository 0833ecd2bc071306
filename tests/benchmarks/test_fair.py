"""Tests that the benchmarks compare like with like, and measure what they say."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention, gpu, objective, train
from betarank import model


def test_all_products_of_the_head_have_bfloat16_operands():
  arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((256, 64), (64, 512))]
  for name in ('optax, all logits', 'ours: beta'):
    f = jax.value_and_grad(objective.contenders(64, tpu=False)[name], (0, 1), has_aux=True)
    text = jax.jit(f).lower(*arguments, jax.ShapeDtypeStruct((256,), jnp.int32)).as_text()
    # One with batching dimensions is a sum per row, not a matrix product.
    operands = re.findall(r'dot_general %\w+, %\w+, contracting_dims.* : \((.*)\) ->', text)
    assert len(operands) >= 3 and not [types for types in operands if 'xf32' in types], name


def test_error_is_relative_to_attention_within_documents():
  rng = np.random.default_rng(0)
  q, k, v, dout = (jnp.asarray(rng.normal(size=(2, 32, n, 8)), jnp.bfloat16) for n in (4, 2, 2, 4))
  segments = jnp.asarray(np.repeat([[1, 2]] * 2, 16, axis=1))
  across = jax.jit(functools.partial(
    attention.with_gradients, functools.partial(jax.nn.dot_product_attention, is_causal=True)))
  alone = [across(*(x[:, part].astype(jnp.float32) for x in (q, k, v, dout)))
           for part in (slice(16), slice(16, 32))]
  reference = jax.jit(attention.exact)(segments, q, k, v, dout)
  assert max(attention.errors([jnp.concatenate(both, 1) for both in zip(*alone)], reference)) < 1e-5
  assert min(attention.errors(across(q, k, v, dout), reference)) > 0.1


def test_mfu_counts_no_attention_across_documents():
  c = train.SMALL
  one, eight = (train.flops_per_step(c, 2, 512, documents) for documents in (1, 8))
  assert one == model.flops_per_token(c, 512) * 1024
  no_attention = model.flops_per_token(c, 0) * 1024
  assert eight - no_attention == pytest.approx((one - no_attention) / 8)


def test_a_silent_part_ends_at_its_time_limit_with_its_children():
  state, seconds, lines = gpu.run('train', ['sh', '-c', 'echo started; sleep 300 & wait'], 1.0)
  assert (state, lines) == ('too long', ['started']) and seconds < 200


def test_the_exit_status_tells_of_a_part_that_failed(monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['gpu', '--only=train'])
  monkeypatch.setattr(gpu, 'PARTS', {'train': ['sh', '-c', 'exit 3']})
  with pytest.raises(SystemExit, match='1'):
    gpu.main()
