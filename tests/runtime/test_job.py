"""Tests the flags with which a job is started, and the messages for errors of a disk."""

import pytest

from betarank.configs import rl_smoke, smoke
from betarank.configs.errors import UserError
from betarank.rl import loop as rl_loop
from betarank.runtime import job
from betarank.runtime.rendezvous import JobError
from betarank.train import loop as train_loop


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
  assert job.locate('', 1, 0)[:3] == ('', 1, 0)
  with pytest.raises(JobError, match='--coordinator=HOST:PORT'):
    job.locate('', 4, 3)


def test_auto_reads_slurms_environment(monkeypatch):
  for name, value in dict(SLURM_JOB_ID='7', SLURM_STEP_NODELIST='node[1-2]', SLURM_NTASKS='2', SLURM_PROCID='1',
                          SLURM_LOCALID='0', SLURM_STEP_NUM_NODES='2').items():
    monkeypatch.setenv(name, value)
  info = job.locate('auto', 1, 0)
  assert info.coordinator.startswith('node1:') and info[1:] == (2, 1, [0])


def fingerprint(loop, config):
  return job._job_fingerprint(config, 'RUN', loop.inputs(config))


def test_processes_of_pre_training_compare_tokenizer_and_data(tmp_path):
  config = smoke.get_config()
  config.data.dir = str(tmp_path)
  before = fingerprint(train_loop, config)
  assert before['config.seed'] == 0 and before['tokenizer'] == before['data manifest of sums'] == 'missing'
  (tmp_path / 'tokenizer.model').write_bytes(b'pieces')
  changed = {name for name, value in fingerprint(train_loop, config).items() if value != before[name]}
  assert changed == {'tokenizer'}


def test_a_tokenizer_s_folder_is_compared_by_its_file(tmp_path):
  config = smoke.get_config()
  config.data.update(dir=str(tmp_path), tokenizer=str(tmp_path))
  (tmp_path / 'tokenizer.model').write_bytes(b'pieces')
  before = fingerprint(train_loop, config)
  (tmp_path / 'tokenizer.json').write_text('{}')
  assert 'missing' != before['tokenizer'] != fingerprint(train_loop, config)['tokenizer'] != 'missing'


def test_processes_of_rl_compare_the_files_of_problems(tmp_path):
  config, file = rl_smoke.get_config(), tmp_path / 'aime.jsonl'
  assert not rl_loop.inputs(config)  # its problems are generated
  file.write_text('{"problem": "1 + 1", "answer": "2"}')
  config.rl.eval_tasks = {'aime': f'jsonl:{file}'}
  before = fingerprint(rl_loop, config)
  file.write_text('{"problem": "1 + 1", "answer": "3"}')
  changed = {name for name, value in fingerprint(rl_loop, config).items() if value != before[name]}
  assert changed == {f'problems {file}'}
