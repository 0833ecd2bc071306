"""Tests what is installed on pods and in images: each package has a version and hashes, and nothing runs as root."""

import ast
import functools
import pathlib
import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOCK = ROOT / 'launch' / 'lock'
INSTALLERS = ('Dockerfile', 'launch/worker.sh', 'launch/examples/sky.yaml')


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
  pins = [Requirement(line) for line in (ROOT / 'launch/constraints.txt').read_text().splitlines() if line[0] != '#']
  lock = locked(f'{extra}.txt')
  for pin in pins:
    version = lock.get(canonicalize_name(pin.name))
    assert version is None or pin.specifier.contains(version), f'{pin}: locked is {version}; run `make lock`'


@pytest.mark.parametrize('name', INSTALLERS)
def test_pods_and_images_install_nothing_without_a_hash(name):
  text = re.sub(r'\\\n', ' ', (ROOT / name).read_text())
  installs = [line.strip() for line in re.split(r'\n|&&', text)
              if re.search(r'\b(pip )?install .*(-r|-e|--requirement|--editable)\b', line)]
  assert len(installs) >= 3
  for line in installs:
    own = re.search(r'(-e|--editable) ("\$tree"|\.)$', line.split(' &&')[0])
    assert ('--no-deps' in line and '--no-build-isolation' in line) if own else '--require-hashes' in line, line
  assert 'pip install uv' not in text and '--constraint' not in text


def test_the_image_does_not_run_as_root():
  lines = (ROOT / 'Dockerfile').read_text().splitlines()
  assert [line for line in lines if line.startswith('USER ')][-1] == 'USER 1000'
  assert lines.index('USER 1000') < next(i for i, line in enumerate(lines) if line.startswith('ENTRYPOINT'))
  # GKE's runAsNonRoot needs a number, and the last stage has no compiler.
  assert 'gcc' not in '\n'.join(lines[max(i for i, line in enumerate(lines) if line.startswith('FROM ')):])


def test_the_licence_of_every_package_is_listed():
  rows = [line.strip('| ').split(' | ') for line in (ROOT / 'docs/licences.md').read_text().splitlines()[7:]]
  listed = {row[0]: {Version(version) for version in row[1].split(' / ')} for row in rows}
  locks = [locked(f'{extra}.txt') for extra in ('tpu', 'gpu')]
  assert listed == {name: {lock[name] for lock in locks if name in lock} for lock in locks for name in lock}
  assert all(len(row) >= 3 and row[2] not in ('', '?') for row in rows), 'python tests/licences.py'
