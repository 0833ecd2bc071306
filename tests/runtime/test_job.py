"""What a job is started with, and what it makes of a disk's errors."""

import pytest

from betarank.configs.errors import UserError
from betarank.runtime import job
from betarank.runtime.rendezvous import JobError


def test_a_full_disk_is_one_line_that_names_the_workdir():
  message = r'--workdir=RUN: No space left on device \(while a log was written\); the same command resumes'
  with pytest.raises(UserError, match=message), job._storage_errors_as_user_errors('RUN'), \
      open('/dev/full', 'w') as file:
    file.write('x')


def test_other_errors_stay_what_they_are():
  for error in (FileNotFoundError(2, 'no'), TimeoutError('late'), KeyError('x')):
    with pytest.raises(type(error)), job._storage_errors_as_user_errors('RUN'):
      raise error


@pytest.mark.parametrize('flags', [('nonsense', 2, 0), ('host:1234', 2, 2), ('host:1234', 2, -1)])
def test_flags_that_name_no_process_are_refused(flags):
  with pytest.raises(JobError, match='--coordinator='):
    job.locate(*flags)


def test_without_a_coordinator_the_job_is_one_process():
  assert job.locate('', 4, 3)[:3] == ('', 1, 0)


def test_auto_reads_slurms_environment(monkeypatch):
  for name, value in dict(SLURM_JOB_ID='7', SLURM_STEP_NODELIST='node[1-2]', SLURM_NTASKS='2', SLURM_PROCID='1',
                          SLURM_LOCALID='0', SLURM_STEP_NUM_NODES='2').items():
    monkeypatch.setenv(name, value)
  info = job.locate('auto', 1, 0)
  assert info.coordinator.startswith('node1:') and info[1:] == (2, 1, [0])
