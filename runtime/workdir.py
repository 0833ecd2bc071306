"""What a run keeps in its workdir besides checkpoints: its config, and where it comes from."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import subprocess
from collections.abc import Iterator
from typing import IO

from etils import epath
from ml_collections import ConfigDict

from betarank.configs.errors import ConfigError, UserError
from betarank.configs.files import write_atomically
from betarank.configs.load import flatten, to_json

# What may differ when a run goes on in its workdir: it changes how the run is carried out or watched, or how
# long it lasts; not what was learned so far.
MAY_CHANGE = ('data.dir', 'data.sources', 'data.tokenizer', 'train.tokens', 'train.microbatches', 'train.mesh',
              'train.init_from', 'model.remat_policy', 'model.attention', 'model.scan_layers', 'checkpoint', 'log')


def check_config(workdir: epath.Path, config: ConfigDict) -> None:
  """Raises ConfigError if the workdir holds a run that can't go on with this config; names the first difference."""
  path = workdir / 'config.json'
  if not path.exists():
    return
  try:
    before = json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ConfigError(f'{path}: not a config ({error}); remove it to go on with the present one') from None
  before, now = flatten(before), flatten(json.loads(to_json(config)))
  for key in sorted(before.keys() | now.keys()):
    if before.get(key) != now.get(key) and not any(key == k or key.startswith(k + '.') for k in MAY_CHANGE):
      raise ConfigError(f'--workdir={workdir}: holds a run with config.{key} = {before.get(key)!r}, now '
                        f'{now.get(key)!r}; choose another workdir, or pass --config={path}')


def write_config(workdir: epath.Path, config: ConfigDict) -> None:
  """Writes the resolved config to config.json, atomically."""
  write_atomically(workdir / 'config.json', to_json(config))


@contextlib.contextmanager
def lock_file(path: str | os.PathLike) -> Iterator[IO[str] | None]:
  """The emptied file at a local `path`, locked; None if somebody else holds it.

  The lock lasts as long as the block and any process that has inherited the file: it ends with its holders, however
  they end.
  """
  with open(path, 'a+', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      yield None
    else:
      file.truncate(0)
      yield file


def holder(path: str | os.PathLike) -> str:
  """What the one who holds a lock wrote of itself."""
  return pathlib.Path(path).read_text(encoding='utf-8')


@contextlib.contextmanager
def claim(workdir: epath.Path, flag: str = '--workdir', lock: str = '.lock') -> Iterator[None]:
  """Keeps a second run, or another with the same lock, out of a local folder; a bucket has no locks.

  Raises UserError, one line, if there is one.
  """
  if '://' in str(workdir):
    yield
    return
  workdir.mkdir(parents=True, exist_ok=True)
  with lock_file(workdir / lock) as held:
    if held is None:
      raise UserError(f'{flag}={workdir}: {holder(workdir / lock)} is at work there; stop it first')
    held.write(f'process {os.getpid()} on {socket.gethostname()}')
    held.flush()
    yield


def code_version() -> str:
  """The commit this code is from, with '+' if files differ from it; '' where that isn't known.

  A copy without git has it in the file `.commit` (launch/tpu.sh, Dockerfile).
  """
  root = pathlib.Path(__file__).resolve().parent.parent
  if (root / '.commit').exists():
    return (root / '.commit').read_text(encoding='utf-8').strip()
  if not (root / '.git').exists():  # an installed wheel inside somebody else's checkout
    return ''
  git = lambda *command: subprocess.run(
    ['git', '-C', str(root), *command], capture_output=True, text=True, timeout=20, check=True).stdout.strip()
  try:
    return git('rev-parse', '--short=12', 'HEAD') + ('+' if git('status', '--porcelain', '-uno') else '')
  except (OSError, subprocess.SubprocessError):
    return ''
