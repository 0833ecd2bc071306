"""Converts our stacked arrays to the tensors of safetensors files, and back, one block of an array at a time.

The suffix of an array's name lists its dimensions, and NAMES says how Hugging Face groups these dimensions. For
example, our `q_DNH` is one array for all layers, while Hugging Face has one tensor [N·H, D] per layer. Export and
import both use a view of each tensor that has our dimensions (`Leaf.view`), so NAMES describes the whole conversion.
Files are memory-mapped, so only the block that is being copied is in memory.

# L layers  E experts  V vocabulary  D width  N query heads  K key heads  H head width  F hidden width
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np

from betarank.model.config import ModelConfig
from betarank.model.hf_config import SIGMOID, HfError, architecture
from betarank.model.transformer import abstract

HEAD = 'lm_head.weight'
NAMES = {  # our name -> (their name, their dimensions); {L} and {E} are indices in the name
  'embed_VD': ('model.embed_tokens.weight', 'V D'),
  'head_DV': (HEAD, 'V D'),
  'norm_D': ('model.norm.weight', 'D'),
  'layers.attention_norm_D': ('model.layers.{L}.input_layernorm.weight', 'D'),
  'layers.attention.q_DNH': ('model.layers.{L}.self_attn.q_proj.weight', 'NH D'),
  'layers.attention.k_DKH': ('model.layers.{L}.self_attn.k_proj.weight', 'KH D'),
  'layers.attention.v_DKH': ('model.layers.{L}.self_attn.v_proj.weight', 'KH D'),
  'layers.attention.q_bias_NH': ('model.layers.{L}.self_attn.q_proj.bias', 'NH'),
  'layers.attention.k_bias_KH': ('model.layers.{L}.self_attn.k_proj.bias', 'KH'),
  'layers.attention.v_bias_KH': ('model.layers.{L}.self_attn.v_proj.bias', 'KH'),
  'layers.attention.o_NHD': ('model.layers.{L}.self_attn.o_proj.weight', 'D NH'),
  'layers.attention.q_norm_H': ('model.layers.{L}.self_attn.q_norm.weight', 'H'),
  'layers.attention.k_norm_H': ('model.layers.{L}.self_attn.k_norm.weight', 'H'),
  'layers.feed_forward_norm_D': ('model.layers.{L}.post_attention_layernorm.weight', 'D'),
  'layers.feed_forward.gate_DF': ('model.layers.{L}.mlp.gate_proj.weight', 'F D'),
  'layers.feed_forward.up_DF': ('model.layers.{L}.mlp.up_proj.weight', 'F D'),
  'layers.feed_forward.down_FD': ('model.layers.{L}.mlp.down_proj.weight', 'D F'),
  'layers.feed_forward.router_DE': ('model.layers.{L}.mlp.gate.weight', 'E D'),
  'layers.feed_forward.router_bias_E': ('model.layers.{L}.mlp.gate.e_score_correction_bias', 'E'),
  'layers.feed_forward.gate_EDF': ('model.layers.{L}.mlp.experts.{E}.gate_proj.weight', 'F D'),
  'layers.feed_forward.up_EDF': ('model.layers.{L}.mlp.experts.{E}.up_proj.weight', 'F D'),
  'layers.feed_forward.down_EFD': ('model.layers.{L}.mlp.experts.{E}.down_proj.weight', 'D F'),
  'layers.feed_forward.shared.gate_DF': ('model.layers.{L}.mlp.shared_experts.gate_proj.weight', 'F D'),
  'layers.feed_forward.shared.up_DF': ('model.layers.{L}.mlp.shared_experts.up_proj.weight', 'F D'),
  'layers.feed_forward.shared.down_FD': ('model.layers.{L}.mlp.shared_experts.down_proj.weight', 'D F'),
}
ALWAYS_FLOAT32 = 'e_score_correction_bias'  # an update of the bias is smaller than bfloat16's resolution
TYPES = {'F32': np.dtype(np.float32), 'BF16': np.dtype(ml_dtypes.bfloat16), 'F16': np.dtype(np.float16)}


@dataclasses.dataclass(frozen=True)
class Leaf:
  """An array of our model, and the tensors in Hugging Face's format that hold its values.

  Attributes:
    path: the place of the array in the tree of parameters, such as 'layers.attention.q_DNH'. It is '' for tensors that
      Hugging Face's model has and ours doesn't. All values of these tensors are zero.
    letters, shape: the letters and sizes of the array's dimensions. If layers are stacked, L comes first.
    template: the name of the tensors, with {L} and {E} in place of the layer and expert numbers.
    groups: the dimensions of a tensor in Hugging Face's format. For example, 'NH D' stands for [N·H, D].
  """

  path: str
  letters: str
  shape: tuple[int, ...]
  template: str
  groups: str

  @property
  def indexed(self) -> int:
    """The number of placeholders in `template`: 0, 1 (layer), or 2 (layer and expert).

    It is also the number of indices that select one tensor's values in our array. For example, 2 means
    array[layer, expert].
    """
    return self.template.count('{')

  @property
  def their_shape(self) -> tuple[int, ...]:
    sizes = dict(zip(self.letters, self.shape, strict=True))
    return tuple(math.prod(sizes[letter] for letter in group) for group in self.groups.split())

  def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields (name, index) for each tensor of this Leaf. The Leaf's array has the tensor's values at `index`."""
    for index in _indices(self.shape[:self.indexed]):
      yield self.template.format(**dict(zip(self.letters, index, strict=False))), index

  def view(self, tensor: np.ndarray) -> np.ndarray:
    """Returns a view of a tensor in Hugging Face's format that has the order of dimensions of our array.

    For example, a tensor [N·H, D] becomes a view [D, N, H]. The view has no dimensions for layers and experts, which
    the index from `tensors` selects.
    """
    sizes, flat = dict(zip(self.letters, self.shape, strict=True)), self.groups.replace(' ', '')
    order = [flat.index(letter) for letter in self.letters[self.indexed:]]
    return tensor.reshape([sizes[letter] for letter in flat]).transpose(order)


