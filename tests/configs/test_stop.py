"""Tests that a command that is asked to stop finishes its step, saves, and tells this by its exit status.

A second Ctrl-C ends the command at once.
"""

import importlib
import json
import os
import signal
import sys
import time

import pytest

from betarank import __main__
from betarank.__main__ import COMMANDS
from betarank.configs.errors import run_main
from betarank.configs.stop import Stopped, StopSignal, interruptible
from tests.runs import betarank, finish, finish_well, free_port, python

STEPS = '''
import sys, time
from betarank.configs.stop import Stopped, StopSignal
with StopSignal() as stop:
  for step in range(1000):
    print('step', step, flush=True)
    time.sleep(0.05)
    if stop():
      print('saved', step)
      raise Stopped(stop.exit_status)
'''
# Nothing interrupts this hash: the main thread is in C code for years, as it is for minutes in a compilation.
BUSY = '''
import hashlib
from betarank.configs.stop import StopSignal
with StopSignal(before_exit=lambda: print('children are ended', flush=True)):
  print('step 0', flush=True)
  hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)
'''
# A KeyboardInterrupt would crash this import.
IMPORT = '''
import time
from betarank.configs.stop import importing, interruptible
with interruptible(), importing('starting'):
  print('importing', flush=True)
  try:
    time.sleep(60)
  except KeyboardInterrupt:
    raise SystemError('the extension crashes')
'''
JOB = '''
import sys, time
import jax
from betarank.runtime import job
from betarank.configs.stop import Stopped, StopSignal
job.initialize(job.locate(sys.argv[1], 2, int(sys.argv[2])), 60)
with StopSignal(jax.process_count()) as stop:
  for step in range(10_000):
    print('step', step, flush=True)
    time.sleep(0.05)
    if stop():
      print('saved', step, flush=True)
      raise Stopped(stop.exit_status)
'''


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_ends_after_the_step_and_the_save(number, status):
  process = python('-c', STEPS)
  first = process.stdout.readline()
  process.send_signal(number)
  [(code, out, err)] = finish([process], timeout=240)
  lines = [first.strip(), *out.splitlines()]
  assert code == status and lines[-1] == lines[-2].replace('step', 'saved') and 'Traceback' not in err
  assert ('Ctrl-C again ends at once' in err) == (number == signal.SIGINT)


def test_a_second_sigterm_changes_nothing():
  process = python('-c', STEPS)
  process.stdout.readline()
  for _ in range(3):
    process.terminate()
  [(code, out, _)] = finish([process], timeout=240)
  assert code == 143 and 'saved' in out


def test_the_second_ctrl_c_ends_at_once_even_in_c_code():
  process = python('-c', BUSY)
  process.stdout.readline()
  process.send_signal(signal.SIGINT)
  assert 'Ctrl-C again ends at once' in process.stderr.readline()
  process.send_signal(signal.SIGINT)
  [(code, out, _)] = finish([process], timeout=240)
  assert code == 130 and out == 'children are ended\n'


def test_a_command_that_was_asked_ends_with_what_is_kept(capsys):
  with StopSignal(unit='problem') as stop:
    stop.end_if_asked('results are kept')
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(Stopped) as end:
      stop.end_if_asked('results are kept')
    until = time.monotonic() + 60
    while not (err := capsys.readouterr().err) and time.monotonic() < until:  # another thread prints it
      time.sleep(0.001)
  assert end.value.code == 130 and err == 'stopping after this problem; Ctrl-C again ends at once, without saving\n'


def test_signals_act_as_before_after_the_block():
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  with StopSignal() as stop:
    assert not stop()
    signal.raise_signal(signal.SIGTERM)
    assert stop() and stop() and stop.exit_status == 143
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
  assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize('number, statuses', [(signal.SIGTERM, [143, 143]), (signal.SIGINT, [143, 130])])
def test_a_signal_to_one_process_stops_all_at_the_same_step(number, statuses):
  address = f'127.0.0.1:{free_port()}'
  pair = [python('-c', JOB, address, i) for i in range(2)]
  for process in pair:
    assert process.stdout.readline() == 'step 0\n'
  pair[1].send_signal(number)
  results = finish(pair, timeout=120)
  assert [code for code, _, _ in results] == statuses, results
  saved = [out.splitlines()[-1] for _, out, _ in results]
  assert saved[0] == saved[1] and saved[0].startswith('saved ')


