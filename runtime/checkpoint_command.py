"""betarank checkpoint inspect DIR     prints what is in the checkpoints of a run, or in one checkpoint
betarank checkpoint verify DIR      reads every byte of these checkpoints, and names damaged files
"""

import json
import math
import sys
import time
from collections.abc import Sequence

import numpy as np
from etils import epath

from betarank.configs.load import flatten
from betarank.configs.parser import Parser, place
from betarank.runtime import checkpoint, integrity


def main(argv: Sequence[str]) -> None:
  parser = Parser('betarank checkpoint', __doc__)
  parser.add_argument('command', choices=('inspect', 'verify'))
  parser.add_argument('path', type=place, metavar='DIR', help='a workdir or one checkpoint; local or gs://')
  args = parser.parse_args(argv)
  found = checkpoint.find(args.path)
  one = str(found) == str(epath.Path(args.path)) or not found.name.isdigit()
  paths = [found] if one else [found.parent / str(step) for step in checkpoint.steps(found.parent)]
  if args.command == 'inspect':
    _inspect(paths)
  else:
    _verify(paths)


def _inspect(paths: list[epath.Path]) -> None:
  for path in paths:
    meta = checkpoint.read_meta(path)
    shapes = {name: (math.prod(shape), np.dtype(kind).itemsize)
              for name, (shape, kind) in meta['shapes'].items()}
    parameters = sum(n for name, (n, _) in shapes.items() if name.startswith('params.'))
    written = (path / 'meta' / 'metadata').stat().mtime
    print(f'{path}: step {meta["step"]}, {parameters:,} parameters, {(time.time() - written) / 3600:.1f} h old')
    files = integrity.read(path)
    for item in integrity.ITEMS if files else ():
      sizes = [f['size'] for name, f in files.items() if name.startswith(f'{item}/')]
      print(f'  {item:6} {sum(sizes):,} bytes in {len(sizes)} files')
    if not files:
      print('  no manifest: what it holds can\'t be checked')
    print(f'  arrays {len(shapes)}, {sum(n * size for n, size in shapes.values()):,} bytes')
    if best := checkpoint.best(meta):
      where = f'step {best["step"]}' if best['step'] else 'the start, which is the parent'
      print(f'  best so far: {best["metric"]} {best["value"]:.4f} at {where}')
    print(f'  code {meta.get("code_version") or "unknown"}, parent {meta.get("parent") or "none"}')
  print(f'config of {paths[-1]}:')
  for key, value in flatten(meta['config']).items():
    print(f'  {key} = {json.dumps(value)}')


def _verify(paths: list[epath.Path]) -> None:
  """Prints one line per checkpoint. Exits with status 1 if any checkpoint is damaged or can't be checked."""
  bad = 0
  for path in paths:
    problem = integrity.damage(checkpoint.absolute(path), full=True)
    if not problem and not (path / integrity.NAME).exists():
      problem = f'{integrity.NAME}: missing, so what the checkpoint holds can\'t be checked'
    bad += bool(problem)
    print(f'{path}/{problem}' if problem else f'{path}: good')
  sys.exit(bad > 0)
