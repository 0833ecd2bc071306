"""Tests that `python -m tests.soak` finds growth, and reports none where there is none, and that
`python -m tests.soak.scale` ends if a process fails.
"""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.soak import hosts
from tests.soak.watch import Sample, Watch, gpu_mb, rows, slope

ROOT = pathlib.Path(__file__).resolve().parent.parent

GROWING = """
import sys, threading, time
kept = []
for i in range(600):
  if 'leak' in sys.argv:
    kept.append(open('/dev/null'))
    kept.append(bytearray(200_000))
  print(i, file=sys.stderr, flush=True)
  time.sleep(0.004)
"""


def test_a_slope_is_found_with_its_error():
  rng, at = np.random.default_rng(0), np.arange(4000)
  per_1000, error = slope(at, 100 + 2.5 * at / 1000 + rng.normal(0, 3, at.size))
  assert error < 0.1 and per_1000 == pytest.approx(2.5, abs=4 * error)
  flat, error = slope(at, 100 + rng.normal(0, 3, at.size))
  assert abs(flat) < 4 * error


def series(memory, step_s=lambda i: 0.01, gpu=lambda i: None):
  time_s = np.cumsum([step_s(i) for i in range(1000)])
  return [Sample(time_s[i], i * 10, time_s[i], {7: {
    'memory MB': memory(i), 'own memory MB': memory(i), 'threads': 30, 'open files': 12}}, gpu(i))
          for i in range(1000)]


def grown(samples):
  return {row.figure for row in rows(samples, {7: 'it'}) if not row.flat}


def test_figures_that_grow_are_named_and_those_that_settle_are_not():
  assert grown(series(lambda i: 300.0)) == set()
  assert grown(series(lambda i: 300 + 0.02 * i)) == {'memory MB', 'own memory MB'}  # 2 MB per 1000 steps
  assert grown(series(lambda i: 300 + 40 * min(i, 150) / 150)) == set()  # only during the warm-up
  assert grown(series(lambda i: 300 + (i % 90))) == set()  # up and down, as with a garbage collector
  assert grown(series(lambda i: 300.0, lambda i: 0.01 + 3e-6 * i)) == {'ms per step', 'CPU ms per step'}
  assert grown(series(lambda i: 300.0, gpu=lambda i: 900.0)) == set()
  assert grown(series(lambda i: 300.0, gpu=lambda i: 900 + i // 50)) == {'GPU MB'}


def test_figures_that_are_not_observed_have_no_row():
  samples = series(lambda i: 300.0)
  for sample in samples:
    del sample.figures[7]['own memory MB']
  found = [row.figure for row in rows(samples, {7: 'it'})]
  assert found == ['memory MB', 'threads', 'open files', 'processes', 'ms per step', 'CPU ms per step']


@pytest.mark.parametrize('script, memory_mb', [
  ('printf "512\\n1024\\n"', 1536), ('echo "[N/A]"', None), ('echo "no driver"; exit 9', None), ('true', None),
  (None, None)])
def test_the_memory_of_all_gpus_is_what_nvidia_smi_says(tmp_path, monkeypatch, script, memory_mb):
  monkeypatch.setenv('PATH', str(tmp_path))
  if script:
    (tmp_path / 'nvidia-smi').write_text(f'#!/bin/sh\n[ "$1" = --query-gpu=memory.used ] || exit 2\n{script}\n')
    (tmp_path / 'nvidia-smi').chmod(0o755)
  assert gpu_mb() == memory_mb


@pytest.mark.parametrize('leaks', [False, True])
def test_a_process_that_leaks_is_caught(tmp_path, leaks):
  with open(tmp_path / 'steps', 'w') as out:
    process = subprocess.Popen([sys.executable, '-c', GROWING, *['leak'] * leaks], stderr=out)
  watch = Watch('it', process, lambda: (tmp_path / 'steps').read_text().count('\n'), every_s=0.02)
  process.wait(120)
  watch.join()
  found = {row.figure for row in rows(watch.samples, watch.names) if not row.flat and 'step' not in row.figure}
  assert found == ({'memory MB', 'own memory MB', 'open files'} if leaks else set())


# Prints when it is ready, and waits for a line. Process 1 then fails, and the others run for very long.
LIGHT = """
import sys, time
if sys.argv[2] == 'early' and sys.argv[1] == '1':
  raise OSError('no such disk')
print('ready', flush=True)
sys.stdin.readline()
if sys.argv[2] == 'late' and sys.argv[1] == '1':
  raise OSError('no such disk')
if sys.argv[2] != 'never':
  time.sleep(3600)
print(sys.argv[1])
"""


@pytest.mark.parametrize('when', ['early', 'late'])
def test_a_light_process_that_fails_is_named_and_the_others_are_killed(when):
  with pytest.raises(hosts.HostFailed, match='^process 1 ended with status 1: OSError: no such disk$'):
    hosts.run({i: [sys.executable, '-c', LIGHT, i, when] for i in range(3)})


def test_light_processes_that_end_well_return_what_they_print():
  assert hosts.run({i: [sys.executable, '-c', LIGHT, i, 'never'] for i in (0, 2)}) == {0: '0\n', 2: '2\n'}


FORKS = """
import os, sys, time
from tests.soak import hosts

def body(index, pipe):
  pipe.send(os.getpid())
  pipe.recv()
  if index == 1:
    os.kill(os.getpid(), 9) if sys.argv[1] == 'killed' else 1 / int(sys.argv[1] != 'raises')
  time.sleep(0 if sys.argv[1] == 'well' else 3600)
  pipe.send(index)

with hosts.Forks(3, body) as forks:
  print(*forks.hear(), flush=True)
  forks.tell()
  print(forks.hear(), file=sys.stderr)
  forks.join()
"""


@pytest.mark.parametrize('what, status, said', [
  ('well', 0, '[0, 1, 2]'),
  ('raises', 1, 'process 1 ended with status 1: ZeroDivisionError: division by zero'),
  ('killed', 1, 'process 1 ended with status -9: it wrote no error')])
def test_a_fork_that_fails_is_named_and_the_others_are_killed(what, status, said):
  ended = subprocess.run([sys.executable, '-c', FORKS, what], cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert (ended.returncode, ended.stderr) == (status, said + '\n')
  assert not [pid for pid in ended.stdout.split() if os.path.exists(f'/proc/{pid}')]
