"""Tests that `python -m tests.soak` finds growth, and reports none where there is none."""

import subprocess
import sys

import numpy as np
import pytest

from tests.soak.watch import Sample, Watch, gpu_mb, rows, slope

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
