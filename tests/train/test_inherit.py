"""Tests that a run that starts from a checkpoint has the checkpoint's model, and that other settings of the model are
errors.
"""

import pytest

from betarank.configs import common, load
from betarank.configs.errors import ConfigError
from betarank.configs.parser import Parser
from betarank.rl import command as rl_command
from betarank.runtime.flags import add_run_flags
from betarank.train import command, setup
from betarank.train.config import run_config
from betarank.train.inherit import describe_rope, inherit_model


@pytest.fixture
def trained():
  model = load.load('configs/smoke.py', {'model.layers': '3', 'model.remat_policy': 'full'}).model
  return {'config': {'model': model.to_dict()}}


def test_what_is_learned_is_taken_and_how_it_is_computed_is_not(trained):
  config = common.base()
  inherit_model(config, trained, {'optimizer.lr': '1', 'model.layers': '3'})
  width = trained['config']['model']['d_model']
  assert (config.model.layers, config.model.d_model, config.model.vocab_size) == (3, width, 1024)
  assert config.data.vocab_size == 1024 and config.model.remat_policy == 'none'


def test_a_config_without_a_model_gets_it_whole(trained):
  config = common.rl_base()
  inherit_model(config, trained, {})
  assert config.model.to_dict() == trained['config']['model']


@pytest.mark.parametrize('key, text', [('model.layers', '4'), ('model.rope_base', '5e5'), ('model.moe.experts', '8')])
def test_an_override_that_contradicts_is_refused(trained, key, text):
  with pytest.raises(ConfigError, match=rf'config\.{key} is .* in the checkpoint to start from'):
    inherit_model(common.base(), trained, {key: text})


@pytest.mark.parametrize('asked, base', [
  ((), 5e5),  # the config has the default
  (('--config.model.rope_base=1e4',), 1e4),
  ((':rope_base=1e6',), 1e6),
  ((':rope_base=1e6', '--config.model.rope_base=2e6'), 2e6)])
def test_training_may_change_the_rotary_embedding_and_says_so(trained, resolved, tmp_path, asked, base):
  trained['config']['model']['rope_base'] = 5e5
  (tmp_path / 'x.py').write_text(
    'from betarank.configs import common\n\n\ndef get_config(arg=None):\n  c = common.base()\n'
    '  c.model.rope_base = common.parse(arg, rope_base=c.model.rope_base).rope_base\n  return c\n')
  spec = ''.join(text for text in asked if text.startswith(':'))
  overrides = [text for text in asked if text.startswith('--')]
  config = resolved(f'--config={tmp_path}/x.py{spec}', '--config.train.init_from=~/parent', *overrides)
  assert config.model.rope_base == base and config.model.layers == 3
  said = describe_rope(run_config(config).model, trained)
  assert said == (f'model.rope_base: 500,000 in the checkpoint, {base:,.0f} from now on' if base != 5e5 else '')
  assert not describe_rope(run_config(config).model, {})


def test_the_paper_s_mid_training_has_its_own_rotary_embedding(trained, resolved):
  assert trained['config']['model']['rope_base'] == 1e4
  config = resolved('--config=configs/paper/dense_1b.py:stage=midtrain', '--config.train.init_from=~/parent')
  assert (config.model.rope_base, config.model.d_model) == (1e6, trained['config']['model']['d_model'])


def test_rl_keeps_the_checkpoint_s_rotary_embedding(trained):
  config = load.read('tests/tiny_rl.py')
  config.model.rope_base = 1e6
  inherit_model(config, trained, {})
  assert config.model.rope_base == 1e4


