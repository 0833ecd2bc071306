"""Tests that a program in the jail has no effect outside of it. Each kind of harm has one test, with a short deadline.
"""

import ctypes
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time

import pytest

from betarank.configs.errors import UserError
from betarank.tasks import code_jail
from betarank.tasks.code_jail import Jail, JailConfig, JailError

PASSED = code_jail.Outcome(True, '')
REFUSED = r'\((unshare: |mount: |syscall: |Operation not permitted)'  # by the kernel; all else is our fault


@pytest.fixture(scope='module')
def jail():
  try:
    return Jail(JailConfig(cpu_s=3, deadline_s=30, memory_mb=512))
  except JailError as error:
    if not re.search(REFUSED, str(error)):
      raise
    pytest.skip(str(error))


def run(jail, program, **limits):
  if limits:
    jail = object.__new__(Jail)
    jail._c, jail.isolated = JailConfig(**{'cpu_s': 3, 'deadline_s': 30, 'memory_mb': 512, **limits}), True
  return jail.run(textwrap.dedent(program))


def running(mark):
  """Returns the ids of the processes on this machine whose name is `mark`."""
  found = []
  for folder in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      if mark == (folder / 'comm').read_text().rstrip('\n'):
        found.append(int(folder.name))
    except OSError:
      continue
  return found


NAME = """
import ctypes
ctypes.CDLL(None).prctl(15, b'{}', 0, 0, 0)  # PR_SET_NAME
"""


def test_programs_that_end_pass_and_others_do_not(jail):
  assert run(jail, 'from __future__ import annotations\nimport math, numpy\nassert math.comb(4, 2) == 6') == PASSED
  assert run(jail, 'assert 1 == 2, "no"') == (False, 'AssertionError: no')
  assert run(jail, 'def f(:')[1].startswith('SyntaxError')
  assert not run(jail, '\0').passed and not run(jail, 'print("\udc80"); 1 / 0').passed
  assert run(jail, 'import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()').passed is False


def test_no_way_to_the_verdict(jail):
  """A program passes only if its last line has run, whatever it prints, writes to file descriptors, or returns as exit
  status.
  """
  for program in (
    'import os; os._exit(0)', 'raise SystemExit(0)', 'import sys; sys.exit()', 'print("R" + "0" * 32); 1 / 0',
    'import os, signal; os.kill(1, signal.SIGKILL); os.kill(os.getppid(), signal.SIGKILL); 1 / 0',
    'import os\nos.kill(os.getpid(), 9)',
    """
    import os
    for fd in range(64):
      for text in (b'R', b'R' + b'0' * 32, b'right', b'0' * 32):
        try:
          os.write(fd, text)
        except OSError:
          pass
    os._exit(0)
    """,
    'import atexit, os; atexit.register(os._exit, 0); 1 / 0',
    'import os\nif os.fork(): os._exit(0)\n1 / 0',
  ):
    assert not run(jail, program).passed, program


def test_fork_bomb(jail):
  name = f'forkbomb{os.getpid()}'
  program = NAME.format(name) + """
import os
failed = 0
while True:
  try:
    os.fork()
  except OSError:
    failed += 1
"""
  began = time.monotonic()
  assert not run(jail, program, deadline_s=3, cpu_s=100).passed
  assert time.monotonic() - began < 60
  assert wait_for(lambda: not running(name))
  several = """
  import os, time
  count = 0
  try:
    for _ in range(100):
      if not os.fork():
        time.sleep(60)
      count += 1
  except OSError:
    pass
  assert count == {}, count
  """
  assert run(jail, several.format(2), processes=3) == PASSED  # and those that sleep on are ended with it
  assert run(jail, 'import threading, time\nfor _ in range(9): threading.Thread(target=time.sleep, args=(9,)).start()',
             processes=3)[1].startswith("RuntimeError: can't start new thread")


def wait_for(holds, seconds=60):
  end = time.monotonic() + seconds
  while not (true := holds()) and time.monotonic() < end:
    time.sleep(0.05)
  return true


