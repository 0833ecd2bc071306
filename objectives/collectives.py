"""Describes how the arrays of the chunked head are sharded over a mesh, and implements the head's communication.

Every device computes the logits of its own tokens for its own part of the vocabulary. The head's weights are
all-gathered once before the loop over chunks, and their gradient is reduced once after the loop. Plain cross-entropy
needs the same communication. Inside the loop, devices exchange only a few numbers per token, and k candidates per token
if a top k is needed.

Vocabulary groups (`with_vocab_groups`) reduce this communication. The devices along the mesh axis that splits the
head's width D are divided into groups of m. The devices of a group divide the vocabulary: each device gathers 1/m of
the head, and computes logits for the tokens of the whole group. The group's hidden states are all-gathered chunk by
chunk, and their gradients are reduce-scattered. With T tokens per device and vocabulary size V, a device sends 2 m T D
+ 2 V D / m numbers instead of 2 V D. The gathered head and its float32 gradient take 1/m of the memory. The mesh axis
lies within a TPU slice, so each group does too.

Most functions have an argument `layout`, a Layout. None means that all arrays are on one device.

# C tokens of a chunk  D width  V vocabulary
"""

import dataclasses
import functools
import math

import jax
from jax import lax
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Layout:
  """The axes of the current mesh (`jax.set_mesh`) that split the dimensions of the head's arrays.

  Attributes:
    tokens: for each leading dimension of the hidden states, the mesh axis or the tuple of mesh axes that splits this
      dimension; None if it isn't split.
    width: the mesh axis or axes that split the first dimension of the head, its width D; None if it isn't split.
    vocab: the mesh axis or axes that split the second dimension of the head, the vocabulary V; None if it isn't split.
    vocab_group_size: the number m of devices in a vocabulary group (see this module's docstring); 1 for no groups.
      Groups lie along the axis `width`. They change how the computation is divided, but not how the head is stored.

  Example: Layout(tokens=(('data', 'fsdp'), 'context'), width='fsdp', vocab='tensor')
  """

  tokens: tuple = ()
  width: str | tuple | None = None
  vocab: str | tuple | None = None
  vocab_group_size: int = 1

  def spec(self, kind):
    """Returns the PartitionSpec of one kind of array.

    kind: 'hidden', 'head', 'tokens' (an array with one entry per token), or None for an array that isn't split.
    """
    return {
      'hidden': P(*self.tokens),
      'tokens': P(*self.tokens),
      'head': P(self.width, self.vocab),
      None: P(),
    }[kind]


def check_layout(layout, hidden, head):
  """Raises ValueError if a layout doesn't fit the current mesh, or the shapes of hidden [..., D] and head [D, V].

  For example, the layout may name an axis that the mesh doesn't have, or the size of an axis may not divide the
  dimension that the axis splits. The message names the field of the layout.
  """
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
      raise ValueError(f'{name}: the current mesh has no axis {unknown[0]!r}, only {list(sizes)}')
    parts = math.prod(sizes[a] for a in _axes(axes))
    if length % parts:
      raise ValueError(f'{name}: length {length} does not divide over {parts} devices ({axes})')


def on_mesh(layout, function, kinds_in, kinds_out):
  """Returns `function` wrapped so that each device runs it on its own shards. If layout is None, returns `function`
  itself.

  kinds_in, kinds_out: trees with the structure of the arguments and of the results. Each leaf says what the array is:
    'hidden', 'head', 'tokens' or None (see `Layout.spec`).
  """
  if layout is None:
    return function
  specs = lambda kinds: jax.tree.map(layout.spec, kinds, is_leaf=lambda x: x is None or isinstance(x, str))
  # The replication check is off because all sums over mesh axes are explicit.
  return jax.shard_map(function, in_specs=specs(kinds_in), out_specs=specs(kinds_out), check_vma=False)


def with_vocab_groups(layout, tokens, vocab):
  """Returns `layout` with the vocab_group_size that minimizes communication.

  Groups are possible only if exactly one mesh axis splits the head's width, and this axis also splits the tokens.
  Otherwise `layout` is returned unchanged.

  tokens, vocab: the numbers of tokens and of vocabulary entries over all devices.
  """
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  ways = lambda axes: math.prod(sizes[a] for a in _axes(axes))
  if len(_axes(layout.width)) != 1 or not set(_axes(layout.width)) <= set(_axes(layout.tokens)):
    return layout
  device_tokens, device_vocab = tokens // ways(layout.tokens), vocab // ways(layout.vocab)
  largest = math.gcd(ways(layout.width), device_vocab)
  sent = {m: m * device_tokens + device_vocab / m for m in range(1, largest + 1) if largest % m == 0}
  return dataclasses.replace(layout, vocab_group_size=min(sent, key=sent.get))


def vocab_offset(layout, local_size):
  """Returns the first token id of this device's part of the vocabulary.

  local_size: the number of ids in this part.
  """
  part = lax.axis_index(_axes(layout.vocab)) if layout and layout.vocab else 0
  return (part * layout.vocab_group_size + _group_rank(layout) if _has_groups(layout) else part) * local_size


def splits_vocab(layout):
  """Returns True if a device holds only a part of the vocabulary. Call this within `on_mesh`."""
  split = layout is not None and math.prod(lax.axis_size(axis) for axis in _axes(layout.vocab)) > 1
  return split or _has_groups(layout)


