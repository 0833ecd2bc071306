"""betarank hf export --checkpoint=RUN --to=DIR | import --from=DIR --to=RUN

Converts a checkpoint to Hugging Face's format (config.json, safetensors and a tokenizer), and back; see
docs/huggingface.md.
"""

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
from betarank.configs.parser import Parser, above_zero, place
from betarank.configs.sections import section
from betarank.data import DataError, read_tokenizer, tokenizer
from betarank.model import ModelConfig, hf_config, hf_tokenizer, hf_weights, parameter_counts
from betarank.model.hf_config import HfError
from betarank.runtime import checkpoint, integrity, workdir
from betarank.train import setup

CHUNK_BYTES = 2**26  # size of a chunk of an imported checkpoint on disk; one chunk at a time is in memory
STORED = {'float32': 'F32', 'bfloat16': 'BF16'}
TOKENIZER_FILES = (  # all files that transformers may read for a tokenizer; they are copied unchanged
  'tokenizer.json', 'tokenizer_config.json', 'generation_config.json', 'tokenizer.model', 'special_tokens_map.json',
  'added_tokens.json', 'vocab.json', 'merges.txt', 'chat_template.jinja', 'chat_template.json')
_LARGEST_TOKENIZER_FILE = 10**8  # bytes


def export(path: str, to: str, dtype: str = 'float32', shard_gb: float = 4.0, tokenizer_path: str = '',
           positions: int = 0) -> str:
  """Writes a checkpoint in Hugging Face's format to the new directory `to`. Returns a summary of one line.

  Only one stored chunk of one array is in memory at a time.

  Args:
    path: a checkpoint, or a workdir, whose newest checkpoint is exported.
    to: a directory that doesn't exist or is empty.
    dtype: 'float32' or 'bfloat16'.
    shard_gb: the largest size of a file, in GB (10^9 bytes).
    tokenizer_path: a SentencePiece model, a tokenizer.json, or a folder with one of them. '' means the run's own
      tokenizer. 'none' exports no tokenizer.
    positions: the length, in tokens, of the longest text that config.json should allow. With 0, this is the length of
      the longest text that the model was trained on, or the length that it was imported with if that is larger.

  Raises:
    HfError, DataError: the model or the tokenizer can't be used or has no counterpart in Hugging Face's format, or a
      file can't be written.
    CheckpointError: the checkpoint is missing or damaged.
  """
  source = checkpoint.find(path)
  checkpoint.check(source)
  meta = checkpoint.read_meta(source)
  config = setup.whole_config(meta)
  c = section(ModelConfig, config['model'], 'model')
  positions = positions or setup.longest_text(meta)
  theirs = hf_config.to_hf(c, positions=positions, dtype=dtype)
  leaves = hf_weights.leaves(c)
  tokenizer_path = tokenizer_path or setup.trained_tokenizer(meta)
  with _new_folder(to) as folder:
    if tokenizer_path != 'none':
      theirs |= _export_tokenizer(tokenizer_path, folder, c)
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


def _export_tokenizer(path: str, folder: pathlib.Path, c: ModelConfig) -> dict[str, int]:
  """Writes the tokenizer at `path` to `folder`. Returns {'bos_token_id': id, ...}, with the keys of config.json.

  A tokenizer.json is copied together with the files that belong to it. A SentencePiece model is converted.
  """
  file = tokenizer.find(path)
  if file.suffix != '.json':
    if hf_config.architecture(c) == hf_config.QWEN2:  # AutoTokenizer ignores tokenizer_class in this architecture
      raise HfError(f'{file}: transformers would read it with the rules of Qwen2\'s tokenizer, which give other '
                    'ids; use --tokenizer=none')
    ids = hf_tokenizer.export(str(file), folder, c.vocab_size)
    ids = {f'{name}_token_id': id for name, id in ids.items()}
    _write_json(folder / 'generation_config.json', ids)
    return ids
  read = read_tokenizer(path, c.vocab_size)
  for name in TOKENIZER_FILES:
    if (file.parent / name).exists():
      (folder / name).write_bytes((file.parent / name).read_bytes())
  return {'bos_token_id': read.bos, 'eos_token_id': read.eos, 'pad_token_id': read.pad}


