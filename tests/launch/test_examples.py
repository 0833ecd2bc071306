"""Tests the examples in launch/examples that run points on GKE, SkyPilot and this machine's GPUs. Stand-ins replace
kubectl, sky and betarank.
"""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / 'launch' / 'examples'
COMMAND = shlex.join(['betarank', 'train', '--config=a b', "--x=it's", '--y=$HOME & \\1'])

# Records its arguments and input. `get` prints the state that the test has written. All calls fail if the file `down`
# exists, and `create` if `forbidden` does.
STAND_IN = '''#!{python}
import json, os, pathlib, signal, sys, time
here = pathlib.Path(os.environ['HERE'])
text = sys.stdin.read() if '--filename=-' in sys.argv else ''
with open(here / 'calls.jsonl', 'a') as file:
  file.write(json.dumps([sys.argv[1:], text]) + '\\n')
if (here / 'down').exists():
  sys.exit('Unable to connect to the server')
if sys.argv[1] == 'create':
  if (here / 'forbidden').exists():
    sys.exit('Forbidden')
  (here / 'state').write_text('Running')
if sys.argv[1] == 'get':
  if (here / 'state').exists():
    state = (here / 'state').read_text()
    [template] = [word.removeprefix('--output=jsonpath=') for word in sys.argv if word.startswith('--output=')]
    print(template.replace('{{.status.terminalState}}', '' if state == 'Running' else state), end='')
  elif '--ignore-not-found' not in sys.argv:
    sys.exit('NotFound')
if sys.argv[1:3] == ['jobs', 'launch']:
  time.sleep(1)  # until the job is submitted
  (here / 'launched').touch()
  status = here / 'status'
  while not status.exists():
    time.sleep(0.05)
  sys.exit(int(status.read_text()))
if sys.argv[1:3] == ['jobs', 'cancel'] and (here / 'launched').exists():
  (here / 'status').write_text('1')
'''


class Engine:
  """A folder with a stand-in for `program`, and the example script that calls this program."""

  def __init__(self, folder, program, script):
    self.folder, self.script = folder, EXAMPLES / script
    (folder / 'bin').mkdir()
    (folder / 'bin' / program).write_text(STAND_IN.format(python=sys.executable))
    (folder / 'bin' / program).chmod(0o755)

  def start(self, *arguments):
    settings = {**os.environ, 'PATH': f'{self.folder / "bin"}:{os.environ["PATH"]}', 'HERE': str(self.folder),
                'IMAGE': 'registry/image:1', 'QUEUE': 'queue', 'POLL_S': '0.1'}
    return subprocess.Popen(['bash', self.script, *arguments], env=settings, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)

  def calls(self, verb):
    path = self.folder / 'calls.jsonl'
    calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [call for call in calls if verb in call[0]]

  def wait(self, holds):
    for _ in range(600):
      if holds():
        return
      time.sleep(0.05)
    raise AssertionError((self.folder / 'calls.jsonl').read_text())


@pytest.fixture
def jobset(tmp_path):
  return Engine(tmp_path, 'kubectl', 'jobset.sh')


def manifest(engine):
  yaml = pytest.importorskip('yaml')
  out, err = engine.start('--print', 'job-1', COMMAND).communicate(timeout=60)
  assert out, err
  return yaml.safe_load(out)


def test_the_manifest_runs_the_command_as_it_is(jobset):
  made = manifest(jobset)
  assert made['metadata']['name'] == 'job-1'
  job = made['spec']['replicatedJobs'][0]['template']['spec']
  [container] = job['template']['spec']['containers']
  assert container['image'] == 'registry/image:1'
  [line] = container['args']
  assert shlex.split(line) == ['exec', *shlex.split(COMMAND), '--coordinator=auto']
  assert job['parallelism'] == job['completions']


@pytest.mark.parametrize('state, status', [('Completed', 0), ('Failed', 1)])
def test_a_jobset_is_waited_for_and_removed(jobset, state, status):
  process = jobset.start('job-1', COMMAND)
  jobset.wait(lambda: len(jobset.calls('get')) > 2)
  assert process.poll() is None
  (jobset.folder / 'state').write_text(state)
  assert process.wait(60) == status
  [(_, text)] = jobset.calls('create')
  assert 'name: job-1' in text and len(jobset.calls('delete')) == 1


