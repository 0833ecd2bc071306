"""Tests that imports go in one direction only, and that importing a module has no effect."""

import ast
import functools
import pathlib
import subprocess
import sys

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


@functools.cache
def imported(path):
  """Returns the names that a file imports, anywhere in the file."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def test_imports_point_one_way():
  for path in FILES:
    name = path.relative_to(ROOT)
    found = {of.split('.')[1] for of in imported(path) if of.startswith('betarank.')}
    wrong = found & ALLOWED.keys() - ALLOWED[name.parts[0]] - {name.parts[0]}
    assert not wrong, f'{name} imports {wrong}'


def test_a_folder_is_imported_as_a_part_of_the_package():
  """`import data` works in a checkout, and in the tests, but not where betarank is installed."""
  for path in [*FILES, ROOT / '__init__.py', ROOT / '__main__.py']:
    wrong = {of for of in imported(path) if of.split('.')[0] in {*ALLOWED, 'tests', 'benchmarks'}}
    assert not wrong, f'{path.relative_to(ROOT)} imports {wrong}'


UNUSED = '''
import sys
from betarank.configs import light_imports
from betarank.eval import generate, probe
from betarank.rl import loop
light_imports.reasoning_gym(), light_imports.tensorboardx()
large = {'grain', 'matplotlib', 'scipy', 'tensorflow', 'tensorflow_datasets', 'torch', 'wandb'}
print(*sorted(large & sys.modules.keys()))
'''


def test_rl_and_evaluation_import_no_large_library_that_they_do_not_use():
  done = subprocess.run([sys.executable, '-c', UNUSED], cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout.split() == []


IMPORT_ALL = '''
import contextlib, importlib, io, sys
from tests import offline
offline.forbid()
for name in sys.argv[1:]:
  try:
    importlib.import_module(name)
  except ModuleNotFoundError as error:
    assert error.name == 'lm_eval', error  # an extra
  bridge = sys.modules.get('jax._src.xla_bridge')
  assert bridge is None or not bridge._backends, f'{name} touches a device'
from betarank import __main__ as main
for command, (module, _) in main.COMMANDS.items():
  with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    importlib.import_module(f'betarank.{module}').main(['configs/smoke.py' if command == 'config' else '--help'])
'''


def test_nothing_happens_at_import():
  """Importing a module doesn't start a JAX backend, doesn't print anything and doesn't use a network. The help of a
  command doesn't use a network either.
  """
  names = ['.'.join(['betarank', *path.relative_to(ROOT).with_suffix('').parts]) for path in FILES]
  done = subprocess.run([sys.executable, '-c', IMPORT_ALL, *names], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout == ''
