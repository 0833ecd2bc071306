"""Tests the campaign of tests/faults itself, without its runs."""

import concurrent.futures
import contextlib
import pathlib
import subprocess
import sys
import threading
import time
import types

import pytest

from tests.faults import buckets, campaign

SLEEPS = [sys.executable, '-c', 'import time; print("starts", flush=True); time.sleep(600)']


def start(place: pathlib.Path) -> subprocess.Popen:
  process = subprocess.Popen(SLEEPS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env={'HOME': str(place)})
  process.stdout.readline()
  return process


@pytest.mark.parametrize('command', ['data', 'train'])
def test_trials_at_once_share_an_undisturbed_run(command, tmp_path, monkeypatch):
  """A trial once killed the command of another trial: both ran it in the folder of undisturbed runs."""
  runs, alone = [], threading.Lock()

  def finish_well(process):
    assert alone.acquire(blocking=False), 'two commands at once'
    time.sleep(0.1)
    runs.append(process)
    alone.release()

  def served(c, place, command, rng):
    place.mkdir(parents=True)
    return contextlib.nullcontext()

  monkeypatch.setattr(buckets, 'served', served)
  monkeypatch.setattr(buckets, 'launch', lambda *_: command)
  c = types.SimpleNamespace(root=tmp_path, finish_well=finish_well)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    assert len(set(pool.map(lambda _: buckets.undisturbed(c, command), range(4)))) == 1
  assert runs == [command] * 2  # the first one compiles


def test_a_command_that_the_campaign_kills_is_said_to_be(tmp_path, monkeypatch):
  process = start(tmp_path / 'one')
  other = start(tmp_path / 'other')
  campaign.kill_all(tmp_path / 'one')
  assert campaign.Campaign.finish(process) == (-9, '', f'killed by the campaign, as all processes of {tmp_path}/one')
  assert other.poll() is None
  monkeypatch.setattr(campaign, 'PATIENCE_S', 0.1)
  with pytest.raises(AssertionError, match='killed by the campaign, because it did not end within 0.1 s'):
    campaign.Campaign.finish(other)
