"""Tests where compiled programs are kept between commands."""

import os
import stat

import jax
import pytest

from betarank.runtime import program_cache

DIR, SHORTEST = 'jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs'


@pytest.fixture
def kept(monkeypatch, tmp_path):
  """Returns a function (platform, folder) -> (JAX's cache folder, its shortest compilation) after keep_programs.

  folder: the folder that the user chose, or None.
  """
  before = {name: getattr(jax.config, name) for name in (DIR, SHORTEST)}
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.delenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', raising=False)

  def keep(platform, folder=None):
    monkeypatch.setattr(jax, 'default_backend', lambda: platform)
    jax.config.update(DIR, folder)
    jax.config.update(SHORTEST, 1.0)
    program_cache.keep_programs()
    return getattr(jax.config, DIR), getattr(jax.config, SHORTEST)

  yield keep
  for name, value in before.items():
    jax.config.update(name, value)


def test_programs_of_accelerators_are_kept_in_the_user_s_cache(kept, tmp_path):
  folder = tmp_path / 'betarank' / 'programs'
  assert kept('gpu') == (str(folder), program_cache.SHORTEST_S) and stat.S_IMODE(folder.stat().st_mode) == 0o700
  assert kept('cpu') == (None, 1.0)


def test_the_user_s_own_folder_is_used_and_not_cleaned(kept, tmp_path):
  old = tmp_path / 'old'
  old.touch()
  os.utime(old, (0, 0))
  assert kept('cpu', str(tmp_path)) == kept('gpu', str(tmp_path)) == (str(tmp_path), program_cache.SHORTEST_S)
  assert kept('tpu', 'gs://b/c') == ('gs://b/c', 1.0)  # each small program would be a request to the bucket
  assert old.exists() and not (tmp_path / 'betarank').exists()


def test_old_programs_are_removed(kept, tmp_path):
  folder = tmp_path / 'betarank' / 'programs'
  kept('gpu')
  (folder / 'autotuning').mkdir()
  old, new = folder / 'autotuning' / 'old', folder / 'new'
  for file, days in ((old, program_cache.KEPT_DAYS + 1), (new, 1)):
    file.touch()
    os.utime(file, (0, os.stat(file).st_mtime - 86400 * days))
  kept('gpu')
  assert new.exists() and not old.exists()


def test_nothing_is_kept_where_others_can_write_or_by_a_job_of_several_processes(kept, tmp_path, monkeypatch):
  folder = tmp_path / 'betarank'
  folder.mkdir()
  folder.chmod(0o770)  # a member of the group could replace the programs
  assert kept('gpu') == (None, 1.0)
  folder.chmod(0o700)
  assert kept('gpu')[0]
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  assert kept('gpu') == (None, 1.0)


def test_nothing_is_kept_where_nothing_can_be_written(kept, tmp_path):
  (tmp_path / 'betarank').touch()
  assert kept('gpu') == (None, 1.0)
