"""Tests that input can't become code, that it can't name files elsewhere, and that bad input gives one line of error.
"""

import argparse
import ast
import bz2
import gzip
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from betarank.configs import errors, load, parser
from betarank.configs.errors import ConfigError, UserError
from betarank.data import formats, prepared, reasoning, sources
from betarank.data.config import DataConfig, DataError, SourceConfig
from betarank.data.tokenizer import read_tokenizer
from betarank.eval.report import arms, command
from betarank.model import hf_weights
from betarank.model.hf_config import HfError
from betarank.runtime import job, workdir
from betarank.runtime.metrics import JsonLines
from betarank.tasks.task_set import TaskConfig, TaskSet
from tests.eval import sweep
from tests.runs import betarank, environment, refused

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ('configs', 'objectives', 'model', 'data', 'tasks', 'runtime', 'train', 'rl', 'eval', 'launch', 'benchmarks')

# What executes code that it gets as data, or makes objects of any class from data.
MODULES = {'pickle', '_pickle', 'cPickle', 'cloudpickle', 'dill', 'marshal', 'shelve', 'joblib', 'jsonpickle', 'yaml',
           'jinja2', 'mako', 'runpy', 'code', 'codeop', 'imp', 'pty', 'builtins', 'commands'}
NAMES = {'eval', 'exec', 'compile', '__import__', '__builtins__'}
ATTRIBUTES = {'exec_module', 'load_module', 'import_module', 'sympify', 'parse_expr', 'lambdify', 'read_pickle',
              'getoutput', 'getstatusoutput', 'run_path', 'run_module', '__subclasses__', '__globals__', '__builtins__',
              'apply_chat_template', 'from_string'}
OS = {'system', 'popen', 'fork', 'forkpty', 'startfile'}  # of os, with its exec... and spawn...
OFF = {'shell', 'allow_pickle', 'trust_remote_code'}  # arguments that must be omitted or False
ALLOWED = {
  ('__main__.py', 'import_module'): 'the modules of its commands, from a table of names',
  ('configs/load.py', 'exec_module'): 'a config is a Python file that the user names on the command line',
  ('data/__init__.py', 'import_module'): 'its own modules, from a table of names',
  ('tasks/verifier_worker.py', 'parse_expr'): 'behind a grammar, in a process that can reach nothing',
  ('tasks/verifier_worker.py', 'exec_module'): 'a reward of the user\'s own, which the config names, in a worker',
  ('tasks/code_jail_worker.py', 'os.execve'): 'the jail: the only place where programs of a model run, by design',
  ('tasks/code_jail_worker.py', 'os.fork'): 'the jail: its first process',
  ('benchmarks/rollout.py', 'import_module'): 'two modules of an earlier checkout, which the command line names',
  ('benchmarks/start.py', 'import_module'): 'modules of betarank, from a table of names',
}


