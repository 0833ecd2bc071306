"""betarank hf export --checkpoint=RUN --to=DIR | import --from=DIR --to=CHECKPOINT

To and from Hugging Face's format: config.json, safetensors and a tokenizer (docs/huggingface.md). This command sits
on top of the packages; nothing imports it.
"""

import argparse
import contextlib
import json
import math
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from rich.progress import Progress

from betarank.configs import common, load
from betarank.configs.sections import section
from betarank.data import DataConfig, Tokenizer
from betarank.model import ModelConfig, hf_config, hf_tokenizer, hf_weights, parameter_counts
from betarank.model.hf_config import HfError
from betarank.runtime import checkpoint, integrity

CHUNK_BYTES = 2**26  # of an imported array on disk, and of the files there: what is in memory while it is written
STORED = {'float32': 'F32', 'bfloat16': 'BF16'}


def export(path: str, to: str, dtype: str = 'float32', shard_gb: float = 4.0, tokenizer: str = '') -> str:
  """Writes the checkpoint at `path` (or the newest of a workdir) to the new directory `to`; says what it wrote.

  tokenizer: a SentencePiece model file, 'none', or '' for the one the run was trained with. Memory: one stored
  chunk of one array.
  """
  source = checkpoint.find(path)
  checkpoint.check(source)
  config = checkpoint.read_meta(source)['config']
  c = section(ModelConfig, config['model'], 'model')
  theirs = hf_config.to_hf(c, positions=_positions(config), dtype=dtype)
  leaves = hf_weights.leaves(c)
  tokenizer = tokenizer or section(DataConfig, config['data'], 'data').tokenizer_path
  with _new_folder(to) as folder:
    if tokenizer != 'none':
      ids = hf_tokenizer.export(tokenizer, folder, c.vocab_size)
      theirs |= (ids := {f'{name}_token_id': id for name, id in ids.items()})
      _write_json(folder / 'generation_config.json', ids)
    _write_json(folder / 'config.json', theirs)
    stored = lambda name: 'F32' if name.endswith(hf_weights.ALWAYS_FLOAT32) else STORED[dtype]
    tensors = [(name, stored(name), leaf.their_shape) for leaf in leaves for name, _ in leaf.tensors()]
    views = hf_weights.create(folder, tensors, int(shard_gb * 1e9))
    with Progress(disable=not sys.stdout.isatty()) as bar:
      for leaf in bar.track(leaves, description='export'):
        if leaf.path:
          _copy(source, leaf, views)
  parameters = sum(parameter_counts(c).values())
  return f'{to}: {parameters:,} parameters as {theirs["architectures"][0]}, {dtype}, from {source}'


def _positions(config: dict) -> int:
  """The longest text the model was trained on, in tokens."""
  longest = config['data']['sequence_length']
  if rl := config.get('rl'):
    longest = max(longest, rl['max_prompt_tokens'] + max(rl['max_new_tokens']))
  return longest


def _copy(source, leaf: hf_weights.Leaf, views: dict[str, np.ndarray]) -> None:
  """Fills the tensors of one array from where Orbax stored it, without reading it whole."""
  where = str(source.resolve()) if '://' in str(source) else f'file://{source.resolve()}'
  try:
    store = tensorstore.open(f'{where}/state/|ocdbt:params.{leaf.path}/', read=True).result()
    if store.shape != leaf.shape:
      raise ValueError(f'it is {list(store.shape)}, but its config makes it {list(leaf.shape)}')
    hf_weights.copy_out(leaf, store, views)
  except ValueError as error:
    raise HfError(f'{source}: params.{leaf.path} could not be read ({str(error).splitlines()[0][:200]}); '
                  'export another checkpoint') from None


def import_(path: str, to: str) -> str:
  """Writes the model in the directory `path` as the new checkpoint `to`; returns its config section and what is next.

  Everything is checked by its headers first. Arrays are put together in files beside `to`, not in memory.
  """
  folder = pathlib.Path(path)
  sizes = hf_config.from_hf(hf_weights.read_json(folder / 'config.json'), str(folder / 'config.json'))
  config = common.base()
  config.model.update(sizes)
  c = section(ModelConfig, config.model, 'model')
  files = hf_weights.Files(folder)
  leaves = hf_weights.leaves(c, head_copy=c.tied_embeddings and hf_weights.HEAD in files.found)
  files.check(leaves)
  tokenizer = folder / 'tokenizer.model'
  if tokenizer.is_file():
    Tokenizer(str(tokenizer))  # it will be copied, and what isn't one may be a link to anything
    config.data.tokenizer = str(pathlib.Path(to).resolve() / tokenizer.name)
  with _new_folder(to) as out, tempfile.TemporaryDirectory(dir=out) as scratch:
    arrays = {}
    for leaf in leaves:
      if leaf.path and leaf.path not in arrays:
        memory = hf_weights.mapped(pathlib.Path(scratch) / leaf.path, 4 * math.prod(leaf.shape))
        arrays[leaf.path] = memory.view(np.float32).reshape(leaf.shape)
    with Progress(disable=not sys.stdout.isatty()) as bar:
      task = bar.add_task('import', total=len(files.found))
      files.copy_in(leaves, arrays, lambda: bar.advance(task))
    params: dict = {}
    for name, array in arrays.items():
      *parents, last = name.split('.')
      node = params
      for parent in parents:
        node = node.setdefault(parent, {})
      node[last] = array
    _save(out, params, {'step': 0, 'cursor': None, 'parent': str(folder.resolve()), 'code_version': '',
                        'config': json.loads(load.to_json(config))})
    if config.data.tokenizer:
      shutil.copy(tokenizer, out)
  return _next_steps(config, sizes, to, sum(parameter_counts(c).values()))


