"""python -m tests.newcomer [--only=WORDS] [--keep=DIR] [DOCUMENT ...]

Does what README.md, and then each file of docs/, tells a newcomer to do. Clones this repository's last commit, and runs
each command in the documents' blocks, in order and as written. Each command runs in a new shell that has only HOME and
PATH=/usr/bin:/bin. Placeholders (RUN, FILE) and a reader's own runs (runs/mine) are replaced by runs of `make smoke`;
commands that need a cloud, a GPU or a download are left out. This takes an hour on two idle cores, and 3 GB of disk.
--only runs only commands that contain one of these words, which are separated by commas. --keep runs the commands in
the folder DIR of an earlier call.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMAND = re.compile(r'^(?:\$ )?((?:\w+=\S+ )?(?:\.|betarank|make|pip|python3?) (?:\\\n|.)*)', re.M)
# Commands that aren't run, by a pattern, and why.
LEFT_OUT = {
  r'--topology=|betarank plan|--plan\b': 'needs the extra tpu', 'make test': 'the tests',
  r'python3? -m (?!venv)': 'a program of its own, of minutes to hours', r'gs://(?!.*--dry_run)': 'needs a bucket',
  r"--on='|--on=tpu(?!.*--dry_run)": 'needs a cluster', r'\bDIR\b|Qwen3|\.\.\. ': 'needs files that a reader has',
  'code:': "needs a reader's own programs", 'eval harness': 'needs the extra lm_eval',
  '(configs|runs)/small': 'needs a GPU'}
# Commands that run until Ctrl-C, by a pattern: (seconds until Ctrl-C, exit status).
UNTIL_CTRL_C = {'betarank explore(?!.*--export)': (90, 0), 'JAX_DISABLE_JIT=1': (60, 130), 'rl --from=': (90, 130),
                'report.*--watch': (90, 130), r'runs/sweep --(only|parallel)': (90, 130)}
# What stands in documents for a reader's own.
OWN = {r'\bRUN\b': 'runs/mine', r'\bFILE\b': 'configs/smoke.py', r' \[[^\]]*\]': ''}
OWN_RUNS = {'mine': 'beta=0', 'mine_rl': 'rl/beta=0', 'other_rl': 'rl/beta=-0.25', 'sweep': '.'}  # runs of `make smoke`


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
  line = command.replace('\\\n', ' ')
  return next((why for pattern, why in LEFT_OUT.items() if re.search(pattern, line)), '')


def main():
  parser = argparse.ArgumentParser(prog='python -m tests.newcomer', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('documents', nargs='*', metavar='DOCUMENT')
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
  failed = 0
  for document in args.documents or ['README.md', *sorted(str(p.relative_to(clone)) for p in clone.glob('docs/*.md'))]:
    for number, command in enumerate(commands((clone / document).read_text(encoding='utf-8'))):
      if not words or any(word in command for word in words):
        failed += not type_in(command, clone, home, f'{pathlib.Path(document).stem}-{number:02d}')
    link_own_runs(clone / 'runs')
  print(f'{failed} failed' if failed else f'all as the documents say, in {place}')
  sys.exit(bool(failed))


def link_own_runs(runs):
  """Gives the runs of `make smoke` the names that docs/ has for a reader's own."""
  for name, of in OWN_RUNS.items():
    if (runs / 'smoke' / 'reasoning' / of).exists() and not (runs / name).exists():
      shutil.copytree(runs / 'smoke' / 'reasoning' / of, runs / name)


def filled(command):
  """Returns a command with a reader's own runs and files in place of placeholders, and without optional flags."""
  for pattern, own in OWN.items():
    command = re.sub(pattern, own, command)
  return command


def type_in(command, clone, home, number):
  """Runs a command in a new shell, and prints how it ended. Returns True if it succeeded, or if it is left out.

  number: the name of the file for its output.
  """
  shown = ' '.join(command.split('#')[0].replace('\\\n', ' ').split())[:90]
  if why := reason_to_leave_out(command):
    print(f'left out         {shown}: {why}', flush=True)
    return True
  command = filled(command)
  limit, want = next((x for pattern, x in UNTIL_CTRL_C.items() if re.search(pattern, command)), (0, 0))
  end = f'timeout --signal=INT --preserve-status {limit} ' if limit else ''
  line = re.sub(r'(?=betarank )', end, command, count=1) if limit else command
  log, began = clone.parent / f'{number}.log', time.monotonic()
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