def sum_over_vocab(layout, array):
  """Returns the sum of `array` over all parts of the vocabulary."""
  return _over_vocab(lax.psum, layout, array)


def max_over_vocab(layout, array):
  """Returns the maximum of `array` over all parts of the vocabulary."""
  return _over_vocab(lax.pmax, layout, array)


def concatenate_over_vocab(layout, array):
  """Concatenates the last axis of `array` over all parts of the vocabulary, lower ids first."""
  return _over_vocab(functools.partial(lax.all_gather, axis=array.ndim - 1, tiled=True), layout, array)


def gather_head(layout, head):
  """All-gathers the head along its width D.

  head is this device's shard, [D / width, V / vocab], where width and vocab are the numbers of devices that split D and
  V. Returns [D, V / vocab]. With vocabulary groups, the devices of a group divide these columns among themselves, so
  each gets [D, V / vocab / vocab_group_size].
  """
  if layout is None or not layout.width:
    return head
  if not _has_groups(layout):
    return lax.all_gather(head, _axes(layout.width), axis=0, tiled=True)
  # First, the devices of a group exchange parts, so that each has fewer columns of more rows. Then each gets the
  # remaining rows from the devices of other groups that have the same columns.
  axis, groups = _groups(layout)
  head = lax.all_to_all(head, axis, 1, 0, axis_index_groups=groups, tiled=True)
  return lax.all_gather(head, axis, axis=0, axis_index_groups=_same_columns(groups), tiled=True)


def reduce_head(layout, dhead):
  """Sums the head's gradient over the tokens of all devices. Returns this device's shard of the sum.

  This is the transpose of `gather_head`. The returned shard has the shape of the argument `head` of `gather_head`.

  dhead: this device's gradient with respect to the result of `gather_head`.
  """
  tokens, width = _axes(layout.tokens), _axes(layout.width)
  if _has_groups(layout):
    axis, groups = _groups(layout)
    dhead = lax.psum_scatter(dhead, axis, scatter_dimension=0, axis_index_groups=_same_columns(groups), tiled=True)
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


def gather_group(layout, array):
  """Concatenates the arrays of the devices of a vocabulary group: [C, ...] -> [m·C, ...], where m is vocab_group_size.

  Without vocabulary groups (see `with_vocab_groups`), returns the array itself.
  """
  if not _has_groups(layout):
    return array
  axis, groups = _groups(layout)
  return lax.all_gather(array, axis, axis=0, axis_index_groups=groups, tiled=True)


def own_tokens(layout, array):
  """Returns this device's C tokens of an array [m·C, ...] that is equal on all m devices of the vocabulary group."""
  if not _has_groups(layout):
    return array
  size = array.shape[0] // layout.vocab_group_size
  return lax.dynamic_slice_in_dim(array, _group_rank(layout) * size, size)


def reduce_scatter_group(layout, array):
  """Sums an array [m·C, ...] over the m devices of the vocabulary group. Returns this device's C tokens of the sum."""
  if not _has_groups(layout):
    return array
  axis, groups = _groups(layout)
  return lax.psum_scatter(array, axis, scatter_dimension=0, axis_index_groups=groups, tiled=True)


def sum_hidden(layout, dhidden):
  """Sums dhidden, the gradient of the hidden states, over the mesh axes `layout.vocab`. Returns the sum.

  `reduce_scatter_group` has already summed it over the devices of each vocabulary group.
  """
  return lax.psum(dhidden, _axes(layout.vocab)) if layout and layout.vocab else dhidden


def _has_groups(layout):
  return layout is not None and layout.vocab_group_size > 1


def _group_rank(layout):
  """Returns this device's index within its vocabulary group."""
  return lax.axis_index(_axes(layout.width)) % layout.vocab_group_size


def _groups(layout):
  """Returns (axis, groups): the mesh axis that is divided into vocabulary groups, and the groups.

  A group is a list of m consecutive indices along this axis. The vocabulary is divided among the m devices with these
  indices.
  """
  (axis,) = _axes(layout.width)
  size, group = lax.axis_size(axis), layout.vocab_group_size
  return axis, [list(range(first, first + group)) for first in range(0, size, group)]


def _same_columns(groups):
  """Returns one list for each part of the vocabulary: the devices that hold this part, one from every group.

  The first list has the first device of every group, the second list the second device of every group, and so on.

  groups: the groups that `_groups` returns.
  """
  return [list(group) for group in zip(*groups)]


def _over_vocab(collective, layout, array):
  """Applies `collective` to `array` over all parts of the vocabulary, in the order of their token ids.

  The axes `layout.vocab` split the vocabulary into ranges of ids, and the devices of a vocabulary group split a range
  into smaller ones. Therefore the collective is applied within the groups first, and then over these axes.

  collective: a function such as lax.psum, with the arguments (array, axis) and optionally axis_index_groups.
  """
  if _has_groups(layout):
    axis, groups = _groups(layout)
    array = collective(array, axis, axis_index_groups=groups)
  return collective(array, _axes(layout.vocab)) if layout and layout.vocab else array


def _axes(entry):
  """Returns the mesh axis names in an entry of a PartitionSpec as a flat tuple. The entry is None, a name, or a tuple
  of entries.
  """
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(a for part in entry for a in _axes(part))
