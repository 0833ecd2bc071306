"""How the chunked head lies on a mesh: which axes split the tokens, the head's width, and its vocabulary.

Every device works on its own tokens against its own part of the vocabulary. The weights are gathered and
their gradient is reduced once, outside the loop over chunks, as plain cross-entropy needs too; what crosses
the vocabulary axis within the loop is a few numbers a token, and k candidates if there is a top k.

Neighbours may share the vocabulary (`share`): each then has a part of it and works on the tokens of all of them,
whose hidden states are gathered chunk by chunk and whose gradients are summed back. For m neighbours with T tokens
each that sends 2 m T D + 2 V D / m numbers in place of 2 V D, and the head and its float32 gradient take an m-th of
the memory. They are neighbours along the axis that splits the head's width, which never leaves a TPU slice.
"""

import dataclasses
import functools
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
    neighbours: how many devices share the vocabulary; see `share`.

  Example: Layout(tokens=(('data', 'fsdp'), 'context'), width='fsdp', vocab='tensor')
  """

  tokens: tuple = ()
  width: str | tuple | None = None
  vocab: str | tuple | None = None
  neighbours: int = 1

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


def share(layout, tokens, vocab):
  """`layout` with as many neighbours as send the least for this many tokens and a vocabulary of this size; one, who
  shares nothing, where the width's axis doesn't split the tokens too."""
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  ways = lambda axes: math.prod(sizes[a] for a in _axes(axes))
  if len(_axes(layout.width)) != 1 or not set(_axes(layout.width)) <= set(_axes(layout.tokens)):
    return layout
  own_tokens, own_vocab = tokens // ways(layout.tokens), vocab // ways(layout.vocab)
  most = math.gcd(ways(layout.width), own_vocab)
  sent = {m: m * own_tokens + own_vocab / m for m in range(1, most + 1) if most % m == 0}
  return dataclasses.replace(layout, neighbours=min(sent, key=sent.get))


def vocab_offset(layout, local_size):
  """First token id of this device's part of the vocabulary."""
  part = lax.axis_index(_axes(layout.vocab)) if layout and layout.vocab else 0
  return (part * layout.neighbours + _place(layout) if _shares(layout) else part) * local_size


def splits_vocab(layout):
  """Whether this device has a part of the vocabulary only; to be asked within `on_mesh`."""
  split = layout is not None and math.prod(lax.axis_size(axis) for axis in _axes(layout.vocab)) > 1
  return split or _shares(layout)


def sum_over_vocab(layout, array):
  return _over_vocab(lax.psum, layout, array)


def max_over_vocab(layout, array):
  return _over_vocab(lax.pmax, layout, array)


def concatenate_over_vocab(layout, array):
  """Joins the last axis of every part of the vocabulary, lower ids first."""
  return _over_vocab(functools.partial(lax.all_gather, axis=array.ndim - 1, tiled=True), layout, array)


def gather_head(layout, head):
  """[D / width, V / vocab] -> [D, V / vocab / neighbours]."""
  if layout is None or not layout.width:
    return head
  if not _shares(layout):
    return lax.all_gather(head, _axes(layout.width), axis=0, tiled=True)
  # Neighbours trade columns for rows; each then lacks the rows of those with the same columns elsewhere.
  axis, groups = _groups(layout)
  head = lax.all_to_all(head, axis, 1, 0, axis_index_groups=groups, tiled=True)
  return lax.all_gather(head, axis, axis=0, axis_index_groups=_across(groups), tiled=True)


def reduce_head(layout, dhead):
  """From each device's gradient of what `gather_head` gave it: the sum over all tokens, [D / width, V / vocab]."""
  tokens, width = _axes(layout.tokens), _axes(layout.width)
  if _shares(layout):
    axis, groups = _groups(layout)
    dhead = lax.psum_scatter(dhead, axis, scatter_dimension=0, axis_index_groups=_across(groups), tiled=True)
    dhead = lax.all_to_all(dhead, axis, 0, 1, axis_index_groups=groups, tiled=True)
  elif width and set(width) <= set(tokens):
    dhead = lax.psum_scatter(dhead, width, scatter_dimension=0, tiled=True)
  else:
    dhead = lax.psum(dhead, tokens) if tokens else dhead
    if not width:
      return dhead
    rows = dhead.shape[0] // lax.axis_size(width)
    return lax.dynamic_slice_in_dim(dhead, lax.axis_index(width) * rows, rows)
  rest = tuple(a for a in tokens if a not in width)
  return lax.psum(dhead, rest) if rest else dhead


def gather_tokens(layout, array):
  """[C, ...] -> [neighbours C, ...], the tokens of all that share a vocabulary."""
  if not _shares(layout):
    return array
  axis, groups = _groups(layout)
  return lax.all_gather(array, axis, axis=0, axis_index_groups=groups, tiled=True)


def own_tokens(layout, array):
  """Of [neighbours C, ...], which all neighbours have, the C that are this device's."""
  if not _shares(layout):
    return array
  size = array.shape[0] // layout.neighbours
  return lax.dynamic_slice_in_dim(array, _place(layout) * size, size)


def sum_own_tokens(layout, array):
  """`own_tokens` of the sum over neighbours."""
  if not _shares(layout):
    return array
  axis, groups = _groups(layout)
  return lax.psum_scatter(array, axis, scatter_dimension=0, axis_index_groups=groups, tiled=True)


def sum_hidden(layout, dhidden):
  """Sum of what the vocabulary's axes have of dhidden; neighbours' parts `sum_own_tokens` has added."""
  return lax.psum(dhidden, _axes(layout.vocab)) if layout and layout.vocab else dhidden


def _shares(layout):
  return layout is not None and layout.neighbours > 1


def _place(layout):
  """This device's number among its neighbours."""
  return lax.axis_index(_axes(layout.width)) % layout.neighbours


def _groups(layout):
  """The axis along which neighbours lie, and the positions of each group on it."""
  (axis,) = _axes(layout.width)
  size = lax.axis_size(axis)
  return axis, [list(range(first, first + layout.neighbours)) for first in range(0, size, layout.neighbours)]


def _across(groups):
  """The first of each group, the second of each, and so on: those that have the same part of the vocabulary."""
  return [list(group) for group in zip(*groups)]


def _over_vocab(collective, layout, array):
  """Neighbours have consecutive parts of what the vocabulary's axes split, so they come first."""
  if _shares(layout):
    axis, groups = _groups(layout)
    array = collective(array, axis, axis_index_groups=groups)
  return collective(array, _axes(layout.vocab)) if layout and layout.vocab else array


def _axes(entry):
  """A flat tuple of the axis names in a PartitionSpec entry or a tuple of them."""
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(a for part in entry for a in _axes(part))