def test_a_jobset_that_lives_on_is_not_created_again_and_a_stop_deletes_it(jobset):
  (jobset.folder / 'state').write_text('Running')
  process = jobset.start('job-1', COMMAND)
  jobset.wait(lambda: len(jobset.calls('get')) > 2)
  process.send_signal(signal.SIGTERM)
  assert process.wait(60) == 143
  assert not jobset.calls('create')
  assert jobset.calls('delete') == [[['delete', 'jobset', 'job-1', '--ignore-not-found', '--wait=true'], '']]


def test_a_stop_deletes_a_jobset_even_if_the_cluster_does_not_answer_at_first(jobset):
  (jobset.folder / 'state').write_text('Running')
  process = jobset.start('job-1', COMMAND)
  jobset.wait(lambda: len(jobset.calls('get')) > 2)
  (jobset.folder / 'down').touch()
  process.send_signal(signal.SIGTERM)
  jobset.wait(lambda: len(jobset.calls('delete')) > 1)
  assert process.poll() is None
  (jobset.folder / 'down').unlink()
  assert process.wait(60) == 143


def test_a_jobset_that_can_not_be_created_ends_with_one_line(jobset):
  (jobset.folder / 'forbidden').touch()
  _, err = jobset.start('job-1', COMMAND).communicate(timeout=120)
  assert len(jobset.calls('create')) == 20
  assert err.splitlines()[-1] == "jobset.sh: JobSet job-1 could not be found or created; kubectl's messages are above"


@pytest.mark.parametrize('exists', [True, False])
def test_a_jobset_that_someone_else_deletes_ends_the_wait(jobset, exists):
  if exists:
    (jobset.folder / 'state').write_text('Running')
  process = jobset.start('job-1', COMMAND)
  jobset.wait(lambda: len(jobset.calls('get')) > 2)
  (jobset.folder / 'state').unlink()
  assert process.wait(60) == 1 and 'JobSet job-1 is gone' in process.stderr.read()
  assert len(jobset.calls('create')) == (not exists) and not jobset.calls('delete')


@pytest.mark.parametrize('exists', [True, False])
def test_a_cluster_that_does_not_answer_is_asked_again(jobset, exists):
  """A failed question doesn't mean that the JobSet is missing, neither before it is created nor after."""
  if exists:
    (jobset.folder / 'state').write_text('Running')
  (jobset.folder / 'down').touch()
  process = jobset.start('job-1', COMMAND)
  jobset.wait(lambda: len(jobset.calls('get')) > 2)
  assert process.poll() is None and not jobset.calls('create')
  (jobset.folder / 'down').unlink()
  jobset.wait((jobset.folder / 'state').exists)
  asked = len(jobset.calls('get'))
  jobset.wait(lambda: len(jobset.calls('get')) > asked + 1)
  (jobset.folder / 'down').touch()
  asked = len(jobset.calls('get'))
  jobset.wait(lambda: len(jobset.calls('get')) > asked + 2)
  assert process.poll() is None
  (jobset.folder / 'state').write_text('Completed')
  (jobset.folder / 'down').unlink()
  assert process.wait(60) == 0 and len(jobset.calls('create')) == (not exists)


# Stands for a job that waits: sbatch prints its id after a second, and ends once scancel was called for waiting jobs.
WAITING_JOB = {
  'sbatch': 'touch "$HERE/called"; sleep 1; echo "7;here"; until [ -f "$HERE/cancelled" ]; do sleep 0.1; done',
  'scancel': 'echo "$*" >>"$HERE/asked"; [[ "$*" != "--state=PENDING 7" ]] || touch "$HERE/cancelled"',
  'squeue': '[ -f "$HERE/cancelled" ] || [[ "$*" != *--states=PENDING* ]] || echo 7'}


def test_slurm_cancels_a_job_that_waits(tmp_path):
  """Even if the signal arrives before sbatch has printed the job's id. tests/launch/test_slurm.py has a real Slurm."""
  for name, line in WAITING_JOB.items():
    (tmp_path / name).write_text(f'#!/bin/bash\n{line}\n')
    (tmp_path / name).chmod(0o755)
  process = subprocess.Popen(['bash', EXAMPLES / 'slurm.sh', 'job-1', COMMAND], text=True, stderr=subprocess.PIPE, env={
    **os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'HERE': str(tmp_path)})
  while not (tmp_path / 'called').exists():
    assert process.poll() is None, process.communicate()
    time.sleep(0.05)
  process.terminate()
  _, err = process.communicate(timeout=60)
  assert process.returncode == 143 and not err
  assert (tmp_path / 'asked').read_text() == '--state=PENDING 7\n'


@pytest.fixture
def sky(tmp_path):
  return Engine(tmp_path, 'sky', 'sky.sh')


