"""Tests that every error in a config gives one line that names the key, and that valid settings get the intended
values.
"""

import dataclasses
import json
import os
import subprocess

import pytest
from ml_collections import ConfigDict

from betarank.configs import command, common, load
from betarank.configs.errors import ConfigError
from betarank.configs.parser import Parser
from betarank.configs.sections import section
from betarank.data import DataConfig
from tests.runs import BETARANK

SMOKE = 'configs/smoke.py'


def refused(*argv):
  with pytest.raises(ConfigError) as error:
    load.from_command_line(Parser('x'), ['--config=' + SMOKE, *argv])
  assert '\n' not in str(error.value)
  return str(error.value)


def test_argument_overrides_and_derived_values():
  config, _ = load.from_command_line(
    Parser('x'),
    [f'--config={SMOKE}:beta=-0.25', '--config.optimizer.lr=1e-3', '--config.train.tokens', '1e6',
     '--config.model.vocab_size=2048', '--config.log.tensorboard=false'])
  assert config.objective.beta == -0.25
  assert config.optimizer.lr == 1e-3
  assert config.train.tokens == 1_000_000 and isinstance(config.train.tokens, int)
  assert config.data.vocab_size == 2048  # follows the model's
  assert config.log.tensorboard is False


@pytest.mark.parametrize(
  'argv, message',
  [
    (['--config.optimizer.lrr=1'], 'config.optimizer.lrr: no such key; did you mean config.optimizer.lr?'),
    (['--config.optimiser.lr=1'], 'config.optimiser.lr: no such key; did you mean config.optimizer.lr?'),
    (['--config.lr=1'], 'config.lr: no such key; did you mean config.optimizer.lr?'),
    (['--config.train.tokens.more=1'], 'config.train.tokens.more: no such key'),
    (['--config.optimizer.lr=fast'], "config.optimizer.lr: expected a number, got 'fast'"),
    (['--config.train.tokens=1.5'], "config.train.tokens: expected a whole number, got '1.5'"),
    (['--config.train.tokens=inf'], 'config.train.tokens: expected a whole number'),
    (['--config.log.tensorboard=maybe'], "config.log.tensorboard: expected true or false, got 'maybe'"),
    (['--config.data.sources=[1]'], 'config.data.sources: expected a JSON object'),
    (['--config.optimizer.lr'], '--config.optimizer.lr: has no value'),
    (['--confg.optimizer.lr=1'], '--confg.optimizer.lr: no such flag'),
  ],
)
def test_overrides_that_cannot_be(argv, message):
  assert refused(*argv).startswith(message)


def test_a_whole_number_in_an_entry_may_become_a_fraction():
  """A config may write weight=2, although a weight is any number. The types of entries are checked later."""
  web = {'data.sources': '{"web": {"uri": "text:/x", "weight": 2, "max_documents": 0, "max_bad_rows": 0, '
                         '"template": ""}}'}
  for text in ('0.5', '3'):
    assert load.load(SMOKE, {**web, 'data.sources.web.weight': text}).data.sources.web.weight == float(text)
  wrong = load.load(SMOKE, {**web, 'data.sources.web.max_documents': '0.5'})
  with pytest.raises(ConfigError, match='config.data.sources.web.max_documents: expected a whole number, got 0.5'):
    section(DataConfig, wrong.data, 'data')


@pytest.mark.parametrize(
  'spec, message',
  [
    ('configs/smok.py', 'did you mean configs/smoke.py?'),
    ('configs/smoke.py:bta=1', "'bta': this file takes beta"),
    ('configs/smoke.py:beta=x', 'expected beta=VALUE, where VALUE is a number'),
    ('configs/smoke.py:beta', 'expected beta=VALUE, where VALUE is a number'),
    ('configs/load.py', 'has no function get_config'),
    ('smoke', 'expected FILE.py'),
    ('missing.json', 'no such file'),
  ],
)
def test_files_that_cannot_be(spec, message):
  with pytest.raises(ConfigError, match='.') as error:
    load.load(spec)
  assert message in str(error.value)


@dataclasses.dataclass(frozen=True)
class Inner:
  size: int
  rate: float
  names: tuple[str, ...] = ()

  def __post_init__(self):
    if self.size < 1:
      raise ValueError(f'size must be >= 1, got {self.size}')


@dataclasses.dataclass(frozen=True)
class Outer:
  inner: Inner
  many: dict[str, Inner]


def test_sections_become_dataclasses():
  got = section(Outer, {'inner': {'size': 2, 'rate': 1, 'names': ['a']}, 'many': {'x': {'size': 1, 'rate': 0.5}}})
  assert got == Outer(Inner(2, 1.0, ('a',)), {'x': Inner(1, 0.5)})
  assert isinstance(got.inner.rate, float)


