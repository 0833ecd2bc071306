"""Builds a jail around itself and runs one Python program in it. See code_jail.py.

    python -I -S -B tasks/code_jail_worker.py SETTINGS < TOKEN + PROGRAM     SETTINGS is JSON

There are three processes. The process that starts with this file limits the time. Its child is process 1 of a new
process namespace; when process 1 dies, the kernel ends all other processes in the namespace. The grandchild gives up
its privileges and becomes the program. When the jail is ready, the grandchild writes one byte to the file descriptor
SETTINGS['report']. After the program's last line has run, it writes the token there too.

This file imports neither the project nor third-party packages, because it runs with privileges that the program must
not have.
"""

import ctypes
import errno
import json
import math
import os
import resource
import signal
import struct
import sys

TOKEN = 32  # bytes
READY = b'R'
FILE_MB = 4  # the largest size of a file, and of the output
_FILES = 64  # the number of open files
_SCRATCH = 'size=16m,nr_inodes=256,mode=1777'  # the options of /tmp
_FIRST_USER = 0x70000000  # no real user has a number from here on

# What a program can read of this machine, besides Python's own folders. Missing ones are skipped.
_SYSTEM = ('/usr', '/bin', '/sbin', '/lib', '/lib32', '/lib64', '/etc/ld.so.cache', '/etc/alternatives')
_DEVICES = ('/dev/null', '/dev/zero', '/dev/random', '/dev/urandom')

# linux/sched.h, sys/mount.h, linux/prctl.h
_NEW_MOUNT, _NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = (
  0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
_BIND, _RECURSIVE, _PRIVATE, _NOSUID, _NODEV, _DETACH = 0x1000, 0x4000, 0x40000, 2, 4, 2
_MOUNT_SETATTR, _PIVOT_ROOT = 442, {'x86_64': 155, 'aarch64': 41}  # system calls without a function in every libc
_SET_DEATH_SIGNAL, _SET_SECCOMP, _NO_NEW_PRIVILEGES = 1, 22, 38
_ATTR_READ_ONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_HERE, _ALL_BELOW = -100, 0x8000

# The system calls that no namespace and no limit makes harmless, by machine: its AUDIT_ARCH (linux/audit.h), and the
# numbers of socket (see `forbid_calls`) and of shmget, semget, msgget, add_key, request_key, keyctl, io_uring_setup.
# System V objects outlive their process, and no limit counts their memory. The caller's keys are readable without a
# file. io_uring opens sockets without the call `socket`.
_FORBIDDEN = {
  'x86_64': (0xc000003e, 41, (29, 64, 68, 248, 249, 250, 425)),
  'aarch64': (0xc00000b7, 198, (194, 190, 186, 217, 218, 219, 425)),
}
# linux/bpf_common.h, linux/seccomp.h
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_FILTER, _ALLOW, _FAIL_WITH = 2, 0x7fff0000, 0x50000
_AF_INET6 = 10  # linux/socket.h

# Run by the jailed interpreter. The token is read only after the program's last line has run.
_RUN = """
import os, runpy, sys
sys.path[:] = [*sys.path, *sys.argv[2:]]
path, report = sys.argv[1].split(':')
sys.argv[:] = [path]
runpy.run_path(path, run_name='__main__')
os.write(int(report), os.read(0, 64))
os._exit(0)
"""

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args) -> None:
  """Calls a function of libc. Raises OSError with the function's name if the call fails."""
  if getattr(_libc, name)(*(os.fsencode(a) if isinstance(a, str) else a for a in args)) < 0:
    code = ctypes.get_errno()
    raise OSError(code, f'{name}: {os.strerror(code)}')


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
  _call('mount', source, target, kind, ctypes.c_ulong(flags), options)


def _restrict(path: str, attributes: int, below: int = _ALL_BELOW) -> None:
  """Sets attributes, such as read-only, on the mount at `path`. Needs Linux 5.12.

  attributes: the attributes as bits, such as _ATTR_READ_ONLY.
  below: _ALL_BELOW to set them on all mounts below `path` too, 0 to set them on this mount alone.
  """
  given = struct.pack('QQQQ', attributes, 0, 0, 0)
  _call('syscall', ctypes.c_long(_MOUNT_SETATTR), _HERE, path, below, given, ctypes.c_size_t(len(given)))


