"""Provides the loads: tiny models with many steps, prompts or gigabytes. Each load runs a command that a user would
run.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from etils import epath

from betarank.data import prepared, publish, records
from betarank.data.config import DataConfig, SourceConfig
from betarank.data.tokenizer import read_tokenizer
from betarank.data.worker import Job, ShardWriter
from betarank.runtime import checkpoint
from tests.runs import environment, metrics
from tests.soak.watch import Watch

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SUMS = '--config.data.sources.main.uri=reasoning:chain_sum'
EVERY, RL_EVERY = 50, 10  # steps between two checkpoints
CHECKPOINT_MB = 0.1  # leaked per checkpoint by tensorstore 0.1.86: Spec.to_json(), which is called for every array
DOCUMENT_TOKENS = 16_384  # mean length in the large data set, two bytes per token
SHARDS = 40
ROWS, ROW_TOKENS = 8, 32_768  # per step, when the data set is read
BATCH = 8  # rows per training step, as in tests/tiny.py


@dataclasses.dataclass(frozen=True)
class Platform:
  """The settings of a load that differ between CPUs and GPUs.

  variables: environment variables of all commands.
  row: the number of tokens per row in training.
  model: the settings of the model that differ from tests/tiny.py.
  """

  variables: dict[str, str]
  row: int = 32
  model: tuple[str, ...] = ()


PLATFORMS = {
  'cpu': Platform({'JAX_PLATFORMS': 'cpu'}),
  # By default JAX takes three quarters of a GPU's memory at once, which would hide growth. The rows and the heads are
  # the smallest that the attention kernels for Hopper support.
  'gpu': Platform({'JAX_PLATFORMS': 'cuda,cpu', 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}, 128, (
    '--config.model.d_model=128', '--config.model.heads=2', '--config.model.kv_heads=1', '--config.model.head_dim=64')),
}


class Soak:
  """The folder of all loads, with the model and the data that they share. All commands run on the same platform, one
  of PLATFORMS.
  """

  def __init__(self, root: pathlib.Path, platform: str):
    self.root, self.platform, self.settings = root, platform, PLATFORMS[platform]
    self.data, self.trained = root / 'data', root / 'trained'
    self.left: set[str] = set()  # temporary files that commands have left

  def start(self, name: str, *args: object, module: str = 'betarank') -> subprocess.Popen:
    """Starts `python -m MODULE ARGS`, and returns the process. It has its own folder for temporary files, and its
    output goes to NAME.log.
    """
    (self.root / f'{name}.tmp').mkdir(exist_ok=True)
    with open(self.root / f'{name}.log', 'a', encoding='utf-8') as log:
      return subprocess.Popen(
        [sys.executable, '-m', module, *map(str, args)], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        env={**environment(), **self.settings.variables, 'TMPDIR': str(self.root / f'{name}.tmp')})

  def watch(self, name: str, process: subprocess.Popen, position: Callable[[], float]) -> Watch:
    """Observes a command until it ends, and also the memory of the GPUs if it runs on them."""
    return Watch(name, process, position, gpu=self.platform == 'gpu')

  def finish(self, name: str, process: subprocess.Popen) -> None:
    """Waits until a command ends, and notes in `left` which temporary files it leaves. Its exit status must be 0."""
    code = process.wait()
    assert code == 0, f'{name}: exit {code}: {(self.root / f"{name}.log").read_text()[-2000:]}'
    self.left |= {f'{name}.tmp/{path.name}' for path in (self.root / f'{name}.tmp').iterdir()}

  def model(self) -> pathlib.Path:
    """Returns the workdir of a model that has learned little more than the format of an answer. Trains the model if
    necessary.
    """
    if not self.trained.exists():
      tiny = f'--config=tests/tiny.py:dir={self.data},beta=0'
      self.finish('data', self.start('data', 'data', 'prepare', tiny, SUMS))
      self.finish('model', self.start(
        'model', 'train', tiny, SUMS, f'--workdir={self.trained}', *self.training(500),
        '--config.checkpoint.every_steps=500', '--config.log.eval_every_steps=1000'))
    return self.trained

  def training(self, steps: int) -> tuple[str, ...]:
    """Returns the flags of `betarank train` for a number of steps with the platform's rows and model."""
    row = self.settings.row
    return (f'--config.train.tokens={steps * BATCH * row}', f'--config.data.sequence_length={row}',
            *self.settings.model)


@dataclasses.dataclass
class Load:
  """The result of a load.

  watch: what was observed.
  did: one line that describes the load.
  """

  watch: Watch
  did: str
  checkpoints_per_1000: float = 0.0