@pytest.mark.parametrize(
  'values, message',
  [
    ({'inner': {'size': 0, 'rate': 1.0}, 'many': {}}, 'config.inner.size must be >= 1, got 0'),
    ({'inner': {'siz': 1, 'rate': 1.0}, 'many': {}}, 'config.inner.siz: no such key; did you mean config.inner.size?'),
    ({'inner': {'size': 1}, 'many': {}}, 'config.inner.rate: missing'),
    ({'inner': {'size': '1', 'rate': 1.0}, 'many': {}}, "config.inner.size: expected a whole number, got '1'"),
    ({'inner': {'size': True, 'rate': 1.0}, 'many': {}}, 'config.inner.size: expected a whole number, got True'),
    ({'inner': {'size': 1, 'rate': float('nan')}, 'many': {}}, 'config.inner.rate: expected a finite number, got nan'),
    ({'inner': {'size': 1, 'rate': 1.0, 'names': [3]}, 'many': {}}, 'config.inner.names[0]: expected text, got 3'),
    ({'inner': 3, 'many': {}}, 'config.inner: expected a section, got 3'),
    ({'inner': {'size': 1, 'rate': 1.0}, 'many': {'x': {'size': -1, 'rate': 1.0}}}, 'config.many.x.size must be >= 1'),
  ],
)
def test_sections_that_cannot_be(values, message):
  with pytest.raises(ConfigError) as error:
    section(Outer, values)
  assert str(error.value).startswith(message)


def test_resolved_config_loads_back_equal(tmp_path):
  config = load.load(SMOKE + ':beta=0.5', {'optimizer.lr': '2e-3', 'data.sources.main.weight': '0.5'})
  path = tmp_path / 'config.json'
  path.write_text(load.to_json(config))
  assert load.load(str(path)).to_dict() == config.to_dict()
  assert load.load(str(path), {'seed': '4'}).seed == 4
  path.write_text('{"seed": ')
  with pytest.raises(ConfigError, match='not a resolved config'):
    load.load(str(path))
  json.loads(load.to_json(config))


def test_the_config_command_takes_its_file_with_and_without_the_flag(capsys):
  outs = []
  for word in (SMOKE, f'--config={SMOKE}'):
    command.main([word, '--config.optimizer.lr=1e-3'])
    outs.append(capsys.readouterr().out)
  assert outs[0] == outs[1] and 'optimizer.lr = 0.001' in outs[0]


def test_a_value_after_a_space_is_no_argument_of_the_command(capsys):
  command.main([f'--config={SMOKE}', '--config.seed', '5', '--config.optimizer.weight-decay', '-1e-3'])
  out = capsys.readouterr().out
  assert 'seed = 5 ' in out and 'weight_decay = -0.001 ' in out
  for rest in ([], ['--list'], ['--config.optimizer.lr=1']):
    with pytest.raises(ConfigError, match='--config.seed: has no value; write --config.seed=VALUE'):
      command.main([f'--config={SMOKE}', '--config.seed', *rest])


@pytest.mark.parametrize('text, message', [
  ('[' * 100_000, "expected a JSON object, got '[["),
  ('{"__class__": {}}', "not a section ('__class__ cannot be overridden.')"),
  ('{"a.b": {}}', 'not a section (ConfigDict does not accept dots in field names'),
])
def test_hostile_sections_are_refused_with_the_reason(text, message):
  with pytest.raises(ConfigError, match='^config.data.sources: ') as error:
    load.load(SMOKE, {'data.sources': text})
  assert message in str(error.value)


def test_in_a_resolved_config_no_default_is_shown_as_changed(tmp_path, capsys):
  """JSON has lists in place of tuples. An empty section counted as changed too, because the config is locked."""
  path = tmp_path / 'config.json'
  path.write_text(load.to_json(common.rl_base()))
  command.main([str(path)])
  out = capsys.readouterr().out
  assert 'rl.max_new_tokens = [8192, 16384]' in out and '# default' not in out


def test_parse_reads_by_the_type_of_the_default():
  got = common.parse('beta=1,name=x,flag=true', beta=0.0, name='', flag=False, rest=3)
  assert (got.beta, got.name, got.flag, got.rest) == (1.0, 'x', True, 3)


def test_the_command_line_ends_with_one_line_and_touches_no_device():
  done = subprocess.run(
    [*BETARANK, 'train', '--config=configs/smoke.py', '--workdir=/nonexistent', '--config.optimizer.lrr=1'],
    capture_output=True, text=True, env={'PATH': '', 'JAX_PLATFORMS': 'none_such'})
  assert done.returncode == 2
  assert done.stderr == 'error: config.optimizer.lrr: no such key; did you mean config.optimizer.lr?\n'


def test_a_reader_that_goes_away_ends_a_command_silently():
  """As in `betarank --help | head`, the pipe is closed, here before anything is written to it."""
  reader, writer = os.pipe()
  os.close(reader)
  done = subprocess.run([*BETARANK, '--help'], stdout=writer, stderr=subprocess.PIPE, text=True)
  os.close(writer)
  assert (done.returncode, done.stderr) == (141, '')


@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_output_to_a_full_disk_is_one_line(unbuffered):
  with open('/dev/full', 'w') as full:
    done = subprocess.run([*BETARANK, '--help'], stdout=full, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, 'PYTHONUNBUFFERED': unbuffered})
  assert (done.returncode, done.stderr) == (2, 'error: standard output or a file: No space left on device\n')


def test_a_path_that_is_no_text_is_left_to_its_check():
  config = ConfigDict({'train': {'init_from': None}})
  load.apply_paths(config, {}, ['train.init_from', 'data.dir'])
  assert config.to_dict() == {'train': {'init_from': None}}
