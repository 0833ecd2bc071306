"""python -m tests.newcomer [--only=WORDS] [--keep=DIR]

Does what README.md tells a newcomer to do. Clones this repository's last commit, and runs each command in the README's
blocks, in order and as written. Each command runs in a new shell that has only HOME and PATH=/usr/bin:/bin. This takes
half an hour on two idle cores, and 3 GB of disk. --only runs only commands that contain one of these words, which are
separated by commas. --keep runs the commands in the folder DIR of an earlier call.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMAND = re.compile(r'^((?:\w+=\S+ )?(?:\.|betarank|make|pip|python3?) (?:\\\n|.)*)', re.M)
# Commands that aren't run, by a word in them, and why.
LEFT_OUT = {
  '--topology=': 'needs the extra tpu', 'make test': 'the tests',
  'python -m ': 'a program of its own, of minutes to hours'}
# Commands that run until Ctrl-C, by a word in them: (seconds until Ctrl-C, exit status).
UNTIL_CTRL_C = {'betarank explore': (90, 0), 'JAX_DISABLE_JIT=1': (60, 130)}


def blocks(text):
  """Returns [(language, content)] of the fenced blocks of a document. The language is '' for blocks of commands or
  output.
  """
  return re.findall(r'^```(\w*)\n(.*?)^```', text, re.M | re.S)


def commands(text):
  """Returns the commands in the blocks of a document, in order and as written."""
  return [found.rstrip() for language, content in blocks(text) if not language for found in COMMAND.findall(content)]


def reason_to_leave_out(command):
  """Returns the reason why a command isn't run; '' if it is run."""
  return next((why for word, why in LEFT_OUT.items() if word in command and '-m venv' not in command), '')


def main():
  parser = argparse.ArgumentParser(prog='python -m tests.newcomer', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default='')
  parser.add_argument('--keep', default='', metavar='DIR')
  args = parser.parse_args()
  place = pathlib.Path(args.keep or tempfile.mkdtemp(prefix='newcomer-')).resolve()
  clone, home = place / 'betarank', place / 'home'
  home.mkdir(parents=True, exist_ok=True)
  if not clone.exists():
    subprocess.run(['git', 'clone', '--quiet', str(ROOT), str(clone)], check=True)
  text = (clone / 'README.md').read_text(encoding='utf-8')
  [config] = [content for language, content in blocks(text) if language == 'python' and 'def get_config' in content]
  (clone / 'my.py').write_text(config)
  (clone / 'corpus').mkdir(exist_ok=True)
  (clone / 'corpus' / 'documents.txt').write_text(''.join(p.read_text() for p in sorted(clone.rglob('*.md'))))
  words = [word for word in args.only.split(',') if word]
  failed = [command for number, command in enumerate(commands(text))
            if (not words or any(word in command for word in words)) and not type_in(command, clone, home, number)]
  print(f'{len(failed)} failed' if failed else f'all as the README says, in {place}')
  sys.exit(bool(failed))


def type_in(command, clone, home, number):
  """Runs a command in a new shell, and prints how it ended. Returns True if it succeeded, or if it is left out."""
  shown = ' '.join(command.split('#')[0].replace('\\\n', ' ').split())[:90]
  if why := reason_to_leave_out(command):
    print(f'left out         {shown}: {why}', flush=True)
    return True
  limit, want = next((x for word, x in UNTIL_CTRL_C.items() if word in command), (0, 0))
  end = f'timeout --signal=INT --preserve-status {limit} ' if limit else ''
  line = re.sub(r'(?=betarank )', end, command, count=1) if limit else command
  log, began = clone.parent / f'{number:02d}.log', time.monotonic()
  alone = {'HOME': str(home), 'PATH': '/usr/bin:/bin', 'LANG': 'C.UTF-8'}
  with log.open('w') as out:
    status = subprocess.run(
      ['bash', '--norc', '-c', f'[ -d .venv ] && . .venv/bin/activate\n{line}'], cwd=clone, stdin=subprocess.DEVNULL,
      stdout=out, stderr=subprocess.STDOUT, env=alone).returncode
  well = status == want and 'Traceback' not in log.read_text(errors='replace')
  print(f'{"well" if well else "NOT WELL":8} {time.monotonic() - began:5.0f} s  {shown}'
        + ('' if well else f': status {status}, {log}'), flush=True)
  return well


if __name__ == '__main__':
  os.environ.pop('PYTHONPATH', None)
  main()