def turned_into_another_error():
  try:
    signal.raise_signal(signal.SIGINT)
  except KeyboardInterrupt:
    raise ImportError('an extension could not be initialized') from None


def ignored():
  class Closed:
    def __del__(self):  # Python ignores what is raised here
      signal.raise_signal(signal.SIGINT)

  Closed()
  time.sleep(10)
  raise AssertionError('Ctrl-C was ignored')


@pytest.mark.parametrize('work', [lambda: signal.raise_signal(signal.SIGINT), turned_into_another_error, ignored])
def test_ctrl_c_ends_with_one_line(work, capsys):
  def main():
    with interruptible():
      work()

  hook = sys.unraisablehook
  with pytest.raises(SystemExit) as end:
    run_main(main)
  assert end.value.code == 130 and capsys.readouterr().err == '\nstopped\n'
  assert sys.unraisablehook is hook and signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize('run, status', [('lambda argv: None', 0), ('lambda argv: sys.exit(3)', 3)])
def test_ctrl_c_after_the_end_of_a_command_changes_nothing(run, status):
  process = python('-c', f"""
import atexit, sys, time
from betarank import __main__
atexit.register(lambda: (print('ending', flush=True), time.sleep(60)))
__main__._run = {run}
__main__.main()
""")
  assert process.stdout.readline() == 'ending\n'
  process.send_signal(signal.SIGINT)
  assert finish([process], timeout=60) == [(status, '', '')]


@pytest.mark.parametrize('name', ['train', 'config'])
def test_ctrl_c_ends_a_command_with_one_line(name, monkeypatch, capsys):
  """Ctrl-C right after a command has begun. `python -m tests.faults --only=Ctrl-C` tests random moments."""
  module = importlib.import_module(f'betarank.{COMMANDS[name][0]}')
  monkeypatch.setattr(module, 'main', lambda argv: signal.raise_signal(signal.SIGINT))
  with pytest.raises(SystemExit) as end:
    run_main(lambda: __main__._run([name]))
  assert end.value.code == 130 and capsys.readouterr().err == '\nstopped\n'


def test_ctrl_c_in_an_import_ends_at_once():
  process = python('-c', IMPORT)
  process.stdout.readline()
  process.send_signal(signal.SIGINT)
  assert finish([process], timeout=240) == [(130, '', '\nstopped\n')]


def test_an_error_without_ctrl_c_is_itself():
  with pytest.raises(ImportError), interruptible():
    raise ImportError


def test_the_line_says_what_is_kept(capsys):
  def main():
    raise KeyboardInterrupt('what is prepared is kept')

  with pytest.raises(SystemExit):
    run_main(main)
  assert capsys.readouterr().err == '\nstopped; what is prepared is kept\n'


@pytest.mark.slow
@pytest.mark.parametrize('after, status, said', [
  ('training a tokenizer', 130, 'stopped; what is prepared is kept, and the same command resumes'),
  ('trained in', 0, 'stopping after this piece of up to 128 MB; Ctrl-C again ends at once, without saving')])
def test_data_is_prepared_on_after_ctrl_c(after, status, said, tmp_path):
  """All processes of the process group get the signal, as from a terminal.

  In the second case, Ctrl-C comes so late that the command still finishes all pieces.
  """
  for name in 'ab':
    texts = (' '.join(f'{name}{i * k % 9973}' for k in range(60)) for i in range(20_000))
    (tmp_path / f'{name}.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
  sources = json.dumps({'two': dict(uri=f'jsonl:{tmp_path}/*.jsonl', weight=1.0, max_documents=0, max_bad_rows=0,
                                    template='')})
  command = ['data', 'prepare', '--config=tests/tiny.py', f'--config.data.sources={sources}', '--workers=2']
  process = betarank(*command, f'--config.data.dir={tmp_path}/data', start_new_session=True)
  while after not in process.stdout.readline():
    pass
  time.sleep(1)
  os.killpg(process.pid, signal.SIGINT)
  [(code, _, err)] = finish([process], timeout=240)
  assert code == status and 'Traceback' not in err and err.splitlines()[-1] == said
  for folder in ('data', 'undisturbed'):
    finish_well([betarank(*command, f'--config.data.dir={tmp_path}/{folder}')])
  manifests = [json.loads((tmp_path / folder / 'two' / '1.0.0' / 'manifest.json').read_text()) for folder in
               ('data', 'undisturbed')]
  assert manifests[0]['fingerprint'] == manifests[1]['fingerprint']