def _save(out: pathlib.Path, params: dict, meta: dict) -> None:
  """A checkpoint as train/checkpoint.py lays it out, of parameters alone."""
  kinds = ocp.type_handlers
  registry = kinds.create_type_handler_registry(
    (np.ndarray, kinds.NumpyHandler(deepcopy_host_arrays=False)),  # a copy would be in memory
    (jax.Array, kinds.ArrayHandler()))
  state = {'params': params}
  chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state)
  save = ocp.args.PyTreeSave(state, save_args=chunks, ocdbt_target_data_file_size=CHUNK_BYTES)
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as writer:
      writer.save(out.resolve() / 'state', save)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
      writer.save(out.resolve() / 'meta', ocp.args.JsonSave({**meta, 'shapes': checkpoint.shapes_of(state)}))
    integrity.write(epath.Path(out))
  except (OSError, ValueError, RuntimeError) as error:  # what Orbax and tensorstore raise when a disk is full
    reason = str(error).strip().splitlines()[0][-160:]
    raise HfError(f'{out}: the checkpoint could not be written ({reason}); it needs room twice') from error


def _next_steps(config, sizes: dict, to: str, parameters: int) -> str:
  section = lambda name, values: f'  c.{name}.update({", ".join(f"{k}={v!r}" for k, v in values.items())})'
  lines = [f'{to}: {parameters:,} parameters. For the config:', '',
           section('model', {k: v for k, v in sizes.items() if k != 'moe'})]
  if 'moe' in sizes:
    lines += [section('model.moe', sizes['moe'])]
  if config.data.tokenizer:
    lines += [section('data', {'tokenizer': config.data.tokenizer})]
  lines += ['', f'  betarank train --config=... --config.train.init_from={to} --workdir=...']
  if not config.data.tokenizer:
    lines += ['', 'It brings no SentencePiece tokenizer.model, the only kind that `betarank data` reads.']
  return '\n'.join(lines)


@contextlib.contextmanager
def _new_folder(to: str):
  """A directory that becomes `to` once all is in it. Raises HfError if there is something already."""
  if '://' in to:
    raise HfError(f'--to={to}: only a local directory can be written; copy it from there')
  final = pathlib.Path(to)
  if final.exists() and (not final.is_dir() or any(final.iterdir())):
    raise HfError(f'--to={to}: is there already and not empty; give a new directory')
  final.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=final.parent, prefix=f'{final.name}.partial-') as folder:
    work = pathlib.Path(folder) / 'whole'
    work.mkdir()
    try:
      yield work
    except OSError as error:
      raise HfError(f'--to={to}: could not be written ({error.strerror or error})') from error
    work.replace(final)


def _write_json(path: pathlib.Path, content: dict) -> None:
  path.write_text(json.dumps(content, indent=2) + '\n')


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(prog='betarank hf', description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = parser.add_subparsers(dest='command', required=True)
  out = commands.add_parser('export', help='a checkpoint to a directory that transformers and vLLM load')
  out.add_argument('--checkpoint', required=True, metavar='DIR', help='a workdir, or one checkpoint')
  out.add_argument('--to', required=True, metavar='DIR', help='a new directory')
  out.add_argument('--dtype', choices=tuple(STORED), default='float32')
  out.add_argument('--shard_gb', type=float, default=4.0, help='largest size of a file (default: 4)')
  out.add_argument('--tokenizer', default='', metavar='FILE.model | none', help="default: the run's own")
  back = commands.add_parser('import', help='a Qwen3 or Qwen3-MoE directory to a checkpoint to start from')
  back.add_argument('--from', required=True, dest='source', metavar='DIR')
  back.add_argument('--to', required=True, metavar='DIR', help='a new directory')
  args = parser.parse_args(argv)
  load.check_places(vars(args))
  if args.command == 'import':
    print(import_(args.source, args.to))
  else:
    if not 0 < args.shard_gb < math.inf:
      parser.error('--shard_gb must be > 0')
    print(export(args.checkpoint, args.to, args.dtype, args.shard_gb, args.tokenizer))
