"""Tests launch/examples/slurm.sh on a real Slurm cluster of three nodes: exit statuses, stops, jobs of two processes,
and a node that dies. Also prepare_slurm.sh, if a part fails.
"""

import collections
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import pytest

from betarank.runtime import checkpoint
from tests.launch import slurm_cluster
from tests.runs import environment, prepare

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / 'launch' / 'examples' / 'slurm.sh'

pytestmark = pytest.mark.skipif(bool(slurm_cluster.missing()), reason=f'needs {slurm_cluster.missing()} of Slurm')


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
  made = slurm_cluster.Cluster(tmp_path_factory.mktemp('slurm'), nodes=3)
  try:
    made.wait_until_up()
    yield made
  finally:
    made.stop()


def start(cluster, tmp_path, name, command, options='', **more):
  """Starts slurm.sh. The output of its job goes to tmp_path/NAME.log."""
  bin_folder = pathlib.Path(sys.executable).parent  # `betarank`
  settings = {**environment(), **cluster.environment, 'PATH': f'{bin_folder}:{slurm_cluster.PATH}',
              'SLURM_OPTIONS': options, 'SLURM_LOGS': str(tmp_path / '%x.log'), **more}
  return subprocess.Popen(['bash', SCRIPT, name, command], env=settings, cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_the_job_s_status_and_arguments_arrive(cluster, tmp_path):
  odd = ["it's", 'two  words', '$HOME', 'a;b', '*', '']
  show = f'import json, sys; json.dump(sys.argv[1:], open({str(tmp_path / "seen")!r}, "w")); sys.exit(7)'
  process = start(cluster, tmp_path, 'status', shlex.join([sys.executable, '-c', show, *odd]))
  assert process.wait(120) == 7, process.communicate()
  assert json.loads((tmp_path / 'seen').read_text()) == odd


WAITS = '''
import os, signal, sys, time
def stop(*_):
  time.sleep(1)
  open(sys.argv[1] + '/saved', 'w').close()
  sys.exit(143)
signal.signal(signal.SIGTERM, stop)
open(sys.argv[1] + '/started', 'a').write('x')
time.sleep(300)
'''


@pytest.mark.slow
def test_a_sigterm_reaches_the_run_which_saves(cluster, tmp_path):
  process = start(cluster, tmp_path, 'stops', shlex.join([sys.executable, '-c', WAITS, str(tmp_path)]))
  cluster.wait((tmp_path / 'started').exists)
  process.terminate()
  assert process.wait(120) == 143, process.communicate()
  assert (tmp_path / 'saved').exists()


@pytest.mark.slow
@pytest.mark.parametrize('when', ['submitting', 'pending', 'starting'])
def test_a_sigterm_before_the_run_has_started_ends_the_job(cluster, tmp_path, when):
  """Slurm refuses to send a signal to a job that waits, and sends none to the batch script before its tasks exist."""
  # `starting`: the job runs, but not yet its tasks. The wrappers wait before they call Slurm's program.
  for program, case in ('sbatch', 'submitting'), ('srun', 'starting'):
    path = tmp_path / program
    path.write_text(f'#!/bin/bash\ntouch {path}.called\n{"sleep 4" if when == case else ""}\n'
                    f'exec {shutil.which(program, path=slurm_cluster.PATH)} "$@"\n')
    path.chmod(0o755)
  process = start(cluster, tmp_path, when, shlex.join([sys.executable, '-c', WAITS, str(tmp_path)]),
                  '--begin=now+1hour' if when == 'pending' else '', PATH=f'{tmp_path}:{slurm_cluster.PATH}')
  if when == 'pending':
    cluster.wait(lambda: 'PD' in cluster.run('squeue', '--noheader', '--name=pending', '--format=%t'))
  else:
    cluster.wait((tmp_path / f'{"sbatch" if when == "submitting" else "srun"}.called').exists)
  process.terminate()
  assert process.wait(120) == 143, process.communicate()
  assert not cluster.run('squeue', '--noheader', f'--name={when}', '--states=PD,R').strip()


@pytest.mark.slow
def test_two_jobs_of_one_point_never_run_at_once(cluster, tmp_path):
  """The script is killed, but its job continues. The job of the next launch waits until the first job has ended."""
  command = shlex.join([sys.executable, '-c', WAITS, str(tmp_path)])
  first = start(cluster, tmp_path, 'single', command)
  cluster.wait((tmp_path / 'started').exists)
  first.kill()
  second = start(cluster, tmp_path, 'single', command)
  cluster.wait(lambda: 'Dependency' in cluster.run('squeue', '--noheader', '--name=single', '--format=%r'))
  assert (tmp_path / 'started').read_text() == 'x'
  cluster.run('scancel', '--signal=TERM', '--name=single', '--state=RUNNING')
  cluster.wait(lambda: (tmp_path / 'started').read_text() == 'xx', 120)
  second.terminate()
  assert second.wait(120) == 143


@pytest.mark.slow
def test_parts_of_data_are_combined_only_if_all_are_prepared(cluster, tmp_path):
  betarank = tmp_path / 'betarank'
  betarank.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n'
                      f'case "$*" in *--part=2/2*) [ -f {tmp_path}/good ] || exit 2;; esac\n')
  betarank.chmod(0o755)
  for code in (1, 0):
    done = subprocess.run(['bash', SCRIPT.with_name('prepare_slurm.sh'), '2', '--config=x'], text=True, timeout=300,
                          capture_output=True, cwd=tmp_path, env={
                            **os.environ, **cluster.environment, 'PATH': f'{tmp_path}:{slurm_cluster.PATH}'})
    assert done.returncode == code and ('were not combined' in done.stderr) == bool(code), done.stderr
    assert ('data finish --config=x' in (tmp_path / 'calls').read_text()) == (not code)
    (tmp_path / 'good').touch()


