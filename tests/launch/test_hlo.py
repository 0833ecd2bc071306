"""What launch/hlo.py reads from programs whose figures are known by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from launch import bundles, hlo


def compiled(function, *arguments, **options):
  return hlo.read(jax.jit(function, **options).lower(*arguments).compile().as_text())


def flops(program):
  return sum(run.times * program.flops(run) for run in program.runs())


def test_products_in_nested_scans_are_counted_as_often_as_they_run():
  def outer(x, w):
    inner = lambda x, _: (jnp.tanh(x @ w), None)
    return jax.lax.scan(lambda x, _: jax.lax.scan(inner, x, length=5), x, length=3)[0]

  f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  program = compiled(outer, f32(64, 128), f32(128, 128))
  assert flops(program) == 3 * 5 * 2 * 64 * 128 * 128


@pytest.mark.parametrize('window, expected', [
  # lhs [1, 8, 4], kernel [3, 4, 16]: at the ends one of three positions lies in the padding.
  ('window={size=3 pad=1_1}', 2 * 4 * 16 * (8 * 3 - 2)),
  ('window={size=3 pad=0_0}', 2 * 4 * 16 * 6 * 3),
])
def test_only_real_pairs_of_a_convolution_are_counted(window, expected):
  """TPUs write batched products as convolutions whose window lies mostly in the padding."""
  length = 8 if '1_1' in window else 6
  program = hlo.read(f'''ENTRY %main (a: f32[1,8,4], b: f32[3,4,16]) -> f32[1,{length},16] {{
  %a = f32[1,8,4]{{2,1,0}} parameter(0)
  %b = f32[3,4,16]{{2,1,0}} parameter(1)
  ROOT %c = f32[1,{length},16]{{2,1,0}} convolution(%a, %b), {window}, dim_labels=b0f_0io->b0f
}}
''')
  assert flops(program) == expected


def test_collectives_have_their_bytes_group_and_count():
  mesh = jax.make_mesh((2, 4), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)

  def layer(x, _):
    return jax.lax.psum(x, 'y'), None

  def step(x):
    x, _ = jax.lax.scan(layer, x, length=6)
    return jax.lax.all_gather(x, 'x', tiled=True), jax.lax.psum_scatter(x, 'y', tiled=True)

  body = jax.shard_map(step, mesh=mesh, in_specs=P('x'), out_specs=(P(), P(('x', 'y'))), check_vma=False)
  x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P('x')))
  found = {c.kind: c for c in compiled(body, x).collectives()}
  local = 32 * 32 * 4
  reduced = found['all-reduce']
  assert (reduced.bytes, reduced.group, reduced.times) == (local, 4, 6)
  assert (found['all-gather'].bytes, found['all-gather'].group) == (2 * local, 2)
  if 'reduce-scatter' in found:  # CPUs may write it as an all-reduce and a slice
    assert (found['reduce-scatter'].bytes, found['reduce-scatter'].group) == (local, 4)


def test_a_slice_of_a_stack_counts_itself():
  """A layer's weights, cut out of the stack in the loop, are read once each, not the whole stack each time."""
  text = '''%fused (p0: f32[10,8,8], p1: s32[]) -> f32[1,8,8] {
  %p0 = f32[10,8,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %b = f32[10,8,8]{2,1,0} bitcast(%p0)
  ROOT %s = f32[1,8,8]{2,1,0} dynamic-slice(%b, %p1, %p1, %p1), dynamic_slice_sizes={1,8,8}
}

ENTRY %main (a: f32[10,8,8], i: s32[]) -> f32[1,8,8] {
  %a = f32[10,8,8]{2,1,0} parameter(0)
  %i = s32[]{:S(2)} parameter(1)
  ROOT %f = f32[1,8,8]{2,1,0:S(1)} fusion(%a, %i), kind=kLoop, calls=%fused
}
'''
  program = hlo.read(text)
  run = program.runs()[-1]
  assert program.hbm_bytes(run) == 8 * 8 * 4  # read once; the result stays on the chip


def test_bundles_multiply_loops_and_halve_what_can_be_skipped():
  outer = ['   0x1 LB: > { %a = nop }']
  body = ['   0x2   : > { %9 = sbr.rel (%p1) target = $region7 }', *['   0x3   : > { %b = nop }'] * 4,
          '   0x7 PF: > { %c = nop } /* Start/End empty region 7 */']
  rest = ['   0x8   : > { %d = nop }'] * 3
  end = ['   0x9   : > { %p5 = scmp.ge.s32.totalorder %s1, 10 /* loop exit test */ }',
         '   0xa   : > { %3 = sbr.rel (!%p5) target = $region99 }']
  text = '\n'.join(['   0   :  { %z = nop }', *outer, *body, *rest, *end])
  assert bundles.count(text) == 1 + 10 * (1 + 1 + 0.5 * 4 + 1 + 3 + 2)
  assert bundles.count(text, causal_share=0.75) == 1 + 10 * (1 + 1 + 0.75 * 4 + 1 + 3 + 2)
