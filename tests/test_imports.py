"""Imports point one way, and nothing happens when a module is imported."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Package -> what else of the project it may import. configs holds values and their loader, and stands below all.
ALLOWED = {
  'configs': set(),
  'objectives': set(),
  'model': set(),
  'data': set(),
  'train': {'configs', 'objectives', 'model', 'data'},
  'rl': {'configs', 'objectives', 'model', 'data', 'train'},
  'eval': {'configs', 'objectives', 'model', 'data', 'train', 'rl'},
  'launch': {'configs', 'objectives', 'model', 'data', 'train', 'rl', 'eval'},
}
# Command lines of leaves stand on top of their package and may import more; nothing imports them.
COMMANDS = {'data/__main__.py': {'configs'}, 'model/hf.py': {'configs', 'data', 'train'}}
FILES = [p for package in ALLOWED for p in sorted((ROOT / package).rglob('*.py'))]


def imported(path):
  """Top-level names that a file imports, anywhere in it."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name.split('.')[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      names.add(node.module.split('.')[0])
  return names


def test_imports_point_one_way():
  for path in FILES:
    name = path.relative_to(ROOT)
    package = name.parts[0]
    wrong = (imported(path) & ALLOWED.keys()) - ALLOWED[package] - COMMANDS.get(str(name), set()) - {package}
    assert not wrong, f'{name} imports {wrong}'


def test_commands_are_imported_by_nothing():
  for path in FILES:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ImportFrom):
        modules = {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
      else:
        modules = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
      wrong = {f'{module.replace(".", "/")}.py' for module in modules} & COMMANDS.keys()
      assert not wrong, f'{path.relative_to(ROOT)} imports {wrong}'


@pytest.mark.parametrize('module', ['configs.load', 'objectives', 'model', 'data', 'train.loop'])
def test_nothing_happens_at_import(module):
  """Importing starts no JAX backend and prints nothing."""
  code = (f'import {module}, sys\n'
          'bridge = sys.modules.get("jax._src.xla_bridge")\n'
          'assert bridge is None or not bridge._backends, "a device was touched"')
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout == ''
