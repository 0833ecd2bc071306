"""Tests that eight devices, in several meshes, give the results of one device, and that no collective sends logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from betarank.objectives import Layout, RewardShaping, shaped_linear_loss, shaped_linear_total
from betarank.objectives.collectives import with_vocab_groups

AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')
MESHES = [(8, 1, 1, 1, 1), (1, 8, 1, 1, 1), (1, 1, 1, 1, 8), (2, 2, 1, 1, 2), (1, 2, 1, 2, 2)]
LAYOUT = Layout(tokens=(('data', 'fsdp'), 'context'), width='fsdp', vocab='tensor')
SHAPING = RewardShaping(beta=-0.25, lambda_head=0.1, lambda_tail=-0.1, top_k=9, z_loss=0.01)
PLAIN = RewardShaping(beta=-0.25, z_loss=0.01)  # needs no top k, so devices may share the vocabulary
RNG = np.random.default_rng(0)
# Multiples of 1/4 give products without rounding and many exact ties, also between parts of the vocabulary.
H = jnp.asarray(RNG.integers(-4, 5, (8, 6, 16)) / 4, jnp.float32)
HEAD = jnp.asarray(RNG.integers(-4, 5, (16, 96)) / 4, jnp.float32)
X = jnp.asarray(RNG.integers(0, 96, (8, 6)))
WEIGHTS = jnp.asarray(RNG.integers(0, 3, (8, 6)), jnp.float32)


def total(h, w, layout, shaping=SHAPING, stats='full'):
  t, loss, stats = shaped_linear_total(
    h, w, X, shaping, weights=WEIGHTS, chunk_tokens=5, stats=stats, layout=layout)
  return t, (loss, stats)


def per_token(h, w, layout, shaping=SHAPING, stats='full'):
  loss, stats = shaped_linear_loss(
    h, w, X, shaping, weights=WEIGHTS, chunk_tokens=5, stats=stats, layout=layout)
  return loss.sum(), (loss, stats)


def run(function, layout, **options):
  f = jax.jit(jax.value_and_grad(lambda h, w: function(h, w, layout, **options), (0, 1), has_aux=True))
  if layout is None:
    return f(H, HEAD), None
  place = lambda a, kind: jax.device_put(a, NamedSharding(jax.sharding.get_mesh(), layout.spec(kind)))
  arguments = place(H, 'hidden'), place(HEAD, 'head')
  compiled = f.lower(*arguments).compile()
  return compiled(*arguments), compiled.as_text()


def compare(got, wanted):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('function', [total, per_token])
@pytest.mark.parametrize('shape', MESHES, ids=str)
def test_five_meshes(shape, function):
  wanted, _ = run(function, None)
  with jax.set_mesh(jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 5)):
    got, hlo = run(function, LAYOUT)
  compare(got, wanted)
  np.testing.assert_array_equal(got[0][1][1].target_rank, wanted[0][1][1].target_rank)
  tokens, vocab = H.shape[0] * H.shape[1], HEAD.shape[1]
  collectives = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute'
  for op in re.findall(rf'= (.*?) (?:{collectives})[-\w]*\(', hlo):
    for dims in re.findall(r'\w+\[([\d,]+)\]', op):
      dims = [int(d) for d in dims.split(',')]
      # Weights and their gradient have D rows and a part of V, hidden states have tokens and D, the rest k per token.
      is_weight = len(dims) == 2 and dims[-1] == vocab // shape[4] and HEAD.shape[0] % dims[0] == 0
      assert is_weight or vocab // shape[4] not in dims, (op, dims)
      assert np.prod(dims) <= max(HEAD.size, H.size, tokens * SHAPING.top_k * shape[4]), (op, dims)


@pytest.mark.parametrize('function', [total, per_token])
@pytest.mark.parametrize(
  'shape, group', [((1, 8, 1, 1, 1), 4), ((2, 4, 1, 1, 1), 4), ((1, 2, 1, 2, 2), 2), ((2, 2, 1, 1, 2), 2)],
  ids=str)
def test_vocabulary_groups_change_only_what_is_sent(shape, group, function):
  """Without a top k, each device of a group holds a part of the head. The results are those of one device."""
  options = {'shaping': PLAIN, 'stats': 'basic'}
  wanted, _ = run(function, None, **options)
  with jax.set_mesh(jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 5)):
    assert with_vocab_groups(LAYOUT, X.size, HEAD.shape[1]).vocab_group_size == group
    got, hlo = run(function, LAYOUT, **options)
  compare(got, wanted)
  np.testing.assert_array_equal(got[0][1][1].target_rank, wanted[0][1][1].target_rank)
  rows, whole = HEAD.shape[0], HEAD.shape[1] // shape[4]
  reduced = re.findall(r'= (.*?) (?:all-reduce|reduce-scatter|all-gather)[-\w]*\(', hlo)
  sent = [tuple(map(int, dims.split(','))) for op in reduced for dims in re.findall(r'\w+\[(\d+,\d+)\]', op)]
  assert any(dims[1] == whole // group for dims in sent)
  assert not [dims for dims in sent if dims[1] == whole and dims[0] > rows // shape[1]]  # only the part it keeps


def test_the_group_size_minimizes_what_is_sent():
  """The size is near sqrt(V / T) for T tokens per device, and divides the mesh axis and the vocabulary."""
  with jax.set_mesh(jax.make_mesh((1, 8, 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 5)):
    assert [with_vocab_groups(LAYOUT, 8 * t, 1600).vocab_group_size for t in (1600, 400, 100, 25, 1)] == [1, 2, 4, 8, 8]
    assert [with_vocab_groups(LAYOUT, 8, vocab).vocab_group_size for vocab in (1602, 1601)] == [2, 1]
  with jax.set_mesh(jax.make_mesh((8, 1, 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 5)):
    assert with_vocab_groups(LAYOUT, 8, 1600) == LAYOUT  # the data axis may span slices


def test_gradients_are_rounded_once_before_they_are_sent():
  """In bfloat16, each device rounds its part of a gradient once. Sharded gradients differ only by this from those of
  one device.
  """
  h, w, options = H.astype(jnp.bfloat16), HEAD, {'shaping': PLAIN, 'stats': 'basic'}
  gradients = lambda layout: jax.jit(jax.grad(lambda h, w: total(h, w, layout, **options)[0], (0, 1)))(h, w)
  wanted = gradients(None)
  with jax.set_mesh(jax.make_mesh((2, 4, 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 5)):
    got = gradients(LAYOUT)
  for a, b in zip(got, wanted):
    assert a.dtype == b.dtype
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert np.abs(a - b).max() < 8 * 2**-8 * np.abs(b).max()


def test_width_split_where_tokens_are_not():
  """If the head's width is sharded over an axis that doesn't split tokens, its gradient is sliced along this axis, not
  reduced.
  """
  layout = Layout(tokens=('data',), width=('fsdp', 'context'), vocab='tensor')
  wanted, _ = run(total, None)
  with jax.set_mesh(jax.make_mesh((2, 2, 1, 1, 2), AXES, axis_types=(AxisType.Auto,) * 5)):
    compare(run(total, layout)[0], wanted)


def test_the_head_is_gathered_and_reduced_outside_the_loop():
  """Collectives inside the loop over chunks send only O(tokens * k) numbers."""
  with jax.set_mesh(jax.make_mesh((1, 4, 1, 1, 2), AXES, axis_types=(AxisType.Auto,) * 5)):
    jaxpr = jax.make_jaxpr(jax.grad(lambda h, w: total(h, w, LAYOUT)[0], (0, 1)))(H, HEAD)
  largest = []

  def walk(jaxpr, in_loop):
    for eqn in jaxpr.eqns:
      if in_loop and eqn.primitive.name in ('psum', 'pmax', 'all_gather', 'reduce_scatter', 'psum_invariant'):
        largest.extend(v.aval.size for v in eqn.outvars)
      is_jaxpr = lambda p: hasattr(p, 'eqns') or hasattr(p, 'jaxpr')
      for parameter in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr):
        inner = getattr(parameter, 'jaxpr', parameter)
        if hasattr(inner, 'eqns'):
          walk(inner, in_loop or eqn.primitive.name == 'scan')

  walk(jaxpr.jaxpr, False)
  assert largest and max(largest) <= 5 * 2 * SHAPING.top_k  # chunk x devices x k


def test_a_layout_that_does_not_fit_the_mesh_is_refused_by_name():
  with jax.set_mesh(jax.make_mesh((1, 1, 1, 1, 8), AXES, axis_types=(AxisType.Auto,) * 5)):
    with pytest.raises(ValueError, match=r'layout.vocab: length 95 does not divide over 8 devices'):
      shaped_linear_loss(H, HEAD[:, :95], X, SHAPING, layout=LAYOUT)
    with pytest.raises(ValueError, match=r'layout.vocab shares a mesh axis'):
      shaped_linear_loss(H, HEAD, X, SHAPING, layout=Layout(tokens=('data',), vocab='data'))