def _indices(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
  """Yields all indices of an array of this shape, one at a time.

  itertools.product would hold the range of each dimension in memory, and a malicious config.json may give a dimension
  of 2^31.
  """
  if not shape:
    yield ()
    return
  for first in range(shape[0]):
    for rest in _indices(shape[1:]):
      yield first, *rest


def leaves(c: ModelConfig, head_copy: bool | None = None) -> list[Leaf]:
  """Returns a Leaf for each array that the exported or imported model has.

  head_copy: whether a tied embedding is stored a second time, as the head. None stores it twice only for Glm4-MoE,
    because vLLM doesn't tie the head of Glm4-MoE.
  """
  theirs = architecture(c)
  found = []
  for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract(c)[1]):
    path = jax.tree_util.keystr(keys, simple=True, separator='.')
    found.append(_leaf(path, leaf.shape))
  if c.tied_embeddings and (theirs == SIGMOID if head_copy is None else head_copy):
    found.append(dataclasses.replace(_leaf('head_DV', (c.d_model, c.vocab_size)), path='embed_VD', letters='VD',
                                     shape=(c.vocab_size, c.d_model)))
  if theirs == SIGMOID and not c.moe.shared_d_ff:
    shapes = {'gate_DF': (c.d_model, c.moe.expert_d_ff), 'up_DF': (c.d_model, c.moe.expert_d_ff),
              'down_FD': (c.moe.expert_d_ff, c.d_model)}
    for name, shape in shapes.items():
      leaf = _leaf(f'layers.feed_forward.shared.{name}', (c.layers, *shape))
      found.append(dataclasses.replace(leaf, path=''))
  return found


def _leaf(path: str, shape: tuple[int, ...]) -> Leaf:
  if path not in NAMES:
    raise HfError(f'parameter {path}: has no counterpart in transformers')
  letters = 'L' * path.startswith('layers.') + path.rsplit('_', 1)[1]
  return Leaf(path, letters, shape, *NAMES[path])


def mapped(path: pathlib.Path, size: int) -> np.memmap:
  """Creates a file of `size` zero bytes, and returns it as a memory-mapped array.

  The space is allocated at once, because a process that writes to a mapping crashes when the disk is full.

  Raises:
    OSError: the disk is full.
  """
  with path.open('wb') as file:
    if hasattr(os, 'posix_fallocate'):  # not on macOS
      os.posix_fallocate(file.fileno(), 0, size)
    else:
      file.truncate(size)
  return np.memmap(path, np.uint8, 'r+')