def unshare() -> None:
  """Gives this process new mount, network, IPC and host name namespaces, and its next child a new process namespace.

  If the user isn't root, also creates a user namespace.
  """
  user, group = os.geteuid(), os.getegid()
  flags = _NEW_MOUNT | _NEW_PID | _NEW_NET | _NEW_IPC | _NEW_UTS
  _call('unshare', flags | (_NEW_USER if user else 0))
  if user:
    for name, text in (('setgroups', 'deny'), ('uid_map', f'{user} {user} 1'), ('gid_map', f'{group} {group} 1')):
      with open(f'/proc/self/{name}', 'w') as file:
        file.write(text)


def build(folder: str, readable: list[str], program: bytes) -> None:
  """Creates a new root folder and makes it this process's root, so that no other file of the machine is visible.

  The new root has the system's libraries, a few devices, the paths in `readable`, the program and an empty /tmp.
  """
  _mount(None, '/', None, _RECURSIVE | _PRIVATE)
  _mount('tmpfs', folder, 'tmpfs', _NOSUID | _NODEV, 'size=16m,nr_inodes=4096,mode=755')
  root = f'{folder}/root'
  os.makedirs(f'{root}/tmp')
  _mount('tmpfs', f'{root}/tmp', 'tmpfs', _NOSUID | _NODEV, _SCRATCH)
  shown = []
  for path in (*_SYSTEM, *_DEVICES, *readable):
    target = root + path
    if not os.path.exists(path) or any(os.path.commonpath((path, other)) == other for other in shown):
      continue
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):  # /lib -> usr/lib
      os.symlink(os.readlink(path), target)
      continue
    shown.append(path)
    if os.path.isdir(path):
      os.makedirs(target, exist_ok=True)
    else:
      open(target, 'x').close()
    _mount(path, target, None, _BIND | _RECURSIVE)
    _restrict(target, _ATTR_READ_ONLY | _ATTR_NOSUID | (0 if path in _DEVICES else _ATTR_NODEV))
  with open(f'{root}/program.py', 'wb') as file:
    file.write(program)
  _restrict(folder, _ATTR_READ_ONLY | _ATTR_NOSUID | _ATTR_NODEV, 0)
  os.chdir(folder)
  _call('syscall', ctypes.c_long(_PIVOT_ROOT[os.uname().machine]), '.', '.')
  _call('umount2', '.', _DETACH)
  # After chroot, a process can't create user namespaces, in which it would have rights again.
  os.chroot('root')
  os.chdir('/tmp')


def limit(settings: dict, extra_processes: int) -> None:
  megabytes = 2**20
  for kind, value in (
    (resource.RLIMIT_AS, settings['memory_mb'] * megabytes), (resource.RLIMIT_CPU, math.ceil(settings['cpu_s'])),
    (resource.RLIMIT_FSIZE, FILE_MB * megabytes), (resource.RLIMIT_NOFILE, _FILES), (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_MSGQUEUE, 0), (resource.RLIMIT_MEMLOCK, 0),
    (resource.RLIMIT_NPROC, settings['processes'] + extra_processes),
  ):
    resource.setrlimit(kind, (value, value))