def test_sky_passes_the_command_and_the_status_on(sky):
  (sky.folder / 'status').write_text('100')
  assert sky.start('job-1', COMMAND).wait(60) == 100
  [(arguments, _)] = sky.calls('launch')
  assert arguments == ['jobs', 'launch', '--yes', '--name', 'job-1', '--env', f'COMMAND={COMMAND}',
                       str(EXAMPLES / 'sky.yaml')]


@pytest.mark.parametrize('submitted', [True, False])
def test_sky_cancels_on_a_stop(sky, submitted):
  process = sky.start('job-1', COMMAND)
  sky.wait((sky.folder / 'launched').exists if submitted else (sky.folder / 'calls.jsonl').exists)
  process.send_signal(signal.SIGTERM)
  assert process.wait(60) == 143 and (sky.folder / 'status').exists()  # the job has ended
  assert sky.calls('cancel')[-1] == [['jobs', 'cancel', '--yes', '--name', 'job-1'], '']


@pytest.mark.parametrize('nodes, expected', [
  ({'SKYPILOT_NUM_GPUS_PER_NODE': '0'}, ['--coordinator=auto']),
  ({'SKYPILOT_NUM_GPUS_PER_NODE': '8', 'SKYPILOT_NODE_IPS': '10.0.0.1\n10.0.0.2', 'SKYPILOT_NUM_NODES': '2',
    'SKYPILOT_NODE_RANK': '1'}, ['--coordinator=10.0.0.1:8476', '--processes=2', '--process_id=1'])])
def test_sky_s_run_section_tells_each_host_its_place(tmp_path, nodes, expected):
  yaml = pytest.importorskip('yaml')
  run = yaml.safe_load((EXAMPLES / 'sky.yaml').read_text())['run']
  (tmp_path / 'betarank').write_text(f'#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n')
  (tmp_path / 'betarank').chmod(0o755)
  done = subprocess.run(['bash', '-c', run], text=True, capture_output=True, env={
    'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'HOME': str(tmp_path), 'COMMAND': COMMAND, **nodes})
  assert json.loads(done.stdout) == [*shlex.split(COMMAND)[1:], *expected], done.stderr


def start_on_card(folder, slot, **variables):
  """Starts cards.sh with these environment variables. The command is a stand-in for betarank that prints what it got.
  """
  betarank = folder / 'betarank'
  betarank.write_text('#!/bin/sh\nprintf "%s\\n" "$$" "$CUDA_VISIBLE_DEVICES" "$XLA_PYTHON_CLIENT_MEM_FRACTION" "$@"\n')
  betarank.chmod(0o755)
  environment = {name: value for name, value in os.environ.items() if name != 'CUDA_VISIBLE_DEVICES'} | {
    'PATH': f'{folder}:{os.environ["PATH"]}', 'XLA_PYTHON_CLIENT_MEM_FRACTION': '', **variables}
  return subprocess.Popen(['bash', EXAMPLES / 'cards.sh', str(slot), COMMAND], env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize('slot, per_card, card, share', [(0, 1, '0', ''), (3, 1, '3', ''), (6, 2, '2', '0.45')])
def test_a_point_gets_one_card_and_its_share_of_the_memory(tmp_path, slot, per_card, card, share):
  process = start_on_card(tmp_path, slot, CARDS='4', PER_CARD=str(per_card))
  pid, *given = process.communicate(timeout=60)[0].splitlines()
  assert given == [card, share, *shlex.split(COMMAND)[1:]]
  assert int(pid) == process.pid  # a signal to the script reaches the run


@pytest.mark.parametrize('slot, variables, card', [
  (0, {}, '5'), (3, {}, 'GPU-8f1c'), (2, {'CARDS': '2'}, '5')])
def test_a_point_gets_one_of_the_cards_that_the_user_was_given(tmp_path, slot, variables, card):
  process = start_on_card(tmp_path, slot, CUDA_VISIBLE_DEVICES='5,GPU-8f1c', **variables)
  assert process.communicate(timeout=60)[0].splitlines()[1] == card


@pytest.mark.parametrize('visible, variables, message', [
  ('5,6', {'CARDS': '3'}, 'CARDS=3, but there are 2 GPUs; CUDA_VISIBLE_DEVICES=5,6'),
  ('', {}, 'CARDS=0, but there are 0 GPUs')])
def test_cards_that_the_user_was_not_given_are_refused(tmp_path, visible, variables, message):
  process = start_on_card(tmp_path, 0, CUDA_VISIBLE_DEVICES=visible, **variables)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 2 and not out and message in err
