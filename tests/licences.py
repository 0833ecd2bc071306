"""Prints docs/licences.md, from the packages of launch/lock and their own metadata: python tests/licences.py [REPORT]

It must run in an environment with the packages of launch/lock/tpu.txt. REPORT has the metadata of those that only
gpu.txt has. They need not be installed, but pip downloads them (2 GB):

    pip install --dry-run --no-deps --ignore-installed --report=REPORT --requirement=launch/lock/gpu.txt
"""

import importlib.metadata
import json
import pathlib
import re
import sys

LOCK = pathlib.Path(__file__).resolve().parent.parent / 'launch' / 'lock'
# What the metadata of a package doesn't say, from the LICENSE file that it installs.
KNOWN = {'zss': 'BSD License'}
HEAD = '''# Licences of what is installed

betarank is Apache 2.0 ([LICENSE](../LICENSE)). It contains no code of these packages; a pod or an image installs them
(`launch/lock`). The licences are what each package's metadata says. `python tests/licences.py` writes this table.

| package | version | licence | with |
|---|---|---|---|'''


def names(lock: str) -> dict[str, str]:
  """Returns {package: version} of a file in launch/lock."""
  return dict(re.findall(r'^([a-z0-9-]+)==([^ ]+)', (LOCK / lock).read_text(), re.M))


def licence(metadata: dict[str, list[str]]) -> str:
  """Returns a package's licence as its metadata names it: an SPDX expression if there is one, or the classifiers, or
  the first line of the text; '' if nothing is said.

  metadata: {field in small letters: values}.
  """
  if found := metadata.get('license-expression'):
    return found[0]
  classified = [c.rsplit(' :: ', 1)[-1] for c in metadata.get('classifier', []) if c.startswith('License ::')]
  classified = [c for c in classified if c != 'OSI Approved']
  text = (metadata.get('license') or [''])[0].strip().split('\n')[0]
  return ', '.join(classified) or text[:60]


def main() -> None:
  found = {}
  for distribution in importlib.metadata.distributions():
    fields = distribution.metadata
    name = re.sub(r'[-_.]+', '-', fields['Name']).lower()
    found[name] = {key.lower(): fields.get_all(key) for key in set(fields.keys())}
  for path in sys.argv[1:]:
    for item in json.loads(pathlib.Path(path).read_text())['install']:
      values = {key.replace('_', '-'): [value] if isinstance(value, str) else value
                for key, value in item['metadata'].items()}
      found.setdefault(re.sub(r'[-_.]+', '-', values['name'][0]).lower(), values)
  locks = {extra: names(f'{extra}.txt') for extra in ('tpu', 'gpu')}
  print(HEAD)
  for name in sorted(locks['tpu'] | locks['gpu']):
    versions = ' / '.join(dict.fromkeys(lock[name] for lock in locks.values() if name in lock))
    only = '' if all(name in lock for lock in locks.values()) else ', '.join(x for x in locks if name in locks[x])
    print(f'| {name} | {versions} | {KNOWN.get(name) or licence(found.get(name, {})) or "?"} | {only} |')


if __name__ == '__main__':
  main()