@pytest.mark.slow
def test_two_processes_on_two_nodes_are_one_run(cluster, tmp_path):
  prepare(f'tests/tiny.py:dir={tmp_path}/data')
  command = shlex.join(['betarank', 'train', f'--config=tests/tiny.py:dir={tmp_path}/data', f'--workdir={tmp_path}/run',
                        '--config.log.samples=0'])
  process = start(cluster, tmp_path, 'two', command, '--nodes=2 --ntasks=2 --ntasks-per-node=1')
  assert process.wait(900) == 0, (tmp_path / 'two.log').read_text()
  assert 'of 2 cpu, 2 processes' in (tmp_path / 'two.log').read_text()
  assert checkpoint.find(str(tmp_path / 'run')).name == '12'


@pytest.mark.slow
def test_a_sweep_whose_node_dies_does_every_step_once(cluster, tmp_path):
  """The sweep has 5 arms and 2 seeds, and runs three points at the same time.

  Slurm requeues the job of the dead node, which resumes from its checkpoint.
  """
  root = tmp_path / 'sweep'
  bin_folder = pathlib.Path(sys.executable).parent
  settings = {**environment(), **cluster.environment, 'PATH': f'{bin_folder}:{slurm_cluster.PATH}',
              'SLURM_OPTIONS': '--cpus-per-task=4', 'SLURM_LOGS': str(tmp_path / '%x.log')}
  launcher = subprocess.Popen(
    ['betarank', 'sweep', f'--config=tests/tiny_sweep.py:dir={tmp_path}/data,arms=5,seeds=2', '--only=*/train',
     f'--root={root}', '--parallel=3', f'--on=bash {SCRIPT} {{name}} {{command}}'],
    env=settings, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  victim, killed = root / 'arm1,seed0' / 'train', ''
  until = time.monotonic() + 1800
  while not killed:
    assert launcher.poll() is None and time.monotonic() < until, launcher.communicate()
    path = victim / 'metrics.jsonl'
    if path.exists() and path.read_text():
      jobs = cluster.run('squeue', '--noheader', '--states=R', '--format=%100j %N').splitlines()
      killed = next((line.split()[1] for line in jobs if line.startswith('arm1-seed0-train-')), '')
      if killed:
        cluster.kill_node(killed)
    time.sleep(0.1)
  out, err = launcher.communicate(timeout=3000)
  assert launcher.returncode == 0 and '11 finished, of 11' in out, out + err
  points = json.loads((root / 'sweep.json').read_text())['points']
  for name, point in points.items():
    assert point['status']['starts'] == 1, name
    if point['stage'] == 'train':
      lines = [json.loads(line) for line in (root / name / 'metrics.jsonl').read_text().splitlines()]
      steps = collections.Counter(line['step'] for line in lines if 'time/step_s' in line)
      assert steps == dict.fromkeys(range(1, 7), 1), name
  assert os.path.exists(victim / 'checkpoints' / '6')
