"""Runs launch/tpu.sh with the real gcloud: its flags, quoting, messages and exit statuses.

A server on this machine answers instead of Google's TPU API. Stand-ins for ssh and scp run commands in the workers'
folders. Nothing leaves this machine.
"""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.launch.fake_tpu import FakeTpu
from tests.launch.test_tpu_sh import Cloud

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
  not shutil.which('gcloud') or not shutil.which('tmux'), reason='needs gcloud and tmux')]
SSH = pathlib.Path(__file__).with_name('stub_ssh.py')
NODES, QUEUED = 'nodes', 'queuedResources'
ALWAYS = 1000


class RealCloud(Cloud):
  """Runs tpu.sh with the real gcloud, whose requests go to `api`."""

  def __init__(self, tmp):
    super().__init__(tmp)
    (self.stub / 'bin' / 'gcloud').unlink()
    for name in ('ssh', 'scp'):
      (self.stub / 'bin' / name).write_text(f'#!/bin/sh\nexec {sys.executable} {SSH} {name} "$@"\n')
      (self.stub / 'bin' / name).chmod(0o755)
    key = self.stub / '.ssh' / 'google_compute_engine'
    key.parent.mkdir()
    subprocess.run(['ssh-keygen', '-q', '-t', 'rsa', '-N', '', '-f', key], check=True)
    self.api = FakeTpu(self.stub)

  def environment(self, **settings):
    return {**super().environment(), **self.api.settings, 'CLOUDSDK_CONFIG': str(self.stub / 'gcloud'),
            'TPU_DOLLARS_PER_HOUR': '307.2', **settings}

  def __call__(self, *argv, **settings):
    process = self.start(*argv, **settings)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err

  def babysit(self, *flags, **settings):
    return self('--yes', *flags, 'babysit', 'run', 'true', **settings)


@pytest.fixture
def cloud(tmp_path):
  it = RealCloud(tmp_path)
  yield it
  for name in list(it.api.nodes):
    it.api.remove(name)
  it.api.close()


def test_every_verb_on_64_workers(cloud):
  """A slice of v5e-256: from `create` to `delete`, with arguments that quoting could spoil."""
  cloud.api.workers = 64
  odd = ["it's", 'two  words', '"$HOME"', '$(date)', 'a;b', '*', '', 'ß', '%USER%']
  show = 'import json,sys,os; json.dump(sys.argv[1:], open("../seen.tmp", "w")); os.rename("../seen.tmp", "../seen")'
  for argv in (['--yes', 'create'], ['push'], ['setup'], ['run', 'python', '-c', show, *odd]):
    code, _, err = cloud(*argv)
    assert code == 0, (argv, err)
  [(_, path, parameters, body)] = [request for request in cloud.api.requests if request[0] == 'POST'
                                   and request[1].endswith('/nodes')]
  assert path == '/v2/projects/my-project/locations/europe-west4-b/nodes' and parameters['nodeId'] == 'pod'
  assert body['acceleratorType'] == 'v5litepod-256' and body['runtimeVersion'] == 'v2-alpha-tpuv5-lite'
  for worker in range(64):
    cloud.wait_for(cloud.home(worker=worker) / 'betarank-run' / 'exit')
    assert (cloud.home(worker=worker) / 'seen').read_text() == json.dumps(odd)
    assert (cloud.home(worker=worker) / 'betarank' / '.commit').read_text().strip() == cloud.git(
      'rev-parse', '--short=12', 'HEAD')
  code, out, err = cloud('status')
  assert code == 0 and out.splitlines()[0] == 'READY' and out.count('betarank-state done') == 64, err
  assert cloud('stop')[0] == 0 and cloud('--yes', 'delete')[0] == 0
  assert cloud('state')[1].strip() == 'NONE' and not cloud.api.nodes and cloud('--yes', 'delete')[0] == 0


def test_two_queued_slices(cloud):
  """`create` makes a request for both, `push` reaches both, and `delete` removes them with the request."""
  settings = {'TPU_SLICES': '2', 'TPU_SPOT': '1', 'TPU_FLAGS': '--valid-until-duration=6h'}
  for argv in (['--yes', 'create'], ['push'], ['status']):
    code, out, err = cloud(*argv, **settings)
    assert code == 0, (argv, err)
  assert out.splitlines()[0] == 'READY' and out.count('betarank-state none') == 2
  [body] = [request[3] for request in cloud.api.requests if request[0] == 'POST' and request[1].endswith(QUEUED)]
  [spec] = body['tpu']['nodeSpec']
  assert spec['multisliceParams'] == {'nodeCount': 2, 'nodeIdPrefix': 'pod'} and 'spot' in body
  assert 'validUntilDuration' in str(body) or 'validUntilTime' in str(body)
  assert cloud('--yes', 'delete', **settings)[0] == 0
  [parameters] = [request[2] for request in cloud.api.requests if request[0] == 'DELETE']
  assert parameters['force'].lower() == 'true' and not cloud.api.nodes and not cloud.api.queued
  assert cloud('state', **settings)[1].strip() == 'NONE' and cloud('--yes', 'delete', **settings)[0] == 0


