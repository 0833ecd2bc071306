"""What tests of whole runs share: their environment, and what a run left behind."""

import json
import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from betarank.runtime.rendezvous import EXIT_JOB_LOST

BETARANK = [sys.executable, '-m', 'betarank']
SECRET = 'hunter2-is-the-password'


def environment(devices=1):
  return {**os.environ, 'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}', 'SECRET_TOKEN': SECRET}


def assert_no_secret(folder):
  """Nothing that a run has written holds what was in its environment."""
  files = [path for path in folder.rglob('*') if path.is_file()]
  assert files and not [path for path in files if SECRET.encode() in path.read_bytes()]


def prepare(config, *flags):
  """`betarank data prepare` of a config, which must go well."""
  done = subprocess.run([*BETARANK, 'data', 'prepare', f'--config={config}', *flags], capture_output=True,
                        text=True)
  assert done.returncode == 0, done.stderr


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def deadline_s(processes):
  """Of the jobs here; more for more of them, which share this machine's cores."""
  return 5 * processes


def start(module, config, workdir, processes, *extra, devices=1, replaced=None):
  """A run as a job of so many processes of so many devices each. replaced: {process: what it runs, not -m MODULE}."""
  command = [f'--config={config}', f'--workdir={workdir}', *extra]
  if processes > 1:
    command += [f'--coordinator=127.0.0.1:{free_port()}', f'--processes={processes}',
                f'--host_deadline_s={deadline_s(processes)}']
  replaced = replaced or {}
  return [subprocess.Popen([sys.executable, *replaced.get(i, (*BETARANK[1:], module)), *command, f'--process_id={i}'],
                           env=environment(devices), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
          for i in range(processes)]


def finish(processes, timeout=900):
  """[(exit status, standard output, standard error)] of all."""
  outs = [p.communicate(timeout=timeout) for p in processes]
  return [(p.returncode, *out) for p, out in zip(processes, outs)]


def finish_well(processes):
  for code, _, err in (results := finish(processes)):
    assert code == 0, err
  return results


def wait_for_step(workdir, step, processes, timeout=600):
  """Returns once the run has written this step, or a later one."""
  path, until = workdir / 'metrics.jsonl', time.monotonic() + timeout
  while time.monotonic() < until:
    whole = [line for line in path.read_text().splitlines(True) if line.endswith('\n')] if path.exists() else []
    if any('time/step_s' in line and line['step'] >= step for line in map(json.loads, whole)):
      return
    assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
    time.sleep(0.05)
  raise AssertionError(f'no step {step} in {timeout} s')


def last_error(err):
  return [line for line in err.splitlines() if line.startswith('error: ')][-1]


def assert_lost(results, victim, processes, workdir):
  """Whoever wasn't killed ended with a line that names who was, in its log too."""
  for index, (code, _, err) in enumerate(results):
    if index != victim:
      assert code == EXIT_JOB_LOST, err
      assert f'process {victim} of {processes} (' in last_error(err), err
      assert last_error(err) in (workdir / 'hosts' / f'{index}.log').read_text()


def assert_same_run(a, b, step):
  """Bit for bit, in figures and in the checkpoint of this step."""
  assert metrics(a) == metrics(b)
  want, got = arrays(b, step), arrays(a, step)
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def metrics(workdir):
  """Every line of the run's file without what can't repeat."""
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{k: v for k, v in line.items() if not k.startswith('time/')} for line in lines]


def arrays(workdir, step):
  """All arrays of a checkpoint, by name, read without knowing what they should be."""
  path = epath.Path(workdir) / 'checkpoints' / str(step) / 'state'
  with ocp.PyTreeCheckpointer() as reader:
    shapes = reader.metadata(path).item_metadata
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    tree = reader.restore(path, restore_args=as_numpy)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
