"""Tests that the table of settings is complete, and that resuming and evaluating treat each setting according to its
role.
"""

import dataclasses
import json
import typing

import pytest
from etils import epath

from betarank.configs import common, load, renamed, settings
from betarank.configs.errors import ConfigError
from betarank.configs.sections import section
from betarank.data.config import DataConfig
from betarank.eval.config import EvalConfig
from betarank.rl.config import RlRun
from betarank.runtime import workdir
from betarank.train.config import RunConfig

ROLES = {settings.IDENTITY, settings.DATA, settings.EXECUTION, settings.LENGTH, settings.REPORTING}


def fields(cls, prefix=''):
  """Returns {dotted key: field} of a dataclass whose fields may be dataclasses (sections)."""
  found, hints = {}, typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    if dataclasses.is_dataclass(hints[field.name]):
      found |= fields(hints[field.name], f'{prefix}{field.name}.')
    else:
      found[prefix + field.name] = field
  return found


@pytest.mark.parametrize('tree, cls', [
  (settings.PRETRAIN, RunConfig), (settings.RL, RlRun), (settings.EVAL, EvalConfig)])
def test_the_table_has_each_field_of_the_dataclasses_and_no_other(tree, cls):
  assert settings.flat(tree).keys() == fields(cls).keys()


@pytest.mark.parametrize('tree, cls', [
  (settings.PRETRAIN, RunConfig), (settings.RL, RlRun), (settings.EVAL, EvalConfig)])
def test_a_default_in_a_dataclass_is_that_of_the_table(tree, cls):
  table = settings.flat(tree)
  for key, field in fields(cls).items():
    if field.default is not dataclasses.MISSING:
      assert field.default == table[key].default, key


def test_each_setting_has_one_role_and_a_meaning():
  for tree in (settings.PRETRAIN, settings.RL, {'eval': settings.EVAL}):
    for key, setting in settings.flat(tree).items():
      assert setting.role in ROLES and setting.help, key
      assert settings.role(key) == setting.role, f'{key} has two roles'


@pytest.mark.parametrize('config', [common.base(), common.rl_base()])
def test_each_key_of_a_config_has_a_role(config):
  assert all(settings.role(key) in ROLES for key in load.flatten(config))


def test_a_key_that_is_no_setting_has_no_role():
  with pytest.raises(KeyError):
    settings.role('optimizer.lrr')


@pytest.mark.parametrize('base, key, value, may_change', [
  (common.rl_base, 'rl.microbatch_tokens', 4, True), (common.rl_base, 'rl.decode_batch_size', 32, True),
  (common.rl_base, 'rl.steps', 2000, True), (common.rl_base, 'rl.verifier.workers', 8, True),
  (common.rl_base, 'rl.eval_samples', 8, True), (common.rl_base, 'rl.group_size', 8, False),
  (common.rl_base, 'rl.eval_prompts', 8, True), (common.rl_base, 'rl.eval_tasks', {'aime': 'jsonl:x'}, True),
  (common.rl_base, 'rl.loss.eps_high', 0.3, False), (common.base, 'model.offload_activations', True, True),
  (common.base, 'model.moe.kernel', 'ragged', True), (common.base, 'model.remat_policy', 'full', True),
  (common.base, 'train.tokens', 1, True), (common.base, 'data.sources.main.weight', 2.0, True),
  (common.base, 'objective.beta', 0.5, False), (common.base, 'seed', 1, False)])
def test_a_run_resumes_with_another_execution_but_not_as_another_run(tmp_path, base, key, value, may_change):
  """Settings of the execution, such as the size of microbatches, may change. A run that has no memory left needs this.
  """
  config = base()
  workdir.write_config(epath.Path(tmp_path), config)
  load.override(config, key, json.dumps(value) if not isinstance(value, str) else value)
  if may_change:
    workdir.check_config(epath.Path(tmp_path), config)
  else:
    with pytest.raises(ConfigError, match=rf'holds a run with config.{key}[.\w]* = '):
      workdir.check_config(epath.Path(tmp_path), config)


@pytest.mark.parametrize('content', ['[' * 100_000, '{', '[]', '\xff'])
def test_a_damaged_config_of_a_run_is_one_line(tmp_path, content):
  (tmp_path / 'config.json').write_bytes(content.encode('latin-1'))
  with pytest.raises(ConfigError, match='config.json: not a config .*; remove it'):
    workdir.check_config(epath.Path(tmp_path), common.base())


def test_a_run_with_the_former_default_of_document_bytes_resumes_with_it(tmp_path):
  """The former default was 65,536. The new default is 0, which means the same for rows of up to 8,192 tokens."""
  config = common.base()
  load.override(config, 'data.document_bytes', '65536')
  workdir.write_config(epath.Path(tmp_path), config)
  workdir.check_config(epath.Path(tmp_path), config)
  with pytest.raises(ConfigError, match=r'holds a run with config\.data\.document_bytes = 65536, now 0'):
    workdir.check_config(epath.Path(tmp_path), common.base())
  longest = [section(DataConfig, c.data, 'data').longest_document for c in (config, common.base())]
  assert longest == [65_536, 65_536]  # so data that was prepared with the former default is still read


def test_an_rl_config_holds_only_what_rl_reads():
  """Settings that only pre-training reads are errors in an RL config. They used to be ignored silently."""
  keys = load.flatten(common.rl_base()).keys()
  assert not [key for key in keys if key.startswith(('objective', 'train.tokens', 'train.batch_size', 'data.sources'))]
  for key in ('objective.beta', 'train.tokens', 'train.microbatches', 'train.init_what', 'data.sequence_length',
              'log.sample_tokens'):
    with pytest.raises(ConfigError, match=f'config.{key}: no such key'):
      load.load('configs/rl_smoke.py', {key: '1'})


@pytest.mark.parametrize('old, new', renamed.RENAMED.items())
def test_a_former_key_is_refused_with_its_new_name(tmp_path, old, new):
  with pytest.raises(ConfigError, match=f'config.{old}: is called config.{new} now'):
    load.override(common.base(), old, '1')
  assert settings.role(new) in ROLES


def test_the_config_of_an_earlier_checkpoint_is_brought_up_to_date():
  before = {'model': {'remat': 'full', 'layers': 4, 'moe': {'d_expert': 8}}, 'rl': {'truncated': 'left_out', 'rows': 8}}
  assert renamed.update(before) == {
    'model': {'remat_policy': 'full', 'layers': 4, 'moe': {'expert_d_ff': 8}},
    'rl': {'truncated_reward': 'masked', 'decode_batch_size': 8}}