def risks(source):
  """Yields (name, line) of everything in Python source code that could execute its input, such as eval."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import | ast.ImportFrom):
      names = [alias.name for alias in node.names]
      modules = names if isinstance(node, ast.Import) else [node.module or '']
      yield from ((m, node.lineno) for m in modules if m.split('.')[0] in MODULES)
      if isinstance(node, ast.ImportFrom):
        yield from ((n, node.lineno) for n in names if n in ATTRIBUTES | NAMES or (node.module == 'os' and _runs(n)))
    elif isinstance(node, ast.Name) and node.id in NAMES and isinstance(node.ctx, ast.Load):
      yield node.id, node.lineno
    elif isinstance(node, ast.Attribute):
      if node.attr in ATTRIBUTES and isinstance(node.ctx, ast.Load):
        yield node.attr, node.lineno
      if isinstance(node.value, ast.Name) and node.value.id == 'os' and _runs(node.attr):
        yield f'os.{node.attr}', node.lineno
    elif isinstance(node, ast.keyword) and node.arg in OFF and ast.unparse(node.value) != 'False':
      yield f'{node.arg}=', node.value.lineno


def _runs(name):
  return name in OS or name.startswith(('exec', 'spawn', 'posix_spawn'))


@pytest.mark.parametrize('source,found', [
  ('eval(x)', 'eval'), ('y = exec', 'exec'), ('import pickle as p', 'pickle'), ('from yaml import load', 'yaml'),
  ('import os\nos.system(x)', 'os.system'), ('from os import execv', 'execv'),
  ('subprocess.run(x, shell=True)', 'shell='), ('np.load(x, allow_pickle=flag)', 'allow_pickle='),
  ('sympy.sympify(x)', 'sympify'),
  ('from sympy import sympify', 'sympify'), ('getattr(__builtins__, x)', '__builtins__'),
  ('importlib.import_module(x)', 'import_module')])
def test_the_search_finds_each_risk(source, found):
  assert found in [what for what, _ in risks(source)]


def test_no_package_executes_its_input():
  found = {}
  for path in [*ROOT.glob('*.py'), *(path for package in PACKAGES for path in (ROOT / package).rglob('*.py'))]:
    for what, line in risks(path.read_text()):
      found[str(path.relative_to(ROOT)), what] = f'{path}:{line}'
  assert not (new := {key: place for key, place in found.items() if key not in ALLOWED}), new
  assert not (gone := ALLOWED.keys() - found.keys()), f'no longer there: {gone}'


def test_no_input_is_executed():
  """Checks the interpreter's audit events while configs, data, tokenizers, checkpoints, answers and reports are read.
  """
  done = subprocess.run([sys.executable, '-m', 'tests.fuzz.audit'], cwd=ROOT, env=environment(), capture_output=True,
                        text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout)
  assert not found['marked'] and not found['touched']
  assert set(found['events']) >= {'config', 'data', 'checkpoint', 'grade', 'report', 'worker'}
  for step, events in found['events'].items():
    for event in events:
      kind, _, who = event.partition(' by ')
      if kind == 'subprocess.Popen':
        assert 'tasks/verifier_worker.py' in who or "['git', '-C', " in who, event
      else:
        assert kind in ('compile', 'exec', 'code.__new__'), f'{step}: {event}'
        assert who.split('.')[0] not in PACKAGES, f'{step}: {event}'
  # SymPy's parser evaluates its own rewriting of plain arithmetic; nothing else that a model wrote is compiled.
  assert [event for event in found['events']['worker'] if not event.startswith('compile by ast')] == [
    'compile by sympy.parsing.sympy_parser', 'exec by sympy.parsing.sympy_parser']
  assert set(found['compiled by the worker']) == {
    'from sympy import *', "Integer (2 )*Symbol ('x' )+Integer (1 )", 'Integer (3 )/Integer (4 )',
    'factorial (Integer (10 ))', "sin (Symbol ('x' ))**Integer (2 )"}


def test_the_audit_records_each_event():
  code = ("from tests.fuzz.audit import Audit; import os, pickle, socket, subprocess, collections; a = Audit()\n"
          "eval('[1, \"zqcanary\"]'); pickle.loads(pickle.dumps(collections.OrderedDict())); os.system('true')\n"
          "socket.getaddrinfo('127.0.0.1', 80)\n"
          "subprocess.run('true', shell=True); print(sorted(e for e, _ in a.events['import']), len(a.marked))")
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  spawn = "'os.posix_spawn', " if hasattr(os, 'POSIX_SPAWN_CLOSEFROM') else ''  # subprocess uses it from Python 3.13 on
  events = f"['compile', 'exec', {spawn}'os.system', 'pickle.find_class', 'socket.getaddrinfo', 'subprocess.Popen']"
  assert done.stdout == f'{events} 2\n', done.stderr


# Names and paths


@pytest.mark.parametrize('path', [
  'gs:/bucket/x', 'GS://bucket/x', 'gs:bucket', 'gs://', 'gs:///x', ' gs:/x', 'Gs://b', 's3:/x', 'file:///x',
  'https://h/x'])
def test_a_path_that_only_looks_like_a_bucket_is_refused(path):
  with pytest.raises(argparse.ArgumentTypeError, match='neither a local path nor a bucket'):
    parser.place(path)
  with pytest.raises(ConfigError, match=r'config\.data\.dir: '):
    load.load('configs/smoke.py', {'data.dir': path})
  with pytest.raises(ConfigError, match=r'config\.data\.sources\.main\.uri: '):
    load.load('configs/smoke.py', {'data.sources.main.uri': f'jsonl:{path.strip()}'})


@pytest.mark.parametrize('path', [
  'gs://bucket/x', '/x', 'x/y', 's3://b', 'jsonl:gs://bucket/*.jsonl', 'reasoning:gcd', '', 'a:b'])
def test_other_paths_are_accepted_unchanged(path):
  assert parser.not_a_place(path) == '' and parser.at_home(path) == path
  assert load.load('configs/smoke.py', {'train.init_from': path}).train.init_from == path


@pytest.mark.parametrize('command', [['train', '--config=configs/smoke.py', '--workdir=gs:/x'], ['report', 'GS://x']])
def test_commands_refuse_such_paths(command):
  assert 'neither a local path nor a bucket' in refused(betarank(*command))


def test_an_error_is_one_line_without_control_characters(capsys):
  def main():
    raise UserError('bad\nvalue \x1b[2J\x9b' + 'x' * 10_000)

  with pytest.raises(SystemExit):
    errors.run_main(main)
  line = capsys.readouterr().err
  assert line.startswith('error: bad value \ufffd[2J\ufffdxxx') and line.count('\n') == 1 and len(line) < 3000


@pytest.mark.parametrize('name', ['../x', 'a/b', '..', '/x', 'a\n', 'a.b', 'A'])
def test_a_source_may_not_be_named_as_a_path(name):
  with pytest.raises(ValueError, match='sources must have names'):
    DataConfig('d', '', 300, {name: SourceConfig('text:x', 1.0, 0)}, 0.0, 32)


@pytest.mark.parametrize('change', [
  lambda m: m['splits']['train']['shards'][0].update(file='../../../outside'),
  lambda m: m['splits']['train']['shards'][0].update(file='/etc/passwd'),
  lambda m: m.update(fingerprint='../../../outside'), lambda m: m['splits'].update({'../x': m['splits']['train']})])
def test_a_manifest_may_not_name_files_elsewhere(change, tmp_path):
  shard = {'file': 'a-train.array_record-00000-of-00001', 'size': 1, 'documents': 1}
  manifest = {'fingerprint': hashlib.sha256().hexdigest(), 'settings': {},
              'splits': {'train': {'lengths_size': 1, 'shards': [shard]}}}
  path = prepared.epath.Path(tmp_path)
  (path / 'manifest.json').write_text(json.dumps(manifest))
  assert prepared.read_manifest(path) == manifest
  change(manifest)
  (path / 'manifest.json').write_text(json.dumps(manifest))
  with pytest.raises(DataError, match='not a manifest of prepared data'):
    prepared.read_manifest(path)


def test_an_index_may_not_name_files_elsewhere(tmp_path):
  for name in ('../x.safetensors', '/x.safetensors', 'x/y.safetensors', 'x.bin', 'x.safetensors\n'):
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'a': name}}))
    with pytest.raises(HfError, match='only files in its folder'):
      hf_weights.Files(tmp_path)


def test_a_set_of_tfds_may_not_name_a_module(tmp_path, monkeypatch):
  """TFDS would import any module that features.json names, even from the current folder."""
  (tmp_path / 'intruder.py').write_text(f'open({str(tmp_path / "canary")!r}, "w")')
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'dataset_info.json').write_text(json.dumps({
    'fileFormat': 'array_record', 'name': 'a', 'version': '1.0.0', 'splits': [{
      'name': 'train', 'numBytes': '1', 'shardLengths': ['1'],
      'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'}]}))
  (tmp_path / 'features.json').write_text(json.dumps({'pythonClassName': 'intruder.Feature', 'text': {}}))
  with pytest.raises(DataError, match='no feature of TFDS itself'):
    read_source(f'tfds:{tmp_path}')
  assert not (tmp_path / 'canary').exists()


# Links


def test_a_run_replaces_a_linked_metrics_file(tmp_path):
  """If metrics.jsonl is a link, the run replaces the link. The file that it leads to isn't changed."""
  from etils import epath
  outside = tmp_path / 'outside.jsonl'
  outside.write_text('{"step": 1}\n')
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'metrics.jsonl').symlink_to(outside)
  JsonLines(epath.Path(tmp_path / 'run' / 'metrics.jsonl'), 5).write(2, {'x': 1.0})
  assert outside.read_text() == '{"step": 1}\n'
  assert not (tmp_path / 'run' / 'metrics.jsonl').is_symlink()
  assert len((tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()) == 2


@pytest.mark.parametrize('name', ['.lock', 'hosts/0.log'])
def test_a_run_writes_neither_its_lock_nor_its_log_through_a_link(tmp_path, name):
  from etils import epath
  outside, run = tmp_path / 'outside', tmp_path / 'run'
  outside.write_text('as it was')
  (run / 'hosts').mkdir(parents=True)
  (run / name).symlink_to(outside)
  with pytest.raises(UserError, match=f'run/{name}: is a symbolic link'), workdir.claim(epath.Path(run)):
    job._open_log(epath.Path(run), 0)
  assert outside.read_text() == 'as it was'


def test_a_report_writes_through_no_link(tmp_path, monkeypatch):
  monkeypatch.setattr(command.Report, 'html', lambda self: str(self.runs()))  # figures are written as tables are
  root, outside = tmp_path / 'sweep', tmp_path / 'outside'
  sweep.make(root, arms=({},), seeds=1, steps=3, rl_steps=2, problems=2, n=2)
  outside.mkdir()
  (outside / 'precious').write_text('as it was')
  (root / 'report').symlink_to(outside)
  with pytest.raises(ConfigError, match=r'report: is a link'):
    command.write_report(str(root))
  (root / 'report').unlink()
  (root / 'report').mkdir()
  (root / 'report' / 'figures').symlink_to(outside)
  with pytest.raises(ConfigError, match=r'figures: is a link'):
    command.write_report(str(root))
  (root / 'report' / 'figures').unlink()
  (root / 'report' / 'report.html').symlink_to(outside / 'precious')
  (root / 'report' / 'tables').mkdir(exist_ok=True)
  (root / 'report' / 'tables' / 'runs.csv').symlink_to(outside / 'precious')
  command.write_report(str(root))
  assert [p.name for p in outside.iterdir()] == ['precious'] and (outside / 'precious').read_text() == 'as it was'


def test_a_report_reads_links_once_and_no_devices(tmp_path):
  """Ten links to the root would otherwise lead to a million folders. /dev/zero and a pipe have no end."""
  root = tmp_path / 'sweep'
  sweep.make(root, arms=({},), seeds=1, steps=3, rl_steps=2, problems=2, n=2)
  for i in range(10):
    (root / f'back{i}').symlink_to(root)
  run = next((root / 'pre').iterdir())
  (run / 'samples.jsonl').symlink_to('/dev/zero')
  (run / 'metrics.jsonl').unlink()
  os.mkfifo(run / 'metrics.jsonl')
  found = arms.read_sweep(root)
  assert len(found.runs) == 2
  assert [note for note in found.notes if 'it is no file' in note]


def test_sources_are_files(tmp_path):
  (tmp_path / 'a.txt').write_text('text')
  (tmp_path / 'b.txt').symlink_to('/dev/zero')
  os.mkfifo(tmp_path / 'c.txt')
  (tmp_path / 'd.txt').mkdir()
  (tmp_path / 'e.txt').symlink_to(tmp_path / 'a.txt')  # a link to a file is one
  assert formats.find(f'{tmp_path}/*.txt') == [f'{tmp_path}/a.txt', f'{tmp_path}/e.txt']


def test_import_reads_no_devices_and_copies_only_tokenizers(tmp_path):
  (tmp_path / 'config.json').symlink_to('/dev/zero')
  with pytest.raises(HfError, match='not a file'):
    hf_weights.read_json(tmp_path / 'config.json')
  os.mkfifo(tmp_path / 'model.safetensors')
  with pytest.raises(HfError, match=r'has no model\.safetensors'):
    hf_weights.Files(tmp_path)
  (tmp_path / 'tokenizer.model').symlink_to(__file__)
  with pytest.raises(DataError, match='not a SentencePiece model'):  # train/hf.py reads it before it copies it
    read_tokenizer(str(tmp_path / 'tokenizer.model'))


# Found by the fuzzer


def read_source(uri):
  source = sources.Source(SourceConfig(uri, 1.0, 0), 1000)
  return [document for unit in source.units() for document in source.read(unit)]


def test_small_files_that_claim_to_be_large_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(formats, '_LINE_BYTES', 2**20)
  (tmp_path / 'x.jsonl.gz').write_bytes(gzip.compress(b'{"text": "' + b'0' * 2**24))
  with pytest.raises(DataError, match='longer than'):
    read_source(f'jsonl:{tmp_path}/x.jsonl.gz')
  for claimed in (2**63, 2**64 - 1, 10**8 + 1):
    (tmp_path / 'model.safetensors').write_bytes(claimed.to_bytes(8, 'little') + b'{}')
    with pytest.raises(HfError, match='not a whole safetensors file'):
      hf_weights.Files(tmp_path)
  header = np.lib.format.magic(1, 0) + (118).to_bytes(2, 'little')
  claim = str({'descr': '<u4', 'fortran_order': False, 'shape': (2**60,)}).encode()
  with pytest.raises(ValueError, match='not 3 lengths'):
    prepared._parse_lengths(iter([header + claim.ljust(117) + b'\n']), 128, 3, hashlib.sha256().update)


@pytest.mark.parametrize('start', [b'', b'text\n', b'text\n"a', b'text\n' + b'"a\n",' * 300_000])
def test_a_row_of_csv_without_end_is_refused(start, tmp_path, monkeypatch):
  """100 kB of bz2 can hold gigabytes without a line end."""
  monkeypatch.setattr(formats, '_LINE_BYTES', 2**20)
  (tmp_path / 'x.csv.bz2').write_bytes(bz2.compress(start + b'a' * 2**24))
  with pytest.raises(DataError, match=r'x\.csv\.bz2:[12]: the row is longer than 1048576 bytes'):
    read_source(f'csv:{tmp_path}/x.csv.bz2')


@pytest.mark.parametrize('content', [
  b'\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff' + b'\xff' * 40, gzip.compress(b'{"answer": ' + b'9' * 5000),
  gzip.compress(b'[' * 10_000)], ids=['cut', 'long number', 'deep'])
def test_damaged_compressed_lines_are_refused(content, tmp_path):
  (tmp_path / 'x.jsonl.gz').write_bytes(content)
  with pytest.raises(DataError, match=r'x\.jsonl\.gz'):
    TaskSet(TaskConfig(f'jsonl:{tmp_path}/x.jsonl.gz'), split='all')
  with pytest.raises(DataError, match=r'x\.jsonl\.gz'):
    read_source(f'jsonl:{tmp_path}/x.jsonl.gz')


def test_a_problem_without_end_is_refused(monkeypatch):
  monkeypatch.setattr(reasoning, '_TRIAL_S', 0.3)
  with pytest.raises(DataError, match=r'max_terms=1000000000: no problem within'):
    reasoning.parse('chain_sum?max_terms=1000000000')
  with pytest.raises(DataError):
    reasoning.parse(f'chain_sum?max_terms={"9" * 5000}')
  reasoning.parse('chain_sum')  # the alarm is off again


@pytest.mark.parametrize('content', [
  '[' * 5000, '{"seed": ' + '9' * 5000 + '}', '{"a.b": 1}', '{"__class__": 1}', '{"model": 1}', '\udcff'])
def test_files_that_are_no_configs_are_refused(content, tmp_path):
  (tmp_path / 'x.json').write_text(content, errors='surrogateescape')
  with pytest.raises(ConfigError):
    from betarank.train.config import run_config
    run_config(load.load(str(tmp_path / 'x.json')))