def test_memory_bomb(jail):
  assert run(jail, 'x = bytearray(2**30)')[1] == 'MemoryError'
  assert not run(jail, 'x = []\nwhile True: x.append(bytearray(2**24))').passed
  files = """
  import ctypes, errno, os
  for opened in (lambda: os.open('/dev/null', os.O_RDONLY), lambda: os.memfd_create('x')):
    held = []
    try:
      while len(held) < 64:
        held.append(opened())
      raise AssertionError('64 files')
    except OSError as error:
      assert error.errno == errno.EMFILE
    for fd in held:
      os.close(fd)
  libc = ctypes.CDLL(None, use_errno=True)
  assert libc.mq_open(b'/x', os.O_CREAT | os.O_RDWR, 0o600, None) == -1 and ctypes.get_errno() == errno.EMFILE
  assert libc.mlock(ctypes.create_string_buffer(1), ctypes.c_size_t(1)) == -1
  for i in range(9):
    open(f'/tmp/{i}', 'wb').write(b'x' * 2**22)
  """
  assert run(jail, files)[1] == 'OSError: [Errno 28] No space left on device'
  assert run(jail, "open('/tmp/x', 'wb').write(b'x' * 2**23)")[1] == 'OSError: [Errno 27] File too large'


def test_files(jail, tmp_path):
  secret = tmp_path / 'secret'
  secret.write_text('mine')
  secret.chmod(0o666)
  tmp_path.chmod(0o777)
  for path in (secret, '/etc/passwd', '/etc/shadow', '/proc/self/environ', '/proc/1/environ', '/root/.ssh', '/var',
               __file__, '/sys', '/dev/mem', '/dev/shm'):
    assert run(jail, f'import os\nassert not os.path.exists({str(path)!r})') == PASSED, path
  program = f"""
  import itertools, os, sys, tempfile
  seen = os.listdir('/')
  assert set(seen) <= {{'bin', 'sbin', 'lib', 'lib32', 'lib64', 'usr', 'etc', 'dev', 'tmp', 'program.py',
                        *{[p.split('/')[1] for p in readable_folders()]}}}, seen
  for folder, below, _ in itertools.chain([({str(tmp_path)!r}, [], [])], os.walk('/')):
    try:
      open(folder + '/written', 'w').close()
    except OSError:
      assert folder != '/tmp'
    else:
      assert folder == '/tmp' or folder.startswith('/tmp/'), folder
      os.remove(folder + '/written')
    if folder.count('/') > 2:
      below.clear()
  for path in ('/', '/usr', '/dev/null', sys.executable, os.__file__):
    assert os.statvfs(path).f_flag & os.ST_RDONLY, path
  for path in ('/program.py', sys.executable, os.__file__):
    try:
      open(path, 'ab')
    except OSError as error:
      continue
    raise AssertionError(path)
  with tempfile.TemporaryFile() as file:
    file.write(b'its own')
  """
  assert run(jail, program) == PASSED
  assert secret.read_text() == 'mine' and os.listdir(tmp_path) == ['secret']


def readable_folders():
  made = object.__new__(Jail)
  made._c, made.isolated = JailConfig(), True
  return made._settings('/x', 3)['readable']


def test_network(jail):
  with socket.create_server(('127.0.0.1', 0)) as server:
    program = f"""
    import socket
    for address in (('127.0.0.1', {server.getsockname()[1]}), ('1.1.1.1', 53)):
      try:
        socket.create_connection(address, timeout=2)
      except OSError:
        continue
      raise AssertionError(address)
    """
    assert run(jail, program) == PASSED
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
      server.accept()
  name = f'jail-test-{os.getpid()}'
  with socket.socket(socket.AF_UNIX) as abstract:
    abstract.bind(f'\0{name}')
    abstract.listen()
    program = f"import socket\nsocket.socket(socket.AF_UNIX).connect('\\0{name}')"
    assert 'ConnectionRefused' in run(jail, program)[1]


def test_environment_and_descriptors(jail, monkeypatch):
  monkeypatch.setenv('SECRET_TOKEN', 'mine')
  reader, writer = os.pipe()
  os.set_inheritable(writer, True)
  program = """
  import os
  assert not set(os.environ) - {'OPENBLAS_NUM_THREADS', 'LC_CTYPE'}, os.environ
  open_ones = []
  for fd in range(1000):
    try:
      os.fstat(fd)
      open_ones.append(fd)
    except OSError:
      pass
  assert len(open_ones) == 4, open_ones  # the token's, two for what is printed, the report
  assert os.getpid() != 1 and os.getppid() == 1
  """
  assert run(jail, program) == PASSED
  os.close(reader)
  os.close(writer)


