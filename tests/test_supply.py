"""Tests what is installed on pods and in images: each package has a version and hashes, and nothing runs as root."""

import ast
import functools
import importlib.metadata
import pathlib
import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOCK = ROOT / 'launch' / 'lock'
INSTALLERS = {'Dockerfile', 'launch/worker.sh', 'launch/examples/sky.yaml'}
# What runs on pods and in images. Only the INSTALLERS install something.
RUNS_THERE = ['Dockerfile', *sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'launch').rglob('*')
                                    if path.suffix in ('.sh', '.yaml', '.json'))]
NOT_LOCKED = {'tpu': set(), 'gpu': {'libtpu'}}  # tested packages that are not for these machines


@functools.cache
def locked(name):
  """Returns {package: version} of a file in launch/lock. Every package must have a version and a sha256."""
  text = re.sub(r' *#.*', '', (LOCK / name).read_text()).replace('\\\n', ' ')
  found = {}
  for line in filter(None, map(str.strip, text.splitlines())):
    package = re.fullmatch(r'([a-z0-9-]+)==([^ ;]+)(?: ;.*?)?((?:\s+--hash=sha256:[0-9a-f]{64})+)', line)
    assert package, f'launch/lock/{name}: {line}'  # this also refuses an address or another index
    found[package[1]] = Version(package[2])
  return found


def requirements():
  """Returns (core, extras) as setup.py has them: lists of requirements."""
  values = {target.id: ast.literal_eval(node.value) for node in ast.parse((ROOT / 'setup.py').read_text()).body
            if isinstance(node, ast.Assign) for target in node.targets if target.id in ('CORE', 'EXTRAS')}
  return [*map(Requirement, values['CORE'])], {name: [*map(Requirement, x)] for name, x in values['EXTRAS'].items()}


def pins():
  """Returns {package: its requirement with the tested version} of launch/constraints.txt."""
  lines = (ROOT / 'launch/constraints.txt').read_text().splitlines()
  return {canonicalize_name(pin.name): pin for pin in (Requirement(line) for line in lines if line[0] != '#')}


def test_every_tool_is_locked():
  assert locked('uv.txt').keys() == {'uv'} and locked('build.txt').keys() == {'setuptools'}


@pytest.mark.parametrize('extra', ['tpu', 'gpu'])
def test_the_lock_has_what_setup_requires(extra):
  core, extras = requirements()
  lock = locked(f'{extra}.txt')
  for need in core + extras[extra]:
    name = canonicalize_name(need.name)
    assert name in lock, f'{name} is missing; run `make lock`'
    assert need.specifier.contains(lock[name]), f'{need}: locked is {lock[name]}; run `make lock`'


@pytest.mark.parametrize('extra', ['tpu', 'gpu'])
def test_the_lock_has_the_versions_that_were_tested(extra):
  of, lock = pins(), locked(f'{extra}.txt')
  assert of.keys() - lock.keys() == NOT_LOCKED[extra]
  for name in of.keys() & lock.keys():
    assert of[name].specifier.contains(lock[name]), f'{of[name]}: locked is {lock[name]}; run `make lock`'


def test_the_versions_that_were_tested_go_together():
  """Checks that they meet the requirements of setup.py and each other's, for example that of jax for libtpu.

  Of the others' requirements, only those of packages that are installed here in the tested version are known.
  """
  of = pins()
  core, extras = requirements()
  here = {canonicalize_name(d.name): d for d in importlib.metadata.distributions()}
  needs = {'setup.py': [*core, *extras['tpu']], **{
    name: [*map(Requirement, here[name].requires or [])] for name, pin in of.items()
    if name in here and pin.specifier.contains(here[name].version)}}
  assert len(needs) > 1, 'no package is installed here in the tested version'
  for name, required in needs.items():
    for need in required:
      pin = of.get(canonicalize_name(need.name))
      if pin and (not need.marker or need.marker.evaluate({'extra': 'tpu'})):
        [version] = pin.specifier
        assert need.specifier.contains(version.version), f'{name} needs {need}, tested is {pin}'


def installs(text):
  """Returns the commands in `text` that install Python packages: pip, and the scripts' own function `install`."""
  text = re.sub(r'(?m)(^|\s)#.*', '', text.replace('\\\n', ' '))
  commands = map(str.strip, re.split(r'\n|&&|[;|]', text))
  found = [command for command in commands if re.search(r'\bpip[\d.]*\s+(-\S+\s+)*install\b|^install\b', command)]
  function = r'install\(\) \{ (python3 -m )?uv pip install --quiet --python \S+ "\$@"'  # gets what its calls say
  return [command for command in found if not re.fullmatch(function, command)]


def is_safe(command):
  """Returns True if an install command checks hashes, or installs only the tree that it runs in."""
  own = re.search(r'(-e|--editable) ("\$tree"|\.)$', command)
  return {'--no-deps', '--no-build-isolation'} <= set(command.split()) if own else '--require-hashes' in command.split()


@pytest.mark.parametrize('name', RUNS_THERE)
def test_pods_and_images_install_nothing_without_a_hash(name):
  text = (ROOT / name).read_text()
  found = installs(text)
  assert len(found) >= 3 if name in INSTALLERS else not found
  assert [command for command in found if not is_safe(command)] == []
  assert '--constraint' not in text


@pytest.mark.parametrize('text', [
  'RUN pip install requests', '  python3 -m pip install foo', 'a && pip3 -q install foo',
  'RUN a; \\\n  pip install -r x.txt', 'install foo', 'install() { pip install foo "$@"; }',
  'pip install --no-deps -e .', 'pip install --no-deps foo'])
def test_an_install_without_a_hash_is_found(text):
  assert not all(map(is_safe, installs(text)))


def test_the_image_does_not_run_as_root():
  """Only the last stage becomes the image. GKE's runAsNonRoot needs a number."""
  lines = (ROOT / 'Dockerfile').read_text().splitlines()
  last = lines[max(i for i, line in enumerate(lines) if line.startswith('FROM ')):]
  assert [line for line in last if line.startswith('USER ')] == ['USER 1000']
  assert last.index('USER 1000') < next(i for i, line in enumerate(last) if line.startswith('ENTRYPOINT'))
  for compiler in ('gcc', 'g++', 'clang', 'build-essential'):
    assert compiler not in '\n'.join(last)


def test_the_licence_of_every_package_is_listed():
  rows = [line.strip('| ').split(' | ') for line in (ROOT / 'docs/licences.md').read_text().splitlines()[7:]]
  listed = {row[0]: {Version(version) for version in row[1].split(' / ')} for row in rows}
  locks = [locked(f'{extra}.txt') for extra in ('tpu', 'gpu')]
  assert listed == {name: {lock[name] for lock in locks if name in lock} for lock in locks for name in lock}
  assert all(len(row) >= 3 and row[2] not in ('', '?') for row in rows), 'python tests/licences.py'