def become_nobody(user: int) -> None:
  """Gives up all privileges of this process, and prevents it from gaining new ones.

  If the process runs as root, its user becomes `user`, who owns no files.
  """
  if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
  _call('prctl', _NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def forbid_calls() -> None:
  """Makes the system calls of _FORBIDDEN fail with EPERM, in this process and in all that it starts.

  `socket` fails for all address families after AF_INET6. Some of these, such as AF_VSOCK, which reaches the host of a
  virtual machine, don't belong to a network namespace.

  The kernel runs a filter, which is a program in classic BPF, before each call. An instruction is (code, jump if true,
  jump if false, operand); a jump of n skips the next n instructions. Loads are from struct seccomp_data, which has the
  call's number at byte 0, the architecture at byte 4, and the arguments, of 8 bytes each, from byte 16 on.
  """
  architecture, call_socket, calls = _FORBIDDEN[os.uname().machine]
  instruction = struct.Struct('HBBI').pack
  fail = instruction(_RETURN, 0, 0, _FAIL_WITH | errno.EPERM)
  program = b''.join((
    instruction(_LOAD, 0, 0, 4),  # in the 32-bit interface of a 64-bit kernel, calls have other numbers
    instruction(_IF_EQUAL, 1, 0, architecture), fail,
    instruction(_LOAD, 0, 0, 0),
    instruction(_IF_AT_LEAST, 0, 1, 0x40000000), fail,  # the x32 interface of x86-64, which has other numbers too
    *(instruction(_IF_EQUAL, 0, 1, call) + fail for call in calls),
    instruction(_IF_EQUAL, 0, 3, call_socket),  # all other calls go to the last instruction
    instruction(_LOAD, 0, 0, 16),
    instruction(_IF_AT_LEAST, 0, 1, _AF_INET6 + 1), fail,
    instruction(_RETURN, 0, 0, _ALLOW),
  ))
  code = ctypes.create_string_buffer(program, len(program))
  _call('prctl', _SET_SECCOMP, _FILTER, struct.pack('HP', len(program) // len(fail), ctypes.addressof(code)), 0, 0)


def run(settings: dict, path: str, token: bytes, user: int) -> None:
  """Replaces this process with Python running the program, under the limits and, in a jail, without privileges.

  settings: the parsed argument SETTINGS (see the docstring of this file).
  path: the file of the program.
  token: what is written to the file descriptor settings['report'] after the program's last line has run.
  user: the user id that this process takes if it runs as root.
  """
  source, sink = os.pipe()
  os.write(sink, token)
  os.dup2(source, 0)
  os.closerange(3, settings['report'])
  os.closerange(settings['report'] + 1, _FILES * 16)
  root = os.geteuid() == 0
  limit(settings, extra_processes=0 if root else 1)  # process 1 belongs to the same user, unless that is root
  if settings['isolated']:
    become_nobody(user)
    forbid_calls()
  os.set_inheritable(settings['report'], True)
  os.write(settings['report'], READY)
  python = settings['python']
  os.execve(python, [python, '-I', '-S', '-B', '-X', 'utf8', '-c', _RUN, f'{path}:{settings["report"]}',
                     *settings['packages']], {'OPENBLAS_NUM_THREADS': '1'})


def first_process(settings: dict, program: bytes, token: bytes, user: int) -> None:
  """Runs as process 1: builds the jail, starts the program and waits for the program's end.

  When process 1 ends after that, the kernel ends all other processes in the jail.

  settings: the parsed argument SETTINGS (see the docstring of this file).
  program: the source code of the program.
  token, user: the arguments of `run` with these names.
  """
  _call('prctl', _SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
  path = f'{settings["folder"]}/program.py'
  if settings['isolated']:
    build(settings['folder'], settings['readable'], program)
    path = '/program.py'
  else:
    with open(path, 'xb') as file:
      file.write(program)
    os.chdir(settings['folder'])
  child = os.fork()
  if child == 0:
    run(settings, path, token, user)
  while os.wait()[0] != child:
    pass


def main() -> None:
  settings = json.loads(sys.argv[1])
  given = sys.stdin.buffer.read()
  token, program = given[:TOKEN], given[TOKEN:]
  signal.alarm(math.ceil(settings['deadline_s']) + 2)  # in case our parent has died
  try:
    if settings['isolated']:
      unshare()
      with open('/proc/self/oom_score_adj', 'w') as file:
        file.write('1000')  # if memory runs out, the kernel kills these processes first
    user = _FIRST_USER + os.getpid()
    child = os.fork()
    if child:
      os.waitpid(child, 0)
      if not settings['isolated']:
        os.killpg(0, signal.SIGKILL)  # kills what is left of the program, unless it has left the process group
      return
    first_process(settings, program, token, user)
  except Exception as error:
    print(getattr(error, 'strerror', None) or error, file=sys.stderr, flush=True)
  os._exit(0)


if __name__ == '__main__':
  main()