def _copy(source, leaf: hf_weights.Leaf, views: dict[str, np.ndarray]) -> None:
  """Copies one array from the checkpoint `source` into the exported tensors, chunk by chunk.

  leaf: the array.
  views: the exported tensors by name, from `hf_weights.create`.
  """
  place = str(checkpoint.absolute(source))
  where = place if '://' in place else f'file://{place}'
  try:
    store = tensorstore.open(f'{where}/state/|ocdbt:params.{leaf.path}/', read=True).result()
    if store.shape != leaf.shape:
      raise ValueError(f'it is {list(store.shape)}, but its config makes it {list(leaf.shape)}')
    hf_weights.copy_out(leaf, store, views)
  except ValueError as error:
    raise HfError(f'{source}: params.{leaf.path} could not be read ({str(error).splitlines()[0][:200]}); '
                  'export another checkpoint') from None


def import_(path: str, to: str, tokenizer_path: str = '') -> str:
  """Converts a Hugging Face model to the new workdir `to`, from which runs can start.

  The workdir gets the weights as checkpoint 0, the tokenizer's files, and a config.json. Names and shapes of all
  tensors are checked before any tensor is read. Arrays are assembled in memory-mapped files, so they may be larger than
  memory.

  Returns a text for the user: a summary, and the commands to run next.

  Args:
    path: the directory of the model.
    to: a directory that doesn't exist or is empty.
    tokenizer_path: a tokenizer to import instead of the one in the model's directory. 'none' imports no tokenizer.

  Raises:
    HfError: the model, a file or the tokenizer can't be used, or `to` can't be written.
  """
  folder, final = pathlib.Path(path), pathlib.Path(to).resolve()
  theirs = hf_weights.read_json(folder / 'config.json')
  sizes = hf_config.from_hf(theirs, str(folder / 'config.json'))
  config = common.base()
  config.model.update(sizes)
  c = section(ModelConfig, config.model, 'model')
  files = hf_weights.Files(folder)
  leaves = hf_weights.leaves(c, head_copy=c.tied_embeddings and hf_weights.HEAD in files.found)
  files.check(leaves)
  tokenizer_files = _tokenizer_files(tokenizer_path or path, c.vocab_size)
  if tokenizer_files:
    config.data.tokenizer = str(final / 'tokenizer' / _main_file(tokenizer_files))
  meta = {'step': 0, 'cursor': None, 'parent': str(folder.resolve()), 'code_version': '',
          'config': json.loads(load.to_json(config)), 'positions': hf_config.positions(theirs)}
  with _new_folder(to) as out:
    for file in tokenizer_files:
      (out / 'tokenizer').mkdir(exist_ok=True)
      shutil.copyfile(file, out / 'tokenizer' / file.name)
    if tokenizer_files:  # so that a run that starts from these weights can't use another tokenizer
      meta['tokenizer_sha256'] = tokenizer.sha256_of(str(out / 'tokenizer' / _main_file(tokenizer_files)))
    with tempfile.TemporaryDirectory(dir=out) as scratch:
      params = _read_params(files, leaves, pathlib.Path(scratch))
      _save(out / 'checkpoints' / '0', params, meta)
    config.train.init_from = str(final)
    workdir.write_config(epath.Path(out), config)
  return _next_steps(to, sum(parameter_counts(c).values()), config.data.tokenizer)


def _tokenizer_files(path: str, vocab_size: int) -> list[pathlib.Path]:
  """Reads the tokenizer at `path` as a check, and returns its files.

  Returns [] if `path` is 'none', or a folder without a tokenizer.

  Raises:
    HfError: the tokenizer can't be read, has more than vocab_size tokens, or has a file that is too large. Also raised
      if a file is a symbolic link out of the model's folder, because the link's target would be copied, and perhaps
      published.
  """
  if path == 'none' or (pathlib.Path(path).is_dir() and not tokenizer.find(path).exists()):
    return []
  try:
    read_tokenizer(path, vocab_size)
  except DataError as error:
    raise HfError(f'{error} (or leave it out with --tokenizer=none)') from None
  main = pathlib.Path(tokenizer.find(path))
  if main.suffix != '.json':
    return [main]
  files = [main.parent / name for name in TOKENIZER_FILES if (main.parent / name).exists()]
  home = main.parent.resolve()
  for file in files:
    # Hugging Face's cache links each file of snapshots/REVISION to one in blobs.
    if file.resolve().parent not in (home, home.parent.parent / 'blobs'):
      raise HfError(f'{file}: is a link to {file.resolve()}, outside of the model; replace it with the file')
    if not file.is_file() or file.stat().st_size > _LARGEST_TOKENIZER_FILE:
      raise HfError(f'{file}: not a file of at most {_LARGEST_TOKENIZER_FILE:,} bytes; fetch it again')
  return files


