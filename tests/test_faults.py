"""Tests each class of faults at two points, and what counts as survived. `python -m tests.faults` tests many points."""

import contextlib
import json
import os
import random
import subprocess
import sys
import types
import urllib.request

import pytest

from tests import runs
from tests.bucket import Bucket, disturb
from tests.faults import buckets, campaign
from tests.faults.__main__ import attempt, run
from tests.faults.campaign import Campaign, Missed, contents, kill, wait
from tests.faults.classes import CLASSES
from tests.xla_flags import QUICK_AND_FAST

SLEEP = 'import time; time.sleep(60)'


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """Returns the folder of all campaigns, which share their inputs, undisturbed runs and compiled programs.

  Commands compile quickly, also in `make test-all`: what is tested is what processes do, not what they compute.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(runs, 'XLA_FLAGS', QUICK_AND_FAST)
    yield tmp_path_factory.mktemp('faults')


@pytest.mark.slow  # the undisturbed runs alone take half a minute
@pytest.mark.parametrize('name', CLASSES)
def test_two_points_of_every_class(name, root):
  lines = []
  counts, notes = run(seed=1, points=2, names=[name], parallel=2, root=root, say=lines.append, processes=4)
  for counted, count in counts.items():
    if notes[counted] and all(note.startswith('skipped: ') for note in notes[counted]):
      pytest.skip(f'{counted}: {next(iter(notes[counted]))}')  # this account may not do it
    whole = '\n'.join([counted, *map(str, notes[counted]), *lines])  # pytest shortens all but strings
    assert count['survived'] == count['tried'] > 0, whole


class Scripts(Campaign):
  """A campaign whose every command is the same script. An undisturbed `train` leaves the metrics of two steps."""

  def __init__(self, root, script):
    super().__init__(root)
    self.script, self.ready, self.kinds['train'].took_s = script, {'train'}, 0.3
    undisturbed = self.undisturbed(self.kinds['train'])
    undisturbed.mkdir(parents=True)
    (undisturbed / 'metrics.jsonl').write_text('{"step": 1, "train/ce_nats": 3}\n{"step": 2, "train/ce_nats": 2}\n')

  def start(self, place, args, **popen):
    return python(self.script, cwd=place, env={**os.environ, 'HOME': str(place)}, **popen)


class Early(random.Random):
  def uniform(self, a, b):
    return a


def python(script, **popen):
  return subprocess.Popen([sys.executable, '-S', '-c', script], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, **popen)


@pytest.mark.parametrize('name, script, why', [
  ('SIGTERM', f"""
import os
os.mkdir('workdir')
with open('workdir/metrics.jsonl', 'w') as file: file.write('{{"step": 1, "train/ce_nats": 3}}\\n')
{SLEEP}""", 'metrics.jsonl differs'),
  ('Ctrl-C in train', SLEEP, 'KeyboardInterrupt'),
  ('Ctrl-C in train', f'import signal; signal.signal(2, signal.SIG_DFL); {SLEEP}', 'metrics.jsonl is missing'),
  ('SIGTERM', '1 / 0', 'ZeroDivisionError'),
])
def test_a_run_that_handles_no_signal_or_fails_by_itself_has_not_survived(name, script, why, tmp_path):
  survived, [note] = attempt(Scripts(tmp_path, script), name, 0, 0)
  assert survived is False and why in note, note


def test_a_command_that_ended_before_was_hit_by_nothing(tmp_path, monkeypatch):
  for name in ('check_same', 'check_clean'):
    monkeypatch.setattr(Scripts, name, lambda *_: None)
  with pytest.raises(Missed):
    CLASSES['data SIGKILL in parts'][0](Scripts(tmp_path, ''), tmp_path / 'place', Early(0))


def test_a_fault_needs_a_process_that_runs(monkeypatch):
  failed = 'exit 1 before the fault: (.|\n)*ZeroDivisionError'
  for script, error, why in (('', Missed, None), ('1 / 0', AssertionError, failed)):
    with pytest.raises(error, match=why):
      wait([python(script)], lambda: False)
    with pytest.raises(error, match=why):
      wait([python(script)], lambda: True, 0.5)
    ended = python(script)
    ended.wait()
    with pytest.raises(error, match=why):
      kill(ended)
  with monkeypatch.context() as patch:
    patch.setattr(campaign, 'PATIENCE_S', 0.1)
    running = python(SLEEP)
    with pytest.raises(AssertionError, match='within 0.1 s'):
      wait([running], lambda: False)
  wait([running], lambda: True)
  kill(running)


def test_results_in_json_are_compared_but_not_their_times_and_paths(tmp_path):
  def left(name, nats, seconds):
    path = tmp_path / name / 'workdir/eval/probe/12.json'
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({'checkpoint': str(tmp_path / name / 'workdir/checkpoints/12'), 'seconds': seconds,
                                'from': 'gs://bucket/run', 'domains': {'main': {'ce_nats': nats, 'seconds': seconds}}}))
    return contents(tmp_path / name / 'workdir')

  assert left('a', 1.5, 1) == left('b', 1.5, 2) != left('c', 1.25, 1)
  assert left('d', 1.5, 1)['eval/probe/12.json'] == {'checkpoint': '12', 'from': 'gs://bucket/run',
                                                     'domains': {'main': {'ce_nats': 1.5}}}


def test_a_bucket_counts_the_requests_that_a_fault_has_hit(tmp_path):
  (tmp_path / 'b').mkdir()
  (tmp_path / 'b/x').write_text('x')
  ask = lambda path: urllib.request.urlopen(f'{bucket.endpoint}/storage/v1/b/b/o{path}', timeout=60).read()
  with Bucket(tmp_path) as bucket:
    counts, stale = [], {'stale_s': 60}
    for faults, path in (({}, '/x'), (stale, ''), (stale, '?prefix=y'), ({'latency_s': 0.01}, '/x')):
      disturb(bucket.endpoint, **faults)
      ask(path)
      counts.append(disturb(bucket.endpoint))
  assert counts == [{'requests': n, 'struck': struck} for n, struck in ((1, 0), (2, 1), (3, 1), (4, 2))]


def test_a_fault_of_a_bucket_that_hits_no_request_is_missed(tmp_path, monkeypatch):
  drawn, store = [], types.SimpleNamespace(disturb=lambda **_: {'requests': 9, 'struck': 0})
  monkeypatch.setattr(buckets, 'undisturbed', lambda *_: None)
  monkeypatch.setattr(buckets, 'served', lambda *_: contextlib.nullcontext(store))
  monkeypatch.setattr(buckets, 'launch', lambda c, place, store, command: drawn.append(command) or python(''))
  for seed in range(20):
    with pytest.raises(Missed):
      CLASSES['bucket: lost answers'][0](Campaign(tmp_path), tmp_path, random.Random(seed))
  assert set(drawn) <= set(buckets.WRITERS)
