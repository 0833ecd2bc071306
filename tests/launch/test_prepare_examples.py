"""Tests the examples in launch/examples that prepare data on several machines: each part is started exactly once.

In place of `betarank`, the parts run a stand-in that records its arguments. tests/data tests that the parts together
are the whole data set.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / 'launch' / 'examples'
BETARANK = '#!{python}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n'

# As sbatch does it: an array runs once per index, a dependent job only if it succeeded, and prints `ID;CLUSTER`. With
# --wait, the status is that of the job, but 0 if the job was cancelled before it ran.
SBATCH = '''#!{python}
import json, os, pathlib, re, subprocess, sys
here = pathlib.Path(os.environ['HERE'])
options = [a for a in sys.argv[1:] if a.startswith('--')][:sys.argv[1:].index(os.environ['SCRIPT'])]
command = sys.argv[1 + len(options):]
jobs = here / 'jobs.jsonl'
number = len(jobs.read_text().splitlines()) + 1 if jobs.exists() else 1
array = next((re.fullmatch('--array=1-([0-9]+)', a)[1] for a in options if a.startswith('--array')), '')
before = next((a.split('=')[1] for a in options if a.startswith('--dependency')), '')
failed = []
if before and os.environ.get('REFUSED'):
  sys.exit('sbatch: error: Batch job submission failed')
if not before or json.loads(jobs.read_text().splitlines()[int(before.split(':')[1]) - 1])['failed'] == []:
  for index in range(1, int(array) + 1) if array else ['']:
    more = {{'SLURM_ARRAY_TASK_ID': str(index), 'SLURM_CPUS_ON_NODE': '4'}}
    done = subprocess.run(['bash', *command], env={{**os.environ, **more}}, text=True, stdout=subprocess.PIPE)
    (here / f'{{number}}.{{index}}').write_text(done.stdout)
    if done.returncode or str(index) == os.environ.get('FAILS'):
      failed.append(index)
else:
  failed = ['dependency']
with open(jobs, 'a') as file:
  file.write(json.dumps(dict(options=options, failed=failed)) + '\\n')
print(f'{{number}};cluster')
sys.exit(bool(failed) and failed != ['dependency'] and '--wait' in options)
'''
SCONTROL = '''#!{python}
import json, os, pathlib, sys
job = json.loads((pathlib.Path(os.environ['HERE']) / 'jobs.jsonl').read_text().splitlines()[int(sys.argv[-1]) - 1])
print(f'JobId={{sys.argv[-1]}}\\n   JobState={{"CANCELLED" if job["failed"] else "COMPLETED"}} Reason=None')
'''
SCANCEL = '#!/bin/sh\necho "$*" >>"$HERE/cancelled"\n'


@pytest.fixture
def folder(tmp_path):
  for name, text in (('betarank', BETARANK), ('sbatch', SBATCH), ('scancel', SCANCEL), ('scontrol', SCONTROL)):
    (tmp_path / name).write_text(text.format(python=sys.executable))
    (tmp_path / name).chmod(0o755)
  return tmp_path


def run(folder, *command, **settings):
  return subprocess.run(['bash', *map(str, command)], text=True, capture_output=True, env={
    **os.environ, 'PATH': f'{folder}:{os.environ["PATH"]}', 'HERE': str(folder), **settings})


def test_a_slurm_array_prepares_each_part_and_then_combines_them(folder):
  script, flags = EXAMPLES / 'prepare_slurm.sh', ['--config=a b', "--config.data.dir=it's"]
  done = run(folder, script, 3, *flags, SCRIPT=str(script), SLURM_OPTIONS='--exclusive --mem=0')
  assert done.returncode == 0, done.stderr
  array, finish = map(json.loads, (folder / 'jobs.jsonl').read_text().splitlines())
  assert {'--exclusive', '--mem=0', '--array=1-3'} <= set(array['options'])
  assert {'--wait', '--dependency=afterok:1', '--kill-on-invalid-dep=yes'} <= set(finish['options'])
  for i in (1, 2, 3):
    assert json.loads((folder / f'1.{i}').read_text()) == ['data', 'prepare', f'--part={i}/3', '--workers=4', *flags]
  assert json.loads((folder / '2.').read_text()) == ['data', 'finish', *flags]


def test_parts_of_a_slurm_array_are_not_combined_if_one_fails(folder):
  script = EXAMPLES / 'prepare_slurm.sh'
  done = run(folder, script, 2, '--config=x', SCRIPT=str(script), FAILS='2')
  assert done.returncode == 1 and not (folder / '2.').exists()
  assert done.stderr == ('prepare_slurm.sh: the parts were not combined, or scontrol gave no answer; see the logs of '
                         'the parts\n')


def test_a_slurm_array_is_cancelled_if_the_job_after_it_is_refused(folder):
  script = EXAMPLES / 'prepare_slurm.sh'
  done = run(folder, script, 2, '--config=x', SCRIPT=str(script), REFUSED='1')
  assert done.returncode == 1 and (folder / 'cancelled').read_text() == '1\n'


def test_an_indexed_job_prepares_each_part(folder):
  spec = pytest.importorskip('yaml').safe_load((EXAMPLES / 'prepare_job.yaml').read_text())['spec']
  [container] = spec['template']['spec']['containers']
  assert spec['completionMode'] == 'Indexed' and spec['completions'] == spec['parallelism'] == 16
  # Kubernetes refuses the limit per index, and the policy on failures, with another restart policy.
  assert spec['backoffLimitPerIndex'] and spec['template']['spec']['restartPolicy'] == 'Never'
  assert spec['podFailurePolicy']['rules'][0]['onExitCodes']['containerName'] == container['name']
  for index in (0, 15):
    done = run(folder, *container['command'][1:], *container['args'], JOB_COMPLETION_INDEX=str(index))
    assert json.loads(done.stdout) == ['data', 'prepare', '--config=FILE', f'--part={index + 1}/16', '--workers=30']


def test_google_batch_prepares_each_part(folder):
  [group] = json.loads((EXAMPLES / 'prepare_batch.json').read_text())['taskGroups']
  [runnable] = group['taskSpec']['runnables']
  for index in (0, group['taskCount'] - 1):
    done = run(folder, *runnable['container']['commands'], BATCH_TASK_INDEX=str(index),
               BATCH_TASK_COUNT=str(group['taskCount']))
    assert json.loads(done.stdout) == ['data', 'prepare', '--config=FILE', f'--part={index + 1}/16']
