"""Takes the place of ssh and scp, which the real gcloud starts once per worker: stub_ssh.py ssh|scp ARGUMENTS

STUB/addresses/ADDRESS has the path of the home folder of the worker with this address. If there is a file
STUB/unreachable, connections are refused.
"""

import os
import pathlib
import re
import shutil
import sys

import stub_workers

STUB = pathlib.Path(os.environ['STUB'])


def main(program, arguments):
  with open(STUB / 'ssh_calls', 'a') as calls:
    calls.write(program + '\n')
  at = next(i for i, argument in enumerate(arguments) if re.match(r'[^ /=]+@[\d.]+(:|$)', argument))
  address, _, target = arguments[at].partition('@')[2].partition(':')
  if (STUB / 'unreachable').exists():
    print(f'ssh: connect to host {address} port 22: Connection refused', file=sys.stderr)
    return 255
  home = pathlib.Path((STUB / 'addresses' / address).read_text())
  if program == 'scp':
    shutil.copy(arguments[at - 1], home / target)
    return 0
  command = arguments[at + 1:]
  return stub_workers.run(home, ' '.join(command[command[:1] == ['--']:]))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1], sys.argv[2:]))
