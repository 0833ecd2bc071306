"""Tests common mistakes of users: each ends the command with one line that says what was meant, and nothing is written.

The commands run in this process. All of these mistakes are found before a device is used.
"""

import difflib
import sys

import fsspec  # noqa: F401   registers what it can read
import pytest

from betarank import __main__
from betarank.configs import load
from betarank.configs.errors import run_main, suggestion
from betarank.configs.parser import Parser, place


def refused(capsys, line):
  """Runs `betarank LINE`, and checks that it ends with status 2 and one line of error. Returns this line."""
  with pytest.raises(SystemExit) as end:
    run_main(lambda: __main__._run(line))
  err = capsys.readouterr().err
  assert end.value.code == 2
  assert err.startswith('error: ') and err.count('\n') == 1 and 'Traceback' not in err, err
  return err.strip()


MISTAKES = [
  # commands and flags
  ('trian', 'did you mean train'),
  ('train', 'missing --workdir and --config'),
  ('train --config=configs/smoke.py', 'missing --workdir'),
  ('train --wordkir={new} --config=configs/smoke.py', 'did you mean --workdir'),
  ('train --workdir={new} --config=configs/smoke.py --fallbak', 'did you mean --fallback'),
  ('train --workdir={new} configs/smoke.py', 'missing --config'),
  ('train --workdir --config=configs/smoke.py', '--workdir: expected one argument'),
  ('train --workdir={new} --config', '--config: expected one argument'),
  ('train --workdir={new} --config=configs/smoke.py --processes=two', 'whole number'),
  ('train --workdir=s3://bucket/run --config=configs/smoke.py', "s3://bucket/run: a run can't be saved there, only on"),
  ('rl --from={run} --workdir=hf://x/y', "--workdir: hf://x/y: a run can't be saved there, only on a disk or in gs://"),
  ('sweep --config=configs/sweeps/beta.py --root=az://x/y', "--root: az://x/y: a run can't be saved there, only on"),
  ('data prepair --config=configs/smoke.py', 'did you mean prepare'),
  ('data prepare --config=configs/smoke.py --workers=0', '--workers: expected a whole number above 0'),
  ('data prepare --config=configs/smoke.py --part=3/2', 'expected I/N, part I of N parts'),
  ('data show --config=configs/smoke.py --source=mian', 'main'),
  ('eval sampel --checkpoint={run}', 'did you mean sample'),
  ('eval sample --checkpoint={run}', 'no such folder'),
  ('eval sample --checkpoint={run} --limit=10', 'use --config.eval.sample.problems=N'),
  ('eval sample --checkpoint={run} --tasks=arc_easy', 'use --benchmark=NAME'),
  ('eval harness --checkpoint={run} --benchmark=gsm8k', 'use --tasks=NAME'),
  ('eval probe --checkpoint={run} --benchmark=x', '--benchmark is a flag of betarank eval sample'),
  ('eval paper --checkpoint={run} --num_fewshot=0', '--num_fewshot is a flag of betarank eval harness'),
  ('hf exprot', 'did you mean export'),
  ('hf export --checkpoint={run} --to={new} --shard_gb=0', '--shard_gb: expected a number above 0'),
  ('hf export --checkpoint={run} --to={new} --dtype=float16', 'float32'),
  ('hf', 'export'),
  ('judge', '--gold'),
  ('judge {nothing}.tsv', 'No such file'),
  ('compare', 'WORKDIR'),
  ('compare {data}', 'no run there'),
  ('compare {run} --plot=x.pdf', 'png'),
  ('report {data}', 'no run'),
  ('report {nothing}', 'no such folder'),
  ('watch {data}', 'no runs'),
  ('checkpoint inspct {run}', 'did you mean inspect'),
  ('checkpoint inspect {data}', 'no checkpoint there'),
  ('checkpoint inspect {nothing}', 'no such folder'),
  ('sweep --config=configs/smoke.py', '--root'),
  ('sweep --config=configs/smoke.py --root={new} --only=beta=7', 'no such point'),
  ('sweep --config=configs/smoke.py --root=runs/x --on=tpu', 'gs://BUCKET'),
  ('plan --config=configs/smoke.py --topology=v5e-3', 'v5e comes as v5e-1'),
  ('plan --config=configs/smoke.py --topology=v5e-4 --mean_answer=100', 'for a config of RL'),
  ('generate --checkpoint={run} --samples=0', '--samples: expected a whole number above 0'),
  ('explore {run} --export=view.html', 'name what to show'),
  ('explore {run} --samples=2', '--samples is for --export'),
  ('explore {run} --max_new_tokens=2', '--max_new_tokens is for --export'),
  ('explore {run} --top_k=-1', '--top_k must be >= 1'),
  ('explore {run} --prot=8000', 'did you mean --port'),
  ('generate --checkpoint={run} --temperature=-1', '--temperature must be >= 0'),
  ('config configs/smoke.py --config=configs/base.py', 'name one of them'),
  ('config configs/smok.py', 'did you mean configs/smoke.py'),
  # places
  ('train --config=configs/smoke.py --workdir=', 'empty'),
  ('train --config=configs/smoke.py --workdir={file}', '--workdir={file}: is a file'),
  ('train --config=configs/smoke.py --workdir={file}/x', 'is a file, or in a file'),
  ('train --config=configs/smoke.py --workdir=/proc/x', "can't be created"),
  ('train --config=configs/smoke.py --workdir=gs:/x', 'neither a local path nor a bucket'),
  ('train --config=configs/smoke.py --workdir=gs://bucket/x', 'gcsfs'),
  ('train --config=gs://bucket/config.json --workdir={new}', 'gcsfs'),
  ('eval probe --checkpoint=', 'empty'),
  ('eval probe --checkpoint=gs://bucket/x', 'gcsfs'),
  ('report gs://bucket/x', 'gcsfs'),
  ('compare gs://bucket/x', 'gcsfs'),
  ('watch gs://bucket/x', 'gcsfs'),
  ('sweep --config=configs/smoke.py --root=', 'empty'),
  ('sweep --config=configs/smoke.py --root={file}', '{file}: File exists'),
  ('sweep --config=configs/smoke.py --root=gs://bucket/x', 'gcsfs'),
  ('hf import --from={data} --to={new}', 'give a directory with config.json'),
  ('hf export --checkpoint={run} --to={data}', 'no such folder'),
  ('data prepare --config=configs/smoke.py --config.data.dir={file}/x', "config.data.dir: {file}/x can't be created"),
  ('data prepare --config=configs/smoke.py --config.data.dir=', 'config.data.dir must be a folder'),
  ('data prepare --config=configs/smoke.py --config.data.dir=/proc/x', "config.data.dir: /proc/x can't be created"),
  ('data prepare --config=configs/smoke.py --config.data.dir=gs://bucket/x', 'pip install gcsfs'),
  ('data prepare --config=configs/smoke.py:source=text:{nothing}/*.txt --config.data.dir={new}',
   '{nothing}/*.txt: no file matches'),
  ('data prepare --config=configs/smoke.py:source=jsonl:{nothing}.json --config.data.dir={new}',
   '{nothing}.json: no file matches'),
  ('data prepare --config=configs/smoke.py:source=reasonign --config.data.dir={new}', 'did you mean reasoning'),
  ('data prepare --config=configs/smoke.py:source=reasoning:chain_smu --config.data.dir={new}', 'chain_sum'),
  # settings
  ('train --config=configs/smoke.py --workdir={new} --config.lr=1', 'did you mean config.optimizer.lr'),
  ('train --config=configs/smoke.py --workdir={new} --config.optimizer.learning_rate=1',
   'did you mean config.optimizer.lr'),
  ('train --config=configs/smoke.py --workdir={new} --config.optimizer.lr=fast', 'expected a number'),
  ('train --config=configs/smoke.py --workdir={new} --config.train.tokens=1.5', 'whole number'),
  ('train --config=configs/smoke.py --workdir={new} --config.train.tokens', 'no value'),
  ('train --config=configs/smoke.py:bta=1 --workdir={new}', 'did you mean beta'),
  ('train --config=configs/smoke.py:beta=x --workdir={new}', 'VALUE is a number'),
  ('train --config=configs/smoke.py:beta --workdir={new}', 'expected beta=VALUE'),
  ('train --config=tests/tiny.py:dir={data} --workdir={new} --config.model.attention=cudnn', 'GPU'),
  ('train --config=tests/tiny.py:dir={data} --workdir={new} --config.model.attention=hopper', 'GPU'),
  ('train --config=tests/tiny.py:dir={data} --workdir={new} --config.model.attention=flash',
   'attention must be one of'),
  ('train --config=tests/tiny.py:dir={data} --workdir={new} --config.model.attention=triton',
   'config.model.attention=triton needs rows of a multiple of 128 tokens, got 32, for config.data.sequence_length'),
  ('train --config=tests/tiny.py:dir={data} --workdir={new} --config.train.mesh.context=8 '
   '--config.data.sequence_length=36',
   'config.data.sequence_length must be a multiple of config.train.mesh.context = 8, got 36'),
  ('train --config=tests/tiny.py:dir={data} --workdir={new} --config.train.mesh.fsdp=3',
   'config.train.mesh: '),
  ('train --config=tests/tiny.py:dir={data} --workdir={new} --config.model.d_ff=2e9',
   'config.model: parameters and optimizer state take 4,608.'),
  ('train --config=tests/tiny.py:dir={nothing} --workdir={new}', 'betarank data prepare'),
  ('train --config=tests/tiny.py:dir={data} --workdir={new} --processes=2', '--coordinator'),
  ('train --config=tests/tiny.py:dir={data} --workdir={new} --process_id=1', '--coordinator'),
  ('train --config=tests/tiny.py:dir={data} --workdir={new} --coordinator=here --processes=2', 'HOST:PORT'),
  ('train --config=tests/tiny.py:dir={data} --workdir={new} --config.train.init_from={data}', 'no checkpoint'),
  ('train --config=tests/tiny.py:dir={data} --workdir={new} --config.train.init_from={nothing}', 'no such folder'),
  ('rl --task=reasoning:gcd', 'missing --from=RUN'),
  ('rl --from={nothing}', 'no such folder'),
  ('rl --from={run} --taks=reasoning:gcd', 'did you mean --task'),
  ('rl --config=configs/smoke.py --workdir={new}', 'is a config of betarank train'),
  ('train --config=configs/rl_smoke.py --workdir={new}', 'is a config of betarank rl'),
  ('rl --config=configs/rl_smoke.py:init_from={nothing} --workdir={new}', 'no such folder'),
]
OWN = [
  ('def get_config(arg=None):\n  return 3', 'it returned int'),
  ('def get_config(arg=None)\n  return 3', "own.py:1: SyntaxError: expected ':'"),
  ('def get_confg(arg=None):\n  return 3', 'has no function get_config(arg)'),
  ('get_config = 3', 'own.py: has no function get_config'),
  ('{head}\n  c.trian.batch_size = 4\n  return c', 'own.py:5: no such key: trian; did you mean train?'),
  ('{head}\n  c.train.btach_size = 4\n  return c', 'did you mean config.train.batch_size'),
  ('{head}\n  c.optimizer.lr = "3e-4"\n  return c', "own.py:5: lr: expected a number, got '3e-4'"),
  ('{head}\n  c.train.tokens = 1.5\n  return c', 'tokens: expected a whole number'),
  ('{head}\n  c.train = 5\n  return c', 'train: expected a section'),
  ('{head}\n  c.trian = dict(batch_size=4)\n  return c', 'config.trian: no such key; did you mean config.train?'),
  ('{head}\n  del c.train\n  return c', 'config.train: missing'),
  ('{head}\n  c.train.update(batch_sise=4)\n  return c', 'config.train.batch_sise: no such key'),
  ('from betarank.configs import common\ndef get_config():\n  return common.base()',
   'get_config must take one argument'),
  ('from betarank.configs import commn', "own.py:1: ImportError: cannot import name 'commn'"),
  ('from betarank.configs import common\nc = common.bse()\ndef get_config(arg=None):\n  return c',
   'own.py:2: AttributeError'),
]
HEAD = 'from betarank.configs import common\n\ndef get_config(arg=None):\n  c = common.base()'


