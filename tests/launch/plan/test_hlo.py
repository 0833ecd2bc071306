"""Tests launch/plan/hlo.py and bundles.py on programs whose figures are known by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from betarank.launch.plan import bundles, hlo


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


def test_a_loop_whose_end_the_data_decide_counts_once_and_one_for_what_does_not_fit_not_at_all():
  def some(x, n):
    x = jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)
    with jax.named_scope('overflow'):
      return jax.lax.fori_loop(1, n, lambda i, x: x @ x @ x, x)

  assert flops(compiled(some, jnp.zeros((8, 8)), jnp.int32(2))) == 2 * 8**3


@pytest.mark.parametrize('window, expected', [
  # lhs [1, 8, 4], kernel [3, 4, 16]: at the ends one of three positions lies in the padding.
  ('window={size=3 pad=1_1}', 2 * 4 * 16 * (8 * 3 - 2)),
  ('window={size=3 pad=0_0}', 2 * 4 * 16 * 6 * 3),
])
def test_only_real_pairs_of_a_convolution_are_counted(window, expected):
  """TPUs compute batched products as convolutions whose window lies mostly in the padding. Padding has no FLOPs."""
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
  """In the loop over layers, each layer's weights are sliced from a stack. Only the slice is read, not the whole stack.
  """
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


def test_what_decoding_moves_through_memory():
  """A kernel that writes in place, a product whose weights are only viewed, and a copy to the chip meanwhile."""
  program = hlo.read('''%viewed (v: bf16[8,64]) -> bf16[64,8] {
  %v = bf16[8,64]{1,0} parameter(0)
  ROOT %b = bf16[64,8]{1,0} bitcast(%v)
}

%product (p0: bf16[4,64], p1: bf16[8,64]) -> bf16[4,8] {
  %p0 = bf16[4,64]{1,0:S(1)} parameter(0)
  %p1 = bf16[8,64]{1,0} parameter(1)
  %f = bf16[64,8]{1,0} fusion(%p1), kind=kLoop, calls=%viewed
  ROOT %d = bf16[4,8]{1,0:S(1)} dot(%p0, %f), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (q: bf16[4,64], pages: bf16[100,64], w: bf16[8,64]) -> bf16[4,8] {
  %q = bf16[4,64]{1,0:S(1)} parameter(0)
  %pages = bf16[100,64]{1,0} parameter(1)
  %w = bf16[8,64]{1,0} parameter(2)
  %k = (bf16[4,64]{1,0:S(1)}, bf16[100,64]{1,0}) custom-call(%q, %pages), output_to_operand_aliasing={{1}: (1, {})}
  %s = (bf16[8,64]{1,0}, bf16[8,64]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%w)
  %c = bf16[8,64]{1,0:S(1)} copy-done(%s)
  ROOT %p = bf16[4,8]{1,0:S(1)} fusion(%q, %w), kind=kOutput, calls=%product
}
''')
  by_name = {run.instruction.name: run for run in program.runs()}
  assert program.hbm_bytes(by_name['k']) == 100 * 64 * 2
  assert program.hbm_bytes(by_name['p']) == program.prefetched_bytes(by_name['c']) == 8 * 64 * 2


def test_bundles_multiply_loops_and_halve_what_can_be_skipped():
  outer = ['   0x1 LB: > { %a = nop }']
  body = ['   0x2   : > { %9 = sbr.rel (%p1) target = $region7 }', *['   0x3   : > { %b = nop }'] * 4,
          '   0x7 PF: > { %c = nop } /* Start/End empty region 7 */']
  rest = ['   0x8   : > { %d = nop }'] * 3
  end = ['   0x9   : > { %p5 = scmp.ge.s32.totalorder %s1, 10 /* loop exit test */ }',
         '   0xa   : > { %3 = sbr.rel (!%p5) target = $region99 }']
  text = '\n'.join(['   0   :  { %z = nop }', *outer, *body, *rest, *end])
  assert bundles.count(text) == 1 + 10 * (1 + 1 + 0.5 * 4 + 1 + 3 + 2)
  assert bundles.count(text, share=0.75) == 1 + 10 * (1 + 1 + 0.75 * 4 + 1 + 3 + 2)


def test_a_loop_whose_end_the_data_decide_counts_as_often_as_is_said():
  loop = ['   0x1 LB: > { %a = nop }', '   0x9   : > { %p5 = scmp.lt.s32.totalorder %s1, %s2 /* loop exit test */ }',
          '   0xa   : > { %3 = sbr.rel (!%p5) target = $region99 }']
  text = '\n'.join(['   0   :  { %z = nop }', *loop * 3])
  assert bundles.count(text) == 1 + 3 * 3
  assert bundles.count(text, data_trips=(32, 0)) == 1 + 32 * 3 + 0 + 0


TPU = '''HloModule jit_step, is_scheduled=true

FileNames
1 "/here/train/step.py"
2 "/here/model/moe.py"

FunctionNames
1 "step"
2 "_collect"

FileLocations
1 {file_name_id=1 function_name_id=1 line=10 end_line=10 column=2 end_column=9}
2 {file_name_id=2 function_name_id=2 line=20 end_line=20 column=2 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add = f32[] add(%x, %y)
}

%scattered (p: bf16[64,256]) -> bf16[16,256] {
  %p = bf16[64,256]{1,0} parameter(0)
  %r = bf16[64,256]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%sum
  %n = s32[] constant(0)
  ROOT %s = bf16[16,256]{1,0} dynamic-slice(%r, %n, %n), dynamic_slice_sizes={16,256}
}

%start (p0: bf16[16,256]) -> bf16[64,256] {
  %p0 = bf16[16,256]{1,0} parameter(0)
  %g0 = bf16[64,256]{1,0} all-gather(%p0), channel_id=1, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="7"}
  ROOT %c0 = bf16[64,256]{1,0} custom-call(%g0), custom_call_target="AsyncCollectiveStart"
}

%along (p1: bf16[16,256], p2: bf16[64,256], p3: bf16[32,32], p4: bf16[32,32]) -> (bf16[32,32], bf16[64,256]) {
  %p1 = bf16[16,256]{1,0} parameter(0)
  %p2 = bf16[64,256]{1,0} parameter(1)
  %p3 = bf16[32,32]{1,0} parameter(2)
  %p4 = bf16[32,32]{1,0} parameter(3)
  %d1 = bf16[32,32]{1,0} dot(%p3, %p4), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %g1 = bf16[64,256]{1,0} all-gather(%p1), channel_id=1, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="7"}
  ROOT %t1 = (bf16[32,32]{1,0}, bf16[64,256]{1,0}) tuple(%d1, %g1)
}

%end (p5: bf16[16,256], p6: bf16[64,256]) -> bf16[64,256] {
  %p5 = bf16[16,256]{1,0} parameter(0)
  %p6 = bf16[64,256]{1,0} parameter(1)
  %g2 = bf16[64,256]{1,0} all-gather(%p5), channel_id=1, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="7"}
  ROOT %c2 = bf16[64,256]{1,0} custom-call(%g2, %p6), custom_call_target="AsyncCollectiveDone"
}

%rows (p7: bf16[64,256], p8: s32[5]) -> bf16[5,256] {
  %p7 = bf16[64,256]{1,0} parameter(0)
  %p8 = s32[5]{0} parameter(1)
  ROOT %g3 = bf16[5,256]{1,0} gather(%p7, %p8), offset_dims={1}, collapsed_slice_dims={0}, slice_sizes={1,256}
}

ENTRY %main (a: bf16[16,256], w: bf16[32,32], i: s32[5]) -> bf16[16,256] {
  %a = bf16[16,256]{1,0} parameter(0)
  %w = bf16[32,32]{1,0} parameter(1)
  %i = s32[5]{0} parameter(2)
  %f0 = bf16[64,256]{1,0} fusion(%a), kind=kCustom, calls=%start
  %f1 = (bf16[32,32]{1,0}, bf16[64,256]{1,0}) fusion(%a, %f0, %w, %w), kind=kOutput, calls=%along
  %e1 = bf16[64,256]{1,0} get-tuple-element(%f1), index=1
  %f2 = bf16[64,256]{1,0} fusion(%a, %e1), kind=kCustom, calls=%end, metadata={op_name="s/all_gather" stack_frame_id=2}
  %f3 = bf16[5,256]{1,0} fusion(%f2, %i), kind=kCustom, calls=%rows, metadata={op_name="s/gather" stack_frame_id=1}
  %c1 = ((), s32[9]{0}) custom-call-start(), async_execution_thread="sparsecore", custom_call_target="some"
  %c2 = ((bf16[64,256]{1,0}, s32[5]{0}), bf16[5,256]{1,0}) custom-call-update(%c1, %f2, %i)
  %c3 = bf16[5,256]{1,0} custom-call-done(%c2), metadata={op_name="s/gather" stack_frame_id=1}
  ROOT %f4 = bf16[16,256]{1,0} fusion(%f2), kind=kCustom, calls=%scattered
}
'''


def test_what_a_tpu_makes_of_transfers():
  """A TPU splits a gather over three fusions with the same chain_id, which are one transfer. Other instructions run
  meanwhile.

  An all-reduce of which each device keeps a slice is a reduce-scatter.
  """
  program = hlo.read(TPU)
  gather, scatter = program.collectives()
  assert (gather.kind, gather.bytes, gather.group, gather.meanwhile) == ('all-gather', 64 * 256 * 2, 4, ('f1', 'e1'))
  assert (scatter.kind, scatter.bytes, scatter.meanwhile) == ('reduce-scatter', 64 * 256 * 2, None)
  by_name = {run.instruction.name: run for run in program.runs()}
  assert [name for name, run in by_name.items() if program.is_transfer(run)] == ['f0', 'f2', 'f4']
  product = 3 * 32 * 32 * 2  # of the fusion that a part of the gather runs along with, its own operands and result
  assert program.hbm_bytes(by_name['f1']) == product


def test_gathered_rows_and_where_they_were_written():
  program = hlo.read(TPU)
  by_name = {run.instruction.name: run for run in program.runs()}
  assert program.rows_moved(by_name['f3']) == {'gather': 5}
  assert program.hbm_bytes(by_name['f3']) == 2 * 5 * 256 * 2 + 5 * 4  # not all that they were taken from
  assert program.hbm_bytes(by_name['c3']) == 2 * 5 * 256 * 2  # by a SparseCore
  assert program.source(by_name['f3']).split() == ['s/gather', '/here/train/step.py:step']
  # Without a note of its own an instruction is known by its operands'.
  assert program.source(by_name['f4']).split() == [
    's/all_gather', '/here/model/moe.py:_collect', '/here/train/step.py:step']
