"""Tests that every scope in the table of a step's parts is found in compiled programs, forward and backward."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from betarank import model
from betarank.data import Batch
from betarank.launch.plan import predict
from betarank.objectives import ObjectiveConfig
from betarank.runtime.state import abstract_state
from betarank.train.step import make_step

DENSE = model.ModelConfig(
  vocab_size=64, layers=2, d_model=16, d_ff=16, heads=2, kv_heads=1, head_dim=8, rope_base=1e4, norm_eps=1e-6,
  tied_embeddings=False, compute_dtype='bfloat16', remat_policy='attention', scan_layers=True)
MOE = model.ModelConfig(**vars(DENSE) | {'moe': model.MoeConfig(
  experts=4, experts_per_token=2, expert_d_ff=16, shared_d_ff=16)})
OF_EXPERTS = {scope for scope in predict.PARTS if scope.startswith('moe/')}
OF_ALL_MODELS = predict.PARTS.keys() - OF_EXPERTS
# The head forms its gradients in the forward pass, and a mask has no gradient.
IN_BACKWARD = {scope for scope in predict.PARTS if not scope.startswith('head')} - {'attention/mask', 'optimizer'}


@pytest.mark.parametrize('scope, path', [
  ('attention/core', 'jit(step)/jvp(layers)/while/body/closed_call/attention/core/shard_map/pallas_call'),
  ('attention/qkv', 'jit(step)/transpose(jvp(layers))/while/body/closed_call/checkpoint/attention/qkv/dot_general'),
  ('embed', 'jit(step)/transpose(jvp(embed))/scatter-add'),
  ('head/loss', 'jit(step)/jvp(head)/while/body/head/loss/reduce_sum'),
  ('head', 'jit(step)/jvp(head)/while'),
  ('moe/dispatch', 'jit(step)/jvp(layers)/while/body/moe/combine/overflow/while/body/moe/dispatch/gather'),
  ('layers', 'jit(step)/jvp(layers)/while/body/add'),
  ('optimizer', 'jit(step)/optimizer/mul'),
  (None, 'jit(step)/jvp(jit(layers))/mul'),  # a function's name is no scope
  (None, 'jit(step)/reduce_sum /here/model/embed/layers/head.py:head'),  # neither is a path
  (None, '')])
def test_the_innermost_scope_of_an_instruction(scope, path):
  assert predict.scope(f'{path} /here/model/transformer.py:Block.__call__') == scope
  assert predict.scope(path) == scope


def scopes(c, mesh):
  """Returns (all scopes, the scopes of the backward pass) that are found in a compiled training step."""
  with jax.set_mesh(mesh):
    tx = optax.sgd(0.1)
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=jax.NamedSharding(mesh, model.spec('batch', 'length')))
    step = make_step(c, ObjectiveConfig(lambda_tail=-0.1, top_k=8), tx, np.ones(c.vocab_size, np.int32))
    lowered = step.lower(abstract_state(c, tx, mesh), Batch(tokens, tokens, tokens, tokens))
  text = lowered.compile(compiler_options={'xla_backend_optimization_level': 0}).as_text()  # in half the time
  names = set(re.findall(r'op_name="([^"]*)"', text))
  found = lambda names: {predict.scope(name) for name in names} - {None}
  return found(names), found(name for name in names if 'transpose(jvp(' in name)


@pytest.mark.parametrize('c, shape, wanted', [
  (DENSE, (1, 2, 1, 1, 1), OF_ALL_MODELS), (MOE, (1, 2, 2, 1, 1), OF_ALL_MODELS | OF_EXPERTS)], ids=['dense', 'moe'])
def test_every_scope_is_in_the_compiled_program(c, shape, wanted):
  """If a scope were renamed, its time would otherwise be counted in another part, without an error."""
  everywhere, backward = scopes(c, model.make_mesh(model.MeshConfig(*shape), jax.devices()[: math.prod(shape)]))
  assert everywhere == wanted
  assert backward >= wanted & IN_BACKWARD
