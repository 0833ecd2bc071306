"""Takes the place of `gcloud` in tests: records its calls, keeps slices as folders, and runs ssh commands in workers'
folders.

    STUB/calls.jsonl           every command line
    STUB/fail.json             calls that fail: [{"match": text of a command line, "stderr": ..., "code": 1, "times": 1,
                               "seconds": 0}, ...]
    STUB/nodes/NAME/state      the state of a slice: READY, PREEMPTED, ...
    STUB/queued/NAME           a queued resource
    STUB/nodes/NAME/0, 1, ...  the workers' home folders
    STUB/workers               the number of workers; 1 if there is no such file
    STUB/created_state         the state of new slices; READY if there is no such file
    STUB/message               the reason why slices are FAILED
"""

import fcntl
import json
import os
import pathlib
import shutil
import sys
import time

import stub_workers

STUB = pathlib.Path(os.environ['STUB'])


def main(argv):
  with open(STUB / 'calls.jsonl', 'a') as calls:
    fcntl.flock(calls, fcntl.LOCK_EX)
    calls.write(json.dumps(argv) + '\n')
  text, rules = ' '.join(argv), STUB / 'fail.json'
  for rule in (plan := json.loads(rules.read_text()) if rules.exists() else []):
    if rule['match'] in text and rule.get('times', 1):
      rule['times'] = rule.get('times', 1) - 1
      rules.write_text(json.dumps(plan))
      time.sleep(rule.get('seconds', 0))
      print(rule['stderr'], file=sys.stderr)
      return rule.get('code', 1)
  argv = argv[argv[0] == 'alpha' :]
  assert argv[:2] == ['compute', 'tpus'], argv
  kind, verb, name = argv[2:5]
  flags = dict(a[2:].partition('=')[::2] for a in argv[5:] if a.startswith('--'))
  return globals()[verb](kind, name, flags, argv)


def missing(kind, name, verb, argv):
  """Prints gcloud's error for a slice that doesn't exist."""
  flags = dict(a[2:].partition('=')[::2] for a in argv[5:] if a.startswith('--'))
  of = 'queuedResources' if kind == 'queued-resources' else 'nodes'
  print(f"ERROR: (gcloud.compute.tpus.{kind}.{verb}) NOT_FOUND: Resource 'projects/{flags['project']}/locations/"
        f"{flags['zone']}/{of}/{name}' was not found. This command is authenticated as someone@example.org",
        file=sys.stderr)
  return 1


def create(kind, name, flags, _):
  count = int((STUB / 'workers').read_text()) if (STUB / 'workers').exists() else 1
  state = (STUB / 'created_state').read_text() if (STUB / 'created_state').exists() else 'READY'
  nodes = [name]
  if kind == 'queued-resources':
    nodes = [flags['node-id']] if 'node-id' in flags else [
      f'{flags["node-prefix"]}-{i}' for i in range(int(flags['node-count']))]
    (STUB / 'queued').mkdir(exist_ok=True)
    (STUB / 'queued' / name).write_text(' '.join(nodes))
  for node in nodes:
    for i in range(count):
      (STUB / 'nodes' / node / str(i)).mkdir(parents=True)
    (STUB / 'nodes' / node / 'state').write_text(state)
  return 0


def delete(kind, name, _flags, argv):
  nodes = [name]
  if not (STUB / ('queued' if kind == 'queued-resources' else 'nodes') / name).exists():
    return missing(kind, name, 'delete', argv)
  if kind == 'queued-resources':
    nodes = (STUB / 'queued' / name).read_text().split()
    (STUB / 'queued' / name).unlink()
  for node in nodes:
    stub_workers.end_sessions(STUB / 'nodes' / node)
    shutil.rmtree(STUB / 'nodes' / node)
  return 0


def describe(kind, name, flags, argv):
  node = STUB / 'nodes' / name
  if kind == 'queued-resources':
    entry = STUB / 'queued' / name
    node = STUB / 'nodes' / entry.read_text().split()[0] if entry.exists() else entry
  if not node.exists():
    return missing(kind, name, 'describe', argv)
  state = (node / 'state').read_text()
  if 'failedData' in flags['format']:
    state = (STUB / 'message').read_text()
  elif kind == 'queued-resources':
    state = {'READY': 'ACTIVE', 'PREEMPTED': 'SUSPENDED'}.get(state, state)
  print(state)
  return 0


def scp(_kind, source, flags, argv):
  node, _, target = argv[5].partition(':')
  for home in stub_workers.workers(STUB / 'nodes' / node):
    shutil.copy(source, home / target)
  return 0


def ssh(_kind, node, flags, _):
  homes = stub_workers.workers(STUB / 'nodes' / node)
  chosen = homes if flags['worker'] == 'all' else [homes[int(flags['worker'])]]
  codes = [stub_workers.run(home, flags['command']) for home in chosen]
  return next((code for code in codes if code), 0)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
