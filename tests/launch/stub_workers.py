"""Takes the place of the workers of a slice in tests: runs command lines in folders, which are the workers' homes."""

import os
import pathlib
import subprocess
import sys


def workers(node: pathlib.Path) -> list[pathlib.Path]:
  """Returns the home folders of the workers of a slice."""
  return sorted((path for path in node.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def run(home: pathlib.Path, command: str) -> int:
  """Runs a command line as ssh does on a worker. Returns its exit status.

  The worker's python3 records `-m pip` and `-m uv`, which would download. The python of its venv is this one.
  """
  venv, bin_folder = home / 'betarank-venv' / 'bin', home / 'bin'
  bin_folder.mkdir(exist_ok=True)
  (bin_folder / 'python3').write_text(
    f'#!/bin/sh\necho "$@" >>{home}/installed\ncase "$*" in\n'
    f'  "-m uv venv"*) mkdir -p {venv}; cp {bin_folder}/own_python {venv}/python;;\n'
    'esac\n')
  (bin_folder / 'own_python').write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
  (bin_folder / 'own_python').chmod(0o755)
  (bin_folder / 'python3').chmod(0o755)
  environment = {'PATH': f'{bin_folder}:/usr/local/bin:/usr/bin:/bin', 'HOME': str(home), 'TMUX_TMPDIR': str(home),
                 'LANG': 'C.UTF-8'}
  return subprocess.run(['bash', '-c', command], cwd=home, env=environment, stdin=subprocess.DEVNULL).returncode


def end_sessions(node: pathlib.Path) -> None:
  """Ends what runs on the workers of a slice."""
  for home in workers(node):
    subprocess.run(['tmux', 'kill-server'], env={**os.environ, 'TMUX_TMPDIR': str(home)}, stderr=subprocess.DEVNULL)
    pid = home / 'betarank-run' / 'pid'
    if pid.exists():
      subprocess.run(['kill', '-9', pid.read_text().strip()], stderr=subprocess.DEVNULL)
