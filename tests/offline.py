"""Runs `betarank ARGS`, and ends the process at its first attempt to use a network: python -m tests.offline ARGS

An audit hook sees what Python code does, in any library. Sockets that C++ code opens are seen by `strace` only
(docs/guarantees.md).
"""

import os
import runpy
import sys

EVENTS = ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.gethostbyaddr', 'socket.getnameinfo',
          'socket.sendto', 'socket.sendmsg', 'urllib.Request', 'http.client.connect', 'ftplib.connect')
STATUS = 97


def forbid() -> None:
  """Ends this process with STATUS, from now on, if it asks for a host's address or connects to anything. An exception
  would not do, because libraries that look for a cloud catch it.
  """
  def hook(event, arguments):
    if event in EVENTS:
      os.write(2, f'tests.offline: {event} {arguments}\n'.encode())
      os._exit(STATUS)
  sys.addaudithook(hook)


if __name__ == '__main__':
  forbid()
  runpy.run_module('betarank', run_name='__main__', alter_sys=True)