def train(s: Soak, steps: int) -> Load:
  """Pre-trains the tiny model for many steps, with a checkpoint every 50 steps and an evaluation every 100."""
  s.model()
  workdir = s.root / 'train'
  process = s.start(
    'train', 'train', f'--config=tests/tiny.py:dir={s.data},beta=-0.25', SUMS, f'--workdir={workdir}',
    *s.training(steps), f'--config.checkpoint.every_steps={EVERY}', f'--config.log.eval_every_steps={2 * EVERY}',
    '--config.log.every_steps=100', '--config.log.tensorboard=true')
  watch = s.watch('train', process, last_step(workdir / 'metrics.jsonl'))
  s.finish('train', process)
  watch.join()
  lines = metrics(workdir)
  assert [line['step'] for line in lines if 'train/ce_nats' in line] == list(range(1, steps + 1))
  assert len(list((workdir / 'checkpoints').iterdir())) == 2  # keep
  checkpoint.check(checkpoint.find(str(workdir)))
  evaluations = sum('eval/main/ce_nats' in line for line in lines)
  return Load(watch, f'{steps:,} steps, {steps // EVERY} checkpoints, {evaluations} evaluations', 1000 / EVERY)


def rl(s: Soak, steps: int) -> Load:
  """Runs RL with a checkpoint every 10 steps. Every second problem goes to the verifier's workers."""
  s.model()
  workdir = s.root / 'rl'
  process = s.start(
    'rl', 'rl', f'--config=tests/tiny_rl.py:init_from={s.trained}', f'--workdir={workdir}',
    '--config.rl.task.uri=reasoning:chain_sum?max_terms=2&max_digits=1+decimal_chain_sum?max_terms=2&max_digits=1',
    f'--config.rl.steps={steps}', f'--config.checkpoint.every_steps={RL_EVERY}', '--config.log.eval_every_steps=20',
    '--config.log.every_steps=20', *s.settings.model)
  watch = s.watch('rl', process, last_step(workdir / 'metrics.jsonl'))
  s.finish('rl', process)
  watch.join()
  lines = metrics(workdir)
  assert [line['step'] for line in lines if 'train/pass_rate' in line] == list(range(1, steps + 1))
  checkpoint.check(checkpoint.find(str(workdir)))
  groups = sum(line.get('train/groups_learned_from', 0) for line in lines)
  return Load(watch, f'{steps:,} steps, {steps // RL_EVERY} checkpoints, {groups:,.0f} groups learned from',
              1000 / RL_EVERY)