def create(folder: pathlib.Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]],
           shard_bytes: int) -> dict[str, np.ndarray]:
  """Creates safetensors files of zeros, and returns their tensors by name, as writable memory-mapped arrays.

  A safetensors file has 8 bytes with the length of the header, then the header as JSON, then the data.

  tensors: (name, dtype, shape) of each tensor; dtype is a key of TYPES.
  shard_bytes: the largest size of a file. A tensor that is larger gets a file of its own.
  """
  shards, used = [[]], 0
  natural = lambda tensor: [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', tensor[0])]
  for tensor in sorted(tensors, key=natural):  # layer by layer, the order in which readers need them
    size = math.prod(tensor[2]) * TYPES[tensor[1]].itemsize
    if used and used + size > shard_bytes:
      shards.append([])
      used = 0
    shards[-1].append((*tensor, size))
    used += size
  views, weight_map = {}, {}
  for number, shard in enumerate(shards, 1):
    one = len(shards) == 1
    path = folder / ('model.safetensors' if one else f'model-{number:05}-of-{len(shards):05}.safetensors')
    shard.sort(key=lambda tensor: -TYPES[tensor[1]].itemsize)  # keeps float32 tensors aligned
    ends = list(itertools.accumulate((size for *_, size in shard), initial=0))
    header = {'__metadata__': {'format': 'pt'}} | {
      name: {'dtype': dtype, 'shape': shape, 'data_offsets': [start, start + size]}
      for (name, dtype, shape, size), start in zip(shard, ends, strict=False)}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    head = len(text).to_bytes(8, 'little') + text
    file = mapped(path, len(head) + ends[-1])
    file[:len(head)] = np.frombuffer(head, np.uint8)
    for (name, dtype, shape, size), start in zip(shard, ends, strict=False):
      views[name] = file[len(head) + start:][:size].view(TYPES[dtype]).reshape(shape)
      weight_map[name] = path.name
  if len(shards) > 1:
    index = {'metadata': {'total_size': sum(view.nbytes for view in views.values())}, 'weight_map': weight_map}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=2) + '\n')
  return views


def copy_out(leaf: Leaf, store: Any, views: dict[str, np.ndarray]) -> None:
  """Copies one array of a checkpoint to the tensors in Hugging Face's format that hold its values.

  leaf: describes the array and these tensors.
  store: the array as a TensorStore, which is read one chunk at a time.
  views: {name: tensor} from `create`.
  """
  steps = [range(0, size, chunk) for size, chunk in zip(leaf.shape, store.chunk_layout.read_chunk.shape, strict=True)]
  names = {index: name for name, index in leaf.tensors()}
  for starts in itertools.product(*steps):
    region = tuple(slice(a, min(a + r.step, r.stop)) for a, r in zip(starts, steps, strict=True))
    block = store[region].read().result()
    inside = region[leaf.indexed:]
    for at in np.ndindex(block.shape[:leaf.indexed]):
      index = tuple(a + r.start for a, r in zip(at, region, strict=False))
      leaf.view(views[names[index]])[inside] = block[at]


@contextlib.contextmanager
def open_file(path: pathlib.Path):
  """Opens a safetensors file for a `with` block. The safetensors library checks the header, which may have at most 100
  MB.

  Raises:
    HfError: the file is damaged or can't be read, or the package safetensors is missing.
  """
  try:
    import safetensors
  except ImportError:
    raise HfError("reading safetensors needs the extra hf: pip install -e '.[hf]'") from None
  try:
    with safetensors.safe_open(path, 'np') as file:
      yield file
  except (safetensors.SafetensorError, OSError) as error:
    raise HfError(f'{path}: not a whole safetensors file ({error}); fetch it again') from None