@pytest.fixture
def resolved(trained, tmp_path, monkeypatch):
  """Returns a function (arguments) -> the config of `betarank train` in the folder `tmp_path`, which is also the home
  folder. The run `parent` has a tokenizer of its own, and the data folder `has` has one too, but not the folder `none`.
  """
  (tmp_path / 'has').mkdir()
  (tmp_path / 'has/tokenizer.model').touch()
  monkeypatch.setenv('HOME', str(tmp_path))
  meta = {str(tmp_path / 'parent'): {**trained, 'tokenizer': 'of the parent'}}
  monkeypatch.setattr(setup, 'parent_meta', lambda root, source: meta[source])

  def read(*arguments):
    parser = Parser('betarank train')
    add_run_flags(parser)
    return load.from_command_line(
      parser, [f'--workdir={tmp_path}/new', *arguments], configure=command._configure)[0]

  return read


@pytest.mark.parametrize('given, tokenizer', [
  ((':dir={}/has',), ''),
  ((':dir={}/none',), 'of the parent'),
  ((':dir={}/none', '--config.data.dir={}/has'), ''),
  ((':dir={}/has', '--config.data.dir={}/none'), 'of the parent'),
  ((':dir={}/none', '--config.data.dir=~/has'), ''),
  ((':dir={}/none', '--config.data.tokenizer={}/mine'), '{}/mine'),
])
def test_the_tokenizer_is_taken_if_the_data_folder_that_counts_has_none(resolved, tmp_path, given, tokenizer):
  config, *overrides = (text.format(tmp_path) for text in given)
  for parent in (f'{tmp_path}/parent', '~/parent'):
    found = resolved(f'--config=tests/tiny.py{config}', *overrides, f'--config.train.init_from={parent}')
    assert found.data.tokenizer == tokenizer.format(tmp_path)


def test_a_config_without_data_is_left_to_its_checks(resolved, tmp_path):
  (tmp_path / 'x.py').write_text('from tests import tiny\n\n\ndef get_config(arg=None):\n'
                                 '  c = tiny.get_config(arg)\n  del c.data\n  return c\n')
  assert 'data' not in resolved(f'--config={tmp_path}/x.py', '--config.train.init_from=~/parent')


def test_rl_starts_from_a_run_in_the_home_folder(resolved, tmp_path):
  flags = Parser('betarank rl')
  add_run_flags(flags)
  args = flags.parse_args([f'--workdir={tmp_path}/rl'])
  args.source, args.task, args.config = None, None, 'tests/tiny_rl.py'
  assert rl_command._configure(args, {'train.init_from': '~/parent'}).train.init_from == f'{tmp_path}/parent'


@pytest.mark.parametrize('task, imported, held_out', [
  ('reasoning:gcd', False, 0.01), (None, False, 0.01), ('jsonl:x.jsonl', False, 0.1), ('reasoning:gcd', True, 0.1)])
def test_without_a_config_rl_holds_out_what_was_left_out(trained, tmp_path, monkeypatch, task, imported, held_out):
  trained['config']['data'] = {'sources': {'main': {'uri': 'reasoning'}}, 'held_out_fraction': 0.01}
  meta = {**trained, 'positions': 64} if imported else trained
  monkeypatch.setattr(setup, 'parent_meta', lambda root, source: meta)
  flags = Parser('betarank rl')
  add_run_flags(flags)
  args = flags.parse_args([f'--workdir={tmp_path}/rl'])
  args.source, args.task, args.config = 'parent', task, ''
  assert rl_command._configure(args, {}).rl.task.held_out_fraction == held_out


def test_a_path_that_an_override_corrects_is_read_with_the_override(tmp_path):
  """The config's own value used to be checked too early, when it was decided what the run inherits."""
  config = load.load('tests/tiny.py:dir=/d')
  with config.unlocked():
    config.data.cache_dir = 'gs:/typo'
  path = tmp_path / 'config.json'
  path.write_text(load.to_json(config))
  read = lambda *more: load.from_command_line(
    Parser('p', ''), [f'--config={path}', *more], configure=command._configure)
  with pytest.raises(ConfigError, match='config.data.cache_dir: '):
    read()
  assert read('--config.data.cache_dir=gs://right')[0].data.cache_dir == 'gs://right'
