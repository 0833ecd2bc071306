"""Tests what README.md and docs/ tell a reader to type and to open: commands, flags, settings, links and files."""

import ast
import contextlib
import functools
import importlib
import io
import pathlib
import re
import shlex

import pytest
from ml_collections import ConfigDict

from betarank.__main__ import COMMANDS
from betarank.configs import common, load
from betarank.configs.errors import ConfigError
from betarank.train.config import run_config
from tests import newcomer

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / 'docs').glob('*.md'))
CONFIGS = load.shipped()
# A command stands on a line of its own in a block, behind variables or what runs it elsewhere, or in backticks.
LINE = re.compile(r'^ *(?:\w+=\S+ )*(?:launch/tpu\.sh run )?betarank (.*)', re.M)
INLINE = re.compile(r'`betarank ([^`]+)`')


def commands(block):
  """Returns the words of each command in a block of lines. Comments are left out."""
  return [shlex.split(line, comments=True) for line in LINE.findall(re.sub(r'\\\n\s*', '', block))]


def commands_of(text):
  """Returns the words of each command in a document, in blocks and inside sentences."""
  prose, *rest = re.split(r'^```.*\n', text, flags=re.M)
  prose, blocks = [prose, *rest[1::2]], rest[::2]
  inline = [shlex.split(line) for part in prose for line in INLINE.findall(part)]
  return [words for block in blocks for words in commands(block)] + inline


def found():
  """Yields (file, words) for each command that the documents and the docstrings of configs tell a reader to type."""
  for name in ('README.md', *DOCS):
    yield from ((name, words) for words in commands_of((ROOT / name).read_text(encoding='utf-8')))
  for name in CONFIGS:
    about = ast.get_docstring(ast.parse((ROOT / name).read_text(encoding='utf-8')))
    yield from ((name, words) for words in commands(about))


@functools.cache
def help_of(*command):
  """Returns the output of `betarank COMMAND --help`."""
  with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as end:
    importlib.import_module(f'betarank.{COMMANDS[command[0]][0]}').main([*command[1:], '--help'])
  assert end.value.code == 0
  return out.getvalue()


def check(words):
  """Raises AssertionError or ConfigError if betarank wouldn't accept the command or its flags.

  words: the words of the command, without `betarank`.
  """
  name, *rest = words
  if name in ('--help', 'COMMAND'):
    return
  assert name in COMMANDS, f'{name}: no such command'
  command = (name,)
  choices = re.search(r'^ +\{([a-z,]+)\}|\] \{([a-z,]+)\}', help_of(name), re.M)  # of the positional argument
  if choices and rest and not rest[0].startswith('-'):
    assert rest[0] in (choices[1] or choices[2]).split(','), f'{name} {rest[0]}: no such command'
    command = (name, rest[0]) if name == 'hf' else command
  overrides, spec = {}, ''
  for word in rest:
    flag, _, value = word.strip('[]').partition('=')
    if flag.startswith('--config.'):
      overrides[flag.removeprefix('--config.')] = value
    elif flag.startswith('--'):
      assert re.search(rf'{flag}\b', help_of(*command)), f'{name} has no flag {flag}'
    if flag == '--config' or (name == 'config' and '-' not in flag):
      spec = value or flag
  if name == 'eval':
    config = ConfigDict({'eval': common.evaluation()})
  else:
    config = load.read(spec) if re.search(r'\.py(:|$)', spec) and 'FILE' not in spec else common.base()
  for key, value in overrides.items():
    load.override(config, key, value)


@pytest.fixture
def in_a_readers_folder(tmp_path, monkeypatch):
  """Changes to an empty folder, with the config files that the documents tell the reader to write."""
  for name in ('README.md', 'docs/extend.md'):
    for block in re.findall(r'^```python\n(.*?)^```', (ROOT / name).read_text(encoding='utf-8'), re.M | re.S):
      if 'def get_config' in block:
        (tmp_path / {'README.md': 'my.py', 'docs/extend.md': 'larger.py'}[name]).write_text(block)
  monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures('in_a_readers_folder')
def test_every_command_of_the_documents_is_one():
  wrong, all_of_them = [], list(found())
  assert len(all_of_them) > 80
  for name, words in all_of_them:
    try:
      check(words)
    except (AssertionError, ConfigError) as error:
      wrong.append(f'{name}: betarank {" ".join(words)}: {error}')
  assert not wrong, '\n'.join(wrong)