class Files:
  """The safetensors files of a directory: model.safetensors, or the files that model.safetensors.index.json names.

  The constructor reads only the files' headers.

  Attributes:
    found: {tensor: (path, dtype, shape)}.

  Raises:
    HfError: a file is missing or damaged, or two files have the same tensor.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.found: dict[str, tuple[pathlib.Path, str, tuple[int, ...]]] = {}
    for path in self._paths():
      with open_file(path) as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
          if name in self.found:
            raise HfError(f'{path}: holds {name}, as {self.found[name][0].name} does; remove one of the files')
          part = file.get_slice(name)
          self.found[name] = path, part.get_dtype(), tuple(part.get_shape())

  def _paths(self) -> list[pathlib.Path]:
    index, single = self.folder / 'model.safetensors.index.json', self.folder / 'model.safetensors'
    if not index.is_file():
      if not single.is_file():
        raise HfError(f'{self.folder}: has no model.safetensors and no {index.name}; other formats, '
                      'such as pytorch_model.bin, must be converted to safetensors first')
      return [single]
    files = read_json(index).get('weight_map')
    files = list(files.values()) if isinstance(files, dict) else []
    for file in files:
      if not isinstance(file, str) or not re.fullmatch(r'[\w.-]+\.safetensors', file):
        raise HfError(f'{index}: weight_map names {file!r}; only files in its folder can be read')
    for file in sorted(set(files)):
      if not (self.folder / file).is_file():
        raise HfError(f'{index}: weight_map names {file}, which is not there; fetch all files of the model')
    if not files:
      raise HfError(f'{index}: has no weight_map of tensors to files; fetch it again')
    return [self.folder / file for file in sorted(set(files))]

  def check(self, wanted: list[Leaf]) -> None:
    """Raises HfError for the first tensor that is missing, has a wrong shape or type, or doesn't belong to the model.

    wanted: the result of `leaves`.
    """
    known = set()
    for leaf in wanted:
      for name, _ in leaf.tensors():
        if name not in self.found:
          raise HfError(f'{self.folder}: no tensor {name}, which its config.json asks for; fetch all files, or '
                        'correct config.json')
        path, dtype, shape = self.found[name]
        if shape != leaf.their_shape:
          raise HfError(f'{path}: {name} is {list(shape)}, but config.json makes it {list(leaf.their_shape)}')
        if dtype not in TYPES:
          raise HfError(f'{path}: {name} is {dtype}; only {", ".join(TYPES)} can be imported')
        known.add(name)
    if extra := sorted(self.found.keys() - known):
      more = f' and {len(extra) - 1} more tensors' if len(extra) > 1 else ''
      raise HfError(f'{self.folder}: holds {extra[0]}{more}, which a model of its config.json does not have; only '
                    'plain models can be imported')

  def copy_in(self, wanted: list[Leaf], targets: dict[str, np.ndarray], report: Callable[[], None]) -> None:
    """Copies the tensors to the arrays of our model, file by file. Calls `report` after each tensor.

    wanted: the result of `leaves`.
    targets: {path in the tree of parameters: array}.

    Raises:
      HfError: config.json says that the head and the embedding are the same, but they differ. Or a tensor that must be
        zero isn't zero.
    """
    places = {name: (leaf, index) for leaf in wanted for name, index in leaf.tensors()}
    by_file = sorted(self.found.items(), key=lambda item: item[1][0])
    second = lambda name: name == HEAD and places[name][0].path == 'embed_VD'
    for late in (False, True):  # the copy of the embedding comes last, because it is compared with the embedding
      for path, items in itertools.groupby((i for i in by_file if second(i[0]) == late), key=lambda item: item[1][0]):
        with open_file(path) as file:
          for name, _ in items:
            tensor, (leaf, index) = file.get_tensor(name), places[name]
            if not leaf.path and np.any(tensor):
              raise HfError(f'{path}: {name} is not zero as config.json says; give it shared_experts_are_zero=false')
            if late and not np.array_equal(tensor, targets['embed_VD']):
              raise HfError(f'{path}: {name} differs from the embedding; config.json must have '
                            'tie_word_embeddings=false')
            if leaf.path and not late:
              targets[leaf.path][index] = leaf.view(tensor)
            report()


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    HfError: the file is missing, larger than 100 MB, or not a JSON object.
  """
  try:
    if path.exists() and not path.is_file():  # a link to a device would never end
      raise HfError(f'{path}: not a file; fetch it again')
    if path.stat().st_size > 1e8:
      raise HfError(f'{path}: is larger than 100 MB, too large for what it should hold')
    content = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise HfError(f'{path}: no such file; give a directory with config.json and model.safetensors') from None
  except OSError as error:
    raise HfError(f'{path}: could not be read ({error.strerror or error}); fetch it again') from None
  except (ValueError, RecursionError) as error:
    if isinstance(error, HfError):
      raise
    raise HfError(f'{path}: not JSON ({str(error)[:100]}); fetch it again') from None
  if not isinstance(content, dict):
    raise HfError(f'{path}: not a JSON object')
  return content