STOCKOUT = 'There is no more capacity in the zone "europe-west4-b"; you can try in another zone'


def test_a_stockout_is_waited_for(cloud):
  """The service accepts the request, and the operation then fails. The server's message is shown."""
  cloud.api.outcome = {'code': 8, 'message': STOCKOUT}
  process = cloud.start('--yes', '--delete', 'babysit', 'run', 'true', TPU_POLL='1')
  seen = []
  for line in process.stderr:
    seen.append(line)
    if 'no capacity; next try' in line:
      assert 'There is no more capacity' in line, line
      cloud.api.outcome = None
  assert process.wait() == 0, seen
  assert 'does not exist: nothing of it is billed' in seen[-1] and not cloud.api.nodes


@pytest.mark.parametrize('error, code, message, creates', [
  (['POST', NODES, 429, 'RESOURCE_EXHAUSTED', "Quota limit 'TPUV5s' has been exceeded. Limit: 0 in zone x."], 3,
   'has no quota', 1),
  (['POST', NODES, 404, 'NOT_FOUND', "Location europe-west4-b is not found or access is unauthorized."], 3,
   'Location europe-west4-b is not found', 1),
  (['POST', NODES, 400, 'INVALID_ARGUMENT', 'Accelerator type "v5litepod-256" is not available'], 3,
   'is not available', 1),
  (['GET', NODES, 403, 'PERMISSION_DENIED', "Permission 'tpu.nodes.get' denied on 'projects/my-project'"], 3,
   "Permission 'tpu.nodes.get' denied", 0),
  (['POST', NODES, 409, 'ABORTED', 'the service is busy'], 6, 'create failed, the failure number 2 in a row', 2)])
def test_refusals_of_the_server_end_the_watch(cloud, error, code, message, creates):
  cloud.api.errors.append([*error, ALWAYS])
  got, _, err = cloud.babysit('--delete', TPU_TRIES='2')
  assert got == code and message in err and cloud.api.verbs() == creates * ['POST nodes'], err
  last = err.splitlines()[-1]
  assert error[0] == 'GET' or last.startswith('tpu.sh: pod does not exist: nothing of it is billed; 0.00')


@pytest.mark.parametrize('reason, code, creates', [
  ('There is an internal problem in zone x', 6, 2), ('Quota limit TPUS_PER_PROJECT has been exceeded', 3, 1)])
def test_a_queued_resource_that_fails_ends_with_the_reason(cloud, reason, code, creates):
  cloud.api.created_state, cloud.api.failure = 'FAILED', reason
  got, _, err = cloud.babysit('--delete', TPU_QUEUED='1', TPU_TRIES='2')
  assert got == code and reason in err, err
  assert cloud.api.verbs()[:2] == [f'POST {QUEUED}', f'DELETE {QUEUED}/pod'] and not cloud.api.queued
  assert cloud.api.verbs().count(f'POST {QUEUED}') == creates
  assert err.splitlines()[-1].startswith('tpu.sh: pod does not exist: nothing of it is billed')


def test_a_setup_that_fails_ends_the_watch_and_the_slice(cloud):
  got, _, err = cloud.babysit('--delete', TPU_TRIES='2', TPU_SETUP='echo no disk >&2; exit 9')
  assert got == 6 and 'setup failed, the failure number 2 in a row' in err, err
  assert cloud.api.verbs() == ['POST nodes', 'DELETE nodes/pod']
  assert 'nothing of it is billed' in err.splitlines()[-1]


def test_a_preempted_slice_is_created_again(cloud):
  process = cloud.start('--yes', '--delete', 'babysit', 'run', 'bash', '-c',
                        'if [ -f ../../../again ]; then exit 0; fi; touch ../../../again; sleep 1000', TPU_POLL='1')
  cloud.wait_for(cloud.stub / 'nodes' / 'again')
  cloud.api.nodes['pod']['state'] = 'PREEMPTED'
  _, err = process.communicate(timeout=300)
  assert process.returncode == 0 and 'the slice is gone (PREEMPTED)' in err, err
  assert cloud.api.verbs() == 2 * ['POST nodes', 'DELETE nodes/pod']


def test_workers_that_refuse_connections_cost_the_slice_and_end_the_watch(cloud):
  """gcloud tries ten times, five seconds apart, and prints a traceback for each worker."""
  cloud.api.workers = 2
  (cloud.stub / 'unreachable').touch()
  code, _, err = cloud.babysit('--delete', TPU_TRIES='1', TPU_ASK_LIMIT='12')
  assert code == 6 and not cloud.api.nodes, err
  assert 'error: ssh failed, the failure number 1 in a row: ssh: connect to host 10.1.0.' in err