@pytest.fixture(scope='module')
def places(data_dir, tmp_path_factory):
  """Returns {name: path} for the names in braces in the table above.

  These are prepared data, a file, and three paths that don't exist.
  """
  root = tmp_path_factory.mktemp('mistakes')
  (root / 'file').write_text('x')
  return {'data': data_dir, **{name: root / name for name in ('new', 'nothing', 'file', 'run')}}


@pytest.mark.parametrize('line, says', MISTAKES, ids=[line for line, _ in MISTAKES])
def test_one_line_says_what_was_meant(line, says, places, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  for name in ('gs', 'gcs'):  # which tests with a bucket in memory register
    monkeypatch.delitem(sys.modules['fsspec.registry']._registry, name, raising=False)
  assert says not in line  # the error may repeat the line, which would say nothing
  assert says.format(**places) in refused(capsys, [word.format(**places) for word in line.split()])
  assert not (places['new'] / 'config.json').exists() and not (places['new'] / 'tokenizer.model').exists()


@pytest.mark.parametrize('text, says', OWN, ids=[says for _, says in OWN])
def test_one_line_says_what_is_wrong_in_an_own_config(text, says, capsys, tmp_path):
  (tmp_path / 'own.py').write_text(text.format(head=HEAD))
  assert says in refused(capsys, ['train', f'--config={tmp_path}/own.py', f'--workdir={tmp_path}/new'])


def test_a_suggestion_is_neither_what_was_typed_nor_an_unrelated_neighbour():
  assert suggestion('runs/a', ['runs/a', 'runs/zebra', 'runs/data']) == ''
  assert suggestion('config.rl', ['config.log', 'config.train', 'config.model']) == ''
  assert suggestion('config.optimiser.lr', ['config.optimizer.lr', 'config.log.every_steps']).endswith('optimizer.lr?')
  assert suggestion('runs/bta', ['runs/beta', 'runs/data']) == '; did you mean runs/beta?'
  assert suggestion('runs/nowhere', ['runs/other']) == ''


def test_home_and_dashes_are_read_as_meant(monkeypatch):
  monkeypatch.setenv('HOME', '/home/somebody')
  parser = Parser('betarank x', '')
  parser.add_argument('--dry_run', action='store_true')
  parser.add_argument('--work_dir', type=place)
  config, args = load.from_command_line(parser, [
    '--dry-run', '--work-dir=~/a-b', '--config=configs/smoke.py', '--config.data.dir=~/data',
    '--config.data.sources.main.uri=text:~/books/*.txt', '--config.train.batch-size=8'])
  assert (args.dry_run, args.work_dir, config.data.dir) == (True, '/home/somebody/a-b', '/home/somebody/data')
  assert (config.data.sources.main.uri, config.train.batch_size) == ('text:/home/somebody/books/*.txt', 8)


def test_a_place_that_cannot_be_written_is_named(capsys, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(SystemExit) as end:
    run_main(lambda: (tmp_path / 'file' / 'x').mkdir())
  assert end.value.code == 2 and capsys.readouterr().err == f'error: {tmp_path}/file/x: Not a directory\n'


def test_a_huge_name_gets_no_suggestion(monkeypatch):
  """Comparing it with others would take minutes, so it isn't compared."""
  monkeypatch.delattr(difflib, 'get_close_matches')
  assert suggestion('config/' * 10_000, ['config/smoke.py', 'config/small.py']) == ''