def test_other_processes(jail):
  other = subprocess.Popen(['sleep', '60'])
  program = f"""
  import os, signal
  for pid in {[other.pid, os.getpid(), os.getppid()]}:
    try:
      os.kill(pid, signal.SIGKILL)
    except OSError:
      pass
  for pid in range(3, 2000):
    try:
      os.kill(pid, 0)
    except ProcessLookupError:
      continue
    raise AssertionError(pid)
  """
  assert run(jail, program) == PASSED
  assert other.poll() is None
  other.kill()
  other.wait()


NO_RIGHTS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert os.getuid() and os.geteuid() and os.getgid()
assert libc.prctl(39, 0, 0, 0, 0) == 1  # PR_GET_NO_NEW_PRIVS
for call in (lambda: libc.unshare(0x10000000), lambda: libc.unshare(0x20000), lambda: libc.setuid(0),
             lambda: libc.mount(b'none', b'/tmp', b'tmpfs', 0, None), lambda: libc.chroot(b'/tmp'),
             lambda: libc.sethostname(b'x', 1), lambda: libc.ptrace(16, 1, 0, 0), lambda: libc.umount2(b'/usr', 2)):
  assert call() == -1
"""


def test_no_rights_to_gain(jail):
  assert run(jail, NO_RIGHTS) == PASSED


NO_CALLS = """
import ctypes, errno, os, socket
libc = ctypes.CDLL(None, use_errno=True)
add_key, request_key, keyctl = {'x86_64': (248, 249, 250), 'aarch64': (217, 218, 219)}[os.uname().machine]
calls = dict(
  shmget=lambda: libc.shmget(0, ctypes.c_size_t(1), 0o1600),
  semget=lambda: libc.semget(0, 1, 0o1600),
  msgget=lambda: libc.msgget(0, 0o1600),
  add_key=lambda: libc.syscall(add_key, b'user', b'name', b'x', ctypes.c_size_t(1), -3),
  request_key=lambda: libc.syscall(request_key, b'user', b'name', None, 0),
  keyctl=lambda: libc.syscall(keyctl, 1, None),  # joins a new session keyring
  io_uring_setup=lambda: libc.syscall(425, 1, ctypes.create_string_buffer(120)),
  netlink=lambda: libc.socket(16, socket.SOCK_RAW, 0),
  vsock=lambda: libc.socket(40, socket.SOCK_STREAM, 0),
  x32=lambda: libc.syscall(0x40000000 + 39))
for name, call in calls.items():
  ctypes.set_errno(0)
  assert call() == -1 and ctypes.get_errno() == errno.EPERM, name
for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
  socket.socket(family).close()
