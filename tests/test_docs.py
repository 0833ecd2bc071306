"""Tests what README.md and docs/ tell a reader to type and to open: commands, flags, settings, links and files."""

import ast
import contextlib
import importlib
import pathlib
import re
import shlex
from unittest import mock

import pytest
from ml_collections import ConfigDict

from betarank.__main__ import COMMANDS
from betarank.configs import common, load
from betarank.configs.errors import ConfigError
from betarank.configs.parser import Parser
from betarank.train.config import run_config
from tests import newcomer

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / 'docs').glob('*.md'))
CONFIGS = load.shipped()
# A command stands on a line of its own in a block, behind variables or what runs it elsewhere, or in backticks.
LINE = re.compile(
  r'^ *(?:\$ )?(?:\w+=\S+ )*(?:launch/tpu\.sh(?: --\w+)* (?:run betarank|babysit|(?=(?:train|rl|eval) ))|'
  r'--command="betarank|betarank) *([^"\n]*)', re.M)
INLINE = re.compile(r'`betarank ([^`]+)`')
PROGRAM = re.compile(r'(?:^|`| )python -m ((?:tests|benchmarks)[\w.]*)([^`#\n]*)', re.M)
VERB = re.compile(r'launch/tpu\.sh((?: --\w+)*) (\w+)')


def joined(text):
  """Returns a text in which each line that ends with a backslash is joined with the next."""
  return re.sub(r'\\\n\s*', '', text)


def commands(block):
  """Returns the words of each command in a block of lines. Comments are left out."""
  return [shlex.split(line, comments=True) for line in LINE.findall(joined(block))]


def commands_of(text):
  """Yields (words, whether it is a whole command) for each command in a document, in blocks and inside sentences.

  A sentence may name a command without what it needs.
  """
  prose, *rest = re.split(r'^```.*\n', text, flags=re.M)
  prose, blocks = [prose, *rest[1::2]], rest[::2]
  yield from ((words, True) for block in blocks for words in commands(block))
  yield from ((shlex.split(line), False) for part in prose for line in INLINE.findall(part))


def found():
  """Yields (file, words, whether it is a whole command) for each command that the documents and the docstrings of
  configs tell a reader to type.
  """
  for name in ('README.md', *DOCS):
    yield from ((name, *found) for found in commands_of((ROOT / name).read_text(encoding='utf-8')))
  for name in CONFIGS:
    about = ast.get_docstring(ast.parse((ROOT / name).read_text(encoding='utf-8')))
    yield from ((name, words, True) for words in commands(about))


class Parsed(Exception):
  """Ends a command that has parsed its command line."""


def check(words, whole=True):
  """Lets betarank parse a command line, and ends the command before it does anything else.

  words: the words of the command, without `betarank`.
  whole: if False, the command may lack arguments.

  Raises ConfigError or AssertionError if betarank wouldn't accept the command, a flag, the config or a setting.
  """
  name, *rest = words
  if name in ('--help', 'COMMAND') or rest == ['--help']:
    return
  assert name in COMMANDS, f'{name}: no such command'
  parse_args, from_command_line = Parser.parse_args, load.from_command_line

  def parse(parser, argv):
    parse_args(parser, argv)
    raise Parsed

  def parse_with_config(parser, argv, *, configure=None, **options):
    from_command_line(parser, argv, configure=lambda args, _: config_of(name, args), **options)
    raise Parsed

  argv = [word.strip('[]').replace('PRICE', '1') for word in rest]
  main = importlib.import_module(f'betarank.{COMMANDS[name][0]}').main
  with contextlib.ExitStack() as stack:
    stack.enter_context(mock.patch.object(Parser, 'parse_args', parse))
    stack.enter_context(mock.patch.object(load, 'from_command_line', parse_with_config))
    stack.enter_context(contextlib.suppress(Parsed))
    try:
      main(argv)
    except ConfigError as error:
      if whole or ': missing ' not in str(error):
        raise


def config_of(command, args):
  """Returns the config whose settings a command line may override. Reads no run.

  args: the flags of the command line.
  """
  if command == 'eval':
    return ConfigDict({'eval': common.evaluation()})
  spec = args.config or getattr(args, 'file', None) or ''
  if not re.search(r'\.py(:|$)', spec):  # a placeholder, or a command that needs no config
    return common.rl_base() if command == 'rl' else common.base()
  return load.read_stage(spec, command) if command in ('train', 'rl') else load.read(spec)


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
  assert len(all_of_them) > 130
  for name, words, whole in all_of_them:
    try:
      check(words, whole)
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
  '$ betarank train --config=configs/rl_smoke.py --workdir=x',
  'launch/tpu.sh --yes babysit train --config=configs/smoke.py',
  'launch/tpu.sh run betarank data prepare',
  'betarank sweep --config=configs/smoke.py --root=x --parallel=many',
  'betarank compare',
  'betarank watch gs:/x',
])
def test_a_wrong_command_is_found(line):
  [words] = commands(line)
  with pytest.raises((AssertionError, ConfigError)):
    check(words)


def test_every_program_of_the_documents_has_the_flags():
  """Checks `python -m MODULE --FLAG`: the module's files, or those of its package, contain the flag in quotes."""
  programs = [(name, *found) for name in ('README.md', *DOCS)
              for found in PROGRAM.findall(joined((ROOT / name).read_text(encoding='utf-8')))]
  assert len(programs) > 30
  for name, module, rest in programs:
    path = ROOT / module.replace('.', '/')
    files = [*path.glob('*.py')] if (path / '__main__.py').exists() else [path.with_suffix('.py')]
    assert files[0].exists(), f'{name}: python -m {module}'
    source = ''.join(path.read_text(encoding='utf-8') for path in files)
    for flag in re.findall(r'--[\w-]+', rest.replace('--no-', '--')):
      assert f"'{flag}'" in source, f'{name}: python -m {module} {flag}'


def test_every_verb_of_tpu_sh_in_the_documents_is_one():
  usage = (ROOT / 'launch' / 'tpu.sh').read_text(encoding='utf-8').partition('\nset ')[0]
  verbs = [found for name in ('README.md', *DOCS) for found in VERB.findall((ROOT / name).read_text(encoding='utf-8'))]
  assert len(verbs) > 10
  for flags, verb in verbs:
    for word in (*flags.split(), verb):
      assert re.search(rf'^# +(?:[a-z|]+\|)?{word}\b', usage, re.M), f'launch/tpu.sh {word}'


def test_every_extra_of_the_documents_is_one():
  setup = (ROOT / 'setup.py').read_text(encoding='utf-8')
  extras = {extra for name in ('README.md', *DOCS)
            for extra in re.findall(r"pip install (?:-e )?'(?:\.|betarank)\[(\w+)\]'", (ROOT / name).read_text())}
  assert len(extras) > 5 and all(f"'{extra}': [" in setup for extra in extras)


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
