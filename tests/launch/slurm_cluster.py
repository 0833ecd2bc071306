"""Starts a Slurm cluster of several nodes on this machine, for tests: slurmctld, and one slurmd per node.

Nodes are named 127.0.0.1, 127.0.0.2 and so on, so that processes can reach each other by the names of their nodes.
"""

import contextlib
import getpass
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

from tests.runs import free_port

PATH = f'{os.environ["PATH"]}:/usr/sbin'
PROGRAMS = ('slurmctld', 'slurmd', 'sbatch', 'srun', 'scancel', 'squeue', 'sinfo')


def missing():
  """Returns the programs of Slurm that aren't installed (on Debian, the package is slurm-wlm)."""
  return [name for name in PROGRAMS if not shutil.which(name, path=PATH)]


class Cluster:
  """A running cluster.

  environment: the environment variables with which commands reach the cluster.
  """

  def __init__(self, folder: pathlib.Path, nodes: int):
    self.folder, self._processes = folder, {}
    self.environment = {'SLURM_CONF': str(folder / 'slurm.conf'), 'PATH': PATH}
    host, user = socket.gethostname(), getpass.getuser()
    settings = dict(
      ClusterName='tests', SlurmctldHost=host, SlurmUser=user, SlurmdUser=user, SlurmctldPort=free_port(),
      AuthType='auth/none', CredType='cred/none', ProctrackType='proctrack/pgid', TaskPlugin='task/none',
      MpiDefault='none', SelectType='select/cons_tres', SelectTypeParameters='CR_CPU', ReturnToService=2,
      SlurmdParameters='config_overrides', SlurmdTimeout=10, SchedulerParameters='sched_interval=1,bf_interval=1',
      StateSaveLocation=folder / 'state', SlurmdSpoolDir=f'{folder}/spool-%n', SlurmctldPidFile=folder / 'ctld.pid',
      SlurmdPidFile=f'{folder}/%n.pid', SlurmctldLogFile=folder / 'ctld.log', SlurmdLogFile=f'{folder}/%n.log')
    names = [f'127.0.0.{i + 1}' for i in range(nodes)]
    lines = [f'{key}={value}' for key, value in settings.items()]
    lines += [f'NodeName={name} NodeHostname={host} NodeAddr={name} Port={free_port()} CPUs=4 RealMemory=1000'
              for name in names]
    lines += [f'PartitionName=all Nodes={",".join(names)} Default=YES MaxTime=INFINITE State=UP']
    (folder / 'slurm.conf').write_text('\n'.join(lines) + '\n')
    (folder / 'state').mkdir()
    self._start('ctld', 'slurmctld', '-D')
    for name in names:
      (folder / f'spool-{name}').mkdir()
      self._start(name, 'slurmd', '-D', '-N', name)

  def _start(self, name, *command):
    with open(self.folder / f'{name}.out', 'ab') as log:
      self._processes[name] = subprocess.Popen(command, env={**os.environ, **self.environment}, stdout=log, stderr=log,
                                               start_new_session=True)

  def run(self, *command):
    """Runs a command, and returns its standard output."""
    return subprocess.run(command, env={**os.environ, **self.environment}, capture_output=True, text=True).stdout

  def wait(self, holds, seconds=60):
    """Waits until holds() is true."""
    until = time.monotonic() + seconds
    while not holds():
      assert time.monotonic() < until, self.run('sinfo') + self.run('squeue') + '\n'.join(
        f'== {path.name}\n{path.read_text()[-2000:]}' for path in self.folder.glob('*.log'))
      time.sleep(0.2)

  def wait_until_up(self):
    nodes = len(self._processes) - 1
    self.wait(lambda: self.run('sinfo', '--noheader', '--format=%D %t').split() == [str(nodes), 'idle'])

  def kill_node(self, name):
    """Ends a node as a power failure would: kills its daemon, the processes of its jobs, and the supervisors of these
    processes.
    """
    daemon = self._processes[name].pid
    processes = [line.split() for line in self.run('ps', '-eo', 'pid=,ppid=').splitlines()]
    of_jobs = [int(pid) for pid, _ in processes if self._is_of_job_on(pid, name)]
    supervisors = [int(parent) for pid, parent in processes if int(pid) in of_jobs and int(parent) > 1]
    for pid in {daemon, *of_jobs, *supervisors} - {os.getpid()}:
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)

  def _is_of_job_on(self, pid, node):
    """Returns whether a process belongs to a job of this cluster on the node `node`. Its environment variables show it.
    """
    try:
      variables = pathlib.Path(f'/proc/{pid}/environ').read_bytes().split(b'\0')
    except OSError:  # it has ended
      return False
    return {f'SLURMD_NODENAME={node}'.encode(), f'SLURM_CONF={self.folder}/slurm.conf'.encode()} <= set(variables)

  def stop(self):
    """Ends all jobs, and then the daemons."""
    self.run('scancel', f'--user={getpass.getuser()}')
    with contextlib.suppress(AssertionError):
      self.wait(lambda: not self.run('squeue', '--noheader').strip(), 20)
    for name in sorted(self._processes):
      self._processes[name].terminate()
    for process in self._processes.values():
      try:
        process.wait(20)
      except subprocess.TimeoutExpired:
        process.kill()