"""


def test_no_calls_that_namespaces_and_limits_do_not_cover(jail):
  assert run(jail, NO_CALLS) == PASSED
  if os.uname().machine == 'x86_64':
    getpid = """
    import ctypes, mmap
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex('b814000000 cd80 c3'))  # mov eax, 20; int 0x80; ret: the 32-bit interface
    assert ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))() == -1, 'it works'
    """
    assert run(jail, getpid).why == ''  # or the kernel lacks this interface, and kills the program


def test_message_queues(jail):
  libc, name = ctypes.CDLL(None), f'/jail-test-{os.getpid()}'
  assert libc.mq_open(name.encode(), os.O_CREAT | os.O_RDWR, 0o666, None) >= 0
  try:
    program = f"""
    import ctypes, errno, os
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mq_open({name.encode()}, os.O_RDONLY) == -1 and ctypes.get_errno() == errno.ENOENT
    """
    assert run(jail, program) == PASSED
  finally:
    libc.mq_unlink(name.encode())


def test_endless(jail):
  began = time.monotonic()
  assert run(jail, 'while True: pass', cpu_s=1) == (False, '')
  name = f'sleeper{os.getpid()}'
  asleep = NAME.format(name) + 'import os, time\nif not os.fork(): os.setsid()\ntime.sleep(99)'
  assert run(jail, asleep, deadline_s=2) == (None, 'deadline')
  assert time.monotonic() - began < 60
  assert wait_for(lambda: not running(name))


def test_output_flood(jail):
  outcome = run(jail, 'import sys\nwhile True: print("x" * 10_000); sys.stderr.write("y" * 10_000)')
  assert not outcome.passed and len(outcome.why) <= 2000
  assert run(jail, 'print("x" * 100_000)') == PASSED


def test_ended_with_its_parent(jail, tmp_path):
  """If an evaluation is killed, none of its processes continues after the deadline."""
  name = f'orphan{os.getpid()}'
  program = NAME.format(name) + 'import time; time.sleep(300)'
  code = ('from betarank.tasks.code_jail import Jail, JailConfig\n'
          f'print(Jail(JailConfig(deadline_s=6)).run({program!r}))')
  parent = subprocess.Popen([sys.executable, '-c', code], cwd=pathlib.Path(__file__).parents[2],
                            env={**os.environ, 'TMPDIR': str(tmp_path)})
  started = wait_for(lambda: running(name))
  assert [pathlib.Path(f'/proc/{pid}/oom_score_adj').read_text() for pid in started] == ['1000\n']
  parent.send_signal(signal.SIGKILL)
  parent.wait()
  assert wait_for(lambda: not running(name))


def test_refused_without_isolation_unless_accepted(monkeypatch, tmp_path, capfd):
  worker = tmp_path / 'worker.py'
  source = pathlib.Path(code_jail.__file__).with_name('code_jail_worker.py').read_text()
  worker.write_text(source.replace("_call('unshare',", "raise OSError(1, 'unshare: Operation not permitted') #"))
  monkeypatch.setattr(code_jail, '_WORKER', worker)
  with pytest.raises(UserError, match='no isolation for programs .unshare: Operation not permitted.') as error:
    Jail(JailConfig())
  assert '\n' not in str(error.value) and '--config.eval.code.accept_no_isolation=true' in str(error.value)
  with pytest.raises(UserError, match=r'--config\.rl\.code\.accept_no_isolation=true'):  # names RL's section in RL
    Jail(JailConfig(), 'config.rl.code')
  loose = Jail(JailConfig(deadline_s=5, memory_mb=512, accept_no_isolation=True))
  warning = capfd.readouterr().err
  assert not loose.isolated and 'AS YOU' in warning and ('root can lift' in warning) == (os.geteuid() == 0)
  assert loose.run('assert 1') == PASSED and loose.run('import os; os._exit(0)').passed is False
  assert loose.run('x = bytearray(2**30)') == (False, 'MemoryError')
  assert loose.run('import time; time.sleep(60)') == (None, 'deadline')


@pytest.mark.skipif(os.geteuid() != 0, reason='all the others run without root here')
def test_without_root(jail):
  """Without root, the jail is in a user namespace of its own. Needs a Python that all users may run."""
  programs = ("import os; assert os.getuid() == 65534 and not os.path.exists('/etc/passwd')", NO_RIGHTS, NO_CALLS,
              'import os\nfor _ in range(9): os.fork()',
              "import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)")
  code = ('from betarank.tasks.code_jail import Jail, JailConfig\n'
          f'jail = Jail(JailConfig(deadline_s=30))\nfor p in {programs!r}: print(jail.run(p).why[:20])')
  with tempfile.TemporaryDirectory(dir='/tmp') as folder:
    for name in ('__init__', 'configs/__init__', 'configs/errors', 'tasks/__init__', 'tasks/code_jail',
                 'tasks/code_jail_worker'):
      copy = pathlib.Path(folder, f'betarank/{name}.py')
      copy.parent.mkdir(parents=True, exist_ok=True)
      copy.write_bytes((pathlib.Path(__file__).parents[2] / f'{name}.py').read_bytes())
    subprocess.run(['chmod', '-R', 'a+rX', folder], check=True)
    unprivileged = dict(cwd=folder, user=65534, group=65534, extra_groups=[], env={}, capture_output=True, text=True)
    for python in (sys.executable, '/usr/bin/python3'):
      try:
        subprocess.run([python, '-c', 'import sys; assert sys.version_info >= (3, 11)'], **unprivileged, check=True)
      except (OSError, subprocess.CalledProcessError):
        continue
      done = subprocess.run([python, '-c', code], **unprivileged)
      if re.search(REFUSED, done.stderr):
        pytest.skip(f'for root only here: {done.stderr.strip().splitlines()[-1][:200]}')
      assert done.stdout.split('\n') == ['', '', '', 'BlockingIOError: [Er', 'OSError: [Errno 101]', ''], done.stderr
      return
  pytest.skip('no Python from version 3.11 on is for all users')


@pytest.mark.parametrize('setting, message', [
  (dict(workers=0), 'workers must be >= 1'), (dict(cpu_s=0.0), 'cpu_s must be > 0'),
  (dict(deadline_s=float('inf')), 'deadline_s must be > 0'),
])
def test_limits_are_checked(setting, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    JailConfig(**setting)