@pytest.mark.usefixtures('in_a_readers_folder')
@pytest.mark.parametrize('line', [
  'betarank trian --config=configs/smoke.py',
  'betarank train --wordkir=x',
  'betarank data prepair',
  'betarank hf export --form=x',
  'betarank train --config=configs/smok.py:beta=0',
  'betarank train --config=configs/smoke.py --config.optimizer.learning_rate=1',
  'betarank train --config=configs/smoke.py --config.train.tokens=many',
  'betarank eval sample --config.eval.sample.rows=2',
  'JAX_DISABLE_JIT=1 betarank rl --config=configs/rl_smoke.py:beta=1',
])
def test_a_wrong_command_is_found(line):
  [words] = commands(line)
  with pytest.raises((AssertionError, ConfigError)):
    check(words)


def test_a_newcomer_types_the_readme_s_commands():
  """Checks which commands `python -m tests.newcomer` would run."""
  typed = [command for command in newcomer.commands(README) if not newcomer.reason_to_leave_out(command)]
  assert [shlex.split(line, comments=True)[:2] for line in typed[:5]] == [
    ['python3', '-m'], ['.', '.venv/bin/activate'], ['pip', 'install'], ['betarank', '--help'], ['make', 'smoke']]
  assert len(typed) > 15 and any('\\\n' in command for command in typed)  # a command of several lines is one


@pytest.mark.usefixtures('in_a_readers_folder')
def test_the_readme_s_own_config_can_be_run():
  run = run_config(load.load('my.py:beta=-0.25'))
  assert set(run.data.sources) == {'main', 'sums', 'mine'} and run.objective.beta == -0.25


@pytest.mark.parametrize('name', ['README.md', 'LOG.md', *DOCS])
def test_links_lead_somewhere(name):
  text = (ROOT / name).read_text(encoding='utf-8')
  for target in re.findall(r'\]\(([^)\s]+)\)', text):
    if '://' not in target:
      assert (ROOT / name).parent.joinpath(target.partition('#')[0]).exists(), f'{name} links to {target}'


@pytest.mark.parametrize('name', ['README.md', *DOCS])
def test_source_files_that_a_document_names_exist(name):
  folders = '|'.join(path.parent.name for path in ROOT.glob('*/__init__.py')) + '|tests'
  text = (ROOT / name).read_text(encoding='utf-8')
  named = set(re.findall(rf'(?<![\w/.])((?:{folders})/[\w/]+\.(?:py|sh|txt|yaml))', text))
  assert not [path for path in named if not (ROOT / path).exists()]


def test_files_that_the_readme_names_exist():
  named = set(re.findall(r'`((?:[\w.]+/)+[\w.]*|\w+\.(?:py|md|sh))`', README))
  named |= set(re.findall(r'^(\w+/)  ', README, re.M))
  named -= {  # of a workdir, of its metrics, or the reader's own
    'checkpoints/STEP/', 'eval/', 'my.py', 'profile/', 'report/report.html', 'runs/smoke/reasoning', 'tensorboard/',
    'WORKDIR/profile', 'train/ce_nats', 'train/entropy_nats', 'eval/SOURCE/ce_nats'}
  assert len(named) > 20
  sweeps = ROOT / 'configs' / 'sweeps'  # a row of the table names files of this folder
  assert not [path for path in named if not (ROOT / path).exists() and not (sweeps / path).exists()]
  modules = re.findall(r'^python -m ([\w.]+)', README, re.M)
  assert modules and not [m for m in modules if importlib.util.find_spec(m) is None]


def test_the_readme_s_tree_has_every_folder():
  tree = set(re.findall(r'^(\w+)/  ', README, re.M))
  assert {path.parent.name for path in ROOT.glob('*/__init__.py')} | {'docs', 'tests'} <= tree


def test_every_document_is_linked_from_the_readme():
  assert not [name for name in DOCS if f']({name})' not in README]


def test_every_config_is_in_the_readme_s_table():
  assert not [name for name in CONFIGS if f'`{name}`' not in README and f'`{pathlib.Path(name).name}`' not in README]