def _main_file(files: list[pathlib.Path]) -> str:
  """Returns the name of the file to read the tokenizer from, or '' to read the folder's tokenizer.json.

  Folders that `export` wrote can have a SentencePiece model and the tokenizer.json made from it. Then the SentencePiece
  model is read, so that the tokenizer keeps its hash.
  """
  by_name = {file.name: file for file in files}
  if 'tokenizer.json' in by_name and 'tokenizer.model' in by_name:
    try:
      converted, _ = hf_tokenizer.convert(by_name['tokenizer.model'].read_bytes(), 'tokenizer.model')
      same = hf_tokenizer.to_bytes(converted) == by_name['tokenizer.json'].read_bytes()
    except HfError:  # tokenizer.model isn't one that we convert, as in the folders of Mistral and Llama
      same = False
    return 'tokenizer.model' if same else ''
  return '' if 'tokenizer.json' in by_name else files[0].name


def _read_params(files: hf_weights.Files, leaves: list[hf_weights.Leaf], scratch: pathlib.Path) -> dict:
  """Returns the tree of parameters as float32 arrays that are memory-mapped to files in `scratch`."""
  arrays = {}
  for leaf in leaves:
    if leaf.path and leaf.path not in arrays:
      memory = hf_weights.mapped(scratch / leaf.path, 4 * math.prod(leaf.shape))
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
  return params


def _save(out: pathlib.Path, params: dict, meta: dict) -> None:
  """Writes a checkpoint in the layout of runtime/checkpoint.py, with parameters only."""
  kinds = ocp.type_handlers
  registry = kinds.create_type_handler_registry(
    (np.ndarray, kinds.NumpyHandler(deepcopy_host_arrays=False)),  # without copying the array to memory
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


def _next_steps(to: str, parameters: int, tokenizer_path: str) -> str:
  config = f'--config={to}/config.json'
  lines = [f'{to}: {parameters:,} parameters, '
           + (f'tokenizer in {tokenizer_path}' if tokenizer_path else 'no tokenizer: --config.data.tokenizer= one'),
           '', 'Train it on data of your own, or ask it (docs/huggingface.md):', '',
           f'  betarank data prepare {config} --config.data.dir=DIR --config.data.sources=...',
           f'  betarank train {config} --config.data.dir=DIR --config.data.sources=... --workdir=RUN',
           f'  betarank eval sample --checkpoint={to} --benchmark=...']
  return '\n'.join(lines)


@contextlib.contextmanager
def _new_folder(to: str):
  """Yields a temporary directory, which is renamed to `to` when the block ends without an error.

  Raises:
    HfError: `to` is in a bucket, is a file or a directory with content, or can't be written.
  """
  if '://' in to:
    raise HfError(f'--to={to}: only a local directory can be written; copy it from there')
  final = pathlib.Path(to)
  if final.exists() and (not final.is_dir() or any(final.iterdir())):
    raise HfError(f'--to={to}: exists and is not empty; give a new directory')
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
  parser = Parser('betarank hf', __doc__)
  commands = parser.add_subparsers(dest='command', required=True)
  out = commands.add_parser('export', help='a checkpoint to a directory that transformers and vLLM load')
  out.add_argument('--checkpoint', required=True, type=place, metavar='DIR', help='a workdir, or one checkpoint')
  out.add_argument('--to', required=True, type=place, metavar='DIR', help='a new directory')
  out.add_argument('--dtype', choices=tuple(STORED), default='float32', help='of the weights (default: float32)')
  out.add_argument('--shard_gb', type=above_zero(float), default=4.0, help='largest size of a file (default: 4)')
  out.add_argument('--tokenizer', default='', metavar='PATH | none', help="default: the run's own")
  out.add_argument('--positions', type=above_zero(int), default=0, metavar='TOKENS',
                   help='longest text that config.json allows; default: what the model was trained on or imported with')
  back = commands.add_parser('import', help='a directory of Qwen3, Qwen3-MoE, Qwen2, Llama 3 or Glm4-MoE to a '
                             'workdir to start from')
  back.add_argument('--from', required=True, type=place, dest='source', metavar='DIR',
                    help='a local directory with config.json and safetensors')
  back.add_argument('--to', required=True, type=place, metavar='DIR', help='a new directory')
  back.add_argument('--tokenizer', default='', metavar='PATH | none', help="default: the directory's own")
  args = parser.parse_args(argv)
  if args.command == 'import':
    print(import_(args.source, args.to, args.tokenizer))
  else:
    print(export(args.checkpoint, args.to, args.dtype, args.shard_gb, args.tokenizer, args.positions))