def evaluation(s: Soak, prompts: int) -> Load:
  """Samples answers to many prompts from a file. The command is killed three times.

  No line may be lost, duplicated or different from a run without a kill. On a GPU lines may differ, because two
  processes may choose different algorithms for the same product, and because the number of rows that are decoded
  together depends on the other prompts.
  """
  s.model()
  workdir, file = s.root / 'eval', s.root / 'prompts.jsonl'
  shutil.copytree(s.trained, workdir)
  with open(file, 'w', encoding='utf-8') as out:
    for i in range(prompts):
      a, b = i // 400 + 1, i % 400
      question = f'State the final answer to the following arithmetic problem: {a} + {b} ='
      out.write(json.dumps({'question': question, 'answer': str(a + b)}) + '\n')
  few = max(prompts // 50, 10)
  args = ('eval', 'sample', f'--benchmark=jsonl:{file}', '--config.eval.sample.samples=1',
          '--config.eval.sample.max_new_tokens=24', '--config.eval.sample.decode_batch_size=64')
  # The first few without a kill, to compare with.
  reference = s.root / 'reference'
  shutil.copytree(s.trained, reference)
  s.finish('reference', s.start('reference', *args, f'--checkpoint={reference}',
                                f'--config.eval.sample.problems={few}'))
  [undisturbed] = (reference / 'eval' / 'samples').rglob('[0-9]*.jsonl')
  kills = [few // 2, prompts // 10, prompts // 5]
  lines = last_line(workdir / 'eval' / 'samples')
  for at in kills:
    process = s.start('eval', *args, f'--checkpoint={workdir}')
    while lines() < at and process.poll() is None:
      time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
  process = s.start('eval', *args, f'--checkpoint={workdir}')
  watch = s.watch('eval', process, lines)
  s.finish('eval', process)
  watch.join()
  [path] = (workdir / 'eval' / 'samples').rglob('[0-9]*.jsonl')
  expected = {line['problem']: line for line in map(json.loads, undisturbed.read_text().splitlines())}
  counts, different = collections.Counter(), 0
  with open(path, encoding='utf-8') as written:
    for line in map(json.loads, written):
      counts[line['problem']] += 1
      different += expected.get(line['problem'], line) != line
  assert sorted(counts) == list(range(prompts)) and set(counts.values()) == {1}, 'problems are lost or duplicated'
  assert not different or s.platform == 'gpu', f'{different} of the first {few} problems have another sample'
  return Load(watch, f'{prompts:,} prompts, each present once after {len(kills)} kills; {different:,} of the first '
                     f'{few:,} lines differ from a run without; file of {path.stat().st_size / 1e6:.0f} MB')


def data(s: Soak, gigabytes: float) -> Load:
  """Reads one epoch of a large prepared data set, as training reads it."""
  s.model()
  config = large(s, gigabytes)
  (s.root / 'walk.json').write_text(json.dumps(dataclasses.asdict(config)))
  process = s.start('walk', s.root / 'walk.json', module='tests.soak.walk')
  watch = s.watch('reader', process, last_step(s.root / 'walk.jsonl'))
  s.finish('walk', process)
  watch.join()
  manifest = prepared.read_manifest(prepared.folder(config, 'main'))['splits']['train']
  lines = (s.root / 'walk.jsonl').read_text().splitlines()
  walked = json.loads(lines[-1])
  assert walked['pairs'] == manifest['tokens'] - manifest['documents'], 'not every token was read once'
  shutil.rmtree(config.dir)
  size = sum(shard['size'] for shard in manifest['shards'])
  return Load(watch, f'{size / 1e9:.1f} GB in {manifest["documents"]:,} documents, every token read once in '
                     f'{walked["step"]:,} steps of {ROWS} rows of {ROW_TOKENS}')


def large(s: Soak, gigabytes: float) -> DataConfig:
  """Writes a prepared data set of random tokens, without tokenizing, with the code of `betarank data prepare`. Returns
  its config.
  """
  path = str(s.data / 'tokenizer.model')
  tokenizer = read_tokenizer(path)
  config = DataConfig(str(s.root / 'large'), path, tokenizer.vocab_size, {'main': SourceConfig('synthetic:', 1.0, 0)},
                      validation_fraction=0.0, sequence_length=ROW_TOKENS)
  job = Job('main', config, str(prepared.folder(config, 'main') / 'partial'))
  epath.Path(job.folder).mkdir(parents=True)
  rng = np.random.default_rng(0)
  form = records.Form(records.token_dtype(tokenizer.vocab_size))
  text = rng.integers(4, tokenizer.vocab_size, 2**24).astype(form.dtype)
  markers = []
  documents = int(gigabytes * 1e9 / (2 * DOCUMENT_TOKENS) / SHARDS)
  for index in range(SHARDS):
    shard = ShardWriter(job.stage(index, 0, 'train'), form)
    lengths = rng.integers(64, 2 * DOCUMENT_TOKENS - 64, documents)
    starts = rng.integers(0, len(text) - 2 * DOCUMENT_TOKENS, documents)
    for start, length in zip(starts.tolist(), lengths.tolist()):
      tokens = text[start : start + length].copy()
      tokens[0], tokens[-1] = tokenizer.bos, tokenizer.eos
      shard.add(tokens, None, 2 * length)
    markers.append({'unit': index, 'piece': 0, 'documents': documents, 'bad_rows': 0,
                    'splits': {'train': shard.close(), 'validation': {'documents': 0}}})
  publish.publish(job, tokenizer, markers, {})
  return config


def last_step(path: pathlib.Path) -> Callable[[], float]:
  """Returns a function that reads the step in the last line of a growing file."""
  def position() -> float:
    with contextlib.suppress(OSError, ValueError, IndexError), open(path, 'rb') as file:
      file.seek(max(0, os.path.getsize(path) - 8192))
      return json.loads(file.read().rsplit(b'\n', 2)[-2])['step']
    return 0
  return position


def last_line(folder: pathlib.Path) -> Callable[[], float]:
  """Returns a function that counts the lines of the growing file of samples in `folder`."""
  at, count = 0, 0

  def position() -> float:
    nonlocal at, count
    for path in folder.rglob('[0-9]*.jsonl'):
      size = path.stat().st_size
      if size < at:  # rewritten without the lines that a kill left incomplete
        at = count = 0
      with open(path, 'rb') as file:
        file.seek(at)
        new = file.read()
      at, count = at + len(new), count + new.count(b'\n')
    return count
  return position
