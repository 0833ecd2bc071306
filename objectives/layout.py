"""How the chunked head lies on a mesh: which axes split the tokens, the head's width, and its vocabulary.

Every device works on its own tokens against its own part of the vocabulary. The weights are gathered and
their gradient is reduced once, outside the loop over chunks, as plain cross-entropy needs too; what crosses
the vocabulary axis within the loop is a few numbers a token, and k candidates if there is a top k.
"""

import dataclasses
import math

import jax
from jax import lax
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Layout:
  """Which mesh axes split what. The mesh is the one in force (`jax.set_mesh`).

  Attributes:
    tokens: for each leading axis of hidden the mesh axis (or tuple of axes) that splits it, or None.
    width: axis or axes that split the head's D.
    vocab: axis or axes that split the head's V.

  Example: Layout(tokens=(('data', 'fsdp'), 'context'), width='fsdp', vocab='tensor')
  """

  tokens: tuple = ()
  width: str | tuple | None = None
  vocab: str | tuple | None = None

  def spec(self, kind):
    """The PartitionSpec of hidden states, of the head, of an array with one entry a token, or of a scalar."""
    return {
      'hidden': P(*self.tokens),
      'tokens': P(*self.tokens),
      'head': P(self.width, self.vocab),
      None: P(),
    }[kind]


def check(layout, hidden, head):
  """Refuses what the mesh in force can't split, by name."""
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  if len(layout.tokens) > hidden.ndim - 1:
    raise ValueError(f'layout.tokens has {len(layout.tokens)} entries, too many for hidden {hidden.shape}')
  if set(_axes(layout.vocab)) & set(_axes(layout.width) + _axes(layout.tokens)):
    raise ValueError(f'layout.vocab shares a mesh axis with layout.width or layout.tokens: {layout}')
  split = [(f'layout.tokens[{i}]', hidden.shape[i], axes) for i, axes in enumerate(layout.tokens)]
  split += [('layout.width', head.shape[0], layout.width), ('layout.vocab', head.shape[1], layout.vocab)]
  for name, length, axes in split:
    unknown = [a for a in _axes(axes) if a not in sizes]
    if unknown:
      raise ValueError(f'{name}: the mesh in force has no axis {unknown[0]!r}, only {list(sizes)}')
    parts = math.prod(sizes[a] for a in _axes(axes))
    if length % parts:
      raise ValueError(f'{name}: length {length} does not divide over {parts} devices ({axes})')


def on_mesh(layout, function, kinds_in, kinds_out):
  """`function` run by each device on its own part of the arrays; `function` itself without a layout."""
  if layout is None:
    return function
  specs = lambda kinds: jax.tree.map(layout.spec, kinds, is_leaf=lambda x: x is None or isinstance(x, str))
  # Sums over axes are written out below, so there is nothing for the replication check to add.
  return jax.shard_map(function, in_specs=specs(kinds_in), out_specs=specs(kinds_out), check_vma=False)


def vocab_offset(layout, local_size):
  """First token id of this device's part of the vocabulary."""
  return lax.axis_index(_axes(layout.vocab)) * local_size if layout and layout.vocab else 0


def splits_vocab(layout):
  """Whether this device has a part of the vocabulary only; to be asked within `on_mesh`."""
  return layout is not None and math.prod(lax.axis_size(axis) for axis in _axes(layout.vocab)) > 1


def sum_over_vocab(layout, array):
  return lax.psum(array, _axes(layout.vocab)) if layout and layout.vocab else array


def max_over_vocab(layout, array):
  return lax.pmax(array, _axes(layout.vocab)) if layout and layout.vocab else array


def concatenate_over_vocab(layout, array):
  """Joins the last axis of every part of the vocabulary, lower ids first."""
  if layout is None or layout.vocab is None:
    return array
  return lax.all_gather(array, _axes(layout.vocab), axis=array.ndim - 1, tiled=True)


def gather_width(layout, head):
  """[D / width, V / vocab] -> [D, V / vocab]."""
  return lax.all_gather(head, _axes(layout.width), axis=0, tiled=True) if layout and layout.width else head


def scatter_width(layout, dhead):
  """This device's part [D / width, V / vocab] of the sum over all tokens of dhead [D, V / vocab]."""
  if layout is None:
    return dhead
  tokens, width = _axes(layout.tokens), _axes(layout.width)
  if width and set(width) <= set(tokens):
    dhead = lax.psum_scatter(dhead, width, scatter_dimension=0, tiled=True)
    rest = tuple(a for a in tokens if a not in width)
    return lax.psum(dhead, rest) if rest else dhead
  dhead = lax.psum(dhead, tokens) if tokens else dhead
  if not width:
    return dhead
  rows = dhead.shape[0] // lax.axis_size(width)
  return lax.dynamic_slice_in_dim(dhead, lax.axis_index(width) * rows, rows)


def _axes(entry):
  """A flat tuple of the axis names in a PartitionSpec entry or a tuple of them."""
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(a for part in entry for a in _axes(part))
