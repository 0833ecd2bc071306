"""Runs a program that a model wrote, so that it can't harm the machine, and says whether the program ran to its end.

    outcome = Jail(JailConfig()).run(program)

Each program gets a new jail, which is removed afterwards (code_jail_worker.py). A jail has its own process, mount,
network and IPC namespaces. If the caller is root, the program runs as a user who owns no files. The jail's root folder
is read-only and holds the system's libraries, this Python, and a writable /tmp of 16 MB. There is no network, no /proc
and none of the caller's environment variables. Time, memory, processes, files and output are limited. At the deadline,
process 1 of the jail is killed, and the kernel then ends all other processes in the jail. All this needs Linux 5.12
with namespaces. On other systems, Jail(...) raises JailError. If accept_no_isolation is set, it runs programs without a
jail instead, protected only by the limits.

After the last line of a program, the jail's code sends back a token, which shows that the program has run to its end.
Besides the token, only the last part of the program's output is read, and it is never parsed.

A jail protects the machine, not the tests. Tests and program share an interpreter, so a program can be written to
deceive the tests, as in any harness of this kind. The kernel itself isn't protected either: a seccomp filter denies
only the calls that reach what namespaces and limits don't cover (`forbid_calls` in code_jail_worker.py).
"""

import dataclasses
import json
import math
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
from typing import Any, NamedTuple

from betarank.configs.errors import UserError

_WORKER = pathlib.Path(__file__).with_name('code_jail_worker.py')
_READY = b'R'
_SHOWN = 2000  # the last so many bytes of a program's output are kept


class JailError(UserError):
  """Raised if programs can't be run. The message is one line that says what to do."""


@dataclasses.dataclass(frozen=True)
class JailConfig:
  """Section `rl.code` or `eval.code`: the limits on each program.

  Attributes:
    workers: the number of programs that run at the same time.
    cpu_s: the CPU seconds that each process of a program may use.
    deadline_s: the wall-clock seconds that a program may take, including the creation of the jail. A program that
      reaches the deadline is undecided, because the machine may be busy. Use several times cpu_s, so that a program
      that computes forever reaches cpu_s first, and is wrong.
    memory_mb: the address space in MB that each process of a program may use.
    processes: the number of processes and threads that a program may have at the same time. Without a jail, the kernel
      counts all processes and threads of the user, so a program usually can't start any, and root has no such limit.
    accept_no_isolation: whether to run programs without a jail if the kernel can't isolate them. Only the limits above
      protect the machine then, and root can lift them.
  """

  workers: int = 2
  cpu_s: float = 5.0
  deadline_s: float = 20.0
  memory_mb: int = 1024
  processes: int = 4
  accept_no_isolation: bool = False

  def __post_init__(self):
    for name in ('workers', 'memory_mb', 'processes'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be >= 1, got {getattr(self, name)}')
    for name in ('cpu_s', 'deadline_s'):
      if not 0 < getattr(self, name) < math.inf:
        raise ValueError(f'{name} must be > 0, got {getattr(self, name)}')


class Outcome(NamedTuple):
  """The result of a program.

  passed: whether the program ran to its end. None if it was still running at the deadline, because this depends on how
    busy the machine is.
  why: '' if the program ran to its end. Otherwise 'deadline', or the last line that the program printed.
  """

  passed: bool | None
  why: str


class Jail:
  """Runs programs in jails. Thread-safe.

  Attributes:
    isolated: True if programs run in a jail, False if only the limits of JailConfig protect the machine.
    workers: the number of programs that run at the same time.
  """

  def __init__(self, config: JailConfig, section: str = 'config.eval.code'):
    """Checks that programs can be run, by running an empty program.

    section: the section of the config that error messages name.

    Raises:
      JailError: the empty program can't be run.
    """
    self._c, self.isolated, self.workers = config, True, config.workers
    try:
      outcome = self.run('pass')
    except JailError as error:
      if not config.accept_no_isolation:
        raise JailError(f'{error}; run where namespaces are allowed (as root, or with sysctl '
                        'user.max_user_namespaces > 0 and, on Ubuntu, kernel.apparmor_restrict_unprivileged_userns=0), '
                        'or let programs that a model wrote act as you, '
                        f'--{section}.accept_no_isolation=true') from None
      print(f'WARNING: {error}. Programs that the model wrote now run AS YOU, with your files and your network, under '
            f'limits on time and memory alone{", which root can lift" if os.geteuid() == 0 else ""}.', file=sys.stderr,
            flush=True)
      self.isolated = False
      outcome = self.run('pass')
    if not outcome.passed:
      raise JailError(f'an empty program does not run in the jail ({outcome.why}); are {section}.memory_mb='
                      f'{config.memory_mb} and deadline_s={config.deadline_s} enough, and may all users read '
                      f'{sys.base_prefix}?')

  def run(self, program: str) -> Outcome:
    """Runs `program`, which is Python source, as a script. Raises JailError if the jail can't be created."""
    token = secrets.token_hex(16).encode()
    reader, writer = os.pipe()
    with (open(reader, 'rb', buffering=0) as reports, tempfile.TemporaryFile() as printed,
          tempfile.TemporaryDirectory(prefix='jail-') as folder):
      try:
        worker = subprocess.Popen(
          [sys.executable, '-I', '-S', '-B', str(_WORKER), json.dumps(self._settings(folder, writer))], cwd='/',
          env={}, stdin=subprocess.PIPE, stdout=printed, stderr=printed, pass_fds=(writer,), start_new_session=True)
      finally:
        os.close(writer)
      late = False
      try:
        worker.communicate(token + program.encode(errors='replace'), timeout=self._c.deadline_s)
      except subprocess.TimeoutExpired:
        late = True
      finally:
        if worker.returncode is None:  # it hasn't been waited for, so its pid is still its own
          os.killpg(worker.pid, signal.SIGKILL)  # also kills its child, process 1 of the jail; the kernel ends the rest
          worker.wait()
      os.set_blocking(reader, False)
      said = reports.read(64) or b''
      printed.seek(-min(_SHOWN, printed.seek(0, os.SEEK_END)), os.SEEK_END)
      tail = printed.read().decode(errors='replace').strip().rpartition('\n')[2]
    if said == _READY + token:
      return Outcome(True, '')
    if said.startswith(_READY):
      return Outcome(None, 'deadline') if late else Outcome(False, tail)
    raise JailError('this system offers no isolation for programs '
                    f'({"the jail was not ready in time" if late else tail})')

  def _settings(self, folder: str, report: int) -> dict[str, Any]:
    packages = sorted({os.path.realpath(sysconfig.get_path(name)) for name in ('purelib', 'platlib')})
    return {
      **dataclasses.asdict(self._c), 'isolated': self.isolated, 'folder': folder, 'report': report,
      'python': os.path.realpath(sys.executable), 'packages': packages,
      'readable': sorted({os.path.realpath(sys.base_prefix), *packages}),
    }
