"""Starts commands as processes in tests, waits for them, and compares what they leave."""

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

from betarank.runtime import checkpoint
from betarank.runtime.rendezvous import EXIT_JOB_LOST

BETARANK = [sys.executable, '-m', 'betarank']
SECRET = 'hunter2-is-the-password'
# jaxlib 0.10.1 may write a line on standard error for each program that it reads from the compilation cache
# (jax-ml/jax issue 38445; see runtime/program_cache.py). Commands whose output is checked then run without the cache.
CACHE = {} if jax.__version_info__ >= (0, 10, 2) else {'JAX_ENABLE_COMPILATION_CACHE': 'false'}
XLA_FLAGS: list[str] = []  # further flags of commands; see the fixture `quick_commands`


def environment(devices=1):
  """Returns the environment variables of a command that has `devices` CPU devices."""
  flags = [os.environ.get('XLA_FLAGS', ''), *XLA_FLAGS, f'--xla_force_host_platform_device_count={devices}']
  return {**os.environ, **CACHE, 'XLA_FLAGS': ' '.join(flags), 'SECRET_TOKEN': SECRET}  # the last flags count


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


# Starting and waiting


def betarank(*arguments, devices=1, **popen):
  """Starts `betarank ARGUMENTS`, and returns the process."""
  return python('-m', 'betarank', *arguments, devices=devices, **popen)


def python(*arguments, devices=1, **popen):
  """Starts `python ARGUMENTS`, and returns the process, whose output and errors are text."""
  return subprocess.Popen([sys.executable, *map(str, arguments)], env=environment(devices), text=True,
                          **{'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, **popen})


def deadline_s(processes):
  """Returns the deadline for heartbeats of a job, in seconds. It is longer for more processes, which share this
  machine's cores.
  """
  return 5 * processes


def start(command, config, workdir, processes, *extra, devices=1, replaced=None):
  """Starts `betarank train` or `betarank rl` as a job, and returns its processes.

  processes: the number of processes.
  devices: the number of devices of each process.
  replaced: {number of a process: Python arguments in place of '-m betarank COMMAND'}. By default, process 0 runs
    betarank, and the other processes run tests/cached.py.
  """
  flags = [f'--config={config}', f'--workdir={workdir}']
  if processes > 1:
    flags += [f'--coordinator=127.0.0.1:{free_port()}', f'--processes={processes}',
              f'--host_deadline_s={deadline_s(processes)}']
  program = lambda i: (replaced or {}).get(i, ('-m', 'tests.cached' if i else 'betarank', command))
  return [python(*program(i), *flags, *extra, f'--process_id={i}', devices=devices) for i in range(processes)]


def finish(processes, timeout=900):
  """Waits until all processes end. Returns [(exit status, standard output, standard error)]."""
  outputs = [p.communicate(timeout=timeout) for p in processes]
  return [(p.returncode, *output) for p, output in zip(processes, outputs)]


def finish_well(processes, timeout=900):
  """Waits until all processes end, and checks that their exit status is 0. Returns what `finish` returns."""
  for code, _, err in (results := finish(processes, timeout=timeout)):
    assert code == 0, err
  return results


def refused(process, alone=True):
  """Waits until a command ends, and checks that it ends with status 2 and one line of error. Returns this line.

  alone: whether standard error must have no other line.
  """
  [(code, _, err)] = finish([process], timeout=240)
  [line] = [line for line in err.splitlines() if line.startswith('error: ')]
  assert code == 2 and (err == line + '\n' or not alone), err
  return line


def prepare(config, *flags):
  """Runs `betarank data prepare` with a config."""
  finish_well([betarank('data', 'prepare', f'--config={config}', *flags)])


def wait_for_step(workdir, step, processes):
  """Waits until the run has logged `step` or a later step. The processes must not end before."""
  path = workdir / 'metrics.jsonl'

  def logged():
    whole = [line for line in path.read_text().splitlines(True) if line.endswith('\n')] if path.exists() else []
    return any('time/step_s' in line and line['step'] >= step for line in map(json.loads, whole))

  _wait(logged, processes, f'step {step}')


def wait_for_checkpoint(workdir, step, processes):
  """Waits until the run has a complete checkpoint of `step` or a later step. The processes must not end before.

  A run saves in the background, so a checkpoint may be complete several steps after its own.
  """
  folder = epath.Path(workdir) / 'checkpoints'
  _wait(lambda: checkpoint.steps(folder)[-1:] >= [step], processes, f'checkpoint of step {step}')


def _wait(condition, processes, what, timeout_s=600):
  until = time.monotonic() + timeout_s
  while not condition():
    assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
    assert time.monotonic() < until, f'no {what} in {timeout_s} s'
    time.sleep(0.05)


# What they leave


def last_error(err):
  return [line for line in err.splitlines() if line.startswith('error: ')][-1]


def assert_no_secret(folder):
  """Checks that no file of a run contains the secret that was in the run's environment."""
  files = [path for path in folder.rglob('*') if path.is_file()]
  assert files and not [path for path in files if SECRET.encode() in path.read_bytes()]


def assert_lost(results, victim, processes, workdir):
  """Checks that every process except `victim` ended with a line that names the victim, on standard error and in its
  log.
  """
  for index, (code, _, err) in enumerate(results):
    if index != victim:
      assert code == EXIT_JOB_LOST, err
      assert f'process {victim} of {processes} (' in last_error(err), err
      assert last_error(err) in (workdir / 'hosts' / f'{index}.log').read_text()


def assert_stopped(results, workdir, statuses=None):
  """Checks that all processes were stopped by a signal after the same step, and that this step is saved. Returns the
  step.

  statuses: the expected exit statuses; None means 143 for all.
  """
  saved = int(checkpoints(workdir)[-1])
  assert [code for code, _, _ in results] == (statuses or [143] * len(results)), results
  assert f'asked to stop: step {saved} is saved; the same command resumes from it' in results[0][1]
  return saved


def assert_same_run(a, b, step):
  """Checks that two runs are equal to the last bit: their metrics, their samples, and the checkpoint of `step`."""
  assert metrics(a) == metrics(b) and samples(a) == samples(b)
  want, got = arrays(b, step), arrays(a, step)
  assert got.keys() == want.keys() and len(got) > 20
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def checkpoints(workdir):
  """Returns the steps of a run's checkpoints as text, oldest first."""
  return sorted((p.name for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit()), key=int)


def metrics(workdir):
  """Returns the lines of a run's metrics.jsonl without times, which are different in every run."""
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{k: v for k, v in line.items() if not k.startswith('time/')} for line in lines]


def samples(workdir):
  """Returns the text of a run's samples.jsonl."""
  return (workdir / 'samples.jsonl').read_text()


def arrays(workdir, step):
  """Returns {name: array} of a checkpoint. They are read without a model, which would say what must be there."""
  path = epath.Path(workdir) / 'checkpoints' / str(step) / 'state'
  with ocp.PyTreeCheckpointer() as reader:
    shapes = reader.metadata(path).item_metadata
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    tree = reader.restore(path, restore_args=as_numpy)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
