"""Handles the workdir of a run: its config, its lock, and the version of the code that writes to it."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import subprocess
from collections.abc import Iterator
from typing import IO, Any

from etils import epath
from ml_collections import ConfigDict

from betarank.configs import renamed, settings
from betarank.configs.errors import ConfigError, UserError
from betarank.configs.files import open_no_follow, read_json, write_atomically
from betarank.configs.load import flatten, to_json
from betarank.runtime import lease


def check_config(workdir: epath.Path, config: ConfigDict, inherits: bool = False) -> None:
  """Raises ConfigError if the workdir holds a run that can't resume with this config.

  Settings with the role IDENTITY (configs/settings.py) must be unchanged. The message names the setting that differs.

  inherits: whether the run will take its model from a checkpoint (train/inherit.py). The settings that `config` has in
    their place aren't compared.
  """
  path = workdir / 'config.json'
  if not path.exists():
    return
  try:
    before = renamed.update(read_json(path))
  except (ValueError, AttributeError) as error:
    raise ConfigError(f'{path}: not a config ({error}); remove it to resume with the present one') from None
  before, now = flatten(before), flatten(json.loads(to_json(config)))
  for key in sorted(before.keys() | now.keys()):
    if inherits and (key.startswith('model.') or key == 'data.vocab_size'):
      continue
    missing = settings.when_missing(key)
    if _is_fixed(key, is_rl='rl.steps' in now) and before.get(key, missing) != now.get(key, missing):
      raise ConfigError(f'--workdir={workdir}: holds a run with config.{key} = {before.get(key)!r}, now '
                        f'{now.get(key)!r}; choose another workdir, or pass --config={path}')


def _is_fixed(key: str, is_rl: bool) -> bool:
  """Returns True if a setting must keep its value when a run resumes.

  Settings with the role IDENTITY must keep their values. So must settings that the user's own config has added to those
  in configs/settings.py. In RL, the settings in renamed.NOT_IN_RL may change, because RL doesn't read them.
  """
  if is_rl and any(key == name or key.startswith(f'{name}.') for name in renamed.NOT_IN_RL):
    return False
  try:
    return settings.role(key) == settings.IDENTITY
  except KeyError:
    return True


def write_config(workdir: epath.Path, config: ConfigDict) -> None:
  """Writes the resolved config to config.json, atomically."""
  write_atomically(workdir / 'config.json', to_json(config))


def write_json(path: epath.Path, values: dict[str, Any]) -> None:
  """Writes `values` as indented JSON, atomically."""
  write_atomically(path, json.dumps(values, indent=2) + '\n')


@contextlib.contextmanager
def lock_file(path: str | os.PathLike) -> Iterator[IO[str] | None]:
  """Locks and empties the local file at `path`, and yields it. Yields None if another process has locked the file.

  The lock is held until the block has ended and all child processes that inherited the file have ended. The operating
  system releases the lock even if these processes are killed.

  Raises:
    UserError: `path` is a symbolic link.
  """
  with open_no_follow(path, 'a+', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      yield None
    else:
      file.truncate(0)
      yield file


def holder(path: str | os.PathLike) -> str:
  """Returns the content of a lock file, a text that names the process that holds the lock."""
  return pathlib.Path(path).read_text(encoding='utf-8')


@contextlib.contextmanager
def claim(workdir: epath.Path, flag: str = '--workdir', lock: str = '.lock') -> Iterator[None]:
  """Locks a folder until the block ends: with a lock file, or with a lease (runtime/lease.py) if it is in a bucket.

  Args:
    workdir: the folder, which is created if needed.
    flag: the command-line flag that named the folder, for messages.
    lock: the name of the lock file or the lease in the folder.

  Raises:
    UserError: another command holds the lock, the lock is a symbolic link, or the folder can't be created or written.
  """
  taken = lambda by: UserError(f'{flag}={workdir}: {by} is at work there; stop it first')
  if '://' in str(workdir):
    with lease.hold(str(workdir), lock) as other:
      if other:
        raise taken(other)
      yield
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    open_no_follow(workdir / lock, 'a').close()
  except (FileExistsError, NotADirectoryError):
    raise UserError(f'{flag}={workdir}: is a file, or in a file, not a folder') from None
  except OSError as error:
    raise UserError(f'{flag}={workdir}: can\'t be created or written ({error.strerror})') from None
  with lock_file(workdir / lock) as held:
    if held is None:
      raise taken(holder(workdir / lock))
    held.write(f'process {os.getpid()} on {socket.gethostname()}')
    held.flush()
    yield


def code_version() -> str:
  """Returns the commit of this code, with a '+' at the end if files differ from the commit; '' if it is unknown.

  In a copy without git, the commit is read from the file `.commit`, which launch/tpu.sh and the Dockerfile write.
  """
  root = pathlib.Path(__file__).resolve().parent.parent
  if (root / '.commit').exists():
    return (root / '.commit').read_text(encoding='utf-8').strip()
  if not (root / '.git').exists():  # an installed wheel; it may be inside the checkout of another project
    return ''
  git = lambda *command: subprocess.run(
    ['git', '-C', str(root), *command], capture_output=True, text=True, timeout=20, check=True).stdout.strip()
  try:
    return git('rev-parse', '--short=12', 'HEAD') + ('+' if git('status', '--porcelain', '-uno') else '')
  except (OSError, subprocess.SubprocessError):
    return ''
