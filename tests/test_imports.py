"""Imports point one way, and nothing happens when a module is imported."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LEAVES = {'configs', 'objectives', 'model', 'data'}
# Package -> what else of the project it may import. configs holds values and their loader, and stands below all.
ALLOWED = {
  'configs': set(),
  'objectives': {'configs'},
  'model': {'configs'},
  'data': {'configs'},
  'tasks': LEAVES,
  'runtime': LEAVES,
  'train': LEAVES | {'tasks', 'runtime'},
  'rl': LEAVES | {'tasks', 'runtime', 'train'},
  'eval': LEAVES | {'tasks', 'runtime', 'train'},
  'launch': LEAVES | {'tasks', 'runtime', 'train', 'rl', 'eval'},
}
FILES = [p for package in ALLOWED for p in sorted((ROOT / package).rglob('*.py'))]


def imported(path):
  """Packages of the project that a file imports, anywhere in it."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return {name.split('.')[1] for name in names if name.startswith('betarank.')}


def test_imports_point_one_way():
  for path in FILES:
    name = path.relative_to(ROOT)
    wrong = imported(path) & ALLOWED.keys() - ALLOWED[name.parts[0]] - {name.parts[0]}
    assert not wrong, f'{name} imports {wrong}'


@pytest.mark.parametrize('module', [
  '__main__', 'configs.load', 'objectives', 'model', 'data.command', 'tasks.verifiers', 'runtime.checkpoint',
  'train.loop', 'rl.loop',  'eval.generate', 'eval.report.command', 'launch.sweep', 'launch.plan.command'])
def test_nothing_happens_at_import(module):
  """Importing starts no JAX backend and prints nothing."""
  code = (f'import betarank.{module}, sys\n'
          'bridge = sys.modules.get("jax._src.xla_bridge")\n'
          'assert bridge is None or not bridge._backends, "a device was touched"')
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout == ''
